"""Placements and scorers in a real pretrained decoder, into out/real/real.json.

    python -m extras.smollm2 && python -m extras.dinov2   get two folders
    python -m extras.real smollm2 --vision dinov2

1. gates: all is computed, so that only the gate acts
2. layers: ARank, and what routing a layer alone costs, on four kinds of input
3. sets: 4, 8 and half of the layers routed by several orders, without training
4. runs: a dense fine-tune by LoRA, then each placement and scorer from there

It may be stopped at any time, and goes on where it stopped. In the background
it is best given one thread: OMP_NUM_THREADS=1.
"""

import hashlib
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

import data
from data import Batch, Row, World, collate, make_batch
from eval import bar
from extras import pretrained
from extras.huggingface import decoder_fields, read_fields
from extras.measured import SAMPLES, layer_costs, losses_of, spearman
from extras.sweep import Sweep, row_of
from mod import GATES
from model import (
    VideoLM,
    check_fields,
    flag,
    layer_ranks,
    load,
    parse,
    pick_device,
    prepare,
    read_json,
    read_weights,
    run_main,
    write_json,
)
from train import alone, provenance

LENGTH = 128  # tokens of a piece of text
SET_SIZES = (4, 8)  # of sets of routed layers; the largest set is half of all layers
RATIOS = (0.2, 0.5)
ADAPT = "--task narration --batch 2 --steps 300 --save_every 150 --streams 32 --adam_lr 0.001"
FIRST = "--plan dense --pool 3 --lora_rank 16 --lora_alpha 32 --lora_dropout 0"
ROWS = """
    converted            --plan dense
    early-exit           --plan early-exit
    layer-skip           --plan layer-skip
    interleaved-update   --plan interleaved --weigh update
    interleaved-values   --plan interleaved --weigh update+values
    interleaved-control  --plan interleaved --weigh update+values RANDOM-SELECTION
    interleaved-amod     --plan interleaved --router random A-MOD
    interleaved-random   --plan interleaved --router random
    interleaved-uniform  --plan interleaved --router uniform
    arank                --plan arank --dense_layers {dense}
    measured             --plan measured --dense_layers {dense}"""


class Report:
    """out/real/real.json: what is in it is not computed again.

    "about" tells what it began with, "commits" at which commit each piece was made.
    """

    def __init__(self, file: Path, about: dict) -> None:
        self.file, self.commit, self.lock = file, about["commit"], threading.Lock()
        self.values = read_json(file) if file.exists() else {"about": about}
        found = self.values.get("about")
        for name in ("weights", "texts", "settings"):
            if not isinstance(found, dict) or name not in found:
                raise ValueError(f"{file} must tell the {name} that it began with, got none")
            began, now = found[name], about[name]
            if now != began:
                raise ValueError(f"{name} must be those that {file} began with, {began}, got {now}")

    def piece(self, section: str, name: str, make: Callable[[], object]) -> object:
        """What a section holds under a name; it is made if it is not there yet."""
        with self.lock:
            found = self.values.setdefault(section, {})
            if name not in found:
                print(f"{section}: {name}", flush=True)
                found[name] = make()
                if section != "runs":  # each row has the commit of its run
                    self.values.setdefault("commits", {})[f"{section}: {name}"] = self.commit
                write_json(self.file, self.values)
            return found[name]


# --- inputs ---------------------------------------------------------------------------------------


def text_batches(tokenizer: data.Special, text: str, every: bool) -> list[Batch]:
    """2 x SAMPLES pieces of LENGTH tokens, evenly spread over a text, one a batch

    every: all tokens but the first may skip, and the loss is of all. Otherwise the middle half may
        skip, and the loss is of the last quarter: as a reply reads the frames before it.
    """
    ids, batches = tokenizer.encode(text), []
    quarter = LENGTH // 4
    may_skip = range(1, LENGTH) if every else range(quarter, 3 * quarter)
    counts = range(LENGTH) if every else range(3 * quarter, LENGTH)
    for n in range(2 * SAMPLES):
        start = n * (len(ids) - LENGTH - 1) // (2 * SAMPLES)
        row = Row([], [], [])
        for place in range(LENGTH):
            target = ids[start + place + 1] if place in counts else data.NO_TARGET
            group = 0 if place in may_skip else -1
            row.add([ids[start + place]], group, [target])
        batches.append(make_batch([row], torch.zeros(1, 0), torch.tensor([n]), tokenizer))
    return batches


def prose() -> str:
    """The language reference that comes with Python"""
    return "\n".join(topics[name] for name in sorted(topics))


def code() -> str:
    """Modules of Python's standard library"""
    folder = Path(threading.__file__).parent
    return "\n".join((folder / f"{name}.py").read_text() for name in ("argparse", "tarfile"))


def stream_batches(model: VideoLM, tokenizer: data.Special) -> list[Batch]:
    """2 x SAMPLES streams of the world `narration`, the second half of them held out"""
    world = World(model.config.image_size)
    samples = world.batch(0, 0, SAMPLES) + world.held_out(SAMPLES)
    return [collate([sample], model.config, tokenizer) for sample in samples]


