"""The curve of speed against memory kept, in small."""

import json

from moe_llava.perf.offload import AHEAD, NEEDED, WHOLE, random_checkpoint
from tests.cli.test_chat import run_here


def test_every_share_is_measured_both_ways_and_cold_too(tmp_path):
    random_checkpoint(tmp_path / "model", alike=True, width=64, ffn_width=96, layers=4, experts=4)
    done = run_here(
        "bench", "offload", tmp_path / "model", "--keep", "0.5", "--keep", "1", "--tokens", "8", "--json", tmp_path / "found.json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["conditions"]["torch"]
    cases = [(kept, files) for kept in ("0.5", "1") for files in ("in the system's cache", "cold")]
    assert [(case["labels"]["kept"], case["labels"]["files"]) for case in found["cases"]] == cases
    for case in found["cases"]:
        all_kept = case["labels"]["kept"] == "1"
        assert case["variants"].keys() == {WHOLE, AHEAD, NEEDED}
        for name in (AHEAD, NEEDED):
            one = case["variants"][name]
            assert one["ratio"]["median"] > 0
            assert one["prompt_ratio"] > 0
            assert (one["counts"]["ahead"] > 0) == (name == AHEAD and not all_kept)
            assert (one["counts"]["bytes_read"] == 0) == all_kept  # all was read with the first prompt, which does not count
