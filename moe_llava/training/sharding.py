"""Train a model that no process holds as a whole: FSDP2 and expert parallelism, as transformers and torch have them.

transformers shards a model while it loads it from a folder (`distributed_config`), and Trainer trains it. This file has the rest: which
sizes go together, whole models at the end, and saves that a run can resume from.

Every process has data of its own, under expert parallelism too: tokens travel to the experts and back. So `batch_size` means the same with
and without sharding.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_deepspeed_available
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForImageTextToText, PreTrainedModel, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from moe_llava.checkpoints.load import load_model
from moe_llava.training.optimizer import save_in_parts
from moe_llava.training.recipe import Recipe, RecipeError, Sharding, check_processes
from moe_llava.training.stage import Stage, is_sparse_checkpoint
from moe_llava.training.trainer import StageTrainer


def check_engine(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe's sharding, or DeepSpeed, does not fit the processes that were started or the packages that are
    installed. Call it before the processes meet."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and not is_deepspeed_available():
        raise RecipeError("accelerate is set to use DeepSpeed, which is not installed: pip install deepspeed, or start with torchrun")
    if recipe.sharding is None:
        return
    if deepspeed:
        raise RecipeError("the recipe has sharding, and accelerate is set to use DeepSpeed, which does the same: leave one of them out")
    check_processes(recipe, int(os.environ.get("WORLD_SIZE", 1)))


def check_zero(arguments: TrainingArguments) -> None:
    """Raise RecipeError for ZeRO stage 3, under which a process could neither copy FFNs into experts nor save the model."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise RecipeError("DeepSpeed's zero_stage is 3, but must be 1 or 2: to share out the parameters too, use the recipe's sharding")


def load_sharded(sharding: Sharding, path: str, **settings: Any) -> PreTrainedModel:
    """Return this process's shard of the model that `load_model` returns. `ep_size` is for sparse models: a dense one has no experts to
    divide."""
    from transformers.distributed import DistributedConfig

    distributed = DistributedConfig(fsdp_size=sharding.fsdp_size, ep_size=sharding.ep_size if is_sparse_checkpoint(path) else 1)
    return load_model(path, distributed_config=distributed, **settings)


@contextmanager
def shared_folder(folder: Path, make: Callable[[], tuple[PreTrainedModel, Any]]) -> Iterator[str]:
    """Yield a folder to which the main process has written the model and processor that `make` returns, and remove it afterwards, after an
    error too."""
    state = PartialState()
    try:
        if state.is_main_process:
            for part in make():
                part.save_pretrained(folder)
        state.wait_for_everyone()
        yield str(folder)
        state.wait_for_everyone()
    finally:  # after an error without waiting: the others may not come
        if state.is_main_process and folder.exists():
            shutil.rmtree(folder)


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the whole of a sharded model, on the CPU of the main process; on the others, without weights. Return any other model as it is.
    All processes have to call this."""
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    config = copy.copy(model.config)
    config.distributed_config = None
    with torch.device("meta"):
        plain = AutoModelForImageTextToText.from_config(config)
    plain.load_state_dict(state, assign=True, strict=PartialState().is_main_process)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


class ShardedTrainer(StageTrainer):
    """A StageTrainer for a sharded model. Its saves hold the whole model, and the optimizer's state in shards."""

    def __init__(self, stage: Stage, args: TrainingArguments, **settings: Any):
        args.save_only_model = True  # Trainer insists, as it cannot save the optimizer of such a model; but torch can
        super().__init__(stage, args=args, **settings)
        args.save_only_model = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = whole_model(self.model)
        if self.args.should_save:
            model.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_in_parts(self.model, self.optimizer.optimizer, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
