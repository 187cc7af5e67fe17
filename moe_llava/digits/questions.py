"""Questions about a scene, each with the one right answer.

Families: existence, count, colour, digit, position, relation, comparison, sum, caption; in the level "hard" neighbour, difference, larger
and extreme, too. Every question has one answer in its scene ("what
colour is the 7" needs exactly one 7). Existence questions with the answer no have the three kinds of POPE (arXiv 2305.10355): random (any
absent digit), popular (an absent digit in its favourite colour) and adversarial (digit and colour are both present, but not together).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from moe_llava.digits.scenes import HARD, STANDARD, Item, Level, Scene

NEGATIVE_KINDS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    """`kind`: of an existence question, "positive" or one of NEGATIVE_KINDS; "" in the other families."""

    family: str
    text: str
    answer: str
    kind: str = ""


def ask_existence(scene: Scene, rng: random.Random, kind: str | None = None) -> Question | None:
    """Return an existence question of `kind`, which is drawn by default, half of them positive; None if the scene allows none."""
    kind = kind or ("positive" if rng.random() < 0.5 else rng.choice(NEGATIVE_KINDS))
    present = {(item.digit, item.colour) for item in scene.items}
    if kind == "positive":
        pairs = sorted(present)
    elif kind == "popular":
        pairs = [(digit, scene.level.favourite_colour(digit)) for digit in range(10)]
    elif kind == "adversarial":
        pairs = [(a.digit, b.colour) for a in scene.items for b in scene.items]
    else:
        pairs = [(digit, colour) for digit in range(10) for colour in scene.level.colours]
    if kind != "positive":
        pairs = [pair for pair in pairs if pair not in present]
    if not pairs:
        return None
    digit, colour = rng.choice(pairs)
    return Question("existence", f"is there a {colour} {digit} ?", "yes" if kind == "positive" else "no", kind)


def ask_count(scene: Scene, rng: random.Random) -> Question:
    what = rng.choice(["digits", "colour"])
    if what == "digits":
        return Question("count", "how many digits are there ?", str(len(scene.items)))
    # Half of the colours are in the scene: otherwise nearly every answer is 0.
    colour = rng.choice(scene.items).colour if rng.random() < 0.5 else rng.choice(scene.level.colours)
    number = sum(item.colour == colour for item in scene.items)
    return Question("count", f"how many {colour} digits are there ?", str(number))


def ask_colour(scene: Scene, rng: random.Random) -> Question | None:
    item = _draw(unique_items(scene, "digit"), rng)
    return Question("colour", f"what colour is the {item.digit} ?", item.colour) if item else None


def ask_digit(scene: Scene, rng: random.Random) -> Question | None:
    if rng.random() < 0.5:
        anywhere = rng.choice(scene.items)
        return Question("digit", f"which digit is {anywhere.place} ?", str(anywhere.digit))
    item = _draw(unique_items(scene, "colour"), rng)
    return Question("digit", f"which digit is {item.colour} ?", str(item.digit)) if item else None


def ask_position(scene: Scene, rng: random.Random) -> Question:
    item = rng.choice(scene.items)
    return Question("position", f"where is the {item.name} ?", item.position)


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    word, axis, sign = rng.choice([("leftmost", "column", 1), ("rightmost", "column", -1), ("highest", "row", 1), ("lowest", "row", -1)])
    if len(scene.items) < 2:
        return None
    first, second = sorted(scene.items, key=lambda item: sign * getattr(item, axis))[:2]
    if getattr(first, axis) == getattr(second, axis):
        return None
    return Question("relation", f"which digit is {word} ?", str(first.digit))


def ask_comparison(scene: Scene, rng: random.Random) -> Question | None:
    pair = _draw_pair(scene, rng)
    if pair is None or pair[0].digit == pair[1].digit:
        return None
    larger = max(pair, key=lambda item: item.digit)
    return Question("comparison", f"which is larger , the {pair[0].colour} digit or the {pair[1].colour} digit ?", larger.colour)


def ask_sum(scene: Scene, rng: random.Random) -> Question | None:
    pair = _draw_pair(scene, rng)
    if pair is None:
        return None
    total = pair[0].digit + pair[1].digit
    return Question("sum", f"what is the sum of the {pair[0].colour} digit and the {pair[1].colour} digit ?", str(total))


def ask_caption(scene: Scene, rng: random.Random) -> Question:
    return Question("caption", "describe the image .", scene.caption)


def ask_neighbour(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the nearest digit in the same row or column, in one direction."""
    item = rng.choice(scene.items)
    direction, axis, along, sign = rng.choice(
        [("left of", "row", "column", -1), ("right of", "row", "column", 1), ("above", "column", "row", -1), ("below", "column", "row", 1)]
    )
    aligned = [other for other in scene.items if getattr(other, axis) == getattr(item, axis)]
    distances = {other: sign * (getattr(other, along) - getattr(item, along)) for other in aligned}
    nearest = min((other for other in aligned if distances[other] > 0), key=lambda other: distances[other], default=None)
    return Question("neighbour", f"which digit is {direction} the {item.name} ?", str(nearest.digit)) if nearest else None


