"""Start from pretrained Hugging Face folders, adapt them by LoRA, merge these.

    python -m extras.pretrained --llm DIR --vision DIR --data DIR --gate unit
    python -m extras.pretrained --merge RUN --out NEW

All flags of train.py are there too. A run is evaluated, resumed and converted
as any other: eval.py RUN, train.py --out RUN --resume, train.py --init RUN.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data
import model as core
import train
from data import Clips
from extras import huggingface
from extras.cost import SIZES
from extras.encoders import ACTIVATIONS, ENCODERS
from extras.features import encode_once
from extras.huggingface import NEW_TOKENS, PretrainedTokenizer
from extras.lora import ExtendedEmbedding, ExtendedHead, LoraLinear
from model import Config, VideoLM, check_fit, flag, parse, run_main
from train import TrainConfig

RENAMED = {"new_embeddings": "embed_tokens.new", "new_head": "lm_head.new"}  # in runs of old


@dataclass(frozen=True)
class PretrainedConfig(Config):
    """Config, and what pretrained folders need beyond it."""

    new_tokens: int = 0  # the last of the vocabulary, unknown to the pretrained decoder
    rope_scaling: tuple[float, ...] = ()  # (factor,): linear; (factor, low, high, length): Llama 3
    sliding_window: int = 0  # of earlier versions; must be 0
    attention_bias: bool = False  # of q, k and v (Qwen2)
    output_bias: bool = False  # of o
    tie_word_embeddings: bool = False
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixels in [0, 1]
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    vision_type: str = "scratch"
    vision_act: str = "gelu"
    vision_norm_eps: float = 1e-5
    llm: str = ""  # Hugging Face folders; weights that are not learned stay there
    vision: str = ""
    train_vision: bool = False
    lora_rank: int = 0  # 0: no adapters, the decoder itself learns
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = False  # compute the inside of layers again when going backward

    may_be_zero: ClassVar[tuple[str, ...]] = (
        "new_tokens",
        "sliding_window",
        "lora_rank",
        "lora_dropout",
    )

    def __post_init__(self) -> None:
        self.must("num_hidden_layers", self.num_hidden_layers <= 1000, "be at most 1000")
        super().__post_init__()
        scaling, std = self.rope_scaling, self.image_std
        sizes = len(scaling) in (0, 1, 4) and all(x > 0 for x in scaling)
        in_order = scaling[1:2] <= scaling[2:3]
        rule = "be a factor, or factor, low, high, length, above 0"
        self.must("rope_scaling", sizes and in_order, rule)
        self.must("sliding_window", self.sliding_window == 0, "be 0")
        self.must("image_mean", len(self.image_mean) == 3, "be three numbers")
        self.must("image_std", len(std) == 3 and min(std) > 0, "be three numbers above 0")
        self.must("new_tokens", self.new_tokens < self.vocab_size, "be below vocab_size")
        self.must("lora_dropout", self.lora_dropout < 1, "be below 1")
        for name, known in {"vision_type": ENCODERS, "vision_act": ACTIVATIONS}.items():
            self.must(name, getattr(self, name) in known, f"be one of {', '.join(known)}")

    @property
    def usual_flags(self) -> dict[str, float | str]:
        """The papers' rule, and their learning rate where something pretrained learns"""
        rate = {"adam_lr": 0.0002} if self.llm or self.train_vision or self.lora_rank else {}
        return {"weigh": "update"} | rate

    def make_tokenizer(self) -> data.Special:
        if self.llm:
            return PretrainedTokenizer(Path(self.llm), self.vocab_size - NEW_TOKENS)
        plain = {f.name: getattr(self, f.name) for f in fields(Config)}
        return data.tokenizer_for(Config(**plain))

    def folder_of(self, name: str) -> str:
        """The pretrained folder that holds a weight, "" if none does"""
        if name.startswith("vision_model."):
            return self.vision
        return "" if is_added(name) else self.llm

    def frozen(self, name: str) -> bool:
        """Does a weight stay as it was read or drawn, whatever learns?"""
        if name.startswith("vision_model."):
            return not self.train_vision
        return self.lora_rank > 0 and not is_added(name)

    def borrowed(self, name: str) -> bool:
        """Does a run leave a weight in its pretrained folder?"""
        return self.frozen(name) and self.folder_of(name) != ""


def is_added(name: str) -> bool:
    """Is a weight between encoder and decoder, or does it adapt the decoder?"""
    return name.startswith(("multi_modal", "routers")) or "lora_" in name or name.endswith(".new")


