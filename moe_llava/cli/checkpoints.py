"""Verbs on checkpoints: upcycle, export, convert and merge make one of another; card describes one; families lists what can be upcycled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_llava.cli.common import heavy_imports, user_errors, verb, with_options
from moe_llava.model.options import MoeOptions

EveryLayer = Annotated[bool, typer.Option("--every-layer", help="turn dense layers into equal experts, for engines with only MoE layers")]


def _layers(text: str) -> str | list[int]:
    """Parse --moe-layers: the name of a placement, or layer indices. Raise ValueError if it is neither."""
    if not text[:1].isdigit():
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--moe-layers is {text!r}, but must be a name, or indices with commas between: 0,2,4")
    return [int(index) for index in text.split(",")]


@verb("Convert", "moe-llava upcycle runs/demo/stage2 runs/sparse --num-experts 4")
@with_options(MoeOptions, moe_layers=str)
def upcycle(
    dense: Annotated[str, typer.Argument(help="a dense vision-language model: a folder, or a hub id")],
    out: Annotated[Path, typer.Argument(help="folder for the sparse checkpoint; must not exist")],
    expert_start: Annotated[str, typer.Option(help="copy; noise or drop: experts that differ from the start")] = "copy",
    experts_from: Annotated[
        list[str], typer.Option(help="a checkpoint that gives one expert; once for each expert. Default: copies of one FFN")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="of the routers' start, and of what is drawn")] = 0,
    native: Annotated[bool, typer.Option("--native", help="write a native MoE architecture, as `moe-llava export` does")] = False,
    every_layer: EveryLayer = False,
    **options: Any,
) -> None:
    """Upcycle a dense checkpoint: each chosen FFN becomes several experts, and the outputs stay the same."""
    with user_errors():
        if every_layer and not native:
            raise ValueError("--every-layer is for --native")
        from moe_llava.checkpoints.files import check_checkpoint
        from moe_llava.common.files import new_folder

        options["moe_layers"] = _layers(options["moe_layers"])
        for name in (dense, *experts_from):
            check_checkpoint(name, plain=True)
        with new_folder(out) as folder:
            # These take seconds, and a mistake is reported first.
            with heavy_imports():
                from moe_llava.checkpoints.load import check_origin_tokens, load_model, load_on_meta, load_processor
                from moe_llava.checkpoints.native import find_target, write_native
                from moe_llava.checkpoints.processors import sparse_processor
                from moe_llava.model.upcycling import upcycle as make_sparse

            made: dict[str, Any] = {"expert_start": expert_start, "seed": seed, **options}
            # All is refused before weights are read.
            on_meta = load_on_meta(dense)
            before = on_meta.num_parameters()
            planned = make_sparse(on_meta, experts_from=[load_on_meta(name) for name in experts_from], **made)
            if native:
                find_target(planned, every_layer)
            processor = load_processor(dense)
            check_origin_tokens(experts_from, processor, dense)
            sparse = make_sparse(load_model(dense), experts_from=[load_model(name) for name in experts_from], **made)
            if native:
                for line in write_native(sparse, sparse_processor(processor), folder, every_layer):
                    print(line)
            else:
                sparse.save_pretrained(folder)
                sparse_processor(processor).save_pretrained(folder)
        total, added = sparse.num_parameters(), sparse.num_parameters() - before
        print(f"{out}: {total:,} parameters, {added:,} more than the dense model; sparse layers {list(sparse.all_sparse_mlps())}")


@verb("Convert", "moe-llava export runs/sparse native", "moe-llava export runs/sparse native --every-layer")
def export(
    checkpoint: Annotated[str, typer.Argument(help="a sparse checkpoint: a folder, or a hub id")],
    out: Annotated[Path, typer.Argument(help="folder for the export; must not exist")],
    every_layer: EveryLayer = False,
) -> None:
    """Export a sparse checkpoint to an MoE architecture of transformers, which serving engines run without this package."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint
        from moe_llava.common.files import new_folder

        check_checkpoint(checkpoint, plain=True)
        with new_folder(out) as folder:
            with heavy_imports():
                from moe_llava.checkpoints.load import load_checkpoint, load_on_meta
                from moe_llava.checkpoints.native import find_target, write_native

            find_target(load_on_meta(checkpoint), every_layer)  # refused before weights are read
            for line in [*write_native(*load_checkpoint(checkpoint), folder, every_layer), f"written to {out}"]:
                print(line)


