"""The curve of speed against memory kept, in small."""

from moe_llava.benchmarks.offload import measure, random_checkpoint


def test_every_share_is_measured_four_times_over(tmp_path):
    random_checkpoint(tmp_path, alike=True, width=64, ffn_width=96, layers=4, experts=4)
    found = measure(tmp_path, shares=(0.5, 1.0), prompt=6, tokens=8)
    assert found["expert_bytes"] == 2 * 4 * 3 * 64 * 96 * 4
    cases = [(share, cold, ahead) for share in (0.5, 1.0) for cold in (False, True) for ahead in (True, False)]
    assert [(point["share"], point["cold"], point["ahead"]) for point in found["curve"]] == cases
    for point in found["curve"]:
        counts = point["counts"]
        assert point["tokens_per_second"] > 0
        assert point["relative"]["prompt_tokens_per_second"] > 0
        assert (counts["ahead"] > 0) == (point["ahead"] and point["share"] < 1)
        assert (counts["bytes_read"] == 0) == (point["share"] == 1)  # all was read with the first prompt, which does not count
