"""Convert a conversation to token ids and labels.

One mechanism for all chat templates: the template is rendered, the answers in its text are found, and each placeholder of an image or a
video is replaced by what the model's processor makes of it. A token is a target if it ends within an answer.

Unusual here:
- With a named chat template, the text between images is tokenized piece by piece, as in the original code. With the model's own template
  the whole text is tokenized at once, as its processor does: a line break before an image and one that belongs to it may be one token.
- Without a processor, an image is -200 in the ids. Within an answer it is -200 in the labels too, and no target there either. A video
  needs a processor.
- The beginning-of-sequence token comes once, whether the tokenizer adds it, the template writes it, or both do.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from moe_llava.common.errors import DataError
from moe_llava.data.answers import placeholder, render
from moe_llava.data.backends import report_spaces, share_vocabulary
from moe_llava.data.records import (
    IMAGE_TOKEN,
    PART_TYPES,
    SCHEMAS,
    VIDEO_TOKEN,
    Record,
    check_media,
    has_video,
    image_names,
    role_and_text,
    split_system,
)
from moe_llava.data.rendering import MARK, Message, Span, adds_bos

IMAGE_INDEX = -200
IGNORE_INDEX = -100
LONGEST_RUN = 16

Encoded = dict[str, list[int]]  # `input_ids` and `labels`, of equal length


@dataclass(frozen=True)
class Media:
    """The images of a record, or its video, as text. `token`: `<image>` or `<video>`. `image`: what a chat template renders for an image.
    `placeholder`: what it renders for `token`. `texts`: what replaces each placeholder. `reserved`: the tokens in `texts` that stand for
    features; in the text of a record they are text like any other."""

    token: str
    image: str
    placeholder: str
    texts: Sequence[str]
    reserved: tuple[str, ...]

    def hidden_texts(self) -> list[str]:
        """Return `texts` with the reserved tokens under the names that `_with_true_offsets` gives them."""
        pattern = "|".join(map(re.escape, self.reserved))
        return [re.sub(pattern, lambda found: MARK + found[0], text) for text in self.texts]


@dataclass
class _Tokens:
    """Ids, labels and, for each token, whether it belongs to an image or a video."""

    ids: list[int]
    labels: list[int]
    of_image: list[bool]

    def __add__(self, other: _Tokens) -> _Tokens:
        return _Tokens(self.ids + other.ids, self.labels + other.labels, self.of_image + other.of_image)

    def without(self, first: int) -> _Tokens:
        """Leave out the first tokens."""
        return _Tokens(self.ids[first:], self.labels[first:], self.of_image[first:])

    def cut(self, end: int | None) -> Encoded:
        return {"input_ids": self.ids[:end], "labels": self.labels[:end]}


def encode_record(record: Record | Mapping[str, Any], tokenizer: Any, template: str | None = None, image_tokens: int = 1) -> Encoded:
    """Return `input_ids` and `labels` of a record, of equal length.

    Args:
        record: a Record, or a raw record of either schema. `<image>` in its text is an image if `image` or `images` names one, and text
            otherwise.
        template: a chat template, a key of TEMPLATES; None for the tokenizer's own.
        image_tokens: the number of -200 for an image.

    As in the original code, a text-only record is cut at the tokenizer's `model_max_length`, and an answer before the first question is
    dropped. An empty answer is no target, nor is a last question without an answer.

    Raises DataError, naming the rule, if the conversation has no question, or roles out of order, or if the template refuses it.
    """
    whole, end = _encode_whole(record, tokenizer, template, image_tokens)
    return whole.cut(end)


def encode_within(record: Record, tokenizer: Any, template: str | None, media: Media | int, max_length: int | None) -> tuple[Encoded, bool]:
    """Return (ids and labels of a record for training, whether it was cut). It is cut after `max_length` tokens, and text alone also at the
    tokenizer's `model_max_length`. `media`: those of the record, or without a processor the number of -200 for each image.

    Raises DataError as `encode_record` does, and if the cut goes through an image or a video, or leaves no target.
    """
    whole, end = _encode_whole(record, tokenizer, template, media)
    length, limit = len(whole.ids), min((limit for limit in (max_length, end) if limit is not None), default=None)
    if limit is None or length <= limit:
        return whole.cut(None), False
    if any(whole.of_image[limit:]):
        medium = "a video" if record.video is not None else "an image"
        raise DataError(f"{record.source} has {length} tokens, and {medium} goes beyond the limit of {limit}")
    if all(label < 0 for label in whole.labels[:limit]):
        raise DataError(f"{record.source} has {length} tokens, and nothing to learn from is left of it at the limit of {limit}")
    return whole.cut(limit), True


def check_rendering(record: Record, tokenizer: Any, template: str | None, image: str) -> None:
    """Raise DataError, naming the record, if the chat template, which renders an image as `image`, refuses it. Nothing is tokenized."""
    with _named(record):
        messages, token = _messages(record, template)
        render(messages, tokenizer, template, image if token else None, token or IMAGE_TOKEN)


def _encode_whole(
    record: Record | Mapping[str, Any], tokenizer: Any, template: str | None, media: Media | int
) -> tuple[_Tokens, int | None]:
    """Return (tokens of a whole record, the limit of the tokenizer for text alone)."""
    with _named(record):
        messages, token = _messages(record, template)
        if token == VIDEO_TOKEN and isinstance(media, int):
            raise DataError("its video becomes tokens only by the processor of a model that takes videos, and there is none")
        whole = _encode_messages(messages, token is not None, tokenizer, template, media)
    return whole, None if token else tokenizer.model_max_length


@contextmanager
def _named(record: Record | Mapping[str, Any]) -> Iterator[None]:
    """Put the record's source before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{record.source}: {error}" if isinstance(record, Record) else str(error)) from error


