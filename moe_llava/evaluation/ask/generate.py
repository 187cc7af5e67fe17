"""Greedy answers in batches, to questions of any benchmark: the one way to query a model.

Most of a prompt is its image, and benchmarks have several questions about one image. So a prompt is prefilled in two parts: its head, up to
the end of its last image, once for all questions that share it; and its rest, with the answer, in batches. Under attack every question has
its own pixels, and so its own head. Where a processor writes more than placeholders for an image, or the model more than positions for a
token, prompts are prefilled as a whole.

Shapes: H heads, B rows of a batch, S sequence.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from moe_llava.common.images import open_image
from moe_llava.data.backends import copy_tokenizer
from moe_llava.data.batches import concatenated, padded_left
from moe_llava.data.encoder import Encoder
from moe_llava.data.videos import VideoReader
from moe_llava.evaluation.ask.options import Restriction, restrict
from moe_llava.evaluation.ask.prompts import prompt_text
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress.attack import answer_losses, attacked_pixels, own_answers, with_answers
from moe_llava.evaluation.stress.perturb import PIXEL_ATTACKS, WORD_ATTACK, Perturbation, perturb_image, perturb_question
from moe_llava.evaluation.stress.words import Losses, attack_words
from moe_llava.model.greedy import end_tokens, positions, write_greedily

AHEAD = 2  # groups that are decoded and wait

Row = tuple[int, int, list[int]]  # the index of a question, its head, and the token ids of its rest
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Group:
    """Questions that share a few heads. `heads`: model inputs [H, ...], None if there are no images. `batches`: of rows."""

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
    """Yield (index, answer) of each question, batch by batch, under a perturbation if one is given.

    A batch has prompts of similar length, and equal prompts where possible, whose answers have similar lengths, too. The longest come
    first, so that memory runs out at once or never. `max_new_tokens` does not limit options.

    Raises BenchmarkError before the first answer if a prompt and its images do not fit, or if there is a video and the model takes none or
    a perturbation is given; DataError if an image or a video cannot be decoded.
    """
    if processor.tokenizer.pad_token_id is None:
        raise BenchmarkError("the tokenizer has no pad token, which batches are padded with")
    attack = perturbation if perturbation is not None and perturbation.name in PIXEL_ATTACKS else None
    if perturbation is not None:
        questions = [perturb_question(question, perturbation) for question in questions]
    videos = [question for question in questions if question.video is not None]
    if videos:
        _check_videos(processor, videos[0], perturbation)
    texts = [prompt_text(processor, question) for question in questions]
    restricted = restrict(model, processor, questions, texts)
    max_new_tokens = restricted.longest or max_new_tokens
    if perturbation is not None and perturbation.name == WORD_ATTACK:
        for start in range(0, len(questions), batch_size):
            attacked = []
            for index, question in enumerate(questions[start : start + batch_size], start):
                own = Restriction(restricted.options[index : index + 1])
                losses = _losses_of(model, processor, question, own, batch_size, max_new_tokens)
                attacked.append(attack_words(question, perturbation, losses))
            for answered in answer(model, processor, attacked, batch_size, max_new_tokens):
                yield [(start + index, text) for index, text in answered]
        return
    if videos or not shares_heads(processor):
        yield from _answer_whole(model, processor, questions, texts, batch_size, max_new_tokens, perturbation, restricted)
        return
    groups = _group_by_head(questions, texts, processor.image_token, batch_size, alone=attack is not None)
    # The processor is used in the background thread, and a tokenizer in one thread only.
    tokenizer = copy_tokenizer(processor.tokenizer)
    for group in in_background(lambda group: _group_inputs(processor, questions, texts, group, batch_size, perturbation), groups):
        if attack is not None and group.heads is not None:
            _attack_heads(model, processor, group, attack, max_new_tokens, restricted)
        cache = None if group.heads is None else _prefill_heads(model, group.heads)
        for batch in group.batches:
            answers = _answer_batch(model, tokenizer, group.heads, cache, batch, max_new_tokens, restricted)
            yield list(zip([index for index, *_ in batch], answers, strict=True))


def shares_heads(processor: Any) -> bool:
    """Return whether an image is nothing but placeholders in a prompt, and a token nothing but its id and position."""
    _, (image,) = Encoder(processor).process([Image.new("RGB", (64, 64))])
    return not image.replace(processor.image_token, "") and not processor.return_mm_token_type_ids


def _answer_whole(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    texts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    perturbation: Perturbation | None,
    restricted: Restriction,
) -> Iterator[list[tuple[int, str]]]:
    """Do the same as `answer`, without sharing heads."""
    attack = perturbation if perturbation is not None and perturbation.name in PIXEL_ATTACKS else None
    order = sorted(range(len(questions)), key=lambda index: (len(questions[index].images), len(texts[index]), texts[index]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    tokenizer = copy_tokenizer(processor.tokenizer)

    def prepared(batch: list[int]) -> Any:
        return _process_all(processor, [questions[index] for index in batch], [texts[index] for index in batch], perturbation)

    for batch, made in zip(batches, in_background(prepared, batches), strict=True):
        inputs = made.to(model.device, dtype=model.dtype)
        allowed = restricted.allowed(batch, inputs["input_ids"].shape[1])
        if attack is not None and "pixel_values" in inputs:
            inputs["pixel_values"] = attacked_pixels(model, processor.image_processor, inputs, attack, max_new_tokens, allowed)
        with torch.inference_mode():
            generated = write_greedily(model, dict(inputs), max_new_tokens, allowed)
        yield list(zip(batch, _decoded(model, tokenizer, generated[:, inputs["input_ids"].shape[1] :]), strict=True))


def _check_videos(processor: Any, question: Question, perturbation: Perturbation | None) -> None:
    """Raise BenchmarkError if a question with a video cannot be answered."""
    if perturbation is not None:
        raise BenchmarkError(f"question {question.id} has a video, but only images and texts are perturbed")
    if problem := Encoder(processor).video_problem:
        raise BenchmarkError(f"question {question.id} has a video, but {problem}")


def _opened(image: Any, question: Question, perturbation: Perturbation | None) -> Any:
    opened = open_image(image, f"question {question.id}")
    return opened if perturbation is None else perturb_image(opened, perturbation)


def _group_by_head(
    questions: Sequence[Question], texts: Sequence[str], image_token: str, batch_size: int, alone: bool
) -> list[list[list[int]]]:
    """Return groups of up to `batch_size` heads, each with the indices of its questions, or of one question if `alone`. All heads of a
    group have the same number of images."""
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
    images = [[_opened(image, questions[index], perturbation) for image in questions[index].images] for index in firsts]
    if any(images):
        heads = _process(processor, [_head(texts[index], processor.image_token) for index in firsts], images)
    return Group(heads, _group_batches(processor, texts, group, batch_size))


def _group_batches(processor: Any, texts: Sequence[str], group: list[list[int]], batch_size: int) -> list[list[Row]]:
    """Return the rows of a group, in batches of similar length."""
    number = {index: place for place, members in enumerate(group) for index in members}
    order = sorted(number, key=lambda index: (len(texts[index]), texts[index]), reverse=True)
    rows = []
    # Prompts are tokenized as a whole, because some tokenizers treat the start of a text in another way.
    all_ids = processor.tokenizer([texts[index] for index in order], add_special_tokens=False)["input_ids"]
    for index, ids in zip(order, all_ids, strict=True):
        last = max((place for place, token in enumerate(ids) if token == processor.image_token_id), default=-1)
        rows.append((index, number[index], ids[last + 1 :]))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _process(processor: Any, texts: list[str], images: list[list[Any]], **videos: Any) -> Any:
    """Return the model's inputs of texts, each with a list of images."""
    given = images if any(images) else None
    return processor(text=texts, images=given, **videos, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")


def _process_all(processor: Any, questions: Sequence[Question], texts: list[str], perturbation: Perturbation | None) -> Any:
    """Return the model's inputs of questions. With a video among them, each is processed alone: what some processors write about a video
    depends on the others in a batch."""
    images = [[_opened(image, question, perturbation) for image in question.images] for question in questions]
    if all(question.video is None for question in questions):
        return _process(processor, texts, images)
    reader, rows = VideoReader(processor), []
    for question, text, own in zip(questions, texts, images, strict=True):
        videos = {} if question.video is None else reader.arguments(reader.open(question.video, f"question {question.id}"))
        rows.append(_process(processor, [text], [own], **videos))
    longest, fill = max(row["input_ids"].shape[1] for row in rows), {"input_ids": processor.tokenizer.pad_token_id}
    return BatchFeature(concatenated([padded_left(row, longest - row["input_ids"].shape[1], fill) for row in rows]))


def _attack_heads(model: Any, processor: Any, group: Group, attack: Perturbation, max_new_tokens: int, restricted: Restriction) -> None:
    """Replace the pixels of a group of questions that each have their own head."""
    (batch,) = group.batches
    batch = sorted(batch, key=lambda row: row[1])
    ids_BS, mask_BS = _prompts(processor.tokenizer.pad_token_id, group.heads, batch)
    allowed = restricted.allowed([index for index, *_ in batch], ids_BS.shape[1])
    inputs = {**group.heads, "input_ids": ids_BS, "attention_mask": mask_BS}
    inputs = {name: value.to(model.device, model.dtype if value.is_floating_point() else None) for name, value in inputs.items()}
    group.heads["pixel_values"] = attacked_pixels(model, processor.image_processor, inputs, attack, max_new_tokens, allowed)


def _losses_of(model: Any, processor: Any, question: Question, restricted: Restriction, batch_size: int, max_new_tokens: int) -> Losses:
    """Return a function of wordings of a question: the mean losses of the model's own answer to it as it is."""
    prompt = _whole_inputs(model, processor, [question])
    start = prompt["input_ids"].shape[1]
    own_1A = own_answers(model, prompt, max_new_tokens, restricted.allowed([0], start))[1][:, start:]
    batches_of = _HeadsInCommon(model, processor).batches if shares_heads(processor) else partial(_whole_batches, model, processor)

    @torch.no_grad()
    def losses(wordings: Sequence[Question]) -> list[float]:
        found: dict[int, float] = {}
        for indices, inputs in batches_of(wordings, batch_size):
            answers = own_1A.expand(len(indices), -1)
            values = answer_losses(model, *with_answers(inputs, answers, torch.ones_like(answers, dtype=torch.bool)))
            found |= zip(indices, values.tolist(), strict=True)
        return [found[index] for index in range(len(wordings))]

    return losses


def _whole_inputs(model: Any, processor: Any, questions: Sequence[Question]) -> Any:
    return prompt_inputs(processor, questions).to(model.device, dtype=model.dtype)


def _whole_batches(model: Any, processor: Any, questions: Sequence[Question], batch_size: int) -> Iterator[tuple[list[int], Any]]:
    """Yield (indices of questions, model inputs), batch by batch."""
    for start in range(0, len(questions), batch_size):
        indices = list(range(start, min(start + batch_size, len(questions))))
        yield indices, _whole_inputs(model, processor, [questions[index] for index in indices])


class _HeadsInCommon:
    """Batches of wordings of one question, again and again: each head is processed and prefilled once."""

    def __init__(self, model: Any, processor: Any):
        self._model, self._processor = model, processor
        self._prefilled: dict[str, tuple[Any, Any]] = {"": (None, None)}  # head -> (its model inputs, its cache)

    def batches(self, questions: Sequence[Question], batch_size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield (indices of questions, model inputs behind the head, with its cache), batch by batch."""
        image_token = self._processor.image_token
        texts = [prompt_text(self._processor, question) for question in questions]
        for group in _group_by_head(questions, texts, image_token, 1, alone=False):
            head = _head(texts[group[0][0]], image_token)
            if head not in self._prefilled:
                heads = _group_inputs(self._processor, questions, texts, group, batch_size, None).heads
                self._prefilled[head] = heads, _prefill_heads(self._model, heads)
            heads, cache = self._prefilled[head]
            for batch in _group_batches(self._processor, texts, group, batch_size):
                inputs = _batch_inputs(self._model, self._processor.tokenizer, heads, cache, batch)
                prefilled = 0 if heads is None else heads["input_ids"].shape[1]
                yield [index for index, *_ in batch], {**inputs, "input_ids": inputs["input_ids"][:, prefilled:]}


@torch.inference_mode()
def _prefill_heads(model: Any, heads: Any) -> Any:
    """Return the cache [H, ...] of keys and values."""
    inputs = heads.to(model.device, dtype=model.dtype)
    return model(**inputs, position_ids=positions(inputs["attention_mask"]), use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def _answer_batch(
    model: Any, tokenizer: Any, heads: Any, cache: Any, batch: list[Row], max_new_tokens: int, restricted: Restriction
) -> list[str]:
    inputs = _batch_inputs(model, tokenizer, heads, cache, batch)
    length = inputs["input_ids"].shape[1]
    allowed = restricted.allowed([index for index, *_ in batch], length)
    return _decoded(model, tokenizer, write_greedily(model, inputs, max_new_tokens, allowed)[:, length:])


def _batch_inputs(model: Any, tokenizer: Any, heads: Any, cache: Any, batch: list[Row]) -> dict[str, Any]:
    """Return the ids and attention mask of whole prompts, and the cache of their heads; None without images."""
    ids_BS, mask_BS = _prompts(tokenizer.pad_token_id, heads, batch)
    if cache is not None:
        cache = _select_rows(cache, torch.tensor([row for _, row, _ in batch], device=model.device))
    return {"input_ids": ids_BS.to(model.device), "attention_mask": mask_BS.to(model.device), "past_key_values": cache}


def _decoded(model: Any, tokenizer: Any, answers_BS: Tensor) -> list[str]:
    """Return the text of each answer, up to its end."""
    ends, texts = end_tokens(model), []
    for tokens in answers_BS.tolist():
        length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        texts.append(tokenizer.decode(tokens[:length], skip_special_tokens=True).strip())
    return texts


def _prompts(pad_token_id: int, heads: Any, batch: list[Row]) -> tuple[Tensor, Tensor]:
    """Return (ids, attention mask), each [B, S]. Padding comes before the head, and between it and the rest."""
    longest = max(len(ids) for *_, ids in batch)
    ids_BS = torch.tensor([[pad_token_id] * (longest - len(ids)) + ids for *_, ids in batch])
    mask_BS = (torch.arange(longest) >= torch.tensor([longest - len(ids) for *_, ids in batch])[:, None]).long()
    if heads is not None:
        rows = [row for _, row, _ in batch]
        ids_BS = torch.cat([heads["input_ids"].cpu()[rows], ids_BS], dim=1)
        mask_BS = torch.cat([heads["attention_mask"].cpu()[rows], mask_BS], dim=1)
    return ids_BS, mask_BS


def _select_rows(cache: Any, rows: Tensor) -> Any:
    """Return a cache of these rows, without changing `cache`."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def prompt_inputs(processor: Any, questions: Sequence[Question]) -> Any:
    """Return model inputs, padded on the left, so that every answer begins at the same position."""
    return _process_all(processor, questions, [prompt_text(processor, question) for question in questions], None)


def in_background(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield `make(item)` for each item, in order, from a thread that is a few items ahead."""
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
