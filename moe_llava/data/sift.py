"""Leave out the records that a stage cannot be trained on, before it begins.

What only tokenizing a text or decoding an image can show is found while training.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_llava.common.errors import DataError
from moe_llava.data.encode import check_form
from moe_llava.data.store import Records


def sift(records: Records, stage: int, tokenizer: Any, template: str | None, image_tokens: int, max_length: int | None) -> Records:
    """Return the records that have images, which stage I needs; whose images fit into `max_length`; and that the chat template takes. Those
    left out are named in `problems`.

    Args: `stage`: 1, 2 or 3; the others as `encode_within`.
    """
    images = records.image_counts()
    problems = {}
    for index in np.flatnonzero(images == 0).tolist() if stage == 1 else []:
        problems[index] = f"{records[index].source} has no image, but stage I teaches the projector, which sees nothing else"
    for index in np.flatnonzero(images * image_tokens >= (max_length or np.inf)).tolist():
        size = images[index] * image_tokens
        problems[index] = f"{records[index].source} has images of {size} tokens, but stage{stage}.max_length is {max_length}"
    left = np.ones(len(records), bool)
    left[list(problems)] = False
    refused = _refused(records, np.flatnonzero(left), tokenizer, template)
    return records.without(dict(sorted((problems | refused).items())))


def _refused(records: Records, indices: np.ndarray, tokenizer: Any, template: str | None) -> dict[int, str]:
    """Index -> what is wrong with a record that the chat template refuses. Templates refuse system prompts or numbers of turns, so the
    first of each shape is rendered, and the others only if that is refused: rendering a million takes minutes."""
    problems = {}
    _, firsts, shapes = np.unique(records.shapes()[indices], return_index=True, return_inverse=True)
    for shape, first in enumerate(firsts.tolist()):
        if _refusal(records, int(indices[first]), tokenizer, template) is None:
            continue
        for index in indices[shapes == shape].tolist():
            problem = _refusal(records, index, tokenizer, template)
            if problem is not None:
                problems[index] = problem
    return problems


def _refusal(records: Records, index: int, tokenizer: Any, template: str | None) -> str | None:
    try:
        check_form(records[index], tokenizer, template)
    except DataError as error:
        return str(error)
    return None
