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
from moe_llava.serving.chat.conversation import Conversation, Turn

COMMANDS = {
    "/image": ("FILE ...", "adds images, which belong to the next question"),
    "/new": ("", "begins a new conversation"),
    "/regenerate": ("", "answers the last question once more"),
    "/routes": ("[LAYER]", "shows which expert took which patch, and which token of the last answer"),
    "/save": ("FILE", "writes the conversation, as a data file has one"),
    "/help": ("", "shows these commands"),
    "/quit": ("", "ends; so does Ctrl-D. Ctrl-C stops an answer"),
}


class Terminal:
    """`name`: of the model. `interactive`: a person types; otherwise one question is answered, or lines come through a pipe."""

    def __init__(self, conversation: Conversation, name: str, as_json: bool, interactive: bool):
        self.conversation = conversation
        self.name = name
        self.as_json = as_json
        self.interactive = interactive
        self._out = Console()
        self._told = Console(stderr=True)
        self._saved: set[Path] = set()
        self._does: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/new": self._new,
            "/regenerate": self._regenerate,
            "/routes": self._routes,
            "/save": self._save,
            "/help": self._help,
        }

    def ask(self, question: str) -> None:
        """Ask a question, and show the answer as it is generated, or as one JSON object. Raises as Conversation.ask does."""
        if self.interactive and not self.conversation.turns and not self.conversation.waiting:
            self._tell("no image comes with this question; /image FILE adds one")
        self._show(self.conversation.ask(question))

    def converse(self) -> bool:
        """Take questions and commands until the end of input or `/quit`. An error is printed and does not end the conversation. Returns
        whether there was none."""
        right = True
        for line in self._lines():
            if line.split()[0] == "/quit":
                break
            try:
                self._take(line)
            except (ValueError, OSError, RuntimeError) as error:  # the last: of torch, such as too little memory
                right = False
                self._tell(f"error: {_plain(error)}", "red")
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._tell("stopped")
        return right

    def _lines(self) -> Iterator[str]:
        """Yield the lines that are typed or piped in, without empty ones."""
        if not self.interactive:
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        with contextlib.suppress(ImportError):  # Windows edits lines by itself
            import readline  # `input` has history and keys by it

            Completer(readline, list(COMMANDS), ("/image", "/save")).install()
        self._tell(f"{self.name}. /image FILE adds an image, /help shows what else there is.")
        while True:
            try:
                line = self._input().strip()
            except KeyboardInterrupt:
                self._tell("\n/quit or Ctrl-D ends")
            except EOFError:
                self._tell("")
                return
            else:
                if line:
                    yield line

    def _input(self) -> str:
        if sys.stdout.isatty():
            return input("> ")
        self._told.print("> ", end="")  # else it would stand among the answers
        return input()

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            return self.ask(line)
        name, _, rest = line.partition(" ")
        if name not in self._does:
            raise ValueError(f"{name} is no command" + did_you_mean(name, COMMANDS, "; /help shows which there are"))
        return self._does[name](rest.strip())

    def _show(self, pieces: Generator[str, None, None]) -> None:
        before = self.conversation.turns
        with contextlib.closing(pieces):
            try:
                self._write(pieces)
            except KeyboardInterrupt:  # what was written counts
                if not self.interactive:
                    raise
        if self.conversation.turns is before:
            return self._tell("stopped; nothing was written")
        turn = self.conversation.turns[-1]
        if self.as_json:
            print(json.dumps(_object(turn)), flush=True)
        elif self._out.is_terminal:
            self._out.print(_markdown(turn.answer))
        else:
            print(flush=True)
        if self.interactive and turn.finish_reason != "stop":
            length = "1 token" if len(turn.tokens) == 1 else f"{len(turn.tokens)} tokens"
            self._tell("stopped" if turn.finish_reason == "interrupted" else f"cut off after {length}")
        return None

    def _write(self, pieces: Iterator[str]) -> None:
        """Write an answer. On a terminal, the growing text is redrawn as far as there is room, and removed at the end."""
        if self.as_json:
            for _ in pieces:
                pass
        elif self._out.is_terminal:
            answer = Growing()
            with Live(answer, console=self._out, transient=True):
                for piece in pieces:
                    answer.text += piece
        else:
            for piece in pieces:
                print(piece, end="", flush=True)

    def _image(self, rest: str) -> None:
        paths = [_path(rest)] if _path(rest).is_file() else [_path(word) for word in _words(rest)]
        if not paths:
            raise ValueError("/image needs a file, or several")
        self.conversation.add_images(paths)
        for picture in self.conversation.waiting[-len(paths) :]:
            self._tell(f"{picture.path} ({picture.content.width} x {picture.content.height})")

    def _new(self, rest: str) -> None:
        self.conversation.clear()
        self._saved.clear()
        self._tell("a new conversation")

    def _regenerate(self, rest: str) -> None:
        pieces = self.conversation.regenerate()
        if self.conversation.settings.temperature == 0 and self.conversation.turns[-1].finish_reason != "interrupted":
            self._tell("at temperature 0 the answer is the same; --temperature 0.7 varies it")
        self._show(pieces)

    def _routes(self, rest: str) -> None:
        from moe_llava.routing.grids import draw_routes  # matplotlib, whose colours it has, takes a second to import

        if rest and not rest.isdecimal():
            raise ValueError(f"/routes takes the number of a layer, not {rest}")
        trace = self.conversation.trace()
        names = [picture.path.name for picture in self.conversation.pictures()]
        self._told.print(draw_routes(trace, names, int(rest) if rest else None))

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
        self._tell(f"written to {file}")

    def _help(self, rest: str) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, (arguments, what) in COMMANDS.items():
            table.add_row(f"{name} {arguments}".replace("[", r"\["), what)
        self._told.print(table)

    def _tell(self, text: str, style: str = "dim") -> None:
        self._told.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Growing:
    """Show the last lines of an answer, as many as the terminal has room for."""

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
        raise ValueError(f"{text} has a quotation mark that is not closed, or ends with a backslash") from error


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: the home folder that ~ stands for is not known") from error


def _plain(error: Exception) -> str:
    """Return the message of an error, without the system's number."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _markdown(text: str) -> Markdown:
    """Render Markdown without control characters."""
    return Markdown("".join(letter for letter in text if letter.isprintable() or letter in "\n\t"))


def _object(turn: Turn) -> dict[str, object]:
    return {
        "question": turn.question,
        "images": [str(picture.path) for picture in turn.pictures],
        "answer": turn.answer,
        "finish_reason": turn.finish_reason,
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": len(turn.tokens),
        "seconds": round(turn.seconds, 3),
    }
