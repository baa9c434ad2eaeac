"""Tasks, clips and features in place of frames: all go the way of the embedded world."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import TURN, annotate, make_video, needs_ffmpeg
from test_data import open_clips

import data
from data import VQA, Clips, Tokenizer, Turn, World, stack_frames
from eval import Watcher, cut, evaluate
from model import VideoLM, initialise, preset
from video import frame_index, read_video


def test_a_task_that_there_is_not_is_refused_with_the_names_of_all():
    assert data.find_task("narration") is World and data.find_task("vqa") is VQA
    with pytest.raises(ValueError, match=r"^task must be one of narration, vqa.*, got chess$"):
        data.open_source("chess", "", 2.0, False, 48)


def test_a_world_is_no_folder_and_narration_is_both(tmp_path):
    world = data.open_source("vqa", "", 2.0, False, 24)
    assert isinstance(world, VQA) and world.size == 24 and world.defaults["router"] == "shared"
    assert world.asks and not World(24).asks
    assert World.defaults == {} and world.score(None, Tokenizer(), [], []) == {}
    message = "task must not be given with data but to name a benchmark, got vqa"
    with pytest.raises(ValueError, match=message):
        data.open_source("vqa", str(tmp_path), 2.0, False, 24)
    with pytest.raises(ValueError, match="must hold clips and replies, got 0 clips"):
        data.open_source("narration", str(tmp_path), 2.0, False, 24)


@needs_ffmpeg
@pytest.mark.parametrize("fps", [2.0, 3.0, 0.7])
def test_a_span_is_exactly_these_frames_of_the_whole(tmp_path, fps):
    video = make_video(tmp_path / "v.mp4", 16, 10, "testsrc2=size=32x32")
    whole = [frame.tobytes() for frame in read_video(video, fps, 16)]
    for start, end in ((0, 3), (2.3, 7.7), (5, 5), (13.1, 15.2), (14.2, 17)):
        first, last = frame_index(start, fps), frame_index(end, fps)
        wanted = (whole + whole[-1:] * 4)[first : last + 1]  # after its end the video stands still
        found = [frame.tobytes() for frame in read_video(video, fps, 16, start=start, end=end)]
        assert found == wanted


@needs_ffmpeg
def test_in_a_span_time_is_that_of_the_video(tmp_path):
    make_video(tmp_path / "v.mp4", 5)
    span = {"video": "v.mp4", "start": 1, "end": 3, "conversation": [TURN | {"time": 3}]}
    whole = {"video": "v.mp4", "conversation": [{"role": "assistant", "content": "After all."}]}
    samples = open_clips(annotate(tmp_path, span, whole)).held_out(2)
    assert [sample.turns[0].frame for sample in samples] == [4, 10]


def test_a_time_after_the_end_is_refused_with_the_time_of_the_end_in_the_video(tmp_path):
    late = {"video": "v.mp4", "start": 4, "conversation": [TURN | {"time": 6}]}
    (tmp_path / "v.mp4").touch()
    clips = open_clips(annotate(tmp_path, late))
    clips.encode = lambda clip: np.zeros((3, 1, 1), np.float32)
    with pytest.raises(ValueError, match=r"time must be at most 5\.5 s, the end of v\.mp4, got 6$"):
        clips.held_out(1)


@needs_ffmpeg
def test_each_clip_is_decoded_or_encoded_once_and_pixels_are_always_decoded(tmp_path, monkeypatch):
    make_video(tmp_path / "v.mp4", 2)
    clips, seen = open_clips(annotate(tmp_path, {"video": "v.mp4", "conversation": [TURN]})), []
    (plain,) = clips.held_out(1)
    clips = open_clips(tmp_path)

    def encode(clip):
        seen.append(clip.video.name)
        return clips.decode(clip).mean(2, dtype=np.float32)  # (F, S, 3)

    clips.encode = encode
    for sample in clips.held_out(1) + clips.batch(0, 0, 1):
        assert np.array_equal(sample.frames, plain.frames.mean(2, dtype=np.float32))
        assert sample.turns == plain.turns
    assert seen == ["v.mp4"] and np.array_equal(clips.pixels(clips.held_out(1)[0]), plain.frames)
    monkeypatch.setattr(data, "MEMORY", 10)
    clips.memory.clear()
    assert len(clips.held_out(1) + clips.held_out(1)) == 2
    assert seen == ["v.mp4"] * 3 and not clips.memory  # no room: encoded anew
    monkeypatch.setattr(data, "MEMORY", clips.held_out(1)[0].frames.nbytes)
    assert clips.held_out(1) and len(clips.memory) == 1  # just enough


@needs_ffmpeg
def test_a_clip_of_too_many_frames_is_refused(tmp_path, monkeypatch):
    make_video(tmp_path / "v.mp4", 2)
    clips = open_clips(annotate(tmp_path, {"video": "v.mp4", "conversation": [TURN]}))
    monkeypatch.setattr(data, "CLIP", 3 * 3 * 16**2)
    with pytest.raises(ValueError, match=r"line 1: .*v\.mp4 must have at most 3 frames"):
        clips.held_out(1)


@needs_ffmpeg
def test_clips_whose_replies_have_no_time_are_questions_about_all_of_it(tmp_path):
    make_video(tmp_path / "v.mp4", 2)
    turns = [{"role": role, "content": "Well."} for role in ("user", "assistant")]
    clips = open_clips(annotate(tmp_path, {"video": "v.mp4", "conversation": turns}))
    assert clips.asks and [turn.frame for turn in clips.held_out(1)[0].turns] == [4, 4]
    conversations = (turns, [TURN | {"time": 1}])
    annotate(tmp_path, *({"video": "v.mp4", "conversation": said} for said in conversations))
    assert not open_clips(tmp_path).asks  # one is said at a time
    annotate(tmp_path, {"video": "v.mp4", "conversation": turns[1:]})
    with pytest.raises(ValueError, match=r"line 1: must end in a question and .*, got \['assi"):
        open_clips(tmp_path)


@needs_ffmpeg
def test_of_a_damaged_clip_that_may_be_used_what_is_said_after_its_rest_is_left_out(tmp_path):
    make_video(tmp_path / "v.mp4", 2)
    entry = {"video": "v.mp4", "conversation": [TURN | {"time": 1}, TURN | {"time": 3}]}
    (sample,) = open_clips(annotate(tmp_path, entry), partial=True).held_out(1)
    assert [turn.frame for turn in sample.turns] == [2]
    asked = {"role": "user", "content": "What was it?", "time": 3}  # of the whole clip: at its last frame
    entry["conversation"] = [asked, {"role": "assistant", "content": "Well."}]
    (sample,) = open_clips(annotate(tmp_path, entry), partial=True).held_out(1)
    assert [turn.frame for turn in sample.turns] == [3, 4]


@needs_ffmpeg
def test_a_clip_draws_other_random_scores_in_each_step(tmp_path):
    make_video(tmp_path / "v.mp4", 1)
    clips = open_clips(annotate(tmp_path, *[{"video": "v.mp4", "conversation": [TURN]}] * 3))
    assert {s.seed for step in range(4) for s in clips.batch(0, step, 3)} == {*range(12)}


def test_held_out_clips_are_others_where_there_are_some(tmp_path):
    annotate(tmp_path, *[{"video": f"{n}.mp4", "conversation": [TURN]} for n in range(4)])
    for n in range(4):
        (tmp_path / f"{n}.mp4").touch()
    clips = open_clips(tmp_path).clips
    assert Clips(clips, 16, 2.0, False).tested is clips
    assert Clips(clips[:3], 16, 2.0, False, clips[3:]).tested == clips[3:]
    assert Clips(clips, 16, 2.0, False).batch(0, 0, 5, 4, 5) == []  # extras/distributed.py refuses it


@torch.no_grad()
def test_features_go_the_way_of_the_frames_they_stand_for(monkeypatch):
    monkeypatch.setattr(Watcher.__init__, "__defaults__", (0.0, 0, 5))  # 5 tokens a reply
    config = replace(preset("tiny"), vocab_size=len(Tokenizer()), keep=(1.0, 0.2, 1.0))
    model = initialise(VideoLM(config), 0).double()
    a, b = World(48, frames=4).held_out(2)
    asked = [Turn(0, "user", "What?"), Turn(1, "assistant", "A")]
    a, b = a._replace(turns=asked), b._replace(turns=asked)
    pixels, features = [a, cut(b, 2, 3, Turn(2, "assistant", "A"))], []
    for sample in pixels:
        made = model.vision_model(stack_frames([sample.frames])[0])
        features.append(sample._replace(frames=made.numpy()))
    results = []
    for samples in (pixels, features):
        watcher = Watcher(model, Tokenizer(), torch.zeros(2).long(), limit=3)
        results.append((evaluate(model, Tokenizer(), samples, 2.0)[0], watcher.ask(samples)))
    assert results[0] == results[1]
