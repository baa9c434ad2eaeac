"""Whatever stops a run ends in one sentence, and leaves the last good state whole."""

import os
import re
import subprocess
import sys

import pytest
import torch
from test_resume import SMALL, log

import model as models
import train

resource = pytest.importorskip("resource", reason="limits and locks are of POSIX")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops") / "run"
    train.main(["--out", str(folder), "--steps", "5", *SMALL])
    return folder


def check_same(a, b):
    a, b = a / "model.safetensors", b / "model.safetensors"
    (a, at), (b, bt) = models.read_weights(a), models.read_weights(b)
    assert at == bt and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize(("term", "got"), [
    ("streaming loss", r"inf, 0\.0 and nan"), ("routing loss", r"\d\S*, nan and nan"), ("gradient", r"\d\S*, 0\.0 and nan")])
def test_a_term_that_is_no_number_is_told_and_the_last_checkpoint_stays(whole, tmp_path, monkeypatch, term, got):
    folder, original = tmp_path / "run", train.batch_loss
    steps = iter(range(5))

    def spoilt(*given):
        terms, model = original(*given), given[0]
        if next(steps) < 3:
            return terms
        if term == "gradient":  # of a weight alone
            return terms + 0 * (model.norm.weight - model.norm.weight.detach()).abs().sqrt().sum()
        return terms * torch.tensor([1.0, torch.nan] if term == "routing loss" else [torch.inf, 1.0])

    with monkeypatch.context() as patch:
        patch.setattr(train, "batch_loss", spoilt)
        with pytest.raises(ValueError, match=f"^losses and gradient .*finite, got {got} at step 3; .*keeps"):
            train.main(["--out", str(folder), "--steps", "5", *SMALL])
    assert models.read_weights(folder / "model.safetensors")[1] == 2 and len(log(folder)) == 3
    train.main(["--out", str(folder), "--resume", "--device", "cpu"])
    check_same(whole, folder)
    assert log(whole) == log(folder)


def test_a_second_training_in_a_folder_is_refused_while_the_first_one_lives(whole):
    with train.alone(whole), pytest.raises(ValueError, match=r"in which nobody else trains, got .*run"):
        train.main(["--out", str(whole), "--resume", "--device", "cpu"])
    train.main(["--out", str(whole), "--resume", "--device", "cpu"])  # the lock went with its holder


@pytest.mark.parametrize(("file", "less"), [("optimizer-5.safetensors", 9), ("log.jsonl", 99)])
def test_a_full_disk_ends_in_a_sentence_and_keeps_the_last_checkpoint(
        whole, tmp_path, monkeypatch, file, less):
    """A limit on the size of a file stands for the disk: to write more fails in the same way."""
    folder, most = tmp_path / "run", (whole / file).stat().st_size - less
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    stop_before(3, monkeypatch, ["--out", str(folder), "--steps", "5", *SMALL])
    ended = subprocess.run(
        [sys.executable, train.__file__, "--out", str(folder), "--resume", "--device", "cpu"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard)),
        capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert re.search(r"^train\.py: error: .*File too large", ended.stderr.splitlines()[-1])
    assert models.read_weights(folder / "model.safetensors")[1] in (2, 4)
    assert not list(folder.glob("*.partial"))
    train.main(["--out", str(folder), "--resume", "--device", "cpu"])
    check_same(whole, folder)
    assert log(whole) == log(folder)


def test_who_has_had_enough_leaves_no_half_a_file(tmp_path):
    def fill(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.write(tmp_path / "file", fill)
    assert not list(tmp_path.iterdir())


def stop_before(step, monkeypatch, argv):
    original = train.log_step

    def stop(folder, now, *args):
        if now == step:
            raise KeyboardInterrupt
        return original(folder, now, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "log_step", stop)
        train.main(argv)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_refused_in_a_sentence(whole, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"Permission denied: .*run"):
        train.main(["--out", str(tmp_path / "run"), "--steps", "5", *SMALL])
    assert not list(tmp_path.iterdir())