def ask_difference(scene: Scene, rng: random.Random) -> Question | None:
    pair = _draw_pair(scene, rng)
    if pair is None:
        return None
    text = f"what is the difference of the {pair[0].colour} digit and the {pair[1].colour} digit ?"
    return Question("difference", text, str(abs(pair[0].digit - pair[1].digit)))


def ask_larger(scene: Scene, rng: random.Random) -> Question:
    bound = rng.randrange(1, 9)
    number = sum(item.digit > bound for item in scene.items)
    return Question("larger", f"how many digits are larger than {bound} ?", str(number))


def ask_extreme(scene: Scene, rng: random.Random) -> Question | None:
    word, choose = rng.choice([("largest", max), ("smallest", min)])
    value = choose(item.digit for item in scene.items)
    found = [item for item in scene.items if item.digit == value]
    return Question("extreme", f"what colour is the {word} digit ?", found[0].colour) if len(found) == 1 else None


Ask = Callable[[Scene, random.Random], Question | None]
FAMILIES: dict[str, Ask] = {
    "existence": ask_existence,
    "count": ask_count,
    "colour": ask_colour,
    "digit": ask_digit,
    "position": ask_position,
    "relation": ask_relation,
    "comparison": ask_comparison,
    "sum": ask_sum,
    "caption": ask_caption,
}
HARD_FAMILIES = FAMILIES | {
    "neighbour": ask_neighbour,
    "difference": ask_difference,
    "larger": ask_larger,
    "extreme": ask_extreme,
}


def families(level: Level) -> dict[str, Ask]:
    """Return the families of questions of a level."""
    return HARD_FAMILIES if level == HARD else FAMILIES


def sample_questions(scene: Scene, rng: random.Random, number: int) -> list[Question]:
    """Draw `number` different questions, equally often from each family as far as the scene allows. Return fewer only if the scene allows
    no more."""
    questions: dict[str, Question] = {}
    asks = families(scene.level)
    for _ in range(20 * number):
        question = asks[rng.choice(list(asks))](scene, rng)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == number:
            break
    return list(questions.values())


def vocabulary(level: Level = STANDARD) -> list[str]:
    """Return every word that a scene, a question or an answer of a level can contain, sorted."""
    templates = (
        "is there a ? how many digits are there ? what colour is the which digit is at the where leftmost rightmost highest lowest "
        "which is larger , the digit or the digit ? what is the sum of and describe the image . yes no"
    )
    more = "left right above below difference than largest smallest" if level == HARD else ""
    numbers = [str(number) for number in range(19)]
    return sorted({*templates.split(), *more.split(), *numbers, *level.colours, *level.positions})


def unique_items(scene: Scene, attribute: str) -> list[Item]:
    """Return the items whose value of `attribute` ("digit" or "colour") is unique in the scene."""
    values = [getattr(item, attribute) for item in scene.items]
    return [item for item, value in zip(scene.items, values, strict=True) if values.count(value) == 1]


def _draw(items: list[Item], rng: random.Random) -> Item | None:
    return rng.choice(items) if items else None


def _draw_pair(scene: Scene, rng: random.Random) -> tuple[Item, Item] | None:
    items = unique_items(scene, "colour")
    if len(items) < 2:
        return None
    first, second = rng.sample(items, 2)
    return first, second
