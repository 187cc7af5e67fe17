"""Whoever is in the batch, an answer is what it would be alone."""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from moe_llava.evaluation.score.benchmark import Question
from moe_llava.model.greedy import end_tokens, write_greedily
from moe_llava.serving.engine.engine import PREFIX_BYTES, Engine, similar_in_length
from moe_llava.serving.engine.requests import EngineClosed, Prompt, QueueFull, Request, RequestError, TimeLimitExceeded
from tests.conftest import FAMILIES
from tests.serving.conftest import ask, held_back, model_of, received, request_of, running, text_of, watched
from tests.training.conftest import tiny_base  # noqa: F401


def alone(model, request):
    """The tokens that transformers writes, up to an end."""
    ids = torch.tensor([request.prompt.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    written = write_greedily(model, inputs | request.prompt.inputs, request.max_new_tokens)[0, ids.shape[1] :].tolist()
    end = next((place for place, token in enumerate(written) if token in end_tokens(model)), len(written))
    return written[: end + 1]


def tokens(pieces):
    return [piece.token for piece in pieces]


@pytest.fixture
def questions(served):
    _, _, about_one = served
    text = Question("text", "which digit is leftmost ?")
    longer = Question("longer", "which digit is leftmost ? which digit is rightmost ? how many digits are there in the image ?")
    return [*about_one, text, Question("two", "<image> is this <image> a red 7 ?", about_one[0].images * 2), longer]


@pytest.fixture
def engine(served):
    model, processor, _ = served
    with Engine(model, processor.tokenizer, slots=2, max_waiting=2) as engine:
        yield engine


@pytest.fixture
def endless(served, monkeypatch):
    """(model, a request whose answer goes on until it is as long as it may be)"""
    model, processor, about_one = served
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    return model, request_of(processor, about_one[0], max_new_tokens=60)


def slowed(model, monkeypatch, seconds=0.02):
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (time.sleep(seconds), forward(**inputs))[1])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_as_alone(served, questions, family, sparse):
    """Asked at once, of different lengths, with more of them than places: some join while others are in the midst of their answers."""
    _, processor, _ = served
    model = model_of(family, sparse, processor)
    requests = [request_of(processor, question, 4 + 3 * number) for number, question in enumerate(questions)]
    expected = [alone(model, request) for request in requests]
    with Engine(model, processor.tokenizer, slots=4) as engine:
        answers = [ask(engine, request) for request in requests]
        assert [tokens(answer) for answer in answers] == expected
    assert len({tuple(answer) for answer in expected}) > 1


@pytest.mark.parametrize("family", ["llama", "phi", "mistral"])
@pytest.mark.parametrize("short_first", [True, False])
def test_answers_are_the_same_whenever_one_joins(served, questions, family, short_first):
    """A longer prompt makes the batch wider, a shorter one is padded; both leave, and those after them stay."""
    _, processor, _ = served
    model = model_of(family, True, processor)
    model.generation_config.eos_token_id = None
    if family == "mistral":
        model.config.text_config.sliding_window = 8  # shorter than any of the prompts
    short, two, one = (request_of(processor, questions[place], length) for place, length in ((6, 9), (7, 20), (0, 14)))
    requests = [short, two, one] if short_first else [two, short, one]
    with Engine(model, processor.tokenizer, slots=3) as engine:
        answers, begun = [], []
        for request in requests:
            answers.append(ask(engine, request))
            begun.append([next(answers[-1]), next(answers[-1])])
        found = [tokens([*first, *rest]) for first, rest in zip(begun, answers, strict=True)]
    assert found == [alone(model, request) for request in requests]


@pytest.mark.parametrize("family", ["llama", "phi", "mistral"])
def test_those_who_wait_are_read_together(served, questions, family, monkeypatch):
    """Prompts of different lengths, with one image, two and none, in one forward pass."""
    _, processor, _ = served
    model = model_of(family, True, processor)
    model.generation_config.eos_token_id = None
    requests = [request_of(processor, questions[place], 9) for place in (0, 7, 6, 8)]
    expected = [alone(model, request) for request in requests]
    may_begin, widths, forward = threading.Event(), [], model.forward

    def waits(**inputs):
        may_begin.wait(60)
        widths.append(inputs["input_ids"].shape)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", waits)
    with Engine(model, processor.tokenizer) as engine:
        answers = [ask(engine, requests[0])]
        while engine.waiting:  # until it is being read
            time.sleep(0.01)
        answers += [ask(engine, request) for request in requests[1:]]
        may_begin.set()
        assert [tokens(answer) for answer in answers] == expected
    lengths = {len(request.prompt.input_ids) for request in requests[1:]}
    assert len(lengths) == 3
    assert (3, max(lengths)) in widths


@pytest.mark.parametrize("prefix_bytes", [0, PREFIX_BYTES])
@pytest.mark.parametrize(("place", "expected_passes"), [(0, [(3, 81), (5, 9)]), (7, [(7, 9), (1, 81)])], ids=["first", "last"])
def test_a_long_prompt_does_not_make_others_as_long(served, questions, place, expected_passes, prefix_bytes, monkeypatch):
    """The first prompt goes with those of similar length. A pass of few tokens may have any padding."""
    model, processor, _ = served
    words = ["why", "which", "where", "how", "what", "who", "when"]
    requests = [request_of(processor, Question("short", f"{word} is this a 7 ?"), 6) for word in words]
    requests.insert(place, request_of(processor, questions[7], 6))
    assert sorted(len(request.prompt.input_ids) for request in requests) == [9] * 7 + [81]
    expected = [alone(model, request) for request in requests]
    passes, may_go = watched(model, monkeypatch), held_back(model, monkeypatch)
    with Engine(model, processor.tokenizer, slots=9, prefix_bytes=prefix_bytes) as engine:
        first = running(engine, processor)
        answers = [ask(engine, request) for request in requests]
        may_go.set()
        assert [tokens(answer) for answer in answers] == expected
        list(first)
    assert [(rows, columns) for rows, columns, _ in passes[1:]] == expected_passes


@pytest.mark.parametrize(
    ("lengths", "together"),
    [
        ([30_000] + [100] * 7, [30_000]),
        ([100, 30_000, 100, 90], [100, 100, 90]),
        ([600, 30, 700, 300, 650], [600, 650, 700, 300]),
        ([600, 30, 300, 90_000], [600, 300]),
        ([9, 80, 30], [9, 30, 80]),
        ([30_000] * 3, [30_000]),
        ([5_000] * 8, [5_000] * 3),
    ],
)
def test_prompts_of_similar_length_are_prefilled_with_the_first(lengths, together):
    rows = [SimpleNamespace(rest=range(length)) for length in lengths]
    assert [len(row.rest) for row in similar_in_length(rows)] == together


def test_a_sliding_window_is_kept_to(served, questions):
    """Else the test above would show nothing about windows."""
    _, processor, _ = served
    request = request_of(processor, questions[7], 20)
    wide, narrow = model_of("mistral", False, processor), model_of("mistral", False, processor)
    narrow.config.text_config.sliding_window = 8
    assert alone(wide, request) != alone(narrow, request)


def test_eight_at_once_need_hardly_more_steps_than_one(endless, served, monkeypatch):
    model, request = endless
    steps = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (steps.append(len(inputs["input_ids"])), forward(**inputs))[1])
    with Engine(model, served[1].tokenizer, slots=8) as engine:
        for answer in [ask(engine, request) for _ in range(8)]:
            assert len(list(answer)) == request.max_new_tokens
    assert sum(steps) == 8 * request.max_new_tokens
    assert len(steps) < 2 * request.max_new_tokens


