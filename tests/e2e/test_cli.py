"""The installed command, as a user types it."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from moe_llava import __version__
from tests.conftest import REPOSITORY, refused, run_command
from tests.training.conftest import tiny_base, write_recipe  # noqa: F401

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "sklearn")


@pytest.fixture(scope="module")
def sparse(tiny_base, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("cli") / "sparse"
    done = run_command("upcycle", tiny_base / "base", out, "--num-experts", "3", "--moe-layers", "1,3")
    assert done.returncode == 0, done.stderr
    assert "sparse layers [1, 3]" in done.stdout
    return out


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--help"], 0, "Convert dense vision-language models to sparse ones"),
        (["benchmarks"], 0, "pope: POPE"),
        (["train", "{folder}/none.yaml"], 2, "none.yaml does not exist"),
        (["train", "recipes/digits.yaml", "--set", "stage1.optimisation.max_step=2"], 2, "did you mean stage1.optimisation.max_steps?"),
        (["demo", "--set", "sed=1"], 2, "did you mean seed?"),
        (["params", "{folder}/none.yaml"], 2, "none.yaml does not exist"),
        (["params", "{folder}"], 2, "has no config.json"),
        (["chat", "{folder}", "hello"], 2, "has no config.json"),
        (["chat", "{folder}", " "], 2, "the prompt is empty"),
        (["serve", "{folder}"], 2, "has no config.json"),
        (["upcycle", "{folder}", "{folder}/out"], 2, "has no config.json"),
        (["check", "{folder}/none.json"], 2, "none.json does not exist"),
        (["check", "{folder}/none.json", "--model", "{folder}"], 2, "has no config.json"),
        (["evaluate", "{folder}", "--benchmark", "popp", "--data", ".", "--out", "{folder}/out"], 2, "did you mean pope?"),
        (["evaluate", "{folder}", "--benchmark", "pope", "--data", ".", "--out", "{folder}/out"], 2, "has no config.json"),
        (["--version"], 0, f"moe-llava {__version__}"),
        (["bench", "layer", "--size", "3x4"], 2, "--size is '3x4', but must be tokens, width and FFN width"),
        (["bench", "generate", "{folder}"], 2, "has no config.json"),
        (["score", "pope", "--data", "{folder}", "--answers", "none"], 2, "POPE needs in"),
        (["convert", "{folder}", "{folder}/out"], 2, "has no config.json"),
        (["convert", "{folder}/gone", "{folder}"], 2, "exists already"),
        (["merge", "{folder}", "{folder}/out"], 2, "is not a folder with adapter_config.json"),
        (["card", "{folder}"], 2, "has no config.json"),
        (["export", "{folder}", "{folder}/out"], 2, "has no config.json"),
        (["digits", "{folder}/out", "--train-images", "0"], 2, "--train-images"),
        (["ablate", "topk", "--set", "sed=1"], 2, "did you mean seed?"),
        (["ablate", "topk", "--benchmark", "popp"], 2, "did you mean pope?"),
        (["trial", "--margin", "0.1", "--set", "sed=1"], 2, "did you mean seed?"),
        (["trial", "--margin", "0.1", "--recipe", "{folder}/none.yaml"], 2, "none.yaml does not exist"),
        (["routes", "{folder}", "--data", ".", "--out", "{folder}/out"], 2, "has no config.json"),
        (["families", "lava"], 2, "no vision-language model of type 'lava'"),
        (["vllm", "{folder}"], 2, "has no config.json"),
        (["judge", "pope", "--data", ".", "--answers", "none", "--endpoint", "http://x", "--judge-model", "x"], 2, "pope"),
        (["table", "{folder}/none"], 2, "does not exist"),
        (["pope-questions", "{folder}/none", "{folder}/out"], 2, "none cannot be read"),
    ],
)
def test_help_and_mistakes_are_told_before_anything_heavy_is_loaded(arguments, status, told, tmp_path):
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    code = (
        f"import sys; sys.argv = ['moe-llava', *{arguments}]\n"
        "from moe_llava.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print('loaded', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == status, done.stderr
    assert told in (done.stderr if status else done.stdout)
    assert done.stdout.endswith("loaded []\n")
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_line(sparse, tiny_base, tmp_path):  # noqa: F811
    (tmp_path / "broken.png").write_text("no image")
    assert "broken.png, which cannot be decoded" in refused("chat", sparse, "--image", tmp_path / "broken.png", "hello")
    assert "none.png, which does not exist" in refused("chat", sparse, "--image", tmp_path / "none.png", "hello")
    assert "is not a folder" in refused("chat", tmp_path / "gone", "hello")
    assert "checkpoint runs/gone cannot be loaded" in refused("chat", "runs/gone", "hello")
    damaged = tmp_path / "damaged"
    shutil.copytree(sparse, damaged)
    (damaged / "model.safetensors").write_bytes((sparse / "model.safetensors").read_bytes()[:1000])
    done = run_command("chat", damaged, "hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: checkpoint \S+damaged cannot be loaded: .*\n", done.stderr)
    (damaged / "model.safetensors").unlink()
    assert "damaged cannot be loaded" in refused("chat", damaged, "hello")
    assert "exists already" in refused("upcycle", tiny_base / "base", sparse)
    assert "sparse already" in refused("upcycle", sparse, tmp_path / "twice")
    assert "num_experts_per_tok is 5, but must lie in 1..num_experts=4" in refused(
        "upcycle", tiny_base / "base", tmp_path / "out", "--num-experts-per-tok", "5"
    )
    assert "layer 9" in refused("upcycle", tiny_base / "base", tmp_path / "out", "--moe-layers", "0,9")
    assert not (tmp_path / "out").exists()


def test_train_and_its_errors(write_recipe, tmp_path):  # noqa: F811
    recipe = write_recipe()
    assert "none.json does not exist" in refused("train", recipe, "--set", "stage1.data.file=none.json")
    done = run_command("train", recipe, "--stage", "1", "--set", "stage1.optimisation.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "stage1 2/2 loss" in done.stdout
    assert "trains projector" in done.stdout
    assert "continue with --resume" in refused("train", recipe, "--stage", "1")
    assert "was made with stage1.optimisation.max_steps 2, now 3" in refused("train", recipe, "--stage", "1", "--resume")
    settings = ["--set", "stage1.optimisation.max_steps=2", "--set", "stage2.optimisation.max_steps=1"]
    again = run_command("train", recipe, "--stage", "1", "--stage", "2", "--resume", *settings)
    assert again.returncode == 0, again.stderr
    assert "stage1 2/2" not in again.stdout
    assert "stage1: finished, kept" in again.stdout
    assert "stage2 1/1 loss" in again.stdout
    assert (tmp_path / "run" / "stage2" / "config.json").is_file()


SMALL = [
    argument
    for stage in (1, 2, 3)
    for key, value in (("max_steps", 2), ("batch_size", 8), ("per_device_batch_size", 8))
    for argument in ("--set", f"stage{stage}.optimisation.{key}={value}")
] + ["--set", "logging_steps=1"]


def test_demo_in_small(tmp_path):
    """The whole chain in seconds; the numbers mean nothing, the files must be there and a second run must reuse them."""
    out = tmp_path / "demo"
    command = ["demo", "--out", out, "--train-images", "20", "--test-images", "4", *SMALL]
    first = run_command(*command)
    assert first.returncode == 0, first.stderr
    results = json.loads((out / "results.json").read_text())
    assert set(results["accuracy"]) == {"stage1", "stage2", "dense", "sparse"}
    for scores in results["accuracy"].values():
        assert set(scores["all"]) == {"mean", "low", "high", "n"}
    assert results["parameters"]["active"] < results["parameters"]["total"]
    assert set(results["seconds"]) == {"stage1", "stage2", "dense", "sparse"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/svg") >= 4
    assert re.findall(r"(?:src|href)=\"(?!data:)([^\"]*)", page) == ["routes/index.html"]  # it needs nothing, and leads to one page
    assert (out / "routes" / "index.html").is_file()
    assert f"chat {out / 'stage3'}" in first.stdout
    assert "stage1 2/2 loss" in first.stdout
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    answers = (out / "answers" / "sparse" / "digits" / "answers.jsonl").read_text()
    second = run_command(*command)
    assert second.returncode == 0, second.stderr
    assert "stage1 2/2 loss" not in second.stdout
    assert "holds 20 and 4 pictures, not 30 and 4" in refused("demo", "--out", out, "--train-images", "30", *SMALL)
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert answers == (out / "answers" / "sparse" / "digits" / "answers.jsonl").read_text()
    shutil.rmtree(out)
