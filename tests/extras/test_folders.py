"""Whatever a folder holds beside the usual is read as transformers reads it, or refused in a sentence that names a file.

The right values are the logits of transformers in the fixtures: a folder is changed so that they must stay, or change
in a known way.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_pretrained import CONFIG, FIXTURES, INDEX, LLM, SMALL, WEIGHTS, logits, spoil

import model as models
from extras import mixed_types, pretrained
from extras.huggingface import PretrainedTokenizer
from extras.pretrained import PretrainedLM
from extras.rope import read_scaling, scale_frequencies
from mod import Groups
from model import Cache, rope_frequencies

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
HAS_UNITS = mixed_types.has_units  # each test has another, see conftest.py


@pytest.fixture
def copied(tmp_path):
    """A copy of a fixture, its config.json changed; a value of "" leaves a key out"""
    def copy(name: str, **changes: object) -> Path:
        folder = Path(shutil.copytree(FIXTURES / name, tmp_path / "folder"))
        values = json.loads((folder / CONFIG).read_text()) | changes
        kept = {key: value for key, value in values.items() if value != ""}
        (folder / CONFIG).write_text(json.dumps(kept))
        return folder
    return copy


def build(folder: Path, **changes: object) -> PretrainedLM:
    return pretrained.build(replace(pretrained.pretrained(SMALL, str(folder)), **changes)).eval()


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    known = load_file(folder / "expected.safetensors")
    return known["input_ids"], known["logits"]


def check_logits(net: PretrainedLM, folder: Path, times: float = 1) -> None:
    ids, known = expected(folder)
    torch.testing.assert_close(logits(net.float(), ids), times * known, rtol=1e-5, atol=1e-5)


def test_a_head_that_differs_from_the_table_is_used_though_the_config_ties_them(copied, tmp_path):
    folder = copied("qwen2")
    table = load_file(folder / WEIGHTS)[TABLE]
    spoil(folder / WEIGHTS, {HEAD: 4 * table})  # exact in bfloat16
    net = build(folder)
    assert not net.config.tie_word_embeddings and net.lm_head.weight is not net.embed_tokens.weight
    check_logits(net, folder, times=4)
    models.save(tmp_path / "run", build(folder))
    check_logits(models.load(tmp_path / "run"), folder, times=4)
    check_logits(build(folder, tie_word_embeddings=True), folder)  # as a run of an earlier version says


@pytest.mark.parametrize("kept", [{HEAD, TABLE}, {HEAD}, {TABLE}], ids=str)
def test_a_tied_head_is_the_table_whichever_of_them_the_file_holds(copied, kept):
    folder = copied("qwen2")
    held = load_file(folder / WEIGHTS)
    held |= {name: held[TABLE].clone() for name in kept}
    save_file({name: t for name, t in held.items() if name in kept or name not in (HEAD, TABLE)}, folder / WEIGHTS)
    net = build(folder)
    assert net.config.tie_word_embeddings and net.lm_head.weight is net.embed_tokens.weight
    check_logits(net, folder)


def test_a_whole_file_is_read_before_an_index_and_no_shard_that_the_index_does_not_name(copied):
    folder, whole = copied("smollm2"), {}
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards:
        whole |= load_file(shard)
    save_file({TABLE: torch.zeros(1)}, folder / "model-00009-of-00009.safetensors")  # of an earlier save
    check_logits(build(folder), folder)
    save_file(whole, folder / WEIGHTS)
    for shard in shards:
        save_file({name: t + 1 for name, t in load_file(shard).items()}, shard)
    assert (folder / INDEX).exists() and len(shards) > 1
    check_logits(build(folder), folder)


@pytest.mark.parametrize(("processor", "preprocessor", "known"), [
    ({"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}, {"image_mean": [0.9] * 3},
     ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])),
    ({"image_processor": {"image_mean": [0, 0, 0]}}, {"image_std": [9, 9, 9]},
     ([0, 0, 0], [0.26862954, 0.26130258, 0.27577711])),  # CLIP's own where that file says nothing
    ({"processor_class": "CLIPProcessor"}, {"image_mean": [0.7] * 3, "image_std": [0.8] * 3}, ([0.7] * 3, [0.8] * 3)),
])
def test_pixel_statistics_are_those_of_processor_config_where_it_has_some(copied, processor, preprocessor, known):
    folder = copied("clip-vision")
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    vision = pretrained.build(pretrained.pretrained(SMALL, vision=str(folder))).float().vision_model
    frames = load_file(folder / "expected.safetensors")["frames"]
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in known)
    torch.testing.assert_close(vision.normalise(frames), (frames / 255 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("file", "values", "complaint"), [
    ("processor_config.json", {"image_processor": 3}, "must have an object as image_processor, got 3"),
    ("processor_config.json", {"image_processor": {"image_std": [1, 0, 1]}}, "must have numbers above 0 as image_std"),
    ("preprocessor_config.json", {"image_mean": [1, 2]}, r"must have three numbers as image_mean, got \[1, 2\]"),
    ("preprocessor_config.json", {"image_mean": 0.5}, r"must have three numbers as image_mean, got 0\.5"),
    ("preprocessor_config.json", {"image_std": ["a"] * 3}, "must have three numbers as image_std"),
])
def test_a_bad_statistic_is_refused_by_the_name_of_its_file(copied, file, values, complaint):
    folder = copied("clip")
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"folder/{file} {complaint}"):
        pretrained.pretrained(SMALL, vision=str(folder))


def test_an_error_names_the_folder_that_is_wrong_of_two(copied):
    folder = copied("clip", vision_config={"hidden_size": 17})  # not a multiple of the heads
    with pytest.raises(ValueError, match=r"folder/config\.json must be of a known model: vision_hidden_size"):
        pretrained.pretrained(SMALL, str(FIXTURES / "llama2"), str(folder))


@pytest.mark.parametrize(("template", "opening"), [
    ("{0} $A {1}", [0]), ("$A {1}", []), ("{0} {1} $A {1} {0}", [0, 1]), ("$A", []),
])
def test_only_what_stands_before_the_text_in_a_template_opens_a_stream(copied, template, opening):
    tokenizers = pytest.importorskip("tokenizers")
    folder = copied(LLM.name)
    file, names = str(folder / "tokenizer.json"), ("<|begin_of_text|>", "<|end_of_text|>")
    t = tokenizers.Tokenizer.from_file(file)
    special = list(zip(names, (0, 1), strict=True))
    how = {"single": template.format(*names), "special_tokens": special}
    t.post_processor = tokenizers.processors.TemplateProcessing(**how)
    t.save(file)
    assert PretrainedTokenizer(folder, 300).opening == opening


def test_each_weight_keeps_the_type_of_its_file_and_they_compute_together(tmp_path):
    folder = FIXTURES / "llama-mixed"  # norms and biases float32, layers float16, tables bfloat16
    types = {name.removeprefix("model."): t.dtype for name, t in load_file(folder / WEIGHTS).items()}
    assert set(types.values()) == {torch.float32, torch.float16, torch.bfloat16}
    net = build(folder)
    assert {name: t.dtype for name, t in net.state_dict().items() if name in types} == types
    ids, known = expected(folder)
    seen = []
    net.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype), prepend=True)
    found = logits(net, ids)
    assert seen == [found.dtype] == [torch.bfloat16] and (found - known).norm() < 0.02 * known.norm()
    config = pretrained.pretrained(replace(SMALL, lora_rank=2), str(folder), new_tokens=6)
    adapted = pretrained.build(config)
    torch.nn.init.normal_(adapted.layers[0].mlp.up_proj.lora_B)
    logits(adapted, ids).float().logsumexp(-1).sum().backward()
    assert adapted.layers[0].self_attn.q_proj.lora_B.grad.abs().sum() > 0
    models.save(tmp_path / "run", adapted)
    models.save(tmp_path / "merged", pretrained.merge(models.load(tmp_path / "run")))
    for name in ("run", "merged"):
        again = models.load(tmp_path / name).eval()
        assert {key: t.dtype for key, t in again.state_dict().items() if key in types} == types
        difference = logits(again, ids) - logits(adapted.eval(), ids)
        assert difference.norm() < 0.02 * known.norm()


def types(weights: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in weights.items()}


@pytest.mark.parametrize("name", ["llama3", "llama-mixed"])  # one type, and three
def test_without_units_for_its_type_a_weight_is_computed_in_float32_and_that_is_said_once(
        tmp_path, monkeypatch, capsys, name):
    config = pretrained.pretrained(replace(SMALL, lora_rank=2), str(FIXTURES / name), str(FIXTURES / "siglip"), 6)
    full = pretrained.build(config)
    held, full = types(full.state_dict()), full.float().eval()
    models.save(tmp_path, pretrained.build(config))
    monkeypatch.setattr(mixed_types, "has_units", lambda dtype: False)
    nets = [pretrained.build(config), models.load(tmp_path)]
    assert [types(net.state_dict()) for net in nets] == [held] * 2  # so it is merged, or moved to a GPU
    nets[0].adapt_source(None, tmp_path)  # as before training
    nets[1].eval()  # as in eval.py
    ids, _ = expected(FIXTURES / name)
    for net in nets:
        assert set(types(net.state_dict()).values()) == {torch.float32}
        assert torch.equal(logits(net.eval(), ids), logits(full, ids))
    said = "{0} weights are computed in float32: this CPU has no {0} units\n"
    narrow = [str(kind).removeprefix("torch.") for kind in {*held.values()} - {torch.float32}]
    assert sorted(capsys.readouterr().out.splitlines(True)) == sorted(map(said.format, narrow))


@pytest.mark.parametrize(("rank", "folders"), [
    (2, {"llm": str(LLM), "vision": str(FIXTURES / "siglip")}), (0, {"llm": str(LLM)}),
    (2, {})])  # a frozen decoder that was drawn is saved in bfloat16
def test_a_run_saves_the_same_types_without_units_and_another_device_computes_in_them(monkeypatch, rank, folders):
    config = pretrained.pretrained(replace(SMALL, lora_rank=rank), **folders)
    net, away = (pretrained.learn_in_float32(pretrained.build(config)) for _ in range(2))
    held, saved = types(net.state_dict()), types(net.learned_state())
    monkeypatch.setattr(mixed_types, "has_units", lambda dtype: False)
    assert types(net.eval().learned_state()) == saved
    assert types(away.to("meta").eval().state_dict()) == held


@pytest.mark.parametrize(("there", "supported", "cpu", "fast"), [
    (True, True, {"avx512_f": True, "avx512_bf16": True}, True), (True, False, {"avx512_f": False}, False),
    (True, True, {"avx512_f": True, "avx512_bf16": False}, False),  # it emulates them
    (True, True, {"bf16": True}, True), (True, False, {}, False),  # ARM has no AVX-512
    (False, True, {}, False)])
def test_a_cpu_has_units_where_onednn_uses_them(monkeypatch, there, supported, cpu, fast):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    for asked, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for kind in ("bf16", "fp16"):
            name, answer = f"_is_mkldnn_{kind}_supported", supported if kind == asked else not supported
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda answer=answer: answer, raising=False)
        assert HAS_UNITS(dtype) == fast


def test_an_encoder_of_several_types_computes_what_it_does_in_float32(copied):
    for name in ("clip", "siglip"):
        folder = copied(name)
        held = load_file(folder / WEIGHTS)
        norms = {key: t.float() for key, t in held.items() if "norm" in key or key.endswith("bias")}
        save_file(held | norms, folder / WEIGHTS)
        net = pretrained.build(pretrained.pretrained(SMALL, vision=str(folder)))
        own = {key: t.dtype for key, t in load_file(folder / WEIGHTS).items() if key.startswith("vision_model.")}
        widened = ("vision_model.head.attention", "vision_model.embeddings.patch_embedding") if name == "siglip" else ()
        for key, p in net.named_parameters():
            if key in own and not key.startswith(widened):
                assert p.dtype == own[key], key
        frames = load_file(folder / "expected.safetensors")["frames"]
        mixed, full = net.vision_model(frames).float(), net.float().vision_model(frames)
        assert (mixed - full).norm() < 0.01 * full.norm()
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "clip", "siglip"])
def test_nothing_is_cast_where_all_weights_have_one_type(name):
    how = {"vision" if name in ("clip", "siglip") else "llm": str(FIXTURES / name)}
    net = pretrained.build(pretrained.pretrained(replace(SMALL, lora_rank=2), **how))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_a_missing_original_length_is_the_longest_position(copied, name, spelling):
    values = json.loads((FIXTURES / name / CONFIG).read_text())
    rope = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or values["rope_parameters"])}
    assert rope.pop("original_max_position_embeddings") == 32
    left_out = {"rope_parameters": "", "rope_scaling": "", "rope_theta": ""}
    folder = copied(name, **left_out | {spelling: rope, "max_position_embeddings": 32})
    check_logits(build(folder), folder)


@pytest.mark.parametrize(("name", "changes", "fields"), [
    ("qwen3", {"head_dim": ""}, {"head_dim": 128}),
    ("qwen3", {"attention_bias": True, "mlp_bias": True}, {"attention_bias": True, "output_bias": True, "mlp_bias": False}),
    ("qwen2", {"attention_bias": False, "mlp_bias": True}, {"attention_bias": True, "output_bias": False, "mlp_bias": False}),
    ("mistral", {"attention_bias": True, "mlp_bias": True}, {"attention_bias": False, "output_bias": False, "mlp_bias": False}),
    ("llama-bias", {}, {"attention_bias": True, "output_bias": True, "mlp_bias": True}),
    ("llama-bias", {"mlp_bias": ""}, {"attention_bias": True, "output_bias": True, "mlp_bias": False}),
    ("mistral", {"num_key_value_heads": "", "num_attention_heads": 8, "head_dim": 4}, {"num_key_value_heads": 8}),
    ("qwen2", {"num_key_value_heads": "", "num_attention_heads": 32, "head_dim": 4}, {"num_key_value_heads": 32}),
    ("qwen2", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),  # null: as many as of queries
    ("llama3", {"num_key_value_heads": ""}, {"num_key_value_heads": 4}),
    ("llama3", {"rms_norm_eps": "", "rope_parameters": ""}, {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_type": "default"}),
    ("llama3", {"original_max_position_embeddings": 16}, {"rope_scaling": (8.0, 1.0, 4.0, 16)}),  # before that of RoPE
    ("yarn", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0,
      "original_max_position_embeddings": 32}}, {"rope_type": "dynamic", "rope_scaling": (3.0, 64)}),
])
def test_what_config_json_leaves_out_or_says_in_vain_is_as_in_transformers(copied, name, changes, fields):
    config = pretrained.pretrained(SMALL, str(copied(name, **changes)))
    assert {field: getattr(config, field) for field in fields} == fields


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(("name", "changes", "refused"), [
    ("mistral", {"sliding_window": 6}, "got 6 in layer 0"),
    ("mistral", {"sliding_window": ""}, "got 4096 in layer 0"),  # what transformers takes then
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"sliding_window": 6, "layer_types": [FULL, FULL]}, None),
    ("mistral", {"sliding_window": 6, "layer_types": [FULL, SLIDING]}, "got 6 in layer 1"),
    ("mistral", {"sliding_window": 64, "max_position_embeddings": 64}, None),
    ("mistral", {"sliding_window": 64, "max_position_embeddings": 65}, "got 64 in layer 0"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": ""}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": ""}, "layer 1"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": [SLIDING, FULL]}, "got 4 in layer 0"),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 4}, None),
    ("llama2", {"sliding_window": 4, "use_sliding_window": True}, None),  # Llama has none
])
def test_a_window_that_no_layer_has_is_read_and_another_is_refused_in_a_sentence(copied, name, changes, refused):
    folder = copied(name, **changes)
    if refused is None:
        return check_logits(build(folder), folder)
    rule = r"config\.json must .* sliding_window must be at least max_position_embeddings \(\d+\) in each layer"
    with pytest.raises(ValueError, match=f"{rule}, .*{refused}"):
        build(folder)


def test_a_dynamic_rope_is_unscaled_up_to_the_longest_position_and_refused_beyond_it(copied):
    dynamic = {"rope_parameters": "", "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    folder = copied("llama-bias", **dynamic, max_position_embeddings=16)
    net, (ids, known) = build(folder).float(), expected(folder)
    check_logits(net, folder)  # of 16 tokens
    too_long = r"a stream of .*folder must have at most 16 tokens, for which its dynamic RoPE is unscaled, got 17"
    with pytest.raises(ValueError, match=too_long):
        logits(net, torch.cat([ids, ids[:, :1]], 1))
    cache = Cache(net, 1)
    for part in (ids[:, :9], ids[:, 9:], ids[:, :1]):
        groups = Groups.plan(torch.full_like(part, -1), net.config.keep)
        call = (part, torch.zeros(1, 0), groups, torch.zeros(1).long(), cache)
        if int(cache.seen) == 16:
            with pytest.raises(ValueError, match=too_long):
                net(*call)
        else:
            hidden = net(*call).hidden
    torch.testing.assert_close(net.logits(hidden), known[:, 9:], rtol=1e-5, atol=1e-5)


@given(st.sampled_from([4, 16, 64]), st.sampled_from([500.0, 1e4, 1e6]), st.integers(1, 40), st.integers(16, 40000),
       st.sampled_from([1, 2.5]), st.sampled_from([8, 32]), st.booleans())
def test_yarn_keeps_fast_pairs_slows_slow_ones_and_between_them_goes_by_the_logarithm(
        d, theta, factor, length, slow, fast, truncate):
    yarn = {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow, "truncate": truncate,
            "original_max_position_embeddings": length}
    frequency = rope_frequencies(d, theta)
    scaled = scale_frequencies(frequency, theta, *read_scaling({"rope_parameters": yarn}, 10**6))
    low = math.log(length / (2 * math.pi * fast)) / math.log(theta) * d / 2  # where a pair turns `fast` times
    high = math.log(length / (2 * math.pi * slow)) / math.log(theta) * d / 2
    for f, got in zip(frequency, scaled, strict=True):
        turns = length * f / (2 * math.pi)
        slowed = math.log(fast / turns) / math.log(fast / slow)  # 0 at `fast` turns, 1 at `slow`
        if turns >= fast * (1 + 1e-9) or turns <= slow / (1 + 1e-9):
            assert got == pytest.approx(f if turns >= fast else f / factor)
        elif not truncate and low >= 0 and high <= d - 1:  # transformers clips the ramp's ends to these
            assert got == pytest.approx((1 - slowed) * f + slowed * f / factor)
        else:
            assert f / factor <= got * (1 + 1e-9) and got <= f * (1 + 1e-9)


@pytest.mark.parametrize(("given", "attention"), [
    ({"factor": 4.0}, 1 + 0.1 * math.log(4)), ({"factor": 0.5}, 1),
    ({}, 1 + 0.1 * math.log(8)), ({"factor": None}, 1 + 0.1 * math.log(8)),  # 256 / 32
    ({"factor": 4.0, "attention_factor": 1.5}, 1.5),
    ({"factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}, (1 + 0.2 * math.log(4)) / (1 + 0.1 * math.log(4))),
    ({"factor": 4.0, "mscale": 2.0}, 1 + 0.1 * math.log(4)),  # both, or neither
])
def test_yarn_lengthens_queries_and_keys_by_its_attention_factor(given, attention):
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 32, **given}
    kind, numbers = read_scaling({"rope_parameters": rope}, 256)
    config = replace(SMALL, rope_type=kind, rope_scaling=numbers)
    assert config.rope_scale == pytest.approx(attention)
    x, turns = torch.ones(1, 1, config.hidden_size), torch.tensor([[[[1.0] * 16, [0.0] * 16]]])  # no turn
    attend = PretrainedLM(config).layers[0].self_attn
    q, k, v = attend.heads(x, turns)
    for got, layer in ((q, attend.q_proj), (k, attend.k_proj)):
        torch.testing.assert_close(got.transpose(1, 2).flatten(), attention * layer(x).flatten())
    torch.testing.assert_close(v.transpose(1, 2).flatten(), attend.v_proj(x).flatten())
