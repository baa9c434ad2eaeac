"""Sequences have the layout they should, batches are pure functions, broken input is named."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import TURN, annotate, make_video, needs_ffmpeg

import data
from data import COLUMNS, ROWS, VQA, Clips, Tokenizer, Turn, World, collate, layout, read_video
from eval import cut
from mod import MASKED
from model import Config

TOKENIZER = Tokenizer()
TURNS = st.lists(st.builds(Turn, st.integers(0, 5), st.sampled_from(["user", "assistant"]),
                           st.text(), st.just(())), max_size=5, unique_by=lambda turn: turn[:2])


def open_clips(folder: Path, partial: bool = False) -> Clips:
    return Clips.open(str(folder), 2.0, partial, 16)


@given(st.binary() | st.text().map(str.encode))
def test_whatever_bytes_are_said_can_be_heard_again_and_are_never_a_special_token(said):
    said += b" red disc." + "".join(data.SPECIAL).encode()
    text = TOKENIZER.decode([len(data.SPECIAL) + byte for byte in said])
    heard = TOKENIZER.encode(text)
    assert all(len(data.SPECIAL) <= i < len(TOKENIZER) for i in heard)
    assert TOKENIZER.decode(heard) == text
    assert b"".join(TOKENIZER.pieces[i] for i in heard) == said


@given(TURNS, st.integers(1, 6), st.integers(1, 5))
def test_each_frame_ends_in_a_decision_and_each_reply_follows_its_frame(turns, frames, per_frame):
    t, expected = TOKENIZER, []  # token, group, label
    for f in range(frames):
        text = {"user": [], "assistant": []}
        for turn in turns:
            if turn.frame == f:
                opening = t.user if turn.role == "user" else t.assistant
                text[turn.role] = [opening, *t.encode(turn.text), t.end]
        asked, reply = text.values()
        expected += [(i, -1, -100) for i in asked] + [(data.VISION, f, -100)] * per_frame
        expected += [(t.frame, -1, t.assistant if reply else t.silent)]
        expected += [(i, -1, label) for i, label in zip(reply, [*reply[1:], -100], strict=False)]
    turns = [turn for turn in turns if turn.frame < frames]
    found = layout(turns, frames, per_frame, t, MASKED["text"])
    assert [*zip(*found, strict=True)] == expected


def tokens_of(text: str, opening: int | None = None) -> list[int]:
    return [*([] if opening is None else [opening]), *TOKENIZER.encode(text), TOKENIZER.end]


@pytest.mark.parametrize(("masked", "system", "question", "handover", "answer"), [
    ("none", 0, 1, 1, 1), ("text", -1, -1, -1, -1), ("question", 0, -1, -1, 1),
    ("question+answer", 0, -1, -1, -1)])
def test_text_joins_the_frame_it_comes_before_or_the_last_unless_it_is_masked(
        masked, system, question, handover, answer):
    t = TOKENIZER
    turns = [Turn(0, "system", "S"), Turn(2, "user", "U"), Turn(2, "assistant", "A", (9, 8)),
             Turn(1, "assistant", "now")]
    parts = [(tokens_of("S"), system), ([data.VISION, data.VISION], 0), ([t.frame], -1),
             ([data.VISION, data.VISION], 1), ([t.frame], -1),
             (tokens_of("now", t.assistant), -1),  # a reply to a frame never skips
             (tokens_of("U", t.user), question), ([t.assistant], handover), ([9, 8, t.end], answer)]
    row = layout(turns, 2, 2, t, MASKED[masked])
    assert row.tokens == [i for ids, _ in parts for i in ids]
    assert row.group == [group for ids, group in parts for _ in ids]
    assert [i for i in row.labels if i >= 0] == [
        t.silent, t.assistant, *t.encode("now"), t.end, 9, 8, t.end]


def test_a_vocabulary_may_begin_each_stream_and_only_its_first_chunk():
    t = Tokenizer()
    t.opening = [7, 7]
    row, later = (layout([], 1, 1, t, (), begins) for begins in (True, False))
    assert [row.tokens, row.group, row.labels] == [
        [7, 7, *later.tokens], [-1, -1, *later.group], [-100, -100, *later.labels]]


def test_unequal_streams_are_padded_to_the_right_without_labels():
    long, short = World(size=16).held_out(2)
    batch = collate([long, cut(short, 3, 3), long], Config(pool=1), TOKENIZER)
    parts = (batch.tokens, batch.real, batch.labels, batch.group)
    for row, real, labels, group in zip(*parts, strict=True):
        n = int(real.sum())
        assert real[:n].all() and not real[n:].any() and (row[n:] == TOKENIZER.pad).all()
        assert (labels[n:] == -100).all() and (group[n:] == -1).all()
    assert batch.decision.sum(1).tolist() == [8, 3, 8]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
def test_a_batch_is_a_pure_function_of_seed_step_and_rank(seed, step, rank):
    world = World(size=16)
    once, anew = [world.batch(seed, step, 8, rank, 4) for _ in range(2)]
    for a, b in zip(once, anew, strict=True):
        assert np.array_equal(a.frames, b.frames) and a[1:] == b[1:]
    assert [s.seed for s in once] == [s.seed for s in world.batch(seed, step, 8)[rank::4]]
    for other in (world.batch(seed + 1, step, 2, rank), world.batch(seed, step + 1, 2, rank),
                  world.batch(seed, step, 8, (rank + 1) % 4, 4), world.held_out(2)):
        assert not any(np.array_equal(a.frames, b.frames) for a in once for b in other)


def painted(frame: np.ndarray) -> dict[str, list[int]]:
    """colour -> row, column of its cell in the 3 x 3 grid"""
    found = {}
    for name, colour in data.COLOURS.items():
        place = (frame == colour).all(-1).nonzero()
        if len(place[0]) > 20:
            found[name] = [int(axis.mean()) * 3 // len(frame) for axis in place]
    return found


def described(text: str) -> dict[str, list]:
    """colour -> row, column, shape, as "A red disc, top left. A ..." says"""
    things = [thing.replace(",", "").split() for thing in text.split(".") if thing]
    return {colour: [ROWS.index(row), COLUMNS.index(column), shape]
            for _, colour, shape, row, column in things}


def test_the_world_shows_exactly_what_it_says():
    for sample in World(size=48).batch(0, 0, 16):
        said = {turn.frame: turn.text for turn in sample.turns if turn.role == "assistant"}
        for f, frame in enumerate(sample.frames):
            things = described(said.get(f, ""))
            assert painted(frame) == {colour: cell for colour, (*cell, _) in things.items()}


def test_the_patches_that_show_a_shape_are_those_with_one_of_its_pixels():
    world = World(size=48)
    frames = data.stack_frames([sample.frames for sample in world.held_out(4)])  # (B, F, 3, S, S)
    painted = torch.zeros_like(frames[:, :, 0])
    for rgb in data.COLOURS.values():
        painted += (frames == torch.tensor(rgb)[:, None, None]).all(2)
    shown = painted.view(4, 8, 6, 8, 6, 8).amax((3, 5)).flatten(2) > 0
    assert shown.any() and not shown.all() and torch.equal(world.shows_shape(frames, 6), shown)


def test_the_picture_of_a_question_shows_exactly_what_is_answered():
    for sample in VQA(48).batch(0, 0, 24):
        *asked, _, last = [turn.text for turn in sample.turns[1:]]
        things, answers = described(last), {}
        assert painted(sample.frames[0]) == {colour: cell for colour, (*cell, _) in things.items()}
        for colour, (row, column, shape) in things.items():
            answers[f"What colour is the {shape}?"] = f" {colour}"
            answers[f"What is the {colour} one?"] = f" {shape}"
            for *cell, neighbour in things.values():
                if cell == [row, column + 1]:
                    answers[f"What is right of the {shape}?"] = f" {neighbour}"
                    answers[f"What is left of the {neighbour}?"] = f" {shape}"
        assert len(things) == 3 and len(asked) == 2 * 4
        assert asked[1::2] == [answers[question] for question in asked[::2]]
    assert [len(sample.turns) for sample in VQA(48).held_out(5)] == [3] * 5


@needs_ffmpeg
def test_a_frame_never_shows_what_comes_after_its_time(tmp_path):
    grey = "geq=lum='N*8':cb=128:cr=128"  # picture number N has brightness 8 N
    video = make_video(tmp_path / "clock.mkv", 3, 10, "color=black:size=32x32", grey)
    shown = [int(frame.mean()) for frame in read_video(video, 2.0, 32)]
    numbers = [round((level * 219 / 255 + 16) / 8) for level in shown]  # of the picture
    assert numbers[1:] == [5, 10, 15, 20, 25] and numbers[0] <= 2


@needs_ffmpeg
def test_a_picture_is_turned_upright_shrunk_to_fit_and_centred_on_black(tmp_path):
    video = make_video(tmp_path / "wide.mp4", source="color=white:size=64x16")
    wide = next(read_video(video, 2.0, 32))
    assert wide.shape == (32, 32, 3)
    assert wide[:11].max() < 20 and wide[13:19].min() > 235 and wide[21:].max() < 20
    before, track = video.read_bytes().split(b"tkhd")  # the track's header has a matrix
    turned = np.array([0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30], ">i4").tobytes()
    video.write_bytes(before + b"tkhd" + track[:40] + turned + track[76:])
    tall = next(read_video(video, 2.0, 32))
    assert tall[:, :11].max() < 20 and tall[:, 13:19].min() > 235 and tall[:, 21:].max() < 20


@needs_ffmpeg
def test_only_as_many_frames_are_decoded_as_are_asked_for(tmp_path, monkeypatch):
    video, started, start = make_video(tmp_path / "v.mp4", 60), [], subprocess.Popen

    def remember(*given, **named):
        started.append(start(*given, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    frames = read_video(video, 10.0, 256)
    next(frames)
    assert started[0].poll() is None  # it waits: the rest does not fit into the pipe
    frames.close()
    assert started[0].poll() is not None


@needs_ffmpeg
@pytest.mark.parametrize("damaged", [
    lambda whole, n: whole[:n], lambda whole, n: whole[:n] + bytes(999) + whole[n + 999 :]])
def test_a_damaged_video_is_refused_unless_its_rest_is_asked_for(tmp_path, damaged):
    video = make_video(tmp_path / "v.mkv", 5)
    whole = video.read_bytes()
    video.write_bytes(damaged(whole, len(whole) * 3 // 4))
    with pytest.raises(ValueError, match=r"v\.mkv must decode whole, got \d+ frames, .*--partial"):
        list(read_video(video, 2.0, 16))
    assert len(list(read_video(video, 2.0, 16, partial=True))) >= 5


def test_what_is_no_video_ends_in_a_sentence_that_names_it(tmp_path, monkeypatch):
    texts = {"empty.mp4": "", "text.mp4": "not a video\n" * 100, "http://localhost:9/x.mp4": None,
             "absent.mp4": None, "concat.mp4": "ffconcat version 1.0\nfile /etc/hostname\n",
             "list.mp4": "#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/x.ts\n"}
    for name, text in texts.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        if text is None or shutil.which("ffmpeg"):
            with pytest.raises(ValueError, match=f"{Path(name).name} must be a video"):
                list(read_video(tmp_path / name, 2.0, 16))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="ffmpeg must be on PATH"):
        list(read_video(tmp_path / "text.mp4", 2.0, 16))


ENTRY = {"video": "v.mp4", "conversation": [TURN]}


@pytest.mark.parametrize(("line", "complaint"), [
    ("{broken", "must be JSON"), ("[]", "video must name a file"),
    (ENTRY | {"video": "absent.mp4"}, r".*(absent\.mp4 must be|ffmpeg must be)"),
    (ENTRY | {"conversation": "hi"}, "conversation must be a list of turns"),
    (ENTRY | {"conversation": [{"role": "assistant", "content": "Hi."}] * 2},
     "each untimed reply must follow a question"),
    *((ENTRY | {"video": name}, f"video must name a file inside .*, got {name!r}")
      for name in (3, "/etc/passwd", "../x.mp4")),
    *((ENTRY | {"conversation": [TURN | {key: value}]},
       f"{key} must .*, got {re.escape(repr(value)[:9])}")
      for key, value in (
          ("role", "narrator"), ("content", " "), ("content", "\ud800"), ("time", -1),
          ("time", True), ("time", "1"), ("time", 10**400), ("time", float("nan")))),
])
def test_a_broken_annotation_is_named_by_file_line_and_value(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text("\n" + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {complaint}"):
        open_clips(tmp_path).held_out(1)


@needs_ffmpeg
def test_times_are_rounded_up_to_the_frame_grid_and_may_not_lie_past_the_end(tmp_path):
    make_video(tmp_path / "v.mp4", 2)
    turns = [TURN | {"time": t} for t in (0, 0.1, 0.5, 1.5)]  # two are on one frame: joined
    clips = open_clips(annotate(tmp_path, {"video": "v.mp4", "conversation": turns}))
    said = {turn.frame: turn.text for turn in clips.held_out(1)[0].turns}
    assert said == {0: "Hello.", 1: "Hello. Hello.", 3: "Hello."}
    assert len(clips.batch(0, 0, 5)) == len(clips.held_out(9)) == 1
    annotate(tmp_path, {"video": "v.mp4", "conversation": [TURN | {"time": 2.6}]})
    complaint = r"a\.jsonl, line 1: time must be at most 1\.5 s, .* got 2\.6"
    with pytest.raises(ValueError, match=complaint):
        open_clips(tmp_path).batch(0, 0, 1)
