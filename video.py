"""Reading video: the pictures of a file at a steady rate, decoded by the programs of FFmpeg.

`ffprobe` tells which track counts, when its pictures come and how they are turned; `ffmpeg` decodes
it. Only the local file is opened: no network, and no container that names other files.
"""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

PATIENCE = 600.0  # seconds that a program may take for a frame
CONTAINERS = (  # none of these names other files
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,h264,hevc,ivf,m4v,mjpeg,mxf,"
    "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,tiff_pipe,j2k_pipe"
)
SAFE = ["-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS,
        "-max_pixels", str(2**26)]
IMAGES = {  # how a file begins -> its format for ffmpeg, which may take the name for a pattern
    rb"\xff\xd8\xff": "jpeg_pipe", rb"\x89PNG\r\n": "png_pipe", rb"RIFF....WEBP": "webp_pipe",
    rb"II\*\0|MM\0\*": "tiff_pipe", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "j2k_pipe",
    rb"BM": "bmp_pipe",
}


def frame_index(seconds: float, fps: float) -> int:
    """The first frame that is not earlier than a time."""
    return math.ceil(seconds * fps - 1e-9)


def read_video(path: Path, fps: float, size: int, partial: bool = False, start: float = 0.0,
               end: float = math.inf) -> Iterator[ndarray]:
    """Decode a file, one frame at a time, as they are asked for.

    Frame i shows the last picture that is not later than i / fps seconds, or else the first
    picture. Time zero is where the file begins, with sound or picture. Of several tracks the
    default one is shown, never cover art. An image has one frame.
    fps: frames a second
    size: S; the picture is turned upright, in the shape of the display, scaled to fit and centred
        on black
    partial: keep what could be decoded of a damaged file instead of refusing it
    start, end: seconds; only frames frame_index(start) to frame_index(end). The last frame is
        repeated for up to 2 s after the end of the file.
    -> yields (S, S, 3) uint8 RGB. Raises ValueError: no ffmpeg, no file, no frame, a stall (longer
    than PATIENCE), damage (a picture is missing or marked as corrupt, or has more than 2**26
    pixels), times that begin again or jump by more than an hour. A file whose end is lost between
    two pictures is not told from a whole one where its format does not say how long it is (TS,
    Ogg, GIF, AVI), nor are files joined where ffmpeg reads the first alone (MP4, GIF, ASF).
    """
    track = find_track(Path(path))
    if track.fault and not partial:
        raise ValueError(f"{path} {track.fault}")
    for seek in seeks(track, frame_index(start, fps) / fps):
        command = ffmpeg_command(track, fps, size, start, end, seek)
        count, log = yield from decode(path, track, command, size)
        if count or BEGUN in log:
            break
    if not count:
        raise no_frame(path, why_empty(log, start))
    why = "" if partial else find_damage(track, log, seek)
    if why:
        raise ValueError(
            f"{path} must decode whole, got {count} frames, then: {why} (--partial keeps them)"
        )


def why_empty(log: str, start: float) -> str:
    if BEGUN in log:
        return f"it has no picture at or after {start} s"
    return first_error(log) or "it is empty"


def no_frame(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} must be a video, got no frame from it: {why}")


# --- which pictures there are -------------------------------------------------------------------


class Orientation(NamedTuple):
    """How stored pictures become upright ones: first `swapped`, then the others."""

    swapped: bool = False  # rows are columns
    mirrored: bool = False  # left is right
    flipped: bool = False  # top is bottom


class Track(NamedTuple):
    """What is decoded of a file. Times are those in the file, in seconds."""

    source: list[str]  # options of ffmpeg: the file, and which of its tracks
    orientation: Orientation = Orientation()
    still: bytes = b""  # an image without its metadata, for the standard input
    demuxer: str = ""
    zero: float = 0.0
    keys: Sequence[float] = ()  # when key pictures come; empty if that is unknown
    fault: str = ""  # why the file is refused, unless partial


