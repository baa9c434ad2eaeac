"""Speed and memory, dense beside MoD: the same weights and shapes, in turns.

    python -m extras.speed                      the preset tiny
    python -m extras.speed --preset llama3-8b   with LoRA; only counted on a CPU

It measures a training step, the prefill of a whole stream, and one more frame
of watched streams. MoD routes every other layer with keep 0.2.
Writes out/profile-NAME-DEVICE.json, a row for each.
"""

import itertools
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

import train
from data import Batch, Tokenizer
from eval import Watcher
from extras.cost import SIZES, computed, flops, muon_matrices, step_flops
from extras.memory import (
    KINDS,
    count_memory,
    count_peak,
    drawn_batch,
    longest,
    make_inputs,
    new_model,
    one_step,
    routed,
    with_adapters,
)
from extras.tables import SPEED_COLUMNS, speed_cells
from mod import Groups
from model import (
    PRESETS,
    Config,
    Inputs,
    VideoLM,
    flag,
    parse,
    pick_device,
    prepare,
    run_main,
    write_json,
)

H200_MEMORY = 141e9  # bytes, of the GPU that is assumed where there is none


class Plan(NamedTuple):
    """What is measured of a preset. A frame has 1 + pool * pool tokens."""

    steps: list[tuple]  # pool, frames (0: most of what fits a dense step), streams
    prefills: list[tuple]  # pool, frames
    pools: list[int]  # one more frame is measured at each of these pools,
    contexts: list[int]  # after each of these numbers of tokens,
    streams: list[int]  # in each of these numbers of parallel streams


PLANS = {
    "tiny": Plan(
        steps=[(6, 8, 16), (6, 32, 4)],
        prefills=[(6, 64), (6, 256)],
        pools=[1, 3, 6],
        contexts=[512, 8192],
        streams=[1, 8, 32],
    ),
    "llama3-8b": Plan(
        steps=[(3, 600, 1), (7, 0, 1), (7, 600, 1)],
        prefills=[(3, 600), (7, 600)],
        pools=[3, 7, 14],
        contexts=[8192, 65536],
        streams=[1, 4, 16],
    ),
}

# --- how actions are timed ------------------------------------------------------------------------


