"""The optimizer's state in parts, as sharded runs save it: by parameter names, so that any number of processes can load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer import SCHEDULER_NAME

from moe_llava.training.saves import OPTIMIZER


def save_in_parts(model: nn.Module, optimizer: Optimizer, folder: str) -> None:
    """Save the optimizer's state. All processes have to call this."""
    from transformers.distributed.checkpoint import save_optimizer_distributed

    save_optimizer_distributed(model, optimizer, str(Path(folder) / OPTIMIZER))


def load_parts(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, save: str) -> None:
    """Load the state of optimizer and scheduler from a save of a sharded run. `model` may be sharded otherwise, or not at all.

    Parameter groups depend on the sharding. torch cannot load an empty one, such as that of the biases in stage III, so it is set aside.
    The scheduler has the same learning rate for each group.
    """
    from transformers.distributed.checkpoint import load_optimizer_distributed

    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["params"]]
    load_optimizer_distributed(model, optimizer, str(Path(save) / OPTIMIZER))
    loaded = iter(optimizer.param_groups)
    optimizer.param_groups = [next(loaded) if group["params"] else group for group in groups]
    state: dict[str, Any] = torch.load(Path(save) / SCHEDULER_NAME, weights_only=True)
    rates = {name: state[name][:1] * len(groups) for name in ("base_lrs", "_last_lr", "lr_lambdas")}
    scheduler.load_state_dict(state | rates)
