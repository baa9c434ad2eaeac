"""The experiment on a real decoder: what is measured is what is said, and what is done is not done again."""

import json
import math
import random
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from strategies import tiny

import data
import train
from extras import pretrained, pretrained_model, real, sweep, tables
from extras.measured import one_by_one
from mod import GATES, placement, rank_placement
from model import VideoLM, layer_ranks, load, prepare

FIXTURES, CPU, TOKENIZER = Path(__file__).parent / "fixtures", torch.device("cpu"), data.Tokenizer()
ABOUT = {"weights": {}, "texts": {}, "settings": {"rows": []}, "commit": "first"}
ROWS = """
    converted  --plan dense
    amod       --plan interleaved --router random A-MOD"""


class Child:
    """In place of a process that trains: the same, here and now"""

    def __init__(self, command: list[str], **how) -> None:
        sweep.main(command[3:])

    ends: ClassVar[list] = []  # how a signal to end is answered while it runs
    stopped: ClassVar[list] = []

    def wait(self) -> int:
        self.ends.append(signal.getsignal(signal.SIGTERM))
        return 0

    def terminate(self) -> None:
        self.stopped.append(self)


@pytest.fixture
def here(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    monkeypatch.chdir(tmp_path)
    small = {"SAMPLES": 2, "LENGTH": 16, "SET_SIZES": (1,), "ROWS": ROWS,  # a decoder of two layers
             "ADAPT": "--task narration --batch 1 --steps 1 --streams 6 --adam_lr 0.001"}
    for name, value in small.items():
        monkeypatch.setattr(real, name, value)
    monkeypatch.setattr(pretrained_model, "PretrainedLM", pretrained_model.PretrainedLM)
    monkeypatch.setattr(sweep.core, "VideoLM", sweep.core.VideoLM)
    monkeypatch.setattr(sweep.train, "VideoLM", sweep.train.VideoLM)
    monkeypatch.setattr(data.World, "frames", 2)
    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], 0, "", ""))
    (tmp_path / "decoder").symlink_to(FIXTURES / "smollm2")
    Child.ends.clear()
    Child.stopped.clear()


def test_the_experiment_is_done_piece_by_piece_and_goes_on_where_it_was_cut_off(here, monkeypatch, capsys):
    piece = real.Report.piece

    def cut_off(report, section, name, make):
        if (section, name) == ("sets", "streams, keep 0.2"):
            raise KeyboardInterrupt
        return piece(report, section, name, make)

    argv = ["decoder", "--seeds", "1", "--device", "cpu"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(real.Report, "piece", cut_off)
        real.main(argv)
    before = json.loads(Path("out/real/real.json").read_text())
    assert before.keys() == {"about", "commits", "gates", "runs", "layers", "sets"} and [*before["runs"]] == ["dense-seed0"]
    assert Child.ends == [sweep.leave] and len(Child.stopped) == 1  # its run does not outlive it
    capsys.readouterr()
    real.main(argv)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("gates:", "layers:", "sets:", "runs:"))]
    assert said == ["sets: streams, keep 0.2", "sets: streams, keep 0.5", "runs: converted-seed0", "runs: amod-seed0"]
    tables.main(["out/real"])  # it writes out/real.json
    found = json.loads(Path("out/real/real.json").read_text())
    assert all(before[section].items() <= found[section].items() for section in ("gates", "layers", "sets", "runs"))
    amod, converted = (found["runs"][f"{name}-seed0"] for name in ("amod", "converted"))
    assert {"reply_accuracy_before", "lm_correctness"} <= amod["free_running"].keys() and amod["argv"][0] == "A-MOD"
    assert amod["free_running"]["step_flops"] < 1 == converted["free_running"]["step_flops"]
    assert str(Path.cwd()) not in json.dumps(found)  # no path of a machine
    (row,) = found["sets"]["prose, keep 0.5"]
    assert row.keys() == {"layers", "keep", "dense", *real.orders(found["layers"]["prose"], 0.5, 2, 1)}
    assert load(Path("out/real/amod-seed0")).config.router_norm
    Path("decoder").unlink()
    Path("decoder").symlink_to(FIXTURES / "qwen2")
    with pytest.raises(ValueError, match=r"weights must be those that out/real/real\.json began with, .*, got "):
        real.main(argv)


