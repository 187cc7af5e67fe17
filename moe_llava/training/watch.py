"""How a run is shown: a progress bar, a line for each logged step, a picture at the end."""

from __future__ import annotations

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
        """A logged step, of how many."""
        numbers = summarise(entry)
        self.progress.update(self.task, numbers=numbers)
        if not self.console.is_terminal:
            left = self.time_left(entry["step"], steps)
            self.console.print(f"{self.name} {entry['step']}/{steps} {numbers}{left}", highlight=False, soft_wrap=True)

    def time_left(self, step: int, steps: int) -> str:
        """Return how long the steps after `step` will take, by what this run's steps took, those before it was resumed not counted."""
        if step == steps:
            return ""
        seconds = (time.monotonic() - self.began) / (step - self.first) * (steps - step)
        return f", {timedelta(seconds=round(seconds))} left"


def summarise(entry: dict[str, Any]) -> str:
    """The numbers of one logged step in a few words; for a sparse model with the smallest and largest share of an expert in each layer."""
    words = [f"loss {float(entry['loss']):.3f}"]
    if "balance_loss" in entry:
        shares = " ".join(f"{min(layer):.0%}-{max(layer):.0%}" for layer in entry["expert_shares"])
        words = [f"loss {entry['language_loss']:.3f}", f"balance {entry['balance_loss']:.3f}", f"experts {shares}"]
    if "dropped_share" in entry:
        words.append(f"dropped {entry['dropped_share']:.1%}")
    if "skipped" in entry:
        words.append(f"skipped {entry['skipped']}")
    words.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    return " ".join(words)


def plot_run(entries: list[dict[str, Any]]) -> Figure:
    """The course of a stage, from its logged steps: losses, gradient norm and learning rate, and of a sparse model the experts' shares."""
    sparse = "expert_shares" in entries[0]
    layers = len(entries[0]["expert_shares"]) if sparse else 0
    figure, axes = plt.subplots(1 + sparse + (layers + 2) // 3, 3, figsize=(11, 2.7 * (1 + sparse + (layers + 2) // 3)), squeeze=False)
    figure.set_layout_engine("constrained")
    places = iter(axes.flat)
    panels = {"language_loss" if sparse else "loss": "language loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
    panels |= {"balance_loss": "balance loss, summed over layers", "padding": "share of padding"} if sparse else {}
    if "dropped_share" in entries[0]:
        panels["dropped_share"] = "share of assignments dropped"
    steps = [entry["step"] for entry in entries]
    for name, title in panels.items():
        _line(next(places), title, steps, [entry[name] for entry in entries], EXPERT_COLOURS[0])
    if sparse and "dropped_share" not in panels:
        next(places).set_visible(False)
    for layer in range(layers):
        axis = next(places)
        for expert in range(len(entries[0]["expert_shares"][layer])):
            shares = [entry["expert_shares"][layer][expert] for entry in entries]
            _line(axis, f"experts' shares, sparse layer {layer + 1} of {layers}", steps, shares, EXPERT_COLOURS[expert % 8], str(expert))
        axis.set_ylim(bottom=0)
    for axis in places:
        axis.set_visible(False)
    if sparse:
        handles, names = axes[2, 0].get_legend_handles_labels()
        figure.legend(handles, [f"expert {name}" for name in names], loc="outside lower center", ncols=8, frameon=False)
    return figure


def _line(axis: Axes, title: str, steps: list[int], values: list[float], colour: str, label: str | None = None) -> None:
    axis.plot(steps, values, color=colour, linewidth=1.2, label=label, marker="." if len(steps) < 3 else None)
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=8)
