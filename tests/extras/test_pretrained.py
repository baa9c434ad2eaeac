"""Hugging Face folders are read as transformers reads them, or refused in a sentence."""

import json
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import TURN, annotate, make_video, needs_ffmpeg

import data
import eval as evaluation
import model as models
import train
from data import Clips, Turn
from extras import distributed, pretrained, pretrained_model
from extras.cost import SIZES
from extras.encoders import SiglipVision
from extras.huggingface import PretrainedTokenizer
from extras.pretrained import PretrainedConfig, PretrainedFlags, PretrainedLM
from mod import GATES, MASKED, Groups
from model import Config, VideoLM, initialise, parse

FIXTURES = Path(__file__).parent / "fixtures"
DECODERS, ENCODERS = (sorted(p.parent for p in FIXTURES.glob("*/expected.safetensors")
                             if p.parent.name.startswith(("clip", "siglip")) == vision)
                      for vision in (False, True))
def plain(config: Config, **changes) -> PretrainedConfig:
    """The same sizes, ready for folders"""
    return PretrainedConfig(**{f.name: getattr(config, f.name) for f in fields(Config)} | changes)


SMALL = plain(Config(), pool=2)
LLM = FIXTURES / "smollm2"  # its tokenizer.json has 270 entries
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def logits(net: VideoLM, tokens: torch.Tensor) -> torch.Tensor:
    groups = Groups.plan(torch.full_like(tokens, -1), net.config.keep)
    frames, seed = torch.zeros(len(tokens), 0), torch.zeros(len(tokens)).long()
    return net.logits(net(tokens, frames, groups, seed).hidden)


@pytest.mark.parametrize("folder", DECODERS, ids=lambda folder: folder.name)
def test_the_logits_of_a_decoder_are_those_of_transformers(folder):
    expected = load_file(folder / "expected.safetensors")
    for new in (0, 6):
        net = pretrained.build(pretrained.pretrained(SMALL, str(folder), new_tokens=new)).float()
        found = logits(net, expected["input_ids"])
        known = found[..., : found.shape[-1] - new]
        torch.testing.assert_close(known, expected["logits"], rtol=1e-5, atol=1e-5)
    table = net.embed_tokens.weight
    assert (net.embed_tokens.new == table.mean(0)).all() and len(table) == net.config.vocab_size - 6
    assert (net.lm_head.new == net.lm_head.weight.mean(0)).all()
    rows = net.embed_tokens(torch.arange(net.config.vocab_size))  # new tokens come after the known ones
    assert torch.equal(rows, torch.cat([table, net.embed_tokens.new]))


@pytest.mark.parametrize("folder", ENCODERS, ids=lambda folder: folder.name)
def test_the_hidden_states_of_an_encoder_are_those_of_transformers(folder):
    expected = load_file(folder / "expected.safetensors")
    vision = pretrained.build(pretrained.pretrained(SMALL, vision=str(folder))).float().vision_model
    hidden, tokens = vision.hidden(expected["pixel_values"]), vision(expected["frames"])
    torch.testing.assert_close(hidden, expected["last_hidden_state"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, 0], expected["pooler_output"], rtol=1e-5, atol=1e-5)
    grid = hidden[:, -16:].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)  # 4 x 4 patches in fours
    torch.testing.assert_close(tokens[:, 1:], grid, rtol=1e-5, atol=1e-5)


