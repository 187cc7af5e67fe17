"""The verb chat: once, through pipes, and on a terminal."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.data.store import load_records
from moe_llava.model.upcycling import upcycle
from tests.conftest import refused, run_here
from tests.training.conftest import tiny_base, wide_base  # noqa: F401

ASKED = "where is the red 7 ?"
WITHOUT_SERVE = """
import gc, sys
sys.modules.update(dict.fromkeys(["fastapi", "prometheus_client", "starlette", "uvicorn"]))
from moe_llava.cli import main
try:
    main()
finally:
    needless = ("datasets", "matplotlib", "pandas", "peft", "sklearn", "torchvision", "transformers.trainer")
    print("loaded", [name for name in needless if name in sys.modules])
    print("collects garbage", gc.isenabled(), "but not of imports", gc.get_freeze_count() > 100_000)
"""


@pytest.fixture(scope="module")
def sparse(tiny_base, tmp_path_factory):  # noqa: F811
    """A checkpoint whose answers do not end by themselves, and may go on for hours."""
    model, processor = load_checkpoint(tiny_base / "base")
    folder = tmp_path_factory.mktemp("chat") / "sparse"
    model.config.text_config.max_position_embeddings = 1_000_000
    model.generation_config.eos_token_id = None
    upcycle(model, num_experts=3, moe_layers=[1, 3]).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tiny_base):  # noqa: F811
    return tiny_base / "data" / "images" / "test" / "000000.png"


def told(done):
    """Standard error, but for progress bars, which are switched off when transformers is imported: here it has been."""
    return re.sub("Loading weights.*\n|\r", "", done.stderr)


def objects(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_one_question_needs_no_server(sparse, image):
    """The same answer as an object, and as text from a process that has no package of the server's, and loads none that an answer does not
    need."""
    arguments = ["chat", str(sparse), "--image", str(image), ASKED, "--max-new-tokens", "4"]
    done = run_here(*arguments, "--json")
    assert done.exit_code == 0, done.output
    (found,) = objects(done)
    assert 0 < found.pop("seconds") < 60
    answer = found.pop("answer")
    assert found == {
        "question": ASKED,
        "images": [str(image)],
        "videos": [],
        "finish_reason": "length",
        "prompt_tokens": found["prompt_tokens"],
        "completion_tokens": 4,
    }
    plain = subprocess.run([sys.executable, "-c", WITHOUT_SERVE, *arguments], capture_output=True, text=True)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert plain.stdout == f"{answer}\nloaded []\ncollects garbage True but not of imports True\n"


def test_lines_of_a_pipe(sparse, image, tmp_path):
    """Nothing but answers on standard output; what is wrong is told, and does not end the conversation."""
    spaced = tmp_path / "a red 7.png"
    shutil.copy(image, spaced)
    text = tmp_path / "notes.md"
    text.write_text("where ?")
    saved = tmp_path / "said.json"
    lines = [
        "/image none.png",
        f"/image {'a' * 300}",
        f"/image '{spaced}",
        f"/image {text}",
        "/image file\\",
        '/save "said.json',
        "/save ~nobody-is-called-so/said.json",
        f"/image {spaced}",
        f"/image '{spaced}' {image}",
        ASKED,
        "",
        "/routes 3",
        "/routes 2",
        "/rotes",
        f"/save {saved}",
        "how many digits are there ?",
        f"/save {saved}",
        "/new",
        f"/save {saved}",
        "where ?",
        f"/save {saved}",
        "/help",
        "/quit now",
        "never asked",
    ]
    done = run_here("chat", sparse, "--json", "--max-new-tokens", "3", stdin="\n".join(lines))
    assert done.exit_code == 1
    found = objects(done)
    assert [(each["question"], len(each["images"])) for each in found] == [(ASKED, 3), ("how many digits are there ?", 0), ("where ?", 0)]
    errors = re.findall("error: (.*)", done.stderr)
    assert errors.pop(3).startswith(f"the conversation names the image {text}, which cannot be decoded: ")
    assert errors == [
        "the conversation names the image none.png, which does not exist",
        f"{'a' * 300}: File name too long",
        f"'{spaced} has an unclosed quotation mark, or ends with a backslash",
        "file\\ has an unclosed quotation mark, or ends with a backslash",
        '"said.json has an unclosed quotation mark, or ends with a backslash',
        "~nobody-is-called-so/said.json: the home folder of ~ is unknown",
        "layer 2 has no experts; those that have are 1, 3",
        "/rotes is not a command; did you mean /routes?",
        "there is no question yet",
        f"{saved} exists already: name another file",
    ]
    assert done.stderr.count("a red 7.png (48 x 48)") == 2
    assert "layer 3" in done.stderr
    (record,) = load_records(saved, tmp_path)
    assert [answer for _, answer in record.turns] == [each["answer"] for each in found[:2]]
    assert record.images == (spaced, spaced, image)


def test_plain_answers_are_lines(sparse):
    drawn = ["chat", sparse, "--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    done = run_here(*drawn, stdin=f"{ASKED}\n/regenerate\n")
    assert (done.exit_code, told(done)) == (0, "")
    first, second = done.stdout.splitlines()
    assert first != second
    assert run_here(*drawn, ASKED).stdout == first + "\n"
    repeated = run_here("chat", sparse, "--max-new-tokens", "5", stdin=f"{ASKED}\n/regenerate\n")
    assert len(set(repeated.stdout.splitlines())) == 1
    assert "at temperature 0 the answer is the same" in repeated.stderr


def test_a_pipe_that_nobody_reads_ends_it(sparse):
    """With neither a traceback nor the rest of an answer that would take hours."""
    command = [sys.executable, "-m", "moe_llava.cli", "chat", str(sparse), ASKED]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature must be 0 or at least 0.001, and at most 2, and top_p above 0 and .* they are -1 and 1"),
        (["--temperature", "2.1"], "but they are 2.1 and 1"),
        (["--temperature", "inf"], "but they are inf and 1"),
        (["--top-p", "0"], "but they are 0 and 0"),
        (["--bits", "5"], "--bits is 5, but must be 4 or 8"),
        (["--dtype", "half"], "dtype is 'half', but must be one of auto, float32, bfloat16, float16"),
        (["--dtype", "float16", "--keep-experts", "0.5"], "--dtype and --keep-experts do not go together: experts are read from the files"),
        (["--image", "none.png"], "none.png, which does not exist"),
        (["--video", "none.mp4"], "^the conversation names the video none.mp4, which does not exist$"),  # not that the model takes none
        (
            ["--max-new-tokens", "1000000"],
            r"the prompt has \d+ tokens and the answer up to 1000000, more than the model's context of 1000000",
        ),
    ],
)
def test_what_cannot_be_is_told(sparse, arguments, message):
    assert re.search(message, refused("chat", sparse, ASKED, *arguments))


def test_experts_that_wait_on_disk(sparse, image, tiny_base):  # noqa: F811
    """The same answer, and what it took to read them."""
    asked = ["chat", sparse, "--image", image, ASKED, "--max-new-tokens", "8"]
    done = run_here(*asked, "--keep-experts", "0.5")
    assert done.exit_code == 0, done.output
    assert done.stdout == run_here(*asked).stdout
    assert re.fullmatch(r"experts needed: \d+, in memory \d+, of which prefetched \d+ \(of \d+\); read \d\.\d MB\n", told(done))
    assert refused(*asked, "--keep-experts", "0.5", "--bits", "8").startswith("--bits and --keep-experts do not go together")
    assert refused(*asked, "--keep-experts", "0").startswith("the share of experts to keep is 0, but must be above 0")
    assert refused(*asked, "--keep-experts", "0.1").startswith("0.1 of 6 experts are to be kept, but 2 to 6 must be")
    assert "has no experts made by upcycle, of which" in refused("chat", tiny_base / "base", ASKED, "--keep-experts", "0.5")


@pytest.mark.parametrize(("bits", "kind"), [("4", "nf4"), ("8", "int8")])
def test_bits(wide_base, image, tmp_path, bits, kind):  # noqa: F811
    """What bitsandbytes quantises is said."""
    model, processor = load_checkpoint(wide_base)
    upcycle(model, num_experts=3, moe_layers=[1, 3]).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    done = run_here("chat", tmp_path, "--image", image, ASKED, "--max-new-tokens", "3", "--bits", bits, "--json")
    assert done.exit_code == 0, done.output
    what, _, sizes = told(done).partition("; the weights take ")
    assert what == f"22 linear layers of the language model and 6 experts in {kind}; routers, embeddings and the rest are not"
    assert re.fullmatch(r"0\.\d MB, 0\.\d MB in the checkpoint\n", sizes)
    assert objects(done)[0]["completion_tokens"] > 0


def test_four_bits_need_wide_layers(sparse):
    message = r"4 bits needs layers from multiples of 64 to multiples of 32 on a CPU, but model\S*layers.0.self_attn.q_proj is of 32 to 32"
    assert re.search(message, refused("chat", sparse, ASKED, "--bits", "4"))


class Typist:
    """Types on a terminal of its own, and reads what is shown there."""

    def __init__(self, *arguments):
        self.unread = ""
        self.process, self.terminal = pty.fork()
        if not self.process:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it, and all that comes of it
            os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
            os.execv(sys.executable, [sys.executable, "-m", "moe_llava.cli", *map(str, arguments)])
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))

    def type(self, text):
        os.write(self.terminal, text.encode())

    def interrupts(self, pattern):
        """Press Ctrl-C until `pattern` is shown: Python's readline loses one that comes just before it waits for a key."""
        for _ in range(9):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.sees(pattern, seconds=10)
        raise AssertionError(self.unread)

    def sees(self, pattern, seconds=90):
        """What is shown up to `pattern`, without it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.unread)):
            assert time.monotonic() < end, self.unread
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.unread += os.read(self.terminal, 65536).decode(errors="replace")
        self.unread = self.unread[found.end() :]
        return found.string[: found.start()]

    def ends(self):
        with contextlib.suppress(OSError):  # Linux says so at the end of a terminal
            while os.read(self.terminal, 65536):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def typist(sparse):
    typist = Typist("chat", sparse, "--max-new-tokens", "500000", "--temperature", "1", "--seed", "0")
    yield typist
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(typist.process, signal.SIGKILL)
        os.waitpid(typist.process, 0)


@pytest.mark.slow
def test_a_terminal(typist, image, tmp_path):
    """Answers grow, Ctrl-C stops them and keeps what was written, arrows bring back what was typed, Ctrl-D leaves."""
    saved = tmp_path / "said.json"
    prompt = r"\n> "
    typist.sees("sparse. /image FILE adds an image, /help shows all commands")
    typist.sees(prompt)
    typist.type("half a question")
    typist.sees("half a question")
    typist.interrupts("/quit or Ctrl-D leaves")
    typist.sees(prompt)
    typist.type(f"/im\t{image.parent}/{image.name[:-2]}\t\n")
    typist.sees("48 x 48")
    typist.sees(prompt)
    typist.type(f"{ASKED}\n")
    typist.sees(r"\n.*[a-z]{2,} ")
    typist.sees(r"[a-z]{2,}")  # a picture later it has grown
    typist.type("\x03")
    typist.sees("stopped")
    typist.sees(prompt)
    typist.type("/routes\n")
    shown = typist.sees("first choice of 2")
    assert re.search(r"48;2;0;114;178m 0\x1b", shown)
    typist.sees(prompt)
    typist.type("\x1b[A\x1b[A\n")  # the question once more
    assert ASKED in typist.sees(r"\n.*[a-z]{2,} ")
    typist.type("\x03")
    typist.sees("stopped")
    typist.sees(prompt)
    typist.type(f"/save {saved}\n")
    typist.sees(f"written to {saved}")
    typist.sees(prompt)
    typist.type("/new\n")
    typist.sees(prompt)
    typist.type(f"{ASKED}\n")
    typist.sees("this question has no image; /image FILE adds one")
    typist.sees(r"\n.*[a-z]{2,} ")
    typist.type("\x03")
    typist.sees("stopped")
    typist.sees(prompt)
    typist.type("\x04")
    assert typist.ends() == 0
    (record,) = load_records(saved, tmp_path)
    assert [question for question, _ in record.turns] == [f"<image>\n{ASKED}", ASKED]
    assert all(len(answer) > 3 for _, answer in record.turns)
