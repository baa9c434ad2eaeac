"""A pretrained vocabulary, features in place of frames, and tasks: all go the way of the embedded world."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import TURN, annotate, make_video, needs_ffmpeg
from test_data import painted

import data
from data import Folder, Forecast, Summary, Tokenizer, Turn, numbered, read_video, stack, tokenizer_for
from eval import Watcher, cut, evaluate
from mod import MASKED
from model import VideoLM, initialise, preset, write

LLM = str(Path(__file__).parent / "fixtures" / "smollm2")  # its tokenizer.json has 270 entries


def test_a_pretrained_vocabulary_is_extended_at_its_end_and_begins_each_stream_once():
    pytest.importorskip("tokenizers")
    t = tokenizer_for(376, LLM)
    assert (t.pad, t.user, t.silent, t.opening) == (370, 371, 375, [0])
    text = "A red ring. <|begin_of_text|><frame><user>é"
    assert t.decode([0, 369, *t.encode(text), t.frame]) == text and 0 not in t.encode(text)
    assert max(t.encode(text)) < 370
    bad = t.encode("é")[:1]  # half of a character: it is heard again as it was said, not as it reads
    said = Turn(0, "assistant", t.decode(bad), tuple(bad))
    tokens, group, labels = data.layout([said], 2, 1, t, MASKED["text"])
    assert tokens == [0, -1, t.frame, t.assistant, *bad, t.end, -1, t.frame]
    assert (group[0], labels[0]) == (-1, -100)
    assert data.layout([said], 2, 1, t, MASKED["text"], begins=False)[0] == tokens[1:]


def test_a_vocabulary_that_does_not_fit_the_model_is_refused_in_a_sentence(monkeypatch):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"tokenizer\.json must have at most 200 entries, .* got 270"):
        tokenizer_for(206, LLM)
    with pytest.raises(ValueError, match=r"absent/tokenizer\.json must be the tokenizer of a model"):
        tokenizer_for(376, "absent")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizers must be installed .*pip install tokenizers"):
        tokenizer_for(376, LLM)


@needs_ffmpeg
@pytest.mark.parametrize("fps", [2.0, 3.0, 0.7])
def test_a_span_is_exactly_these_frames_of_the_whole(tmp_path, fps):
    video = make_video(tmp_path / "v.mp4", 16, 10, "testsrc2=size=32x32")
    whole = [frame.tobytes() for frame in read_video(video, fps, 16)]
    for start, end in ((0, 3), (2.3, 7.7), (5, 5), (13.1, 15.2), (14.2, 17)):
        first, last = (data.grid(time, fps) for time in (start, end))
        wanted = (whole + whole[-1:] * 4)[first : last + 1]  # after its end the video stands still
        assert [frame.tobytes() for frame in read_video(video, fps, 16, start=start, end=end)] == wanted


@needs_ffmpeg
def test_each_clip_is_encoded_once_and_read_from_its_file_afterwards(tmp_path):
    make_video(tmp_path / "v.mp4", 5)
    span = {"video": "v.mp4", "start": 1, "end": 3, "conversation": [TURN | {"time": 3}]}
    whole = {"video": "v.mp4", "conversation": [{"role": "assistant", "content": "After all."}]}
    plain, seen = Folder(annotate(tmp_path, span, whole), size=16).held_out(2), []
    assert [s.turns[0].frame for s in plain] == [4, 10]  # in a span, time is that of the video

    def encoder(pixels):
        seen.append(len(pixels))
        return pixels.float().mean(-1).mT  # (N, 16, 3)

    for key in ("mean", "mean", "other"):
        folder = Folder(tmp_path, size=16)
        folder.encode(encoder, tmp_path / "cache", key, write)
        for sample, p in zip(folder.held_out(2), plain, strict=True):
            np.testing.assert_allclose(sample.frames, p.frames.mean(2), rtol=1e-5)
            assert sample.turns == p.turns and np.array_equal(folder.pixels(sample), p.frames)
    assert seen == [5, 10] * 2  # by another encoder anew
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"broken")
    folder.memory.clear()
    with pytest.raises(ValueError, match=r"safetensors must hold features \(remove it to encode again\)"):
        folder.held_out(2)


@needs_ffmpeg
def test_clips_whose_replies_have_no_time_are_questions_about_all_of_it(tmp_path):
    make_video(tmp_path / "v.mp4", 2)
    turns = [{"role": role, "content": "Well."} for role in ("user", "assistant")]
    folder = Folder(annotate(tmp_path, {"video": "v.mp4", "conversation": turns}), size=16)
    assert folder.asks and [turn.frame for turn in folder.held_out(1)[0].turns] == [4, 4]
    annotate(tmp_path, *({"video": "v.mp4", "conversation": told} for told in (turns, [TURN | {"time": 1}])))
    assert not Folder(tmp_path, size=16).asks  # one is said at a time
    annotate(tmp_path, {"video": "v.mp4", "conversation": turns[1:]})
    with pytest.raises(ValueError, match=r"line 1: must end in a question and its answer .*, got 1 turns"):
        Folder(tmp_path, size=16)


@needs_ffmpeg
def test_of_a_damaged_clip_that_may_be_used_what_is_said_after_its_rest_is_left_out(tmp_path):
    make_video(tmp_path / "v.mp4", 2)
    entry = {"video": "v.mp4", "conversation": [TURN | {"time": 1}, TURN | {"time": 3}]}
    (sample,) = Folder(annotate(tmp_path, entry), size=16, partial=True).held_out(1)
    assert [turn.frame for turn in sample.turns] == [2]


@needs_ffmpeg
def test_a_clip_draws_other_random_scores_in_each_step(tmp_path):
    make_video(tmp_path / "v.mp4", 1)
    folder = Folder(annotate(tmp_path, *[{"video": "v.mp4", "conversation": [TURN]}] * 3), size=16)
    assert len({s.seed for step in range(4) for s in folder.batch(0, step, 3)}) == 12


def tiny() -> VideoLM:
    config = replace(preset("tiny"), vocab_size=len(Tokenizer()), keep=(1.0, 0.2) * 2)
    return initialise(VideoLM(config), 0).double()


@torch.no_grad()
def test_features_go_the_way_of_the_frames_they_stand_for(monkeypatch):
    monkeypatch.setattr(Watcher.__init__, "__defaults__", (0.0, None, 3))  # 3 tokens a reply
    model, (a, b) = tiny(), Summary(48, frames=4).held_out(2)
    pixels = [a, cut(b, 2, 3, Turn(2, "assistant", "A"))]
    features = [s._replace(frames=model.vision_model(stack([s.frames])[0]).numpy()) for s in pixels]
    for run in (lambda samples: evaluate(model, Tokenizer(), samples, 2.0)[0],
                lambda samples: Watcher(model, Tokenizer(), torch.zeros(2).long()).ask(samples)):
        assert run(pixels) == run(features)


def test_of_five_candidates_the_first_is_greedy_and_the_others_are_drawn_alike_in_each_run():
    model, samples = tiny(), Forecast(48, frames=2).held_out(2)
    five, drawn = [s for s in samples for _ in range(5)], torch.arange(10) % 5 > 0
    greedy = Watcher(model, Tokenizer(), torch.zeros(2).long(), limit=6).ask(samples)
    once, again = (Watcher(model, Tokenizer(), torch.zeros(10).long(), limit=6).ask(five, drawn)
                   for _ in range(2))
    assert once == again and once[::5] == greedy and len(set(once[:5])) > 1


@pytest.mark.parametrize("world", [Forecast(48), Summary(48)])
def test_what_a_recipe_shows_tells_the_answer(world):
    for sample in world.batch(0, 0, 32):
        seen = [colour for frame in sample.frames for colour in painted(frame)]
        told = [recipe[at:] for recipe in data.RECIPES for at in range(3)
                if [step.split()[0] for step in recipe[at : at + 3]] == seen]
        (steps,) = told  # the colours alone tell the recipe
        asked = steps[:3] if world.question == data.DESCRIBE else steps[3:]
        assert sample.turns == [Turn(0, "user", world.question),
                                Turn(7, "assistant", numbered(f"{step}." for step in asked))]
