"""The engine, asked by a test."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.evaluation.ask.generate import prompt_inputs
from moe_llava.evaluation.score.benchmark import Question
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.model.greedy import end_tokens
from moe_llava.model.upcycling import upcycle
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.requests import Piece, Prompt, Request
from moe_llava.serving.http.api import build_app
from moe_llava.serving.http.connections import http_server
from moe_llava.serving.http.listen import listener
from moe_llava.serving.http.protocol import Limits
from tests.conftest import tiny_config
from tests.training.conftest import tiny_base  # noqa: F401

LIMITS = Limits()


def model_of(family: str, sparse: bool, processor) -> LlavaForConditionalGeneration:
    """A tiny random model that takes what `processor` makes."""
    config = tiny_config(family)
    config.image_token_id = processor.tokenizer.image_token_id
    config.vision_config.image_size = 48
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    return upcycle(model, num_experts=3).eval() if sparse else model


def ask(engine: Engine, request: Request) -> Iterator[Piece]:
    """Submits at once; then the pieces as they come."""
    delivered: queue.Queue[Piece | Exception] = queue.Queue()
    engine.submit(request, delivered.put)
    return received(delivered)


def received(delivered: queue.Queue[Piece | Exception]) -> Iterator[Piece]:
    while True:
        piece = delivered.get(timeout=60)
        if isinstance(piece, Exception):
            raise piece
        yield piece
        if piece.finish_reason:
            return


def text_of(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def request_of(processor, question, max_new_tokens=12, **settings) -> Request:
    """A benchmark's question as a request."""
    inputs = prompt_inputs(processor, [question])
    images = {name: value for name, value in inputs.items() if name == "pixel_values"}
    return Request(Prompt(inputs["input_ids"][0].tolist(), images), max_new_tokens, **settings)


def watched(model, monkeypatch):
    """The number of tokens and of images in each forward pass of more than one token."""
    passes, forward = [], model.forward

    def watch(**inputs):
        rows, columns = inputs["input_ids"].shape
        if columns > 1:
            passes.append((rows, columns, len(inputs.get("pixel_values", ()))))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watch)
    return passes


def held_back(model, monkeypatch):
    """An event: until it is set, every forward pass waits."""
    may_go, forward = threading.Event(), model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (may_go.wait(60), forward(**inputs))[1])
    return may_go


def running(engine, processor):
    """A completion that has its slot. Those who ask while its pass is held back are admitted together."""
    first = ask(engine, request_of(processor, Question("t", "first"), 30))
    while engine.waiting:
        time.sleep(0.01)
    return first


@pytest.fixture(scope="session")
def served(tiny_base):  # noqa: F811
    """(model, processor, questions about an image)"""
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.float32)
    return model, processor, digits_world.questions(tiny_base / "data")[:6]


@pytest.fixture(scope="session")
def sparse(served):
    """(model, processor); the model writes words only, so that the text of an answer tells all of its tokens"""
    _, processor, _ = served
    model = model_of("llama", True, processor)
    others = {*processor.tokenizer.all_special_ids, *range(len(processor.tokenizer), model.config.text_config.vocab_size)}
    model.generation_config.suppress_tokens = sorted(others.difference(end_tokens(model)))
    return model, processor


@contextmanager
def server(engine: Engine, processor, limits: Limits = LIMITS, name: str = "tiny", **settings) -> Iterator[str]:
    """A real server on loopback; its URL, without /v1."""
    with listener("127.0.0.1", 0) as socket:
        running = http_server(build_app(engine, processor, name, limits, **settings), engine, limits)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()
