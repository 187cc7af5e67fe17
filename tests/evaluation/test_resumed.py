"""Answers that are there already: evaluations that were killed, shared among processes, merged, or of another checkpoint."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from moe_llava.common.files import drop_torn_line
from moe_llava.digits.dataset import write_dataset
from moe_llava.evaluation import evaluate
from moe_llava.evaluation.ask.answers import answer_file, merge, writing
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from tests.conftest import REPOSITORY, refused, run_here
from tests.evaluation.test_evaluate import BIN, arguments, run, whole, write_vizwiz  # noqa: F401
from tests.training.conftest import tiny_base  # noqa: F401


def test_a_torn_line_and_what_is_missing_is_asked_again_and_nothing_else(tiny_base, whole, tmp_path, monkeypatch):  # noqa: F811
    assert run(tiny_base, tmp_path, limit=20)[0][0]["questions"] == 20
    file = tmp_path / "digits" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 20
    file.write_text("".join(lines[:9]) + lines[9][:30])
    (tmp_path / "digits" / "answers.1.jsonl").write_text("".join(lines[15:]) + lines[10][:-1])
    asked = []
    real = evaluate.answer

    def answer(model, processor, questions, *rest):
        asked.extend(questions)
        return real(model, processor, questions, *rest)

    monkeypatch.setattr(evaluate, "answer", answer)
    run(tiny_base, tmp_path)
    questions = digits_world.questions(tiny_base / "data")
    assert [question.id for question in asked] == [question.id for question in questions[9:15] + questions[20:]]
    assert file.read_text() == (whole / "answers.jsonl").read_text()
    assert not (tmp_path / "digits" / "answers.1.jsonl").exists()
    asked.clear()
    monkeypatch.setattr(evaluate, "load_for_inference", None)  # nothing to ask: no model is needed
    assert run(tiny_base, tmp_path, limit=5)[0][0]["questions"] == 5
    assert not asked
    assert file.read_text() == (whole / "answers.jsonl").read_text()


@pytest.mark.slow
def test_killed_and_run_again(tiny_base, tmp_path):  # noqa: F811
    write_dataset(tmp_path / "data", train_images=1, test_images=10)
    command = [BIN / "moe-llava", *arguments(tiny_base, tmp_path / "out", "--batch-size", "4", data=tmp_path / "data")]
    file = tmp_path / "out" / "digits" / "answers.jsonl"
    number = len(digits_world.questions(tmp_path / "data"))
    process = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while not file.exists() or file.read_text().count("\n") < 20:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 20 <= len(before) < number
    done = run_here(*command[1:])
    assert done.exit_code == 0, done.output
    assert f"evaluating digits: {number - len(before)} in" in done.output
    after = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(after) == number
    assert {answer["answer_id"] for answer in before} <= {answer["answer_id"] for answer in after}


@pytest.mark.slow
def test_two_processes(tiny_base, whole, tmp_path):  # noqa: F811
    """One benchmark has fewer questions than there are processes."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_vizwiz(data)
    (data / "digits").mkdir()
    (data / "digits" / "data").symlink_to(tiny_base / "data")
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", BIN / "moe-llava"]
    command += ["evaluate", tiny_base / "base", "--benchmark", "digits,vizwiz", "--data", data, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluating digits") == done.stdout.count("evaluating vizwiz") == 1
    assert (out / "digits" / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()
    assert sorted(path.name for path in (out / "digits").iterdir()) == [
        ".lock",
        "answers.jsonl",
        "result.json",
        "scored.jsonl",
        "settings.json",
    ]
    assert len((out / "vizwiz" / "answers.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in (out / "vizwiz").iterdir()) == [".lock", "answers.jsonl", "settings.json", "vizwiz.json"]


def test_no_process_writes_answers_before_all_have_their_shares(tiny_base, tmp_path, monkeypatch):  # noqa: F811
    """A share depends on the answers that are there."""
    order = []
    monkeypatch.setattr(evaluate, "_processes", lambda: contextlib.nullcontext((0, 2)))
    monkeypatch.setattr(evaluate, "_wait", lambda processes: order.append("_wait"))
    for name in ("_share", "_write_answers"):
        real = getattr(evaluate, name)
        monkeypatch.setattr(evaluate, name, lambda *rest, name=name, real=real: order.append(name) or real(*rest))
    run(tiny_base, tmp_path, limit=1)
    assert order == ["_wait", "_share", "_wait", "_write_answers", "_wait"]


def test_questions_are_dealt_out_by_image():
    left = [Question(str(number), "what is this?", (Path(f"{number // 3}.png"),)) for number in range(12)]
    left += [Question(str(number), "why?") for number in range(12, 15)]
    shares = [evaluate._share(left, process, 3) for process in range(3)]
    assert sorted(question.id for share in shares for question in share) == sorted(question.id for question in left)
    assert [[question.id for question in share] for share in shares] == [
        ["0", "1", "2", "9", "10", "11", "14"],
        ["3", "4", "5", "12"],
        ["6", "7", "8", "13"],
    ]
    assert [len(evaluate._share(left[:3], process, 2)) for process in range(2)] == [3, 0]


def test_two_runs_do_not_write_into_the_same_folder(tiny_base, tmp_path):  # noqa: F811
    """Not even under different perturbations: both would evaluate without perturbation, too."""
    with writing(tmp_path / "digits"):
        told = refused(*arguments(tiny_base, tmp_path, "--limit", "2", "--perturb", "noise:1"))
    assert f"another run is writing into {tmp_path / 'digits'}: wait for its end, or choose another --out" in told
    assert not (tmp_path / "digits" / "answers.jsonl").exists()
    assert run(tiny_base, tmp_path, limit=2)[0][0]["missing"] == []


def test_answers_that_vanish_are_not_scored_as_wrong(tiny_base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "answer", lambda *rest: iter([[(0, "7")]]))
    with pytest.raises(BenchmarkError, match="2 questions of digits were evaluated, but their answers are gone"):
        run(tiny_base, tmp_path, limit=3)
    assert not (tmp_path / "digits" / "result.json").exists()


def test_merging(tmp_path):
    questions = [Question("1", "a"), Question("1", "b"), Question("2", "a")]
    answer_file(tmp_path).write_text('{"question_id": 1, "prompt": "a"}\n')
    with pytest.raises(BenchmarkError, match=r"line 1 of .*answers.jsonl has no 'text'"):
        merge(tmp_path, questions)
    lines = [json.dumps({"question_id": id, "prompt": prompt, "text": "x\té\n"}) + "\n" for id, prompt in (("2", "a"), ("1", "b"))]
    answer_file(tmp_path).write_bytes(lines[0].encode() + lines[1].encode()[:-9])
    answer_file(tmp_path, 1).write_text(lines[1])
    merge(tmp_path, questions)
    assert answer_file(tmp_path).read_text() == lines[1] + lines[0]
    assert not answer_file(tmp_path, 1).exists()
    answer_file(tmp_path).write_bytes("é".encode()[:1])
    drop_torn_line(answer_file(tmp_path))
    assert answer_file(tmp_path).read_bytes() == b""


def change(file):
    """Change a byte, but neither name, size nor time; in JSON a blank, so that it stays valid. Return the content before."""
    before, times = file.read_bytes(), file.stat()
    content = bytearray(before)
    content[content.index(b" ") if file.suffix == ".json" else -2] ^= 0x2A  # a blank becomes a line break
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return before


def test_checkpoint_and_pictures_are_known_by_their_contents(tiny_base, tmp_path):  # noqa: F811
    """The error names the changed file, and answers are kept; a new time alone is no change."""
    shutil.copytree(tiny_base, tmp_path / "in")
    base, data = tmp_path / "in" / "base", tmp_path / "in" / "data"
    out = tmp_path / "out"

    def again(limit):
        return list(evaluate.evaluate(str(base), ["digits"], data, out, 8, limit, Console(quiet=True)))

    assert again(3)[0]["questions"] == 3
    answers = (out / "digits" / "answers.jsonl").read_text()
    first, last = (digits_world.questions(data)[number].images[0] for number in (0, -1))
    for file in (base / "model.safetensors", first):
        os.utime(file)
    assert again(3)[0]["questions"] == 3
    for file, named in (
        (base / "model.safetensors", "other checkpoint files: model.safetensors"),
        (base / "tokenizer.json", "other checkpoint files: tokenizer.json"),
        (base / "config.json", "other checkpoint files: config.json"),
        (first, "other pictures: images/test/000000.png"),
    ):
        content = change(file)
        with pytest.raises(BenchmarkError, match=rf"the answers in .*digits were made with {named}: choose another --out, or remove it"):
            again(None)
        file.write_bytes(content)
    assert (out / "digits" / "answers.jsonl").read_text() == answers
    # A picture that nobody was asked about may change; it is noted when its turn comes, and the others stay noted.
    change(last)
    assert again(None)[0]["missing"] == []
    again(1)
    change(last)
    with pytest.raises(BenchmarkError, match=rf"other pictures: images/test/{last.name}: choose"):
        again(None)
    settings = json.loads((out / "digits" / "settings.json").read_text())
    del settings["pictures"], settings["checkpoint_files"]
    (out / "digits" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(BenchmarkError, match="made with checkpoint files of which no digests were kept, by an earlier version"):
        again(None)


def test_a_kept_answer_that_stands_twice(tmp_path):
    """A kill may leave the same text twice; two different texts are an error."""
    questions = [Question("1", "a")]
    one, other = (json.dumps({"question_id": "1", "prompt": "a", "text": text}) + "\n" for text in ("x", "y"))
    answer_file(tmp_path).write_text(one + one)
    answer_file(tmp_path, 1).write_text(one)
    merge(tmp_path, questions)
    assert answer_file(tmp_path).read_text() == one
    answer_file(tmp_path).write_text(one + other)
    with pytest.raises(BenchmarkError, match=r"line 2 of .*answers.jsonl answers question 1 once more, with another text"):
        merge(tmp_path, questions)
    answer_file(tmp_path).write_text(one)
    answer_file(tmp_path, 1).write_text(other)
    with pytest.raises(BenchmarkError, match=r"answers.1.jsonl answers question 1 otherwise than the files before it"):
        merge(tmp_path, questions)
