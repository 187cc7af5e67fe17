"""The verb sbatch. There is no Slurm here: stand-ins for srun and scontrol start torchrun on this machine."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, refused, run_here
from tests.training.test_distributed import BIN, ENVIRONMENT, read_log, wait_for_step

# srun starts the command once for each of two nodes, and passes SIGTERM on.
STAND_INS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first || wait $first || status=$?
wait $second || wait $second || status=$?
exit ${status:-0}
""",
    "scontrol": """
echo "$@" >> "$ASKED"
if [ "$1" = show ]; then echo localhost; fi
""",
}


def script(*arguments):
    done = run_here("sbatch", *arguments)
    assert done.exit_code == 0, done.output
    subprocess.run([shutil.which("bash"), "-n"], input=done.stdout, text=True, check=True)
    return done.stdout


def test_the_script(write_recipe):
    file = write_recipe(stage1__optimisation__batch_size=16, stage3__optimisation__batch_size=16)
    two = ("--nodes", "2", "--gpus-per-node", "2", "--stage", "1", "--stage", "3", "--set", "output=a b")
    text = script(file, *two, "--partition", "a100", "--time", "1-02:30:00", "--save-before", "600")
    header = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "gpus-per-node=2", "partition=a100", "time=1-02:30:00", "signal=B:USR1@600", "requeue"} < set(header)
    assert f"moe-llava train {file} --stage 1 --stage 3 --set 'output=a b' --resume" in text
    assert "--nnodes=2 --nproc-per-node=2" in text
    assert "SHUTDOWN_TIMEOUT=570 " in text
    assert "scontrol requeue" in text
    once = script(file, "--gpus-per-node", "1", "--no-requeue")
    assert "#SBATCH --no-requeue" in once
    assert "scontrol requeue" not in once
    assert "partition" not in once


def test_what_does_not_fit_the_processes(write_recipe):
    file = write_recipe()
    told = refused("sbatch", file, "--nodes", "2", "--gpus-per-node", "3", "--set", "sharding={fsdp_size: 4, ep_size: 2}")
    assert "sharding.fsdp_size is 4, but must be the number of processes that torchrun starts, 6" in told
    for stage in ("stage1", "stage2", "stage3"):
        assert f"{stage}.optimisation.batch_size is 4, but must be a multiple of what all 6 devices compute at once, 24" in told
    assert "ep_size is 3, but must divide fsdp_size=4" in refused("sbatch", file, "--set", "sharding={fsdp_size: 4, ep_size: 3}")
    assert "--time is '1 day', but must be minutes, HH:MM:SS or D-HH:MM:SS" in refused("sbatch", file, "--time", "1 day")
    short = "but must be more than twice the 300 seconds of --save-before, or there is no time to train"
    for time in ("10", "9:59", "00:10:00", "0-0:10"):
        assert f"--time is {time}, {short}" in refused("sbatch", file, "--gpus-per-node", "1", "--time", time)
    for time in ("11", "10:01", "00:10:01", "0-1", "1-00"):
        script(file, "--gpus-per-node", "1", "--time", time)
    assert "the recipe has no stage2" in refused("sbatch", file, "--set", "stage2=null", "--stage", "2")


@pytest.mark.slow
def test_the_script_runs_saves_before_the_time_limit_and_continues(write_recipe, tmp_path):
    """Two torchruns on this machine, with one process each."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    file = write_recipe(stage1__optimisation__max_steps=60, stage1__optimisation__per_device_batch_size=2, save_steps=1000)
    job = tmp_path / "job.sh"
    job.write_text(script(file, "--nodes", "2", "--gpus-per-node", "1", "--stage", "1"))
    asked = tmp_path / "asked"
    environment = ENVIRONMENT | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "nodes", "ASKED": str(asked)}
    environment["PATH"] = f"{tmp_path}:{Path(BIN)}:{os.environ['PATH']}"

    def start():
        return subprocess.Popen(["bash", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment)

    with start() as first:
        wait_for_step(tmp_path / "run" / ".stage1" / "log.jsonl", 1, first)
        first.send_signal(signal.SIGUSR1)
        _, errors = first.communicate(timeout=120)
    assert first.returncode != 0
    assert "stage1 stopped as asked after step" in errors
    requeue = f"requeue {os.getpid()}"
    assert asked.read_text().splitlines() == ["show hostnames nodes", requeue]
    with start() as second:
        printed, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert "stage1 resumes after step" in printed
    assert asked.read_text().splitlines().count(requeue) == 1
    assert [entry["step"] for entry in read_log(tmp_path / "run" / "stage1")] == list(range(1, 61))
