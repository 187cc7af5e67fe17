"""MM-Vet: shares of a judge on loopback, scores computed by hand; the command that judges."""

import json
import re

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark
from moe_llava.evaluation.score.definitions.mm_vet import read_share
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.scoring import judge_answers
from moe_llava.evaluation.score.tables import write_table
from tests.conftest import refused, run_here
from tests.evaluation.judging_server import Told, serving

CAPABILITIES = [["ocr"], ["rec"], ["rec", "ocr"], ["ocr", "rec"]]
SHARES = {"one": "1.0", "two": "0.5", "three": "0.3.", "None": " **0.1**\n"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "mm-vet"
    folder.mkdir()
    questions = [{"question_id": n, "image": f"v1_{n}.png", "text": f"What is {n}?"} for n in range(4)]
    (folder / "llava-mm-vet.jsonl").write_text("\n".join(map(json.dumps, questions)))
    truth = {f"v1_{n}": {"question": "?", "answer": f"{n}<AND>-{n}", "capability": names} for n, names in enumerate(CAPABILITIES)}
    (folder / "mm-vet.json").write_text(json.dumps(truth))
    answer(tmp_path, *SHARES)
    return tmp_path


def answer(data, *texts):
    (data / "answers.jsonl").write_text(
        "\n".join(json.dumps({"question_id": n, "text": text, "model_id": "mine"}) for n, text in enumerate(texts))
    )


def share(prompt, before):
    return Told(SHARES[re.search(r"Given answer:\n(.*)\n\nHow much", prompt)[1]])


def test_scores_by_the_command(data):
    arguments = ["judge", "mm-vet", "--data", data, "--answers", data / "answers.jsonl", "--judge-model", "m", "--endpoint"]
    with serving(share) as server:
        done = run_here(*arguments, server.url, "--json", "--prices", "10", "100")
        assert done.exit_code == 0, done.output
        shown = run_here(*arguments, server.url)
        assert len(server.requests) == 4
        assert "2 <AND> -2" in next(prompt for prompt in server.prompts() if "What is 2?" in prompt)
    found = json.loads(done.stdout)
    assert found["scores"] == pytest.approx(
        {
            "total": 100 * 1.9 / 4,
            "capability/ocr": 100 * 1.4 / 3,
            "capability/rec": 100 * 0.9 / 3,
            "combination/ocr": 100.0,
            "combination/ocr+rec": 100 * 0.4 / 2,
            "combination/rec": 50.0,
        }
    )
    low, high = found["intervals"]["total"]
    assert 10 <= low < 47.5 < high <= 100
    # Of three resamples one has nothing of this combination.
    assert found["intervals"]["combination/ocr"] == [100, 100]
    assert found["judge"]["cost"] == (400 * 10 + 40 * 100) / 1e6
    assert "47.5" in shown.stdout
    assert "model m, served ['served-name'], replies 4, asked 0, prompt tokens 400, completion tokens 40" in shown.stdout
    assert "sent: max_tokens 1024, temperature 0\n" in shown.stdout
    assert "another run may give other scores" not in shown.stdout
    (data / "result.json").write_text(done.stdout)
    table = write_table([data / "result.json"], "csv", False).splitlines()[1]
    assert table == f"measured,mine,mm-vet,total,47.5,{low},{high},4,0,m"
    assert (data / "answers.judged.jsonl").exists()


def test_the_command_says_that_a_temperature_was_rejected(data):
    rejection = Told(status=400, body=b'{"error": {"message": "unsupported value", "param": "temperature"}}')
    with serving(share, {"temperature": rejection}) as server:
        rest = ["--answers", data / "answers.jsonl", "--judge-model", "m", "--endpoint", server.url]
        done = run_here("judge", "mm-vet", "--data", data, *rest)
        assert done.exit_code == 0, done.output
        assert "sent: max_tokens 1024\nThe judge accepts no temperature 0, so it used its own: another run may give" in done.output
        assert json.loads(run_here("judge", "mm-vet", "--data", data, *rest, "--json").output)["judge"]["parameters"] == [
            {"max_tokens": 1024}
        ]


def test_missing_and_unreadable(data):
    answer(data, "one", "two", "three")
    with serving(lambda prompt, before: Told("quite right") if "What is 1?" in prompt else share(prompt, before)) as server:
        found = judge_answers("mm-vet", data, data / "answers.jsonl", server.url, "m")
    assert len(server.requests) == 4
    assert (found["missing"], found["unreadable"]) == (["3"], ["1"])
    assert found["scores"]["total"] == pytest.approx(100 * 1.3 / 4)


def test_the_command_tells_what_is_wrong(data):
    arguments = ["--data", data, "--answers", data / "answers.jsonl"]
    command = f"moe-llava judge mm-vet --data {data} --answers {data / 'answers.jsonl'} --endpoint URL --judge-model NAME"
    assert command in refused("score", "mm-vet", *arguments)
    message = refused("judge", "mm-vet", *arguments, "--endpoint", "nowhere", "--judge-model", "m")
    assert message.startswith("--endpoint must be a base URL")


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("0", 0.0),
        ("1", 1.0),
        ("0.5.", 0.5),
        (".5", 0.5),
        ("**0.85**\nas one part is missing", 0.85),
        ("", None),
        ("1.1", None),
        ("-0.5", None),
        ("10", None),
        ("nan", None),
        ("0.5 or 0.6", None),
        ("Correctness: 0.5", None),
        ("\u0660.\u0665", None),
    ],
)
def test_reading(reply, value):
    assert read_share(reply) == value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("v1_3", "v1_4", "mm-vet.json has no entry 'v1_3' for question 3"),
        ('"answer"', '"truth"', "v1_0 of .*mm-vet.json has no 'answer'"),
        ('["ocr"]', '"ocr"', "v1_0 of .*mm-vet.json has the capability 'ocr', but must have a list"),
        ("{", "", "mm-vet.json is not JSON"),
    ],
)
def test_bad_files_are_told_before_the_judge_is_asked(data, old, new, message):
    path = data / "mm-vet" / "mm-vet.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with serving(share) as server, pytest.raises(BenchmarkError, match=message):
        judge_answers("mm-vet", data, data / "answers.jsonl", server.url, "m")
    assert not server.requests


def test_upload(data):
    benchmark = find_benchmark("mm-vet")
    questions = benchmark.questions(data / "mm-vet")
    (file,) = benchmark.upload(data / "mm-vet", questions, ["a\tb", None, "", "é"], data)
    assert json.loads(file.read_text()) == {"v1_0": "a\tb", "v1_1": "", "v1_2": "", "v1_3": "é"}
