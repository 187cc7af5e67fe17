"""Measure how much `moe-llava serve` gains by batching and by its prefix cache: answered questions of the digits world per second, streamed
over HTTP from servers in processes of their own. Of each workload, two ways take turns with the same questions, so that both run under the
same load; greedy answers must be equal.

    short answers    a word or two: one client, several at once; each question is about any picture
    64 tokens        the same questions to a model that cannot end an answer
    shared images    several clients at once, with all questions about a picture in turn: without a prefix cache, and with it
"""

from __future__ import annotations

import base64
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from transformers import GenerationConfig

from moe_llava.checkpoints.files import resolve
from moe_llava.checkpoints.load import load_config
from moe_llava.common.progress import show_progress
from moe_llava.digits.dataset import write_dataset
from moe_llava.evaluation.score.benchmark import Question
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.model.greedy import as_list
from moe_llava.perf.measure import bench_device, conditions, dtype_names, ratios, spread
from moe_llava.perf.options import BenchError
from moe_llava.perf.report import print_conditions, print_table
from moe_llava.perf.running import Interrupted

NAME = "model"
HEADERS = ("answers", "clients", "cache", "req/s", "first token, ms (p99)", "next token, ms (p99)", "CPU, ms")
SHORT, LONG, SHARED, DESCRIPTIONS = "short answers", "64 tokens", "shared images", "descriptions"
LONG_TOKENS = 64
PLAIN, ENDLESS, CACHED = "plain", "endless", "cached"  # servers


@dataclass(frozen=True)
class Reply:
    """`tokens`: with the end token. `times`: seconds from the request to each token, the end token included."""

    text: str
    tokens: int
    times: list[float]


@dataclass(frozen=True)
class Pass:
    """All questions, sent in one way: seconds, processor seconds of server and clients, replies in order."""

    seconds: float
    server: float
    clients: float
    replies: list[Reply]


@dataclass(frozen=True)
class Way:
    """A server, and how many clients ask it at once."""

    server: str
    clients: int

    @property
    def labels(self) -> dict[str, Any]:
        return {"clients": self.clients, "prefix_cache": self.server == CACHED}


Pair = tuple[Pass, Pass]  # of the two ways of a workload


