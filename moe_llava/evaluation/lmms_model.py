"""The model behind `lmms-eval --model moe_llava`: its tasks' requests become questions, which are evaluated like those of any benchmark.

lmms-eval passes all requests of a run at once, so all are checked before the first is evaluated. Pictures are not kept, because they may
not fit into memory: a task decodes a picture once for its digest, and again when its turn comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from rich.console import Console

from moe_llava.checkpoints.files import check_dtype
from moe_llava.checkpoints.load import best_device, load_checkpoint
from moe_llava.common.images import BROKEN, to_rgb
from moe_llava.common.progress import show_progress
from moe_llava.data.records import IMAGE_TOKEN, VIDEO_TOKEN
from moe_llava.evaluation.ask.generate import answer
from moe_llava.evaluation.ask.tasks import check_questions
from moe_llava.evaluation.evaluate import warn_of_capacity
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError

MAX_NEW_TOKENS = 1024  # if a task does not set it; lmms-eval's own LLaVA has the same
# The values that a task may set; None leaves the value to the model.
OFFERED = {"do_sample": (False, None), "temperature": (0, None), "num_beams": (1, None), "repetition_penalty": (1, None)}
# The last belongs to the original code, and here to the checkpoint's processor. The others have no effect on greedy answers.
WITHOUT_EFFECT = ("top_p", "top_k", "seed", "image_aspect_ratio")
# lmms-eval sets this if a task sets nothing. Its own models ignore it, because it would cut off all but an answer's first paragraph.
DEFAULT_STOP = "\n\n"


@dataclass(frozen=True)
class TaskImage:
    """A picture that a task holds in memory. `digest`, of its size and pixels, identifies it. `decode` returns it."""

    name: str = field(compare=False)
    digest: str
    decode: Callable[[], Image.Image] = field(compare=False)

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        file = BytesIO()
        to_rgb(self.decode()).save(file, "PPM")  # lossless and fast
        file.seek(0)
        return file


class MoeLlava(lmms):
    """A dense or sparse LLaVA. lmms-eval reads `is_simple`, and `device` if there are several processes."""

    is_simple = False  # takes chat messages

    def __init__(self, pretrained: str, dtype: str = "auto", device: str | None = None, batch_size: int | str = 1) -> None:
        """The arguments are those of `--model_args`, `--device` and `--batch_size`.

        Raises BenchmarkError if the batch size is no number or the dtype unknown, CheckpointError as `load_checkpoint` does.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) == 0:
            raise BenchmarkError(f"batch_size must be a number from 1, but is {batch_size!r}")
        check_dtype(dtype)
        self.batch_size = int(batch_size)
        self.device = best_device() if device is None else torch.device(device)
        model, self.processor = load_checkpoint(pretrained, dtype=dtype)
        self.model = model.to(self.device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request.

        Raises BenchmarkError, before the first question is evaluated, if a task has unsupported settings, or more than text and images, or
        text and a video.
        """
        problems = dict.fromkeys(problem for request in requests for problem in _unsupported(request))
        if problems:
            raise BenchmarkError("\n  ".join(problems))
        questions = [self._question(request) for request in requests]
        if not questions:
            return []  # of several processes, one may have none
        check_questions("lmms-eval", questions)
        groups: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.args[2].get("max_new_tokens") or MAX_NEW_TOKENS, []).append(index)
        console = Console(quiet=self.rank != 0)
        warn_of_capacity(self.model, console)
        answers: dict[int, str] = {}
        with show_progress("evaluating", len(questions), console) as advance:
            for max_new_tokens, members in groups.items():
                selected = [questions[index] for index in members]
                for batch in answer(self.model, self.processor, selected, self.batch_size, max_new_tokens):
                    answers |= {members[place]: _cut(text, requests[members[place]]) for place, text in batch}
                    advance(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _question(self, request: Instance) -> Question:
        *_, number, task, _ = request.args
        name = f"{number} of task {task}"
        prompt, images, video = self._read(request)
        try:
            sources: list[Any] = [
                Path(image) if isinstance(image, str) else TaskImage(str(place), _digest(image), partial(self._image, request, place))
                for place, image in enumerate(images)
            ]
        except BROKEN as error:
            raise BenchmarkError(f"question {name} has an image that cannot be read: {error}") from error
        return Question(name, prompt, tuple(sources), video=video)

    def _read(self, request: Instance) -> tuple[str, list[Any], Path | None]:
        _, to_messages, _, number, task, split = request.args
        return _prompt_and_media(to_messages(self.task_dict[task][split][number]), f"question {number} of task {task}")

    def _image(self, request: Instance, place: int) -> Image.Image:
        return self._read(request)[1][place]

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        _refuse(requests, "the likelihood of given answers")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        _refuse(requests, "answers in several rounds")


def _refuse(requests: list[Instance], wish: str) -> NoReturn:
    tasks = ", ".join(sorted({request.task_name for request in requests}))
    raise BenchmarkError(f"{tasks}: {wish} is not supported: this model answers one question at a time")


def _unsupported(request: Instance) -> Iterator[str]:
    """Yield the settings of a request that are not supported."""
    for key, value in request.args[2].items():
        where = f"task {request.task_name} wants {key}={value!r}"
        if key == "max_new_tokens":
            if value is not None and (not isinstance(value, int) or value < 1):
                yield f"{where}, which must be a number from 1"
        elif key in OFFERED:
            if value not in OFFERED[key]:
                yield f"{where}, but answers are greedy; `--gen_kwargs {key}={OFFERED[key][0]}` overrules the task"
        elif key not in ("until", *WITHOUT_EFFECT):
            yield f"{where}, which this model does not know"


def _cut(text: str, request: Instance) -> str:
    """Return an answer up to the first stop string of its request."""
    until = request.args[2].get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop and stop != DEFAULT_STOP else text
    return text


def _prompt_and_media(messages: Any, where: str) -> tuple[str, list[Any], Path | None]:
    """Return (the prompt, with a placeholder for each image or the video; the images; the video) of a chat.

    Raises BenchmarkError unless it is one user message of text and images, or text and a video file.
    """
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise BenchmarkError(f"{where} is a chat of {', '.join(roles)}; this model takes one user message")
    content = messages[0]["content"]
    other = sorted({part["type"] for part in content} - {"text", "image", "video"})
    if other:
        raise BenchmarkError(f"{where} comes with {', '.join(other)}; this model takes text and images, or text and a video")
    videos = [part["url"] for part in content if part["type"] == "video"]
    images = [part["url"] for part in content if part["type"] == "image"]
    for image in images:
        if not isinstance(image, (str, Image.Image)):
            raise BenchmarkError(f"{where} must have pictures or files as its images, but has {str(image)[:60]}")
    if videos and (images or len(videos) > 1 or not isinstance(videos[0], str)):
        found = f"{len(images)} images and {len(videos)} videos, such as {str(videos[0])[:60]}"
        raise BenchmarkError(f"{where} comes with {found}; this model takes images, or the file of one video")
    token = VIDEO_TOKEN if videos else IMAGE_TOKEN
    texts = [part["text"] for part in content if part["type"] == "text"]
    if not any(token in text for text in texts):  # some tasks pass images first, and mark their places in the text
        texts = [part["text"] if part["type"] == "text" else token for part in content]
    return "\n".join(texts), images, Path(videos[0]) if videos else None


def _digest(image: Image.Image) -> str:
    pixels = to_rgb(image)
    return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()