def test_the_experiment_is_refused_beside_another_and_with_other_texts_and_with_no_jobs(here, monkeypatch):
    about = real.describe(real.RealConfig(llm="decoder"))
    Path("out/real").mkdir(parents=True)
    with train.alone(Path("out/real")), pytest.raises(ValueError, match="in which nobody else trains, got out/real"):
        real.main(["decoder"])
    Path("out/real/real.json").write_text(json.dumps({"about": about | {"texts": {"prose": "", "code": ""}}}))
    with pytest.raises(ValueError, match=r"texts must be those that out/real/real\.json began with"):
        real.main(["decoder"])
    with pytest.raises(ValueError, match="jobs must be "):
        real.main(["decoder", "--jobs", "0"])


def test_weights_of_no_dimension_are_hashed_too(tmp_path):
    hashes = []
    for scale in (1.0, 1.0, 2.0):
        save_file({"logit_scale": torch.tensor(scale), "table": torch.ones(2, 2)}, tmp_path / "model.safetensors")
        hashes.append(real.hash_of(str(tmp_path)))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("lost", ["dense-seed0", "converted-seed0", "amod-seed0"])
def test_a_run_that_finished_when_nobody_was_there_to_report_it_is_reported(here, monkeypatch, lost):
    monkeypatch.setattr(real, "row_of", lambda run: run.name)
    report = real.Report(Path("real.json"), ABOUT | {"settings": {"rows": real.row_lines(2)}})
    runs = real.Runs(real.RealConfig(llm="decoder", device="cpu"), report)
    names = ["dense-seed0", "converted-seed0", "amod-seed0"]
    for name in names:
        (runs.folder / name).mkdir(parents=True)
        (runs.folder / name / "eval.json").write_text("{}")
    report.values["runs"] = {name: name for name in names if name != lost}
    runs.train_seed(0)
    assert report.values["runs"] == {name: name for name in names} and not Child.ends


def test_the_texts_skip_in_their_middle_and_are_judged_by_their_last_quarter(monkeypatch):
    class Letters(data.Tokenizer):
        def encode(self, text):
            return [*map(ord, text)]

    monkeypatch.setattr(real, "SAMPLES", 1)
    monkeypatch.setattr(real, "LENGTH", 8)
    first, last = real.text_batches(Letters(), "abcdefghijklmnopqr", every=False)
    assert first.tokens.tolist() == [[*map(ord, "abcdefgh")]]
    assert first.group.tolist() == [[-1, -1, 0, 0, 0, 0, -1, -1]]
    assert first.labels.tolist() == [[-100] * 6 + [ord("h"), ord("i")]]
    assert last.tokens[0, 0] == ord("e") and not first.decision.any()
    whole = real.text_batches(Letters(), "abcdefghijklmnopqr", every=True)[0]
    assert whole.group.tolist() == [[-1, *[0] * 7]] and whole.labels.tolist() == [[*map(ord, "bcdefghi")]]


def test_orders_take_the_lowest_the_highest_the_cheapest_the_evenly_spaced_and_the_deepest_layers():
    layers = {"arank": [5, 1, 4, 2, 3, 0], "cost": {"0.5": [0.1, 0.6, 0.2, 0.3, 0.0, 0.9]}}
    assert real.orders(layers, 0.5, 6, 2) == {"ARank, lowest": [5, 1], "ARank, highest": [2, 0], "measured": [4, 0],
                                              "interleaved": [1, 4], "deepest": [4, 5]}
    assert real.orders({"arank": [*range(30)], "cost": {"0.2": [*range(30)]}}, 0.2, 30, 15)["interleaved"] == [*range(1, 30, 2)]


def test_the_interval_of_a_correlation_holds_it_and_narrows_with_agreement():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = real.interval(values, values)
    assert (low, high) == pytest.approx((1, 1))
    noisy = [v + n for v, n in zip(values, torch.randn(30, generator=torch.Generator().manual_seed(1)).tolist(), strict=True)]
    low, high = real.interval(values, noisy)
    assert low < real.spearman(values, noisy) < high and 0.2 < high - low < 1
    draws, inside = random.Random(0), []
    for _ in range(1000):
        a, b = zip(*draws.choices([*zip(values, noisy, strict=True)], k=30), strict=True)
        inside.append(low <= real.spearman(a, b) <= high)
    assert fmean(inside) == pytest.approx(0.95, abs=0.02)


# --- what the report holds ------------------------------------------------------------------------


def test_a_report_tells_the_commit_that_made_each_piece_and_a_row_its_own(tmp_path):
    file = tmp_path / "real.json"
    real.Report(file, ABOUT).piece("gates", "unit", dict)
    later = real.Report(file, ABOUT | {"commit": "second"})
    for section, name in (("gates", "unit"), ("sets", "prose, keep 0.2"), ("runs", "dense-seed0")):
        later.piece(section, name, dict)
    found = json.loads(file.read_text())
    assert found["commits"] == {"gates: unit": "first", "sets: prose, keep 0.2": "second"} and found["about"] == ABOUT


