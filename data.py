"""Where streams come from: the tokenizer, the sequence, two embedded worlds, and your own videos.

A stream is frames at a fixed rate, and turns of text. In the sequence a frame is P vision tokens
and one `<frame>` token. There the model decides to speak (`<assistant>`) or to stay silent
(`<silent>`, which is only predicted, never fed back). A question after the last frame is always
answered.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from video import frame_index, read_video

# --- tokenizer ----------------------------------------------------------------------------------

SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>", "<frame>", "<silent>")
VISION = -1  # id at the place of a vision token; the embedding table has no row for it
NO_TARGET = -100  # label of a place where nothing is to be predicted

QUERY = "Narrate what you see, as it happens."
SYSTEM, DESCRIBE = "Answer the questions about the picture.", "Describe it."
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230),
           "yellow": (235, 215, 50), "white": (250, 250, 250), "pink": (240, 120, 200)}
SHAPES = ("disc", "ring", "cross", "triangle")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
WORDS = ("A", "The", " a", " the", " at", " in", " is", " of", ",", ".", "?",
         QUERY, SYSTEM, DESCRIBE, "What", " colour", " one",
         *(f" {word}" for word in (*COLOURS, *SHAPES, *ROWS, *COLUMNS)))


class Special:
    """The ids of the six special tokens, `first` and the five after it.

    opening: ids that begin every stream; a pretrained vocabulary has some, ours has none
    """

    def __init__(self, first: int, opening: list[int]) -> None:
        ids = range(first, first + 6)
        self.pad, self.user, self.assistant, self.end, self.frame, self.silent = ids
        self.opening = opening


class Tokenizer(Special):
    """Text to ids and back, without a file and without loss: a few words, else bytes."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        super().__init__(0, [])
        encoded = [word.encode() for word in words]
        special = [name.encode() for name in SPECIAL]
        self.pieces = special + [bytes([b]) for b in range(256)] + encoded
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if i >= len(SPECIAL)}
        longest_first = sorted(map(re.escape, encoded), key=len, reverse=True)
        self.split = re.compile(b"|".join([*longest_first, b"."]), re.DOTALL)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        raw = text.encode(errors="surrogateescape")
        return [self.ids[piece] for piece in self.split.findall(raw)]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="surrogateescape")


def tokenizer_for(config: object) -> Tokenizer:
    """The tokenizer of a model; config: a model.Config, a pretrained one brings its own.

    Raises ValueError if the model was trained with other words.
    """
    if hasattr(config, "make_tokenizer"):
        return config.make_tokenizer()
    tokenizer = Tokenizer()
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"vocab_size must be {len(tokenizer)}, the words of data.WORDS, got {config.vocab_size}"
        )
    return tokenizer


# --- the sequence -------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one speaker says. After the last frame, `frame` is the number of frames."""

    frame: int  # a question comes before this frame, a reply after it
    role: str  # system, user or assistant
    text: str
    said: tuple[int, ...] = ()  # the ids of a model's own reply, used instead of the text


class Sample(NamedTuple):
    """One stream."""

    frames: ndarray  # (F, S, S, 3) uint8 RGB, or (F, P, W) float32 features of an encoder
    turns: list[Turn]
    seed: int  # names the stream, for a random router; for a held-out clip, its index


class Batch(NamedTuple):
    """B sequences of at most T tokens, padded on the right, on the host."""

    tokens: Tensor  # (B, T) int64, VISION at vision tokens
    group: Tensor  # (B, T) int64, group of a token: the number of its frame; -1: it never skips
    real: Tensor  # (B, T) bool, False: padding
    labels: Tensor  # (B, T) int64, the token to predict here, NO_TARGET: none
    decision: Tensor  # (B, T) bool, the label is a decision to speak or to stay silent
    frames: Tensor  # (B, F, 3, S, S) uint8 or (B, F, P, W) float32, zeros after a stream's last
    seed: Tensor  # (B,) int64


