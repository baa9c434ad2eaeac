"""Layouts, scores, models and streams, valid by construction. Shapes and seeds are drawn, tensors follow.

And small folders of clips: ffmpeg draws what real videos would show. And where to keep what a check found.
"""

import json
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mod import GATES, MASKED, WEIGHED, Groups
from model import ROUTERS, Config, VideoLM, initialise, write_json
from train import provenance

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
RATIOS = st.sampled_from([0.0, 0.07, 0.2, 0.34, 0.5, 0.75, 1.0])
SEEDS = st.integers(0, 2**16)
Batch = namedtuple("Batch", "tokens frames groups seed")  # the arguments of VideoLM.forward


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[list[int]], value: int) -> Tensor:
    """(B, T), rows of unequal length filled up to the right"""
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True, value)


class Routing(NamedTuple):
    """One call of `select`, of 1 to 3 streams, and what its groups were planned from."""

    id: Tensor  # (B, T)
    real: Tensor  # (B, T), right-padded
    late: Tensor  # (B, T)
    score: Tensor  # (B, T) whole numbers, so that ties are common
    groups: Groups
    r: float


@st.composite
def layouts(draw) -> list[int]:
    """Group ids of a stream: text and groups in turn, or the same in any order (as in gamma-MoD)."""
    first, row = draw(st.integers(0, 9)), []
    for group in range(draw(st.integers(0, 4))):
        row += [-1] * draw(st.integers(0, 3)) + [first + group] * draw(st.integers(1, 6))
    row += [-1] * draw(st.integers(0, 3))
    return [row[i] for i in normal(draw(SEEDS), len(row)).argsort()] if draw(st.booleans()) else row


@st.composite
def routings(draw) -> Routing:
    rows, r = draw(st.lists(layouts(), min_size=1, max_size=3).filter(any)), draw(RATIOS)
    id, real = padded(rows, -1), padded([[1] * len(row) for row in rows], 0).bool()
    late = (integers(draw(SEEDS), 0, 4, *id.shape) == 0) & (id >= 0)
    score, device = integers(draw(SEEDS), -2, 3, *id.shape).double(), draw(st.sampled_from(DEVICES))
    known = (t.to(device) for t in (id, real, late, score, Groups.plan(id, (r,), real, late)))
    return Routing(*known, r)


def tiny(keep: tuple[float, ...], seed: int, device: str, **chosen) -> VideoLM:
    """A VideoLM in float64; its parameters want no gradient."""
    config = Config(
        keep=keep, num_hidden_layers=len(keep), hidden_size=16, intermediate_size=24, num_attention_heads=4,
        head_dim=4, image_size=8, patch_size=4, vision_hidden_size=8,
        vision_intermediate_size=16, vision_heads=2,
        **{"pool": 2, "vocab_size": 23, "num_key_value_heads": 2, "vision_layers": 1} | chosen)
    return initialise(VideoLM(config), seed).double().requires_grad_(False).to(device)


class Unit(NamedTuple):
    """What no chunk may split: a text token, or a frame, in gamma-MoD with text that may compete too."""

    tokens: list[int]
    member: list[bool]  # of the unit's group
    pixels: Tensor  # (0 or 1, 3, S, S) uint8


def unit(config: Config, is_frame: bool, seed: int) -> Unit:
    pixels = integers(seed, 0, 256, int(is_frame), 3, config.image_size, config.image_size).byte()
    if not is_frame:
        return Unit([seed % config.vocab_size], ["assistant" not in MASKED[config.masked]], pixels)
    text = integers(seed, 0, config.vocab_size, seed % 4 if config.masked != "text" else 0).tolist()
    tokens = [*text[:1], *[-1] * config.tokens_per_frame, *text[1:]]
    return Unit(tokens, [t < 0 or t % 2 == 0 or i == 0 for i, t in enumerate(tokens)], pixels)


