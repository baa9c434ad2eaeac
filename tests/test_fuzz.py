"""Whatever is in its files, a door ends in a result or a sentence: soon, in bounded memory, and alone."""

import json
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice, repeat
from pathlib import Path
from random import Random

import numpy as np
import pytest
from strategies import TURN, annotate, make_video, needs_ffmpeg
from test_endless import SMALL, TOKENIZER

import data
import eval as evaluation
import model as models
import train
import video

resource = pytest.importorskip("resource", reason="alarms and limits are of POSIX")
STRANGE = [None, True, -1, 0, 1e308, -0.0, 10**400, float("nan"), float("inf"), "", " ", "\ud800",
           "x" * 10**5, "../x", "/etc/passwd", "http://localhost:9/x", "a.safetensors", "\x1b[2J", "0.2", [],
           {}, [[]], [0] * 9, {"": {}}]
LINUX = sys.platform == "linux"  # where kilobytes are told
SECONDS, MEGABYTES = 30, 400  # that a case may take, and that all cases may add


def flip(held: bytes, random: Random) -> bytes:
    """Other bytes, fewer, more, in another order"""
    for _ in range(random.choice((1, 1, 2, 8))):
        at, to = sorted(random.randrange(len(held) + 1) for _ in range(2))
        some = random.randbytes(random.choice((1, 1, 4, 300)))
        held = random.choice((held[:at] + some + held[at + len(some) :], held[:at], held[:at] + held[to:],
                              held[:at] + some + held[at:], held[:to] + held[at:], held[at:]))
        if not held:
            break
    return held


def bend(values: object, random: Random) -> object:
    """JSON with something strange, or nothing, in one of its places"""
    if not values or not isinstance(values, dict | list) or random.random() < 0.2:
        return random.choice(STRANGE)
    if isinstance(values, list):
        at = random.randrange(len(values))
        return [bend(v, random) if i == at else v for i, v in enumerate(values)]
    key = random.choice(list(values))
    if random.random() < 0.2:
        return {k: v for k, v in values.items() if k != key}
    return {k: bend(v, random) if k == key else v for k, v in values.items()}


def spoil(file: Path, random: Random) -> None:
    held = file.read_bytes()
    if file.suffix in (".json", ".jsonl") and random.random() < 0.6:
        lines = held.splitlines() if file.suffix == ".jsonl" else [held]
        at = random.randrange(len(lines))
        lines[at] = json.dumps(bend(json.loads(lines[at]), random)).encode()
        file.write_bytes(b"\n".join(lines))
    else:
        file.write_bytes(flip(held, random))


# --- the doors: what makes their files, and what opens these ------------------------------------------------


def write_clips(folder):
    turns = [TURN | {"role": role, "time": time}
             for role, time in (("user", 0), ("assistant", 1), ("assistant", 2.5))]
    annotate(folder, *({"video": "v.mp4", "start": 0, "end": 9, "conversation": turns} for _ in range(3)))
    (folder / "v.mp4").touch()


def open_clips(folder, task="narration"):
    clips = data.open_source(task, str(folder), 2.0, False, 16)
    samples = clips.batch(0, 0, 4) + clips.held_out(4)
    data.collate(samples, SMALL, TOKENIZER)
    return clips


