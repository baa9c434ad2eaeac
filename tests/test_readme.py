"""The README and the docstrings say what is so."""

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
EXTRAS = (ROOT / "extras").is_dir()
MAPS = README + ((ROOT / "extras" / "README.md").read_text() if EXTRAS else "")
CORE = ("mod", "model", "data", "eval", "train")
MAP = re.findall(r"^\| ((?:Eq\.|Sections?|Table) [^,|]+|[\w ]+ of gamma-MoD), [^|]*\| `(\w+)\.(\w+)` "
                 r"\| `(tests/[\w/]+\.py)` \|$", MAPS, re.M)


def tags(module: str) -> list[tuple[str, str]]:
    """What the docstrings of a module name of the papers: where, function"""
    said = []
    for name, thing in inspect.getmembers(importlib.import_module(module)):
        if getattr(thing, "__module__", None) == module:
            for where in re.findall(r" {4}(\S.+ of \S+-MoD)", inspect.getdoc(thing) or ""):
                said.append((where.removesuffix(" of VideoLLM-MoD"), name))
    return said


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 180


def test_the_rows_of_the_paper_map_are_the_equations_that_the_docstrings_name():
    said = [(where, module, name) for module in CORE for where, name in tags(module)]
    if EXTRAS:
        said += [(where, "cost", name) for where, name in tags("extras.cost")]
    rows = [(where, module, name) for where, module, name, _ in MAP]
    assert sorted(said) == sorted(rows) and len(MAP) >= 12


def test_every_name_path_and_flag_in_the_readme_exists():
    for module, name in re.findall(r"`(mod|model|data|eval|train)\.(\w+)`", README):
        assert name in ("py", "safetensors", "json") or hasattr(importlib.import_module(module), name)
    for path in re.findall(r"`(tests/[\w/]+\.py)`|\(((?:assets|results|extras)/[\w.]+)\)", README):
        path = ROOT / "".join(path)
        assert path.is_file() or (not EXTRAS and "extras" in path.parts)
    tests = "".join(file.read_text() for file in ROOT.glob("tests/*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", README))
    configs = {"train.py": train.TrainConfig, "eval.py": evaluation.EvalConfig}
    known = {f"--{f.name}" for config in configs.values() for f in fields(config)}
    assert set(re.findall(r"`?(--\w+)", README)) <= known
    for name, rest in re.findall(r"python (train\.py|eval\.py)([^\n`]*)", README):
        assert set(re.findall(r"--\w+", rest)) <= {f"--{f.name}" for f in fields(configs[name])}
    plans = README.split("| `--plan` |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z][\w-]+)`", plans)) == {"arank", *mod.PLACEMENTS}


def test_the_loop_in_the_readme_is_that_of_the_definition():
    shown = README.split("```python\n")[1].split("```")[0]
    source = inspect.getsource(mod.routed_layer)
    for line in shown.splitlines():
        code = line.split("  #")[0].strip().replace("for t in tokens", "for t in range(len(x))")
        code = code.replace("for g in groups:", "for g in set(group) - {-1}:")
        assert code in source.replace(" if keep_ratio < 1 else 1.0", ""), code


def test_ci_runs_the_readmes_own_test_command():
    command = re.search(r"pip install (.*) && (python -m pytest)$", README, re.M)
    assert f"{command[1]} && {command[2]}" in (ROOT / ".ci" / "run").read_text()


def test_the_flags_that_people_rely_on_keep_their_names():
    flags = {f.name for f in fields(train.TrainConfig)}
    assert flags >= {"out", "steps", "seed", "batch", "device", "preset", "plan", "keep", "router", "gate", "masked",
                     "data", "task", "init", "resume", "compile"}
    assert {f.name for f in fields(evaluation.EvalConfig)} >= {"run", "watch", "arank"}


@pytest.mark.parametrize("main", [train.main, evaluation.main])
def test_help_fits_a_terminal(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
