"""Streams of frames and text: the tokenizer, the sequence layout, the embedded worlds and real videos.

A stream is frames at a fixed rate and turns of text. In the sequence a frame is P vision tokens and one
`<frame>`, at which the model decides to speak (`<assistant>`) or not (`<silent>`, predicted, never fed back).
A question after the last frame is answered without being asked whether.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

QUERY = "Narrate what you see, as it happens."
NARRATE = "Narrate what happens, as it happens. Call who wears the camera C, and others by letters."
SYSTEM, DESCRIBE = "Answer the questions about the picture.", "Describe it."

# --- tokenizer ----------------------------------------------------------------------------------------------

SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>", "<frame>", "<silent>")
PATIENCE = 600.0  # seconds that a decoder may take to give a frame
CLIP = 2**33  # bytes of decoded frames that a clip may have
MEMORY = 2**30  # bytes of decoded frames, or of features, that a folder keeps
VISION = -1  # marks the place of a vision token; it has no row in the embedding table

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50),
           "white": (250, 250, 250), "black": (5, 5, 5)}
SHAPES = ("disc", "ring", "cross", "triangle")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
WORDS = ("A", "The", " a", " the", " at", " in", " is", " of", ",", ".", "?", QUERY,
         SYSTEM, DESCRIBE, "What", " colour", " one",
         *(f" {word}" for word in (*COLOURS, *SHAPES, *ROWS, *COLUMNS)))


class Special:
    """The ids of SPECIAL, `first` and those after it, and of what begins every sequence."""

    def __init__(self, first: int, opening: list[int]) -> None:
        self.pad, self.user, self.assistant, self.end, self.frame, self.silent = range(first, first + 6)
        self.opening = opening


class Tokenizer(Special):
    """Text to ids and back, without a file and without loss: a small word list, bytes for everything else."""

    def __init__(self, words: tuple[str, ...] = WORDS) -> None:
        super().__init__(0, [])
        encoded = [word.encode() for word in words]
        self.pieces = [name.encode() for name in SPECIAL] + [bytes([b]) for b in range(256)] + encoded
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if i >= len(SPECIAL)}
        longest_first = sorted(map(re.escape, encoded), key=len, reverse=True)
        self.split = re.compile(b"|".join([*longest_first, b"."]), re.DOTALL)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        return [self.ids[piece] for piece in self.split.findall(text.encode(errors="surrogateescape"))]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="surrogateescape")


class PretrainedTokenizer(Special):
    """The vocabulary of a pretrained model, as its folder's tokenizer.json has it; SPECIAL comes after it.

    Its own special tokens are never read in text nor shown in it; only its template adds some, as `opening`.
    Raises ValueError: no package tokenizers, no such file, more entries than `first`, the model's rows.
    """

    def __init__(self, folder: Path, first: int) -> None:
        file = folder / "tokenizer.json"
        try:
            import tokenizers  # optional

            self.text = tokenizers.Tokenizer.from_file(str(file))
        except ImportError:
            raise ValueError(f"tokenizers must be installed to read {file} (pip install tokenizers), got none"
                             ) from None
        except Exception as error:  # tokenizers raises no narrower one
            raise ValueError(f"{file} must be the tokenizer of a model: {error}") from None
        self.text.no_truncation()
        self.text.no_padding()
        super().__init__(first, self.text.encode("").ids)
        self.text.encode_special_tokens = True
        self.entries = 1 + max([*self.text.get_vocab().values(), *self.opening], default=-1)
        if not 0 < self.entries <= first:
            raise ValueError(f"{file} must have at most {first} entries, the rows of the model, "
                             f"got {self.entries}")

    def encode(self, text: str) -> list[int]:
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no text become U+FFFD, so what a model said is kept as ids too: see Turn."""
        return self.text.decode([i for i in ids if i < self.entries])


def tokenizer_for(vocab_size: int, llm: str = "") -> Special:
    """The tokenizer of a model of so many embeddings, SPECIAL among them; llm: folder of a pretrained one.

    Raises ValueError if the model was trained with another vocabulary.
    """
    if llm:
        return PretrainedTokenizer(Path(llm), vocab_size - len(SPECIAL))
    if len(tokenizer := Tokenizer()) != vocab_size:
        raise ValueError(f"vocab_size must be {len(tokenizer)}, the words of data.WORDS, got {vocab_size}")
    return tokenizer


# --- the sequence -------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    frame: int  # the system's and the user's turns come before this frame, a reply after it
    role: str  # system, user or assistant
    text: str
    said: tuple[int, ...] = ()  # the tokens of a model's own reply; else they are those of the text


class Sample(NamedTuple):
    frames: np.ndarray  # (F, S, S, 3) uint8 RGB, or (F, P, W) float32 features of a frozen encoder
    turns: list[Turn]
    seed: int  # names the stream, for a random router; of a held-out clip, its place among those


class Batch(NamedTuple):
    """Right-padded sequences, on the host."""

    tokens: Tensor  # (B, T) int64, VISION at vision tokens
    group: Tensor  # (B, T) int64, frame of a vision token and of text that may skip, -1: always computed
    real: Tensor  # (B, T) bool, False: padding
    labels: Tensor  # (B, T) int64, the token to predict at this place, -100: none
    decision: Tensor  # (B, T) bool, labels that are decisions to speak or stay silent
    frames: Tensor  # (B, F, 3, S, S) uint8 or (B, F, P, W) float32, zeros after the last frame of a stream
    seed: Tensor  # (B,) int64