class Clock:
    """Times actions on a device in turns, so that what slows the machine slows all of them."""

    def __init__(self, device: torch.device, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        self.gpu = device.type == "cuda"

    def take_turns(self, actions: dict[str, Callable[[], object]], repeats: int = 12) -> dict:
        """-> {name of an action: its seconds, one number a repeat}"""
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(repeats):
            for name, action in actions.items():
                self.wait()
                began = time.perf_counter()
                action()
                self.wait()
                seconds[name].append(time.perf_counter() - began)
        return seconds

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def ceiling(self, dtype: torch.dtype) -> dict[str, float]:
        """FLOP/s of a large matrix product and bytes/s of a large copy, the best of all repeats"""
        n, size = (8192, 2**30) if self.gpu else (2048, 2**27)
        a = torch.randn(n, n, device=self.device).to(dtype)
        b = torch.randn(n, n, device=self.device).to(dtype)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        actions = {"flops": partial(torch.mm, a, b), "bytes": partial(target.copy_, source)}
        seconds = self.take_turns(actions)
        product, copy = min(seconds["flops"]), min(seconds["bytes"])
        return {"flops": 2 * n**3 / product, "bytes": 2 * size / copy}

    def graphs(self) -> dict:
        """What has been compiled so far"""
        return dict(torch._dynamo.utils.counters["stats"]) if self.compiled else {}

    def count_waits(self, action: Callable[[], object]) -> dict[str, int]:
        """On a GPU: how often the host waits for it during the action, and its peak of memory"""
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")  # warns that it is a prototype, once
        with warnings.catch_warnings(record=True, action="always") as waits:
            action()
        torch.cuda.set_sync_debug_mode("default")
        return {"peak": torch.cuda.max_memory_allocated(), "waits": len(waits)}


class Profile:
    """A preset on a device, and a row for each piece of work that was measured."""

    def __init__(self, name: str, device: torch.device, compiled: bool) -> None:
        self.large = name in SIZES
        self.sizes = SIZES[name] if self.large else PRESETS[name]
        self.device, self.clock, self.rows = device, Clock(device, compiled), []
        gpu = self.clock.gpu
        self.timed = gpu or not self.large  # without a GPU, the large presets are only counted
        self.dtype = torch.bfloat16 if gpu or self.large else torch.float32
        self.memory = H200_MEMORY
        if gpu:
            self.memory = torch.cuda.get_device_properties(device).total_memory
        self.ceiling = self.clock.ceiling(self.dtype) if self.timed else {}

    @cached_property
    def model(self) -> VideoLM:
        """The model that watches. It has no adapters, since they can be merged."""
        model = new_model(routed(self.sizes, "mod", 1), self.device).to(self.dtype).eval()
        if self.clock.compiled:
            compile_layers(model)
        return model

    def watcher(self, kind: str, pool: int, streams: int) -> Watcher:
        self.model.config = routed(self.sizes, kind, pool)
        return Watcher(self.model, Tokenizer(), torch.zeros(streams).long())

    def row_bytes(self) -> int:
        """Bytes of the key and the value of a token in a layer"""
        return 2 * self.sizes.num_key_value_heads * self.sizes.head_dim * self.dtype.itemsize

    def add(
        self,
        work: str,
        about: dict,
        costs: dict[str, dict],
        actions: dict[str, Callable[[], object]],
    ) -> None:
        """Measure a piece of work and keep its row.

        costs: kind -> the FLOPs and bytes that no implementation can do without
        actions: kind -> the work itself; empty: it is only counted
        """
        least = {}
        for kind, cost in costs.items():
            times = [cost[name] / self.ceiling.get(name, 1) for name in ("flops", "bytes")]
            least[kind] = max(times)
        row = {"work": work, **about, **costs, "implied": 1 - least["mod"] / least["dense"]}
        if actions:
            row |= self.time_kinds(costs, least, actions)
        for kind, action in actions.items():
            if self.clock.gpu:
                costs[kind] |= self.clock.count_waits(action)
            elif "peak" not in costs[kind]:
                costs[kind]["peak"] = count_peak(action)
        self.rows.append(row)
        print_cells(speed_cells(row))

    def time_kinds(self, costs: dict, least: dict[str, float], actions: dict) -> dict[str, object]:
        """Time both kinds, add what they took to `costs` -> what it says of both together"""
        self.clock.take_turns(actions, 3)  # to warm up
        graphs = self.clock.graphs()
        seconds = self.clock.take_turns(actions)
        recompiled = graphs != self.clock.graphs()
        for kind, taken in seconds.items():
            first, middle, third = quantiles(taken, n=4)
            spread = (third - first) / middle / 2
            share = least[kind] / middle
            costs[kind] |= {"seconds": middle, "spread": spread, "of_ceiling": share}
        pairs = zip(seconds["dense"], seconds["mod"], strict=True)
        saved = median(1 - mod / dense for dense, mod in pairs)
        return {"recompiled": recompiled, "saved": saved}


# --- the work that is measured --------------------------------------------------------------------


def profile_step(profile: Profile, pool: int, frames: int, streams: int) -> None:
    """A training step without the making of its batch, which is timed apart.

    Streams too long for a dense step are trained with gradient checkpointing.
    """
    configs = {kind: routed(profile.sizes, kind, pool) for kind in KINDS}
    fits = {}
    if profile.large:
        configs = {kind: with_adapters(config) for kind, config in configs.items()}
        fits = {kind: longest(config, profile.memory) for kind, config in configs.items()}
        frames = frames or max(1, int(0.9 * fits["dense"]))
    checkpointing = profile.large and frames > fits["dense"]
    about = {
        "frames": frames,
        "tokens_per_frame": 1 + pool**2,
        "streams": streams,
        "longest": fits,
        "gradient_checkpointing": checkpointing,
    }
    batch = drawn_batch(configs["mod"], frames, streams)
    costs = {}
    for kind, config in configs.items():
        costs[kind] = step_cost(profile, config, batch, checkpointing)
    actions = {}
    if profile.timed:
        actions = step_actions(profile, configs, batch, checkpointing)
        make = partial(make_inputs, configs["mod"], frames, streams, profile.device)
        about["batch_seconds"] = median(profile.clock.take_turns({"batch": make})["batch"])
    profile.add("train", about, costs, actions)


def step_cost(
    profile: Profile, config: Config, batch: Batch, checkpointing: bool
) -> dict[str, float]:
    """What a step on this batch takes; peak: bytes of memory"""
    if profile.large:  # adapters learn by AdamW
        passes = step_flops(config, batch, [], config.lora_rank, checkpointing=checkpointing)
    else:
        passes = step_flops(config, batch, muon_matrices(profile.model))
    return {"flops": passes, "bytes": 0, "peak": count_memory(config, batch, checkpointing)}


def step_actions(
    profile: Profile, configs: dict[str, Config], batch: Batch, checkpointing: bool
) -> dict[str, Callable[[], object]]:
    """Each kind -> a step of it on this batch. Both train the same weights."""
    model = new_model(configs["mod"], profile.device, checkpointing)
    optimizers = train.make_optimizers(model, train.TrainConfig())
    loss_of = train.batch_loss
    if profile.clock.compiled:
        loss_of = torch.compile(train.batch_loss, fullgraph=True)

    def step(config: Config, inputs: Inputs) -> None:
        model.config = config
        one_step(model, optimizers, inputs, loss_of)

    actions = {}
    for kind, config in configs.items():
        actions[kind] = partial(step, config, prepare(batch, config, profile.device))
    return actions


def profile_prefill(profile: Profile, pool: int, frames: int) -> None:
    """A whole stream at once into an empty cache, as features of its frames"""
    P = 1 + pool**2
    features = torch.randn(1, frames, P, profile.sizes.vision_hidden_size, device=profile.device)

    def fill(kind: str) -> None:
        watcher = profile.watcher(kind, pool, 1)
        watcher.feed([watcher.layout([], frames)], features)

    costs, actions = {}, {}
    for kind in KINDS:
        config = routed(profile.sizes, kind, pool)
        tokens = computed(config.keep, frames, frames, P)
        macs = flops(config, tokens, frames, 1) | {"vision": 0}
        macs["attention"] /= 2  # causal: half of all pairs
        cache = sum(tokens) // frames * profile.row_bytes()
        costs[kind] = {"flops": 2 * sum(macs.values()), "bytes": 0, "cache": cache}
        actions[kind] = partial(fill, kind)
    about = {"frames": frames, "tokens_per_frame": P, "streams": 1}
    profile.add("prefill", about, costs, actions)


def profile_frame(profile: Profile, pool: int, before: int, streams: int) -> None:
    """One more frame of each stream, as features, after so many tokens.

    It is left out where a cache would take more than a quarter of the memory.
    """
    P = 1 + pool**2
    frames = before // (P + 1)
    costs = {}
    for kind in KINDS:
        costs[kind] = frame_cost(profile, routed(profile.sizes, kind, pool), frames, streams)
        if costs[kind].pop("held") > profile.memory / 4:
            return
    width = profile.sizes.vision_hidden_size
    features = torch.randn(streams, 1, P, width, device=profile.device)

    def see(watcher: Watcher, config: Config) -> None:
        profile.model.config = config
        watcher.feed([watcher.layout([], 1)] * streams, features)

    actions = {}
    for kind in KINDS:
        watcher = profile.watcher(kind, pool, streams)
        preload(watcher, frames)
        actions[kind] = partial(see, watcher, routed(profile.sizes, kind, pool))
    about = {"frames": frames, "tokens_per_frame": P, "streams": streams, "before": before}
    profile.add("stream", about, costs, actions)


def frame_cost(profile: Profile, config: Config, frames: int, streams: int) -> dict[str, float]:
    """What one more frame of each stream costs after so many.

    Returns flops; bytes of weights and caches, all of which are read; bytes of `cache` that a
    frame adds; bytes that the caches `held` before it.
    """
    now = computed(config.keep, 1, 1, config.tokens_per_frame)  # of each layer
    width = config.num_attention_heads * config.head_dim
    macs = flops(config, now, 1, 1) | {"vision": 0}
    macs["attention"] = sum(2 * n * (n + frames * n) * width for n in now)
    held = streams * frames * sum(now) * profile.row_bytes()
    model, weights = profile.model, 0
    for part in (model.layers, model.norm, model.lm_head, model.multi_modal_projector):
        weights += sum(p.numel() for p in part.parameters()) * profile.dtype.itemsize
    return {
        "flops": 2 * streams * sum(macs.values()),
        "bytes": weights + held,
        "cache": sum(now) * profile.row_bytes(),
        "held": held,
    }


def compile_layers(model: VideoLM) -> None:
    """Compile all layers into one graph a chunk. Each kind of chunk is another graph."""
    torch._dynamo.config.recompile_limit = 64
    model.run_layers = torch.compile(model.run_layers, fullgraph=True, dynamic=True)


def preload(watcher: Watcher, frames: int) -> None:
    """Fill the cache as if so many frames had been watched. Keys and values are drawn."""
    config, cache = watcher.model.config, watcher.cache
    tokens = config.tokens_per_frame + 1
    id = torch.arange(frames).repeat_interleave(tokens)
    id[tokens - 1 :: tokens] = -1  # <frame>
    id[0] = -1  # the first token never skips
    groups = Groups.plan(id.expand(len(watcher.seed), -1), config.keep)
    cache.advance(groups.to(cache.seen.device))
    watcher.next_group, watcher.begins = frames, False
    for layer, r in zip(cache.layers, config.keep, strict=True):
        rows = len(id) if r == 1 else groups.max_kept[r]
        layer.reserve(rows)
        layer.kv.normal_()
        layer.position[:, :rows] = torch.arange(rows)
        layer.length = rows


# --- command line ---------------------------------------------------------------------------------

WIDTHS = (8, 16, 9, 9, 7, 8, 9, 8, 6)  # of SPEED_COLUMNS on the screen


def print_cells(cells: Iterable[str]) -> None:
    padded = [cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)]
    print("".join(padded), flush=True)


