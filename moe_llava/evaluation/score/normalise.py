"""When two short answers are the same: the answer processing of the VQA evaluation (Antol et al., arXiv 1505.00468; Goyal et al.,
arXiv 1612.00837; code: github.com/GT-Vision-Lab/VQA) and that of EvalAI, as Pythia and MMF have it for TextVQA (Singh et al.,
arXiv 1904.08920).

They share two steps, `strip_punctuation` and `map_words`; EvalAI's does `split_words` before. What becomes of the annotators' answers
is for each benchmark to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import BenchmarkError, take, take_list, total

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Each is what is written for itself with any one of its apostrophes missing: hadn't've for hadnt've and hadn'tve.
# The published table also has I'm, I've and I'd've, which never match, as words are lower-case by then.
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

# `re.UNICODE` stands where the published code has to say how many full stops to strip at most, and it is 32.
MOST_STOPS = int(re.UNICODE)


def vqa(text: str) -> str:
    """An answer, as the VQA evaluation and VizWiz's compare it."""
    return map_words(strip_punctuation(_one_line(text)))


def evalai(text: str) -> str:
    """An answer, or an annotator's, as TextVQA's evaluation compares it; LLaVA's uploads are written so, too."""
    return map_words(strip_punctuation(_one_line(split_words(text))))


def split_words(text: str) -> str:
    """Lower case, without commas and question marks, a possessive on its own."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def strip_punctuation(text: str) -> str:
    """A sign beside a blank vanishes, another becomes a blank; all vanish where a comma stands within a number. Full stops vanish but
    before a digit; ' : $ % & and # stay."""
    comma_in_number = re.search(r"\d,\d", text) is not None
    stripped = text
    for sign in PUNCTUATION:
        vanishes = comma_in_number or f"{sign} " in text or f" {sign}" in text
        stripped = stripped.replace(sign, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", stripped, count=MOST_STOPS)


def map_words(text: str) -> str:
    """Lower case, numbers in digits, no articles, contractions with their apostrophes, single blanks."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(SPELLED.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(given: str, truths: Sequence[str]) -> float:
    """VQA accuracy, 0 to 1: an answer is right if three others gave it; the mean over whom of the annotators to leave out."""
    same = [truth == given for truth in truths]
    matches = sum(same)
    return total(np.array([min(1.0, (matches - left_out) / 3) for left_out in same])) / len(same)


def annotators(record: Mapping[str, Any], where: str) -> list[str]:
    """The `answers` of a record: texts, or records with an `answer` each. Raises BenchmarkError if there are none."""
    answers = [
        str(take(answer, "answer", where) if isinstance(answer, Mapping) else answer) for answer in take_list(record, "answers", where)
    ]
    if not answers:
        raise BenchmarkError(f"{where} has an empty list of answers, but must have those of its annotators")
    return answers


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