def _encode_messages(messages: list[Message], has_media: bool, tokenizer: Any, template: str | None, media: Media | int) -> _Tokens:
    count = media if isinstance(media, int) else None
    image = placeholder(tokenizer, template) if isinstance(media, int) else media.image
    token, mark = (IMAGE_TOKEN, image) if isinstance(media, int) else (media.token, media.placeholder)
    text, answers = render(messages, tokenizer, template, image if has_media else None, token)
    pieces = text.split(mark) if has_media else [text]
    wanted = len(pieces) - 1
    if isinstance(media, Media):
        wanted = len(media.texts)
    elif template is None and has_media:
        wanted = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if len(pieces) - 1 != wanted:
        raise DataError(f"the chat template makes {len(pieces) - 1} {mark} of {wanted} {PART_TYPES[token]}s")
    reserved: tuple[str, ...]
    if isinstance(media, int):
        texts, reserved = [""] * (len(pieces) - 1), (IMAGE_TOKEN, getattr(tokenizer, "image_token", None) or IMAGE_TOKEN)
    else:
        texts, reserved = media.hidden_texts(), media.reserved
    parts, spans = _put_together(pieces, texts, len(mark), answers)
    backend = _with_true_offsets(tokenizer, reserved)
    if template is None and count is None:
        whole = "".join(part for part, _ in parts)
        of_image = [(start, start + len(part)) for part, start in parts[1::2]]
        return _encode_text(whole, 0, spans, of_image, backend, tokenizer)
    # Every piece is a text of its own; the token that the tokenizer adds to each is kept of the first only.
    found, added = _Tokens([], [], []), int(adds_bos(tokenizer))
    for number, (part, start) in enumerate(parts):
        if number % 2 == 0:
            tokens = _encode_text(part, start, spans, [], backend, tokenizer)
            found += tokens.without(added if number else 0)
        elif count is not None:
            label = IMAGE_INDEX if _is_within(start, spans) else IGNORE_INDEX
            found += _Tokens([IMAGE_INDEX] * count, [label] * count, [True] * count)
        else:
            ids = backend.encode(part, add_special_tokens=False).ids
            found += _Tokens(ids, [IGNORE_INDEX] * len(ids), [True] * len(ids))
    return found


def _put_together(pieces: list[str], texts: list[str], width: int, answers: list[Span]) -> tuple[list[tuple[str, int]], list[Span]]:
    """Return ((text, its start) of each piece and of each medium's text, in turn; the spans of the answers), both counted in the text with
    `texts` in place of the placeholders of `width` characters."""
    parts, before, after = [], [0], [0]  # the start of each piece in the rendered text, and in the new one
    for piece, text in zip(pieces, [*texts, None], strict=True):
        parts.append((piece, after[-1]))
        if text is not None:
            start = after[-1] + len(piece)
            parts.append((text, start))
            before.append(before[-1] + len(piece) + width)
            after.append(start + len(text))

    def moved(position: int) -> int:
        piece = bisect_right(before, position) - 1
        return position - before[piece] + after[piece]

    return parts, [(moved(low), moved(high)) for low, high in answers]


