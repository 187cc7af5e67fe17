"""What a run tells about itself: numbers that are right, a picture, curves in other programs."""

import io
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe_llava.common.files import read_lines
from moe_llava.data.encoder import Encoder
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.watch import ProgressDisplay, plot_run, summarise

QUIET = Console(quiet=True)


def logged(folder):
    return [line for line in read_lines(folder / "log.jsonl") if "loss" in line]


def test_numbers_of_a_run(write_recipe, tmp_path):
    """Of stage III with a capacity of half an even share: half of the assignments are dropped, or more."""
    changes = {"stage3__moe": {"capacity_factor": 0.5, "num_experts_per_tok": 1}, "logging_steps": 2, "stage3__optimisation__max_steps": 4}
    console = Console(file=io.StringIO(), width=200)
    folders = train(load_recipe(write_recipe(**changes)), [1, 2, 3], resume=False, console=console)
    printed = console.file.getvalue()
    for folder in folders:
        lines = logged(folder)
        assert lines
        for line in lines:
            assert 0 <= line["padding"] < 0.5
            assert line["tokens_per_second"] > 0
            assert line["peak_memory"] > 10**8
            assert f"{line['tokens_per_second']:,.0f} tokens/s" in printed
            assert "skipped" not in line
        assert (folder / "run.png").stat().st_size > 10_000
    for line in logged(folders[2]):
        assert 0.5 <= line["dropped_share"] < 1
        assert f"dropped {line['dropped_share']:.1%}" in summarise(line)
        assert "dropped_share" not in logged(folders[1])[0]


def test_packed_samples_have_no_padding_and_the_same_losses(write_recipe, put_stage, tmp_path):
    """One step over the same records: only the padding is gone."""
    found = {}
    for packing in (False, True):
        changes = {f"stage{number}__optimisation__packing": packing for number in (2, 3)}
        changes |= {f"stage{number}__optimisation__max_steps": 1 for number in (2, 3)}
        file = write_recipe(output=str(tmp_path / str(packing)), **changes)
        put_stage(1, tmp_path / str(packing))
        folders = train(load_recipe(file), [2, 3], resume=False, console=QUIET)
        found[packing] = [logged(folder)[0] for folder in folders]
    for plain, packed in zip(found[False], found[True], strict=True):
        assert packed["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert packed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert packed["padding"] == 0 < plain["padding"]


def test_a_run_shorter_than_a_logging_step(write_recipe):
    (folder,) = train(load_recipe(write_recipe(logging_steps=100)), [1], resume=False, console=QUIET)
    assert [line["step"] for line in logged(folder)] == [1, 3]
    assert (folder / "run.png").is_file()


def test_grouping_leaves_less_padding(write_recipe, tiny_base, tmp_path):
    records = json.loads((tiny_base / "data" / "train.json").read_text())
    for number, record in enumerate(records):
        record["conversations"][0]["value"] += " the digit" * (number % 7)
    (tmp_path / "long.json").write_text(json.dumps(records))
    padding = {}
    for grouped in (False, True):
        data = {"file": str(tmp_path / "long.json"), "images": str(tiny_base / "data" / "images")}
        changes = {"stage1__data": data, "stage1__template": None, "stage1__optimisation__max_steps": 12, "logging_steps": 12}
        file = write_recipe(output=str(tmp_path / str(grouped)), **changes, stage1__optimisation__group_by_length=grouped)
        (folder,) = train(load_recipe(file), [1], resume=False, console=QUIET)
        padding[grouped] = logged(folder)[-1]["padding"]
    assert padding[True] < padding[False] / 2


def test_only_records_with_images_are_read_for_their_length(write_recipe, tiny_base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Encoder, "estimate_image_tokens", lambda self, records: seen.extend(record.images for record in records) or 4)
    records = json.loads((tiny_base / "data" / "train.json").read_text())
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = "What is a digit?"
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    data = {"file": str(tmp_path / "mixed.json"), "images": str(tiny_base / "data" / "images")}
    recipe = load_recipe(write_recipe(stage2__data=data, stage2__optimisation__group_by_length=True, stage2__optimisation__max_steps=1))
    train(load_recipe(write_recipe()), [1], resume=False, console=QUIET)
    train(recipe, [2], resume=False, console=QUIET)
    assert seen
    assert all(seen)


def test_curves_for_other_programs(write_recipe, put_stage):
    recipe = load_recipe(write_recipe(report_to=["tensorboard"]))
    put_stage(2)
    (folder,) = train(recipe, [3], resume=False, console=QUIET)
    events = b"".join(path.read_bytes() for path in Path(folder).rglob("*tfevents*"))
    for name in (b"train/language_loss", b"train/balance_loss", b"train/experts_smallest/0", b"train/experts_largest/1", b"train/padding"):
        assert name in events
    with pytest.raises(RecipeError, match="report_to names 'tensorbord', which transformers does not know or which is not installed"):
        load_recipe(write_recipe(report_to=["tensorbord"]))


@pytest.mark.parametrize("layers", [0, 1, 12])
def test_a_picture_of_any_run(layers):
    entries = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 0.1, "padding": 0.2} for step in (1, 2, 3)]
    for entry in entries if layers else []:
        entry |= {"language_loss": 1.0, "balance_loss": 1.0, "expert_shares": [[0.2, 0.3, 0.5, 0.0]] * layers}
    visible = [axis for axis in plot_run(entries).axes if axis.get_visible()]
    assert len(visible) == (5 + layers if layers else 3)


@pytest.mark.slow
def test_compiled(write_recipe, put_stage):
    """The same losses, up to rounding, and the same numbers of the experts."""
    put_stage(2)
    found = []
    for compiled in (False, True):
        file = write_recipe(torch_compile=compiled, stage3__optimisation__max_steps=2)
        (folder,) = train(load_recipe(file), [3], resume=False, console=QUIET)
        line = logged(folder)[0]
        found.append([line["loss"], line["language_loss"], line["balance_loss"], *itertools.chain(*line["expert_shares"])])
        shutil.rmtree(folder)
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def test_time_left_of_a_resumed_run(monkeypatch):
    """Ten steps took 20 s; the hundred before were another run's."""
    now = 1000.0
    monkeypatch.setattr("moe_llava.training.watch.time.monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=200)
    display = ProgressDisplay("stage1", console)
    display.on_train_begin(None, SimpleNamespace(global_step=100, max_steps=200), None)
    now += 20
    for step, told in ((110, "stage1 110/200 loss 1.000 5 tokens/s, 0:03:00 left\n"), (200, "stage1 200/200 loss 1.000 5 tokens/s\n")):
        display.show({"step": step, "loss": 1.0, "tokens_per_second": 5}, 200)
        assert console.file.getvalue().endswith(told)
