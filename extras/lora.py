"""LoRA, biases and new tokens: what a pretrained decoder's linear maps and tables have more.

extras/pretrained_model.py puts them in place of the plain modules; there is no command. Parameters
keep their names: `.weight`, and beside it `.bias`, `.lora_A`, `.lora_B`, `.new`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """W x + alpha / rank * B A x (arXiv 2106.09685); at rank 0 a plain linear map.

    A and B are learned in float32, whatever the type of W, and are used in the type of x.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.rank = rank
        self.dropout = dropout
        if rank:
            self.scale = alpha / rank
            self.lora_A = nn.Parameter(torch.zeros(rank, inputs))
            self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        out = F.linear(x, self.weight, bias)
        if not self.rank:
            return out
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., rank)
        return out + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def merged(self) -> Tensor:
        """W + alpha / rank * B A, in the type of W"""
        change = self.scale * self.lora_B @ self.lora_A
        return (self.weight + change).to(self.weight.dtype)


class ExtendedHead(LoraLinear):
    """Logits of the known tokens, then of the new ones."""

    def __init__(self, inputs: int, outputs: int, new: int, *lora: float) -> None:
        super().__init__(inputs, outputs, False, *lora)
        self.new = nn.Parameter(torch.zeros(new, inputs)) if new else None

    def forward(self, x: Tensor) -> Tensor:
        known = super().forward(x)
        if self.new is None:
            return known
        return torch.cat([known, F.linear(x, self.new.to(x.dtype))], dim=-1)


class ExtendedEmbedding(nn.Embedding):
    """An embedding table, and the rows of new tokens after it."""

    def __init__(self, known: int, new: int, width: int) -> None:
        super().__init__(known, width)
        self.new = nn.Parameter(torch.zeros(new, width))

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.num_embeddings  # id of the first new token
        x = super().forward(tokens.clamp(max=first - 1))
        new = F.embedding((tokens - first).clamp(min=0), self.new).to(x.dtype)
        return torch.where((tokens >= first)[..., None], new, x)
