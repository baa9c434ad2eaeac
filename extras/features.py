"""The features of a frozen encoder, in files: each clip is encoded once.

extras/pretrained_model.py uses it; there is no command.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import Clip, Clips, stack_frames
from model import VideoLM, write


@torch.no_grad()
def encode_once(model: VideoLM, source: Clips, cache: Path, clip: Clip) -> np.ndarray:
    """-> (F, P, W) float32, encoded now or read from the file of an earlier run

    cache: the folder of these files. Raises ValueError if a file is damaged.
    """
    file = cache / f"{name_features(model, source, clip)}.safetensors"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        device, parts = model.norm.weight.device, []
        for part in stack_frames([source.decode(clip)])[0].split(64):
            parts.append(model.vision_model(part.to(device)).float().cpu())
        encoded = {"features": torch.cat(parts)}
        write(file, lambda path: save_file(encoded, path))
    try:
        return load_file(file)["features"].numpy()
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{file} must hold features (remove it to encode again): {error}"
        ) from None


def name_features(model: VideoLM, source: Clips, clip: Clip) -> str:
    """A hash of all that features depend on: the clip, how it is read, and the encoder"""
    stat = clip.video.stat()
    about = [clip.video.resolve(), stat.st_size, stat.st_mtime_ns, clip.start, clip.end]
    about += [source.fps, source.size, source.partial]
    for name, value in vars(model.config).items():
        if name.startswith(("vision", "image", "patch", "pool")):
            about.append(value)
    for weights in sorted(Path(model.config.vision).glob("*.safetensors")):
        about.append(weights.stat().st_mtime_ns)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]
