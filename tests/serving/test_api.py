"""A real server on loopback, and the clients that people use."""

import base64
import json
import time
import urllib.request
from dataclasses import replace
from http.client import HTTPConnection
from io import BytesIO

import openai
import pytest
import torch
from PIL import Image

from moe_llava.serving.chat.conversation import Conversation, Settings
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prompt import PromptBuilder
from tests.conftest import refused
from tests.serving.conftest import LIMITS, server
from tests.serving.test_engine import slowed
from tests.training.conftest import tiny_base  # noqa: F401


def picture(path=None, **settings):
    """A data: URL, of a file or of a plain picture."""
    file = BytesIO()
    (Image.open(path) if path else Image.new("RGB", (20, 30), "red")).save(file, "PNG", **settings)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_part(url=None):
    return {"type": "image_url", "image_url": {"url": url or picture()}}


def text_part(text):
    return {"type": "text", "text": text}


def user(content="where is the red 7 ?"):
    return {"role": "user", "content": content}


def client_of(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def url(served):
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor) as url:
        yield url


@pytest.fixture
def client(url):
    with client_of(url) as client:
        yield client


@pytest.fixture
def endless(served, monkeypatch):
    """(model, processor): an answer goes on until it is as long as it may be, slowly."""
    monkeypatch.setattr(served[0].generation_config, "eos_token_id", None)
    slowed(served[0], monkeypatch)
    return served[:2]


def complete(client, messages, **settings):
    return client.chat.completions.create(model="tiny", messages=messages, **{"temperature": 0, "max_tokens": 8} | settings)


def metric(url, name):
    lines = urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(f"moe_llava_{name}")), 0))


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about within 10 seconds"
        time.sleep(0.02)


def test_it_tells_what_it_serves(url, client):
    assert json.load(urllib.request.urlopen(f"{url}/health")) == {"status": "ok"}
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_no_answer_waits_for_an_acknowledgement(url):
    """Which takes 40 ms, from the second or third on."""
    connection = HTTPConnection(url.removeprefix("http://"))
    times = []
    for _ in range(10):
        start = time.monotonic()
        connection.request("GET", "/health")
        connection.getresponse().read()
        times.append(time.monotonic() - start)
    connection.close()
    assert sorted(times)[5] < 0.03


def test_a_conversation_goes_as_it_does_in_chat(served, client):
    """Two turns about a picture; what came back is sent on as it came."""
    model, processor, about_one = served
    messages = [user([image_part(picture(about_one[0].images[0])), text_part("where is the red 7 ?")])]
    with Engine(model, processor.tokenizer, slots=1) as engine:
        conversation = Conversation(engine, processor, Settings(max_new_tokens=8))
        conversation.add_images(about_one[0].images)
        for question in ("where is the red 7 ?", "how many digits are there ?"):
            reply = complete(client, messages)
            assert reply.choices[0].message.content == "".join(conversation.ask(question))
            messages += [reply.choices[0].message.model_dump(exclude_none=True), user("how many digits are there ?")]


def test_histories_of_the_client_s_own_making(client):
    """What came back is sent on as the client's library keeps it, whole, parsed or streamed, with every field that says nothing."""
    asked = {"model": "tiny", "messages": [user()], "temperature": 0}
    asked["stop"] = complete(client, [user()]).choices[0].message.content.split(" ")[3]  # else the client calls it unfinished
    whole = client.chat.completions.create(**asked).choices[0].message
    parsed = client.chat.completions.parse(**asked).choices[0].message
    with client.chat.completions.stream(**asked) as events:
        list(events)
    streamed = events.get_final_completion().choices[0].message
    kept = [message.model_dump(exclude_none=brief) for message in (whole, parsed, streamed) for brief in (False, True)]
    assert len({message["content"] for message in kept}) == 1
    question = user("how many digits are there ?") | {"name": None}
    nothing = {"tools": [], "logit_bias": {}, "functions": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False}
    replies = {
        complete(client, [user(), message, question], **nothing, extra_body={"audio": None}).choices[0].message.content
        for message in [*kept, whole]
    }
    assert len(replies) == 1


