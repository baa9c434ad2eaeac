"""A pretrained vocabulary, features in place of frames, and tasks: all go the way of the embedded world."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_data import TURN, make_video, needs_ffmpeg

import data
import eval as evaluation
from data import Folder, Forecast, Summary, Tokenizer, Turn, numbered, read_video, stack, tokenizer_for
from eval import Watcher, evaluate, evaluate_answers
from mod import MASKED
from model import VideoLM, initialise, preset


@pytest.fixture
def llm(tmp_path):
    """A folder with a byte-level tokenizer that begins every text with <s>."""
    tokenizers = pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=letters)
    built.train_from_iterator(["A taxi passes the taxi stand."] * 9, trainer)
    built.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_pretrained_vocabulary_is_extended_at_its_end_and_begins_each_stream_once(llm):
    t = tokenizer_for(406, str(llm))
    assert (t.pad, t.user, t.silent, t.opening) == (400, 401, 405, [0])
    text = "A taxi passes. <s><frame><user>é"
    assert t.decode([0, 399, *t.encode(text), t.frame]) == text and 0 not in t.encode(text)
    assert max(t.encode(text)) < 400
    bad = t.encode("é")[:1]  # half of a character: it is heard again as it was said, not as it reads
    said = Turn(0, "assistant", t.decode(bad), tuple(bad))
    tokens, group, labels = data.layout([said], 2, 1, t, MASKED["text"])
    assert tokens == [0, -1, t.frame, t.assistant, *bad, t.end, -1, t.frame]
    assert (group[0], labels[0]) == (-1, -100)
    assert data.layout([said], 2, 1, t, MASKED["text"], begins=False)[0] == tokens[1:]


def test_a_vocabulary_that_does_not_fit_the_model_is_refused_in_a_sentence(llm, monkeypatch):
    with pytest.raises(ValueError, match=r"tokenizer\.json must have at most 200 entries, .* got \d+"):
        tokenizer_for(206, str(llm))
    with pytest.raises(ValueError, match=r"absent/tokenizer\.json must be the tokenizer of a model"):
        tokenizer_for(406, str(llm / "absent"))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizers must be installed .*pip install tokenizers"):
        tokenizer_for(406, str(llm))


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
    clips = [{"video": "v.mp4", "start": 1, "end": 3, "conversation": [TURN | {"time": 3}]},
             {"video": "v.mp4", "conversation": [{"role": "assistant", "content": "After all."}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, clips)))
    plain, seen = Folder(tmp_path, size=16).held_out(2), []

    def features(folder, key="mean"):
        def encoder(pixels):
            seen.append(len(pixels))
            return pixels.float().mean(-1).mT  # (N, 16, 3)
        folder.encode(encoder, tmp_path / "cache", key)
        return folder.held_out(2)

    first, again = (features(Folder(tmp_path, size=16)) for _ in range(2))
    assert seen == [5, 10] and [s.frames.shape for s in first] == [(5, 16, 3), (10, 16, 3)]
    for a, b, p in zip(first, again, plain, strict=True):
        assert np.array_equal(a.frames, b.frames) and a.turns == b.turns == p.turns
        np.testing.assert_allclose(a.frames, p.frames.mean(2), rtol=1e-5)
    assert [s.turns[0].frame for s in first] == [4, 10]  # in a span, time is that of the video
    folder = Folder(tmp_path, size=16)
    features(folder, "other")
    assert len(seen) == 4 and np.array_equal(folder.pixels(first[0]), plain[0].frames)
    next((tmp_path / "cache").glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"safetensors must hold features \(remove it to encode again\)"):
        features(Folder(tmp_path, size=16), "mean"), features(Folder(tmp_path, size=16), "other")


def test_features_go_the_way_of_the_frames_they_stand_for(monkeypatch):
    monkeypatch.setattr(evaluation.Watcher.__init__, "__defaults__", (0.0, None, 3))  # 3 tokens a reply
    config = replace(preset("tiny"), vocab_size=len(Tokenizer()), keep=(1.0, 0.2) * 2)
    model = initialise(VideoLM(config), 0).double().requires_grad_(False)
    for world in (data.World(48, frames=3), Forecast(48, frames=4)):
        a, b = world.held_out(2)
        last, results = Turn(len(b.frames) - 2, "assistant", "A"), []
        pixels = [a, b._replace(frames=b.frames[:-1], turns=[*b.turns[:1], last])]
        seen = [model.vision_model(stack([s.frames])[0]).numpy() for s in pixels]
        for samples in (pixels, [s._replace(frames=f) for s, f in zip(pixels, seen, strict=True)]):
            result = (evaluate_answers(model, Tokenizer(), samples, world) if world.asks
                      else evaluate(model, Tokenizer(), samples, 2.0))[0]["free_running"]
            results.append({name: value for name, value in result.items() if name != "seconds_per_answer"})
        assert results[0] == results[1]


def test_of_five_candidates_the_first_is_greedy_and_the_others_are_drawn_alike_in_each_run():
    model = initialise(VideoLM(replace(preset("tiny"), vocab_size=len(Tokenizer()))), 0).double()
    samples = Forecast(48, frames=2).held_out(2)
    five, drawn = [s for s in samples for _ in range(5)], torch.arange(10) % 5 > 0
    greedy = Watcher(model, Tokenizer(), torch.zeros(2).long(), limit=6).ask(samples)
    once, again = (Watcher(model, Tokenizer(), torch.zeros(10).long(), limit=6).ask(five, drawn)
                   for _ in range(2))
    assert once == again and once[::5] == greedy and len(set(once[:5])) > 1


@pytest.mark.parametrize("world", [Forecast(48), Summary(48)])
def test_what_a_recipe_shows_tells_the_answer(world):
    for sample in world.batch(0, 0, 32):
        seen = [colour for frame in sample.frames for colour, rgb in data.COLOURS.items()
                if (frame == rgb).all(-1).sum() > 20]
        told = [recipe[at:] for recipe in data.RECIPES for at in range(3)
                if [step.split()[0] for step in recipe[at : at + 3]] == seen]
        (steps,) = told  # the colours alone tell the recipe
        asked = steps[:3] if world.question == data.DESCRIBE else steps[3:]
        assert sample.turns == [Turn(0, "user", world.question),
                                Turn(7, "assistant", numbered(f"{step}." for step in asked))]
