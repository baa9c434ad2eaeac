"""Mixture-of-Depths for streaming video-language models: the papers, and nothing else.

Every token belongs to a routing group, or to none (-1). A layer has a keep ratio r. Of each group of n tokens
the layer computes the `capacity(n, r)` best-scored ones; the others pass through unchanged. Tokens without a
group are always computed. VideoLLM-MoD (arXiv 2408.16730): the vision tokens of a frame are a group.
gamma-MoD (arXiv 2410.13859): the image and the text around it are one, and masked text is in none.

    here           paper     meaning
    B, T, D                  streams, tokens of the interleaved sequence, model width
    n, k                     tokens of a group; how many of them a layer computes
    keep ratio     r         share of a group that a layer computes; a tuple, one ratio a layer: the placement
    score          mu        what the router (the paper's LayerExpert) says of each token before any selection
    gate                     turns the score into the weight of the update
    keep                     (B, T) bool: does this layer compute this token?
    rows, K        X-hat     what a layer computes: (B, K, D), the kept tokens in order
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 2**62  # the position of a row that is no token: later than every query, so that none attends to it

# --- how many, and in which layers --------------------------------------------------------------------------


def capacity(n: int, keep_ratio: float) -> int:
    """k, how many of a group's n tokens a layer computes: r * n, rounded.    Eq. 2 of VideoLLM-MoD

    n: tokens of the group, >= 0;  keep_ratio: r in [0, 1], taken as the decimal that it is written as
    -> k: 0 for r = 0, n for r = 1, else at least 1 and at most n; halves round up. Nothing else here rounds.
    Note: the paper cuts at a percentile, which keeps no token where the scores tie; a count cannot.
    """
    check_keep_ratio(keep_ratio)
    k = math.floor(Fraction(str(keep_ratio)) * n + Fraction(1, 2))  # exact: in floats 100 * 0.07 is above 7
    return min(n, max(k, 1)) if keep_ratio > 0 else 0


def check_keep_ratio(keep_ratio: float) -> None:
    if not 0 <= keep_ratio <= 1:  # also refuses NaN
        raise ValueError(f"keep must be in [0, 1], got {keep_ratio}")


PLACEMENTS: dict[str, Callable[[int, int, float], float]] = {  # layer l of L, r -> its keep ratio
    "dense": lambda l, L, r: 1.0,
    "interleaved": lambda l, L, r: r if l % 2 else 1.0,  # the default of VideoLLM-MoD: 16 of 32 layers
    "interleaved-deep": lambda l, L, r: r if l in range(3, L, 2) else 1.0,
    "all": lambda l, L, r: r,
    "all-deep": lambda l, L, r: r if l >= 2 else 1.0,
    "two-of-three": lambda l, L, r: r if l % 3 else 1.0,  # a baseline of gamma-MoD
    "early-exit": lambda l, L, r: 0.0 if l >= 2 else 1.0,  # vision tokens leave after two layers
    "layer-skip": lambda l, L, r: 0.0 if l % 2 else 1.0,
    "cosine": lambda l, L, r: (  # p-MoD (arXiv 2412.04449): half a cosine from 1 to r, above 0.85 dense
        1.0 if (c := 0.5 + 0.5 * math.cos(math.pi * l / max(1, L - 1))) > 0.85 else max(r, round(c, 4))),
}


def placement(plan: str, layers: int, keep_ratio: float) -> tuple[float, ...]:
    """The placement of a model: one keep ratio a layer.    Sections 4.2 and 4.3 of VideoLLM-MoD

    plan: a name in PLACEMENTS;  layers: depth of the decoder;  keep_ratio: r of the routed layers
    """
    check_keep_ratio(keep_ratio)
    if plan not in PLACEMENTS:
        raise ValueError(f"plan must be one of {', '.join(PLACEMENTS)}, got {plan}")
    return tuple(float(PLACEMENTS[plan](layer, layers, keep_ratio)) for layer in range(layers))


def arank(q: Tensor, k: Tensor, real: Tensor, softmax: bool = True, window: int = 0) -> Tensor:
    """Rank of a layer's attention maps, mean over heads: how much the layer adds.    ARank of gamma-MoD

    q, k: (B, H, T, d), turned by RoPE if softmax;  real: (B, T) bool, right-padded -> (B,) float64
    softmax: as its code, the causal map (of `window` keys a query, if not 0) below its diagonal; else as its
    formula, (x W_Q)(x W_K)^T, whose rank is d for any long input. In float32, matrix_rank's default tolerance
    """
    ranks = []
    for sample, n in zip(q.float() @ k.float().mT, real.sum(1).tolist(), strict=True):
        maps = sample[:, :n, :n]  # (H, n, n): cut, since the tolerance grows with the size of a matrix
        if softmax:
            unseen = torch.ones_like(maps[0]).tril().triu(1 - (window or n)) == 0
            maps = (maps / math.sqrt(q.shape[-1])).masked_fill(unseen, -math.inf).softmax(-1).tril(-1)
        ranks.append(torch.linalg.matrix_rank(maps).double().mean())
    return torch.stack(ranks)


def rank_placement(ranks: list[float], keep_ratio: float, dense_layers: int = 0) -> tuple[float, ...]:
    """Layers of the highest ARank stay dense, the rest get the keep ratio.    Placement of gamma-MoD

    ranks: one a layer; of equals the earlier stays dense
    dense_layers: how many; 0: an eighth of the layers, at most 4: the paper has 4 of 32, and 4 of 40
    """
    highest = sorted(range(len(ranks)), key=lambda layer: -ranks[layer])
    dense = highest[: dense_layers or min(4, math.ceil(len(ranks) / 8))]
    return tuple(1.0 if layer in dense else float(keep_ratio) for layer in range(len(ranks)))


# --- which: groups, scores, selection -----------------------------------------------------------------------

MASKED: dict[str, tuple[str, ...]] = {  # whose text belongs to no group, so that it never skips
    "text": ("system", "user", "assistant"),  # VideoLLM-MoD; the others are of gamma-MoD
    "none": (), "question": ("user",), "question+answer": ("user", "assistant")}  # the paper: "question"


@dataclass(frozen=True)
class Groups:
    """Who competes with whom, and what each keep ratio leaves: all of routing that is known before any score.

    Planned on the host, so that every shape in the model is a host number and no layer waits for the device.
    """

    id: Tensor  # (B, T) int64, group of each token, -1: none
    real: Tensor  # (B, T) bool, False: padding
    size: Tensor  # (B, T) int64, n of the token's group
    index: Tensor  # (B, T) int64, place of the token in its group, 0 ... n - 1
    before: Tensor  # (B, T) int64, tokens of the same stream with a smaller group id
    late: Tensor  # (B, T) bool, decoded one by one after the group was chosen: each is a group, see select
    quota: dict[float, Tensor]  # r -> (B, T) int64, k of the token's group; T for text, 0 for padding
    width: dict[float, int]  # r -> K, the most tokens that any of the streams computes, late ones too

    @classmethod
    def plan(cls, id: Tensor, keep: tuple[float, ...], real: Tensor | None = None,
             late: Tensor | None = None) -> "Groups":
        """id: (B, T) int64 on the host;  keep: the placement;  real, late: (B, T) bool, None: all and none

        The tokens of a group need not be neighbours, and groups may differ in size in and between streams.
        """
        B, T = id.shape
        real = torch.ones_like(id, dtype=torch.bool) if real is None else real
        late = torch.zeros_like(real) if late is None else late
        ids, dense = torch.unique(id, return_inverse=True)  # dense: (B, T) in the same order, without gaps
        count = torch.zeros(B, len(ids), dtype=torch.int64).scatter_add_(1, dense, torch.ones_like(dense))
        size, before = count.gather(1, dense), (count.cumsum(1) - count).gather(1, dense)
        index = dense.argsort(dim=1, stable=True).argsort(dim=1) - before  # a place, made a rank
        n = size.where(id >= 0, 0)  # (B, T)
        table = {r: torch.tensor([capacity(i, r) for i in range(int(n.max()) + 1)]) for r in set(keep)}
        quota = {r: torch.where(id >= 0, k[n], T * real) for r, k in table.items()}
        width = {r: int((index < k).sum(1).max()) for r, k in quota.items()}
        return cls(id, real, size, index, before, late, quota, width)

    def to(self, device: torch.device) -> "Groups":
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors, quota={r: k.to(device) for r, k in self.quota.items()})


class Router(nn.Module):
    """mu = w . x, the importance of each token (LayerExpert): a linear map d -> 1.    Eq. 2 of VideoLLM-MoD

    x: (B, T, D) hidden states as they enter the layer -> (B, T) scores of any scale
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))  # model.initialise draws it, as all weights

    def forward(self, x: Tensor) -> Tensor:
        # A product and a sum in at least float32, not F.linear: among scores rounded to bf16, many tie.
        return (x * self.weight.to(torch.promote_types(x.dtype, torch.float32))).sum(-1)


