"""The control chooses at random and weighs as learned; A-MoD's scores are attention, and exact in streaming."""

import math
from dataclasses import replace

import torch
from hypothesis import given
from strategies import watches
from test_streaming import assert_same, at_once, chunked

import mod
from extras.baselines import AMoD, RandomSelection, attention_got
from model import rotations


@given(watches(router="learned"))
def test_the_control_chooses_by_random_scores_and_weighs_by_the_learned_ones(watch):
    model, batch = watch.model, watch.whole()
    learned = model(*batch)
    model.__class__ = RandomSelection
    out, position = model(*batch), torch.ones_like(batch.tokens).cumsum(1) - 1
    position = position.where(batch.groups.real, mod.PADDING)
    for layer, keep in out.keep.items():
        drawn = mod.random_score(position, layer, batch.seed)
        assert torch.equal(keep, mod.select(drawn, batch.groups, model.config.keep[layer]))
    assert out.score.keys() == learned.score.keys()
    for router in model.routers.values():  # so large a score that every gate shows it
        router.weight.mul_(-9)
    changed = model(*batch)
    assert all(torch.equal(changed.keep[layer], keep) for layer, keep in out.keep.items())
    group = batch.groups.id >= 0
    weighed = [layer for layer in out.score if (out.keep[layer] & group).any()]
    assert torch.equal(changed.hidden, out.hidden) == (not weighed)


def as_amod(watch):
    model = watch.model
    model.__class__, model.config = AMoD, replace(model.config, keep=(1.0, *model.config.keep[1:]))
    return watch


@given(watches(router="random"))
def test_what_a_mod_chooses_in_a_stream_is_what_it_chooses_in_the_whole_sequence(watch):
    _, streams = chunked(as_amod(watch))
    assert_same(streams, at_once(watch))


@given(watches(router="random", max_streams=2, max_chunks=2))
def test_a_mod_scores_a_token_by_the_attention_that_its_group_pays_to_it(watch):
    model, batch = watch.model, watch.whole()
    block, x = model.layers[0], model.embed(batch.tokens, batch.frames)
    rope = rotations(torch.ones_like(batch.tokens).cumsum(1) - 1, model.rope_frequency)
    got = attention_got(block, x, rope, batch.groups)
    q, k, _ = block.self_attn.heads(block.input_layernorm(x), rope)
    shared = q.shape[1] // k.shape[1]
    for b, group in enumerate(batch.groups.id.tolist()):
        expected = [0.0] * len(group)
        for t, g in enumerate(group):
            seen = [s for s in range(t + 1) if group[s] == g]
            for head in range(q.shape[1]):
                logits = [float(q[b, head, t] @ k[b, head // shared, s]) / math.sqrt(q.shape[-1]) for s in seen]
                paid = torch.tensor(logits, dtype=torch.float64).softmax(0) - 1 / len(seen)
                for s, share in zip(seen, paid.tolist(), strict=True):
                    expected[s] += share / q.shape[1]
        torch.testing.assert_close(got[b], got.new_tensor(expected), rtol=1e-9, atol=1e-9)
