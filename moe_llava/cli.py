"""The command `moe-llava`: a function per verb. Heavy imports stand inside the verbs, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moe_llava.data.check import Report
    from moe_llava.serving.chat import Conversation
    from moe_llava.training.budget import Budget, StageCost

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Dense vision-language models made sparse: trained, asked, looked into.",
)

Checkpoint = Annotated[str, typer.Argument(help="a checkpoint folder, or a hub id")]


def main() -> None:
    """Entry point. What a user can put right is one line on standard error and exit status 2."""
    with contextlib.suppress(BrokenPipeError):
        app()


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the errors that name what is wrong with the input into one line and exit status 2."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Where bitsandbytes is installed, every import of transformers' Trainer would warn of a kernel that it could have on some CPUs.
    getLogger("bitsandbytes").setLevel(ERROR)
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """A run that was asked to stop says so, with the exit status of a process that SIGTERM ended."""
    from moe_llava.training.saves import Stopped

    try:
        yield
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(128 + signal.SIGTERM) from stopped


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, checkpoints and report; what it holds is reused")] = Path("runs/demo"),
    recipe: Annotated[Path | None, typer.Option(help="a recipe instead of the shipped recipes/digits.yaml")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="change the recipe: a.b=value")] = None,
    train_images: Annotated[int | None, typer.Option(help="pictures to train on")] = None,
    test_images: Annotated[int | None, typer.Option(help="pictures of unseen handwriting to test on")] = None,
) -> None:
    """Trains the three stages on scenes of real handwritten digits, tests them, and writes a report with pictures."""
    with user_errors(), stops():
        from moe_llava.experiments.demo import run_demo

        run_demo(out, recipe, settings or [], train_images, test_images)


@app.command()
def digits(
    out: Annotated[Path, typer.Argument(help="folder to write `data` and `base` into")] = Path("runs/digits"),
    train_images: Annotated[int | None, typer.Option(help="pictures to train on")] = None,
    test_images: Annotated[int | None, typer.Option(help="pictures of unseen handwriting to test on")] = None,
) -> None:
    """Writes the digits data set (LLaVA files) and the dense model that training on it starts from."""
    with user_errors():
        from rich.console import Console

        from moe_llava.experiments.demo import prepare

        prepare(out, train_images, test_images, Console())
        print(f"{out / 'data'}: pictures and questions; {out / 'base'}: the dense model to start from")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/digits.yaml")],
    stage: Annotated[list[int] | None, typer.Option(min=1, max=3, help="run this stage only; may be given several times")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="change the recipe: a.b=value")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep finished stages, go on with an unfinished one")] = False,
) -> None:
    """Runs MoE-Tuning: the projector, then the language model, then the experts."""
    with user_errors(), stops():
        from rich.console import Console

        from moe_llava.training.recipe import load_recipe, stages_of

        loaded = load_recipe(recipe, settings)

        from moe_llava.training.run import train as run  # takes seconds, and a mistake in the recipe is told before

        run(loaded, sorted(set(stage or stages_of(loaded))), resume, Console())


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="a data file: a JSON list, or JSON lines")],
    images: Annotated[Path, typer.Option(help="folder that its image names are relative to")] = Path("."),
    model: Annotated[str | None, typer.Option(help="a checkpoint, to count tokens with its tokenizer: a folder, or a hub id")] = None,
    template: Annotated[str | None, typer.Option(help="a conversation form, such as phi or plain; default: the tokenizer's own")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens beyond which a record is cut")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="to tell how much of a batch would be padding")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Looks through a data file: every problem by record, lengths, padding. Exit status 1 if there is a problem."""
    with user_errors():
        from moe_llava.checkpoints.load import load_processor
        from moe_llava.data.batches import EmptyImage
        from moe_llava.data.check import check_data
        from moe_llava.data.templates import TEMPLATES

        if template is not None and template not in TEMPLATES:
            raise ValueError(f"--template is {template!r}, but must be one of {', '.join(TEMPLATES)}")
        processor = None if model is None else load_processor(model)
        tokenizer, image_tokens = (None, 1) if processor is None else (processor.tokenizer, EmptyImage.of(processor).tokens)
        report = check_data(data, images, tokenizer, template, image_tokens, max_length)
    counts: dict[str, float] = {
        "records": report.records,
        "text_only": report.text_only,
        "images": report.images,
        "problems": len(report.problems),
    }
    if tokenizer is not None:
        counts |= {"tokens": sum(report.lengths), "learnt": report.learnt, "cut": report.cut, "padding": report.padding(batch_size)}
    if as_json:
        print(json.dumps(counts | {"problems": report.problems, "lengths": report.histogram()}))
    else:
        _print_check(report, counts)
    if report.problems:
        raise typer.Exit(1)


