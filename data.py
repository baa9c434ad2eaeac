"""Streams of frames and text: the tokenizer, the sequence layout, the embedded worlds and real videos.

A stream is frames at a fixed rate and turns of text. In the sequence a frame is P vision tokens and one
`<frame>`, at which the model decides to speak (`<assistant>`) or not (`<silent>`, predicted, never fed back).
A question after the last frame is answered without being asked whether.
"""

import json
import math
import re
import shutil
import struct
import subprocess
import threading
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

QUERY = "Narrate what you see, as it happens."
SYSTEM, DESCRIBE = "Answer the questions about the picture.", "Describe it."

# --- tokenizer ----------------------------------------------------------------------------------------------

SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>", "<frame>", "<silent>")
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
        self.entries = 1 + max(self.text.get_vocab().values())
        if self.entries > first:
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
    frames: np.ndarray  # (F, S, S, 3) uint8 RGB
    turns: list[Turn]
    seed: int  # names the stream


class Batch(NamedTuple):
    """Right-padded sequences, on the host."""

    tokens: Tensor  # (B, T) int64, VISION at vision tokens
    group: Tensor  # (B, T) int64, frame of a vision token and of text that may skip, -1: always computed
    real: Tensor  # (B, T) bool, False: padding
    labels: Tensor  # (B, T) int64, the token to predict at this place, -100: none
    decision: Tensor  # (B, T) bool, labels that are decisions to speak or stay silent
    frames: Tensor  # (B, F, 3, S, S) uint8, zeros after the last frame of a stream
    seed: Tensor  # (B,) int64


def turn_tokens(tokenizer: Tokenizer, turn: Turn) -> list[int]:
    opening = {"system": [], "user": [tokenizer.user], "assistant": [tokenizer.assistant]}[turn.role]
    return [*opening, *(turn.said or tokenizer.encode(turn.text)), tokenizer.end]


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

    def add(ids: list[int], frame: int, targets: list[int] | None = None) -> None:
        tokens.extend(ids)
        group.extend([frame] * len(ids))
        labels.extend(targets or [-100] * len(ids))

    def say(turn: Turn) -> None:
        ids, answers = turn_tokens(tokenizer, turn), turn.role == "assistant"
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


def collate(samples: list[Sample], tokens_per_frame: int, tokenizer: Tokenizer,
            masked: Collection[str]) -> Batch:
    rows = [layout(s.turns, len(s.frames), tokens_per_frame, tokenizer, masked) for s in samples]
    B, T, F = len(rows), max(len(row[0]) for row in rows), max(len(s.frames) for s in samples)
    tokens, group, labels = (np.full((B, T), fill) for fill in (tokenizer.pad, -1, -100))
    frames = np.zeros((B, F, *samples[0].frames.shape[1:]), np.uint8)
    for b, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        for array, values in zip((tokens, group, labels), row, strict=True):
            array[b, : len(values)] = values
        frames[b, : len(sample.frames)] = sample.frames
    tokens, group, labels = (torch.from_numpy(a) for a in (tokens, group, labels))
    real = torch.arange(T) < torch.tensor([[len(row[0])] for row in rows])
    frames = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)  # (B, F, 3, S, S)
    decision = (tokens == tokenizer.frame) & (labels >= 0)
    return Batch(tokens, group, real, labels, decision, frames, torch.tensor([s.seed for s in samples]))


# --- the embedded worlds ------------------------------------------------------------------------------------


