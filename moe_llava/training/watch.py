"""Show a run: a progress bar, a line for each logged step, a picture at the end."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_llava.common.colours import EXPERT_COLOURS


class ProgressDisplay(TrainerCallback):
    """A progress bar on a terminal; elsewhere a line for each logged step."""

    def __init__(self, name: str, console: Console):
        self.name = name
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=600,  # a step may take a minute
        )
        self.task = self.progress.add_task(name, numbers="")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.first, self.began = state.global_step, time.monotonic()
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.stop()

    def show(self, entry: dict[str, Any], steps: int) -> None:
        """Show a logged step out of `steps`."""
        numbers = summarise(entry)
        self.progress.update(self.task, numbers=numbers)
        if not self.console.is_terminal:
            left = self.time_left(entry["step"], steps)
            self.console.print(f"{self.name} {entry['step']}/{steps} {numbers}{left}", highlight=False, soft_wrap=True)

    def time_left(self, step: int, steps: int) -> str:
        """Return how long the steps after `step` will take, at the rate of this run's own steps."""
        if step == steps:
            return ""
        seconds = (time.monotonic() - self.began) / (step - self.first) * (steps - step)
        return f", {timedelta(seconds=round(seconds))} left"


def summarise(entry: dict[str, Any]) -> str:
    """Return the numbers of one logged step in a few words. Of a sparse model: the balance loss, averaged over layers, and the smallest and
    largest share of a layer's assignments that an expert gets."""
    words = [f"loss {entry.get('language_loss', entry['loss']):.3f}"]
    if "distillation_loss" in entry:
        words.append(f"distillation loss {entry['distillation_loss']:.3f}")
    if "expert_shares" in entry:
        layers = entry["expert_shares"]
        if "balance_loss" in entry:
            words.append(f"balance loss {entry['balance_loss'] / len(layers):.3f}")
        words.append(f"expert load {100 * min(map(min, layers)):.0f}-{max(map(max, layers)):.0%}")
    if "dropped_share" in entry:
        words.append(f"dropped {entry['dropped_share']:.1%}")
    if "skipped" in entry:
        words.append(f"skipped {entry['skipped']}")
    words.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    return " ".join(words)


def plot_run(entries: list[dict[str, Any]]) -> Figure:
    """Plot the logged steps of a stage: losses, gradient norm and learning rate, and for a sparse model the load of each expert."""
    layers = len(entries[0].get("expert_shares", []))
    panels = {
        "language_loss" if "language_loss" in entries[0] else "loss": "language loss",
        "grad_norm": "gradient norm",
        "learning_rate": "learning rate",
    }
    optional = {
        "distillation_loss": "distillation loss",
        "balance_loss": "balance loss, mean over layers",
        "dropped_share": "share of assignments dropped",
    }
    panels |= {"padding": "share of padding"} if layers else {}
    panels |= {name: title for name, title in optional.items() if name in entries[0]}
    above = (len(panels) + 2) // 3  # rows of panels; the experts follow
    rows = above + (layers + 2) // 3
    figure, axes = plt.subplots(rows, 3, figsize=(11, 2.7 * rows), squeeze=False)
    figure.set_layout_engine("constrained")
    steps = [entry["step"] for entry in entries]
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        values = [entry[name] / (layers if name == "balance_loss" else 1) for entry in entries]
        _line(axis, title, steps, values, EXPERT_COLOURS[0])
    for layer, axis in zip(range(layers), axes[above:].flat, strict=False):
        for expert, colour in zip(range(len(entries[0]["expert_shares"][layer])), itertools.cycle(EXPERT_COLOURS[:8])):
            shares = [entry["expert_shares"][layer][expert] for entry in entries]
            _line(axis, f"expert load, sparse layer {layer + 1} of {layers}", steps, shares, colour, f"expert {expert}")
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    if layers:
        handles, names = axes[above, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=8, frameon=False)
    return figure


def _line(axis: Axes, title: str, steps: list[int], values: list[float], colour: str, label: str | None = None) -> None:
    axis.plot(steps, values, color=colour, linewidth=1.2, label=label, marker="." if len(steps) < 3 else None)
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=8)
