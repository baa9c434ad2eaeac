"""The 39 defects known of public Mixture-of-Depths code, each of which a test here catches.

PLANTS are versions of them in a line or two; planted, the properties named must fail. ELSEWHERE has the test
of a defect that no line could plant, or says why it cannot occur.
"""

import inspect
import re
import textwrap
from copy import deepcopy
from pathlib import Path
from random import Random

import pytest
from test_gamma import (
    test_masked_text_belongs_to_no_group_and_all_else_to_that_of_the_image as MASK,
)
from test_gamma import (
    test_the_routing_loss_is_the_mean_cross_entropy_towards_what_was_selected as AUX,
)
from test_loss import test_the_loss_has_both_terms_and_the_routing_loss_reaches_the_routers as TERMS
from test_reference import test_the_fast_path_is_the_slow_loop_in_value_and_in_gradient as REFERENCE
from test_routing import test_select_keeps_what_a_slow_loop_keeps as SELECT
from test_streaming import test_a_window_hides_all_but_the_first_text_and_the_last_frames as WINDOW
from test_streaming import (
    test_chunks_of_any_streams_are_the_whole_sequences_at_once_and_alone as CHUNKS,
)
from test_update import test_a_layer_computes_its_rows_and_no_more as ROWS
from test_update import (
    test_a_skipped_token_keeps_every_bit_and_an_empty_update_changes_nothing as UPDATE,
)
from test_update import (
    test_the_fast_path_is_the_definition_in_value_choice_and_gradient as DEFINITION,
)

import data
import mod
import train
from mod import Groups, Router
from model import Attention, Cache, LayerCache, VideoLM, Window

BETTER = "((score[:, None] {} score[..., None]) & (groups.id[:, None] == groups.id[..., None])).sum(-1) < "

