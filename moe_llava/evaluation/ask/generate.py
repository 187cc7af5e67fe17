"""The one way to ask: greedy answers in batches, to questions of any benchmark.

Most of a prompt is its image, and benchmarks ask about one image several times. So a prompt is computed in two parts: its head, up to the
end of its last image, once for all questions that have it; and its rest, together with the answer, in batches. Under attack every question
has pixels, and so a head, of its own.

Shapes: H heads, B rows of a batch, S sequence.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_llava.common.images import open_image
from moe_llava.data.records import IMAGE_TOKEN, content_parts
from moe_llava.data.rendering import REFUSALS
from moe_llava.evaluation.score.benchmark import BenchmarkError, Question
from moe_llava.evaluation.stress.attack import attacked_pixels
from moe_llava.evaluation.stress.perturb import Perturbation, perturb_image, perturb_question
from moe_llava.model.greedy import end_tokens, positions, write_greedily

AHEAD = 2  # groups that wait, decoded

Row = tuple[int, int, list[int]]  # the index of a question, its head, and the ids of its rest
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Group:
    """Questions that share a few heads. `heads`: model inputs [H, ...], None without images. `batches`: of rows."""

    heads: Any
    batches: list[list[Row]]


def answer(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    perturbation: Perturbation | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Yields (index, answer) of each question, batch by batch; under a perturbation, if one is given.

    A batch has prompts of about one length, and where it can the same prompt, to which answers are of about one length, too. The longest
    come first, so that memory runs out at once or never.

    Raises BenchmarkError before the first answer if a prompt and its images do not fit; DataError if an image cannot be decoded.
    """
    if processor.tokenizer.pad_token_id is None:
        raise BenchmarkError("the tokenizer has no pad token, which batches are padded with")
    attack = perturbation if perturbation is not None and perturbation.kind == "adversarial" else None
    if perturbation is not None:
        questions = [perturb_question(question, perturbation) for question in questions]
    texts = [prompt_text(processor, question) for question in questions]
    groups = _share_heads(questions, texts, processor.image_token, batch_size, alone=attack is not None)
    # The processor belongs to the thread that makes inputs: a tokenizer cannot be used by two at a time.
    tokenizer = copy.deepcopy(processor.tokenizer)
    for group in in_background(lambda group: _group_inputs(processor, questions, texts, group, batch_size, perturbation), groups):
        if attack is not None and group.heads is not None:
            _attack_heads(model, processor, group, attack, max_new_tokens)
        cache = None if group.heads is None else _read_heads(model, group.heads)
        for batch in group.batches:
            yield list(
                zip([index for index, *_ in batch], _answer_batch(model, tokenizer, group.heads, cache, batch, max_new_tokens), strict=True)
            )


def _share_heads(
    questions: Sequence[Question], texts: Sequence[str], image_token: str, batch_size: int, alone: bool
) -> list[list[list[int]]]:
    """Groups of up to `batch_size` heads, each with the indices of its questions, one if `alone`; all of a group have the same number of
    images."""
    order = sorted(range(len(questions)), key=lambda index: (len(questions[index].images), len(texts[index]), texts[index]), reverse=True)
    heads: dict[Any, list[int]] = {}
    for index in order:
        heads.setdefault((questions[index].images, _head(texts[index], image_token), index if alone else None), []).append(index)
    groups: list[list[list[int]]] = []
    images = -1
    for (pictures, *_), members in heads.items():
        if len(pictures) != images or len(groups[-1]) == batch_size:
            images = len(pictures)
            groups.append([])
        groups[-1].append(members)
    return groups


def _head(text: str, image_token: str) -> str:
    return text[: text.rfind(image_token) + len(image_token)] if image_token in text else ""


