"""A stream as one HTML page: frames, what routed layers computed, what was said.

    python -m extras.page RUN --watch VIDEO --out FILE.html
    python -m extras.page RUN --out FILE.html    of a stream of its own world

The page needs no other file and no network. All frames are held in memory.
"""

import contextlib
import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import eval as evaluation
from data import Turn
from eval import WatchConfig, Watcher, newest_run, read_settings
from model import flag, load, parse, pick_device, printable, run_main, write
from video import read_video

TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "watch.html"


class Watched(NamedTuple):
    """A frame that a model has watched."""

    pixels: np.ndarray  # (S, S, 3) uint8
    kept: dict[int, Tensor]  # routed layer -> (P,) bool, the vision tokens that it computed
    said: str | None  # None: it stayed silent


def watch(watcher: Watcher, frames: Iterator[np.ndarray], query: str) -> list[Watched]:
    """Watch a stream from its beginning. query: what is asked before the first frame"""
    watched, asked = [], [[Turn(0, "user", query)]]
    for pixels in frames:
        turn = watcher.watch(data.stack_frames([pixels[None]]), asked)[0]
        kept = {layer: keep[0] for layer, keep in watcher.kept.items()}
        watched.append(Watched(pixels, kept, turn and turn.text))
        asked = None
    return watched


def page(title: str, fps: float, watched: Sequence[Watched]) -> str:
    """The HTML: a slider, a picture per routed layer, and the list of what was said."""
    kept: dict[int, list[str]] = {layer: [] for layer in sorted(watched[0].kept)}
    for frame in watched:
        for layer, digits in kept.items():
            digits.append("".join(str(int(k)) for k in frame.kept[layer]))
    stream = {
        "title": title,
        "fps": fps,
        "frames": [b64encode(evaluation.png(frame.pixels)).decode() for frame in watched],
        "kept": kept,
        "said": [None if frame.said is None else printable(frame.said) for frame in watched],
    }
    script = json.dumps(stream).replace("<", "\\u003c")  # so that no text ends the script
    before, rest = TEMPLATE.read_text().split("null/*", 1)
    after = rest.split("*/", 1)[1]
    return before + script + after


@dataclass(frozen=True)
class PageConfig(WatchConfig):
    out: str = flag("out/watch.html", "the page")

    def __post_init__(self) -> None:
        super().__post_init__()
        file = Path(self.out)
        if file.suffix != ".html" or not file.parent.is_dir():
            raise ValueError(
                f"out must name an .html file in a folder that is there, got {self.out}"
            )


def frames_of(cfg: PageConfig, settings: dict, size: int) -> tuple[Iterator[np.ndarray], str]:
    """The frames of the video, or of a held-out stream, and the question before the first"""
    task = data.find_task(settings["task"])
    if cfg.watch:
        video = read_video(Path(cfg.watch), settings["fps"], size, cfg.partial)
        return video, cfg.query or task.query
    if settings["data"] or not issubclass(task, data.World) or task.asks:
        rule = f"watch must be given for the task {settings['task']}"
        raise ValueError(f"{rule}, whose runs have no stream of their own, got no video")
    sample = task(size).held_out(1)[0]
    return iter(sample.frames), cfg.query or sample.turns[0].text


def main(argv: list[str] | None = None) -> None:
    cfg, _ = parse(PageConfig, argv, __doc__)
    folder = Path(cfg.run) if cfg.run else newest_run()
    model, settings = load(folder, pick_device(cfg.device)).eval(), read_settings(folder)
    frames, query = frames_of(cfg, settings, model.config.image_size)
    tokenizer, seed = data.tokenizer_for(model.config), torch.zeros(1).long()
    watcher = Watcher(model, tokenizer, seed, cfg.threshold, cfg.window)
    with contextlib.ExitStack() as stack:
        if cfg.watch:
            stack.enter_context(contextlib.closing(frames))  # also on KeyboardInterrupt
        watched = watch(watcher, frames, query)
    text = page(query, settings["fps"], watched)
    write(Path(cfg.out), lambda path: path.write_text(text))
    print(f"{cfg.out}: a page of all {len(watched)} frames")


if __name__ == "__main__":
    run_main(main)
