"""Open a video, in the same way for training, evaluation, chat and server: decode only the frames that a model sees.

A video is a file, which PyAV decodes, or the pictures of its frames, which need no decoder.

Shapes: F frames, H height, W width, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.common.errors import DataError
from moe_llava.common.images import BROKEN, ImageSource, open_image

FRAMES = 32  # of a video, where the model's processor does not sample
MOST_FRAME_PIXELS = 2**25  # of a frame: 8K. Decoders keep up to 17 frames
MOST_PIXELS = 2**31  # of the chosen frames together, 6 GB
# A playlist names other files and addresses. So only formats that hold a video themselves are read, and no protocol is used.
FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "gif", "mpeg", "mpegts", "flv", "asf", "ogg")
_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "", "max_pixels": str(MOST_FRAME_PIXELS)}

Frames = tuple[Path | ImageSource, ...]
Video = Path | ImageSource | Frames


@dataclass(frozen=True)
class VideoInfo:
    """A video before its frames are chosen. `fps`: frames per second, None if that is unknown."""

    frames: int
    fps: float | None
    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    """The chosen frames of a video, and their `indices` [F] in it."""

    frames_FHWC: np.ndarray
    indices: list[int]
    info: VideoInfo


Choose = Callable[[VideoInfo], Sequence[int]]


def uniform(info: VideoInfo) -> list[int]:
    """Return FRAMES indices at equal distances, from the first frame to the last; a shorter video has frames more than once."""
    return np.linspace(0, info.frames - 1, FRAMES).round().astype(int).tolist()


def missing_video(source: str, video: Video) -> DataError:
    return DataError(f"{source} names the video {video}, which does not exist")


def open_video(video: Video, source: str, fps: float | None, choose: Choose) -> Clip:
    """Return the chosen frames of a video. `fps`: of a list of frames, each of which is opened as `open_image` does.

    Raises DataError, naming `source`, if the video is missing or cannot be decoded, if frames differ in size, or as `choose` does.
    """
    return _open_frames(video, source, fps, choose) if isinstance(video, tuple) else _open_file(video, source, choose)


def _open_frames(frames: Frames, source: str, fps: float | None, choose: Choose) -> Clip:
    width, height = open_image(frames[0], source).size
    info = VideoInfo(len(frames), fps, width, height)
    indices = _chosen(info, choose, f"{source} has a video")
    frames_FHWC, indices_F = _room(info, indices), np.array(indices)
    for index in dict.fromkeys(indices):
        picture = np.asarray(open_image(frames[index], source))
        if picture.shape[:2] != (height, width):
            found = f"{picture.shape[1]} x {picture.shape[0]}"
            raise DataError(f"{source} names the frame {frames[index]} of {found} pixels, but the first frame has {width} x {height}")
        frames_FHWC[indices_F == index] = picture
    return Clip(frames_FHWC, indices, info)


def _room(info: VideoInfo, indices: list[int]) -> np.ndarray:
    """Return an array for the chosen frames, whose values are not set: stacking frames afterwards would need their memory twice."""
    return np.empty((len(indices), info.height, info.width, 3), np.uint8)


def decoder(name: str) -> Any:
    """Return the module of PyAV. Raises DataError, which begins with `name`, if it is not installed."""
    try:
        import av  # an optional package
    except ImportError as error:
        raise DataError(f"{name}, but a video file needs av, which is not installed: pip install -e '.[video]'") from error
    return av


def inspect_video(file: Path | ImageSource, source: str, choose: Choose) -> tuple[VideoInfo, list[int]]:
    """Return (what the header and the packets of a video file say, the indices of the chosen frames), without decoding any. Raises
    DataError as `open_video` does."""
    with _container(file, source) as (container, name):
        return _plan(container, choose, name)


def _open_file(file: Path | ImageSource, source: str, choose: Choose) -> Clip:
    with _container(file, source) as (container, name):
        return _decode(container, choose, name)


@contextmanager
def _container(file: Path | ImageSource, source: str) -> Iterator[tuple[Any, str]]:
    """Yield (the opened file, its name for messages). Within this context, errors of the file become DataErrors."""
    name = f"{source} names the video {file}"
    av = decoder(name)
    try:
        with file.open("rb") if isinstance(file, Path) else file.open() as opened, av.open(opened, options=_OPTIONS) as container:
            yield container, name
    except DataError:
        raise
    except FileNotFoundError as error:
        raise missing_video(source, file) from error
    except av.error.ArgumentError as error:  # a format that is not on the list
        raise DataError(f"{name}, which cannot be decoded: it is none of {', '.join(FORMATS)}") from error
    except (av.error.FFmpegError, *BROKEN) as error:
        raise DataError(f"{name}, which cannot be decoded: {getattr(error, 'strerror', None) or error}") from error


def _plan(container: Any, choose: Choose, name: str, total: int | None = None) -> tuple[VideoInfo, list[int]]:
    """Return (the video of an opened file, the indices of its chosen frames). It has `total` frames, or as many as its header or its
    packets say. `name`: of the file, in messages."""
    if not container.streams.video:
        raise ValueError("it has no pictures")
    stream = container.streams.video[0]
    if not 0 < stream.width * stream.height <= MOST_FRAME_PIXELS:
        raise ValueError(f"its frames have {stream.width} x {stream.height} pixels, but must have 1 to {MOST_FRAME_PIXELS:,}")
    total = total or stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not total:
        raise ValueError("it has no frames")
    info = VideoInfo(total, float(stream.average_rate) if stream.average_rate else None, stream.width, stream.height)
    return info, _chosen(info, choose, name)


def _decode(container: Any, choose: Choose, name: str, total: int | None = None) -> Clip:
    """Return the chosen frames of an opened file. `total`, `name`: as in `_plan`."""
    info, indices = _plan(container, choose, name, total)
    frames_FHWC, indices_F, wanted, last, count = _room(info, indices), np.array(indices), set(indices), max(indices), 0
    container.seek(0)
    for count, frame in enumerate(container.decode(video=0), start=1):
        if (frame.width, frame.height) != (info.width, info.height):
            raise ValueError("its frames differ in size")
        if count - 1 in wanted:
            frames_FHWC[indices_F == count - 1] = frame.to_ndarray(format="rgb24")
        if count > last:
            return Clip(frames_FHWC, indices, info)
    if not count:
        raise ValueError("it has no frames")
    return _decode(container, choose, name, count)  # the file ends before its header says


def _chosen(info: VideoInfo, choose: Choose, name: str) -> list[int]:
    """Return the chosen indices. Raise DataError if there are none, if the video has no such frames, or if they are too large together."""
    indices = [int(index) for index in choose(info)]
    if not indices or min(indices) < 0 or max(indices) >= info.frames:
        raise DataError(f"{name} of {info.frames} frames, of which the model's processor chooses {indices[:8]}")
    if len(set(indices)) * info.width * info.height > MOST_PIXELS:
        size = f"{len(set(indices))} frames of {info.width} x {info.height} pixels"
        raise DataError(f"{name}, of which {size} would be decoded, but at most {MOST_PIXELS:,} pixels are, together")
    return indices
