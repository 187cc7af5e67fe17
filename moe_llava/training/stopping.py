"""The end of a run when one is asked for."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopWhenAsked(TrainerCallback):
    """On SIGTERM or Ctrl-C: the step is finished and saved, in all processes, then training ends. A second Ctrl-C acts at once; SIGTERM may
    well come twice, from a scheduler and from torchrun."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopWhenAsked:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # whatever logging_steps is: the picture ends where the run does
        asked = self.asked
        if args.world_size > 1:
            anybody = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(anybody, torch.distributed.ReduceOp.MAX)
            asked = bool(anybody)
        if asked:
            control.should_save = control.should_training_stop = True
