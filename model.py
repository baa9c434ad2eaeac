"""A video-language model from scratch: CLIP-style patch encoder, projector, Llama-style decoder with routed
layers, and the ragged cache with which it watches a stream. Parameters carry their Hugging Face names.

    B, T, D    streams, tokens, model width        F, P    frames, vision tokens of a frame (1 + pool * pool)
    H, G, d    query heads, key/value heads, width of a head        K    rows that a routed layer computes
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mod
from mod import GATES, MASKED, PADDING, Groups, Router, take

LEARNED = {"learned": str, "shared": lambda layer: "shared"}  # router -> what a layer's is called
ROUTERS = (*LEARNED, "random", "uniform")
VISION_TYPES = ("scratch", "clip", "siglip")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights in files
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


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
    new_tokens: int = 0  # the last of the vocabulary, unknown to the pretrained decoder
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()  # (factor,): linear;  (factor, low, high, original length): Llama 3
    sliding_window: int = 0  # positions that a query looks back on, 0: all (Mistral)
    attention_bias: bool = False  # of q, k and v (Qwen2)
    output_bias: bool = False  # of o
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    image_size: int = 48  # pixels, square
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixels in [0, 1], as the encoder wants them
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    patch_size: int = 8
    pool: int = 6  # a frame is CLS and a pool x pool grid
    vision_type: str = "scratch"
    vision_hidden_size: int = 96
    vision_intermediate_size: int = 288
    vision_layers: int = 2
    vision_heads: int = 4
    vision_act: str = "gelu"
    vision_norm_eps: float = 1e-5
    keep: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    router: str = "learned"
    gate: str = "sigmoid"
    masked: str = "text"
    llm: str = ""  # Hugging Face folders; what is not learnt of their weights is not saved with a run
    vision: str = ""
    train_vision: bool = False
    lora_rank: int = 0  # 0: no adapters, the decoder itself is learnt
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self, ("new_tokens", "sliding_window", "lora_rank", "lora_dropout"))
        known = {"router": ROUTERS, "gate": GATES, "masked": MASKED, "vision_type": VISION_TYPES,
                 "vision_act": ACTIVATIONS}
        scaling, std, side = self.rope_scaling, self.image_std, self.image_size // self.patch_size
        for name, holds, must in (
                # so that a damaged file cannot ask for millions of layers
                ("num_hidden_layers", self.num_hidden_layers <= 1000, "be at most 1000"),
                ("vision_layers", self.vision_layers <= 1000, "be at most 1000"),
                ("vision_hidden_size", self.vision_hidden_size % self.vision_heads == 0,
                 "be a multiple of vision_heads"),
                ("num_attention_heads", self.num_attention_heads % self.num_key_value_heads == 0,
                 "be a multiple of num_key_value_heads"),
                ("head_dim", self.head_dim % 2 == 0, "be even"),
                ("rope_scaling", len(scaling) in (0, 1, 4) and min(scaling, default=1) > 0
                 and scaling[1:2] <= scaling[2:3], "be a factor, or factor, low, high, length, above 0"),
                ("image_mean", len(self.image_mean) == 3, "be three numbers"),
                ("image_std", len(std) == 3 and min(std) > 0, "be three numbers above 0"),
                ("new_tokens", self.new_tokens < self.vocab_size, "be below vocab_size"),
                ("lora_dropout", self.lora_dropout < 1, "be below 1"),
                ("pool", self.pool <= side, f"be at most {side}, the patches of a side"),
                ("keep", len(self.keep) == self.num_hidden_layers, "have one ratio a layer"),
                *((name, getattr(self, name) in names, f"be one of {', '.join(names)}")
                  for name, names in known.items())):
            if not holds:
                raise ValueError(f"{name} must {must}, got {getattr(self, name)}")
        for ratio in self.keep:
            mod.check_keep_ratio(ratio)

    @property
    def tokens_per_frame(self) -> int:
        return 1 + self.pool**2

    def folder_of(self, name: str) -> str:
        """The pretrained folder that holds a weight, "" if none does."""
        if name.startswith("vision_model."):
            return self.vision
        return "" if added(name) else self.llm

    def frozen(self, name: str) -> bool:
        """Does a weight stay as it was read or drawn, whatever is learnt?"""
        if name.startswith("vision_model."):
            return self.vision != "" and not self.train_vision
        return self.lora_rank > 0 and not added(name)

    def borrowed(self, name: str) -> bool:
        """Does a run leave a weight in its pretrained folder?"""
        return self.frozen(name) and self.folder_of(name) != ""


def added(name: str) -> bool:
    """Is a weight of what stands between a pretrained encoder and decoder, or adapts the decoder?"""
    return name.startswith(("multi_modal", "routers", "new_")) or "lora_" in name


def check_fields(config: object, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless each field is of the type of its default, and each number above 0."""
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        known = isinstance(value, (int, float) if kind is float else kind)
        if not known or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{f.name} must be of type {kind.__name__}, got {value!r}")
        if kind is tuple and not all(isinstance(x, int | float) and abs(x) < 2**63 for x in value):
            raise ValueError(f"{f.name} must be numbers, got {str(value)[:60]}")
        if kind in (int, float) and not (0 < value < 2**31 or (value == 0 and f.name in may_be_zero)):
            least = "at least" if f.name in may_be_zero else "above"
            raise ValueError(f"{f.name} must be {least} 0 and below 2**31, got {str(value)[:60]}")


