"""The commands of the README run, from top to bottom, with few steps and small clips."""

import re
import shlex
from pathlib import Path

import pytest
from strategies import annotate, make_video, needs_ffmpeg

import eval as evaluation
import train

ROOT = Path(__file__).parents[1]
FEW = {"train.py": ["--steps", "1", "--streams", "1", "--device", "cpu"], "eval.py": ["--device", "cpu"]}


def commands(page: str, scripts: str, places: dict[str, str]) -> list[list[str]]:
    """script and flags of all that a page tells to type, each once"""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(rf"^(?:pip .*&& )?python ({scripts}.*)$|`python\s({scripts}[^`]*)`", text, re.M)
    lines = dict.fromkeys("".join(pair) for pair in found)
    words = map(shlex.split, lines)
    return [[places.get(word, word.replace("DIR/", "clips/")) for word in line] for line in words]


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """A folder with the clip of the README"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    make_video(tmp_path / "clips" / "bikes.mp4", 2, 10)
    annotate(tmp_path / "clips", {"video": "bikes.mp4", "conversation": [
        {"time": 0.0, "role": "user", "content": "Narrate."},
        {"time": 1.0, "role": "assistant", "content": "A taxi passes."}]})


@needs_ffmpeg
def test_every_command_of_the_readme_runs(clips):
    asked = commands("README.md", r"(?:train|eval)\.py", {"DIR": "clips", "[RUN]": ""})
    assert len(asked) >= 5 and {"--watch", "--init", "--data"} <= {flag for command in asked for flag in command}
    for script, *flags in asked:
        main = {"train.py": train.main, "eval.py": evaluation.main}[script]
        main([flag for flag in flags if flag] + FEW[script])