PLANTS = {  # number and defect -> the function it is planted in, what it replaces there, what must fail
    "1 top-k over the sequence": (
        mod, "select", "best_first =", "groups = Groups.plan(groups.id.cpu().clamp(max=0), (keep_ratio,), "
        "groups.real.cpu(), groups.late.cpu()).to(score.device); best_first =", [SELECT, DEFINITION, CHUNKS]),
    "2 top-k in training, a threshold with a cache": (
        VideoLM, "run_layer", "score = self.score(layer, x, position, groups, seed)",
        "score = self.score(layer, x, position, groups, seed); "
        "groups = mod.replace(groups, late=groups.id >= 0) if cache else groups", [CHUNKS]),
    "3 positions renumbered": (
        mod, "routed_update", "index = (~keep).int()",
        "position = torch.arange(x.shape[1]).expand(x.shape[:2]).where(groups.real, 0) "
        "- (~keep).int().cumsum(1); index = (~keep).int()", [DEFINITION, CHUNKS]),
    "4 positions start again in a chunk": (Cache, "advance", "return start", "return 0 * start", [CHUNKS]),
    "5 positions from the length of layer 0": (
        Cache, "advance", "start = self.seen\n", "start = 0 * self.seen + self.layers[0].length\n", [CHUNKS]),
    "6 a routed layer does not look into its cache": (
        VideoLM, "run_layer", "held = cache.layers[layer] if cache else None",
        "held = cache.layers[layer] if cache and r in (0, 1) else None", [CHUNKS]),
    "7 holes in the cache": (
        LayerCache, "append", "self.length = end", "self.length = end + 1", [CHUNKS]),
    "8 no cache where nothing is selected": (
        mod, "routed_update", "return x, keep\n", "return x\n", [CHUNKS]),
    "9 decoding never skips": (mod, "select", " & ((score >= 0) | ~groups.late)", "", [SELECT]),
    "10 the residual weighted": (
        mod, "routed_update", "lerp(rows, out, weight", "lerp(0 * rows, out, weight",
        [UPDATE, DEFINITION, REFERENCE]),
    "11 the residual added twice": (
        mod, "routed_update", "new = torch.lerp", "new = rows + torch.lerp", [UPDATE, DEFINITION, REFERENCE]),
    "12 no gradient to the router": (
        mod, "routed_update", "weight = weight.where", "weight = weight.detach().where", [DEFINITION, REFERENCE]),
    "13 a softmax over the selected": (
        mod, "routed_update", "(1, index)  # (B, K)\n    value", "(1, index).double().softmax(1)\n    value",
        [DEFINITION, REFERENCE]),
    "14 a mask instead of fewer rows": (mod, "routed_update", "stable=True)[:, :K]", "stable=True)", [ROWS]),
    "15 skipped tokens zeroed": (
        mod, "routed_update", "return x.scatter(", "return (x * keep[..., None]).scatter(",
        [UPDATE, DEFINITION, REFERENCE]),
    "17 the batch shares a capacity": (
        Groups, "plan", "size.where(id >= 0, 0)", "size.where(id >= 0, 0).amax(0)[None].expand_as(id)",
        [SELECT, CHUNKS]),
    "18 the rows of one stream taken in all": (
        mod, "routed_update", "kept = keep.g", "index = index[:1].expand_as(index); kept = keep.g",
        [DEFINITION, REFERENCE, CHUNKS]),
    "19 the positions of one stream taken for all": (
        mod, "routed_update", "gather_rows(position, index)",
        "gather_rows(position[:1].expand_as(position), index)", [CHUNKS]),
    "20 padding takes capacity": (
        Groups, "plan", "B, T = id.shape", "B, T = id.shape; id = id.where(real, id.max().clamp(min=0))",
        [SELECT, CHUNKS]),
    "21 a threshold that drops the last": (mod, "select", "best = rank < ", "best = " + BETTER.format(">="), [SELECT]),
    "21 ties all kept": (mod, "select", "best = rank < ", "best = " + BETTER.format(">"), [SELECT]),
    "21 ties to the later": (
        mod, "select", "best_first = score.", "best_first = score.shape[1] - 1 - score.flip(1).", [SELECT]),
    "22 a group of which nothing is kept": (mod, "capacity", "max(k, 1)", "k", [SELECT]),
    "22 a capacity rounded in floats": (
        mod, "capacity", "math.floor(Fraction(str(keep_ratio)) * n + Fraction(1, 2))",
        "math.ceil(keep_ratio * n)", [SELECT]),
    "23 scores squashed until they collide": (
        mod, "select", "best_first = score.", "score = score.double().clamp(-1, 1); best_first = score.",
        [SELECT]),
    "24 the same places masked in any layout": (
        Groups, "plan", "B, T = id.shape", "B, T = id.shape; id = id.where(torch.arange(T) > 1, -1)",
        [SELECT, CHUNKS]),
    "24 the mask off by one token": (
        data, "layout", "    return row\n", "    return row._replace(group=[g if t < 0 else last for last, g, t in "
        "zip([-1, *row.group], row.group, row.tokens)])\n", [MASK]),
    "26 the routing loss dropped": (train, "batch_loss", "* routing]", "* 0 * routing]", [TERMS]),
    "28 routing targets without their stream": (
        mod, "routing_loss", "target = keep.to(",
        "target = (0 * keep.flatten()).index_fill(0, keep.nonzero()[:, 1], 1).view_as(keep).to(", [AUX]),
    "30 the shared router copied into layers": (
        VideoLM, "score", "return self.routers[",
        "return (deepcopy(self.routers) if layer and self.config.router == 'shared' else self.routers)[",
        [REFERENCE]),
    "32 scores that know the mean of the sequence": (
        Router, "forward", "(x * self.weight)", "((x - x.mean(1, keepdim=True)) * self.weight)",
        [REFERENCE, CHUNKS]),
    "35 kept tokens that do not see each other": (
        Attention, "forward", "F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)",
        "v.repeat_interleave(q.shape[1] // v.shape[1], 1)", [REFERENCE, CHUNKS]),
    "skipped tokens are keys": (
        mod, "routed_update", "(~keep).int().argsort(dim=1, stable=True)[:, :K]",
        "torch.ones_like(keep).cumsum(1) - 1", [DEFINITION, REFERENCE]),
    "values of text weighed": (
        mod, "routed_update", "value_weight = weight if", "value_weight = score.sigmoid().gather(1, index) if",
        [DEFINITION, REFERENCE]),
    "values weighed by a constant": (
        mod, "routed_update", "value_weight = weight if", "value_weight = weight.detach() if",
        [DEFINITION, REFERENCE]),
    "keys weighed instead of values": (
        Attention, "forward", "v = v * value_weight", "k = k * value_weight", [REFERENCE]),
    "the cache holds values as they were before": (
        Attention, "forward", "cache.append(k, v, position)",
        "cache.append(k, v if value_weight is None else self.heads(x, rope)[2], position)", [CHUNKS]),
    "nothing leaves the window": (Window, "advance", "(oldest > self.first_text)", "(oldest > PADDING)", [WINDOW]),
    "the first text leaves the window": (Window, "advance", "(at < self.first_text) | ", "", [WINDOW]),
}
ELSEWHERE = {
    "16 a loop over the batch": "test_a_layer_computes_all_streams_of_a_batch_in_one_call",
    "16 streams that a loop mixes": CHUNKS.__name__,
    "25 flags that change nothing": "test_each_flag_of_routing_changes_what_is_computed",
    "27 attention tensors in the loss": TERMS.__name__,
    "29 a two-dimensional mask gathered": "cannot occur: a layer has no mask; its rows are causal in order",
    "31 routing that is not saved":
        "test_a_loaded_model_is_the_saved_one_and_all_but_its_encoder_is_trained_once",
    "33 the host waits in each layer": "test_no_layer_waits_for_the_device",
    "34 an ARank that nobody can use": "test_maps_of_known_rank_have_it_in_any_batch_and_beside_any_padding",
    "36 examples that do nothing": "test_every_command_of_the_readme_runs",
    "37 gradients clipped after the step":
        "test_gradients_are_clipped_before_they_are_used_and_the_rate_is_set_before",
    "38 a reply that does not end":
        "test_a_reply_without_an_end_is_ended_after_its_limit_and_the_stream_goes_on",
    "38 a stream of a fixed length, or without an end": "test_memory_and_time_per_frame_stay_flat",
    "38 a special token by its number":
        "test_whatever_bytes_are_said_can_be_heard_again_and_are_never_a_special_token",
    "39 evaluated teacher-forced only": "test_free_running_is_scored_on_exactly_what_the_model_heard",
}