def remark(row: dict) -> str:
    """What else there is to say of work on whole streams"""
    dense, mod = row["dense"], row["mod"]
    said = [f"peak memory {dense['peak'] / 1e9:.2f} GB, MoD {mod['peak'] / 1e9:.2f} GB"]
    if row.get("gradient_checkpointing"):
        said[0] += " (with gradient checkpointing)"
    elif row.get("longest"):
        fits = row["longest"]
        said.append(f"longest stream {fits['dense']:,} frames, MoD {fits['mod']:,}")
    if "batch_seconds" in row:
        share = row["batch_seconds"] / mod["seconds"]
        said.append(f"making a batch: {share:.1%} of a MoD step")
    if row["work"] == "prefill":
        caches = f"{dense['cache'] / 1e3:.1f} kB a frame, MoD {mod['cache'] / 1e3:.1f} kB"
        said.append(f"cache {caches}")
    shape = f"{row['frames']} x {row['tokens_per_frame']} x {row['streams']}"
    return f"{row['work']} {shape}: {'; '.join(said)}"


def about_run(profile: Profile, name: str) -> dict:
    """What a profile was measured on"""
    return {
        "preset": name,
        "device": torch.cuda.get_device_name() if profile.clock.gpu else "cpu",
        **train.provenance(),
        "threads": torch.get_num_threads(),
        "dtype": str(profile.dtype),
        "compiled": profile.clock.compiled,
        "ceiling": profile.ceiling,
    }


