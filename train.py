"""Train a streaming video-language model, dense or routed, then evaluate it.

    python train.py                 the embedded world, interleaved, keep 0.2
    python train.py --plan dense    the same without routing
    python train.py --data DIR      your own clips and conversations
    python train.py --task vqa --plan dense --out out/dense
    python train.py --task vqa --init out/dense --plan arank --out out/gamma
    python train.py --llm DIR --vision DIR --data DIR --gate unit
    python train.py --sweep NAME    the rows of a table, with several seeds
    torchrun --nproc_per_node=2 train.py    the same steps on two GPUs

Other tasks than narration have defaults of their own (TASK_DEFAULTS), as have
pretrained folders.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

try:
    import fcntl  # there is none on Windows
except ImportError:
    fcntl = None

import data
import mod
import model as models
from data import Tokenizer
from eval import encode_once, on_shapes, ranks_of, report, step_flops
from mod import GATES, MASKED, PLACEMENTS, Groups, check_keep_ratio, placement
from model import Config, VideoLM, check_fields, opt, streaming_loss, write, write_json

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun

# What a task takes where no flag says otherwise (all but the steps if it starts from --init).
ONE_ANSWER = {"muon_lr": 0.005, "adam_lr": 0.003}  # a stream is harder to learn from than with many replies
TASK_DEFAULTS = {
    "scene": {"preset": "coarse", "muon_lr": 0.01, "adam_lr": 0.003, "steps": 600, "save_every": 60},
    "forecast": {**ONE_ANSWER, "preset": "coarse", "steps": 800},
    "summary": {**ONE_ANSWER, "preset": "coarse", "steps": 500},
    "vqa": {**ONE_ANSWER, "preset": "deep", "keep": 0.5, "router": "shared", "gate": "unit",
            "masked": "question+answer", "routing_loss": 0.01, "steps": 1200}}
PRETRAINED_DEFAULTS = {"adam_lr": 0.0002}  # as in the paper
SWEEPS = {  # rows of the papers' tables, the flags that make them; DENSE: the dense run of the same seed
    **dict.fromkeys(("narration", "forecast", "summary"), """
        dense                --plan dense
        interleaved          --plan interleaved"""),
    "scene": """
        dense                --plan dense
        early-exit           --plan early-exit
        layer-skip           --plan layer-skip
        interleaved          --plan interleaved
        interleaved-deep     --plan interleaved-deep
        all                  --plan all
        all-deep             --plan all-deep
        interleaved-random   --plan interleaved --router random
        interleaved-uniform  --plan interleaved --router uniform
        interleaved-0.1      --plan interleaved --keep 0.1
        interleaved-0.3      --plan interleaved --keep 0.3
        all-random           --plan all --router random
        all-uniform          --plan all --router uniform""",
    "vqa": """
        dense                --plan dense
        dense-converted      --init DENSE --plan dense
        arank                --init DENSE --plan arank
        interleaved          --init DENSE --plan interleaved
        two-of-three         --init DENSE --plan two-of-three
        all                  --init DENSE --plan all
        all-none             --init DENSE --plan all --masked none
        arank-none           --init DENSE --plan arank --masked none
        arank-question       --init DENSE --plan arank --masked question
        arank-unshared       --init DENSE --plan arank --router learned
        arank-0.83           --init DENSE --plan arank --keep 0.83
        arank-0.66           --init DENSE --plan arank --keep 0.66
        arank-0.49           --init DENSE --plan arank --keep 0.49
        arank-0.32           --init DENSE --plan arank --keep 0.32""",
}


@dataclass(frozen=True)
class TrainConfig:
    out: str = opt("", "run folder (default: out/ and a name made of the settings)")
    steps: int = opt(400, "optimizer steps")
    batch: int = opt(16, "streams a step")
    seed: int = opt(0, "of the weights and of the batches")
    task: str = opt("narration", f"embedded world: {', '.join(data.TASKS)}; benchmark whose annotations "
                                 f"--data holds: {', '.join(data.READERS)}")
    data: str = opt("", "folder of clips and .jsonl conversations to learn instead")
    fps: float = opt(2.0, "frames a second to read of clips", needs="data or resume")
    partial: bool = opt(False, "use what can be decoded of damaged clips", needs="data or resume")
    preset: str = opt("tiny", f"sizes of the model: {', '.join(models.PRESETS)}; of the decoders of the "
                              "large ones, only adapters learn")
    init: str = opt("", "run folder whose weights to start from, instead of a preset; plan, router, gate and "
                        "masked are those of the flags")
    llm: str = opt("", "Hugging Face folder of a Llama, Mistral or Qwen2: the decoder to start from")
    vision: str = opt("", "Hugging Face folder of a CLIP or SigLIP: the encoder to start from")
    train_vision: bool = opt(False, "let the encoder learn too", needs="vision or resume")
    pool: int = opt(0, "a frame is CLS and a pool x pool grid (0: the preset's, 3 with --vision)")
    lora_rank: int = opt(128, "rank of the adapters, 0: the decoder itself learns", needs="llm or resume")
    lora_alpha: float = opt(256.0, "the adapters' update is weighed by alpha / rank", needs="llm or resume")
    lora_dropout: float = opt(0.05, "dropout before the adapters", needs="llm or resume")
    plan: str = opt("interleaved", f"which layers are routed: arank (by that of the --init or --llm), "
                                   f"{', '.join(PLACEMENTS)}")
    dense_layers: int = opt(0, "of --plan arank: layers that stay dense (0: an eighth of them, at most 4)")
    keep: float = opt(0.2, "keep ratio r of the routed layers")
    router: str = opt("learned", f"what scores the tokens: {', '.join(models.ROUTERS)}")
    gate: str = opt("sigmoid", f"turns a score into the weight of the update: {', '.join(GATES)}")
    masked: str = opt("text", f"text that never skips: {', '.join(MASKED)}")
    routing_loss: float = opt(0.0, "weight of the routers' cross-entropy towards what they selected")
    sigma: float = opt(1.0, "weight of a decision to speak, against that of a reply token")
    muon_lr: float = opt(0.02, "peak learning rate of hidden matrices (Muon)")
    adam_lr: float = opt(0.002, "peak learning rate of everything else (AdamW)")
    warmup: int = opt(20, "steps of linear warm-up, of a cosine to zero")
    clip: float = opt(1.0, "largest norm of the gradient")
    save_every: int = opt(100, "steps between checkpoints")
    streams: int = opt(64, "held-out streams to evaluate on at the end")
    device: str = opt("", "cpu or cuda (default: cuda where there is one)")
    shard: bool = opt(False, "with torchrun: share the weights out among the GPUs, do not replicate them")
    gradient_checkpointing: bool = opt(False, "compute the inside of layers again for their gradients: less "
                                              "memory, more time")
    compile: bool = opt(False, "compile the model for training")
    resume: bool = opt(False, "go on with the run in --out")

    def __post_init__(self) -> None:
        check_keep_ratio(self.keep)
        if self.init and (self.llm or self.vision or self.pool):
            raise ValueError("init must not be given with llm, vision or pool, which its run has, got both")
        if self.batch % RANKS:
            raise ValueError(f"batch must be a multiple of the {RANKS} processes, got {self.batch}")
        check_fields(self, ("seed", "keep", "warmup", "sigma", "dense_layers", "routing_loss", "pool",
                            "lora_rank", "lora_dropout"))
        data.check_fps(self.fps)

    @property
    def chooses(self) -> bool:
        """Has the plan layers that compute some tokens of a group and not others?"""
        return self.plan not in ("dense", "early-exit", "layer-skip")

    @property
    def folder(self) -> Path:
        """`--out`, or out/ and what tells a run from the default one, so that comparisons do not collide."""
        routed = [f"{self.keep:g}"] if self.chooses else []
        usual = {"router": "learned", "gate": "sigmoid", "masked": "text"} | TASK_DEFAULTS.get(self.task, {})
        other = [getattr(self, f) for f in ("router", "gate", "masked") if getattr(self, f) != usual[f]]
        start = (["converted"] if self.init else []) + [f"seed{self.seed}"]
        task = [self.task] if self.task != "narration" or not (self.llm or self.data) else []
        learnt = [part for part in (Path(self.llm).name, Path(self.data).name) if part] + task
        name = [*learnt, self.plan, *routed, *other, *start]
        return Path(self.out or f"out/{'-'.join(name)}")


def build(cfg: TrainConfig) -> VideoLM:
    """The model before its first step: pretrained weights or those of another run, the rest drawn."""
    donor = models.load(Path(cfg.init), models.pick_device(cfg.device)) if cfg.init else None
    sizes = donor.config if donor else start(cfg)
    if cfg.plan == "arank":
        if not donor and not cfg.llm:
            raise ValueError("init or llm must name a trained dense model for the plan arank, got neither")
        if cfg.dense_layers >= (layers := sizes.num_hidden_layers):
            raise ValueError(f"dense_layers must be fewer than the {layers} layers, got {cfg.dense_layers}")
        source = data.open_source(cfg.task, cfg.data, cfg.fps, cfg.partial, sizes.image_size)
        tokenizer = data.tokenizer_for(sizes.vocab_size, sizes.llm)
        dense = donor or models.build(sizes, cfg.seed).to(models.pick_device(cfg.device))
        encode_once(source, dense, cfg.folder)
        ranks = ranks_of(dense, tokenizer, source.batch(0, 0, 50))
        keep = mod.rank_placement(ranks.mean(0).tolist(), cfg.keep, cfg.dense_layers)
    else:
        keep = placement(cfg.plan, sizes.num_hidden_layers, cfg.keep)
    routed = replace(sizes, keep=keep, router=cfg.router, gate=cfg.gate, masked=cfg.masked)
    model = models.build(routed, cfg.seed, donor and donor.state_dict())
    # What learns does so in float32: in bfloat16, most updates of a weight are rounded away.
    models.assign(model, {name: t.float() for name, t in models.own(model).items()
                          if not routed.frozen(name)})
    return model


def start(cfg: TrainConfig) -> Config:
    """The dense Config of a preset, with those of pretrained folders in its place."""
    sizes = replace(models.preset(cfg.preset), vocab_size=len(Tokenizer()), train_vision=cfg.train_vision)
    if cfg.llm:
        sizes = replace(sizes, lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha,
                        lora_dropout=cfg.lora_dropout)
    pool, new = cfg.pool or (3 if cfg.vision else sizes.pool), len(data.SPECIAL) if cfg.llm else 0
    return replace(models.pretrained(replace(sizes, pool=1), cfg.llm, cfg.vision, new), pool=pool)


def make_optimizers(model: VideoLM, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and projector; AdamW for embeddings, head, norms, biases, routers.

    AdamW for what is pretrained, and for all with a pretrained decoder or adapters, as in the paper.
    """
    c, hidden, rest = model.config, [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            muon = p.dim() == 2 and ("layers." in name or "projector" in name)
            (hidden if muon and not (c.llm or c.lora_rank or c.folder_of(name)) else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=cfg.adam_lr, weight_decay=0.0, fused=rest[0].is_cuda)
    optimizers = [torch.optim.Muon(hidden, lr=cfg.muon_lr, weight_decay=0.0), adam] if hidden else [adam]
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak"] = optimizer.param_groups[0]["lr"]
    return optimizers


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Share of the peak: a cosine from 1 to zero, times a linear warm-up."""
    return min(1.0, (step + 1) / max(1, cfg.warmup)) * (0.5 + 0.5 * math.cos(math.pi * step / cfg.steps))


def distribute(model: VideoLM, cfg: TrainConfig) -> None:
    """Share the weights of a model out among the processes, or leave each its own, the same in all."""
    if cfg.shard and dist.is_initialized():
        mesh = init_device_mesh(model.lm_head.weight.device.type, (dist.get_world_size(),))
        still = {p for p in model.vision_model.parameters() if not p.requires_grad}  # encodes clips by itself
        for block in [*model.layers, model]:
            fully_shard(block, mesh=mesh, reshard_after_forward=block is not model, ignored_params=still)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def over_all(numbers: Tensor) -> Tensor:
    """The sum over processes, in each of them."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


class Ready(NamedTuple):
    """A batch as its loss wants it: planned on the host, then moved to the device."""

    tokens: Tensor  # (B, T) int64, and so on, the arguments of VideoLM.forward
    frames: Tensor
    groups: Groups
    seed: Tensor
    at: Tensor  # (M,) int64, and so on, those of streaming_loss
    target: Tensor
    weight: Tensor
    counts: Tensor  # (3,) float64, on the host: labels, tokens that compete, tokens


def make_ready(b: data.Batch, config: Config, sigma: float, device: torch.device) -> Ready:
    groups, labels = Groups.plan(b.group, config.keep, b.real).to(device), b.labels.flatten()
    at = (labels >= 0).nonzero()[:, 0]
    weight = torch.where(b.decision.flatten()[at], sigma, 1.0)
    counts = torch.stack([(labels >= 0).sum(), (b.group >= 0).sum(), b.real.sum()]).double()
    tokens, frames, seed, at, target, weight = (
        t.to(device) for t in (b.tokens, b.frames, b.seed, at, labels[at], weight))
    return Ready(tokens, frames, groups, seed, at, target, weight, counts)


def ahead(make: Callable[[int], Ready], steps: Iterable[int]) -> Iterator[Ready]:
    """What `make` makes for each step, always the next one in a thread while the last is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for step in [*steps, None]:
            ready, coming = coming, None if step is None else thread.submit(make, step)
            if ready:
                yield ready.result()


def batch_loss(model: VideoLM, b: Ready, share: Tensor, routing_loss: float) -> Tensor:
    """The two terms of the loss of a batch, in bf16 where that is fast; of a part of a batch, its share.

    share: (2,) of all labels in the whole batch, and of all tokens that compete
    -> (2,) the streaming loss, and the routing loss, weighed
    """
    weight = model.lm_head.weight
    fast = weight.is_cuda and weight.dtype == torch.float32
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=fast):
        out = model(b.tokens, b.frames, b.groups, b.seed)
        loss = streaming_loss(model, out.hidden, b.at, b.target, b.weight)
        routing = torch.zeros_like(loss)
        for layer, score in out.score.items():  # summed over layers, as in the code of gamma-MoD
            routing = routing + mod.routing_loss(score, out.keep[layer], b.groups)
        return torch.stack([share[0] * loss, routing_loss * share[1] * routing])


def train_step(loss_of: Callable[..., Tensor], model: VideoLM, optimizers: list, cfg: TrainConfig, b: Ready,
               step: int) -> Tensor:
    """One update on a batch -> (4,) both terms of its loss, the norm of the gradient, tokens

    loss_of: batch_loss, or the same compiled.  Nothing here waits for the device.
    """
    torch.manual_seed((cfg.seed << 32) + (step << 8) + RANK)  # of dropout
    total = over_all(b.counts.clone())
    share = b.counts / total.clamp(min=1)  # 1 in a single process
    terms = loss_of(model, b, share[:2].float().to(b.tokens.device, non_blocking=True), cfg.routing_loss)
    (terms.sum() * (RANKS if cfg.shard else 1)).backward()  # fully_shard takes the mean of the gradients
    learnt = [p for p in model.parameters() if p.grad is not None]
    for p in () if cfg.shard else learnt:
        over_all(p.grad)
    norm = whole(clip_grad_norm_(learnt, cfg.clip))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([*over_all(terms.detach()), norm, total[2].to(norm, non_blocking=True)])


def check_finite(terms: dict[str, float], step: int, folder: Path) -> None:
    for name, value in terms.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must stay finite, got {value} at step {step}; {folder} keeps its last "
                             "checkpoint (--init starts from it with other flags)")


def checkpoint(folder: Path, model: VideoLM, optimizers: list, step: int) -> None:
    """Save weights and optimizer state after so many steps; all processes call it, the first writes.

    What counts is the rename of model.safetensors, which holds its step: the optimizer state of that step is
    on disk by then, and that of the last checkpoint still is. So a kill at any time leaves a whole one.
    """
    state = {f"{i}.{n}.{key}": whole(t).contiguous() for i, optimizer in enumerate(optimizers)
             for n, values in optimizer.state_dict()["state"].items() for key, t in values.items()}
    weights = {name: whole(t) for name, t in models.learnt(model).items()}
    if RANK == 0:
        write(folder / f"optimizer-{step}.safetensors", lambda path: save_file(state, path))
        models.save(folder, model, weights, step)
        for old in folder.glob("optimizer-*.safetensors"):
            if old.name != f"optimizer-{step}.safetensors":
                old.unlink()


def resume(folder: Path, optimizers: list) -> int:
    """Load the last optimizer state, drop the log lines after it -> the number of steps already taken"""
    step = models.read_weights(folder / "model.safetensors")[1]
    file, values = folder / f"optimizer-{step}.safetensors", [{} for _ in optimizers]
    try:
        for name, t in models.read_weights(file)[0].items():
            i, n, key = name.split(".")
            p = optimizers[int(i)].param_groups[0]["params"][int(n)]
            if isinstance(p, DTensor) and t.shape == p.shape:
                t = distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
            values[int(i)].setdefault(int(n), {})[key] = t
        for optimizer, state in zip(optimizers, values, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} must hold the optimizer state of step {step}: {error}") from None
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines[: step + 1] if line.endswith("\n")]  # the first line is not a step
    if RANK == 0:
        write(folder / "log.jsonl", lambda path: path.write_text("".join(kept)))
    return step


def check_new(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        raise ValueError(f"out must be a new folder, got the run {folder} (--resume goes on)")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else trains in a folder meanwhile (but on Windows). The lock ends with its process."""
    if RANK > 0 or fcntl is None:
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out must be a folder in which nobody else trains, got {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield


def settings(cfg: TrainConfig, given: set[str]) -> TrainConfig:
    """The settings of this run; with --resume those it began with. Raises ValueError if the given clash."""
    fixed = given | ({"steps"} if cfg.init else set())
    usual = TASK_DEFAULTS.get(cfg.task, {})
    if cfg.data and cfg.task in data.TASKS and cfg.task != "narration":
        raise ValueError(f"task must not be given with data but to name a benchmark, got {cfg.task}")
    begins = models.read_config(Path(cfg.init)) if cfg.init else models.preset(cfg.preset)
    if cfg.llm or cfg.train_vision or begins.llm or begins.train_vision or begins.lora_rank:
        usual = usual | PRETRAINED_DEFAULTS
    cfg = replace(cfg, **{name: value for name, value in usual.items() if name not in fixed})
    scores = cfg.chooses and cfg.router in models.LEARNED
    uses = {"preset": not (cfg.init or (cfg.llm and cfg.vision)), "shard": RANKS > 1, "keep": cfg.chooses,
            "router": cfg.chooses, "gate": scores, "routing_loss": scores, "masked": cfg.plan != "dense",
            "muon_lr": not (cfg.llm or begins.llm or begins.lora_rank), "dense_layers": cfg.plan == "arank",
            "lora_alpha": cfg.lora_rank, "lora_dropout": cfg.lora_rank}
    for name, use in uses.items():
        if name in given and not use and not cfg.resume:
            raise ValueError(f"{name} must be left out where it changes nothing, got {getattr(cfg, name)}")
    paths = {name: getattr(cfg, name) for name in ("data", "llm", "vision")}  # the same from any folder
    cfg = replace(cfg, **{name: str(Path(path).resolve()) for name, path in paths.items() if path})
    file = cfg.folder / "train.json"
    if not cfg.resume:
        check_new(cfg.folder)
        return cfg
    try:
        began = TrainConfig(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} must hold the settings of the run to resume: {error}") from None
    free = given & {"device", "compile", "gradient_checkpointing"}
    for name in sorted(given - free - {"out", "resume"}):
        now, was = getattr(cfg, name), getattr(began, name)
        if now != was:
            raise ValueError(f"{name} must be {was} to resume {cfg.folder}, got {now}")
    return replace(began, out=cfg.out, resume=True, **{name: getattr(cfg, name) for name in free})


def first_line(cfg: TrainConfig, model: VideoLM, optimizers: list, b: data.Batch) -> dict:
    """What tells this run from another: command, settings, code, versions, machine; and what a step costs."""
    c, without = model.config, (1.0,) * model.config.num_hidden_layers
    routed, dense = (step_flops(replace(c, keep=keep), b, optimizers) for keep in (c.keep, without))
    return {"argv": sys.argv[1:], **asdict(cfg), **data.provenance(),
            "parameters": sum(p.numel() for p in model.parameters()), "placement": model.config.keep,
            "learnt": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "flops_of_dense": round(routed / dense, 4), "processes": RANKS}


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had at most, on a GPU those of its tensors"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # there is none on Windows
    except ImportError:
        return 0
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)  # there, it is bytes


def learn(cfg: TrainConfig, device: torch.device, held: ExitStack) -> data.Source:
    """Begin or go on with a run, until its last checkpoint -> what it learnt from.  held: gets its lock"""
    folder = cfg.folder
    if cfg.resume:
        held.enter_context(alone(folder))
    model = models.load(folder, device) if cfg.resume else build(cfg).to(device)
    tokenizer = data.tokenizer_for(model.config.vocab_size, model.config.llm)
    source = data.open_source(cfg.task, cfg.data, cfg.fps, cfg.partial, model.config.image_size)
    encode_once(source, model, folder)
    distribute(model, cfg)
    optimizers = make_optimizers(model, cfg)
    start = resume(folder, optimizers) if cfg.resume else 0

    def collated(step: int) -> data.Batch:
        samples = source.batch(cfg.seed, step, cfg.batch, RANK, RANKS)
        return data.collate(samples, model.config.tokens_per_frame, tokenizer, MASKED[model.config.masked])

    first = first_line(cfg, model, optimizers, collated(0))
    if RANK == 0:
        print(f"{folder}: {first['parameters']:,} parameters, {first['learnt']:,} learnt, on {device}\n"
              f"keep {', '.join(f'{r:g}' for r in model.config.keep)}\n"
              f"{first['flops_of_dense']:.0%} of the dense FLOPs a step")
    if not cfg.resume:
        if RANK == 0:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(folder))
            check_new(folder)
            write_json(folder / "train.json", asdict(cfg))
            write(folder / "log.jsonl", lambda path: path.write_text(json.dumps(first) + "\n"))
        checkpoint(folder, model, optimizers, 0)  # from here on it is a run
    model.gradient_checkpointing = cfg.gradient_checkpointing
    loss_of = torch.compile(batch_loss, fullgraph=not cfg.shard) if cfg.compile else batch_loss
    beside = ahead if device.type == "cuda" else map  # on a CPU there is nothing to work beside
    batches = beside(lambda step: make_ready(collated(step), model.config, cfg.sigma, device),
                     range(start, cfg.steps))
    with open(folder / "log.jsonl" if RANK == 0 else os.devnull, "a") as log:
        bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, ncols=80, disable=RANK > 0)
        for step in bar:
            began = time.perf_counter()
            b = next(batches)
            loss, routing, norm, tokens = train_step(loss_of, model, optimizers, cfg, b, step).tolist()
            check_finite({"streaming loss": loss, "routing loss": routing, "gradient": norm}, step, folder)
            seconds = round(time.perf_counter() - began, 4)
            line = {"step": step, "loss": loss + routing, "routing_loss": routing, "grad_norm": norm,
                    "tokens": int(tokens), "seconds": seconds, "peak_memory": peak_memory(device)}
            saved = (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
            if saved and isinstance(source, data.World) and not cfg.shard:
                line["on_shapes"] = on_shapes(model, tokenizer, source.held_out(16))
            print(json.dumps(line), file=log, flush=True)
            bar.set_postfix_str(f"loss {loss + routing:.3f}, {1000 * seconds:.0f} ms a step")
            if saved:
                checkpoint(folder, model, optimizers, step + 1)
    return source


def finish(cfg: TrainConfig, device: torch.device, source: data.Source) -> None:
    """Evaluate a run as it was saved, and whole; the model that learnt is gone."""
    folder = cfg.folder
    steps = (folder / "log.jsonl").read_text().splitlines()[1:]
    print(f"median step {1000 * median(json.loads(line)['seconds'] for line in steps):.0f} ms")
    model = models.load(folder, device).eval()
    encode_once(source, model, folder)
    tokenizer = data.tokenizer_for(model.config.vocab_size, model.config.llm)
    report(folder, model, tokenizer, source, cfg.streams)


def sweep(name: str, seeds: int, jobs: int, flags: dict[str, str]) -> None:
    """Train and evaluate the rows of a table, with several seeds; what is done stays, what was cut goes on.

    flags: for all runs -> the runs in out/NAME/, a row each in out/NAME.json
    """
    if name not in SWEEPS:
        raise ValueError(f"sweep must be one of {', '.join(SWEEPS)}, got {name}")
    folder, rows = Path("out") / name, [line.split() for line in SWEEPS[name].split("\n")[1:]]
    folder.mkdir(parents=True, exist_ok=True)
    device, asked = flags.pop("device", ""), json.dumps(flags)
    began = folder / "sweep.json"
    if began.exists() and began.read_text() != asked:
        raise ValueError(f"sweep must go on with the flags that {began} holds, got {asked}")
    write(began, lambda path: path.write_text(asked))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    stopped, running = threading.Event(), []

    def train_rows(seed: int) -> None:
        dense = str(folder / f"dense-seed{seed}")
        for row, *how in rows:  # the dense one first: others start from it
            run = folder / f"{row}-seed{seed}"
            if stopped.is_set() or (run / "eval.json").exists():
                continue
            print(f"{time.strftime('%H:%M')} {run}\n", end="", flush=True)  # at once: others print too
            new = [f"--task={name}", *how, f"--seed={seed}", *(f"--{flag}={v}" for flag, v in flags.items())]
            how = ["--resume"] if (run / "model.safetensors").exists() else new
            how = [dense if flag == "DENSE" else flag for flag in how] + [f"--device={device}"]
            with open(f"{run}.log", "a") as log:
                process = subprocess.Popen([sys.executable, __file__, f"--out={run}", *how], stdout=log,
                                           stderr=log, env=environment)
                running.append(process)
                if process.wait() and not stopped.is_set():
                    stopped.set()
                    raise ValueError(f"{run} must train and be evaluated, its end is in {run}.log")

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what follows
    threads = ThreadPoolExecutor(jobs)
    try:
        list(threads.map(train_rows, range(seeds)))
    finally:  # also where one failed or somebody has had enough: no run goes on alone
        stopped.set()
        for process in running:
            process.terminate()
        threads.shutdown()
        signal.signal(signal.SIGTERM, before)
    write_json(Path(f"{folder}.json"), data.collect(folder))
    print(f"written to {folder}.json")


@dataclass(frozen=True)
class Command(TrainConfig):
    """What one call may ask for beside the settings of a run"""

    sweep: str = opt("", f"train the rows of a table, into out/NAME and out/NAME.json: {', '.join(SWEEPS)}")
    seeds: int = opt(5, "how many, from 0", needs="sweep")
    jobs: int = opt(1, "runs at once, which share the cores", needs="sweep")


def main(argv: list[str] | None = None) -> None:
    asked, given = models.parse(Command, argv, __doc__)
    if asked.sweep:
        if wrong := sorted(given - {"sweep", "seeds", "jobs", "steps", "streams", "device"}):
            raise ValueError(f"sweep must not be given with {wrong[0]}, which its rows have, got both")
        if RANKS > 1:
            raise ValueError(f"sweep must be started by one process, got {RANKS} of torchrun")
        flags = {name: str(getattr(asked, name)) for name in sorted(given & {"steps", "streams", "device"})}
        return sweep(asked.sweep, asked.seeds, asked.jobs, flags)
    cfg = settings(TrainConfig(**{f.name: getattr(asked, f.name) for f in fields(TrainConfig)}), given)
    device = models.pick_device(cfg.device)
    if RANKS > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # by number: each thread has its default
        torch.cuda.set_device(device)
    if RANKS > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with ExitStack() as held:  # also while it is evaluated
        source = learn(cfg, device, held)
        if RANKS > 1:
            dist.destroy_process_group()
        if RANK == 0:
            finish(cfg, device, source)


if __name__ == "__main__":
    models.run(main)