def read_head(path: Path) -> bytes:
    """How a file begins. Raises ValueError if it cannot be read, or not decoded here."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} must be a video file, got no file of that name")
    for program in ("ffmpeg", "ffprobe"):
        if not shutil.which(program):
            raise ValueError(
                f"{program} must be on PATH to decode videos (apt or brew install ffmpeg), got none"
            )
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read, got {error.strerror}") from None


def find_track(path: Path) -> Track:
    """What to decode of a file. Raises ValueError where that is nothing."""
    head = read_head(path)
    kinds = [kind for magic, kind in IMAGES.items() if re.match(magic, head, re.DOTALL)]
    kind, changed = "".join(kinds), path.stat().st_mtime_ns
    if not kind or path.suffix.lower() in (".mjpeg", ".mjpg"):
        return probe(path, kind, changed)
    still, orientation, names = strip_metadata(path.read_bytes(), kind)
    if b"acTL" in names:
        return probe(path, "apng", changed)
    if b"ANIM" in names:
        raise ValueError(f"{path} must be converted to GIF, APNG or MP4, got an animated WebP")
    if kind == "tiff_pipe" and exif_value(still, 259) in (6, 7):  # ffmpeg would make it black
        raise ValueError(f"{path} must be converted to PNG, got a TIFF that holds a JPEG")
    source = ["-f", kind, "-frame_size", str(len(still)), "-i", "pipe:0"]
    return Track(source, orientation, still)


@lru_cache
def probe(path: Path, kind: str, changed: int) -> Track:
    """find_track, of a video. kind: its format, '' lets ffprobe find out

    changed: when the file was changed, so that what is known of it is not asked again
    """
    source = ["-f", kind] if kind else []
    source += ["-i", f"file:{path}"]
    found = run_ffprobe(path, source)
    streams = [s for s in found.get("streams", []) if not s["disposition"]["attached_pic"]]
    if not streams:
        raise no_frame(path, "it has no track of pictures")
    stream, form = max(streams, key=is_default), found["format"]
    index, zero = stream["index"], float(form.get("start_time", 0))
    # A raw stream has no times, and its decoder may have the same name.
    demuxer = form["format_name"] if "start_time" in form else "raw"
    packets = [packet for packet in found.get("packets", []) if packet["stream_index"] == index]
    source += ["-map", f"0:{index}"]
    keys, fault = find_keys(packets), find_time_jump(packets)
    if demuxer == "flv" and holds_two(path):
        fault = "must hold one recording, got another after it"
    return Track(source, orientation_of_matrix(stream), b"", demuxer, zero, keys, fault)


def run_ffprobe(path: Path, source: list[str]) -> dict:
    """The container, its tracks of pictures, and their packets in the order of decoding"""
    show = (
        "format=start_time,format_name:stream=index:stream_side_data=displaymatrix:"
        "stream_disposition=default,attached_pic:packet=stream_index,pts_time,dts_time,flags"
    )
    command = ["ffprobe", *"-v level+error -select_streams v -of json -show_entries".split(), show]
    try:
        process = subprocess.run([*command, *SAFE, *source], input=b"", capture_output=True,
                                 timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise stall(path) from None
    if process.returncode:
        why = first_error(process.stderr.decode(errors="replace"))
        raise no_frame(path, "its format is not known" if "whitelist" in why else why)
    return json.loads(process.stdout.decode(errors="replace"))


def find_keys(packets: list[dict]) -> list[float]:
    """When key pictures come; none where the container does not time each picture."""
    if not all("pts_time" in packet for packet in packets):
        return []
    return sorted(float(packet["pts_time"]) for packet in packets if "K" in packet["flags"])


def is_default(stream: dict) -> int:
    return stream["disposition"]["default"]


def find_time_jump(packets: list[dict]) -> str:
    """Why their times are not those of one recording, or ''"""
    times = [float(packet["dts_time"]) for packet in packets if "dts_time" in packet]
    for before, after in pairwise(times):
        if not -0.5 < after - before < 3600:
            return f"must have times that go on (one recording), got {after} s after {before} s"
    return ""


def holds_two(path: Path) -> bool:
    """Whether a header of FLV comes again"""
    header = re.compile(rb"FLV\x01[\x01\x04\x05]\0\0\0\x09\0\0\0\0")
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as held:
        return header.search(held, 9) is not None


def orientation_of_matrix(stream: dict) -> Orientation:
    """As a track's display matrix says: x' = ax + cy, y' = bx + dy"""
    for side in stream.get("side_data_list", []):
        if "displaymatrix" in side:
            _, a, b, _, _, c, d, *_ = map(int, re.findall(r"-?\b\d+\b", side["displaymatrix"]))
            return Orientation(abs(b) > abs(a), a + c < 0, b + d < 0)  # two of them are 0
    return Orientation()


