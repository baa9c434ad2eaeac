"""The model of pretrained folders: a VideoLM into which their modules and weights are injected.

extras/pretrained.py trains it; there is no command.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data
import model as core
from data import Clips
from extras import huggingface
from extras.encoders import ENCODERS
from extras.features import encode_once
from extras.lora import ExtendedEmbedding, ExtendedHead, LoraLinear
from extras.mixed_types import cast_between_types, compute_fast
from extras.pretrained_config import PretrainedConfig
from extras.rope import scale_frequencies
from mod import Groups
from model import Attention, Cache, Config, Output, VideoLM, check_fit, rotate

RENAMED = {"new_embeddings": "embed_tokens.new", "new_head": "lm_head.new"}  # in runs of old


class PretrainedAttention(Attention):
    """Attention that norms each head of queries and keys (Qwen3), or scales them (YaRN)."""

    def __init__(self, c: PretrainedConfig) -> None:
        super().__init__(c)
        self.rope_scale = c.rope_scale
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if c.query_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)

    def heads(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, D) -> q: (B, H, K, d), k and v: (B, G, K, d)"""
        B, K, _ = x.shape
        rope = rope * self.rope_scale  # both are turned by it, so both are scaled
        q = rotate(self.q_norm(self.q_proj(x).view(B, K, -1, self.head_dim)), rope)
        k = rotate(self.k_norm(self.k_proj(x).view(B, K, -1, self.head_dim)), rope)
        v = self.v_proj(x).view(B, K, -1, self.head_dim)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class PretrainedLM(VideoLM):
    """A VideoLM into which the modules of pretrained folders are injected."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        c = config
        self.gradient_checkpointing = c.gradient_checkpointing
        self.vision_model = ENCODERS[c.vision_type](c)
        scaling = (c.rope_theta, c.rope_type, c.rope_scaling)
        self.rope_frequency = scale_frequencies(self.rope_frequency, *scaling)
        lora = (c.lora_rank, c.lora_alpha, c.lora_dropout)
        free_biases(self.vision_model)
        for block in self.layers:
            if c.query_norm or c.rope_scale != 1:
                block.self_attn = PretrainedAttention(c)
            attention = block.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                inject(attention, name, c.attention_bias, *lora)
            inject(attention, "o_proj", c.output_bias, *lora)
            for name in ("gate_proj", "up_proj", "down_proj"):
                inject(block.mlp, name, c.mlp_bias, *lora)
        known = c.vocab_size - c.new_tokens
        if c.new_tokens:
            self.embed_tokens = ExtendedEmbedding(known, c.new_tokens, c.hidden_size)
        if c.new_tokens or c.lora_rank:
            self.lm_head = ExtendedHead(c.hidden_size, known, c.new_tokens, *lora)
        for name, p in self.named_parameters():
            p.requires_grad_(not c.frozen(name))
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def load_state_dict(self, *args: object, **how: object) -> object:
        loaded = super().load_state_dict(*args, **how)
        self.tie()
        cast_between_types(self)
        return loaded

    def named_parameters(self, *args: object, **how: object) -> list[tuple[str, nn.Parameter]]:
        """New tokens first: optimizer states and the norm of the gradient follow this order."""
        found = super().named_parameters(*args, **how)
        return sorted(found, key=lambda item: not item[0].endswith(".new"))

    def own(self) -> dict[str, Tensor]:
        """All weights by name, each once: a head that is the embedding table is left out."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state

    def learned_state(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.own().items() if not self.config.borrowed(name)}

    def uses_muon(self, name: str, p: Tensor) -> bool:
        """What is pretrained learns by AdamW, and everything beside a pretrained decoder."""
        c = self.config
        pretrained = c.llm or c.lora_rank or c.folder_of(name)
        return super().uses_muon(name, p) and not pretrained

    def forward(
        self,
        tokens: Tensor,
        frames: Tensor,
        groups: Groups,
        seed: Tensor,
        cache: Cache | None = None,
    ) -> Output:
        """As of VideoLM. Raises ValueError for a stream longer than a dynamic RoPE allows."""
        if self.config.rope_type == "dynamic":
            longest = self.config.rope_scaling[1]
            length = tokens.shape[1] + (int(cache.seen.max()) if cache else 0)
            if length > longest:  # then transformers would turn all earlier keys anew
                rule = f"have at most {longest} tokens, for which its dynamic RoPE is unscaled"
                raise ValueError(f"a stream of {self.config.llm} must {rule}, got {length}")
        return super().forward(tokens, frames, groups, seed, cache)

    def run_layer(self, *args: object) -> tuple:
        if self.gradient_checkpointing and self.training:
            return checkpoint(super().run_layer, *args, use_reentrant=False)
        return super().run_layer(*args)

    def rerouted(self, config: Config, seed: int) -> "PretrainedLM":
        model = skeleton(config)
        model.load_state_dict(self.own(), strict=False, assign=True)
        return learn_in_float32(draw_missing(model, seed, self.norm.weight.device))

    def train(self, mode: bool = True) -> "PretrainedLM":
        compute_fast(self)  # eval() comes here: the device is known by then
        return super().train(mode)

    def adapt_source(self, source: data.Source, folder: Path) -> data.Source:
        """A frozen encoder of a folder encodes each clip once, into features/ beside the run."""
        compute_fast(self)
        if self.config.borrowed("vision_model.") and isinstance(source, Clips):
            source.encode = partial(encode_once, self, source, folder.parent / "features")
        return source


