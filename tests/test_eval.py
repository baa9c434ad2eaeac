"""What is scored is what a model did: turns cut as the metrics say, its own replies heard, pictures true."""

import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import eval as evaluation
import train
from data import Sample, Tokenizer, Turn, World, picture
from eval import Evidence, Reading, evaluate, gather_evidence, replies
from mod import placement
from model import Config, VideoLM, initialise, printable

TOKENIZER = Tokenizer()


def stream(frames, **said):
    turns = [Turn(0, "user", "Go."), *(Turn(int(f[1:]), "assistant", text) for f, text in said.items())]
    return Sample(np.zeros((frames, 8, 8, 3), np.uint8), turns, 0)


def scripted(speaks_at, asked):
    """A `read` of a model that wants to speak at fixed frames, whatever it heard."""
    def read(model, tokenizer, samples, threshold):
        asked.extend(samples)
        spoke = [[f in speaks_at for f in range(len(s.frames))] for s in samples]
        return [Reading(row, {f: [0.5] for f in replies(s)}, {f: [True] for f in replies(s)})
                for row, s in zip(spoke, samples, strict=True)]
    return read


@pytest.mark.parametrize(("speaks_at", "expected"), [
    ({2, 5, 9}, [([0, 0, 1], []), ([0, 0, 1], []), ([0, 0, 0, 1], [])]),
    ({1, 7}, [([0, 1, 0], []), ([0, 0, 0], [0, 1]), ([0, 1, 0, 0], [])]),  # early, 2 late, early
    (set(), [([0, 0, 0], [0, 0]), ([0, 0, 0], [0, 0]), ([0, 0, 0, 0], [0])]),  # never; 1 frame is left
])
def test_turns_are_cut_at_the_true_replies_and_a_silent_model_is_waited_for(monkeypatch, speaks_at, expected):
    truth, asked = stream(11, f2="one", f5="two", f9="three"), []
    heard = truth._replace(turns=[*truth.turns[:1], Turn(4, "assistant", "mine")])
    monkeypatch.setattr(evaluation, "read", scripted(speaks_at, asked))
    evidence, spoke = gather_evidence(None, None, [truth, stream(3)], [heard, stream(3)], 0.0)
    assert evidence == [[Evidence([*map(bool, a)], [*map(bool, b)], [0.5], [True]) for a, b in expected], []]
    assert [len(row) for row in spoke] == [11, 3]
    ends = [(len(s.frames) - 1, replies(s)) for s in asked]
    told = {last: said for last, said in ends if last in said}
    assert told == {2: {2: "one"}, 5: {4: "mine", 5: "two"}, 9: {4: "mine", 9: "three"}}


@pytest.mark.parametrize("opening", [[], [7]])
def test_free_running_is_scored_on_exactly_what_the_model_heard(monkeypatch, opening):
    monkeypatch.setattr(TOKENIZER, "opening", opening)
    monkeypatch.setattr(evaluation.Watcher.__init__, "__defaults__", (0.0, None, 5))  # 5 tokens a reply
    keep = placement("all", 4, 0.2)
    config = Config(vocab_size=len(TOKENIZER), image_size=16, pool=2, keep=keep)
    model = initialise(VideoLM(config), 1).double()
    samples = World(size=16).held_out(3)
    early = [turn for turn in samples[1].turns if turn.frame < 5]
    samples[1] = samples[1]._replace(frames=samples[1].frames[:5], turns=early)
    samples[2].turns.append(Turn(4, "user", "And now?"))
    monkeypatch.setattr(evaluation, "speaks", lambda logits, *_: (logits[..., 7] * 100).int() % 2 == 0)
    _, own = evaluate(model, TOKENIZER, samples, 2.0)
    decided = [[f in replies(s) for f in range(len(s.frames))] for s in own]
    assert any(map(any, decided)) and not all(map(all, decided))  # else it shows nothing
    assert [r.spoke for r in evaluation.read(model, TOKENIZER, own, 0.0)] == decided
    said = [turn for s in own for turn in s.turns if turn.role == "assistant"]
    assert all(len(turn.said) <= 5 and turn.text == TOKENIZER.decode(turn.said) for turn in said)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="decodes a video, and there is no ffmpeg")
