"""The digits benchmark: questions about unseen handwriting, right to the letter, per family; existence as POPE scores it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_llava.data.records import Record
from moe_llava.evaluation.statistics import bootstrap_mean


@dataclass(frozen=True)
class Answered:
    """A test question with its answers, expected and given."""

    record: Record
    given: str

    @property
    def family(self) -> str:
        return self.record.extra["family"]

    @property
    def kind(self) -> str:
        return self.record.extra["kind"]

    @property
    def question(self) -> str:
        return self.record.turns[0][0].removeprefix("<image>").strip()

    @property
    def expected(self) -> str:
        return self.record.turns[0][1]

    @property
    def right(self) -> bool:
        return self.given == self.expected

    @property
    def image(self) -> str:
        return str(self.record.images[0])


def accuracy(answered: list[Answered]) -> dict[str, dict[str, float]]:
    """Per family, and over "all": mean, low, high (95%), n."""
    families = {"all": answered}
    for item in answered:
        families.setdefault(item.family, []).append(item)
    return {
        family: asdict(bootstrap_mean([float(item.right) for item in items], [item.image for item in items]))
        for family, items in families.items()
    }


def existence(answered: list[Answered]) -> dict[str, dict[str, float]]:
    """For each kind of negative: accuracy, precision, recall, F1, share of yes.

    As in POPE, each kind has as many questions to affirm as to deny: those about the same pictures. What is not "yes" counts as no.
    """
    asked = [item for item in answered if item.family == "existence"]
    positive = [item for item in asked if item.kind == "positive"]
    scores = {}
    for kind in sorted({item.kind for item in asked} - {"positive"}):
        negative = [item for item in asked if item.kind == kind]
        pictures = {item.image for item in negative}
        scores[kind] = _yes_no_scores([*negative, *(item for item in positive if item.image in pictures)])
    return scores


def compare(answered: list[Answered], control: list[Answered]) -> dict[str, float]:
    """The difference in accuracy between two checkpoints that answered the same questions: mean, low, high (95%), n. Pairing the answers
    takes out what the two have in common, which two separate intervals do not."""
    differences = [float(a.right) - float(b.right) for a, b in zip(answered, control, strict=True)]
    return asdict(bootstrap_mean(differences, [item.image for item in answered]))


def _yes_no_scores(items: list[Answered]) -> dict[str, Any]:
    said = [item.given == "yes" for item in items]
    truth = [item.expected == "yes" for item in items]
    hits = sum(a and b for a, b in zip(said, truth, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(truth) if any(truth) else 0.0
    return {
        "accuracy": sum(a == b for a, b in zip(said, truth, strict=True)) / len(items),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_share": sum(said) / len(items),
        "n": len(items),
    }
