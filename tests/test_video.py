"""A frame shows the last picture that is not later than its time, in the shape of the display, whatever the container.

The videos are drawn here. A picture is 4 x 4 cells, dark or bright: the bits of its number. ffprobe tells its time.
"""

import json
import math
import shlex
import shutil
import struct
import subprocess
import zlib
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
from strategies import make_video, needs_ffmpeg

from video import BEGUN, frame_index, read_video

pytestmark = needs_ffmpeg
SIDE = 64  # of a picture that is drawn, in pixels


def picture(number: int, side: int = SIDE) -> np.ndarray:
    cells = number >> np.arange(16).reshape(4, 4) & 1
    return np.kron(28 + 200 * cells, np.ones((side // 4, side // 4))).astype(np.uint8)


def number(frame: np.ndarray) -> int:
    """What picture a frame (S, S, 3) shows"""
    cell = len(frame) // 4
    middles = frame[cell // 2 :: cell, cell // 2 :: cell].mean(-1)
    return int((middles > 127).ravel() @ (1 << np.arange(16)))


def run_ffmpeg(arguments: str, given: bytes = b"", folder: Path | None = None) -> None:
    command = ["ffmpeg", "-v", "error", "-y", *shlex.split(arguments)]
    done = subprocess.run(command, input=given, capture_output=True, cwd=folder)
    if b"Unknown encoder" in done.stderr:
        pytest.skip(done.stderr.decode().strip())
    assert done.returncode == 0, done.stderr.decode()


def draw(path: Path, how: str, numbers: range = range(100), rate: int = 10) -> Path:
    """A video of these pictures; how: options of ffmpeg"""
    raw = f"-f rawvideo -pix_fmt gray -s {SIDE}x{SIDE} -r {rate} -i -"
    run_ffmpeg(f"{raw} {how} {shlex.quote(str(path))}", b"".join(picture(n).tobytes() for n in numbers))
    return path


def find_times(path: Path) -> tuple[list[float], float]:
    """Seconds from the file's zero to each picture in the order of showing, and to the end of the last"""
    entries = "frame=best_effort_timestamp_time,pkt_duration_time,duration_time:format=start_time"
    command = f"ffprobe -v quiet -select_streams V:0 -of json -show_entries {entries}".split()
    found = json.loads(subprocess.run([*command, f"file:{path}"], capture_output=True).stdout)
    zero, times = float(found["format"]["start_time"]), []
    for frame in found["frames"]:
        last = float(frame.get("pkt_duration_time", frame.get("duration_time", 0.1)))
        time = frame.get("best_effort_timestamp_time")  # some containers time only some pictures
        times.append(times[-1] + last if time is None else float(time) - zero)
    assert times == sorted(times)
    return times, times[-1] + last


def right_frames(times: list[float], numbers: list[int], fps: float, first: int, count: int) -> list[int]:
    wanted = []
    for i in range(first, first + count):
        past = [n for time, n in zip(times, numbers, strict=True) if time <= i / fps + 1e-6]
        wanted.append((past or numbers[:1])[-1])
    return wanted


def shown(path: Path, fps: float = 2.0, **how: object) -> list[int]:
    """The numbers in the frames"""
    return [number(frame) for frame in read_video(path, fps, 32, **how)]


def check(path: Path, numbers: list[int], fps: float = 2.0, spans: tuple = ((0, math.inf),)) -> None:
    """All frames of these spans are right."""
    times, length = find_times(path)
    for start, end in spans:
        first = frame_index(start, fps)
        last = math.ceil(length * fps - 1e-4) - 1 if end == math.inf else frame_index(end, fps)
        wanted = right_frames(times, numbers, fps, first, last + 1 - first)
        assert shown(path, fps, start=start, end=end) == wanted, (start, end)


# --- the sweep ----------------------------------------------------------------------------------

CONTAINERS = {"mp4": "", "mov": "", "mkv": "", "ts": "", "m2ts": "-f mpegts -mpegts_m2ts_mode 1", "mpg": "-f vob",
              "flv": "", "avi": "", "webm": ""}
X264 = "-c:v libx264 -pix_fmt yuv420p -preset veryfast"
MPEG2, MPEG4 = "-c:v mpeg2video -q:v 3 -sc_threshold 1000000000", "-c:v mpeg4 -q:v 3"
VPX = "-b:v 1M -deadline realtime -cpu-used 8"
IRREGULAR = r"-vf 'setpts=(N+0.3*mod(N\,3)+3*floor(N/50))/(10*TB)' -fps_mode vfr"
NOISE = "noise=alls=40:allf=t"  # makes pictures as large as real ones: MPEG-PS does not time each small one
HALF = r"select=lt(mod(n*7\,10)\,5)"  # for containers with a fixed rate: pictures left out
KINDS = {
    "open": f"{X264} -x264-params open-gop=1:keyint=20:min-keyint=20:scenecut=0:bframes=3:b-adapt=0",
    "long": f"{X264} -g 120 -bf 0",
    "refresh": f"{X264} -x264-params intra-refresh=1:keyint=25:bframes=0",
    "bframes": f"{X264} -g 30 -x264-params b-adapt=0:bframes=3:b-pyramid=normal:scenecut=0",
    "varying": f"{X264} -g 30 -bf 2 {IRREGULAR}",
}
OTHERS = {
    ("mpg", "open"): f"{MPEG2} -g 12 -bf 2 -vf {NOISE}", ("mpg", "long"): f"{MPEG2} -g 300 -vf {NOISE}",
    ("mpg", "refresh"): f"{MPEG2} -g 600 -bf 2 -vf {NOISE}", ("mpg", "bframes"): f"{MPEG2} -g 15 -bf 2 -flags +cgop -vf {NOISE}",
    ("mpg", "varying"): f"{MPEG2} -g 12 -bf 2 -vf '{HALF},{NOISE}' -fps_mode vfr",
    ("avi", "bframes"): f"{MPEG4} -bf 2 -g 30", ("avi", "varying"): f"{MPEG4} -g 30 -vf '{HALF}' -fps_mode vfr",
    ("webm", "open"): "-c:v libvpx-vp9 -b:v 1M -deadline realtime -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -g 20",
    ("webm", "long"): f"-c:v libvpx {VPX} -g 120", ("webm", "refresh"): f"-c:v libvpx {VPX} -g 9999",
    ("webm", "bframes"): "-c:v libvpx -b:v 1M -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -g 40",
    ("webm", "varying"): f"-c:v libvpx {VPX} -g 30 {IRREGULAR}",
}
FEW = [("mp4", "open"), ("mov", "varying"), ("mkv", "refresh"), ("ts", "long"), ("ts", "bframes"), ("m2ts", "refresh"),
       ("mpg", "open"), ("flv", "bframes"), ("avi", "bframes"), ("webm", "open"), ("mkv", "varying")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")

    @lru_cache
    def find(container: str, kind: str) -> tuple[Path, list[int]]:
        """24 s of a kind of stream in a container, and the numbers of its pictures"""
        how, rate = OTHERS.get((container, kind), KINDS[kind]), 25 if container == "mpg" else 10
        numbers = range(24 * rate)
        path = draw(folder / f"{kind}.{container}", f"{how} {CONTAINERS[container]}", numbers, rate)
        return path, [n for n in numbers if HALF not in how or n * 7 % 10 < 5]

    return find


LONG = [pytest.param(*how, marks=pytest.mark.long) for how in product(CONTAINERS, KINDS, (1.0, 2.0, 5.0))]
SHORT = [(*how, (1.0, 2.0, 5.0)[i % 3]) for i, how in enumerate(FEW)]


@pytest.mark.parametrize(("container", "kind", "fps"), [*LONG, *SHORT])
def test_each_frame_of_each_span_shows_the_right_picture(library, container, kind, fps):
    """From the beginning to the end, and spans before and after 10 s.

    What a container cannot hold is replaced. MPEG-PS has MPEG-2 (ffmpeg times no H.264 in it): one key picture in 24 s
    for gradual refresh. WebM has VP8 and VP9: hidden reference pictures for open groups and B-frames, one key picture for
    gradual refresh. AVI has MPEG-4 where there are B-frames. AVI and MPEG-PS have a fixed rate: half of the pictures are
    left out where times vary.
    """
    random, (path, numbers) = Random(f"{container} {kind} {fps}"), library(container, kind)
    early, late = random.uniform(3, 9), random.uniform(11, 22)
    spans = (0, math.inf), (early, early + random.uniform(0, 3)), (late, late + random.uniform(0, 1.5))
    check(path, numbers, fps, spans)


# --- what a span needs --------------------------------------------------------------------------


def find_packets(path: Path) -> list[dict]:
    command = "ffprobe -v quiet -select_streams V:0 -show_entries packet=pos,size -of json".split()
    found = json.loads(subprocess.run([*command, path], capture_output=True).stdout)
    return [{key: int(packet[key]) for key in ("pos", "size")} for packet in found["packets"] if "pos" in packet]


def overwrite(path: Path, packet: dict) -> None:
    held = bytearray(path.read_bytes())
    held[packet["pos"] + 8 : packet["pos"] + packet["size"]] = bytes([255]) * (packet["size"] - 8)
    path.write_bytes(held)


@pytest.mark.parametrize("kind", ["refresh", "bframes", "open"])
def test_what_lies_long_before_a_span_is_not_decoded(tmp_path, kind):
    path = draw(tmp_path / "v.mp4", KINDS[kind], range(300))
    overwrite(path, find_packets(path)[5])
    with pytest.raises(ValueError, match=r"v\.mp4 must decode whole"):
        shown(path)
    assert shown(path, start=25, end=27) == [250, 255, 260, 265, 270]


def test_damage_shortly_before_a_span_is_none_of_its_own(tmp_path):
    path = draw(tmp_path / "v.mp4", f"{X264} -g 20 -bf 0", range(100))  # key pictures at 0, 2, 4, 6 and 8 s
    overwrite(path, find_packets(path)[35])
    with pytest.raises(ValueError, match=r"v\.mp4 must decode whole"):
        shown(path, start=3.5, end=6)
    assert shown(path, start=4.1, end=6) == [45, 50, 55, 60]


@pytest.mark.parametrize(("container", "how"), [
    ("h264", X264), ("m4v", MPEG4), ("mjpeg", "-q:v 2 -pix_fmt yuvj420p")])
def test_a_raw_stream_without_times_has_those_of_its_rate(tmp_path, container, how):
    path = draw(tmp_path / f"v.{container}", how, range(350), 25)
    assert shown(path) == [int(12.5 * i) for i in range(28)]
    assert shown(path, start=11.6, end=13.4) == [int(12.5 * i) for i in range(24, 28)]


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "mpg", "flv"])
def test_time_begins_with_the_sound_where_that_comes_first(tmp_path, container):
    how = OTHERS.get((container, "open"), KINDS["bframes"])
    rate = 25 if container == "mpg" else 10
    draw(tmp_path / "v.mkv", how, range(14 * rate), rate)
    sound = "-f lavfi -i sine=duration=16 -map 0 -map 1 -c:v copy"
    run_ffmpeg(f"-itsoffset 1.7 -i v.mkv {sound} {CONTAINERS[container]} s.{container}", folder=tmp_path)
    path = tmp_path / f"s.{container}"
    assert 1.6 < find_times(path)[0][0] < 1.9
    check(path, [*range(14 * rate)], 2.0, ((0, math.inf), (2.2, 4), (12.3, 13.9)))


# --- one file of several parts ------------------------------------------------------------------


def test_times_go_on_where_the_size_of_the_pictures_changes(tmp_path):
    for n, side in enumerate((64, 128, 64)):
        scale = f"-muxdelay 0 -muxpreload 0 -output_ts_offset {5 * n} -vf scale={side}:-1:flags=neighbor"
        draw(tmp_path / f"{n}.ts", f"{X264} -g 10 -bf 0 {scale}", range(50 * n, 50 * n + 50))
    path = tmp_path / "v.ts"
    path.write_bytes(b"".join((tmp_path / f"{n}.ts").read_bytes() for n in range(3)))
    check(path, [*range(150)], 2.0, ((0, math.inf), (4.2, 6), (12, 14)))


def test_each_picture_is_scaled_by_its_own_size(tmp_path):
    shapes = ((64, 64), (128, 64), (64, 128))
    for n, (width, height) in enumerate(shapes):
        source = f"-f lavfi -i color=white:size={width}x{height}:rate=10:duration=2"
        run_ffmpeg(f"{source} {X264} -muxdelay 0 -muxpreload 0 -output_ts_offset {2 * n} {n}.ts", folder=tmp_path)
    path = tmp_path / "v.ts"
    path.write_bytes(b"".join((tmp_path / f"{n}.ts").read_bytes() for n in range(3)))
    frames = [frame.mean(-1) > 128 for frame in read_video(path, 1.0, 32)]
    assert [(int(frame[16].sum()), int(frame[:, 16].sum())) for frame in frames] == [
        *[(32, 32)] * 2, *[(32, 16)] * 2, *[(16, 32)] * 2]


def test_segments_of_one_recording_may_be_joined_again(tmp_path):
    draw(tmp_path / "v.mkv", KINDS["bframes"], range(200))
    run_ffmpeg("-i v.mkv -c copy -f segment -segment_time 6 -segment_format mpegts s%d.ts", folder=tmp_path)
    path, parts = tmp_path / "v.ts", sorted(tmp_path.glob("s*.ts"))
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert len(parts) > 2
    check(path, [*range(200)], 2.0, ((0, math.inf), (11, 13)))


@pytest.mark.parametrize(("container", "how"), [
    ("ts", X264), ("mpg", MPEG2), ("mkv", X264), ("flv", X264)])
def test_two_recordings_in_one_file_are_refused(tmp_path, container, how):
    rate = 25 if container == "mpg" else 10
    parts = [draw(tmp_path / f"{n}.{container}", how, range(50 * n, 50 * n + 50), rate) for n in (0, 1)]
    path = tmp_path / f"two.{container}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(ValueError, match=rf"two\.{container} must .*one recording.*, got"):
        shown(path)
    assert shown(path, partial=True)[:4] == [int(rate / 2 * i) for i in range(4)]


def test_a_jump_of_more_than_an_hour_is_refused(tmp_path):
    path = draw(tmp_path / "v.mkv", rf"{X264} -bf 0 -vf 'setpts=PTS+gt(N\,30)*4000/TB' -fps_mode vfr")
    with pytest.raises(ValueError, match=r"v\.mkv must have times that go on .*got 4003\.1.* after 3\.0"):
        shown(path)


def boxes(held: bytes, at: int, end: int) -> dict[bytes, bytes]:
    """The boxes of an MP4, by their type"""
    found = {}
    while at < end:
        (size,) = struct.unpack_from(">I", held, at)
        found[held[at + 4 : at + 8]] = held[at : at + size]
        at += size
    return found


def test_cover_art_is_no_track_even_where_it_comes_first(tmp_path):
    draw(tmp_path / "v.mp4", X264)
    run_ffmpeg("-f lavfi -i color=red:size=64x64 -frames:v 1 cover.png", folder=tmp_path)
    run_ffmpeg("-i v.mp4 -i cover.png -map 0 -map 1 -c copy -disposition:v:1 attached_pic c.mp4", folder=tmp_path)
    path = tmp_path / "c.mp4"
    assert shown(path) == [*range(0, 100, 5)]
    held = path.read_bytes()
    moov = boxes(held, 0, len(held))[b"moov"]
    inner = boxes(moov, 8, len(moov))
    order = b"mvhd", b"udta", b"trak"  # the cover is in the second
    path.write_bytes(held.replace(moov, moov[:8] + b"".join(inner[name] for name in order)))
    assert len(moov) == 8 + sum(len(inner[name]) for name in order)
    assert shown(path) == [*range(0, 100, 5)]
    path.write_bytes(path.read_bytes().replace(b"tkhd\0\0\0\x03", b"tkhd\0\0\0\x02"))  # no longer a default track
    assert shown(path) == [*range(0, 100, 5)]


def test_of_two_tracks_the_default_one_is_shown(tmp_path):
    for n in (0, 1):
        draw(tmp_path / f"{n}.mkv", f"{X264} -g {30 - n}", range(200 * n, 200 * n + 200))
    for default in (0, 1):
        how = f"-disposition:v:{default} default -disposition:v:{1 - default} 0"
        run_ffmpeg(f"-i 0.mkv -i 1.mkv -map 0 -map 1 -c copy {how} two.mkv", folder=tmp_path)
        assert shown(tmp_path / "two.mkv") == [*range(200 * default, 200 * default + 200, 5)]
        assert shown(tmp_path / "two.mkv", start=12, end=13) == [200 * default + n for n in (120, 125, 130)]


# --- the shape of the display -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "how"), [("v.mp4", X264), ("v.mkv", X264), ("v.mpg", f"{MPEG2} -r 25")])
def test_a_picture_has_the_shape_of_the_display(tmp_path, name, how):
    source = "-f lavfi -i color=white:size=720x576:rate=25:duration=0.2"
    for ratio, rows in (("1", 51), ("64/45", 36)):
        run_ffmpeg(f"{source} -vf setsar={ratio} {how} {name}", folder=tmp_path)
        frame = next(read_video(tmp_path / name, 2.0, 64))
        assert int((frame[:, 32].mean(-1) > 128).sum()) == rows
    if how == X264:  # MPEG-2 knows but a few shapes
        run_ffmpeg(f"{source} -vf setsar=64/45,transpose {how} {name}", folder=tmp_path)
        frame = next(read_video(tmp_path / name, 2.0, 64))
        assert int((frame[32].mean(-1) > 128).sum()) == 36


def turned(frame: np.ndarray, orientation: int) -> np.ndarray:
    """What is to be seen of a stored picture, as EXIF defines its orientations from 1 to 8"""
    return {1: frame, 2: np.fliplr(frame), 3: np.rot90(frame, 2), 4: np.flipud(frame), 5: frame.swapaxes(0, 1),
            6: np.rot90(frame, -1), 7: np.rot90(frame, 2).swapaxes(0, 1), 8: np.rot90(frame)}[orientation]


MATRICES = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),  # a, b, c, d of x' = ax + cy, y' = bx + dy
            5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}


def test_a_video_is_turned_as_the_matrix_of_its_track_says(tmp_path):
    path = draw(tmp_path / "v.mp4", X264, range(741, 742))
    before, track = path.read_bytes().split(b"tkhd")  # the track's header has the matrix
    for orientation, (a, b, c, d) in MATRICES.items():
        matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        path = tmp_path / f"{orientation}.mp4"
        path.write_bytes(before + b"tkhd" + track[:40] + matrix + track[76:])
        wanted = turned(np.stack([picture(741, 32)] * 3, -1), orientation)
        assert shown(path) == [number(wanted)], orientation


# --- images -------------------------------------------------------------------------------------


def exif(orientation: int, order: str = "<") -> bytes:
    """A TIFF directory of three tags"""
    head = b"II*\0" if order == "<" else b"MM\0*"
    tags = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in
                    ((256, 9), (274, orientation), (296, 2)))
    return head + struct.pack(f"{order}IH", 8, 3) + tags + bytes(4)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def with_metadata(image: bytes, kind: str, metadata: bytes) -> bytes:
    if kind == "jpg":
        body = b"Exif\0\0" + metadata
        return image[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + image[2:]
    if kind == "png":
        return image[:33] + png_chunk(b"eXIf", metadata) + image[33:]
    extended = webp_chunk(b"VP8X", struct.pack("<I", 8) + (SIDE - 1).to_bytes(3, "little") * 2)
    body = b"WEBP" + extended + image[12:] + webp_chunk(b"EXIF", metadata)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(pixels: np.ndarray, orientation: int, order: str) -> bytes:
    """One strip of (S, S, 3) uint8 RGB"""
    side, at = len(pixels), 8 + 2 + 12 * 10 + 4
    tags = {256: side, 257: side, 258: at, 259: 1, 262: 2, 273: at + 6, 274: orientation, 277: 3, 278: side,
            279: side * side * 3}
    entries = b""
    for tag, value in tags.items():
        kind, count = (3, 3) if tag == 258 else (4, 1) if tag in (273, 279) else (3, 1)
        entries += struct.pack(f"{order}HHI", tag, kind, count)
        entries += struct.pack(f"{order}I" if tag in (258, 273, 279) else f"{order}H2x", value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + struct.pack(f"{order}3H", 8, 8, 8) + pixels.tobytes()


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_an_image_is_turned_as_its_metadata_says(tmp_path, kind):
    stored = np.stack([picture(741)] * 3, -1)
    if kind != "tif":
        draw(tmp_path / f"plain.{kind}", "-q:v 2 -frames:v 1" if kind == "jpg" else "-frames:v 1", range(741, 742))
    for orientation in range(1, 9):
        order = "<>"[orientation // 2 % 2]
        path = tmp_path / f"{orientation}.{kind}"
        if kind == "tif":
            path.write_bytes(tiff(stored, orientation, order))
        else:
            plain = (tmp_path / f"plain.{kind}").read_bytes()
            path.write_bytes(with_metadata(plain, kind, exif(orientation, order)))
        assert shown(path) == [number(turned(stored, orientation))], orientation


def test_broken_metadata_of_an_image_is_no_damage(tmp_path):
    images = {}
    for kind in ("jpg", "png", "webp"):
        images[kind] = draw(tmp_path / f"v.{kind}", "-frames:v 1", range(741, 742)).read_bytes()
        images[f"junk.{kind}"] = with_metadata(images[kind], kind, b"junk")
    images["ends.jpg"] = with_metadata(images["jpg"], "jpg", exif(6)[:9])
    images["profile.png"] = images["png"][:33] + png_chunk(b"iCCP", b"x\0\0junk") + images["png"][33:]
    images["after.png"] = images["png"] + bytes(50)
    for name, held in images.items():
        (tmp_path / name).write_bytes(held)
        assert shown(tmp_path / name) == [741], name


@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "webp", "tif", "jp2"])
def test_an_image_is_read_whatever_its_name_or_suffix(tmp_path, kind):
    """Its name is no pattern. A large one is read too: ffmpeg would take such a JPEG for a pattern."""
    plain = draw(tmp_path / f"v.{kind}", "-vf scale=640:640:flags=neighbor -frames:v 1", range(741, 742))
    for name in (f"my%20dog.{kind}", f"frame_%03d.{kind}", f"what?.{kind}", "a*b.jpg", "cat{1}.mp4"):
        path = tmp_path / name
        path.write_bytes(plain.read_bytes())
        assert shown(path) == [741], name


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_image_that_ends_early_is_refused(tmp_path, kind):
    path = draw(tmp_path / f"v.{kind}", "-vf noise=alls=90 -frames:v 1", range(741, 742))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"v\.{kind} must (decode whole, got 1 frames, then|be a video, got no frame)"):
        shown(path)


