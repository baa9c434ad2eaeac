"""A skipped token keeps every bit, a block that changes nothing changes nothing, r = 1 is the dense layer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, normal, routings, watches
from torch._subclasses.fake_tensor import FakeTensorMode

import mod
from mod import GATES, WEIGHED, Groups
from model import rotations

GATE, WEIGH = st.sampled_from(sorted(GATES)), st.sampled_from(WEIGHED)


@given(routings(), SEEDS, GATE, WEIGH, st.sampled_from([0.0, torch.inf, torch.nan]))
def test_a_skipped_token_keeps_every_bit_and_an_empty_update_changes_nothing(case, seed, gate, weigh, update):
    x = normal(seed, *case.score.shape, 3).to(case.score.device)
    x[normal(seed + 1, *x.shape) > 1] = -0.0
    position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    y, keep = mod.routed_update(lambda rows, *_: rows + update, x, case.score, GATES[gate](case.score), case.groups,
                                case.r, weigh, position, position)
    assert torch.equal(keep, mod.select(case.score, case.groups, case.r))
    assert torch.equal(y[~keep].view(torch.int64), x[~keep].view(torch.int64))  # bits: -0.0 is not 0.0
    if update == 0:
        assert torch.equal(y, x)
    else:
        assert not y[keep & (case.id < 0)].isfinite().any()


def mixes(rows, positions, value_weight):
    """A causal block of one stream: each row depends on its position, and on all before it as they are weighed"""
    at = torch.as_tensor(positions, dtype=rows.dtype, device=rows.device)[:, None]
    values = [row * w for row, w in zip(rows, value_weight, strict=True)]
    return torch.sin(rows + torch.stack(values).cumsum(0) + at) if values else rows


@given(routings(), SEEDS, GATE, WEIGH)
def test_the_fast_path_is_the_definition_in_value_choice_and_gradient(case, seed, gate, weigh):
    groups = Groups.plan(case.id.cpu(), (case.r,), case.real.cpu()).to(case.score.device)  # no late token
    x = normal(seed, *case.score.shape, 3).to(case.score.device).requires_grad_()
    score = case.score.detach().clone().requires_grad_()
    position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])

    def block(rows, at, rope, value_weight, cache):
        value_weight = torch.ones_like(at) if value_weight is None else value_weight
        return torch.stack([*map(mixes, rows, at.clamp(max=10**6), value_weight)])

    fast, keep = mod.routed_update(block, x, score, GATES[gate](score), groups, case.r, weigh, position, position)
    for b in range(len(x)):
        n = int(case.real[b].sum())
        args = x[b, :n], score[b, :n], case.id[b, :n].tolist(), case.r, GATES[gate], weigh
        slow, kept = mod.routed_layer(mixes, *args)
        assert keep[b].nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(fast[b, :n], slow, rtol=1e-9, atol=1e-9)
        probe = normal(seed + b, n, 3).to(x)
        grads = [torch.autograd.grad((y * probe).sum(), (x, score), allow_unused=True, materialize_grads=True,
                                     retain_graph=True) for y in (fast[b, :n], slow) if y.requires_grad]
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@given(watches())
def test_a_layer_computes_all_streams_of_a_batch_in_one_call(watch):
    called = []
    for layer in watch.model.layers:
        layer.register_forward_hook(lambda block, rows, out: called.append(len(out)))
    watch.model(*watch.whole())
    assert len(called) <= len(watch.model.layers) and {*called} <= {len(watch.seed)}


@given(watches(max_streams=2))
def test_a_layer_computes_its_rows_and_no_more(watch):
    model, batch, rows = watch.model, watch.whole(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda block, given, out: rows.append(given[0].shape[1]))
    model(*batch)
    T, width = batch.tokens.shape[1], batch.groups.max_kept
    assert rows == [n for n in (T if r == 1 else width[r] for r in model.config.keep) if n]


@given(watches(max_streams=2, max_chunks=2))
def test_no_layer_waits_for_the_device(watch):
    """A fake tensor has a shape and no value: to ask for one, as `int(t)` does, is an error."""
    model, batch = watch.model.requires_grad_(), watch.whole()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        groups = batch.groups
        tensors = {name: fake.from_tensor(t) for name, t in vars(groups).items() if isinstance(t, torch.Tensor)}
        quota = {r: fake.from_tensor(k) for r, k in groups.quota.items()}
        x = torch.zeros(*batch.tokens.shape, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
        position = torch.ones_like(fake.from_tensor(batch.tokens)).cumsum(1)
        seed = fake.from_tensor(batch.seed)
        out = model.run_layers(x, position, replace(groups, **tensors, quota=quota), seed)
        out.hidden.sum().backward()
        with pytest.raises(RuntimeError):
            int(out.hidden.sum())


@given(watches(ratios=st.sampled_from([0.2, 0.5, 1.0]), max_chunks=2), GATE)
def test_a_keep_ratio_of_one_is_the_dense_layer_bit_for_bit_whatever_the_router_and_the_gate(watch, gate):
    model, batch = watch.model, watch.whole()
    model.config = replace(model.config, keep=(1.0,) * len(model.layers), gate=gate)  # its routers stay
    out = model(*batch)
    x, position = model.embed(batch.tokens, batch.frames), torch.ones_like(batch.tokens).cumsum(1) - 1
    for block in model.layers:
        x = block(x, position, rotations(position, model.rope_frequency))
    assert torch.equal(out.hidden[batch.groups.real], x[batch.groups.real]) and not out.keep
