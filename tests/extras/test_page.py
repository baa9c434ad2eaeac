"""The page of a watched stream stands alone, and shows what was computed and what was said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import make_video, needs_ffmpeg

import train
from extras import page
from extras.worlds import Scene

HEAD = "const stream = "


def stream_of(page: str) -> dict:
    line = next(line for line in page.splitlines() if line.startswith(HEAD))
    return json.loads(line.removeprefix(HEAD).removesuffix(";"))


def test_a_page_holds_every_frame_and_every_choice_and_whatever_was_said_stays_text():
    frames = [np.full((4, 4, 3), n, np.uint8) for n in range(3)]
    kept = [{3: torch.tensor([True, False, n > 0, True, False]), 1: torch.ones(5).bool()} for n in range(3)]
    evil = "</script><img src=x onerror=alert(1)> \x1b[2J"
    said = [None, evil, "A red disc."]
    made = page.page("What & why?", 2.0, [page.Watched(*each) for each in zip(frames, kept, said, strict=True)])
    stream = stream_of(made)
    assert stream["kept"] == {"1": ["11111"] * 3, "3": ["10010", "10110", "10110"]}
    assert stream["said"] == [None, evil.replace("\x1b", "\N{MIDDLE DOT}"), "A red disc."]
    assert (stream["title"], stream["fps"], len(stream["frames"])) == ("What & why?", 2.0, 3)
    assert made.count("</script>") == 1 and "<img" not in made
    silent = [page.Watched(*each, None) for each in zip(frames, kept, strict=True)]
    empty = page.page("", 2.0, silent)
    assert not re.search(r"https?:|src=|href=|@import|url\(", empty)  # nothing is fetched


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    train.main(["--task", "scene", "--steps", "1", "--streams", "1", "--device", "cpu", "--out", str(folder)])
    return folder


def test_without_a_video_the_page_is_of_a_held_out_stream(run, tmp_path, capsys):
    page.main([str(run), "--out", str(tmp_path / "page.html"), "--device", "cpu"])
    stream = stream_of((tmp_path / "page.html").read_text())
    assert len(stream["frames"]) == Scene.frames == len(stream["said"])
    assert stream["kept"].keys() == {"1"} and stream["title"].startswith("Narrate what you see")
    assert all(row.count("1") == 7 and len(row) == 37 for rows in stream["kept"].values() for row in rows)
    assert f"a page of all {Scene.frames} frames" in capsys.readouterr().out


@needs_ffmpeg
def test_with_a_video_the_page_is_of_it(run, tmp_path):
    make_video(tmp_path / "v.mp4", 7, 10)
    page.main([str(run), "--watch", str(tmp_path / "v.mp4"), "--out", str(tmp_path / "page.html"),
               "--query", "What?", "--window", "2", "--device", "cpu"])
    stream = stream_of((tmp_path / "page.html").read_text())
    assert len(stream["frames"]) == 14 and stream["title"] == "What?"


def test_a_run_without_a_stream_of_its_own_needs_a_video(run, tmp_path):
    settings = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps(settings | {"task": "vqa"}))
    with pytest.raises(ValueError, match=r"watch must be given for the task vqa, .*, got no video"):
        page.main([str(run), "--out", str(tmp_path / "page.html"), "--device", "cpu"])
    assert not Path(tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match=r"out must name an \.html file in a folder that is there, got x\.png"):
        page.main([str(run), "--out", "x.png"])