def inject(owner: nn.Module, name: str, bias: bool, rank: int, *lora: float) -> None:
    """Put a linear map with LoRA or a bias in the place of a plain one."""
    plain = getattr(owner, name)
    if bias or rank:
        size = (plain.in_features, plain.out_features)
        setattr(owner, name, LoraLinear(*size, bias, rank, *lora))


def free_biases(encoder: nn.Module) -> None:
    """Let the bias of a linear map have another type than its weight, as in the decoder."""
    for owner in encoder.modules():
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear:
                inject(owner, name, True, 0, 0.0, 0.0)


# --- building -------------------------------------------------------------------------------------


def pretrained(
    sizes: PretrainedConfig, llm: str = "", vision: str = "", new_tokens: int = 0
) -> PretrainedConfig:
    """`sizes` with the decoder and the encoder of two Hugging Face folders

    new_tokens: special tokens that extend the vocabulary of the decoder
    Raises ValueError, naming the file, for what is of no known family or does not fit together.
    """
    config = sizes
    if llm:
        found = huggingface.read_fields(llm, huggingface.decoder_fields)
        if found["tie_word_embeddings"] and huggingface.has_own_head(Path(llm)):
            found["tie_word_embeddings"] = False
        config = fit(config, llm, found)
    if vision:
        found = huggingface.read_fields(vision, huggingface.encoder_fields)
        config = fit(config, vision, found | huggingface.pixel_fields(Path(vision)))
    rows = config.vocab_size + new_tokens
    found = {"llm": llm, "vision": vision, "vocab_size": rows, "new_tokens": new_tokens}
    return replace(config, **found, router_norm=llm != "")


