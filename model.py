"""A video-language model from scratch: CLIP-style patch encoder, projector, Llama-style decoder with routed
layers, and the ragged cache with which it watches a stream. Parameters carry their Hugging Face names.

    B, T, D    streams, tokens, model width        F, P    frames, vision tokens of a frame (1 + pool * pool)
    H, G, d    query heads, key/value heads, width of a head        K    rows that a routed layer computes
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mod
from mod import GATES, MASKED, PADDING, Groups, Router, take

ROUTERS = ("learned", "shared", "random", "uniform")


@dataclass(frozen=True)
class Config:
    """Everything needed to rebuild a model. `keep` is the placement: one keep ratio a layer, 1 = dense."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
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
    keep: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    router: str = "learned"
    gate: str = "sigmoid"
    masked: str = "text"

    def __post_init__(self):
        check_fields(self)
        for name, part in (("image_size", "patch_size"), ("vision_hidden_size", "vision_heads"),
                           ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, name) % getattr(self, part):
                raise ValueError(f"{name} must be a multiple of {part}, got {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.pool > self.image_size // self.patch_size:
            raise ValueError(f"pool must be at most the patches of a side, got {self.pool}")
        if len(self.keep) != self.num_hidden_layers:
            raise ValueError(f"keep must have one ratio a layer, got {self.keep}")
        for ratio in self.keep:
            mod.check_keep_ratio(ratio)
        for name, known in (("router", ROUTERS), ("gate", GATES), ("masked", MASKED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)}")

    @property
    def tokens_per_frame(self) -> int:
        return 1 + self.pool**2


def check_fields(config: object, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless each field is of the type of its default, and each number above 0."""
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{f.name} must be of type {kind.__name__}, got {value!r}")
        if kind in (int, float) and not (0 < value < 2**31 or (value == 0 and f.name in may_be_zero)):
            least = "at least" if f.name in may_be_zero else "above"
            raise ValueError(f"{f.name} must be {least} 0 and below 2**31, got {value}")


LARGE = Config(  # what the 7B models share: 32 layers of width 4096 and a ViT-L
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, head_dim=128, keep=(1.0,) * 32,
    vision_hidden_size=1024, vision_intermediate_size=4096, vision_layers=24, vision_heads=16)
PRESETS = {
    "tiny": Config(),
    "deep": Config(num_hidden_layers=8, keep=(1.0,) * 8),  # of --task vqa
    "llama3-8b": replace(  # VideoLLM-MoD: its decoder, an encoder as large as SigLIP-L/16, 1 + 3 x 3 tokens
        LARGE, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
        image_size=384, patch_size=16, pool=3),
    "vicuna-7b": replace(  # gamma-MoD: its decoder, an encoder as large as CLIP-L/14, CLS and 576 patches
        LARGE, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000,
        image_size=336, patch_size=14, pool=24),
}


def preset(name: str) -> Config:
    """A dense Config by name."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name]


# --- patch encoder and projector ----------------------------------------------------------------------------


class VisionBlock(nn.Module):
    """Pre-norm transformer block of CLIP: every patch sees every patch."""

    def __init__(self, width: int, ffn: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in projections})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, ffn), "fc2": nn.Linear(ffn, width)})

    def forward(self, x: Tensor) -> Tensor:
        N, L, D = x.shape
        a, normed = self.self_attn, self.layer_norm1(x)
        q, k, v = a["q_proj"](normed), a["k_proj"](normed), a["v_proj"](normed)  # (N, L, D) each
        q, k, v = (t.view(N, L, self.heads, -1).transpose(1, 2) for t in (q, k, v))  # (N, H, L, d)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D)
        x = x + a["out_proj"](mixed)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class VisionModel(nn.Module):
    """Frames to vision tokens: CLS, then the patch grid averaged to p x p.    Section 3.1 of VideoLLM-MoD"""

    def __init__(self, c: Config):
        super().__init__()
        width, self.pool = c.vision_hidden_size, c.pool
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, c.patch_size, stride=c.patch_size, bias=False)
        self.embeddings.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, width)
        self.pre_layrnorm = nn.LayerNorm(width)  # spelled so in the files
        sizes = width, c.vision_intermediate_size, c.vision_heads
        blocks = nn.ModuleList(VisionBlock(*sizes) for _ in range(c.vision_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (N, 3, S, S) in [-1, 1] -> (N, P, vision width), the grid row by row"""
        grid = self.embeddings.patch_embedding(pixels)  # (N, D, h, w)
        N, D, h, w = grid.shape
        cls = self.embeddings.class_embedding.expand(N, 1, D)
        x = torch.cat([cls, grid.flatten(2).mT], dim=1)  # (N, 1 + h * w, D)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        for block in self.encoder["layers"]:
            x = block(x)
        x = self.post_layernorm(x)
        pooled = F.adaptive_avg_pool2d(x[:, 1:].mT.reshape(N, D, h, w), self.pool)  # (N, D, pool, pool)
        return torch.cat([x[:, :1], pooled.flatten(2).mT], dim=1)  # (N, P, D)


class Projector(nn.Module):
    """Two-layer MLP from the width of the encoder to that of the decoder, as in LLaVA and VideoLLM-online."""

    def __init__(self, c: Config):
        super().__init__()
        self.linear_1 = nn.Linear(c.vision_hidden_size, c.hidden_size)
        self.linear_2 = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


# --- decoder ------------------------------------------------------------------------------------------------


def rotations(position: Tensor, head_dim: int, theta: float) -> Tensor:
    """cos and sin of the RoPE angles, computed in float64: float32 loses them beyond some 100,000 tokens.

    position: (B, T) int64 -> (B, T, 2, d/2) float64
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position.device).double() / head_dim)
    angle = position.double()[..., None] * frequency  # (B, T, d/2)
    return torch.stack([angle.cos(), angle.sin()], dim=2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x: (B, T, heads, d), rope: (B, T, 2, d/2) -> (B, T, heads, d), its halves turned against each other"""
    cos, sin = rope[:, :, None, 0], rope[:, :, None, 1]  # (B, T, 1, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention over the rows it is given, and over what its layer has in the cache."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def heads(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, D) -> q: (B, H, K, d), k and v: (B, G, K, d)"""
        B, K, _ = x.shape
        q, k, v = (proj(x).view(B, K, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, position: Tensor, rope: Tensor, remember: Callable | None) -> Tensor:
        B, K, _ = x.shape
        q, k, v = self.heads(x, rope)
        mask = None
        if remember:
            k, v, seen = remember(k, v, position[:, None, :, None])  # (B, G, L, d) twice, (B, 1, L, 1)
            mask = seen.mT <= position[:, None, :, None]  # (B, 1, K, L)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, K, -1))


class MLP(nn.Module):
    """SwiGLU"""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A layer of Llama. It knows nothing of routing: it computes the rows it is given, at their positions."""

    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, position: Tensor, rope: Tensor, remember: Callable | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position, rope, remember)  # (B, K, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Output(NamedTuple):
    hidden: Tensor  # (B, T, D) after the last layer, before the final norm
    keep: dict[int, Tensor]  # routed layer -> (B, T) bool, the tokens it computed
    score: dict[int, Tensor]  # layer with a router -> (B, T) what it said of them


class VideoLM(nn.Module):
    """Frames and text in, a hidden state for each token out. A placement of ones is the dense baseline."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.vision_model, self.multi_modal_projector = VisionModel(c), Projector(c)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        names = [self.router_of(layer) for layer, r in enumerate(c.keep) if 0 < r < 1]  # shared: one for all
        self.routers = nn.ModuleDict({name: Router(c.hidden_size) for name in names if name})

    def router_of(self, layer: int) -> str:
        """The name of a layer's router; "" where scores are not learned."""
        return {"learned": str(layer), "shared": "shared"}.get(self.config.router, "")

    def forward(self, tokens: Tensor, frames: Tensor, groups: Groups, seed: Tensor | None = None,
                cache: "Cache | None" = None) -> Output:
        """One pass over whole sequences, or over the next chunk of streams whose past is in `cache`.

        tokens: (B, T) int64, -1 at vision tokens;  frames: (B, F, 3, S, S) uint8, those of the chunk in order
        groups: of these tokens;  seed: (B,) int64, names the streams (only the random router asks)
        Raises ValueError if the chunk splits a group.
        """
        B, T = tokens.shape
        x = self.embed(tokens, frames)  # (B, T, D)
        start = cache.advance(groups) if cache else 0  # (B, 1)
        position = (start + torch.arange(T, device=tokens.device)).expand(B, T).where(groups.real, PADDING)
        rope = rotations(position, self.config.head_dim, self.config.rope_theta).to(x.dtype)
        seed = tokens.new_zeros(B) if seed is None else seed
        keep, scores = {}, {}
        for layer, (block, r) in enumerate(zip(self.layers, self.config.keep, strict=True)):
            if cache:
                block = partial(block, remember=partial(cache.append, layer))
            if r == 1:  # nothing is chosen, so nothing is weighed
                x = block(x, position, rope)
            else:
                score, gate = self.score(layer, x, groups, position, seed), torch.ones_like
                if r > 0 and self.router_of(layer):
                    scores[layer], gate = score, GATES[self.config.gate]
                x, keep[layer] = mod.routed_update(block, x, score, groups, r, gate, position, rope)
        return Output(x, keep, scores)

    def embed(self, tokens: Tensor, frames: Tensor) -> Tensor:
        """Text from the embedding table, the vision tokens of the frames in order at the places marked -1."""
        pixels = frames.flatten(0, 1).to(self.lm_head.weight.dtype) / 127.5 - 1  # (B * F, 3, S, S)
        x = self.embed_tokens(tokens.clamp(min=0))  # (B, T, D)
        if len(pixels) == 0:
            return x
        vision = self.multi_modal_projector(self.vision_model(pixels))  # (B * F, P, D)
        vision = vision.view(len(x), -1, x.shape[-1]).to(x.dtype)  # (B, F * P, D)
        nth = ((tokens < 0).cumsum(1) - 1).clamp(min=0)  # (B, T) which vision token
        return torch.where((tokens < 0)[..., None], take(vision, nth), x)

    def score(self, layer: int, x: Tensor, groups: Groups, position: Tensor, seed: Tensor) -> Tensor:
        """(B, T) what `select` ranks in this layer. At a keep ratio of 0 any score will do."""
        if self.router_of(layer) in self.routers:
            return self.routers[self.router_of(layer)](x)
        if self.config.router == "random":
            return mod.random_score(position, layer, seed)
        return mod.uniform_score(groups, self.config.keep[layer])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary). Ask only for rows that are read: vision tokens predict nothing."""
        return self.lm_head(self.norm(hidden))


@torch.no_grad()
def layer_ranks(model: VideoLM, tokens: Tensor, frames: Tensor, real: Tensor, softmax: bool = True) -> Tensor:
    """(B, L) float64, `mod.arank` of each layer of a dense model; arguments: of forward, softmax of arank"""
    c = model.config
    if min(c.keep) < 1:
        raise ValueError(f"ARank must be measured on a dense run, got one of keep {c.keep}")
    x, position, ranks = model.embed(tokens, frames), torch.ones_like(tokens).cumsum(1) - 1, []
    rope, still = (rotations(p, c.head_dim, c.rope_theta).to(x.dtype) for p in (position, 0 * position))
    for block in model.layers:
        q, k, _ = block.self_attn.heads(block.input_layernorm(x), rope if softmax else still)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, d)
        ranks.append(mod.arank(q, k, real, softmax))
        x = block(x, position, rope)
    return torch.stack(ranks, dim=1)


def streaming_loss(model: VideoLM, hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """sum of w * cross-entropy over the labelled positions / their number.    Eq. 1 of VideoLLM-MoD

    hidden: (B, T, D);  labels: (B, T) int64 on the host, the token to predict there, -100: none
    weight: (B, T) float on the host, 1 on replies, sigma on the decisions to speak or stay silent
    """
    at = (labels.flatten() >= 0).nonzero()[:, 0]  # (M,) found on the host, so that the device need not wait
    target, w, rows = (t.to(hidden.device) for t in (labels.flatten()[at], weight.flatten()[at], at))
    logits = model.logits(hidden.flatten(0, 1)[rows])  # (M, vocabulary)
    return (w * F.cross_entropy(logits.float(), target, reduction="none")).sum() / max(1, len(at))


@torch.no_grad()
def initialise(model: VideoLM, seed: int) -> VideoLM:
    """Draw weights from (seed): linear maps at 1/sqrt(fan-in), 0.3 of it where they write to the residual."""
    generator, outputs = torch.Generator().manual_seed(seed), ("o_proj", "down_proj", "out_proj", "fc2")
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = 0.5 if "embed_tokens" in name or "position_embedding" in name else p[0].numel() ** -0.5
            p.normal_(0, std * (0.3 if name.split(".")[-2] in outputs else 1), generator=generator)
        elif name.startswith("routers") or "class_embedding" in name:
            tenth = 0.1 if name.startswith("routers") and model.config.gate == "unit" else 1  # weights near 1
            p.normal_(0, tenth * p.numel() ** -0.5, generator=generator)
        else:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


# --- the ragged streaming cache -----------------------------------------------------------------------------


class Cache:
    """Keys and values of B streams. Each layer holds only the tokens that it computed.

    Where streams differ in how many those are, or a late token skips, the rest is rows of position PADDING.
    A position comes from one counter a stream, never from the length of a layer, and stays with its token. So
    one rule serves full, routed and evicted layers, streams of any length: a query sees what is not later.
    Within a stream, group ids must grow from chunk to chunk.
    window: None, or W: the first text stays, and the last W frames, each with the text that follows it
    """

    def __init__(self, config: Config, streams: int = 1, window: int | None = None,
                 device: torch.device | str = "cpu"):
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 frame, got {window}")
        self.rows: list[tuple[Tensor, ...]] = [()] * config.num_hidden_layers  # k, v, position; room for more
        self.length = [0] * config.num_hidden_layers  # rows in use
        self.seen = torch.zeros(streams, 1, dtype=torch.int64, device=device)  # tokens so far
        self.last_group = torch.full_like(self.seen, -1)
        self.first_text = torch.full_like(self.seen, PADDING)  # its length, once the first frame is there
        self.starts = None if window is None else self.seen.expand(streams, window)  # of the last W frames

    def advance(self, groups: Groups) -> Tensor:
        """Count a chunk in -> (B, 1) the position of its first token; drop what leaves the window"""
        start, seen_before = self.seen, (groups.id >= 0) & (groups.id <= self.last_group)
        if bool(seen_before.any()):
            raise ValueError(f"a chunk must not split a group, got {int(groups.id[seen_before][0])} again")
        if self.starts is not None and bool((groups.id >= 0).any()):
            self.slide(groups.id, start)
        self.last_group = torch.maximum(self.last_group, groups.id.amax(1, keepdim=True))
        self.seen = start + groups.real.sum(1, keepdim=True)
        return start

    def slide(self, id: Tensor, start: Tensor) -> None:
        """id: (B, T), start: (B, 1). In streams that have W frames and get one, the oldest leaves."""
        if bool(((id >= 0) & (id != id[:, :1])).any()):
            raise ValueError("with a window, a chunk must begin with its only frame, got text or two frames")
        gets_one = id[:, :1] >= 0  # (B, 1)
        self.first_text = torch.minimum(self.first_text, start.where(gets_one, PADDING))
        self.starts = torch.cat([self.starts[:, 1:], start], dim=1).where(gets_one, self.starts)  # (B, W)
        oldest = self.starts[:, :1]
        for layer, rows in enumerate(self.rows if bool((oldest > self.first_text).any()) else ()):
            if not rows:
                continue
            k, v, position = (t[:, :, : self.length[layer]] for t in rows)
            at = position[:, 0, :, 0]  # (B, L)
            stay = ((at < self.first_text) | (at >= oldest)) & (at < PADDING)
            index = (~stay).int().argsort(dim=1, stable=True)[:, : int(stay.sum(1).max())]  # (B, L')
            held = (k, v, position.where(stay[:, None, :, None], PADDING))
            self.length[layer] = 0
            self.append(layer, *(take(t.transpose(1, 2), index).transpose(1, 2) for t in held))

    def append(self, layer: int, k: Tensor, v: Tensor, position: Tensor) -> list[Tensor]:
        """k, v: (B, G, K, d), position: (B, 1, K, 1) of what a layer computed -> the same of all it holds"""
        n, total = self.length[layer], self.length[layer] + k.shape[2]
        if not self.rows[layer] or total > self.rows[layer][0].shape[2]:  # seldom: the room doubles
            room = tuple(t.new_empty(*t.shape[:2], max(2 * total, 64), t.shape[3]) for t in (k, v, position))
            for new, old in zip(room, self.rows[layer], strict=False):
                new[:, :, :n] = old[:, :, :n]
            self.rows[layer] = room
        for held, new in zip(self.rows[layer], (k, v, position), strict=True):
            held[:, :, n:total] = new
        self.length[layer] = total
        return [t[:, :, :total] for t in self.rows[layer]]


# --- nothing below is in the papers: run folders and flags --------------------------------------------------


def save(folder: Path, model: VideoLM, step: int = 0) -> None:
    """Write config.json and model.safetensors; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(model.config))
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    write(folder / "model.safetensors", lambda path: save_file(weights, path, metadata={"step": str(step)}))


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it: nobody ever sees half of it."""
    unfinished = path.with_name(path.name + ".partial")
    fill(unfinished)
    os.replace(unfinished, path)


def write_json(path: Path, values: dict) -> None:
    write(path, lambda unfinished: unfinished.write_text(json.dumps(values, indent=1) + "\n"))


def load(folder: Path, device: torch.device | str = "cpu") -> VideoLM:
    """Rebuild the model of a run folder. Raises ValueError, naming the file, where something does not fit."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
        config = Config(**{**values, "keep": tuple(values["keep"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} must hold the Config of a model: {error}") from None
    weights = read_weights(folder / "model.safetensors")[0]
    with torch.device("meta"):
        model = VideoLM(config)
    wanted = {name: list(t.shape) for name, t in model.state_dict().items()}
    found = {name: list(t.shape) if t.is_floating_point() else t.dtype for name, t in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{folder / 'model.safetensors'} must fit {file.name}: {name} must be "
                             f"{wanted.get(name, 'absent')}, got {found.get(name, 'nothing')}")
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def read_weights(path: Path) -> tuple[dict[str, Tensor], int]:
    """A safetensors file -> its tensors by name, and the training step after which they were saved"""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            return weights, int((file.metadata() or {}).get("step", 0))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None


def opt(default: object, help: str, positional: bool = False) -> object:
    """A dataclass field that is also a flag; `help` is its only documentation."""
    return field(default=default, metadata={"help": help, "positional": positional})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def parse(cls: type, argv: list[str] | None, doc: str) -> tuple[object, set[str]]:
    """One flag per field of a dataclass -> an instance of it, and the names of the fields that were given.

    Raises ValueError for what is no flag or no value of one, and as the dataclass does.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=doc, allow_abbrev=False, formatter_class=formatter)
    for f in fields(cls):
        kind, positional = type(f.default), f.metadata["positional"]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        how |= {"nargs": "?"} if positional else {}
        text = f.metadata["help"] + ("" if kind is bool or f.default == "" else f" (default: {f.default})")
        name = f.name if positional else f"--{f.name}"
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    return cls(**given), set(given)


def pick_device(name: str) -> torch.device:
    if name not in ("", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu or, where there is one, cuda, got {name}")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def printable(text: str) -> str:
    """Models and files can say any bytes; a terminal must not obey them."""
    return "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)


def run(main: Callable[[list[str] | None], None]) -> None:
    """Call a main function; a user's mistake (ValueError, OSError) ends in one sentence and exit status 2."""
    try:
        main(None)
    except (ValueError, OSError) as error:
        print(printable(f"{Path(sys.argv[0]).name}: error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
