"""The types of weights: several in one model, and those for which a CPU has no units.

extras/pretrained_model.py uses it; there is no command. Where all weights of an encoder or a
decoder have one type, nothing is added to it.
"""

from functools import cache, reduce

import torch
from torch import Tensor, nn

from extras.lora import LoraLinear
from extras.pretrained_config import is_added
from model import VideoLM

CAST = (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Conv2d, nn.MultiheadAttention)
UNITS = {  # oneDNN's question whether a CPU multiplies matrices of a type
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


class OwnType:
    """Two hooks: a module computes in the type of its weight, its output has that of its input."""

    def before(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.outside = given[-1].dtype
        inside = next(module.parameters()).dtype
        return tuple([x.to(inside) for x in given])

    def after(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor | tuple) -> object:
        if isinstance(out, tuple):  # of attention pooling; there are no attention weights
            return out[0].to(self.outside), None
        return out.to(self.outside)


def cast_between_types(model: nn.Module) -> None:
    """Give the modules of an encoder or a decoder of several types the hooks of OwnType."""
    types = {"encoder": set(), "decoder": set(), "added": set()}
    for name, p in model.named_parameters():
        if not p.is_meta:
            types[part_of(name)].add(p.dtype)
    types["added"].clear()  # what is added follows the type of its input
    for name, module in model.named_modules():
        part = part_of(name)
        if len(types[part]) > 1 and isinstance(module, CAST) and not module._forward_hooks:
            if not isinstance(module, LoraLinear):  # that casts its bias, torch wants one type
                module.to(reduce(torch.promote_types, [p.dtype for p in module.parameters()]))
            hooks = OwnType()
            module.register_forward_pre_hook(hooks.before)
            module.register_forward_hook(hooks.after)


def part_of(name: str) -> str:
    if is_added(name):
        return "added"
    return "encoder" if name.startswith("vision_model.") else "decoder"


# --- types without units --------------------------------------------------------------------------


def compute_fast(model: VideoLM) -> None:
    """Turn the weights of folders that are on a CPU without units for their type into float32.

    A run saves the same types as ever: it leaves these weights in their folders, or learns them,
    in float32.
    """
    for name, p in model.named_parameters():
        if p.is_cpu and model.config.folder_of(name):
            p.data = p.data.to(computed_in(p.dtype))


@cache  # so it is said once
def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type in which this CPU computes with weights of a type"""
    if dtype not in UNITS or has_units(dtype):
        return dtype
    name = str(dtype).removeprefix("torch.")
    print(f"{name} weights are computed in float32: this CPU has no {name} units")
    return torch.float32


def has_units(dtype: torch.dtype) -> bool:
    """Does this CPU multiply matrices of bfloat16 or float16 at full speed?"""
    if not torch.backends.mkldnn.is_available():
        return False
    # oneDNN says yes too where AVX-512 has no such units, and emulates them at half the speed.
    cpu = torch.cpu.get_capabilities()
    emulated = cpu.get("avx512_f") and not cpu.get("avx512_bf16")
    return getattr(torch.ops.mkldnn, UNITS[dtype])() and not emulated
