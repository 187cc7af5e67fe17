"""A conversation on a terminal, or through pipes: answers go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.table import Table

from moe_llava.common.messages import did_you_mean
from moe_llava.serving.chat.completion import Completer
from moe_llava.serving.chat.conversation import Conversation, OpenedImage, OpenedVideo, Turn

COMMANDS = {
    "/image": ("FILE ...", "adds images to the next question"),
    "/video": ("FILE", "adds a video to the next question, for a model that takes videos"),
    "/new": ("", "starts a new conversation"),
    "/regenerate": ("", "generates another answer to the last question"),
    "/routes": ("[LAYER]", "shows the first expert of every patch, and of every token of the last answer"),
    "/save": ("FILE", "saves the conversation as a data file"),
    "/help": ("", "shows these commands"),
    "/quit": ("", "leaves, like Ctrl-D. Ctrl-C stops an answer"),
}


class Terminal:
    """Run a conversation. `name`: of the model. `interactive`: a person types; otherwise one question is answered, or lines come through a
    pipe."""

    def __init__(self, conversation: Conversation, name: str, as_json: bool, interactive: bool):
        self.conversation = conversation
        self.name = name
        self.as_json = as_json
        self.interactive = interactive
        self._out = Console()
        self._errors = Console(stderr=True)
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/video": self._video,
            "/new": self._new,
            "/regenerate": self._regenerate,
            "/routes": self._routes,
            "/save": self._save,
            "/help": self._help,
        }

    def ask(self, question: str) -> None:
        """Ask a question, and show the answer as it is generated, or as one JSON object. Raises as Conversation.ask does."""
        if self.interactive and not self.conversation.turns and not self.conversation.pending:
            self._note("this question has no image; /image FILE adds one")
        if unknown := self.conversation.unknown_words(question):
            self._note(f"not in the model's vocabulary: {', '.join(unknown)}")
        self._show(self.conversation.ask(question))

    def converse(self) -> bool:
        """Process questions and commands until the end of input or `/quit`. An error is printed and does not end the conversation. Return
        whether there was none."""
        succeeded = True
        for line in self._lines():
            if line.split()[0] == "/quit":
                break
            try:
                self._run(line)
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: raised by torch, for example without memory
                succeeded = False
                self._note(f"error: {_plain(error)}", "red")
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._note("stopped")
        return succeeded

    def _lines(self) -> Iterator[str]:
        """Yield the lines that are typed or piped in, without empty ones."""
        if not self.interactive:
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        with contextlib.suppress(ImportError):  # Windows has no readline, and its console edits lines
            import readline  # adds history and keys to `input`

            Completer(readline, list(COMMANDS), ("/image", "/video", "/save")).install()
        self._note(f"{self.name}. /image FILE adds an image, /help shows all commands.")
        while True:
            try:
                line = self._input().strip()
            except KeyboardInterrupt:
                self._note("\n/quit or Ctrl-D leaves")
            except EOFError:
                self._note("")
                return
            else:
                if line:
                    yield line

    def _input(self) -> str:
        if sys.stdout.isatty():
            return input("> ")
        self._errors.print("> ", end="")  # standard output has only the answers
        return input()

    def _run(self, line: str) -> None:
        if not line.startswith("/"):
            return self.ask(line)
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ValueError(f"{name} is not a command" + did_you_mean(name, COMMANDS, "; /help shows all commands"))
        return self._commands[name](rest.strip())

    def _show(self, pieces: Generator[str, None, None]) -> None:
        before = self.conversation.turns
        with contextlib.closing(pieces):
            try:
                self._print(pieces)
            except KeyboardInterrupt:  # the text so far is kept
                if not self.interactive:
                    raise
        if self.conversation.turns is before:
            return self._note("stopped; there is no answer")
        turn = self.conversation.turns[-1]
        if self.as_json:
            print(json.dumps(_object(turn)), flush=True)
        elif self._out.is_terminal:
            self._out.print(_markdown(turn.answer))
        else:
            print(flush=True)
        if self.interactive and turn.finish_reason != "stop":
            length = "1 token" if len(turn.tokens) == 1 else f"{len(turn.tokens)} tokens"
            self._note("stopped" if turn.finish_reason == "interrupted" else f"stopped at the limit of {length}")
        return None

    def _print(self, pieces: Iterator[str]) -> None:
        """Print an answer as it is generated. On a terminal, the last lines are redrawn, and removed at the end."""
        if self.as_json:
            for _ in pieces:
                pass
        elif self._out.is_terminal:
            answer = Tail()
            with Live(answer, console=self._out, transient=True):
                for piece in pieces:
                    answer.text += piece
        else:
            for piece in pieces:
                print(piece, end="", flush=True)

    def _image(self, rest: str) -> None:
        paths = [_path(rest)] if _path(rest).is_file() else [_path(word) for word in _words(rest)]
        if not paths:
            raise ValueError("/image needs one or more files")
        for image in self.conversation.add_images(paths):
            self._note(f"{image.path} ({image.content.width} x {image.content.height})")

    def _video(self, rest: str) -> None:
        if not rest:
            raise ValueError("/video needs a file")
        path = _path(rest) if _path(rest).is_file() else _path(" ".join(_words(rest)))
        clip = self.conversation.add_video(path).content
        self._note(f"{path} ({clip.info.width} x {clip.info.height}, {len(clip.indices)} of {clip.info.frames} frames)")

    def _new(self, rest: str) -> None:
        self.conversation.clear()
        self._saved.clear()
        self._note("new conversation")

    def _regenerate(self, rest: str) -> None:
        pieces = self.conversation.regenerate()
        if self.conversation.settings.temperature == 0 and self.conversation.turns[-1].finish_reason != "interrupted":
            self._note("at temperature 0 the answer is the same; with --temperature 0.7 it varies")
        self._show(pieces)

    def _routes(self, rest: str) -> None:
        from moe_llava.routing.grids import draw_routes  # imports matplotlib, which takes a second

        if rest and not rest.isdecimal():
            raise ValueError(f"/routes needs the number of a layer, not {rest}")
        trace = self.conversation.trace()
        names = [image.path.name for image in self.conversation.images()]
        self._errors.print(draw_routes(trace, names, int(rest) if rest else None))

    def _save(self, rest: str) -> None:
        """Write the conversation to a file. An existing file is overwritten only if this conversation wrote it."""
        if not rest:
            raise ValueError("/save needs a file")
        file = _path(" ".join(_words(rest)) if rest[:1] in ("'", '"') else rest)
        text = json.dumps([self.conversation.record(self.name)], indent=1, ensure_ascii=False) + "\n"
        try:
            with file.open("w" if file.resolve() in self._saved else "x", encoding="utf-8") as opened:
                opened.write(text)
        except FileExistsError as error:
            raise ValueError(f"{file} exists already: name another file") from error
        except OSError as error:
            raise ValueError(f"{file} cannot be written: {error.strerror}") from error
        self._saved.add(file.resolve())
        self._note(f"written to {file}")

    def _help(self, rest: str) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, (arguments, effect) in COMMANDS.items():
            table.add_row(f"{name} {arguments}".replace("[", r"\["), effect)
        self._errors.print(table)

    def _note(self, text: str, style: str = "dim") -> None:
        self._errors.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Tail:
    """Show the last lines of an answer, as many as fit on the terminal."""

    text = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(_markdown(self.text), options.update(height=None))[1 - options.size.height :]:
            yield from line
            yield Segment.line()


def _words(text: str) -> list[str]:
    """Split file names as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text} has an unclosed quotation mark, or ends with a backslash") from error


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: the home folder of ~ is unknown") from error


def _plain(error: Exception) -> str:
    """Return the message of an error, without the system's number."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _markdown(text: str) -> Markdown:
    """Render Markdown without control characters."""
    return Markdown("".join(letter for letter in text if letter.isprintable() or letter in "\n\t"))


def _object(turn: Turn) -> dict[str, object]:
    return {
        "question": turn.question,
        "images": [str(medium.path) for medium in turn.media if isinstance(medium, OpenedImage)],
        "videos": [str(medium.path) for medium in turn.media if isinstance(medium, OpenedVideo)],
        "answer": turn.answer,
        "finish_reason": turn.finish_reason,
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": len(turn.tokens),
        "seconds": round(turn.seconds, 3),
    }
