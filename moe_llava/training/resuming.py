"""Whether a stage can be resumed, and from which save: its records are the same, and its files are as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_llava.common.errors import DataError
from moe_llava.common.files import read_object, write_whole
from moe_llava.data.store import Records
from moe_llava.training.checksums import MANIFEST, find_damage, find_unreadable
from moe_llava.training.saves import saves

RECORDS = "records.json"  # of a stage's folder: which records it is trained on


def check_resume(work: Path, records: Records, console: Console) -> None:
    """Raise DataError if a stage that was begun cannot be resumed from its last save.

    Either it was begun on other records, so that a run would see some twice and others never; or the save is damaged, and the message says
    which one is whole.
    """
    found = saves(work)
    if not found:
        return
    before, now = _described(work), describe(records)
    if before and before["digest"] != now["digest"]:
        raise DataError(
            f"{work} was begun on {before['records']:,} records, and its data files now hold others ({now['records']:,}): "
            "put them back, or remove the folder and begin again"
        )
    old = not before.get("checksums")
    problems = _problems(found[-1], old)
    if not problems:
        if not (found[-1] / MANIFEST).is_file():
            told = f"{found[-1]} was made before saves had checksums: its weights are resumed from as they are"
            console.print(told, highlight=False, soft_wrap=True)
        return
    whole = next((save for save in reversed(found[:-1]) if not _problems(save, old)), None)
    if whole is None:
        raise DataError("\n".join([*problems, f"no other save is whole: remove {work} to begin the stage again"]))
    later = " and ".join(str(save) for save in found[found.index(whole) + 1 :])
    raise DataError("\n".join([*problems, f"{whole} is whole: remove {later} to resume from it"]))


def _problems(save: Path, old: bool) -> list[str]:
    """Return what is wrong with a save. In an `old` stage, whose first saves had no checksums, a manifest may be missing."""
    return find_unreadable(save) if old and not (save / MANIFEST).is_file() else find_damage(save)


def describe(records: Records) -> dict[str, Any]:
    return {"records": len(records), "digest": records.digest()}


def write_records(work: Path, records: Records) -> None:
    """Write which records a stage is trained on, and whether all of its saves have checksums."""
    checksums = not saves(work) or bool(_described(work).get("checksums"))
    write_whole(work / RECORDS, json.dumps(describe(records) | {"checksums": checksums}))


def _described(work: Path) -> dict[str, Any]:
    """Return what `write_records` wrote, or nothing. Raises DataError if it is damaged."""
    file = work / RECORDS
    if not file.is_file():
        return {}
    found = read_object(file)
    if not isinstance(found.get("digest"), str) or not isinstance(found.get("records"), int):
        raise DataError(f"{file} is damaged: it names no records")
    return found


def check_weights(folder: str | Path) -> None:
    """Raise DataError if weights that a stage starts from have a manifest, and are not as they were written."""
    if (Path(folder) / MANIFEST).is_file() and (problems := find_damage(Path(folder))):
        way = f"restore it, or train that stage again; if it was changed on purpose, remove {Path(folder) / MANIFEST}"
        raise DataError("\n".join([*problems, way]))
