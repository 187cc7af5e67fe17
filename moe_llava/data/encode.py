"""Convert a conversation to token ids and labels.

One mechanism for all chat templates: the template is rendered, the answers in its text are found, and the text between images is tokenized
piece by piece, as in the original code. A token is a target if it ends within an answer.

Unusual here:
- An image is -200 in the ids until a model's own placeholder replaces it. Within an answer it is -200 in the labels too, and no target
  there either.
- The beginning-of-sequence token comes once, whether the tokenizer adds it, the template writes it, or both do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from moe_llava.common.errors import DataError
from moe_llava.data.answers import placeholder, render
from moe_llava.data.records import IMAGE_TOKEN, SCHEMAS, Record, check_media, image_names, role_and_text, split_system
from moe_llava.data.rendering import MARK, Message, Span, adds_bos

IMAGE_INDEX = -200
IGNORE_INDEX = -100
LONGEST_RUN = 16

Encoded = dict[str, list[int]]  # `input_ids` and `labels`, of equal length


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
    return {name: values[:end] for name, values in whole.items()}


def encode_within(record: Record, tokenizer: Any, template: str | None, image_tokens: int, max_length: int | None) -> tuple[Encoded, bool]:
    """Return (ids and labels of a record for training, whether it was cut). It is cut after `max_length` tokens, and text alone also at the
    tokenizer's `model_max_length`.

    Raises DataError as `encode_record` does, and if the cut goes through an image, or leaves no target.
    """
    whole, end = _encode_whole(record, tokenizer, template, image_tokens)
    length, limit = len(whole["input_ids"]), min((limit for limit in (max_length, end) if limit is not None), default=None)
    if limit is None or length <= limit:
        return whole, False
    if IMAGE_INDEX in whole["input_ids"][limit:]:
        raise DataError(f"{record.source} has {length} tokens, and an image goes beyond the limit of {limit}")
    kept = {name: values[:limit] for name, values in whole.items()}
    if all(label < 0 for label in kept["labels"]):
        raise DataError(f"{record.source} has {length} tokens, and nothing to learn from is left of it at the limit of {limit}")
    return kept, True


def check_rendering(record: Record, tokenizer: Any, template: str | None) -> None:
    """Raise DataError, naming the record, if the chat template refuses it. Nothing is tokenized."""
    with _named(record):
        messages, has_images = _messages(record, template)
        render(messages, tokenizer, template, has_images)


def _encode_whole(
    record: Record | Mapping[str, Any], tokenizer: Any, template: str | None, image_tokens: int
) -> tuple[Encoded, int | None]:
    """Return (ids and labels of a whole record, the limit of the tokenizer for text alone)."""
    with _named(record):
        messages, has_images = _messages(record, template)
        whole = _encode_messages(messages, has_images, tokenizer, template, image_tokens)
    return whole, None if has_images else tokenizer.model_max_length


@contextmanager
def _named(record: Record | Mapping[str, Any]) -> Iterator[None]:
    """Put the record's source before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{record.source}: {error}" if isinstance(record, Record) else str(error)) from error


def _encode_messages(messages: list[Message], has_images: bool, tokenizer: Any, template: str | None, image_tokens: int) -> Encoded:
    text, answers = render(messages, tokenizer, template, has_images)
    image = placeholder(tokenizer, template)
    pieces = text.split(image) if has_images else [text]
    wanted = sum(message["content"].count(IMAGE_TOKEN) for message in messages) if has_images else 0
    if template is None and len(pieces) - 1 != wanted:
        raise DataError(f"the chat template makes {len(pieces) - 1} {image} of {wanted} images")
    ids, labels, start = [], [], 0
    # Every piece is tokenized as a text of its own; the token that the tokenizer adds to each is kept of the first only.
    added = int(adds_bos(tokenizer))
    for number, piece in enumerate(pieces):
        if number:
            ids += [IMAGE_INDEX] * image_tokens
            labels += [IMAGE_INDEX if _is_target(start, answers) else IGNORE_INDEX] * image_tokens
        piece_ids, piece_labels = _encode_piece(piece, start, answers, tokenizer)
        ids += piece_ids[added if number else 0 :]
        labels += piece_labels[added if number else 0 :]
        start += len(piece) + len(image)
    return {"input_ids": ids, "labels": labels}


def _is_target(end: int, answers: list[Span]) -> bool:
    """Return whether a token that ends at `end` of the text belongs to an answer."""
    return any(low < end <= high for low, high in answers)


def _encode_piece(text: str, start: int, answers: list[Span], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return ids and labels of a piece that begins at `start` of the whole text."""
    encoded = _with_true_offsets(tokenizer).encode(text)
    labels = [
        token if _is_target(start + end, answers) else IGNORE_INDEX for token, (_, end) in zip(encoded.ids, encoded.offsets, strict=True)
    ]
    # The template may write the beginning-of-sequence token that the tokenizer adds.
    twice = int(encoded.ids[:2] == [tokenizer.bos_token_id] * 2)
    return encoded.ids[twice:], labels[twice:]


@lru_cache(maxsize=4)
def _with_true_offsets(tokenizer: Any) -> Tokenizer:
    """Return a tokenizer that reports tokens with their white space, which byte-level ones leave out, and for which `<image>` is text:
    images have been cut out already. The token of `<image>` keeps its id, because others may be counted from it, under a name that is in no
    text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    names = {token: MARK + token for token in (IMAGE_TOKEN, getattr(tokenizer, "image_token", None)) if token}
    for added in state["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab |= {name: vocab.pop(token) for token, name in names.items() if token in vocab}
    text = json.dumps(state["post_processor"]).replace('"trim_offsets": true', '"trim_offsets": false')
    return Tokenizer.from_str(json.dumps({**state, "post_processor": json.loads(text)}))


def _messages(record: Record | Mapping[str, Any], template: str | None) -> tuple[list[Message], bool]:
    """Return (messages for chat templates, whether `<image>` is an image)."""
    if isinstance(record, Record):
        turns = [turn for question, answer in record.turns for turn in (("user", question), ("assistant", answer))]
        system, has_images = record.system, bool(record.images)
    else:
        check_media("the record", record)
        system, turns, has_images = *_raw_turns(record), bool(image_names(record))
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(f"turn {number} is by the {role}, but user and assistant must take turns, user first")
    if not turns:
        raise DataError("the conversation has no question")
    if template == "plain":
        if len(turns) != 2 or IMAGE_TOKEN not in turns[0][1] or not (has_images or isinstance(record, Mapping)):
            raise DataError(f"the template 'plain' takes one question with {IMAGE_TOKEN} and its caption, but found {len(turns)} turns")
        has_images = True
    return [{"role": role, "content": text} for role, text in [*([("system", system)] if system else []), *turns]], has_images


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
