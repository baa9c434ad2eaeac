"""A run is saved whole, resumed bit for bit, and refused by name where its files do not fit."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from numpy.random import default_rng
from safetensors.torch import save_file
from strategies import TURN, annotate, make_video, needs_ffmpeg

import eval as evaluation
import model as models
import train
from model import Config, VideoLM, initialise, load, save

SMALL = ["--batch", "2", "--streams", "1", "--save_every", "2", "--device", "cpu"]


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main(["--out", str(folder), "--steps", "6", *SMALL])
    return folder


@pytest.mark.parametrize("moment", [
    "before log_step 0", "before log_step 5", "before save 4", "after save 4"])
def test_a_run_killed_and_resumed_ends_in_the_same_bits_as_a_whole_one(whole, tmp_path, monkeypatch, moment):
    when, name, step = moment.split()
    folder, original = tmp_path / "run", getattr(train, name)

    def kill(*args):
        if args[2 if name == "save" else 1] != int(step):
            return original(*args)
        if when == "after":
            original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, name, kill)
        with pytest.raises(KeyboardInterrupt):
            train.main(["--out", str(folder), "--steps", "6", *SMALL])
    load(folder)
    train.main(["--out", str(folder), "--resume", "--device", "cpu"])
    a, b = (load(run).state_dict() for run in (whole, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert log(whole) == log(folder) and [line["step"] for line in log(folder)] == list(range(6))
    assert sorted(p.name for p in folder.glob("optimizer-*")) == ["optimizer-6.safetensors"]


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(whole):
    with pytest.raises(ValueError, match=r"out must be a new folder, got .*--resume"):
        train.main(["--out", str(whole)])
    with pytest.raises(ValueError, match=r"keep must be 0\.2 to resume .*, got 0\.5"):
        train.main(["--out", str(whole), "--resume", "--keep", "0.5"])
    with pytest.raises(ValueError, match=r"train\.json must hold the settings"):
        train.main(["--out", str(whole.parent / "absent"), "--resume"])
    again = models.parse(train.TrainConfig, ["--out", str(whole), "--resume"], "")
    assert train.settings(*again).device == "cpu"  # what it began with, where nothing else is asked for


def test_a_run_on_clips_is_resumed_by_the_command_that_began_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--data", "clips", "--out", "run"]
    began = train.settings(*models.parse(train.TrainConfig, argv, ""))
    assert began.data == str(tmp_path.resolve() / "clips")
    (tmp_path / "run").mkdir()
    models.write_json(tmp_path / "run" / "train.json", vars(began))
    again = train.settings(*models.parse(train.TrainConfig, [*argv, "--resume"], ""))
    assert again.data == began.data
    with pytest.raises(ValueError, match=r"data must be .*clips to resume run, got .*others"):
        train.settings(*models.parse(train.TrainConfig, ["--data", "others", "--out", "run", "--resume"], ""))


def test_a_run_is_named_by_what_differs_from_the_default_of_its_task():
    for chosen, name in (({}, "narration-seed0"), ({"keep": 0.5, "seed": 3}, "narration-0.5-seed3"),
                         ({"data": "x/clips", "plan": "all"}, "clips-narration-all-seed0"), ({"out": "y"}, None)):
        assert train.TrainConfig(**chosen).folder == Path(f"out/{name}" if name else "y")


@needs_ffmpeg
def test_a_run_whose_first_clips_are_bad_writes_nothing(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    annotate(tmp_path, {"video": "bad.mp4", "conversation": [TURN]})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*bad\.mp4"):
        train.main(["--out", str(tmp_path / "run"), "--data", str(tmp_path), "--device", "cpu"])
    assert not (tmp_path / "run").exists()


@needs_ffmpeg
def test_a_run_that_met_a_bad_clip_goes_on_with_partial(tmp_path, capsys):
    make_video(tmp_path / "v.mp4", 1)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    said = [{"time": 0, "role": "assistant", "content": "A."}]
    annotate(tmp_path, *({"video": f"{name}.mp4", "conversation": said} for name in ("v", "bad")))
    drawn = {seed: [default_rng([seed, step]).permutation(2)[0] for step in range(3)] for seed in range(99)}
    seed = next(seed for seed, clips in drawn.items() if clips == [0, 0, 1])  # clip 1 is bad
    run = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*bad\.mp4"):
        train.main([*run, "--data", str(tmp_path), "--seed", str(seed), "--steps", "4", "--batch", "1",
                    "--streams", "2", "--save_every", "1"])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*bad\.mp4"):
        train.main([*run, "--resume"])
    began = (tmp_path / "run" / "train.json").read_bytes()
    state = next((tmp_path / "run").glob("optimizer-*"))
    state.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="optimizer"):
        train.main([*run, "--resume", "--partial"])
    assert (tmp_path / "run" / "train.json").read_bytes() == began
    (tmp_path / "kept").rename(state)
    train.main([*run, "--resume", "--partial"])
    assert [line["step"] for line in log(tmp_path / "run")] == [0, 1, 2, 3]
    assert "left out with --partial: 1, the first is" in capsys.readouterr().out
    evaluation.main([str(tmp_path / "run"), "--device", "cpu"])  # the run remembers --partial


@pytest.mark.parametrize(("router", "names"), [
    ("learned", ["0", "3"]), ("shared", ["shared"]), ("random", []), ("uniform", [])])
def test_a_loaded_model_is_the_saved_one_and_all_but_its_encoder_is_trained_once(tmp_path, router, names):
    config = Config(num_hidden_layers=4, keep=(0.2, 1.0, 0.0, 0.5), router=router, gate="unit")
    model = initialise(VideoLM(config), 3)
    save(tmp_path / "run", model)
    again = load(tmp_path / "run")
    assert again.config == config and list(again.routers) == names
    groups = [g for o in train.make_optimizers(again, train.TrainConfig()) for g in o.param_groups]
    learns = [p for name, p in again.named_parameters() if not name.startswith("vision_model.")]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, learns))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_begun_from_another_has_its_weights_and_new_routers(whole):
    model = train.build(train.TrainConfig(init=str(whole), plan="all", keep=0.5, gate="unit"))
    assert model.config.keep == (0.5,) * 3 and len(model.routers) == 3
    donor = load(whole).state_dict()
    assert all(torch.equal(t, donor[name]) for name, t in model.state_dict().items() if name in donor)


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda run: (run / "config.json").unlink(), r"config\.json must be JSON"),
    (lambda run: (run / "config.json").write_text("{"), r"config\.json must be JSON"),
    (lambda run: (run / "config.json").write_text('{"keep": [1.0], "colour": 3}'), "colour"),
    (lambda run: change(run, vocab_size=9), r"embed_tokens\.weight must be \[9, 128\], got \[320, 128\]"),
    (lambda run: change(run, keep=(1.0, 0.2, 1.0)), r"routers\.1\.weight must be \[128\], got nothing"),
    (lambda run: change(run, keep=(1.5,) * 3), r"keep must be in \[0, 1\], got 1\.5"),
    (lambda run: change(run, hidden_size="big"), "hidden_size must be of type int, got 'big'"),
    (lambda run: (run / "model.safetensors").unlink(), r"model\.safetensors must be a safetensors file"),
    (lambda run: (run / "model.safetensors").write_bytes(b"\x10" * 99),
     r"model\.safetensors must be a safetensors file"),
    (lambda run: save_file({"x": torch.zeros(2)}, run / "model.safetensors"), "must be .*, got nothing"),
    (lambda run: save_file({name: t.long() for name, t in load(run).learned_state().items()}, run / "model.safetensors"),
     r"must fit config\.json: .* must be \[.*\], got torch\.int64"),
])
def test_a_run_folder_that_does_not_fit_is_refused_by_name(tmp_path, spoil, complaint):
    run = tmp_path / "run"
    save(run, initialise(VideoLM(Config()), 0))
    spoil(run)
    with pytest.raises(ValueError, match=complaint):
        load(run)


def test_a_run_that_needs_extras_is_refused_in_a_sentence_without_them(tmp_path, monkeypatch):
    save(tmp_path, initialise(VideoLM(Config()), 0))
    change(tmp_path, llm="", lora_rank=0)
    monkeypatch.setitem(sys.modules, "extras.pretrained_model", None)
    with pytest.raises(ValueError, match=r"config\.json must have the fields of Config alone .*, got llm, lora_rank"):
        load(tmp_path)


def change(run, **values):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | values))


def test_a_keep_ratio_may_be_written_as_a_whole_number_and_weights_of_others_are_at_step_0(tmp_path):
    save(tmp_path, initialise(VideoLM(Config(keep=(1, 0.5, 1.0))), 0), 3)
    assert load(tmp_path).config.keep == (1, 0.5, 1)
    weights, step = models.read_weights(tmp_path / "model.safetensors")
    save_file(weights, tmp_path / "others.safetensors")
    assert (step, models.read_weights(tmp_path / "others.safetensors")[1]) == (3, 0)


def test_the_presets_are_dense_and_the_first_is_the_default():
    assert asdict(models.preset("tiny")) == asdict(Config())
    assert models.preset("coarse").tokens_per_frame == 10  # 1 + 3 x 3, as VideoLLM-MoD
    assert all(set(preset.keep) == {1.0} for preset in models.PRESETS.values())
