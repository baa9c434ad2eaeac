"""Bugs of public Mixture-of-Depths code, planted one at a time, are all caught."""

import copy
import math
from dataclasses import replace

import pytest
import test_gamma
import test_reference
import test_routing
import test_streaming
import test_update
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, routings, watches

import data
import mod
from mod import PADDING, Groups, capacity
from model import Cache, VideoLM

SELECT = test_routing.test_select_keeps_what_a_slow_loop_keeps
IDENTITY = test_update.test_a_block_that_changes_nothing_leaves_everything_as_it_is_under_any_gate
REFERENCE = test_reference.test_the_fast_path_is_the_slow_loop_in_value_and_in_gradient
CHUNKS = test_streaming.test_chunks_of_any_streams_are_the_whole_sequence_at_once
CACHE = test_streaming.test_each_layer_holds_the_tokens_that_it_computed_and_no_other
SHARED = test_gamma.test_the_gradients_of_all_routed_layers_add_up_in_the_shared_router
MASK = test_gamma.test_masked_text_belongs_to_no_group_and_all_else_to_that_of_the_image
AUX = test_gamma.test_the_routing_loss_is_the_mean_cross_entropy_towards_what_each_stream_selected
ALONE = test_streaming.test_streams_that_advance_together_are_each_what_they_are_alone
WINDOW = test_streaming.test_a_window_hides_all_but_the_first_text_and_the_last_frames
PROPERTIES = {  # the strategies of each, so that it can be run again on fewer examples
    SELECT: [routings()], IDENTITY: [routings(), SEEDS, test_update.GATE],
    REFERENCE: [watches(max_streams=2, max_chunks=2), SEEDS, st.booleans()], CHUNKS: [watches()],
    CACHE: [watches()], ALONE: [watches(together=True, max_chunks=6)], SHARED: [test_gamma.SHARED],
    MASK: test_gamma.PROMPTS, AUX: [test_gamma.ROUTED],
    WINDOW: [watches(together=True, max_chunks=10, masked="question+answer"), st.integers(1, 3)],
}


def holds(test) -> bool:
    """Does the property hold on a few examples?"""
    few = settings(max_examples=60, phases=[Phase.generate], report_multiple_bugs=False)
    try:
        few(given(*PROPERTIES[test])(test.hypothesis.inner_test))()
    except (AssertionError, ValueError):
        return False
    return True


def per_group(pick):
    """A select that asks `pick` which of a group's tokens to keep, given their scores and k."""
    def select(score, groups, keep_ratio):
        keep = groups.real & (groups.id < 0)
        for b, row in enumerate(groups.id):
            for group in row[row >= 0].unique():
                at = row == group
                k = capacity(int(at.sum()), keep_ratio)
                keep[b, at] = pick(score[b, at], k) if k else False
        return keep & ((score >= 0) | ~groups.late)
    return select


def best(score, k):
    ahead = score.sort(descending=True, stable=True)[1][:k]
    return torch.zeros_like(score, dtype=torch.bool).index_fill(0, ahead, True)


def over_the_sequence(score, groups, keep_ratio):
    return per_group(best)(score, replace(groups, id=groups.id.clamp(max=0)), keep_ratio)


def padding_competes(id, keep, real=None, late=None):
    return PLAN(id if real is None else id.where(real, id.max().clamp(min=0)), keep, real, late)


def residual_doubled(block, x, *rest):
    y, keep = UPDATE(block, x, *rest)
    return y + x * keep[..., None], keep


def residual_weighted(block, x, score, groups, keep_ratio, gate, *rest):
    y, keep = UPDATE(block, x, score, groups, keep_ratio, gate, *rest)
    return y - ((1 - gate(score)) * (keep & (groups.id >= 0)))[..., None] * x, keep


def weight_without_gradient(block, x, score, *rest):
    return UPDATE(block, x, score.detach(), *rest)


def positions_renumbered(block, x, score, groups, keep_ratio, gate, position, *along):
    def among_the_kept(rows, at, *_):
        first = position[:, : rows.shape[1]].where(at < PADDING, PADDING)
        return block(rows, first, *(t[:, : rows.shape[1]] for t in along))
    return UPDATE(among_the_kept, x, score, groups, keep_ratio, gate, position, *along)


