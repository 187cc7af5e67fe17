"""Measure the gain of batching: answered questions of the digits world per second, several at once and one at a time. The two take turns
with the same questions, so that both run under the same load; their answers must be equal.

    python benchmarks/answers.py --batch 16
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from moe_llava.digits.base import build_base
from moe_llava.digits.dataset import write_dataset
from moe_llava.evaluation.ask.generate import answer
from moe_llava.evaluation.score.definitions import digits_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=128, help="in each round")
    arguments = parser.parse_args()
    model, processor = build_base()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        # A picture has more than ten questions; one round more warms up.
        write_dataset(Path(folder), train_images=1, test_images=1 + arguments.questions * (arguments.rounds + 1) // 10)
        questions = digits_world.questions(Path(folder))
        for number in range(arguments.rounds + 1):
            asked = questions[number * arguments.questions : (number + 1) * arguments.questions]
            seconds, given = {}, {}
            for size in (1, arguments.batch):
                began = time.perf_counter()
                batches = answer(model, processor, asked, size, digits_world.BENCHMARK.max_new_tokens)
                given[size] = dict(pair for batch in batches for pair in batch)
                seconds[size] = time.perf_counter() - began
            different = sum(given[1][index] != text for index, text in given[arguments.batch].items())
            if different:
                sys.exit(f"{different} of {len(asked)} answers depend on the batch")
            if number:
                ratios.append(seconds[1] / seconds[arguments.batch])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds of {arguments.questions} questions")
    print(f"{arguments.batch} at once: {statistics.median(ratios):.2f} x as many per second as one at a time ", end="")
    print(f"({min(ratios):.2f} to {max(ratios):.2f}); the same answers")


if __name__ == "__main__":
    main()
