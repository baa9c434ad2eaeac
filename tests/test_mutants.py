"""Bugs of public Mixture-of-Depths code, planted one at a time, are all caught."""

import inspect
import textwrap
from copy import deepcopy
from random import Random

import pytest
from test_gamma import test_masked_text_belongs_to_no_group_and_all_else_to_that_of_the_image as MASK
from test_gamma import test_the_routing_loss_is_the_mean_cross_entropy_towards_what_was_selected as AUX
from test_reference import test_the_fast_path_is_the_slow_loop_in_value_and_in_gradient as REFERENCE
from test_routing import test_select_keeps_what_a_slow_loop_keeps as SELECT
from test_streaming import test_a_window_hides_all_but_the_first_text_and_the_last_frames as WINDOW
from test_streaming import test_chunks_of_any_streams_are_the_whole_sequences_at_once_and_alone as CHUNKS
from test_update import test_a_skipped_token_keeps_every_bit_and_an_empty_update_changes_nothing as UPDATE

import data
import mod
from mod import Groups
from model import Cache, VideoLM

BETTER = "((score[:, None] {} score[..., None]) & (groups.id[:, None] == groups.id[..., None])).sum(-1) < "

PLANTS = {  # bug -> the function it is planted in, what it replaces there, and the properties that must fail
    "threshold instead of rank": (mod, "select", "rank < ", BETTER.format(">="), [SELECT]),
    "ties all kept": (mod, "select", "rank < ", BETTER.format(">"), [SELECT]),
    "ties to the later": (
        mod, "select", "by_score = score.", "by_score = score.shape[1] - 1 - score.flip(1).", [SELECT]),
    "rounded up in floats": (
        mod, "capacity", "math.floor(Fraction(str(keep_ratio)) * n + Fraction(1, 2))",
        "math.ceil(keep_ratio * n)", [SELECT]),
    "top-k over the sequence": (
        mod, "select", "by_score =", "groups = Groups.plan(groups.id.cpu().clamp(max=0), (keep_ratio,), "
        "groups.real.cpu(), groups.late.cpu()).to(score.device); by_score =", [SELECT, CHUNKS]),
    "padding takes capacity": (
        Groups, "plan", "B, T = id.shape", "B, T = id.shape; id = id.where(real, id.max().clamp(min=0))",
        [SELECT, CHUNKS]),
    "residual added twice": (
        mod, "routed_update", "new = torch.lerp", "new = rows + torch.lerp", [UPDATE, REFERENCE]),
    "residual weighted": (
        mod, "routed_update", "lerp(rows, out, weight", "lerp(0 * rows, out, weight", [UPDATE, REFERENCE]),
    "no gradient to the router": (
        mod, "routed_update", "gate(score.gather", "gate(score.detach().gather", [REFERENCE]),
    "positions renumbered": (
        mod, "routed_update", "take(position, index).where(kept, PADDING), *(take(t, index) for t in along)",
        "position[:, : index.shape[1]].where(kept, PADDING), *(t[:, : index.shape[1]] for t in along)",
        [REFERENCE, CHUNKS]),
    "skipped tokens are keys": (
        mod, "routed_update", "(~keep).int().argsort(dim=1, stable=True)[:, : groups.width[keep_ratio]]",
        "torch.ones_like(keep).cumsum(1) - 1", [REFERENCE, CHUNKS]),
    "a router a layer": (
        VideoLM, "score", "return self.routers[",
        "return (deepcopy(self.routers) if layer and self.config.router == 'shared' else self.routers)[",
        [REFERENCE]),
    "the mask off by one token": (
        data, "layout", "return [tokens, group,",
        "return [tokens, [g if t < 0 else last for last, g, t in zip([-1, *group], group, tokens)],", [MASK]),
    "routing loss without batch offset": (
        mod, "routing_loss", "member = keep.to(",
        "member = (0 * keep.flatten()).index_fill(0, keep.nonzero()[:, 1], 1).view_as(keep).to(", [AUX]),
    "positions start again in a chunk": (Cache, "advance", "return start", "return 0 * start", [CHUNKS]),
    "positions from the length of layer 0": (
        Cache, "advance", "return start", "return 0 * start + self.length[0]", [CHUNKS]),
    "nothing leaves the window": (Cache, "slide", "oldest > self.first_text", "oldest > PADDING", [WINDOW]),
    "the first text leaves the window": (Cache, "slide", "(at < self.first_text) | ", "", [WINDOW]),
}


def holds(test) -> bool:
    """Does the property hold on a few examples, drawn from random bytes?"""
    random = Random(0)
    try:
        for _ in range(60):
            test.hypothesis.fuzz_one_input(random.randbytes(4000))
    except (AssertionError, ValueError, IndexError):
        return False
    return True


@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    owner, name, right, wrong, properties = PLANTS[bug]
    function = getattr(owner, name)
    source, planted = textwrap.dedent(inspect.getsource(function)), {}
    assert source.count(right) == 1, f"{name} has no {right} to replace"
    exec(source.replace(right, wrong), {**function.__globals__, "deepcopy": deepcopy}, planted)
    monkeypatch.setattr(owner, name, planted[name])
    assert [p.__name__ for p in properties if holds(p)] == []


def test_without_a_bug_nothing_is_caught():
    properties = {p for *_, must_fail in PLANTS.values() for p in must_fail}
    assert [p.__name__ for p in properties if not holds(p)] == []
