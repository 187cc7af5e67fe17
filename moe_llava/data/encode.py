"""From a conversation to token ids and labels: what a model reads, and what it learns to say.

One mechanism for all conversation forms: a chat template is rendered, with the places of the answers, and the text between images is
tokenized piece by piece, as the original code does. A token is learnt if it ends within an answer.

Unusual here:
- An image is -200 in the ids until a model's own placeholder takes its place; inside an answer it is -200 in the labels, too, and is no
  more learnt than outside.
- The tokenizer alone decides about a beginning-of-sequence token, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from moe_llava.common.errors import DataError
from moe_llava.data.records import FORMS, IMAGE_TOKEN, Record, role_and_text, split_system
from moe_llava.data.templates import TEMPLATES, chat_template

IMAGE_INDEX = -200
IGNORE_INDEX = -100
LONGEST_RUN = 16

Message = dict[str, Any]
Span = tuple[int, int]


def encode_record(
    record: Record | Mapping[str, Any], tokenizer: Any, template: str | None = None, image_tokens: int = 1
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a record, of equal length.

    Args:
        record: a Record, or a record as it stands in a file, of either form; `<image>` in its text means an image if it has `image` or
            `images`.
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


def _encode_whole(
    record: Record | Mapping[str, Any], tokenizer: Any, template: str | None, image_tokens: int
) -> tuple[dict[str, list[int]], int | None]:
    """(ids and labels of all of a record, where the tokenizer's model ends text alone)"""
    try:
        messages, has_images = _messages(record)
        has_images = has_images or template == "plain"
        whole = _encode_messages(messages, has_images, tokenizer, template, image_tokens)
    except DataError as error:
        raise DataError(f"{record.source}: {error}" if isinstance(record, Record) else str(error)) from error
    return whole, None if has_images else tokenizer.model_max_length


def _encode_messages(
    messages: list[Message], has_images: bool, tokenizer: Any, template: str | None, image_tokens: int
) -> dict[str, list[int]]:
    if template == "plain":
        _check_caption(messages)
    text, answers = render(messages, tokenizer, template)
    ids, labels, start = [], [], 0
    # Every piece is tokenized as if it were a text of its own: what the tokenizer begins each with belongs to the first.
    begin = int(_with_true_offsets(tokenizer).encode("").ids[:1] == [tokenizer.bos_token_id])
    for number, piece in enumerate(text.split(IMAGE_TOKEN) if has_images else [text]):
        if number:
            ids += [IMAGE_INDEX] * image_tokens
            labels += [IMAGE_INDEX if _learnt(start, answers) else IGNORE_INDEX] * image_tokens
        piece_ids, piece_labels = _encode_piece(piece, start, answers, tokenizer)
        ids += piece_ids[begin if number else 0 :]
        labels += piece_labels[begin if number else 0 :]
        start += len(piece) + len(IMAGE_TOKEN)
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


def render(messages: list[Message], tokenizer: Any, template: str | None) -> tuple[str, list[Span]]:
    """The text of a conversation, and the [start, end) of each answer in it, its end token included.

    Raises DataError if the tokenizer has no chat template, or one that does not build a conversation turn by turn.
    """
    if template is None:
        jinja = tokenizer.chat_template
        if not jinja:
            raise DataError(f"the tokenizer has no chat template: name one of {', '.join(TEMPLATES)}")
        special = tokenizer.special_tokens_map
    else:
        jinja, special = chat_template(template), {"bos_token": ""}  # the tokenizer adds it
    if re.search(r"\{%-?\s*generation\s*-?%\}", jinja):
        texts, spans = _rendered(messages, jinja, return_assistant_tokens_mask=True, **special)
        return texts[0], [(low, high) for low, high in spans[0]]
    return _render_by_turns(messages, jinja, special)


def _render_by_turns(messages: list[Message], jinja: str, special: dict[str, Any]) -> tuple[str, list[Span]]:
    """For a template that does not mark its answers: an answer is what a turn adds to the prompt for it."""

    def written(count: int, prompt: bool) -> str:
        return _rendered(messages[:count], jinja, add_generation_prompt=prompt, **special)[0][0]

    whole, answers = written(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = written(index, True), written(index + 1, False)
        if not (answered.startswith(prompt) and whole.startswith(answered)) or (answered == prompt and message["content"]):
            raise DataError(
                "the tokenizer's chat template does not add turn to turn, and has no {% generation %} blocks, so its answers cannot be "
                f"told from the rest: name one of {', '.join(TEMPLATES)}"
            )
        answers.append((len(prompt), len(answered)))
    return whole, answers


def _rendered(messages: list[Message], jinja: str, **settings: Any) -> tuple[list[str], list[list[list[int]]]]:
    """([text], [[[start, end) of each answer]]), the latter if `return_assistant_tokens_mask` asks for it."""
    from transformers.utils.chat_template_utils import render_jinja_template  # takes a second, and reading a file needs none of it

    return render_jinja_template([messages], chat_template=jinja, **settings)


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
    """Byte-level tokenizers report their tokens without the white space in them."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    text = json.dumps(state["post_processor"]).replace('"trim_offsets": true', '"trim_offsets": false')
    return Tokenizer.from_str(json.dumps({**state, "post_processor": json.loads(text)}))


def _messages(record: Record | Mapping[str, Any]) -> tuple[list[Message], bool]:
    """(messages as chat templates take them, whether `<image>` means an image)"""
    if isinstance(record, Record):
        turns = [turn for question, answer in record.turns for turn in (("user", question), ("assistant", answer))]
        system, has_images = record.system, bool(record.images)
    else:
        system, turns, has_images = _raw_turns(record)
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(f"turn {number} is by the {role}, but user and assistant must take turns, user first")
    if not turns:
        raise DataError("the conversation has no question")
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
        return system, turns, "image" in record or bool(record.get("images"))
    raise DataError(f"the record has neither {' nor '.join(repr(key) for key, *_ in FORMS)}")


def _cut_run(text: str) -> str:
    """The original code makes 16 of a longer run of images at the beginning of a turn. Only what is compared with it needs this: a Record
    keeps all its images."""
    run = IMAGE_TOKEN * text.count(IMAGE_TOKEN)
    longest = IMAGE_TOKEN * LONGEST_RUN
    return text.replace(run, longest).strip() if text.startswith(longest) and len(run) > len(longest) else text


def _check_caption(messages: list[Message]) -> None:
    if len(messages) != 2 or IMAGE_TOKEN not in messages[0]["content"]:
        raise DataError(f"the form 'plain' takes one question with {IMAGE_TOKEN} and its caption, but found {len(messages)} turns")
