"""Train the rows of a table with several seeds, into out/NAME/ and out/NAME.json.

    python -m extras.sweep scene                five seeds of each row, in turn
    python -m extras.sweep vqa --streams 512    more held-out questions per run
    python -m extras.sweep NAME --jobs 2        two runs at once

Runs that are finished stay. A run that was cut off goes on where it stopped.
Whoever stops a sweep stops its runs too.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from statistics import fmean, median

import torch

import data
import model as core
import train
from eval import on_shapes, read
from extras import pretrained, pretrained_model
from extras.baselines import VARIANTS
from extras.cost import flops, muon_matrices, step_flops
from mod import WEIGHED
from model import (
    Config,
    VideoLM,
    check_fields,
    flag,
    load,
    parse,
    read_json,
    run_main,
    write_json,
)

ROOT = Path(__file__).resolve().parents[1]

# The rows of each table, and the flags of train.py that make them. DENSE stands for the dense run
# of the same seed, which is the first row. Other words in capitals are of baselines.VARIANTS.
TWO_ROWS = """
    dense                --plan dense
    interleaved          --plan interleaved"""
SWEEPS = {
    "narration": TWO_ROWS,
    "forecast": TWO_ROWS,
    "summary": TWO_ROWS,
    "scene": """
        dense                --plan dense
        early-exit           --plan early-exit
        layer-skip           --plan layer-skip
        interleaved-values   --plan interleaved --weigh update+values
        interleaved-update   --plan interleaved --weigh update
        interleaved-random   --plan interleaved --router random
        interleaved-uniform  --plan interleaved --router uniform
        interleaved-amod     --plan interleaved --router random A-MOD
        interleaved-control  --plan interleaved --weigh update+values RANDOM-SELECTION
        all-values           --plan all --weigh update+values
        all-update           --plan all --weigh update
        all-random           --plan all --router random
        all-uniform          --plan all --router uniform
        all-control          --plan all --weigh update+values RANDOM-SELECTION
        values-0.1           --plan interleaved --weigh update+values --keep 0.1
        values-0.3           --plan interleaved --weigh update+values --keep 0.3
        values-sigmoid       --plan interleaved --weigh update+values --gate sigmoid
        update-sigmoid       --plan interleaved --weigh update --gate sigmoid""",
    "vqa": """
        dense                   --plan dense
        dense-converted         --init DENSE --plan dense
        arank-4                 --init DENSE --plan arank --dense_layers 4
        measured-4              --init DENSE --plan measured --dense_layers 4
        interleaved-4           --init DENSE --plan interleaved
        worst-4                 --init DENSE --plan arank --dense_layers 4 WORST
        arank-5                 --init DENSE --plan arank --dense_layers 3
        measured-5              --init DENSE --plan measured --dense_layers 3
        two-of-three-5          --init DENSE --plan two-of-three
        worst-5                 --init DENSE --plan arank --dense_layers 3 WORST
        measured-7              --init DENSE --plan measured
        worst-7                 --init DENSE --plan arank WORST""",
}
# ... and on ARank's placement each rule, one router for all layers or one a layer, and each mask
MASKS = ("none", "question", "question+answer")
for weigh, router, masked in product(WEIGHED, ("shared", "learned"), MASKS):
    rule = f"--plan arank --weigh {weigh} --router {router} --masked {masked}"
    SWEEPS["vqa"] += f"\n{weigh}-{router}-{masked} --init DENSE {rule}"


def rows_of(name: str) -> list[list[str]]:
    """The rows of a table, each as its name and flags."""
    return [line.split() for line in SWEEPS[name].strip().split("\n")]


# --- the runs -------------------------------------------------------------------------------------


class Sweep:
    """The runs of a table. Each is a process, and none outlives the sweep.

    rows: each its name and its flags, the dense one first;  flags: of train.py, for all runs
    jobs: seeds that are trained at once
    """

    def __init__(
        self, name: str, rows: list[list[str]], jobs: int, flags: dict[str, str], device: str
    ) -> None:
        self.name, self.rows, self.jobs = name, rows, jobs
        self.flags, self.device = flags, device
        self.folder = Path("out") / name
        self.stopped = threading.Event()
        self.running: list[subprocess.Popen] = []
        threads = max(1, torch.get_num_threads() // jobs)
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}

    def check_flags(self) -> None:
        """Raises ValueError if the sweep began with other flags."""
        began = self.folder / "sweep.json"
        if began.exists() and read_json(began) != self.flags:
            asked = json.dumps(self.flags)
            raise ValueError(f"sweep must go on with the flags that {began} holds, got {asked}")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(began, self.flags)

    def command(self, run: Path, flags: list[str], seed: int) -> list[str]:
        """The command that trains a run, or goes on with it. flags: of its row"""
        argv, variants = [f"--out={run}"], [flag for flag in flags if flag in VARIANTS]
        if (run / "model.safetensors").exists():
            argv.append("--resume")
        else:
            dense = str(self.folder / f"dense-seed{seed}")
            argv.append(f"--task={self.name}")
            argv += [dense if flag == "DENSE" else flag for flag in flags if flag not in VARIANTS]
            argv.append(f"--seed={seed}")
            argv += [f"--{flag}={value}" for flag, value in self.flags.items()]
        argv.append(f"--device={self.device}")
        return [sys.executable, "-m", "extras.sweep", "--row", *variants, *argv]

    def train_seed(self, seed: int) -> None:
        """Train the rows of a seed in order: the dense run is first, and others start from it."""
        for row, *flags in self.rows:
            run = self.folder / f"{row}-seed{seed}"
            if not self.stopped.is_set() and not (run / "eval.json").exists():
                self.train_run(run, self.command(run, flags, seed))

    def train_run(self, run: Path, command: list[str]) -> None:
        """Wait for the process of a run. Raises ValueError if it fails; no further run begins."""
        now = time.strftime("%H:%M")
        print(f"{now} {run}\n", end="", flush=True)  # one write, as several threads print
        with open(f"{run}.log", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
            self.running.append(process)
            if self.stopped.is_set():  # it was stopped between the two lines above
                process.terminate()
            if process.wait() and not self.stopped.is_set():
                self.stopped.set()
                raise ValueError(
                    f"{run} must train and be evaluated, its end is in {run}.log"
                )

    def train(self, seeds: int) -> None:
        """Train all runs that are not finished."""
        self.check_flags()
        before = signal.signal(signal.SIGTERM, leave)
        threads = ThreadPoolExecutor(self.jobs)
        try:
            list(threads.map(self.train_seed, range(seeds)))
        finally:  # also on an error, on Ctrl-C and on SIGTERM
            self.stopped.set()
            for process in self.running:
                process.terminate()
            threads.shutdown()
            signal.signal(signal.SIGTERM, before)


def leave(*signal_and_frame: object) -> None:
    """End by way of the `finally` blocks, with the status of a process that SIGTERM ended."""
    sys.exit(143)


# --- one run --------------------------------------------------------------------------------------


def train_row(argv: list[str]) -> None:
    """Do what train.py does with these flags, and look at the model at each of its checkpoints.

    argv: may begin with a word of baselines.VARIANTS, which holds for this process; with --llm it
        is extras/pretrained.py that does it
    """
    checkpoint, sys.argv = train.checkpoint, ["sweep.py", *argv]  # the row's JSON has them all
    if argv[0] in VARIANTS:
        put_variant(*VARIANTS[argv[0]])
        argv = argv[1:]

    def look_and_save(folder: Path, model: VideoLM, optimizers: list, step: int) -> None:
        look(folder, model.eval(), step)
        model.train()
        checkpoint(folder, model, optimizers, step)

    train.checkpoint = look_and_save
    begins = any(arg.startswith("--llm") for arg in argv)
    try:
        (pretrained if begins else train).main(argv)
    finally:
        train.checkpoint = checkpoint


def put_variant(name: str, other: type | Callable) -> None:
    """Put a baseline in the place of a name of the core, and of the models of folders."""
    for module in (train, core):
        if hasattr(module, name):
            setattr(module, name, other)
    if name == "VideoLM":
        plain = pretrained_model.PretrainedLM
        pretrained_model.PretrainedLM = type(other.__name__, (other, plain), {})


def look(folder: Path, model: VideoLM, step: int) -> None:
    """Append a line to looks.jsonl: peak memory, the perplexity of held-out replies, the share of
    their tokens that are right, and that of the kept patches that show a shape.

    This comes before the checkpoint. After a kill between the two, the step is taken again, and
    the later one of two lines counts.
    """
    line = {"step": step, "peak_memory": peak_memory(model.lm_head.weight.device)}
    source = source_of(train_settings(folder), model)
    if isinstance(source, data.World):
        tokenizer, held_out = data.tokenizer_for(model.config), source.held_out(32)
        line["on_shapes"] = on_shapes(model, tokenizer, held_out[:16], source)
        if not source.asks:
            readings = read(model, tokenizer, held_out, threshold=0.0)
            right = chain(*(reading.right.values() for reading in readings))
            line["reply_accuracy"] = fmean(chain(*right))
            nll = chain(*(reading.nll.values() for reading in readings))
            line["perplexity"] = math.exp(min(100.0, fmean(chain(*nll))))
    with open(folder / "looks.jsonl", "a") as file:
        print(json.dumps(line), file=file)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had at once; on a GPU, those of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # there is none on Windows
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # bytes there, kilobytes elsewhere
        return most
    return 1024 * most


def train_settings(folder: Path) -> train.TrainConfig:
    """The settings of a run."""
    return train.TrainConfig(**read_json(folder / "train.json"))


def source_of(settings: train.TrainConfig, model: VideoLM) -> data.World | data.Clips:
    """Where the streams of a run come from."""
    s = settings
    return data.open_source(s.task, s.data, s.fps, s.partial, model.config.image_size)


# --- the rows -------------------------------------------------------------------------------------


def collect(folder: Path) -> list[dict]:
    """What each run in a folder began with and came to, one row per run.

    Raises ValueError, naming the run, if one is broken.
    """
    broken = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
    rows = []
    for file in sorted(folder.glob("*/eval.json")):
        try:
            rows.append(row_of(file.parent))
        except broken as error:
            raise ValueError(f"{file.parent} must be an evaluated run: {error!r}") from None
    if not rows:
        raise ValueError(f"{folder} must hold runs, got none")
    return rows


def row_of(run: Path) -> dict:
    """The row of a run: its log's first line, its settings, its costs and its results.

    free_running gets two shares of the dense model's FLOPs, by formula: `step_flops` of a training
    step, and for answers `flops_of_dense`, at the mean lengths that eval.json has.
    """
    result = read_json(run / "eval.json")
    first, *steps = read_lines(run / "log.jsonl")
    scores = result["free_running"]
    if not {"lm_correctness", "accuracy"} & scores.keys():
        raise ValueError("it has no scores")
    model, settings = load(run), train_settings(run)
    batch = first_batch(run, model, settings)
    scores["step_flops"] = step_share(model, batch)
    scores["seconds_per_step"] = round(median(step["seconds"] for step in steps), 4)
    if "tokens" in result:
        scores["flops_of_dense"] = answer_share(model.config, batch, result["tokens"])
    seen = what_was_seen(run)
    scores |= scores_over_steps(seen["reply_accuracy_at"], settings)
    result["free_running"] = {name: float(value) for name, value in scores.items()}
    size = [p.numel() for p in model.parameters()]
    learnt = [p.numel() for p in model.parameters() if p.requires_grad]
    return {
        "run": run.name,
        **first,
        **asdict(settings),
        "parameters": sum(size),
        "placement": model.config.keep,
        "learnt": sum(learnt),
        **seen,
        **result,
    }


def read_lines(file: Path) -> list[dict]:
    """The objects of a file that has one per line. A last line that was cut off is left out."""
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def what_was_seen(run: Path) -> dict:
    """Of looks.jsonl: peak memory; at each step the share of kept patches that show a shape, the
    share of the reply tokens that are right, and their perplexity."""
    file = run / "looks.jsonl"
    looks = read_lines(file) if file.exists() else []
    seen = {"peak_memory": max([line["peak_memory"] for line in looks], default=0)}
    for name in ("on_shapes", "reply_accuracy", "perplexity"):
        found = [line for line in looks if line.get(name) not in (None, {})]
        seen[f"{name}_at"] = {line["step"]: line[name] for line in found}
    return seen


def scores_over_steps(
    accuracy_at: dict[int, float], settings: train.TrainConfig
) -> dict[str, float]:
    """Steps to 95 %; of a converted run the accuracy of replies before its first step"""
    scores = {}
    if settings.init and 0 in accuracy_at:
        scores["reply_accuracy_before"] = accuracy_at[0]
    if accuracy_at and settings.save_every <= 25:  # else the line is too coarse
        scores["steps_to_95"] = round(steps_to(0.95, accuracy_at), 1)
    return scores


def steps_to(goal: float, accuracy_at: dict[int, float]) -> float:
    """The step at which the accuracy first reaches the goal, on the line between two looks

    A run that never does counts with all its steps.
    """
    before, was = 0, 0.0
    for step, accuracy in sorted(accuracy_at.items()):
        if accuracy >= goal:
            return before + (step - before) * (goal - was) / (accuracy - was)
        before, was = step, accuracy
    return before


def first_batch(run: Path, model: VideoLM, settings: train.TrainConfig) -> data.Batch:
    """The batch of a run's first step, 64 streams of it at most."""
    source = model.adapt_source(source_of(settings, model), run)
    samples = source.batch(settings.seed, 0, min(settings.batch, 64))
    c, tokenizer = model.config, data.tokenizer_for(model.config)
    return data.collate(samples, c, tokenizer)


