"""Train a streaming video-language model, dense or routed, then evaluate it.

    python train.py                 the embedded world, interleaved, keep 0.2
    python train.py --plan dense    the same without routing
    python train.py --data DIR      your own clips and conversations
    python train.py --task vqa --plan dense --out out/dense
    python train.py --task vqa --init out/dense --plan arank --out out/gamma

Pretrained folders, several GPUs and tables of runs: see extras/README.md.
"""

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

try:
    import fcntl  # there is none on Windows
except ImportError:
    fcntl = None

import data
from data import Source, collate
from eval import rank_layers, report
from mod import GATES, MASKED, PLACEMENTS, WEIGHED, check_keep_ratio, placement, rank_placement
from mod import routing_loss as routing_loss_of
from model import (
    LEARNED,
    PRESETS,
    ROUTERS,
    Config,
    Inputs,
    VideoLM,
    check_fields,
    flag,
    initialise,
    load,
    parse,
    pick_device,
    prepare,
    preset,
    read_json,
    read_weights,
    run_main,
    save,
    streaming_loss,
    write,
    write_json,
)

WARMUP = 20  # steps in which the learning rate rises
CLIP = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class TrainConfig:
    out: str = flag("", "run folder (default: out/ and a name made of the settings)")
    steps: int = flag(200, "optimizer steps")
    batch: int = flag(16, "streams per step")
    seed: int = flag(0, "of the weights and of the batches")
    task: str = flag("narration", f"{', '.join(data.TASKS)}, or one of extras/benchmarks.py")
    data: str = flag("", "folder of clips and .jsonl conversations to learn from instead")
    fps: float = flag(2.0, "frames per second to read of clips")
    partial: bool = flag(False, "leave out bad entries, use what can be decoded of clips")
    preset: str = flag("tiny", f"sizes of the model: {', '.join(PRESETS)}")
    init: str = flag("", "run folder whose weights to start from, instead of a preset")
    plan: str = flag("interleaved", f"which layers are routed: arank, {', '.join(PLACEMENTS)}")
    dense_layers: int = flag(0, "of --plan arank: layers that stay dense (0: an eighth)")
    keep: float = flag(0.2, "keep ratio r of the routed layers")
    router: str = flag("learned", f"what scores the tokens: {', '.join(ROUTERS)}")
    gate: str = flag("unit", f"turns a score into a weight: {', '.join(GATES)}")
    weigh: str = flag("update+values", f"what the gate weighs: {', '.join(WEIGHED)}")
    masked: str = flag("text", f"text that never skips: {', '.join(MASKED)}")
    routing_loss: float = flag(0.0, "weight of the routers' cross-entropy (gamma-MoD)")
    sigma: float = flag(1.0, "weight of a decision to speak, against a reply token")
    muon_lr: float = flag(0.02, "peak learning rate of hidden matrices (Muon)")
    adam_lr: float = flag(0.002, "peak learning rate of everything else (AdamW)")
    save_every: int = flag(100, "steps between checkpoints")
    streams: int = flag(64, "held-out streams to evaluate on at the end, 0: no evaluation")
    device: str = flag("", "cpu or cuda (default: cuda where there is one)")
    compile: bool = flag(False, "compile the model for training")
    resume: bool = flag(False, "go on with the run in --out")

    may_be_zero = ("seed", "dense_layers", "keep", "routing_loss", "sigma", "streams")

    def __post_init__(self) -> None:
        check_keep_ratio(self.keep)
        check_fields(self)

    @property
    def folder(self) -> Path:
        """`--out`, or out/ and what tells this run from the default one of its task."""
        usual = vars(TrainConfig) | data.find_task(self.task).defaults
        parts = [Path(self.data).name, self.task]
        for name in ("plan", "keep", "router", "gate", "weigh", "masked"):
            if getattr(self, name) != usual[name]:
                parts.append(f"{getattr(self, name)}")
        name = "-".join(part for part in parts if part)
        return Path(self.out or f"out/{name}-seed{self.seed}")


