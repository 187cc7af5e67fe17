"""The headline: what is decided before the first run, jobs, and the report."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import CLIPVisionModel, LlamaForCausalLM

from moe_llava.common.files import file_digest, read_lines
from moe_llava.digits import RECIPE
from moe_llava.digits.pretrain import language_model_config, tower_config
from moe_llava.digits.scenes import HARD
from moe_llava.evaluation.score.statistics import detectable_difference, ratio_interval, t_interval
from moe_llava.experiments import headline
from moe_llava.experiments.cells import ExperimentError
from moe_llava.experiments.headline import CELLS, gap, run_headline
from moe_llava.experiments.plan import Setup
from moe_llava.training import run
from moe_llava.training.recipe import RecipeError
from tests.conftest import run_here
from tests.experiments.conftest import QUIET

TINY = ["precision=fp32", "logging_steps=1", "save_steps=2"]
for number in (1, 2, 3):
    sizes = {"batch_size": 4, "per_device_batch_size": 4, "max_steps": 2}
    TINY += [f"stage{number}.optimisation.{key}={value}" for key, value in sizes.items()]


def write_parts(out, small=96):
    """Save untrained parts of the real sizes."""
    torch.manual_seed(0)
    parts = {
        "tower": CLIPVisionModel(tower_config(HARD).vision_config),
        "small": LlamaForCausalLM(language_model_config(small, HARD)),
        "large": LlamaForCausalLM(language_model_config(level=HARD)),
    }
    for name, model in parts.items():
        model.save_pretrained(out / "parts" / name)
        (out / "parts" / name / "pretraining.json").write_text("{}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete headline of two seeds, one cell of it run as a job: (setup, report). Tests leave it as it is."""
    setup = Setup(tmp_path_factory.mktemp("headline") / "out", RECIPE, TINY, 2, images=(None, 3))
    write_parts(setup.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "plot_run", lambda entries: Figure(figsize=(1, 1)))  # drawing the losses takes longer than training
        assert run_headline(setup, 0.3, 0.01, QUIET, ("dense_large", 1)) is None
        assert [(line["cell"], line["seed"]) for line in read_lines(setup.out / "results.jsonl")] == [("dense_large", 1)]
        return setup, run_headline(setup, 0.3, 0.01, QUIET)


@pytest.mark.slow
def test_the_report_has_what_was_decided_and_what_was_found(finished):
    setup, report = finished
    text, plan = report.read_text(), json.loads((setup.out / "plan.json").read_text())
    assert 2 <= plan["active_ratio"] <= 2.5
    assert plan["detectable_difference"] == pytest.approx(detectable_difference(0.01 * 2**0.5, 2, 0.8))
    results = read_lines(setup.out / "results.jsonl")
    assert [(result["cell"], result["seed"]) for result in results] == [(cell, seed) for cell in CELLS for seed in (0, 1)]
    for part in (file_digest(setup.out / "plan.json"), "895,680", "1,874,880", "--headline --seed-sd 0.01 --margin 0.3", "existence F1"):
        assert part in text, part
    for picture in ("headline", "scores"):
        assert f"({picture}.png)" in text
        assert (setup.out / f"{picture}.png").stat().st_size > 10_000
    assert run_headline(setup, 0.3, 0.01, QUIET).read_text() == text
    with pytest.raises(ExperimentError, match=r"seed_sd 0.01, now 0.02; detectable_difference"):
        run_headline(setup, 0.3, 0.02, QUIET)


@pytest.mark.slow
def test_small_cells_share_their_stages_and_no_record_is_taken_twice(finished):
    setup, _ = finished
    homes = {cell: (setup.out / "cells" / cell / "seed-0" / "stage2").resolve() for cell in CELLS}
    assert homes["dense_small"] == homes["sparse_small"] != homes["dense_large"]
    counts = {name: len(json.loads((setup.out / "data" / f"{name}.json").read_text())) for name in ("captions", "train", "fresh")}
    assert counts == {"captions": 8, "train": 8, "fresh": 8}