def test_moving_images_are_videos_and_an_animated_webp_is_refused(tmp_path):
    for kind, name in (("gif", "a.gif"), ("gif", "what?.gif"), ("apng", "a.apng"), ("apng", "a%03d.png")):
        path = draw(tmp_path / f"v.{kind}", "").rename(tmp_path / name)
        assert shown(path) == [*range(0, 100, 5)], name
    path = draw(tmp_path / "a.webp", "-c:v libwebp_anim")
    with pytest.raises(ValueError, match=r"a\.webp must be converted to GIF, APNG or MP4, got an animated WebP"):
        shown(path)


# --- damage -------------------------------------------------------------------------------------


def complaints(path: Path) -> bytes:
    return subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-f", "null", "-"], capture_output=True).stderr


def test_a_complaint_of_the_decoder_is_no_damage(tmp_path):
    """A broken message beside a picture that is whole"""
    path = draw(tmp_path / "v.mp4", f"{X264} -x264-params pic-struct=1:bframes=0")
    held = bytearray(path.read_bytes())
    message = held.index(b"\x06\x01", find_packets(path)[40]["pos"])  # with the time of the picture; its length follows
    held[message + 2] = 240
    path.write_bytes(held)
    assert b"truncated" in complaints(path)
    assert shown(path) == [*range(0, 100, 5)]


