"""What Tab offers. That readline asks for it is tested with the verb."""

import readline

import pytest

from moe_llava.serving.chat.completion import Completer
from moe_llava.serving.chat.terminal import COMMANDS


@pytest.fixture
def rests(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name in ("images/one.png", "images/other.png", "images/a b.png", "images/.hidden.png", "ink.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Completer(readline, list(COMMANDS), ("/image", "/save")).rests


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/i", ["mage "]),
        ("/re", ["generate "]),
        ("/", [f"{name[1:]} " for name in COMMANDS]),
        ("/nothing", []),
        ("", []),
        ("i", []),
        ("where is i", []),
        ("/routes i", []),
        ("/image i", ["mages/", "nk.png"]),
        ("/save i", ["mages/", "nk.png"]),
        ("/image ", ["images/", "ink.png"]),
        ("/image images/", ["a b.png", "one.png", "other.png"]),
        ("/image images/o", ["ne.png", "ther.png"]),
        ("/image images/.", [".hidden.png"[1:]]),
        ("/image images/a b", [".png"]),
        ("/image 'images/a b", [".png"]),
        ("/image ink.png images/on", ["e.png"]),
        ("/image ~/im", ["ages/"]),
        ("/image ~nobody-is-called-so/i", []),
        ("/image none/i", []),
        ("/image ink.png/i", []),
    ],
)
def test_commands_and_files_are_completed(rests, line, expected):
    assert rests(line) == expected


def test_a_path_from_the_root(rests, tmp_path):
    assert rests(f"/image {tmp_path}/images/on") == ["e.png"]
    assert "tmp/" in rests("/image /")
