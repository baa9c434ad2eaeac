"""How much memory a training step needs, counted with fake tensors: nothing is computed.

For extras/speed.py, with the step and the models that it measures; there is no command.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

import train
from data import QUERY, Batch, Sample, Tokenizer, Turn, World, collate
from extras.pretrained_config import PretrainedConfig
from extras.pretrained_model import build
from mod import placement
from model import Config, Inputs, VideoLM, initialise, prepare

KINDS = {"dense": 1.0, "mod": 0.2}  # keep ratio of every other layer
LORA_RANK = 128  # of the large presets, whose decoder is frozen

# --- what is trained ------------------------------------------------------------------------------


def routed(sizes: Config, kind: str, pool: int) -> Config:
    """Dense or MoD, with frames of 1 + pool * pool tokens. The same weights fit all of them."""
    keep = placement("interleaved", sizes.num_hidden_layers, KINDS[kind])
    return replace(sizes, keep=keep, pool=pool)


def with_adapters(config: Config) -> PretrainedConfig:
    """How the large presets are trained: adapters beside a frozen decoder"""
    return PretrainedConfig(**vars(config), lora_rank=LORA_RANK)


def one_step(
    model: VideoLM,
    optimizers: list[torch.optim.Optimizer],
    inputs: Inputs,
    loss_of: Callable[..., Tensor] = train.batch_loss,
) -> None:
    """A step of train.learn without its batch, its log and its checkpoint, at the rates there are.

    loss_of: train.batch_loss, or the same compiled.  Nothing here waits for the device.
    """
    cfg = train.TrainConfig()
    loss_of(model, inputs, cfg.sigma, cfg.routing_loss).sum().backward()
    clip_grad_norm_([p for p in model.parameters() if p.grad is not None], train.CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def new_model(config: Config, device: torch.device, checkpointing: bool = False) -> VideoLM:
    """A model with drawn weights. checkpointing: backward passes compute its layers again"""
    if isinstance(config, PretrainedConfig):
        model = build(config, 0, device)
        model.gradient_checkpointing = checkpointing
        return model
    with torch.device(device):
        return initialise(VideoLM(config), 0)


def drawn_batch(config: Config, frames: int, streams: int) -> Batch:
    """Streams of the embedded world. With adapters: features, and a reply to every tenth frame."""
    if isinstance(config, PretrainedConfig):
        shape = (frames, config.tokens_per_frame, config.vision_hidden_size)
        features = np.zeros(shape, np.float32)
        turns = [Turn(0, "user", QUERY)]
        for frame in range(9, frames, 10):
            turns.append(Turn(frame, "assistant", "A red disc, top left."))
        samples = [Sample(features, turns, number) for number in range(streams)]
    else:
        samples = World(config.image_size, frames).batch(0, 0, streams)
    return collate(samples, config, Tokenizer())


def make_inputs(config: Config, frames: int, streams: int, device: torch.device) -> Inputs:
    return prepare(drawn_batch(config, frames, streams), config, device)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, now and at most. It also sees fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        function: Callable,
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        tree_map_only(Tensor, self.count, args)
        return tree_map_only(Tensor, self.count, function(*args, **(kwargs or {})))

    def count(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, size)
        return t

    def forget(self, size: int) -> None:
        self.now -= size


def count_peak(action: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Bytes that are alive at the peak of an action: `held`, what it reads, and what it makes"""
    with Alive() as alive, torch.compiler.set_stance("force_eager"):
        for t in held:
            alive.count(t)
        action()
    return alive.most


def count_memory(config: Config, batch: Batch, checkpointing: bool = False) -> int:
    """Bytes that are alive at the peak of a training step, found without taking them"""
    cpu = torch.device("cpu")
    inputs = prepare(batch, config, cpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = new_model(config, cpu, checkpointing)
        optimizers = train.make_optimizers(model, train.TrainConfig())

        def two_steps() -> None:  # the first makes the state of the optimizers
            one_step(model, optimizers, inputs)
            one_step(model, optimizers, inputs)

        return count_peak(two_steps, model.parameters())


def longest(config: Config, memory: float) -> int:
    """Frames of one stream whose training step fits in so many bytes: memory is linear in them"""
    few = count_memory(config, drawn_batch(config, 100, 1))
    more = count_memory(config, drawn_batch(config, 200, 1))
    return int(100 + (memory - few) / (more - few) * 100)
