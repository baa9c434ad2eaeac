"""The benchmarks of the papers, read from their own annotation files.

    python train.py --task NAME --data DIR
    python -m extras.benchmarks    show this

task       files in DIR, beside the videos       videos           score
ego4d      all_narrations_redacted.json, lists:  <uid>.mp4        streaming
           *_val.json, *_test*.json
lta        fho_lta_taxonomy.json,                <video_uid>.mp4  edit distance
           fho_lta_train.json, fho_lta_val.json
coin-step  COIN.json                             <id>.mp4         top-1
coin-next, coin-task, coin-procedure, coin-goal: the same file and score
keystep    keystep_train.json, keystep_val.json  <take_name>.mp4  top-1
llava      train.json and val.json, or *.json    its images       relaxed

Clips whose video is missing are left out and counted. Without DIR there are
three worlds that stand in for them: scene, forecast, summary (worlds.py).
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from data import Clip, Clips, Sample, Tokenizer, Turn, check_entry, frame_index, parse_json, replies
from extras import worlds
from extras.scores import draw_candidates, forecast, numbered, relaxed, top1, true_answers
from model import VideoLM, parse, run_main


class Benchmark(Clips):
    """Clips to learn from and held-out clips, from the annotation files of a benchmark."""

    kind = "held-out clips"
    folder: Path
    # folder, "train" or "val" -> each clip of the split, in the format of data.check_entry
    entries: ClassVar[Callable[[Path, str], Iterator[dict]]]

    @classmethod
    def open(cls, folder: str, fps: float, partial: bool, size: int) -> "Benchmark":
        if not folder:
            raise ValueError(
                f"data must name a folder of the benchmark for the task {cls.task}, got none"
            )
        train, tested = cls.read(Path(folder), "train"), cls.read(Path(folder), "val")
        source = cls(train, size, fps, partial, tested)
        source.folder = Path(folder)
        return source

    @classmethod
    def read(cls, folder: Path, split: str) -> list[Clip]:
        """The clips of a split that have their video."""
        try:
            entries = []
            for entry in cls.entries(folder, split):
                where = f"{folder}, {cls.task} {split}, {str(entry['video'])[:60]}:"
                entries.append((entry, where))
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            if str(error).startswith(str(folder)):  # it names the file already
                raise
            raise ValueError(
                f"{folder} must hold annotations of {cls.task}, got {error!r}"
            ) from None
        clips = [check_entry(entry, where, folder) for entry, where in entries]
        found = [clip for clip in clips if clip.video.is_file()]
        if not any(replies(clip) for clip in found):
            raise ValueError(
                f"{folder} must hold clips and replies ({cls.task}, {split}), "
                f"got {len(found)} clips of {len(clips)}"
            )
        if len(found) < len(clips):
            print(f"{folder}: {len(clips) - len(found)} of {len(clips)} clips lack their video")
        return found

    def answers(self) -> list[str]:
        """All answers of the held-out clips"""
        return [turn["content"] for clip in self.tested for turn in replies(clip)]


def read_annotations(file: Path) -> object:
    """JSON in which a missing key is a ValueError that names the file and the key."""

    class Record(dict):
        def __missing__(self, key: str) -> None:
            there = str(list(self))[:60]
            raise ValueError(f"{file} must have {key!r} where it has {there}, got none")

    return parse_json(file.read_bytes(), str(file), object_hook=Record)


def sentence(text: str) -> str:
    text = " ".join(text.split()).rstrip(". ")
    return f"{text[:1].upper()}{text[1:]}."


def question_of_span(video: str, start: float, end: float, question: str, answer: str) -> dict:
    """An entry: a question before the first frame of a span, its answer at the last"""
    asked = {"time": start, "role": "user", "content": question}
    said = {"time": end, "role": "assistant", "content": answer}
    return {"video": f"{video}.mp4", "start": start, "end": end, "conversation": [asked, said]}


# --- narration ----------------------------------------------------------------------------------


class Ego4D(Benchmark):
    """Ego4D narrations, a stream of each video and annotator.

    val: the videos in any *_val.json of a benchmark; those in any *_test*.json are in neither
    Times are on a grid of 0.5 s, where the later of two texts replaces the earlier. The first ten
    minutes of a video are used.
    """

    task = "ego4d"
    query = (
        "Narrate what happens, as it happens. "
        "Call who wears the camera C, and others by letters."
    )

    @classmethod
    def entries(cls, folder: Path, split: str) -> Iterator[dict]:
        val, test = listed_videos(folder, "*_val.json"), listed_videos(folder, "*_test*.json")
        file = folder / "all_narrations_redacted.json"
        for uid, video in read_annotations(file)["videos"].items():
            of = "val" if uid in val else "test" if uid in test else "train"
            if of != split:
                continue
            for said in narrations(video).values():
                turns = [{"time": 0, "role": "user", "content": cls.query}]
                for time, text in said.items():
                    if text != turns[-1]["content"]:
                        turns.append({"time": time, "role": "assistant", "content": text})
                end = turns[-1]["time"]
                yield {"video": f"{uid}.mp4", "end": end, "conversation": turns}

    def turns(self, clip: Clip, frames: int) -> list[Turn]:
        """As in data.py, but what is narrated after the end of the file is left out."""
        last = frames - 1
        told = [turn for turn in clip.turns if frame_index(turn["time"], self.fps) <= last]
        return super().turns(clip._replace(turns=told), frames)


def listed_videos(folder: Path, lists: str) -> set[str]:
    """The videos in files of these names"""
    found = set()
    for file in folder.glob(lists):
        found.update(re.findall(r'"video_uid"\s*:\s*"([^"]+)"', file.read_text()))
    return found


def narrations(video: dict) -> dict[str, dict[float, str]]:
    """annotator -> time -> text, cleaned of the tags #C (the wearer), #O and #unsure"""
    said: dict[str, dict[float, str]] = defaultdict(dict)
    for narration in sorted(video["narrations"], key=lambda narration: narration["time"]):
        text = re.sub(r"#(C|O|unsure)?|@c", "", narration["text"], flags=re.IGNORECASE)
        text = text.strip(" .,\n")
        if len(text.split()) >= 2 and narration["time"] <= 600:
            time = frame_index(narration["time"], 2) / 2
            said[narration["_annotation_uid"]][time] = sentence(text)
    return said