def settings(cfg: TrainConfig, given: set[str]) -> TrainConfig:
    """The settings of this run: flags, then the task's own defaults; with --resume the run's.

    given: names of the flags that were given. Raises ValueError where these clash.
    """
    if cfg.data:
        cfg = replace(cfg, data=str(Path(cfg.data).resolve()))  # the same from any folder
    if cfg.resume:
        return resumed(cfg, given)
    if cfg.init and "preset" in given:
        raise ValueError(f"preset must be left out with init, got {cfg.preset}")
    begins = load(Path(cfg.init)).config if cfg.init else preset(cfg.preset)
    usual = data.find_task(cfg.task).defaults | begins.usual_flags
    free = usual.keys() - given - ({"steps", "preset"} if cfg.init else set())
    cfg = replace(cfg, **{name: usual[name] for name in free})
    check_new(cfg.folder)
    return cfg


def resumed(cfg: TrainConfig, given: set[str]) -> TrainConfig:
    """The settings that the run began with; how it is computed may change, and `partial`."""
    file = cfg.folder / "train.json"
    try:
        began = TrainConfig(**read_json(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must hold the settings of the run to resume: {error}") from None
    free = given & {"out", "resume", "device", "compile", "partial"}
    for name in sorted(given - free):
        now, was = getattr(cfg, name), getattr(began, name)
        if now != was:
            raise ValueError(f"{name} must be {was} to resume {cfg.folder}, got {now}")
    return replace(began, **{name: getattr(cfg, name) for name in free})


def check_new(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        raise ValueError(f"out must be a new folder, got the run {folder} (--resume goes on)")


def build(cfg: TrainConfig) -> VideoLM:
    """The model before its first step: drawn from the seed, or another run's weights (--init)."""
    if cfg.init:
        donor = load(Path(cfg.init), pick_device(cfg.device))
        return donor.rerouted(route(cfg, donor.config, donor), cfg.seed)
    sizes = replace(preset(cfg.preset), vocab_size=len(data.Tokenizer()))
    return initialise(VideoLM(route(cfg, sizes)), cfg.seed)


def route(cfg: TrainConfig, sizes: Config, dense: VideoLM | None = None) -> Config:
    """`sizes` with the placement and the routers of the flags

    dense: the model of --init, and in extras/pretrained.py the one that a plan of MEASURED looks at
    """
    if cfg.plan in MEASURED:
        if dense is None:
            raise ValueError(f"init must name a dense run for the plan {cfg.plan}, got none")
        keep = MEASURED[cfg.plan](cfg, dense)
    else:
        keep = placement(cfg.plan, sizes.num_hidden_layers, cfg.keep)
    # The first routers of a trained decoder are normed; those that a run has stay as they are.
    norm = sizes.router_norm or bool(cfg.init and not dense.routers)
    if norm and cfg.router in LEARNED and cfg.gate != "unit" and 0 < min(keep) < 1:
        print("a gate other than unit ruins a trained decoder at its first step")
    return replace(
        sizes,
        keep=keep,
        router=cfg.router,
        router_norm=norm,
        gate=cfg.gate,
        weigh=cfg.weigh,
        masked=cfg.masked,
    )


def keep_by_rank(cfg: TrainConfig, dense: VideoLM) -> tuple[float, ...]:
    """The placement of gamma-MoD, by the ARank of 50 samples"""
    ranks = rank_layers(dense, open_source(cfg, dense))
    return rank_placement(ranks, cfg.keep, cfg.dense_layers)


# Plans that look at a dense model. extras/measured.py adds one.
MEASURED: dict[str, Callable] = {"arank": keep_by_rank}


def open_source(cfg: TrainConfig, model: VideoLM) -> Source:
    size = model.config.image_size
    source = data.open_source(cfg.task, cfg.data, cfg.fps, cfg.partial, size)
    return model.adapt_source(source, cfg.folder)


class Muon(Optimizer):
    """Momentum, turned into a matrix whose singular values are all about 1 (Jordan, 2024).

    As torch.optim.Muon, but in the type of the weights: bfloat16 is slow on many CPUs.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"].lerp_(p.grad, 0.05)
            update = orthogonal(p.grad.lerp(momentum, 0.95))  # Nesterov
            rows, columns = p.shape
            p.sub_(group["lr"] * max(1, rows / columns) ** 0.5 * update)


def orthogonal(x: Tensor) -> Tensor:
    """(N, M) -> (N, M), by five steps of Newton and Schulz"""
    x = x / x.norm().clamp(min=1e-7)
    tall = len(x) > len(x.mT)
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.mT if tall else x


def make_optimizers(model: VideoLM, cfg: TrainConfig) -> list[Optimizer]:
    """Muon for the matrices of blocks and projector; AdamW for everything else."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (hidden if model.uses_muon(name, p) else rest).append(p)
    optimizers = [Muon(hidden, cfg.muon_lr)] if hidden else []
    optimizers.append(AdamW(rest, lr=cfg.adam_lr, weight_decay=0.0))
    return optimizers


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: a cosine from 1 to zero, times a linear warm-up."""
    return min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def batch_loss(model: VideoLM, x: Inputs, sigma: float, routing_weight: float) -> Tensor:
    """(2,) the streaming loss, and the routing loss, weighted; in bfloat16 on a GPU."""
    weight = model.lm_head.weight
    fast = weight.is_cuda and weight.dtype == torch.float32
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=fast):
        out = model(x.tokens, x.frames, x.groups, x.seed)
        of_label = torch.where(x.decision, sigma, 1.0)  # (M,)
        streaming = streaming_loss(model, out.hidden, x.at, x.target, of_label)
        routing = torch.zeros_like(streaming)
        for layer, score in out.score.items():  # summed over layers, as in gamma-MoD's code
            routing = routing + routing_loss_of(score, out.keep[layer], x.groups)
        return torch.stack([streaming, routing_weight * routing])


def unchanged(t: Tensor) -> Tensor:
    return t


def learn(cfg: TrainConfig, model: VideoLM, source: Source, total: Callable = unchanged) -> None:
    """The training loop, from step 0 or from the last checkpoint.

    total: sums a tensor over processes, in place, and returns it; one process has nothing to sum
    """
    c, device = model.config, model.norm.weight.device
    tokenizer, optimizers = data.tokenizer_for(c), make_optimizers(model, cfg)
    compute_loss = torch.compile(batch_loss, fullgraph=True) if cfg.compile else batch_loss
    first = begin(cfg, model, optimizers)
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, ncols=80)
    for step in bar:
        began = time.perf_counter()
        # batch: planned on the host, then moved to the device
        batch = collate(source.batch(cfg.seed, step, cfg.batch), c, tokenizer)
        inputs = prepare(batch, c, device)
        # rate
        for optimizer in optimizers:
            rate = optimizer.defaults["lr"] * learning_rate(step, cfg.steps)
            optimizer.param_groups[0]["lr"] = rate
        # loss: means over the batch of this process, times its share of the whole
        torch.manual_seed(cfg.seed << 32 | step << 8)  # seeds dropout
        share, tokens = share_of(batch)
        loss = share.to(device) * compute_loss(model, inputs, cfg.sigma, cfg.routing_loss)
        # backward
        loss.sum().backward()
        learnt = [p for p in model.parameters() if p.grad is not None]
        for p in learnt:
            total(p.grad)
        # clip
        norm = clip_grad_norm_(learnt, CLIP)
        # step
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # log
        loss = total(loss.detach())
        bar.set_postfix_str(log_step(cfg.folder, step, loss, norm, tokens, began))
        # checkpoint
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            checkpoint(cfg.folder, model, optimizers, step + 1)


def share_of(batch: data.Batch) -> tuple[Tensor, int]:
    """(2,) the share of the labels, and of the group members, that are here; how many tokens are

    One process has them all. extras/distributed.py has another.
    """
    return torch.ones(2), int(batch.real.sum())


def log_step(
    folder: Path, step: int, loss: Tensor, norm: Tensor, tokens: int, began: float
) -> str:
    """Append a line to log.jsonl -> what the bar shows. Raises ValueError where a term is NaN.

    loss: (2,) of batch_loss;  norm: of the gradient;  began: when the step did
    """
    (streaming, routing), norm = loss.tolist(), float(norm)
    if not math.isfinite(streaming + routing + norm):
        raise ValueError(
            f"losses and gradient must stay finite, got {streaming}, {routing} and {norm} at step "
            f"{step}; {folder} keeps its last checkpoint (--init starts from it with other flags)"
        )
    seconds = round(time.perf_counter() - began, 4)
    line = {
        "step": step,
        "loss": streaming + routing,
        "routing_loss": routing,
        "grad_norm": norm,
        "tokens": tokens,
        "seconds": seconds,
    }
    with open(folder / "log.jsonl", "a") as log:
        print(json.dumps(line), file=log)
    return f"loss {streaming + routing:.3f}, {1000 * seconds:.0f} ms a step"


def begin(cfg: TrainConfig, model: VideoLM, optimizers: list[Optimizer]) -> int:
    """Resume, or write settings, the first line of the log and a checkpoint -> the first step"""
    folder, keep = cfg.folder, model.config.keep
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{folder}: {learned:,} parameters to learn")
    print(f"keep ratios of the layers: {', '.join(f'{r:g}' for r in keep)}")
    first = resume(folder, optimizers) if cfg.resume else 0
    write_json(folder / "train.json", asdict(cfg))
    if cfg.resume:
        return first
    about = {"argv": sys.argv[1:], "placement": keep} | asdict(cfg) | provenance()
    write(folder / "log.jsonl", lambda path: path.write_text(json.dumps(about) + "\n"))
    checkpoint(folder, model, optimizers, 0)
    return 0


def provenance() -> dict[str, str]:
    """The code, and whether it was changed since; torch; the machine and its instructions"""
    git = "git describe --always --abbrev=40 --exclude=* --dirty".split()
    here = Path(__file__).parent
    try:
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"commit": commit, "torch": torch.__version__, "machine": machine}


def checkpoint(folder: Path, model: VideoLM, optimizers: list[Optimizer], step: int) -> None:
    """Save weights and optimizer state after so many steps.

    What counts is the rename of model.safetensors, which holds its step: the optimizer state of
    that step is on disk by then, and that of the last checkpoint still is. So a kill at any time
    leaves a whole one.
    """
    state = {}
    for i, optimizer in enumerate(optimizers):
        for n, values in optimizer.state_dict()["state"].items():
            for key, t in values.items():
                state[f"{i}.{n}.{key}"] = t.contiguous()
    latest = folder / f"optimizer-{step}.safetensors"
    write(latest, lambda path: save_file(state, path))
    save(folder, model, step)
    for old in folder.glob("optimizer-*.safetensors"):
        if old != latest:
            old.unlink()


def resume(folder: Path, optimizers: list[Optimizer]) -> int:
    """Load the last optimizer state, drop the log lines after it -> the number of steps taken"""
    step = read_weights(folder / "model.safetensors")[1]
    file, states = folder / f"optimizer-{step}.safetensors", [{} for _ in optimizers]
    try:
        for name, t in read_weights(file)[0].items():
            i, n, key = name.split(".")
            states[int(i)].setdefault(int(n), {})[key] = t
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} must hold the optimizer state of step {step}: {error}") from None
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines[: step + 1] if line.endswith("\n")]  # the first is no step
    write(folder / "log.jsonl", lambda path: path.write_text("".join(kept)))
    return step


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else trains in a folder meanwhile (but on Windows). The lock ends with its process."""
    with open(folder / "lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out must be a folder in which nobody else trains, got {folder}"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def run(cfg: TrainConfig, model: VideoLM) -> None:
    """Train a model that was built or loaded, and evaluate it."""
    source = open_source(cfg, model.to(pick_device(cfg.device)))
    source.batch(cfg.seed, 0, cfg.batch)  # a bad clip is refused before anything is written
    cfg.folder.mkdir(parents=True, exist_ok=True)
    with alone(cfg.folder):
        learn(cfg, model, source)
        finish(cfg, source)


def finish(cfg: TrainConfig, source: Source) -> None:
    """Evaluate a run as it was saved."""
    model = load(cfg.folder, pick_device(cfg.device)).eval()
    if cfg.streams:
        report(cfg.folder, model, model.adapt_source(source, cfg.folder), cfg.streams)


def main(argv: list[str] | None = None) -> None:
    cfg, given = parse(TrainConfig, argv, __doc__)
    cfg = settings(cfg, given)
    run(cfg, load(cfg.folder) if cfg.resume else build(cfg))


if __name__ == "__main__":
    run_main(main)
