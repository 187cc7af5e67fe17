"""What is measured of experts that know something, and of experts that know nothing."""

import json
import sys

import numpy as np
import pytest
import torch

from moe_llava import upcycle
from moe_llava.digits.scenes import STANDARD
from moe_llava.experiments import learned
from moe_llava.experiments.learned import LABELS, explained, label, scenes_of
from moe_llava.routing.tokens import IMAGE
from moe_llava.routing.trace import trace_records
from tests.serving.conftest import model_of, served  # noqa: F401
from tests.training.conftest import tiny_base  # noqa: F401


@pytest.fixture
def traced(served, tmp_path):  # noqa: F811
    """(scenes, records, traces) of a random sparse model"""
    scenes, records = scenes_of(12, STANDARD, tmp_path)
    model = model_of("llama", True, served[1])
    traces = [trace for batch in trace_records(model, served[1], records, 5) for trace in batch.split()]
    return scenes, records, traces


def test_labels_are_those_of_the_scenes(traced):
    """A patch has the digit and the colour of its cell; a word the family of its question."""
    scenes, records, traces = traced
    families = [record.extra["family"] for record in records]
    found = label(traces, scenes, families)
    assert tuple(found) == LABELS
    kinds_T = torch.cat([trace.kinds_T for trace in traces])
    assert (kinds_T[found["modality"].tokens] == IMAGE).sum() == 12 * 36
    assert len(found["occupied"].tokens) == 12 * 36
    items = [item for scene in scenes for item in scene.items]
    assert len(found["digit"].tokens) == len(found["colour"].tokens) == 4 * len(items)
    digits = sorted({item.digit for item in items})
    assert [digits[value] for value in found["digit"].values] == [item.digit for item in items]
    # The first patch of a digit: its place in the picture, and that of its cell.
    start = np.cumsum([0, *(len(trace.kinds_T) for trace in traces)])
    for number, item in enumerate(scenes[3].items, start=sum(len(scene.items) for scene in scenes[:3])):
        tokens = found["digit"].tokens[found["digit"].units == number] - start[3]
        assert sorted(map(tuple, traces[3].places_T3[tokens][:, 1:].tolist())) == [
            (2 * item.row + row, 2 * item.column + column) for row in (0, 1) for column in (0, 1)
        ]
    names = sorted(set(families))
    assert [names[value] for value in found["family"].values] == families


def test_modalities_are_permuted_within_a_conversation(traced):
    scenes, records, traces = traced
    modality = label(traces, scenes, [record.extra["family"] for record in records])["modality"]
    permuted = modality.permuted(np.random.default_rng(0))
    assert (permuted != modality.values).any()
    for row in range(len(traces)):
        here = modality.groups == row
        assert sorted(permuted[here]) == sorted(modality.values[here])


def test_the_measure():
    """An expert for each label explains all of it, experts drawn at random explain nothing but what few tokens have by chance."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 20_000)
    assert explained(labels, labels) == pytest.approx(1)
    assert explained(labels // 2, labels) == pytest.approx(0.5, abs=0.01)
    assert explained(rng.integers(0, 4, 20_000), labels) < 0.001
    assert explained(labels, np.zeros(20_000, int)) == 0
    assert explained(rng.integers(0, 4, 40), labels[:40]) > 0.02


def test_the_command(served, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Experts of one modality each explain modalities entirely."""
    _, processor, _ = served
    split = upcycle(model_of("llama", False, processor), num_experts=4, routing="modality_split")
    models = {"random": model_of("llama", True, processor), "split": split}
    monkeypatch.setattr(learned, "load_checkpoint", lambda name: (models[name], processor))
    arguments = ["learned", str(tmp_path / "out"), "0=random", "10=split", "10=split", "--scenes", "8", "--permutations", "19"]
    monkeypatch.setattr(sys, "argv", arguments)
    learned.main()
    found = json.loads((tmp_path / "out" / "learned.json").read_text())
    assert {step: len(seeds) for step, seeds in found.items()} == {"0": 1, "10": 2}
    layers = {one["layer"] for one in found["0"][0]}
    assert len(found["0"][0]) == len(LABELS) * len(layers)
    assert all(0.05 <= one["p"] <= 1 and 0 <= one["found"] <= 1 for one in found["0"][0])
    for seed in found["10"]:
        assert [(one["found"], one["p"]) for one in seed if one["label"] == "modality"] == [(pytest.approx(1), 0.05)] * len(layers)
    assert "| modality | 0 | 1.000 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "learned.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["learned", str(tmp_path / "out"), "stage3"])
    with pytest.raises(SystemExit):
        learned.main()
    assert "stage3 must be STEP=CHECKPOINT" in capsys.readouterr().err
