"""The page of a watched stream stands alone, and shows what was computed and what was said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import make_video, needs_ffmpeg

import data
import eval as evaluation
import train

HEAD = "const stream = "


def stream_of(page: str) -> dict:
    line = next(line for line in page.splitlines() if line.startswith(HEAD))
    return json.loads(line.removeprefix(HEAD).removesuffix(";"))


def test_a_page_holds_every_frame_and_every_choice_and_whatever_was_said_stays_text():
    frames = [np.full((4, 4, 3), n, np.uint8) for n in range(3)]
    kept = [{3: torch.tensor([True, False, n > 0, True, False]), 1: torch.ones(5).bool()} for n in range(3)]
    evil = "</script><img src=x onerror=alert(1)> \x1b[2J"
    page = evaluation.page("What & why?", 2.0, frames, kept, [None, evil, "A red disc."])
    stream = stream_of(page)
    assert stream["kept"] == {"1": ["11111"] * 3, "3": ["10010", "10110", "10110"]}
    assert stream["said"] == [None, evil.replace("\x1b", "\N{MIDDLE DOT}"), "A red disc."]
    assert (stream["title"], stream["fps"], len(stream["frames"])) == ("What & why?", 2.0, 3)
    assert page.count("</script>") == 1 and "<img" not in page
    empty = evaluation.page("", 2.0, frames, kept, [None] * 3)
    assert not re.search(r"https?:|src=|href=|@import|url\(", empty)  # nothing is fetched


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    train.main(["--task", "scene", "--steps", "1", "--streams", "1", "--device", "cpu", "--out", str(folder)])
    return folder


def test_without_a_video_the_page_is_of_a_held_out_stream(run, tmp_path, capsys):
    evaluation.main([str(run), "--html", str(tmp_path / "page.html"), "--device", "cpu"])
    stream = stream_of((tmp_path / "page.html").read_text())
    assert len(stream["frames"]) == data.Scene.frames == len(stream["said"])
    assert stream["kept"].keys() == {"1", "3"} and stream["title"].startswith("Name the colours")
    assert all(row.count("1") == 2 and len(row) == 10 for rows in stream["kept"].values() for row in rows)
    assert f"a page of all {data.Scene.frames} frames" in capsys.readouterr().out


@needs_ffmpeg
def test_with_a_video_the_page_is_of_it(run, tmp_path):
    make_video(tmp_path / "v.mp4", 7, 10)
    evaluation.main([str(run), "--watch", str(tmp_path / "v.mp4"), "--html", str(tmp_path / "page.html"),
                     "--query", "What?", "--device", "cpu"])
    stream = stream_of((tmp_path / "page.html").read_text())
    assert len(stream["frames"]) == 14 and stream["title"] == "What?"


def test_a_run_without_a_stream_of_its_own_needs_a_video(run, tmp_path):
    settings = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps(settings | {"task": "vqa"}))
    with pytest.raises(ValueError, match="watch must be given with html for the task vqa, got no video"):
        evaluation.main([str(run), "--html", str(tmp_path / "page.html"), "--device", "cpu"])
    assert not Path(tmp_path / "page.html").exists()
