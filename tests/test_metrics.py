"""The four metrics are those of VideoLLM-online's code, worked out by hand, beside their corrected forms."""

import math

import pytest
import torch

from data import Tokenizer
from eval import Evidence, speaks, summarise, turn_metrics

SILENT, SPEAK = False, True


def turn(spoke, later=(), right=(True, True, True, True), nll=None):
    return Evidence(list(spoke), list(later), nll or [math.log(2)] * len(right), list(right))


@pytest.mark.parametrize(("case", "time_diff", "corrected", "fluency", "fluency_corrected"), [
    # on time: all 3 frames and the 4 tokens of the reply, or those before its first wrong one
    (turn([SILENT, SILENT, SPEAK]), 0, 0, 7 / 7, 7 / 7),
    (turn([SILENT, SILENT, SPEAK], right=[True, False, True, True]), 0, 0, 4 / 7, 4 / 7),
    # one frame early: the code counts both frames as right, but only the first one was
    (turn([SILENT, SPEAK, SILENT]), 1, 1, 2 / 7, 1 / 7),
    (turn([SPEAK, SPEAK, SPEAK]), 2, 2, 1 / 7, 0 / 7),
    # two frames late
    (turn([SILENT] * 3, later=[SILENT, SPEAK]), 2, 2, 2 / 7, 2 / 7),
    # never: the code counts the frames that were fed, and with none left takes the reply for a punctual one
    (turn([SILENT] * 3, later=[SILENT, SILENT]), 2, 3, 2 / 7, 2 / 7),
    (turn([SILENT] * 3), 0, 1, 7 / 7, 2 / 7),
])
def test_a_turn_is_scored_as_worked_out_by_hand(case, time_diff, corrected, fluency, fluency_corrected):
    got = turn_metrics(case)
    assert got["time_diff"] == time_diff and got["time_diff_corrected"] == corrected
    assert [got["fluency"], got["fluency_corrected"]] == pytest.approx([fluency, fluency_corrected])
    assert got["lm_ppl"] == pytest.approx(2)


def test_the_mean_is_over_turns_then_over_streams_and_time_is_in_seconds():
    late, punctual = turn([SILENT], later=[SPEAK]), turn([SPEAK])
    numbers = summarise([[late, punctual, punctual, punctual], [late], []], fps=2)
    assert numbers["time_diff"] == pytest.approx((1 / 4 + 1) / 2 / 2)


def test_corrected_perplexity_is_that_of_all_tokens_and_reply_accuracy_counts_every_right_one():
    sure, unsure = turn([SPEAK], nll=[0.0] * 4, right=[True, False, True, True]), turn([SPEAK], nll=[2.0] * 4)
    numbers = summarise([[sure, unsure]], fps=1)
    assert numbers["lm_ppl"] == pytest.approx((1 + math.exp(2)) / 2)
    assert numbers["lm_ppl_corrected"] == pytest.approx(math.exp(1))
    assert numbers["lm_correctness"] == (1 / 4 + 1) / 2 and numbers["reply_accuracy"] == 7 / 8
    with pytest.raises(ValueError, match="at least one reply"):
        summarise([[], []], fps=2)
    diverged = summarise([[turn([SPEAK], nll=[1e4])]], fps=1)
    assert diverged["lm_ppl"] == diverged["lm_ppl_corrected"] == math.exp(100)  # a number, not infinity


def test_the_threshold_makes_it_speak_earlier_and_zero_leaves_the_best_token_to_decide():
    logits, silent = torch.full((1, 8), -9.0), Tokenizer().silent
    logits[0, silent], logits[0, Tokenizer().assistant] = 1.0, 0.0  # silence has about 0.73
    assert not speaks(logits, 0.0, silent).item() and not speaks(logits, 0.7, silent).item()
    assert speaks(logits, 0.8, silent).item() and speaks(logits[:, [5, 1, 2, 3, 4, 0]], 0, silent).item()
    even = torch.tensor([[0.0, 0.0]])  # silence has exactly 0.5, which is not below 0.5
    assert not speaks(even, 0.5, 0).item() and speaks(even, 0.5, 1).item()
