"""MMBench-CN (Liu et al., arXiv 2307.06281): MMBench in Chinese."""

from __future__ import annotations

from moe_llava.evaluation.score.definitions.mmbench import mmbench

SUFFIX = "\n请直接回答选项字母。"  # "Answer with the option's letter directly."

BENCHMARK = mmbench("mmbench-cn", "MMBench-CN", "mmbench_cn", "mmbench_dev_cn_20231003.tsv", SUFFIX)