def test_a_stream_is_the_whole_in_pieces(client):
    messages = [user([image_part(), text_part("what is on the left ?"), image_part()])]
    whole = complete(client, messages)
    chunks = list(complete(client, messages, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    usage = chunks[-1].usage
    assert (chunks[-1].choices, usage.total_tokens, usage.completion_tokens) == (
        [],
        whole.usage.total_tokens,
        whole.usage.completion_tokens,
    )
    assert 2 * 36 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert whole.usage.prompt_tokens > 2 * 36  # of the images
    assert whole.usage.completion_tokens <= 8


def test_events_of_one_moment_are_sent_together(url):
    """The role comes with the first token, the usage and the end with the last one: each sending costs the engine time."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
    asked = {"model": "tiny", "messages": [user()], "temperature": 0, "max_tokens": 1, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    chunks = list(iter(connection.getresponse().read1, b""))
    connection.close()
    assert len(chunks) == 1
    assert [line[:6] for line in chunks[0].split(b"\n\n")] == [b"data: "] * 4 + [b""]  # role, token, usage, [DONE]


def test_a_system_prompt_is_read(client):
    plain = complete(client, [user()])
    told = complete(client, [{"role": "system", "content": "red digits ."}, user()])
    assert told.usage.prompt_tokens == plain.usage.prompt_tokens + 3


def test_sampling_stops_and_lengths(client):
    settings = {"temperature": 1.5, "max_tokens": 20}
    drawn = [complete(client, [user()], seed=seed, **settings).choices[0].message.content for seed in (3, 3, 4, 5)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    words = drawn[0].split(" ")
    stopped = complete(client, [user()], seed=3, stop=[words[4]], **settings).choices[0]
    assert stopped.message.content == drawn[0].partition(words[4])[0]
    assert stopped.finish_reason == "stop"
    short = client.chat.completions.create(
        model="tiny", messages=[user()], max_completion_tokens=2, temperature=0, n=1, presence_penalty=0.0
    )
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (2, "length")
    client.chat.completions.create(model="tiny", messages=[user()], temperature=0)  # as long as there is room


def test_logprobs(client):
    reply = complete(client, [user()], logprobs=True, top_logprobs=2).choices[0]
    assert " ".join(token.token for token in reply.logprobs.content if token.token) == reply.message.content
    for token in reply.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
        assert bytes(token.bytes).decode() == token.token
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, [user()], logprobs=True, stream=True)]
    assert [token.logprob for told in streamed if told for token in told.content] == [token.logprob for token in reply.logprobs.content]


@pytest.mark.parametrize("text", ["<image>", "<IMAGE> <Image>", "<<image>>", "<image>" * 50])
def test_a_placeholder_that_a_client_writes_is_text(client, text):
    assert complete(client, [user(f"where is {text} ?")]).usage.prompt_tokens < 60
    with_image = complete(client, [user([text_part("where is"), image_part()])]).usage.prompt_tokens
    written = complete(client, [user([text_part("where is <ima"), text_part(f"ge> {text[:8]}"), image_part()])]).usage.prompt_tokens
    assert written < with_image + 36  # else it stood for an image


def post(url, body, headers=None, path="/v1/chat/completions", method="POST"):
    """(status, headers, body)"""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(url + path, data, {"Content-Type": "application/json"} | (headers or {}), method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def assert_told(status, expected, body):
    assert status == expected, body
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 5 < len(error["message"]) < 1000
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("path", ["/", "/health", "/page/chat.js", "/page/settings", "/metrics", "/v1/models"])
def test_without_keys_every_path_is_this_machine_s_alone(url, path):
    for name in ("elsewhere.example", "localhost.elsewhere.example", "192.0.2.7:8000"):  # that lead here
        status, _, told = post(url, b"", {"Host": name}, path=path, method="GET")
        assert_told(status, 403, told)
    for name in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:9"):
        assert post(url, b"", {"Host": name}, path=path, method="GET")[0] == 200


def test_keys(served):
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor, api_keys=["first", "second"]) as url:
        assert complete(client_of(url, "second"), [user()], max_tokens=1).usage.completion_tokens == 1
        for key in ("firs", "first second", "third"):
            with pytest.raises(openai.AuthenticationError, match="send an API key"):
                complete(client_of(url, key), [user()])
        for path in ("/v1/models", "/metrics"):
            assert post(url, b"", path=path, method="GET")[0] == 401
        for path in ("/health", "/", "/page/chat.js"):  # whatever name leads here
            assert post(url, b"", {"Host": "models.example.org"}, path=path, method="GET")[0] == 200


def test_who_comes_when_the_queue_is_full_is_told_to_try_again(endless):
    model, processor = endless
    with server(Engine(model, processor.tokenizer, slots=1, max_waiting=1), processor) as url, client_of(url) as client:
        streams = [complete(client, [user()], stream=True, max_tokens=40) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client, [user()])
        assert int(caught.value.response.headers["Retry-After"]) > 0
        assert caught.value.body["code"] == "queue_full"
        for stream in streams:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert metric(url, 'requests_total{outcome="429"}') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(endless, stream):
    model, processor = endless
    with server(Engine(model, processor.tokenizer, slots=1), processor) as url, client_of(url) as client:
        if stream:
            leaving = complete(client, [user()], stream=True, max_tokens=90)
            next(iter(leaving))
            leaving.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                complete(client.with_options(timeout=0.3), [user()], max_tokens=90)
        eventually(lambda: metric(url, "requests_running") == 0)
        assert metric(url, 'requests_total{outcome="cancelled"}') == 1
        assert metric(url, "completion_tokens_total") < 80


def test_an_answer_that_takes_too_long(endless):
    model, processor = endless
    with server(Engine(model, processor.tokenizer, time_limit=0.4), processor) as url, client_of(url) as client:
        with pytest.raises(openai.InternalServerError, match=r"not complete within 0\.4 seconds") as caught:
            complete(client, [user()], max_tokens=90)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="not complete"):
            list(complete(client, [user()], max_tokens=90, stream=True))
        assert metric(url, 'requests_total{outcome="504"}') == metric(url, 'requests_total{outcome="failed"}') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_no_json_fails_and_frees_its_memory(served, monkeypatch, stream):
    """A log probability that is not a number, as overflowing weights make it: twice, with room for one image."""
    model, processor, _ = served
    weights = torch.nn.Parameter(torch.full_like(model.lm_head.weight, torch.nan))
    monkeypatch.setitem(model.lm_head._parameters, "weight", weights)
    limits = replace(LIMITS, all_bytes=PromptBuilder(processor).image_bytes()((20, 30)) + 5000)
    with server(Engine(model, processor.tokenizer), processor, limits) as url:
        for _ in range(2):
            with client_of(url) as client, pytest.raises(openai.APIError, match="the server failed to answer"):
                list(complete(client, [user([image_part(), text_part("is this a 7 ?")])], logprobs=True, stream=stream))
        eventually(lambda: metric(url, "requests_running") == 0)


def test_metrics_count_what_was_done(served):
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor) as url, client_of(url) as client:
        usages = [complete(client, [user()], max_tokens=3).usage for _ in range(2)]
        list(complete(client, [user()], max_tokens=3, stream=True))
        eventually(lambda: metric(url, 'requests_total{outcome="200"}') == 3)
        assert metric(url, "prompt_tokens_total") == 3 * usages[0].prompt_tokens
        assert metric(url, "completion_tokens_total") == 3 * usages[0].completion_tokens
        assert metric(url, "time_to_first_token_seconds_count") == 3
        assert metric(url, 'time_to_first_token_seconds_bucket{le="+Inf"}') == 3
        assert metric(url, "requests_waiting") == 0


def test_metrics_count_what_was_refused_and_what_failed(served, monkeypatch):
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor) as url:
        for path, method in (("/gone", "GET"), ("/v1/chat/completions", "GET"), ("/v1/chat/completions", "POST")):
            post(url, b"{", path=path, method=method)
        post(url, {}, {"Host": "elsewhere.example"})
        body = {"model": "tiny", "messages": [user()]}
        monkeypatch.setattr(model, "forward", failing)
        for asked in (body, body | {"stream": True}):
            status, _, told = post(url, asked)
            assert "RuntimeError" not in told.decode()
            assert "its log has the details" in told.decode()
        monkeypatch.setattr(type(processor), "apply_chat_template", failing)  # outside of the engine
        status, _, told = post(url, body)
        assert_told(status, 500, told)
        counts = {
            outcome: metric(url, f'requests_total{{outcome="{outcome}"}}') for outcome in ("400", "403", "404", "405", "500", "failed")
        }
    assert counts == {"400": 1, "403": 1, "404": 1, "405": 1, "500": 2, "failed": 1}


def failing(*_, **__):
    raise RuntimeError("a mistake")


def test_a_server_that_cannot_start_says_why(url, tiny_base, tmp_path):  # noqa: F811
    checkpoint = tiny_base / "base"
    (tmp_path / "none").write_text("\n \n")
    assert "give --api-keys FILE, or listen on 127.0.0.1" in refused("serve", checkpoint, "--host", "0.0.0.0")
    assert "must hold API keys, one per line, but has none" in refused("serve", checkpoint, "--api-keys", tmp_path / "none")
    assert "cannot listen on 127.0.0.1 port" in refused("serve", checkpoint, "--port", url.rsplit(":", 1)[1])
    assert "is not a folder" in refused("serve", tmp_path / "gone")