def write_run(folder):
    cfg = train.TrainConfig(out=str(folder))
    model = models.initialise(models.VideoLM(SMALL), 0)
    optimizers = train.make_optimizers(model, cfg)
    sum(p.square().sum() for p in model.parameters()).backward()
    for optimizer in optimizers:
        optimizer.step()
    train.checkpoint(folder, model, optimizers, 1)
    models.write_json(folder / "train.json", asdict(cfg))
    lines = [{"seed": 0}, {"step": 0, "loss": 1.0, "seconds": 0.1}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def open_run(folder):
    evaluation.read_settings(folder)
    cfg = train.settings(train.TrainConfig(out=str(folder), resume=True), {"out", "resume"})
    train.resume(folder, train.make_optimizers(models.load(folder), cfg))


DOORS = {  # what writes a valid folder, what opens it, the files to spoil
    "clips": (write_clips, open_clips, ["a.jsonl"]),
    "run": (write_run, open_run, ["*.json", "*.jsonl", "*.safetensors"]),
}


# --- what must hold -----------------------------------------------------------------------------------------

WATCHED: dict = {"inside": None, "wrong": []}


def watch(event: str, args: tuple) -> None:
    """What a door does beside reading its folder"""
    inside = WATCHED["inside"]
    if inside is None:
        return
    if event == "open" and isinstance(args[0], str | bytes):
        path = Path(args[0].decode() if isinstance(args[0], bytes) else args[0]).absolute()
        known = inside, sys.prefix, sys.base_prefix, Path(train.__file__).parent, "/proc", "/sys", "/usr"
        place = Path(tempfile.gettempdir())  # of a file for the decoder's complaints, with or without a name
        nameless = path == place or (path.parent == place and path.name.startswith("tmp"))
        if not nameless and not any(path.is_relative_to(place) for place in known):
            WATCHED["wrong"].append(f"{event} {path}")
    elif event in ("socket.connect", "socket.getaddrinfo", "os.system", "pickle.find_class"):
        WATCHED["wrong"].append(f"{event} {args}")


sys.addaudithook(watch)


@contextmanager
def soon_and_alone(folder: Path):
    def late(*_):
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    WATCHED.update(inside=folder, wrong=[])
    try:
        yield
    finally:
        WATCHED["inside"] = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


SAID: list = []  # the sentences


def ends_in(door, folder: Path) -> str:
    """A result or a sentence; anything else that is raised passes through"""
    try:
        with soon_and_alone(folder):
            door(folder)
        ended = "a result"
    except (ValueError, OSError) as error:
        SAID.append(str(error))
        assert str(folder) in SAID[-1], f"no file is named in: {error}"
        ended = "a sentence"
    assert not WATCHED["wrong"], WATCHED["wrong"]
    return ended


ENDED = defaultdict(Counter)  # how many, how


def fuzz(name: str, how: tuple, tmp_path: Path, cases: int) -> Counter:
    make, door, patterns = how
    valid, folder = tmp_path / "valid", tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    make(folder)
    assert ends_in(door, folder) == "a result", SAID[-1]
    shutil.copytree(folder, valid)
    ended, memory = Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(cases):
        random = Random(f"{name} {case}")
        shutil.rmtree(folder)
        shutil.copytree(valid, folder)
        spoil(random.choice(sorted({file for p in patterns for file in folder.glob(p)})), random)
        try:
            ended[ends_in(door, folder)] += 1
        except BaseException:
            print(f"case {case} of {name}; its files are in {folder}")
            raise
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEGABYTES * 1000 or not LINUX
    return ended


def count(name: str, how: tuple, cases: int, tmp_path: Path) -> None:
    ended = fuzz(name, how, tmp_path, cases)
    ENDED["folders"].update(ended)
    print(f"{name}: {cases} spoilt folders, {ended}")


@pytest.fixture
def no_decoder(monkeypatch):
    """Each video has ten seconds; to decode them is of another test."""
    def frames(path, fps, size, partial=False, start=0.0, end=10.0):
        first, last = (video.frame_index(min(time, 9.5), fps) for time in (start, end))
        yield from np.zeros((last + 1 - first, size, size, 3), np.uint8)

    monkeypatch.setattr(data, "read_video", frames)


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("cases", [15, pytest.param(500, marks=pytest.mark.long)])
def test_spoilt_files_end_in_a_result_or_a_sentence(name, cases, tmp_path, no_decoder):
    count(name, DOORS[name], cases, tmp_path)


@pytest.fixture
def bounded(monkeypatch):
    """Decoders have 4 GiB of addresses at most."""
    start = subprocess.Popen

    def begin(*args, **how):
        process = start(*args, **how)
        if hasattr(resource, "prlimit"):  # on Linux
            resource.prlimit(process.pid, resource.RLIMIT_AS, (2**32, 2**32))
        return process

    monkeypatch.setattr(subprocess, "Popen", begin)


@needs_ffmpeg
@pytest.mark.parametrize("cases", [6, pytest.param(250, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "gif", "avi"])
def test_spoilt_videos_end_in_frames_or_a_sentence(kind, cases, tmp_path, bounded):
    valid, ended = make_video(tmp_path / f"v.{kind}", 1, source="testsrc2=size=32x32").read_bytes(), Counter()
    for case in range(cases):
        random, folder = Random(f"{kind} {case}"), tmp_path / "spoilt"
        folder.mkdir(exist_ok=True)
        (folder / f"v.{kind}").write_bytes(flip(valid, random))

        def door(folder, case=case):
            frames = video.read_video(folder / f"v.{kind}", 2.0, 16, partial=case % 2 > 0)
            assert all(frame.shape == (16, 16, 3) for frame in islice(frames, 500))
            frames.close()

        ended[ends_in(door, folder)] += 1
    ENDED["videos"].update(ended)
    print(f"{kind}: {cases} spoilt videos, {ended}")


def filmed(source: str, *how: str):
    """Made by ffmpeg"""
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *how]
    return lambda file: subprocess.run([*command, file], check=True)


def declared(width: int, height: int):
    """A PNG that says to be so large, and holds next to nothing"""
    def write(file):
        whole = evaluation.png(np.zeros((4, 4, 3), np.uint8))
        header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
        file.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])

    return write


