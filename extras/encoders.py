"""The vision encoders of CLIP and SigLIP, as their Hugging Face files hold them.

extras/pretrained_model.py uses them; there is no command. As in VideoLLM-online, the last hidden
state is pooled: of CLIP as its last layer leaves it, of SigLIP after the final norm.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Config, VisionMLP, VisionModel


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class ClipVision(VisionModel):
    """CLIP: CLS goes through the final norm, the patches do not."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.mean, self.std = c.image_mean, c.image_std
        adopt(self, c)

    def normalise(self, pixels: Tensor) -> Tensor:
        """0 ... 255 -> mean 0 and spread 1 of the pictures that the encoder learned from"""
        pixels, channels = pixels.to(self.post_layernorm.weight.dtype), []
        for t, mean, std in zip(pixels.unbind(1), self.mean, self.std, strict=True):
            channels.append(t / (255 * std) - mean / std)
        return torch.stack(channels, dim=1)

    def hidden(self, x: Tensor) -> Tensor:
        """x: (N, 3, S, S) normalised -> (N, 1 + h * w, D), transformers' last_hidden_state"""
        return self.encode(x)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.hidden(self.normalise(pixels))
        return self.pool_grid(self.post_layernorm(x[:, :1]), x[:, 1:])


class SiglipVision(ClipVision):
    """SigLIP: no CLS; in its place stands the output of attention pooling."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        width, patch = c.vision_hidden_size, c.patch_size
        del self.embeddings.class_embedding, self.pre_layrnorm
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.embeddings.position_embedding = nn.Embedding(self.side**2, width)
        self.head = AttentionPooling(c)
        adopt(self, c)

    def hidden(self, x: Tensor) -> Tensor:
        """x: (N, 3, S, S) normalised -> (N, h * w, D), transformers' last_hidden_state"""
        x = self.embeddings.patch_embedding(x).flatten(2).mT  # (N, h * w, D)
        x = x + self.embeddings.position_embedding.weight
        for block in self.encoder["layers"]:
            x = block(x)
        return self.post_layernorm(x)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.hidden(self.normalise(pixels))
        return self.pool_grid(self.head(x), x)


class AttentionPooling(nn.Module):
    """One learned query attends to all patches: (N, L, D) -> (N, 1, D)"""

    def __init__(self, c: Config) -> None:
        super().__init__()
        width = c.vision_hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, c.vision_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.expand(len(x), -1, -1)
        x, _ = self.attention(probe, x, x, need_weights=False)
        return x + self.mlp(self.layernorm(x))


def adopt(encoder: nn.Module, c: Config) -> None:
    """Give an encoder the activation and the epsilon of its config."""
    for module in encoder.modules():
        if isinstance(module, VisionMLP):
            module.act = ACTIVATIONS[c.vision_act]
        if isinstance(module, nn.LayerNorm):
            module.eps = c.vision_norm_eps


ENCODERS = {"scratch": VisionModel, "clip": ClipVision, "siglip": SiglipVision}
