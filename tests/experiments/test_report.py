"""The demo's report is read on a laptop and on a telephone: nothing is cut off, and labels are large enough."""

import json

import pytest
from PIL import Image

from moe_llava.experiments.report import CHECKPOINTS, write_report
from tests.browser import open_browser

FAMILIES = ("all", "existence", "count", "colour", "digit", "position", "relation", "comparison", "sum", "caption")
KINDS = ("random", "popular", "adversarial", "all")
LABEL_PIXELS = 13.3  # of matplotlib's 10 points, in a picture of natural size
READABLE = 9


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    for folder in CHECKPOINTS.values():
        (out / folder).mkdir()
        line = {"loss": 1.0, "balance_loss": 3.1, "expert_shares": [[0.25] * 4] * 3, "seconds": 1.0}
        (out / folder / "log.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in range(9)))
    scores = {family: {"mean": 1.0, "low": 0.9951, "high": 1.0, "n": 5232} for family in FAMILIES}
    f1 = {kind: {"f1": 0.95} for kind in KINDS}
    results = {
        "accuracy": dict.fromkeys(CHECKPOINTS, scores),
        "sparse_minus_dense": {"mean": -0.0012, "low": -0.0042, "high": 0.0018, "n": 5232},
        "existence": dict.fromkeys(CHECKPOINTS, f1),
        "seconds": dict.fromkeys(CHECKPOINTS, 123.4),
        "parameters": {"total": 3_214_567, "active": 2_345_678, "dense": 1_987_654},
        "test_images": 500,
        "threads": 2,
    }
    picture = out / "scene.png"
    Image.new("RGB", (48, 48), "navy").save(picture)
    asked = {"image": str(picture), "question": "which is larger , the red digit or the blue digit ?", "given": "red", "expected": "blue"}
    answered = {"sparse": [asked | {"right": right} for right in (True, False)]}
    counts = [[900, 1100, 1020, 980]] * 3
    routing = {"layers": [0, 2, 4], "experts": 4, "top_k": 2, "image": counts, "text": counts}
    return write_report(
        out, results, answered, routing, f".venv/bin/moe-llava chat {out}/stage3 --image {picture} 'how many digits are there?'"
    )


@pytest.mark.parametrize("width", [1366, 768, 390])
def test_nothing_is_cut_off_and_labels_can_be_read(report, tmp_path, width):
    with open_browser(tmp_path) as browser:
        browser.open(report.as_uri(), width=width, height=768)
        assert browser.run("document.documentElement.scrollWidth") <= width
        tables = browser.run("[...document.querySelectorAll('.scroll')].map(box => [box.scrollWidth, box.clientWidth])")
        assert len(tables) == 2
        assert all(needed <= there for needed, there in tables), tables
        assert browser.run("document.querySelectorAll('table')[0].rows[0].cells.length") == 1 + len(CHECKPOINTS)
        scales = browser.run("[...document.querySelectorAll('figure img')].map(image => image.clientWidth / image.naturalWidth)")
        assert len(scales) == 4
        assert min(scales) * LABEL_PIXELS >= READABLE, scales
        cells = browser.run("[...document.querySelectorAll('td, td small')].map(cell => parseFloat(getComputedStyle(cell).fontSize))")
        assert min(cells) >= READABLE
        assert browser.errors == []
        browser.screenshot(tmp_path / "report.png")  # to look at