class Row(NamedTuple):
    """The sequence of one stream: three lists of T ints, as in Batch."""

    tokens: list
    group: list
    labels: list

    def add(self, ids: list[int], group: int, labels: Sequence[int] = ()) -> None:
        self.tokens.extend(ids)
        self.group.extend([group] * len(ids))
        self.labels.extend(labels or [NO_TARGET] * len(ids))

    def add_turn(self, turn: Turn, group: int, masked: Collection[str],
                 tokenizer: Tokenizer) -> None:
        """`<user> text <end>`, `<assistant> text <end>`, of the system `text <end>`.

        In this group, unless its role is masked.

        `<assistant>` ends the question before it, so it is masked where questions are.
        """
        ids = [*(turn.said or tokenizer.encode(turn.text)), tokenizer.end]
        if turn.role in masked:
            group = -1
        if turn.role == "assistant":
            self.add([tokenizer.assistant], -1 if "user" in masked else group, ids[:1])
            self.add(ids, group, [*ids[1:], NO_TARGET])
        else:
            opening = [tokenizer.user] if turn.role == "user" else []
            self.add(opening + ids, group)


def layout(turns: list[Turn], frames: int, tokens_per_frame: int, tokenizer: Tokenizer,
           masked: Collection[str], begins: bool = True) -> Row:
    """The sequence of a stream -> tokens, group and labels, T ints each.

    masked: the roles whose text never skips;  begins: False for a later chunk of a stream
    Other text joins the group of the frame it comes before, or of the last frame; where there is no
    frame it has none. `<frame>` and replies to a frame never skip. If a reply were in the group of
    its frame, it would change which vision tokens are kept, and so leak into the decision before.
    The first token of a stream never skips: a trained decoder attends to it from everywhere.
    """
    row = Row([], [], [])
    if begins:
        row.add(tokenizer.opening, -1)
    for frame in range(frames):
        before, replies = turns_at(turns, frame)
        for turn in before:
            row.add_turn(turn, frame, masked, tokenizer)
        decision = tokenizer.assistant if replies else tokenizer.silent
        row.add([VISION] * tokens_per_frame, frame)
        row.add([tokenizer.frame], -1, [decision])
        for turn in replies[:1]:  # one reply a frame
            row.add_turn(turn, -1, masked, tokenizer)
    for turn in turns:
        if turn.frame == frames:  # after the last frame, answered without a decision
            row.add_turn(turn, frames - 1, masked, tokenizer)
    if begins and row.group:
        row.group[0] = -1
    return row


def turns_at(turns: list[Turn], frame: int) -> tuple[list[Turn], list[Turn]]:
    """What comes before a frame, and the replies to it"""
    here = [turn for turn in turns if turn.frame == frame]
    replies = [turn for turn in here if turn.role == "assistant"]
    return [turn for turn in here if turn not in replies], replies


def questions_at(turns: list[Turn], frame: int) -> list[Turn]:
    """What is asked before a frame, as turns of frame 0, for a chunk of a stream"""
    return [turn._replace(frame=0) for turn in turns_at(turns, frame)[0]]


def parse_question(text: str, fps: float) -> Turn:
    """"12.5 What is it?" -> a turn. Raises ValueError if it is not seconds and a text."""
    seconds, _, question = text.partition(" ")
    fits = re.fullmatch(r"\d{1,9}(\.\d*)?", seconds) and question.strip()
    need(fits, "ask must be seconds and a question", text)
    return Turn(frame_index(float(seconds), fps), "user", question)


def stack_frames(frames: list[ndarray]) -> Tensor:
    """Frames of B streams, (F, S, S, 3) uint8 or (F, P, W) float32 each -> as in Batch"""
    tensor = pad_sequence([torch.tensor(array) for array in frames], True)
    return tensor.movedim(-1, -3) if tensor.dtype == torch.uint8 else tensor


def pad_rows(rows: Sequence[list[int]], value: int) -> Tensor:
    """Rows of B lengths -> (B, T) int64, filled up on the right"""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, True, value)


def make_batch(rows: list[Row], frames: Tensor, seed: Tensor, tokenizer: Tokenizer) -> Batch:
    """rows: of `layout`, empty where a stream waits;  frames and seed: as in Batch"""
    ids, groups, targets = zip(*rows, strict=True)
    tokens = pad_rows(ids, tokenizer.pad)
    group = pad_rows(groups, -1)
    labels = pad_rows(targets, NO_TARGET)
    real = pad_rows([[1] * len(row) for row in ids], 0).bool()
    decision = (tokens == tokenizer.frame) & (labels >= 0)
    return Batch(tokens, group, real, labels, decision, frames, seed)


