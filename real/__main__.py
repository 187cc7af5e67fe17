"""`python -m real OUT`: pipeline.py, with errors and signals reported as by `moe-llava`."""

from pathlib import Path
from typing import Annotated

import typer

from moe_llava.cli.common import heavy_imports, stops, user_errors


def main(out: Annotated[Path, typer.Argument(help="folder for everything; what it holds is reused")]) -> None:
    """Train a LLaVA on real weights and pictures, and report what it learnt."""
    with user_errors(), stops():
        with heavy_imports():
            from rich.console import Console

            from real.pipeline import run

        run(out, Console())


if __name__ == "__main__":
    typer.run(main)
