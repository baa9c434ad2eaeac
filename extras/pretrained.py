"""Start from pretrained Hugging Face folders, adapt them by LoRA, merge these.

    python -m extras.pretrained --llm DIR --vision DIR --data DIR
    python -m extras.pretrained --merge RUN --out NEW

All flags of train.py but --init are there too, and --plan measured. By default
--weigh is update, --streams 16 and --adam_lr 0.0002.
A run is evaluated, resumed and converted as any other: eval.py RUN,
train.py --out RUN --resume, train.py --init RUN.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import data
import model as core
import train
from extras import measured  # noqa: F401  (it adds the plan measured)
from extras.cost import SIZES
from extras.huggingface import NEW_TOKENS
from extras.pretrained_config import PretrainedConfig
from extras.pretrained_model import PretrainedLM, build, learn_in_float32, merge, pretrained
from model import Config, VideoLM, flag, parse, run_main
from train import TrainConfig


@dataclass(frozen=True)
class PretrainedFlags(TrainConfig):
    llm: str = flag("", "Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3: the decoder")
    vision: str = flag("", "Hugging Face folder of a CLIP or SigLIP: the encoder")
    train_vision: bool = flag(False, "let the encoder learn too")
    pool: int = flag(0, "a frame is CLS and a pool x pool grid (0: 3 with --vision)")
    lora_rank: int = flag(128, "rank of the adapters, 0: the decoder itself learns")
    lora_alpha: float = flag(256.0, "the adapters' update is scaled by alpha / rank")
    lora_dropout: float = flag(0.05, "dropout before the adapters")
    gradient_checkpointing: bool = flag(False, "less memory, more time")
    merge: str = flag("", "run folder whose adapters to merge into --out instead")

    may_be_zero = (
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
    """The model before its first step; a plan of train.MEASURED looks at the dense one first."""
    dense = None
    if cfg.plan in train.MEASURED:
        print(f"{cfg.plan} sees frames through an untrained projector, not so after a dense run")
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
