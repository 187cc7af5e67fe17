"""Continuous batching: one thread owns the model and generates the next token of every completion at once.

Requests join the batch as soon as a slot is free. Waiting requests of similar length are prefilled together and become rows of the batch's
cache; a row is removed when its completion is finished. The cache is padded on the left, so the tokens of a row are contiguous and end at
the last column, and the distances between them, on which sliding windows depend, are correct. If a prompt begins like an earlier one, only
the rest of it is computed (see prefixes.py).

transformers' own continuous batching takes token ids only, without images.

Shapes: B rows of the batch, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from threading import Condition, Thread

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from moe_llava.data.backends import copy_tokenizer
from moe_llava.data.batches import concatenated, padded_left
from moe_llava.model.greedy import end_tokens, media_ids, never_written, placeholder_ids, prefill_positions
from moe_llava.serving.engine.batch import Batch
from moe_llava.serving.engine.cache import cache_of, has_states, is_causal, preallocated_cache, shapes_of, states_of, window_of
from moe_llava.serving.engine.interface import CompletionEngine, Deliver, Result, Work
from moe_llava.serving.engine.prefixes import PrefixCache, blocks_of
from moe_llava.serving.engine.requests import (
    ContextError,
    EngineClosed,
    Piece,
    Prompt,
    QueueFull,
    Request,
    RequestError,
    TimeLimitExceeded,
    TokenLogprobs,
    check_sampling,
)
from moe_llava.serving.engine.sampling import Sampler, choose
from moe_llava.serving.engine.submitted import Job, Row
from moe_llava.serving.engine.text import Detokenizer

logger = logging.getLogger(__name__)

PREFIX_BYTES = 512 * 2**20
SMALL_PREFILL = 256  # tokens, padding included: fewer take a GPU about as long, because it reads all weights in any case
PADDED = 1.5  # the most tokens of a larger prefill, padding included, for each token of its prompts
LARGE_PREFILL = 16_384  # the most tokens of a prefill of several prompts, which bounds its memory


class Engine(CompletionEngine):
    """Run a model in a thread of its own. The methods are described in CompletionEngine.

    `generation_config` decides on the tokens that end a completion and on those that are suppressed; the request decides on sampling.
    Completions do not depend on the rest of the batch, nor on earlier ones, except for rounding, and for a sparse model with a capacity,
    which drops tokens of a batch. `prefix_bytes`: the most memory for the beginnings of prompts, 0 for none. A model with a capacity, with
    linear attention, or whose text attends in both directions keeps none.

    Raises ValueError for a model with layers that keep a state instead of keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int = 8,
        max_waiting: int = 32,
        time_limit: float = 300.0,
        prefix_bytes: int = PREFIX_BYTES,
    ):
        self.model = model
        self.slots = slots
        self.max_waiting = max_waiting
        self.time_limit = time_limit
        text = model.config.get_text_config()
        self.context = text.max_position_embeddings
        self._tokenizer = copy_tokenizer(tokenizer)  # it is not thread-safe
        self._vocabulary = model.get_output_embeddings().weight.shape[0]
        self._placeholders = frozenset(placeholder_ids(model.config))
        self._media = frozenset(media_ids(model.config))
        suppressed = [token for token in never_written(model) if token < self._vocabulary]
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=model.device)  # may be empty
        self._ends = frozenset(end_tokens(model))
        self._admitted: list[Row] = []  # have a slot and will be prefilled next
        self._new_cache = partial(preallocated_cache, text)
        self._batch = Batch(self._new_cache, model.device)
        reusable = is_causal(text) and not has_states(text) and getattr(model.config, "capacity_factor", None) is None
        self._prefixes = PrefixCache(prefix_bytes) if prefix_bytes and reusable else None
        self._window = window_of(text)
        self._shapes: list[tuple[int, int]] = []  # of the cache's layers, known after the first prefill
        self._waiting: list[Row] = []
        self._jobs: list[Job] = []
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver[Piece]) -> Row:
        self._check(request)
        sampler = Sampler(request.temperature, request.top_p, request.seed) if request.temperature > 0 else None
        blocks = blocks_of(request.prompt, self._media) if self._prefixes is not None else []
        row = Row(deliver, time.monotonic() + self.time_limit, request, Detokenizer(self._tokenizer, request.stop), sampler, blocks)
        self._queue(row)
        return row

    def submit_work(self, work: Work[Result], deliver: Deliver[Result]) -> Job:
        job = Job(deliver, time.monotonic() + self.time_limit, work)
        self._queue(job)
        return job

    def _queue(self, pending: Row | Job) -> None:
        with self._changed:
            self.check_queue()
            if isinstance(pending, Job):
                self._jobs.append(pending)
            else:
                self._waiting.append(pending)
            self._changed.notify()

    def check_queue(self) -> None:
        if self._closed:
            raise EngineClosed("the server is shutting down")
        if self.running + self.waiting >= self.slots + self.max_waiting:
            raise QueueFull(f"{self.running + self.waiting} requests are running or waiting, the maximum; try again later")

    def clip_length(self, prompt_tokens: int, limit: int) -> int:
        return max(1, min(limit, self.context - prompt_tokens))

    @property
    def running(self) -> int:
        return len(self._admitted) + len(self._batch.rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._jobs)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_prompt(self, prompt: Prompt) -> None:
        ids = prompt.input_ids
        if len(ids) > self.context:
            raise ContextError(f"the conversation has {len(ids)} tokens, more than the model's context of {self.context}")
        unknown = max((token for token in ids if token not in self._placeholders), default=0)
        if unknown >= self._vocabulary:
            raise RequestError(f"the prompt has token {unknown}, but the vocabulary has {self._vocabulary} tokens")
        found, images = sum(token in self._placeholders for token in ids), image_count(prompt.inputs)
        if bool(found) != bool(images):
            raise RequestError(f"the prompt has {found} placeholder tokens and {images} images: both or neither must be 0")

    def _check(self, request: Request) -> None:
        length, limit = len(request.prompt.input_ids), request.max_new_tokens
        if not length or limit < 1:
            raise RequestError(f"a request needs a prompt and a token to generate, but has {length} tokens and max_new_tokens={limit}")
        if length + limit > self.context:
            answer = f"and the answer up to {limit}, more than" if length < self.context else "and leaves no room for an answer in"
            raise ContextError(f"the prompt has {length} tokens {answer} the model's context of {self.context}")
        self.check_prompt(request.prompt)
        check_sampling(request.temperature, request.top_p)
        if "" in request.stop:
            raise RequestError("a stop string is empty, which is not allowed")

    # All methods below run in the engine's thread.

    @torch.inference_mode()
    def _work(self) -> None:
        while self._wait_for_work():
            self._admit()
            if self._jobs:
                self._run_job(self._jobs[0])
            while self._admitted:
                self._guarded(self._prefill, self._next_to_prefill())
            if self._batch.rows:
                self._guarded(self._decode, self._batch.rows)

    def _wait_for_work(self) -> bool:
        """Return False when the engine is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._jobs or self._batch.rows or self._closed)
            return bool(self._waiting or self._jobs or self._batch.rows)

    def _admit(self) -> None:
        """Move waiting requests to free slots, in order. Drop cancelled ones, and fail those that exceeded the time limit."""
        with self._changed:
            pending = (*self._batch.rows, *self._waiting, *self._jobs)
            for expired in [one for one in pending if not one.done and time.monotonic() > one.deadline]:
                expired.fail(TimeLimitExceeded(f"the answer was not complete within {self.time_limit:g} seconds"))
            self._drop_finished()
            waiting = [row for row in self._waiting if not row.done]
            self._jobs = [job for job in self._jobs if not job.done]
            free = self.slots - len(self._batch.rows)
            self._admitted, self._waiting = waiting[:free], waiting[free:]

    def _guarded(self, work: Callable[[list[Row]], None], rows: list[Row]) -> None:
        """Deliver an error to the rows that it concerns; the next requests may succeed."""
        try:
            work(rows)
        except Exception as error:
            logger.exception("%d requests failed", len(rows))  # their clients may have disconnected
            for row in rows:
                if not row.done:
                    row.fail(error)
        self._drop_finished()

    def _run_job(self, job: Job) -> None:
        """Run a job. Completions wait meanwhile, so only one is run between two decoding steps."""
        try:
            result = job.work(self.model, self._tokenizer)
        except Exception as error:  # noqa: BLE001  the caller raises or logs it
            job.fail(error)
        else:
            job.done = True
            job.deliver(result)
        with self._changed:
            self._jobs.remove(job)

    def _next_to_prefill(self) -> list[Row]:
        """Return the admitted rows that are prefilled together next, and set how much of them is reused."""
        if self._prefixes is None:
            return similar_in_length(self._admitted)
        for row in self._admitted:
            row.blocks = self._prefixes.fitting(row.blocks)
            row.reused = self._prefixes.known(row.blocks)
        first: dict[bytes | int, Row] = {}  # of those that begin the same, one goes ahead
        for row in self._admitted:
            if not row.reused:
                first.setdefault(row.blocks[0].key if row.blocks else id(row), row)
        if first:
            return similar_in_length(list(first.values()))
        rows = similar_in_length(self._admitted)
        # With a sliding window there may be no gap in a row (see `_rest`): the rests are then of one length.
        longest = max(row.reused for row in rows) + max(len(row.rest) for row in rows)
        gaps = longest <= self._window
        return [row for row in rows if gaps or len(row.rest) == len(rows[0].rest)]

    def _prefill(self, rows: list[Row]) -> None:
        """Run the model on new prompts, with a cache of their own, and generate the first token of each completion."""
        prompts = [row.request.prompt for row in rows]
        columns = max(len(prompt.input_ids) for prompt in prompts)
        inputs = self._inputs(prompts, columns)
        position_ids = prefill_positions(self.model, inputs)
        last = position_ids.reshape(-1, len(prompts), columns).amax((0, 2)).tolist()
        cache = self._new_cache()
        if rows[0].reused:
            cache, inputs = self._rest(rows)
            position_ids = position_ids[..., -inputs["input_ids"].shape[1] :]
        logits_B1V = self.model(**inputs, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for row, prompt, position in zip(rows, prompts, last, strict=True):
            row.cached, row.position = len(prompt.input_ids), position + 1
        if rows[0].reused:
            self._close_gaps(rows, cache, columns)
        self._keep_prefixes(rows, cache, columns)
        self._batch.join(rows, cache, columns)
        self._admitted = [row for row in self._admitted if row not in rows]
        self._choose(rows, logits_B1V[:, -1])

    def _rest(self, rows: list[Row]) -> tuple[Cache, dict[str, Tensor]]:
        """Return (a cache with what rows reuse, the inputs for the rest of their prompts). The images are in what is reused. Both are
        padded on the left, so a row has a gap between them."""
        assert self._prefixes is not None
        cache = cache_of([self._prefixes.take(row.blocks, row.reused) for row in rows], self._shapes)
        lengths = [len(row.rest) for row in rows]
        masks = self._mask([row.reused for row in rows], cache.get_seq_length()), self._mask(lengths, max(lengths))
        return cache, {"input_ids": self._padded([row.rest for row in rows], max(lengths)), "attention_mask": torch.cat(masks, dim=1)}

    def _close_gaps(self, rows: list[Row], cache: Cache, columns: int) -> None:
        """Move what rows reused to the rest of their prompts, so that the tokens of a row are the last of `columns`."""
        if len({len(row.rest) for row in rows}) == 1:
            return
        end = cache.get_seq_length()
        reused = max(row.reused for row in rows)
        sources_BS = torch.arange(end - columns, end).repeat(len(rows), 1)
        for row, sources_S in zip(rows, sources_BS, strict=True):
            begin = columns - row.cached
            sources_S[begin : begin + row.reused] = torch.arange(reused - row.reused, reused)
        for layer in cache.layers:
            layer.select(sources_BS.to(self.model.device))

    def _keep_prefixes(self, rows: list[Row], cache: Cache, columns: int) -> None:
        """Keep the states of prefilled rows, the only ones in `cache`."""
        if self._prefixes is None:
            return
        self._shapes = self._shapes or shapes_of(cache)
        for index, row in enumerate(rows):
            self._prefixes.keep(row.blocks, partial(states_of, cache, index, columns - row.cached))

    def _inputs(self, prompts: list[Prompt], columns: int) -> dict[str, Tensor]:
        """Return the model's inputs for several prompts, padded on the left to `columns`."""
        lengths = [len(prompt.input_ids) for prompt in prompts]
        ids_BS = self._padded([prompt.input_ids for prompt in prompts], columns)
        padded = [padded_left(prompt.inputs, columns - length) for prompt, length in zip(prompts, lengths, strict=True)]
        inputs = {name: self._to_device(value) for name, value in concatenated(padded).items()}
        return {"input_ids": ids_BS, "attention_mask": self._mask(lengths, columns)} | inputs

    def _padded(self, rows: list[list[int]], columns: int) -> Tensor:
        """Return token ids [B, S], padded on the left."""
        filler = next(token for token in range(self._vocabulary) if token not in self._placeholders)  # it is masked
        return torch.tensor([[filler] * (columns - len(ids)) + ids for ids in rows], device=self.model.device)

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

    def _decode(self, rows: list[Row]) -> None:
        """Generate the next token of every completion."""
        device = self.model.device
        logits_B1V = self.model(
            input_ids=torch.tensor([row.tokens[-1:] for row in rows], device=device),
            attention_mask=self._mask([row.cached + 1 for row in rows], self._batch.columns + 1),
            position_ids=torch.tensor([[row.position] for row in rows], device=device),
            past_key_values=self._batch.cache,
            use_cache=True,
        ).logits
        self._batch.columns += 1
        for row in rows:
            row.cached += 1
            row.position += 1
        self._choose(rows, logits_B1V[:, -1])

    def _mask(self, lengths: list[int], columns: int) -> Tensor:
        """Return [B, S], 0 for padding on the left."""
        starts = torch.tensor([columns - length for length in lengths])
        return (torch.arange(columns) >= starts[:, None]).long().to(self.model.device)

    def _drop_finished(self) -> None:
        self._admitted = [row for row in self._admitted if not row.done]
        self._batch.drop_finished()

    def _choose(self, rows: list[Row], logits_BV: Tensor) -> None:
        """Choose the next token of each row."""
        logits_BV = logits_BV.float()
        logits_BV[:, self._suppressed] = -torch.inf
        for row, logits_V, token in zip(rows, logits_BV, choose([row.sampler for row in rows], logits_BV), strict=True):
            if not row.done and token < 0:
                row.fail(ValueError("the model's logits for the next token are infinite or not numbers"))
            elif not row.done:
                self._add(row, token, logits_V)

    def _add(self, row: Row, token: int, logits_V: Tensor) -> None:
        """Append `token` to a completion, and deliver the new text."""
        row.tokens.append(token)
        reason: str | None
        if token in self._ends:
            text, logprobs, reason = row.text.finish(), None, "stop"
        else:
            text, logprobs = row.text.add(token), self._logprobs(row.request.top_logprobs, token, logits_V)
            reason = "stop" if row.text.stopped else "length" if len(row.tokens) == row.request.max_new_tokens else None
            if reason == "length":
                text += row.text.finish()
        row.deliver(Piece(token, text, logprobs, reason))
        row.done = row.done or reason is not None

    def _logprobs(self, number: int | None, token: int, logits_V: Tensor) -> TokenLogprobs | None:
        if number is None:
            return None
        logprobs_V = logits_V.log_softmax(-1)
        top = logprobs_V.topk(number)
        texts = [self._tokenizer.decode([other]) for other in (token, *top.indices.tolist())]
        return TokenLogprobs(texts[0], float(logprobs_V[token]), list(zip(texts[1:], top.values.tolist(), strict=True)))


def image_count(inputs: Mapping[str, Tensor]) -> int:
    """Return the number of images and videos, or of their patches or tiles, in the inputs of a prompt."""
    return sum(len(inputs[name]) for name in ("pixel_values", "pixel_values_videos") if name in inputs)


def similar_in_length(rows: list[Row]) -> list[Row]:
    """Return the first row, and those of most similar length that can be prefilled with it without much padding."""
    length = len(rows[0].rest)
    chosen: list[Row] = []
    longest = tokens = 0
    for row in sorted(rows, key=lambda row: abs(len(row.rest) - length)):
        longest, tokens = max(longest, len(row.rest)), tokens + len(row.rest)
        padded = (len(chosen) + 1) * longest
        if padded > max(SMALL_PREFILL, PADDED * tokens) or (chosen and padded > LARGE_PREFILL):
            break
        chosen.append(row)
    return chosen
