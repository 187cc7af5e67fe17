"""What fails in the engine fails alone, and whoever waits for it is told."""

import queue
import threading
import time

import pytest
import torch

from moe_llava.serving.engine.cache import PreallocatedLayer
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.requests import EngineClosed, Prompt, QueueFull, Request, TimeLimitExceeded
from tests.serving.conftest import ask, request_of
from tests.serving.test_engine import alone, endless, engine, questions, tokens  # noqa: F401


def test_a_failure_is_told_to_those_whom_it_concerns(endless, served, monkeypatch):  # noqa: F811
    """An image of another size than the tower's cannot be read; who is in the midst of an answer does not notice."""
    model, request = endless
    with Engine(model, served[1].tokenizer) as engine:  # noqa: F811
        running = ask(engine, request)
        next(running)
        with pytest.raises(ValueError, match="doesn't match model"):
            list(ask(engine, Request(Prompt(request.prompt.input_ids, {"pixel_values": torch.zeros(1, 3, 24, 24)}), 2)))
        assert len(list(running)) == request.max_new_tokens - 1


def failing(monkeypatch, method, layer):
    """The given call of a layer's method fails, those before and after it do not."""
    calls, works = [], getattr(PreallocatedLayer, method)

    def fails(self, *args):
        calls.append(self)
        if len(calls) == layer:
            raise torch.OutOfMemoryError("out of memory")
        works(self, *args)

    monkeypatch.setattr(PreallocatedLayer, method, fails)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("running", [1, 2])
@pytest.mark.parametrize("joining", [7, 6], ids=["longer", "shorter"])
def test_running_answers_stay_when_there_is_no_memory_to_join(endless, served, questions, monkeypatch, running, layer, joining):  # noqa: F811
    model, request = endless
    expected = alone(model, request)
    other = request_of(served[1], questions[joining], 5)
    assert (len(other.prompt.input_ids) > len(request.prompt.input_ids)) == (joining == 7)
    with Engine(model, served[1].tokenizer) as engine:  # noqa: F811
        answers = [ask(engine, request) for _ in range(running)]
        begun = [next(answer) for answer in answers]
        failing(monkeypatch, "join", layer)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            list(ask(engine, other))
        later = ask(engine, other)
        assert [tokens([first, *rest]) for first, rest in zip(begun, answers, strict=True)] == [expected] * running
        assert tokens(later) == alone(model, other)


def test_all_fail_when_there_is_no_memory_to_leave(endless, served, monkeypatch):  # noqa: F811
    """The cache has lost its order then, but the engine goes on."""
    model, request = endless
    failing(monkeypatch, "keep", 2)
    with Engine(model, served[1].tokenizer) as engine:  # noqa: F811
        answers = [ask(engine, request), ask(engine, Request(request.prompt, 5))]
        assert len(list(answers[1])) == 5
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            list(answers[0])
        assert tokens(ask(engine, request)) == alone(model, request)


def test_a_row_without_finite_logits_fails_alone(endless, served, monkeypatch):  # noqa: F811
    model, request = endless
    forward = model.forward

    def broken(**inputs):
        output = forward(**inputs)
        output.logits[1:] = torch.nan
        return output

    monkeypatch.setattr(model, "forward", broken)
    with Engine(model, served[1].tokenizer) as engine:  # noqa: F811
        running = ask(engine, request)
        next(running)
        with pytest.raises(ValueError, match="infinite or not numbers"):
            list(ask(engine, Request(request.prompt, 9)))
        assert len(list(running)) == request.max_new_tokens - 1


def test_work_that_fails_is_cancelled_or_late(served):
    model, processor, _ = served
    begun, may_end, done = threading.Event(), threading.Event(), queue.Queue()
    with Engine(model, processor.tokenizer, slots=1, max_waiting=2, time_limit=0.2) as engine:  # noqa: F811
        engine.submit_work(lambda *_: (begun.set(), may_end.wait(20), 1 / 0), done.put)
        assert begun.wait(20)
        engine.submit_work(lambda *_: "late", done.put)
        cancelled = engine.submit_work(lambda *_: "cancelled", done.put)
        with pytest.raises(QueueFull):
            engine.submit_work(lambda *_: None, done.put)
        cancelled.cancel()
        time.sleep(0.25)
        may_end.set()
        assert isinstance(done.get(timeout=20), ZeroDivisionError)
        assert isinstance(done.get(timeout=20), TimeLimitExceeded)
        engine.submit_work(lambda *_: "after", done.put)
        assert done.get(timeout=20) == "after"  # and nothing of what was cancelled
        engine.submit_work(lambda *_: "last", done.put)
    assert done.get_nowait() == "last"  # what was taken is done before the end
    with pytest.raises(EngineClosed):
        engine.submit_work(lambda *_: None, done.put)
