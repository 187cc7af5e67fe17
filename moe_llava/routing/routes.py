"""Trace conversations through a checkpoint and write a folder of numbers, pictures, and a page:

    index.html        pick a conversation, a layer, a token; needs no other file
    statistics.json   RoutingStatistics.summary
    figures/          load, modality, pathways, router: each as PNG and SVG
    examples/         some conversations: the whole trace as safetensors, patches and answer as PNG and SVG

The statistics cover all records, in constant memory; whole traces are kept for the examples only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from moe_llava.common.errors import DataError
from moe_llava.common.progress import show_progress, with_bar
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.routing.page import Example, as_seen, write_page
from moe_llava.routing.plots import Chart, as_data, plot_answer, plot_expert_load, plot_modality, plot_patches, plot_pathways, plot_router
from moe_llava.routing.routers import find_routers
from moe_llava.routing.statistics import RoutingStatistics
from moe_llava.routing.trace import trace_records

EXAMPLES = 12
PLOTS = {"load": plot_expert_load, "modality": plot_modality, "pathways": plot_pathways, "router": plot_router}


def write_routes(
    out: Path, name: str, model: Any, processor: Any, records: Sequence[Record], batch_size: int, group_by: str | None
) -> dict[str, Any]:
    """Trace `records`, fill the folder `out`, and return the statistics. `name`: of the checkpoint, for the page. `group_by`: the key of
    a record whose value groups it, such as the family of its question.

    Before any tracing, raise RoutingError if the model has no routers, and DataError if a record has no such key, or a video. Raise
    DataError for a record that cannot be read.
    """
    find_routers(model)
    for record in records:
        if record.video is not None:
            raise DataError(f"{record.source} has a video, and where its patches are is not shown: leave it out")
    if group_by is not None:
        for record in records:
            record.group(group_by)
    chosen = {number * len(records) // EXAMPLES for number in range(EXAMPLES)}
    statistics, examples, encoder = RoutingStatistics(), [], Encoder(processor)
    batches = trace_records(model, processor, records, batch_size)
    with show_progress("tracing routes", len(records), Console(stderr=True)) as advance:
        for start, trace in zip(range(0, len(records), batch_size), batches, strict=True):
            members = records[start : start + batch_size]
            statistics.add(trace, None if group_by is None else [record.group(group_by) for record in members])
            for row, record in enumerate(members):
                if start + row in chosen:
                    pictures = as_seen(encoder(record), processor, model.config)
                    group = "" if group_by is None else record.group(group_by)
                    examples.append(Example(record.source, record.turns[0][0], group, pictures, trace.row(row)))
            advance(len(members))
    summary = statistics.summary()
    (out / "statistics.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    charts = {}
    for chart, plot in PLOTS.items():
        figure = plot(summary)
        _write(figure, out / "figures" / chart)
        charts[chart] = Chart(as_data(figure), as_data(plot(summary, narrow=True)))
    for number, example in enumerate(with_bar(examples, "drawing examples")):
        _write_example(out / "examples" / f"{number:02}", example, summary["experts"])
    write_page(out / "index.html", name, len(records), group_by, summary, examples, charts)
    return summary


def _write_example(path: Path, example: Example, experts: int) -> None:
    path.parent.mkdir(exist_ok=True)
    example.trace.save(path.with_suffix(".safetensors"), source=example.source, group=example.group)
    if example.trace.pictures:
        _write(plot_patches(example.trace, example.pictures, experts), path.with_name(f"{path.name}-patches"))
    _write(plot_answer(example.trace, experts), path.with_name(f"{path.name}-answer"))


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.set_layout_engine("none")  # the layout is final now
    figure.savefig(path.with_suffix(".svg"))