def work_of(plan: Plan, timed: bool) -> list[tuple]:
    """Pairs: a function to call with a Profile, and its other arguments"""
    work = [(profile_step, step) for step in plan.steps]
    if timed:
        work += [(profile_prefill, prefill) for prefill in plan.prefills]
        frames = itertools.product(plan.pools, plan.contexts, plan.streams)
        work += [(profile_frame, frame) for frame in frames]
    return work


@dataclass(frozen=True)
class SpeedConfig:
    preset: str = flag("tiny", ", ".join(PLANS))
    compile: bool = flag(False, "compile the model")
    device: str = flag("", "cpu or cuda (default: cuda where there is one)")

    def __post_init__(self) -> None:
        if self.preset not in PLANS:
            known = ", ".join(PLANS)
            raise ValueError(f"preset must be one of {known} to be profiled, got {self.preset}")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = parse(SpeedConfig, argv, __doc__)
    profile = Profile(cfg.preset, pick_device(cfg.device), cfg.compile)
    about = about_run(profile, cfg.preset)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print_cells(SPEED_COLUMNS)
    file = Path("out") / f"profile-{cfg.preset}-{profile.device.type}.json"
    file.parent.mkdir(exist_ok=True)
    for measure, shape in work_of(PLANS[cfg.preset], profile.timed):
        try:
            measure(profile, *shape)
        except torch.OutOfMemoryError:  # the rest can still be measured
            print(measure.__name__, *shape, "out of memory")
        write_json(file, about | {"rows": profile.rows})
    for row in profile.rows:
        if row["work"] != "stream":
            print(textwrap.fill(remark(row), 80, subsequent_indent="  "))
    print(f"written to {file}")


if __name__ == "__main__":
    run_main(main)
