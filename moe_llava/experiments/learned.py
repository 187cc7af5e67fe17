"""What experts learn in stage III: how much a token's first expert says about the token, layer by layer and step by step.

    python -m moe_llava.experiments.learned OUT 0=runs/kept/upcycled 50=runs/kept/stage3/checkpoint-50 100=runs/kept/stage3

Checkpoints are given with their steps; those of one step are seeds. Labels of tokens, from scenes that no training saw:

    modality    image or text, of all tokens but special ones
    family      of the question, of the tokens of question and answer
    occupied    whether the cell of a patch holds a digit
    digit       its value, of the patches of digits
    colour      its colour, of the same

The measure is mutual information as a share of the entropy of the label: 0 if the expert says nothing, 1 if it determines the label. Tables
of few tokens have some by chance, so labels are permuted: the figure subtracts the measure's mean over permutations, and p is the share of
permutations that reach it. Permuted are families among conversations, the contents of cells among cells (four patches each), and modalities
among the tokens of a conversation. Tokens of a conversation are not independent: images come in one piece, and neighbours are alike. So p
of modality only says that experts do not choose at random; it does not tell modality from place. Routers before any training pass such
tests, too: p does not say that something was learnt.

Shapes: T tokens, L MoE layers, E experts, U units, N permutations.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.common.progress import show_progress
from moe_llava.data.records import Record
from moe_llava.digits.questions import sample_questions
from moe_llava.digits.scenes import LEVELS, STANDARD, Item, Level, Scene, render, sample_scene
from moe_llava.evaluation.score.statistics import holm, permutation_p
from moe_llava.experiments.ablate import save
from moe_llava.experiments.figures import plot_learned
from moe_llava.experiments.summary import markdown
from moe_llava.routing.statistics import entropy, mutual_information
from moe_llava.routing.tokens import IMAGE, TEXT
from moe_llava.routing.trace import Trace, trace_records

LABELS = ("modality", "family", "occupied", "digit", "colour")
PERMUTATIONS = 999
BATCH = 16


@dataclass(frozen=True)
class Labelled:
    """The tokens that have a label. `tokens` [T]: their indices. `units` [T]: the unit of each. `values` [U]: the label of each unit, a
    number from 0. `groups` [U]: units are permuted within their groups."""

    tokens: np.ndarray
    units: np.ndarray
    values: np.ndarray
    groups: np.ndarray

    def permuted(self, rng: np.random.Generator) -> np.ndarray:
        """Return labels [U] in another order."""
        shuffled = np.empty_like(self.values)
        shuffled[self.groups.argsort(kind="stable")] = self.values[np.lexsort((rng.random(len(self.values)), self.groups))]
        return shuffled


def scenes_of(number: int, level: Level, folder: Path) -> tuple[list[Scene], list[Record]]:
    """Return scenes with unseen handwriting, drawn into `folder`, and a conversation of one question about each."""
    rng = random.Random("what experts learn")
    scenes, records = [], []
    for index in range(number):
        scene = sample_scene(rng, level)
        picture = folder / f"{index}.png"
        render(scene, rng, "test").save(picture)
        (question,) = sample_questions(scene, rng, 1)
        record = Record(f"scene {index}", ((f"<image>\n{question.text}", question.answer),), (picture,), extra={"family": question.family})
        scenes.append(scene)
        records.append(record)
    return scenes, records


def label(traces: Sequence[Trace], scenes: Sequence[Scene], families: Sequence[str]) -> dict[str, Labelled]:
    """Return the labels of the tokens of all traces, each of one scene, one after another."""
    kinds = [trace.kinds_T.numpy() for trace in traces]
    rows_T = np.repeat(np.arange(len(traces)), [len(kinds_T) for kinds_T in kinds])
    kinds_T = np.concatenate(kinds)
    words, ordinary = kinds_T == TEXT, np.isin(kinds_T, (IMAGE, TEXT))
    places_T3 = np.concatenate([trace.places_T3.numpy() for trace in traces])
    level = scenes[0].level
    cells_T = (places_T3[:, 1] // 2) * level.grid + places_T3[:, 2] // 2  # a cell has two rows and two columns of patches
    patches = (kinds_T == IMAGE) & (places_T3[:, 1] >= 0)
    items: list[Item | None] = [None] * (len(scenes) * level.grid**2)
    for row, scene in enumerate(scenes):
        for item in scene.items:
            items[row * level.grid**2 + item.cell] = item
    cell_T = rows_T * level.grid**2 + cells_T
    occupied_U = np.array([item is not None for item in items])
    digits = patches & occupied_U[np.where(patches, cell_T, 0)]
    numbers_U = np.cumsum(occupied_U) - 1  # of the units that hold a digit
    held = [item for item in items if item is not None]
    return {
        "modality": _labelled(ordinary, np.cumsum(ordinary) - 1, kinds_T[ordinary], rows_T[ordinary]),
        "family": _labelled(words, rows_T, families),
        "occupied": _labelled(patches, cell_T, occupied_U),
        "digit": _labelled(digits, numbers_U[np.where(digits, cell_T, 0)], [item.digit for item in held]),
        "colour": _labelled(digits, numbers_U[np.where(digits, cell_T, 0)], [item.colour for item in held]),
    }


def _labelled(
    mask_T: np.ndarray, units_T: np.ndarray, labels_U: Sequence[Any] | np.ndarray, groups_U: np.ndarray | None = None
) -> Labelled:
    """Return the labels of the tokens in the mask; units are in one group by default."""
    values_U = np.unique(np.asarray(labels_U), return_inverse=True)[1]
    return Labelled(np.flatnonzero(mask_T), units_T[mask_T], values_U, np.zeros_like(values_U) if groups_U is None else groups_U)


def explained(experts_T: np.ndarray, values_T: np.ndarray) -> float:
    """Return the mutual information of expert and label as a share of the label's entropy; 0 if the label is constant."""
    values = int(values_T.max()) + 1
    counts = np.bincount(experts_T * values + values_T, minlength=(int(experts_T.max()) + 1) * values)
    table = torch.from_numpy(counts).view(-1, values)
    whole = entropy(table.sum(0))
    return mutual_information(table) / whole if whole > 0 else 0.0