def test_a_clip_that_was_cut_at_an_open_group_of_pictures_is_whole(tmp_path):
    """The decoder misses what its first pictures refer to, but none of the pictures in the file."""
    draw(tmp_path / "whole.mp4", f"{KINDS['open']}:b-pyramid=normal:ref=4", range(100))
    run_ffmpeg("-ss 4 -i whole.mp4 -c copy cut.mkv", folder=tmp_path)
    path = tmp_path / "cut.mkv"
    assert complaints(path)
    times, _ = find_times(path)
    check(path, [*range(100 - len(times), 100)])


@pytest.mark.parametrize(("container", "packet", "at"), [
    ("mp4", 0, 1300), ("mpg", 0, 1300), ("ts", 0, 1300),  # the first picture
    ("mp4", 40, 600), ("mkv", 40, 600), ("avi", 40, 600), ("flv", 40, 600), ("mpg", 40, 600), ("webm", 40, 10)])
def test_a_picture_that_is_missing_or_not_whole_is_damage(tmp_path, container, packet, at):
    how = OTHERS.get((container, "long"), f"{X264} -vf {NOISE} -bf 0")
    path = draw(tmp_path / f"v.{container}", f"{how} {CONTAINERS[container]}", range(100), 25)
    held = bytearray(path.read_bytes())
    at += find_packets(path)[packet]["pos"]
    held[at : at + 1500] = Random(0).randbytes(1500)
    path.write_bytes(held)
    with pytest.raises(ValueError, match=rf"v\.{container} must decode whole, got [48] frames, then: "):
        shown(path)
    assert len(shown(path, partial=True)) in (4, 8)


