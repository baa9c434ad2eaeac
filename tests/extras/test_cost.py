"""The formula of the cost is what torch counts, and it gives the papers' columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import watches
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from extras.cost import GAMMA_PAPER, PAPER, computed, flops, gamma_cost, main, paper_cost
from model import Config, VideoLM


@given(watches(max_streams=1, masked="text"), st.integers(0, 3))
def test_the_formula_is_the_count_of_a_real_forward_pass(watch, head):
    model, batch = watch.model, watch.whole()
    T, F = batch.tokens.shape[1], batch.frames.shape[1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused: uncounted
        out = model(*batch)
        model.logits(out.hidden[:, :head])
    c = model.config
    tokens = computed(c.keep, T - F * c.tokens_per_frame, F, c.tokens_per_frame)
    kept = [int(out.keep[layer].sum()) if layer in out.keep else T for layer in range(len(tokens))]
    assert tokens == kept
    assert 2 * sum(flops(c, tokens, F, min(head, T)).values()) == counter.get_total_flops()


def test_the_formula_is_the_count_of_an_encoder_of_any_number_of_patches():
    model = VideoLM(Config())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.vision_model(torch.zeros(2, 3, 48, 48).byte())  # of 6 x 6 patches
    assert 2 * flops(model.config, [], 2)["vision"] == counter.get_total_flops()
    assert not any(flops(model.config, []).values())


def test_the_papers_cost_columns_are_reproduced():
    for skipped, paper in GAMMA_PAPER:
        assert gamma_cost(skipped) == pytest.approx(paper, abs=0.05)
    assert f"{gamma_cost(0.743):.3f}" == "6.523"  # 359 of 1,400 tokens, as the released code counts
    for plan, ratio, paper in PAPER:
        assert paper_cost(plan, ratio)[0] == pytest.approx(paper, abs=0.01)
    dense, routed = paper_cost("dense", 1.0), paper_cost("interleaved", 0.2)
    assert dense[2] == 32 * 11 * 2 * 8 * 128 * 2
    assert routed[2] == (16 * 11 + 16 * 3) * 2 * 8 * 128 * 2
    assert 0.6 < routed[1] / dense[1] < 0.64


def test_the_command_prints_a_row_for_each_of_the_papers_and_fits_a_terminal(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for plan, ratio, paper in PAPER:
        assert any(line.split()[:3] == [plan, f"{ratio}", f"{paper:.2f}"] for line in lines)
    for skipped, paper in GAMMA_PAPER:
        assert any(line.split()[:2] == [f"{skipped:.1%}", f"{paper}"] for line in lines)
