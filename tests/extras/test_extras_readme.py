"""The READMEs of extras and of the results say what is so, and their commands run."""

import importlib
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from strategies import needs_ffmpeg
from test_commands import FEW, clips, commands

import eval as evaluation
import train
from extras import page, pretrained, real, speed, sweep, tables
from model import run_main

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "extras" / "fixtures"
PAGES = ("README.md", "extras/README.md", "results/README.md")
JOBS = ("pretrained", "distributed", "benchmarks", "worlds", "sweep", "tables", "cost", "speed", "page",
        "smollm2", "dinov2", "measured", "real")
PLACES = {"LLAMA": str(FIXTURES / "smollm2"), "SIGLIP": str(FIXTURES / "siglip"), "DIR": "clips",
          "FILE": "page.html", "RUN": "out/own-mod", "NAME": "scene", "[RUN]": ""}
SCRIPTS = r"(?:train\.py|eval\.py|-m extras\.\w+)"
ALONE = {f"extras.{name}" for name in ("benchmarks", "worlds", "tables", "cost", "speed")}  # need no flags
assert clips  # a fixture


def test_the_tables_are_those_of_the_json_and_each_json_has_one():
    pages = [(ROOT / name).read_text() for name in PAGES if name != "extras/README.md"]
    assert all(text == tables.render(text, ROOT / "results") for text in pages)
    shown = {found[1] for text in pages for found in tables.MARKED.findall(text)}
    assert shown == {file.name for file in (ROOT / "results").glob("*.json")}
    assert all(text.count("<!-- table") == len(tables.MARKED.findall(text)) for text in pages)


def test_no_table_of_the_readme_is_wider_than_six_columns():
    text = (ROOT / "README.md").read_text()
    assert max(line.count("|") - 1 for line in text.splitlines() if line.startswith("|")) <= 6


def test_each_file_of_extras_has_its_line():
    text = (ROOT / "extras" / "README.md").read_text()
    named = set(re.findall(r"`(\w+\.py)`", text.split("\n## ")[0]))
    assert named == {file.name for file in (ROOT / "extras").glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("name", JOBS)
def test_each_job_has_a_help_that_fits_a_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"extras.{name}").main(["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80, max(printed.splitlines(), key=len)


def test_a_mistake_in_extras_is_a_sentence_too(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrained.py"])
    with pytest.raises(SystemExit) as ended:
        run_main(lambda _: pretrained.main(["--lora_rank", "-1"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "pretrained.py: error: lora_rank must be at least 0 and below 2**31, got -1\n"


def test_every_flag_in_the_readmes_of_extras_exists():
    kinds = (train.TrainConfig, evaluation.EvalConfig, pretrained.PretrainedFlags, sweep.SweepConfig,
             tables.TablesConfig, speed.SpeedConfig, page.PageConfig, real.RealConfig)
    known = {f"--{f.name}" for kind in kinds for f in fields(kind)} | {"--shard", "--nproc_per_node"}
    known |= {"--local", "--no"}  # hf download --local-dir, pip install --no-deps
    for name in PAGES:
        assert set(re.findall(r"(?<![-!<])--\w+", (ROOT / name).read_text())) <= known


@needs_ffmpeg
def test_every_command_of_extras_runs(clips, monkeypatch):
    pytest.importorskip("tokenizers", reason="pretrained folders have a tokenizer.json")
    for part in ("results", "assets"):
        shutil.copytree(ROOT / part, part)
    shutil.copy(ROOT / "README.md", ".")
    monkeypatch.setattr(tables, "ROOT", Path.cwd())  # what is written stays here
    monkeypatch.setitem(speed.PLANS, "tiny", speed.Plan([(1, 2, 1)], [(1, 2)], [1], [8], [1]))
    monkeypatch.setitem(speed.PLANS, "llama3-8b", speed.Plan([], [], [], [], []))  # see test_speed.py
    monkeypatch.setattr(sweep.Sweep, "train", lambda self, seeds: self.folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(sweep, "collect", lambda folder: [])
    monkeypatch.setattr(evaluation.Watcher.__init__, "__defaults__", (0.0, 0, 5))  # 5 tokens a reply
    asked = [command for name in PAGES[1:] for command in commands(name, SCRIPTS, PLACES)]
    assert {command[1] for command in asked if command[0] == "-m"} >= {f"extras.{name}" for name in JOBS[4:]}
    for script, *flags in asked:
        if script == "-m":
            name, *flags = flags
            if (not flags and name not in ALONE) or name == "extras.real":
                continue  # it is named, not typed; see test_real.py
            few = FEW["train.py"] if name == "extras.pretrained" and "--merge" not in flags else []
            importlib.import_module(name).main(flags + few)
        elif not {"scene", "--resume"} & set(flags):  # a benchmark's: see test_benchmarks.py
            main = {"train.py": train.main, "eval.py": evaluation.main}[script]
            main([flag for flag in flags if flag] + FEW[script])
