"""MME's scores equal those of the published script to the last digit, also with newlines and tabs in answers."""

import json
import shutil

import pytest

from moe_llava.evaluation.score.benchmark import find_benchmark, find_folder, result
from moe_llava.evaluation.score.definitions.mme import TASKS, read, read_leniently
from moe_llava.evaluation.score.questions import pair
from moe_llava.evaluation.score.reading import BenchmarkError, read_json_lines

MME = find_benchmark("mme")


@pytest.fixture
def folder(golden):
    return find_folder(MME, golden / "eval")


@pytest.fixture
def answers(folder):
    return read_json_lines(folder / "answers" / "fixture-model.jsonl")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the data that can be changed."""
    shutil.copytree(folder, tmp_path / "MME", copy_function=shutil.copyfile)
    for path in [tmp_path / "MME", *(tmp_path / "MME").rglob("*")]:
        path.chmod(0o755)
    return tmp_path / "MME"


def scored(folder, answers):
    questions = MME.questions(folder)
    given, unknown = pair(questions, answers, folder / "answers")
    assert not unknown
    return MME.score(folder, questions, given), questions, given


def scores(folder, answers):
    found, questions, given = scored(folder, answers)
    return result(MME, found, questions, given)


def test_reading(folder):
    for case in json.loads((folder / "expected_parsing.json").read_text()):
        assert read(case["answer"]) == case["parsed"], case


@pytest.mark.parametrize("step", [1, -1])
def test_scores_are_the_published_ones(folder, answers, step):
    found, questions, given = scored(folder, answers[::step])
    values = result(MME, found, questions, given)["scores"]
    expected = json.loads((folder / "expected.json").read_text())
    assert len(found.items) == expected["n_items"]
    for ability, tasks in TASKS.items():
        old = expected[ability.capitalize()]
        assert values[ability] == old["total"]
        assert list(old["tasks"]) == list(tasks)
        for task, metrics in old["tasks"].items():
            items = [item for item in found.items if item["task"] == task]
            assert metrics == {
                "n_questions": len(items),
                "n_images": len({item["id"] for item in items}),
                "acc": values[f"{task}/acc"],
                "acc_plus": values[f"{task}/acc_plus"],
                "other_num": sum(item["read"] == "other" for item in items),
                "score": values[task],
            }


@pytest.mark.parametrize("case", ["case_newline_in_answer", "case_tab_in_answer"])
def test_newlines_and_tabs_shift_nothing(folder, answers, case):
    """The answer in question, "Yes" and more, is right, where "maybe" was wrong: 4 + 1 of 6 questions, 1 + 1 of 3 images."""
    before = scores(folder, answers)["scores"]
    after = scores(folder, read_json_lines(folder / "answers" / f"{case}.jsonl"))["scores"]
    assert (before["color/acc"], before["color/acc_plus"]) == (4 / 6, 1 / 3)
    assert (after["color/acc"], after["color/acc_plus"]) == (5 / 6, 2 / 3)
    assert {name for name in before if before[name] != after[name]} == {
        f"{name}{suffix}" for name in ("color", "color/acc", "color/acc_plus", "perception") for suffix in ("", " (lenient)")
    } & before.keys()


def test_a_missing_answer_is_named_and_wrong(folder, answers):
    found = scores(folder, answers[1:])
    assert found["missing"] == ["existence/0000.png"]
    assert (found["scores"]["existence/acc"], found["scores"]["existence/acc_plus"]) == (0.4, 1 / 5)


def test_only_what_was_asked_is_scored(folder):
    """Of five questions, the one without its partner counts for acc only. Sums over tasks need all tasks."""
    asked = MME.questions(folder)[:5]
    assert [item["expected"] for item in MME.score(folder, asked, [None] * 5).items[:4]] == ["yes", "no", "no", "yes"]
    given = ["yes", "no", "yes", "yes", None]
    found = result(MME, MME.score(folder, asked, given), asked, given)
    assert found["scores"] == {"existence": 60 + 50, "existence/acc": 3 / 5, "existence/acc_plus": 1 / 2}
    found = result(MME, MME.score(folder, asked[:1], ["yes"]), asked[:1], ["yes"])
    assert found["scores"].keys() == {"existence/acc"}


def test_intervals_hold_every_task(folder, answers):
    """If a task has only right answers, so have all resamples, and the sums are not NaN."""
    found = scores(folder, answers)
    assert found["scores"]["position"] == 200
    assert found["intervals"]["position"] == (200, 200)
    surest = sum(found["intervals"][task][0] for task in TASKS["perception"])
    assert surest < found["intervals"]["perception"][0] < found["scores"]["perception"] < found["intervals"]["perception"][1]


def test_both_layouts_of_the_release(folder):
    release = folder / "MME_Benchmark_release_version"
    assert (release / "posters" / "questions_answers_YN").is_dir()
    assert not (release / "color" / "questions_answers_YN").exists()
    by_task = {question.id.split("/")[0]: question for question in MME.questions(folder)}
    assert by_task["posters"].images[0].parent == release / "posters" / "images"
    assert by_task["color"].images[0].parent == release / "color"


def test_an_answer_without_its_prompt_is_not_guessed(folder, answers):
    del answers[3]["prompt"]
    with pytest.raises(BenchmarkError, match=r"answer 4 of .* as 2 questions have, but no 'prompt'"):
        scored(folder, answers)


def test_a_line_that_says_neither_yes_nor_no(copy, answers):
    file = copy / "MME_Benchmark_release_version" / "color" / "0000.txt"
    file.write_text("Is it red?\tperhaps\n")
    with pytest.raises(BenchmarkError, match=r"line 1 of .*0000.txt must be a question, a tab, and Yes or No, but is 'Is it red"):
        scored(copy, answers)


def test_a_question_without_a_pair(copy):
    lines = (copy / "llava_mme.jsonl").read_text().splitlines()
    (copy / "llava_mme.jsonl").write_text("\n".join(lines[1:]))
    questions = MME.questions(copy)
    with pytest.raises(BenchmarkError, match=r"existence/0000.png must have 2 questions in .*llava_mme.jsonl, but has 1"):
        MME.score(copy, questions, [None] * len(questions))


@pytest.mark.parametrize(
    ("text", "says"), [("The answer is yes", "yes"), ("know", "other"), ("Snow", "other"), ("\n\tNo", "no"), ("", "other")]
)
def test_lenient_reading(text, says):
    assert read_leniently(text) == says
