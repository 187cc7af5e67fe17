"""Verbs that make a checkpoint of another: upcycle, convert, merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from moe_llava.cli.common import app, heavy_imports, user_errors


@app.command()
def upcycle(
    dense: Annotated[str, typer.Argument(help="a dense LLaVA: a folder, or a hub id")],
    out: Annotated[Path, typer.Argument(help="folder for the sparse checkpoint; must not exist")],
    num_experts: Annotated[int, typer.Option(help="experts per sparse layer")] = 4,
    num_experts_per_tok: Annotated[int, typer.Option(help="experts that each token goes through")] = 2,
    moe_layers: Annotated[str, typer.Option(help="interval, all, first_half, second_half, or indices: 0,2,4")] = "interval",
    norm_topk_prob: Annotated[bool, typer.Option(help="make each token's weights sum to 1")] = True,
    capacity_factor: Annotated[float | None, typer.Option(help="let experts drop tokens beyond this multiple of an even share")] = None,
    use_residual: Annotated[bool, typer.Option(help="keep the dense FFN beside the experts")] = False,
    routing: Annotated[
        str, typer.Option(help="agnostic, modality_split or smoes: what a token's modality says about its experts")
    ] = "agnostic",
    expert_start: Annotated[str, typer.Option(help="copy, or noise: experts that differ from the start")] = "copy",
    seed: Annotated[int, typer.Option(help="of the routers' start, and of the noise")] = 0,
) -> None:
    """Makes a dense checkpoint sparse: each chosen FFN becomes several experts, and the result computes the same (without noise)."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint
        from moe_llava.common.files import new_folder

        layers: str | list[int] = moe_layers
        if moe_layers[:1].isdigit():
            if not re.fullmatch(r"\d+(,\d+)*", moe_layers):
                raise ValueError(f"--moe-layers is {moe_layers!r}, but must be a name, or indices with commas between: 0,2,4")
            layers = [int(index) for index in moe_layers.split(",")]
        check_checkpoint(dense, plain=True)
        with new_folder(out) as folder:
            # These take seconds, and a mistake is told before.
            with heavy_imports():
                from moe_llava.checkpoints.load import load_checkpoint
                from moe_llava.model import MoeLlavaProcessor
                from moe_llava.model.upcycling import upcycle as make_sparse

            model, processor = load_checkpoint(dense)
            sparse = make_sparse(
                model,
                num_experts=num_experts,
                num_experts_per_tok=num_experts_per_tok,
                moe_layers=layers,
                norm_topk_prob=norm_topk_prob,
                capacity_factor=capacity_factor,
                use_residual=use_residual,
                routing=routing,
                expert_start=expert_start,
                seed=seed,
            )
            sparse.save_pretrained(folder)
            MoeLlavaProcessor.from_llava(processor).save_pretrained(folder)
        total, added = sparse.num_parameters(), sparse.num_parameters() - model.num_parameters()
        print(f"{out}: {total:,} parameters, {added:,} more than the dense model; sparse layers {sparse.config.moe_layer_indices}")


@app.command()
def convert(
    published: Annotated[str, typer.Argument(help="a checkpoint of the original MoE-LLaVA code: a folder, or a hub id")],
    out: Annotated[Path, typer.Argument(help="folder for the converted checkpoint; must not exist")],
    vision_towers: Annotated[Path | None, typer.Option(help="folder with the vision towers, instead of the hub")] = None,
    language_model: Annotated[str | None, typer.Option(help="for a stage I projector: the language model it was trained with")] = None,
) -> None:
    """Turns a published checkpoint, sparse or of stage I or II, into one that this package and transformers load."""
    with user_errors():
        with heavy_imports():
            from moe_llava.checkpoints.convert import convert as run

        for line in [*run(published, out, vision_towers, language_model), f"written to {out}"]:
            print(line)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="an adapter folder, such as the `adapter` of a stage")],
    out: Annotated[Path, typer.Argument(help="folder for the merged checkpoint; must not exist")],
    base: Annotated[str | None, typer.Option(help="the checkpoint it belongs to, if that is no longer where the adapter says")] = None,
) -> None:
    """Adds an adapter into the weights of its base: a checkpoint like any other."""
    with user_errors():
        from moe_llava.common.files import new_folder

        with new_folder(out) as folder:
            with heavy_imports():
                from moe_llava.training.adapters import merge as run  # takes seconds, and a mistake is told before

            model, processor = run(adapter, base)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        print(f"{out}: {model.num_parameters():,} parameters, the adapter among them")
