"""A conversation with a model about images and videos, as a stream of pieces."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from moe_llava.common.images import open_image
from moe_llava.common.videos import Clip
from moe_llava.data.records import check_characters
from moe_llava.model.greedy import end_tokens
from moe_llava.routing.tokens import RoutingError
from moe_llava.routing.trace import Trace, trace_answer
from moe_llava.serving.engine.interface import CompletionEngine
from moe_llava.serving.engine.prompt import PromptBuilder
from moe_llava.serving.engine.requests import DEFAULT_MAX_NEW_TOKENS, Piece, Prompt, Request


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """An image and its file."""

    path: Path
    content: Image.Image


@dataclass(frozen=True, eq=False)
class OpenedVideo:
    """A video file, and the frames of it that the model sees."""

    path: Path
    content: Clip


Opened = OpenedImage | OpenedVideo


@dataclass(frozen=True)
class Turn:
    """A question, its images and videos, and its answer. `finish_reason`: "stop", "length", or "interrupted". `seconds`: the time of
    prefill and decode."""

    question: str
    media: tuple[Opened, ...]
    answer: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Settings of generation. `max_new_tokens`: None for 512, or less if the context is full. `seed`: of the first answer; each later
    one takes the next number. `system`: a system prompt, for a chat template that has one."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    system: str | None = None


class Conversation:
    """A conversation with its `turns`. The images and videos in `pending` belong to the next question. `engine`: used by this conversation
    only."""

    def __init__(self, engine: CompletionEngine, processor: ProcessorMixin, settings: Settings):
        self.engine = engine
        self.settings = settings
        self.turns: list[Turn] = []
        self.pending: tuple[Opened, ...] = ()
        self._builder = PromptBuilder(processor)
        self._generated = 0

    def unknown_words(self, question: str) -> list[str]:
        """Return the words of a question that are not in the model's vocabulary."""
        return self._builder.unknown_words(question)

    def add_images(self, paths: Sequence[Path]) -> tuple[OpenedImage, ...]:
        """Add all images or none, and return them. Raises DataError if a file is missing or not an image."""
        added = tuple(OpenedImage(path, open_image(path, "the conversation")) for path in paths)
        self.pending += added
        return added

    def add_video(self, path: Path) -> OpenedVideo:
        """Add a video, and return it. Raises DataError if the file is missing or not a video, or if the model takes none."""
        added = OpenedVideo(path, self._builder.open_video(path, "the conversation"))
        self.pending += (added,)
        return added

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece, and keep it as a turn; if the caller stops early, keep the part that was generated. If there is
        none, or an error is raised, the conversation is unchanged.

        Raises ValueError if `question` is empty or not valid text; PromptError and RequestError if the model cannot answer it.
        """
        if not question.strip():
            raise ValueError("the prompt is empty")
        check_characters("the prompt", [question, self.settings.system or ""])
        return self._generate(self.turns, Turn(question.strip(), self.pending))

    def regenerate(self) -> Generator[str, None, None]:
        """Generate another answer to the last question, which replaces the one before. Raises ValueError if there is no question."""
        *before, last = self._require_turns()
        return self._generate(before, Turn(last.question, last.media))

    def trace(self) -> Trace:
        """Return the routes of the last answer and of its prompt, in one forward pass. An expert with a capacity may drop other tokens in
        one pass than in many.

        Raises ValueError if there is no question; RoutingError if there is a video, and as `trace_routing` does.
        """
        *before, last = self._require_turns()
        for video in self.videos():
            raise RoutingError(f"the conversation has the video {video.path}, and where its patches are is not shown")
        prompt = self._prompt(before, last)
        ends = end_tokens(self.engine.model)
        answer = [token for token in last.tokens if token not in ends]
        results: SimpleQueue[Trace | Exception] = SimpleQueue()
        ids, inputs = prompt.input_ids, prompt.inputs
        self.engine.submit_work(lambda model, tokenizer: trace_answer(model, tokenizer, ids, answer, inputs), results.put)
        result = results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def images(self) -> list[OpenedImage]:
        """Return the images of all turns, in order."""
        return [medium for turn in self.turns for medium in turn.media if isinstance(medium, OpenedImage)]

    def videos(self) -> list[OpenedVideo]:
        """Return the videos of all turns, in order."""
        return [medium for turn in self.turns for medium in turn.media if isinstance(medium, OpenedVideo)]

    def record(self, source: str) -> dict[str, Any]:
        """Return the conversation as a record of a data file, which can be checked, traced, and trained on. `source`: the model's name.

        Raises ValueError if there is no question, or if it has more than a record may have: a video beside images, or several videos.
        """
        self._require_turns()
        images, videos = ([str(medium.path.resolve()) for medium in media] for media in (self.images(), self.videos()))
        if videos and (images or len(videos) > 1):
            raise ValueError(
                f"a record of a data file has images or one video, but there are {len(images)} images and {len(videos)} videos"
            )
        media = {"video": videos[0]} if videos else {"images": images}
        return {"id": source, **media, "messages": self._messages(self.turns)}

    def clear(self) -> None:
        self.turns, self.pending = [], ()

    def _require_turns(self) -> list[Turn]:
        if not self.turns:
            raise ValueError("there is no question yet")
        return self.turns

    def _generate(self, before: list[Turn], turn: Turn) -> Generator[str, None, None]:
        began = time.monotonic()
        prompt = self._prompt(before, turn)
        delivered: SimpleQueue[Piece | Exception] = SimpleQueue()
        generation = self.engine.submit(self._request(prompt), delivered.put)
        self._generated += 1
        answer, reason = "", None
        tokens: list[int] = []
        try:
            while reason is None:
                piece = delivered.get()
                if isinstance(piece, Exception):
                    raise piece
                answer, tokens, reason = answer + piece.text, [*tokens, piece.token], piece.finish_reason
                if piece.text:
                    yield piece.text
        except (KeyboardInterrupt, GeneratorExit):
            reason = reason or ("interrupted" if answer.strip() else None)
            raise
        finally:
            generation.cancel()
            if reason is not None:
                seconds = time.monotonic() - began
                length = len(prompt.input_ids)
                self.turns = [*before, Turn(turn.question, turn.media, answer.strip(), reason, length, tuple(tokens), seconds)]
                self.pending = tuple(medium for medium in self.pending if medium not in turn.media)

    def _request(self, prompt: Prompt) -> Request:
        settings = self.settings
        return Request(
            prompt=prompt,
            max_new_tokens=settings.max_new_tokens or self.engine.clip_length(len(prompt.input_ids), DEFAULT_MAX_NEW_TOKENS),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=None if settings.seed is None else settings.seed + self._generated,
        )

    def _prompt(self, before: Sequence[Turn], turn: Turn) -> Prompt:
        """Return the prompt of a question after others."""
        turns = [*before, turn]
        return self._builder.build(self._messages(turns)[:-1], [medium.content for each in turns for medium in each.media])

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        messages = [self._message("system", self.settings.system)] if self.settings.system else []
        for turn in turns:
            messages += [self._message("user", turn.question, turn.media), self._message("assistant", turn.answer)]
        return messages

    def _message(self, role: str, text: str, media: Sequence[Opened] = ()) -> dict[str, Any]:
        parts = [{"type": "video" if isinstance(medium, OpenedVideo) else "image"} for medium in media]
        return {"role": role, "content": [*parts, {"type": "text", "text": self._builder.escape(text)}]}
