"""Experiments: the shipped ones, mistakes in files, and a plan that cannot change."""

import dataclasses
import json
import os
import shutil

import pytest

from moe_llava.cli.experiments import ABLATIONS as cli_ablations
from moe_llava.common.errors import DataError
from moe_llava.evaluation.score.benchmark import BenchmarkError
from moe_llava.experiments.ablate import conditions, run_ablation
from moe_llava.experiments.cells import ExperimentError, sequence
from moe_llava.experiments.plan import (
    ABLATIONS,
    TRIAL,
    find_experiment,
    load_experiment,
    make_plan,
    recipe_digests,
    write_plan,
)
from moe_llava.training.parsing import RecipeError
from moe_llava.training.recipe import Data, load_recipe
from tests.conftest import refused, run_here
from tests.experiments.conftest import QUIET

SIX_LAYERS = {"dense6", "sparse6"}  # the tiny base has four


LATER = {"granularity", "balancing", "initialisation"}  # options that the paper does not have


def test_the_paper_is_covered():
    assert set(ABLATIONS) == {"strategy", "tuned", "experts", "topk", "placement", "capacity", "size"} | LATER


@pytest.mark.parametrize("name", [*ABLATIONS, "trial"])
def test_shipped_experiments_are_valid_and_their_budgets_known_before_training(setup, name):
    experiment = load_experiment(TRIAL if name == "trial" else find_experiment(name))
    plan = make_plan(experiment, setup, 0.02 if name == "trial" else None)
    assert experiment.paper.startswith("Not in the paper" if name in LATER else ("Paper", "The paper"))
    assert len(plan.cells) >= 3
    for cell in plan.cells.keys() - SIX_LAYERS:
        budget = plan.cells[cell].budget()
        assert sum(budget.steps) == 6  # whatever the strategy
        assert 0 < budget.active <= budget.total
    assert not (plan.out / "cells").exists()