def bench_serve(checkpoint: str, clients: int, rounds: int, questions: int, console: Console) -> dict[str, Any]:
    """Start servers and send `questions` in each of `rounds`, after a warm-up; a quarter as many where answers are long. Return the report.

    Raise CheckpointError as `load_config` does, and BenchError if a server does not start, breaks off an answer, or answers differently in
    the two ways.
    """
    dtype = dtype_names(load_config(checkpoint).dtype)
    report: dict[str, Any] = {
        "bench": "serve",
        "conditions": conditions(bench_device(), dtype, ("fastapi", "uvicorn")),
        "rounds": rounds,
        "workloads": {},
    }
    ways = {
        SHORT: (Way(PLAIN, 1), Way(PLAIN, clients)),
        LONG: (Way(ENDLESS, 1), Way(ENDLESS, clients)),
        SHARED: (Way(PLAIN, clients), Way(CACHED, clients)),
    }
    sizes = {SHORT: questions, LONG: max(1, questions // 4), SHARED: questions}
    with tempfile.TemporaryDirectory() as folder, show_progress("rounds", len(sizes) * (rounds + 1), console) as advance:
        bodies = workloads(Path(folder) / "data", {name: size * (rounds + 1) for name, size in sizes.items()})
        none = ("--prefix-cache", "0")
        commands = {
            PLAIN: (checkpoint, none),
            ENDLESS: (str(without_end(checkpoint, Path(folder) / "model")), none),
            CACHED: (checkpoint, ()),
        }
        with ExitStack() as stack, ThreadPoolExecutor(len(commands)) as pool:
            started = pool.map(lambda one: stack.enter_context(server(one[0], clients, *one[1])), commands.values())
            servers = dict(zip(commands, started, strict=True))
            for name, size in sizes.items():
                done: list[Pair] = []
                try:
                    for number in range(rounds + 1):
                        batch = bodies[name][number * size : (number + 1) * size]
                        found = {way: send_all(*servers[way.server], batch, way.clients) for way in ways[name][:: 1 if number % 2 else -1]}
                        base, other = (found[way] for way in ways[name])
                        check_same(name, base, other)
                        done.append((base, other))
                        advance(1)
                except KeyboardInterrupt:
                    running = len(report["workloads"]) + 1
                    if done[1:]:
                        report["workloads"][name] = summary(ways[name], done[1:])
                    raise Interrupted(report, running, len(sizes)) from None
                report["workloads"][name] = summary(ways[name], done[1:])
    return report


def without_end(checkpoint: str, out: Path) -> Path:
    """Make a folder with the files of a checkpoint, except that its model generates no end token. Return it."""
    folder = resolve(checkpoint, with_weights=True)
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).symlink_to(file.resolve())
    has_settings = (folder / "generation_config.json").exists()
    settings = GenerationConfig.from_pretrained(folder) if has_settings else GenerationConfig.from_model_config(load_config(checkpoint))
    settings.suppress_tokens = [*as_list(settings.suppress_tokens), *as_list(settings.eos_token_id)]
    (out / "generation_config.json").unlink(missing_ok=True)
    settings.save_pretrained(out)
    return out


def workloads(folder: Path, sizes: Mapping[str, int]) -> dict[str, list[bytes]]:
    """Return bodies of requests, as many of each workload as `sizes` says, with images of their own."""
    bodies: dict[str, list[bytes]] = {}
    for seed, (name, size) in enumerate(sizes.items()):
        # A picture has more than five questions with short answers.
        write_dataset(folder / name, train_images=1, test_images=1 + size // (1 if name in (LONG, DESCRIPTIONS) else 5), seed=seed)
        asked = [one for one in digits_world.questions(folder / name) if (one.extra["family"] == "caption") == (name == DESCRIPTIONS)]
        chosen = asked[:size] if name == SHARED else random.Random(seed).sample(asked, size)
        bodies[name] = [body_of(one, LONG_TOKENS if name == LONG else digits_world.BENCHMARK.max_new_tokens) for one in chosen]
    return bodies


def body_of(question: Question, max_tokens: int) -> bytes:
    (picture,) = question.images
    assert isinstance(picture, Path)
    image = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": question.prompt.removeprefix("<image>").strip()},
    ]
    request = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0}
    return json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()


@contextmanager
def server(checkpoint: str, slots: int, *options: str) -> Iterator[tuple[psutil.Process, int]]:
    """Run a server; yield (the process, its port)."""
    command = [sys.executable, "-m", "moe_llava.cli", "serve", checkpoint, "--port", "0", "--name", NAME, "--slots", str(slots), *options]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        first = running.stdout.readline()  # it ends with ":PORT"
        if not first:
            raise BenchError(f"the server did not start: it ended with status {running.wait()}")
        yield psutil.Process(running.pid), int(first.rsplit(":", 1)[1])
    finally:
        running.terminate()
        running.wait()


def send_all(process: psutil.Process, port: int, bodies: Sequence[bytes], clients: int) -> Pass:
    """Let each client send over a connection of its own: the next question as soon as the last one is answered."""
    left = iter(list(enumerate(bodies)))  # an iterator of a list can be shared by threads
    replies: dict[int, Reply] = {}

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=300)
        for number, body in left:
            replies[number] = send(connection, body)
        connection.close()

    before, own, began = process.cpu_times(), time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    seconds, after = time.perf_counter() - began, process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return Pass(seconds, used, time.process_time() - own, [replies[number] for number in range(len(bodies))])