@pytest.mark.parametrize("name", ["weights", "texts", "settings"])
def test_a_report_goes_on_only_with_the_weights_texts_and_settings_that_it_tells(tmp_path, name):
    file, others = tmp_path / "real.json", {key: value for key, value in ABOUT.items() if key != name}
    for found, said in (({"about": ABOUT | {name: {"x": 1}}}, rf"^{name} must be those that .* began with, .*1.*, got "),
                        ({"about": others}, f"real.json must tell the {name} that it began with, got none"),
                        ({}, "real.json must tell the weights that it began with, got none"),
                        ({"about": None}, "real.json must tell the weights that it began with, got none")):
        file.write_text(json.dumps(found))
        with pytest.raises(ValueError, match=said):
            real.Report(file, ABOUT)


def decoder_folder(folder: Path, layers: int) -> str:
    """What of a folder of a decoder is read before any measuring"""
    weights = next((FIXTURES / "smollm2").glob("*.safetensors"))
    (folder / weights.name).symlink_to(weights)
    config = json.loads((FIXTURES / "smollm2" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return str(folder)


def test_a_decoder_of_30_layers_has_the_settings_of_the_stored_report(tmp_path):
    stored = json.loads((Path(__file__).parents[2] / "results" / "real.json").read_text())["about"]["settings"]
    assert real.describe(real.RealConfig(llm=decoder_folder(tmp_path, 30)))["settings"] == stored


def test_arank_measured_and_the_largest_set_route_as_many_layers_of_any_decoder_as_interleaved_does():
    for L in range(16, 41):
        routed = sum(r < 1 for r in placement("interleaved", L, 0.2))
        assert real.set_sizes(L) == sorted({4, 8, routed})
        rows = [line.split() for line in real.row_lines(L)]
        assert [row[0] for row in rows[-2:]] == ["arank", "measured"]
        for row in rows[-2:]:
            dense_layers = int(row[row.index("--dense_layers") + 1])
            assert sum(r < 1 for r in rank_placement([0.0] * L, 0.2, dense_layers)) == routed


def test_a_decoder_of_too_few_layers_for_the_sets_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^llm must have at least 16 layers, got 15$"):
        real.main([decoder_folder(tmp_path, 15)])
    assert not Path("out").exists()


# --- what is measured -----------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    for name, value in {"SAMPLES": 2, "LENGTH": 16, "SET_SIZES": (1, 2)}.items():
        monkeypatch.setattr(real, name, value)


def decoder(layers: int) -> VideoLM:
    """A dense model, whose layers add enough to be seen in the loss"""
    dense = tiny((1.0,) * layers, 0, "cpu", vocab_size=len(TOKENIZER))
    for name, p in dense.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.mul_(3)
    return dense.float().eval()


@torch.no_grad()
def loss_of(dense: VideoLM, batches: list[data.Batch], seed: int = 0, **how) -> float:
    """Mean loss with another config"""
    model = dense.rerouted(replace(dense.config, **how), seed)
    return fmean(float(train.batch_loss(model, prepare(batch, model.config, CPU), 1.0, 0.0)[0]) for batch in batches)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_alone_weighs_what_is_all_computed_mean_over_three_fresh_routers(few, gate, normed):
    dense, batches = decoder(3), real.text_batches(TOKENIZER, __doc__, every=True)
    assert set(batches[0].group.unique(return_counts=True)[1].tolist()) == {1, 15}
    how = {"keep": (0.999,) * 3, "gate": gate, "router_norm": normed}  # capacity(15, 0.999) is 15
    before, after = loss_of(dense, batches), fmean(loss_of(dense, batches, seed, **how) for seed in range(3))
    found = real.gate_alone(dense, batches, gate, normed)
    assert found == {"gate": gate, "the router scores": "x / rms(x)" if normed else "x",
                     "dense": pytest.approx(math.exp(before), abs=6e-4),
                     "gate alone": pytest.approx(math.exp(after), abs=6e-4),
                     "of dense": pytest.approx(math.exp(after - before), abs=6e-5)}


def test_layers_are_ranked_and_routed_alone_by_even_spacing(few, monkeypatch):
    monkeypatch.setattr(real, "interval", lambda ranks, costs: (ranks, costs))
    dense, batches = decoder(3), real.text_batches(TOKENIZER, __doc__, every=False)
    found = real.measure_layers(dense, batches)
    ranks = torch.cat([layer_ranks(dense, prepare(batch, dense.config, CPU)) for batch in batches]).mean(0).tolist()
    assert found["arank"] == pytest.approx(ranks) and found["cost"].keys() == found["correlation"].keys() == {"0.2", "0.5"}
    for r in (0.2, 0.5):
        before, *losses = [loss_of(dense, batches, keep=keep, router="uniform") for keep in one_by_one(3, r)]
        costs = found["cost"][str(r)]
        assert costs == pytest.approx([loss - before for loss in losses], abs=1e-5)
        assert found["correlation"][str(r)] == [real.spearman(ranks, costs), found["arank"], costs]


def test_sets_of_layers_are_routed_by_even_spacing_in_several_orders(few):
    dense, batches = decoder(6), real.text_batches(TOKENIZER, __doc__, every=False)
    layers = {"arank": [5, 1, 4, 2, 3, 0], "cost": {"0.2": [0.0] * 6, "0.5": [0.1, 0.6, 0.2, 0.3, 0.0, 0.9]}}
    rows = real.route_sets(dense, batches, layers, 0.5)
    assert [(row["layers"], row["keep"]) for row in rows] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    for row in rows:
        for name, routed in {"dense": [], **real.orders(layers, 0.5, 6, row["layers"])}.items():
            keep = tuple(0.5 if layer in routed else 1.0 for layer in range(6))
            loss = loss_of(dense, batches, keep=keep, router="uniform")
            assert row[name] == pytest.approx(math.exp(loss), abs=2e-3), name


def test_half_of_the_streams_are_of_training_and_the_others_held_out(few):
    model, world = decoder(1), data.World(8)
    samples = world.batch(0, 0, 2) + world.held_out(2)
    for batch, sample in zip(real.stream_batches(model, TOKENIZER), samples, strict=True):
        expected = data.collate([sample], model.config, TOKENIZER)
        assert torch.equal(batch.frames, expected.frames) and torch.equal(batch.tokens, expected.tokens)


# --- which model and which inputs -----------------------------------------------------------------


def test_both_folders_reach_the_models():
    cfg = real.RealConfig(llm="decoder", vision="encoder")
    assert real.folders(cfg) == ["--llm=decoder", "--vision=encoder"]
    assert real.folders(replace(cfg, vision="")) == ["--llm=decoder"]
    report = real.Report(Path("none.json"), ABOUT | {"settings": {"rows": real.row_lines(30)}})
    first, *_, last = real.Runs(cfg, report).rows
    assert first[:3] == ["dense", "--llm=decoder", "--vision=encoder"]
    assert last[:7] == ["measured", "--plan", "measured", "--dense_layers", "15", "--init", "DENSE"]


def test_each_piece_gets_its_model_and_its_inputs_and_sets_others_than_the_layers_they_order(few, monkeypatch):
    dense, tuned, made, asked = decoder(1).train(), decoder(1), {}, []

    def prepare_run(flags, given):
        asked.append((flags.llm, flags.vision, flags.plan))
        return None, dense

    def piece(section, name, make):
        made[section, name] = (make.func, *make.args)
        return f"layers of {name}"

    monkeypatch.setattr(pretrained, "prepare_run", prepare_run)
    monkeypatch.setattr(real, "prose", lambda: "prose")
    monkeypatch.setattr(real, "code", lambda: "code")
    monkeypatch.setattr(real, "text_batches", lambda _, text, every: [f"{text} {every} {n}" for n in range(4)])
    monkeypatch.setattr(real, "stream_batches", lambda *_: [f"stream {n}" for n in range(4)])
    cfg = real.RealConfig(llm="decoder", vision="encoder", device="cpu")
    real.without_training(cfg, SimpleNamespace(piece=piece), SimpleNamespace(train_dense=lambda: tuned))
    expected = {}
    for gate in GATES:
        for normed, scored in ((True, "x / rms(x)"), (False, "x")):
            expected["gates", f"{gate}, {scored}"] = (real.gate_alone, dense, ["prose True 0", "prose True 1"], gate, normed)
    for kind, model, text in (("prose", dense, "prose False"), ("code", dense, "code False"),
                              ("streams, projector untrained", dense, "stream"), ("streams", tuned, "stream")):
        expected["layers", kind] = (real.measure_layers, model, [f"{text} 0", f"{text} 1"])
        for r in (0.2, 0.5) if kind in ("prose", "streams") else ():
            unseen = [f"{text} 2", f"{text} 3"]
            expected["sets", f"{kind}, keep {r}"] = (real.route_sets, model, unseen, f"layers of {kind}", r)
    assert made == expected and not dense.training
    assert asked == [("decoder", "encoder", "dense")]