def test_text_is_that_of_the_tokens(engine, served):
    model, processor, about_one = served
    request = request_of(processor, about_one[0])
    pieces = list(ask(engine, request))
    assert text_of(pieces) == processor.decode(alone(model, request), skip_special_tokens=True)
    assert pieces[-1].finish_reason == ("stop" if pieces[-1].token in end_tokens(model) else "length")


def test_a_seed_gives_one_answer_in_any_company(engine, served):
    _, processor, about_one = served
    drawn = request_of(processor, about_one[0], temperature=1.5, top_p=0.95, seed=5)
    first = tokens(ask(engine, drawn))
    company = ask(engine, request_of(processor, about_one[1], temperature=1.0, seed=9))
    assert tokens(ask(engine, drawn)) == first
    list(company)
    others = {tuple(tokens(ask(engine, request_of(processor, about_one[0], temperature=1.5, seed=seed)))) for seed in range(6)}
    assert len(others) > 1
    unlikely = request_of(processor, about_one[0], temperature=1.5, top_p=1e-6, seed=5)
    assert tokens(ask(engine, unlikely)) == tokens(ask(engine, request_of(processor, about_one[0])))


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(endless, served):
    model, request = endless
    with Engine(model, served[1].tokenizer) as engine:
        words = text_of(ask(engine, request)).split(" ")
        stop = " ".join(words[3:5])
        before = " ".join(words).partition(stop)[0]
        pieces = list(ask(engine, Request(request.prompt, 60, stop=("never there", stop))))
    assert text_of(pieces) == before
    assert pieces[-1].finish_reason == "stop"
    assert len(pieces) < 60


