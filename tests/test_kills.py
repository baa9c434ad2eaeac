"""A run killed at any moment, inside a save too, can be loaded, goes on, and ends in the same bits."""

import os
import subprocess
import sys
import time
from collections import Counter
from random import Random

import pytest
from strategies import keep
from test_resume import log
from test_stops import check_same

import train
from model import load

NEW = ["--steps", "12", "--batch", "1", "--streams", "1", "--save_every", "1"]
FOUND = Counter()  # what kills left behind


def begin(folder, *flags):
    return subprocess.Popen([sys.executable, train.__file__, "--device", "cpu", "--out", folder, *flags],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_until(process, begun):
    while process.poll() is None and not begun():
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody killed, and the seconds that it learnt"""
    folder = tmp_path_factory.mktemp("kills") / "run"
    process = begin(folder, *NEW)
    wait_until(process, lambda: (folder / "log.jsonl").exists())
    began = time.time()
    assert process.wait() == 0
    return folder, (folder / "model.safetensors").stat().st_mtime - began  # what follows writes no checkpoint


def saves(folder):
    return any(folder.glob("*.partial")) or len(list(folder.glob("optimizer-*.safetensors"))) > 1


@pytest.mark.long
@pytest.mark.parametrize("moment", range(30))
def test_a_run_killed_at_any_moment_ends_in_the_bits_of_a_whole_one(whole, tmp_path, moment):
    unhurt, seconds = whole
    random, folder, flags = Random(moment), tmp_path / "run", NEW
    for in_a_save in (True, False):
        lines, process = folder / "log.jsonl", begin(folder, *flags)
        before = lines.stat().st_mtime_ns if lines.exists() else 0
        wait_until(process, lambda f=lines, b=before: f.exists() and f.stat().st_mtime_ns > b)  # it writes
        time.sleep(random.uniform(0, seconds / 2))  # so that there is more to do
        if in_a_save:
            wait_until(process, lambda: saves(folder))
            time.sleep(random.uniform(0, 0.01))
        process.kill()  # SIGKILL
        FOUND["too late"] += process.wait() == 0
        FOUND["in a save"] += in_a_save and saves(folder)  # the second finds what the first left
        FOUND["kills"] += 1
        if (folder / "model.safetensors").exists():
            load(folder)
            flags = ["--resume"]
    assert begin(folder, *flags).wait() == 0
    check_same(unhurt, folder)
    assert log(unhurt) == log(folder)
    assert not list(folder.glob("*.partial")) and len(list(folder.glob("optimizer-*"))) == 1


@pytest.mark.long
def test_some_of_these_kills_fell_into_a_save():
    if FOUND["kills"] < 60:
        pytest.skip("only some of the moments were run")
    kills = FOUND["kills"] - FOUND["too late"]
    assert kills >= 50 and FOUND["in a save"] >= 10
    keep("SIGKILLs while training", f"{kills} in 30 runs, {FOUND['in a save']} of them inside a save: each "
         "can be loaded, goes on, and ends in the same bits of weights and log")
