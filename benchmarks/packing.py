"""Measure the gain of grouping by length and of packing: tokens per second of a training step of stage II over the same records, in random
order and padded, grouped and padded, packed. The three take turns, so that all run under the same load.

    python benchmarks/packing.py --records 768 --batch 16 --attention sdpa
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_llava.data.batches import Collator, ConversationDataset, GroupedSampler
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.data.store import load_records
from moe_llava.digits.base import build_base
from moe_llava.digits.dataset import write_dataset


def make_records(folder: Path, number: int, random: np.random.Generator) -> list[Record]:
    """Return conversations of 1 to 24 turns about a picture, every fourth without it: lengths as uneven as in a mix of instructions."""
    write_dataset(folder / "data", train_images=number // 4, test_images=1)
    plain = load_records(folder / "data" / "train.json", folder / "data" / "images")
    records = []
    for index in range(number):
        first = plain[int(random.integers(len(plain)))]
        turns = [plain[int(random.integers(len(plain)))].turns[0] for _ in range(min(24, 1 + int(random.exponential(6))))]
        turns = [(question.replace("<image>\n", ""), answer) for question, answer in turns]
        images = first.images if index % 4 else ()
        records.append(Record(f"record {index}", ((("<image>\n" if images else "") + turns[0][0], turns[0][1]), *turns[1:]), images))
    return records


def batches(order: list[int], size: int, dataset: ConversationDataset, collate: Collator) -> Iterator[dict[str, Any]]:
    for start in range(0, len(order) - size + 1, size):
        yield collate([dataset[index] for index in order[start : start + size]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--attention", default="sdpa")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    model, processor = build_base()
    model.set_attn_implementation(arguments.attention)
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        records = make_records(Path(folder), arguments.records, random)
        encoder = Encoder(processor)
        dataset, items = ConversationDataset(records, encoder), (encoder.nothing(), encoder.empty_image())
        lengths = np.array([len(dataset[index]["input_ids"]) for index in range(len(records))])
        has_image = np.array([bool(record.images) for record in records])
        shuffled = random.permutation(len(records)).tolist()
        grouped = list(GroupedSampler(lengths, has_image, arguments.batch, arguments.batch, 1, seed=0))
        padded, packed = Collator(*items), Collator(*items, packed=True)
        ways = {"random": (shuffled, padded), "grouped": (grouped, padded), "packed": (shuffled, packed)}
        streams = {name: batches(order, arguments.batch, dataset, collate) for name, (order, collate) in ways.items()}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        tokens, slots = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
        for step in range(len(records) // arguments.batch):
            for name, stream in streams.items():
                batch = next(stream)
                real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
                began = time.perf_counter()
                model(**batch).loss.backward()
                model.zero_grad()
                if step > 1:  # the first ones warm up
                    rates[name].append(real / (time.perf_counter() - began))
                    tokens[name] += real
                    slots[name] += batch["input_ids"].numel()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, attention {arguments.attention}, {arguments.batch} records at once,"
    )
    print(f"lengths {lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f} tokens")
    base = statistics.median(rates["random"])
    for name in ways:
        low, middle, high = statistics.quantiles(rates[name], n=4)
        print(f"{name:>8}: padding {1 - tokens[name] / slots[name]:.1%}, tokens per second {middle / base:.2f} x random ", end="")
        print(f"(quartiles {low / base:.2f} to {high / base:.2f})")


if __name__ == "__main__":
    main()