def in_bursts(file):
    """Pictures at 0, 0.1, 0.2 and 2.9 s"""
    times = "setpts='if(eq(N,3),2.9,N/10)/TB'"
    filmed("testsrc2=size=32x32:rate=10:duration=0.4", "-vf", times)(file)


ODD = {  # file -> what makes it, how many frames at 2 a second it must have, or what must be said of it
    "none.mkv": (filmed("testsrc2=size=32x32:duration=1", "-frames:v", "0"), "got no frame"),
    "one.mkv": (filmed("testsrc2=size=32x32:rate=2:duration=0.5"), 1),
    "dot.mkv": (filmed("testsrc2=size=32x32:duration=1", "-vf", "format=rgb24,scale=1:1", "-c:v", "png"), 2),
    "odd.mkv": (filmed("testsrc2=size=33x17:rate=10:duration=1", "-c:v", "ffv1"), 2),
    "long.mkv": (filmed("testsrc2=size=2000x2:rate=10:duration=1", "-c:v", "ffv1"), 2),
    "sound.mkv": (filmed("sine=duration=1"), "got no frame"),
    "turning.gif": (filmed("testsrc2=size=32x32:rate=10:duration=1"), 2),
    "raw.m4v": (filmed("testsrc2=size=32x32:rate=10:duration=1", "-f", "m4v"), 2),  # no duration
    "bursts.mkv": (in_bursts, 6),
    "huge.png": (declared(60_000, 60_000), "got no frame"),
    "large.png": (declared(12_000, 12_000), "got no frame .*exceeds specified max pixel"),
}


@needs_ffmpeg
@pytest.mark.parametrize("name", ODD)
def test_odd_videos_have_their_frames_or_a_sentence(name, tmp_path, bounded):
    write, expected = ODD[name]
    write(tmp_path / name)
    if isinstance(expected, int):
        assert len(list(video.read_video(tmp_path / name, 2.0, 16))) == expected
    else:
        with pytest.raises(ValueError, match=rf"{name} must be a video, {expected}"):
            list(video.read_video(tmp_path / name, 2.0, 16))


@needs_ffmpeg
@pytest.mark.parametrize("program", ["ffmpeg", "ffprobe"])
def test_a_program_that_stalls_is_ended(tmp_path, monkeypatch, program):
    make_video(tmp_path / "v.mp4")
    stalls = tmp_path / program
    stalls.write_text("#!/bin/sh\nhead -c 768 /dev/zero\nexec sleep 60\n")  # a frame, then nothing
    stalls.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(video, "PATIENCE", 3.0)
    with pytest.raises(ValueError, match=r"v\.mp4 must be decoded without a stall, got none of it for 3 s"):
        list(video.read_video(tmp_path / "v.mp4", 2.0, 16, partial=True))


def test_a_clip_of_too_many_frames_is_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    write_clips(tmp_path)
    monkeypatch.setattr(data, "CLIP", 5 * 16 * 16 * 3)
    monkeypatch.setattr(data, "read_video", lambda *_: (frame for frame in repeat(np.zeros((16, 16, 3)))))
    with pytest.raises(ValueError, match=r"v\.mp4 must have at most 5 frames"):
        open_clips(tmp_path)
