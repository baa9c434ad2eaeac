"""A kept token moves by its weighted update, text by all of it, and a skipped one by not a single bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICES, SEEDS, Routing, collate, normal, routings, tiny, unit, watches

import mod
from mod import GATES, PADDING
from model import rotations

GATE = st.sampled_from(sorted(GATES))
WEIGHT = {"sigmoid": lambda s: 1 / (1 + torch.exp(-s)), "linear": lambda s: s,
          "unit": lambda s: 2 / (1 + torch.exp(-s))}


def update(case: Routing, block, x, gate="sigmoid", along=()):
    """routed_update with the tokens of a case -> y, keep on the host"""
    position = 100 + torch.arange(x.shape[1]).expand(x.shape[:2])  # as if a stream had run before
    host = (x, case.score, position, *along)
    x, score, position, *along = (t.to(case.device) for t in host)
    y, keep = mod.routed_update(block, x, score, case.groups(), case.r, GATES[gate], position, *along)
    return y.cpu(), keep.cpu()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int64)


def mix(rows, position, *along):
    """A block in which each row depends on all rows before it."""
    return (rows.cumsum(1) + position[..., None] % 7).sin() * 3 + rows


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


@given(routings(), SEEDS, GATE)
def test_text_takes_the_whole_update_and_a_group_takes_its_weight_of_it(case, seed, gate):
    x = normal(seed, *case.id.shape, 3)
    y, keep = update(case, mix, x, gate)
    for b, row in enumerate(keep):
        at = row.nonzero()[:, 0]
        text = case.id[b, at] < 0
        out, rows, score = mix(x[None, b, at], 100 + at[None])[0], x[b, at], case.score[b, at, None]
        assert torch.equal(y[b, at[text]], out[text]) or not text.any()
        moved = rows + WEIGHT[gate](score) * (out - rows)
        torch.testing.assert_close(y[b, at], torch.where(text[:, None], out, moved))


@given(routings(), SEEDS)
def test_the_block_sees_the_kept_rows_in_order_at_their_own_positions(case, seed):
    x, tag, seen = normal(seed, *case.id.shape, 3), normal(seed + 1, *case.id.shape, 2, 2), []

    def spy(rows, position, along):
        seen.append((rows.cpu(), position.cpu(), along.cpu()))
        return rows

    _, keep = update(case, spy, x, along=(tag,))
    assert len(seen) == int(keep.any())  # where nothing is kept there is nothing to compute
    for rows, position, along in seen:
        assert rows.shape[1] == keep.sum(1).max()
        for b, row in enumerate(keep):
            at = row.nonzero()[:, 0]
            fillers = [PADDING] * (rows.shape[1] - len(at))
            assert position[b].tolist() == (100 + at).tolist() + fillers
            assert torch.equal(rows[b, : len(at)], x[b, at]) and torch.equal(along[b, : len(at)], tag[b, at])


@given(watches(ratios=st.sampled_from([0.2, 0.5, 1.0]), max_chunks=2), GATE)
def test_a_keep_ratio_of_one_is_the_dense_layer_bit_for_bit_whatever_the_router_and_the_gate(watch, gate):
    model, batch = watch.model, watch.whole()
    c = model.config = replace(model.config, keep=(1.0,) * len(model.layers), gate=gate)  # its routers stay
    out = model(*batch)
    x, position = model.embed(batch.tokens, batch.frames), torch.ones_like(batch.tokens).cumsum(1) - 1
    for block in model.layers:
        x = block(x, position, rotations(position, c.head_dim, c.rope_theta))
    assert torch.equal(out.hidden[batch.groups.real], x[batch.groups.real]) and not out.keep


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize(("silent", "reached"), [
    ((), True), (("mlp.down_proj",), True), (("self_attn.o_proj",), True),
    (("mlp.down_proj", "self_attn.o_proj"), False)])
def test_the_router_learns_from_attention_and_from_the_ffn_alike(device, gate, silent, reached):
    model = tiny((0.5,), 0, device, gate=gate)
    for name, p in model.named_parameters():
        p.mul_(not any(part in name for part in silent))
    batch = collate(model, [[unit(model.config, True, seed) for seed in range(3)]], torch.tensor([0]))
    weight = model.routers["0"].weight.requires_grad_()
    model(*batch).hidden.square().sum().backward()
    assert bool(weight.grad.any()) == reached
