"""The verb routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_llava.cli.common import Checkpoint, Dtype, heavy_imports, user_errors, verb


@verb("Use a model", "moe-llava routes runs/demo/stage3 --data runs/demo/data/test.json --images runs/demo/data/images --out runs/routes")
def routes(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="conversations: a JSON list, JSON lines, or a folder of `datasets`")],
    out: Annotated[Path, typer.Option(help="folder for statistics, pictures and page; must not exist")],
    images: Annotated[
        Path | None, typer.Option(help="folder that the data's image names are relative to; default: that of the file")
    ] = None,
    group_by: Annotated[str | None, typer.Option(help="a key of the records whose value groups them, such as family")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many records, the first ones")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="records at once")] = 16,
    dtype: Dtype = "auto",
) -> None:
    """Show which experts each token used: statistics, pictures, and a page to explore."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint, check_dtype
        from moe_llava.common.files import new_folder
        from moe_llava.data.files import read_items

        check_dtype(dtype)
        check_checkpoint(checkpoint)
        next(read_items(data), None)  # raises if there is no such file
        with new_folder(out) as folder:
            with heavy_imports():
                from moe_llava.checkpoints.load import best_device, load_checkpoint
                from moe_llava.data.store import load_records
                from moe_llava.routing.routes import write_routes

            records = load_records(data, images or data.parent)[:limit]
            model, processor = load_checkpoint(checkpoint, dtype)
            summary = write_routes(folder, checkpoint, model.to(best_device()), processor, records, batch_size, group_by)
    tokens = summary["tokens"]
    print(f"{out / 'index.html'}: {len(records):,} records, {tokens['image']:,} image tokens, {tokens['text']:,} others")
    dead = "; ".join(f"{', '.join(map(str, experts))} of layer {layer}" for layer, experts in summary["dead"].items())
    print(f"dead experts: {dead or 'none'}; every picture in {out / 'figures'} and {out / 'examples'}")
