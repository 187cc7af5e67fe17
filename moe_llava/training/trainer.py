"""transformers' Trainer, which also watches what a sparse model is made of: language loss, balance loss, shares of the experts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_llava.model import MoeLlavaForConditionalGeneration
from moe_llava.routing.load import expert_counts, expert_shares
from moe_llava.training.adapters import without_adapter


class StageTrainer(Trainer):
    """Writes every logged step to `log_file` as a JSON line: `loss`, `grad_norm`, `learning_rate`, `seconds` since the run began. For
    sparse models also, averaged since the line before: `language_loss`, `balance_loss` (sum over layers; 1 per layer is perfect balance)
    and `expert_shares` (layers x experts)."""

    def __init__(self, *arguments: Any, log_file: Path, **settings: Any):
        super().__init__(*arguments, **settings)
        self.remove_callback(PrinterCallback)
        self.log_file = log_file
        self._language_loss: list[Tensor] = []
        self._balance_loss: list[Tensor] = []
        self._counts_LE: Tensor | int = 0
        self.begin(0)
        self.add_callback(_Beginning(self))

    def begin(self, step: int) -> None:
        """A run begins, perhaps not at the first step."""
        self._last_step = step
        self._began = time.monotonic()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sparse = isinstance(without_adapter(self.accelerator.unwrap_model(model)), MoeLlavaForConditionalGeneration)
        if sparse:
            inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if sparse:
            self._watch(outputs, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _watch(self, outputs: Any, attention_mask: Tensor) -> None:
        self._language_loss.append(outputs.language_loss.detach())
        self._balance_loss.append(outputs.aux_loss.detach())
        top_k = self.accelerator.unwrap_model(self.model).config.num_experts_per_tok
        with torch.no_grad():
            self._counts_LE = self._counts_LE + expert_counts(outputs.router_logits, top_k, attention_mask.reshape(-1).bool())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Trainer reads the file's keys as they stand, but LLaVA saves under older names, which only `from_pretrained` translates; Trainer
        would warn and go on with the weights of the first step. Of an adapter it reads them well."""
        if without_adapter(self.model) is not self.model:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def log(self, logs: dict[str, Any], *arguments: Any, **settings: Any) -> None:
        if self._language_loss and isinstance(self._counts_LE, Tensor):
            # Each batch's language loss is its share of the step's, over all processes: their sum counts steps, not batches.
            language_loss = self.accelerator.reduce(torch.stack(self._language_loss).sum(), "sum")
            logs["language_loss"] = language_loss.item() / max(self.state.global_step - self._last_step, 1)
            logs["balance_loss"] = self.accelerator.reduce(torch.stack(self._balance_loss).mean(), "mean").item()
            shares = expert_shares(self.accelerator.reduce(self._counts_LE, "sum"))
            logs["expert_shares"] = [[round(share, 4) for share in layer] for layer in shares.tolist()]
            self._language_loss, self._balance_loss, self._counts_LE = [], [], 0
        self._last_step = self.state.global_step
        logs["seconds"] = round(time.monotonic() - self._began, 2)
        super().log(logs, *arguments, **settings)
        if self.is_world_process_zero():
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")


class _Beginning(TrainerCallback):
    """Tells the trainer at which step and time its run begins."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.begin(state.global_step)


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
        )
        self.task = self.progress.add_task(name, numbers="")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        numbers = summarise(logs)
        self.progress.update(self.task, numbers=numbers)
        if not self.console.is_terminal:
            self.console.print(f"{self.name} {state.global_step}/{state.max_steps} {numbers}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.stop()


def summarise(logs: dict[str, Any]) -> str:
    """The numbers of one logged step in a few words; for a sparse model with the smallest and largest share of an expert in each layer."""
    text = f"loss {float(logs['loss']):.3f}"
    if "balance_loss" in logs:
        shares = " ".join(f"{min(layer):.0%}-{max(layer):.0%}" for layer in logs["expert_shares"])
        text = f"loss {logs['language_loss']:.3f} balance {logs['balance_loss']:.3f} experts {shares}"
    return text