def layout(turns: list[Turn], frames: int, tokens_per_frame: int, tokenizer: Tokenizer,
           masked: Collection[str], begins: bool = True) -> list[list[int]]:
    """The token sequence of a stream -> [tokens, group, labels], each of T ints (see Batch).

    begins: this is the beginning of the stream, and not a later chunk of it
    masked: the roles whose text belongs to no group. Other text is in the group of the frame that it comes
    before; after the last frame, of that one. `<frame>`, and what is said of a frame, never skips: a group
    that went on after the decision to speak would tell it. Where questions never skip, neither does the
    `<assistant>` that hands over to the answer.
    """
    tokens, group, labels = [], [], []
    opening = {"system": [], "user": [tokenizer.user], "assistant": [tokenizer.assistant]}

    def add(ids: list[int], frame: int, targets: list[int] | None = None) -> None:
        tokens.extend(ids)
        group.extend([frame] * len(ids))
        labels.extend(targets or [-100] * len(ids))

    def say(turn: Turn) -> None:
        ids = [*opening[turn.role], *(turn.said or tokenizer.encode(turn.text)), tokenizer.end]
        answers = turn.role == "assistant"
        never = turn.role in masked or (answers and turn.frame < frames)
        add(ids, -1 if never else min(turn.frame, frames - 1), [*ids[1:], -100] if answers else None)
        if answers and "user" in masked:
            group[-len(ids)] = -1

    add(tokenizer.opening if begins else [], -1)
    for frame in range(frames):
        here = [turn for turn in turns if turn.frame == frame]
        said = [turn for turn in here if turn.role == "assistant"][:1]
        for turn in here:
            if turn.role != "assistant":
                say(turn)
        add([VISION] * tokens_per_frame, frame)
        add([tokenizer.frame], -1, [tokenizer.assistant if said else tokenizer.silent])
        for turn in said:
            say(turn)
    for turn in turns:
        if turn.frame == frames:  # questions, and an answer to each
            say(turn)
    return [tokens, group, labels]


def stack(frames: list[np.ndarray]) -> Tensor:
    """Frames of B streams, pixels (F, S, S, 3) or features (F, P, W) -> as in Batch"""
    tensor = pad_sequence([torch.tensor(mine) for mine in frames], batch_first=True)
    return tensor.movedim(-1, -3) if tensor.dtype == torch.uint8 else tensor


def pad(rows: list[list[list[int]]], tokenizer: Tokenizer) -> list[Tensor]:
    """What `layout` made of B streams -> tokens, group, labels, real, as in Batch"""
    rows = [[*row, [1] * len(row[0])] for row in rows]
    return [pad_sequence([torch.tensor(row[i], dtype=torch.long) for row in rows], True, fill)
            for i, fill in enumerate((tokenizer.pad, -1, -100, 0))]


def collate(samples: list[Sample], tokens_per_frame: int, tokenizer: Tokenizer,
            masked: Collection[str]) -> Batch:
    rows = [layout(s.turns, len(s.frames), tokens_per_frame, tokenizer, masked) for s in samples]
    tokens, group, labels, real = pad(rows, tokenizer)
    decision = (tokens == tokenizer.frame) & (labels >= 0)
    frames, seed = stack([s.frames for s in samples]), torch.tensor([s.seed for s in samples])
    return Batch(tokens, group, real.bool(), labels, decision, frames, seed)


# --- the embedded worlds ------------------------------------------------------------------------------------


