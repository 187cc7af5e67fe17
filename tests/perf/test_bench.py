"""The verb, on tiny models."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.perf.generate import models_of, write
from moe_llava.perf.loading import IMPORT, READ
from moe_llava.perf.pairs import DENSE, SPARSE
from tests.conftest import REPOSITORY, refused, run_here
from tests.training.conftest import tiny_base  # noqa: F401


@pytest.fixture(scope="module")
def sparse(tiny_base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("bench") / "sparse"
    dense, processor = load_checkpoint(tiny_base / "base")
    upcycle(dense).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "labels", "variants"),
    [
        (["layer", "--size", "16x8x16", "--phase", "forward", "--no-growth"], {"TxDxF": "16x8x16"}, {"dense", "ours", "ours, grouped_mm"}),
        (["model", "--size", "tiny"], {"size": "tiny", "rows": 2, "tokens": 48}, {"dense", "sparse"}),
    ],
)
def test_a_report_has_conditions_and_ratios(arguments, labels, variants, tmp_path):
    file = tmp_path / "report.json"
    done = run_here("bench", *arguments, "--dtype", "float32", "--rounds", "2", "--json", file)
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    assert (report["bench"], report["rounds"]) == (arguments[0], 2)
    assert report["conditions"]["dtype"] == "float32"
    (case,) = report["cases"]
    assert case["labels"].items() >= labels.items()
    assert case["variants"].keys() >= variants
    for one in case["variants"].values():
        assert 0 < one["ratio"]["low"] <= one["ratio"]["median"] <= one["ratio"]["high"]
    assert "dense (limit)" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout


def test_generation_of_a_checkpoint(sparse, tmp_path):
    file = tmp_path / "report.json"
    done = run_here(
        "bench", "generate", sparse, "--rows", "1", "--rows", "3", "--new-tokens", "2", "--rounds", "1", "--compile", "--json", file
    )
    assert done.exit_code == 0, done.output
    cases = json.loads(file.read_text())["cases"]
    assert [case["labels"]["rows"] for case in cases] == [1, 3]
    for rows, case in zip((1, 3), cases, strict=True):
        assert case["variants"].keys() == {"dense", "dense, static cache", "sparse", "sparse, static cache"}
        for one in case["variants"].values():
            assert one["tokens_per_second"]["median"] == pytest.approx(rows * 2 / one["seconds"]["median"])


def test_a_checkpoint_is_what_generates(sparse):
    models, prompts = models_of(str(sparse), "tiny", torch.float32, torch.device("cpu"))
    expected, _ = load_checkpoint(sparse)
    prompt = prompts[SPARSE](2)
    assert torch.equal(write(models[SPARSE], prompt, 5, {}), write(expected, prompt, 5, {}))
    static = write(models[SPARSE], prompt, 5, {"cache_implementation": "static"})
    assert torch.equal(static, write(models[SPARSE], prompt, 5, {}))
    assert write(models[DENSE], prompts[DENSE](2), 5, {}).shape == (2, 5)


def test_mistakes_are_reported(tiny_base, tmp_path):  # noqa: F811
    assert "--size is 'tinny', but must be one of tiny, digits" in refused("bench", "train", "--size", "tinny")
    assert "both widths must be multiples of 8" in refused("bench", "layer", "--size", "65x33x48")
    assert "a checkpoint has its own size" in refused("bench", "generate", tiny_base / "base", "--size", "tiny")
    assert "--keep is 1.5, but must be above 0 and at most 1" in refused("bench", "offload", "--keep", "1.5")
    assert "--dtype is 'int8', but must be one of float32" in refused("bench", "model", "--dtype", "int8")
    assert "must name a file in a folder that exists" in refused("bench", "model", "--json", tmp_path / "none" / "report.json")
    assert "is a LlavaForConditionalGeneration, but the benchmark compares a sparse" in refused("bench", "generate", tiny_base / "base")
    assert "but it needs 1 and 37: an image takes 36" in refused("bench", "model", "--size", "tiny", "--tokens", "36")


@pytest.mark.slow
def test_loading(sparse, tmp_path):
    file = tmp_path / "report.json"
    done = run_here("bench", "load", sparse, "--rounds", "1", "--json", file)
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    assert [case["limit"] for case in report["cases"]] == [READ, IMPORT]
    memory = report["memory"]
    assert memory["weights"] == (sparse / "model.safetensors").stat().st_size
    assert memory["ratio"] == (memory["peak"] - memory["baseline"]) / memory["weights"]
    assert 0 < memory["baseline"] < memory["peak"]


@pytest.mark.slow
def test_all_that_needs_a_gpu_runs_in_small_without(tmp_path):
    """Among it the training steps, whose memory is measured in processes of their own."""
    command = [REPOSITORY / "benchmarks" / "gpu.sh", tmp_path / "out", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    reports = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").iterdir()}
    assert reports.keys() == {"layer", "check", "fine", "crossing", "train", "prompt", "decode", "compiled"}
    (trained,) = reports["train"]["cases"]
    assert all(one["memory"] > 0 for one in trained["variants"].values())


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    fails = tmp_path / "python"
    fails.write_text('#!/bin/sh\n[ "$4" = train ] && exit 3\necho "{}" > "$(echo "$@" | sed "s/.*--json //")"\n')
    fails.chmod(0o755)
    command = [REPOSITORY / "benchmarks" / "gpu.sh", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHON": str(fails)})
    assert done.returncode == 1
    assert done.stderr == "failed: train (status 3) families (status 3)\n"
    assert {file.stem for file in (tmp_path / "out").iterdir()} == {"layer", "check", "fine", "crossing", "prompt", "decode", "compiled"}