def random_score(position: Tensor, layer: int, seed: Tensor) -> Tensor:
    """Scores drawn anew for each stream (its seed), layer and token.    Table 3 of VideoLLM-MoD, "Random"

    position: (B, T) int64;  seed: (B,) int64, names the stream -> (B, T) float32 in [0, 1]
    """
    prime = 2**31 - 1  # a hash, so a token draws in a stream what it draws in the whole; squares fit 62 bits
    h = (position % prime * 69621 + (seed[:, None] % prime * 16807 + layer * 48271 + 1)) % prime
    for step in range(4):
        h = (h * h + 40692 * h + step + 1) % prime
    return h.float() / prime


def uniform_score(groups: Groups, keep_ratio: float) -> Tensor:
    """Scores whose best k are evenly spaced in the group.    Table 3 of VideoLLM-MoD, "Uniform"

    -> (B, T) int64, <= 0. Token i is among the k best iff i * k mod n < k, which holds for exactly k of n.
    """
    return -(groups.index * groups.quota[keep_ratio] % groups.size)


def select(score: Tensor, groups: Groups, keep_ratio: float) -> Tensor:
    """Choose what a layer computes: the k best tokens of each group, and all text.    Eq. 2 of VideoLLM-MoD

    score: (B, T), compared only within a group -> keep: (B, T) bool; of equals the earlier, padding never
    Note: over the sequence, not per group, a token would see the future. A late one competes with nobody: it
    is computed if sigmoid(score) >= 0.5, as gamma-MoD's code decodes (always, of random or uniform scores).
    """
    by_score = score.argsort(dim=1, descending=True, stable=True)  # (B, T) best first, ties in order
    by_group = groups.id.gather(1, by_score).argsort(dim=1, stable=True)
    rank = by_score.gather(1, by_group).argsort(dim=1) - groups.before  # (B, T) 0: the best
    return (rank < groups.quota[keep_ratio]) & ((score >= 0) | ~groups.late)


