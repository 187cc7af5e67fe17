"""The judge against a server that misbehaves: it retries where that may help, and never requests a reply twice."""

import json
import sys

import pytest

from moe_llava.evaluation.score import judge as module
from moe_llava.evaluation.score.judge import Judge, JudgeError
from tests.evaluation.judging_server import Told, serving

REMINDER = "A number, please."


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(module.KEY_VARIABLE, raising=False)


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept" / "answers.judged.jsonl"


def say(*texts):
    return [[{"role": "system", "content": "Judge."}, {"role": "user", "content": text}] for text in texts]


def read(reply):
    return int(reply) if reply.isdecimal() else None


def test_answers_come_in_order_and_are_asked_for_once(kept):
    texts = [f"question {number}" for number in range(20)]
    with serving(lambda prompt, before: Told(prompt.split()[1], seconds=0.01 * (len(prompt) % 3))) as server:
        judge = Judge(server.url, "m", kept)
        assert judge.query(say(*texts, *texts), read, REMINDER) == [*range(20), *range(20)]
        assert len(server.requests) == 20
        first = server.requests[0]
        assert (first["path"], first["model"], first["temperature"]) == ("/v1/chat/completions", "m", 0)
        assert "Authorization" not in first["headers"]

        again = Judge(server.url + "/", "m", kept)
        assert again.query(say(*texts, "question 20"), read, REMINDER) == [*range(21)]
        assert len(server.requests) == 21
        assert again.summary((2.0, 10.0)) == {
            "model": "m",
            "served": ["served-name"],
            "replies": 21,
            "asked": 1,
            "parameters": [{"temperature": 0, "max_tokens": 1024}],
            "prompt_tokens": 2100,
            "completion_tokens": 210,
            "replies_without_usage": 0,
            "cost": (2100 * 2 + 210 * 10) / 1e6,
        }
        # Another model is another judge.
        Judge(server.url, "other", kept).query(say(*texts), read, REMINDER)
        assert len(server.requests) == 41