class World:
    """A drawn stream: now and then a coloured shape flashes on a textured, noisy ground; the reply names it.

    What is to be said, and when, is known exactly. A sample is a pure function of (seed, split, number).
    """

    fps, kind, asks = 2.0, "held-out streams", False  # asks: each sample ends in a question and its answer
    scores: tuple[str, ...] = ()  # names in eval.SCORES
    frames = 8

    def __init__(self, size: int, frames: int = 0) -> None:
        self.size, self.frames = size, frames or self.frames

    def batch(self, seed: int, step: int, count: int, rank: int = 0, ranks: int = 1) -> list[Sample]:
        """Of `count` streams every ranks-th, so that several processes have together what one has alone."""
        return [self.sample(seed, "train", step * 4096**2 + i) for i in range(rank, count, ranks)]

    def held_out(self, count: int) -> list[Sample]:
        return [self.sample(0, "test", i) for i in range(count)]

    def pixels(self, sample: Sample) -> np.ndarray:
        return sample.frames

    def sample(self, seed: int, split: str, number: int) -> Sample:
        rng, S = np.random.default_rng([seed, split == "train", number]), self.size
        coarse = 18 * rng.normal(size=(1, -(-S // 4), -(-S // 4), 3))
        texture = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :S, :S]  # stays; the noise is of each frame
        ground = 115 + 25 * rng.uniform(-1, 1, 3) + texture
        frames = rng.standard_normal((self.frames, S, S, 3))
        frames *= 6  # in place, as all that follows: drawing must cost little beside a step
        frames += ground
        turns = self.draw(frames, rng, split)
        return Sample(frames.clip(0, 255, out=frames).astype(np.uint8), turns, number)

    def draw(self, frames: np.ndarray, rng: np.random.Generator, split: str) -> list[Turn]:
        """Paint on frames (F, S, S, 3) float -> what is said of them"""
        turns = [Turn(0, "user", QUERY)]
        for frame in range(self.frames):
            if rng.random() < 0.45:
                said = self.paint(frames[frame], rng, *any_thing(rng), *rng.integers(3, size=2))
                turns.append(Turn(frame, "assistant", said))
        return turns

    def paint(self, frame: np.ndarray, rng: np.random.Generator, colour: str, shape: str, row: int,
              column: int) -> str:
        """Draw a shape, a third of the picture wide, about the centre of its cell of 3 x 3 -> what to say"""
        centre = (np.array([row, column]) * 2 + 1) * self.size / 6 - 0.5 + rng.uniform(-0.5, 0.5, 2)
        v, u = ((np.arange(self.size) - at) * 6.6 / self.size for at in centre)
        v = v[:, None]  # (S, 1)
        if shape == "cross":
            inside = (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1)
        elif shape == "triangle":
            inside = (abs(u) * 2 <= v + 1) & (v <= 1)
        else:
            inside = (u * u + v * v <= 1) & (u * u + v * v >= (0.36 if shape == "ring" else 0))
        frame[inside] = COLOURS[colour]
        return f"A {colour} {shape}, {ROWS[row]} {COLUMNS[column]}."


def any_thing(rng: np.random.Generator) -> tuple[str, str]:
    """A colour and a shape"""
    return list(COLOURS)[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]


class Scene(World):
    """Three to five shapes flash at once, each in its colour; the reply names the colours in reading order.

    It begins with the one named at the start of the stream, and goes on at the top after the last. So for
    each word the last one said has to be found in the picture, and then what comes after it there.
    """

    frames = 6

    def draw(self, frames: np.ndarray, rng: np.random.Generator, split: str) -> list[Turn]:
        begin, *others = rng.permutation(list(COLOURS))
        turns = [Turn(0, "user", f"Name the colours, from {begin} on.")]
        for frame in range(self.frames):
            if rng.random() < 0.8:
                colours = rng.permutation([begin, *rng.permutation(others)[: rng.integers(2, 5)]]).tolist()
                for colour, cell in zip(colours, np.sort(rng.permutation(9)[: len(colours)]), strict=True):
                    self.paint(frames[frame], rng, colour, any_thing(rng)[1], *divmod(cell, 3))
                at = colours.index(begin)
                said = "".join(f" {colour}" for colour in (*colours[at:], *colours[:at]))
                turns.append(Turn(frame, "assistant", f"{said}."))
        return turns


class VQA(World):
    """One frame with three shapes, each in a colour and a cell of its own, and questions with exact answers.

    A sample to learn from asks once of each shape and once of a neighbour, in any order, and ends in a
    description of the picture. A held-out sample is one such question.
    """

    kind, asks, frames = "held-out questions", True, 1

    def draw(self, frames: np.ndarray, rng: np.random.Generator, split: str) -> list[Turn]:
        shapes, colours = rng.permutation(SHAPES)[:3], rng.permutation(list(COLOURS))[:3]
        left = 3 * rng.integers(3) + rng.integers(2)  # two shapes stand side by side, one anywhere
        cells = left, left + 1, rng.choice([cell for cell in range(9) if cell not in (left, left + 1)])
        things = sorted(zip(cells, colours, shapes, strict=True))
        places = [self.paint(frames[0], rng, colour, shape, *divmod(cell, 3))
                  for cell, colour, shape in things]
        a, b, _ = shapes  # a stands left of b
        pairs = [((f"What is left of the {b}?", f" {a}"), (f"What is right of the {a}?", f" {b}"))]
        for _, colour, shape in things:
            pairs.append(((f"What colour is the {shape}?", f" {colour}"),
                          (f"What is the {colour} one?", f" {shape}")))
        either = [pair[rng.integers(2)] for pair in pairs]
        asked = [either[i] for i in rng.permutation(len(either))]
        turns = [Turn(0, "system", SYSTEM)]
        for question, answer in [*asked, (DESCRIBE, " ".join(places))] if split == "train" else asked[:1]:
            turns += [Turn(1, "user", question), Turn(1, "assistant", answer)]
        return turns


RECIPES = (  # each step is of one recipe, and each has its place there
    ("red disc", "white ring", "blue cross", "green disc", "black triangle", "yellow ring"),
    ("yellow cross", "black disc", "red triangle", "white cross", "green ring", "blue triangle"),
    ("blue ring", "green cross", "yellow disc", "red ring", "white triangle", "black cross"),
    ("green triangle", "yellow triangle", "black ring", "blue disc", "red cross", "white disc"))


class Forecast(World):
    """Three steps of a hidden recipe flash in order; asked before them, the answer after lists the rest."""

    kind, asks, scores = "held-out questions", True, ("top1", "forecast")
    question, asked = "What is next?", slice(3, None)  # of the steps from the first that is shown

    def draw(self, frames: np.ndarray, rng: np.random.Generator, split: str) -> list[Turn]:
        recipe, first = rng.choice(len(RECIPES)), rng.integers(3)
        steps, shown = RECIPES[recipe][first:], np.sort(rng.permutation(self.frames)[:3])
        for frame, step in zip(shown, steps, strict=False):
            self.paint(frames[frame], rng, *step.split(), *rng.integers(3, size=2))
        answer = numbered(f"{step}." for step in steps[self.asked])
        return [Turn(0, "user", self.question), Turn(self.frames - 1, "assistant", answer)]

    def answers(self) -> list[str]:
        return [numbered(recipe) for recipe in RECIPES]


class Summary(Forecast):
    """The same streams; the answer lists the steps that were shown."""

    scores, question, asked = ("top1",), DESCRIBE, slice(3)


# --- real videos --------------------------------------------------------------------------------------------


def parse(text: bytes, where: str) -> object:
    """JSON in which a missing key is a ValueError that names it, and where it is missing."""
    class Record(dict):
        def __missing__(self, key: str) -> None:
            raise ValueError(f"{where} must have {key!r} where it has {str(list(self))[:60]}, got none")

    try:
        return json.loads(text, object_hook=Record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON, got {text[:60]!r} ({error})") from None


def read_json(file: Path) -> dict | list:
    return parse(file.read_bytes(), str(file))


def read_lines(file: Path) -> list[tuple[str, object]]:
    """A file of an entry a line -> where each stands, and the entry"""
    lines = [(f"{file}, line {n}:", line) for n, line in enumerate(file.read_bytes().splitlines(), 1)]
    return [(where, parse(line, where)) for where, line in lines if line.strip()]


CONTAINERS = ("mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,h264,hevc,ivf,m4v,mjpeg,mxf,"
              "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe")


def grid(time: float, fps: float) -> int:
    """The first frame that is not earlier than a time in seconds."""
    return math.ceil(time * fps - 1e-9)


def read_video(path: Path, fps: float, size: int, partial: bool = False, start: float = 0.0,
               end: float = math.inf) -> Iterator[np.ndarray]:
    """Decode a file through the ffmpeg program, frame by frame as they are asked for.

    fps: frames a second; frame i shows the last picture of the file that is not later than i / fps seconds
    size: S; the picture is turned as its rotation says, shrunk to fit and centred on black
    partial: keep what could be decoded of a damaged file instead of refusing it
    start, end: seconds; only these frames, from and to the first that is not earlier
    -> yields (S, S, 3) uint8 RGB. Raises ValueError: no ffmpeg, no such file, no frame, damage, a stall.
    Note: nothing but this local file is opened: no protocol, and no container that names other files. A
    picture of more than 2**26 pixels is damage; a decoder that takes longer than PATIENCE is ended.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} must be a video file, got no such file")
    if (program := shutil.which("ffmpeg")) is None:
        raise ValueError("ffmpeg must be on PATH to decode videos (apt or brew install ffmpeg), got none")
    with open(path, "rb") as file:
        jpeg = file.read(3) == b"\xff\xd8\xff"
    # A frame keeps the time of the file, so that is its number on the grid. After a seek to the key picture
    # before, 10 s early for files without an index, `start_time` fills in what `trim` drops; `tpad` lets a
    # span end a little after its file.
    trim = f"trim=start_pts={grid(start, fps)}"
    if end < math.inf:
        trim = f"tpad=stop_mode=clone:stop_duration=2,{trim}:end_pts={grid(end, fps) + 1}"
    sides = (f"'max(1,min({size},round({size}*{ratio})))'" for ratio in ("iw/ih", "ih/iw"))
    shape = f"scale={':'.join(sides)},pad={size}:{size}:-1:-1"
    chain = f"fps={float(fps)}:round=up:start_time=0,{trim},setpts=PTS-STARTPTS,{shape}"
    command = [program, "-nostdin", "-v", "error", *([] if partial else ["-xerror"]),
               "-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-copyts", "-start_at_zero",
               "-max_pixels", str(2**26),
               *(["-f", "jpeg_pipe"] if jpeg else []),  # else a large one passes for a pattern of names
               *(["-noaccurate_seek", "-ss", str(start - 10)] if start > 10 else []), "-i", f"file:{path}",
               "-map", "0:v:0", "-vf", chain, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    count, length = 0, size * size * 3  # frames; bytes of one
    with (tempfile.TemporaryFile() as complaints,
          subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as process):
        try:
            while len(frame := patiently(process, path, lambda: process.stdout.read(length))) == length:
                count += 1
                yield np.frombuffer(frame, np.uint8).reshape(size, size, 3)
            failed = patiently(process, path, process.wait) != 0
            complaints.seek(0)
            why = complaints.readline().decode(errors="replace").strip()
        finally:  # also when whoever asked for frames has had enough
            process.kill()
    if not count:
        raise ValueError(f"{path} must be a video, got no frame from it: {why or 'it ends before'}")
    if (failed or why) and not partial:  # ffmpeg can report damage and yet exit with 0
        raise ValueError(f"{path} must decode whole, got {count} frames, then: "
                         f"{why or 'the file ends early'} (--partial keeps them)")


def patiently(process: subprocess.Popen, path: Path, ask: Callable[[], object]) -> object:
    """What is asked of a decoder. Raises ValueError if it stalls, and ends it."""
    stalled = threading.Event()
    alarm = threading.Timer(PATIENCE, lambda: (stalled.set(), process.kill()))
    alarm.start()
    try:
        answer = ask()
    finally:
        alarm.cancel()
    if stalled.is_set():
        raise ValueError(f"{path} must be decoded without a stall, got none of it for {PATIENCE:g} s")
    return answer


class Clip(NamedTuple):
    """A video, or a span of it, and what is said there: an entry of a .jsonl file or a benchmark."""

    where: str  # to be named in errors
    video: Path
    start: float  # seconds
    end: float
    turns: list[dict]


def check_entry(entry: object, where: str, folder: Path) -> Clip:
    """{"video": name, "conversation": [{"time": s, "role": ..., "content": ...}, ...]}, and "start", "end"

    Times are those of the video; a turn without one comes after the last frame, and its answer is given
    without deciding to speak. Raises ValueError saying where, what must hold and what came.
    """
    def need(ok: bool, rule: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{where} {rule}, got {repr(got)[:60]}")

    def need_time(name: str, time: object, least: float, most: float) -> None:
        need(type(time) in (int, float) and least <= time <= most,
             f"{name} must be a number from {least} to {most}", time)

    entry = entry if isinstance(entry, dict) else {}
    video, turns = entry.get("video"), entry.get("conversation")
    need(isinstance(video, str) and not Path(video).is_absolute() and ".." not in Path(video).parts,
         f"video must name a file inside {folder}", video)
    start, end = entry.get("start", 0), entry.get("end", 1e9)
    need_time("start", start, 0, 1e9)
    need_time("end", end, start, 1e9)
    need(isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns),
         "conversation must be a list of turns", turns)
    for turn in turns:
        role, content = turn.get("role"), turn.get("content")
        need_time("time", turn.get("time", start), start, end)
        need(role in ("user", "assistant"), "role must be user or assistant", role)
        need(isinstance(content, str) and content.strip() and not re.search("[\ud800-\udfff]", content),
             "content must be text", content)
    late = [turn["role"] for turn in turns if "time" not in turn]
    need(("assistant", "assistant") not in pairwise(late), "each untimed reply must follow a question", late)
    return Clip(where, folder / video, start, entry.get("end", math.inf), turns)


class Folder:
    """Clips of a folder and what is said in them. A batch is a function of (seed, step, rank).

    Frames are decoded, or their features read, when a batch needs them, and stay in memory up to MEMORY.
    """

    def __init__(self, folder: Path, size: int, fps: float = 2.0, partial: bool = False,
                 task: str = "narration") -> None:
        self.folder, self.size, self.fps, self.partial, self.task = folder, size, fps, partial, task
        self.reader, self.scores = READERS.get(task, (None, ()))
        self.asks, self.kind = bool(self.scores), "held-out clips" if self.reader else "training clips"
        self.memory: dict[tuple, np.ndarray] = {}  # video, start, end -> frames or features
        self.encoder: tuple[Callable[[Tensor], Tensor], Path, str, Callable] | None = None
        self.clips = self.read("train")
        self.tested = self.read("val") if self.reader else self.clips
        if not any("time" in t for clip in self.tested for t in clip.turns if t["role"] == "assistant"):
            self.asks = True  # no reply is decided: each clip is a question about all of it
            for clip in self.tested:
                if [turn["role"] for turn in clip.turns[-2:]] != ["user", "assistant"]:
                    raise ValueError(f"{clip.where} must end in a question and its answer where no reply of "
                                     f"the folder has a time, got {len(clip.turns)} turns")

    def read(self, split: str) -> list[Clip]:
        """The clips of a split; of .jsonl files, which have but one, also those whose videos are missing."""
        if not self.reader:
            entries = [line for file in sorted(self.folder.glob("*.jsonl")) for line in read_lines(file)]
        else:
            try:
                entries = [(f"{self.folder}, {self.task} {split}, {str(entry['video'])[:60]}:", entry)
                           for entry in self.reader(self.folder, split)]
            except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
                if str(error).startswith(str(self.folder)):  # it names the file already
                    raise
                raise ValueError(f"{self.folder} must hold annotations of {self.task}, got {error!r}"
                                 ) from None
        clips = [check_entry(entry, where, self.folder) for where, entry in entries]
        found = [clip for clip in clips if clip.video.is_file() or not self.reader]
        if not any(turn["role"] == "assistant" for clip in found for turn in clip.turns):
            raise ValueError(f"{self.folder} must hold clips and replies ({self.task}, {split}), got "
                             f"{len(found)} clips of {len(clips)}")
        if len(found) < len(clips):
            print(f"{self.folder}: {len(clips) - len(found)} of {len(clips)} clips lack their video")
        return found

    def encode(self, encoder: Callable[[Tensor], Tensor], cache: Path, key: str, write: Callable) -> None:
        """From now on samples hold the features of a frozen encoder: each clip is encoded once, into a file.

        encoder: (N, 3, S, S) uint8 on the host -> (N, P, W);  cache: folder of files;  key: names the encoder
        write: model.write
        """
        cache.mkdir(parents=True, exist_ok=True)
        self.encoder, self.memory = (encoder, cache, key, write), {}

    def decode(self, clip: Clip) -> np.ndarray:
        """-> (F, S, S, 3) uint8. Raises ValueError: more than CLIP bytes, and as read_video does."""
        most = CLIP // (3 * self.size**2)
        video = read_video(clip.video, self.fps, self.size, self.partial, clip.start, clip.end)
        with closing(video):
            frames = list(islice(video, most + 1))
        if len(frames) > most:
            raise ValueError(f"{clip.video} must have at most {most} frames (start and end cut it), got more")
        return np.stack(frames)

    @torch.no_grad()
    def features(self, clip: Clip) -> np.ndarray:
        """-> (F, P, W) float32. Raises ValueError if the file of an earlier run is damaged."""
        encoder, cache, key, write = self.encoder
        stat = clip.video.stat()
        about = (clip.video.resolve(), stat.st_size, stat.st_mtime_ns, clip.start, clip.end, self.fps,
                 self.size, self.partial, key)
        file = cache / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}.safetensors"
        if not file.exists():
            parts = [encoder(part).float().cpu() for part in stack([self.decode(clip)])[0].split(64)]
            write(file, lambda path: save_file({"features": torch.cat(parts)}, path))
        try:
            return load_file(file)["features"].numpy()
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{file} must hold features (remove it to encode again): {error}") from None

    def sample(self, clip: Clip, number: int) -> Sample:
        try:
            if (frames := self.memory.get(clip[1:4])) is None:
                frames = self.features(clip) if self.encoder else self.decode(clip)
        except ValueError as error:
            raise ValueError(f"{clip.where} {error}") from None
        if frames.nbytes + sum(held.nbytes for held in self.memory.values()) <= MEMORY:
            self.memory[clip[1:4]] = frames
        said: dict[tuple, list[str]] = {}  # on one frame it is said together, after the last it is not
        for n, turn in enumerate(clip.turns):
            at, last = len(frames), (len(frames) - 1) / self.fps
            if "time" in turn:
                at, n = grid(turn["time"], self.fps) - grid(clip.start, self.fps), -1
                if at >= len(frames):
                    if not self.partial and (self.asks or not self.reader):
                        raise ValueError(f"{clip.where} time must be at most {clip.start + last} s, the last "
                                         f"frame of {clip.video.name}, got {turn['time']}")
                    if not self.asks:
                        continue  # narrated after the end of the file
                    at = len(frames) - 1
            said.setdefault((at, turn["role"], n), []).append(turn["content"])
        turns = [Turn(at, role, " ".join(texts)) for (at, role, _), texts in said.items()]
        return Sample(frames, turns, number)

    def batch(self, seed: int, step: int, count: int, rank: int = 0, ranks: int = 1) -> list[Sample]:
        """At most `count` clips, none of them twice; of these every ranks-th."""
        order = np.random.default_rng([seed, step]).permutation(len(self.clips))[:count][rank::ranks]
        if not len(order):
            raise ValueError(f"{self.folder} must hold a clip for each of {ranks} processes, got too few")
        return [self.sample(self.clips[i], step * len(self.clips) + i) for i in order]

    def held_out(self, count: int) -> list[Sample]:
        """At most `count` clips from all over the validation split; a folder of .jsonl files has only one."""
        count = min(count, len(self.tested))
        return [self.sample(self.tested[i], i) for i in (n * len(self.tested) // count for n in range(count))]

    def pixels(self, sample: Sample) -> np.ndarray:
        """The frames of a held-out sample -> (F, S, S, 3) uint8"""
        return self.decode(self.tested[sample.seed]) if self.encoder else sample.frames

    def answers(self) -> list[str]:
        """All answers of the validation split; of long-term anticipation, those of the taxonomy."""
        if self.task == "lta":
            verbs, nouns = taxonomy(self.folder)
            return [f"{verb} {nouns[0]}" for verb in verbs] + [f"{verbs[0]} {noun}" for noun in nouns]
        return [turn["content"] for clip in self.tested for turn in clip.turns if turn["role"] == "assistant"]


# --- benchmarks: their own annotation files, as entries of the one format -----------------------------------


def sentence(text: str) -> str:
    text = " ".join(text.split()).rstrip(". ")
    return f"{text[:1].upper()}{text[1:]}."


def numbered(lines: Iterable[str]) -> str:
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1))


def span(video: str, start: float, end: float, question: str, answer: str) -> dict:
    """An entry: a question before the first frame of a span, its answer at the last."""
    asked = {"time": start, "role": "user", "content": question}
    said = {"time": end, "role": "assistant", "content": answer}
    return {"video": f"{video}.mp4", "start": start, "end": end, "conversation": [asked, said]}


def ego4d(folder: Path, split: str) -> Iterator[dict]:
    """Ego4D narrations, a stream of each video and annotator.    all_narrations_redacted.json, <uid>.mp4

    val: the videos in any *_val.json of a benchmark; not in train: those in any *_test*.json
    Times are on the 0.5 s grid, where the later of two replaces the earlier; ten minutes at most.
    """
    def listed(lists: str) -> set[str]:
        texts = (file.read_text() for file in folder.glob(lists))
        return {uid for text in texts for uid in re.findall(r'"video_uid"\s*:\s*"([^"]+)"', text)}

    val, test = listed("*_val.json"), listed("*_test*.json")
    for uid, video in read_json(folder / "all_narrations_redacted.json")["videos"].items():
        if split != ("val" if uid in val else "test" if uid in test else "train"):
            continue
        passes: dict[str, dict[float, str]] = {}  # annotator -> time -> text
        for narration in sorted(video["narrations"], key=lambda narration: narration["time"]):
            text = re.sub(r"#(C|O|unsure)?|@c", "", narration["text"], flags=re.IGNORECASE).strip(" .,\n")
            if len(text.split()) >= 2 and narration["time"] <= 600:
                at = grid(narration["time"], 2) / 2
                passes.setdefault(narration["_annotation_uid"], {})[at] = sentence(text)
        for said in passes.values():
            turns = [{"time": 0, "role": "user", "content": NARRATE}]
            for at, text in said.items():
                if text != turns[-1]["content"]:
                    turns.append({"time": at, "role": "assistant", "content": text})
            yield {"video": f"{uid}.mp4", "end": turns[-1]["time"], "conversation": turns}


def taxonomy(folder: Path) -> list[list[str]]:
    """Ego4D's verbs, of one word each, and nouns: what stands before "_(", unless two are then alike."""
    words = read_json(folder / "fho_lta_taxonomy.json")
    short = {kind: [word.split("_(")[0] for word in words[kind]] for kind in ("verbs", "nouns")}
    return [[(s if short[kind].count(s) == 1 else word).replace("_", joint)
             for s, word in zip(short[kind], words[kind], strict=True)]
            for kind, joint in (("verbs", "-"), ("nouns", " "))]


def lta(folder: Path, split: str) -> Iterator[dict]:
    """Ego4D long-term anticipation: 8 actions seen, the next 20 listed.    fho_lta_*.json, <video_uid>.mp4"""
    verbs, nouns = taxonomy(folder)
    clips: dict[str, list[dict]] = {}
    for action in read_json(folder / f"fho_lta_{split}.json")["clips"]:
        clips.setdefault(action["clip_uid"], []).append(action)
    for actions in clips.values():
        actions.sort(key=lambda action: action["action_idx"])
        names = [sentence(f"{verbs[a['verb_label']]} {nouns[a['noun_label']]}") for a in actions]
        for i in range(len(actions) - 27):
            began = actions[i]["clip_parent_start_sec"]
            start, end = actions[i]["action_clip_start_sec"], actions[i + 7]["action_clip_end_sec"]
            yield span(actions[i]["video_uid"], began + start, began + end,
                       "Eight actions are seen. List the 20 that follow, each as a verb and a noun.",
                       numbered(names[i + 8 : i + 28]))


CAMEL = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"  # where a word begins: ReplaceCDDrive, MakeTea


def coin(folder: Path, split: str, task: str) -> Iterator[dict]:
    """COIN: name the step or the task, the next step, or up to five of them.    COIN.json, <id>.mp4"""
    more = "What are the next steps, five at most?"
    for name, video in read_json(folder / "COIN.json")["database"].items():
        if (video["subset"] == "training") != (split == "train"):
            continue
        goal = sentence(re.sub(CAMEL, " ", video["class"]))
        asked = defaultdict(list, task=[(video["start"], video["end"], "What is the task?", goal)])
        steps = [(*step["segment"], sentence(step["label"])) for step in video["annotation"]]
        for i, (start, end, label) in enumerate(steps):
            asked["step"].append((start, end, "What is being done?", label))
            if after := [label for _, _, label in steps[i + 1 : i + 6]]:
                asked["next"].append((start, end, "What is the next step?", after[0]))
                asked["procedure"].append((start, end, more, numbered(after)))
                asked["goal"].append((start, end, f"The task is: {goal} {more}", numbered(after)))
        yield from (span(name, *entry) for entry in asked[task])


def keystep(folder: Path, split: str) -> Iterator[dict]:
    """Ego-Exo4D fine-grained keysteps: name that of each segment.    keystep_*.json, <take_name>.mp4

    The papers do not say how they ask. Assumed: a segment is a clip, its step_name the answer. A take has one
    video a camera; link or copy the one to watch to <take_name>.mp4.
    """
    for take in read_json(folder / f"keystep_{split}.json")["annotations"].values():
        for segment in take["segments"]:
            yield span(take["take_name"], segment["start_time"], segment["end_time"],
                       "Which step is this?", sentence(segment["step_name"]))


def llava(folder: Path, split: str) -> Iterator[dict]:
    """Image instructions of LLaVA: questions after the image.    train.json and val.json, or any *.json

    Without val.json, every twentieth image is val. Entries without an image, and turns that are no pair of a
    question and an answer, are left out.
    """
    whole = not (folder / "val.json").exists()
    files = sorted(folder.glob("*.json")) if whole else [folder / f"{split}.json"]
    for entry in (entry for file in files for entry in read_json(file) if "image" in entry):
        if whole and (zlib.crc32(str(entry["image"]).encode()) % 20 == 0) != (split == "val"):
            continue
        said = [(turn["from"], turn["value"].replace("<image>", "").strip())
                for turn in entry["conversations"]]
        turns = [{"role": role, "content": text} for (asks, question), (tells, answer) in pairwise(said)
                 if (asks, tells) == ("human", "gpt") and question and answer
                 for role, text in (("user", question), ("assistant", answer))]
        if turns:
            yield {"video": entry["image"], "end": 0, "conversation": turns}


READERS = {"ego4d": (ego4d, ()), "lta": (lta, ("forecast",)), "keystep": (keystep, ("top1",)),
           "llava": (llava, ("relaxed",)),  # task -> reader, what eval scores beside the exact answers
           **{f"coin-{task}": (partial(coin, task=task), ("top1",))
              for task in ("step", "next", "task", "procedure", "goal")}}


# --- pictures -----------------------------------------------------------------------------------------------


def picture(frames: list[np.ndarray], kept: list[dict[int, Tensor]]) -> bytes:
    """A stream's routing as a PNG: frames in columns; below each, a row a routed layer, skipped patches pale.

    frames: (S, S, 3) uint8 each;  kept: per frame, routed layer -> (1 + p * p,) bool; a bar on top is CLS
    """
    scale, gap = max(1, 112 // len(frames[0])), ((4, 0), (4, 0), (0, 0))  # white above and to the left
    columns = []
    for frame, keep in zip(frames, kept, strict=True):
        big = frame.repeat(scale, axis=0).repeat(scale, axis=1)  # (side, side, 3)
        tiles, side = [np.pad(big, gap, constant_values=255)], len(big)
        for layer in sorted(keep):
            p = math.isqrt(len(keep[layer]) - 1)
            patch = np.arange(side) * p // side  # (side,) the patch that a pixel lies in
            computed_here = keep[layer][1:].view(p, p).numpy()[patch][:, patch, None]  # (side, side, 1)
            tile = np.where(computed_here, big, 255 - (255 - big) // 5)
            tiles.append(np.pad(tile, gap, constant_values=255))
            if keep[layer][0]:
                tiles[-1][1:3, 4:] = (40, 90, 200)
        columns.append(np.concatenate(tiles))
    return png(np.pad(np.hstack(columns), ((0, 4), (0, 4), (0, 0)), constant_values=255))


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> the file"""
    raw = np.pad(image.reshape(len(image), -1), ((0, 0), (1, 0)))  # a row begins with 0: no filter
    header = struct.pack(">2I5B", image.shape[1], len(image), 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")):
        file += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return file


Source = World | Folder
TASKS: dict[str, type[World]] = {"narration": World, "scene": Scene, "vqa": VQA, "forecast": Forecast,
                                "summary": Summary}


def check_fps(fps: float) -> None:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 120:
        raise ValueError(f"fps must be a number above 0 and at most 120, got {fps!r}")


def open_source(task: str, data: str, fps: float, partial: bool, size: int) -> Source:
    """Where streams come from: the embedded world of a task, or a folder of clips, read as the task says."""
    if task not in (known := [*TASKS, *READERS]):
        raise ValueError(f"task must be one of {', '.join(known)}, got {task}")
    if data:
        return Folder(Path(data), size, fps, partial, task)
    if task in READERS:
        raise ValueError(f"data must name a folder of the benchmark for the task {task}, got none")
    return TASKS[task](size)


def newest_run() -> Path:
    runs = sorted(Path("out").glob("*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise ValueError("out/ must hold a run to evaluate, got none: make one with `python train.py`")
    return runs[-1].parent


def read_settings(file: Path) -> dict:
    """What a run was trained on. Raises ValueError, naming the file, where it does not say."""
    keys = {"task": str, "data": str, "fps": float, "partial": bool}
    try:
        values = json.loads(file.read_text())
        check_fps(values["fps"])
        return {key: kind(values[key]) for key, kind in keys.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} must be JSON with {', '.join(keys)}, got {error!r}") from None


def provenance() -> dict[str, str | int]:
    """The code, and whether anything has changed in it since; versions, and machine with its instructions."""
    git, commit = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"], ""
    if shutil.which("git"):
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "torch": torch.__version__, "python": platform.python_version(),
            "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "cores": os.cpu_count() or 0}


def collect(folder: Path) -> list[dict]:
    """What each run in a folder began with and came to, a row a run."""
    rows = []
    for file in sorted(folder.glob("*/eval.json")):
        try:
            result = json.loads(file.read_text())
            first, *steps = map(json.loads, (file.parent / "log.jsonl").read_text().splitlines())
            seconds = round(median(step["seconds"] for step in steps), 4)
            numbers = {"step_flops": first["flops_of_dense"], "seconds_per_step": seconds}
            if not {"lm_correctness", "accuracy"} & result["free_running"].keys():
                raise ValueError("it has no scores")
            result["free_running"] = {k: float(v) for k, v in (result["free_running"] | numbers).items()}
            first["seed"] = int(first["seed"])
            first["peak_memory"] = max(step.get("peak_memory", 0) for step in steps)
            first["on_shapes_at"] = {step["step"] + 1: step["on_shapes"] for step in steps
                                     if step.get("on_shapes")}
            rows.append({"run": file.parent.name, **first, **result})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{file.parent} must be an evaluated run: {error!r}") from None
    if rows:
        return rows
    raise ValueError(f"{folder} must hold runs, got none")
