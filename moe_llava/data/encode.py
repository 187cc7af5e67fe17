"""From a conversation to token ids and labels: what a model reads, and what it learns to say.

One mechanism for all conversation forms: a chat template is rendered, with the places of the answers, and the text between images is
tokenized piece by piece, as the original code does. A token is learnt if it ends within an answer.

Unusual here:
- An image is -200 in the ids until a model's own placeholder takes its place; inside an answer it is -200 in the labels, too, and is no
  more learnt than outside.
- A beginning-of-sequence token stands once, whether the tokenizer adds it, the template writes it, or both do.
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
from moe_llava.data.records import FORMS, IMAGE_TOKEN, Record, check_media, image_names, role_and_text, split_system
from moe_llava.data.rendering import MARK, Message, Span, adds_beginning

IMAGE_INDEX = -200
IGNORE_INDEX = -100
LONGEST_RUN = 16


def encode_record(
    record: Record | Mapping[str, Any], tokenizer: Any, template: str | None = None, image_tokens: int = 1
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a record, of equal length.

    Args:
        record: a Record, or a record as it stands in a file, of either form; `<image>` in its text means an image if it names one in
            `image` or `images`, and is text elsewhere.
        template: a conversation form, a key of TEMPLATES; None takes the tokenizer's own chat template.
        image_tokens: how many -200 stand for an image.

    A text-only record is cut at the tokenizer's `model_max_length`, as the original code does. An answer that is empty is not learnt, a
    last question without an answer is read and not learnt, and an answer before the first question is dropped.

    Raises DataError, naming the rule, if the conversation has no question, roles out of order, or does not fit the form.
    """
    whole, end = _encode_whole(record, tokenizer, template, image_tokens)
    return {name: values[:end] for name, values in whole.items()}


def encode_within(
    record: Record, tokenizer: Any, template: str | None, image_tokens: int, max_length: int | None
) -> tuple[dict[str, list[int]], bool]:
    """(ids and labels of a record as training takes them, whether something was cut off): after `max_length` tokens, or, of text alone,
    where the tokenizer's model ends, if that is less.

    Raises DataError as `encode_record` does, and as `cut` does.
    """
    whole, end = _encode_whole(record, tokenizer, template, image_tokens)
    kept = cut(whole, min((length for length in (max_length, end) if length is not None), default=None), record.source)
    return kept, kept is not whole


def check_form(record: Record, tokenizer: Any, template: str | None) -> None:
    """Raises DataError, naming the record, if the chat template refuses it. No token is counted."""
    with _named(record):
        messages, has_images = _messages(record, template)
        render(messages, tokenizer, template, has_images)


def _encode_whole(
    record: Record | Mapping[str, Any], tokenizer: Any, template: str | None, image_tokens: int
) -> tuple[dict[str, list[int]], int | None]:
    """(ids and labels of all of a record, where the tokenizer's model ends text alone)"""
    with _named(record):
        messages, has_images = _messages(record, template)
        whole = _encode_messages(messages, has_images, tokenizer, template, image_tokens)
    return whole, None if has_images else tokenizer.model_max_length