# --- without training -----------------------------------------------------------------------------


def route_all(dense: VideoLM, keep_ratio: float, seed: int = 0, **how: object) -> VideoLM:
    """A dense model with all layers routed. how: fields of its Config"""
    keep = (keep_ratio,) * len(dense.layers)
    return dense.rerouted(replace(dense.config, keep=keep, **how), seed).eval()


def perplexity(loss: Tensor | float) -> float:
    return round(math.exp(min(float(loss), 100.0)), 3)


def gate_alone(dense: VideoLM, batches: list[Batch], gate: str, normed: bool) -> dict:
    """Perplexity with everything computed and weighed by a fresh router, mean over three seeds"""
    dense_keep, losses = (1.0,) * len(dense.layers), []
    everything = (0.999,) * len(dense.layers)  # capacity(127, 0.999) is 127
    for seed in range(3):
        routed = route_all(dense, 0.999, seed, gate=gate, router_norm=normed)
        losses.append(losses_of(routed, batches, [dense_keep, everything]).mean(0))
    before, after = torch.stack(losses).mean(0).tolist()
    return {
        "gate": gate,
        "the router scores": "x / rms(x)" if normed else "x",
        "dense": perplexity(before),
        "gate alone": perplexity(after),
        "of dense": round(math.exp(min(after - before, 100.0)), 4),
    }


@torch.no_grad()
def measure_layers(dense: VideoLM, batches: list[Batch]) -> dict:
    """ARank and cost of each layer, evenly spaced tokens kept, and how they agree"""
    device, ranks = dense.norm.weight.device, []
    for batch in bar(batches, "ranking"):
        ranks.append(layer_ranks(dense, prepare(batch, dense.config, device)))
    ranks = torch.cat(ranks).mean(0).tolist()
    cost, correlation = {}, {}
    for keep_ratio in RATIOS:
        routed = route_all(dense, keep_ratio, router="uniform")
        costs = layer_costs(routed, batches, keep_ratio).mean(0).tolist()
        cost[str(keep_ratio)] = costs
        low, high = interval(ranks, costs)
        correlation[str(keep_ratio)] = [spearman(ranks, costs), low, high]
    return {"arank": ranks, "cost": cost, "correlation": correlation}