def skipped_are_masked(block, x, score, groups, keep_ratio, gate, position, *along):
    keep = mod.select(score, groups, keep_ratio)
    weight = gate(score).where(groups.id >= 0, 1) * keep
    return torch.lerp(x, block(x, position, *along), weight[..., None].to(x.dtype)), keep


def copy_per_layer(model, layer, x, *rest):
    shared = model.config.router == "shared" and model.routers
    return copy.deepcopy(model.routers["shared"])(x) if shared else SCORE(model, layer, x, *rest)


def masked_one_token_late(*args):
    tokens, group, labels = LAYOUT(*args)
    shifted = [before if t >= 0 else g for before, g, t in zip([-1, *group], group, tokens, strict=False)]
    return [tokens, shifted, labels]


def without_batch_offset(score, keep, groups):
    chosen = torch.zeros_like(keep).flatten()
    chosen[keep.nonzero()[:, 1]] = True
    return AUX_LOSS(score, chosen.view_as(keep), groups)


def first_text_forgotten(cache, id, start):
    cache.first_text = torch.zeros_like(start)
    SLIDE(cache, id, start)


PLAN, UPDATE, ADVANCE, SLIDE = Groups.plan, mod.routed_update, Cache.advance, Cache.slide
LAYOUT, SCORE, AUX_LOSS = data.layout, VideoLM.score, mod.routing_loss
PLANTS = {  # bug -> where it is planted, what is planted, and the properties that must fail
    "threshold instead of rank": (mod, "select", per_group(lambda s, k: s > s.topk(k)[0][-1]), [SELECT]),
    "ties all kept": (mod, "select", per_group(lambda s, k: s >= s.topk(k)[0][-1]), [SELECT]),
    "ties to the later": (mod, "select", per_group(lambda s, k: best(s.flip(0), k).flip(0)), [SELECT]),
    "rounded up in floats": (mod, "capacity", lambda n, r: math.ceil(n * r), [SELECT]),
    "top-k over the sequence": (mod, "select", over_the_sequence, [SELECT, CHUNKS]),
    "padding takes capacity": (Groups, "plan", padding_competes, [SELECT, ALONE]),
    "residual added twice": (mod, "routed_update", residual_doubled, [IDENTITY, REFERENCE]),
    "residual weighted": (mod, "routed_update", residual_weighted, [IDENTITY, REFERENCE]),
    "no gradient to the router": (mod, "routed_update", weight_without_gradient, [REFERENCE]),
    "positions renumbered": (mod, "routed_update", positions_renumbered, [REFERENCE, CHUNKS]),
    "skipped tokens are keys": (mod, "routed_update", skipped_are_masked, [REFERENCE, CACHE]),
    "a router a layer": (VideoLM, "score", copy_per_layer, [SHARED, REFERENCE]),
    "the mask off by one token": (data, "layout", masked_one_token_late, [MASK]),
    "routing loss without batch offset": (mod, "routing_loss", without_batch_offset, [AUX]),
    "positions start again in a chunk": (Cache, "advance", lambda c, g: 0 * ADVANCE(c, g), [CHUNKS, CACHE]),
    "positions from the length of layer 0": (
        Cache, "advance", lambda c, g: 0 * ADVANCE(c, g) + c.length[0], [CHUNKS, CACHE]),
    "nothing leaves the window": (Cache, "slide", lambda c, id, start: None, [WINDOW]),
    "the first text leaves the window": (Cache, "slide", first_text_forgotten, [WINDOW]),
}


@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    owner, name, wrong, properties = PLANTS[bug]
    monkeypatch.setattr(owner, name, wrong)
    assert [p.__name__ for p in properties if holds(p)] == []


def test_without_a_bug_nothing_is_caught(monkeypatch):
    monkeypatch.setattr(mod, "select", per_group(best))  # slow, but right: the bugs above are made of it
    assert [p.__name__ for p in PROPERTIES if not holds(p)] == []