# --- images -------------------------------------------------------------------------------------

# format -> where the first chunk is, in a chunk where its name and its length are, and how many
# bytes of a chunk the length does not count
CHUNKS = {
    "jpeg_pipe": (2, slice(1, 2), slice(2, 4), 2),
    "png_pipe": (8, slice(4, 8), slice(4), 12),
    "webp_pipe": (12, slice(4), slice(4, 8), 8),
}


def strip_metadata(image: bytes, kind: str) -> tuple[bytes, Orientation, set[bytes]]:
    """An image without what only describes it, how it is turned, and the names of its chunks

    ffmpeg reports broken metadata as an error of the image, so it is removed first.
    """
    if kind not in CHUNKS:
        return image, orientation_of_exif(image), set()
    kept, orientation, names = [], Orientation(), set()
    for name, chunk in split_chunks(image, kind):
        names.add(name)
        if name in (b"\xe1", b"eXIf", b"EXIF") and orientation == Orientation():
            orientation = orientation_of_exif(chunk)
        describes = name[:1].islower() or name in (b"EXIF", b"ICCP", b"XMP ") or name > b"\xe0"
        if not describes or name in (b"tRNS", b"\xee"):  # transparency, a JPEG's kind of colours
            kept.append(chunk)
    still = b"".join(kept)
    if kind == "webp_pipe":  # it begins with its length
        still = still[:4] + struct.pack("<I", len(still) - 8) + still[8:]
    return still, orientation, names


def split_chunks(image: bytes, kind: str) -> Iterator[tuple[bytes, bytes]]:
    """The name and the bytes of each part"""
    at, name_at, length_at, omitted = CHUNKS[kind]
    name = b""
    yield name, image[:at]
    while at < len(image) and name not in (b"\xda", b"IEND"):
        header = image[at : at + 8]
        name = header[name_at]
        if kind == "jpeg_pipe" and name == b"\xff":  # it fills up
            at += 1
            continue
        length = int.from_bytes(header[length_at], "little" if kind == "webp_pipe" else "big")
        if kind == "webp_pipe":
            length += length % 2
        yield name, image[at : at + length + omitted]
        at += length + omitted
    if kind == "jpeg_pipe":
        yield b"", image[at:]


def orientation_of_exif(text: bytes) -> Orientation:
    value = exif_value(text, 274)
    return Orientation(value in (5, 6, 7, 8), value in (2, 3, 6, 7), value in (3, 4, 7, 8))


