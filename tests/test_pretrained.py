"""Hugging Face folders are read as transformers reads them, or refused in a sentence."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data import make_video, needs_ffmpeg

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


def name(folder: Path) -> str:
    return folder.name


def logits(net: VideoLM, tokens: torch.Tensor) -> torch.Tensor:
    groups = Groups.plan(torch.full_like(tokens, -1), net.config.keep)
    return net.logits(net(tokens, torch.zeros(len(tokens), 0, 3, 8, 8, dtype=torch.uint8), groups).hidden)


@pytest.mark.parametrize("folder", DECODERS, ids=name)
def test_the_logits_of_a_decoder_are_those_of_transformers(folder):
    expected = load_file(folder / "expected.safetensors")
    for new in (0, 6):
        net = models.build(models.pretrained(SMALL, str(folder), new_tokens=new)).float()
        found = logits(net, expected["input_ids"])
        known = found[..., : found.shape[-1] - new]
        torch.testing.assert_close(known, expected["logits"], rtol=1e-5, atol=1e-5)
    table = net.embed_tokens.weight
    assert (net.new_embeddings == table.mean(0)).all() and len(table) == net.config.vocab_size - 6


@pytest.mark.parametrize("folder", ENCODERS, ids=name)
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


def spoil(change):
    """A change of a json file, or of the tensors of model.safetensors (None: without it)."""
    def apply(folder: Path) -> None:
        (name, values), = change.items()
        if name.endswith("json"):
            old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            return (folder / name).write_text(json.dumps(old | values))
        weights = load_file(folder / name) | values
        save_file({key: t for key, t in weights.items() if t is not None}, folder / name)
    return apply


def tensors(**change):
    return spoil({"model.safetensors": {key.replace("__", "."): t for key, t in change.items()}})


def index(*shards):
    return spoil({"model.safetensors.index.json": {"weight_map": dict(enumerate(shards))}})


@pytest.mark.parametrize(("spoiled", "complaint"), [
    (spoil({"config.json": {"model_type": "gpt2"}}), "model_type must be llama or .*, got 'gpt2'"),
    (spoil({"config.json": {"rope_scaling": {"type": "yarn"}}}), "rope_type must be .*llama3, got 'yarn'"),
    (spoil({"config.json": {"hidden_act": "gelu"}}), "hidden_act must be silu, got 'gelu'"),
    (spoil({"config.json": {"partial_rotary_factor": 0.5}}), r"partial_rotary_factor must be 1\.0, got 0\.5"),
    (spoil({"config.json": {"hidden_size": "big"}}), r"config\.json must be of a known model"),
    (spoil({"config.json": {"hidden_size": 10**12}}), "hidden_size must be above 0 and below"),
    (spoil({"config.json": {"num_hidden_layers": 10**9}}), "num_hidden_layers must be at most 1000, got"),
    (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json must be a JSON object"),
    (lambda folder: (folder / "config.json").write_text("[" * 10**5), r"config\.json must be JSON"),
    (tensors(model__norm__weight=None), r"norm\.weight must be \[24\], got nothing"),
    (tensors(model__norm__weight=torch.ones(9)), r"norm\.weight must be \[24\], got \[9\]"),
    (tensors(model__norm__weight=torch.ones(24).long()), r"norm\.weight must be \[24\], got torch\.int64"),
    (tensors(model__norm__bias=torch.ones(24)), r"norm\.bias must be absent, got \[24\]"),
    (index("../a.safetensors"), r"safetensors files beside it, got '\.\./a\.safetensors'"),
    (index("pytorch_model.bin"), "safetensors files beside it, got 'pytorch_model.bin'"),
    (index("absent.safetensors"), r"absent\.safetensors must be a safetensors file"),
    (spoil({"model.safetensors.index.json": {"weight_map": 3}}), "safetensors files beside it, got"),
    (lambda folder: os.truncate(folder / "model.safetensors", 9999),
     r"model\.safetensors must be a safetensors file"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01."), "must be a safetensors"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), r"got \.bin files"),
    (spoil({"config.json": {"rope_scaling": {"type": "linear", "factor": 0}}}), r"above 0, got \(0,\)"),
    (spoil({"config.json": {"intermediate_size": True}}), "intermediate_size must be of type int, got True"),
])
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, spoiled, complaint):
    folder = Path(shutil.copytree(FIXTURES / "llama2", tmp_path / "llm"))
    spoiled(folder)
    with pytest.raises(ValueError, match=complaint):
        models.build(models.pretrained(SMALL, str(folder)))


def test_a_folder_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match="model_type must be llama or mistral or qwen2, got 'clip'"):
        models.pretrained(SMALL, llm=str(FIXTURES / "clip"))
    with pytest.raises(ValueError, match="model_type must be clip or siglip, got 'llama'"):
        models.pretrained(SMALL, vision=str(FIXTURES / "llama2"))


@needs_ffmpeg
def test_a_pretrained_pair_is_trained_saved_converted_and_watches_a_video(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "v.mp4", 1)
    turns = [{"time": 0.5, "role": "assistant", "content": "A red ring."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"video": "v.mp4", "conversation": turns}))
    few = ["--data", ".", "--steps", "1", "--batch", "1", "--streams", "1"]
    pair = ["--llm", str(FIXTURES / "smollm2"), "--vision", str(FIXTURES / "siglip"), "--lora_rank", "2"]
    gamma = ["--router", "shared", "--masked", "question", "--routing_loss", "0.01", "--keep", "0.5"]
    train.main([*few, *pair, "--plan", "dense", "--out", "out/dense"])
    train.main([*few, *pair, "--gate", "unit", "--out", "out/mod"])
    train.main([*few, *pair, "--plan", "arank", *gamma, "--out", "out/gamma"])
    train.main([*few, "--init", "out/dense", "--plan", "arank", *gamma, "--out", "out/both"])
    train.main(["--out", "out/mod", "--resume", "--device", "cpu"])
    assert sorted(models.read_config(Path("out/gamma")).keep) == [0.5, 1.0]
    evaluation.main(["out/both", "--watch", "v.mp4", "--device", "cpu"])
    assert "tokens in the cache of each layer" in capsys.readouterr().out
    assert len(list(Path("out/features").glob("*.safetensors"))) == 1  # the clip was encoded once
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
