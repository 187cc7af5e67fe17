"""What a body may say, what it may say without effect, and how a mistake in it is named."""

import itertools
import json
import typing

import pytest
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming

from moe_llava.serving.http.protocol import (
    SUPPORTED,
    WITHOUT_EFFECT,
    ApiError,
    ImagePart,
    Limits,
    Message,
    TextPart,
    VideoPart,
    media_of,
    parse,
)
from tests.conftest import REPOSITORY

USER = {"role": "user", "content": "which ?"}
URL = "data:image/png;base64,AAAA"
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
CLIP = "data:video/mp4;base64,AAAA"
VIDEO = {"type": "video_url", "video_url": {"url": CLIP}}
PLAIN = {"model": "tiny", "messages": [USER]}

# Each field that has no effect: values that ask for nothing, and values that ask for what cannot be done.
ASKS = {
    "audio": ([], [{"voice": "alloy", "format": "wav"}, {}]),
    "frequency_penalty": ([0, 0.0], [0.5, -2, "0", False]),
    "function_call": (["none", "auto"], [{"name": "a"}]),
    "functions": ([[]], [[{"name": "a"}], {}]),
    "logit_bias": ([{}], [{"50256": -100}, []]),
    "metadata": ([{}, {"run": "7"}], ["run"]),
    "modalities": ([["text"], []], [["text", "audio"], "text"]),
    "moderation": ([], [{"model": "a"}]),
    "n": ([1], [2, 0, True, "1"]),
    "parallel_tool_calls": ([False, True], ["no"]),
    "prediction": ([], [{"type": "content", "content": "a"}]),
    "presence_penalty": ([0, 0.0], [1, "a"]),
    "prompt_cache_key": (["a"], [3]),
    "prompt_cache_options": ([{}, {"mode": "implicit"}], [{"mode": "explicit"}]),
    "prompt_cache_retention": (["in_memory"], ["24h"]),
    "reasoning_effort": (["none"], ["high"]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a"}}, "text"]),
    "safety_identifier": (["a"], [3]),
    "service_tier": (["auto", "default"], ["priority"]),
    "store": ([False], [True, {}, 0]),
    "tool_choice": (["none", "auto"], ["required", {"type": "function", "function": {"name": "a"}}]),
    "tools": ([[]], [[{"type": "function", "function": {"name": "a"}}], {}]),
    "user": (["a"], [7]),
    "verbosity": (["medium"], ["low"]),
    "web_search_options": ([], [{}]),
}


def read(**change):
    return parse(json.dumps(PLAIN | change).encode(), Limits())


def refused(**change):
    """What is told of a body: (message, field)."""
    with pytest.raises(ApiError) as caught:
        read(**change)
    assert caught.value.status == 400
    return str(caught.value), caught.value.param


def wrong_part(content, role="user"):
    return refused(messages=[{"role": role, "content": content}, USER][: 1 if role == "user" else 2])


def test_every_field_of_the_client_is_known():
    """A field that a later client has more is decided here, and not by accident."""
    fields = {**typing.get_type_hints(CompletionCreateParamsNonStreaming), **typing.get_type_hints(CompletionCreateParamsStreaming)}
    assert set(fields) == set(ASKS) | set(SUPPORTED)


def test_the_documents_name_every_field():
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    assert [name for name in [*SUPPORTED, *WITHOUT_EFFECT] if f"`{name}`" not in text] == ["model", "messages", "stream", "stream_options"]


@pytest.mark.parametrize("name", [*ASKS, *SUPPORTED, "chat_template", "best_of"])
def test_null_is_as_no_field(name):
    if name in PLAIN:
        assert refused(**{name: None}) == (f"{name}: is missing", name)
    else:
        assert read(**{name: None}) == read()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (values, _) in ASKS.items() for value in values])
def test_a_field_that_asks_for_nothing_has_no_effect(name, value):
    assert read(**{name: value}) == read()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, values) in ASKS.items() for value in values])
def test_a_field_that_asks_for_what_cannot_be_done_is_refused_by_name(name, value):
    message, param = refused(**{name: value})
    assert param == name
    assert message.startswith(f"{name}: ")
    assert "leave it out" in message or "must be" in message


@pytest.mark.parametrize(
    "change",
    [
        {"stop": []},
        {"stream": False, "stream_options": {}},
        {"stream_options": {"include_usage": False, "include_obfuscation": False}},
        {"stream_options": {"include_usage": None}},
        {"logprobs": False, "top_logprobs": 0},
        {"logprobs": False, "top_logprobs": None},
        {"temperature": 1, "top_p": 1.0},
        {"messages": [USER | {"name": None}]},
        {"messages": [{"role": "user", "content": "which ?", "tool_call_id": None}]},
    ],
)
def test_honoured_fields_may_ask_for_nothing_too(change):
    assert read(**change) == read()