def exif_value(text: bytes, wanted: int) -> int:
    """What the TIFF directory that begins near the start of `text` has at a tag, 0: nothing"""
    head = re.search(rb"II\*\0|MM\0\*", text[:40])
    if not head:
        return 0
    order, text = "<" if head[0][:1] == b"I" else ">", text[head.start() :]
    try:
        (at,) = struct.unpack_from(f"{order}4xI", text)
        (count,) = struct.unpack_from(f"{order}H", text, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, value = struct.unpack_from(f"{order}H6xH", text, entry)
            if tag == wanted:
                return value
    except struct.error:  # it ends too early
        pass
    return 0


# --- decoding -----------------------------------------------------------------------------------

BEGUN = "27182818."  # what the filter `select` logs where it opens; ffmpeg logs no such number


def seeks(track: Track, time: float) -> list[list[float]]:
    """Where to begin, and the key picture to wait for; then an empty list: at the beginning

    One key picture earlier than need be: where pictures refresh gradually, the decoder is ready at
    the next one. If the key picture does not come, the beginning is safe.
    """
    keys = track.keys[: bisect_right(track.keys, track.zero + time + 1e-6)]
    return [keys[-2:], []] if len(keys) > 1 else [[]]


def ffmpeg_command(track: Track, fps: float, size: int, start: float, end: float,
                   seek: list[float]) -> list[str]:
    """The command line for read_video, which says what the arguments mean"""
    # reinit_filter: else filters would begin anew where the size changes, and time with them.
    # threads: a decoder that works on several pictures at once loses the mark of a corrupt one.
    options = "-nostdin -v level+warning -copyts -noautorotate -reinit_filter 0 -threads 1".split()
    opens = "1"
    if seek:
        options += ["-noaccurate_seek", "-ss", f"{seek[0] - track.zero:.6f}"]
        opens = f"lt(abs(t-{seek[1]:.6f}),1e-3)"  # pictures before it may be broken
    trim = f"trim=start_frame={frame_index(start, fps)}"
    if end < math.inf:  # `tpad` lets a span end a little after its file
        pad = "tpad=stop_mode=clone:stop_duration=2"
        trim = f"{pad},{trim}:end_frame={frame_index(end, fps) + 1}"
    shape = "setsar=1" if track.still else "null"  # of an image the unit is often wrong
    width = f"'max(1,min({size},round({size}*dar)))'"
    height = f"'max(1,min({size},round({size}/dar)))'"
    chain = (
        f"select='ld(0)+if({opens},st(0,print({BEGUN}0,24)))',"
        f"fps={float(fps)}:round=up:start_time={track.zero:.6f},{trim},setpts=N,{shape},"
        f"scale={width}:{height}:eval=frame,pad={size}:{size}:-1:-1:eval=frame"
    )
    output = "-f rawvideo -pix_fmt rgb24 pipe:1".split()
    return ["ffmpeg", *options, *SAFE, *track.source, "-vf", chain, *output]


def decode(path: Path, track: Track, command: list[str], size: int) -> Iterator[ndarray]:
    """Run ffmpeg -> yields frames, and returns how many there were and what it logged"""
    count, length = 0, size * size * 3
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as log:
        given.write(track.still)
        given.seek(0)
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=log) as process:
            try:
                while len(frame := patiently(process, path, process.stdout.read, length)) == length:
                    count += 1
                    pixels = np.frombuffer(frame, np.uint8).reshape(size, size, 3)
                    yield upright(pixels, track.orientation)
                status = patiently(process, path, process.wait)
            finally:  # also where the caller wants no more frames
                process.kill()
        log.seek(0)
        text = log.read().decode(errors="replace")
    if status:
        text += f"\n[fatal] ffmpeg ended with status {status}"
    return count, text


def upright(frame: ndarray, orientation: Orientation) -> ndarray:
    """(S, S, 3) -> the same"""
    if orientation.swapped:
        frame = frame.swapaxes(0, 1)
    if orientation.mirrored:
        frame = frame[:, ::-1]
    if orientation.flipped:
        frame = frame[::-1]
    return np.ascontiguousarray(frame)


def patiently(process: subprocess.Popen, path: Path, ask: Callable, *given: object) -> object:
    """ask(*given), from a decoder. Raises ValueError if it takes too long, and ends the decoder."""
    began, alarm = time.monotonic(), threading.Timer(PATIENCE, process.kill)
    alarm.start()
    try:
        answer = ask(*given)
    finally:
        alarm.cancel()
    if time.monotonic() - began >= PATIENCE:
        raise stall(path)
    return answer


def stall(path: Path) -> ValueError:
    return ValueError(f"{path} must be decoded without a stall, got none of it for {PATIENCE:g} s")


def find_damage(track: Track, log: str, seek: list[float]) -> str:
    """What ffmpeg logged of a picture that is missing or corrupt, or ''

    A line of the decoder is no damage: it marks a picture that is not whole. Nor is what comes
    before the first picture, while the decoder finds its feet. Of an image every error counts.
    """
    if track.still:
        return first_error(log)
    before, _, after = log.partition(BEGUN)
    # A picture or packet that is marked; "mismatch" is FLV's word. MPEG-TS also marks packets where
    # segments were joined, so there the decoder must complain too.
    marked = "(corrupt (decoded|input)|Packet mismatch)"
    if track.demuxer == "mpegts":
        marked = r"corrupt (decoded|input(?=[\s\S]*\[error\]))"
    # An error of ffmpeg itself, of its demuxer, or of JPEG, whose pictures stand alone
    failed = rf"^\[((in#|vist#|mjpeg @|{re.escape(track.demuxer)} @).*\[)?(error|fatal)\].*"
    found = re.search(rf"{failed}|.*{marked}.*", after, re.MULTILINE)
    if not found and not seek:
        found = re.search(f".*{marked}.*", before)
    return plain(found)


def first_error(log: str) -> str:
    return plain(re.search(r".*\[(error|fatal)\].*", log))


def plain(line: re.Match | None) -> str:
    """Without what stands in brackets"""
    return re.sub(r"\[[^]]*\] ", "", line[0]).strip() if line else ""
