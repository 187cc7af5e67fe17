"""Convert a client's messages to a prompt. Nothing is fetched here, and no file is opened on behalf of a client."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL import Image
from transformers import BaseImageProcessor, ProcessorMixin

from moe_llava.common.errors import DataError
from moe_llava.common.images import BROKEN, InlineImage, check_shape, fitting, open_image
from moe_llava.common.videos import Clip
from moe_llava.serving.engine.prompt import PromptBuilder, PromptError
from moe_llava.serving.engine.requests import Prompt
from moe_llava.serving.http.protocol import ImagePart, Limits, Message, MessagesError, TextPart, VideoPart, media_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
Fetched = Mapping[str, bytes]  # URL -> content
START_OF_SCAN = b"\xff\xda"
# RFC 2397: a media type, parameters such as charset=utf-8 or name="a.png", and the encoding. The format is detected from the
# content, not from the media type.
DATA_URL = re.compile(r"""data:(image|video)/[\w.+*-]+(?: *; *[\w.+*-]+=(?:[^;,"]*|"[^"]*"))* *; *base64,""", re.IGNORECASE | re.ASCII)

# Bytes per pixel, at most, measured with Pillow and transformers.
DECODING = 12  # while a file is decoded and converted to RGB
DECODING_WEBP = 21  # WebP's decoder has two canvases, for this frame and the last one
CONVERTING = 14  # while the image is converted to an array
KEPT = 7  # the image and its array, which are kept while it is resized
RESIZING = 13  # of the padded or enlarged image, while it is resized or cropped
PATCHING = 3  # times the inputs, while an image of a dynamic resolution is divided into patches
DECODING_VIDEO = 12  # of the frames that the model sees, while they are decoded and resized: 8, beside twice their inputs
FRAME_INPUTS = 16  # of a frame, for a model whose frames keep their size


@dataclass(frozen=True)
class Needs:
    """Bytes for the images and videos of a request: `working` while they are prepared, one by one, `kept` for their inputs."""

    working: int
    kept: int


class PromptMaker:
    """Check and decode the images and videos of messages, and build prompts. Only one thread may use `needs`, and one `make`, at a time,
    because a tokenizer is not thread-safe."""

    def __init__(self, processor: ProcessorMixin, limits: Limits):
        self._builder = PromptBuilder(processor)
        self._image_bytes, self._frame_bytes = self._builder.image_bytes(), self._builder.frame_bytes()  # here: they use the tokenizer
        self._image_processor = processor.image_processor
        self._limits = limits

    def needs(self, messages: list[Message], fetched: Fetched) -> Needs:
        """Return the bytes for the images and videos of `messages`, from their headers: none is decoded. `fetched`: the content of URLs
        that are not data: URLs.

        Raises MessagesError if an image or a video is not accepted.
        """
        all_pixels, working, kept = 0, 0, 0
        for part, medium in self._media_of(messages, fetched):
            pixels, needs = self._inspect_video(medium) if isinstance(part, VideoPart) else self._inspect(medium)
            all_pixels += pixels
            if all_pixels > self._limits.all_pixels:
                raise MessagesError(f"the images have more than {self._limits.all_pixels} pixels together")
            working, kept = max(working, needs.working), kept + needs.kept
        if kept > self._limits.all_bytes:
            raise MessagesError(f"the inputs of the images need {kept} bytes, but at most {self._limits.all_bytes} are allowed")
        return Needs(working, kept)

    def make(self, messages: list[Message], fetched: Fetched) -> Prompt:
        """Return the prompt of `messages`, up to the beginning of the next answer or, if the last message is an answer, to its end. Call
        `needs` first.

        Raises MessagesError if an image or a video cannot be decoded, or the chat template refuses the messages.
        """
        conversation = [{"role": message.role, "content": self._parts(message)} for message in messages]
        try:
            return self._builder.build(conversation, (self._decoded(*each) for each in self._media_of(messages, fetched)))
        except PromptError as error:
            raise MessagesError(f"messages: {error}") from error

    def _parts(self, message: Message) -> list[dict[str, str]]:
        """Return the parts of a message for its chat template. Adjacent texts are joined with line breaks, so that they cannot form a
        placeholder together."""
        parts: list[dict[str, str]] = []
        for part in message.content:
            if isinstance(part, TextPart) and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += "\n" + part.text
            elif isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                parts.append({"type": "video" if isinstance(part, VideoPart) else "image"})
        return [part | {"text": self._builder.escape(part["text"])} if part["type"] == "text" else part for part in parts]

    def _media_of(self, messages: list[Message], fetched: Fetched) -> Iterator[tuple[ImagePart | VideoPart, InlineImage]]:
        for part, path in media_of(messages):
            yield part, InlineImage(path, fetched[part.url] if part.url in fetched else self._content(part, path))

    def _content(self, part: ImagePart | VideoPart, path: str) -> bytes:
        kind, example = ("video", "mp4") if isinstance(part, VideoPart) else ("image", "png")
        url, head = part.url, DATA_URL.match(part.url)
        if head is None or head[1].lower() != kind:
            raise _refused(path, f"must be a data: URL, data:{kind}/{example};base64,...; {kind}s are not fetched")
        limit = self._limits.image_bytes
        if (len(url) - head.end()) * 3 // 4 > limit + 2:
            raise _refused(path, f"has more than {limit} bytes")
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _refused(path, f"is not base64: {error}") from error

    def _inspect(self, image: InlineImage) -> tuple[int, Needs]:
        """Return (pixels, bytes) of an image, from its header."""
        try:
            with Image.open(image.open(), formats=FORMATS) as header:
                width, height = header.size
        except Image.DecompressionBombError as error:
            raise _refused(image, f"has more than {self._limits.pixels} pixels") from error
        except BROKEN as error:
            raise _refused(image, f"is broken, or none of {', '.join(FORMATS)}") from error
        if width * height > self._limits.pixels:
            raise _refused(image, f"has {width} x {height} pixels, but at most {self._limits.pixels} are allowed")
        try:
            check_shape(header.size)
        except ValueError as error:
            raise _refused(image, f"is not accepted: {error}") from error
        if header.format in ("JPEG", "MPO") and image.data.count(START_OF_SCAN) > self._limits.scans:
            raise _refused(image, f"has more than {self._limits.scans} scans")
        kept, limit = self._image_bytes(fitting(header.size)), self._limits.working_bytes
        size = working_bytes(header.size, header.format == "WEBP", self._image_processor, kept)
        if size > limit:
            rule = f"has {width} x {height} pixels and needs {size} bytes to prepare, but at most {limit} are allowed"
            raise _refused(image, rule)
        return width * height, Needs(size, kept)

    def _inspect_video(self, video: InlineImage) -> tuple[int, Needs]:
        """Return (pixels of the frames that the model sees, bytes) of a video, from its header."""
        try:
            info, indices = self._builder.inspect_video(video, "the request")
        except DataError as error:
            raise MessagesError(str(error), str(video)) from error
        limits, frame = self._limits, info.width * info.height
        size = f"has {info.frames} frames of {info.width} x {info.height} pixels"
        if frame > limits.pixels or frame * info.frames > limits.decoded_pixels:
            most = f"at most {limits.pixels} pixels are allowed in a frame, and {limits.decoded_pixels} in all"
            raise _refused(video, f"{size}, but {most}")
        pixels, per_frame = frame * len(set(indices)), self._frame_bytes or FRAME_INPUTS * frame
        needs = Needs(DECODING_VIDEO * pixels + 2 * per_frame * len(indices), per_frame * len(indices))
        if needs.working > limits.working_bytes or needs.kept > limits.all_bytes:
            needed = f"{needs.working} bytes to prepare and {needs.kept} for its inputs"
            most = f"at most {limits.working_bytes} and {limits.all_bytes} are allowed"
            raise _refused(video, f"{size} and needs {needed}, but {most}")
        return pixels, needs

    def _decoded(self, part: ImagePart | VideoPart, medium: InlineImage) -> Image.Image | Clip:
        try:
            if isinstance(part, VideoPart):
                return self._builder.open_video(medium, "the request")
            return open_image(medium, "the request", FORMATS)
        except DataError as error:
            message = str(error)
        # Raised here, because `error` would otherwise keep the decoded image in memory until the response is sent.
        raise MessagesError(message, str(medium))


def _refused(medium: InlineImage | str, rule: str) -> MessagesError:
    """Return the error for an image or a video, which is named by its path in the body."""
    return MessagesError(f"{medium} {rule}", str(medium))


def working_bytes(size: tuple[int, int], webp: bool, processor: BaseImageProcessor, inputs: int) -> int:
    """Return the most bytes that `open_image` and this image processor need at once, for an image file of `size` whose inputs take
    `inputs` bytes."""
    width, height = fitting(size)
    longer, shorter = max(width, height), min(width, height)
    edges = processor.size or {}
    # With both edges, they are limits for an image that keeps its resolution. Qwen's and GLM's are of its area, in spite of the name.
    edge = 0 if edges.get("longest_edge") else edges.get("shortest_edge") or 0
    largest = longer**2 if getattr(processor, "do_pad", False) else edge**2 * longer // shorter
    decoding = (DECODING_WEBP if webp else DECODING) * size[0] * size[1]
    return max(decoding, CONVERTING * width * height, KEPT * width * height + max(RESIZING * largest, PATCHING * inputs))