# --- what happens to them: the routed update ----------------------------------------------------------------

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "linear": lambda score: score,  # Eq. 2 of VideoLLM-MoD to the letter
    "unit": lambda score: 2 * torch.sigmoid(score),  # a converted dense layer starts almost unchanged
}


def routed_update(
    block: Callable[..., Tensor], x: Tensor, score: Tensor, groups: Groups, keep_ratio: float,
    gate: Callable[[Tensor], Tensor], position: Tensor, *along: Tensor,
) -> tuple[Tensor, Tensor]:
    """y_i = x_i + g(s_i) (Block(X-hat)_i - x_i) if kept, y_i = x_i if skipped.    Eq. 2 of VideoLLM-MoD

    block: (rows (B, K, D), position (B, K), *along (B, K, ...)) -> (B, K, D), causal over its rows
    x: (B, T, D);  score: (B, T);  gate: one of GATES, or torch.ones_like for scores that are not learned
    position: (B, T) int64 and along: (B, T, ...) belong to tokens and travel with the kept ones, unchanged
    -> y: (B, T, D), skipped rows bit-identical to x;  keep: (B, T) bool
    Note: X-hat is gathered by index and in order, so attention over it is plain causal attention. A stream
    that keeps fewer than K tokens is filled up to the right with rows that nobody sees and that are dropped.
    """
    keep = select(score, groups, keep_ratio)
    if groups.width[keep_ratio] == 0:  # a chunk of a stream can hold nothing that this layer computes
        return x, keep
    index = (~keep).int().argsort(dim=1, stable=True)[:, : groups.width[keep_ratio]]  # (B, K)
    kept = keep.gather(1, index)  # (B, K) False: filler
    rows = take(x, index)  # (B, K, D)
    out = block(rows, take(position, index).where(kept, PADDING), *(take(t, index) for t in along))
    weight = gate(score.gather(1, index)).to(out.dtype).where(groups.id.gather(1, index) >= 0, 1)  # text: 1
    new = torch.lerp(rows, out, weight[..., None])  # the weight is on the whole update, never on the residual
    return x.scatter(1, index[..., None].expand_as(new), new.where(kept[..., None], rows)), keep