def test_weights_keep_the_type_of_their_file_and_what_is_learnt_is_float32():
    config = pretrained.pretrained(replace(SMALL, lora_rank=2), str(FIXTURES / "llama3"), new_tokens=6)
    net = pretrained.build(config)
    kinds = {name: p.dtype for name, p in net.named_parameters() if not name.startswith("vision_model")}
    assert {kinds[name] for name in kinds if config.frozen(name)} == {torch.bfloat16}
    assert {kinds[name] for name in kinds if not config.frozen(name)} == {torch.float32}
    out = logits(net, torch.arange(102)[None])  # new tokens too
    assert out.dtype == torch.bfloat16 and out.shape == (1, 102, 102) and out.isfinite().all()
    cfg = PretrainedFlags(llm=config.llm, vision=str(FIXTURES / "clip"), train_vision=True, lora_rank=0)
    _, net = pretrained.prepare_run(cfg, {"llm", "vision", "train_vision", "lora_rank"})
    assert {p.dtype for p in net.parameters()} == {torch.float32}  # all of it learns


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
    (CONFIG, {"model_type": "clip"}, "model_type must be llama or mistral or qwen2 or qwen3, got 'clip'"),
    (CONFIG, {"rope_scaling": {"type": "longrope"}}, "rope_type must be .*llama3 or yarn, got 'longrope'"),
    (CONFIG, {"rope_scaling": {"type": "linear"}}, r"config\.json must .* linear RoPE must have a factor, got none"),
    (CONFIG, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor of linear RoPE must be above 0 and .* got 0"),
    (CONFIG, {"rope_scaling": {"type": "yarn", "factor": "4"}}, r"config\.json must be of a known model"),
    (CONFIG, {"rope_scaling": {"type": "yarn", "attention_factor": -1}}, "attention_factor of yarn RoPE must be above 0 and"),
    (CONFIG, {"rope_scaling": {"type": "yarn"}, "rope_theta": 1.0}, "config.json must .* rope_theta must be above 1"),
    (CONFIG, {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
     "low_freq_factor must be at most high_freq_factor"),
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
    if file == INDEX:  # it would not be read beside the whole file
        (folder / WEIGHTS).unlink()
    spoil(folder / file, change)
    with pytest.raises(ValueError, match=complaint):
        pretrained.build(pretrained.pretrained(SMALL, str(folder)))


def test_an_encoder_of_no_known_family_is_refused():
    with pytest.raises(ValueError, match="model_type must be clip or siglip, got 'llama'"):
        pretrained.pretrained(SMALL, vision=str(FIXTURES / "llama2"))


def test_behind_a_decoder_that_is_drawn_routers_are_not_normed_and_frames_not_scaled(monkeypatch):
    monkeypatch.setattr(pretrained_model, "scale_vision", None)
    monkeypatch.setitem(train.MEASURED, "arank", lambda cfg, dense: (0.5,) * len(dense.layers))
    for plan in ("all", "arank"):
        flags = ["--vision", str(FIXTURES / "siglip"), "--plan", plan, "--out", "none"]
        net = pretrained.prepare_run(*parse(PretrainedFlags, flags, ""))[1]
        assert net.routers and not net.config.router_norm


def test_a_grid_is_of_the_patches_of_the_folder_and_a_converted_encoder_learns_as_slowly(tmp_path):
    how = {"vision": str(FIXTURES / "siglip"), "preset": "coarse", "train_vision": True}  # 4 x 4, not 3 x 3
    assert pretrained.sizes_of(PretrainedFlags(pool=4, **how)).pool == 4
    with pytest.raises(ValueError, match="pool must be at most 4"):
        pretrained.sizes_of(PretrainedFlags(pool=5, **how))
    settings, net = pretrained.prepare_run(PretrainedFlags(plan="dense", **how), set(how))
    assert settings.adam_lr == 0.0002
    models.save(tmp_path, net)
    cfg = train.TrainConfig(init=str(tmp_path), out=str(tmp_path / "new"))
    assert train.settings(cfg, {"init", "out"}).adam_lr == 0.0002
    assert train.settings(replace(cfg, adam_lr=0.1), {"init", "out", "adam_lr"}).adam_lr == 0.1


@needs_ffmpeg
def test_a_pretrained_pair_is_trained_saved_converted_and_watches_a_video(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    monkeypatch.chdir(tmp_path)
    make_video(annotate(tmp_path, {"video": "v.mp4", "conversation": [TURN]}) / "v.mp4", 1)
    few, asked = ["--data", ".", "--steps", "1", "--batch", "1", "--streams", "1"], []
    pair = ["--llm", str(FIXTURES / "smollm2"), "--vision", str(FIXTURES / "siglip"), "--lora_rank", "2"]
    gamma = ["--router", "shared", "--masked", "question", "--routing_loss", "0.01", "--keep", "0.5"]
    pretrained.main([*few, *pair, "--plan", "dense", "--out", "out/dense"])
    pretrained.main([*few, *pair, "--gate", "unit", "--out", "out/mod"])
    pretrained.main([*few, *pair, "--gate", "unit", "--out", "out/mod", "--resume"])
    with monkeypatch.context() as patch:
        patch.setattr(pretrained_model, "scale_vision", print)  # it encodes noise
        patch.setattr(SiglipVision, "forward", None)  # the clip has been encoded already
        pretrained.main([*few, *pair, "--plan", "arank", *gamma, "--out", "out/gamma"])
    train.main([*few, "--init", "out/dense", "--plan", "arank", *gamma, "--out", "out/both"])
    train.main(["--out", "out/mod", "--resume", "--device", "cpu"])
    assert sorted(models.load(Path("out/gamma")).config.keep) == [0.5, 1.0]
    assert "arank sees frames through an untrained projector" in capsys.readouterr().out
    pretrained.main(["--merge", "out/mod", "--out", "out/merged"])
    evaluation.main(["out/merged", "--streams", "1", "--device", "cpu"])
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "report", lambda folder, model, source, streams, _: asked.append(streams))
        evaluation.main(["out/merged", "--device", "cpu"])
    assert asked == [16]
    with pytest.raises(ValueError, match="out must be a new folder for the merged run, got 'out/merged'"):
        pretrained.main(["--merge", "out/mod", "--out", "out/merged"])
    evaluation.main(["out/both", "--watch", "v.mp4", "--device", "cpu"])
    assert "tokens in the cache of each layer" in capsys.readouterr().out
    assert len(list(Path("out/features").glob("*.safetensors"))) == 1
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]


@pytest.mark.parametrize("vision", ["", "siglip", "clip"])
def test_frames_enter_a_trained_decoder_as_large_as_text_and_its_new_routers_hardly_change_it(vision):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    folders = ["--llm", str(LLM), *(["--vision", str(FIXTURES / vision)] if vision else [])]
    cfg, given = parse(PretrainedFlags, [*folders, "--plan", "all", "--out", "none"], "")
    _, net = pretrained.prepare_run(cfg, given)
    size = net.config.image_size
    frames = torch.randint(256, (1, 3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tokens = torch.full((1, 3 * net.config.tokens_per_frame), -1)
    rms = net.embed(tokens, frames).float().square().mean().sqrt() / net.embed_tokens.weight.float().square().mean().sqrt()
    assert 0.7 < rms < 1.4
    assert net.config.router_norm and all(router.normed for router in net.routers.values())
    large = 1000 * torch.randn(99, net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for router in net.routers.values():
        assert (GATES["unit"](router(large)) - 1).abs().max() < 0.3


@pytest.mark.parametrize(("flags", "warns"), [
    ("--gate sigmoid --plan all", True), ("--gate linear --plan interleaved", True), ("--gate unit --plan all", False),
    ("--gate sigmoid --plan dense", False), ("--gate sigmoid --plan layer-skip", False),
    ("--gate sigmoid --plan all --router random", False)])
def test_a_gate_that_ruins_a_trained_decoder_is_named(capsys, flags, warns, tmp_path):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    cfg, given = parse(PretrainedFlags, ["--llm", str(LLM), "--out", "none", *flags.split()], "")
    dense = pretrained.prepare_run(replace(cfg, plan="dense"), given)[1]
    capsys.readouterr()
    pretrained.prepare_run(cfg, given)
    assert ("a gate other than unit ruins a trained decoder" in capsys.readouterr().out) == warns
    models.save(tmp_path / "dense", dense)
    train.build(parse(train.TrainConfig, ["--init", str(tmp_path / "dense"), *flags.split()], "")[0])
    assert ("a gate other than unit ruins a trained decoder" in capsys.readouterr().out) == warns


OLD = {"new_tokens": 0, "rope_scaling": [], "sliding_window": 0, "attention_bias": False, "output_bias": False,
       "tie_word_embeddings": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "vision_type": "scratch",
       "vision_act": "gelu", "vision_norm_eps": 1e-5, "llm": "", "vision": "", "train_vision": False,
       "lora_rank": 0, "lora_alpha": 256.0, "lora_dropout": 0.05}  # what config.json had for every run


def test_a_run_of_an_earlier_version_is_the_same_model(tmp_path):
    config = Config(num_hidden_layers=4, keep=(1.0, 0.2, 0.0, 0.5), vocab_size=len(data.Tokenizer()))
    net = initialise(VideoLM(config), 3)
    models.save(tmp_path, net)
    (tmp_path / CONFIG).write_text(json.dumps(asdict(config) | OLD))
    again = models.load(tmp_path)
    assert isinstance(again, PretrainedLM) and again.config.usual_flags == {"weigh": "update", "streams": 16}
    samples = data.World(48).held_out(2)
    a, b = (evaluation.hear(m, data.tokenizer_for(m.config), samples)[1].hidden for m in (net, again))
    assert torch.equal(a, b) and not any(again.uses_muon(n, p) != net.uses_muon(n, p) for n, p in net.named_parameters())
    (tmp_path / CONFIG).write_text(json.dumps(asdict(config) | OLD | {"colour": 3}))
    with pytest.raises(ValueError, match=r"config\.json must hold the Config of a model: .*colour"):
        models.load(tmp_path)


@pytest.mark.parametrize("folder", ["llama2", "llama3", "qwen2"])  # linear, Llama 3 and no scaling
def test_a_run_of_an_earlier_version_has_its_rope_scaling(tmp_path, folder):
    config = pretrained.pretrained(replace(SMALL, lora_rank=2), str(FIXTURES / folder))
    models.save(tmp_path, pretrained.build(config))
    values = json.loads((tmp_path / CONFIG).read_text())
    old = {name: value for name, value in values.items() if name not in ("rope_type", "mlp_bias", "query_norm")}
    (tmp_path / CONFIG).write_text(json.dumps(old))
    expected = load_file(FIXTURES / folder / "expected.safetensors")
    found = logits(models.load(tmp_path).eval().float(), expected["input_ids"])
    torch.testing.assert_close(found, expected["logits"], rtol=1e-5, atol=1e-5)


def test_new_tokens_of_a_run_of_an_earlier_version_are_found(tmp_path):
    config = pretrained.pretrained(replace(SMALL, lora_rank=2), str(FIXTURES / "llama3"), new_tokens=6)
    net = pretrained.build(config, seed=1)
    models.save(tmp_path, net)
    held = load_file(tmp_path / WEIGHTS)
    old = {new: name for name, new in pretrained_model.RENAMED.items()}
    save_file({old.get(name, name): t for name, t in held.items()}, tmp_path / WEIGHTS)
    again = models.load(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in net.state_dict().items())


def test_a_pretrained_vocabulary_is_extended_at_its_end_and_begins_each_stream_once():
    pytest.importorskip("tokenizers")
    t = data.tokenizer_for(plain(Config(), vocab_size=376, llm=str(LLM)))
    assert (t.pad, t.user, t.silent, t.opening) == (370, 371, 375, [0])
    text = "A red ring. <|begin_of_text|><frame><user>\u00e9"
    assert t.decode([0, 369, *t.encode(text), t.frame]) == text and 0 not in t.encode(text)
    assert max(t.encode(text)) < 370
    bad = t.encode("\u00e9")[:1]  # half of a character: it is heard again as it was said, not as it reads
    said = Turn(0, "assistant", t.decode(bad), tuple(bad))
    tokens, group, labels = data.layout([said], 2, 1, t, MASKED["text"])
    assert tokens == [0, -1, t.frame, t.assistant, *bad, t.end, -1, t.frame]
    assert (group[0], labels[0]) == (-1, -100)
    assert data.layout([said], 2, 1, t, MASKED["text"], begins=False)[0] == tokens[1:]


def test_a_vocabulary_that_does_not_fit_the_model_is_refused_in_a_sentence(monkeypatch):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"tokenizer\.json must have at most 200 entries, .* got 270"):
        PretrainedTokenizer(LLM, 200)
    with pytest.raises(ValueError, match=r"absent/tokenizer\.json must be the tokenizer of a model"):
        PretrainedTokenizer(Path("absent"), 370)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizers must be installed .*pip install tokenizers"):
        PretrainedTokenizer(LLM, 370)


@needs_ffmpeg
def test_each_clip_is_encoded_once_and_read_from_its_file_afterwards(tmp_path):
    make_video(tmp_path / "v.mp4", 5)
    span = {"video": "v.mp4", "start": 1, "end": 3, "conversation": [TURN | {"time": 3}]}
    whole = {"video": "v.mp4", "conversation": [{"role": "assistant", "content": "After all."}]}
    annotate(tmp_path, span, whole)
    models_of, seen = [], []
    for folder in ("siglip", "siglip", "clip"):
        net = pretrained.build(pretrained.pretrained(SMALL, vision=str(FIXTURES / folder)))
        models_of.append(net)
        net.vision_model.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
        source = Clips.open(str(tmp_path), 2.0, False, net.config.image_size)
        plain_samples = Clips.open(str(tmp_path), 2.0, False, net.config.image_size).held_out(2)
        net.adapt_source(source, tmp_path / "out" / "run")
        for sample, p in zip(source.held_out(2), plain_samples, strict=True):
            counted = len(seen)
            expected = net.vision_model(data.stack_frames([p.frames])[0]).detach().float().numpy()
            del seen[counted:]
            np.testing.assert_allclose(sample.frames, expected, rtol=1e-5, atol=1e-6)
            assert sample.turns == p.turns and np.array_equal(source.pixels(sample), p.frames)
    assert seen == [5, 10] * 2  # by another encoder anew
    files = list((tmp_path / "out" / "features").iterdir())
    assert len(files) == 4
    for file in files:
        file.write_bytes(b"broken")
    source.memory.clear()
    with pytest.raises(ValueError, match=r"safetensors must hold features \(remove it to encode again\)"):
        source.held_out(2)


def test_the_sizes_of_the_papers_are_those_of_their_models():
    for name, billions in (("llama3-8b", 8.03), ("vicuna-7b", 6.74)):
        net = pretrained_model.skeleton(replace(plain(SIZES[name]), lora_rank=128))
        size = sum(p.numel() for n, p in net.named_parameters()
                   if not n.startswith(("vision", "multi")) and "lora_" not in n)
        assert size / 1e9 == pytest.approx(billions, abs=0.01)
    assert SIZES["llama3-8b"].tokens_per_frame == 10


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--lora_rank", "3"], "lora_rank must be 2 to resume RUN, got 3"),
    (["--llm", "elsewhere"], "llm must be .*smollm2 to resume RUN, got .*elsewhere"),
    (["--vision", "elsewhere"], "vision must be left out to resume RUN, got .*elsewhere"),
    (["--preset", "tiny"], "preset must be coarse to resume RUN, got tiny"),
])
def test_a_run_is_resumed_by_its_own_command_and_by_no_other(adapted_run, flags, complaint):
    with pytest.raises(ValueError, match=complaint.replace("RUN", str(adapted_run.folder))):
        pretrained.main(["--out", str(adapted_run.folder), "--resume", *flags])
    argv = [*adapted_run.argv, "--resume", "--gradient_checkpointing"]
    settings, net = pretrained.prepare_run(*models.parse(PretrainedFlags, argv, ""))
    assert settings.resume and settings.adam_lr == 0.0002 and net.config.lora_rank == 2
    assert net.gradient_checkpointing and not net.config.gradient_checkpointing


class AdaptedRun(NamedTuple):
    folder: Path
    argv: list[str]


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    folder = tmp_path_factory.mktemp("adapted") / "run"
    argv = ["--llm", str(LLM), "--lora_rank", "2", "--preset", "coarse", "--steps", "1", "--batch", "1",
            "--streams", "1", "--device", "cpu", "--out", str(folder)]
    pretrained.main(argv)
    return AdaptedRun(folder, argv)


@pytest.mark.parametrize(("flags", "name"), [
    (["--lora_rank", "4"], "lora_rank"), (["--lora_alpha", "2", "--preset", "coarse"], "lora_alpha"),
    (["--train_vision"], "train_vision"), (["--llm", str(LLM), "--train_vision"], "train_vision"),
])
def test_a_flag_of_folders_that_are_not_given_is_refused(flags, name):
    for main in (pretrained.main, distributed.main):
        with pytest.raises(ValueError, match=f"{name} must be left out where it changes nothing, got"):
            main(flags)


def test_a_run_without_folders_is_named_after_its_preset():
    cfg = PretrainedFlags(preset="coarse", pool=2)
    settings, net = pretrained.prepare_run(cfg, {"preset", "pool"})
    assert settings.out == "out/coarse-narration-update-seed0" and net.config.pool == 2
