"""What holds of every benchmark."""

import json

import pytest

from moe_llava.evaluation.benchmark import NAMES, BenchmarkError, find_benchmark, find_folder
from tests.conftest import run_command


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_a_benchmark_says_what_it_needs(name, tmp_path):
    benchmark = find_benchmark(name)
    assert benchmark.name == name
    assert benchmark.files
    assert benchmark.headline
    assert benchmark.score or benchmark.judge or benchmark.upload
    with pytest.raises(BenchmarkError, match=f"needs in .*{benchmark.folder} there"):
        find_folder(benchmark, tmp_path)


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
