"""transformers' Trainer, with the numbers of sparse models logged, and with saves that are whole or not there."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from moe_llava.common.errors import DataError
from moe_llava.common.files import read_lines
from moe_llava.data.batches import GroupedSampler
from moe_llava.data.shards import ShardError
from moe_llava.data.stream import Position, StreamDataset
from moe_llava.model import SparseModel
from moe_llava.model.losses import IGNORED, logits_at_labels
from moe_llava.routing.counts import expert_counts, expert_shares
from moe_llava.training.adapters import check_loaded, without_adapter
from moe_llava.training.distil import Teacher, divergence
from moe_llava.training.native import auxiliary_loss, numbers, recorded
from moe_llava.training.optimizer import load_parts
from moe_llava.training.parts import native_experts
from moe_llava.training.recipe import RecipeError, check_processes
from moe_llava.training.saves import OPTIMIZER, SAVING, append_line, keep, remove_leftovers, rewind, saving, write_manifest
from moe_llava.training.stage import Stage
from moe_llava.training.watch import ProgressDisplay

MOST_SKIPPED = 0.5  # of the records that a run uses: beyond that, the problem is not single records
SKIPPED = "skipped.jsonl"  # in a stage's folder; step 0 is before the first


class StageTrainer(Trainer):
    """Write every logged step to `log.jsonl` in the stage's work folder as a JSON line.

    `loss`, `grad_norm`, `learning_rate`; `tokens` since the stage began, in all processes, without padding; since the previous line:
    `tokens_per_second`, `padding` (its share); `peak_memory` in bytes, of one process; `seconds` in all runs of the stage. Of sparse models
    also, averaged since the previous line: `language_loss`, `balance_loss` (summed over layers; 1 per layer is perfect balance),
    `expert_shares` (layers x experts; after the language model's layers those of the tower, then the projector), with SMoES `mi_loss`
    (summed over layers), and with a capacity `dropped_share` of the assignments. With a teacher also `language_loss`, the cross entropy,
    and `distillation_loss`, temperature^2 * KL, unweighted.
    Services in `report_to` get all of it as single numbers.

    A record that cannot be read stops the run; with `on_bad_record: skip` it is left out and written to `skipped.jsonl`, up to MOST_SKIPPED
    of all records that the run uses.
    """

    def __init__(self, stage: Stage, display: ProgressDisplay, sampler: Sampler | None, teacher: Teacher | None = None, **settings: Any):
        super().__init__(**settings)
        self.remove_callback(PrinterCallback)
        self.stage, self.work = stage, stage.work
        self.display = display
        self.sampler = sampler
        self.stream = self.train_dataset.stream if isinstance(self.train_dataset, StreamDataset) else None
        self._positions: dict[int, Position] = {}  # in the stream, after the last step
        self.teacher = teacher  # if the teacher is live
        self.native = native_experts(without_adapter(self.model))
        self._noted = False  # that the family has no auxiliary loss
        self.model_accepts_loss_kwargs = True  # some families say that they do not, but all pass the number of labels to their loss
        self.skip_bad_records = stage.recipe.on_bad_record == "skip"
        self._sums: dict[str, Tensor] = {}
        self.add_callback(display)
        self.add_callback(_Moments(self))

    def run(self, save: Path | None) -> None:
        """Train to the last step, from `save` if there is one, of which `start` has returned the model.

        From a save of the last step nothing is trained: it is only loaded, because Trainer would run one step more.
        """
        state = None if save is None else TrainerState.load_from_json(str(save / TRAINER_STATE_NAME))
        if save is None or state is None or state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=None if save is None else str(save))
            return
        self._load_from_checkpoint(str(save))
        self.state = state
        self.begin(state.global_step)

    def begin(self, step: int) -> None:
        """Prepare to train from `step` on: remove what was logged after it, and load the sums of its save."""
        if self.is_world_process_zero():
            remove_leftovers(self.work)
            for name in ("log.jsonl", SKIPPED):
                rewind(self.work / name, step)
        self.accelerator.wait_for_everyone()
        # Otherwise Trainer would use the values that were loaded with a save.
        self.state.logging_steps, self.state.save_steps = self.args.logging_steps, self.args.save_steps
        self._skipped = sum(line["step"] > 0 for line in read_lines(self.work / SKIPPED))
        self._last_step = step
        self._uncounted: Tensor | int = 0
        self._start_sums()
        self._load_unlogged(save := self.work / f"checkpoint-{step}")
        logged = read_lines(self.work / "log.jsonl")
        self._began = self._since - (logged[-1]["seconds"] if logged else 0.0)
        if self.stream is not None and step:
            self.stream.positions = self.stream.read_positions(save)
            self._positions = dict(self.stream.positions)

    def _save_unlogged(self, save: Path) -> None:
        """Add to a save what this process summed since the last logged step, so that a resumed run logs the same numbers, and where it was
        in a stream."""
        unlogged = {"sums": self._sums, "last_step": self._last_step, "seconds": time.monotonic() - self._since}
        torch.save(unlogged, save / f"unlogged_{self.args.process_index}.pt")
        if self.stream is not None:
            self.stream.save(save, self.args.process_index, self._positions)

    def _load_unlogged(self, save: Path) -> None:
        """Continue the sums of a save, unless another number of processes made it."""
        if len(list(save.glob("unlogged_*.pt"))) != self.args.world_size:
            return
        file = save / f"unlogged_{self.args.process_index}.pt"
        unlogged = torch.load(file, map_location=self.args.device, weights_only=True)
        self._sums, self._last_step = unlogged["sums"], unlogged["last_step"]
        self._since -= unlogged["seconds"]

    def _start_sums(self) -> None:
        """Start the sums from one logged step to the next."""
        self._since = time.monotonic()
        self._sums = {}

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        try:
            batches, labels = super().get_batch_samples(*arguments)
        except ShardError as error:  # that of a worker is its whole traceback, which ends with the message
            raise ShardError(str(error).rpartition("ShardError: ")[2].strip()) from error
        problems = [problem for batch in batches for problem in batch.pop("problems", [])]
        for batch in batches:
            self._positions |= batch.pop("positions", {})
        if problems and not self.skip_bad_records:
            raise DataError(problems[0])
        if self.skip_bad_records:
            self._skip(problems)
        for batch in batches:
            mask = batch.get("attention_mask", batch.get("token_mask"))
            positions = torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)
            tokens = positions if mask is None else mask.sum()
            self._add("places", positions)  # the name in saves
            self._add("tokens", tokens)
            self._uncounted = self._uncounted + tokens
        # A step without any label divides by their number all the same.
        return batches, labels if labels is None else torch.as_tensor(labels).clamp(min=1)

    def _count_tokens(self) -> int:
        """Return the tokens of all processes since the stage began. The state is saved, so a resumed run continues the count."""
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(torch.as_tensor(self._uncounted, device=self.args.device), "sum"))
        self._uncounted = 0
        return self.state.num_input_tokens_seen

    def _skip(self, problems: list[str]) -> None:
        """Count the records of a step that were left out, in all processes, and log those of this one."""
        if problems:
            append_line(self.work / SKIPPED, *({"step": self.state.global_step + 1, "problem": problem} for problem in problems))
        self._skipped += int(self.accelerator.reduce(torch.tensor(len(problems), device=self.args.device), "sum"))
        seen = self.state.max_steps * self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        if self._skipped > MOST_SKIPPED * seen:
            raise DataError(
                f"{self._skipped} of the {seen:,} records that the run uses could not be read, more than {MOST_SKIPPED:.0%}: "
                f"{self.work / SKIPPED} names them"
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert num_items_in_batch is not None, "Trainer counts the labels of a step"
        inputs, distillation = dict(inputs), self.stage.distillation
        taught = self._taught(inputs) if distillation else {}
        plain = self._plain
        sparse = isinstance(plain, SparseModel)
        mask = inputs.get("attention_mask", inputs.get("token_mask"))
        mask_T = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).reshape(-1).bool()
        if not sparse:
            inputs = {**inputs, **logits_at_labels(inputs["labels"])}
            inputs.pop("token_mask", None)  # for routers made here alone
        if sparse or self.native:
            inputs = {**inputs, "output_router_logits": True}
        with recorded(plain, self.native, inputs, mask_T) as routed:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if sparse:
            self._watch(outputs, mask_T)
            language = outputs.language_loss * self._processes
        else:
            # A family adds its auxiliary loss as it is, and Trainer multiplies both by the processes. Weight it by the batch's share of the
            # labels of a step, as the language loss is.
            share = (inputs["shift_labels"] != IGNORED).sum() / num_items_in_batch
            auxiliary = self._processes * auxiliary_loss(outputs, plain, loss.device)
            language = loss - auxiliary
            loss = language + share * auxiliary
            if distillation or self.native:
                self._add("language_loss", language / self.args.world_size)
        if self.native:
            self._watch_native(outputs, numbers(routed, self.native, loss.device))
        if distillation:
            logits_NV = outputs.logits if sparse else outputs.logits[inputs["shift_labels"] != IGNORED]
            taught_loss = self._distillation_loss(logits_NV, taught, distillation.temperature, num_items_in_batch)
            loss = loss + distillation.weight * (taught_loss - language)
        return (loss, outputs) if return_outputs else loss

    def _taught(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Take the teacher's part out of the inputs, and return its probabilities of the labels, as `divergence` takes them."""
        part = inputs.pop("teacher")
        return part if self.teacher is None else {"log_probs": self.teacher(part)}

    def _distillation_loss(self, logits_NV: Tensor, taught: dict[str, Tensor], temperature: float, items: Tensor | int) -> Tensor:
        """Return a batch's part of the distillation loss of a step. It is scaled as the cross entropy is: a sum over the batch's labels,
        divided by the `items` labels of the step, times the processes, over which gradients are averaged."""
        loss = temperature**2 * divergence(logits_NV, taught, temperature) * (self._processes / items)
        self._add("distillation_loss", loss / self.args.world_size)
        return loss

    @property
    def _processes(self) -> int:
        """The number of processes whose labels a step counts together."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    @property
    def _plain(self) -> Any:
        """The model without the wrappers of several processes, of torch.compile and of an adapter."""
        return without_adapter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def training_step(self, *arguments: Any, **settings: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **settings)
        self._add("loss", loss / self.args.world_size)
        return loss

    @torch.no_grad()
    def _watch(self, outputs: Any, token_mask_T: Tensor) -> None:
        config = self.accelerator.unwrap_model(self.model).config
        self._add("language_loss", outputs.language_loss)
        self._add("balance_loss", outputs.aux_loss)
        if outputs.mi_loss is not None:
            self._add("mi_loss", outputs.mi_loss)
        self._add("batches", torch.ones_like(outputs.aux_loss))
        choices = [ids_TK[token_mask_T] for ids_TK in outputs.router_choices or ()] + list(outputs.vision_router_choices or ())
        self._add("counts_LE", expert_counts(choices, config.experts_per_layer))
        if config.capacity_factor is not None:
            drops = [drops_TK[token_mask_T] for drops_TK in outputs.router_drops or ()] + list(outputs.vision_router_drops or ())
            self._add("dropped", torch.stack([drops_TK.sum() for drops_TK in drops]).sum())

    def _watch_native(self, outputs: Any, found: dict[str, Tensor]) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not self._noted and getattr(outputs, "aux_loss", None) is None:
            note = f"{type(model).__name__} returns no auxiliary loss: nothing balances the load of its experts"
            self.display.console.print(note, highlight=False, soft_wrap=True)
        self._noted = True
        self._add("batches", torch.ones((), device=self.args.device))
        for name, value in found.items():
            self._add(name, value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the adapter of a save. Any other model has been loaded from the save by `start`: LLaVA saves parameters under older names,
        which only `from_pretrained` translates. Trainer would warn and keep the weights that it has."""
        if without_adapter(self.model) is not self.model:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            check_loaded(self.model, resume_from_checkpoint, "the stage's")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / OPTIMIZER).is_dir():
            load_parts(self.accelerator.unwrap_model(self.model), self.optimizer.optimizer, self.lr_scheduler, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.work / SAVING)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._count_tokens()
        with saving(self.work, f"step {self.state.global_step}") as folder:
            super()._save_checkpoint(model, trial)
            self._save_unlogged(folder / f"checkpoint-{self.state.global_step}")
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (save,) = folder.iterdir()
                write_manifest(save, save.rglob("*"))
                keep(folder, self.work, self.stage.recipe.save_total_limit)
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, Any], *arguments: Any, **settings: Any) -> None:
        if "loss" in logs:
            logs |= self._numbers()
        self._last_step = self.state.global_step
        logs["seconds"] = round(time.monotonic() - self._began, 2)
        super().log(self._singly(logs), *arguments, **settings)
        if not self.is_world_process_zero():
            return
        entry = {"step": self.state.global_step, **logs}
        append_line(self.work / "log.jsonl", entry)
        if "loss" in entry:
            self.display.show(entry, self.state.max_steps)

    def _numbers(self) -> dict[str, Any]:
        """Return the numbers since the last logged step, of all processes."""
        seconds = time.monotonic() - self._since
        sums = {name: self.accelerator.reduce(value, "sum") for name, value in self._sums.items()}
        steps = max(self.state.global_step - self._last_step, 1)
        numbers: dict[str, Any] = {
            "loss": sums["loss"].item() / steps,  # Trainer's own leaves out steps from before a run was resumed
            "tokens": self._count_tokens(),
            "tokens_per_second": round(sums["tokens"].item() / seconds, 1),
            "padding": round(1 - (sums["tokens"] / sums["places"]).item(), 4),
            "peak_memory": peak_memory(),
        }
        # A batch's part of these is its share of the step's loss, so their sum is divided by steps, not by batches.
        numbers |= {name: sums[name].item() / steps for name in ("language_loss", "distillation_loss") if name in sums}
        if "counts_LE" in sums:
            numbers |= {name: (sums[name] / sums["batches"]).item() for name in ("balance_loss", "mi_loss") if name in sums}
            numbers["expert_shares"] = [[round(share, 4) for share in layer] for layer in expert_shares(sums["counts_LE"]).tolist()]
        if "dropped" in sums:
            numbers["dropped_share"] = round((sums["dropped"] / sums["counts_LE"].sum()).item(), 4)
        if self.skip_bad_records:
            numbers["skipped"] = self._skipped
        self._start_sums()
        return numbers

    def _singly(self, logs: dict[str, Any]) -> dict[str, float]:
        """Return single numbers, for services that draw curves: the smallest and largest expert share of each layer."""
        numbers = {name: value for name, value in logs.items() if name != "expert_shares"}
        for index, layer in enumerate(logs.get("expert_shares", [])):
            numbers |= {f"experts_smallest/{index}": min(layer), f"experts_largest/{index}": max(layer)}
        return numbers


