"""Three more embedded worlds, that stand in for benchmarks.

    python -m extras.worlds         show what is asked and said in each
    python train.py --task scene    learn one

scene: several small shapes; each word has to be found among the patches
forecast: the steps that follow are listed, as in Ego4D's long-term anticipation
summary: the steps that were shown are listed
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from data import COLOURS, DESCRIBE, QUERY, Sample, Tokenizer, Turn, World, draw_thing
from extras.scores import draw_candidates, forecast, numbered, top1, true_answers
from model import VideoLM, parse, run_main

# Each step is in one recipe, and each recipe has its own colour at each place.
RECIPES = (
    ("red disc", "white ring", "blue cross", "green disc", "pink triangle", "yellow ring"),
    ("yellow cross", "pink disc", "red triangle", "white cross", "green ring", "blue triangle"),
    ("blue ring", "green cross", "yellow disc", "red ring", "white triangle", "pink cross"),
    ("green triangle", "yellow triangle", "pink ring", "blue disc", "red cross", "white disc"),
)


class Scene(World):
    """One to six shapes flash at once, a patch each; the reply names them in reading order.

    So of the 36 patches of a frame a reply needs one to six, which change with every frame.
    """

    task, frames, grid = "scene", 4, 6
    defaults: ClassVar[dict] = {
        "muon_lr": 0.01,
        "adam_lr": 0.003,
        "steps": 300,
        "save_every": 25,
    }

    def draw(self, frames: np.ndarray, rng: Generator, split: str) -> list[Turn]:
        turns = [Turn(0, "user", QUERY)]
        for number, frame in enumerate(frames):
            if rng.random() < 0.8:
                said = ""
                colours = rng.permutation(list(COLOURS))[: rng.integers(1, 7)].tolist()
                cells = np.sort(rng.permutation(self.grid**2)[: len(colours)])
                for colour, cell in zip(colours, cells, strict=True):
                    _, shape = draw_thing(rng)
                    self.paint(frame, rng, colour, shape, *divmod(cell, self.grid))
                    said += f" {colour} {shape}"
                turns.append(Turn(number, "assistant", f"{said}."))
        return turns


class Forecast(World):
    """Three steps of a hidden recipe flash in order; the answer at the end lists the rest."""

    task, kind, asks = "forecast", "held-out questions", True
    question = "What is next?"
    defaults: ClassVar[dict] = {
        "preset": "coarse",
        "muon_lr": 0.005,
        "adam_lr": 0.003,
        "steps": 400,
    }

    def asked(self, steps: tuple[str, ...]) -> tuple[str, ...]:
        """Of the steps from the first that is shown, those that the answer lists"""
        return steps[3:]

    def draw(self, frames: np.ndarray, rng: Generator, split: str) -> list[Turn]:
        recipe, first = rng.choice(len(RECIPES)), rng.integers(3)
        steps = RECIPES[recipe][first:]
        shown = np.sort(rng.permutation(self.frames)[:3])
        for frame, step in zip(shown, steps, strict=False):
            self.paint(frames[frame], rng, *step.split(), *rng.integers(3, size=2))
        answer = numbered(f"{step}." for step in self.asked(steps))
        last = self.frames - 1
        return [Turn(0, "user", self.question), Turn(last, "assistant", answer)]

    def answers(self) -> list[str]:
        return [numbered(recipe) for recipe in RECIPES]

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        """Top-1, and edit distances of the best of five candidates"""
        true, known = true_answers(tokenizer, samples), self.answers()
        candidates = draw_candidates(model, tokenizer, samples, said)
        return top1(said, true, known) | forecast(candidates, true, known)


class Summary(Forecast):
    """The same streams; the answer lists the steps that were shown."""

    task, question = "summary", DESCRIBE

    def asked(self, steps: tuple[str, ...]) -> tuple[str, ...]:
        return steps[:3]

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        return top1(said, true_answers(tokenizer, samples), self.answers())


TASKS = {"scene": Scene, "forecast": Forecast, "summary": Summary}


@dataclass(frozen=True)
class NoFlags:
    """This command has no flags."""


def main(argv: list[str] | None = None) -> None:
    parse(NoFlags, argv, __doc__)
    for task, world in TASKS.items():
        print(f"{task}:")
        for turn in world(48).held_out(1)[0].turns:
            print(f"  frame {turn.frame}  {turn.role}: {turn.text.strip()}")


if __name__ == "__main__":
    run_main(main)
