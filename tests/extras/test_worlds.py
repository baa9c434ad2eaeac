"""The worlds that stand in for benchmarks show what they say, and answers are drawn and scored."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import painted

import data
from data import Tokenizer, Turn
from eval import Watcher, longest_reply
from extras import worlds
from extras.scores import draw_candidates, numbered
from extras.worlds import RECIPES, TASKS, Forecast, Scene, Summary
from model import VideoLM, initialise, preset


def tiny() -> VideoLM:
    config = replace(preset("tiny"), vocab_size=len(Tokenizer()), keep=(1.0, 0.2, 1.0))
    return initialise(VideoLM(config), 0).double()


def test_a_scene_shows_exactly_what_it_says():
    for sample in Scene(48).held_out(20):
        said = {turn.frame: turn.text for turn in sample.turns if turn.role == "assistant"}
        for number, frame in enumerate(sample.frames):
            cells = frame.reshape(6, 8, 6, 8, 3).swapaxes(1, 2).reshape(36, 64, 3)
            seen = [colour for cell in cells for colour, rgb in data.COLOURS.items() if (cell == rgb).all(1).sum() > 8]
            words = said.get(number, ".")[:-1].split()
            assert words[::2] == seen and set(words[1::2]) <= set(data.SHAPES) and len(words) == 2 * len(seen) <= 12


def test_a_shape_of_a_scene_lies_in_one_patch_and_is_the_same_as_a_large_one():
    rng, scene, world = np.random.default_rng(0), Scene(48), data.World(24)
    for shape in data.SHAPES:
        small, large = np.zeros((48, 48, 3)), np.zeros((24, 24, 3))  # cells of 8 pixels in both
        scene.paint(small, SimpleNamespace(uniform=lambda *_: np.full(2, -0.5)), "red", shape, 2, 3)
        said = world.paint(large, SimpleNamespace(uniform=lambda *_: np.full(2, -0.5)), "red", shape, 1, 1)
        assert (small[16:24, 24:32] == large[8:16, 8:16]).all() and said == f"A red {shape}, middle centre."
        scene.paint(small, rng, "red", shape, 5, 0)
        assert small.any(2).nonzero()[0].max() >= 40 and (small.any(2)[:, 32:] == 0).all()


@pytest.mark.parametrize("world", [Forecast(48), Summary(48)])
def test_what_a_recipe_shows_tells_the_answer(world):
    for sample in world.batch(0, 0, 32):
        seen = [colour for frame in sample.frames for colour in painted(frame)]
        told = [recipe[at:] for recipe in RECIPES for at in range(3)
                if [step.split()[0] for step in recipe[at : at + 3]] == seen]
        (steps,) = told  # the colours alone tell the recipe
        asked = steps[:3] if world.question == data.DESCRIBE else steps[3:]
        assert sample.turns == [Turn(0, "user", world.question),
                                Turn(7, "assistant", numbered(f"{step}." for step in asked))]


def test_a_batch_of_each_world_is_a_pure_function_of_seed_step_and_rank():
    for task, world in TASKS.items():
        once, again = world(16).batch(3, 5, 4, 1, 2), world(16).batch(3, 5, 4)[1::2]
        assert [s.frames.tobytes() for s in once] == [s.frames.tobytes() for s in again]
        assert [s.turns for s in once] == [s.turns for s in again]
        assert world.task == task and data.open_source(task, "", 2.0, False, 16).size == 16
        with pytest.raises(ValueError, match=f"task must not be given with data .*, got {task}"):
            data.open_source(task, "clips", 2.0, False, 16)


def test_of_five_candidates_the_first_is_greedy_and_the_others_are_drawn_alike_in_each_run():
    model, samples, tokenizer = tiny(), Forecast(48, frames=2).held_out(10), Tokenizer()
    greedy = [f"answer {number}" for number in range(10)]
    once, again = [draw_candidates(model, tokenizer, samples, greedy) for _ in range(2)]
    assert once == again and [answers[0] for answers in once] == greedy
    assert {len(answers) for answers in once} == {5}
    drawn = [answer for answers in once for answer in answers[1:]]
    assert len(set(drawn)) > 30  # of 40
    limit = longest_reply(tokenizer, samples)
    assert max(len(tokenizer.encode(answer)) for answer in drawn) <= limit < 40  # as of the greedy ones
    said = Watcher(model, tokenizer, torch.zeros(10).long(), limit=limit).ask(samples)
    assert not set(drawn) & set(said)


def test_the_answers_of_forecast_and_summary_are_scored(monkeypatch):
    monkeypatch.setattr(worlds, "draw_candidates", lambda m, t, samples, said: [[s] for s in said])
    for world, names in ((Forecast(16), {"ed_verb", "ed_noun", "ed_action"}), (Summary(16), set())):
        samples = world.held_out(4)
        true = [sample.turns[-1].text for sample in samples]
        right = world.score(None, Tokenizer(), samples, true)
        assert right.keys() == names | {"top1_exact", "top1_nearest"}
        assert all(right[name] == 0 for name in names) and right["top1_exact"] == 1
        wrong = world.score(None, Tokenizer(), samples, ["nothing"] * 4)
        assert all(wrong[name] > 0 for name in names) and wrong["top1_exact"] == 0


def test_a_stream_of_each_world_is_shown(capsys):
    worlds.main([])
    printed = capsys.readouterr().out
    assert all(f"{task}:" in printed for task in TASKS) and "What is next?" in printed
