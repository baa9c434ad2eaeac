"""Whatever is in the files of extras, their doors end in a result or a sentence, as those of the core do."""

import json
import shutil
from collections import Counter

import pytest
from strategies import keep
from test_benchmarks import FILES
from test_endless import SMALL
from test_fuzz import (
    ENDED,
    MEGABYTES,
    SECONDS,
    count,
    no_decoder,
    open_clips,
    write_clips,
    write_run,
)
from test_pretrained import FIXTURES, plain

import data
import model as models
from eval import METRICS
from extras import pretrained, sweep
from extras.huggingface import PretrainedTokenizer
from extras.tables import table

assert no_decoder  # a fixture


def write_benchmark(task):
    def write(folder):
        (folder / "i").mkdir()
        for name in ("v.mp4", "w.mp4", "x.mp4", "y.mp4", "c.mp4", "i/a.png", "i/a.jpg"):
            (folder / name).touch()
        for name, values in FILES[task.split("-")[0]].items():
            (folder / name).write_text(json.dumps(values))

    return write


def open_benchmark(task):
    return lambda folder: open_clips(folder, task).answers()


def copy(name):
    return lambda folder: shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)


def build(**folders):
    return pretrained.build(pretrained.pretrained(plain(SMALL), **folders))


def write_rows(folder):
    write_run(folder)
    free = {name: 0.5 for _, name, _ in METRICS[:9]}
    models.write_json(folder / "eval.json", {"streams": 4, "threshold": 0.0, "free_running": free})


def open_rows(folder):
    table(sweep.collect(folder.parent))


def write_features(folder):
    write_clips(folder)
    open_features(folder)


def open_features(folder):
    """A frozen encoder's features, which the file of an earlier run holds"""
    model = MODELS.setdefault("siglip", build(vision=str(FIXTURES / "siglip")))
    clips = data.Clips.open(str(folder), 2.0, False, model.config.image_size)
    model.adapt_source(clips, folder / "run")
    clips.held_out(1)


MODELS: dict = {}
MORE = {
    **{task: (write_benchmark(task), open_benchmark(task), ["*.json"])
       for task in ("ego4d", "lta", "coin-step", "coin-procedure", "keystep", "llava")},
    "rows": (write_rows, open_rows, ["*.json", "*.jsonl"]),
    "llm": (copy("llama3"), lambda folder: build(llm=str(folder)), ["config.json", "model.safetensors"]),
    "vision": (copy("siglip"), lambda folder: build(vision=str(folder)), ["*config.json", "model.safetensors"]),
    "tokenizer": (copy("smollm2"), lambda folder: PretrainedTokenizer(folder, 300).encode("A red disc."),
                  ["tokenizer.json"]),
    "features": (write_features, open_features, ["features/*.safetensors"]),
}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("cases", [15, pytest.param(500, marks=pytest.mark.long)])
def test_spoilt_files_of_extras_end_in_a_result_or_a_sentence(name, cases, tmp_path, no_decoder):
    if name == "tokenizer":
        pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    count(name, MORE[name], cases, tmp_path)


@pytest.mark.long
def test_they_were_at_least_five_thousand():
    if (cases := sum(map(Counter.total, ENDED.values()))) < 5000:
        pytest.skip("only some of the doors were tried")
    said = (f"{ended['a sentence']:,} of {ended.total():,} {what}" for what, ended in ENDED.items())
    keep("spoilt input", f"{cases:,}: {' and '.join(said)} are refused in a sentence, the rest give a "
         f"result; each in {SECONDS} s, within {MEGABYTES} MB; no other file is opened, no connection")


def test_a_run_whose_scores_are_lost_is_named(tmp_path):
    (run := tmp_path / "run").mkdir()
    write_rows(run)
    models.write_json(run / "eval.json", {"streams": 4, "threshold": 0.0, "free_running": {"lm_ppl": 1.0}})
    with pytest.raises(ValueError, match=rf"{run} must be an evaluated run: .*it has no scores"):
        sweep.collect(tmp_path)