def test_budgets_of_cells(setup):
    """By hand: width 32, FFN 48, layers 0 and 2 of four sparse; forward, gradients of activations, gradients of weights. In layer 0, only
    the input of down_proj, a third of the FFN, has a gradient."""
    plan = make_plan(load_experiment(TRIAL), setup, 0.02)
    budgets = {name: cell.budget() for name, cell in plan.cells.items()}
    ffn, router = 3 * 32 * 48, 4 * 32
    dense, top1, sparse = (budgets[name] for name in ("dense", "sparse_top1", "sparse"))
    assert top1.active - dense.active == 2 * router
    assert top1.flops[2] - dense.flops[2] == 2 * (2 + 3) * router
    assert sparse.active - top1.active == 2 * ffn
    assert sparse.flops[2] - top1.flops[2] == 2 * ((2 + 3) * ffn + ffn // 3)
    assert sparse.flops[:2] == dense.flops[:2]


def test_strategies(setup):
    recipe = load_recipe(setup.recipe, ["stage2.optimisation.max_steps=5", "stage3.data.weight=2"])
    two, three = recipe.stage2, recipe.stage3

    one, merged = sequence(recipe, "merged")
    assert (one.number, merged.number) == (1, 3)
    assert merged.recipe.stage3.data == [two.data, three.data]
    assert merged.recipe.stage3.optimisation == dataclasses.replace(two.optimisation, max_steps=7)
    assert sequence(load_recipe(setup.recipe), "merged")[1].recipe.stage3.data == [two.data]  # both have the same file

    by_epochs = load_recipe(
        setup.recipe, ["stage2.optimisation.max_steps=-1", "stage3.optimisation.max_steps=-1", "stage2.optimisation.epochs=3"]
    )
    both = sequence(by_epochs, "merged")[1].recipe.stage3
    assert both.data == [Data(two.data.file, two.data.images, 3.0), Data(two.data.file, two.data.images, 1.0)]
    assert (both.optimisation.epochs, both.optimisation.max_steps) == (1.0, -1)

    _, first, second = sequence(recipe, "sparse_twice")
    assert (first.number, second.number) == (3, 3)
    assert (first.recipe.stage3.data, first.recipe.stage3.optimisation) == (two.data, two.optimisation)
    assert (first.recipe.stage3.moe, second.recipe.stage3) == (three.moe, three)

    with pytest.raises(RecipeError, match="one batch_size"):
        sequence(load_recipe(setup.recipe, ["stage2.optimisation.batch_size=8"]), "merged")
    with pytest.raises(RecipeError, match="one image_processor"):
        sequence(load_recipe(setup.recipe, ["stage2.image_processor={max_pixels: 100}"]), "merged")
    recipe.stage2 = None
    with pytest.raises(RecipeError, match="has no stage2"):
        sequence(recipe, "merged")


def test_all_mistakes_of_a_file_are_reported(write_experiment):
    cells = {"a": {"layer": 2}, "b": {"strategy": "other"}}
    with pytest.raises(ExperimentError) as caught:
        load_experiment(write_experiment(cells=cells))
    assert "unknown key cells.a.layer; did you mean cells.a.layers?" in str(caught.value)
    assert "cells.b.strategy is 'other', but must be one of three_stages, merged, sparse_twice" in str(caught.value)
    cells = {"a": {"layers": 0, "against": "c"}, "b": {"evolve": True, "strategy": "sparse_twice"}}
    with pytest.raises(ExperimentError) as caught:
        load_experiment(write_experiment(cells=cells, baseline="a", claim="d"))
    for text in ("no cell is called so", "c is to be compared", "d is to be compared", "cells.a.layers is 0", "cells.b.evolve is true"):
        assert text in str(caught.value)
    with pytest.raises(ExperimentError, match="no ablation is called 'expert'; did you mean experts"):
        find_experiment("expert")


def test_what_cannot_be_compared_is_refused(setup, write_experiment):
    wrong = load_experiment(write_experiment(cells={"dense": {"set": ["stage3.moe.num_experts=0"]}, "sparse": {"set": ["stage3.mo=1"]}}))
    with pytest.raises(ExperimentError) as caught:
        make_plan(wrong, setup)
    assert "cell dense: " in str(caught.value)
    assert "did you mean stage3.moe?" in str(caught.value)
    good = load_experiment(write_experiment())
    with pytest.raises(ExperimentError, match=r"margin is 2\.0, but must be a share"):
        make_plan(good, setup, 2.0)
    with pytest.raises(BenchmarkError, match="did you mean digits"):
        make_plan(good, dataclasses.replace(setup, benchmark="digit"))


def test_a_plan_is_written_once(setup, write_experiment):
    experiment = load_experiment(write_experiment())
    plan = make_plan(experiment, setup, 0.02)
    write_plan(plan)
    before = (plan.out / "plan.json").read_text()
    assert json.loads(before)["margin"] == 0.02
    write_plan(make_plan(experiment, setup, 0.02))
    with pytest.raises(ExperimentError, match=r"margin 0.02, now 0.03: choose another --out"):
        write_plan(make_plan(experiment, setup, 0.03))
    with pytest.raises(ExperimentError, match=r"seeds \[0, 1\], now \[0, 1, 2\]"):
        write_plan(make_plan(experiment, dataclasses.replace(setup, seeds=3), 0.02))
    longer = dataclasses.replace(setup, settings=["stage3.optimisation.max_steps=9"])
    with pytest.raises(ExperimentError, match=r"recipes.dense.stage3.optimisation.max_steps 2, now 9"):
        write_plan(make_plan(experiment, longer, 0.02))
    assert (plan.out / "plan.json").read_text() == before


@pytest.fixture
def own_copy(setup, tiny_base, tmp_path):
    """The setup on a copy of data and base that can be changed."""
    shutil.copytree(tiny_base, tmp_path / "inputs")
    setup.recipe.write_text(setup.recipe.read_text().replace(str(tiny_base), str(tmp_path / "inputs")))
    return dataclasses.replace(setup, data=tmp_path / "inputs" / "data"), tmp_path / "inputs"


def change(file):
    """Another byte under the same name, size and time; of JSON a blank, so that it can still be read."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[content.index(b" ") if file.suffix == ".json" else -2] ^= 0x2A  # a blank becomes a line break
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("data/train.json", "train.json"),
        ("data/captions.json", "captions.json"),
        ("data/images/train/000000.png", "images of "),
        ("data/images/test/000003.png", "pictures of The digits world"),
        ("base/model.safetensors", "base/model.safetensors"),
        ("base/config.json", "base/config.json"),
        ("base/tokenizer.json", "base/tokenizer.json"),
    ],
)
def test_a_plan_knows_its_inputs_by_their_contents(own_copy, write_experiment, changed, named):
    setup, inputs = own_copy
    plan = make_plan(load_experiment(write_experiment()), setup)
    write_plan(plan)
    os.utime(inputs / changed)  # another time alone is no change
    (inputs / "data" / "images" / "test" / "._000003.png").write_bytes(b"macOS")
    write_plan(plan)
    change(inputs / changed)
    with pytest.raises(ExperimentError, match=rf"the content of .*{named}.* is not what it was when .*plan.json was written"):
        write_plan(plan)


def test_an_ablation_is_not_continued_on_other_questions(own_copy, write_experiment):
    """Results are kept, and the run resumes when the file is back."""
    setup, inputs = own_copy
    experiment = write_experiment()
    plan = make_plan(load_experiment(experiment), setup)
    write_plan(plan)
    cell = plan.cells["dense"].result
    cell.parent.mkdir(parents=True)
    cell.write_text("done")
    file = inputs / "data" / "test.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole)[:-3]))
    with pytest.raises(ExperimentError, match=r"the content of .*test.json.* is not what it was"):
        run_ablation(str(experiment), setup, QUIET)
    assert cell.read_text() == "done"
    file.write_text(whole)
    write_plan(make_plan(load_experiment(experiment), setup))

    written = json.loads((plan.out / "plan.json").read_text())
    del written["digests"]
    (plan.out / "plan.json").write_text(json.dumps(written))
    with pytest.raises(ExperimentError, match="has no digests of what was read, as an earlier version wrote it: choose another --out"):
        write_plan(plan)


def test_the_benchmark_is_checked_before_the_first_run(own_copy, write_experiment):
    setup, inputs = own_copy
    (inputs / "data" / "images" / "test" / "000002.png").unlink()
    with pytest.raises(BenchmarkError, match=r"names the image .*000002.png, which does not exist"):
        make_plan(load_experiment(write_experiment()), setup)
    questions = json.loads((inputs / "data" / "test.json").read_text())
    (inputs / "data" / "test.json").write_text(json.dumps([*questions, questions[0]]))
    with pytest.raises(BenchmarkError, match=r"record \d+ of .*test.json has the id and question .* once more, after record 0 of"):
        make_plan(load_experiment(write_experiment()), setup)


def test_a_plan_on_own_questions(own_copy, write_experiment):
    setup, inputs = own_copy
    file = inputs / "data" / "images" / "held-out.json"
    shutil.copyfile(inputs / "data" / "test.json", file)
    plan = make_plan(load_experiment(write_experiment()), dataclasses.replace(setup, benchmark="questions", data=file))
    assert plan.data == file
    write_plan(plan)
    write_plan(plan)
    change(file)
    with pytest.raises(ExperimentError, match=r"the content of .*held-out.json is not what it was"):
        write_plan(plan)


def test_conditions_say_which_cells_have_an_order_of_their_own(setup, write_experiment):
    shared = conditions(make_plan(load_experiment(write_experiment()), setup))
    assert "cells of one seed share it, and" in shared
    cells = {"dense": {"set": ["stage3.dense=true"]}, "joined": {"strategy": "merged", "set": ["stage3.tuned=all"]}}
    own = conditions(make_plan(load_experiment(write_experiment(cells=cells, claim=None)), setup))
    assert "cells of one seed share it (joined: in one order of their own, over the data of stages II and III together), and" in own


def test_the_help_names_the_ablations():
    told = run_here("ablate", "--help").output
    assert ", ".join(names := cli_ablations.split(", ")) in " ".join(told.split())
    assert set(names) == set(ABLATIONS)


@pytest.mark.parametrize("margin", ["nan", "inf", "-inf", "0", "1"])
def test_a_margin_is_a_share(margin, tmp_path):
    assert f"the margin is {float(margin)}, but must be a share" in refused("trial", "--margin", margin, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stream_of_shards_is_refused(write_recipe):
    recipe = load_recipe(write_recipe(stage1__data={"file": "shards/*.tar"}))
    with pytest.raises(DataError, match=r"data file shards/\*.tar is a stream of shards, whose content has no digest"):
        recipe_digests([recipe])
