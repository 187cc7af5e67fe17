"""How OpenMP's threads wait: asleep under the command, unless the user has said otherwise, and as they like under the package."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# When torch is imported, libgomp prints how often a waiting thread looks before it sleeps.
COMMAND = (
    "import sys; sys.argv = ['moe-llava', 'train', 'none.yaml']\nfrom moe_llava.cli import main\n"
    "try:\n    main()\nfinally:\n    import torch"
)


@pytest.mark.parametrize(
    ("code", "settings", "spins"),
    [
        (COMMAND, {}, 0),
        (COMMAND, {"OMP_WAIT_POLICY": "ACTIVE"}, 30_000_000_000),
        (COMMAND, {"GOMP_SPINCOUNT": "12345"}, 12345),
        ("import moe_llava, torch", {}, 300_000),
    ],
)
def test_threads_that_wait(code, settings, spins):
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | settings
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
