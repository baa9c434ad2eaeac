"""Hugging Face folders are read as transformers reads them, or refused in a sentence."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import TURN, annotate, make_video, needs_ffmpeg

import eval as evaluation
import model as models
import train
from mod import Groups
from model import Config, VideoLM

FIXTURES = Path(__file__).parent / "fixtures"
DECODERS, ENCODERS = (sorted(p.parent for p in FIXTURES.glob("*/expected.safetensors")
                             if p.parent.name.startswith(("clip", "siglip")) == vision)
                      for vision in (False, True))
SMALL = replace(Config(), pool=2)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def logits(net: VideoLM, tokens: torch.Tensor) -> torch.Tensor:
    groups = Groups.plan(torch.full_like(tokens, -1), net.config.keep)
    return net.logits(net(tokens, torch.zeros(len(tokens), 0, 3, 8, 8, dtype=torch.uint8), groups).hidden)


@pytest.mark.parametrize("folder", DECODERS, ids=lambda folder: folder.name)
def test_the_logits_of_a_decoder_are_those_of_transformers(folder):
    expected = load_file(folder / "expected.safetensors")
    for new in (0, 6):
        net = models.build(models.pretrained(SMALL, str(folder), new_tokens=new)).float()
        found = logits(net, expected["input_ids"])
        known = found[..., : found.shape[-1] - new]
        torch.testing.assert_close(known, expected["logits"], rtol=1e-5, atol=1e-5)
    table = net.embed_tokens.weight
    assert (net.new_embeddings == table.mean(0)).all() and len(table) == net.config.vocab_size - 6


@pytest.mark.parametrize("folder", ENCODERS, ids=lambda folder: folder.name)
def test_the_hidden_states_of_an_encoder_are_those_of_transformers(folder):
    expected = load_file(folder / "expected.safetensors")
    vision = models.build(models.pretrained(SMALL, vision=str(folder))).float().vision_model
    hidden, tokens = vision.hidden(expected["pixel_values"]), vision(expected["frames"])
    torch.testing.assert_close(hidden, expected["last_hidden_state"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, 0], expected["pooler_output"], rtol=1e-5, atol=1e-5)
    grid = hidden[:, -16:].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)  # 4 x 4 patches in fours
    torch.testing.assert_close(tokens[:, 1:], grid, rtol=1e-5, atol=1e-5)


def test_weights_keep_the_type_of_their_file_and_what_is_learnt_is_float32():
    config = models.pretrained(replace(SMALL, lora_rank=2), str(FIXTURES / "llama3"), new_tokens=6)
    net = models.build(config)
    kinds = {name: p.dtype for name, p in net.named_parameters() if not name.startswith("vision_model")}
    assert {kinds[name] for name in kinds if config.frozen(name)} == {torch.bfloat16}
    assert {kinds[name] for name in kinds if not config.frozen(name)} == {torch.float32}
    out = logits(net, torch.arange(102)[None])  # new tokens too
    assert out.dtype == torch.bfloat16 and out.shape == (1, 102, 102) and out.isfinite().all()
    cfg = train.TrainConfig(llm=config.llm, vision=str(FIXTURES / "clip"), train_vision=True, lora_rank=0)
    assert {p.dtype for p in train.build(cfg).parameters()} == {torch.float32}  # all of it learns


def spoil(file: Path, change: dict | bytes | None) -> None:
    """Write other bytes, values of a JSON file or tensors; None: leave only a pickle."""
    if change is None:
        file.rename(file.with_name("pytorch_model.bin"))
    elif isinstance(change, bytes):
        file.write_bytes(change)
    elif file.suffix == ".json":
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        save_file(load_file(file) | change, file)


@pytest.mark.parametrize(("file", "change", "complaint"), [
    (CONFIG, {"model_type": "clip"}, "model_type must be llama or mistral or qwen2, got 'clip'"),
    (CONFIG, {"rope_scaling": {"type": "yarn"}}, "rope_type must be .*llama3, got 'yarn'"),
    (CONFIG, {"rope_scaling": {"type": "linear", "factor": 0}}, r"above 0, got \(0,\)"),
    (CONFIG, {"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
    (CONFIG, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1\.0, got 0\.5"),
    (CONFIG, {"hidden_size": "big"}, r"config\.json must be of a known model"),
    (CONFIG, {"hidden_size": 10**12}, "hidden_size must be above 0 and below"),
    (CONFIG, {"intermediate_size": True}, "intermediate_size must be of type int, got True"),
    (CONFIG, {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1000, got"),
    (CONFIG, b"[]", r"config\.json must be a JSON object"),
    (CONFIG, b"[" * 10**5, r"config\.json must be JSON"),
    (WEIGHTS, {"model.norm.weight": torch.ones(24).long()}, r"norm\.weight must be \[24\], got torch\.int64"),
    (WEIGHTS, {"model.norm.bias": torch.ones(24)}, r"norm\.bias must be absent, got \[24\]"),
    (WEIGHTS, None, r"got \.bin files"),
    (INDEX, b'{"weight_map": {"x": "../a.safetensors"}}', r"files beside it, got '\.\./a\.safetensors'"),
    (INDEX, b'{"weight_map": {"x": "pytorch_model.bin"}}', "files beside it, got 'pytorch_model.bin'"),
    (INDEX, b'{"weight_map": {"x": "absent.safetensors"}}', r"absent\.safetensors must be a safetensors"),
    (INDEX, b'{"weight_map": 3}', "safetensors files beside it, got"),
])
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, file, change, complaint):
    folder = Path(shutil.copytree(FIXTURES / "llama2", tmp_path / "llm"))
    spoil(folder / file, change)
    with pytest.raises(ValueError, match=complaint):
        models.build(models.pretrained(SMALL, str(folder)))


def test_an_encoder_of_no_known_family_is_refused():
    with pytest.raises(ValueError, match="model_type must be clip or siglip, got 'llama'"):
        models.pretrained(SMALL, vision=str(FIXTURES / "llama2"))


def test_a_grid_is_of_the_patches_of_the_folder_and_a_converted_encoder_learns_as_slowly(tmp_path):
    how = {"vision": str(FIXTURES / "siglip"), "preset": "coarse", "train_vision": True}  # 4 x 4, not 3 x 3
    assert train.start(train.TrainConfig(pool=4, **how)).pool == 4
    with pytest.raises(ValueError, match="pool must be at most 4"):
        train.start(train.TrainConfig(pool=5, **how))
    models.save(tmp_path, train.build(train.TrainConfig(plan="dense", **how)))
    cfg = train.TrainConfig(init=str(tmp_path), out=str(tmp_path / "new"))
    assert train.settings(cfg, {"init", "out"}).adam_lr == train.PRETRAINED_DEFAULTS["adam_lr"]


@needs_ffmpeg
def test_a_pretrained_pair_is_trained_saved_converted_and_watches_a_video(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    monkeypatch.chdir(tmp_path)
    make_video(annotate(tmp_path, {"video": "v.mp4", "conversation": [TURN]}) / "v.mp4", 1)
    few = ["--data", ".", "--steps", "1", "--batch", "1", "--streams", "1"]
    pair = ["--llm", str(FIXTURES / "smollm2"), "--vision", str(FIXTURES / "siglip"), "--lora_rank", "2"]
    gamma = ["--router", "shared", "--masked", "question", "--routing_loss", "0.01", "--keep", "0.5"]
    train.main([*few, *pair, "--plan", "dense", "--out", "out/dense"])
    train.main([*few, *pair, "--gate", "unit", "--out", "out/mod"])
    with monkeypatch.context() as patch:
        patch.setattr(models.VisionModel, "forward", None)  # the clip has been encoded already
        train.main([*few, *pair, "--plan", "arank", *gamma, "--out", "out/gamma"])
    train.main([*few, "--init", "out/dense", "--plan", "arank", *gamma, "--out", "out/both"])
    train.main(["--out", "out/mod", "--resume", "--device", "cpu"])
    assert sorted(models.read_config(Path("out/gamma")).keep) == [0.5, 1.0]
    evaluation.main(["out/both", "--watch", "v.mp4", "--device", "cpu"])
    assert "tokens in the cache of each layer" in capsys.readouterr().out
    assert len(list(Path("out/features").glob("*.safetensors"))) == 1
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