def histories():
    """An assistant's messages as the client's library keeps them, whole, parsed and streamed."""
    kinds = {"whole": ChatCompletionMessage, "parsed": ParsedChatCompletionMessage, "streamed": ChoiceDelta}
    for (kind, made), exclude_none in itertools.product(kinds.items(), (False, True)):
        yield pytest.param(made(role="assistant", content="left").model_dump(exclude_none=exclude_none), id=f"{kind} {exclude_none}")
    yield {"role": "assistant", "content": "left", "annotations": [], "tool_calls": []}
    yield {"role": "assistant", "content": [{"type": "text", "text": "left"}], "reasoning_content": None}


@pytest.mark.parametrize("answer", list(histories()))
def test_an_answer_is_sent_on_as_it_came(answer):
    asked = read(messages=[USER | {"name": None}, answer, USER])
    assert [message.role for message in asked.messages] == ["user", "assistant", "user"]
    assert asked.messages[1].content == [TextPart("left")]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"refusal": "no"}, "refusal"),
        ({"annotations": [{"type": "url_citation"}]}, "annotations"),
        ({"audio": {"id": "a"}}, "audio"),
        ({"function_call": {"name": "a", "arguments": ""}}, "function_call"),
        ({"tool_calls": [{"id": "a"}]}, "tool_calls"),
        ({"name": "bob"}, "name"),
        ({"content": None}, "content"),
    ],
)
def test_an_answer_of_another_kind_is_refused_by_name(change, field):
    message, param = refused(messages=[USER, {"role": "assistant", "content": "left"} | change, USER])
    assert param == f"messages.1.{field}"
    assert message.startswith(f"{param}: ")


def test_parts_are_read():
    detailed = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
    empty = {"type": "image_url", "image_url": {"url": URL, "detail": None}, "prompt_cache_breakpoint": None}
    asked = read(messages=[{"role": "user", "content": [detailed, {"type": "text", "text": "which ?"}, IMAGE, empty, VIDEO]}])
    assert asked.messages == [Message("user", [ImagePart(URL), TextPart("which ?"), ImagePart(URL), ImagePart(URL), VideoPart(CLIP)])]
    assert [(part.url, path) for part, path in media_of(asked.messages)][2:] == [
        (URL, "messages.0.content.3.image_url"),
        (CLIP, "messages.0.content.4.video_url"),
    ]


def test_a_video_is_a_question_of_its_own():
    assert read(messages=[{"role": "user", "content": [VIDEO]}]).messages[0].content == [VideoPart(CLIP)]
    message, _ = refused(messages=[{"role": "user", "content": [VIDEO, VIDEO]}])
    assert message == "2 videos, but at most 1 are allowed"


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "image_url", "image_url": URL}, f'image_url: must be an object with url, but is the string "{URL}"'),
        ({"type": "image_url", "image_url": [URL]}, "image_url: must be an object with url, but is a list"),
        ({"type": "image_url", "image_url": None}, "image_url: is missing"),
        ({"type": "image_url"}, "image_url: is missing"),
        ({"type": "image_url", "url": URL}, "url: not supported: leave it out"),
        ({"type": "image_url", "image_url": {}}, "image_url.url: is missing"),
        ({"type": "image_url", "image_url": {"url": None}}, "image_url.url: is missing"),
        ({"type": "image_url", "image_url": {"url": 7}}, "image_url.url: must be a string, but is 7"),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "original"}},
            'image_url.detail: must be auto, low or high, but is the string "original"',
        ),
        ({"type": "image_url", "image_url": {"url": URL, "detail": True}}, "image_url.detail: must be auto, low or high, but is true"),
        ({"type": "image_url", "image_url": {"urls": URL}}, "image_url.urls: not supported: did you mean url?"),
        ({"type": "video_url", "video_url": CLIP}, f'video_url: must be an object with url, but is the string "{CLIP}"'),
        ({"type": "video_url", "video_url": {"url": CLIP, "fps": 2}}, "video_url.fps: not supported: leave it out"),
        ({"type": "input_image", "image_url": URL}, 'type: must be text, image_url or video_url, but is the string "input_image"'),
        ({"type": "input_text", "text": "a"}, 'type: must be text, image_url or video_url, but is the string "input_text"'),
        ({"type": "file", "file": {}}, 'type: must be text, image_url or video_url, but is the string "file"'),
        ({"type": ["text"], "text": "a"}, "type: must be text, image_url or video_url, but is a list"),
        ({"type": None, "text": "a"}, "type: is missing: must be text, image_url or video_url"),
        ({"text": "a"}, "type: is missing: must be text, image_url or video_url"),
        ({"type": "text"}, "text: is missing"),
        ({"type": "text", "text": None}, "text: is missing"),
        ({"type": "text", "text": 7}, "text: must be a string, but is 7"),
        ({"type": "text", "text": ["a"]}, "text: must be a string, but is a list"),
        ({"type": "text", "text": "a", "image_url": {"url": URL}}, "image_url: not supported: leave it out"),
        ({"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}, "prompt_cache_breakpoint: not supported"),
    ],
)
def test_what_is_wrong_within_a_part_is_named(part, told):
    for content, place in (([part], 0), ([{"type": "text", "text": "which ?"}, IMAGE, part, IMAGE], 2)):
        message, param = wrong_part(content)
        assert message.startswith(f"messages.0.content.{place}.{told}")
        assert param == f"messages.0.content.{place}.{told.partition(':')[0]}"


