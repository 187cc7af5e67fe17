"""Questions of benchmarks, and the answers to them.

Answers are paired with questions by id, never by order. A question without an answer is reported and counts as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.common.images import ImageSource
from moe_llava.common.messages import listed
from moe_llava.common.videos import Video
from moe_llava.data.files import read_items
from moe_llava.data.records import Record, parse_record
from moe_llava.evaluation.score.reading import BenchmarkError, numbered, once, read_json_lines, take, take_text

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

Answers = list[str | None]  # one per question; None: there is none


@dataclass(frozen=True)
class Question:
    """`id` is the benchmark's own; several questions may share it if their prompts differ. `prompt` is the whole text for the model; images
    go before it, or where it has `<image>`. `video`: goes before the prompt or where it has `<video>`; such a question has no images.
    `extra` holds what scoring needs. `history`: (question, answer) of the earlier turns of a conversation, whose texts may hold the
    placeholders, too. `system`: the system prompt, empty for that of the chat template. `options`: the model writes one of them, and
    nothing else; empty: anything."""

    id: str
    prompt: str
    images: tuple[Path | ImageSource, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    video: Video | None = None
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    options: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The texts of the user, the prompt last."""
        return [*(text for text, _ in self.history), self.prompt]

    @property
    def media(self) -> tuple[Path | ImageSource, ...]:
        """The images, the video, or the frames of the video."""
        return self.images if self.video is None else self.video if isinstance(self.video, tuple) else (self.video,)

    @property
    def unit(self) -> str:
        """Return the unit that the bootstrap draws: the questions about one image or video."""
        return str(self.images[0]) if self.images else str(self.video or self.id)


def image_name(question: Question, where: str) -> str:
    """Return the file name of a question's first image. Raises BenchmarkError if it has none."""
    if not question.images:
        raise BenchmarkError(f"{where} has no image, but must have one")
    return Path(str(question.images[0])).name


def llava_questions(name: str, images: str, folder: Path, unique: tuple[str, ...] = ("question_id",)) -> list[Question]:
    """Read the file `name` in LLaVA's schema: JSON lines of question_id, image, text, category; `images` is the folder of its images.
    `unique`: the keys that identify a record.

    Raises BenchmarkError, naming the record, if two records have the same keys, or if a value is missing or of another type.
    """
    questions, file = [], folder / name
    for where, record in numbered(read_json_lines(file), "record", file, *unique):
        image = take_text(record, "image", where) if record.get("image") is not None else ""
        extra = {key: value for key, value in record.items() if key not in ("question_id", "text", "image")}
        identity, text = str(take(record, "question_id", where)), take_text(record, "text", where)
        questions.append(Question(identity, text, (folder / images / image,) if image else (), extra))
    return questions


def conversation_questions(file: Path, images: Path, extra: Callable[[Record, Question], dict[str, Any]]) -> list[Question]:
    """Read a question from each record of a file, or folder, of conversations, as `read_items` takes them: the last question, with all
    before it as its history. `images`: the folder of the images. `extra`: returns what scoring needs beside "answer", the last answer.

    Raises BenchmarkError, naming every record that breaks a rule of the format, that has no `id` or no answer, that has the id and the
    question of another, or that `extra` refuses by a DataError or a BenchmarkError.
    """
    questions, problems = [], []
    seen: dict[str, str] = {}
    try:
        for where, item in read_items(file):
            try:
                record = parse_record(where, item, images)
                question = _last_question(record)
                once(seen, "id and question", f"{question.id}, {question.prompt}", where)
                questions.append(replace(question, extra=question.extra | extra(record, question)))
            except (DataError, BenchmarkError) as error:
                problems.append(str(error))
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    if problems:
        raise BenchmarkError(listed(problems))
    return questions


def _last_question(record: Record) -> Question:
    *history, (prompt, answer) = record.turns
    if not answer.strip():
        raise BenchmarkError(f"{record.source} has no answer to its last question, but must have the expected one")
    if record.extra.get("id") is None:
        raise BenchmarkError(f"{record.source} has no id, by which its answer is found again")
    return Question(str(record.extra["id"]), prompt, record.images, {"answer": answer}, record.video, tuple(history), record.system)


def pair(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], file: Path) -> tuple[Answers, list[str]]:
    """Return (the answer to each question, None if there is none; the ids of answers to unknown questions).

    An answer is a record with `question_id` and `text` (or `answer`, `prediction`). If several questions have its id, its `prompt` selects
    one. Raises BenchmarkError if a question is answered twice, if a needed prompt is missing, if it is unclear which of a record's keys is
    the answer, or if a text or prompt is no string.
    """
    by_id: dict[str, list[Question]] = {}
    for question in questions:
        by_id.setdefault(question.id, []).append(question)
    found: dict[tuple[str, str], tuple[str, str]] = {}
    unknown = []
    for where, answer in numbered(answers, "answer", file):
        identity, text, prompt = _checked_answer(answer, where)
        choices = by_id.get(identity, [])
        if len(choices) > 1:
            if prompt is None:
                raise BenchmarkError(f"{where} has question_id {identity!r}, as {len(choices)} questions have, but no 'prompt'")
            choices = [question for question in choices if plain(question.prompt) == plain(prompt)]
        if not choices:
            unknown.append(identity)
            continue
        key = (identity, choices[0].prompt)
        before, first = found.setdefault(key, (text, where))
        if first != where:
            how = f"with {before[:40]!r} before" if before != text else "with the same text"
            raise BenchmarkError(f"{where} answers question {identity!r} once more, with {text[:40]!r}; {first} answers it {how}")
    return [found.get((question.id, question.prompt), (None,))[0] for question in questions], unknown


def _checked_answer(answer: Mapping[str, Any], where: str) -> tuple[str, str, str | None]:
    """Return (id, text, prompt) of an answer."""
    values = {key: answer[key] for key in ("text", "answer", "prediction") if key in answer}
    if not values:
        raise BenchmarkError(f"{where} has none of 'text', 'answer', 'prediction', but {', '.join(map(repr, answer)) or 'is empty'}")
    if not {"question_id", "questionId"} & answer.keys():
        raise BenchmarkError(f"{where} has no 'question_id', but {', '.join(map(repr, answer))}")
    prompt = answer.get("prompt")
    for name, value in (*values.items(), ("prompt", "" if prompt is None else prompt)):
        if not isinstance(value, str):
            raise BenchmarkError(f"{where} has {json.dumps(value)[:40]} as {name!r}, but must have a string")
    if len(set(values.values())) > 1:
        # One may be the ground truth, which would make every answer right.
        raise BenchmarkError(f"{where} has {' and '.join(map(repr, values))}, which differ: keep only the model's answer")
    return answer_id(answer), next(iter(values.values())), prompt


def answer_id(answer: Mapping[str, Any]) -> str:
    """Return the id of the question that an answer belongs to."""
    return str(answer.get("question_id", answer.get("questionId")))


def plain(prompt: str) -> str:
    """Return a prompt in a form to compare: without image placeholders, with single blanks."""
    return " ".join(prompt.replace("<image>", " ").split())