class PretrainedLM(VideoLM):
    """A VideoLM into which the modules of pretrained folders are injected."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        c = config
        self.gradient_checkpointing = c.gradient_checkpointing
        self.vision_model = ENCODERS[c.vision_type](c)
        self.rope_frequency = scale_frequencies(self.rope_frequency, c.rope_scaling)
        lora = (c.lora_rank, c.lora_alpha, c.lora_dropout)
        for block in self.layers:
            attention = block.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                inject(attention, name, c.attention_bias, *lora)
            inject(attention, "o_proj", c.output_bias, *lora)
            for name in ("gate_proj", "up_proj", "down_proj"):
                inject(block.mlp, name, False, *lora)
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

    def run_layer(self, *args: object) -> tuple:
        if self.gradient_checkpointing and self.training:
            return checkpoint(super().run_layer, *args, use_reentrant=False)
        return super().run_layer(*args)

    def rerouted(self, config: Config, seed: int) -> "PretrainedLM":
        model = skeleton(config)
        model.load_state_dict(self.own(), strict=False, assign=True)
        return learn_in_float32(draw_missing(model, seed, self.norm.weight.device))

    def adapt_source(self, source: data.Source, folder: Path) -> data.Source:
        """A frozen encoder of a folder encodes each clip once, into features/ beside the run."""
        if self.config.borrowed("vision_model.") and isinstance(source, Clips):
            source.encode = partial(encode_once, self, source, folder.parent / "features")
        return source


def inject(owner: nn.Module, name: str, bias: bool, rank: int, *lora: float) -> None:
    """Put a linear map with LoRA or a bias in the place of a plain one."""
    plain = getattr(owner, name)
    if bias or rank:
        size = (plain.in_features, plain.out_features)
        setattr(owner, name, LoraLinear(*size, bias, rank, *lora))


def scale_frequencies(frequency: list[float], scaling: tuple[float, ...]) -> list[float]:
    """RoPE scalings: a linear one slows all frequencies, Llama 3's those with long waves."""
    if not scaling:
        return frequency
    if len(scaling) == 1:
        return [f / scaling[0] for f in frequency]
    factor, low, high, length = scaling
    scaled = []
    for f in frequency:
        waves = length * f / (2 * math.pi)  # in the original length
        same = min(1.0, max(0.0, (waves - low) / (high - low)))  # 0: slowed in full
        scaled.append(same * f + (1 - same) * f / factor)
    return scaled


# --- building -------------------------------------------------------------------------------------


def pretrained(
    sizes: PretrainedConfig, llm: str = "", vision: str = "", new_tokens: int = 0
) -> PretrainedConfig:
    """`sizes` with the decoder and the encoder of two Hugging Face folders

    new_tokens: special tokens that extend the vocabulary of the decoder
    Raises ValueError, naming the file, for what is of no known family or does not fit together.
    """
    found = {}
    if llm:
        found |= huggingface.read_fields(llm, huggingface.decoder_fields)
    if vision:
        found |= huggingface.read_fields(vision, huggingface.encoder_fields)
    vocabulary = found.get("vocab_size", sizes.vocab_size)
    try:
        found["vocab_size"] = vocabulary + new_tokens
        return replace(sizes, **found, llm=llm, vision=vision, new_tokens=new_tokens)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{llm or vision}/config.json must be of a known model: {error}") from None


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
    return draw_missing(model, seed, device)


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


# --- command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainedFlags(TrainConfig):
    llm: str = flag("", "Hugging Face folder of a Llama, Mistral or Qwen2: the decoder")
    vision: str = flag("", "Hugging Face folder of a CLIP or SigLIP: the encoder")
    train_vision: bool = flag(False, "let the encoder learn too")
    pool: int = flag(0, "a frame is CLS and a pool x pool grid (0: 3 with --vision)")
    lora_rank: int = flag(128, "rank of the adapters, 0: the decoder itself learns")
    lora_alpha: float = flag(256.0, "the adapters' update is scaled by alpha / rank")
    lora_dropout: float = flag(0.05, "dropout before the adapters")
    gradient_checkpointing: bool = flag(False, "less memory, more time")
    merge: str = flag("", "run folder whose adapters to merge into --out instead")

    may_be_zero: ClassVar[tuple[str, ...]] = (
        *TrainConfig.may_be_zero,
        "pool",
        "lora_rank",
        "lora_dropout",
    )


SHARED = {f.name for f in fields(TrainConfig)}  # flags that train.py has too
OWN = {f.name for f in fields(PretrainedFlags)} - SHARED