def training_arguments(stage: Stage) -> TrainingArguments:
    """Return a stage's settings as transformers takes them. Raises RecipeError if the batch cannot be divided among the devices."""
    recipe, settings = stage.recipe, stage.settings.optimisation
    arguments = TrainingArguments(
        output_dir=str(stage.work),
        per_device_train_batch_size=settings.per_device_batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=stage.bf16,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        save_steps=recipe.save_steps,
        torch_compile=recipe.torch_compile,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=recipe.dataloader_workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every trainable parameter takes part in every step: see Collator
        disable_tqdm=True,
        report_to=recipe.report_to or "none",
    )
    if arguments.n_gpu > 1:
        raise RecipeError(f"one process sees {arguments.n_gpu} devices: start one for each with torchrun, or hide all but one from it")
    check_processes(recipe, arguments.world_size, [stage.number])
    arguments.gradient_accumulation_steps = settings.batch_size // (settings.per_device_batch_size * arguments.world_size)
    return arguments


def peak_memory() -> int:
    """Return the most bytes that were allocated on the accelerator, or without one, the most that the process used."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Moments(TrainerCallback):
    """Report the first step of a run to the trainer, the epoch to the sampler, which several processes hide from it, and each step of the
    optimizer to the routers."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.begin(state.global_step)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if isinstance(model := self.trainer._plain, SparseModel):
            model.update_router_bias()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if isinstance(self.trainer.sampler, GroupedSampler):
            self.trainer.sampler.set_epoch(int(state.epoch or 0))