def collate(model: VideoLM, streams: list[list[Unit]], seed: Tensor, first: int = 0) -> Batch:
    """Streams -> one right-padded batch; the groups of a stream are numbered from `first`."""
    c, device = model.config, model.lm_head.weight.device
    id = [[first + n if m else -1 for n, u in enumerate(units) for m in u.member] for units in streams]
    late = padded([[m and not len(u.pixels) for u in units for m in u.member] for units in streams], 0).bool()
    real = padded([[1 for u in units for _ in u.tokens] for units in streams], 0).bool()
    tokens = padded([[t for u in units for t in u.tokens] for units in streams], 0)
    none = torch.zeros(0, 3, c.image_size, c.image_size, dtype=torch.uint8)
    frames = pad_sequence([torch.cat([none, *(u.pixels for u in units)]) for units in streams], True)
    groups = Groups.plan(padded(id, -1), c.keep, real, late).to(device)
    return Batch(tokens.to(device), frames.to(device), groups, seed.to(device))


class Watch(NamedTuple):
    """A model and the chunks that it sees: units of chunk, stream."""

    model: VideoLM
    chunks: list[list[list[Unit]]]
    seed: Tensor  # (B,)

    def __repr__(self) -> str:
        units = [["".join("tF"[len(u.pixels)] for u in row) for row in chunk] for chunk in self.chunks]
        return f"Watch({self.model.config}, chunks={units})"

    def streams(self) -> list[list[Unit]]:
        return [[u for chunk in self.chunks for u in chunk[b]] for b in range(len(self.seed))]

    def whole(self) -> Batch:
        return collate(self.model, self.streams(), self.seed)


@st.composite
def watches(draw, max_streams=3, together=False, max_chunks=4, ratios=RATIOS, **fixed) -> Watch:
    """Any placement, router, gate, weighing and masking, unless fixed; chunks of 0 to 3 units a stream.

    together: in a chunk all streams get text, or a frame and text, and some of them nothing
    """
    chosen = {"pool": draw(st.integers(1, 2)), "router": draw(st.sampled_from(ROUTERS)),
              "gate": draw(st.sampled_from(sorted(GATES))), "masked": draw(st.sampled_from(sorted(MASKED))),
              "weigh": draw(st.sampled_from(WEIGHED)), "router_norm": draw(st.booleans()),
              "num_key_value_heads": draw(st.sampled_from([1, 2, 4]))}
    keep, B = tuple(draw(st.lists(ratios, min_size=1, max_size=4))), draw(st.integers(1, max_streams))
    model = tiny(keep, draw(SEEDS), draw(st.sampled_from(DEVICES)), **chosen | fixed)
    few = st.lists(st.just(False), max_size=2)
    seen = few.map(lambda text: [True, *text])
    kinds = [seen, seen | few, few] if together else [st.lists(st.booleans(), max_size=3)]
    chunk = st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=B, max_size=B))
    plan, seed = draw(st.lists(chunk.filter(any), min_size=1, max_size=max_chunks)), draw(SEEDS)
    chunks = [[[unit(model.config, frame, seed + 99 * i + 9 * b + n) for n, frame in enumerate(row)]
               for b, row in enumerate(rows)] for i, rows in enumerate(plan)]
    return Watch(model, chunks, integers(seed, 0, 1000, B))


def keep(check: str, found: str) -> None:
    """Print a figure, and put it into out/checks.json, from which results/checks.json is copied"""
    print(f"{check}: {found}")
    file = Path(__file__).parents[1] / "out" / "checks.json"
    file.parent.mkdir(exist_ok=True)
    checks = json.loads(file.read_text())["checks"] if file.exists() else {}
    write_json(file, {"checks": checks | {check: {"found": found} | provenance()}})


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg to decode videos")
TURN = {"time": 0.5, "role": "assistant", "content": "Hello."}


def make_video(path: Path, seconds: float = 2.0, rate: int = 10, source: str = "testsrc2=size=64x48",
               filters: str = "null") -> Path:
    drawn = ["-f", "lavfi", "-i", f"{source}:rate={rate}:duration={seconds},{filters}"]
    subprocess.run(["ffmpeg", "-v", "error", *drawn, "-pix_fmt", "yuv420p", path], check=True)
    return path


def annotate(folder: Path, *entries: dict) -> Path:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder
