"""Weights of several types in one model: float32 norms or float16 layers beside bfloat16 tables.

extras/pretrained.py uses it; there is no command. Where all weights of an encoder or a decoder have
one type, nothing is added to it.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from extras.lora import LoraLinear
from extras.pretrained_config import is_added

CAST = (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Conv2d, nn.MultiheadAttention)


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
