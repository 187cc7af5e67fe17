"""Measure how much `moe-llava serve` gains by batching: answered questions of the digits world per second, sent by several clients at once
and one after another, streamed over HTTP from a server in a process of its own. The two take turns with the same questions, so that both
run under the same load; greedy answers must be equal."""

from __future__ import annotations

import base64
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from moe_llava.checkpoints.load import load_config
from moe_llava.common.progress import show_progress
from moe_llava.digits.dataset import write_dataset
from moe_llava.evaluation.score.benchmark import Question
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.perf.measure import bench_device, conditions, dtype_names, ratios, spread
from moe_llava.perf.options import BenchError
from moe_llava.perf.report import print_conditions, print_table
from moe_llava.perf.running import Interrupted

NAME = "model"
HEADERS = ("answers", "asked", "requests/s", "tokens/s", "first token, ms", "next token, ms", "server, ms")
LONGEST = digits_world.BENCHMARK.max_new_tokens


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


def bench_serve(checkpoint: str, clients: int, rounds: int, questions: int, console: Console) -> dict[str, Any]:
    """Start a server and send `questions` in each of `rounds`, after a warm-up; half as many where answers are long. Return the report.

    Raise CheckpointError as `load_config` does, and BenchError if the server does not start, breaks off an answer, or answers differently
    when batching.
    """
    dtype = dtype_names(load_config(checkpoint).dtype)
    report: dict[str, Any] = {
        "bench": "serve",
        "conditions": conditions(bench_device(), dtype, ("fastapi", "uvicorn")),
        "clients": clients,
        "rounds": rounds,
        "workloads": {},
    }
    sizes = {"short answers": questions, "long answers": max(1, questions // 2)}
    with tempfile.TemporaryDirectory() as folder, show_progress("rounds", len(sizes) * (rounds + 1), console) as advance:
        bodies = workloads(Path(folder), {name: size * (rounds + 1) for name, size in sizes.items()})
        with server(checkpoint, clients) as (process, port):
            for name, size in sizes.items():
                passes: list[tuple[Pass, Pass]] = []
                try:
                    for number in range(rounds + 1):
                        batch = bodies[name][number * size : (number + 1) * size]
                        pair = {}
                        for at_once in (1, clients) if number % 2 else (clients, 1):
                            pair[at_once] = send_all(process, port, batch, at_once)
                        check_same(name, pair[1], pair[clients])
                        passes.append((pair[1], pair[clients]))
                        advance(1)
                except KeyboardInterrupt:
                    running = len(report["workloads"]) + 1
                    if passes[1:]:
                        report["workloads"][name] = summary(passes[1:])
                    raise Interrupted(report, running, len(sizes)) from None
                report["workloads"][name] = summary(passes[1:])
    return report


def workloads(folder: Path, sizes: dict[str, int]) -> dict[str, list[bytes]]:
    """Return bodies of requests in random order: questions with short answers, and requests for descriptions, as many as `sizes` says."""
    # A picture has one description, and more than five other questions.
    write_dataset(folder, train_images=1, test_images=max(sizes["long answers"], sizes["short answers"] // 5))
    kinds: dict[str, list[Question]] = {"short answers": [], "long answers": []}
    for question in digits_world.questions(folder):
        kinds["long answers" if question.extra["family"] == "caption" else "short answers"].append(question)
    return {name: [body_of(one) for one in random.Random(0).sample(kinds[name], size)] for name, size in sizes.items()}


def body_of(question: Question) -> bytes:
    (picture,) = question.images
    assert isinstance(picture, Path)
    image = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": question.prompt.removeprefix("<image>").strip()},
    ]
    request = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": LONGEST, "temperature": 0}
    return json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()


@contextmanager
def server(checkpoint: str, slots: int) -> Iterator[tuple[psutil.Process, int]]:
    """Run a server; yield (the process, its port)."""
    command = [sys.executable, "-m", "moe_llava.cli", "serve", checkpoint, "--port", "0", "--name", NAME, "--slots", str(slots)]
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


def check_same(name: str, alone: Pass, together: Pass) -> None:
    different = [pair for pair in zip(alone.replies, together.replies, strict=True) if pair[0].text != pair[1].text]
    if different:
        one, other = different[0]
        raise BenchError(
            f"{name}: {len(different)} of {len(alone.replies)} answers depend on batching, such as {one.text!r} and {other.text!r}"
        )


def summary(passes: Sequence[tuple[Pass, Pass]]) -> dict[str, Any]:
    """Summarise rounds, each alone and together. `ratio`: throughput together over alone. `processor_time_ratio`: of the server, which
    depends less on other work on the machine."""
    alone, together = zip(*passes, strict=True)
    return {
        "questions_per_round": len(passes[0][0].replies),
        "ratio": ratios([one.seconds for one in alone], [one.seconds for one in together]),
        "processor_time_ratio": ratios([one.server for one in together], [one.server for one in alone]),
        "alone": rates(alone),
        "together": rates(together),
    }


def rates(passes: Sequence[Pass]) -> dict[str, Any]:
    replies = [reply for one in passes for reply in one.replies]
    gaps = [later - earlier for reply in replies for earlier, later in zip(reply.times, reply.times[1:], strict=False)]
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
        for way, asked in (("alone", "one after another"), ("together", f"{report['clients']} at once")):
            one = found[way]
            rate, tokens, server_ms = (
                one[key]["median"] for key in ("requests_per_second", "tokens_per_second", "server_processor_ms_per_request")
            )
            times = [f"{one[key]['median']:.1f}, {one[key]['p99']:.1f}" for key in ("first_token_ms", "next_token_ms")]
            rows.append((name, asked, f"{rate:.1f}", f"{tokens:.0f}", *times, f"{server_ms:.1f}"))
    columns = {header: [row[place] for row in rows] for place, header in enumerate(HEADERS)}
    print_table("", {header: columns.pop(header) for header in HEADERS[:2]}, columns, console)
    for name, found in report["workloads"].items():
        ratio, work = found["ratio"], found["processor_time_ratio"]
        console.print(
            f"{name} ({found['together']['tokens_per_answer']:.1f} tokens): {report['clients']} at once {ratio['median']:.2f} x "
            f"({ratio['low']:.2f} to {ratio['high']:.2f}) the throughput, "
            f"{work['median']:.2f} x the server's processor time; the same answers",
            highlight=False,
            soft_wrap=True,
        )
