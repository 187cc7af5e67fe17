"""A running benchmark: finished cases are printed at once, and are kept when it is stopped."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe_llava.perf import running
from moe_llava.perf.measure import CutShort, Timings, compare
from moe_llava.perf.report import COLUMNS, print_case
from moe_llava.perf.running import Interrupted, show_cases
from tests.conftest import REPOSITORY
from tests.perf.test_measure import CPU

WIDE = {"median": 123456.0, "low": 1234.5, "high": 1234567.0}
NAMES = ("dense", "ours, grouped_mm, 64 experts", "transformers' Mixtral", "sparse, logits of all positions")


def console_of(width):
    return Console(file=io.StringIO(), width=width, force_terminal=False)


@pytest.mark.parametrize("width", [80, 100, 160, 400])
def test_no_word_is_broken_and_nothing_is_cut_off(width):
    """A case with every measurement that exists."""
    case = {"labels": {"TxDxF": "2048x256x704", "dtype": "bfloat16"}, "limit": "dense", "variants": {}}
    for name in NAMES:
        case["variants"][name] = dict.fromkeys(COLUMNS, WIDE)
    console = console_of(width)
    print_case(case, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in re.findall(r"[^\s┃│┏┓┡┩└┘━─┳╇┴]+", line)}
    expected = " ".join([*(name for name, *_ in COLUMNS.values()), *NAMES, "TxDxF 2048x256x704, dtype bfloat16", "(limit)"])
    assert set(expected.split()) <= words
    assert all(any(name in line for line in lines) for name in NAMES)
    if width == 400:
        assert sum(line.startswith("┏") for line in lines) == 1


def test_the_time_left_is_that_of_the_case_and_counts_down(monkeypatch):
    """Rounds of 40 seconds, the first after a minute of warm-up; a line each 30 seconds where there is no terminal."""
    clock = iter([0, 100, 140, 180, 220])
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = console_of(80)
    with show_cases({"bench": "layer", "conditions": {}, "rounds": 4, "cases": []}, 3, console) as cases:
        cases.begin({"size": "tiny"})
        for _ in range(4):
            cases(1)
    told = [line.removeprefix("case 1 of 3, ") for line in console.file.getvalue().splitlines() if line.startswith("case")]
    left = "about 0:0{} left of it".format
    assert told == ["round 2 of 4", f"round 3 of 4, {left('1:20')}", f"round 4 of 4, {left('0:40')}", "round 4 of 4"]


def interrupting(rounds):
    """Two variants, of which one is stopped in the round after `rounds`, in the middle of it."""
    calls = {"dense": 0, "sparse": 0}

    def call(name):
        calls[name] += 1
        if name == "sparse" and calls[name] > rounds:
            raise KeyboardInterrupt

    return {name: (lambda name=name: call(name)) for name in calls}


def test_only_complete_rounds_count(monkeypatch):
    monkeypatch.setattr("moe_llava.perf.measure.TURN", 0.0)
    with pytest.raises(CutShort) as stopped:
        compare(interrupting(1 + 3), 9, CPU, lambda number: None, warm_up=1)
    assert {name: len(one.seconds) for name, one in stopped.value.timings.items()} == {"dense": 3, "sparse": 3}
    with pytest.raises(KeyboardInterrupt) as stopped:
        compare(interrupting(1), 9, CPU, lambda number: None, warm_up=1)
    assert not isinstance(stopped.value, CutShort)


def test_what_was_measured_until_ctrl_c_is_in_the_report():
    report = {"bench": "layer", "conditions": {}, "rounds": 5, "cases": []}
    console = console_of(80)

    def measure():
        with show_cases(report, 4, console) as cases:
            cases.begin({"size": "small"})
            cases.end("dense", {"dense": {"seconds": WIDE}})
            assert "size small" in console.file.getvalue()  # at once
            cases.begin({"size": "large"})
            raise CutShort({"dense": Timings([1.0, 2.0], [1.0, 2.0]), "sparse": Timings([2.0, 6.0], [1.0, 2.0])})

    with pytest.raises(Interrupted, match="stopped in case 2 of 4") as stopped:
        measure()
    small, large = stopped.value.report["cases"]
    assert (small["labels"], large["labels"]) == ({"size": "small"}, {"size": "large", "rounds": 2})
    assert large["variants"]["sparse"]["ratio"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert "size large, rounds 2" in console.file.getvalue()


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """As a person presses it: the first case is printed, then the second, which would take minutes, is stopped."""
    file = tmp_path / "report.json"
    command = [Path(sys.executable).parent / "moe-llava", "bench", "layer", "--size", "16x8x16", "--size", "2048x512x2048", "--rounds", "7"]
    options = ["--dtype", "float32", "--phase", "forward", "--no-growth", "--json", file]
    environment = {**os.environ, "COLUMNS": "80"}
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    shown = []
    while not shown or not shown[-1].startswith("└"):
        shown.append(process.stdout.readline())
        assert shown[-1], process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    watchdog.cancel()
    assert process.returncode == 130, errors
    assert errors == "stopped in case 2 of 2\n"
    assert any("dense (limit)" in line for line in shown)
    assert json.loads(file.read_text())["cases"][0]["labels"]["TxDxF"] == "16x8x16"