@contextmanager
def _named(record: Record | Mapping[str, Any]) -> Iterator[None]:
    """Puts the record's place before what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{record.source}: {error}" if isinstance(record, Record) else str(error)) from error


def _encode_messages(
    messages: list[Message], has_images: bool, tokenizer: Any, template: str | None, image_tokens: int
) -> dict[str, list[int]]:
    text, answers = render(messages, tokenizer, template, has_images)
    image = placeholder(tokenizer, template)
    pieces = text.split(image) if has_images else [text]
    wanted = sum(message["content"].count(IMAGE_TOKEN) for message in messages) if has_images else 0
    if template is None and len(pieces) - 1 != wanted:
        raise DataError(f"the chat template makes {len(pieces) - 1} {image} of {wanted} images")
    ids, labels, start = [], [], 0
    # Every piece is tokenized as if it were a text of its own: what the tokenizer begins each with belongs to the first.
    begin = int(adds_beginning(tokenizer))
    for number, piece in enumerate(pieces):
        if number:
            ids += [IMAGE_INDEX] * image_tokens
            labels += [IMAGE_INDEX if _learnt(start, answers) else IGNORE_INDEX] * image_tokens
        piece_ids, piece_labels = _encode_piece(piece, start, answers, tokenizer)
        ids += piece_ids[begin if number else 0 :]
        labels += piece_labels[begin if number else 0 :]
        start += len(piece) + len(image)
    return {"input_ids": ids, "labels": labels}


def cut(encoded: dict[str, list[int]], limit: int | None, source: str) -> dict[str, list[int]]:
    """`encoded`, of a record, without what comes after `limit` tokens.

    Raises DataError if that goes through an image, or nothing is left to learn from.
    """
    length = len(encoded["input_ids"])
    if limit is None or length <= limit:
        return encoded
    if IMAGE_INDEX in encoded["input_ids"][limit:]:
        raise DataError(f"{source} has {length} tokens, and an image goes beyond the limit of {limit}")
    kept = {name: values[:limit] for name, values in encoded.items()}
    if all(label < 0 for label in kept["labels"]):
        raise DataError(f"{source} has {length} tokens, and nothing to learn from is left of it at the limit of {limit}")
    return kept


def _learnt(end: int, answers: list[Span]) -> bool:
    """Whether what ends at `end` of the whole text belongs to an answer."""
    return any(low < end <= high for low, high in answers)


def _encode_piece(text: str, start: int, answers: list[Span], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a text that begins at `start` of the whole."""
    encoded = _with_true_offsets(tokenizer).encode(text)
    labels = [
        token if _learnt(start + end, answers) else IGNORE_INDEX for token, (_, end) in zip(encoded.ids, encoded.offsets, strict=True)
    ]
    # A template may write the beginning-of-sequence token that the tokenizer adds.
    twice = int(encoded.ids[:2] == [tokenizer.bos_token_id] * 2)
    return encoded.ids[twice:], labels[twice:]


@lru_cache(maxsize=4)
def _with_true_offsets(tokenizer: Any) -> Tokenizer:
    """Byte-level tokenizers report their tokens without the white space in them. And to this one `<image>` is text: where it means an
    image, texts are cut there. Its token keeps its id, by which others may be counted, under a name that is in no text."""
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
    """(messages as chat templates take them, whether `<image>` means an image)"""
    if isinstance(record, Record):
        turns = [turn for question, answer in record.turns for turn in (("user", question), ("assistant", answer))]
        system, has_images = record.system, bool(record.images)
    else:
        check_media("the record", record)
        system, turns, has_images = _raw_turns(record)
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(f"turn {number} is by the {role}, but user and assistant must take turns, user first")
    if not turns:
        raise DataError("the conversation has no question")
    if template == "plain":
        if len(turns) != 2 or IMAGE_TOKEN not in turns[0][1] or not (has_images or isinstance(record, Mapping)):
            raise DataError(f"the form 'plain' takes one question with {IMAGE_TOKEN} and its caption, but found {len(turns)} turns")
        has_images = True
    first = [("system", system)] if system else []
    return [{"role": role, "content": text} for role, text in first + turns], has_images


def _raw_turns(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], bool]:
    """(system prompt, (role, text) of each turn, whether there are images) of a record as it stands in a file."""
    for key, (role_key, text_key), roles in FORMS:
        if key not in record:
            continue
        names = dict(zip(roles, ("user", "assistant"), strict=True))
        turns = []
        system, others = split_system(record, record[key], role_key, text_key)
        for number, turn in enumerate(others):
            role, text = role_and_text(turn, role_key, text_key)
            if role not in names or text is None:
                raise DataError(f"turn {number} must be a text from one of {', '.join(roles)}, but is {str(turn)[:60]}")
            turns.append((names[role], _cut_run(text)))
        return system, turns, bool(image_names(record))
    raise DataError(f"the record has neither {' nor '.join(repr(key) for key, *_ in FORMS)}")


def _cut_run(text: str) -> str:
    """The original code makes 16 of a longer run of images at the beginning of a turn. Only what is compared with it needs this: a Record
    keeps all its images."""
    run = IMAGE_TOKEN * text.count(IMAGE_TOKEN)
    longest = IMAGE_TOKEN * LONGEST_RUN
    return text.replace(run, longest).strip() if text.startswith(longest) and len(run) > len(longest) else text
