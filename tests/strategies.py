"""Layouts, scores, models and streams, valid by construction. Shapes and seeds are drawn, tensors follow."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from mod import GATES, MASKED, Groups
from model import ROUTERS, Config, VideoLM, initialise

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
RATIOS = st.sampled_from([0.0, 0.07, 0.2, 0.34, 0.5, 0.75, 1.0])
SEEDS = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# --- groups and scores --------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """One call of `select` and all that it knows, of 1 to 3 streams, on the host."""

    id: Tensor  # (B, T)
    real: Tensor | None  # (B, T), right-padded
    score: Tensor  # (B, T) whole numbers, so that ties are common
    r: float
    device: str

    def groups(self) -> Groups:
        return Groups.plan(self.id, (self.r,), self.real).to(self.device)


@st.composite
def layouts(draw) -> list[int]:
    """Group ids of a stream: text and groups in turn, or the same in any order (as in gamma-MoD)."""
    row = []
    for group in range(draw(st.integers(0, 4))):
        row += [-1] * draw(st.integers(0, 3)) + [group] * draw(st.integers(1, 6))
    row += [-1] * draw(st.integers(0, 3))
    if draw(st.booleans()):
        row = [row[i] for i in normal(draw(SEEDS), len(row)).argsort()]
    return row


@st.composite
def routings(draw, ratios=RATIOS) -> Routing:
    rows = draw(st.lists(layouts(), min_size=1, max_size=3).filter(any))
    T = max(map(len, rows))
    id = torch.tensor([row + [-1] * (T - len(row)) for row in rows])
    real = torch.arange(T) < torch.tensor([[len(row)] for row in rows])
    score = integers(draw(SEEDS), -2, 3, *id.shape).double()
    return Routing(id, real, score, draw(ratios), draw(st.sampled_from(DEVICES)))


# --- models and what they watch -----------------------------------------------------------------------------


def tiny(keep: tuple[float, ...], seed: int, device: str, **chosen) -> VideoLM:
    """A VideoLM in float64; its parameters want no gradient."""
    config = Config(
        keep=keep, num_hidden_layers=len(keep), hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=23, image_size=8, patch_size=4, vision_hidden_size=8,
        vision_intermediate_size=16, vision_layers=1, vision_heads=2, **{"pool": 2} | chosen)
    return initialise(VideoLM(config), seed).double().requires_grad_(False).to(device)


@st.composite
def models(draw, ratios=RATIOS, **fixed) -> VideoLM:
    """Of any placement, router, gate and masking."""
    chosen = {"pool": draw(st.integers(1, 2)), "router": draw(st.sampled_from(ROUTERS)),
              "gate": draw(st.sampled_from(sorted(GATES))), "masked": draw(st.sampled_from(sorted(MASKED)))}
    keep = tuple(draw(st.lists(ratios, min_size=1, max_size=4)))
    return tiny(keep, draw(SEEDS), draw(st.sampled_from(DEVICES)), **chosen | fixed)


class Unit(NamedTuple):
    """What no chunk may split: a text token, or a frame, in gamma-MoD with text that may compete too."""

    tokens: list[int]
    member: list[bool]  # of the unit's group
    pixels: Tensor  # (0 or 1, 3, S, S) uint8
    late: bool = False


class Batch(NamedTuple):
    """The arguments of VideoLM.forward."""

    tokens: Tensor
    frames: Tensor
    groups: Groups
    seed: Tensor


def unit(config: Config, is_frame: bool, seed: int) -> Unit:
    pixels = integers(seed, 0, 256, int(is_frame), 3, config.image_size, config.image_size).byte()
    if not is_frame:
        late = "assistant" not in MASKED[config.masked]
        return Unit([seed % config.vocab_size], [late], pixels, late)
    text = integers(seed, 0, config.vocab_size, seed % 4 if config.masked != "text" else 0).tolist()
    tokens = [*text[:1], *[-1] * config.tokens_per_frame, *text[1:]]
    return Unit(tokens, [t < 0 or t % 2 == 0 or i == 0 for i, t in enumerate(tokens)], pixels)


def collate(model: VideoLM, streams: list[list[Unit]], seed: Tensor, first: int = 0) -> Batch:
    """Streams -> one right-padded batch; the groups of a stream are numbered from `first`."""
    device, size = model.lm_head.weight.device, model.config.image_size
    rows = [[t for u in units for t in u.tokens] for units in streams]
    ids = [[first + n if m else -1 for n, u in enumerate(units) for m in u.member] for units in streams]
    late = [[u.late for u in units for _ in u.tokens] for units in streams]
    T, F = max(map(len, rows)), max(sum(len(u.pixels) for u in units) for units in streams)
    real = torch.arange(T) < torch.tensor([[len(row)] for row in rows])
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    id = torch.tensor([row + [-1] * (T - len(row)) for row in ids])
    late = torch.tensor([row + [False] * (T - len(row)) for row in late])
    frames = torch.zeros(len(rows), F, 3, size, size, dtype=torch.uint8)
    for b, units in enumerate(streams):
        pixels = torch.cat([frames[b, :0], *(u.pixels for u in units)])
        frames[b, : len(pixels)] = pixels
    groups = Groups.plan(id, model.config.keep, real, late)
    return Batch(tokens.to(device), frames.to(device), groups.to(device), seed.to(device))


class Watch(NamedTuple):
    """A model and the chunks that it sees: units of chunk, stream."""

    model: VideoLM
    chunks: list[list[list[Unit]]]
    seed: Tensor  # (B,)

    def __repr__(self) -> str:
        c = self.model.config
        units = [["".join("tF"[len(u.pixels)] for u in row) for row in chunk] for chunk in self.chunks]
        chosen = {name: getattr(c, name) for name in ("keep", "router", "gate", "masked", "pool")}
        return f"Watch({chosen}, chunks={units})"

    def streams(self) -> list[list[Unit]]:
        return [[u for chunk in self.chunks for u in chunk[b]] for b in range(len(self.seed))]

    def whole(self) -> Batch:
        return collate(self.model, self.streams(), self.seed)


@st.composite
def watches(draw, max_streams=3, together=False, max_chunks=4, **fixed) -> Watch:
    """Chunks of 0 to 3 units a stream; together: text, or a frame and text, or nothing for some streams."""
    model, B = draw(models(**fixed)), draw(st.integers(1, max_streams))
    few = st.lists(st.just(False), max_size=2)
    turn = st.lists(st.booleans(), max_size=3)
    seen = few.map(lambda text: [True, *text])
    kinds = [seen, seen | few, few] if together else [turn]
    chunk = st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=B, max_size=B))
    plan, seed = draw(st.lists(chunk.filter(any), min_size=1, max_size=max_chunks)), draw(SEEDS)
    chunks = [[[unit(model.config, frame, seed + 99 * i + 9 * b + n) for n, frame in enumerate(row)]
               for b, row in enumerate(rows)] for i, rows in enumerate(plan)]
    return Watch(model, chunks, integers(seed, 0, 1000, B))