# --- long-term anticipation ---------------------------------------------------------------------


def taxonomy(folder: Path) -> tuple[list[str], list[str]]:
    """Ego4D's verbs, of one word each, and its nouns"""
    words = read_annotations(folder / "fho_lta_taxonomy.json")
    verbs = [name.replace("_", "-") for name in short_names(words["verbs"])]
    nouns = [name.replace("_", " ") for name in short_names(words["nouns"])]
    return verbs, nouns


def short_names(words: list[str]) -> list[str]:
    """What stands before "_(" in each, unless two are then alike"""
    short = [word.split("_(")[0] for word in words]
    return [s if short.count(s) == 1 else word for s, word in zip(short, words, strict=True)]


class LTA(Benchmark):
    """Ego4D long-term anticipation: eight actions are seen, the next 20 are listed."""

    task, asks = "lta", True

    @classmethod
    def entries(cls, folder: Path, split: str) -> Iterator[dict]:
        question = "Eight actions are seen. List the 20 that follow, each as a verb and a noun."
        verbs, nouns = taxonomy(folder)
        clips = defaultdict(list)
        for action in read_annotations(folder / f"fho_lta_{split}.json")["clips"]:
            clips[action["clip_uid"]].append(action)
        for actions in clips.values():
            actions.sort(key=lambda action: action["action_idx"])
            names = []
            for action in actions:
                verb, noun = verbs[action["verb_label"]], nouns[action["noun_label"]]
                names.append(sentence(f"{verb} {noun}"))
            for i in range(len(actions) - 27):
                first, eighth = actions[i], actions[i + 7]
                began = first["clip_parent_start_sec"]
                start = began + first["action_clip_start_sec"]
                end = began + eighth["action_clip_end_sec"]
                answer = numbered(names[i + 8 : i + 28])
                yield question_of_span(first["video_uid"], start, end, question, answer)

    def answers(self) -> list[str]:
        """Actions that have every word of the taxonomy"""
        verbs, nouns = taxonomy(self.folder)
        with_verbs = [f"{verb} {nouns[0]}" for verb in verbs]
        return with_verbs + [f"{verbs[0]} {noun}" for noun in nouns]

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        """Edit distances of the best of five candidates, one greedy and four drawn"""
        candidates = draw_candidates(model, tokenizer, samples, said)
        return forecast(candidates, true_answers(tokenizer, samples), self.answers())


# --- steps --------------------------------------------------------------------------------------


class Steps(Benchmark):
    """Benchmarks whose answers are lines of a closed set."""

    asks = True

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        """Top-1 accuracy"""
        return top1(said, true_answers(tokenizer, samples), self.answers())


