"""The folder of a benchmark's answers:

answers.jsonl     in LLaVA's form: question_id, prompt, text, answer_id, model_id, metadata
answers.N.jsonl   while several processes ask, those of process N > 0
settings.json     what they were made with, checkpoint and pictures by their contents
result.json       their scores
.lock             held while a run writes

Lines are only ever appended, so whatever ends a run leaves whole answers, and at most half of a last line.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe_llava.common.files import drop_torn_line, write_whole
from moe_llava.evaluation.score.benchmark import BenchmarkError, Question, read_json_lines, take, take_text
from moe_llava.evaluation.score.reading import read_object
from moe_llava.evaluation.stress.perturb import Perturbation, perturb_question

SETTINGS = "settings.json"
LOCK = ".lock"
PICTURES = "pictures"
MOST_SHOWN = 5

Key = tuple[str, str]  # id and prompt of a question


def answer_file(folder: Path, process: int = 0) -> Path:
    return folder / (f"answers.{process}.jsonl" if process else "answers.jsonl")


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises BenchmarkError if the answers in a folder were made with other settings."""
    file = folder / SETTINGS
    if not file.is_file():
        if answer_file(folder).exists():
            raise BenchmarkError(f"{folder} has answers, but no {SETTINGS} that says whose: choose another --out")
        return
    before = read_object(file)
    changed = [_change(name, before.get(name), value) for name, value in settings.items()]
    if any(changed):
        raise BenchmarkError(
            f"the answers in {folder} were made with {'; '.join(filter(None, changed))}: choose another --out, or remove it"
        )


def _change(name: str, before: Any, now: Any) -> str:
    """What changed in one setting, empty if nothing did."""
    if not isinstance(now, dict) or name == "perturbation":
        return "" if before == now else f"{name} {before}, now {now}"
    words = name.replace("_", " ")
    if not isinstance(before, dict):
        return f"{words} of which no digests were kept, by an earlier version"
    # Which pictures there are is known by the questions; a run with --limit sees some of them.
    names = before.keys() & now.keys() if name == PICTURES else before.keys() | now.keys()
    changed = sorted(key for key in names if before.get(key) != now.get(key))
    more = f" and {len(changed) - MOST_SHOWN} more" if len(changed) > MOST_SHOWN else ""
    return f"other {words}: {', '.join(changed[:MOST_SHOWN])}{more}" if changed else ""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While it lasts, no other run may write into a folder and those inside. Raises BenchmarkError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise BenchmarkError(f"another run is writing into {folder}: wait for its end, or choose another --out") from error


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what the answers in a folder are made with. Pictures of runs before stay noted: their answers do, too."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    before = read_object(file).get(PICTURES, {}) if file.is_file() else {}
    write_whole(file, json.dumps({**settings, PICTURES: before | settings[PICTURES]}, indent=1) + "\n")


def line(question: Question, text: str, model_id: str, perturbation: Perturbation | None = None) -> str:
    """The same for the same answer: a run that was killed ends with the file of one that was not. The prompt is the question's own, by
    which the two are paired; how a perturbation worded it is `asked` among the metadata."""
    identity = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model_id, question.id, question.prompt, text]))
    answer = {"question_id": question.id, "prompt": question.prompt, "text": text}
    metadata = {} if perturbation is None else {"asked": perturb_question(question, perturbation).prompt}
    return json.dumps(answer | {"answer_id": identity.hex, "model_id": model_id, "metadata": metadata}) + "\n"


def merge(folder: Path, questions: Sequence[Question]) -> None:
    """Makes one file, in the order of the questions, of what all processes left. Nobody may be writing."""
    files = [file for file in (answer_file(folder), *sorted(folder.glob("answers.*.jsonl"))) if file.exists()]
    for file in files:
        drop_torn_line(file)
    found: dict[Key, dict[str, Any]] = {}
    for file in files:
        for key, record in _by_key(file).items():
            if found.setdefault(key, record)["text"] != record["text"]:
                raise BenchmarkError(f"{file} answers question {key[0]} otherwise than the files before it in {folder}: remove one answer")
    keys = dict.fromkeys((question.id, question.prompt) for question in questions)
    write_whole(answer_file(folder), "".join(json.dumps(found[key]) + "\n" for key in keys if key in found))
    for file in files:
        if file != answer_file(folder):
            file.unlink()


def given(folder: Path, questions: Sequence[Question]) -> list[str | None]:
    """The text that answers each question, None where there is none yet."""
    found = _by_key(answer_file(folder))
    texts = (found.get((question.id, question.prompt)) for question in questions)
    return [None if record is None else str(record["text"]) for record in texts]


def _by_key(file: Path) -> dict[Key, dict[str, Any]]:
    records: dict[Key, dict[str, Any]] = {}
    for number, record in enumerate(read_json_lines(file), start=1):
        where = f"line {number} of {file}"
        key = (str(take(record, "question_id", where)), str(take(record, "prompt", where)))
        text = take_text(record, "text", where)
        if records.setdefault(key, record)["text"] != text:
            raise BenchmarkError(f"{where} answers question {key[0]} once more, with another text: remove one of the two lines")
    return records
