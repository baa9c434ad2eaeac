"""Mixture-of-Depths for streaming video-language models: the method, and nothing else.

Every token belongs to a routing group, or to none (-1). A layer has a keep ratio r. Of each group
of n tokens the layer computes the `capacity(n, r)` best-scored ones; the others pass through
unchanged. Tokens without a group are always computed. Two papers are two choices of the groups:

    VideoLLM-MoD (arXiv 2408.16730)  the vision tokens of each frame are a group; text has none
    gamma-MoD (arXiv 2410.13859)     the picture and the text are one group; masked text has none

    here           paper     meaning
    B, T, D                  streams, tokens of the interleaved sequence, model width
    n, k                     tokens of a group, and how many of them a layer computes
    keep ratio     r         share of a group that a layer computes
    score          mu        what the router (the paper's LayerExpert) says of each token
    gate           g         turns the score into the weight of the update
    keep                     (B, T) bool: does this layer compute this token?  In a model's config
                             and in --keep: keep ratios
    rows, K        X-hat     the kept tokens in order, (B, K, D)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The position of a row that holds no token: later than every real query, so none attends to it.
PADDING = 2**62

# --- the definition -------------------------------------------------------------------------------


def routed_layer(
    block: Callable,
    x: Tensor,
    score: Sequence[Tensor],
    group: list[int],
    keep_ratio: float,
    gate: Callable[[Tensor], Tensor],
    weigh: str = "update",
) -> tuple[Tensor, list[int]]:
    """One routed layer over one stream, as a plain loop. `routed_update` is the same, batched.

    It is for r < 1: where nothing is chosen nothing is weighed, and the model calls the block
    directly. One more rule, for late tokens, is in `select`.

    block: (rows (K, D), their K positions, K weights of their values) -> (K, D), causal over the
        rows that it is given
    x: (T, D) hidden states;  score: T numbers;  group: T ids, -1 for none;  weigh: one of WEIGHED
    -> y: (T, D), and the positions of the tokens that were computed
    """
    weight = {t: 1.0 for t in range(len(x)) if group[t] == -1}  # always computed, weight 1
    for g in set(group) - {-1}:
        members = [t for t in range(len(x)) if group[t] == g]
        best_first = sorted(members, key=lambda t: -score[t])  # of equals the earlier comes first
        for t in best_first[: capacity(len(members), keep_ratio)]:
            weight[t] = gate(score[t])
    kept = sorted(weight)
    value_weight = [weight[t] if weigh == "update+values" else 1.0 for t in kept]
    computed = block(x[kept], kept, value_weight)  # skipped tokens are no queries, keys or values
    y = x.clone()
    for row, t in enumerate(kept):
        y[t] = x[t] + weight[t] * (computed[row] - x[t])
    return y, kept  # skipped tokens leave the layer bit-identical


# --- how many -------------------------------------------------------------------------------------


def capacity(n: int, keep_ratio: float) -> int:
    """k, how many of a group's n tokens a layer computes: r * n, rounded.    Eq. 2 of VideoLLM-MoD

    n: tokens of the group, >= 0;  keep_ratio: r in [0, 1], taken as the decimal it is written as
    -> k: 0 for r = 0, n for r = 1, else from 1 to n (of 0 tokens 0). Halves round up.
    Note: the paper cuts at a percentile, which keeps no token where scores tie. A count always
    keeps k.
    """
    check_keep_ratio(keep_ratio)
    k = math.floor(Fraction(str(keep_ratio)) * n + Fraction(1, 2))  # as floats, 0.07 * 100 > 7
    return min(n, max(k, 1)) if keep_ratio > 0 else 0


def check_keep_ratio(keep_ratio: float) -> None:
    if not 0 <= keep_ratio <= 1:  # also refuses NaN
        raise ValueError(f"keep must be in [0, 1], got {keep_ratio}")


# --- which: groups, scores, selection -------------------------------------------------------------

MASKED: dict[str, tuple[str, ...]] = {  # roles whose text belongs to no group, so it never skips
    "text": ("system", "user", "assistant"),  # VideoLLM-MoD; the other three are gamma-MoD's
    "none": (),
    "question": ("user",),  # the default of gamma-MoD's paper
    "question+answer": ("user", "assistant"),
}


@dataclass(frozen=True)
class Groups:
    """Who competes with whom, and how many win: all of routing that is known before any score.

    It is computed on the CPU before the forward pass: so all shapes are Python ints, and no layer
    waits for the GPU.
    """

    id: Tensor  # (B, T) int64, group of each token, -1: none (below, these count as one group)
    real: Tensor  # (B, T) bool, False: padding
    size: Tensor  # (B, T) int64, n, tokens in the token's group
    place: Tensor  # (B, T) int64, place of the token in its group, 0 ... n - 1
    before: Tensor  # (B, T) int64, where the group starts when tokens are sorted by group
    quota: dict[float, Tensor]  # r -> (B, T) int64, k of the group; id -1: T, padding: 0
    max_kept: dict[float, int]  # r -> K, the most tokens that a stream may compute
    late: Tensor  # (B, T) bool, decoded text that has a group, its own: see select

    @classmethod
    def plan(
        cls,
        id: Tensor,
        keep: tuple[float, ...],
        real: Tensor | None = None,
        late: Tensor | None = None,
    ) -> "Groups":
        """id: (B, T) int64 on the host, -1 for padding too;  keep: the placement

        real, late: (B, T) bool; by default all tokens are real and none is late
        Tokens of a group need not be neighbours. Groups may differ in size, streams too.
        """
        B, T = id.shape
        real = torch.ones_like(id, dtype=torch.bool) if real is None else real
        late = torch.zeros_like(real) if late is None else late
        ids, column = torch.unique(id, return_inverse=True)  # column: (B, T) place in ids
        count = torch.zeros(B, len(ids), dtype=torch.int64)
        count.scatter_add_(1, column, torch.ones_like(column))  # (B, ids) tokens of each group
        size = count.gather(1, column)  # (B, T)
        before = (count.cumsum(1) - count).gather(1, column)
        place = inverse(column.argsort(dim=1, stable=True)) - before
        n = size.where(id >= 0, 0)
        quota, max_kept = {}, {}
        for r in set(keep):
            k = torch.tensor([capacity(i, r) for i in range(int(n.max()) + 1)])
            quota[r] = torch.where(id >= 0, k[n], T * real)
            max_kept[r] = int((place < quota[r]).sum(1).max())
        return cls(id, real, size, place, before, quota, max_kept, late)

    def to(self, device: torch.device) -> "Groups":
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors, quota={r: k.to(device) for r, k in self.quota.items()})


def inverse(order: Tensor) -> Tensor:
    """order: (B, T), each row lists the tokens 0 ... T - 1 -> (B, T) the place of each"""
    B, T = order.shape
    place = torch.arange(T, device=order.device).expand(B, T)
    return torch.empty_like(order).scatter_(1, order, place)


class Router(nn.Module):
    """mu = w . x, the importance of each token: a linear map from D to 1.    Eq. 2 of VideoLLM-MoD

    x: (B, T, D) hidden states as they enter the layer -> (B, T) scores, read as logits: 0 is
    the middle for the gates `sigmoid` and `unit`, and for late tokens
    normed: score x / rms(x), as where a decoder was trained before. In SmolLM2 rms(x) grows from
    0.1 to 30 over the layers, and is 1,000 at the first token: there w . x is nowhere near 0.
    """

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))  # model.initialise draws it
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        # A product and a sum in at least float32, not F.linear: in bfloat16 many scores tie.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.normed:
            x = F.rms_norm(x, x.shape[-1:])
        return (x * self.weight).sum(-1)


def random_score(position: Tensor, layer: int, seed: Tensor) -> Tensor:
    """Scores drawn anew for each stream, layer and token.    Table 3 of VideoLLM-MoD, "Random"

    position: (B, T) int64;  seed: (B,) int64, names the stream -> (B, T) float32 in [0, 1]
    Note: a hash of the position, so a token has the same score in a chunk as in the whole stream.
    """
    prime = 2**31 - 1  # squares fit 62 bits
    start = position % prime * 69621 + seed[:, None] % prime * 16807
    h = (start + layer * 48271 + 1) % prime
    for step in range(4):
        h = (h * h + 40692 * h + step + 1) % prime
    return h.float() / prime


def uniform_score(groups: Groups, keep_ratio: float) -> Tensor:
    """Scores whose best k are evenly spaced in the group.    Table 3 of VideoLLM-MoD, "Uniform"

    -> (B, T) int64, <= 0. Token i is among the k best if i * k mod n < k, true of exactly k of n.
    """
    return -(groups.place * groups.quota[keep_ratio] % groups.size)


def select(score: Tensor, groups: Groups, keep_ratio: float) -> Tensor:
    """What a layer computes: the k best of each group, all without one.    Eq. 2 of VideoLLM-MoD

    score: (B, T), compared only within a group -> keep: (B, T) bool; of equals the earlier wins
    Note: a group must arrive in one chunk. A choice among tokens that arrive later would use the
    future. In gamma-MoD the prompt is all there before the answer; answers that may skip break this
    rule in training, where they compete with it.
    """
    # place            0   1   2   3   4   5   6   7
    # group           -1   0   0   0  -1   1   1   1
    # score            0   3   9   5   0   2   2   8
    # order            0   4 | 2   3   1 | 7   5   6      group by group, the best first
    # token's place    0   4   2   3   1   6   7   5      in that order
    # groups.before    0   2   2   2   0   5   5   5
    # rank             0   2   0   1   1   1   2   0      place - before
    # quota, r = 0.4   8   1   1   1   8   1   1   1
    # keep             x       x       x           x      rank < quota
    best_first = score.argsort(dim=1, descending=True, stable=True)
    by_group = groups.id.gather(1, best_first).argsort(dim=1, stable=True)
    order = best_first.gather(1, by_group)
    rank = inverse(order) - groups.before
    best = rank < groups.quota[keep_ratio]
    # A late token is fed alone, in a group of one. gamma-MoD computes it if sigmoid(score) >= 0.5.
    return best & ((score >= 0) | ~groups.late)


# --- what happens to them: the routed update ------------------------------------------------------


def raw_score(score: Tensor) -> Tensor:
    return score


def twice_sigmoid(score: Tensor) -> Tensor:
    return 2 * torch.sigmoid(score)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "linear": raw_score,  # Eq. 2 of VideoLLM-MoD to the letter
    "unit": twice_sigmoid,  # 1 for a score of 0: a converted dense layer starts almost unchanged
}
# What the gate weighs. "update": what the layer adds to a token, as in both papers. So a router
# learns from what later layers read of the token, and that of the last layer learns nothing.
# "update+values": also the token's value vector, which others read in this layer.
WEIGHED = ("update", "update+values")


def routed_update(
    block: Callable,
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    groups: Groups,
    keep_ratio: float,
    weigh: str,
    position: Tensor,
    rope: Tensor,
    cache: object = None,
) -> tuple[Tensor, Tensor]:
    """y = x + g(s) (Block(X-hat) - x) for kept tokens, y = x for skipped.    Eq. 2 of VideoLLM-MoD

    block: (rows (B, K, D), position (B, K), rope (B, K, ...), value_weight (B, K) or None, cache)
        -> (B, K, D), causal
    x: (B, T, D);  score: (B, T);  weight: (B, T) g(s), read of tokens that have a group
    weigh: one of WEIGHED
    position: (B, T) int64 and rope: (B, T, ...) go along with the kept tokens, unchanged
    -> y: (B, T, D), skipped rows bit-identical to x;  keep: (B, T) bool
    Note: rows are gathered by index and in order, so attention over them is plain causal attention.
    A stream that keeps fewer than K tokens is filled up to K with filler rows. No real query
    attends to them, and their result is thrown away.
    """
    keep = select(score, groups, keep_ratio)
    K = groups.max_kept[keep_ratio]
    if K == 0:  # a chunk of a stream can hold nothing that this layer computes
        return x, keep
    index = (~keep).int().argsort(dim=1, stable=True)[:, :K]  # (B, K) the kept ones, then filler
    kept = keep.gather(1, index)  # (B, K) False: filler
    rows = gather_rows(x, index)  # (B, K, D)
    at = gather_rows(position, index).where(kept, PADDING)
    weight = weight.where(groups.id >= 0, 1).gather(1, index)  # (B, K)
    value_weight = weight if weigh == "update+values" else None
    out = block(rows, at, gather_rows(rope, index), value_weight, cache)
    # `out` contains `rows`: the weight is of what the block adds, not of the residual.
    new = torch.lerp(rows, out, weight.to(out.dtype)[..., None])
    new = new.where(kept[..., None], rows)
    return x.scatter(1, index[..., None].expand_as(new), new), keep


def gather_rows(t: Tensor, index: Tensor) -> Tensor:
    """t: (B, T, ...), index: (B, K) -> (B, K, ...)"""
    B, K = index.shape
    index = index.reshape(B, K, *[1] * (t.dim() - 2))
    return t.gather(1, index.expand(B, K, *t.shape[2:]))


def routing_loss(score: Tensor, keep: Tensor, groups: Groups) -> Tensor:
    """Cross-entropy of sigmoid(score) towards what was selected.    Routing loss of gamma-MoD

    score: (B, T), keep: (B, T) bool, of one layer -> the mean over all tokens that have a group
    """
    target = keep.to(score.dtype)
    member = (groups.id >= 0).to(score.dtype)
    total = F.binary_cross_entropy_with_logits(score, target, member, reduction="sum")
    return total / member.sum().clamp(min=1)


# --- in which layers: placements ------------------------------------------------------------------


def cosine_ratio(l: int, L: int, r: float) -> float:
    """p-MoD (arXiv 2412.04449): half a cosine over depth, from 1 to r; dense above 0.85."""
    ratio = 0.5 + 0.5 * math.cos(math.pi * l / max(1, L - 1))
    return 1.0 if ratio > 0.85 else max(r, round(ratio, 4))


PLACEMENTS: dict[str, Callable[[int, int, float], float]] = {  # layer l of L, r -> its keep ratio
    "dense": lambda l, L, r: 1.0,
    "interleaved": lambda l, L, r: r if l % 2 else 1.0,  # the default of VideoLLM-MoD
    "interleaved-deep": lambda l, L, r: r if l % 2 and l > 1 else 1.0,
    "all": lambda l, L, r: r,
    "all-deep": lambda l, L, r: r if l >= 2 else 1.0,
    "two-of-three": lambda l, L, r: r if l % 3 else 1.0,  # a baseline of gamma-MoD
    "early-exit": lambda l, L, r: 0.0 if l >= 2 else 1.0,  # vision tokens leave after two layers
    "layer-skip": lambda l, L, r: 0.0 if l % 2 else 1.0,
    "cosine": cosine_ratio,
}


def placement(plan: str, layers: int, keep_ratio: float) -> tuple[float, ...]:
    """The placement of a model: one keep ratio per layer.    Sections 4.2 and 4.3 of VideoLLM-MoD

    plan: a name in PLACEMENTS;  layers: depth of the decoder;  keep_ratio: r of the routed layers
    """
    check_keep_ratio(keep_ratio)
    if plan not in PLACEMENTS:
        raise ValueError(f"plan must be one of {', '.join(PLACEMENTS)}, got {plan}")
    ratio_of = PLACEMENTS[plan]
    keep = [float(ratio_of(l, layers, keep_ratio)) for l in range(layers)]
    return tuple(keep)


def rank_placement(
    ranks: list[float], keep_ratio: float, dense_layers: int = 0
) -> tuple[float, ...]:
    """Layers of the highest ARank stay dense, the rest get r.    Placement of gamma-MoD

    ranks: one per layer; of equals the earlier stays dense
    dense_layers: how many; 0: an eighth of the layers, at most 4 (the paper: 4 of 32 and of 40)
    """
    if dense_layers > len(ranks):
        raise ValueError(f"dense_layers must be at most {len(ranks)}, got {dense_layers}")
    dense_layers = dense_layers or min(4, math.ceil(len(ranks) / 8))
    highest_first = sorted(range(len(ranks)), key=lambda layer: -ranks[layer])
    dense = highest_first[:dense_layers]
    keep = [1.0 if layer in dense else float(keep_ratio) for layer in range(len(ranks))]
    return tuple(keep)


def arank(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """Rank of the attention maps, mean over heads: how much a layer adds.    ARank of gamma-MoD

    q, k: (B, H, T, d), turned by RoPE;  real: (B, T) bool, right-padded
    -> (B,) float64; ranks are taken in float32 with the default tolerance of matrix_rank
    Note: a map is causal, after its softmax, and below its diagonal, as in gamma-MoD's code. The
    formula (x W_Q)(x W_K)^T has rank d for any long input, so it cannot tell layers apart.
    """
    B, H, T, d = q.shape
    ranks = []
    for b in range(B):
        n = int(real[b].sum())
        # Cut to the real tokens, since the tolerance grows with the size of a matrix.
        maps = (q[b].float() @ k[b].float().mT)[:, :n, :n]  # (H, n, n)
        future = torch.ones_like(maps[0]).triu(1).bool()
        maps = (maps / math.sqrt(d)).masked_fill(future, -math.inf).softmax(-1).tril(-1)
        ranks.append(torch.linalg.matrix_rank(maps).double().mean())
    return torch.stack(ranks)