LARGE = Config(  # what the 7B models share: 32 layers of width 4096, of which adapters learn, and a ViT-L
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, head_dim=128, keep=(1.0,) * 32,
    lora_rank=128, vision_hidden_size=1024, vision_intermediate_size=4096, vision_layers=24, vision_heads=16)
PRESETS = {
    "tiny": Config(),
    "coarse": Config(patch_size=16, pool=3),  # of three tasks: 1 + 3 x 3 tokens a frame, as VideoLLM-MoD
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


class VisionMLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.act = ACTIVATIONS[c.vision_act]
        self.fc1 = nn.Linear(c.vision_hidden_size, c.vision_intermediate_size)
        self.fc2 = nn.Linear(c.vision_intermediate_size, c.vision_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm transformer block of CLIP and SigLIP: every patch sees every patch."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        width, self.heads = c.vision_hidden_size, c.vision_heads
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, c.vision_norm_eps) for _ in range(2))
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width) for n in ("q", "k", "v", "out")})
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        N, L, D = x.shape
        a, normed = self.self_attn, self.layer_norm1(x)
        q, k, v = a["q_proj"](normed), a["k_proj"](normed), a["v_proj"](normed)  # (N, L, D) each
        q, k, v = (t.view(N, L, self.heads, -1).transpose(1, 2) for t in (q, k, v))  # (N, H, L, d)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D)
        x = x + a["out_proj"](mixed)
        return x + self.mlp(self.layer_norm2(x))