def test_a_damaged_video_is_refused_each_time_that_it_is_read(tmp_path):
    """Decoders that work on several pictures at once lose the mark of a corrupt one now and then."""
    run_ffmpeg("-f lavfi -i mandelbrot=size=320x240:rate=25 -t 6 -c:v libx264 -pix_fmt yuv420p v.mp4", folder=tmp_path)
    path = tmp_path / "v.mp4"
    whole = path.read_bytes()
    for part in (0.4, 0.6, 0.8):
        at = int(part * len(whole))
        path.write_bytes(whole[:at] + bytes(188) + whole[at + 188 :])
        for _ in range(3):
            with pytest.raises(ValueError, match=r"v\.mp4 must decode whole"):
                shown(path)


def test_a_span_after_the_end_has_no_picture(tmp_path):
    path = draw(tmp_path / "v.mp4", KINDS["open"], range(30))
    for start, end in ((3, math.inf), (2.9, math.inf), (30, 31)):
        with pytest.raises(ValueError, match=rf"v\.mp4 .* it has no picture at or after {start} s"):
            shown(path, start=start, end=end)


def test_a_file_of_another_kind_or_with_cover_art_alone_is_named(tmp_path):
    (tmp_path / "saved.jpg").write_text("<html>not found</html>" * 99)
    with pytest.raises(ValueError, match=r"saved\.jpg must be a video, got no frame from it: its format is not known"):
        shown(tmp_path / "saved.jpg")
    make_video(tmp_path / "cover.png", 1, 1)
    run_ffmpeg("-f lavfi -i sine=duration=1 -i cover.png -map 0 -map 1 -c:v png -disposition:v attached_pic v.mp4",
               folder=tmp_path)
    with pytest.raises(ValueError, match=r"v\.mp4 .* it has no track of pictures"):
        shown(tmp_path / "v.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=r"folder\.mp4 must be a video file, got no file of that name"):
        shown(tmp_path / "folder.mp4")


def test_a_file_that_may_not_be_read_or_has_too_long_a_name_is_named(tmp_path, monkeypatch):
    (tmp_path / "v.mp4").touch()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"v\.mp4 must be a file that can be read, got Permission denied"):
        shown(tmp_path / "v.mp4")
    with pytest.raises(ValueError, match="must be a video file, got no file of that name"):
        shown(tmp_path / ("x" * 300))