class Keystep(Steps):
    """Ego-Exo4D fine-grained keysteps: name the step of each segment.

    The papers do not say how they ask. Assumed: a segment is a clip, its step_name the answer. A
    take has one video per camera; link or copy the one to watch to <take_name>.mp4.
    """

    task = "keystep"

    @classmethod
    def entries(cls, folder: Path, split: str) -> Iterator[dict]:
        takes = read_annotations(folder / f"keystep_{split}.json")["annotations"]
        for take in takes.values():
            for segment in take["segments"]:
                start, end = segment["start_time"], segment["end_time"]
                answer = sentence(segment["step_name"])
                yield question_of_span(
                    take["take_name"], start, end, "Which step is this?", answer
                )


CAMEL = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"  # between words, as in ReplaceCDDrive


class Coin(Steps):
    """COIN: name the step, the next step or the task, or list up to five steps to come."""

    @classmethod
    def entries(cls, folder: Path, split: str) -> Iterator[dict]:
        for name, video in read_annotations(folder / "COIN.json")["database"].items():
            if (video["subset"] == "training") == (split == "train"):
                for start, end, question, answer in cls.questions(video)[cls.task]:
                    yield question_of_span(name, start, end, question, answer)

    @classmethod
    def questions(cls, video: dict) -> dict[str, list[tuple]]:
        """task -> (start, end, question, answer) of each clip of a video"""
        asked = defaultdict(list)
        goal = sentence(re.sub(CAMEL, " ", video["class"]))
        asked["coin-task"].append((video["start"], video["end"], "What is the task?", goal))
        more = "What are the next steps, five at most?"
        steps = []
        for step in video["annotation"]:
            start, end = step["segment"]
            steps.append((start, end, sentence(step["label"])))
        for i, (start, end, label) in enumerate(steps):
            asked["coin-step"].append((start, end, "What is being done?", label))
            after = [later for _, _, later in steps[i + 1 : i + 6]]
            if after:
                listed = numbered(after)
                asked["coin-next"].append((start, end, "What is the next step?", after[0]))
                asked["coin-procedure"].append((start, end, more, listed))
                asked["coin-goal"].append((start, end, f"The task is: {goal} {more}", listed))
        return asked


class CoinStep(Coin):
    task = "coin-step"


class CoinNext(Coin):
    task = "coin-next"


class CoinTask(Coin):
    task = "coin-task"


class CoinProcedure(Coin):
    task = "coin-procedure"


class CoinGoal(Coin):
    task = "coin-goal"


# --- images -------------------------------------------------------------------------------------


class Llava(Benchmark):
    """Image instructions of LLaVA: questions after the image.

    Without val.json, every twentieth image is val. Entries without an image are left out, and so
    are turns that are no pair of a question and an answer.
    """

    task, asks = "llava", True

    @classmethod
    def entries(cls, folder: Path, split: str) -> Iterator[dict]:
        whole = not (folder / "val.json").exists()
        files = sorted(folder.glob("*.json")) if whole else [folder / f"{split}.json"]
        for file in files:
            for entry in read_annotations(file):
                if "image" not in entry:
                    continue
                image = entry["image"]
                is_val = zlib.crc32(str(image).encode()) % 20 == 0
                if whole and is_val != (split == "val"):
                    continue
                turns = question_pairs(entry["conversations"])
                if turns:
                    yield {"video": image, "end": 0, "conversation": turns}

    def score(
        self, model: VideoLM, tokenizer: Tokenizer, samples: list[Sample], said: list[str]
    ) -> dict[str, float]:
        """Relaxed accuracy"""
        return relaxed(said, true_answers(tokenizer, samples))


def question_pairs(conversation: list[dict]) -> list[dict]:
    """Untimed turns: each question of the human that the model answers, and the answer"""
    said = []
    for turn in conversation:
        said.append((turn["from"], turn["value"].replace("<image>", "").strip()))
    turns = []
    for (asks, question), (tells, answer) in pairwise(said):
        if (asks, tells) == ("human", "gpt") and question and answer:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
    return turns


COIN = (CoinStep, CoinNext, CoinTask, CoinProcedure, CoinGoal)
TASKS = worlds.TASKS | {source.task: source for source in (Ego4D, LTA, *COIN, Keystep, Llava)}


@dataclass(frozen=True)
class NoFlags:
    """This command has no flags."""


def main(argv: list[str] | None = None) -> None:
    parse(NoFlags, argv, __doc__)
    print(__doc__)


if __name__ == "__main__":
    run_main(main)