def measure(checkpoint: str, scenes: Sequence[Scene], records: Sequence[Record], permutations: int) -> list[dict[str, Any]]:
    """Return the measure of every label and layer of a checkpoint: `found`, `chance` (its mean over permutations), `p`."""
    model, processor = load_checkpoint(checkpoint)
    traces: list[Trace] = []
    with show_progress(f"tracing {checkpoint}", len(records), Console(stderr=True)) as advance:
        for batch in trace_records(model, processor, records, BATCH):
            split = batch.split()
            traces += split
            advance(len(split))
    experts_LT = np.concatenate([trace.ids_LTK[..., 0].numpy() for trace in traces], axis=1)
    results = []
    for name, labelled in label(traces, scenes, [record.extra["family"] for record in records]).items():
        rng = np.random.default_rng(0)
        drawn = [labelled.values, *(labelled.permuted(rng) for _ in range(permutations))]
        for layer, experts_T in zip(traces[0].layers, experts_LT[:, labelled.tokens], strict=True):
            found, *chance = (explained(experts_T, values_U[labelled.units]) for values_U in drawn)
            p = permutation_p(found, chance)
            results.append({"label": name, "layer": layer, "found": found, "chance": float(np.mean(chance)), "p": p})
    return results


def report(found: Mapping[int, Sequence[Sequence[dict[str, Any]]]], permutations: int) -> str:
    """Return the table of the last step: label, layer, measure and chance (means over the seeds), and the largest p of a seed, adjusted for
    the number of labels and layers."""
    last = found[max(found)]
    adjusted = [holm([one["p"] for one in seed]) for seed in last]
    lines = [["label", "layer", "share of its entropy that the first expert explains", "of which by chance", "p, adjusted"]]
    for place, one in enumerate(last[0]):
        share, chance = (np.mean([seed[place][key] for seed in last]) for key in ("found", "chance"))
        lines.append([one["label"], str(one["layer"]), f"{share:.3f}", f"{chance:.3f}", f"{max(p[place] for p in adjusted):.2g}"])
    p = f"p: the largest of the seeds; {permutations} permutations, Holm's adjustment for {len(last[0])} tests."
    return f"{markdown(lines)}\n\nStep {max(found)}, seeds: {len(last)}. {p}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="STEP=CHECKPOINT")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS)
    parser.add_argument("--level", choices=LEVELS, default=STANDARD.name)
    arguments = parser.parse_args()
    given = [text.partition("=") for text in arguments.checkpoints]
    wrong = [step + equals + folder for step, equals, folder in given if not (step.isdecimal() and folder)]
    if wrong:
        parser.error(f"{wrong[0]} must be STEP=CHECKPOINT, such as 100=runs/demo/stage3/checkpoint-100")
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[int, list[list[dict[str, Any]]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        scenes, records = scenes_of(arguments.scenes, LEVELS[arguments.level], Path(folder))
        for step, _, checkpoint in given:
            found[int(step)].append(measure(checkpoint, scenes, records, arguments.permutations))
    (arguments.out / "learned.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "learned.md").write_text(report(found, arguments.permutations), encoding="utf-8")
    save(plot_learned(found, LABELS), arguments.out / "learned.png")
    print(report(found, arguments.permutations))


if __name__ == "__main__":
    main()