@pytest.mark.parametrize("part", ["which ?", 7, None, True, [IMAGE]])
def test_a_part_that_is_none_is_named(part):
    message, param = wrong_part([IMAGE, part])
    assert message.startswith("messages.0.content.1: must be an object, but is ")
    assert param == "messages.0.content.1"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"type": "text", "text": "a"}, "must be a string or a list of parts, but is an object"),
        (7, "must be a string or a list of parts, but is 7"),
        ([], "must be a string or a list of parts, but is empty"),
        (None, "is missing"),
    ],
)
def test_content_of_another_kind_is_named(content, told):
    for role in ("user", "system"):
        assert wrong_part(content, role) == (f"messages.0.content: {told}", "messages.0.content")


def test_pictures_are_the_user_s():
    message, _ = wrong_part([IMAGE], "system")
    assert message == 'messages.0.content.0.type: must be text, but is the string "image_url"'


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"messages": None}, "messages: is missing"),
        ({"messages": []}, "messages: must be a list of messages, but is empty"),
        ({"messages": "hello"}, 'messages: must be a list of messages, but is the string "hello"'),
        ({"messages": [None]}, "messages.0: must be an object, but is null"),
        ({"messages": [{"content": "a"}]}, "messages.0.role: is missing: must be system, user or assistant"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            'messages.0.role: must be system, user or assistant, but is the string "tool"',
        ),
        ({"messages": [USER, {"role": {}, "content": "a"}]}, "messages.1.role: must be system, user or assistant, but is an object"),
        ({"messages": [USER, {"role": "assistant"}, USER]}, "messages.1.content: is missing"),
        ({"messages": [USER | {"contents": "a"}]}, "messages.0.contents: not supported: did you mean content?"),
        ({"messages": [USER | {"content": " "}]}, "messages.0.content: the last message is empty"),
        ({"model": 7}, "model: must be a string, but is 7"),
        ({"max_tokens": "5"}, 'max_tokens: must be an integer from 1 to 2147483647, but is the string "5"'),
        ({"max_tokens": 1.5}, "max_tokens: must be an integer from 1 to 2147483647, but is 1.5"),
        ({"max_tokens": 0}, "max_tokens: must be an integer from 1 to 2147483647, but is 0"),
        ({"max_tokens": True}, "max_tokens: must be an integer from 1 to 2147483647, but is true"),
        ({"max_token": 5}, "max_token: not supported: did you mean max_tokens?"),
        ({"temperature": "hot"}, 'temperature: must be a number from 0 to 2, but is the string "hot"'),
        ({"temperature": float("nan")}, "temperature: must be a number from 0 to 2, but is NaN"),
        ({"temperature": float("inf")}, "temperature: must be a number from 0 to 2, but is Infinity"),
        ({"temperature": False}, "temperature: must be a number from 0 to 2, but is false"),
        ({"temperature": 2.1}, "temperature: must be a number from 0 to 2, but is 2.1"),
        ({"top_p": 0}, "top_p: must be a number above 0 and at most 1, but is 0"),
        ({"seed": 2**63}, "seed: must be an integer from -9223372036854775808 to 9223372036854775807, but is 9223372036854775808"),
        ({"stop": 7}, "stop: must be up to 4 strings of 1 to 200 characters"),
        ({"stop": ["a", None]}, "stop: must be up to 4 strings of 1 to 200 characters"),
        ({"stream": "yes"}, 'stream: must be true or false, but is the string "yes"'),
        ({"stream_options": []}, "stream_options: must be an object, but is a list"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage: must be true or false, but is 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage: needs stream to be true"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation: not supported"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: must be an integer from 0 to 20, but is 21"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template: not supported: leave it out"),
        ({"n": 2}, "n: not supported: leave it out (only 1 is accepted, without effect)"),
        ({"x" * 5000: 1}, f"{'x' * 40}...: not supported: leave it out"),
        ({"user": ["a" * 5000]}, "user: must be a string, but is a list"),
        ({"model": "a" * 5000, "seed": "b" * 5000}, f'seed: must be an integer from {-(2**63)} to {2**63 - 1}, but is the string "bbb'),
    ],
)
def test_what_is_wrong_is_named(change, told):
    message, param = refused(**change)
    assert message.startswith(told)
    assert len(message) < 200
    assert param == told.partition(":")[0]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "the body: must be JSON: EOF while parsing an object at line 1 column 1"),
        (b"[]", "the body: must be an object with model and messages, but is a list"),
        (b'"a"', 'the body: must be an object with model and messages, but is the string "a"'),
        (b"[" * 9000, "the body: must be JSON: recursion limit exceeded"),
        (b'"\\ud800"', "the body: must be JSON: unexpected end of hex escape"),
    ],
)
def test_a_body_that_is_none(body, told):
    with pytest.raises(ApiError) as caught:
        parse(body, Limits())
    assert str(caught.value).startswith(told)
    assert (caught.value.status, caught.value.param) == (400, None)
