"""Help and completion: groups of verbs, examples that parse, names that a shell completes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from moe_llava.cli import app
from tests.conftest import run_here

ROOT = typer.main.get_command(app)
EXAMPLES = [
    line.strip()
    for command in ROOT.commands.values()
    for line in (command.epilog or "").splitlines()
    if line.strip().startswith("moe-llava ")
]


def test_every_verb_is_in_a_group():
    found = run_here("--help").output
    headings = [line for line in found.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options:", "Use a model:", "Convert:", "Train:", "Evaluate:"]
    assert all(f"  {name} " in found for name in ROOT.commands)


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_parse(line):
    """Every option and argument is known, and of its type; nothing runs."""
    _, name, *arguments = shlex.split(line)
    command = ROOT.commands[name]
    assert not isinstance(command, TyperGroup)
    command.make_context(name, arguments)


def test_help_shows_the_examples():
    assert "Example:\n    moe-llava upcycle runs/demo/stage2 runs/sparse --num-experts 4" in run_here("upcycle", "--help").output


def test_a_shell_completes_verbs():
    variables = {"_MOE_LLAVA_COMPLETE": "complete_bash", "COMP_WORDS": "moe-llava up", "COMP_CWORD": "1"}
    command = Path(sys.executable).parent / "moe-llava"
    done = subprocess.run([str(command)], env=os.environ | variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["upcycle"]
