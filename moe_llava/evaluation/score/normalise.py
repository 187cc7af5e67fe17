"""Normalise short answers before they are compared, as the VQA evaluation does (Antol et al., arXiv 1505.00468; Goyal et al., arXiv
1612.00837; code: github.com/GT-Vision-Lab/VQA), and as EvalAI's does in Pythia and MMF for TextVQA (Singh et al., arXiv 1904.08920).

Both use `strip_punctuation` and `map_words`; EvalAI's applies `split_words` first. Each benchmark decides whether the annotators' answers
are normalised too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import total
from moe_llava.evaluation.score.reading import BenchmarkError, take, take_list

_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Each replaces itself with any one apostrophe missing: hadn't've replaces hadnt've and hadn'tve.
# The published table also has I'm, I've and I'd've. These never match, because words are lower-case by then.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
SPELLED = {word[: place.start()] + word[place.end() :]: word for word in CONTRACTIONS.split() for place in re.finditer("'", word)}
SPELLED["somebody'd"] = "somebodyd"  # the wrong way round, as published

# The published code passes `re.UNICODE`, which is 32, where the maximum number of full stops to strip belongs.
MOST_STOPS = int(re.UNICODE)


def vqa(text: str) -> str:
    """Normalise an answer as the VQA and VizWiz evaluations do."""
    return map_words(strip_punctuation(_one_line(text)))


def evalai(text: str) -> str:
    """Normalise an answer as TextVQA's evaluation and LLaVA's uploads do."""
    return map_words(strip_punctuation(_one_line(split_words(text))))


def split_words(text: str) -> str:
    """Lower the case, remove commas and question marks, and separate possessives."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def strip_punctuation(text: str) -> str:
    """Remove a sign if it is beside a blank anywhere, or if a number has a comma, and replace it by a blank otherwise. Remove full stops
    except before a digit. Keep ' : $ % & and #."""
    comma_in_number = re.search(r"\d,\d", text) is not None
    stripped = text
    for sign in PUNCTUATION:
        vanishes = comma_in_number or f"{sign} " in text or f" {sign}" in text
        stripped = stripped.replace(sign, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", stripped, count=MOST_STOPS)


def map_words(text: str) -> str:
    """Lower the case, write numbers as digits, remove articles, restore apostrophes in contractions, and use single blanks."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(SPELLED.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(answer: str, truths: Sequence[str]) -> float:
    """Return VQA accuracy, 0 to 1: an answer that three other annotators gave is right; mean over leaving out each annotator once."""
    same = [truth == answer for truth in truths]
    matches = sum(same)
    return total(np.array([min(1.0, (matches - left_out) / 3) for left_out in same])) / len(same)


def vqa_item(text: str | None, truths: Sequence[str], normalise: Callable[[str], str]) -> dict[str, Any]:
    """Return the item of an answer that is scored by VQA accuracy."""
    read = None if text is None else normalise(text)
    return {"given": text, "read": read, "expected": truths, "right": 0.0 if read is None else leave_one_out(read, truths)}


def annotators(record: Mapping[str, Any], where: str) -> list[str]:
    """Return the `answers` of a record: texts, or records with an `answer` each. Raises BenchmarkError if there are none."""
    answers = [
        str(take(answer, "answer", where) if isinstance(answer, Mapping) else answer) for answer in take_list(record, "answers", where)
    ]
    if not answers:
        raise BenchmarkError(f"{where} has an empty list of answers, but must have those of its annotators")
    return answers


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
