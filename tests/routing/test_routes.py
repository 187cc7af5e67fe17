"""A folder of numbers and pictures from a checkpoint, and a page to click on."""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.cli import app
from moe_llava.data.store import load_records
from moe_llava.routing.trace import Trace
from tests.browser import open_browser
from tests.conftest import run_here
from tests.experiments.test_report import LABEL_PIXELS, READABLE
from tests.training.conftest import tiny_base  # noqa: F401

FEW = 4  # examples: each has four pictures


@pytest.fixture(scope="module")
def sparse(tiny_base, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("routes") / "sparse"
    dense, processor = load_checkpoint(tiny_base / "base")
    upcycle(dense, moe_layers=[1, 3], capacity_factor=1.0).save_pretrained(out)
    processor.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def routes(sparse, tiny_base):  # noqa: F811
    out = sparse.parent / "out"
    data = tiny_base / "data"
    options = ("--images", data / "images", "--group-by", "family", "--batch-size", "5", "--limit", "14")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_llava.routing.routes.EXAMPLES", FEW)
        done = run_here("routes", sparse, "--data", data / "test.json", "--out", out, *options)
    assert done.exit_code == 0, done.output
    assert f"{out}/index.html: 14 records, 504 image tokens" in done.stdout
    return out


def test_numbers_and_pictures(routes, tiny_base):  # noqa: F811
    summary = json.loads((routes / "statistics.json").read_text())
    records = load_records(tiny_base / "data" / "test.json", tiny_base / "data" / "images")[:14]
    assert set(summary["groups"]) == {record.extra["family"] for record in records}
    assert [sum(layer) for layer in summary["image"]] == [14 * 36 * 2] * 2
    assert sum(map(sum, summary["dropped"])) > 0
    for figure in ("load", "modality", "pathways", "router"):
        assert Image.open(routes / "figures" / f"{figure}.png").width > 400
        assert (routes / "figures" / f"{figure}.svg").read_text().rstrip().endswith("</svg>")
    names = {path.name for path in (routes / "examples").iterdir()}
    ends = (".safetensors", "-patches.png", "-patches.svg", "-answer.png", "-answer.svg")
    assert names == {f"{number:02}{end}" for number in range(FEW) for end in ends}
    last = Trace.load(routes / "examples" / f"{FEW - 1:02}.safetensors")
    chosen = records[(FEW - 1) * 14 // FEW]
    answer = [piece for piece, answers in zip(last.pieces, last.answer_T.tolist(), strict=True) if answers]
    assert answer == [*chosen.turns[0][1].split(), "</s>"]


def test_a_person_picks_an_image_a_layer_a_token(routes, tmp_path):
    trace = Trace.load(routes / "examples" / "02.safetensors")
    with open_browser(tmp_path) as browser:
        browser.open((routes / "index.html").as_uri())
        assert browser.run("document.querySelectorAll('#examples button').length") == FEW
        browser.click("#examples button:nth-child(3)")
        browser.click("#layers label:nth-of-type(2)")
        browser.click(".grid button:nth-child(8)")  # row 2, column 2 of six columns
        token = trace.places_T3.tolist().index([0, 1, 1])
        panel = browser.run("document.querySelector('#panel').innerText")
        assert panel.startswith("patch in row 2, column 2")
        assert f"Pathway: {' → '.join(map(str, trace.ids_LTK[:, token, 0].tolist()))}." in panel
        told = [f"expert {expert} \u00d7 {weight:.2f}" for expert, weight in expected(trace, token)]
        assert all(line in panel for line in told), (told, panel)
        shown = browser.run("[...document.querySelectorAll('.grid button')].map(button => Number(button.textContent))")
        assert shown == trace.ids_LTK[1, trace.places_T3[:, 0] == 0, 0].tolist()
        legend = browser.run("[...document.querySelectorAll('#legend span')].map(entry => entry.textContent)")
        taken = trace.ids_LTK[1].flatten().bincount(minlength=trace.probs_LTE.shape[-1]).tolist()
        assert legend == [f"expert {expert}: {number}" for expert, number in enumerate(taken)]  # of this conversation alone
        assert browser.run("document.querySelector('#legend b').textContent") == "Tokens of this conversation in layer 3"
        browser.click("#answer button:nth-child(1)")
        first = trace.answer_T.tolist().index(True)
        assert browser.run("document.querySelector('#panel h3').innerText").startswith(f"“{trace.pieces[first].strip()}”")
        words = browser.run("[...document.querySelectorAll('#answer button')].map(button => button.textContent)")
        experts = trace.ids_LTK[1, trace.answer_T, 0].tolist()
        assert [re.sub(r"\d$", "", word) for word in words] == [piece.strip() for piece in trace.pieces[first:]]
        assert [int(word[-1]) for word in words] == experts
        browser.screenshot(tmp_path / "page.png")
        assert browser.errors == []  # no exceptions, and no requests outside of the page
        for width in (1366, 390):
            browser.open((routes / "index.html").as_uri(), width=width, height=768)
            assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            scales = browser.run("[...document.querySelectorAll('figure img')].map(image => image.clientWidth / image.naturalWidth)")
            assert len(scales) == 4
            assert min(scales) * LABEL_PIXELS >= READABLE, scales
            browser.screenshot(tmp_path / f"page-{width}.png")  # to look at
    colours = Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)
    assert len(colours) > 100


def expected(trace, token):
    for layer in range(len(trace.layers)):
        for place in range(2):
            if not trace.dropped_LTK[layer, token, place]:
                yield int(trace.ids_LTK[layer, token, place]), float(trace.weights_LTK[layer, token, place])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--group-by": "colour"}, "record 0 of .*test.json has no 'colour' to group it by, only id, family, kind"),
        ({"--data": "none.json"}, "data file none.json does not exist"),
        ({"checkpoint": "base"}, "LlavaForConditionalGeneration has no routers"),
        ({"--out": "data"}, "data exists already"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(sparse, tiny_base, tmp_path, change, message):  # noqa: F811
    values = {"--data": tiny_base / "data" / "test.json", "--images": tiny_base / "data" / "images", "--out": tmp_path / "out"} | change
    checkpoint = tiny_base / values.pop("checkpoint") if "checkpoint" in values else sparse
    if change.get("--out"):
        values["--out"] = tiny_base / "data"
    done = CliRunner().invoke(app, ["routes", *map(str, [checkpoint, *(part for pair in values.items() for part in pair)])])
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.search(f"error: .*{message}", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []
