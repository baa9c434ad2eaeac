"""A skipped token keeps every bit, a block that changes nothing changes nothing, r = 1 is the dense layer."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, normal, routings, watches

import mod
from mod import GATES
from model import rotations

GATE = st.sampled_from(sorted(GATES))


@given(routings(), SEEDS, GATE, st.sampled_from([0.0, torch.inf, torch.nan]))
def test_a_skipped_token_keeps_every_bit_and_an_empty_update_changes_nothing(case, seed, gate, update):
    x = normal(seed, *case.score.shape, 3).to(case.score.device)
    x[normal(seed + 1, *x.shape) > 1] = -0.0
    position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    y, keep = mod.routed_update(lambda rows, *_: rows + update, x, case.score, case.groups, case.r,
                                GATES[gate], position)
    assert torch.equal(keep, mod.select(case.score, case.groups, case.r))
    assert torch.equal(y[~keep].view(torch.int64), x[~keep].view(torch.int64))  # bits: -0.0 is not 0.0
    if update == 0:
        assert torch.equal(y, x)
    else:
        assert not y[keep & (case.id < 0)].isfinite().any()


@given(watches(ratios=st.sampled_from([0.2, 0.5, 1.0]), max_chunks=2), GATE)
def test_a_keep_ratio_of_one_is_the_dense_layer_bit_for_bit_whatever_the_router_and_the_gate(watch, gate):
    model, batch = watch.model, watch.whole()
    c = model.config = replace(model.config, keep=(1.0,) * len(model.layers), gate=gate)  # its routers stay
    out = model(*batch)
    x, position = model.embed(batch.tokens, batch.frames), torch.ones_like(batch.tokens).cumsum(1) - 1
    for block in model.layers:
        x = block(x, position, rotations(position, c.head_dim, c.rope_theta))
    assert torch.equal(out.hidden[batch.groups.real], x[batch.groups.real]) and not out.keep