@pytest.mark.slow
def test_numbers_of_a_report(finished, monkeypatch, tmp_path):
    """Untrained models answer nothing right, so known answers to 100 questions and known F1 take the place of theirs."""
    setup, _ = finished
    right = {"dense_small": (40, 42), "sparse_small": (50, 52), "dense_large": (60, 62)}
    answers = {cell: (np.array([[float(number < count) for number in range(100)] for count in right[cell]])) for cell in CELLS}
    monkeypatch.setattr(headline, "right_answers", lambda plan, cell: (answers[cell], [str(number) for number in range(100)]))
    results = read_lines(setup.out / "results.jsonl")
    f1 = {"dense_small": 0.2, "sparse_small": 0.25, "dense_large": 0.4}
    for result in results:
        for kind, more in (("random", 0.1), ("popular", 0.0), ("adversarial", -0.1)):
            result["scores"][f"existence/{kind}/f1"] = f1[result["cell"]] + more
    plan = dataclasses.replace(headline.plan_headline(setup, 0.3, 0.01, QUIET), out=tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    text = headline.write_report(plan, results, "again").read_text()
    assert "# A small sparse model against a large dense one: non-inferior" in text
    assert "sparse_small minus dense_large: -0.1 of all questions" in text
    assert "It is worse all the same" in text
    assert "| accuracy | 0.41 | 0.51 | 0.61 | +0.2 (+0.2 to +0.2) | +0.1 (+0.1 to +0.1) | 50% | 50% to 50% |" in text
    assert "| existence F1 | 0.2 | 0.25 | 0.4 | +0.2 (+0.2 to +0.2) | +0.05 (+0.05 to +0.05) | 25% | 25% to 25% |" in text


def test_what_cannot_be_decided_is_refused(tmp_path):
    setup = Setup(tmp_path / "out", RECIPE, TINY, 2, images=(None, 3))
    with pytest.raises(ExperimentError) as caught:
        run_headline(setup, 0.3, 0.01, QUIET)
    assert f"pretrain language-model {setup.out / 'parts' / 'small'} --level hard --width 96" in str(caught.value)
    for job, message in (
        (("dense", 0), "did you mean dense_"),
        (("dense_small", 2), "the seed is 2, but the seeds of the plan are 0 to 1"),
    ):
        with pytest.raises(ExperimentError, match=message):
            run_headline(setup, 0.3, 0.01, QUIET, job)
    with pytest.raises(ExperimentError, match=r"standard deviation between seeds is 1.2, but must be a share"):
        run_headline(setup, 0.3, 1.2, QUIET)
    write_parts(setup.out, small=128)
    with pytest.raises(RecipeError, match=r"stage3.optimisation.max_steps is -1, but --headline needs a number of steps"):
        run_headline(dataclasses.replace(setup, settings=[*TINY, "stage3.optimisation.max_steps=-1"]), 0.3, 0.01, QUIET)
    with pytest.raises(ExperimentError, match=r"the ratio is 1.15, but must be 2 to 2.5"):
        run_headline(setup, 0.3, 0.01, QUIET)
    assert not (setup.out / "plan.json").exists()


def test_options_that_do_not_go_together(tmp_path):
    for arguments, message in (
        (["--headline", "--train-images", "9"], "--headline writes its own data"),
        (["--cell", "dense_small", "--seed", "0"], "select a run of --headline"),
        (["--headline", "--cell", "dense_small"], "are given together"),
    ):
        done = run_here("trial", "--margin", "0.02", "--out", tmp_path / "a", *arguments)
        assert done.exit_code != 0
        assert message in done.stderr, done.stderr
    assert not (tmp_path / "a").exists()


def test_the_share_of_a_gap():
    """With a large gap of the same size in all seeds, the share's interval is that of the difference, divided by the gap."""
    small, closed = np.array([0.50, 0.52, 0.49, 0.51, 0.50]), np.array([0.10, 0.12, 0.08, 0.11, 0.09])
    found = gap("accuracy", {"dense_small": small, "sparse_small": small + closed, "dense_large": small + 0.2})
    expected = t_interval((closed / 0.2).tolist())
    assert (found.share.mean, found.share.low, found.share.high) == pytest.approx((expected.mean, expected.low, expected.high))
    unknown = gap("accuracy", {"dense_small": small, "sparse_small": small + closed, "dense_large": small + [0.1, -0.1, 0.1, -0.1, 0.02]})
    assert (unknown.share.low, unknown.share.high) == (-np.inf, np.inf)


def test_fiellers_interval_has_the_true_ratio_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        common = random.normal(0, 0.01, 5)
        interval = ratio_interval(0.03 + common + random.normal(0, 0.01, 5), 0.1 + common + random.normal(0, 0.01, 5))
        hits += interval.low <= 0.3 <= interval.high
    assert 0.93 < hits / 1000 < 0.97


def test_a_detectable_difference_is_detected_as_often_as_it_says():
    difference = detectable_difference(0.02, 5, 0.8)
    drawn = np.random.default_rng(0).normal(difference, 0.02, (2000, 5))
    found = [interval.low > 0 or interval.high < 0 for interval in (t_interval(row.tolist()) for row in drawn)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