def test_a_tiff_that_holds_a_jpeg_is_refused_as_ffmpeg_would_make_it_black(tmp_path):
    entry = struct.pack("<HHIHH", 259, 3, 1, 7, 0)  # compression: JPEG
    (tmp_path / "v.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4))
    with pytest.raises(ValueError, match=r"v\.tif must be converted to PNG, got a TIFF that holds a JPEG"):
        shown(tmp_path / "v.tif")


def test_bytes_between_the_parts_of_a_jpeg_are_passed_over(tmp_path):
    make_video(tmp_path / "v.jpg", 1, 1, "testsrc2=size=64x64")
    whole = (tmp_path / "v.jpg").read_bytes()
    (frame,) = read_video(tmp_path / "v.jpg", 2.0, 64)
    (tmp_path / "v.jpg").write_bytes(whole[:2] + b"\xff\xff" + whole[2:])
    assert np.array_equal(next(read_video(tmp_path / "v.jpg", 2.0, 64)), frame)


def test_a_frame_never_shows_what_comes_after_its_time(tmp_path):
    grey = "geq=lum='N*8':cb=128:cr=128"  # picture number N has brightness 8 N
    video = make_video(tmp_path / "clock.mkv", 3, 10, "color=black:size=32x32", grey)
    shown = [int(frame.mean()) for frame in read_video(video, 2.0, 32)]
    numbers = [round((level * 219 / 255 + 16) / 8) for level in shown]  # of the picture
    assert numbers[1:] == [5, 10, 15, 20, 25] and numbers[0] <= 2


def test_a_picture_is_turned_upright_shrunk_to_fit_and_centred_on_black(tmp_path):
    video = make_video(tmp_path / "wide.mp4", source="color=white:size=64x16")
    wide = next(read_video(video, 2.0, 32))
    assert wide.shape == (32, 32, 3)
    assert wide[:11].max() < 20 and wide[13:19].min() > 235 and wide[21:].max() < 20
    before, track = video.read_bytes().split(b"tkhd")  # the track's header has a matrix
    turned = np.array([0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30], ">i4").tobytes()
    video.write_bytes(before + b"tkhd" + track[:40] + turned + track[76:])
    tall = next(read_video(video, 2.0, 32))
    assert tall[:, :11].max() < 20 and tall[:, 13:19].min() > 235 and tall[:, 21:].max() < 20


def test_only_as_many_frames_are_decoded_as_are_asked_for(tmp_path, monkeypatch):
    video, started, start = make_video(tmp_path / "v.mp4", 60), [], subprocess.Popen

    def remember(*given, **named):
        started.append(start(*given, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    frames = read_video(video, 10.0, 256)
    next(frames)
    assert started[-1].poll() is None  # it waits: the rest does not fit into the pipe
    frames.close()
    assert started[-1].poll() is not None


@pytest.mark.parametrize("damaged", [
    lambda whole, n: whole[:n], lambda whole, n: whole[:n] + bytes(999) + whole[n + 999 :]])
def test_a_damaged_video_is_refused_unless_its_rest_is_asked_for(tmp_path, damaged):
    video = make_video(tmp_path / "v.mkv", 5)
    whole = video.read_bytes()
    video.write_bytes(damaged(whole, len(whole) * 3 // 4))
    with pytest.raises(ValueError, match=r"v\.mkv must decode whole, got \d+ frames, .*--partial"):
        list(read_video(video, 2.0, 16))
    assert len(list(read_video(video, 2.0, 16, partial=True))) >= 5


def test_what_is_no_video_ends_in_a_sentence_that_names_it(tmp_path):
    texts = {"empty.mp4": "", "text.mp4": "not a video\n" * 100, "http://localhost:9/x.mp4": None,
             "absent.mp4": None, "concat.mp4": "ffconcat version 1.0\nfile /etc/hostname\n",
             "list.mp4": "#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/x.ts\n"}
    for name, text in texts.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{Path(name).name} must be a video"):
            list(read_video(tmp_path / name, 2.0, 16))


@pytest.mark.parametrize("missing", ["ffmpeg", "ffprobe"])
def test_without_its_programs_it_says_so(tmp_path, monkeypatch, missing):
    for program in {"ffmpeg", "ffprobe"} - {missing}:
        (tmp_path / program).symlink_to(shutil.which(program))
    (tmp_path / "v.mp4").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=f"{missing} must be on PATH"):
        list(read_video(tmp_path / "v.mp4", 2.0, 16))


def test_a_decoder_that_dies_is_told(tmp_path, monkeypatch):
    make_video(tmp_path / "v.mp4")
    dies = tmp_path / "ffmpeg"
    dies.write_text(f"#!/bin/sh\nhead -c 768 /dev/zero\necho {BEGUN}0 >&2\nexit 3\n")
    dies.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match=r"v\.mp4 must decode whole, got 1 frames, then: ffmpeg ended with status 3"):
        list(read_video(tmp_path / "v.mp4", 2.0, 16))
