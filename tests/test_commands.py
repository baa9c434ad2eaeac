"""The commands of the READMEs run, from top to bottom, with few steps, small clips and models.

All but pytest, torchrun (test_distributed.py), the loops, and what a sweep trains (test_tables.py).
"""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
from strategies import annotate, make_video

import eval as evaluation
import train

ROOT = Path(__file__).parents[1]
PLACES = {"LLAMA": str(ROOT / "tests/fixtures/smollm2"), "SIGLIP": str(ROOT / "tests/fixtures/siglip"),
          "DIR": "clips", "NAME": "forecast", "N": "1", "[RUN]": "", "FILE": "page.html"}
FEW = {"train.py": ["--steps", "1", "--streams", "1", "--device", "cpu"], "eval.py": ["--device", "cpu"]}


def commands() -> list[list[str]]:
    """script and flags of all that a README tells to type, each once"""
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "results/README.md"))
    text = re.sub(r"```bash\n(for .*?done\n.*?)```", "", text, flags=re.DOTALL)  # loops over the same
    found = re.findall(r"^(?:pip .*&& )?python ((?:train|eval)\.py.*)$|`python\s((?:train|eval)\.py[^`]*)`",
                       text.replace("\\\n", " "), re.M)
    lines = dict.fromkeys("".join(pair).replace("\n", " ") for pair in found)
    words = map(shlex.split, lines)
    return [[PLACES.get(word, word.replace("DIR/", "clips/")) for word in line] for line in words]


def test_every_command_of_the_readmes_runs(tmp_path, monkeypatch):
    if not importlib.util.find_spec("tokenizers") or not shutil.which("ffmpeg"):
        pytest.skip("some need the package tokenizers and the program ffmpeg")
    monkeypatch.chdir(tmp_path)
    for part in ("results", "assets"):
        shutil.copytree(ROOT / part, part)
    shutil.copy(ROOT / "README.md", ".")
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "eval.py"))  # what is written stays here
    (tmp_path / "clips").mkdir()
    make_video(tmp_path / "clips" / "bikes.mp4", 2, 10)
    annotate(tmp_path / "clips", {"video": "bikes.mp4", "conversation": [
        {"time": 0.0, "role": "user", "content": "Narrate."},
        {"time": 1.0, "role": "assistant", "content": "A taxi passes."}]})
    monkeypatch.setitem(evaluation.PROFILES, "tiny", ([(1, 2, 1)], [(1, 2)], [1], [8], [1]))
    monkeypatch.setitem(evaluation.PROFILES, "llama3-8b", ([], [], [], [], []))  # counted in test_speed.py
    monkeypatch.setattr(train, "sweep", lambda *asked: None)
    asked = commands()
    assert len(asked) >= 12 and {"--sweep", "--profile", "--table", "--flops", "--watch"} <= {
        flag for command in asked for flag in command}
    for script, *flags in asked:
        main = {"train.py": train.main, "eval.py": evaluation.main}[script]
        few = [] if "--sweep" in flags else FEW[script]
        main([flag for flag in flags if flag] + few)