def send(connection: HTTPConnection, body: bytes) -> Reply:
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise BenchError(f"the server answered {response.status}: {response.read().decode()}")
    lines = [(line, time.perf_counter() - began) for line in response if line != b"\n"]
    *events, (end, _) = [(line.removeprefix(b"data: "), at) for line, at in lines]
    chunks = [(json.loads(line), at) for line, at in events]
    if end != b"[DONE]\n" or "usage" not in chunks[-1][0]:
        raise BenchError(f"the server broke off an answer: {chunks[-1][0]}")
    # The first chunk holds the role, the last one the usage.
    pieces = [(chunk["choices"][0], at) for chunk, at in chunks[1:-1]]
    text = "".join(choice["delta"]["content"] for choice, _ in pieces)
    return Reply(text, chunks[-1][0]["usage"]["completion_tokens"], [at for _, at in pieces])


def check_same(name: str, base: Pass, other: Pass) -> None:
    different = [pair for pair in zip(base.replies, other.replies, strict=True) if pair[0].text != pair[1].text]
    if different:
        one, another = different[0]
        raise BenchError(
            f"{name}: {len(different)} of {len(base.replies)} answers depend on how they are asked, such as {one.text!r} "
            f"and {another.text!r}"
        )


def summary(ways: tuple[Way, Way], passes: Sequence[Pair]) -> dict[str, Any]:
    """Summarise rounds. `ratio`: the throughput of the second way over that of the first. `processor_time_ratio`: of the server, which
    depends less on other work on the machine."""
    base, other = zip(*passes, strict=True)
    return {
        "questions_per_round": len(base[0].replies),
        "ratio": ratios([one.seconds for one in base], [one.seconds for one in other]),
        "processor_time_ratio": ratios([one.server for one in other], [one.server for one in base]),
        "ways": [way.labels | rates(done) for way, done in zip(ways, (base, other), strict=True)],
    }


def rates(passes: Sequence[Pass]) -> dict[str, Any]:
    replies = [reply for one in passes for reply in one.replies]
    # As a mean over an answer: under load, tokens arrive in bursts, and most gaps are short.
    gaps = [(reply.times[-1] - reply.times[0]) / (reply.tokens - 1) for reply in replies if reply.tokens > 1]
    return {
        "tokens_per_answer": statistics.mean(reply.tokens for reply in replies),
        "requests_per_second": spread([len(one.replies) / one.seconds for one in passes]),
        "tokens_per_second": spread([sum(reply.tokens for reply in one.replies) / one.seconds for one in passes]),
        "first_token_ms": percentiles([reply.times[0] for reply in replies]),
        "next_token_ms": percentiles(gaps),
        "server_processor_ms_per_request": spread([1000 * one.server / len(one.replies) for one in passes]),
        "clients_processor_ms_per_request": spread([1000 * one.clients / len(one.replies) for one in passes]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": 1000 * float(np.percentile(seconds, 50)), "p99": 1000 * float(np.percentile(seconds, 99))}


def print_serving(report: dict[str, Any], console: Console) -> None:
    print_conditions(report, console)
    rows = []
    for name, found in report["workloads"].items():
        for way in found["ways"]:
            rate, cpu = (way[key]["median"] for key in ("requests_per_second", "server_processor_ms_per_request"))
            times = [f"{way[key]['median']:.0f} ({way[key]['p99']:.0f})" for key in ("first_token_ms", "next_token_ms")]
            labels = (name, str(way["clients"]), "yes" if way["prefix_cache"] else "no")
            rows.append((*labels, f"{rate:.1f}", *times, f"{cpu:.1f}"))
    columns = {header: [row[place] for row in rows] for place, header in enumerate(HEADERS)}
    print_table("", {header: columns.pop(header) for header in HEADERS[:3]}, columns, console)
    for name, found in report["workloads"].items():
        ratio, work, tokens = found["ratio"], found["processor_time_ratio"], found["ways"][0]["tokens_per_answer"]
        what = "with a prefix cache" if found["ways"][1]["prefix_cache"] else f"{found['ways'][1]['clients']} clients at once"
        console.print(
            f"{name} ({tokens:.1f} tokens): {what} {ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f}) the throughput, "
            f"{work['median']:.2f} x the server's processor time; the same answers",
            highlight=False,
            soft_wrap=True,
        )
