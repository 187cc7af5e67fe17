"""Requests that are refused in OpenAI's form."""

import base64
import json

import pytest

from tests.serving.test_api import assert_told, image_part, picture, post, text_part, url, user  # noqa: F401

BOMB = picture()  # a small file that claims to be a very large picture


BOMB = (
    "data:image/png;base64,"
    + base64.b64encode(
        (lambda png: png[:16] + (20_000).to_bytes(4, "big") * 2 + png[24:29] + b"\0\0\0\0" + png[33:])(base64.b64decode(BOMB.split(",")[1]))
    ).decode()
)


MALFORMED = {
    "no JSON": (b"{", 400),
    "empty": (b"", 400),
    "a list": (b"[]", 400),
    "no UTF-8": (b'{"model": "\xff"}', 400),
    "half a character": (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "nested": (b"[" * 100_000, 400),
    "a long number": (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 10_000 + b"}", 400),
    "NaN": (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
    "no messages": ({"messages": []}, 400),
    "messages of text": ({"messages": "hello"}, 400),
    "a message that is none": ({"messages": [None]}, 400),
    "no role": ({"messages": [{"content": "a"}]}, 400),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, 400),
    "no content": ({"messages": [{"role": "user"}]}, 400),
    "null": ({"messages": [user(None)]}, 400),
    "a number": ({"messages": [user(7)]}, 400),
    "empty text": ({"messages": [user(" ")]}, 400),
    "no parts": ({"messages": [user([])]}, 400),
    "unknown part": ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, 400),
    "system last": ({"messages": [user(), {"role": "system", "content": "a"}]}, 400),
    "system alone": ({"messages": [{"role": "system", "content": "a"}]}, 400),
    "user twice": ({"messages": [user(), user()]}, 400),
    "answer last": ({"messages": [user(), {"role": "assistant", "content": "a"}]}, 400),
    "system image": ({"messages": [{"role": "system", "content": [image_part()]}, user()]}, 400),
    "another model": ({"model": "gpt"}, 404),
    "a path as model": ({"model": "../../etc/passwd"}, 404),
    "n": ({"n": 2}, 400),
    "negative temperature": ({"temperature": -1}, 400),
    "tiny temperature": ({"temperature": 1e-300}, 400),
    "temperature in words": ({"temperature": "hot"}, 400),
    "top_p": ({"top_p": 0}, 400),
    "no tokens": ({"max_tokens": 0}, 400),
    "tokens as text": ({"max_tokens": "5"}, 400),
    "true tokens": ({"max_tokens": True}, 400),
    "too many tokens": ({"max_tokens": 10**6}, 400),
    "two limits": ({"max_tokens": 2, "max_completion_tokens": 2}, 400),
    "seed": ({"seed": 2**70}, 400),
    "empty stop": ({"stop": ""}, 400),
    "many stops": ({"stop": ["a", "b", "c", "d", "e"]}, 400),
    "top_logprobs alone": ({"top_logprobs": 2}, 400),
    "many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400),
    "stream options alone": ({"stream_options": {"include_usage": True}}, 400),
    "tools": ({"tools": [{"type": "function"}]}, 400),
    "a template": ({"chat_template": "{{ 7 * 7 }}"}, 400),
    "JSON mode": ({"response_format": {"type": "json_object"}}, 400),
    "penalty": ({"frequency_penalty": 1}, 400),
    "a long prompt": ({"messages": [user("red " * 500)]}, 400),
    "a very long prompt": ({"messages": [user("red " * 100_000)]}, 400),
    "many messages": ({"messages": [user()] * 1001}, 400),
    "many images": ({"messages": [user([image_part()] * 9)]}, 400),
    "a URL": ({"messages": [user([image_part("http://127.0.0.1:9/a.png")])]}, 400),
    "a file": ({"messages": [user([image_part("file:///etc/passwd")])]}, 400),
    "a path": ({"messages": [user([image_part("/etc/passwd")])]}, 400),
    "no base64": ({"messages": [user([image_part("data:image/png;base64,???")])]}, 400),
    "no image": ({"messages": [user([image_part("data:image/png;base64,aGVsbG8=")])]}, 400),
    "an empty image": ({"messages": [user([image_part("data:image/png;base64,")])]}, 400),
    "half an image": ({"messages": [user([image_part(picture()[:80])])]}, 400),
    "a page": ({"messages": [user([image_part("data:text/html;base64,aGVsbG8=")])]}, 400),
    "a vector image": ({"messages": [user([image_part("data:image/svg+xml;base64,PHN2Zy8+")])]}, 400),
    "a bomb": ({"messages": [user([image_part(BOMB)])]}, 400),
    "a large image": ({"messages": [user([image_part("data:image/png;base64," + "A" * 12 * 2**20)])]}, 400),
    "a large body": (b" " * (33 * 2**20), 413),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_in_openai_s_form(url, name):  # noqa: F811
    body, expected = MALFORMED[name]
    if isinstance(body, dict):
        body = {"model": "tiny", "messages": [user()], "max_tokens": 4} | body
    status, _, told = post(url, body)
    assert_told(status, expected, told)
    assert post(url, {"model": "tiny", "messages": [user()], "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("name", ["a URL", "a file", "no base64", "no image", "half an image", "a bomb", "a large image"])
def test_an_image_that_is_not_taken_is_named_by_its_place(url, name):  # noqa: F811
    (message,) = MALFORMED[name][0]["messages"]
    messages = [
        user([text_part("here"), image_part()]),
        {"role": "assistant", "content": "left"},
        user([image_part(), *message["content"]]),
    ]
    status, _, told = post(url, {"model": "tiny", "messages": messages})
    assert_told(status, 400, told)
    error = json.loads(told)["error"]
    assert error["param"] == "messages.2.content.1.image_url"
    assert error["param"] in error["message"]


def test_a_prompt_beyond_the_context_has_openai_s_code(url):  # noqa: F811
    for settings, message in (({}, "leaves no room for an answer in the model's context"), ({"max_tokens": 4}, "leaves no room")):
        status, _, told = post(url, {"model": "tiny", "messages": [user([text_part("red " * 600)])], **settings})
        assert_told(status, 400, told)
        error = json.loads(told)["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert message in error["message"]
    status, _, told = post(url, {"model": "tiny", "messages": [user()], "max_tokens": 100_000})
    assert "and the answer up to 100000, more than the model's context" in json.loads(told)["error"]["message"]


def test_other_ways_in_are_closed(url):  # noqa: F811
    body = {"model": "tiny", "messages": [user()]}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert_told(*(lambda told: (told[0], 415, told[2]))(post(url, body, {"Content-Type": kind})))
    for path, method, expected in (("/v1/nothing", "POST", 404), ("/docs", "GET", 404), ("/v1/chat/completions", "PUT", 405)):
        status, _, told = post(url, body, path=path, method=method)
        assert_told(status, expected, told)
    status, headers, _ = post(url, body, {"Origin": "http://elsewhere.example"})
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("access-control")]
