"""Variants are measured side by side."""

import pytest
import torch

from moe_llava.perf import measure
from moe_llava.perf.measure import Timings, begin_peak, compare, conditions, peak_memory, spread, summary

CPU = torch.device("cpu")


def test_variants_take_turns_and_the_order_alternates(monkeypatch):
    monkeypatch.setattr(measure, "TURN", 0.0)
    called, rounds = [], []
    variants = {name: lambda name=name: called.append(name) for name in "abc"}
    timings = compare(variants, 3, CPU, rounds.append, warm_up=2)
    assert "".join(called) == "aabbcc" + "abc" + "cba" + "abc"
    assert rounds == [1, 1, 1]
    assert {name: (len(one.seconds), len(one.processor)) for name, one in timings.items()} == dict.fromkeys("abc", (3, 3))


def test_a_quick_call_is_repeated_within_its_turn(monkeypatch):
    called = []
    monkeypatch.setattr(measure, "_turn", lambda call, repeats, device: (called.append(repeats), (0.004, 0.002))[1])
    assert compare({"a": lambda: None}, 2, CPU, lambda number: None) == {"a": Timings([0.004, 0.004], [0.002, 0.002])}
    assert called == [1, 5, 5]  # so that a turn takes 0.02 seconds


def test_ratios_are_of_the_same_round():
    timings = {"limit": Timings([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]), "ours": Timings([2.0, 3.0, 4.0], [3.0, 2.0, 1.0])}
    told = summary(timings, "limit", CPU)
    assert told["ours"]["seconds"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert told["ours"]["ratio"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert told["ours"]["processor_ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert told["limit"]["ratio"] == spread([1.0])


def test_conditions_say_what_a_number_depends_on():
    told = conditions(CPU, "float32", ("rich",))
    assert told.keys() - {"deepspeed"} == {
        *("date", "machine", "gpu", "load_average", "threads", "omp_wait_policy", "dtype"),
        *("python", "moe_llava", "torch", "transformers", "rich"),
    }
    assert (told["threads"], told["dtype"], told["gpu"]) == (torch.get_num_threads(), "float32", "none")


def test_a_peak_is_of_what_was_held_since_it_began():
    before = begin_peak(CPU)
    held = torch.ones(16_000_000)
    assert peak_memory(CPU) - before == pytest.approx(64e6, rel=0.1)
    del held
    assert begin_peak(CPU) - before < 32e6
