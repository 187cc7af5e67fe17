"""Open a video, in the same way for training, evaluation, chat and server: decode only the frames that a model sees.

A video is a file, which PyAV decodes, or the pictures of its frames, which need no decoder.

Shapes: F frames, H height, W width, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_llava.common.errors import DataError
from moe_llava.common.images import ImageSource, open_image

FRAMES = 32  # of a video, where the model's processor does not sample

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
    if isinstance(video, tuple):
        return _open_frames(video, source, fps, choose)
    raise NotImplementedError


def _open_frames(frames: Frames, source: str, fps: float | None, choose: Choose) -> Clip:
    width, height = open_image(frames[0], source).size
    info = VideoInfo(len(frames), fps, width, height)
    indices = [int(index) for index in choose(info)]
    pictures = {index: np.asarray(open_image(frames[index], source)) for index in dict.fromkeys(indices)}
    for index, picture in pictures.items():
        if picture.shape[:2] != (height, width):
            found = f"{picture.shape[1]} x {picture.shape[0]}"
            raise DataError(f"{source} names the frame {frames[index]} of {found} pixels, but the first frame has {width} x {height}")
    return Clip(np.stack([pictures[index] for index in indices]), indices, info)
