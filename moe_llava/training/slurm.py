"""A script for Slurm's sbatch that runs a recipe on several machines, each with a torchrun of its own.

Slurm signals the script before the time limit. The script passes SIGTERM on to srun, which passes it on to every torchrun; the processes
save after the step, and the script puts the job back into the queue. It always resumes, so a job that Slurm itself starts again, after the
loss of a machine, continues, too.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from string import Template

RESTARTS = 3  # of the processes after one was lost, on the same machines
TIME = re.compile(r"\d+(-\d+)?(:\d+){0,2}")
MARGIN = 30  # seconds of `save_before` that are left to torchrun and Slurm

_SCRIPT = Template(
    """\
#!/bin/bash
$header

stopping=
trap 'stopping=1; kill -TERM "$$step"' USR1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarted processes would find the addresses of those before
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$patience  # seconds for a save, after which torchrun kills its processes
host=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
port=$$((20000 + SLURM_JOB_ID % 10000))
srun --ntasks-per-node=1 --cpus-per-task=$cpus --cpu-bind=none --kill-on-bad-exit=1 \\
  torchrun --nnodes=$nodes --nproc-per-node=$gpus --max-restarts=$restarts \\
  --rdzv-backend=c10d --rdzv-endpoint="$$host:$$port" --rdzv-id="$$SLURM_JOB_ID" \\
  --no-python $command &
step=$$!
wait "$$step"
status=$$?
if [ -n "$$stopping" ]; then
  wait "$$step"  # a signal had ended the first one
  status=$$?$requeue
fi
exit "$$status"
"""
)
_REQUEUE = """
  if [ "$status" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi"""


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm. `time`: as Slurm takes it; `save_before`: seconds before its end at which the run saves and stops."""

    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    save_before: int = 300
    requeue: bool = True

    def problem(self) -> str | None:
        """Return what Slurm would not understand, or what leaves no time to train, or None."""
        if not TIME.fullmatch(self.time):
            return f"--time is {self.time!r}, but must be minutes, HH:MM:SS or D-HH:MM:SS"
        if self.seconds <= 2 * self.save_before:
            rule = f"more than twice the {self.save_before} seconds of --save-before, or there is no time to train"
            return f"--time is {self.time}, but must be {rule}"
        return None

    @property
    def seconds(self) -> int:
        """The time limit; see `TIME`. Slurm reads MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
        days, dash, rest = self.time.rpartition("-")
        numbers = [int(number) for number in rest.split(":")]
        units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
        return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus_per_node


def sbatch_script(job: Job, name: str, arguments: list[str]) -> str:
    """Return the script of a job called `name` that runs `moe-llava train` with these arguments."""
    options = {
        "job-name": name,
        "partition": job.partition,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": (cpus := job.gpus_per_node * job.cpus_per_gpu),
        "time": job.time,
        "signal": f"B:USR1@{job.save_before}",
        "open-mode": "append",
    }
    header = [f"#SBATCH --{option}={shlex.quote(str(value))}" for option, value in options.items() if value is not None]
    return _SCRIPT.substitute(
        header="\n".join([*header, "#SBATCH --requeue" if job.requeue else "#SBATCH --no-requeue"]),
        patience=job.save_before - MARGIN,
        cpus=cpus,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        restarts=RESTARTS,
        command=shlex.join(["moe-llava", "train", *arguments, "--resume"]),
        requeue=_REQUEUE if job.requeue else "",
    )
