"""One table of many results: every format has the same content, and published scores are apart from measured ones."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest

from moe_llava.evaluation.score import published
from moe_llava.evaluation.score.benchmark import NAMES
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.tables import write_table
from tests.conftest import refused, run_here


def write(folder, model, benchmark, score, value, **more):
    file = folder / benchmark / "result.json"
    file.parent.mkdir(parents=True)
    record = {
        "benchmark": benchmark,
        "model": model,
        "scores": {"other": 1.0, score: value},
        "intervals": {"other": [0, 2], score: [value - 0.01, value + 0.01]},
        "questions": 1000,
        "missing": [],
    }
    file.write_text(json.dumps(record | more))
    return file


@pytest.fixture
def runs(tmp_path):
    """Results of two models; the second has no LLaVA-Bench, and another judge in MM-Vet."""
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, "a|<b>", "mm-vet", "total", 30.126, judge={"model": "judge-1"}, unreadable=["1", "2"])
    write(first, "a|<b>", "llava-bench", "all", 75.0, judge={"model": "judge-1"})
    write(first, "a|<b>", "pope", "f1", 0.85671234)
    write(second, "plain", "mm-vet", "total", 31.0, judge={"model": "judge-2"})
    write(second, "plain", "pope", "f1", 0.9, questions=999, missing=["7"])
    return [first, second]


def test_markdown(runs):
    head = (
        "| model | POPE, f1, % | LLaVA-Bench (in the wild), all, judge judge-1, % | MM-Vet, total, judge judge-1, % "
        "| MM-Vet, total, judge judge-2, % |"
    )
    assert write_table(runs, "markdown", False).splitlines() == [
        "## Measured",
        "",
        head,
        "| --- | ---: | ---: | ---: | ---: |",
        "| a\\|&lt;b> | 85.67 [84.67 to 86.67] | 75.00 [74.99 to 75.01] | 30.13 [30.12 to 30.14] |  |",
        "| plain | 90.00 [89.00 to 91.00] |  |  | 31.00 [30.99 to 31.01] |",
        "",
        "- In brackets: 95% bootstrap intervals.",
        "- a\\|&lt;b>, MM-Vet: 2 of 1,000 questions whose judgement could not be read.",
        "- plain, POPE: 1 of 999 questions without an answer, counted as wrong.",
        "- POPE, f1, %: not the same questions: a\\|&lt;b> 1,000, plain 999.",
    ]


def test_published_scores_stand_apart(runs):
    measured, apart = write_table(runs, "markdown", True).split("\n## Published")
    assert measured == write_table(runs, "markdown", False)
    assert apart.startswith(", not measured here: Lin et al., MoE-LLaVA, arXiv 2401.15947v5")
    assert "| LLaVA-1.5-7B (dense) | 78.5 | 62.0 | 50.0 | 66.8 | 58.2 | 85.9 | 1511 | 64.3 |  | 30.5 |" in apart
    assert "plain" not in apart


def test_published_scores_belong_to_benchmarks():
    assert set(published.COLUMNS) <= set(NAMES)
    assert {len(values.split()) for values in published.ROWS.values()} == {len(published.COLUMNS)}


def test_csv(runs):
    lines = list(csv.DictReader(write_table(runs, "csv", True).splitlines()))
    measured = [line for line in lines if line["source"] == "measured"]
    assert len(measured) == 5
    assert measured[2] == {
        "source": "measured",
        "model": "a|<b>",
        "benchmark": "pope",
        "score": "f1",
        "value": "0.85671234",
        "low": str(0.85671234 - 0.01),
        "high": str(0.85671234 + 0.01),
        "questions": "1000",
        "missing": "0",
        "judge": "",
    }
    rest = [line for line in lines if line["source"] != "measured"]
    assert len(rest) == 10 * len(published.ROWS) - 1
    assert {(line["source"], line["low"], line["judge"]) for line in rest} == {("published", "", "")}


class Rows(HTMLParser):
    """Return the cell texts of each table's rows."""

    def __init__(self):
        super().__init__()
        self.tables, self.opened = [], []

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta",):
            self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.opened):
            self.tables[-1][-1][-1] += data


def test_html(runs):
    page = write_table(runs, "html", True)
    rows = Rows()
    rows.feed(page)
    assert not rows.opened
    measured, apart = rows.tables
    assert measured[0] == [
        "model",
        "POPEf1%",
        "LLaVA-Bench (in the wild)alljudge judge-1%",
        "MM-Vettotaljudge judge-1%",
        "MM-Vettotaljudge judge-2%",
    ]
    assert measured[1] == ["a|<b>", "85.67[84.67 to 86.67]", "75.00[74.99 to 75.01]", "30.13[30.12 to 30.14]", ""]
    assert [row[0] for row in apart] == ["model", *published.ROWS]
    assert not re.search(r"(src|href|url\()", page)


def test_the_command(runs):
    done = run_here("table", *runs, "--format", "csv")
    assert done.exit_code == 0, done.output
    assert done.stdout == write_table(runs, "csv", False)
    assert refused("table", runs[0], "--format", "pdf") == "--format is 'pdf', but must be one of markdown, csv, html\n"


def change(file, **more):
    file.write_text(json.dumps({key: value for key, value in (json.loads(file.read_text()) | more).items() if value is not None}))


def test_what_is_wrong_is_named(runs, tmp_path):
    file = runs[0] / "pope" / "result.json"
    with pytest.raises(BenchmarkError, match=r"first/pope/result.json and .*/result.json are both results of 'a|<b>' in pope"):
        write_table([runs[0], file], "csv", False)
    with pytest.raises(BenchmarkError, match="nowhere does not exist"):
        write_table([tmp_path / "nowhere"], "csv", False)
    with pytest.raises(BenchmarkError, match=r"first/pope has no BENCHMARK/result\.json"):
        write_table([runs[0] / "pope"], "csv", False)
    for more, message in (
        ({"model": None}, r"first/pope/result.json has no 'model'"),
        ({"scores": {"x": 1}}, r"first/pope/result.json has no score 'f1', because too few questions of POPE were evaluated"),
        ({"perturbation": {"name": "noise"}}, r"perturbation of .*first/pope/result.json has no 'strength'"),
        ({"judge": "gpt"}, r"judge of .*first/pope/result.json must be an object, but is gpt"),
        ({"scores": {"f1": float("nan")}}, r"first/pope/result.json must have a number and an interval of two numbers for 'f1'"),
        ({"intervals": {"f1": [0.5]}}, r"first/pope/result.json must have a number and an interval of two numbers for 'f1'"),
        ({"missing": 3}, r"first/pope/result.json must have a list of 'missing', but has 3"),
        ({"benchmark": "pop"}, r"first/pope/result.json is of the benchmark 'pop'; there are"),
    ):
        before = file.read_text()
        change(file, **more)
        with pytest.raises(BenchmarkError, match=message):
            write_table([file], "csv", False)
        file.write_text(before)
    file.write_text("[1]")
    with pytest.raises(BenchmarkError, match="must be an object"):
        write_table([file], "csv", False)
