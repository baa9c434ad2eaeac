"""The README, the docstrings and the line budgets say what is so."""

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import eval as evaluation
import mod
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BUDGETS = {"README.md": 260, "mod.py": 280, "model.py": 942, "data.py": 884, "train.py": 598, "eval.py": 1240}
MAP = re.findall(r"^\| ((?:Eq\.|Sections?|Table) [^,|]+|[\w ]+ of gamma-MoD), [^|]*\| `(\w+)\.(\w+)` "
                 r"\| `tests/\w+\.py` \|$", README, re.M)


def test_every_file_keeps_its_line_budget_and_its_width():
    for name, most in BUDGETS.items():
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) <= most, f"{name} has {len(lines)} lines, its budget is {most}"
        assert name.endswith(".md") or max(map(len, lines)) <= 110
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob("tests/*.py")) <= 3684
    assert {path.name for path in ROOT.glob("*.py")} == {name for name in BUDGETS if name.endswith(".py")}


def test_the_rows_of_the_paper_map_are_the_equations_that_the_docstrings_name():
    said = []
    for module in ("mod", "model", "data", "eval", "train"):
        for name, thing in inspect.getmembers(importlib.import_module(module)):
            if getattr(thing, "__module__", None) == module:
                for where in re.findall(r" {4}(\S.+ of \S+-MoD)", inspect.getdoc(thing) or ""):
                    said.append((where.removesuffix(" of VideoLLM-MoD"), module, name))
    assert sorted(said) == sorted(MAP) and len(MAP) >= 12


def test_every_name_command_and_flag_in_the_readme_exists():
    for module, name in re.findall(r"`(mod|model|data|eval|train)\.(\w+)`", README):
        assert name in ("py", "safetensors", "json") or hasattr(importlib.import_module(module), name)
    for path in re.findall(r"`(tests/\w+\.py)`|\((assets/[\w.]+)\)", README):
        assert (ROOT / "".join(path)).is_file()
    configs = {"train.py": train.Command, "eval.py": evaluation.EvalConfig}
    known = {f"--{f.name}" for config in configs.values() for f in fields(config)}
    assert set(re.findall(r"`?(--\w+)", README)) <= known | {"--nproc_per_node"}  # of torchrun
    for name, rest in re.findall(r"python (train\.py|eval\.py)([^\n`]*)", README):
        assert set(re.findall(r"--\w+", rest)) <= {f"--{f.name}" for f in fields(configs[name])}
    plans = README.split("| `--plan` |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z][\w-]+)`", plans)) == {"arank", *mod.PLACEMENTS}


def test_the_tables_are_those_of_the_json_and_each_json_has_one():
    pages = README, (ROOT / "results" / "README.md").read_text()
    assert all(page == evaluation.render(page, ROOT / "results") for page in pages)
    shown = {found[1] for page in pages for found in evaluation.MARKED.findall(page)}
    assert shown == {file.name for file in (ROOT / "results").glob("*.json")}
    assert all(page.count("<!-- table") == len(evaluation.MARKED.findall(page)) for page in pages)


def test_ci_runs_the_readmes_own_test_command():
    command = re.search(r"pip install (.*) && (python -m pytest)$", README, re.M)
    assert f"{command[1]} && {command[2]}" in (ROOT / ".ci" / "run").read_text()


def test_the_flags_that_people_rely_on_keep_their_names():
    flags = {f.name for f in fields(train.TrainConfig)}
    assert flags >= {"out", "steps", "seed", "batch", "device", "preset", "plan", "keep", "router", "gate",
                     "data", "task", "init", "resume", "compile"}
    assert {f.name for f in fields(evaluation.EvalConfig)} >= {"run", "watch", "flops", "arank", "table"}


@pytest.mark.parametrize("main", [train.main, evaluation.main])
def test_help_fits_a_terminal(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_modules_import_each_other_in_one_direction():
    allowed = {"mod": set(), "data": set(), "model": {"mod"}, "eval": {"mod", "model", "data"},
               "train": {"mod", "model", "data", "eval"}}
    for name, others in allowed.items():
        source = (ROOT / f"{name}.py").read_text()
        assert set(re.findall(r"^(?:from|import) (mod|model|data|eval|train)\b", source, re.M)) <= others
