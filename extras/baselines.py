"""Two selections and a placement to compare with. `extras/sweep.py` trains them.

There is no command.
"""

import math
from unittest.mock import patch

import torch
from torch import Tensor

import mod
from mod import Groups
from model import Block, VideoLM


class RandomSelection(VideoLM):
    """The control: tokens are chosen at random, and weighed by learned gates all the same.

    If a rule owes its lead to what the gates weigh, and not to what is chosen, this has it too.
    """

    def run_layer(self, *given: object) -> tuple:
        """given: as to VideoLM.run_layer"""
        layer, _, position, _, _, seed, _ = given
        drawn, select = mod.random_score(position, layer, seed), mod.select
        with patch.object(mod, "select", lambda score, *how: select(drawn, *how)):
            return super().run_layer(*given)


class AMoD(VideoLM):
    """Tokens are chosen by the attention that they got in the last dense layer.   arXiv 2412.20875

    Only attention within a group counts, so the choice is known when the group has arrived, and
    streaming stays exact. Nothing is learned: `--router random`, whose weights are 1.
    """

    def run_layer(self, *given: object) -> tuple:
        """given: as to VideoLM.run_layer"""
        layer, x, _, rope, groups, _, _ = given
        if self.config.keep[layer] == 1:
            self.got = attention_got(self.layers[layer], x, rope, groups)
        return super().run_layer(*given)

    def score(self, *given: object) -> Tensor:
        return self.got


@torch.no_grad()
def attention_got(block: Block, x: Tensor, rope: Tensor, groups: Groups) -> Tensor:
    """(B, T) the attention that a token gets from its group, less what even attention would give

    Mean over heads, sum over queries. Without "less", early tokens, which more queries see, win.
    """
    q, k, _ = block.self_attn.heads(block.input_layernorm(x), rope)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, d)
    seen = (groups.id[:, :, None] == groups.id[:, None]).tril()  # (B, T, T)
    logits = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
    maps = logits.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    even = seen.to(maps.dtype) / seen.sum(-1, keepdim=True)
    return (maps.mean(1) - even).sum(1)


def worst_placement(
    ranks: list[float], keep_ratio: float, dense_layers: int = 0
) -> tuple[float, ...]:
    """`mod.rank_placement` turned round: the layers of the lowest ARank stay dense."""
    return mod.rank_placement([-rank for rank in ranks], keep_ratio, dense_layers)


# Words of a row of a sweep, and what they put in the place of train.py's and model.py's names
VARIANTS = {
    "RANDOM-SELECTION": ("VideoLM", RandomSelection),
    "A-MOD": ("VideoLM", AMoD),
    "WORST": ("rank_placement", worst_placement),
}