def collate(samples: list[Sample], config: object, tokenizer: Tokenizer) -> Batch:
    """Whole streams as one batch for a model; config: its model.Config"""
    P, masked = config.tokens_per_frame, config.masked_roles
    rows = [layout(s.turns, len(s.frames), P, tokenizer, masked) for s in samples]
    frames = stack_frames([s.frames for s in samples])
    return make_batch(rows, frames, torch.tensor([s.seed for s in samples]), tokenizer)


# --- the embedded worlds ------------------------------------------------------------------------


class Source:
    """Where the streams of a task come from. A batch is a function of (seed, step, rank)."""

    task = "narration"
    defaults: ClassVar[dict] = {}  # flags of train.py that this task takes where none are given
    query = QUERY  # what to ask before the first frame of a new video
    asks = False  # True: a sample ends in a question, and only its answer is scored

    def score(self, *given: object) -> dict:
        """Of model, tokenizer, samples and answers: what a task scores beside exact ones"""
        return {}


class World(Source):
    """A drawn stream: now and then a bright shape flashes on dark ground; the reply names it.

    What must be said, and when, is known exactly. A sample is a function of (seed, split, number).
    A shape fills one of grid x grid cells.
    """

    fps, frames, kind, grid = 2.0, 8, "held-out streams", 3

    def __init__(self, size: int, frames: int = 0) -> None:
        self.size, self.frames = size, frames or self.frames

    @classmethod
    def open(cls, folder: str, fps: float, partial: bool, size: int) -> "World":
        """The signature of Clips.open. Raises ValueError if a folder is named: a world has none."""
        if folder:
            raise ValueError(
                f"task must not be given with data but to name a benchmark, got {cls.task}"
            )
        return cls(size)

    def batch(self, seed: int, step: int, count: int, rank: int = 0,
              ranks: int = 1) -> list[Sample]:
        """Every ranks-th of `count` streams: so all processes together have what one would have."""
        return [self.sample(seed, "train", step * 4096**2 + i) for i in range(rank, count, ranks)]

    def held_out(self, count: int) -> list[Sample]:
        # Of seed 1, as the first stream is drawn and printed, and that of seed 0 has no reply.
        return [self.sample(1, "test", number) for number in range(count)]

    def pixels(self, sample: Sample) -> ndarray:
        """The frames of a held-out sample -> (F, S, S, 3) uint8"""
        return sample.frames

    def shows_shape(self, frames: Tensor, pool: int) -> Tensor:
        """Which patches show some of a shape: (B, F, 3, S, S) uint8 -> (B, F, pool * pool) bool"""
        colours = torch.tensor(list(COLOURS.values()))[:, None, None, :, None, None]
        painted = (frames == colours).all(3).any(0)  # (colours, B, F, 3, S, S) -> (B, F, S, S)
        return torch.nn.functional.adaptive_max_pool2d(painted.float(), pool).flatten(2) > 0

    def sample(self, seed: int, split: str, number: int) -> Sample:
        rng, S = default_rng([seed, split == "train", number]), self.size
        cells = S // 4 + 1
        coarse = 18 * rng.standard_normal((1, cells, cells, 3))
        texture = coarse.repeat(4, 1).repeat(4, 2)[:, :S, :S]  # the same in each frame
        frames = rng.standard_normal((self.frames, S, S, 3))
        frames *= 6  # in place, as below: drawing must cost little beside a step of training
        frames += 40 + 25 * rng.uniform(-1, 1, 3) + texture
        turns = self.draw(frames, rng, split)
        return Sample(frames.clip(0, 255, frames).astype(np.uint8), turns, number)

    def draw(self, frames: ndarray, rng: Generator, split: str) -> list[Turn]:
        """Paint on frames (F, S, S, 3) float64 -> what is said of them"""
        turns = [Turn(0, "user", QUERY)]
        for number, frame in enumerate(frames):
            if rng.random() < 0.45:
                said = self.paint(frame, rng, *draw_thing(rng), *rng.integers(3, size=2))
                turns.append(Turn(number, "assistant", said))
        return turns

    def paint(self, frame: ndarray, rng: Generator, colour: str, shape: str,
              row: int, column: int) -> str:
        """Paint a shape about in the middle of a cell -> what to say of it"""
        half = self.size / self.grid / 2  # of a cell, in pixels
        centre = (np.array([row, column]) * 2 + 1) * half + rng.uniform(-1, 0, 2)
        offset = np.indices(frame.shape[:2]) - centre[:, None, None]
        v, u = offset * 1.1 / half  # (S, S) each, -1 to 1 within the shape
        if shape == "cross":
            inside = (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1)
        elif shape == "triangle":
            inside = (abs(u) * 2 <= v + 1) & (v <= 1)
        else:
            hole = 0.36 if shape == "ring" else 0
            distance = u * u + v * v
            inside = (hole <= distance) & (distance <= 1)
        frame[inside] = COLOURS[colour]
        where = f"{ROWS[3 * row // self.grid]} {COLUMNS[3 * column // self.grid]}"
        return f"A {colour} {shape}, {where}."


