"""The main job, trained at full size and tested on fewer pictures: what the README promises."""

import json

import pytest

from tests.conftest import run_command


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    out = tmp_path / "demo"
    done = run_command("demo", "--out", out, "--test-images", "120", timeout=3000)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    accuracy = {name: scores["all"] for name, scores in results["accuracy"].items()}
    assert accuracy["stage2"]["mean"] >= 0.85
    assert accuracy["sparse"]["high"] >= accuracy["dense"]["mean"]
    assert accuracy["stage1"]["mean"] < accuracy["stage2"]["mean"]
