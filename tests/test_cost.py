"""The formula of the cost is what torch counts, and to keep less never costs more."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import watches
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod import computed, flops
from model import Config, VideoLM


@given(watches(max_streams=1, masked="text"), st.integers(0, 3))
def test_the_formula_is_the_count_of_a_real_forward_pass(watch, head):
    model, batch = watch.model, watch.whole()
    T, F = batch.tokens.shape[1], batch.frames.shape[1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused ones go uncounted
        out = model(*batch)
        model.logits(out.hidden[:, :head])
    c = model.config
    tokens = computed(c.keep, T - F * c.tokens_per_frame, F, c.tokens_per_frame)
    assert tokens == [int(out.keep[layer].sum()) if layer in out.keep else T for layer in range(len(tokens))]
    assert 2 * sum(flops(c, tokens, F, min(head, T)).values()) == counter.get_total_flops()


def test_the_formula_is_the_count_of_an_encoder_of_any_number_of_patches():
    model = VideoLM(Config())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.vision_model(torch.zeros(2, 3, 48, 48).byte())  # of 6 x 6 patches
    assert 2 * flops(model.config, [], 2)["vision"] == counter.get_total_flops()
    assert not any(flops(model.config, []).values())


@given(watches())
def test_a_layer_computes_all_streams_of_a_batch_in_one_call(watch):
    called = []
    for layer in watch.model.layers:
        layer.register_forward_hook(lambda block, rows, out: called.append(len(out)))
    watch.model(*watch.whole())
    assert len(called) <= len(watch.model.layers) and {*called} <= {len(watch.seed)}
