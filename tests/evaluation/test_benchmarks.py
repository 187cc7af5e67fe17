"""What holds of every benchmark."""

import json

import pytest

from moe_llava.evaluation.benchmark import NAMES, BenchmarkError, find_benchmark, find_folder
from tests.conftest import REPOSITORY, run_command


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_a_benchmark_says_what_it_needs(name, tmp_path):
    benchmark = find_benchmark(name)
    assert benchmark.name == name
    assert benchmark.files
    assert benchmark.headline
    assert benchmark.score or benchmark.judge or benchmark.upload
    with pytest.raises(BenchmarkError, match=f"needs in .*{benchmark.folder} there"):
        find_folder(benchmark, tmp_path)


@pytest.mark.parametrize("name", NAMES)
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


def test_an_unknown_name():
    with pytest.raises(BenchmarkError, match="did you mean textvqa"):
        find_benchmark("text-vqa")


@pytest.mark.parametrize("name", ["pope", "textvqa", "scienceqa", "mme"])
def test_the_command_on_recorded_answers(golden, name):
    folder = find_folder(find_benchmark(name), golden / "eval")
    answers = folder / "answers" / "fixture-model.jsonl"
    found = run_command("score", name, "--data", golden / "eval", "--answers", answers, "--json")
    assert found.returncode == 0, found.stderr
    scores = json.loads(found.stdout)
    assert scores["benchmark"] == name
    assert set(find_benchmark(name).headline) <= scores["scores"].keys()
    for score, value in scores["scores"].items():
        low, high = scores["intervals"][score]
        assert low <= high
        assert isinstance(value, float)