@verb("Convert", "moe-llava convert published converted --vision-towers towers")
def convert(
    published: Annotated[str, typer.Argument(help="a checkpoint of the original code: a folder, or a hub id; or the folder of an export")],
    out: Annotated[Path, typer.Argument(help="folder for the converted checkpoint; must not exist")],
    vision_towers: Annotated[Path | None, typer.Option(help="folder with the vision towers, instead of the hub")] = None,
    language_model: Annotated[str | None, typer.Option(help="for a stage I projector: the language model it was trained with")] = None,
) -> None:
    """Convert a checkpoint of the original MoE-LLaVA code, or an export of `moe-llava export`, to one that transformers loads."""
    with user_errors():
        from moe_llava.checkpoints.files import PROJECTOR_FILE, check_published, is_export, read_config
        from moe_llava.common.files import check_new, new_folder

        if is_export(published):
            with heavy_imports():
                from moe_llava.checkpoints.native import convert_back

            with new_folder(out) as folder:
                lines = convert_back(published, folder)
        else:
            check_new(out)
            settings = Path(published).parent if Path(published).name == PROJECTOR_FILE else Path(published)
            check_published(read_config(settings), settings / "config.json", published)
            with heavy_imports():
                from moe_llava.checkpoints.published import convert as run

            lines = run(published, out, vision_towers, language_model)
        for line in [*lines, f"written to {out}"]:
            print(line)


@verb("Convert", "moe-llava merge runs/lora/stage3/adapter runs/lora/merged")
def merge(
    adapter: Annotated[Path, typer.Argument(help="an adapter folder, such as the `adapter` of a stage")],
    out: Annotated[Path, typer.Argument(help="folder for the merged checkpoint; must not exist")],
    base: Annotated[str | None, typer.Option(help="the checkpoint it belongs to, if that is no longer where the adapter says")] = None,
) -> None:
    """Merge an adapter (LoRA) into the weights of its base."""
    with user_errors():
        from moe_llava.checkpoints.files import read_adapter
        from moe_llava.common.files import new_folder

        read_adapter(adapter)
        with new_folder(out) as folder:
            with heavy_imports():
                from moe_llava.training.adapters import merge as run  # takes seconds, and a mistake is reported first

            model, processor = run(adapter, base)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        print(f"{out}: {model.num_parameters():,} parameters, the adapter among them")


@verb("Convert", "moe-llava card runs/sparse --base Qwen/Qwen3-VL-2B-Instruct --results runs/evaluation")
def card(
    checkpoint: Annotated[Path, typer.Argument(help="the folder of a checkpoint")],
    results: Annotated[list[Path] | None, typer.Option(help="results of `moe-llava evaluate`: a file or a folder; may be repeated")] = None,
    base: Annotated[str | None, typer.Option(help="the model it was made from; default: as the recipe of a stage says")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="its licence, as the hub names it; default: the base's")] = None,
) -> None:
    """Write the model card of a checkpoint, README.md in its folder: origin, MoE options, training data, results, how to load it."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint
        from moe_llava.evaluation.score.tables import find_results

        check_checkpoint(str(checkpoint))
        find_results(results or [])
        with heavy_imports():
            from moe_llava.evaluation.card import write_card

        print(f"written to {write_card(checkpoint, results or [], base, licence)}")


@verb("Convert", "moe-llava families", "moe-llava families qwen3_vl")
def families(
    model_type: Annotated[str | None, typer.Argument(help="report this model type only, as config.json names it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """List the vision-language models of the installed transformers: which can be upcycled, which are MoE already, which cannot."""
    with user_errors():
        from moe_llava.checkpoints.files import known_types
        from moe_llava.common.messages import did_you_mean

        if model_type is not None and model_type not in known_types():
            rule = did_you_mean(model_type, known_types(), "; `moe-llava families` lists all")
            raise ValueError(f"transformers has no vision-language model of type {model_type!r}{rule}")
        with heavy_imports():
            from rich.console import Console
            from rich.table import Table

            from moe_llava.checkpoints.supported import list_support, summary, support_of

        rows = list_support() if model_type is None else [support_of(model_type)]
        if as_json:
            print(json.dumps({row.model_type: {"class": row.class_name, "status": row.status, "reason": row.reason} for row in rows}))
            return
        table = Table()
        for title in ("model type", "class", "status", "reason"):
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(row.model_type, row.class_name, row.status, row.reason)
        Console().print(table)
        if model_type is None:
            print(summary(rows))