@pytest.mark.parametrize(
    "trouble",
    [
        Told("", status=429, headers={"Retry-After": "0"}),
        Told("", status=500),
        Told("", status=503, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        Told("too late", seconds=1.0),
        Told(body=b"<html>a proxy speaks</html>"),
        Told(body=b"[]"),
        Told(body=b'{"choices": []}'),
        Told(body=b"cut off", headers={"Content-Length": "100"}),
    ],
    ids=["429", "500", "503 with a date", "slow", "no JSON", "a list", "no choice", "cut off"],
)
def test_what_may_pass_is_tried_again(kept, trouble):
    with serving(lambda prompt, before: trouble if before < 2 else Told("7")) as server:
        assert Judge(server.url, "m", kept).query(say("a"), read, REMINDER) == [7]
        assert len(server.requests) == 3
    assert len(kept.read_text().splitlines()) == 1


def test_it_gives_up_and_keeps_what_it_has(kept):
    """A second run does not request the saved replies."""
    down = True
    with serving(lambda prompt, before: Told("", status=500) if down and prompt == "d" else Told("7")) as server:
        with pytest.raises(JudgeError, match=r"500 .*gave up after 6 attempts.*run it again"):
            Judge(server.url, "m", kept).query(say("a", "b", "c", "d"), read, REMINDER)
        assert server.prompts().count("d") == module.ATTEMPTS
        down = False
        assert Judge(server.url, "m", kept).query(say("a", "b", "c", "d"), read, REMINDER) == [7] * 4
        assert server.prompts().count("a") == 1
        assert server.prompts().count("d") == module.ATTEMPTS + 1


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_what_will_not_pass_is_told_at_once(kept, status, monkeypatch):
    """The key is sent, but never printed, even if the server repeats it; redirects are not followed."""
    monkeypatch.setenv(module.KEY_VARIABLE, " sk-secret\n")
    body = b'{"error": "sk-secret is\nnot for this"}'
    with serving(lambda prompt, before: Told(status=status, body=body, headers={"Location": "http://127.0.0.1:9/"})) as server:
        with pytest.raises(JudgeError) as error:
            Judge(server.url, "m", kept).query(say("a"), read, REMINDER)
        assert len(server.requests) == 1
        assert server.requests[0]["headers"]["Authorization"] == "Bearer sk-secret"
    assert str(status) in str(error.value)
    assert "*** is not for this" in str(error.value)
    assert "sk-secret" not in str(error.value)
    assert (module.KEY_VARIABLE in str(error.value)) == (status == 401)


def test_the_key_is_not_kept(kept, monkeypatch):
    monkeypatch.setenv(module.KEY_VARIABLE, "sk-secret")
    with serving(lambda prompt, before: Told("7")) as server:
        judge = Judge(server.url, "m", kept)
        judge.query(say("a"), read, REMINDER)
    assert "sk-secret" not in kept.read_text() + json.dumps(judge.summary())


def test_no_other_key_is_sent(kept, monkeypatch):
    """Nothing that the client reads from its own environment variables is sent."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Other: other\nAuthorization: other")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/")
    with serving(lambda prompt, before: Told("7")) as server:
        Judge(server.url, "m", kept).query(say("a"), read, REMINDER)
        monkeypatch.setenv(module.KEY_VARIABLE, "sk-secret")
        Judge(server.url, "m", kept).query(say("b"), read, REMINDER)
    for request in server.requests:
        assert "other" not in str(request["headers"])
    assert [request["headers"].get("Authorization") for request in server.requests] == [None, "Bearer sk-secret"]


def test_the_client_may_be_missing(kept, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"a judge needs openai, which is not installed: pip install -e '\.\[judge\]'"):
        Judge("http://localhost/v1", "m", kept)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "gopher://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_named(kept, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(JudgeError, match="the proxy that the environment names, such as in ALL_PROXY"):
        Judge("http://127.0.0.1:1/v1", "m", kept)


def test_a_key_with_blanks_is_not_shown(kept, monkeypatch):
    monkeypatch.setenv(module.KEY_VARIABLE, "sk secret")
    with pytest.raises(JudgeError, match=module.KEY_VARIABLE) as error:
        Judge("http://localhost/v1", "m", kept)
    assert "secret" not in str(error.value)


def test_nobody_there(kept):
    with serving(lambda prompt, before: Told("7")) as server:
        pass
    with pytest.raises(JudgeError, match="refused"):
        Judge(server.url, "m", kept).query(say("a"), read, REMINDER)


def test_nonsense_is_asked_once_more(kept):
    """The second request has a reminder; if that does not help, the reply stays unread, in a second run, too."""

    def respond(prompt, before):
        if prompt.startswith("a"):
            return Told("five" if REMINDER not in prompt else "5")
        return Told(None) if prompt.startswith("b") else Told("<think>6\nor 7?</think>\n 8 ")

    with serving(respond) as server:
        for _ in range(2):
            assert Judge(server.url, "m", kept).query(say("a", "b", "c"), read, REMINDER) == [5, None, 8]
        assert sorted(server.prompts()) == ["a", f"a\n\n{REMINDER}", "b", f"b\n\n{REMINDER}", "c"]


def test_a_cut_off_line_is_asked_again(kept):
    with serving(lambda prompt, before: Told("7", usage=None)) as server:
        Judge(server.url, "m", kept).query(say("a", "\ud800 ü\n\t"), read, REMINDER)
        kept.write_bytes(kept.read_bytes()[:-5])
        judge = Judge(server.url, "m", kept)
        assert judge.query(say("a", "\ud800 ü\n\t"), read, REMINDER) == [7, 7]
        assert len(server.requests) == 3
        assert judge.summary()["replies_without_usage"] == 2
    assert len(kept.read_text().splitlines()) == 2


def test_a_damaged_line_is_named(kept):
    kept.parent.mkdir()
    kept.write_text('{"key": 1}\n')
    with pytest.raises(JudgeError, match=r"line 1 of .*judged\.jsonl"):
        Judge("http://localhost/v1", "m", kept)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "file:///etc", "http://", "http://me:pass@host/v1", "http://h/v1?key=1", "http://h/ v1", "http://[/"]
)
def test_what_is_no_base_url(kept, url):
    with pytest.raises(JudgeError, match="--endpoint must be a base URL") as error:
        Judge(url, "m", kept)
    assert "pass" not in str(error.value)


UNSUPPORTED = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
}
OWN_TEMPERATURE, RENAMED = {"max_tokens": 1024}, {"max_completion_tokens": module.MAX_COMPLETION_TOKENS}


@pytest.mark.parametrize(
    ("rejected", "status", "sent"),
    [
        (["max_tokens"], 400, RENAMED | {"temperature": 0}),
        (["temperature"], 400, OWN_TEMPERATURE),
        (["temperature", "max_tokens"], 400, RENAMED),
        (["max_tokens", "temperature"], 422, RENAMED),
    ],
)
def test_parameters_that_the_judge_rejects(kept, rejected, status, sent):
    """Servers report them one after the other; the parameters sent are in the summary, and saved with each reply."""

    refusals = {
        name: Told(status=status, body=json.dumps({"error": {"input": "x" * 500, "message": UNSUPPORTED[name]}}).encode())
        for name in rejected
    }
    with serving(lambda prompt, before: Told("7"), refusals) as served:
        judge = Judge(served.url, "m", kept)
        assert judge.query(say(*"abcdefgh"), read, REMINDER) == [7] * 8
        accepted = [request for request in served.requests if not any(name in request for name in rejected)]
        assert len(accepted) == 8
        # Each of the requests that go out at once may be rejected; those after them are not.
        assert len(served.requests) <= 8 + module.AT_ONCE * len(rejected)
        assert judge.summary()["parameters"] == [sent]
        again = Judge(served.url, "m", kept)
        assert again.query(say("a"), read, REMINDER) == [7]
        assert again.summary()["parameters"] == [sent]
        assert len([request for request in served.requests if not any(name in request for name in rejected)]) == 8


def test_a_judge_that_takes_neither_name_of_a_limit(kept):
    body = json.dumps({"detail": "max_tokens and max_completion_tokens: extra inputs are not permitted"}).encode()
    with serving(lambda prompt, before: Told(status=400, body=body)) as server:
        with pytest.raises(JudgeError, match="extra inputs are not permitted"):
            Judge(server.url, "m", kept).query(say("a"), read, REMINDER)
        assert len(server.requests) == 2


def test_a_prompt_without_room_for_the_reply(kept):
    body = json.dumps(
        {"message": "'max_tokens' or 'max_completion_tokens' is too large: 1024. The maximum context length is 2048"}
    ).encode()
    with serving(lambda prompt, before: Told(status=400, body=body)) as server:
        with pytest.raises(JudgeError, match="is too large: 1024"):
            Judge(server.url, "m", kept).query(say("a"), read, REMINDER)
        assert len(server.requests) == 1


def test_replies_that_an_earlier_version_kept(kept):
    with serving(lambda prompt, before: Told("7")) as server:
        Judge(server.url, "m", kept).query(say("a"), read, REMINDER)
        line = json.loads(kept.read_text())
        del line["parameters"]
        kept.write_text(json.dumps(line) + "\n")
        judge = Judge(server.url, "m", kept)
        assert judge.query(say("a"), read, REMINDER) == [7]
        assert judge.summary()["parameters"] == [{"temperature": 0, "max_tokens": 1024}]
        assert len(server.requests) == 1
