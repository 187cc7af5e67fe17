"""The folder with a benchmark's answers:

answers.jsonl     in LLaVA's schema: question_id, prompt, text, answer_id, model_id, metadata
answers.N.jsonl   while several processes evaluate: the answers of process N > 0
settings.json     the settings of the run, and digests of checkpoint and pictures
result.json       the scores
.lock             held while a run writes

Lines are only ever appended, so a run that is killed leaves whole answers, and at most half of a last line.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe_llava.common.files import drop_torn_line, read_object, write_whole
from moe_llava.evaluation.score.questions import Answers, Question
from moe_llava.evaluation.score.reading import BenchmarkError, read_json_lines, take, take_text
from moe_llava.evaluation.stress.perturb import Perturbation, perturb_question

SETTINGS = "settings.json"
LOCK = ".lock"
PICTURES = "pictures"
MOST_NAMED = 5  # changed files

Key = tuple[str, str]  # id and prompt of a question


def answer_file(folder: Path, process: int = 0) -> Path:
    return folder / (f"answers.{process}.jsonl" if process else "answers.jsonl")


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise BenchmarkError if the answers in a folder were made with other settings."""
    file = folder / SETTINGS
    if not file.is_file():
        if answer_file(folder).exists():
            raise BenchmarkError(f"{folder} has answers, but no {SETTINGS} that says whose: choose another --out")
        return
    before = read_object(file)
    changed = [change for name, value in settings.items() if (change := _change(name, before.get(name), value))]
    if changed:
        raise BenchmarkError(f"the answers in {folder} were made with {'; '.join(changed)}: choose another --out, or remove it")


def _change(name: str, before: Any, now: Any) -> str:
    """Return what changed in a setting; an empty text if nothing did."""
    if not isinstance(now, dict) or name == "perturbation":
        return "" if before == now else f"{name} {before}, now {now}"
    words = name.replace("_", " ")
    if not isinstance(before, dict):
        return f"{words} of which no digests were kept, by an earlier version"
    # The questions say which pictures there are; a run with --limit reads only some of them.
    names = before.keys() & now.keys() if name == PICTURES else before.keys() | now.keys()
    changed = sorted(key for key in names if before.get(key) != now.get(key))
    more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
    return f"other {words}: {', '.join(changed[:MOST_NAMED])}{more}" if changed else ""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep other runs from writing into a folder and those inside. Raises BenchmarkError if one does already."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise BenchmarkError(f"another run is writing into {folder}: wait for its end, or choose another --out") from error


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Save the settings of a folder's answers. The digests of earlier runs' pictures are kept, as their answers are."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    before = read_object(file).get(PICTURES, {}) if file.is_file() else {}
    write_whole(file, json.dumps({**settings, PICTURES: before | settings[PICTURES]}, indent=1) + "\n")


def line(question: Question, text: str, model_id: str, perturbation: Perturbation | None = None) -> str:
    """Return the line of an answer. It is the same for the same answer, so a resumed run ends with the same file as one without a stop. The
    prompt is the question's own, by which the two are paired; `asked` in the metadata is its perturbed wording."""
    identity = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model_id, question.id, question.prompt, text]))
    answer = {"question_id": question.id, "prompt": question.prompt, "text": text}
    metadata = {} if perturbation is None else {"asked": perturb_question(question, perturbation).prompt}
    return json.dumps(answer | {"answer_id": identity.hex, "model_id": model_id, "metadata": metadata}) + "\n"


def merge(folder: Path, questions: Sequence[Question]) -> None:
    """Merge the files of all processes into one, in the order of the questions. No process may be writing."""
    files = [file for file in (answer_file(folder), *sorted(folder.glob("answers.*.jsonl"))) if file.exists()]
    found: dict[Key, dict[str, Any]] = {}
    for file in files:
        drop_torn_line(file)
    for file in files:
        for key, record in _by_key(file).items():
            if found.setdefault(key, record)["text"] != record["text"]:
                raise BenchmarkError(f"{file} answers question {key[0]} otherwise than the files before it in {folder}: remove one answer")
    keys = dict.fromkeys((question.id, question.prompt) for question in questions)
    write_whole(answer_file(folder), "".join(json.dumps(found[key]) + "\n" for key in keys if key in found))
    for file in files:
        if file != answer_file(folder):
            file.unlink()


def read_answers(folder: Path, questions: Sequence[Question]) -> Answers:
    """Return the answer to each question, None if there is none yet."""
    found = _by_key(answer_file(folder))
    records = (found.get((question.id, question.prompt)) for question in questions)
    return [None if record is None else str(record["text"]) for record in records]


def _by_key(file: Path) -> dict[Key, dict[str, Any]]:
    records: dict[Key, dict[str, Any]] = {}
    for number, record in enumerate(read_json_lines(file), start=1):
        where = f"line {number} of {file}"
        key = (str(take(record, "question_id", where)), str(take(record, "prompt", where)))
        text = take_text(record, "text", where)
        if records.setdefault(key, record)["text"] != text:
            raise BenchmarkError(f"{where} answers question {key[0]} once more, with another text: remove one of the two lines")
    return records