def _print_check(report: Report, counts: dict[str, float]) -> None:
    for problem in report.problems:
        print(problem)
    print(
        ", ".join(f"{name.replace('_', '-')} {value:.1%}" if name == "padding" else f"{name} {value:,}" for name, value in counts.items())
    )
    histogram = report.histogram()
    for span, count in histogram.items():
        bar = "#" * max(1, round(50 * count / max(histogram.values())))
        print(f"{span:>12} tokens  {bar} {count:,}")


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
    seed: Annotated[int, typer.Option(help="of the routers' start")] = 0,
) -> None:
    """Makes a dense checkpoint sparse: each chosen FFN becomes several experts, and the result computes the same."""
    with user_errors():
        from moe_llava.checkpoints.folders import new_folder
        from moe_llava.checkpoints.load import load_checkpoint
        from moe_llava.model import MoeLlavaProcessor
        from moe_llava.model.upcycling import upcycle as make_sparse

        with new_folder(out) as folder:
            model, processor = load_checkpoint(dense)
            layers: str | list[int] = moe_layers
            if moe_layers[:1].isdigit():
                if not re.fullmatch(r"\d+(,\d+)*", moe_layers):
                    raise ValueError(f"--moe-layers is {moe_layers!r}, but must be a name, or indices with commas between: 0,2,4")
                layers = [int(index) for index in moe_layers.split(",")]
            sparse = make_sparse(
                model,
                num_experts=num_experts,
                num_experts_per_tok=num_experts_per_tok,
                moe_layers=layers,
                norm_topk_prob=norm_topk_prob,
                capacity_factor=capacity_factor,
                use_residual=use_residual,
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
        from moe_llava.checkpoints.folders import new_folder
        from moe_llava.training.adapters import merge as run

        with new_folder(out) as folder:
            model, processor = run(adapter, base)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        print(f"{out}: {model.num_parameters():,} parameters, the adapter among them")


@app.command()
def params(
    target: Annotated[str, typer.Argument(help="a recipe (.yaml), or a checkpoint, ours or a published one: a folder or a hub id")],
    vision_towers: Annotated[Path | None, typer.Option(help="for a published checkpoint: folder with the vision towers")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Counts a model's parameters, arithmetic and memory from its configuration, without its weights."""
    with user_errors():
        from moe_llava.training.budget import survey

        budget, training = survey(target, vision_towers)
        if as_json:
            costs = {
                "training_bytes": {stage: cost.memory for stage, cost in training.items()},
                "training_flops": {stage: cost.flops for stage, cost in training.items()},
            }
            print(json.dumps(budget.as_dict() | costs))
        else:
            _print_budget(budget, training)


def _print_budget(budget: Budget, training: dict[str, StageCost]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moe_llava.training.budget import CONTEXT

    table = Table("part", "total", "active per token")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, total in budget.total.items():
        table.add_row(part, f"{total:,}", f"{budget.active[part]:,}")
    table.add_section()
    table.add_row("language model", *(f"{number:,}" for number in budget.language_model))
    table.add_row("all", f"{sum(budget.total.values()):,}", f"{sum(budget.active.values()):,}")
    console = Console()
    console.print(table)
    sparse = ""
    if budget.experts:
        layers = ", ".join(map(str, budget.moe_layers))
        sparse = f", {len(budget.moe_layers)} of them sparse ({layers}): {budget.experts[0]} experts, a token uses {budget.experts[1]}"
    lines = [
        f"layers: {budget.layers}{sparse}",
        f"forward pass of the language model: {budget.flops / 1e9:,.3f} GFLOPs per token, at {CONTEXT:,} tokens of context",
        f"cache of keys and values in bfloat16: {budget.cache_bytes:,} bytes per token",
        f"weights in bfloat16: {_megabytes(budget.weight_bytes)}",
        *(
            f"training, {stage}: {_megabytes(cost.memory)} on each device for weights, gradients and AdamW, without activations; "
            f"{cost.flops / 1e9:,.3f} GFLOPs per token"
            for stage, cost in training.items()
        ),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@app.command()
def benchmarks(as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """Lists the benchmarks, and the files that each needs."""
    with user_errors():
        from moe_llava.evaluation.benchmark import NAMES, find_benchmark

        found = [find_benchmark(name) for name in NAMES]
    if as_json:
        print(json.dumps({benchmark.name: {"folder": benchmark.folder, "files": benchmark.files} for benchmark in found}))
        return
    for benchmark in found:
        print(f"{benchmark.name}: {benchmark.title}, in a folder {benchmark.folder}")
        for name, purpose in benchmark.files.items():
            print(f"  {name}: {purpose}")


@app.command()
def score(
    name: Annotated[str, typer.Argument(help="a benchmark; `moe-llava benchmarks` lists them")],
    data: Annotated[Path, typer.Option(help="the folder with its files, or the one of LLaVA's evaluation that holds it")],
    answers: Annotated[Path, typer.Option(help="JSON lines of question_id and text")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Scores answers to a benchmark as its published script does, with 95% intervals."""
    with user_errors():
        from moe_llava.evaluation.score import score_answers

        found = score_answers(name, data, answers)
    if as_json:
        print(json.dumps(found))
    else:
        _print_scores(found)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    benchmark: Annotated[str, typer.Option(help="one of those that `moe-llava benchmarks` lists, or several with commas between")],
    data: Annotated[Path, typer.Option(help="the folder with the benchmark's files, or the one of LLaVA's evaluation that holds it")],
    out: Annotated[Path, typer.Option(help="folder for answers, results and uploads; answers that are there are not asked for again")],
    batch_size: Annotated[int, typer.Option(min=1, help="questions at once, in each process")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many questions of each benchmark, the first ones")] = None,
) -> None:
    """Asks a checkpoint the questions of benchmarks and scores its answers. Run again, it goes on where it was stopped."""
    with user_errors():
        from rich.console import Console

        from moe_llava.evaluation.benchmark import find_benchmark

        names = [name.strip() for name in benchmark.split(",")]
        for name in names:
            find_benchmark(name)

        from moe_llava.evaluation.evaluate import evaluate as run  # takes seconds, and a mistake in a name is told before

        for found in run(checkpoint, names, data, out, batch_size, limit, Console()):
            _print_scores(found)


def _print_scores(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "value", "95% interval", title=found["benchmark"])
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in found["scores"].items():
        low, high = found["intervals"][name]
        table.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}")
    Console().print(table)
    for key, words in (("missing", "questions without an answer, counted as wrong"), ("unknown", "answers to no question")):
        if found.get(key):
            print(f"{len(found[key])} {words}: {', '.join(found[key][:20])}{' ...' if len(found[key]) > 20 else ''}")


@app.command()
def chat(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="a question; without one, a conversation")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="an image to talk about; may be given several times")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per answer")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
) -> None:
    """Asks a model about images: once, or as a conversation on the terminal."""
    with user_errors():
        from moe_llava.checkpoints.load import best_device, load_checkpoint
        from moe_llava.serving.chat import Conversation

        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty: ask something")
        model, processor = load_checkpoint(checkpoint)
        conversation = Conversation(model.to(best_device()), processor, max_new_tokens)
        for path in image or []:
            conversation.add_image(path)
        if prompt is not None:
            _answer(conversation, prompt, as_json)
            return
        for line in _lines():
            try:
                if line.startswith("/image "):
                    conversation.add_image(Path(line.removeprefix("/image ").strip()))
                else:
                    _answer(conversation, line, as_json)
            except ValueError as error:  # a wrong line does not end the conversation
                print(f"error: {error}", file=sys.stderr)


def _answer(conversation: Conversation, question: str, as_json: bool) -> None:
    """Asks, and prints the answer as it comes, or as one JSON object."""
    answer = ""
    for piece in conversation.ask(question):
        answer += piece
        if not as_json:
            print(piece, end="", flush=True)
    print(json.dumps({"question": question, "answer": answer.strip()}) if as_json else "", flush=True)


def _lines() -> Iterator[str]:
    """Lines typed or piped in, until the end of input or `/quit`."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask about the image. /image FILE adds one, /quit ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line:
            yield line


if __name__ == "__main__":
    main()