def draw_thing(rng: Generator) -> tuple[str, str]:
    """A colour and a shape"""
    return list(COLOURS)[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]


class VQA(World):
    """One frame with three shapes, each in its own colour and cell; questions with exact answers.

    A training sample asks once of each shape and once of a neighbour, in any order, and ends in a
    description of the picture. A held-out sample is one such question.
    """

    task, kind, asks, frames = "vqa", "held-out questions", True, 1
    defaults: ClassVar[dict] = {
        "preset": "deep", "keep": 0.5, "router": "shared", "weigh": "update",
        "masked": "question+answer", "routing_loss": 0.01, "muon_lr": 0.005, "adam_lr": 0.003,
        "steps": 600}

    def draw(self, frames: ndarray, rng: Generator, split: str) -> list[Turn]:
        shapes = rng.permutation(SHAPES)[:3]
        colours = rng.permutation(list(COLOURS))[:3]
        left = 3 * rng.integers(3) + rng.integers(2)  # two shapes are neighbours, one is anywhere
        beside = left, left + 1
        alone = rng.choice([cell for cell in range(9) if cell not in beside])
        things = sorted(zip((*beside, alone), colours, shapes, strict=True))
        places = [self.paint(frames[0], rng, colour, shape, *divmod(cell, 3))
                  for cell, colour, shape in things]
        a, b, _ = shapes  # a is left of b
        pairs = [((f"What is left of the {b}?", f" {a}"), (f"What is right of the {a}?", f" {b}"))]
        for _, colour, shape in things:
            pairs.append(((f"What colour is the {shape}?", f" {colour}"),
                          (f"What is the {colour} one?", f" {shape}")))
        chosen = [pair[rng.integers(2)] for pair in pairs]
        asked = [chosen[i] for i in rng.permutation(len(chosen))]
        asked = [*asked, (DESCRIBE, " ".join(places))] if split == "train" else asked[:1]
        turns = [Turn(0, "system", SYSTEM)]
        for question, answer in asked:
            turns += [Turn(1, "user", question), Turn(1, "assistant", answer)]
        return turns


# --- a folder of clips --------------------------------------------------------------------------

CLIP = 2**33  # bytes of decoded frames that one clip may have
MEMORY = 2**30  # bytes of frames that a folder keeps in memory


@contextmanager
def leave_out(where: str, partial: bool, left_out: dict[str, str]) -> Iterator[None]:
    """A ValueError within names the entry. With `partial` the entry is left out and noted instead.

    where: names the entry, "file, line 3:";  left_out: where -> why, grows
    """
    try:
        yield
    except ValueError as error:
        if not partial:
            raise ValueError(f"{where} {error}") from None
        left_out[where] = str(error)


def print_left_out(left_out: dict[str, str]) -> None:
    for where, why in list(left_out.items())[:1]:
        line = f"left out with --partial: {len(left_out)}, the first is {where} {why}"
        print("".join(filter(str.isprintable, line)))


def parse_json(text: bytes, **options: object) -> object:
    """options: of json.loads. Raises ValueError if the text is no JSON."""
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be JSON, got {text[:60]!r} ({error})") from None


class Clip(NamedTuple):
    """A video, or a span of it, and what is said there."""

    where: str  # to be named in errors
    video: Path
    start: float  # seconds
    end: float
    turns: list  # dicts of role, content and, unless it comes after the last frame, time


