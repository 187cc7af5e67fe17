"""Do variants keep more accuracy under perturbation than what they are compared with, and does that depend on scale?

    python -m moe_llava.experiments.interaction runs/robust small large

takes a finished experiment with perturbations, whose cells are named VARIANT_SCALE at two scales, and writes interaction.md and
interaction.png into its folder. For a cell, a seed and a perturbation,

    kept = (accuracy under it - that of the cell compared with) - (accuracy without it - that of the cell compared with)

is above 0 where the variant loses less. The interaction is `kept` at the second scale minus `kept` at the first. All are paired by seed.
Intervals and p are adjusted for the number of variants and perturbations.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.common.files import read_lines, read_object, write_whole
from moe_llava.evaluation.score.statistics import holm, paired_p, t_interval
from moe_llava.experiments.ablate import save
from moe_llava.experiments.cells import ExperimentError
from moe_llava.experiments.figures import plot_interactions
from moe_llava.experiments.summary import Kept, markdown, signed

MEAN = "mean of all"


def kept(against: Mapping[str, str], results: Sequence[Mapping[str, Any]], scales: tuple[str, str]) -> list[Kept]:
    """Return what every variant keeps under the mean of all perturbations, then under each. `against`: cell -> the one that it is compared
    with, itself if there is none.

    Raise ExperimentError if a variant is not in both scales, or a result is missing, twice there, or not of the plan.
    """
    by_cell: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in against}
    for result in results:
        name, seed = result["cell"], result["seed"]
        if name not in by_cell:
            raise ExperimentError(f"the results have a cell {name}, but the plan has only {', '.join(against)}")
        if seed in by_cell[name]:
            raise ExperimentError(f"the results have cell {name} with seed {seed} twice: keep one line for each cell and seed")
        if result.get("perturbed", {}).keys() != results[0].get("perturbed", {}).keys():
            raise ExperimentError(f"cell {name} with seed {seed} has other perturbations than the first result: all need the same")
        by_cell[name][seed] = result
    seeds = sorted(by_cell[next(iter(against))])
    for name, found in by_cell.items():
        if sorted(found) != seeds or len(seeds) < 2:
            raise ExperimentError(
                f"cell {name} is complete with seeds {sorted(found)}, the first cell with {seeds}: all need the same, at least 2"
            )
    names = list(results[0].get("perturbed", {}))
    if not names:
        raise ExperimentError("the experiment has no perturbations: add `perturb` to its file")
    variants = _variants(against, scales)
    values = {
        (variant, place): {name: _kept(by_cell[cell], by_cell[against[cell]], seeds, name) for name in names}
        for variant, both in variants.items()
        for place, cell in enumerate(both)
    }
    means = {key: {MEAN: np.mean(list(found.values()), axis=0)} for key, found in values.items()}
    return [*_compared(list(variants), [MEAN], means), *_compared(list(variants), names, values)]


def _variants(against: Mapping[str, str], scales: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """Return variant -> its cells at both scales, of the variants that are compared with another cell."""
    compared = [name for name, other in against.items() if name != other]
    names = [name.removesuffix(f"_{scales[0]}") for name in compared if name.endswith(f"_{scales[0]}")] or ["VARIANT"]
    found = {name: (f"{name}_{scales[0]}", f"{name}_{scales[1]}") for name in names}
    missing = [cell for both in found.values() for cell in both if cell not in compared]
    if missing:
        raise ExperimentError(f"no cell is called {missing[0]} and compared with another: there are {', '.join(against)}")
    return found


def _kept(mine: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]], seeds: Sequence[int], name: str) -> np.ndarray:
    """Return what a cell keeps with each seed, from its results and those of the cell compared with."""

    def lost(result: Mapping[str, Any]) -> float:
        return float(result["unperturbed"] - result["perturbed"][name])

    return np.array([lost(other[seed]) - lost(mine[seed]) for seed in seeds])


def _compared(variants: Sequence[str], names: Sequence[str], values: Mapping[tuple[str, int], Mapping[str, np.ndarray]]) -> list[Kept]:
    pairs = [(variant, name) for name in names for variant in variants]
    differences = [(values[variant, 1][name] - values[variant, 0][name]).tolist() for variant, name in pairs]
    p = holm([paired_p(found) for found in differences])
    rows = []
    for (variant, name), difference, adjusted in zip(pairs, differences, p, strict=True):
        first, second = (t_interval(values[variant, place][name].tolist(), len(pairs)) for place in (0, 1))
        rows.append(Kept(variant, name, (first, second), t_interval(difference, len(pairs)), adjusted))
    return rows


def table(rows: Sequence[Kept], scales: tuple[str, str]) -> str:
    lines = [["perturbation", "variant", *(f"kept, {scale}" for scale in scales), f"{scales[1]} minus {scales[0]}", "p (Holm)"]]
    for row in rows:
        intervals = [f"{signed(each.mean)} ({signed(each.low)} to {signed(each.high)})" for each in (*row.scales, row.interaction)]
        lines.append([row.perturbation, row.variant, *intervals, f"{row.p:.2g}"])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the experiment, with plan.json and results.jsonl")
    parser.add_argument("scales", nargs=2, help="how the names of the cells end")
    arguments = parser.parse_args()
    scales = (arguments.scales[0], arguments.scales[1])
    try:
        experiment = read_object(arguments.run / "plan.json")["experiment"]
        against = {name: cell["against"] or experiment["baseline"] for name, cell in experiment["cells"].items()}
        rows = kept(against, read_lines(arguments.run / "results.jsonl"), scales)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    save(plot_interactions(rows, scales), arguments.run / "interaction.png")
    write_whole(arguments.run / "interaction.md", table(rows, scales))
    print(table(rows, scales))


if __name__ == "__main__":
    main()
