"""Whatever stops a run ends in one sentence, and leaves the last good state whole."""

import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from test_resume import SMALL, log

import model as models
import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops") / "run"
    train.main(["--out", str(folder), "--steps", "5", *SMALL])
    return folder


def check_same(a, b):
    a, b = a / "model.safetensors", b / "model.safetensors"
    (a, at), (b, bt) = models.read_weights(a), models.read_weights(b)
    assert at == bt and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("term", ["streaming loss", "routing loss", "gradient"])
def test_what_is_no_number_stops_before_the_update_and_is_named(whole, tmp_path, monkeypatch, term):
    step, folder = 3, tmp_path / "run"
    original = train.train_step

    def spoilt(loss_of, model, *args, **how):
        def wrong(*given):
            terms = loss_of(*given)
            if term == "gradient":  # of a weight alone
                return terms + 0 * (model.norm.weight - model.norm.weight.detach()).abs().sqrt().sum()
            return terms * torch.tensor([1.0, torch.nan] if term == "routing loss" else [torch.inf, 1.0])

        return original(wrong if args[-1] == step else loss_of, model, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", spoilt)
        with pytest.raises(ValueError, match=rf"^{term} must stay finite, got (nan|inf) at step 3; "):
            train.main(["--out", str(folder), "--steps", "5", *SMALL])
    assert models.read_weights(folder / "model.safetensors")[1] == step and len(log(folder)) == step
    train.main(["--out", str(folder), "--resume", "--device", "cpu"])
    check_same(whole, folder)
    assert log(whole) == log(folder)


def test_a_second_training_in_a_folder_is_refused_while_the_first_one_lives(whole):
    with train.alone(whole), pytest.raises(ValueError, match=r"in which no other process trains, got .*run"):
        train.main(["--out", str(whole), "--resume", "--device", "cpu"])
    train.main(["--out", str(whole), "--resume", "--device", "cpu"])  # the lock went with its holder


@pytest.mark.parametrize(("file", "less"), [("optimizer-5.safetensors", 9), ("log.jsonl", 99)])
def test_a_full_disk_ends_in_a_sentence_and_keeps_the_last_checkpoint(
        whole, tmp_path, monkeypatch, file, less):
    """A limit on the size of a file stands for the disk: to write more fails in the same way."""
    folder, most = tmp_path / "run", (whole / file).stat().st_size - less
    stop_before(3, monkeypatch, ["--out", str(folder), "--steps", "5", *SMALL])
    ended = subprocess.run(
        [sys.executable, train.__file__, "--out", str(folder), "--resume"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY)))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert re.search(r"^train\.py: error: .*File too large", ended.stderr.splitlines()[-1])
    assert models.read_weights(folder / "model.safetensors")[1] in (2, 4)
    assert not list(folder.glob("*.partial"))
    train.main(["--out", str(folder), "--resume", "--device", "cpu"])
    check_same(whole, folder)
    assert log(whole) == log(folder)


def stop_before(step, monkeypatch, argv):
    original = train.train_step

    def stop(*args, **how):
        if args[-1] == step:
            raise KeyboardInterrupt
        return original(*args, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stop)
        train.main(argv)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_refused_in_a_sentence(whole, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"Permission denied: .*run"):
        train.main(["--out", str(tmp_path / "run"), "--steps", "5", *SMALL])
    assert not list(tmp_path.iterdir())