def step_share(model: VideoLM, batch: data.Batch) -> float:
    """FLOPs of a training step over those of the dense model.

    A run that extras/pretrained.py began may have adapters, or an encoder that learns.
    """
    c, matrices = model.config, muon_matrices(model)
    dense = replace(c, keep=(1.0,) * c.num_hidden_layers)
    lora_rank = getattr(c, "lora_rank", 0)  # Config has no adapters
    frozen = not any(p.requires_grad for p in model.vision_model.parameters())
    routed_step = step_flops(c, batch, matrices, lora_rank, frozen)
    dense_step = step_flops(dense, batch, matrices, lora_rank, frozen)
    return round(routed_step / dense_step, 4)


def answer_share(config: Config, batch: data.Batch, tokens: dict) -> float:
    """FLOPs of a question and its answer over those of the dense model, at mean lengths.

    batch: tells how many frames a question is about
    tokens: {"computed": [mean of each layer], "given": mean}
    """
    frames, given = batch.frames.shape[1], [tokens["given"]] * config.num_hidden_layers
    routed = flops(config, tokens["computed"], frames, head=1)
    dense = flops(config, given, frames, head=1)
    return sum(routed.values()) / sum(dense.values())


# --- command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepConfig:
    name: str = flag("", f"the table: {', '.join(SWEEPS)}", positional=True)
    seeds: int = flag(5, "how many seeds, from 0")
    jobs: int = flag(1, "runs at once, which share the cores")
    steps: int = flag(0, "optimizer steps of each run (0: those of its task)")
    streams: int = flag(0, "held-out streams of each run (0: those of train.py)")
    device: str = flag("", "cpu or cuda (default: cuda where there is one)")

    may_be_zero = ("steps", "streams")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.name not in SWEEPS:
            raise ValueError(
                f"sweep must be one of {', '.join(SWEEPS)}, got {self.name or 'none'}"
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("sweep must be started by one process, got several of torchrun")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--row"]:  # a process of a sweep
        train_row(argv[1:])
        return
    cfg, _ = parse(SweepConfig, argv, __doc__)
    numbers = {"steps": cfg.steps, "streams": cfg.streams}
    flags = {name: str(number) for name, number in numbers.items() if number > 0}
    sweep = Sweep(cfg.name, rows_of(cfg.name), cfg.jobs, flags, cfg.device)
    sweep.train(cfg.seeds)
    write_json(Path(f"{sweep.folder}.json"), collect(sweep.folder))
    print(f"written to {sweep.folder}.json")


if __name__ == "__main__":
    run_main(main)
