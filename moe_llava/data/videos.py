"""Read videos for one model: the video part of its processor chooses the frames, before any is decoded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers.video_utils import VideoMetadata

from moe_llava.common.errors import DataError
from moe_llava.common.images import ImageSource
from moe_llava.common.videos import Clip, Video, VideoInfo, inspect_video, open_video, uniform


class VideoReader:
    """Open videos for `processor`, which takes them. Its video part samples the frames if it is set to: by `do_sample_frames`, `fps` or
    `num_frames`. Otherwise they are `uniform`, as many for every video: such models need equal numbers of frames in a batch."""

    def __init__(self, processor: Any):
        self.videos = processor.video_processor
        # What the video part itself passes to its method, in `preprocess`.
        self.settings = {name: getattr(self.videos, name, None) for name in self.videos.valid_kwargs.__annotations__}

    def open(self, video: Video, source: str) -> Clip:
        """Return the frames of a video that the model sees. A list of frames counts as a video at the rate that the model samples at, so
        all of them are used, up to the processor's limits.

        Raises DataError, naming `source`, if the video is missing, cannot be decoded or is refused by the processor.
        """
        return open_video(video, source, self.settings.get("fps"), partial(self._choose, source))

    def inspect(self, file: Path | ImageSource, source: str) -> tuple[VideoInfo, list[int]]:
        """Return (what a video file says of itself, the indices of the frames that the model sees); none is decoded. Raises DataError as
        `open` does."""
        return inspect_video(file, source, partial(self._choose, source))

    def arguments(self, clip: Clip) -> dict[str, Any]:
        """Return the arguments of the processor for a clip, whose frames are chosen already."""
        return {"videos": [clip.frames_FHWC], "video_metadata": [_metadata(clip.info, clip.indices)], "do_sample_frames": False}

    def _choose(self, source: str, info: VideoInfo) -> list[int]:
        if not any(self.settings.get(name) for name in ("do_sample_frames", "fps", "num_frames")):
            return uniform(info)
        try:
            return [int(index) for index in self.videos.sample_frames(metadata=_metadata(info, None), **self.settings)]
        except (ValueError, TypeError, ArithmeticError) as error:  # of settings that do not fit the video
            raise DataError(f"{source} has a video that the model's {type(self.videos).__name__} refuses: {error}") from error


def _metadata(info: VideoInfo, indices: list[int] | None) -> VideoMetadata:
    duration = None if info.fps is None else info.frames / info.fps
    return VideoMetadata(
        total_num_frames=info.frames, fps=info.fps, width=info.width, height=info.height, duration=duration, frames_indices=indices
    )
