"""A video-language model from scratch: a CLIP-style patch encoder, a projector, a Llama-style
decoder with routed layers, and the ragged cache with which it watches a stream. Parameters have the
names that Hugging Face gives them.

    B, T, D    streams, tokens, model width         F, P    frames, vision tokens of a frame
    H, G, d    query heads, key/value heads, width of a head        K    rows that a layer computes
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mod
from mod import GATES, MASKED, PADDING, WEIGHED, Groups, Router, gather_rows

LEARNED = ("learned", "shared")  # a router of its own for each routed layer, or one for all of them
ROUTERS = (*LEARNED, "random", "uniform")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights in files


@dataclass(frozen=True)
class Config:
    """Everything needed to rebuild a model. `keep` is the placement: one keep ratio per layer."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3  # so `interleaved` routes the middle one, whose router learns
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 320
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    image_size: int = 48  # pixels, square
    patch_size: int = 8
    pool: int = 6  # a frame is CLS and a pool x pool grid
    vision_hidden_size: int = 96
    vision_intermediate_size: int = 288
    vision_layers: int = 2
    vision_heads: int = 4
    keep: tuple[float, ...] = (1.0, 1.0, 1.0)
    router: str = "learned"
    gate: str = "unit"
    weigh: str = "update"  # train.py has another default
    masked: str = "text"
    router_norm: bool = False  # routers score x / rms(x), of a decoder that was trained before

    usual_flags: ClassVar[dict[str, float | str]] = {}  # of train.py, for models of this kind

    def __post_init__(self) -> None:
        check_fields(self)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        rule = "be a multiple of num_key_value_heads"
        self.must("num_attention_heads", heads % groups == 0, rule)
        self.must("head_dim", self.head_dim % 2 == 0, "be even")
        width, heads = self.vision_hidden_size, self.vision_heads
        self.must("vision_hidden_size", width % heads == 0, "be a multiple of vision_heads")
        self.must("vision_layers", self.vision_layers <= 1000, "be at most 1000")
        side = self.image_size // self.patch_size
        self.must("pool", self.pool <= side, f"be at most {side}, the patches of a side")
        self.must("keep", len(self.keep) == self.num_hidden_layers, "have one ratio a layer")
        for ratio in self.keep:
            mod.check_keep_ratio(ratio)
        choices = {"router": ROUTERS, "gate": GATES, "weigh": WEIGHED, "masked": MASKED}
        for name, known in choices.items():
            self.must(name, getattr(self, name) in known, f"be one of {', '.join(known)}")

    def must(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} must {rule}, got {getattr(self, name)}")

    @property
    def tokens_per_frame(self) -> int:
        return 1 + self.pool**2

    @property
    def masked_roles(self) -> tuple[str, ...]:
        """Whose text never skips"""
        return MASKED[self.masked]


def check_fields(config: object) -> None:
    """Raises ValueError unless each field has the type of its default, and numbers are above 0.

    Fields named in the class attribute `may_be_zero` may be 0.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        if kind is tuple and f.metadata:  # a flag that may be repeated: a list of texts
            continue
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"{f.name} must be of type {kind.__name__}, got {value!r:.60}")
        if kind is tuple and not {type(x) for x in value} <= {int, float}:
            raise ValueError(f"{f.name} must be numbers, got {value!r:.60}")
        if kind in (int, float):
            check_range(f.name, value, f.name in getattr(config, "may_be_zero", ()))


def check_range(name: str, value: float, may_be_zero: bool) -> None:
    if not (0 < value < 2**31 or (value == 0 and may_be_zero)):
        least = "at least" if may_be_zero else "above"
        raise ValueError(f"{name} must be {least} 0 and below 2**31, got {value!r:.60}")


PRESETS = {
    "tiny": Config(),
    "coarse": Config(patch_size=16, pool=3),  # 1 + 3 x 3 tokens per frame, as VideoLLM-MoD
    "deep": Config(num_hidden_layers=8, keep=(1.0,) * 8),  # of --task vqa
}


def preset(name: str) -> Config:
    """A dense Config by name."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name]


# --- patch encoder and projector ------------------------------------------------------------------


class VisionMLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.act = F.gelu
        self.fc1 = nn.Linear(c.vision_hidden_size, c.vision_intermediate_size)
        self.fc2 = nn.Linear(c.vision_intermediate_size, c.vision_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm transformer block: every patch sees every patch."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        width = c.vision_hidden_size
        self.heads = c.vision_heads
        self.layer_norm1 = nn.LayerNorm(width)
        self.layer_norm2 = nn.LayerNorm(width)
        projections = {f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")}
        self.self_attn = nn.ModuleDict(projections)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        qkv = []
        for name in ("q_proj", "k_proj", "v_proj"):
            split = self.self_attn[name](x).unflatten(-1, (self.heads, -1))  # (N, L, H, d)
            qkv.append(split.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(*qkv)  # (N, H, L, d)
        return self.self_attn["out_proj"](mixed.transpose(1, 2).flatten(2))  # (N, L, D)


class VisionModel(nn.Module):
    """Frames to vision tokens: CLS, then the patch grid averaged.    Section 3.1 of VideoLLM-MoD

    Both are taken from the last hidden state, after the final norm.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        width, patch = c.vision_hidden_size, c.patch_size
        self.side, self.pool = c.image_size // patch, c.pool
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding(self.side**2 + 1, width)
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.pre_layrnorm = nn.LayerNorm(width)  # spelled so in Hugging Face's files
        blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (N, 3, S, S) uint8 -> (N, P, vision width), the grid row by row"""
        x = self.hidden(self.normalise(pixels))  # (N, 1 + h * w, D)
        return self.pool_grid(x[:, :1], x[:, 1:])

    def normalise(self, pixels: Tensor) -> Tensor:
        """0 ... 255 -> -1 ... 1"""
        return pixels.to(self.post_layernorm.weight.dtype) / 127.5 - 1

    def hidden(self, x: Tensor) -> Tensor:
        """x: (N, 3, S, S) normalised -> (N, 1 + h * w, D); CLS is first"""
        return self.post_layernorm(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """All of `hidden` but the final norm"""
        x = self.embeddings.patch_embedding(x).flatten(2).mT  # (N, h * w, D)
        cls = self.embeddings.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        for block in self.encoder["layers"]:
            x = block(x)
        return x

    def pool_grid(self, cls: Tensor, patches: Tensor) -> Tensor:
        """cls: (N, 1, D), patches: (N, h * w, D) -> (N, 1 + p * p, D)"""
        grid = patches.mT.unflatten(2, (self.side, self.side))  # (N, D, h, w)
        grid = F.adaptive_avg_pool2d(grid, self.pool).flatten(2).mT  # (N, p * p, D)
        return torch.cat([cls, grid], dim=1)


class Projector(nn.Module):
    """Two-layer MLP from the width of the encoder to that of the decoder, as in LLaVA."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c.vision_hidden_size, c.hidden_size)
        self.linear_2 = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


# --- decoder --------------------------------------------------------------------------------------


def rope_frequencies(head_dim: int, theta: float) -> list[float]:
    """How far each pair of a head's numbers turns per position, in radians: d/2 numbers"""
    return [theta ** -(pair / head_dim) for pair in range(0, head_dim, 2)]


def rotations(position: Tensor, frequency: list[float]) -> Tensor:
    """cos and sin of the RoPE angles, in float64: float32 loses them beyond some 100,000 tokens.

    position: (B, T) int64;  frequency: of `rope_frequencies` -> (B, T, 2, d/2) float64
    """
    speed = torch.tensor(frequency, dtype=torch.float64, device=position.device)
    angle = position.double()[..., None] * speed  # (B, T, d/2)
    return torch.stack([angle.cos(), angle.sin()], dim=2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x: (B, T, heads, d), rope: (B, T, 2, d/2) -> (B, T, heads, d), its halves turned"""
    cos, sin = rope[:, :, None, 0], rope[:, :, None, 1]  # (B, T, 1, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention over the rows it is given, and over those in the cache."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=False)

    def heads(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, D) -> q: (B, H, K, d), k and v: (B, G, K, d)"""
        B, K, _ = x.shape
        q = rotate(self.q_proj(x).view(B, K, -1, self.head_dim), rope)
        k = rotate(self.k_proj(x).view(B, K, -1, self.head_dim), rope)
        v = self.v_proj(x).view(B, K, -1, self.head_dim)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        rope: Tensor,
        value_weight: Tensor | None = None,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        B, K, _ = x.shape
        q, k, v = self.heads(x, rope)
        if value_weight is not None:  # before the cache: it holds what others may read
            v = v * value_weight[:, None, :, None].to(v.dtype)
        key_position = position
        if cache is not None:
            k, v, key_position = cache.append(k, v, position)  # (B, G, L, d) twice, (B, L)
        if k.shape[2] == K:  # there is no past: the rows are all there is, and in order
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = attend_to_past(q, k, v, position, key_position)
        return self.o_proj(out.transpose(1, 2).reshape(B, K, -1))


def attend_to_past(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, key_position: Tensor
) -> Tensor:
    """A query sees every key that is not later than itself.

    q: (B, H, K, d), at position (B, K);  k, v: (B, G, L, d), at key_position (B, L) -> (B, H, K, d)
    """
    B, H, K, d = q.shape
    G = k.shape[1]
    mask = key_position[:, None, None, :] <= position[:, None, :, None]  # (B, 1, K, L)
    # Fold the query heads that share a key head into the query axis: keys need no repeating.
    q = q.reshape(B, G, H // G * K, d)
    mask = mask.repeat(1, 1, H // G, 1)
    return F.scaled_dot_product_attention(q, k, v, mask).reshape(B, H, K, d)


class MLP(nn.Module):
    """SwiGLU"""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A layer of Llama. It knows nothing of routing: it computes the rows it is given.

    x: (B, K, D);  position: (B, K);  rope: (B, K, 2, d/2) -> (B, K, D)
    value_weight: (B, K) multiplies each row's value vector, None: by 1
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        rope: Tensor,
        value_weight: Tensor | None = None,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, position, rope, value_weight, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Inputs(NamedTuple):
    """A batch as the model and its loss want it, on the device."""

    tokens: Tensor  # (B, T) int64, -1 at vision tokens
    frames: Tensor  # (B, F, 3, S, S) uint8 pixels, or (B, F, P, W) features of a frozen encoder
    groups: Groups
    seed: Tensor  # (B,) int64, names the streams, for a random router
    at: Tensor  # (M,) int64, the labelled places among the B * T
    target: Tensor  # (M,) int64, the token to predict there
    decision: Tensor  # (M,) bool, is it a decision to speak or stay silent?


def prepare(
    batch: NamedTuple, config: Config, device: torch.device, late: Tensor | None = None
) -> Inputs:
    """Every batch enters the model through here: groups are planned on the CPU, then all moves.

    batch: a data.Batch;  late: (B, T) bool, see mod.Groups
    """
    groups = Groups.plan(batch.group, config.keep, batch.real, late)
    labels = batch.labels.flatten()
    at = (labels >= 0).nonzero()[:, 0]
    decision = batch.decision.flatten()[at]
    moved = [t.to(device) for t in (batch.seed, at, labels[at], decision)]
    return Inputs(batch.tokens.to(device), batch.frames.to(device), groups.to(device), *moved)


class Output(NamedTuple):
    hidden: Tensor  # (B, T, D) after the last layer, before the final norm
    keep: dict[int, Tensor]  # routed layer -> (B, T) bool, the tokens it computed
    score: dict[int, Tensor]  # layer with a router -> (B, T) its scores


class VideoLM(nn.Module):
    """Frames and text in, a hidden state per token out. A placement of ones is the dense model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        # Frozen as in VideoLLM-MoD: one drawn at random tells patches apart, which is enough here.
        self.vision_model = VisionModel(c).requires_grad_(False)
        self.multi_modal_projector = Projector(c)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.rope_frequency = rope_frequencies(c.head_dim, c.rope_theta)
        self.routers = nn.ModuleDict()
        for layer, r in enumerate(c.keep):
            if 0 < r < 1 and c.router in LEARNED:
                self.routers[self.router_name(layer)] = Router(c.hidden_size, c.router_norm)

    def router_name(self, layer: int) -> str:
        """Name of the layer's router in `routers`"""
        return "shared" if self.config.router == "shared" else str(layer)

    def forward(
        self,
        tokens: Tensor,
        frames: Tensor,
        groups: Groups,
        seed: Tensor,
        cache: "Cache | None" = None,
    ) -> Output:
        """One pass over whole sequences, or over the next chunk of streams with a past in `cache`.

        tokens, frames, groups, seed: as in Inputs; frames are those of the chunk, in order
        Raises ValueError if the chunk splits a group.
        """
        B, T = tokens.shape
        x = self.embed(tokens, frames)  # (B, T, D)
        start = cache.advance(groups) if cache else 0  # (B, 1)
        position = (start + torch.arange(T, device=tokens.device)).expand(B, T)
        position = position.where(groups.real, PADDING)
        return self.run_layers(x, position, groups, seed, cache)

    def run_layers(
        self,
        x: Tensor,
        position: Tensor,
        groups: Groups,
        seed: Tensor,
        cache: "Cache | None" = None,
    ) -> Output:
        """x: (B, T, D), position: (B, T). Nothing in it waits for the device."""
        rope = rotations(position, self.rope_frequency).to(x.dtype)
        keep, score = {}, {}
        for layer in range(len(self.layers)):
            x, kept, scored = self.run_layer(layer, x, position, rope, groups, seed, cache)
            if kept is not None:
                keep[layer] = kept
            if scored is not None:
                score[layer] = scored
        return Output(x, keep, score)

    def run_layer(
        self,
        layer: int,
        x: Tensor,
        position: Tensor,
        rope: Tensor,
        groups: Groups,
        seed: Tensor,
        cache: "Cache | None" = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer -> x: (B, T, D), keep and score: (B, T)

        keep is None in a dense layer, score is None without a learned router.
        """
        r, block = self.config.keep[layer], self.layers[layer]
        held = cache.layers[layer] if cache else None
        if r == 1:
            return block(x, position, rope, cache=held), None, None
        score = self.score(layer, x, position, groups, seed)
        learned = r > 0 and self.config.router in LEARNED
        weight = GATES[self.config.gate](score) if learned else torch.ones_like(score)
        weigh = self.config.weigh
        x, keep = mod.routed_update(
            block, x, score, weight, groups, r, weigh, position, rope, held
        )
        return x, keep, score if learned else None

    def score(
        self, layer: int, x: Tensor, position: Tensor, groups: Groups, seed: Tensor
    ) -> Tensor:
        """(B, T) what `select` ranks in this layer. At a keep ratio of 0 any score will do."""
        name = self.router_name(layer)
        if name in self.routers:
            return self.routers[name](x)
        if self.config.router == "random":
            return mod.random_score(position, layer, seed)
        return mod.uniform_score(groups, self.config.keep[layer])

    def embed(self, tokens: Tensor, frames: Tensor) -> Tensor:
        """Text from the embedding table; where tokens are -1, the frames' vision tokens in order"""
        x = self.embed_tokens(tokens.clamp(min=0))  # (B, T, D)
        B, T, D = x.shape
        if frames.shape[1] == 0:
            return x
        features = frames if frames.dim() == 4 else self.vision_model(frames.flatten(0, 1))
        features = features.to(self.multi_modal_projector.linear_1.weight.dtype)
        vision = self.multi_modal_projector(features).view(B, -1, D).to(x.dtype)  # (B, F * P, D)
        nth = ((tokens < 0).cumsum(1) - 1).clamp(min=0)  # (B, T) which vision token
        return torch.where((tokens < 0)[..., None], gather_rows(vision, nth), x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary). Ask only for rows that are read."""
        return self.lm_head(self.norm(hidden))

    # What a pretrained model does otherwise (extras/pretrained_model.py overrides these four).

    def learned_state(self) -> dict[str, Tensor]:
        """The weights that a run saves, by name"""
        return self.state_dict()

    def rerouted(self, config: Config, seed: int) -> "VideoLM":
        """The same weights in a model of another placement; the routers that it lacks are drawn."""
        model = initialise(type(self)(config), seed)
        model.load_state_dict(self.state_dict(), strict=False)
        return model

    def adapt_source(self, source: object, folder: Path) -> object:
        """What a source of streams must do for this model in the run `folder`: nothing"""
        return source

    def uses_muon(self, name: str, p: Tensor) -> bool:
        """Matrices of blocks and projector learn by Muon, everything else by AdamW."""
        return p.dim() == 2 and ("layers." in name or "projector" in name)


@torch.no_grad()
def layer_ranks(model: VideoLM, inputs: Inputs) -> Tensor:
    """(B, L) float64, `mod.arank` of each layer of a dense model"""
    if min(model.config.keep) < 1:
        raise ValueError(f"ARank must be measured on a dense run, got keep {model.config.keep}")
    x, ranks = model.embed(inputs.tokens, inputs.frames), []
    position = torch.ones_like(inputs.tokens).cumsum(1) - 1  # (B, T)
    rope = rotations(position, model.rope_frequency).to(x.dtype)
    for block in model.layers:
        q, k, _ = block.self_attn.heads(block.input_layernorm(x), rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, d)
        ranks.append(mod.arank(q, k, inputs.groups.real))
        x = block(x, position, rope)
    return torch.stack(ranks, dim=1)


def streaming_loss(
    model: VideoLM, hidden: Tensor, at: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """sum of w * cross-entropy over the labelled places / their number.    Eq. 1 of VideoLLM-MoD

    hidden: (B, T, D);  at, target: (M,) as in Inputs; only there logits are computed
    weight: (M,) float, 1 on reply tokens, sigma on the decisions to speak or stay silent
    """
    logits = model.logits(hidden.flatten(0, 1)[at])  # (M, vocabulary)
    loss = F.cross_entropy(logits.float(), target, reduction="none")  # (M,)
    return (weight * loss).sum() / max(1, len(at))


def initialise(model: VideoLM, seed: int) -> VideoLM:
    """Draw every weight from `seed`, on the device where it is."""
    generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
    for name, p in model.named_parameters():
        draw_weight(name, p, generator)
    return model


@torch.no_grad()
def draw_weight(name: str, p: Tensor, generator: torch.Generator) -> None:
    """Linear maps at 1/sqrt(fan-in), 0.3 of it where they write to the residual."""
    writes_residual = name.split(".")[-2] in ("o_proj", "down_proj", "out_proj", "fc2")
    if p.dim() > 1:
        table = "embed_tokens" in name or "position_embedding" in name
        std = 0.5 if table else p[0].numel() ** -0.5
        p.normal_(0, std * (0.3 if writes_residual else 1), generator=generator)
    elif name.startswith("routers"):  # a bias too, if a router has one
        # Scores begin near 0, so that a few steps can turn their order.
        p.normal_(0, 0.1 * p.numel() ** -0.5, generator=generator)
    elif "class_embedding" in name:
        p.normal_(0, p.numel() ** -0.5, generator=generator)
    else:
        p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


# --- the ragged streaming cache -------------------------------------------------------------------


class LayerCache:
    """Keys, values and positions of the tokens that one layer computed, for B streams.

    A row with position PADDING fills up a stream beside a longer one; no real query attends to it.
    """

    def __init__(self, kv: Tensor, position: Tensor) -> None:
        self.kv = kv  # (2, B, G, room, d)
        self.position = position  # (B, room)
        self.length = 0  # rows in use, the same for all streams

    def append(self, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v: (B, G, K, d), position: (B, K) -> the same of all rows in use"""
        start, end = self.length, self.length + k.shape[2]
        self.kv[:, :, :, start:end] = torch.stack([k, v])
        self.position[:, start:end] = position
        self.length = end
        k, v = self.kv[:, :, :, :end]
        return k, v, self.position[:, :end]

    def reserve(self, rows: int) -> None:
        """Grow by an eighth at least: spare rows cost memory, and growing costs a copy."""
        room = self.position.shape[1]
        if rows >= room:  # one spare row: torch.compile would build a second graph for a full one
            more = max(rows + 1, room + room // 8 + 64) - room
            self.kv = F.pad(self.kv, (0, 0, 0, more))
            self.position = F.pad(self.position, (0, more), value=PADDING)

    def drop(self, stays: Tensor) -> None:
        """Keep only the rows with stays: (B, length) bool, in order."""
        rows = int(stays.sum(1).max())
        index = (~stays).int().argsort(dim=1, stable=True)[:, :rows]  # (B, rows)
        kept = [gather_rows(t.transpose(1, 2), index).transpose(1, 2) for t in self.kv]
        self.kv[:, :, :, :rows] = torch.stack(kept)
        position = self.position[:, : self.length].where(stays, PADDING)
        self.position[:, :rows] = gather_rows(position, index)
        self.length = rows


class Cache:
    """What B streams have seen. Each layer holds only the tokens that it computed.

    A token's position is its place in the stream, not its row in a layer. So dense, routed and
    evicted layers share one rule: a query sees the keys at its own position or earlier. Within a
    stream, group ids must grow from chunk to chunk.
    """

    def __init__(self, model: VideoLM, streams: int) -> None:
        c, weight = model.config, model.embed_tokens.weight
        kv = weight.new_empty(2, streams, c.num_key_value_heads, 0, c.head_dim)
        position = weight.new_empty(streams, 0, dtype=torch.int64)
        self.keep = c.keep
        self.layers = [LayerCache(kv, position) for _ in c.keep]
        self.seen = weight.new_zeros(streams, 1, dtype=torch.int64)  # tokens so far
        self.last_group = torch.full_like(self.seen, -1)

    def advance(self, groups: Groups) -> Tensor:
        """Count a chunk in -> (B, 1) the position of its first token"""
        again = (groups.id >= 0) & (groups.id <= self.last_group)
        if bool(again.any()):
            group = int(groups.id[again][0])
            raise ValueError(f"a chunk must not split a group, got {group} again")
        start = self.seen
        self.last_group = torch.maximum(self.last_group, groups.id.amax(1, keepdim=True))
        self.seen = start + groups.real.sum(1, keepdim=True)
        B, T = groups.id.shape
        for layer, r in zip(self.layers, self.keep, strict=True):
            layer.reserve(layer.length + (T if r == 1 else groups.max_kept[r]))
        return start


class Window(Cache):
    """A cache that forgets all but the first text and the last frames, each with its text."""

    def __init__(self, model: VideoLM, streams: int, frames: int) -> None:
        super().__init__(model, streams)
        if frames < 1:
            raise ValueError(f"window must be at least 1 frame, got {frames}")
        # Tokens before the first frame, and where each of the last frames begins, at first 0
        self.first_text = torch.full_like(self.seen, PADDING)
        self.starts = self.seen.expand(streams, frames)

    def advance(self, groups: Groups) -> Tensor:
        first = groups.id[:, :2].amax(1, keepdim=True)  # a stream's first token has no group
        if bool(((groups.id >= 0) & (groups.id != first)).any()):
            raise ValueError(
                "with a window, a chunk must begin with its only frame, got text or two frames"
            )
        start = super().advance(groups)
        gets_frame = first >= 0
        self.first_text = torch.minimum(self.first_text, start.where(gets_frame, PADDING))
        starts = torch.cat([self.starts[:, 1:], start], dim=1)
        self.starts = starts.where(gets_frame, self.starts)
        oldest = self.starts[:, :1]
        if bool((gets_frame & (oldest > self.first_text)).any()):
            for layer in self.layers:
                at = layer.position[:, : layer.length]
                layer.drop(((at < self.first_text) | (at >= oldest)) & (at < PADDING))
        return start


# --- nothing below is in the papers: run folders and flags ----------------------------------------


def save(folder: Path, model: VideoLM, step: int = 0) -> None:
    """Write config.json and model.safetensors; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(model.config))
    weights = {name: t.contiguous() for name, t in model.learned_state().items()}
    about = {"step": str(step)}
    write(folder / "model.safetensors", lambda path: save_file(weights, path, metadata=about))


def load(folder: Path, device: torch.device | str = "cpu") -> VideoLM:
    """Rebuild the model of a run. Raises ValueError naming the file that does not fit."""
    file = folder / "config.json"
    more = read_json(file).keys() - {f.name for f in fields(Config)}
    if more:  # it was pretrained
        try:
            from extras.pretrained_model import load_run
        except ImportError as error:
            rule = f"{file} must have the fields of Config alone where extras/ is not there"
            raise ValueError(f"{rule}, got {', '.join(sorted(more))[:60]} too ({error})") from None
        return load_run(folder, device)
    config = read_config(folder)
    try:
        with torch.device("meta"):  # weights have a shape, and no memory yet
            model = VideoLM(config)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"{file} must be of a model that can be held, got {error}") from None
    path = folder / "model.safetensors"
    fill(model, read_weights(path)[0], path)
    return model.to(device)


def fill(model: VideoLM, found: dict[str, Tensor], file: Path) -> None:
    """Give a model these weights. Raises ValueError naming the first that does not fit."""
    check_fit(model.learned_state(), found, file)
    model.load_state_dict(found, strict=False, assign=True)


def check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], file: Path) -> None:
    wanted = {name: list(t.shape) for name, t in wanted.items()}
    shapes = {}
    for name, t in found.items():
        shapes[name] = list(t.shape) if t.dtype in FLOATS else t.dtype
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            rule = f"{printable(name)[:99]} must be {wanted.get(name, 'absent')}"
            got = shapes.get(name, "nothing")
            raise ValueError(f"{file} must fit config.json: {rule}, got {got}")


def read_config(folder: Path, kind: type[Config] = Config) -> Config:
    file = folder / "config.json"
    try:
        values = read_json(file)
        lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        return kind(**{**values, **lists})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must hold the Config of a model: {error}") from None


def read_weights(path: Path) -> tuple[dict[str, Tensor], int]:
    """A safetensors file -> its tensors by name, and the training step of its metadata"""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            return weights, int((file.metadata() or {}).get("step", 0))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write under a temporary name, then rename: nobody sees half a file, nor on a full disk."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        fill(unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} must be written whole: {error}") from None
    finally:  # also on KeyboardInterrupt
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, values: dict | list) -> None:
    text = json.dumps(values, indent=1) + "\n"
    write(path, lambda unfinished: unfinished.write_text(text))


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must be a JSON object, got {type(values).__name__}")
    return values


def flag(default: object, help: str, positional: bool = False) -> object:
    """A dataclass field that is also a flag; `help` is its only documentation."""
    return field(default=default, metadata={"help": help, "positional": positional})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def parse(cls: type, argv: list[str] | None, doc: str) -> tuple[object, set[str]]:
    """One flag per field of a dataclass -> an instance of it, and the names of the fields given.

    The flag of a tuple may be repeated, and gives a list of texts.

    Raises ValueError for what is no flag or no value of one, and as the dataclass does.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        description=doc,
        allow_abbrev=False,
        formatter_class=formatter,
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(cls):
        kind, help = type(f.default), f.metadata["help"]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            how = {"action": "append"}
        else:
            how = {"type": kind}
            help += "" if f.default == "" else f" (default: {f.default})"
        if f.metadata["positional"]:
            parser.add_argument(f.name, nargs="?", help=help)
        else:
            parser.add_argument(f"--{f.name}", help=help, **how)
    given = vars(parser.parse_args(argv))
    return cls(**given), set(given)


def pick_device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name not in ("", "cpu", "cuda") or (name == "cuda" and not there):
        raise ValueError(f"device must be cpu or, where there is one, cuda, got {name}")
    return torch.device(name or ("cuda" if there else "cpu"))


def printable(text: str) -> str:
    """Replace control characters: what a model or a file says must not steer the terminal."""
    return "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)


def run_main(main: Callable[[list[str] | None], None]) -> None:
    """Call a main function; a user's mistake or too little memory ends in a sentence, status 2."""
    try:
        main(None)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(of|allocate) memory", str(error)):
            raise
        text = f"{Path(sys.argv[0]).name}: error: {str(error) or 'out of memory'}"
        print(printable(text), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
