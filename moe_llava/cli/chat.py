"""The verb chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_llava.cli.common import Checkpoint, app, user_errors

if TYPE_CHECKING:
    from moe_llava.serving.chat import Conversation


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
        from moe_llava.checkpoints.files import check_checkpoint
        from moe_llava.data.records import open_image

        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty: ask something")
        check_checkpoint(checkpoint)
        for path in image or []:
            open_image(path, "the conversation")

        # These take seconds, and a mistake is told before.
        from moe_llava.checkpoints.load import best_device, load_checkpoint
        from moe_llava.serving.chat import Conversation

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
