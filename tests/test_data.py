"""Sequences have the layout they should, batches are pure functions, broken input is named."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import TURN, annotate, make_video, needs_ffmpeg

import data
from data import COLUMNS, ROWS, VQA, Clips, Tokenizer, Turn, World, collate, layout
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
    said += b"\0 red disc." + "".join(data.SPECIAL).encode()
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
    expected[0] = (expected[0][0], -1, -100)  # the first token of a stream never skips
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
    assert row.group == [-1, *[group for ids, group in parts for _ in ids][1:]]  # the first never skips
    assert [i for i in row.labels if i >= 0] == [
        t.silent, t.assistant, *t.encode("now"), t.end, 9, 8, t.end]


def test_a_vocabulary_may_begin_each_stream_and_only_its_first_chunk():
    t = Tokenizer()
    t.opening = [7, 7]
    row, later = (layout([], 1, 1, t, (), begins) for begins in (True, False))
    assert [row.tokens, row.group, row.labels] == [
        [7, 7, *later.tokens], [-1, -1, *later.group], [-100, -100, *later.labels]]
    assert layout([], 1, 1, t, ()) == row


def test_the_first_token_of_a_stream_never_skips_and_that_of_a_later_chunk_may():
    first, later = (layout([], 2, 2, TOKENIZER, (), begins).group for begins in (True, False))
    assert first == [-1, 0, -1, 1, 1, -1] and later == [0, 0, -1, 1, 1, -1]
    assert layout([], 0, 2, TOKENIZER, ()) == ([], [], [])


def test_a_model_of_other_words_is_refused():
    assert len(data.tokenizer_for(Config(vocab_size=len(TOKENIZER)))) == len(TOKENIZER)
    with pytest.raises(ValueError, match=f"^vocab_size must be {len(TOKENIZER)}, .* got 9$"):
        data.tokenizer_for(Config(vocab_size=9))


def test_unequal_streams_are_padded_to_the_right_without_labels():
    long, short = World(size=16).held_out(2)
    batch = collate([long, cut(short, 3, 3), long], Config(pool=1), TOKENIZER)
    parts = (batch.tokens, batch.real, batch.labels, batch.group)
    for row, real, labels, group in zip(*parts, strict=True):
        n = int(real.sum())
        assert real[:n].all() and not real[n:].any() and (row[n:] == TOKENIZER.pad).all()
        assert (labels[n:] == -100).all() and (group[n:] == -1).all()
    assert batch.decision.sum(1).tolist() == [8, 3, 8]
    assert (batch.tokens < 0).sum(1).tolist() == [16, 6, 16]  # what a model takes for vision tokens


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


SHOWN = {  # shape -> is it painted in its middle, at its left edge, between its middle and a corner?
    "disc": [True, True, True], "ring": [False, True, True], "cross": [True, True, False],
    "triangle": [True, False, False]}


def painted(frame: np.ndarray) -> dict[str, list]:
    """colour -> row, column of its cell in the 3 x 3 grid, shape"""
    found, cell = {}, len(frame) // 3
    for name, colour in data.COLOURS.items():
        place = (frame == colour).all(-1)
        if place.sum() > 20:
            first, last = (end(np.argwhere(place), axis=0) for end in (np.min, np.max))
            assert (first // cell == last // cell).all() and (last - first > cell - 5).all()  # it fills one cell
            h, w = last - first
            box = place[first[0] :, first[1] :]
            looks = [bool(at) for at in (box[h // 2, w // 2], box[h // 2, w // 8], box[h // 4, w // 4])]
            found[name] = [*(first // cell), *(shape for shape, shown in SHOWN.items() if shown == looks)]
    return found


def described(text: str) -> dict[str, list]:
    """colour -> row, column, shape, as "A red disc, top left. A ..." says"""
    things = [thing.replace(",", "").split() for thing in text.split(".") if thing]
    return {colour: [ROWS.index(row), COLUMNS.index(column), shape]
            for _, colour, shape, row, column in things}


def test_the_world_shows_exactly_what_it_says_on_ground_that_is_dark_in_its_own_way():
    samples = World(size=48).batch(0, 0, 16)
    ground = [sample.frames.min(0).mean((0, 1)) for sample in samples]  # (3,) each, of colours
    assert np.max(ground) < 65 and np.std(ground) > 5
    assert World(18).held_out(1)[0].frames.shape == (8, 18, 18, 3)
    for sample in samples:
        said = {turn.frame: turn.text for turn in sample.turns if turn.role == "assistant"}
        for f, frame in enumerate(sample.frames):
            assert painted(frame) == described(said.get(f, ""))


def test_the_patches_that_show_a_shape_are_those_with_one_of_its_pixels():
    world = World(size=48)
    frames = data.stack_frames([sample.frames for sample in world.held_out(4)])  # (B, F, 3, S, S)
    painted = torch.zeros_like(frames[:, :, 0])
    for rgb in data.COLOURS.values():
        painted += (frames == torch.tensor(rgb)[:, None, None]).all(2)
    shown = painted.view(4, 8, 6, 8, 6, 8).amax((3, 5)).flatten(2) > 0
    assert shown.any() and not shown.all() and torch.equal(world.shows_shape(frames, 6), shown)


def test_the_picture_of_a_question_shows_exactly_what_is_answered():
    lefts, alone = set(), set()
    for sample in VQA(48).batch(0, 0, 48):
        assert sample.turns[0] == (0, "system", data.SYSTEM, ()) and {turn.frame for turn in sample.turns[1:]} == {1}
        *asked, _, last = [turn.text for turn in sample.turns[1:]]
        things, answers = described(last), {}
        assert painted(sample.frames[0]) == things
        cells = {(row, column) for row, column, _ in things.values()}
        if len(left := [(row, column) for row, column in cells if (row, column + 1) in cells]) == 1:  # else 3 in a row
            lefts.update(left)
            alone |= cells - {left[0], (left[0][0], left[0][1] + 1)}
        for colour, (row, column, shape) in things.items():
            answers[f"What colour is the {shape}?"] = f" {colour}"
            answers[f"What is the {colour} one?"] = f" {shape}"
            for *cell, neighbour in things.values():
                if cell == [row, column + 1]:
                    answers[f"What is right of the {shape}?"] = f" {neighbour}"
                    answers[f"What is left of the {neighbour}?"] = f" {shape}"
        assert len(things) == 3 and len(asked) == 2 * 4
        assert asked[1::2] == [answers[question] for question in asked[::2]]
    assert len(lefts) == 3 * 2 and len(alone) == 3 * 3  # anywhere
    assert [len(sample.turns) for sample in VQA(48).held_out(5)] == [3] * 5


ENTRY = {"video": "v.mp4", "conversation": [TURN]}


@pytest.mark.parametrize(("line", "complaint"), [
    ("{broken", "must be JSON"), ("[]", "must be an object"),
    (ENTRY | {"video": "absent.mp4"}, r"video must be a file, got 'absent\.mp4'"),
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
    complaint = r"a\.jsonl, line 1: time must be at most 2\.0 s, .* got 2\.6"
    with pytest.raises(ValueError, match=complaint):
        open_clips(tmp_path).batch(0, 0, 1)


@needs_ffmpeg
@pytest.mark.parametrize("time", [1.5, 1.6, 1.99, 2.0])
def test_what_is_said_after_the_last_frame_of_the_grid_belongs_to_that_frame(tmp_path, time):
    make_video(tmp_path / "v.mp4", 2)  # at 2 frames a second the last shows 1.5 s
    annotate(tmp_path, {"video": "v.mp4", "conversation": [TURN | {"time": time}]})
    assert [turn.frame for turn in open_clips(tmp_path).held_out(1)[0].turns] == [3]


def test_what_is_asked_before_a_frame_comes_before_the_frame_of_its_chunk():
    turns = [Turn(2, "user", "a"), Turn(1, "assistant", "b"), Turn(1, "user", "c"), Turn(2, "assistant", "d")]
    assert data.questions_at(turns, 1) == [Turn(0, "user", "c")]
    assert data.questions_at(turns, 2) == [Turn(0, "user", "a")] and data.questions_at(turns, 3) == []
    for text, frame in (("0 a", 0), ("0.5 a", 1), ("0.51 a", 2), ("12. a b", 24)):
        assert data.parse_question(text, 2.0) == Turn(frame, "user", text.split(" ", 1)[1])


@needs_ffmpeg
def test_a_span_or_a_reply_after_the_end_of_a_video_is_refused_and_with_partial_left_out_and_counted(tmp_path, capsys):
    make_video(tmp_path / "v.mp4", 2)
    late = {"video": "v.mp4", "conversation": [TURN, TURN | {"time": 9}]}
    for entry, complaint in ((late, r"time must be at most 2\.0 s, the end of v\.mp4, got 9"),
                             (ENTRY | {"end": 9}, r"end must be at most 4\.\d s, the end of v\.mp4, got 9")):
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: {complaint}"):
            open_clips(annotate(tmp_path, entry)).held_out(1)
    nothing = late | {"conversation": [TURN | {"time": 9}]}
    clips = open_clips(annotate(tmp_path, nothing, late, ENTRY | {"end": 9}), partial=True)
    assert [len(sample.turns) for sample in clips.held_out(3)] == [1, 1]
    assert "left out with --partial: 3, the first is" in capsys.readouterr().out  # a clip, and two turns
    assert clips.left_out.keys() == {f"{tmp_path}/a.jsonl, line {where}:" for where in ("1", "1: turn 1", "2: turn 2")}


@pytest.mark.parametrize("name", ["x" * 300, "folder"])
def test_a_name_that_no_file_can_have_is_that_of_its_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: video must be a file, got '"):
        open_clips(annotate(tmp_path, ENTRY | {"video": name}))


@needs_ffmpeg
def test_with_partial_bad_entries_are_left_out_named_and_replaced_by_others(tmp_path, capsys):
    make_video(tmp_path / "v.mp4", 1)
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    good = {"video": "v.mp4", "conversation": [TURN]}
    known_bad = [good | {"end": -1}, good | {"video": "absent.mp4"}]
    entries = [good, {"video": "damaged.mp4", "conversation": [TURN]}, *known_bad, good, good]
    annotate(tmp_path, *entries)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: end must be"):
        open_clips(tmp_path)
    clips = open_clips(tmp_path, partial=True)
    assert re.search(r"left out with --partial: 2, .*a\.jsonl, line 3: end must be", capsys.readouterr().out)
    for step in range(4):
        drawn = clips.batch(0, step, 3)
        numbers = [sample.seed % 4 for sample in drawn]
        assert len(drawn) == 3 and sorted(numbers) == [0, 2, 3]  # clip 1 is damaged
        again = open_clips(tmp_path, partial=True).batch(0, step, 3)
        assert [sample.seed for sample in again] == [sample.seed for sample in drawn]
    capsys.readouterr()
    assert len(clips.held_out(4)) == 3
    assert re.search(r"left out with --partial: 1, .*line 2: .*damaged\.mp4", capsys.readouterr().out)
    annotate(tmp_path, entries[1])
    with pytest.raises(ValueError, match=r"at least one clip must be readable, but .*line 1: .*damaged"):
        open_clips(tmp_path, partial=True).batch(0, 0, 1)
