"""Hugging Face folders: what their config.json, weights and tokenizer.json mean here.

extras/pretrained.py builds models from them; there is no command. Nothing is downloaded, and no
pickle is read.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data import SPECIAL, Special
from model import FLOATS, read_json, read_weights

DECODERS: dict[str, dict] = {  # model_type of config.json -> what the file may leave out
    "llama": {"attention_bias": False},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False},
}
BIAS = {"mistral": {"attention_bias": False}, "qwen2": {"attention_bias": True}}  # always
ROPE = {  # kind of RoPE scaling -> its numbers
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
ENCODERS: dict[str, dict] = {
    "clip": {
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "siglip": {
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
}
ENCODER_SIZES = {  # what the files of both families may leave out
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}


def read_fields(folder: str, read: Callable[[Path], dict]) -> dict:
    """read(folder); whatever is wrong with config.json becomes a sentence that names it."""
    try:
        return read(Path(folder))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{folder}/config.json must be of a known model: {why}") from None


def decoder_fields(folder: Path) -> dict:
    """Fields of PretrainedConfig for a decoder; RoPE may be spelled in the old or the new way."""
    hf = read_json(folder / "config.json")
    family = hf.get("model_type")
    window = hf.get("sliding_window", 4096) if family == "mistral" else None
    given = {key: value for key, value in hf.items() if value is not None}
    hf = {**DECODERS.get(str(family), {}), **given, **BIAS.get(str(family), {})}
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    must_be("model_type", family, list(DECODERS))
    must_be("rope_type", kind, list(ROPE))
    must_be("hidden_act", hf.get("hidden_act", "silu"), ["silu"])
    must_be("partial_rotary_factor", rotated, [1.0])
    must_be("use_sliding_window", hf.get("use_sliding_window", False), [False])
    must_be("sliding_window", window, [None])
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: hf[name] for name in (*same, "vocab_size")}
    heads, layers = hf["num_attention_heads"], min(hf["num_hidden_layers"], 1000)
    bias = hf["attention_bias"]
    return {
        **fields,
        "num_key_value_heads": hf.get("num_key_value_heads", heads),
        "head_dim": hf.get("head_dim", hf["hidden_size"] // heads),
        "keep": (1.0,) * layers,
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        "rope_scaling": tuple(rope[key] for key in ROPE[kind]),
        "attention_bias": bias,
        "output_bias": bias and family == "llama",
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
    }


def must_be(name: str, value: object, known: list) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(map(str, known))}, got {value!r:.60}")


def encoder_fields(folder: Path) -> dict:
    """Fields of PretrainedConfig for an encoder, from a file of both towers or of this one."""
    hf = read_json(folder / "config.json")
    family = str(hf.get("model_type")).removesuffix("_vision_model")
    if family not in ENCODERS:
        must_be("model_type", hf.get("model_type"), list(ENCODERS))
    tower = hf.get("vision_config_dict") or hf.get("vision_config") or hf
    hf = {**ENCODER_SIZES, **ENCODERS[family], **tower}
    pixels = folder / "preprocessor_config.json"
    if pixels.exists():
        for key, value in read_json(pixels).items():
            if key in ("image_mean", "image_std"):
                hf[key] = tuple(value)
    return {
        "vision_type": family,
        "vision_hidden_size": hf["hidden_size"],
        "vision_intermediate_size": hf["intermediate_size"],
        "vision_layers": hf["num_hidden_layers"],
        "vision_heads": hf["num_attention_heads"],
        "vision_act": hf["hidden_act"],
        "vision_norm_eps": hf["layer_norm_eps"],
        "image_size": hf["image_size"],
        "patch_size": hf["patch_size"],
        "image_mean": hf["image_mean"],
        "image_std": hf["image_std"],
    }


def decoder_weights(folder: Path, tied: bool) -> dict[str, Tensor]:
    """Weights of a decoder by our names; tied: a head that the file holds all the same is left."""
    found = {}
    for name, t in read_shards(folder).items():
        name = name.removeprefix("model.")
        if not (name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")):
            found[name] = t
    return found


def encoder_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of an encoder by our names, of a folder with both towers or with this one."""
    weights, prefix = read_shards(folder), "vision_model."
    if not any(name.startswith(prefix) for name in weights):  # then no name has it
        weights = {prefix + name: t for name, t in weights.items()}
    found = {}
    for name, t in weights.items():
        if name.startswith(prefix) and not name.endswith("position_ids"):
            found[name] = t
    return found


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The weights of one safetensors file, or of those that its index names; mapped, not copied."""
    if not list(folder.glob("model*.safetensors*")) and list(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} must hold safetensors, got .bin files, whose pickle is not read here: "
            "save them anew with transformers' save_pretrained"
        )
    weights = {}
    for shard in shards_of(folder):
        weights |= read_weights(folder / shard)[0]
    largest = max(weights.values(), key=Tensor.numel, default=torch.zeros(0))
    for name, t in weights.items():  # norms can be of another type
        weights[name] = t.to(largest.dtype) if t.dtype in FLOATS else t
    return weights


def shards_of(folder: Path) -> list[str]:
    """The names of the files that hold the weights"""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    listed = read_json(index).get("weight_map")
    shards = set(map(str, listed.values())) if isinstance(listed, dict) else set()
    for shard in shards or {""}:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):
            raise ValueError(
                f"{index} must map weights to safetensors files beside it, got {shard!r:.99}"
            )
    return sorted(shards)


class PretrainedTokenizer(Special):
    """The vocabulary of a folder's tokenizer.json; the special tokens of data.py come after it.

    Its own special tokens are never read in text nor shown in it; only its template adds some, as
    `opening`. first: rows of the model, so the id of the first special token
    Raises ValueError: no package tokenizers, no such file, more entries than rows.
    """

    def __init__(self, folder: Path, first: int) -> None:
        file = folder / "tokenizer.json"
        try:
            import tokenizers  # optional

            self.text = tokenizers.Tokenizer.from_file(str(file))
        except ImportError:
            raise ValueError(
                f"tokenizers must be installed to read {file} (pip install tokenizers), got none"
            ) from None
        except Exception as error:  # tokenizers raises no narrower one
            raise ValueError(f"{file} must be the tokenizer of a model: {error}") from None
        self.text.no_truncation()
        self.text.no_padding()
        super().__init__(first, self.text.encode("").ids)
        self.text.encode_special_tokens = True
        known = [*self.text.get_vocab().values(), *self.opening]
        self.entries = 1 + max(known, default=-1)
        if not 0 < self.entries <= first:
            rule = f"{file} must have at most {first} entries, the rows of the model"
            raise ValueError(f"{rule}, got {self.entries}")

    def encode(self, text: str) -> list[int]:
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no text become U+FFFD, so a model's reply is kept as ids too."""
        return self.text.decode([i for i in ids if i < self.entries])


NEW_TOKENS = len(SPECIAL)  # rows that a pretrained vocabulary gets