def _is_within(end: int, spans: list[Span]) -> bool:
    """Return whether a token that ends at `end` of the text belongs to one of `spans`."""
    return any(low < end <= high for low, high in spans)


def _encode_text(text: str, start: int, answers: list[Span], images: list[Span], backend: Tokenizer, tokenizer: Any) -> _Tokens:
    """Return the tokens of a text that begins at `start` of the whole text. `answers`, `images`: spans of the whole text."""
    encoded = backend.encode(text)
    ends = [start + end for _, end in encoded.offsets]
    of_image = [_is_within(end, images) for end in ends]
    labels = [
        id if _is_within(end, answers) and not image else IGNORE_INDEX for id, end, image in zip(encoded.ids, ends, of_image, strict=True)
    ]
    # The template may write the beginning-of-sequence token that the tokenizer adds.
    twice = int(encoded.ids[:2] == [tokenizer.bos_token_id] * 2)
    return _Tokens(encoded.ids, labels, of_image).without(twice)


@lru_cache(maxsize=8)
def _with_true_offsets(tokenizer: Any, reserved: tuple[str, ...]) -> Tokenizer:
    """Return a tokenizer that reports tokens with their white space, which byte-level ones leave out, and for which `reserved` tokens are
    text. These keep their ids, because others may be counted from them, under names that are in no text."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    names = {token: MARK + token for token in reserved}
    if any(backend.model.token_to_id(token) is not None for token in reserved):
        backend = _rename_words(backend, names)
    else:
        backend = share_vocabulary(backend, names)
    report_spaces(backend)
    return backend


def _rename_words(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """Return a copy whose vocabulary and added tokens have other names: a model may look up a whole word, which renaming alone prevents."""
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    for added in state["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab |= {name: vocab.pop(token) for token, name in names.items() if token in vocab}
    return Tokenizer.from_str(json.dumps(state))


def _messages(record: Record | Mapping[str, Any], template: str | None) -> tuple[list[Message], str | None]:
    """Return (messages for chat templates, the placeholder in them that is an image or a video)."""
    if isinstance(record, Record):
        turns = [turn for question, answer in record.turns for turn in (("user", question), ("assistant", answer))]
        system, medium = record.system, record.token
    else:
        check_media("the record", record)
        system, turns = _raw_turns(record)
        medium = VIDEO_TOKEN if has_video(record) else IMAGE_TOKEN if image_names(record) else None
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(f"turn {number} is by the {role}, but user and assistant must take turns, user first")
    if not turns:
        raise DataError("the conversation has no question")
    if template == "plain":
        if medium == VIDEO_TOKEN:
            raise DataError("the template 'plain' takes an image and its caption, but the record has a video")
        if len(turns) != 2 or IMAGE_TOKEN not in turns[0][1] or not (medium or isinstance(record, Mapping)):
            raise DataError(f"the template 'plain' takes one question with {IMAGE_TOKEN} and its caption, but found {len(turns)} turns")
        medium = IMAGE_TOKEN
    return [{"role": role, "content": text} for role, text in [*([("system", system)] if system else []), *turns]], medium


def _raw_turns(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Return (system prompt, (role, text) of each turn) of a raw record."""
    for key, (role_key, text_key), roles in SCHEMAS:
        if key not in record:
            continue
        turns = []
        system, others = split_system(record, record[key], role_key, text_key)
        for number, turn in enumerate(others):
            role, text = role_and_text(turn, role_key, text_key)
            if role not in roles or text is None:
                raise DataError(f"turn {number} must be a text from one of {', '.join(roles)}, but is {str(turn)[:60]}")
            turns.append((("user", "assistant")[roles.index(role)], _cut_run(text)))
        return system, turns
    raise DataError(f"the record has neither {' nor '.join(repr(key) for key, *_ in SCHEMAS)}")


def _cut_run(text: str) -> str:
    """Cut a longer run of images at the beginning of a turn to 16, as the original code does. A Record keeps all its images; only the
    comparison with the original code needs this."""
    run, longest = IMAGE_TOKEN * text.count(IMAGE_TOKEN), IMAGE_TOKEN * LONGEST_RUN
    return text.replace(run, longest).strip() if text.startswith(longest) and len(run) > len(longest) else text