def interval(a: list[float], b: list[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of Spearman's correlation, by drawing layers with replacement"""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.tensor(a), torch.tensor(b)
    picks = torch.randint(len(a), (draws, len(a)), generator=generator)
    found = torch.tensor([spearman(a[pick].tolist(), b[pick].tolist()) for pick in picks])
    low, high = found.nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def route_sets(dense: VideoLM, batches: list[Batch], layers: dict, keep_ratio: float) -> list[dict]:
    """Perplexity with 4, 8 and half of the layers routed by each order, nothing trained

    layers: of `measure_layers`, on other batches of the same kind
    """
    L = len(dense.layers)
    routed = route_all(dense, keep_ratio, router="uniform")
    rows = []
    for size in set_sizes(L):
        placements = {"dense": (1.0,) * L}
        for name, chosen in orders(layers, keep_ratio, L, size).items():
            keep = [keep_ratio if layer in chosen else 1.0 for layer in range(L)]
            placements[name] = tuple(keep)
        losses = losses_of(routed, batches, list(placements.values())).mean(0).tolist()
        row = {"layers": size, "keep": keep_ratio}
        for name, loss in zip(placements, losses, strict=True):
            row[name] = perplexity(loss)
        rows.append(row)
    return rows


def set_sizes(L: int) -> list[int]:
    """How many of L layers each set routes"""
    return sorted({*SET_SIZES, L // 2})


def orders(layers: dict, keep_ratio: float, L: int, size: int) -> dict[str, list[int]]:
    """The first `size` layers of each order"""
    by_rank = sorted(range(L), key=lambda layer: layers["arank"][layer])
    by_cost = sorted(range(L), key=lambda layer: layers["cost"][str(keep_ratio)][layer])
    return {
        "ARank, lowest": by_rank[:size],
        "ARank, highest": by_rank[-size:],
        "measured": by_cost[:size],
        "interleaved": [int((n + 0.5) * L / size) for n in range(size)],
        "deepest": list(range(L - size, L)),
    }


# --- fine-tuning ----------------------------------------------------------------------------------


def row_lines(L: int) -> list[str]:
    """ROWS for a decoder of L layers: arank and measured route L // 2, as interleaved does."""
    lines = ROWS.format(dense=L - L // 2).strip().split("\n")
    return [line.strip() for line in lines]


class Runs(Sweep):
    """The sweep of part 4. Each finished run is in the report at once."""

    def __init__(self, cfg: "RealConfig", report: Report) -> None:
        rows = [["dense", *folders(cfg), *FIRST.split(), *ADAPT.split()]]
        for line in report.values["about"]["settings"]["rows"]:
            rows.append([*line.split(), "--init", "DENSE", *ADAPT.split()])
        super().__init__("real", rows, cfg.jobs, {}, cfg.device)
        self.report = report

    def train_seed(self, seed: int) -> None:
        """A seed whose rows are all in the report is done, also without its folders."""
        names = [f"{row[0]}-seed{seed}" for row in self.rows]
        if not set(names) <= self.report.values.get("runs", {}).keys():
            super().train_seed(seed)
            for name in names:  # a run may have finished when nobody was there to report it
                self.report_run(self.folder / name)

    def train_run(self, run: Path, command: list[str]) -> None:
        super().train_run(run, command)
        self.report_run(run)

    def report_run(self, run: Path) -> None:
        if (run / "eval.json").exists():
            self.report.piece("runs", run.name, partial(row_of, run))

    def train_dense(self) -> VideoLM:
        """The dense run of seed 0, trained if it is not there"""
        Sweep(self.name, self.rows[:1], 1, self.flags, self.device).train(1)
        run = self.folder / "dense-seed0"
        self.report_run(run)
        return load(run, pick_device(self.device)).eval()


# --- command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealConfig:
    llm: str = flag("", "Hugging Face folder of the decoder", positional=True)
    vision: str = flag("", "Hugging Face folder of the encoder (default: one drawn at random)")
    seeds: int = flag(3, "how many seeds of the runs, from 0")
    jobs: int = flag(1, "runs at once, which share the cores")
    device: str = flag("", "cpu or cuda (default: cuda where there is one)")

    def __post_init__(self) -> None:
        check_fields(self)


def folders(cfg: RealConfig) -> list[str]:
    """The flags of extras/pretrained.py that name the folders"""
    vision = [f"--vision={cfg.vision}"] if cfg.vision else []
    return [f"--llm={cfg.llm}", *vision]


def hash_of(folder: str) -> str:
    """sha256 of the weights of a folder, in the order of their names"""
    files, digest = sorted(Path(folder).glob("*.safetensors")), hashlib.sha256()
    if not folder or not files:
        raise ValueError(f"{folder or 'llm'} must be a folder with safetensors, got none")
    for file in files:
        for name, t in sorted(read_weights(file)[0].items()):
            digest.update(name.encode())
            digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def count_layers(folder: str) -> int:
    """Of a decoder. Raises ValueError if half of them are too few for the other sets."""
    layers = read_fields(folder, decoder_fields)["num_hidden_layers"]
    least = 2 * max(SET_SIZES)
    if layers < least:
        raise ValueError(f"llm must have at least {least} layers, got {layers}")
    return layers


def describe(cfg: RealConfig) -> dict:
    """What the report begins with: command, hashes of weights and texts, commit and machine"""
    weights = {"llm": hash_of(cfg.llm)}
    layers = count_layers(cfg.llm)
    if cfg.vision:
        weights["vision"] = hash_of(cfg.vision)
    texts = {}
    for name, text in {"prose": prose(), "code": code()}.items():
        texts[name] = hashlib.sha256(text.encode()).hexdigest()
    command = " ".join(["python -m extras.real", *sys.argv[1:]])
    settings = {"samples": SAMPLES, "length": LENGTH, "sets": set_sizes(layers)}
    settings |= {"first": FIRST, "adapt": ADAPT, "rows": row_lines(layers)}
    about = {"command": command, "weights": weights, "texts": texts, "settings": settings}
    return about | provenance()


def without_training(cfg: RealConfig, report: Report, runs: Runs) -> None:
    """Parts 1 to 3. The dense run of seed 0 is trained for the streams."""
    flags, given = parse(pretrained.PretrainedFlags, [*folders(cfg), *FIRST.split()], "")
    dense = pretrained.prepare_run(replace(flags, out="out/real"), given)[1]
    dense = dense.to(pick_device(cfg.device)).eval()
    tokenizer = data.tokenizer_for(dense.config)
    texts = text_batches(tokenizer, prose(), every=True)[:SAMPLES]
    for gate in GATES:
        for normed in (True, False):
            name = f"{gate}, {'x / rms(x)' if normed else 'x'}"
            report.piece("gates", name, partial(gate_alone, dense, texts, gate, normed))
    tuned = runs.train_dense()
    kinds = {
        "prose": (dense, text_batches(tokenizer, prose(), every=False)),
        "code": (dense, text_batches(tokenizer, code(), every=False)),
        "streams, projector untrained": (dense, stream_batches(dense, tokenizer)),
        "streams": (tuned, stream_batches(tuned, tokenizer)),
    }
    for kind, (model, batches) in kinds.items():
        seen, unseen = batches[:SAMPLES], batches[SAMPLES:]
        layers = report.piece("layers", kind, partial(measure_layers, model, seen))
        if kind in ("prose", "streams"):
            for r in RATIOS:
                make = partial(route_sets, model, unseen, layers, r)
                report.piece("sets", f"{kind}, keep {r}", make)


def main(argv: list[str] | None = None) -> None:
    cfg, _ = parse(RealConfig, argv, __doc__)
    about, folder = describe(cfg), Path("out/real")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):  # another process would write over what this one reports
        report = Report(folder / "real.json", about)
        runs = Runs(cfg, report)
        without_training(cfg, report, runs)
        runs.train(cfg.seeds)
    print(f"written to {report.file}")


if __name__ == "__main__":
    run_main(main)
