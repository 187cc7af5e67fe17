"""POST /routes tells what trace_routing tells; the page's files are held to themselves."""

import base64
import copy
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from io import BytesIO
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from moe_llava.data.encode import IGNORE_INDEX
from moe_llava.evaluation.ask.generate import prompt_inputs
from moe_llava.evaluation.score.benchmark import Question
from moe_llava.model.greedy import end_tokens
from moe_llava.routing.page import as_seen
from moe_llava.routing.trace import trace_answer, trace_routing
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.http import web
from tests.serving.conftest import server
from tests.serving.test_api import assert_told, client_of, complete, eventually, image_part, metric, picture, post, text_part, user
from tests.serving.test_engine import slowed
from tests.training.conftest import tiny_base  # noqa: F401

JSON = {"Content-Type": "application/json"}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def url(sparse):
    model, processor = sparse
    with server(Engine(model, processor.tokenizer), processor) as url:
        yield url


def routes(url, messages, **settings):
    status, _, told = post(url, {"model": "tiny", "messages": messages, **settings}, path="/routes")
    assert status == 200, told
    return json.loads(told)


def test_an_answer_s_routes_are_those_it_took_while_it_was_written(served, sparse, url):
    model, processor = sparse
    path = served[2][0].images[0]
    question = [image_part(picture(path)), text_part("where is the red 7 ?")]
    with client_of(url) as client:
        text = complete(client, [user(question)], max_tokens=9).choices[0].message.content
    trace = trace_routing(model, prompt_inputs(processor, [Question("", "where is the red 7 ?", (path,))]), processor.tokenizer, 10)
    kept = [token not in end_tokens(model) for token in trace.token_ids_T[trace.answer_T].tolist()]

    before = metric(url, 'requests_total{outcome="routes"}')
    found = routes(url, [user(question), answer(text)])
    assert metric(url, 'requests_total{outcome="routes"}') == before + 1
    assert found["layers"] == list(trace.layers)
    assert found["experts"] == len(found["colours"]) == len(found["inks"]) == 3
    assert len(found["answer"]["tokens"]) == sum(kept) > 4
    assert found["answer"]["experts"] == trace.ids_LTK[:, trace.answer_T][:, torch.tensor(kept)].tolist()
    (image,) = found["images"]
    patches_T = trace.places_T3[:, 0] == 0
    assert (image["rows"], image["columns"]) == (6, 6)
    assert image["experts"] == trace.ids_LTK[:, patches_T].tolist()
    assert np.allclose(image["weights"], trace.weights_LTK[:, patches_T], atol=1e-4)
    assert np.allclose(np.sum(image["weights"], axis=-1), 1, atol=2e-4)


def test_a_longer_conversation(served, sparse, url):
    """A system prompt, two turns, two images; of the answers the last is told."""
    model, processor = sparse
    paths = [question.images[0] for question in served[2][:5:4]]
    one, two = (image_part(picture(path)) for path in paths)
    messages = [
        {"role": "system", "content": "red digits ."},
        user([one, text_part("where is the red 7 ?")]),
        answer("at the top"),
        user([text_part("is there a red 7 ?"), two]),
        answer("a blue 3 at the left"),
    ]
    found = routes(url, messages)
    parts = [{**message, "content": _as_parts(message["content"])} for message in messages]
    text = processor.apply_chat_template(parts)
    inputs = processor(text=text, images=[Image.open(path) for path in paths], add_special_tokens=False, return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    labels[0, -7:-1] = 1  # six words, and the end
    trace = trace_routing(model, {**inputs, "labels": labels}, processor.tokenizer)
    assert found["answer"]["tokens"] == ["a", "blue", "3", "at", "the", "left"]
    assert found["answer"]["experts"] == trace.ids_LTK[:, trace.answer_T].tolist()
    assert [image["experts"] for image in found["images"]] == [
        trace.ids_LTK[:, trace.places_T3[:, 0] == image].tolist() for image in range(2)
    ]
    for image, path, seen in zip(found["images"], paths, as_seen(inputs, processor, model.config), strict=True):
        shown = np.asarray(Image.open(BytesIO(base64.b64decode(image["picture"].partition(",")[2]))))
        assert np.abs(shown / 255 - seen).max() < 0.003
        assert np.abs(shown.astype(int) - np.asarray(Image.open(path).convert("RGB").resize((48, 48), 3))).mean() < 2


def _as_parts(content):
    if isinstance(content, str):
        return [text_part(content)]
    return [{"type": "image"} if part["type"] == "image_url" else part for part in content]


def test_a_picture_ends_with_its_last_patch(sparse):
    _, processor = sparse
    assert as_seen({"pixel_values": torch.zeros(1, 3, 51, 50)}, processor, None)[0].shape == (48, 48, 3)  # patches of 8


def test_an_answer_is_found_where_a_prompt_ends_otherwise(sparse):
    """As with forms that begin an answer with an empty thought, which they leave out of answers that are given."""
    model, processor = copy.deepcopy(sparse[0]), copy.deepcopy(sparse[1])
    processor.chat_template += "{% if add_generation_prompt %} white white{% endif %}"
    with server(Engine(model, processor.tokenizer), processor) as url:
        assert routes(url, [user(), answer("at the left")])["answer"]["tokens"] == ["at", "the", "left"]


def test_half_precision(sparse, url):
    """The same but for rounding, which can decide between experts that are nearly as likely."""
    model, processor = copy.deepcopy(sparse[0]).to(torch.bfloat16), sparse[1]
    messages = [user([image_part(), text_part("where is the red 7 ?")]), answer("at the left")]
    with server(Engine(model, processor.tokenizer), processor) as half:
        found, expected = routes(half, messages), routes(url, messages)
    assert found["answer"]["tokens"] == expected["answer"]["tokens"]
    same = np.array(found["images"][0]["experts"]) == np.array(expected["images"][0]["experts"])
    assert same.mean() > 0.8


def test_text_alone(url):
    found = routes(url, [user(), answer("at the left")])
    assert found["images"] == []
    assert found["answer"]["tokens"] == ["at", "the", "left"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"messages": [user()]}, "from user to assistant"),
        ({"messages": [answer("red")]}, "from user to assistant"),
        ({"messages": [{"role": "system", "content": "a"}]}, "from user to assistant"),
        ({"messages": [user(), answer(" ")]}, "the last message is empty"),
        ({"messages": [user(), answer([image_part()])]}, "messages.1.content.0.type: must be text, but"),
        ({"messages": [user([image_part()] * 9), answer("red")]}, "9 images, but at most 8"),
        ({"messages": [user([image_part("http://127.0.0.1:9/a.png")]), answer("red")]}, "data: URL"),
        ({"messages": [user(), answer("red " * 600)]}, "more than the model's context of"),
        ({"messages": [user(), answer("red")], "tools": [{}]}, "tools"),
        ({"messages": [user(), answer("red")], "model": "gpt"}, "the model is 'tiny'"),
    ],
)
def test_what_is_refused(url, change, rule):
    status, _, told = post(url, {"model": "tiny"} | change, path="/routes")
    assert_told(status, 404 if change.get("model") else 400, told)
    assert rule in json.loads(told)["error"]["message"]