def check_entry(entry: object, where: str, folder: Path) -> Clip:
    """{"video": name, "conversation": [{"time": s, "role": ..., "content": ...}, ...]} -> Clip

    With "start" and "end" the clip is a span of the video. Times are seconds of the video. A turn
    without a time comes after the last frame; its answer is given without deciding to speak.
    Raises ValueError saying what must hold and what came.
    """
    need(isinstance(entry, dict), "must be an object", entry)
    video, turns = entry.get("video"), entry.get("conversation")
    path = Path(video if isinstance(video, str) else "..")
    inside = not path.is_absolute() and ".." not in path.parts
    need(inside, f"video must name a file inside {folder}", video)
    start, end = entry.get("start", 0), entry.get("end", 1e9)
    need_time("start", start, 0, 1e9)
    need_time("end", end, start, 1e9)
    listed = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    need(listed, "conversation must be a list of turns", turns)
    for turn in turns:
        check_turn(turn, start, end)
    untimed = [turn["role"] for turn in turns if "time" not in turn]
    alternate = ("assistant", "assistant") not in pairwise(untimed)
    need(alternate, "each untimed reply must follow a question", untimed)
    return Clip(where, folder / path, start, entry.get("end", math.inf), turns)


def check_turn(turn: dict, start: float, end: float) -> None:
    role, content = turn.get("role"), turn.get("content")
    need_time("time", turn.get("time", start), start, end)
    need(role in ("user", "assistant"), "role must be user or assistant", role)
    is_text = isinstance(content, str) and content.strip()
    whole = is_text and not re.search("[\ud800-\udfff]", content)  # no half of a character
    need(whole, "content must be text that is not empty", content)


