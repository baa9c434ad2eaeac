"""Train on several GPUs, or in several processes: each gets a part of every batch.

    torchrun --nproc_per_node=2 -m extras.distributed --data DIR
    torchrun --nproc_per_node=2 -m extras.distributed --llm DIR --shard

All flags of train.py and of extras/pretrained.py are there. The first process
writes the run and evaluates it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

import train
from data import Batch, Sample
from extras import pretrained
from extras.cost import SIZES
from extras.pretrained import OWN, SHARED, PretrainedFlags
from model import VideoLM, flag, load, parse, pick_device, run_main
from train import TrainConfig

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


@dataclass(frozen=True)
class DistributedFlags(PretrainedFlags):
    shard: bool = flag(False, "share the weights out among the processes, not only the batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % RANKS:
            raise ValueError(
                f"batch must be a multiple of the {RANKS} processes, got {self.batch}"
            )
        if self.shard and self.compile:
            raise ValueError("compile must be left out with shard, got both")
        if self.merge:
            raise ValueError("merge must be left out here: python -m extras.pretrained --merge RUN")


def start(cfg: DistributedFlags, given: set[str]) -> tuple[TrainConfig, VideoLM]:
    """The settings of the run and its model, before the first step or as it was saved"""
    if given & OWN or cfg.preset in SIZES:
        return pretrained.prepare_run(cfg, given)
    base = {name: getattr(cfg, name) for name in SHARED}
    settings = train.settings(TrainConfig(**base), given & SHARED)
    return settings, load(settings.folder) if cfg.resume else train.build(settings)


def total(t: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in place. fully_shard leaves gradients as means."""
    if isinstance(t, DTensor):
        return t.mul_(RANKS)
    if RANKS > 1:
        dist.all_reduce(t)
    return t


def share_of(batch: Batch) -> tuple[Tensor, int]:
    """(2,) the share of all labels and group members that this process has; the tokens of all"""
    here = [(batch.labels >= 0).sum(), (batch.group >= 0).sum(), batch.real.sum()]
    counts = torch.stack(here).double()
    totals = total(counts.clone())
    share = counts / totals.clamp(min=1)
    return share[:2].float(), int(totals[2])


# --- sharded weights and optimizer states, whole in files -----------------------------------------


