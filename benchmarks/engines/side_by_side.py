"""Compare `moe-llava serve` and vLLM under the same load: 8 clients, streamed answers, in turns on one machine.

    VLLM_CPU_KVCACHE_SPACE=1 python -m benchmarks.engines.side_by_side CHECKPOINT .engines/bin/vllm [--rounds 5]

Both servers run all the time, and only one of them is asked at a time. Processor time is that of all processes of a server.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import psutil

from moe_llava.perf.measure import ratios
from moe_llava.perf.serve import DESCRIPTIONS, NAME, SHORT, Pass, rates, send_all, server, workloads

CLIENTS = 8
START = 600  # seconds until vLLM must have started
OURS, VLLM = "moe-llava serve", "vllm serve"


class Tree:
    """A process with all its children, which vLLM has."""

    def __init__(self, process: psutil.Process):
        self._process = process

    def cpu_times(self) -> SimpleNamespace:
        times = [one.cpu_times() for one in (self._process, *self._process.children(recursive=True))]
        return SimpleNamespace(user=sum(one.user for one in times), system=sum(one.system for one in times))


@contextmanager
def vllm_server(program: str, checkpoint: str) -> Iterator[tuple[psutil.Process, int]]:
    """Run vLLM; yield (the process, its port)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model-impl", "transformers", "--trust-remote-code", "--dtype", "float32", "--max-num-seqs", str(CLIENTS)]
    command = [program, "serve", checkpoint, *options, "--port", str(port), "--served-model-name", NAME, "--max-model-len", "512"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(START):
            if running.poll() is not None:
                raise RuntimeError(f"vLLM ended with status {running.returncode}: {' '.join(command)}")
            try:
                connection = HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(1)
        yield psutil.Process(running.pid), port
    finally:
        running.terminate()
        running.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("vllm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=64)
    arguments = parser.parse_args()
    rounds, size = arguments.rounds + 1, arguments.questions  # the first round warms up
    with (
        tempfile.TemporaryDirectory() as folder,
        server(arguments.checkpoint, CLIENTS) as ours,
        vllm_server(arguments.vllm, arguments.checkpoint) as theirs,
    ):
        bodies = workloads(Path(folder), {SHORT: size * rounds, DESCRIPTIONS: size * rounds})
        for name, questions in bodies.items():
            passes: dict[str, list[Pass]] = {OURS: [], VLLM: []}
            for number in range(rounds):
                batch = questions[number * size : (number + 1) * size]
                for which in (OURS, VLLM) if number % 2 else (VLLM, OURS):
                    process, port = ours if which == OURS else theirs
                    passes[which].append(send_all(Tree(process), port, batch, CLIENTS))  # type: ignore[arg-type]
            ours_passes, theirs_passes = passes[OURS][1:], passes[VLLM][1:]
            pairs = [
                (one.text, other.text)
                for mine, vllms in zip(ours_passes, theirs_passes, strict=True)
                for one, other in zip(mine.replies, vllms.replies, strict=True)
            ]
            found = {
                "workload": name,
                "equal_answers": f"{sum(one.strip() == other.strip() for one, other in pairs)} of {len(pairs)}",
                "throughput_ratio": ratios([one.seconds for one in ours_passes], [one.seconds for one in theirs_passes]),
                "processor_time_ratio": ratios([one.server for one in theirs_passes], [one.server for one in ours_passes]),
                OURS: rates(ours_passes),
                VLLM: rates(theirs_passes),
            }
            print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