CRASHES = {  # a defect that is noticed by a crash, not by a wrong value
    "8 no cache where nothing is selected": (TypeError, ValueError, RuntimeError, IndexError),
}


def holds(test, crashes: tuple = ()) -> bool:
    """Does the property hold on a few examples, drawn from random bytes?"""
    random = Random(0)
    try:
        for _ in range(60):
            test.hypothesis.fuzz_one_input(random.randbytes(4000))
    except (AssertionError, *crashes):
        return False
    return True


@pytest.mark.parametrize("defect", PLANTS)
def test_a_planted_defect_is_caught(defect, monkeypatch):
    owner, name, right, wrong, properties = PLANTS[defect]
    function = getattr(owner, name)
    source, planted = textwrap.dedent(inspect.getsource(function)), {}
    source = source.replace("super()", f"super({getattr(owner, '__name__', '')}, self)")
    assert source.count(right) == 1, f"{name} has no {right} to replace"
    exec(source.replace(right, wrong), {**function.__globals__, "deepcopy": deepcopy}, planted)
    monkeypatch.setattr(owner, name, planted[name])
    assert [p.__name__ for p in properties if holds(p, CRASHES.get(defect, ()))] == []


def test_without_a_defect_nothing_is_caught():
    properties = {p for *_, must_fail in PLANTS.values() for p in must_fail}
    assert [p.__name__ for p in properties if not holds(p)] == []


@pytest.mark.parametrize("defect", ELSEWHERE)
def test_a_defect_that_is_not_planted_has_a_test_or_cannot_occur(defect):
    sources = [file.read_text() for file in Path(__file__).parent.glob("test_*.py")]
    why = ELSEWHERE[defect]
    assert why.startswith("cannot occur: ") or any(f"\ndef {why}(" in source for source in sources)


def test_no_defect_is_left_out():
    numbers = {int(found[0]) for name in (*PLANTS, *ELSEWHERE) if (found := re.match(r"\d+", name))}
    assert numbers == set(range(1, 40))