def whole(t: Tensor) -> Tensor:
    """A tensor that may be sharded, in full; all processes call it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard(model: VideoLM) -> None:
    """Share the weights out: a layer is gathered when it computes."""
    mesh = init_device_mesh(model.norm.weight.device.type, (RANKS,))
    frozen = {p for p in model.vision_model.parameters() if not p.requires_grad}
    for part in [*model.layers, model]:
        gathered = part is model  # its head is used after its forward pass
        fully_shard(part, mesh=mesh, reshard_after_forward=not gathered, ignored_params=frozen)

    def gather(module: object, state: dict, prefix: str, metadata: object) -> None:
        for name, t in state.items():
            state[name] = whole(t)

    model.register_state_dict_post_hook(gather)


def gather_state(optimizer: Optimizer, state: dict) -> dict:
    """After optimizer.state_dict(): the whole tensors"""
    found = {}
    for n, values in state["state"].items():
        found[n] = {key: whole(t) for key, t in values.items()}
    return {**state, "state": found}


def shard_state(optimizer: Optimizer, state: dict) -> dict:
    """Before optimizer.load_state_dict(): each tensor is shared out as its parameter is"""
    parameters, found = optimizer.param_groups[0]["params"], {}
    for n, values in state["state"].items():
        found[n] = {key: shard_like(t, parameters[n]) for key, t in values.items()}
    return {**state, "state": found}


def shard_like(t: Tensor, p: Tensor) -> Tensor:
    if isinstance(p, DTensor) and t.shape == p.shape:
        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
    return t


def make_optimizers(model: VideoLM, cfg: TrainConfig) -> list[Optimizer]:
    """Those of train.py, whose states are whole in files"""
    optimizers = ORIGINAL["make_optimizers"](model, cfg)
    for optimizer in optimizers:
        optimizer.register_state_dict_post_hook(gather_state)
        optimizer.register_load_state_dict_pre_hook(shard_state)
    return optimizers


def clip_grad_norm(parameters: list[Tensor], most: float) -> Tensor:
    return whole(ORIGINAL["clip_grad_norm_"](parameters, most))


def gather_only(folder: Path, model: VideoLM, optimizers: list[Optimizer], step: int) -> None:
    """The part of other processes in a checkpoint: they help to gather it, in the same order."""
    for optimizer in optimizers:
        optimizer.state_dict()
    model.state_dict()


ORIGINAL = {name: getattr(train, name) for name in ("make_optimizers", "clip_grad_norm_")}


def take_over() -> dict[str, Callable]:
    """The functions of train.py that are others where there are several processes"""
    others = {
        "make_optimizers": make_optimizers,
        "clip_grad_norm_": clip_grad_norm,
        "share_of": share_of,
    }
    return others | ({"checkpoint": gather_only} if RANK > 0 else {})


# --- the processes --------------------------------------------------------------------------------


class Ahead:
    """Makes the next batch in a thread while the last one is used."""

    def __init__(self, make: Callable[[int, int, int], list[Sample]]) -> None:
        self.make, self.thread = make, ThreadPoolExecutor(1)
        self.coming: dict[tuple[int, int, int], Future] = {}

    def __call__(self, seed: int, step: int, count: int) -> list[Sample]:
        ready = self.coming.pop((seed, step, count), None)
        batch = ready.result() if ready else self.make(seed, step, count)
        following = (seed, step + 1, count)
        self.coming[following] = self.thread.submit(self.make, *following)
        return batch


def shadow(folder: Path, stack: ExitStack) -> Path:
    """A temporary run folder for another process, with what resuming reads"""
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for file in folder.glob("*.safetensors"):
        (copy / file.name).symlink_to(file.resolve())
    if (folder / "log.jsonl").exists():
        shutil.copy(folder / "log.jsonl", copy)
    return copy


def other_dropout(*_: object) -> None:
    """Before a forward pass: each process drops other numbers."""
    torch.manual_seed(torch.initial_seed() + RANK)


def join(device: torch.device) -> torch.device:
    """Become one of the processes -> the device of this one"""
    gpu = device.type == "cuda"
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if RANKS > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return device


def run(cfg: DistributedFlags, given: set[str], stack: ExitStack) -> None:
    settings, model = start(cfg, given)
    folder, device = settings.folder, join(pick_device(cfg.device))
    source = train.open_source(settings, model.to(device))
    source.batch = partial(source.batch, rank=RANK, ranks=RANKS)
    if device.type == "cuda":
        source.batch = Ahead(source.batch)
    # A bad clip is refused before anything is written.
    if not source.batch(settings.seed, 0, settings.batch):
        raise ValueError(f"data must hold a clip for each of {RANKS} processes, got too few")
    if RANKS > 1:
        dist.barrier()  # all have looked into the folder
        model.register_forward_pre_hook(other_dropout)
    if cfg.shard and RANKS > 1:
        shard(model)
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(train.alone(folder))
        train.learn(settings, model, source, total)
    else:
        learner = replace(settings, out=str(shadow(folder, stack)))
        train.learn(learner, model, source, total)
    if RANKS > 1:
        dist.destroy_process_group()
    if RANK == 0:
        train.finish(settings, source)


def main(argv: list[str] | None = None) -> None:
    cfg, given = parse(DistributedFlags, argv, __doc__)
    with ExitStack() as stack:
        for name, function in take_over().items():
            stack.callback(setattr, train, name, getattr(train, name))
            setattr(train, name, function)
        if RANK > 0:  # the first process speaks for all; errors are printed after this
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(quiet))
            stack.enter_context(redirect_stderr(quiet))
        run(cfg, given, stack)


if __name__ == "__main__":
    run_main(main)