class World:
    """A drawn stream: now and then a coloured shape flashes on a textured, noisy ground; the reply names it.

    What is to be said, and when, is known exactly. A sample is a pure function of (seed, split, number).
    """

    fps, kind, asks = 2.0, "held-out streams", False  # asks: each sample ends in a question

    def __init__(self, size: int, frames: int = 8) -> None:
        self.size, self.frames = size, frames

    def batch(self, seed: int, step: int, count: int, rank: int = 0) -> list[Sample]:
        return [self.sample(seed, "train", (step * 4096 + rank) * 4096 + i) for i in range(count)]

    def held_out(self, count: int) -> list[Sample]:
        return [self.sample(0, "test", i) for i in range(count)]

    def sample(self, seed: int, split: str, number: int) -> Sample:
        rng = np.random.default_rng([seed, split == "train", number])
        frames, turns = self.ground(rng), [Turn(0, "user", QUERY)]
        for frame in range(self.frames):
            if rng.random() < 0.45:
                colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
                row, column = rng.integers(3, size=2)
                self.paint(frames[frame], rng, colour, shape, row, column)
                turns.append(Turn(frame, "assistant", f"A {colour} {shape}, {ROWS[row]} {COLUMNS[column]}."))
        return Sample(frames.clip(0, 255).astype(np.uint8), turns, number)

    def ground(self, rng: np.random.Generator) -> np.ndarray:
        """(F, S, S, 3) float: a texture that stays, and new noise in each frame"""
        S, F = self.size, self.frames
        texture = 18 * rng.normal(size=(1, S // 4, S // 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
        return 115 + 25 * rng.uniform(-1, 1, 3) + texture + 6 * rng.normal(size=(F, S, S, 3))

    def paint(self, frame: np.ndarray, rng: np.random.Generator, colour: str, shape: str, row: int,
              column: int) -> None:
        """Draw a shape about where its cell of a 3 x 3 grid has its centre."""
        centre = (np.array([row, column]) * 2 + 1) * self.size / 6 - 0.5 + rng.uniform(-0.5, 0.5, 2)
        frame[self.mask(shape, centre)] = COLOURS[colour]

    def mask(self, shape: str, centre: np.ndarray) -> np.ndarray:
        """(S, S) bool, the pixels of a shape about a third of the picture wide"""
        v, u = ((np.mgrid[: self.size, : self.size] - centre[:, None, None]) * 6.6 / self.size)
        radius = u * u + v * v
        return {"disc": radius <= 1, "ring": (radius <= 1) & (radius >= 0.36),
                "cross": (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1),
                "triangle": (abs(u) * 2 <= v + 1) & (v <= 1)}[shape]


class VQA(World):
    """One frame with three shapes, each in a colour and a cell of its own, and questions with exact answers.

    A sample to learn from asks once of each shape and once of a neighbour, in any order, and ends in a
    description of the picture. A held-out sample is one such question.
    """

    kind, asks = "held-out questions", True

    def __init__(self, size: int) -> None:
        super().__init__(size, frames=1)

    def sample(self, seed: int, split: str, number: int) -> Sample:
        rng = np.random.default_rng([seed, split == "train", number])
        frames, shapes = self.ground(rng), rng.permutation(SHAPES)[:3]
        colours = rng.permutation(list(COLOURS))[:3]
        left = 3 * rng.integers(3) + rng.integers(2)  # two shapes stand side by side, one anywhere
        cells = left, left + 1, rng.choice([cell for cell in range(9) if cell not in (left, left + 1)])
        things = sorted(zip(cells, colours, shapes, strict=True))
        for cell, colour, shape in things:
            self.paint(frames[0], rng, colour, shape, *divmod(cell, 3))
        a, b, _ = shapes  # a stands left of b
        asked = [(f"What is left of the {b}?", f" {a}"), (f"What is right of the {a}?", f" {b}")]
        asked = [asked[rng.integers(2)]]
        for _, colour, shape in things:
            either = [(f"What colour is the {shape}?", f" {colour}"),
                      (f"What is the {colour} one?", f" {shape}")]
            asked.append(either[rng.integers(2)])
        asked = [asked[i] for i in rng.permutation(len(asked))]
        places = [f"A {colour} {shape}, {ROWS[cell // 3]} {COLUMNS[cell % 3]}."
                  for cell, colour, shape in things]
        asked = [*asked, (DESCRIBE, " ".join(places))] if split == "train" else asked[:1]
        turns = [Turn(1, role, text) for question, answer in asked
                 for role, text in (("user", question), ("assistant", answer))]
        return Sample(frames.clip(0, 255).astype(np.uint8), [Turn(0, "system", SYSTEM), *turns], number)


# --- real videos --------------------------------------------------------------------------------------------

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,h264,hevc,ivf,m4v,mjpeg,mxf"


def read_video(path: Path, fps: float, size: int, partial: bool = False) -> Iterator[np.ndarray]:
    """Decode a file through the ffmpeg program, frame by frame as they are asked for.

    fps: frames a second; frame i shows the last picture of the file that is not later than i / fps seconds
    size: S; the picture is turned as its rotation says, shrunk to fit and centred on black
    partial: keep what could be decoded of a damaged file instead of refusing it
    -> yields (S, S, 3) uint8 RGB. Raises ValueError: no ffmpeg, no such file, no frame, damage.
    Note: nothing but this local file is opened: no protocol, and no container that names other files.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise ValueError("ffmpeg must be on PATH to decode videos (apt or brew install ffmpeg), got none")
    if not Path(path).is_file():
        raise ValueError(f"{path} must be a video file, got no such file")
    shape = f"scale={size}:{size}:force_original_aspect_ratio=decrease,pad={size}:{size}:-1:-1"
    command = [program, "-nostdin", "-v", "error", *([] if partial else ["-xerror"]),
               "-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-i", f"file:{path}",
               "-map", "0:v:0", "-vf", f"fps={float(fps)}:round=up,{shape}",
               "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    complaints: deque[bytes] = deque(maxlen=1)
    listener = threading.Thread(target=complaints.extend, args=(process.stderr,), daemon=True)
    listener.start()
    count = 0
    try:
        while len(frame := process.stdout.read(size * size * 3)) == size * size * 3:
            count += 1
            yield np.frombuffer(frame, np.uint8).reshape(size, size, 3)
        failed = process.wait() != 0
        listener.join()
        failed |= bool(complaints)  # ffmpeg can report damage and yet exit with 0
        why = complaints[0].decode(errors="replace").strip() if complaints else "the file ends early"
        if not count:
            raise ValueError(f"{path} must be a video, got no frame from it: {why}")
        if failed and not partial:
            raise ValueError(f"{path} must decode whole, got {count} frames, then: {why} "
                             "(--partial keeps them)")
    finally:  # also when whoever asked for frames has had enough
        process.kill()
        process.wait()
        listener.join()
        process.stdout.close()
        process.stderr.close()


def read_conversations(path: Path) -> Iterator[tuple[int, str, list[dict]]]:
    """JSONL, a video a line: {"video": name, "conversation": [{"time": s, "role": ..., "content": ...}, ...]}

    -> yields (line number, video, turns). Raises ValueError naming file, line and value.
    """
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}, line {number}:"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} must be JSON, got {line[:60]!r} ({error})") from None
        entry = entry if isinstance(entry, dict) else {}
        video, turns = entry.get("video"), entry.get("conversation")
        if not isinstance(video, str) or Path(video).is_absolute() or ".." in Path(video).parts:
            raise ValueError(f"{where} video must name a file inside {path.parent}, got {str(video)[:60]!r}")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{where} conversation must be a list of turns, got {str(turns)[:60]}")
        for turn in turns:
            time, role, content = (turn.get(key) for key in ("time", "role", "content"))
            if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < 1e9:
                raise ValueError(f"{where} time must be a number from 0 to 1e9, got {repr(time)[:60]}")
            if role not in ("user", "assistant"):
                raise ValueError(f"{where} role must be user or assistant, got {str(role)[:60]!r}")
            if not isinstance(content, str) or not content.strip() or re.search("[\ud800-\udfff]", content):
                raise ValueError(f"{where} content must be text, got {str(content)[:60]!r}")
        yield number, video, turns


class Folder:
    """Clips and conversations: every *.jsonl of a folder. A batch is a function of (seed, step, rank)."""

    kind, asks = "training clips", False  # a folder has no held-out ones

    def __init__(self, folder: Path, size: int, fps: float = 2.0, partial: bool = False) -> None:
        self.fps, self.samples = fps, []
        for path in sorted(folder.glob("*.jsonl")):
            for number, video, turns in read_conversations(path):
                try:
                    frames = np.stack(list(read_video(folder / video, fps, size, partial)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                last, said = len(frames) - 1, {}
                for turn in turns:
                    at = math.ceil(turn["time"] * fps - 1e-9)  # on the frame grid, never too early
                    if at > last:
                        raise ValueError(f"{path}, line {number}: time must be at most {last / fps} s, "
                                         f"the last frame of {video}, got {turn['time']}")
                    said.setdefault((at, turn["role"]), []).append(turn["content"])
                joined = [Turn(*key, " ".join(texts)) for key, texts in said.items()]
                self.samples.append(Sample(frames, joined, len(self.samples)))
        if not any(turn.role == "assistant" for sample in self.samples for turn in sample.turns):
            raise ValueError(f"{folder} must hold clips and a .jsonl file with replies to learn, got none")

    def batch(self, seed: int, step: int, count: int, rank: int = 0) -> list[Sample]:
        """At most `count` clips, none of them twice."""
        order = np.random.default_rng([seed, step, rank]).permutation(len(self.samples))
        return [self.samples[i] for i in order[:count]]

    def held_out(self, count: int) -> list[Sample]:
        return self.samples[:count]


# --- pictures -----------------------------------------------------------------------------------------------


def picture(frames: list[np.ndarray], kept: list[dict[int, Tensor]]) -> bytes:
    """A stream's routing as a PNG: frames in columns; below each, a row a routed layer, skipped patches pale.

    frames: (S, S, 3) uint8 each;  kept: per frame, routed layer -> (1 + p * p,) bool; a bar on top is CLS
    """
    scale, gap = max(1, 112 // len(frames[0])), 4
    side, layers = scale * len(frames[0]), sorted(kept[0])
    height, width = (side + gap) * (1 + len(layers)) + gap, (side + gap) * len(frames) + gap
    image = np.full((height, width, 3), 255, np.uint8)
    for left, frame, keep in zip(range(gap, width, side + gap), frames, kept, strict=False):
        big = frame.repeat(scale, axis=0).repeat(scale, axis=1)  # (side, side, 3)
        image[gap : gap + side, left : left + side] = big
        for top, layer in zip(range(side + 2 * gap, height, side + gap), layers, strict=False):
            p = math.isqrt(len(keep[layer]) - 1)
            patch = np.arange(side) * p // side  # (side,) the patch that a pixel lies in
            computed_here = keep[layer][1:].view(p, p).numpy()[patch][:, patch, None]  # (side, side, 1)
            image[top : top + side, left : left + side] = np.where(computed_here, big, 255 - (255 - big) // 5)
            if keep[layer][0]:
                image[top - gap + 1 : top - 1, left : left + side] = (40, 90, 200)
    above = np.concatenate([np.zeros_like(image[:1]), image[:-1]])
    raw = b"".join(b"\2" + line.tobytes() for line in image - above)  # 2: as differences to the row above
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
                    for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


Source = World | Folder
TASKS = {"narration": World, "vqa": VQA}


def check_fps(fps: float) -> None:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 120:
        raise ValueError(f"fps must be a number above 0 and at most 120, got {fps!r}")


def open_source(task: str, data: str, fps: float, partial: bool, size: int) -> Source:
    """Where streams come from: the embedded world of a task, or a folder of clips if one is named."""
    check_fps(fps)
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task}")
    return Folder(Path(data), size, fps, partial) if data else TASKS[task](size)


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
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} must be JSON with {', '.join(keys)}, got {why}") from None


def collect(folder: Path) -> list[dict]:
    """What each run in a folder began with and came to, a row a run."""
    rows = []
    for file in sorted(folder.glob("*/eval.json")):
        try:
            result = json.loads(file.read_text())
            first, *steps = map(json.loads, (file.parent / "log.jsonl").read_text().splitlines())
            result["free_running"]["seconds_per_step"] = round(median(step["seconds"] for step in steps), 4)
            rows.append({"run": file.parent.name, **first, **result})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file.parent} must be an evaluated run: {error!r}") from None
    if rows:
        return rows
    raise ValueError(f"{folder} must hold runs, got none")
