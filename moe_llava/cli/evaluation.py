"""Verbs of evaluation: benchmarks, evaluate, score, judge, table, pope-questions."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_llava.cli.common import Checkpoint, Dtype, KeepExperts, heavy_imports, user_errors, verb


@verb("Evaluate", "moe-llava benchmarks")
def benchmarks(as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """List the benchmarks, and the files that each needs."""
    with user_errors():
        from moe_llava.evaluation.score.benchmark import NAMES, find_benchmark

        found = [find_benchmark(name) for name in NAMES]
    if as_json:
        print(json.dumps({benchmark.name: {"folder": benchmark.folder, "files": benchmark.files} for benchmark in found}))
        return
    for benchmark in found:
        place = f"in a folder {benchmark.folder}" if benchmark.folder else "in a file of conversations with the expected answers"
        print(f"{benchmark.name}: {benchmark.title}, {place}")
        for name, purpose in benchmark.files.items():
            print(f"  {name}: {purpose}")


OWN = "for the benchmark questions: "
Metric = Annotated[
    str | None,
    typer.Option(help=f"{OWN}exact (the default), contains, yes_no, choice, number or word_f1; a record's key metric overrides it"),
]
GroupBy = Annotated[str | None, typer.Option(help=f"{OWN}a key of the records whose value groups them, such as family")]


@verb("Evaluate")
def score(
    name: Annotated[str, typer.Argument(help="a benchmark; `moe-llava benchmarks` lists them")],
    data: Annotated[
        Path, typer.Option(help="the folder with its files, or the one of LLaVA's evaluation that holds it; or your own questions")
    ],
    answers: Annotated[Path, typer.Option(help="JSON lines of question_id and text")],
    metric: Metric = None,
    group_by: GroupBy = None,
    model: Annotated[str | None, typer.Option(help="who answered; default: what the answers name as model_id")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Score answers to a benchmark as its published script does, with 95% intervals."""
    with user_errors():
        from moe_llava.evaluation.score.benchmark import Options
        from moe_llava.evaluation.score.scoring import score_answers

        found = score_answers(name, data, answers, Options(None, metric, group_by)) | ({} if model is None else {"model": model})
    if as_json:
        print(json.dumps(found))
    else:
        _print_scores(found)


