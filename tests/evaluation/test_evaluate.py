"""From a checkpoint to answers and scores; what is refused before it begins."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.cli.evaluation import _print_scores
from moe_llava.common.images import InlineImage
from moe_llava.evaluation import evaluate
from moe_llava.evaluation.ask import tasks as plan
from moe_llava.evaluation.ask.answers import answer_file
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress.perturb import parse_perturbations
from moe_llava.model.upcycling import upcycle
from tests.conftest import refused, run_here
from tests.training.conftest import tiny_base  # noqa: F401

BIN = Path(sys.executable).parent


def arguments(tiny_base, out, *more, data=None):  # noqa: F811
    data = data or tiny_base / "data"
    return ["evaluate", tiny_base / "base", "--benchmark", "digits", "--data", data, "--out", out, *more]


def run(tiny_base, out, names=("digits",), limit=None, batch_size=8, perturb=None):  # noqa: F811
    console = Console(record=True, width=160)
    perturbations = parse_perturbations(perturb) if perturb else []
    found = list(evaluate.evaluate(str(tiny_base / "base"), names, tiny_base / "data", out, batch_size, limit, console, perturbations))
    return found, console.export_text()


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory):  # noqa: F811
    """The folder of a run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    done = run_here(*arguments(tiny_base, out))
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    return out / "digits"