def routing_loss(score: Tensor, keep: Tensor, groups: Groups) -> Tensor:
    """Cross-entropy of sigmoid(score) towards what was selected.    Routing loss of gamma-MoD

    score: (B, T), keep: (B, T) bool, of one layer -> the mean over all tokens that belong to a group
    """
    target, member = keep.to(score.dtype), (groups.id >= 0).to(score.dtype)
    total = F.binary_cross_entropy_with_logits(score, target, member, reduction="sum")
    return total / member.sum().clamp(min=1)


def take(t: Tensor, index: Tensor) -> Tensor:
    """t: (B, T, ...), index: (B, K) -> (B, K, ...)"""
    shape = index.shape + t.shape[2:]
    return t.gather(1, index.reshape(index.shape + (1,) * (t.dim() - 2)).expand(shape))


# --- what it costs ------------------------------------------------------------------------------------------


def computed(keep: tuple[float, ...], text: int, frames: int, tokens_per_frame: int) -> list[int]:
    """Tokens that each layer computes: all text and, of each frame, its capacity.    Eq. 3 of VideoLLM-MoD"""
    return [text + frames * capacity(tokens_per_frame, r) for r in keep]


def flops(config: Any, tokens: list[int], frames: int = 0, head: int = 0, lora_rank: int = 0) -> dict:
    """Multiply-accumulates of one forward pass of one stream, by term.    Eq. 4 of VideoLLM-MoD

    config: a model.Config;  tokens: how many each layer computes;  frames: images encoded and projected
    head: tokens whose logits are computed;  lora_rank: of adapters on every linear layer, if not merged
    -> {term: MACs}; a MAC is two FLOPs
    Note: attention is not halved for causality, as in torch's FLOP counter; norms, activations, RoPE and the
    router are left out, as usual, and any encoder is a CLIP. The paper's equation has multi-head attention
    and a two-matrix FFN; its tables count what Llama-3 has, grouped queries and SwiGLU, and so do we.
    """
    d, m, q = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    v, ffn = config.vision_hidden_size, config.vision_intermediate_size
    linears = [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]  # q, k, v, o, gate, up, down
    patches = (config.image_size // config.patch_size) ** 2
    encoder_layer = (patches + 1) * (4 * v * v + 2 * v * ffn) + 2 * (patches + 1) ** 2 * v
    return {
        "linears": sum(a * b for a, b in linears) * sum(tokens),
        "attention": sum(2 * n * n * q for n in tokens),
        "head": head * d * config.vocab_size,
        "lora": lora_rank * (sum(a + b for a, b in linears) * sum(tokens) + head * (d + config.vocab_size)),
        "projector": frames * config.tokens_per_frame * (v * d + d * d),
        "vision": frames * (patches * 3 * config.patch_size**2 * v + config.vision_layers * encoder_layer),
    }
