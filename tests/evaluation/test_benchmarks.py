"""Properties of every benchmark."""

import json

import pytest

from moe_llava.evaluation.score.benchmark import NAMES, find_benchmark, find_folder, result
from moe_llava.evaluation.score.means import mean_by, mean_by_group
from moe_llava.evaluation.score.questions import LETTER, SINGLE_WORD
from moe_llava.evaluation.score.reading import BenchmarkError, read_json, read_json_lines, take
from moe_llava.evaluation.score.scoring import score_answers
from tests.conftest import REPOSITORY, run_here

OWN = ("digits", "digits-options", "questions")  # which have no folder of LLaVA's


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_a_benchmark_says_what_it_needs(name, tmp_path):
    benchmark = find_benchmark(name)
    assert benchmark.name == name
    assert benchmark.files
    assert benchmark.headline
    assert benchmark.score or benchmark.judge or benchmark.upload
    with pytest.raises(BenchmarkError, match=f"needs in .*{benchmark.folder} there"):
        find_folder(benchmark, tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "questions"])
def test_the_document_shows_its_folder(name):
    benchmark = find_benchmark(name)
    text = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    assert f"| `{benchmark.folder}` |" in row
    for files in benchmark.files if name not in ("mme", "mmmu") else []:  # of which only the folder of all their parts is shown
        for file in files.split(" | "):
            assert f"`{file}`" in row or file in ("testdev_balanced_questions.json", "images/test")
    assert ("by a judge" in row) == (benchmark.judge is not None)
    assert ("upload" in row) == (benchmark.upload is not None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text-vqa", r"no benchmark is called 'text-vqa'; did you mean textvqa\? There are vqav2, "),
        ("POPE", r"no benchmark is called 'POPE'; did you mean pope\? There are vqav2, "),
        ("xyz", r"no benchmark is called 'xyz'\. There are vqav2, "),
    ],
)
def test_an_unknown_name(name, message):
    with pytest.raises(BenchmarkError, match=message):
        find_benchmark(name)


def test_a_mark_in_front_of_utf8_is_no_content(tmp_path):
    (tmp_path / "lines").write_text('{"a": 1}\n', encoding="utf-8-sig")
    (tmp_path / "json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json_lines(tmp_path / "lines") == [read_json(tmp_path / "json")] == [{"a": 1}]


def test_a_record_without_anything(tmp_path):
    with pytest.raises(BenchmarkError, match="line 1 has no 'image', but is empty"):
        take({}, "image", "line 1")


def test_a_resample_without_a_group_does_not_count_for_it():
    """The only question of a kind is right, so its interval has no width."""
    items = [{"right": number % 2, "kind": "common"} for number in range(9)] + [{"right": 1, "kind": "rare"}]
    scored = mean_by(items, ("kind",), [str(number) for number in range(10)])
    found = result(find_benchmark("vqav2"), scored, [], [])
    assert found["intervals"]["kind/rare"] == (100, 100)
    low, high = found["intervals"]["kind/common"]
    assert low < found["scores"]["kind/common"] < high


def test_multiple_choice_too():
    items = [{"right": number % 2 == 0, "right (lenient)": True} for number in range(5)]
    scored = mean_by_group(items, [["accuracy", "type/x"] if number == 0 else ["accuracy"] for number in range(5)], list("abcde"))
    found = result(find_benchmark("seed-bench"), scored, [], [])
    assert found["intervals"]["type/x"] == (100, 100)
    assert found["intervals"]["accuracy (lenient)"] == (100, 100)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda good: [], "answers.jsonl has no answers"),
        (
            lambda good: [answer | {"question_id": f"x{n}"} for n, answer in enumerate(good)],
            "answers the questions x0, x1, x2 and so on; those",
        ),
        (
            lambda good: [answer | {"prompt": "Who?"} for answer in good],
            "answers other questions: .* was 'Who\\?' there, but is 'What is the",
        ),
        (lambda good: [good[0] | {"text": None}], "answer 1 of .* has null as 'text', but must have a string"),
        (lambda good: [good[0] | {"prompt": 5}], "answer 1 of .* has 5 as 'prompt', but must have a string"),
    ],
)
def test_answers_that_answer_nothing_are_an_error(golden, tmp_path, answers, message):
    folder, file = golden / "eval" / "textvqa", tmp_path / "answers.jsonl"
    good = read_json_lines(folder / "answers" / "fixture-model.jsonl")
    file.write_text("".join(json.dumps(answer) + "\n" for answer in answers(good)))
    with pytest.raises(BenchmarkError, match=message):
        score_answers("textvqa", folder, file)


def test_answers_with_a_part_of_the_prompt_are_scored(golden, tmp_path):
    """LLaVA saves some prompts without the instruction how to answer."""
    folder, file = golden / "eval" / "scienceqa", tmp_path / "answers.jsonl"
    good = read_json_lines(folder / "answers" / "fixture-model.jsonl")
    shorter = [answer | {"prompt": f"<image>\n{answer['prompt']}".removesuffix(LETTER)} for answer in good]
    assert shorter[0]["prompt"] != f"<image>\n{good[0]['prompt']}"
    file.write_text("".join(json.dumps(answer) + "\n" for answer in [*shorter, {"question_id": "x", "text": "a"}]))
    found = score_answers("scienceqa", folder, file)
    assert found["scores"]["accuracy"] == 20
    assert found["unknown"] == ["x"]


def test_prompts_that_find_no_question_are_an_error(golden, tmp_path):
    """MME's questions are identified by their whole prompts."""
    folder, file = golden / "eval" / "MME", tmp_path / "answers.jsonl"
    good = read_json_lines(folder / "answers" / "fixture-model.jsonl")
    file.write_text("".join(json.dumps(answer | {"prompt": answer["prompt"].removesuffix(SINGLE_WORD)}) + "\n" for answer in good))
    with pytest.raises(BenchmarkError, match=r"answers other questions: existence/0000.png was "):
        score_answers("mme", folder, file)


@pytest.mark.parametrize("name", ["pope", "textvqa", "scienceqa", "mme"])
def test_the_command_on_recorded_answers(golden, name):
    folder = find_folder(find_benchmark(name), golden / "eval")
    answers = folder / "answers" / "fixture-model.jsonl"
    found = run_here("score", name, "--data", golden / "eval", "--answers", answers, "--json")
    assert found.exit_code == 0, found.output
    scores = json.loads(found.stdout)
    assert scores["benchmark"] == name
    assert set(find_benchmark(name).headline) <= scores["scores"].keys()
    for score, value in scores["scores"].items():
        low, high = scores["intervals"][score]
        assert low <= high
        assert isinstance(value, float)
