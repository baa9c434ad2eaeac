"""Hugging Face folders: what their config.json, weights and tokenizer.json mean here.

extras/pretrained.py builds models from them; there is no command. Nothing is downloaded, and no
pickle is read.
"""

import re
from collections.abc import Callable
from itertools import takewhile
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from data import SPECIAL, Special
from extras.rope import read_scaling, rope_of
from model import read_json, read_weights

DECODERS: dict[str, dict] = {  # model_type of config.json -> what the file may leave out
    "llama": {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "use_sliding_window": True,
        "max_window_layers": 0,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "attention_bias": False,
    },
}
ALWAYS = {  # whatever the file says
    "llama": {"use_sliding_window": False},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "mlp_bias": False},
    "qwen3": {"mlp_bias": False},
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


def decoder_config(folder: Path) -> dict:
    """config.json of a decoder; what it leaves out is as in transformers."""
    hf = read_json(folder / "config.json")
    must_be("model_type", hf.get("model_type"), list(DECODERS))
    if "num_key_value_heads" in hf:  # null: as many as of queries
        hf["num_key_value_heads"] = hf["num_key_value_heads"] or hf["num_attention_heads"]
    window = hf.get("sliding_window", 4096)  # null: none
    given = {key: value for key, value in hf.items() if value is not None}
    family = hf["model_type"]
    return {**DECODERS[family], **given, **ALWAYS[family], "sliding_window": window}


def decoder_fields(folder: Path) -> dict:
    """Fields of PretrainedConfig for a decoder; RoPE may be spelled in the old or the new way."""
    hf = decoder_config(folder)
    rope, family, heads = rope_of(hf), hf["model_type"], hf["num_attention_heads"]
    kind, scaling = read_scaling(hf, hf["max_position_embeddings"])
    rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    must_be("partial_rotary_factor", rotated, [1.0])
    must_be("hidden_act", hf.get("hidden_act", "silu"), ["silu"])
    if hf["use_sliding_window"] and hf["sliding_window"] is not None:
        refuse_windows(hf, hf["sliding_window"], hf["max_position_embeddings"])
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: hf[name] for name in (*same, "vocab_size", "attention_bias", "mlp_bias")}
    return {
        **fields,
        "num_key_value_heads": hf.get("num_key_value_heads", heads),
        "head_dim": hf.get("head_dim", hf["hidden_size"] // heads),
        "keep": (1.0,) * min(hf["num_hidden_layers"], 1000),
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        "rope_type": kind,
        "rope_scaling": scaling,
        "output_bias": hf["attention_bias"] and family in ("llama", "qwen3"),
        "query_norm": family == "qwen3",
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
    }


def refuse_windows(hf: dict, window: int, longest: int) -> None:
    """Raises ValueError if a layer sees only the last tokens: here each layer sees all."""
    layers, first = min(hf["num_hidden_layers"], 1000), hf["max_window_layers"]
    usual = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    for layer, kind in enumerate(hf.get("layer_types", usual)[:layers]):
        if kind != "full_attention" and window < longest:
            rule = f"sliding_window must be at least max_position_embeddings ({longest})"
            raise ValueError(f"{rule} in each layer, got {window!r:.60} in layer {layer}")


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


def pixel_fields(folder: Path) -> dict:
    """Mean and spread of the pictures that an encoder learned from, where a file has them

    As in transformers, processor_config.json goes before preprocessor_config.json.
    """
    file = folder / "processor_config.json"
    values = read_json(file).get("image_processor") if file.exists() else None
    if values is None:
        file = folder / "preprocessor_config.json"
        values = read_json(file) if file.exists() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must have an object as image_processor, got {values!r:.60}")
    found = {}
    for name in ("image_mean", "image_std"):
        if values.get(name) is not None:
            found[name] = three_numbers(file, name, values[name])
    return found


def three_numbers(file: Path, name: str, values: object) -> tuple[float, ...]:
    numbers = values if isinstance(values, list) else []
    kinds = {type(x) for x in numbers}
    if len(numbers) != 3 or not kinds <= {int, float}:
        raise ValueError(f"{file} must have three numbers as {name}, got {values!r:.60}")
    if name == "image_std" and min(numbers) <= 0:
        raise ValueError(f"{file} must have numbers above 0 as {name}, got {values!r:.60}")
    return tuple(numbers)


def decoder_weights(folder: Path, tied: bool) -> dict[str, Tensor]:
    """Weights of a decoder by our names; tied: the head is the table, whichever the file holds."""
    found = {}
    for name, t in read_shards(folder).items():
        if not name.endswith("rotary_emb.inv_freq"):
            found[name.removeprefix("model.")] = t
    if tied and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        found.setdefault("embed_tokens.weight", head)
    return found


def has_own_head(folder: Path) -> bool:
    """Does a folder hold a head that is not the embedding table? Then transformers ties nothing."""
    found = decoder_weights(folder, False)
    head, table = found.get("lm_head.weight"), found.get("embed_tokens.weight")
    if head is None or table is None:
        return False
    return head.dtype != table.dtype or not torch.equal(head, table)


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
    return weights


def shards_of(folder: Path) -> list[str]:
    """The names of the files that hold the weights: as in transformers, a whole one goes first."""
    whole, index = "model.safetensors", folder / "model.safetensors.index.json"
    if (folder / whole).exists() or not index.exists():
        return [whole]
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
    `opening`, before a text. first: rows of the model, so the id of the first special token
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
        super().__init__(first, self.before_text())
        self.text.encode_special_tokens = True
        known = [*self.text.get_vocab().values(), *self.opening]
        self.entries = 1 + max(known, default=-1)
        if not 0 < self.entries <= first:
            rule = f"{file} must have at most {first} entries, the rows of the model"
            raise ValueError(f"{rule}, got {self.entries}")

    def before_text(self) -> list[int]:
        """The ids with which the template begins a text; what ends one stands after it."""
        encoding = self.text.encode("a")
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [i for i, special in takewhile(itemgetter(1), pairs)]

    def encode(self, text: str) -> list[int]:
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no text become U+FFFD, so a model's reply is kept as ids too."""
        return self.text.decode([i for i in ids if i < self.entries])


NEW_TOKENS = len(SPECIAL)  # rows that a pretrained vocabulary gets
