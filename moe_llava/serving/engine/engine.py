"""Continuous batching: one thread owns the model, and writes the next token of every answer at once.

A request need not wait until others are answered. Those that wait are read together (prefill), and join the batch as rows of its cache; a
row leaves when its answer is complete. The cache is padded on the left, so a row's tokens are always one run that ends at the last
column, and distances between them, of which sliding windows are made, stay true.

transformers' own continuous batching takes token ids only, and has no way for an image to come with them.

Shapes: B rows of the batch, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_llava.model.greedy import end_tokens, never_written, positions
from moe_llava.serving.engine.cache import roomy_cache
from moe_llava.serving.engine.requests import (
    EngineClosed,
    Piece,
    QueueFull,
    Request,
    RequestError,
    TimeLimitExceeded,
    TokenLogprobs,
    check_sampling,
)
from moe_llava.serving.engine.sampling import Sampler
from moe_llava.serving.engine.text import AnswerText

logger = logging.getLogger(__name__)

Deliver = Callable[[Piece | Exception], None]
Work = Callable[[Any, Any], Any]  # of model and tokenizer


@dataclass(eq=False)
class Asked:
    """What somebody waits for."""

    deliver: Callable[[Any], None]
    deadline: float
    done: bool = field(default=False, init=False)  # complete, failed, or cancelled from another thread

    def cancel(self) -> None:
        self.done = True

    def fail(self, error: Exception) -> None:
        self.done = True
        self.deliver(error)


@dataclass(eq=False)
class Row(Asked):
    """An answer while it is written. `cached`: its tokens in the cache, all but the last."""

    request: Request
    text: AnswerText
    sampler: Sampler | None
    tokens: list[int] = field(default_factory=list)
    cached: int = 0


@dataclass(eq=False)
class Job(Asked):
    """Other work with the model, done between two tokens."""

    work: Work


class Engine:
    """Answers up to `places` requests at once, while `max_waiting` more wait. Each has `time_limit` seconds, waiting among them.

    What `generation_config` says counts where it ends an answer or suppresses tokens; how to sample is said by the request. Answers do not
    depend on the company they are written in, but for rounding, and for a sparse model with a capacity, which drops tokens of a batch.
    """

    def __init__(self, model: Any, tokenizer: Any, places: int = 8, max_waiting: int = 32, time_limit: float = 300.0):
        self.model = model
        self.places = places
        self.max_waiting = max_waiting
        self.time_limit = time_limit
        self.context = model.config.text_config.max_position_embeddings
        self._tokenizer = copy.deepcopy(tokenizer)  # one cannot be used by two threads at a time
        self._vocabulary = model.get_output_embeddings().weight.shape[0]
        self._image = model.config.image_token_id
        suppressed = [token for token in never_written(model) if token < self._vocabulary]
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=model.device)  # there may be none
        self._ends = frozenset(end_tokens(model))
        self._newcomers: list[Row] = []  # have a place, and are about to be read
        self._rows: list[Row] = []
        self._cache: Any = None  # [B, heads, S, head width] per layer
        self._columns = 0  # S
        self._waiting: list[Row] = []
        self._jobs: list[Job] = []
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Callable[[], None]:
        """Has `request` answered: calls `deliver` from the engine's thread with each piece, or with the error that ended the answer; it
        must neither wait nor raise. Returns what cancels the answer; a piece that is being written may still come.

        Raises RequestError if the model cannot answer it, QueueFull if too many wait, EngineClosed after `close`.
        """
        self._check(request)
        sampler = Sampler(request.temperature, request.top_p, request.seed) if request.temperature > 0 else None
        row = Row(deliver, time.monotonic() + self.time_limit, request, AnswerText(self._tokenizer, request.stop), sampler)
        self._queue(row)
        return row.cancel

    def submit_work(self, work: Work, deliver: Callable[[Any], None]) -> Callable[[], None]:
        """Has `work` done in the engine's thread, with the model and its tokenizer, and calls `deliver` from there with what it returns, or
        with the error that ended it. It waits, is counted and is cancelled as an answer is; once begun, it is not stopped.

        Raises QueueFull if too many wait, EngineClosed after `close`.
        """
        job = Job(deliver, time.monotonic() + self.time_limit, work)
        self._queue(job)
        return job.cancel

    def _queue(self, asked: Row | Job) -> None:
        with self._changed:
            self.check_room()
            if isinstance(asked, Job):
                self._jobs.append(asked)
            else:
                self._waiting.append(asked)
            self._changed.notify()

    def check_room(self) -> None:
        """Raises QueueFull or EngineClosed where `submit` would: for who wants to know before a request is prepared."""
        if self._closed:
            raise EngineClosed("the server is ending")
        if self.running + self.waiting >= self.places + self.max_waiting:
            raise QueueFull(f"{self.running + self.waiting} requests are being answered or wait, as many as may; try again later")

    def room(self, prompt: int, most: int) -> int:
        """How many tokens the answer to so many may have, up to `most`; 1 where there is room for none, which `submit` refuses."""
        return max(1, min(most, self.context - prompt))

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return len(self._newcomers) + len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place, and work that waits for its turn."""
        return len(self._waiting) + len(self._jobs)

    def close(self) -> None:
        """Takes no more requests, and returns when all that it took are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_readable(self, ids: list[int], pixel_values: Tensor | None) -> None:
        """Raises RequestError if the model cannot read them."""
        if len(ids) > self.context:
            raise RequestError(f"the conversation has {len(ids)} tokens, but the model takes {self.context}")
        unknown = max((token for token in ids if token != self._image), default=0)
        if unknown >= self._vocabulary:
            raise RequestError(f"the prompt has token {unknown}, but the model knows {self._vocabulary}")
        places, images = ids.count(self._image), 0 if pixel_values is None else len(pixel_values)
        if bool(places) != bool(images) or (images and places % images):
            raise RequestError(f"the prompt has {places} placeholders, which cannot be those of {images} images")

    def _check(self, request: Request) -> None:
        ids, limit = request.input_ids, request.max_new_tokens
        if not ids or limit < 1:
            raise RequestError(f"a request needs a prompt and a token to write, but has {len(ids)} tokens and max_new_tokens={limit}")
        if len(ids) + limit > self.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the answer up to {limit}, but the model takes {self.context} together"
            )
        self.check_readable(ids, request.pixel_values)
        check_sampling(request.temperature, request.top_p)
        if "" in request.stop:
            raise RequestError("a stop string is empty, which none may be")

    # What follows runs in the engine's thread.

    @torch.inference_mode()
    def _work(self) -> None:
        while self._wait_for_work():
            self._admit()
            if self._jobs:
                self._do(self._jobs[0])
            if self._newcomers:
                self._guarded(self._read, self._newcomers)
            if self._rows:
                self._guarded(self._write, self._rows)

    def _wait_for_work(self) -> bool:
        """False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._jobs or self._rows or self._closed)
            return bool(self._waiting or self._jobs or self._rows)

    def _admit(self) -> None:
        """Gives the first of those that wait a place, as far as there are places. Ends what was cancelled, or took too long."""
        with self._changed:
            asked = (*self._rows, *self._waiting, *self._jobs)
            for late in [one for one in asked if not one.done and time.monotonic() > one.deadline]:
                late.fail(TimeLimitExceeded(f"the answer was not complete within {self.time_limit:g} seconds"))
            self._let_go()
            still = [row for row in self._waiting if not row.done]
            self._jobs = [job for job in self._jobs if not job.done]
            free = self.places - len(self._rows)
            self._newcomers, self._waiting = still[:free], still[free:]

    def _guarded(self, work: Callable[[list[Row]], None], rows: list[Row]) -> None:
        """Whoever asked is told what went wrong; the next request may go well."""
        try:
            work(rows)
        except Exception as error:
            logger.exception("answering %d requests failed", len(rows))  # those who asked may all have left
            for row in rows:
                if not row.done:
                    row.fail(error)
        self._let_go()

    def _do(self, job: Job) -> None:
        """One job: those whose answers are being written wait for no more than that."""
        try:
            result = job.work(self.model, self._tokenizer)
        except Exception as error:  # noqa: BLE001  who asked raises or logs it
            job.fail(error)
        else:
            job.done = True
            job.deliver(result)
        with self._changed:
            self._jobs.remove(job)

    def _read(self, newcomers: list[Row]) -> None:
        """Reads prompts, of which a cache of their own comes, and writes the first token of each answer."""
        device = self.model.device
        prompts = [row.request.input_ids for row in newcomers]
        columns = max(map(len, prompts))
        filler = int(self._image == 0)  # any token but a placeholder: it is masked
        ids_BS = torch.tensor([[filler] * (columns - len(ids)) + ids for ids in prompts], device=device)
        mask_BS = self._mask([len(ids) for ids in prompts], columns)
        images = [row.request.pixel_values for row in newcomers if row.request.pixel_values is not None]
        cache = roomy_cache()
        logits_B1V = self.model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=positions(mask_BS),
            pixel_values=torch.cat(images).to(device, self.model.dtype) if images else None,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        for row, ids in zip(newcomers, prompts, strict=True):
            row.cached = len(ids)
        self._join(cache, columns)
        self._choose(newcomers, logits_B1V[:, -1])

    def _write(self, rows: list[Row]) -> None:
        """Writes the next token of every answer."""
        device = self.model.device
        logits_B1V = self.model(
            input_ids=torch.tensor([row.tokens[-1:] for row in rows], device=device),
            attention_mask=self._mask([row.cached + 1 for row in rows], self._columns + 1),
            position_ids=torch.tensor([[row.cached] for row in rows], device=device),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._columns += 1
        for row in rows:
            row.cached += 1
        self._choose(rows, logits_B1V[:, -1])

    def _mask(self, lengths: list[int], columns: int) -> Tensor:
        """[B, S], 0 for padding on the left."""
        starts = torch.tensor([columns - length for length in lengths])
        return (torch.arange(columns) >= starts[:, None]).long().to(self.model.device)

    def _join(self, cache: Any, columns: int) -> None:
        """Makes newcomers rows of the batch, below those that are there."""
        if self._rows:
            longest = max(columns, self._columns)
            for layer, theirs in zip(self._cache.layers, cache.layers, strict=True):
                layer.hold(
                    torch.cat([_pad_left(layer.keys, longest), _pad_left(theirs.keys, longest)]),
                    torch.cat([_pad_left(layer.values, longest), _pad_left(theirs.values, longest)]),
                )
            self._columns = longest
        else:
            self._cache, self._columns = cache, columns
        self._rows, self._newcomers = [*self._rows, *self._newcomers], []

    def _let_go(self) -> None:
        """Takes rows that are done out of the batch, and columns that nobody needs any more."""
        self._newcomers = [row for row in self._newcomers if not row.done]
        kept = [index for index, row in enumerate(self._rows) if not row.done]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in kept]
        if not kept:
            self._cache, self._columns = None, 0
            return
        columns = max(row.cached for row in self._rows)
        rows = torch.tensor(kept, device=self.model.device)
        for layer in self._cache.layers:
            layer.hold(layer.keys[rows, :, -columns:], layer.values[rows, :, -columns:])
        self._columns = columns

    def _choose(self, rows: list[Row], logits_BV: Tensor) -> None:
        logits_BV = logits_BV.float()
        logits_BV[:, self._suppressed] = -torch.inf
        for row, logits_V, likeliest in zip(rows, logits_BV, logits_BV.argmax(-1).tolist(), strict=True):
            if not row.done:
                self._add(row, row.sampler.draw(logits_V) if row.sampler else likeliest, logits_V)

    def _add(self, row: Row, token: int, logits_V: Tensor) -> None:
        """Delivers what `token` adds to an answer."""
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


def _pad_left(states: Tensor, columns: int) -> Tensor:
    """[B, heads, S, head width], with zeros before, `columns` long."""
    return F.pad(states, (0, 0, columns - states.shape[2], 0))