def test_logprobs_are_those_of_the_model(engine, served):
    model, processor, about_one = served
    request = request_of(processor, about_one[0], max_new_tokens=1, top_logprobs=3)
    (piece,) = ask(engine, request)
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([request.prompt.input_ids]), **request.prompt.inputs).logits[0, -1]
    logits_V[model.config.image_token_id] = -torch.inf
    top = logits_V.log_softmax(-1).topk(3)
    assert [text for text, _ in piece.logprobs.top] == [processor.decode([token]) for token in top.indices]
    assert [value for _, value in piece.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert (piece.logprobs.text, piece.logprobs.logprob) == piece.logprobs.top[0]


def test_what_is_cancelled_frees_its_place(endless, served, monkeypatch):
    model, request = endless
    slowed(model, monkeypatch)
    with Engine(model, served[1].tokenizer, slots=1) as engine:
        running, waiting = queue.Queue(), queue.Queue()
        first, second = engine.submit(request, running.put), engine.submit(request, waiting.put)
        next(received(running))
        answer = ask(engine, Request(request.prompt, 3))
        assert (engine.running, engine.waiting) == (1, 2)
        second.cancel()
        first.cancel()
        assert len(list(answer)) == 3
    assert waiting.empty()
    assert running.qsize() < request.max_new_tokens - 2


def test_beyond_the_queue_there_is_no_room(endless, served, monkeypatch):
    model, request = endless
    slowed(model, monkeypatch)
    with Engine(model, served[1].tokenizer, slots=2, max_waiting=2) as engine:
        answers = [ask(engine, request) for _ in range(4)]
        with pytest.raises(QueueFull, match="4 requests are running or waiting"):
            ask(engine, request)
        for answer in answers:
            assert len(list(answer)) == request.max_new_tokens
        assert len(list(ask(engine, request))) == request.max_new_tokens


def test_nobody_waits_for_ever(endless, served, monkeypatch):
    model, request = endless
    slowed(model, monkeypatch, 0.05)
    with Engine(model, served[1].tokenizer, slots=1, time_limit=0.5) as engine:
        running, waiting = ask(engine, request), ask(engine, request)
        with pytest.raises(TimeLimitExceeded, match=r"not complete within 0\.5 seconds"):
            list(running)
        with pytest.raises(TimeLimitExceeded):
            list(waiting)
        assert len(list(ask(engine, Request(request.prompt, 2)))) == 2


def test_the_end_comes_when_all_are_answered(endless, served, monkeypatch):
    model, request = endless
    slowed(model, monkeypatch)
    engine = Engine(model, served[1].tokenizer, slots=1)
    answers = [ask(engine, request), ask(engine, request)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert [len(list(answer)) for answer in answers] == [request.max_new_tokens] * 2
    closing.join(timeout=10)
    assert not closing.is_alive()
    with pytest.raises(EngineClosed):
        ask(engine, request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": []}, "has 0 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 120}, "more than the model's context of 128"),
        ({"input_ids": [1, 500]}, "token 500, but the vocabulary has 99 tokens"),
        ({"inputs": {"pixel_values": torch.zeros(1, 3, 48, 48)}}, "0 placeholder tokens and 1 images"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": 1e-40}, "temperature must be 0 or at least"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine, change, message):
    settings = {"input_ids": list(range(5, 20)), "inputs": {}, "max_new_tokens": 4} | change
    prompt = Prompt(settings.pop("input_ids"), settings.pop("inputs"))
    with pytest.raises(RequestError, match=message):
        ask(engine, Request(prompt, **settings))


def test_other_work_is_done_between_two_tokens(served, endless, monkeypatch):
    """In the engine's thread, with a tokenizer of its own, one piece of work after another; the answer is what it would be without."""
    model, request = endless
    expected, done = alone(model, request), queue.Queue()
    slowed(model, monkeypatch)
    with Engine(model, served[1].tokenizer) as engine:
        answer = ask(engine, request)
        first = next(answer)
        for number in range(3):
            engine.submit_work(lambda given, tokenizer, number=number: (number, given, threading.current_thread().name), done.put)
        found = [done.get(timeout=20) for _ in range(3)]
        assert not engine.waiting
        assert engine.running == 1
        assert tokens([first, *answer]) == expected
    assert found == [(number, model, "engine") for number in range(3)]


def test_nothing_is_lost_that_comes_while_the_engine_looks(served):
    """Four submit at once, while the engine takes up what is there."""
    model, processor, _ = served
    done: queue.Queue[int] = queue.Queue()
    with Engine(model, processor.tokenizer, max_waiting=10_000) as engine, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: engine.submit_work(lambda *_: number, done.put), range(2000)))
        assert {done.get(timeout=20) for _ in range(2000)} == set(range(2000))
