"""A run killed at any moment, inside a save too, can be loaded, goes on, and ends in the same bits."""

import os
import subprocess
import sys
import time
from collections import Counter
from random import Random

import pytest
from test_resume import log
from test_stops import check_same

import train
from model import load

NEW = ["--steps", "12", "--batch", "1", "--streams", "1", "--save_every", "1", "--warmup", "2"]
FOUND = Counter()  # what kills left behind


def begin(folder, *flags):
    return subprocess.Popen([sys.executable, train.__file__, "--device", "cpu", "--out", folder, *flags],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody killed, and the seconds that it wrote into its folder"""
    folder = tmp_path_factory.mktemp("kills") / "run"
    process = begin(folder, *NEW)
    while not (folder / "train.json").exists():
        time.sleep(0.01)
    began = time.monotonic()
    assert process.wait() == 0
    return folder, time.monotonic() - began


@pytest.mark.long
@pytest.mark.parametrize("moment", range(30))
def test_a_run_killed_at_any_moment_ends_in_the_bits_of_a_whole_one(whole, tmp_path, moment):
    unhurt, seconds = whole
    random, folder, flags = Random(moment), tmp_path / "run", NEW
    for _ in range(2):
        process = begin(folder, *flags)
        while process.poll() is None and not (folder / "train.json").exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, seconds) + 3 * (flags != NEW))  # to go on, it first has to start again
        process.kill()  # SIGKILL
        process.wait()
        FOUND["partial"] += any(folder.glob("*.partial"))
        FOUND["two optimizers"] += len(list(folder.glob("optimizer-*.safetensors"))) > 1
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
    print(f"{FOUND['kills']} kills, {FOUND['partial']} while a file was written, "
          f"{FOUND['two optimizers']} between two files of a checkpoint")
    assert FOUND["kills"] == 60 and FOUND["partial"] + FOUND["two optimizers"] >= 5