def _group_inputs(
    processor: Any,
    questions: Sequence[Question],
    texts: Sequence[str],
    group: list[list[int]],
    batch_size: int,
    perturbation: Perturbation | None,
) -> Group:
    heads = None
    firsts = [members[0] for members in group]
    images = [open_image(image, f"question {questions[index].id}") for index in firsts for image in questions[index].images]
    if perturbation is not None:
        images = [perturb_image(image, perturbation) for image in images]
    if images:
        shared = [_head(texts[index], processor.image_token) for index in firsts]
        heads = processor(text=shared, images=images, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    number = {index: place for place, members in enumerate(group) for index in members}
    order = sorted(number, key=lambda index: (len(texts[index]), texts[index]), reverse=True)
    rows = []
    # Tokenized as a whole, since some tokenizers begin a text of its own in another way.
    for index, ids in zip(
        order, processor.tokenizer([texts[index] for index in order], add_special_tokens=False)["input_ids"], strict=True
    ):
        last = max((place for place, token in enumerate(ids) if token == processor.image_token_id), default=-1)
        rows.append((index, number[index], ids[last + 1 :]))
    return Group(heads, [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])


def _attack_heads(model: Any, processor: Any, group: Group, attack: Perturbation, max_new_tokens: int) -> None:
    """Replaces the pixels of a group of questions, each with a head of its own."""
    (batch,) = group.batches
    ids_BS, mask_BS = _prompts(processor.tokenizer.pad_token_id, group.heads, sorted(batch, key=lambda row: row[1]))
    pixels = group.heads["pixel_values"].to(model.device, model.dtype)
    inputs = {"input_ids": ids_BS.to(model.device), "attention_mask": mask_BS.to(model.device), "pixel_values": pixels}
    group.heads["pixel_values"] = attacked_pixels(model, processor.image_processor, inputs, attack, max_new_tokens)


@torch.inference_mode()
def _read_heads(model: Any, heads: Any) -> Any:
    """The cache [H, ...] of keys and values."""
    inputs = heads.to(model.device, dtype=model.dtype)
    named = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    return model(**named, position_ids=positions(inputs["attention_mask"]), use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def _answer_batch(model: Any, tokenizer: Any, heads: Any, cache: Any, batch: list[Row], max_new_tokens: int) -> list[str]:
    ids_BS, mask_BS = _prompts(tokenizer.pad_token_id, heads, batch)
    if cache is not None:
        cache = _rows_of(cache, torch.tensor([row for _, row, _ in batch], device=model.device))
    inputs = {"input_ids": ids_BS.to(model.device), "attention_mask": mask_BS.to(model.device), "past_key_values": cache}
    generated = write_greedily(model, inputs, max_new_tokens)
    return [_text(model, tokenizer, row) for row in generated[:, ids_BS.shape[1] :].tolist()]


def _prompts(pad_token_id: int, heads: Any, batch: list[Row]) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), each [B, S]. Padding stands before the head, and between it and the rest."""
    longest = max(len(ids) for *_, ids in batch)
    ids_BS = torch.tensor([[pad_token_id] * (longest - len(ids)) + ids for *_, ids in batch])
    mask_BS = (torch.arange(longest) >= torch.tensor([longest - len(ids) for *_, ids in batch])[:, None]).long()
    if heads is not None:
        rows = [row for _, row, _ in batch]
        ids_BS = torch.cat([heads["input_ids"].cpu()[rows], ids_BS], dim=1)
        mask_BS = torch.cat([heads["attention_mask"].cpu()[rows], mask_BS], dim=1)
    return ids_BS, mask_BS


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache of these rows; `cache` stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _text(model: Any, tokenizer: Any, tokens: list[int]) -> str:
    ends = end_tokens(model)
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()


def prompt_text(processor: Any, question: Question) -> str:
    """The question as the model's conversation form has it. Raises BenchmarkError if that refuses it, or has more or fewer images than the
    question."""
    parts = content_parts(question.prompt)
    if IMAGE_TOKEN not in question.prompt:
        parts = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": question.prompt}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    except REFUSALS as error:
        raise BenchmarkError(f"the model's conversation form refuses question {question.id}: {error}") from error
    found = text.count(processor.image_token)
    if found != len(question.images):
        raise BenchmarkError(f"question {question.id} has {found} {processor.image_token} in its prompt and {len(question.images)} images")
    return text


def prompt_inputs(processor: Any, questions: Sequence[Question]) -> Any:
    """Model inputs, padded on the left, so that every answer begins at the same position."""
    texts = [prompt_text(processor, question) for question in questions]
    images = [open_image(image, f"question {question.id}") for question in questions for image in question.images] or None
    return processor(text=texts, images=images, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")


def in_background(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """What `make` makes of each, in order, in a thread that is a few ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
