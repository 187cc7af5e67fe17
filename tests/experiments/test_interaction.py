"""What variants keep under perturbation, worked by hand."""

import json
import sys

import pytest

from moe_llava.evaluation.score.statistics import t_interval
from moe_llava.experiments.cells import ExperimentError
from moe_llava.experiments.interaction import MEAN, kept, main

AGAINST = {f"{variant}_{scale}": f"dense_{scale}" for scale in ("small", "large") for variant in ("dense", "split", "soft")}
SCALES = ("small", "large")


def result(cell, seed, clean, noise, typos):
    return {"cell": cell, "seed": seed, "unperturbed": clean, "perturbed": {"noise:3": noise, "typos:3": typos}}


def results():
    """Dense loses 0.3 under noise, and 0.1 under typos. Large split loses 0.2 under noise with seed 0, 0.1 with seed 1; everything else
    loses what dense does. Cells start from different accuracies."""
    found = []
    for seed in (0, 1):
        for scale, clean in (("small", 0.5), ("large", 0.8)):
            found.append(result(f"dense_{scale}", seed, clean, clean - 0.3, clean - 0.1))
            found.append(result(f"soft_{scale}", seed, clean + 0.1, clean - 0.2, clean))
            lost = 0.3 if scale == "small" else 0.2 - 0.1 * seed
            found.append(result(f"split_{scale}", seed, clean + 0.05, clean + 0.05 - lost, clean - 0.05))
    return found


def test_by_hand():
    rows = {(row.variant, row.perturbation): row for row in kept(AGAINST, results(), SCALES)}
    assert list(rows) == [(variant, name) for name in (MEAN, "noise:3", "typos:3") for variant in ("split", "soft")]
    noise = rows["split", "noise:3"]
    assert [scale.mean for scale in noise.scales] == pytest.approx([0, 0.15])
    assert noise.interaction.mean == pytest.approx(0.15)
    assert rows["split", MEAN].interaction.mean == pytest.approx(0.075)
    # Two seeds, 0.1 and 0.2; of four comparisons each interval misses with 1.25%. One degree of freedom: Cauchy's distribution.
    alone, adjusted = t_interval([0.1, 0.2]), noise.interaction
    assert (adjusted.high - adjusted.low) / (alone.high - alone.low) == pytest.approx(50.9232 / 12.7062, rel=1e-4)
    for variant, name in (("soft", "noise:3"), ("soft", MEAN), ("split", "typos:3")):
        row = rows[variant, name]
        assert [row.interaction.mean, *(scale.mean for scale in row.scales)] == pytest.approx([0, 0, 0])
        assert row.p == 1


def test_the_page(tmp_path, monkeypatch, capsys):
    cells = {name: {"against": None if other == "dense_small" else other} for name, other in AGAINST.items()}
    (tmp_path / "plan.json").write_text(json.dumps({"experiment": {"baseline": "dense_small", "cells": cells}}))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in results()))
    monkeypatch.setattr(sys, "argv", ["interaction", str(tmp_path), *SCALES])
    main()
    assert "| noise:3 | split | +0 (+0 to +0) | +0.15 (" in capsys.readouterr().out
    assert (tmp_path / "interaction.png").stat().st_size > 10_000
    assert "| typos:3 | soft |" in (tmp_path / "interaction.md").read_text()
    monkeypatch.setattr(sys, "argv", ["interaction", str(tmp_path), "small", "huge"])
    with pytest.raises(SystemExit):
        main()
    assert "error: no cell is called split_huge and compared with another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("against", "change", "message"),
    [
        (AGAINST, lambda found: found[:-1], r"cell split_large is complete with seeds \[0\], the first cell with \[0, 1\]"),
        (AGAINST, lambda found: [*found, found[2]], "have cell split_small with seed 0 twice: keep one line"),
        (AGAINST, lambda found: [*found, found[0] | {"cell": "old"}], "have a cell old, but the plan has only dense_small, "),
        (AGAINST, lambda found: [*found[:-1], found[-1] | {"perturbed": {}}], "split_large with seed 1 has other perturbations"),
        (AGAINST, lambda found: [each | {"perturbed": {}} for each in found], "has no perturbations: add `perturb`"),
        ({"dense_small": "dense_small", "a_small": "dense_small"}, None, "no cell is called a_large and compared with another"),
        ({"dense_small": "dense_small"}, None, "no cell is called VARIANT_small and compared with another: there are dense_small"),
    ],
)
def test_refusals(against, change, message):
    made = [result(cell, seed, 0.5, 0.4, 0.4) for cell in against for seed in (0, 1)] if change is None else change(results())
    with pytest.raises(ExperimentError, match=message):
        kept(against, made, SCALES)