def sizes_of(cfg: PretrainedFlags) -> PretrainedConfig:
    """The dense config of the folders, with a preset for what they lack"""
    preset = SIZES.get(cfg.preset) or core.preset(cfg.preset)
    plain = {f.name: getattr(preset, f.name) for f in fields(Config)}
    adapted = cfg.llm or cfg.preset in SIZES
    sizes = PretrainedConfig(
        **{**plain, "pool": 1, "vocab_size": len(data.Tokenizer())},
        train_vision=cfg.train_vision,
        lora_rank=cfg.lora_rank if adapted else 0,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        gradient_checkpointing=cfg.gradient_checkpointing,
    )
    pool = cfg.pool or (3 if cfg.vision else preset.pool)
    found = pretrained(sizes, cfg.llm, cfg.vision, NEW_TOKENS if cfg.llm else 0)
    return replace(found, pool=pool)


def prepare_run(cfg: PretrainedFlags, given: set[str]) -> tuple[TrainConfig, PretrainedLM]:
    """The settings of a run, as train.py has them, and its model, as it begins or was saved"""
    for name in ("llm", "vision"):
        if path := getattr(cfg, name):  # the same from any folder
            cfg = replace(cfg, **{name: str(Path(path).resolve())})
    base = {name: getattr(cfg, name) for name in SHARED}
    if cfg.resume:
        settings = train.settings(TrainConfig(**base), given & SHARED)
        return settings, saved_model(cfg, given, settings.folder)
    check_useful(cfg, given)
    sizes = sizes_of(cfg)
    usual = {name: value for name, value in sizes.usual_flags.items() if name not in given}
    base |= {**usual, "preset": "tiny"}  # the folders have their sizes
    given = given | {"preset", *usual}
    settings = train.settings(TrainConfig(**base), given & SHARED)
    settings = replace(settings, preset=cfg.preset)
    if not cfg.out:
        begins = Path(cfg.llm or cfg.vision or cfg.preset).name
        settings = replace(settings, out=f"out/{begins}-{settings.folder.name}")
        train.check_new(settings.folder)
    return settings, learn_in_float32(first_model(cfg, settings, sizes))


def check_useful(cfg: PretrainedFlags, given: set[str]) -> None:
    """Raises ValueError for a flag that would change nothing."""
    if cfg.init:
        raise ValueError("init must be left out here: python train.py --init converts any run")
    adapted = cfg.llm or cfg.preset in SIZES
    needs = {
        "train_vision": cfg.vision,
        "lora_rank": adapted,
        "lora_alpha": adapted,
        "lora_dropout": adapted,
    }
    for name in sorted(given & needs.keys()):
        if not needs[name]:
            got = getattr(cfg, name)
            raise ValueError(f"{name} must be left out where it changes nothing, got {got}")


def saved_model(cfg: PretrainedFlags, given: set[str], folder: Path) -> VideoLM:
    """The model of the run to resume. Raises ValueError for a flag that it did not begin with."""
    model = core.load(folder)
    for name in sorted(given & OWN - {"merge", "gradient_checkpointing"}):
        now, was = getattr(cfg, name), getattr(model.config, name, "")
        if now != was:
            raise ValueError(f"{name} must be {was or 'left out'} to resume {folder}, got {now}")
    if "gradient_checkpointing" in given:  # only how it is computed
        model.gradient_checkpointing = cfg.gradient_checkpointing
    return model


def first_model(
    cfg: PretrainedFlags, settings: TrainConfig, sizes: PretrainedConfig
) -> PretrainedLM:
    """The model before its first step; the plan arank looks at the dense one first."""
    dense = None
    if cfg.plan == "arank":
        dense = build(sizes, cfg.seed).to(core.pick_device(cfg.device))
    return build(train.route(settings, sizes, dense), cfg.seed)


def main(argv: list[str] | None = None) -> None:
    cfg, given = parse(PretrainedFlags, argv, __doc__)
    if not cfg.merge:
        return train.run(*prepare_run(cfg, given))
    new = Path(cfg.out)
    if not cfg.out or new.exists():
        raise ValueError(f"out must be a new folder for the merged run, got {cfg.out!r}")
    core.save(new, merge(core.load(Path(cfg.merge))))
    settings = core.read_json(Path(cfg.merge) / "train.json")
    core.write_json(new / "train.json", settings)
    print(f"{new}: {cfg.merge} without adapters")


if __name__ == "__main__":
    run_main(main)
