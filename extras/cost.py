"""The FLOPs columns of both papers, and what this code computes, by one formula.

    python -m extras.cost

A multiply-accumulate (MAC) is two FLOPs. VideoLLM-MoD counts MACs, gamma-MoD
counts FLOPs.
"""

from dataclasses import dataclass

from torch import nn

from data import Batch
from mod import Groups, capacity, placement
from model import Config, VideoLM, parse, run_main

# Sizes of the papers' decoders, with encoders as large as theirs.
SIZES = {
    # VideoLLM-MoD: Llama-3-8B, an encoder of the size of SigLIP-L/16, 1 + 3 x 3 tokens a frame.
    "llama3-8b": Config(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        rope_theta=500000.0,
        image_size=384,
        patch_size=16,
        pool=3,
        vision_hidden_size=1024,
        vision_intermediate_size=4096,
        vision_layers=24,
        vision_heads=16,
        keep=(1.0,) * 32,
    ),
    # gamma-MoD: Vicuna-7B, an encoder of the size of CLIP-L/14, CLS and 24 x 24 patches.
    "vicuna-7b": Config(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
        image_size=336,
        patch_size=14,
        pool=24,
        vision_hidden_size=1024,
        vision_intermediate_size=4096,
        vision_layers=24,
        vision_heads=16,
        keep=(1.0,) * 32,
    ),
}

# --- the formula ----------------------------------------------------------------------------------


def computed(
    keep: tuple[float, ...], text: int, frames: int, tokens_per_frame: int
) -> list[int]:
    """Tokens that each layer computes: text, and each frame's capacity.    Eq. 3 of VideoLLM-MoD

    keep: the placement, a keep ratio per layer;  text: text tokens of the stream
    """
    return [text + frames * capacity(tokens_per_frame, r) for r in keep]


def linear_maps(config: Config) -> list[tuple[int, int]]:
    """(inputs, outputs) of the seven linear maps in a decoder layer."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]  # q, k, v, o
    mlp = [(width, inner), (width, inner), (inner, width)]  # gate, up, down
    return attention + mlp


def encoder_macs(config: Config) -> int:
    """MACs of the encoder for one frame. Any encoder is counted as a CLIP."""
    width = config.vision_hidden_size
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1  # with CLS
    linears = tokens * (4 * width * width + 2 * width * config.vision_intermediate_size)
    attention = 2 * tokens * tokens * width
    embedding = patches * 3 * config.patch_size**2 * width
    return embedding + config.vision_layers * (linears + attention)


def flops(
    config: Config, tokens: list[float], frames: int = 0, head: float = 0, lora_rank: int = 0
) -> dict[str, float]:
    """MACs of one forward pass of one stream, by term.    Eq. 4 of VideoLLM-MoD

    tokens: how many tokens each layer computes;  frames: images encoded and projected
    head: tokens whose logits are computed;  lora_rank: of adapters on every linear map, not merged
    Returns {term: MACs}. A MAC is two FLOPs.
    Attention is not halved for causality, as in torch's FLOP counter. Norms, activations, RoPE and
    the router are left out, as usual. The paper's equation has multi-head attention and an FFN of
    two matrices. Its tables count what Llama 3 has, grouped queries and SwiGLU, and so do we.
    """
    width, vision_width = config.hidden_size, config.vision_hidden_size
    queries = config.num_attention_heads * config.head_dim
    maps, total = linear_maps(config), sum(tokens)
    adapters = total * sum(inputs + outputs for inputs, outputs in maps)
    adapters += head * (width + config.vocab_size)
    return {
        "linears": total * sum(inputs * outputs for inputs, outputs in maps),
        "attention": sum(2 * n * n * queries for n in tokens),
        "head": head * width * config.vocab_size,
        "lora": lora_rank * adapters,
        "projector": frames * config.tokens_per_frame * (vision_width * width + width * width),
        "vision": frames * encoder_macs(config),
    }


# --- a training step ------------------------------------------------------------------------------


def muon_matrices(model: VideoLM) -> list[nn.Parameter]:
    """The weights of a model that Muon updates in training."""
    named = model.named_parameters()
    return [p for name, p in named if p.requires_grad and model.uses_muon(name, p)]


def step_flops(
    config: Config,
    batch: Batch,
    matrices: list[nn.Parameter],
    lora_rank: int = 0,
    frozen_encoder: bool = True,
    checkpointing: bool = False,
) -> float:
    """FLOPs of a training step: forward, backward and optimizer.

    matrices: the weights that Muon updates, see `muon_matrices`; only their shapes are read
    lora_rank: above 0, the decoder is frozen and adapters of this rank learn
    frozen_encoder: the encoder only goes forward. Where the batch has features, it does not run.
    checkpointing: the backward pass computes the inside of each layer again
    The backward pass costs one forward pass for the inputs and one more for weights that learn.
    Causal attention is half of all pairs. Muon: five times three products per matrix.
    """
    B, T = batch.tokens.shape
    kept = Groups.plan(batch.group, config.keep, batch.real).max_kept
    tokens = [T if r == 1 else kept[r] for r in config.keep]
    labels = int((batch.labels >= 0).sum())
    macs = flops(config, tokens, batch.frames.shape[1], labels / B, lora_rank)
    macs["attention"] /= 2
    passes = dict.fromkeys(macs, 3)
    if lora_rank:
        passes["linears"] = passes["head"] = 2
    if batch.frames.dim() == 4:  # features of frames
        passes["vision"] = 0
    elif frozen_encoder:
        passes["vision"] = 1
    if checkpointing:
        for term in ("linears", "attention", "lora"):
            passes[term] += 1
    return 2 * B * sum(passes[term] * macs[term] for term in macs) + muon_flops(matrices)


def muon_flops(matrices: list[nn.Parameter]) -> int:
    """FLOPs of Muon's five Newton-Schulz iterations over these matrices."""
    total = 0
    for matrix in matrices:
        m, n = sorted(matrix.shape)
        total += 10 * (2 * m * m * n + m**3)
    return total


