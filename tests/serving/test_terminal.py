"""How an answer is drawn while it grows. What is typed on a terminal is tested with the verb."""

import io

from rich.console import Console

from moe_llava.serving.chat.terminal import Tail


def drawn(text, height=6):
    console = Console(file=io.StringIO(), width=30, height=height, force_terminal=True, color_system=None)
    answer = Tail()
    answer.text = text
    console.print(answer, end="")
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_end_is_shown_as_far_as_there_is_room():
    lines = [f"- point {number}" for number in range(20)]
    assert drawn("\n".join(lines)) == [f" • point {number}" for number in range(15, 20)]
    assert drawn("one\n\ntwo") == ["one", "", "two"]
    assert drawn("") == []


def test_an_answer_cannot_control_the_terminal():
    assert drawn("a \x1b[31mred\x1b]0;title\x07 **7**\x08") == ["a [31mred]0;title 7"]
