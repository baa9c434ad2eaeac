"""Scores of answers: top-1 accuracy, edit distance of forecasts, relaxed accuracy.

The benchmarks and the worlds that stand in for them import these; there is no command. In all of
them `said` are the model's answers, `true` the right ones, and `known` all answers there are.
"""

import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from data import Sample, Tokenizer
from eval import Watcher, longest_reply
from model import VideoLM


def numbered(texts: Iterable[str]) -> str:
    """An answer of several lines, numbered from 1"""
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))


def lines(answer: str) -> list[str]:
    """The lines of an answer in lower case, without numbers and full stops; [""] if it has none"""
    found = []
    for line in answer.split("\n"):
        text = re.sub(r"^\d+[.)](\s+|$)", "", line.strip()).lower().removesuffix(".")
        if text:
            found.append(text)
    return found or [""]


def true_answers(tokenizer: Tokenizer, samples: list[Sample]) -> list[str]:
    """The last reply of each sample, after a tokenizer round trip"""
    return [tokenizer.decode(tokenizer.encode(sample.turns[-1].text)) for sample in samples]


def edit_distance(a: Sequence, b: Sequence) -> int:
    """How many items to put in, leave out or replace to turn one sequence into the other."""
    row = list(range(len(b) + 1))  # distances of the first i items of a to each beginning of b
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            best = min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
            corner, row[j] = row[j], best
    return row[-1]


@cache
def nearest(text: str, known: tuple[str, ...]) -> str:
    """The known text of least edit distance, the first of equally near ones.

    As `edit_distance`, for all known texts at once: (n, longest + 1) rows instead of one.
    """
    longest = max(map(len, known))
    padded = [other.ljust(longest, "\0") for other in known]
    codes = np.array([[ord(c) for c in other] for other in padded])  # (n, longest)
    place = np.arange(longest + 1)
    row = np.tile(place, (len(known), 1))
    for c in text:
        best = row + 1
        best[:, 1:] = np.minimum(best[:, 1:], row[:, :-1] + (codes != ord(c)))
        row = np.minimum.accumulate(best - place, axis=1) + place
    lengths = [len(other) for other in known]
    return known[int(row[range(len(known)), lengths].argmin())]


def top1(said: list[str], true: list[str], known: list[str]) -> dict[str, float]:
    """COIN and keysteps: the share of right lines, over all lines of all answers.

    top1_exact: as they are; a missing line is wrong, as in the paper
    top1_nearest: as the nearest line of any known answer; a missing line is not counted, as in the
    code of VideoLLM-online
    """
    categories = tuple(sorted({line for answer in known for line in lines(answer)}))
    exact, near, total = 0, [], 0
    for mine, answer in zip(said, true, strict=True):
        due = lines(answer)
        total += len(due)
        for line, right in zip(lines(mine), due, strict=False):
            exact += line == right
            near.append(nearest(line, categories) == right)
    return {"top1_exact": exact / total, "top1_nearest": fmean(near)}


def relaxed(said: list[str], true: list[str]) -> dict[str, float]:
    """Questions about images: the share of answers that are the same, or a number within 5 %."""
    pairs = zip(said, true, strict=True)
    return {"relaxed": fmean(relaxed_same(mine, answer) for mine, answer in pairs)}


def relaxed_same(mine: str, answer: str) -> bool:
    mine = mine.strip().lower().rstrip(".%")
    answer = answer.strip().lower().rstrip(".%")
    if mine == answer:
        return True
    try:
        number, right = float(mine.replace(",", "")), float(answer.replace(",", ""))
    except ValueError:
        return False
    return math.isfinite(right) and abs(number - right) <= 0.05 * abs(right)


# --- forecasts ----------------------------------------------------------------------------------


def actions(answer: str) -> list[tuple[str, str]]:
    """The verb and the noun of each line: its first word, and the others"""
    found = []
    for line in lines(answer):
        verb, _, noun = line.partition(" ")
        found.append((verb, noun))
    return found


def by_part(found: list[tuple[str, str]]) -> dict[str, list]:
    """What each score compares"""
    return {
        "ed_verb": [verb for verb, _ in found],
        "ed_noun": [noun for _, noun in found],
        "ed_action": found,
    }


def forecast(candidates: list[list[str]], true: list[str], known: list[str]) -> dict[str, float]:
    """ED@Z of Ego4D: edit distance to the Z true actions, over Z, least of the candidates.

    A word counts as the nearest known one. An answer of fewer than Z lines goes on with its last,
    one of more is cut.
    """
    every = by_part([action for answer in known for action in actions(answer)])
    verbs = tuple(sorted(set(every["ed_verb"])))
    nouns = tuple(sorted(set(every["ed_noun"])))
    distances = {part: [] for part in every}
    for answers, right in zip(candidates, true, strict=True):
        goal = actions(right)
        tried = []
        for answer in answers:
            mine = []
            for verb, noun in actions(answer):
                mine.append((nearest(verb, verbs), nearest(noun, nouns)))
            mine += mine[-1:] * len(goal)
            tried.append(by_part(mine[: len(goal)]))
        for part, due in by_part(goal).items():
            least = min(edit_distance(attempt[part], due) for attempt in tried)
            distances[part].append(least / len(goal))
    return {part: fmean(values) for part, values in distances.items()}


class Sampler(Watcher):
    """A watcher that draws what it says from the model's probabilities."""

    def __init__(
        self,
        model: VideoLM,
        tokenizer: Tokenizer,
        seed: Tensor,
        generator: torch.Generator,
        limit: int,
    ) -> None:
        super().__init__(model, tokenizer, seed, limit=limit)
        self.generator = generator

    def choose(self, logits: Tensor) -> Tensor:
        """(B, vocabulary) -> (B,) int64 on the host"""
        share = logits.softmax(-1).cpu()
        return torch.multinomial(share, 1, generator=self.generator)[:, 0]


def draw_candidates(
    model: VideoLM,
    tokenizer: Tokenizer,
    samples: list[Sample],
    said: list[str],
    drawn: int = 4,
) -> list[list[str]]:
    """The greedy answer to each sample and some drawn ones, the same in each run"""
    candidates, limit = [[answer] for answer in said], longest_reply(tokenizer, samples)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(samples), 8):
        asked = [sample for sample in samples[first : first + 8] for _ in range(drawn)]
        seed = torch.tensor([sample.seed for sample in asked])
        answers = Sampler(model, tokenizer, seed, generator, limit).ask(asked)
        for place, answer in enumerate(answers):
            candidates[first + place // drawn].append(answer)
    return candidates
