"""A skipped token keeps every bit, a block that changes nothing changes nothing, r = 1 is the dense layer."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, Routing, normal, routings, watches

import mod
from mod import GATES
from model import rotations

GATE = st.sampled_from(sorted(GATES))


def update(case: Routing, block, x, gate):
    """routed_update with the tokens of a case -> y, keep on the host"""
    position = torch.arange(x.shape[1]).expand(x.shape[:2])
    x, score, position = (t.to(case.device) for t in (x, case.score, position))
    y, keep = mod.routed_update(block, x, score, case.groups(), case.r, GATES[gate], position)
    return y.cpu(), keep.cpu()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int64)


@given(routings(), SEEDS, GATE)
def test_a_skipped_token_keeps_every_bit_whatever_the_block_does(case, seed, gate):
    x = normal(seed, *case.id.shape, 3)
    x[normal(seed + 1, *x.shape) > 1] = -0.0
    for poison in (torch.inf, torch.nan):
        y, keep = update(case, lambda rows, *_, poison=poison: rows + poison, x, gate)
        assert torch.equal(keep, mod.select(case.score.to(case.device), case.groups(), case.r).cpu())
        assert torch.equal(bits(y[~keep]), bits(x[~keep]))
        assert not y[keep & (case.id < 0)].isfinite().any()


@given(routings(), SEEDS, GATE)
def test_a_block_that_changes_nothing_leaves_everything_as_it_is_under_any_gate(case, seed, gate):
    x = normal(seed, *case.id.shape, 3)
    assert torch.equal(update(case, lambda rows, *_: rows, x, gate)[0], x)


@given(watches(ratios=st.sampled_from([0.2, 0.5, 1.0]), max_chunks=2), GATE)
def test_a_keep_ratio_of_one_is_the_dense_layer_bit_for_bit_whatever_the_router_and_the_gate(watch, gate):
    model, batch = watch.model, watch.whole()
    c = model.config = replace(model.config, keep=(1.0,) * len(model.layers), gate=gate)  # its routers stay
    out = model(*batch)
    x, position = model.embed(batch.tokens, batch.frames), torch.ones_like(batch.tokens).cumsum(1) - 1
    for block in model.layers:
        x = block(x, position, rotations(position, c.head_dim, c.rope_theta))
    assert torch.equal(out.hidden[batch.groups.real], x[batch.groups.real]) and not out.keep