def test_a_video_is_watched_with_and_without_a_window(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "testsrc2=size=64x48:rate=10:duration=20"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "clip.mp4"], check=True)
    train.main(["--steps", "1", "--batch", "1", "--streams", "1", "--device", "cpu", "--out", "run"])
    capsys.readouterr()
    monkeypatch.setattr(evaluation.Watcher.__init__, "__defaults__", (0.0, None, 5))  # 5 tokens a reply
    for flags, fewest, most in (([], 40 * 38, 40 * 38 + 12), (["--window", "3"], 3 * 38, 3 * 38 + 12)):
        decisions = (torch.tensor([frame == 2]) for frame in range(40))
        monkeypatch.setattr(evaluation, "speaks", lambda *_, d=decisions: next(d))
        evaluation.main(["run", "--watch", "clip.mp4", "--query", "Go.", "--device", "cpu", *flags])
        *said, counted, held, drawn = capsys.readouterr().out.splitlines()
        assert counted.startswith("40 frames, 20.0 s of video") and drawn.endswith("run/watch.png")
        assert len(said) == 1 and said[0].startswith("    1.0 s  ")
        assert fewest <= int(held.split(": ")[1].split(",")[0]) <= most  # layer 0 is dense
    assert (tmp_path / "run" / "watch.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_model_says_cannot_steer_the_terminal():
    assert printable("red \x1b[2J\r\n\udc80 disc").replace("\N{MIDDLE DOT}", "_") == "red _[2J___ disc"


def test_the_picture_fades_what_was_skipped_and_nothing_else():
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for _ in range(2)]
    kept = [{1: torch.tensor(keep).bool()} for keep in ([1, 0, 1, 0, 0], [0, 1, 1, 1, 0])]
    png = picture(frames, kept)
    width, height = struct.unpack(">2I", png[16:24])
    start = png.index(b"IDAT")
    size = struct.unpack(">I", png[start - 4 : start])[0]
    rows = np.frombuffer(zlib.decompress(png[start + 4 : start + 4 + size]), np.uint8).reshape(height, -1)
    image = rows[:, 1:].reshape(height, width, 3)
    for column, (frame, keep) in enumerate(zip(frames, kept, strict=True)):
        left = 4 + column * 116
        assert np.array_equal(image[4:116, left : left + 112], frame)
        for patch, is_kept in enumerate(keep[1][1:].tolist()):
            top, side = 120 + patch // 2 * 56, left + patch % 2 * 56
            part = frame[patch // 2 * 56 :, patch % 2 * 56 :][:56, :56]
            shown = image[top : top + 56, side : side + 56]
            assert np.array_equal(shown, part if is_kept else 255 - (255 - part) // 5)
        assert (image[118, left] != 255).any() == bool(keep[1][0])  # the bar: CLS is computed


def test_a_frame_is_cls_and_the_grid_of_mean_patches_row_by_row():
    vision = initialise(VideoLM(Config(image_size=16, patch_size=4, pool=2)), 0).double().vision_model
    vision.encoder["layers"] = nn.ModuleList()  # without attention, a patch is known from its own pixels
    pixels = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    e, place = vision.embeddings, vision.embeddings.position_embedding.weight

    def token(row, column):
        patch = pixels.double()[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        x = e.patch_embedding(patch / 127.5 - 1)[0, :, 0, 0] + place[1 + 4 * row + column]
        return vision.post_layernorm(vision.pre_layrnorm(x))

    expected = [vision.post_layernorm(vision.pre_layrnorm(e.class_embedding + place[0]))]
    for row, column in ((0, 0), (0, 2), (2, 0), (2, 2)):
        expected.append(sum(token(row + a, column + b) for a in (0, 1) for b in (0, 1)) / 4)
    torch.testing.assert_close(vision(pixels)[0], torch.stack(expected), rtol=0, atol=1e-12)
