"""Sequences have the layout they are said to have, batches are pure functions, and broken input is named."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from data import VQA, Folder, Tokenizer, Turn, World, collate, layout, read_video
from mod import MASKED

VIDEOS = Path(__file__).parents[1].parent / "shared" / "videos"
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg to decode videos")
needs_videos = pytest.mark.skipif(not VIDEOS.is_dir(), reason="reads real clips, which a clone does not have")
TURNS = st.lists(st.builds(Turn, st.integers(0, 5), st.sampled_from(["user", "assistant"]),
                           st.text(), st.just(())), max_size=5, unique_by=lambda turn: turn[:2])


@given(st.text())
def test_text_survives_the_tokenizer_and_never_becomes_a_special_token(text):
    tokenizer = Tokenizer()
    ids = tokenizer.encode(text + " red disc." + "".join(data.SPECIAL))
    assert tokenizer.decode(ids) == text + " red disc." + "".join(data.SPECIAL)
    assert all(len(data.SPECIAL) <= i < len(tokenizer) for i in ids)


@given(st.binary())
def test_whatever_bytes_a_model_says_it_can_hear_again(said):
    tokenizer = Tokenizer()
    heard = tokenizer.encode(tokenizer.decode([len(data.SPECIAL) + byte for byte in said]))
    assert b"".join(tokenizer.pieces[i] for i in heard) == said


@given(TURNS, st.integers(1, 6), st.integers(1, 5))
def test_each_frame_ends_in_a_decision_and_each_reply_follows_its_frame(turns, frames, per_frame):
    tokenizer = Tokenizer()
    turns = [turn for turn in turns if turn.frame < frames]
    tokens, group, labels = layout(turns, frames, per_frame, tokenizer, MASKED["text"])
    assert [g for g in group if g >= 0] == [f for f in range(frames) for _ in range(per_frame)]
    assert all((t == data.VISION) == (g >= 0) for t, g in zip(tokens, group, strict=True))
    assert tokenizer.silent not in tokens
    places = [i for i, t in enumerate(tokens) if t == tokenizer.frame]
    assert len(places) == frames
    for f, i in enumerate(places):
        said = [turn.text for turn in turns if turn.role == "assistant" and turn.frame == f]
        assert labels[i] == (tokenizer.assistant if said else tokenizer.silent)
        if said:
            reply = tokenizer.encode(said[0])
            assert tokens[i + 1 : i + 3 + len(reply)] == [tokenizer.assistant, *reply, tokenizer.end]
            assert labels[i + 1 : i + 3 + len(reply)] == [*reply, tokenizer.end, -100]
    assert sum(t == tokenizer.user for t in tokens) == sum(turn.role == "user" for turn in turns)


def test_unequal_streams_are_padded_to_the_right_without_labels():
    world = World(size=16)
    samples = [world.sample(0, "train", i) for i in range(3)]
    early = [turn for turn in samples[1].turns if turn.frame < 3]
    samples[1] = samples[1]._replace(frames=samples[1].frames[:3], turns=early)
    batch = collate(samples, 2, Tokenizer(), MASKED["text"])
    for row, real, labels, group in zip(batch.tokens, batch.real, batch.labels, batch.group, strict=True):
        n = int(real.sum())
        assert real[:n].all() and not real[n:].any()
        assert (row[n:] == Tokenizer().pad).all() and (labels[n:] == -100).all() and (group[n:] == -1).all()
    assert batch.decision.sum(1).tolist() == [8, 3, 8]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
def test_a_batch_is_a_pure_function_of_seed_step_and_rank(seed, step, rank):
    world = World(size=16)
    once, anew = (world.batch(seed, step, 8, rank, 4) for _ in range(2))
    assert all(np.array_equal(a.frames, b.frames) and a[1:] == b[1:] for a, b in zip(once, anew, strict=True))
    assert [s.seed for s in once] == [s.seed for s in world.batch(seed, step, 8)[rank::4]]
    for other in (world.batch(seed + 1, step, 2, rank), world.batch(seed, step + 1, 2, rank),
                  world.batch(seed, step, 8, (rank + 1) % 4, 4), world.held_out(2)):
        assert not any(np.array_equal(a.frames, b.frames) for a in once for b in other)


def test_the_world_shows_exactly_what_it_says():
    for sample in World(size=48).batch(0, 0, 16):
        said = {turn.frame: turn.text for turn in sample.turns if turn.role == "assistant"}
        for f, frame in enumerate(sample.frames):
            painted = {name: (frame == colour).all(-1) for name, colour in data.COLOURS.items()}
            found = {name: mask for name, mask in painted.items() if mask.sum() > 20}
            assert list(found) == ([said[f].split()[1]] if f in said else [])
            for mask in found.values():
                row, column = (int(axis.mean()) * 3 // 48 for axis in mask.nonzero())
                assert said[f].endswith(f", {data.ROWS[row]} {data.COLUMNS[column]}.")


def test_the_picture_of_a_question_shows_exactly_what_is_answered():
    for sample in VQA(48).batch(0, 0, 24):
        *asked, _, described = [turn.text for turn in sample.turns[1:]]
        seen = {}  # shape -> colour, row, column
        for thing in described[:-1].split("."):
            _, colour, shape, row, column = thing.replace(",", "").split()
            mask = (sample.frames[0] == data.COLOURS[colour]).all(-1)
            cell = [int(axis.mean()) * 3 // 48 for axis in mask.nonzero()]
            assert cell == [data.ROWS.index(row), data.COLUMNS.index(column)] and mask.sum() > 20
            seen[shape] = colour, *cell
        assert len(seen) == 3 and len(asked) == 2 * 4
        for question, answer in zip(asked[::2], asked[1::2], strict=True):
            *_, side, _, _, about = words = question[:-1].split()
            if words[1] == "colour" or about == "one":
                colour, shape = (answer[1:], about) if about in seen else (words[-2], answer[1:])
                assert seen[shape][0] == colour
            else:
                _, row, column = seen[about]
                assert seen[answer[1:]][1:] == (row, column + {"left": -1, "right": 1}[side])
    assert [len(sample.turns) for sample in VQA(48).held_out(5)] == [3] * 5


def make_video(path: Path, seconds: float = 2.0, rate: int = 10, source: str = "testsrc2=size=64x48") -> Path:
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i",
                    f"{source}:rate={rate}:duration={seconds}", "-pix_fmt", "yuv420p", str(path)], check=True)
    return path


@needs_ffmpeg
def test_a_frame_never_shows_what_comes_after_its_time(tmp_path):
    video = make_video(tmp_path / "clock.mkv", 3, 10, "color=black:size=32x32")
    grey = "geq=lum='N*8':cb=128:cr=128"  # input picture number N has brightness 8 N
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", video, "-vf", grey, "-c:v", "ffv1",
                    tmp_path / "n.mkv"], check=True)
    shown = [int(frame.mean()) for frame in read_video(tmp_path / "n.mkv", 2.0, 32)]
    numbers = [round((level * 219 / 255 + 16) / 8) for level in shown]  # video range to picture number
    assert numbers[1:] == [5, 10, 15, 20, 25] and numbers[0] <= 2


@needs_ffmpeg
def test_a_picture_is_shrunk_to_fit_and_centred_on_black(tmp_path):
    wide = make_video(tmp_path / "wide.mp4", source="color=white:size=64x16")
    frame = next(read_video(wide, 2.0, 32))
    assert frame.shape == (32, 32, 3)
    assert frame[:11].max() < 20 and frame[13:19].min() > 235 and frame[21:].max() < 20


@needs_ffmpeg
@needs_videos
def test_rotation_is_honoured():
    frame = next(read_video(VIDEOS / "rotated.mp4", 2.0, 48))  # 480 x 270 turned upright: 27 of 48 columns
    assert frame[:, :10].max() == frame[:, -10:].max() == 0 and frame[9].max() > 0 and frame[39].max() > 0


@needs_ffmpeg
@needs_videos
def test_a_damaged_video_is_refused_unless_its_rest_is_asked_for():
    complaint = r"corrupted\.mp4 must decode whole, got \d+ frames, then: .*--partial"
    with pytest.raises(ValueError, match=complaint):
        list(read_video(VIDEOS / "corrupted.mp4", 2.0, 16))
    assert len(list(read_video(VIDEOS / "corrupted.mp4", 2.0, 16, partial=True))) > 5


@needs_ffmpeg
def test_only_as_many_frames_are_decoded_as_are_asked_for(tmp_path, monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1])
    video = make_video(tmp_path / "v.mp4", 60)
    started.clear()
    frames = read_video(video, 10.0, 256)
    next(frames)
    assert started[0].poll() is None  # it waits: the rest does not fit into the pipe
    frames.close()
    assert started[0].poll() is not None


@needs_ffmpeg
def test_a_video_that_ends_in_mid_file_is_damaged_too(tmp_path):
    whole = make_video(tmp_path / "whole.mkv", 5).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(ValueError, match=r"cut\.mkv must decode whole, got \d+ frames, then: .*--partial"):
        list(read_video(tmp_path / "cut.mkv", 2.0, 16))
    assert len(list(read_video(tmp_path / "cut.mkv", 2.0, 16, partial=True))) >= 1


def test_what_is_no_video_ends_in_a_sentence_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/x.ts\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    for name in ("empty.mp4", "text.mp4", "list.mp4", "concat.mp4", "absent.mp4", "http://localhost:9/x.mp4"):
        if name.endswith("absent.mp4") or "http" in name or shutil.which("ffmpeg"):
            with pytest.raises(ValueError, match=f"{Path(name).name} must be a video"):
                list(read_video(tmp_path / name, 2.0, 16))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="ffmpeg must be on PATH"):
        list(read_video(tmp_path / "text.mp4", 2.0, 16))


TURN = {"time": 0.5, "role": "assistant", "content": "Hello."}


@pytest.mark.parametrize(("line", "complaint"), [
    ("{broken", "must be JSON"), ("[]", "video must name a file"),
    ({"video": 3}, "video must name a file inside"),
    ({"video": "/etc/passwd", "conversation": []}, "video must name a file inside .*, got '/etc/passwd'"),
    ({"video": "../x.mp4", "conversation": []}, "video must name a file inside .*, got '../x.mp4'"),
    ({"video": "v.mp4", "conversation": "hi"}, "conversation must be a list of turns"),
    ({"video": "v.mp4", "conversation": [TURN | {"role": "narrator"}]}, "role must be .*, got 'narrator'"),
    ({"video": "v.mp4", "conversation": [TURN | {"time": -1}]}, "time must be .*, got -1"),
    ({"video": "v.mp4", "conversation": [TURN | {"time": True}]}, "time must be .*, got True"),
    ({"video": "v.mp4", "conversation": [TURN | {"time": "1"}]}, "time must be .*, got '1'"),
    ({"video": "v.mp4", "conversation": [TURN | {"time": float("nan")}]}, "time must be .*, got nan"),
    ({"video": "v.mp4", "conversation": [TURN | {"content": " "}]}, "content must be text"),
    ({"video": "v.mp4", "conversation": [TURN | {"content": "\ud800"}]}, "content must be text"),
    ({"video": "v.mp4", "conversation": [TURN | {"time": 10**400}]}, "time must be .*, got 1000"),
])
def test_a_broken_annotation_is_named_by_file_line_and_value(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"video": "v.mp4", "conversation": [TURN]})
    path.write_text(good + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: {complaint}"):
        Folder(tmp_path, size=16)


@needs_ffmpeg
def test_times_are_rounded_up_to_the_frame_grid_and_may_not_lie_past_the_end(tmp_path):
    make_video(tmp_path / "v.mp4", 2)
    turns = [TURN | {"time": t} for t in (0, 0.1, 0.5, 1.5)]  # two fall on one frame, and are said together
    (tmp_path / "a.jsonl").write_text(json.dumps({"video": "v.mp4", "conversation": turns}))
    folder = Folder(tmp_path, size=16)
    said = {turn.frame: turn.text for turn in folder.held_out(1)[0].turns}
    assert said == {0: "Hello.", 1: "Hello. Hello.", 3: "Hello."}
    assert len(folder.batch(0, 0, 5)) == len(folder.held_out(9)) == 1
    (tmp_path / "a.jsonl").write_text(json.dumps({"video": "v.mp4", "conversation": [TURN | {"time": 2.6}]}))
    complaint = r"a\.jsonl, line 1: time must be at most 1\.5 s, .* v\.mp4, got 2\.6"
    with pytest.raises(ValueError, match=complaint):
        Folder(tmp_path, size=16).batch(0, 0, 1)


def test_a_clip_that_cannot_be_read_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps({"video": "absent.mp4", "conversation": [TURN]}))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*(absent\.mp4 must be|ffmpeg must be)"):
        Folder(tmp_path, size=16).held_out(1)
