"""The config of a model of pretrained folders: Config, and what those need beyond it.

extras/pretrained_model.py builds the model; there is no command.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import data
from extras import rope
from extras.encoders import ACTIVATIONS, ENCODERS
from extras.huggingface import NEW_TOKENS, PretrainedTokenizer
from model import Config


@dataclass(frozen=True)
class PretrainedConfig(Config):
    """Config, and what pretrained folders need beyond it."""

    new_tokens: int = 0  # the last of the vocabulary, unknown to the pretrained decoder
    rope_type: str = ""  # of rope.NUMBERS; earlier runs had the numbers alone
    rope_scaling: tuple[float, ...] = ()
    sliding_window: int = 0  # of earlier versions; must be 0
    attention_bias: bool = False  # of q, k and v (Qwen2)
    output_bias: bool = False  # of o
    mlp_bias: bool = False
    query_norm: bool = False  # each head of queries and keys is normed (Qwen3)
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

    may_be_zero = (
        "new_tokens",
        "sliding_window",
        "lora_rank",
        "lora_dropout",
    )

    def __post_init__(self) -> None:
        self.must("num_hidden_layers", self.num_hidden_layers <= 1000, "be at most 1000")
        super().__post_init__()
        if not self.rope_type:
            kind = rope.OLD.get(len(self.rope_scaling), "default")
            object.__setattr__(self, "rope_type", kind)  # the dataclass is frozen
        self.must("sliding_window", self.sliding_window == 0, "be 0")
        std = self.image_std
        self.must("image_mean", len(self.image_mean) == 3, "be three numbers")
        self.must("image_std", len(std) == 3 and min(std) > 0, "be three numbers above 0")
        self.must("new_tokens", self.new_tokens < self.vocab_size, "be below vocab_size")
        self.must("lora_dropout", self.lora_dropout < 1, "be below 1")
        choices = {"vision_type": ENCODERS, "vision_act": ACTIVATIONS, "rope_type": rope.NUMBERS}
        for name, known in choices.items():
            self.must(name, getattr(self, name) in known, f"be one of {', '.join(known)}")
        rope.check_scaling(self.rope_theta, self.rope_type, self.rope_scaling)

    @property
    def rope_scale(self) -> float:
        """YaRN makes queries and keys longer by its attention factor."""
        return self.rope_scaling[1] if self.rope_type == "yarn" else 1.0

    @property
    def usual_flags(self) -> dict[str, float | str]:
        """The papers' rule, fewer streams to evaluate on, and a rate for what is pretrained"""
        rate = {"adam_lr": 0.0002} if self.llm or self.train_vision or self.lora_rank else {}
        return {"weigh": "update", "streams": 16} | rate

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
