"""The benchmark of a server under load, in small."""

import json
import shutil
from io import StringIO

import pytest
from rich.console import Console
from transformers import GenerationConfig

from moe_llava.perf import serve
from moe_llava.perf.options import BenchError
from tests.conftest import run_here
from tests.training.conftest import tiny_base  # noqa: F401


@pytest.mark.slow
def test_it_measures_a_server(tiny_base, tmp_path):  # noqa: F811
    sizes = ["--clients", "2", "--rounds", "1", "--questions", "4"]
    done = run_here("bench", "serve", tiny_base / "base", *sizes, "--json", tmp_path / "load.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["conditions"]["dtype"] == "float32"
    expected_ways = {
        "short answers": [(1, False), (2, False)],
        "64 tokens": [(1, False), (2, False)],
        "shared images": [(2, False), (2, True)],
    }
    assert report["workloads"].keys() == expected_ways.keys()
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in done.stdout.splitlines()]
    for name, found in report["workloads"].items():
        assert found["questions_per_round"] == (1 if name == "64 tokens" else 4)
        assert found["ratio"]["low"] > 0
        assert [(way["clients"], way["prefix_cache"]) for way in found["ways"]] == expected_ways[name]
        for way in found["ways"]:
            # Of one round, so that the median is the round's own.
            expected = way["requests_per_second"]["median"] * way["tokens_per_answer"]
            assert way["tokens_per_second"]["median"] == pytest.approx(expected)
            assert 0 < way["first_token_ms"]["median"] <= way["first_token_ms"]["p99"]
            assert way["tokens_per_answer"] == (64 if name == "64 tokens" else found["ways"][0]["tokens_per_answer"])
            labels = [name, str(way["clients"]), "yes" if way["prefix_cache"] else "no"]
            assert [*labels, f"{way['requests_per_second']['median']:.1f}"] in rows
    narrow = Console(width=80, file=StringIO())
    serve.print_serving(report, narrow)
    assert narrow.file.getvalue().count("┏") == 1  # one table, not parts of one


def test_an_endless_model_of_a_checkpoint_without_settings_of_generation(tiny_base, tmp_path):  # noqa: F811
    """Its end token is that of the language model's configuration."""
    base = shutil.copytree(tiny_base / "base", tmp_path / "base")
    (base / "generation_config.json").unlink()
    endless = serve.without_end(str(base), tmp_path / "endless")
    assert GenerationConfig.from_pretrained(endless).suppress_tokens == [2]
    assert (endless / "config.json").samefile(base / "config.json")
    assert not (base / "generation_config.json").exists()


def test_another_answer_when_batching_ends_it():
    alone, together = ([serve.Reply(text, 2, [0.1, 0.2])] for text in ("red", "blue"))
    with pytest.raises(BenchError, match="1 of 1 answers depend on how they are asked, such as 'red' and 'blue'"):
        serve.check_same("short answers", serve.Pass(1, 1, 1, alone), serve.Pass(1, 1, 1, together))


def test_a_server_that_does_not_start_is_reported(tmp_path):
    with pytest.raises(BenchError, match="did not start: it ended with status 2"), serve.server(str(tmp_path), 2):
        pass