@verb("Evaluate")
def judge(
    name: Annotated[str, typer.Argument(help="llava-bench or mm-vet")],
    data: Annotated[Path, typer.Option(help="the folder with its files, or the one of LLaVA's evaluation that holds it")],
    answers: Annotated[Path, typer.Option(help="JSON lines of question_id and text; the judge's replies are kept beside it")],
    endpoint: Annotated[str, typer.Option(help="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1")],
    judge_model: Annotated[str, typer.Option(help="the model that judges, by the name that the server has for it")],
    prices: Annotated[
        tuple[float, float] | None,
        typer.Option(min=0, help="prices of a million prompt tokens and of a million reply tokens, to report the cost"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Score answers by the opinion of a language model. Its API key is read from MOE_LLAVA_JUDGE_KEY; no query is sent twice."""
    with user_errors():
        from moe_llava.evaluation.score.scoring import judge_answers

        found = judge_answers(name, data, answers, endpoint, judge_model, prices)
    if as_json:
        print(json.dumps(found))
        return
    _print_scores(found)
    sent = found["judge"].pop("parameters")
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["judge"].items()))
    print("sent:", "; ".join(", ".join(f"{key} {value}" for key, value in parameters.items()) for parameters in sent))
    if any("temperature" not in parameters for parameters in sent):
        print("The judge accepts no temperature 0, so it used its own: another run may give other scores.")


@verb("Evaluate", "moe-llava table runs/sparse runs/dense --format html")
def table(
    results: Annotated[list[Path], typer.Argument(help="result.json files, or folders with BENCHMARK/result.json")],
    form: Annotated[str, typer.Option("--format", help="markdown, csv or html")] = "markdown",
    reference: Annotated[bool, typer.Option("--reference", help="add the paper's published scores, apart")] = False,
) -> None:
    """Show the main scores of several models side by side, with 95% intervals."""
    with user_errors():
        from moe_llava.evaluation.score.tables import write_table

        print(write_table(results, form, reference), end="")


@verb("Evaluate", "moe-llava evaluate runs/demo/stage3 --benchmark digits --data runs/demo/data --out runs/evaluation")
def evaluate(
    checkpoint: Checkpoint,
    benchmark: Annotated[str, typer.Option(help="a benchmark, or several with commas between; `moe-llava benchmarks` lists them")],
    data: Annotated[
        Path,
        typer.Option(help="the folder with the benchmark's files, or the one of LLaVA's evaluation that holds it; or your own questions"),
    ],
    out: Annotated[Path, typer.Option(help="folder for answers, results and uploads; a run resumes from the answers in it")],
    metric: Metric = None,
    group_by: GroupBy = None,
    images: Annotated[
        Path | None,
        typer.Option(help=f"{OWN}folder that the data's image names are relative to; default: that of the file"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions per batch, in each process")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="evaluate only the first LIMIT questions of each benchmark")] = None,
    perturb: Annotated[
        str | None,
        typer.Option(
            help="repeat under these perturbations and report the drop of each: noise,typos:2 is noise at strengths 1 to 5, typos at 2"
        ),
    ] = None,
    dtype: Dtype = "auto",
    keep_experts: KeepExperts = None,
) -> None:
    """Evaluate a checkpoint on benchmarks. The same command resumes a run that was stopped."""
    with user_errors():
        from rich.console import Console

        from moe_llava.checkpoints.files import check_checkpoint, check_dtype
        from moe_llava.evaluation.score.benchmark import Options, configured, find_benchmark
        from moe_llava.evaluation.stress.perturb import parse_perturbations

        perturbations = [] if perturb is None else parse_perturbations(perturb)
        names = [name.strip() for name in benchmark.split(",")]
        options = Options(images, metric, group_by)
        for name in names:
            configured(find_benchmark(name), options)
        check_dtype(dtype, keep_experts)
        check_checkpoint(checkpoint, keep_experts)

        with heavy_imports():
            from moe_llava.evaluation.evaluate import evaluate as run  # takes seconds, and a mistake in a name is reported first

        try:
            for found in run(checkpoint, names, data, out, batch_size, limit, Console(), perturbations, keep_experts, options, dtype):
                _print_scores(found)
                if "robustness" in found:
                    _print_drops(found["robustness"], out / found["benchmark"] / "robustness.png")
        except KeyboardInterrupt:
            print(f"stopped: the same command continues from the answers in {out}", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGINT) from None


def _print_scores(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moe_llava.evaluation.score.benchmark import find_benchmark

    answered, there = found["questions"], found.get("questions_in_all", found["questions"])
    of = f"{answered:,} questions" if answered == there else f"the first {answered:,} of {there:,} questions"
    benchmark, counts = find_benchmark(found["benchmark"]), found.get("counts", {})
    table = Table("score", benchmark.unit, "95% interval", *(["questions"] if counts else []), title=f"{found['benchmark']}, {of}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in found["scores"].items():
        shown, low, high = (f"{benchmark.shown * number:.2f}" for number in (value, *found["intervals"][name]))
        table.add_row(name, shown, f"{low} to {high}", *([f"{counts[name]:,}" if name in counts else ""] if counts else []))
    Console().print(table)
    reported = {
        "missing": "questions without an answer, counted as wrong",
        "unknown": "answers to no question",
        "unreadable": "questions whose judgement could not be read, counted as wrong",
    }
    for key, words in reported.items():
        if found.get(key):
            print(f"{len(found[key])} {words}: {', '.join(found[key][:20])}{' ...' if len(found[key]) > 20 else ''}")
    for token, number in found["end_tokens"].items():
        print(f"{number} answers end with {token}, which scores count as part of the answer: remove it from the answers and score again")


def _print_drops(summary: dict[str, Any], picture: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    clean = summary["clean"]
    title = f"{summary['benchmark']}: {clean['mean']:.1%} of {clean['n']:,} right without perturbation"
    table = Table("under", "right", "drop in points", "95% interval", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for drop in summary["drops"]:
        low, mean, high = (100 * drop[key] for key in ("low", "drop", "high"))
        table.add_row(f"{drop['name']}:{drop['strength']}", f"{drop['right']:.1%}", f"{mean:.1f}", f"{low:.1f} to {high:.1f}")
    Console().print(table)
    print(picture)


@verb("Evaluate", "moe-llava pope-questions instances_val2014.json runs/pope --images-per-set 500")
def pope_questions(
    annotations: Annotated[Path, typer.Argument(help="COCO's instances as JSON, or JSON lines of image and objects")],
    out: Annotated[Path, typer.Argument(help="folder for questions and labels; must not exist")],
    images_per_set: Annotated[
        int | None, typer.Option(min=1, help="number of pictures to draw; default: all that show an object and lack one")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the random choices")] = 0,
) -> None:
    """Write questions about present and absent objects in your own images, as POPE does."""
    with user_errors():
        from moe_llava.evaluation.stress.pope_questions import IMAGES, write_pope_questions

        written = write_pope_questions(annotations, out, images_per_set, seed)
    print(f"{out}: {written['questions']:,} questions of each kind, about {written['images']:,} pictures; put these into {out / IMAGES}")
    for reason, number in written["left_out"].items():
        if number:
            print(f"{number:,} pictures left out: {reason}")
