"""The commands and the Python of the documents are run, in small, in the order in which they are written: those of the README first, then
those of the pages that build on it, in two parts, which two cores can run side by side."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from moe_llava.cli import app
from moe_llava.cli.bench import bench
from moe_llava.evaluation.score.benchmark import NAMES
from tests.checkpoints import tiny_published
from tests.checkpoints.tiny_tokenizers import write_phi
from tests.conftest import REPOSITORY
from tests.e2e.test_cli import SMALL

README = "README.md"
COMMANDS = "docs/commands.md"
EXTRAS = set(metadata("moe-llava").get_all("Provides-Extra")) - {"dev", "docs"}
PARTS = {
    "training": ("tutorial", "training", "data", "adapters", "preferences", "digits", "checkpoints", "variants"),
    "evaluation": ("evaluation", "robustness", "routing", "experiments", "serving", "performance", "customising"),
}
# What makes each command small enough for a test; "make" targets stand for the command behind them.
SMALLER = {
    "demo": ["--train-images", "20", "--test-images", "4", *SMALL],
    "ablate": ["--train-images", "20", "--test-images", "4", *SMALL],
    "digits": ["--train-images", "20", "--test-images", "4"],
    "train": SMALL,
    "torchrun": [
        argument
        for key, value in (("max_steps", 2), ("batch_size", 8), ("per_device_batch_size", 4))
        for argument in ("--set", f"stage1.optimisation.{key}={value}")
    ],
    "bench": ["--rounds", "1"],
    "chat": ["--max-new-tokens", "4"],
    "check": [],
    "convert": [],
    "evaluate": ["--limit", "5"],
    "merge": [],
    "params": [],
    "routes": ["--limit", "12"],
    "sbatch": [],
    "tower": ["--steps", "2"],
    "language-model": ["--steps", "2"],
}


def blocks(part: str, language: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block of `language` in the README and a part of the pages."""
    found = []
    for name in [README, *(f"docs/{name}.md" for name in PARTS[part])]:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        found += [(name, block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


def commands(part: str) -> list[tuple[str, list[str]]]:
    lines = [(name, line.split("#")[0].strip()) for name, block in blocks(part, "sh") for line in block.splitlines()]
    return [(name, shlex.split(line)) for name, line in lines if line]


def runnable(words: list[str]) -> list[str] | None:
    """The command of a document as it is run here; None for `make test`, which runs this."""
    words = ["moe-llava", "demo"] if words == ["make", "demo"] else words
    if words == ["make", "test"]:
        return None
    program, *arguments = words
    if "=" in program:
        return ["env", program, *(runnable(arguments) or [])]
    if program in ("cp", "mkdir"):
        return words
    folder = Path(sys.executable).parent
    verb = arguments[2] if program == "python" else program if program == "torchrun" else arguments[0]
    verb = "evaluate" if "evaluate" in arguments else verb
    arguments = [str(folder / word) if word == "moe-llava" else word for word in arguments]
    return [str(folder / Path(program).name), *arguments, *SMALLER[verb]]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_documented_commands_and_python_run(tmp_path, part):
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    towers = tiny_published.write_towers(tmp_path / "towers")
    settings = tiny_published.settings_of("qwen1_5", vocab_size=520)
    write_phi(tiny_published.write_published(tmp_path / "published", settings, tiny_published.weights_of(settings, towers)), fast=True)
    ran = 0
    for name, words in commands(part):
        command = runnable(words)
        if command is None:
            continue
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{name}: {shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 6
    scripts = blocks(part, "python")
    assert scripts
    for name, script in scripts:
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{name}:\n{script}\n{done.stderr}"


@pytest.mark.slow
def test_the_notebook_runs():
    notebook = nbformat.read(REPOSITORY / "docs" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 2  # the scene, and its routes


EVERY_PAGE = sorted(str(file.relative_to(REPOSITORY)) for file in REPOSITORY.glob("docs/**/*.md"))


@pytest.mark.parametrize("name", [README, "CONTRIBUTING.md", *EVERY_PAGE])
def test_links_lead_somewhere(name):
    file = REPOSITORY / name
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


def test_a_page_lists_every_benchmark_command_and_extra():
    """What it says of the paper's table is counted."""
    text = (REPOSITORY / COMMANDS).read_text(encoding="utf-8")
    beyond = {"mmbench-cn", "seed-bench", "mmmu", "digits", "digits-options", "questions"}
    assert len(set(NAMES) - beyond) == 10
    ten = "The ten benchmarks of the paper's tables"
    assert f"{ten}, and MMBench-CN, SEED-Bench, MMMU, the digits in two ways, and your own questions" in text
    listed = re.findall(r"^\| `moe-llava ([\w-]+)", text, re.MULTILINE)
    verbs = {(command.name or command.callback.__name__).replace("_", "-") for command in app.registered_commands}
    assert sorted(listed) == sorted((verbs | {"bench"}) - {"benchmarks"})  # which is named where its list is needed
    assert "`moe-llava benchmarks`" in text
    measured = set(re.findall(r"`(\w+)`", re.search(r"^\| `moe-llava bench layer` (.*)", text, re.MULTILINE)[1]))
    assert measured | {"layer"} == {command.callback.__name__ for command in bench.registered_commands}
    assert set(re.findall(r"^\| `pip install -e '\.\[(\w+)\]'`", text, re.MULTILINE)) == EXTRAS
    assert f"]({COMMANDS})" in (REPOSITORY / README).read_text(encoding="utf-8")


def test_what_is_to_be_installed_is_installed_from_a_checkout():
    """The package is in no index."""
    texts = [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / README, *(REPOSITORY / "moe_llava").rglob("*.py")]
    assert [str(file) for file in texts if re.search(r"pip install\b.*moe-llava\[", file.read_text(encoding="utf-8"))] == []
    named = {name for file in texts for name in re.findall(r"pip install -e '\.\[(\w+)\]'", file.read_text(encoding="utf-8"))}
    assert named == EXTRAS
