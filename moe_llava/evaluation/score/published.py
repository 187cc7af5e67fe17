"""Scores that papers published: for looking at, never for mixing with measured ones."""

SOURCE = "Lin et al., MoE-LLaVA, arXiv 2401.15947v5"
NOTE = (
    "Single runs without intervals: percent as printed there, and points of perception for MME, rounded to whole ones. "
    "ScienceQA is its questions with an image. LLaVA-Bench and MM-Vet were judged by GPT-4, prompted in other words, so they do not "
    "compare with judgements made here."
)

# Benchmark here -> the paper's heading.
COLUMNS = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "vizwiz": "VizWiz",
    "scienceqa": "SQA-I",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMBench",
    "llava-bench": "LLaVA-Bench",
    "mm-vet": "MM-Vet",
}

# As printed; - where there is none.
ROWS = {
    "MoE-LLaVA-1.6Bx4-Top2": "76.7 60.3 36.2 62.6 50.1 85.7 1318 60.2 86.8 26.9",
    "MoE-LLaVA-1.8Bx4-Top2": "76.2 61.5 32.6 63.1 48.0 87.0 1292 59.7 88.7 25.3",
    "MoE-LLaVA-2.7Bx4-Top2": "77.6 61.4 43.9 68.5 51.4 86.3 1423 65.2 94.1 34.3",
    "MoE-LLaVA-2.7Bx4-Top2-384": "79.9 62.6 43.7 70.3 57.0 85.7 1431 68.0 97.3 35.9",
    "LLaVA-1.5-7B (dense)": "78.5 62.0 50.0 66.8 58.2 85.9 1511 64.3 - 30.5",
}