# --- the papers' tables ---------------------------------------------------------------------------

PAPER = (  # placement, keep ratio, teraMACs
    ("dense", 1.0, 48.29),
    ("early-exit", 0.0, 7.14),
    ("layer-skip", 0.0, 26.35),
    ("interleaved", 0.2, 30.74),
    ("all", 0.2, 13.18),
    ("all-deep", 0.2, 15.37),
    ("interleaved-deep", 0.2, 31.83),
    ("interleaved", 0.1, 28.54),
    ("interleaved", 0.3, 32.93),
)
GAMMA_PAPER = (  # share of tokens that skip a routed layer, teraFLOPs of LLaVA-HR-7B
    (0.0, 19.2),
    (0.164, 16.3),
    (0.355, 13.0),
    (0.379, 12.6),
    (0.489, 10.7),
    (0.515, 10.3),
    (0.577, 9.3),
    (0.743, 6.5),
)


def paper_cost(plan: str, keep_ratio: float) -> tuple[float, float, int]:
    """Cost of 600 frames x 10 tokens on Llama-3-8B.    Table 1 of VideoLLM-MoD

    Returns three numbers:
    teraMACs as the paper counts: linear maps with unmerged LoRA of rank 128, projector, lm_head on
    the 6,000 vision tokens and some 130 of text; no attention and no encoder.
    teraMACs as this code computes: with attention, without LoRA, one `<frame>` token per frame,
    logits only where text is predicted; no encoder.
    Bytes of keys and values that a frame leaves in the cache, at 2 bytes per number.
    """
    c, frames, text = SIZES["llama3-8b"], 600, 130
    keep, P = placement(plan, c.num_hidden_layers, keep_ratio), c.tokens_per_frame
    paper_tokens = computed(keep, text, frames, P)
    paper = flops(c, paper_tokens, frames, head=text + frames * P, lora_rank=128)
    as_paper = sum(paper[term] for term in ("linears", "lora", "head", "projector"))
    here_tokens = computed(keep, text + frames, frames, P)
    here = flops(c, here_tokens, frames, head=text + frames)
    as_here = sum(here.values()) - here["vision"]
    row_bytes = 2 * 2 * c.num_key_value_heads * c.head_dim  # a key and a value
    return as_paper / 1e12, as_here / 1e12, row_bytes * sum(computed(keep, 1, 1, P))


def gamma_cost(skipped: float, tokens: int = 1400) -> float:
    """TeraFLOPs of a prefill where 4 of 32 layers are dense.    Table 1 of gamma-MoD

    skipped: share of tokens that skip each routed layer;  tokens: of the prompt
    Tokens are cut to an integer, as in the released cal_flops.py; `capacity` rounds to the nearest.
    """
    routed = int(tokens * (1 - skipped))
    macs = flops(SIZES["vicuna-7b"], [tokens] * 4 + [routed] * 28)
    return 2 * sum(macs.values()) / 1e12


def print_video_table() -> None:
    print("VideoLLM-MoD. Llama-3-8B, 600 frames x 10 tokens, a forward pass in teraMACs")
    print(
        f"{'placement':18}{'keep':>4}{'paper':>8}{'formula':>9}{'computed here':>15}"
        f"{'of dense':>10}{'KV KiB/frame':>14}"
    )
    _, dense, _ = paper_cost("dense", 1.0)
    for plan, ratio, paper in PAPER:
        formula, here, cache = paper_cost(plan, ratio)
        print(
            f"{plan:18}{ratio:4.1f}{paper:8.2f}{formula:9.2f}{here:15.2f}"
            f"{here / dense:10.1%}{cache / 1024:14.0f}"
        )
    encoder = flops(SIZES["llama3-8b"], [], frames=600)["vision"] / 1e12
    print(
        "formula: as the paper counts (unmerged LoRA, lm_head over vision tokens, no\n"
        "attention). computed here: attention counted, lm_head only over text, no LoRA,\n"
        f"one <frame> token a frame; not the encoder, {encoder:.1f} T in every row.\n"
    )


def print_gamma_table() -> None:
    print(
        "gamma-MoD. Vicuna-7B, 1,400 tokens, 4 dense and 28 routed layers, in teraFLOPs\n"
        "(2 a MAC, attention without causal halving); what skips is as measured there\n"
        "skipped   paper formula"
    )
    for skipped, paper in GAMMA_PAPER:
        print(f"{skipped:7.1%}{paper:8.1f}{gamma_cost(skipped):8.2f}")


@dataclass(frozen=True)
class CostConfig:
    """There are no flags."""


def main(argv: list[str] | None = None) -> None:
    parse(CostConfig, argv, __doc__)
    print_video_table()
    print_gamma_table()


if __name__ == "__main__":
    run_main(main)
