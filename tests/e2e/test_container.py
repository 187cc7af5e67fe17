"""The Dockerfile, as far as it can be tried without Docker: what it copies is there, what it starts is understood."""

import json
import re
import subprocess
import sys

from moe_llava.serving.engine.engine import Engine
from tests.conftest import REPOSITORY, refused
from tests.serving.conftest import served, server  # noqa: F401
from tests.training.conftest import tiny_base  # noqa: F401

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")


def words_of(instruction):
    """The words of the one that is written as a list, as Docker takes them."""
    return json.loads(re.search(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])


def test_what_is_copied_is_there_and_not_ignored():
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY ([^-].*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in copied)


def test_its_command_is_the_server_s():
    command, *arguments = [*words_of("ENTRYPOINT"), *words_of("CMD")]
    assert command == "moe-llava"
    told = refused(*arguments)
    assert "/model" in told  # no option is unknown: what is missing is the checkpoint


def test_its_health_check_tells_a_server_from_none(served):  # noqa: F811
    program, *words, code = words_of("HEALTHCHECK.*\n *CMD")
    assert (program, words) == ("python", ["-c"])
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor) as url:
        here = code.replace("http://127.0.0.1:8000", url)
        assert here != code
        assert subprocess.run([sys.executable, "-c", here], timeout=60).returncode == 0
    assert subprocess.run([sys.executable, "-c", here], capture_output=True, timeout=60).returncode == 1