def fit(config: PretrainedConfig, folder: str, found: dict) -> PretrainedConfig:
    """The config with what a folder says; an error names the folder."""
    try:
        return replace(config, **found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/config.json must be of a known model: {error}") from None


def skeleton(config: PretrainedConfig) -> PretrainedLM:
    """A model whose weights have a shape, and no memory yet"""
    try:
        with torch.device("meta"):
            return PretrainedLM(config)
    except (RuntimeError, OverflowError) as error:
        why = str(error)[:99]
        raise ValueError(f"config must be of a model that can be held, got {why}") from None


def build(
    config: PretrainedConfig, seed: int = 0, device: torch.device | str = "cpu"
) -> PretrainedLM:
    """A model with the weights of its folders, in the types of their files, the rest drawn."""
    model = skeleton(config)
    borrow(model, lambda name: config.folder_of(name) != "")
    draw_missing(model, seed, device)
    if config.llm:
        scale_vision(model)
    return model


@torch.no_grad()
def draw_missing(model: PretrainedLM, seed: int, device: torch.device | str) -> PretrainedLM:
    """Draw the weights that have no memory yet; new tokens begin as the mean of the known ones."""
    c, new = model.config, {}
    for name, p in model.named_parameters():
        if p.is_meta:
            of_decoder = not name.startswith("vision_model.")
            dtype = torch.bfloat16 if c.frozen(name) and of_decoder else p.dtype
            new[name] = torch.empty_like(p, device=device, dtype=dtype)
    model.load_state_dict(new, strict=False, assign=True)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if name not in new:
            continue
        if name.endswith(".new"):
            known = getattr(model, name.split(".")[0]).weight
            p.copy_(known.mean(0, dtype=torch.float32))
        elif name.endswith("lora_B"):
            p.zero_()  # an adapter begins as no change
        else:
            core.draw_weight(name, p, generator)
    return model


@torch.no_grad()
def scale_vision(model: PretrainedLM) -> None:
    """Let vision tokens enter a trained decoder as large as text, not ten times as large.

    The root mean square of vision tokens is measured on frames of noise.
    """
    device, size = model.norm.weight.device, model.config.image_size
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.empty(4, 3, size, size, device=device)
    noise = noise.uniform_(0, 256, generator=generator).to(torch.uint8)
    last, text = model.multi_modal_projector.linear_2, model.embed_tokens.weight
    features = model.vision_model(noise).to(last.weight.dtype)
    vision = model.multi_modal_projector(features)
    last.weight.mul_(rms(text) / rms(vision))


def rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()


def learn_in_float32(model: PretrainedLM) -> PretrainedLM:
    """In bfloat16 most updates of a weight would be rounded away."""
    learned = {}
    for name, t in model.own().items():
        if not model.config.frozen(name):
            learned[name] = t.float()
    model.load_state_dict(learned, strict=False, assign=True)
    return model


def borrow(model: PretrainedLM, wanted: Callable[[str], bool]) -> None:
    """Give a model the weights of its folders that are wanted, mapped from their files."""
    c, names = model.config, [name for name in model.own() if wanted(name)]
    encoder = {name for name in names if name.startswith("vision_model.")}
    decoder = set(names) - encoder
    if decoder:
        found = huggingface.decoder_weights(Path(c.llm), c.tie_word_embeddings)
        assign(model, found, decoder, c.llm)
    if encoder:
        assign(model, huggingface.encoder_weights(Path(c.vision)), encoder, c.vision)


def assign(
    model: PretrainedLM, found: dict[str, Tensor], names: Collection[str], folder: str
) -> None:
    wanted = {name: t for name, t in model.own().items() if name in names}
    check_fit(wanted, found, Path(folder) / "model.safetensors")
    model.load_state_dict(found, strict=False, assign=True)


def load_run(folder: Path, device: torch.device | str = "cpu") -> PretrainedLM:
    """Rebuild the model of a run: the door of model.load for what Config does not know."""
    config = core.read_config(folder, PretrainedConfig)
    model = skeleton(config)
    borrow(model, config.borrowed)
    file = folder / "model.safetensors"
    found = {RENAMED.get(name, name): t for name, t in core.read_weights(file)[0].items()}
    core.fill(model, found, file)
    return model.to(device)


@torch.no_grad()
def merge(model: PretrainedLM) -> PretrainedLM:
    """The same model without adapters: each W becomes W + alpha / rank * B A."""
    if not model.config.lora_rank:
        raise ValueError("merge must be of a run with adapters, got one of lora_rank 0")
    weights = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and module.rank:
            weights[f"{name}.weight"] = module.merged()
    merged = skeleton(replace(model.config, lora_rank=0, tie_word_embeddings=False))
    merged.load_state_dict(weights, assign=True)
    return merged