def need(ok: object, rule: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{rule}, got {repr(got)[:60]}")


def need_time(name: str, value: object, least: float, most: float) -> None:
    ok = type(value) in (int, float) and least <= value <= most
    need(ok, f"{name} must be a number from {least:g} to {most:g}", value)


class Clips(Source):
    """Clips and what is said in them.

    Frames are decoded when a batch needs them, and stay in memory up to MEMORY bytes.
    clips: to learn from;  tested: held out, by default the same
    If no reply of `tested` has a time, each clip is a question about the whole clip (`asks`).
    partial: clips that cannot be read are left out, each noted in `left_out`
    """

    kind = "training clips"
    encode = None  # where set, it replaces `decode`: clip -> (F, P, W) float32

    def __init__(self, clips: list[Clip], size: int, fps: float, partial: bool,
                 tested: list[Clip] | None = None) -> None:
        self.clips, self.size, self.fps, self.partial = clips, size, fps, partial
        self.tested, self.left_out = tested or clips, {}
        self.memory = {}  # video, start, end -> frames
        if not any("time" in turn for clip in self.tested for turn in replies(clip)):
            self.asks, given, self.tested = True, self.tested, []
            for clip in given:
                with leave_out(clip.where, partial, self.left_out):
                    last = [turn["role"] for turn in clip.turns[-2:]]
                    rule = "must end in a question and its answer where no reply has a time"
                    need(last == ["user", "assistant"], rule, last)
                    self.tested.append(clip)

    @classmethod
    def open(cls, folder: str, fps: float, partial: bool, size: int) -> "Clips":
        """The clips of all .jsonl files of a folder."""
        clips, left_out = [], {}
        for file in sorted(Path(folder).glob("*.jsonl")):
            for number, line in enumerate(file.read_bytes().splitlines(), 1):
                where = f"{file}, line {number}:"
                with leave_out(where, partial, left_out):
                    if line.strip():
                        clip = check_entry(parse_json(line), where, Path(folder))
                        need(os.path.isfile(clip.video), "video must be a file", clip.video.name)
                        clips.append(clip)
        print_left_out(left_out)
        if not any(replies(clip) for clip in clips):
            raise ValueError(f"{folder} must hold clips and replies, got {len(clips)} clips")
        return cls(clips, size, fps, partial)

    def batch(self, seed: int, step: int, count: int, rank: int = 0,
              ranks: int = 1) -> list[Sample]:
        """At most `count` clips, none of them twice; every ranks-th of these.

        The next one in the order of this rank replaces a clip that is left out.
        """
        order = default_rng([seed, step]).permutation(len(self.clips))
        numbered = ((self.clips[i], step * len(self.clips) + i) for i in order[rank::ranks])
        return self.first_samples(numbered, len(order[rank:count:ranks]))

    def held_out(self, count: int) -> list[Sample]:
        """At most `count` held-out clips, evenly spread over all of them."""
        count = min(count, len(self.tested))
        places = [n * len(self.tested) // count for n in range(count)]
        samples = self.first_samples(((self.tested[i], i) for i in places), count)
        print_left_out(self.left_out)
        return samples

    def first_samples(self, numbered: Iterable[tuple[Clip, int]], count: int) -> list[Sample]:
        """The first `count` clips that can be read. Raises ValueError if there is none."""
        samples = []
        for clip, number in numbered:
            if len(samples) == count:
                break
            if clip.where not in self.left_out:
                with leave_out(clip.where, self.partial, self.left_out):
                    samples.append(self.sample(clip, number))
        if self.left_out and not samples:
            where, why = next(iter(self.left_out.items()))
            raise ValueError(f"at least one clip must be readable, but {where} {why}")
        return samples

    def pixels(self, sample: Sample) -> ndarray:
        """The frames of a held-out sample, decoded -> (F, S, S, 3) uint8"""
        return self.decode(self.tested[sample.seed])

    def decode(self, clip: Clip) -> ndarray:
        """-> (F, S, S, 3) uint8. Raises ValueError: more than CLIP bytes, and as read_video."""
        most = CLIP // (3 * self.size**2)
        video = read_video(clip.video, self.fps, self.size, self.partial, clip.start, clip.end)
        with closing(video):
            frames = list(islice(video, most + 1))
        if len(frames) > most:
            raise ValueError(
                f"{clip.video} must have at most {most} frames (start and end cut it), got more"
            )
        return np.stack(frames)

    def sample(self, clip: Clip, number: int) -> Sample:
        key = (clip.video, clip.start, clip.end)
        frames = self.memory.get(key)
        if frames is None:
            frames = (self.encode or self.decode)(clip)
            if frames.nbytes + sum(held.nbytes for held in self.memory.values()) <= MEMORY:
                self.memory[key] = frames
        return Sample(frames, self.turns(clip, len(frames)), number)

    def turns(self, clip: Clip, frames: int) -> list[Turn]:
        """Turns at frames. Timed texts of a role on one frame are joined, untimed ones are not.

        What comes up to 1 / fps seconds after the last frame belongs to that frame. Raises
        ValueError for later turns; with `partial` they are left out, unless no reply remains.
        """
        texts, first = {}, frame_index(clip.start, self.fps)
        rule = self.check_end(clip, frames)
        for number, turn in enumerate(clip.turns):
            key = (frames, turn["role"], number)  # the number keeps untimed turns apart
            if "time" in turn:
                frame = frame_index(turn["time"], self.fps) - first
                late = frame > frames
                need(self.partial or not late, f"time {rule}", turn["time"])
                if late and not self.asks:
                    self.left_out[f"{clip.where} turn {number + 1}:"] = f"time {rule}"
                    continue
                key = (min(frame, frames - 1), turn["role"], None)
            texts.setdefault(key, []).append(turn["content"])
        lost = replies(clip) and not any("assistant" in key for key in texts)
        need(not lost, f"the time of a reply {rule}", clip.turns)
        return [Turn(frame, role, " ".join(said)) for (frame, role, _), said in texts.items()]

    def check_end(self, clip: Clip, frames: int) -> str:
        """-> what must hold of times. Raises ValueError if a span ends after its video."""
        end = clip.start + frames / self.fps
        rule = f"must be at most {end} s, the end of {clip.video.name}"
        need(self.partial or clip.end <= end or clip.end == math.inf, f"end {rule}", clip.end)
        return rule


def replies(clip: Clip) -> list:
    return [turn for turn in clip.turns if turn["role"] == "assistant"]


# --- tasks --------------------------------------------------------------------------------------

TASKS = {"narration": World, "vqa": VQA}  # extras/benchmarks.py has more


def find_task(task: str) -> type[Source]:
    """The class of a task. Raises ValueError, naming all tasks, if there is none."""
    if task in TASKS:
        return TASKS[task]
    try:
        from extras.benchmarks import TASKS as MORE
    except ImportError:  # there is no folder extras/
        MORE = {}
    if task not in MORE:
        raise ValueError(f"task must be one of {', '.join(TASKS | MORE)}, got {task}")
    return MORE[task]


def open_source(task: str, data: str, fps: float, partial: bool, size: int) -> Source:
    """Where the streams of a task come from. data: a folder of clips or of a benchmark, or none"""
    if task == "narration" and data:
        return Clips.open(data, fps, partial, size)
    return find_task(task).open(data, fps, partial, size)
