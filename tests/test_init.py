"""A fresh weight has the spread of its kind: of its fan-in, less where it writes to the residual, and not of its fan-out."""

import math

import pytest
import torch

from model import Config, VideoLM, initialise

# Where a map is not square its fan-out is another number than its fan-in.
SIZES = Config(hidden_size=192, intermediate_size=400, num_hidden_layers=1, keep=(0.5,), num_attention_heads=4,
               num_key_value_heads=2, head_dim=32, vocab_size=300, image_size=40, patch_size=4, pool=1,
               vision_hidden_size=96, vision_intermediate_size=260, vision_layers=1)
SPREAD = {  # of each weight that is drawn
    "embed_tokens.weight": 0.5,
    "layers.0.self_attn.q_proj.weight": 192**-0.5,
    "layers.0.self_attn.k_proj.weight": 192**-0.5,
    "layers.0.self_attn.v_proj.weight": 192**-0.5,
    "layers.0.self_attn.o_proj.weight": 0.3 * 128**-0.5,  # 4 heads of 32
    "layers.0.mlp.gate_proj.weight": 192**-0.5,
    "layers.0.mlp.up_proj.weight": 192**-0.5,
    "layers.0.mlp.down_proj.weight": 0.3 * 400**-0.5,
    "lm_head.weight": 192**-0.5,
    "routers.0.weight": 0.1 * 192**-0.5,
    "multi_modal_projector.linear_1.weight": 96**-0.5,
    "multi_modal_projector.linear_2.weight": 192**-0.5,
    "vision_model.embeddings.class_embedding": 96**-0.5,
    "vision_model.embeddings.position_embedding.weight": 0.5,
    "vision_model.embeddings.patch_embedding.weight": 48**-0.5,  # three colours of 4 x 4 pixels
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": 96**-0.5,
    "vision_model.encoder.layers.0.self_attn.k_proj.weight": 96**-0.5,
    "vision_model.encoder.layers.0.self_attn.v_proj.weight": 96**-0.5,
    "vision_model.encoder.layers.0.self_attn.out_proj.weight": 0.3 * 96**-0.5,
    "vision_model.encoder.layers.0.mlp.fc1.weight": 96**-0.5,
    "vision_model.encoder.layers.0.mlp.fc2.weight": 0.3 * 260**-0.5,
}


def test_each_weight_is_drawn_with_the_spread_of_its_kind_norms_are_one_and_biases_zero():
    for name, p in initialise(VideoLM(SIZES), 0).named_parameters():
        if name in SPREAD:
            n = p.numel()
            assert p.std().item() == pytest.approx(SPREAD[name], rel=4 / math.sqrt(2 * n)), name
            assert abs(p.mean().item()) < 4 * SPREAD[name] / math.sqrt(n), name
        else:
            is_norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            is_bias = name.endswith("bias") and name.startswith(("vision_model", "multi_modal_projector"))
            assert (is_norm and (p == 1).all()) or (is_bias and (p == 0).all()), name
    assert SPREAD.keys() <= {name for name, _ in VideoLM(SIZES).named_parameters()}


def test_a_seed_names_the_weights():
    a, b, other = (initialise(VideoLM(SIZES), seed).state_dict() for seed in (3, 3, 4))
    for name in SPREAD:
        assert torch.equal(a[name], b[name]) and not torch.equal(a[name], other[name])
