"""Adapters learn, nothing else of the decoder does, and merging them changes nothing but rounding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_pretrained import FIXTURES, SMALL, logits

import data
import model as models
import train
from data import Special, World
from extras import pretrained
from extras.lora import LoraLinear

FOLDERS = {"llm": str(FIXTURES / "qwen2"), "vision": str(FIXTURES / "clip")}  # tied, with biases


def adapted(rank: int, **changes) -> pretrained.PretrainedLM:
    config = pretrained.pretrained(replace(SMALL, lora_rank=rank), **FOLDERS, new_tokens=6)
    return pretrained.build(replace(config, **changes), seed=1)


@settings(max_examples=10)
@given(st.integers(1, 5), st.sampled_from([0.5, 3.0, 16.0]), st.integers(0, 99))
def test_merged_adapters_are_the_unmerged_to_rounding_and_begin_as_no_change(rank, alpha, seed):
    net, tokens = adapted(rank, lora_alpha=alpha).double().eval(), torch.arange(20)[None]
    plain = adapted(0).double()
    assert torch.equal(logits(net, tokens), logits(plain, tokens))
    maps = [module for module in net.modules() if isinstance(module, LoraLinear) and module.rank]
    assert len(maps) == 7 * 2 + 1 and all(m.lora_A.shape[0] == rank for m in maps)  # and lm_head
    for m in maps:
        torch.nn.init.normal_(m.lora_B, generator=torch.Generator().manual_seed(seed))
        x = torch.ones(1, m.in_features, dtype=torch.float64)
        added = m(x) - torch.nn.Linear.forward(m, x) if not hasattr(m, "new") else None
        if added is not None:  # alpha / rank as a number
            torch.testing.assert_close(added, alpha / rank * (x @ m.lora_A.T @ m.lora_B.T))
    merged = pretrained.merge(net)
    assert not any("lora_" in name for name in merged.state_dict()) and merged.config.lora_rank == 0
    assert not torch.equal(logits(net, tokens), logits(plain, tokens))
    torch.testing.assert_close(logits(merged, tokens), logits(net, tokens), rtol=1e-9, atol=1e-9)


def test_adapters_of_alpha_32_and_rank_8_add_4_times_b_a():
    net = adapted(8, lora_alpha=32.0, lora_dropout=0.0).float()
    for m in (module for module in net.modules() if isinstance(module, LoraLinear) and module.rank):
        for p, value in ((m.weight, 0), (m.bias, 0), (m.lora_B, 0.5)):
            if p is not None:
                p.data.fill_(value)
        m.lora_A.data.copy_(torch.arange(8.0)[:, None])  # row i is i, so B A is 0.5 * (0 + 1 + ... + 7) = 14 throughout
        assert (m(torch.ones(1, m.in_features))[0, : m.out_features] == 4 * 14 * m.in_features).all()
        assert (m.merged() == 4 * 14).all()


def test_each_new_token_reads_and_scores_its_own_row():
    net = adapted(0).float()
    first = net.config.vocab_size - 6
    with torch.no_grad():
        net.embed_tokens.new.copy_(torch.arange(100.0, 106)[:, None])  # row n is n throughout
        net.lm_head.new.copy_(torch.arange(200.0, 206)[:, None])
    rows = net.embed_tokens(torch.arange(first - 1, first + 6))
    assert torch.equal(rows[0], net.embed_tokens.weight[-1])
    assert rows[1:].tolist() == [[float(n)] * net.config.hidden_size for n in range(100, 106)]
    scores = net.lm_head(torch.eye(net.config.hidden_size))  # each row's numbers
    assert torch.equal(scores[:, :first], net.lm_head.weight.T)
    assert scores[:, first:].tolist() == [[200.0, 201, 202, 203, 204, 205]] * net.config.hidden_size
    tokenizer = Special(first, [])
    ids = [tokenizer.pad, tokenizer.user, tokenizer.assistant, tokenizer.end, tokenizer.frame, tokenizer.silent]
    assert net.embed_tokens(torch.tensor(ids))[:, 0].tolist() == [100.0, 101, 102, 103, 104, 105]


def test_training_changes_the_adapters_the_router_the_projector_and_the_new_tokens_alone(tmp_path, monkeypatch):
    net = adapted(3, lora_alpha=4.0, lora_dropout=0.5, keep=(0.5, 0.5), router="shared", gate="unit")
    before = {name: t.clone() for name, t in net.state_dict().items()}
    cfg = train.TrainConfig(adam_lr=0.1, steps=2, batch=2, out=str(tmp_path / "learned"))
    cfg.folder.mkdir()
    tokenizer = Special(96, [])
    tokenizer.encode = lambda text: [5] * len(text.split())
    monkeypatch.setattr(data, "tokenizer_for", lambda config: tokenizer)
    train.learn(cfg, net.train(), World(net.config.image_size))  # after a step the gradient of A is not zero
    changed = {name for name, t in net.state_dict().items() if not torch.equal(t, before[name])}
    own = {name for name in before if "lora_" in name or name.startswith(("multi_modal", "routers")) or name.endswith(".new")}
    assert changed == own == set(net.learned_state()) and "routers.shared.weight" in own
    models.save(tmp_path, net)
    assert set(load_file(tmp_path / "model.safetensors")) == own
    again = models.load(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in net.state_dict().items())
    models.save(tmp_path / "merged", pretrained.merge(again))
    merged = models.load(tmp_path / "merged")
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")  # no longer tied
    a, b = (logits(m.float().eval(), torch.arange(102)[None]) for m in (net, merged))
    assert (a - b).norm() < 0.02 * a.norm()  # W is bfloat16, so merging rounds


def test_a_run_whose_pretrained_folder_is_gone_says_so(tmp_path):
    net = adapted(1)
    net.config = replace(net.config, llm=str(tmp_path / "gone"))
    models.save(tmp_path / "run", net)
    with pytest.raises(ValueError, match=r"gone/model\.safetensors must be a safetensors file"):
        models.load(tmp_path / "run")