def test_answers_and_result(tiny_base, whole):  # noqa: F811
    questions = digits_world.questions(tiny_base / "data")
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [(question.id, question.prompt) for question in questions]
    assert set(answers[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert len({answer["answer_id"] for answer in answers}) == len(answers)
    result = json.loads((whole / "result.json").read_text())
    assert result["questions"] == len(questions)
    assert result["missing"] == []
    assert result["model"] == str(tiny_base / "base")
    assert result["generation"] == {"do_sample": False, "num_beams": 1, "max_new_tokens": 40, "dtype": "torch.float32", "batch_size": 16}
    assert set(result["versions"]) == {"moe_llava", "torch", "transformers"}
    assert sorted(path.name for path in whole.iterdir()) == [".lock", "answers.jsonl", "result.json", "scored.jsonl", "settings.json"]


@pytest.mark.slow
def test_in_half_precision(tiny_base, tmp_path):  # noqa: F811
    """Gradients of attacks, losses of wordings and routes, too; answers of another precision are not mixed with them."""
    model, processor = load_checkpoint(tiny_base / "base")
    upcycle(model, num_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path / "sparse")
    processor.save_pretrained(tmp_path / "sparse")
    asked = [
        "evaluate",
        tmp_path / "sparse",
        "--benchmark",
        "digits",
        "--data",
        tiny_base / "data",
        "--out",
        tmp_path / "out",
        "--limit",
        "3",
    ]
    done = run_here(*asked, "--dtype", "bfloat16", "--perturb", "fgsm:1,words:1")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "digits" / "result.json").read_text())["generation"]["dtype"] == "torch.bfloat16"
    assert "dtype torch.bfloat16, now torch.float32" in refused(*asked)
    data = ["--data", tiny_base / "data" / "test.json", "--images", tiny_base / "data" / "images", "--limit", "2"]
    done = run_here("routes", tmp_path / "sparse", *data, "--out", tmp_path / "routes", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output


def test_bad_input_is_told_before_long_work(tiny_base, whole, tmp_path):  # noqa: F811
    base, data = tiny_base / "base", tiny_base / "data"
    rest = ["--data", data, "--out", tmp_path / "out"]
    assert "no benchmark is called 'digitz'; did you mean digits?" in refused("evaluate", base, "--benchmark", "digitz", *rest)
    missing = refused("evaluate", base, "--benchmark", "digits,pope", "--data", tmp_path, "--out", tmp_path / "out")
    for name in ("test.json: the questions", "images/test: the pictures", "coco/coco_pope_random.json"):
        assert name in missing
    assert "is not a folder" in refused("evaluate", tmp_path / "gone", "--benchmark", "digits", *rest)
    assert not (tmp_path / "out").exists()
    settings = json.loads((whole / "settings.json").read_text())
    (tmp_path / "other" / "digits").mkdir(parents=True)
    (tmp_path / "other" / "digits" / "settings.json").write_text(json.dumps(settings | {"checkpoint": "elsewhere", "max_new_tokens": 7}))
    message = refused(*arguments(tiny_base, tmp_path / "other"))
    assert f"were made with checkpoint elsewhere, now {base}; max_new_tokens 7, now 40: choose another --out" in message
    (tmp_path / "whose" / "digits").mkdir(parents=True)
    (tmp_path / "whose" / "digits" / "answers.jsonl").write_text("{}\n")
    with pytest.raises(BenchmarkError, match=r"has answers, but no settings.json"):
        run(tiny_base, tmp_path / "whose")


def test_questions_that_cannot_be_asked(tmp_path):
    image = InlineImage("a.png", b"")
    questions = [
        Question("1", "<image> what is <image>?", (image,)),
        Question("2", "what is <image>?"),
        Question("3", "what is this?", (image,)),
    ]
    questions += [Question(f"{number}", "what is this?", (tmp_path / f"{number}.png",)) for number in range(4, 30)]
    with pytest.raises(BenchmarkError) as caught:
        plan.check_questions("The digits world", questions)
    lines = str(caught.value).splitlines()
    assert "question 1 of The digits world has 2 <image> and 1 images" in lines[0]
    assert "question 2 of The digits world has 1 <image> and 0 images" in lines[1]
    assert "4.png, which does not exist" in lines[2]
    assert lines[-1].strip() == "and 8 more"
    with pytest.raises(BenchmarkError, match="has no questions"):
        plan.check_questions("The digits world", [])


def write_vizwiz(folder):
    """One question of the test set, whose answers only a server knows."""
    (folder / "vizwiz" / "test").mkdir(parents=True)
    Image.new("RGB", (48, 48)).save(folder / "vizwiz" / "test" / "a.jpg")
    question = {"question_id": 0, "image": "a.jpg", "text": "what is this ?"}
    (folder / "vizwiz" / "llava_test.jsonl").write_text(json.dumps(question) + "\n")


def test_where_only_a_server_or_a_judge_can_score(tiny_base, tmp_path, monkeypatch):  # noqa: F811
    def upload(folder, asked, given, out):
        (out / "upload.json").write_text(json.dumps(dict(zip([question.id for question in asked], given, strict=True))))
        return [out / "upload.json"]

    def broken(folder, asked, given):
        if any(given):
            raise BenchmarkError("cannot be scored")
        return real.score(folder, asked, given)

    real = digits_world.BENCHMARK
    variants = {
        "server": replace(real, name="server", title="Server", score=None, upload=upload, max_new_tokens=2),
        "judge": replace(real, name="judge", title="Judge", score=None, judge=broken, max_new_tokens=2),
        "fine": replace(real, title="Fine", max_new_tokens=2),
        "broken": replace(real, name="broken", title="Broken", score=broken, max_new_tokens=2),
    }
    monkeypatch.setattr(plan, "find_benchmark", lambda name: variants[name])
    found, printed = run(tiny_base, tmp_path, ("server", "judge"), limit=3)
    assert found == []
    assert "Server: no upload, which would need the answers to all questions" in printed
    _, printed = run(tiny_base, tmp_path, ("server", "judge"))
    plain = printed.replace("\n", "")
    assert f"Server: {tmp_path / 'server' / 'upload.json'} is what its server takes" in plain
    assert f"moe-llava judge judge --data {tiny_base / 'data'} --answers {tmp_path / 'judge' / 'answers.jsonl'} --endpoint" in plain
    assert None not in json.loads((tmp_path / "server" / "upload.json").read_text()).values()
    told = []
    with pytest.raises(BenchmarkError, match="cannot be scored"):
        told.extend(
            evaluate.evaluate(str(tiny_base / "base"), ["broken", "fine"], tiny_base / "data", tmp_path, 8, None, Console(quiet=True))
        )
    assert [found["questions"] for found in told] == [len(digits_world.questions(tiny_base / "data"))]  # what can be scored is
    assert len((tmp_path / "broken" / "answers.jsonl").read_text().splitlines()) > 3


def test_perturbed(tiny_base, whole, tmp_path, monkeypatch):  # noqa: F811
    """The evaluation is repeated under each perturbation, paired with the one without, and plotted."""
    out = tmp_path / "digits"
    done = run_here(*arguments(tiny_base, tmp_path, "--limit", "12", "--perturb", "noise:5,typos:2,fgsm:5"))
    assert done.exit_code == 0, done.output
    assert "12 right without perturbation" in done.stdout
    assert str(out / "robustness.png") in done.stdout
    questions = digits_world.questions(tiny_base / "data")[:12]
    clean = (whole / "answers.jsonl").read_text().splitlines()[:12]
    assert (out / "answers.jsonl").read_text().splitlines() == clean
    summary = json.loads((out / "robustness.json").read_text())
    assert summary["clean"]["n"] == 12
    assert [(drop["name"], drop["strength"]) for drop in summary["drops"]] == [("noise", 5), ("typos", 2), ("fgsm", 5)]
    under_typos = []
    for drop in summary["drops"]:
        folder = out / f"{drop['name']}-{drop['strength']}"
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [
            (question.id, question.prompt) for question in questions
        ]
        assert [answer["text"] for answer in answers] != [json.loads(line)["text"] for line in clean]
        under_typos = answers if drop["name"] == "typos" else under_typos
        result = json.loads((folder / "result.json").read_text())
        assert result["scores"]["accuracy"] == pytest.approx(drop["right"])
        assert result["perturbation"] == {"name": drop["name"], "strength": drop["strength"], "seed": 0}
    with Image.open(out / "robustness.png") as picture:
        assert picture.width > 600
    assert [answer["metadata"]["asked"] == answer["prompt"] for answer in under_typos] == [False] * 12
    # What was asked is there, and stays in the picture; only what is new is asked, under it alone.
    real, under = evaluate.answer, []
    monkeypatch.setattr(evaluate, "answer", lambda *rest: under.append(str(rest[-1])) or real(*rest))
    (found,), _ = run(tiny_base, tmp_path, limit=12, perturb="noise:5,blur:1")
    assert under == ["blur:1"]
    assert [drop["name"] for drop in found["robustness"]["drops"]] == ["noise", "blur", "typos", "fgsm"]
    # With more questions, what was asked fewer is left out, and said so.
    (found,), printed = run(tiny_base, tmp_path, limit=14, perturb="blur:1")
    assert [drop["name"] for drop in found["robustness"]["drops"]] == ["blur"]
    assert "digits under noise:5 has answers to fewer questions: left out" in printed


def test_perturbations_are_refused_before_anything_is_asked(tiny_base, tmp_path):  # noqa: F811
    assert "did you mean noise?" in refused(*arguments(tiny_base, tmp_path / "out", "--perturb", "noisy:1"))
    with pytest.raises(BenchmarkError, match=r"LLaVA-Bench .*is not scored here, so there is nothing to compare"):
        run(tiny_base, tmp_path / "out", names=("digits", "llava-bench"), perturb="noise:1")
    assert not (tmp_path / "out").exists()


def test_a_split_that_only_its_server_scores(tiny_base, tmp_path):  # noqa: F811
    """This is known before the evaluation: there is an upload, and nothing to compare."""
    write_vizwiz(tmp_path)
    command = ["evaluate", tiny_base / "base", "--benchmark", "vizwiz", "--data", tmp_path]
    done = run_here(*command, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "is what its server takes" in done.output
    assert not (tmp_path / "out" / "vizwiz" / "result.json").exists()
    message = refused(*command, "--out", tmp_path / "new", "--perturb", "noise:1")
    assert "VizWiz's test set is not scored here, so there is nothing to compare under --perturb" in message
    assert not (tmp_path / "new").exists()


def test_experts_that_wait_on_disk(tiny_base, tmp_path):  # noqa: F811
    """The answers are the same; attacks need the whole model."""
    model, processor = load_checkpoint(tiny_base / "base")
    for part in (upcycle(model), processor):
        part.save_pretrained(tmp_path / "sparse")
    answers = []
    for keep in (None, 0.25):
        settings = (str(tmp_path / "sparse"), ["digits"], tiny_base / "data", tmp_path / str(keep), 8, 6, Console(quiet=True), [], keep)
        (found,) = evaluate.evaluate(*settings)
        answers.append([json.loads(line)["text"] for line in answer_file(tmp_path / str(keep) / "digits").read_text().splitlines()])
    assert len(answers[0]) == found["questions"] == 6
    assert answers[0] == answers[1]
    command = ["evaluate", tmp_path / "sparse", "--benchmark", "digits", "--data", tiny_base / "data", "--out", tmp_path / "out"]
    assert "pgd need the model's gradient" in refused(*command, "--perturb", "noise,pgd:1", "--keep-experts", "0.5")


@pytest.mark.parametrize(
    ("name", "scores", "printed"),
    [
        ("digits", {"accuracy": 1.0, "colour/accuracy": 0.895, "count/accuracy": 0.93243}, ["%", "100.00", "89.50", "93.24"]),
        ("questions", {"accuracy": 0.0, "x": 0.5, "y": 85.714285}, ["%", "0.00", "0.50", "85.71"]),
        ("mme", {"perception": 1318.0, "color/acc": 0.9333}, ["points", "1318.00", "0.93"]),
    ],
)
def test_a_table_has_the_unit_of_its_benchmark(capsys, name, scores, printed):
    found = {"benchmark": name, "questions": 2, "scores": scores, "intervals": dict.fromkeys(scores, (0, 1))}
    _print_scores(found | {"end_tokens": {"</s>": 2}, "missing": ["7"]})
    told = capsys.readouterr().out
    assert [line.replace("┃", "│").split("│")[2].strip() for line in told.splitlines() if line[:1] in "│┃"] == printed
    assert "1 questions without an answer, counted as wrong: 7" in told
    assert "2 answers end with </s>, which scores count as part of the answer" in told