class VisionPooling(nn.Module):
    """SigLIP's pooled output, which takes the place of CLS: one learned query attends to all patches."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, c.vision_hidden_size))
        self.attention = nn.MultiheadAttention(c.vision_hidden_size, c.vision_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(c.vision_hidden_size, c.vision_norm_eps)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]  # (N, 1, D)
        return x + self.mlp(self.layernorm(x))


class VisionModel(nn.Module):
    """Frames to vision tokens: CLS, then the patch grid averaged to p x p.    Section 3.1 of VideoLLM-MoD

    What is pooled is, as in VideoLLM-online, the last hidden state: of CLIP as its last layer leaves it, of
    SigLIP (and of the encoder from scratch, otherwise a CLIP) after the final norm.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config, width, has_cls = c, c.vision_hidden_size, c.vision_type != "siglip"
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, width, c.patch_size, c.patch_size, bias=not has_cls)
        patches = (c.image_size // c.patch_size) ** 2
        self.embeddings.position_embedding = nn.Embedding(patches + has_cls, width)
        if has_cls:
            self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
            self.pre_layrnorm = nn.LayerNorm(width, c.vision_norm_eps)  # spelled so in the files
        blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.post_layernorm = nn.LayerNorm(width, c.vision_norm_eps)
        if not has_cls:
            self.head = VisionPooling(c)

    def hidden(self, x: Tensor) -> Tensor:
        """x: (N, 3, S, S) normalised -> (N, L, D), transformers' last_hidden_state; CLS, if any, is first"""
        x = self.embeddings.patch_embedding(x).flatten(2).mT  # (N, h * w, D)
        if self.config.vision_type != "siglip":
            x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = x + self.embeddings.position_embedding.weight
        if self.config.vision_type != "siglip":
            x = self.pre_layrnorm(x)
        for block in self.encoder["layers"]:
            x = block(x)
        return x if self.config.vision_type == "clip" else self.post_layernorm(x)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (N, 3, S, S) uint8 -> (N, P, vision width), the grid row by row"""
        c, x = self.config, pixels.to(self.post_layernorm.weight.dtype)
        channels = zip(x.unbind(1), c.image_mean, c.image_std, strict=True)
        x = self.hidden(torch.stack([t / (255 * std) - mean / std for t, mean, std in channels], dim=1))
        if c.vision_type == "siglip":
            cls, grid = self.head(x), x
        else:
            cls, grid = x[:, :1], x[:, 1:]
            cls = self.post_layernorm(cls) if c.vision_type == "clip" else cls
        grid = grid.mT.unflatten(2, (c.image_size // c.patch_size,) * 2)  # (N, D, h, w)
        return torch.cat([cls, F.adaptive_avg_pool2d(grid, c.pool).flatten(2).mT], dim=1)  # (N, P, D)


class Projector(nn.Module):
    """Two-layer MLP from the width of the encoder to that of the decoder, as in LLaVA and VideoLLM-online."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c.vision_hidden_size, c.hidden_size)
        self.linear_2 = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


# --- decoder ------------------------------------------------------------------------------------------------


def rotations(position: Tensor, head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> Tensor:
    """cos and sin of the RoPE angles, computed in float64: float32 loses them beyond some 100,000 tokens.

    position: (B, T) int64;  scaling: of Config.rope_scaling -> (B, T, 2, d/2) float64
    A linear scaling slows all frequencies, that of Llama 3 those with long waves for the original length.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position.device).double() / head_dim)
    if len(scaling) == 1:
        frequency = frequency / scaling[0]
    elif scaling:
        factor, low, high, original = scaling
        same = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # 0: slowed in full
        frequency = same * frequency + (1 - same) * frequency / factor
    angle = position.double()[..., None] * frequency  # (B, T, d/2)
    return torch.stack([angle.cos(), angle.sin()], dim=2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x: (B, T, heads, d), rope: (B, T, 2, d/2) -> (B, T, heads, d), its halves turned against each other"""
    cos, sin = rope[:, :, None, 0], rope[:, :, None, 1]  # (B, T, 1, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """A linear map of the decoder; with LoRA (arXiv 2106.09685), W x + alpha / rank * B A x.

    A and B are learnt in float32, whatever the type of W, and are used in the type of x.
    """

    def __init__(self, c: Config, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias)
        self.rank, self.dropout = c.lora_rank, c.lora_dropout
        if c.lora_rank:
            self.scale = c.lora_alpha / c.lora_rank
            self.lora_A = nn.Parameter(torch.zeros(c.lora_rank, inputs))
            self.lora_B = nn.Parameter(torch.zeros(outputs, c.lora_rank))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.rank:
            return out
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (..., rank)
        return out + self.scale * F.linear(low, self.lora_B.to(x.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention over the rows it is given, and over what its layer has in the cache."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim, self.window = c.head_dim, c.sliding_window
        self.q_proj = Linear(c, c.hidden_size, c.num_attention_heads * c.head_dim, c.attention_bias)
        self.k_proj = Linear(c, c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.v_proj = Linear(c, c.hidden_size, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.o_proj = Linear(c, c.num_attention_heads * c.head_dim, c.hidden_size, c.output_bias)

    def heads(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, D) -> q: (B, H, K, d), k and v: (B, G, K, d)"""
        B, K, _ = x.shape
        q, k, v = (proj(x).view(B, K, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, position: Tensor, rope: Tensor, remember: Callable | None) -> Tensor:
        B, K, _ = x.shape
        q, k, v = self.heads(x, rope)
        now = position[:, None, :, None]  # (B, 1, K, 1)
        past = remember(k, v, now) if remember else None
        if not past and not self.window:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, K, d)
        else:
            k, v, seen = past or (k, v, now)  # (B, G, L, d) twice, (B, 1, L, 1)
            mask = seen.mT <= now  # (B, 1, K, L)
            mask = mask & (seen.mT > now - self.window) if self.window else mask
            n = q.shape[1] // k.shape[1]  # heads that share keys become one, so that these are read once
            q, mask = q.reshape(B, -1, n * K, self.head_dim), mask.repeat(1, 1, n, 1)  # (B, G, nK, d)
            out = F.scaled_dot_product_attention(q, k, v, mask).reshape(B, -1, K, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(B, K, -1))


class MLP(nn.Module):
    """SwiGLU"""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = Linear(c, c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c, c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c, c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A layer of Llama. It knows nothing of routing: it computes the rows it is given, at their positions."""

    def __init__(self, c: Config) -> None:
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

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.gradient_checkpointing = False  # True: a backward pass computes the inside of layers again
        self.vision_model, self.multi_modal_projector = VisionModel(c), Projector(c)
        known = c.vocab_size - c.new_tokens
        self.embed_tokens = nn.Embedding(known, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = Linear(c, c.hidden_size, known)
        for name in ("new_embeddings", "new_head") if c.new_tokens else ():  # learnt, also if the rest is not
            setattr(self, name, nn.Parameter(torch.zeros(c.new_tokens, c.hidden_size)))
        names = [self.router_of(layer) for layer, r in enumerate(c.keep) if 0 < r < 1]  # shared: one for all
        self.routers = nn.ModuleDict({name: Router(c.hidden_size) for name in names if name})
        for name, p in self.named_parameters():
            p.requires_grad_(not c.frozen(name))
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def router_of(self, layer: int) -> str:
        """The name of a layer's router; "" where scores are not learned."""
        return LEARNED.get(self.config.router, lambda layer: "")(layer)

    def forward(self, tokens: Tensor, frames: Tensor, groups: Groups, seed: Tensor | None = None,
                cache: "Cache | None" = None) -> Output:
        """One pass over whole sequences, or over the next chunk of streams whose past is in `cache`.

        tokens: (B, T) int64, -1 at vision tokens;  frames: as in data.Batch, those of the chunk in order
        groups: of these tokens;  seed: (B,) int64, names the streams (only the random router asks)
        Raises ValueError if the chunk splits a group.
        """
        B, T = tokens.shape
        x = self.embed(tokens, frames)  # (B, T, D)
        start = cache.advance(groups) if cache else 0  # (B, 1)
        position = (start + torch.arange(T, device=tokens.device)).expand(B, T).where(groups.real, PADDING)
        return self.decode(x, position, groups, tokens.new_zeros(B) if seed is None else seed, cache)

    def decode(self, x: Tensor, position: Tensor, groups: Groups, seed: Tensor,
               cache: "Cache | None" = None) -> Output:
        """All layers. x: (B, T, D), position: (B, T). Nothing in it waits for the device."""
        c, keep, score = self.config, {}, {}
        rope = rotations(position, c.head_dim, c.rope_theta, c.rope_scaling).to(x.dtype)
        again = self.gradient_checkpointing and self.training
        compute = partial(checkpoint, self.compute, use_reentrant=False) if again else self.compute
        for layer in range(len(self.layers)):
            x, keep[layer], score[layer] = compute(layer, x, position, rope, groups, seed, cache)
        keep, score = ({layer: t for layer, t in of.items() if t is not None} for of in (keep, score))
        return Output(x, keep, score)

    def compute(self, layer: int, x: Tensor, position: Tensor, rope: Tensor, groups: Groups, seed: Tensor,
                cache: "Cache | None") -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer, dense or routed -> x (B, T, D), keep and score (B, T); None: there is no such thing"""
        r, block, gate = self.config.keep[layer], self.layers[layer], torch.ones_like
        if cache:
            block = partial(block, remember=partial(cache.append, layer))
        if r == 1:  # nothing is chosen, so nothing is weighed
            return block(x, position, rope), None, None
        score = self.score(layer, x, groups, position, seed)
        if learned := r > 0 and self.router_of(layer) != "":
            gate = GATES[self.config.gate]
        x, keep = mod.routed_update(block, x, score, groups, r, gate, position, rope)
        return x, keep, score if learned else None

    def embed(self, tokens: Tensor, frames: Tensor) -> Tensor:
        """Text from the embedding table, the vision tokens of the frames in order at the places marked -1."""
        known = self.embed_tokens.num_embeddings
        x = self.embed_tokens(tokens.clamp(0, known - 1))  # (B, T, D)
        if self.config.new_tokens:
            new = F.embedding((tokens - known).clamp(min=0), self.new_embeddings).to(x.dtype)  # (B, T, D)
            x = torch.where((tokens >= known)[..., None], new, x)
        if frames.shape[1] == 0:
            return x
        features = frames if frames.dim() == 4 else self.vision_model(frames.flatten(0, 1))  # known: encoded
        vision = self.multi_modal_projector(features.to(self.multi_modal_projector.linear_1.weight.dtype))
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
        normed = self.norm(hidden)
        known = self.lm_head(normed)
        if not self.config.new_tokens:
            return known
        return torch.cat([known, F.linear(normed, self.new_head.to(normed.dtype))], dim=-1)


@torch.no_grad()
def layer_ranks(model: VideoLM, tokens: Tensor, frames: Tensor, real: Tensor, softmax: bool = True) -> Tensor:
    """(B, L) float64, `mod.arank` of each layer of a dense model; arguments: of forward, softmax of arank"""
    c = model.config
    if min(c.keep) < 1:
        raise ValueError(f"ARank must be measured on a dense run, got one of keep {c.keep}")
    x, position, ranks = model.embed(tokens, frames), torch.ones_like(tokens).cumsum(1) - 1, []
    rope, still = (rotations(p, c.head_dim, c.rope_theta, c.rope_scaling).to(x.dtype)
                   for p in (position, 0 * position))
    for block in model.layers:
        q, k, _ = block.self_attn.heads(block.input_layernorm(x), rope if softmax else still)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, d)
        ranks.append(mod.arank(q, k, real, softmax, c.sliding_window))
        x = block(x, position, rope)
    return torch.stack(ranks, dim=1)


def streaming_loss(model: VideoLM, hidden: Tensor, at: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """sum of w * cross-entropy over the labelled positions / their number.    Eq. 1 of VideoLLM-MoD

    hidden: (B, T, D);  at: (M,) int64, the labelled ones among the B * T: only there logits are computed
    target: (M,) int64, the token to predict there
    weight: (M,) float, 1 on replies, sigma on the decisions to speak or stay silent
    """
    logits = model.logits(hidden.flatten(0, 1)[at])  # (M, vocabulary)
    loss = F.cross_entropy(logits.float(), target, reduction="none")  # (M,)
    return (weight * loss).sum() / max(1, len(at))


@torch.no_grad()
def initialise(model: VideoLM, seed: int, names: Collection[str] | None = None) -> VideoLM:
    """Draw weights from (seed): linear maps at 1/sqrt(fan-in), 0.3 of it where they write to the residual.

    names: of those to draw, None: all. New tokens begin as the mean of the known ones, LoRA as no change.
    """
    drawn = [(name, p) for name, p in model.named_parameters() if names is None or name in names]
    generator = torch.Generator(drawn[0][1].device if drawn else "cpu").manual_seed(seed)
    outputs = ("o_proj", "down_proj", "out_proj", "fc2")
    known = {"new_embeddings": model.embed_tokens.weight, "new_head": model.lm_head.weight}
    for name, p in drawn:
        if name in known:
            p.copy_(known[name].mean(0, dtype=torch.float32))
        elif name.endswith("lora_B"):
            p.zero_()
        elif p.dim() > 1:
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

    A layer has room for more rows than it uses, so that shapes change seldom. The position PADDING marks a
    row that is not used, that pads a stream beside a longer one, or whose late token skips. Each stream has
    one counter for its positions, never the length of a layer, and they stay with their tokens. So one rule
    serves full, routed and evicted layers, streams of any length: a query sees what is not later.
    Within a stream, group ids must grow from chunk to chunk.
    window: None, or W: the first text stays, and the last W frames, each with the text that follows it
    """

    step = 64  # room grows in steps of so many rows

    def __init__(self, model: VideoLM, streams: int = 1, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 frame, got {window}")
        c, weight = model.config, model.embed_tokens.weight
        none = weight.new_empty(streams, c.num_key_value_heads, 0, c.head_dim)
        self.keep, self.seen = c.keep, weight.new_zeros(streams, 1, dtype=torch.int64)  # tokens so far
        self.rows = [(none, none, self.seen[:, None, :0, None]) for _ in c.keep]  # k, v, position, with room
        self.length = [0] * len(c.keep)  # rows in use
        self.begun = [False] * len(c.keep)  # were there any before this chunk?
        self.used = self.seen.new_zeros(len(c.keep))  # rows in use, as the device knows it
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
        for layer, r in enumerate(self.keep):
            self.reserve(layer, groups.id.shape[1] if r == 1 else groups.width[r])
        return start

    def slide(self, id: Tensor, start: Tensor) -> None:
        """id: (B, T), start: (B, 1). In streams that have W frames and get one, the oldest leaves."""
        if bool(((id >= 0) & (id != id[:, :1])).any()):
            raise ValueError("with a window, a chunk must begin with its only frame, got text or two frames")
        gets_one = id[:, :1] >= 0  # (B, 1)
        self.first_text = torch.minimum(self.first_text, start.where(gets_one, PADDING))
        self.starts = torch.cat([self.starts[:, 1:], start], dim=1).where(gets_one, self.starts)  # (B, W)
        oldest = self.starts[:, :1]
        for layer, (k, v, position) in enumerate(self.rows if bool((oldest > self.first_text).any()) else ()):
            at = position[:, 0, :, 0]  # (B, room)
            stay = ((at < self.first_text) | (at >= oldest)) & (at < PADDING)
            self.length[layer] = n = int(stay.sum(1).max())
            index = (~stay).int().argsort(dim=1, stable=True)[:, :n]  # (B, n)
            position.masked_fill_(~stay[:, None, :, None], PADDING)
            for t in (k, v, position):
                t[:, :, :n] = take(t.transpose(1, 2), index).transpose(1, 2)
            position[:, :, n:] = PADDING
            self.used[layer] = n

    def reserve(self, layer: int, more: int) -> None:
        """Count in the rows that a layer is about to append. Where there is no room for them, it grows."""
        self.begun[layer] = self.length[layer] > 0
        self.length[layer] += more
        room = self.rows[layer][0].shape[2]
        if self.length[layer] > room:  # by an eighth at least, for that is read and copied in vain
            more = -(-max(self.length[layer], room * 9 // 8) // self.step) * self.step - room
            self.rows[layer] = tuple(F.pad(t, (0, 0, 0, more), value=value) for t, value in
                                     zip(self.rows[layer], (0, 0, PADDING), strict=True))

    def append(self, layer: int, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...] | None:
        """k, v: (B, G, K, d), position: (B, 1, K, 1) of what a layer computed -> the same of all it holds,
        None: these are all
        """
        at = self.used[layer] + torch.arange(k.shape[2], device=k.device)
        for held, new in zip(self.rows[layer], (k, v, position), strict=True):
            held.index_copy_(2, at, new)
        self.used[layer] += k.shape[2]
        return self.rows[layer] if self.begun[layer] else None


# --- pretrained folders -------------------------------------------------------------------------------------

DECODERS: dict[str, dict] = {  # families by model_type of config.json, and what it may leave out
    "llama": {"attention_bias": False}, "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False}}
ROPE = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
ENCODERS: dict[str, dict] = {
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
             "image_mean": (0.48145466, 0.4578275, 0.40821073),
             "image_std": (0.26862954, 0.26130258, 0.27577711)},
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
               "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224}  # what both leave out


def pretrained(sizes: Config, llm: str = "", vision: str = "", new_tokens: int = 0) -> Config:
    """A dense Config with the decoder and the encoder of two Hugging Face folders, or else those of `sizes`.

    new_tokens: special tokens that extend the vocabulary of the decoder
    Raises ValueError, naming the file, for what is of no known family or does not fit together.
    """
    for folder, read in ((llm, decoder_of), (vision, encoder_of)):
        try:
            sizes = replace(sizes, **read(Path(folder))) if folder else sizes
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            why = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{folder}/config.json must be of a known model: {why}") from None
    vocabulary = sizes.vocab_size + new_tokens
    return replace(sizes, llm=llm, vision=vision, vocab_size=vocabulary, new_tokens=new_tokens)


def decoder_of(folder: Path) -> dict:
    """Fields of Config for a decoder; its RoPE settings may be spelled in the old or in the new way."""
    hf = read_json(folder / "config.json")
    family = hf.get("model_type")
    hf = {key: value for key, value in (DECODERS.get(str(family), {}) | hf).items() if value is not None}
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    for what, value, known in (("model_type", family, DECODERS), ("rope_type", kind, ROPE),
                               ("hidden_act", hf.get("hidden_act", "silu"), ["silu"]),
                               ("partial_rotary_factor", rotated, [1.0]),
                               ("use_sliding_window", hf.get("use_sliding_window", False), [False])):
        if value not in list(known):
            raise ValueError(f"{what} must be {' or '.join(map(str, known))}, got {value!r:.60}")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    bias, heads = family == "qwen2" or hf.get("attention_bias", False), hf["num_attention_heads"]
    return {name: hf[name] for name in names} | {
        "num_key_value_heads": hf.get("num_key_value_heads", heads),
        "head_dim": hf.get("head_dim", hf["hidden_size"] // heads),
        "keep": (1.0,) * min(hf["num_hidden_layers"], 1000), "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        "rope_scaling": tuple(rope[key] for key in ROPE[kind]),
        "sliding_window": hf.get("sliding_window", 0) if family == "mistral" else 0,
        "attention_bias": bias and family != "mistral", "output_bias": bias and family == "llama",
        "tie_word_embeddings": hf.get("tie_word_embeddings", False)}


def encoder_of(folder: Path) -> dict:
    """Fields of Config for an encoder, from a file of both towers or of this one, and for its pixels."""
    hf = read_json(folder / "config.json")
    family = str(hf.get("model_type")).removesuffix("_vision_model")
    if family not in ENCODERS:
        raise ValueError(f"model_type must be {' or '.join(ENCODERS)}, got {hf.get('model_type')!r:.60}")
    hf = BASE | ENCODERS[family] | (hf.get("vision_config_dict") or hf.get("vision_config") or hf)
    if (file := folder / "preprocessor_config.json").exists():
        pixels = read_json(file)
        hf |= {key: tuple(pixels[key]) for key in ("image_mean", "image_std") if key in pixels}
    names = {"hidden_size": "vision_hidden_size", "intermediate_size": "vision_intermediate_size",
             "num_hidden_layers": "vision_layers", "num_attention_heads": "vision_heads",
             "hidden_act": "vision_act", "layer_norm_eps": "vision_norm_eps"}
    same = ("image_size", "patch_size", "image_mean", "image_std")
    return {names.get(key, key): hf[key] for key in (*names, *same)} | {"vision_type": family}


def skeleton(config: Config) -> VideoLM:
    """A model whose weights have a shape, and no memory yet."""
    try:
        with torch.device("meta"):
            return VideoLM(config)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"config must be of a model that can be held, got {str(error)[:99]}") from None


def build(config: Config, seed: int = 0, weights: dict[str, Tensor] | None = None,
          device: torch.device | str = "cpu") -> VideoLM:
    """A model of another run's weights, of pretrained ones as their files have them, the rest drawn.

    device: where weights are drawn, so that large ones need not travel
    """
    model, weights = skeleton(config), weights or {}
    borrow(model, lambda name: config.folder_of(name) and name not in weights)
    new = {name: torch.empty_like(p, device=device, dtype=torch.bfloat16 if config.frozen(name) else p.dtype)
           for name, p in model.named_parameters() if p.is_meta}
    assign(model, new)
    initialise(model, seed, new.keys())
    assign(model, {name: t for name, t in weights.items() if name in own(model)})
    return model


def borrow(model: VideoLM, wanted: Callable[[str], object]) -> None:
    """Give a model the pretrained weights that are wanted, by name. They stay mapped from their files."""
    c, names = model.config, {name for name in own(model) if wanted(name)}
    ours = {name for name in names if name.startswith("vision_model.")}
    if names - ours:
        tied = ["lm_head.weight"] if c.tie_word_embeddings else []  # some files hold it all the same
        found = {name.removeprefix("model."): t for name, t in read_folder(Path(c.llm)).items()}
        fill(model, Path(c.llm), {name: t for name, t in found.items() if name not in tied
                                  and not name.endswith("rotary_emb.inv_freq")}, names - ours)
    if ours:
        found = read_folder(Path(c.vision))
        towers = any(name.startswith("vision_model.") for name in found)  # else no name has the prefix
        found = {name if towers else f"vision_model.{name}": t for name, t in found.items()}
        fill(model, Path(c.vision), {name: t for name, t in found.items() if name.startswith("vision_model.")
                                     and not name.endswith("position_ids")}, ours)


def fill(model: VideoLM, folder: Path, found: dict[str, Tensor], names: Collection[str]) -> None:
    """Assign weights to these names. Raises ValueError naming the first that is missing, odd or too much."""
    wanted = {name: list(t.shape) for name, t in own(model).items() if name in names}
    shapes = {name: list(t.shape) if t.dtype in FLOATS else t.dtype for name, t in found.items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise ValueError(f"{folder / 'model.safetensors'} must fit config.json: {printable(name)[:99]} "
                             f"must be {wanted.get(name, 'absent')}, got {shapes.get(name, 'nothing')}")
    assign(model, found)


def assign(model: VideoLM, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder: of one safetensors file, or of those that its index names."""
    shards, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if not list(folder.glob("model*.safetensors*")) and list(folder.glob("*.bin")):
        raise ValueError(f"{folder} must hold safetensors, got .bin files, whose pickle is not read here: "
                         "save them anew with transformers' save_pretrained")
    if index.exists():
        listed = read_json(index).get("weight_map")
        shards = set(map(str, listed.values())) if isinstance(listed, dict) else set()
        for shard in shards or {""}:
            if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):
                raise ValueError(f"{index} must map weights to safetensors files beside it, "
                                 f"got {shard!r:.99}")
    weights = {name: t for shard in sorted(shards) for name, t in read_weights(folder / shard)[0].items()}
    most = max(weights.values(), key=Tensor.numel, default=torch.zeros(0)).dtype  # norms can be of another
    return {name: t.to(most) if t.dtype in FLOATS else t for name, t in weights.items()}


@torch.no_grad()
def merge(model: VideoLM) -> VideoLM:
    """The same model without adapters: each W becomes W + alpha / rank * B A, and is saved with the run."""
    if not model.config.lora_rank:
        raise ValueError("merge must be of a run with adapters, got one of lora_rank 0")
    weights = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.rank:
            change = module.scale * module.lora_B @ module.lora_A
            weights[f"{name}.weight"] = (module.weight + change).to(module.weight.dtype)
    merged = skeleton(replace(model.config, lora_rank=0, tie_word_embeddings=False))
    assign(merged, weights)
    return merged


# --- nothing below is in the papers: run folders and flags --------------------------------------------------


def own(model: VideoLM) -> dict[str, Tensor]:
    """The weights by name, each once: a head that is the embedding table is not there."""
    tied = model.config.tie_word_embeddings
    return {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def learnt(model: VideoLM) -> dict[str, Tensor]:
    """What a run saves: all weights but those that are as they are in the pretrained folders."""
    return {name: t for name, t in own(model).items() if not model.config.borrowed(name)}


def save(folder: Path, model: VideoLM, weights: dict[str, Tensor] | None = None, step: int = 0) -> None:
    """Write config.json and the learnt weights, model.safetensors; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(model.config))
    held = {name: t.contiguous() for name, t in (weights or learnt(model)).items()}
    write(folder / "model.safetensors", lambda path: save_file(held, path, metadata={"step": str(step)}))


def write(path: Path, fill: Callable[[Path], object], mark: str = "") -> None:
    """Write a file under a temporary name, then rename it: nobody sees half of it, nor on a full disk.

    mark: in that name, where several processes write the same file
    """
    unfinished = path.with_name(f"{path.name}{mark}.partial")
    try:
        fill(unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} must be written whole: {error}") from None
    finally:  # also where somebody has had enough
        with suppress(OSError):  # there may be none
            unfinished.unlink()


def write_json(path: Path, values: dict) -> None:
    write(path, lambda unfinished: unfinished.write_text(json.dumps(values, indent=1) + "\n"))


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must be a JSON object, got {type(values).__name__}")
    return values


def read_config(folder: Path) -> Config:
    file = folder / "config.json"
    try:
        values = read_json(file)
        return Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must hold the Config of a model: {error}") from None


def load(folder: Path, device: torch.device | str = "cpu") -> VideoLM:
    """Rebuild the model of a run folder. Raises ValueError, naming the file, where something does not fit."""
    model = skeleton(config := read_config(folder))
    borrow(model, config.borrowed)
    fill(model, folder, read_weights(folder / "model.safetensors")[0], learnt(model).keys())
    return model.to(device)


def read_weights(path: Path) -> tuple[dict[str, Tensor], int]:
    """A safetensors file -> its tensors by name, and the training step after which they were saved"""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            return weights, int((file.metadata() or {}).get("step", 0))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None


def opt(default: object, help: str, positional: bool = False, needs: str = "") -> object:
    """A dataclass field that is also a flag; `help` is its only documentation. needs: flags it goes with"""
    help = f"with --{needs.replace(' or ', ' or --')}: {help}" if needs else help
    return field(default=default, metadata={"help": help, "positional": positional, "needs": needs})


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
    config = cls(**given)
    for f in fields(cls):
        needs = f.metadata["needs"]
        if needs and f.name in given and not any(getattr(config, name) for name in needs.split(" or ")):
            raise ValueError(f"{f.name} must be given with {needs}, got no {needs}")
    return config, set(given)


def pick_device(name: str) -> torch.device:
    if name not in ("", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu or, where there is one, cuda, got {name}")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def printable(text: str) -> str:
    """Models and files can say any bytes; a terminal must not obey them."""
    return "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)


def run(main: Callable[[list[str] | None], None]) -> None:
    """Call a main function; a user's mistake, or too little memory, ends in one sentence, status 2."""
    try:
        main(None)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(of|allocate) memory", str(error)):
            raise
        print(printable(f"{Path(sys.argv[0]).name}: error: {str(error) or 'out of memory'}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
