"""A pretrained vocabulary, features in place of frames, and tasks: all go the way of the embedded world."""

import pytest

from data import Turn, layout, tokenizer_for
from mod import MASKED


@pytest.fixture
def llm(tmp_path):
    """A folder with a byte-level tokenizer that begins every text with <s>."""
    tokenizers = pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=letters)
    built.train_from_iterator(["A taxi passes the taxi stand."] * 9, trainer)
    built.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_pretrained_vocabulary_is_extended_at_its_end_and_begins_each_stream_once(llm):
    t = tokenizer_for(406, str(llm))
    assert (t.pad, t.user, t.silent, t.opening) == (400, 401, 405, [0])
    text = "A taxi passes. <s><frame><user>é"
    assert t.decode([0, 399, *t.encode(text), t.frame]) == text and 0 not in t.encode(text)
    assert max(t.encode(text)) < 400
    bad = t.encode("é")[:1]  # half of a character: it is heard again as it was said, not as it reads
    said = Turn(0, "assistant", t.decode(bad), tuple(bad))
    tokens, group, labels = layout([said], 2, 1, t, MASKED["text"])
    assert tokens == [0, -1, t.frame, t.assistant, *bad, t.end, -1, t.frame]
    assert (group[0], labels[0]) == (-1, -100)
    assert layout([said], 2, 1, t, MASKED["text"], begins=False)[0] == tokens[1:]


def test_a_vocabulary_that_does_not_fit_the_model_is_refused_in_a_sentence(llm, monkeypatch):
    with pytest.raises(ValueError, match=r"tokenizer\.json must have at most 200 entries, .* got \d+"):
        tokenizer_for(206, str(llm))
    with pytest.raises(ValueError, match=r"absent/tokenizer\.json must be the tokenizer of a model"):
        tokenizer_for(406, str(llm / "absent"))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizers must be installed .*pip install tokenizers"):
        tokenizer_for(406, str(llm))