def test_a_dense_model_has_no_routes(served):
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor) as url:
        status, _, told = post(url, {"model": "tiny", "messages": [user(), answer("red")]}, path="/routes")
        assert_told(status, 400, told)
        assert json.loads(told)["error"]["code"] == "no_experts"
        assert json.load(urllib.request.urlopen(f"{url}/page/settings"))["sparse"] is False


def test_keys(sparse):
    """Are asked for by what tells something, and not by the page."""
    model, processor = sparse
    asked = {"model": "tiny", "messages": [user(), answer("red")]}
    with server(Engine(model, processor.tokenizer), processor, api_keys=["first"]) as url:
        assert post(url, asked, path="/routes")[0] == post(url, b"", path="/page/settings", method="GET")[0] == 401
        assert post(url, asked, {"Authorization": "Bearer first"}, "/routes")[0] == 200
        assert b"tiny" not in urllib.request.urlopen(url).read()


def test_the_page_is_held_to_its_own_files(url):
    page = urllib.request.urlopen(url)
    text = page.read().decode()
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "style=" not in text
    for name, kind in (("chat.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        file = urllib.request.urlopen(f"{url}/page/{name}")
        assert file.headers["Content-Type"].startswith(kind)
        assert file.headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/page/", "/page/..%2fapi.py", "/page/../api.py", "/page/index.html"):
        assert post(url, b"", path=path, method="GET")[0] == 404


@pytest.fixture
def slow(sparse, monkeypatch):
    """(model, processor, body of a request that is being answered for seconds, body of one for routes)"""
    model, processor = sparse
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    slowed(model, monkeypatch, 0.6)
    asked = {"model": "tiny", "messages": [user()], "max_tokens": 4}
    return model, processor, asked, {"model": "tiny", "messages": [user(), answer("red")]}


def test_a_full_queue_and_too_long_a_wait(slow):
    model, processor, asked, traced = slow
    with (
        server(Engine(model, processor.tokenizer, slots=1, max_waiting=1, time_limit=0.3), processor) as url,
        ThreadPoolExecutor() as pool,
    ):
        answered = pool.submit(post, url, asked)
        eventually(lambda: metric(url, "requests_running") == 1)
        waiting = pool.submit(post, url, traced, path="/routes")
        eventually(lambda: metric(url, "requests_waiting") == 1)
        status, headers, told = post(url, traced, path="/routes")
        assert_told(status, 429, told)
        assert int(headers["Retry-After"]) > 0
        assert_told(waiting.result()[0], 504, waiting.result()[2])
        assert answered.result()[0] == 504


def test_what_fails_for_a_client_that_has_left_is_logged(sparse, monkeypatch, caplog):
    """Nobody is told of it otherwise."""
    model, processor = sparse
    begun, left = Event(), Event()

    def trace(*_):
        begun.set()
        assert left.wait(20)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(web, "trace_answer", trace)
    with server(Engine(model, processor.tokenizer), processor) as url:
        leaving = HTTPConnection(url.removeprefix("http://"))
        leaving.request("POST", "/routes", json.dumps({"model": "tiny", "messages": [user(), answer("red")]}), JSON)
        assert begun.wait(20)
        leaving.close()
        eventually(lambda: metric(url, 'requests_total{outcome="499"}') == 1)
        left.set()
        eventually(lambda: "tracing failed after its client had disconnected" in caplog.messages)
    assert "out of memory" in caplog.text


def test_who_leaves_is_not_traced_for(slow, monkeypatch):
    model, processor, asked, traced = slow
    calls = []
    monkeypatch.setattr(web, "trace_answer", lambda *arguments: calls.append(1) or trace_answer(*arguments))
    with server(Engine(model, processor.tokenizer), processor) as url, ThreadPoolExecutor() as pool:
        answered = pool.submit(post, url, asked | {"max_tokens": 2})
        eventually(lambda: metric(url, "requests_running") == 1)
        leaving = HTTPConnection(url.removeprefix("http://"))
        leaving.request("POST", "/routes", json.dumps(traced), JSON)
        eventually(lambda: metric(url, "requests_waiting") == 1)
        leaving.close()
        assert answered.result()[0] == 200
        eventually(lambda: metric(url, "requests_waiting") == 0)
        assert calls == []
        assert post(url, traced, path="/routes")[0] == 200
        assert calls == [1]
