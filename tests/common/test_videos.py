"""Video files are decoded frame by frame; anything else is refused by name."""

import io
import re
import resource
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from moe_llava.common import videos
from moe_llava.common.errors import DataError
from moe_llava.common.images import InlineImage
from moe_llava.common.videos import FRAMES, VideoInfo, inspect_video, open_video, uniform
from tests.conftest import in_fresh_process

av = pytest.importorskip("av")
SIZE = (48, 32)


def write_video(path, number=10, fps=5, codec="mpeg4", size=SIZE, format=None):
    """Write a video whose frame i has the grey 20 * i."""
    with av.open(str(path) if not isinstance(path, io.BytesIO) else path, "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps, width=size[0], height=size[1], pix_fmt="yuv420p")
        for index in range(number):
            frame = np.full((size[1], size[0], 3), 20 * (index % 12), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def greys(clip):
    return [round(float(frame.mean()) / 20) for frame in clip.frames_FHWC]


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("mov", "mpeg4"), ("avi", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx")])
def test_the_chosen_frames_are_decoded(tmp_path, suffix, codec):
    """In any order, and more than once. Some formats do not say how many frames they have."""
    file = write_video(tmp_path / f"clip.{suffix}", codec=codec)
    seen = []

    def choose(info):
        seen.append(info)
        return [0, 4, 9, 4, 2]

    clip = open_video(file, "a test", None, choose)
    assert greys(clip) == [0, 4, 9, 4, 2]
    assert clip.indices == [0, 4, 9, 4, 2]
    assert clip.frames_FHWC.shape == (5, 32, 48, 3)
    assert clip.frames_FHWC.dtype == np.uint8
    (info,) = seen
    assert (info.frames, info.fps, info.width, info.height) == (10, 5.0, 48, 32)


def memory_of_a_clip(video):
    """The most memory of this process while all frames are opened, as a multiple of the clip. Much of it is not that of Python."""
    open_video(video, "a test", None, lambda info: [0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clip = open_video(video, "a test", None, lambda info: range(info.frames))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * (1 if sys.platform == "darwin" else 1024) / clip.frames_FHWC.nbytes


@pytest.mark.parametrize("kind", ["file", "frames"])
def test_a_clip_is_in_memory_once(tmp_path, kind):
    size = (320, 240)
    video = write_video(tmp_path / "clip.mp4", number=400, size=size)
    if kind == "frames":
        Image.new("RGB", size).save(tmp_path / "frame.png")
        video = (tmp_path / "frame.png",) * 400
    assert 0.9 < in_fresh_process(memory_of_a_clip, video) < 1.3


def test_uniform(tmp_path):
    clip = open_video(write_video(tmp_path / "clip.mp4"), "a test", None, uniform)
    assert len(clip.indices) == FRAMES
    assert clip.indices == sorted(clip.indices)
    assert set(clip.indices) == set(range(10))


def test_bytes(tmp_path):
    data = write_video(tmp_path / "clip.mp4").read_bytes()
    assert greys(open_video(InlineImage("a video", data), "a test", None, lambda info: [7])) == [7]


def test_a_file_that_ends_early(tmp_path):
    """Frames are chosen again from those that there are. The header of an AVI file is changed to 20 frames."""
    file = write_video(tmp_path / "clip.avi")
    data = bytearray(file.read_bytes())
    count = data.index(b"strh") + 40
    assert data[count : count + 4] == (10).to_bytes(4, "little")
    data[count : count + 4] = (20).to_bytes(4, "little")
    file.write_bytes(data)
    clip = open_video(file, "a test", None, lambda info: [0, info.frames - 1])
    assert clip.info.frames == 10
    assert clip.indices == greys(clip) == [0, 9]


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    message: str


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nclip.ts\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "case",
    [
        Case("text.mp4", b"no video", "a test names the video .*text.mp4, which cannot be decoded"),
        Case("empty.mp4", b"", "a test names the video .*empty.mp4, which cannot be decoded"),
        Case("list.m3u8", PLAYLIST.encode(), "a test names the video .*list.m3u8, which cannot be decoded: it is none of mov, mp4"),
        Case("list.txt", b"ffconcat version 1.0\nfile clip.ts\n", "list.txt, which cannot be decoded: it is none of mov, mp4"),
    ],
    ids=lambda case: case.name,
)
def test_refused_files(tmp_path, monkeypatch, case):
    """A playlist names other files, which are not opened."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.ts", codec="mpeg2video", fps=25)
    (tmp_path / case.name).write_bytes(case.data)
    with pytest.raises(DataError, match=case.message):
        open_video(tmp_path / case.name, "a test", None, uniform)


def test_a_truncated_file(tmp_path):
    file = write_video(tmp_path / "clip.mp4")
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(DataError, match=r"a test names the video .*clip.mp4, which cannot be decoded: "):
        open_video(file, "a test", None, uniform)


def test_a_file_without_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="cannot be decoded: it has no pictures"):
        open_video(tmp_path / "sound.mp4", "a test", None, uniform)


@pytest.mark.parametrize("indices", [[], [10], [-1]])
def test_wrong_choices(tmp_path, indices):
    file = write_video(tmp_path / "clip.mp4")
    with pytest.raises(DataError, match=rf"clip.mp4 of 10 frames, of which the model's processor chooses {re.escape(str(indices))}"):
        open_video(file, "a test", None, lambda info: indices)


def test_too_many_pixels(tmp_path, monkeypatch):
    file = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(videos, "MOST_PIXELS", 5 * 48 * 32)
    assert len(open_video(file, "a test", None, lambda info: [0, 1, 2, 3, 4, 4]).indices) == 6
    with pytest.raises(DataError, match="of which 6 frames of 48 x 32 pixels would be decoded, but at most 7,680 pixels are, together"):
        open_video(file, "a test", None, lambda info: range(6))


def test_large_frames_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    file = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(videos, "MOST_FRAME_PIXELS", 48 * 32 - 1)
    with pytest.raises(DataError, match=r"clip.mp4, which cannot be decoded: its frames have 48 x 32 pixels, but must have 1 to 1,535"):
        open_video(file, "a test", None, uniform)


def test_inspecting_decodes_nothing(tmp_path):
    """Frames of a damaged file are counted, too."""
    file = write_video(tmp_path / "clip.mkv")
    found = inspect_video(file, "a test", lambda info: [info.frames - 1])
    assert found == (VideoInfo(10, 5.0, 48, 32), [9])
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    assert 0 < inspect_video(file, "a test", uniform)[0].frames < 10


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"a test names the video .*gone.mp4, which does not exist"):
        open_video(tmp_path / "gone.mp4", "a test", None, uniform)


def test_without_the_decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"clip.mp4, but a video file needs av, which is not installed: pip install -e '.\[video\]'"):
        open_video(tmp_path / "clip.mp4", "a test", None, uniform)
