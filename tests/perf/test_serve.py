"""The benchmark of a server under load, in small."""

import json

import pytest

from moe_llava.perf import serve
from moe_llava.perf.options import BenchError
from tests.conftest import run_here
from tests.training.conftest import tiny_base  # noqa: F401


def test_it_measures_a_server(tiny_base, tmp_path):  # noqa: F811
    sizes = ["--clients", "2", "--rounds", "1", "--questions", "4"]
    done = run_here("bench", "serve", tiny_base / "base", *sizes, "--json", tmp_path / "load.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["conditions"]["dtype"] == "float32"
    for name, questions in (("short answers", 4), ("long answers", 2)):
        found = report["workloads"][name]
        assert found["questions_per_round"] == questions
        assert found["ratio"]["low"] > 0
        for way in ("alone", "together"):
            one = found[way]
            # Of one round, so that the median is the round's own.
            expected = one["requests_per_second"]["median"] * one["tokens_per_answer"]
            assert one["tokens_per_second"]["median"] == pytest.approx(expected)
            assert 0 < one["first_token_ms"]["median"] <= one["first_token_ms"]["p99"]
        assert found["alone"]["tokens_per_answer"] == found["together"]["tokens_per_answer"]
        rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in done.stdout.splitlines()]
        assert [name, "2 at once", f"{found['together']['requests_per_second']['median']:.1f}"] in rows


def test_another_answer_when_batching_ends_it():
    alone, together = ([serve.Reply(text, 2, [0.1, 0.2])] for text in ("red", "blue"))
    with pytest.raises(BenchError, match="1 of 1 answers depend on batching, such as 'red' and 'blue'"):
        serve.check_same("short answers", serve.Pass(1, 1, 1, alone), serve.Pass(1, 1, 1, together))


def test_a_server_that_does_not_start_is_reported(tmp_path):
    with pytest.raises(BenchError, match="did not start: it ended with status 2"), serve.server(str(tmp_path), 2):
        pass
