"""The weight files of a checkpoint: safetensors or PyTorch pickles, single or sharded.

Unusual here: files are inspected without loading them. Both formats store a tensor as contiguous bytes. So a table of names, shapes and
offsets is read first, and each tensor is later read from the file straight into the memory that will keep it. A conversion needs little
more memory than its weights. Pickles are read with `weights_only=True`, which runs no code.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_llava.checkpoints.files import check_pointers, read_json
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line

# The weights of a folder are in the first of these files that it has, in the order of transformers. An index names the shards.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file, at `offset` bytes; or `loaded` already, if the file's layout allows nothing else."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    loaded: Tensor | None = None

    def rows(self, part: int, parts: int) -> StoredTensor:
        """Return one of `parts` equal runs of rows."""
        shape = (self.shape[0] // parts, *self.shape[1:])
        if self.loaded is not None:
            return replace(self, shape=shape, loaded=self.loaded.chunk(parts)[part])
        return replace(self, shape=shape, offset=self.offset + part * shape_bytes(shape, self.dtype))

    def read_into(self, out: Tensor) -> None:
        """Copy the values into `out`, which has the same shape, is contiguous, and may have another dtype.

        Raises CheckpointError if the file ends before the tensor does.
        """
        if self.loaded is not None:
            out.copy_(self.loaded)
            return
        target = out if out.dtype == self.dtype else torch.empty(self.shape, dtype=self.dtype)
        view = target.view(-1).view(torch.uint8).numpy().data
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise CheckpointError(f"{self.file} is truncated: it ends {len(view)} bytes before a tensor does")
        if target is not out:
            out.copy_(target)


def shape_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the number of bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def find_weights(folder: Path) -> list[Path]:
    """Return the weight files of `folder`, shards in order.

    Raises CheckpointError if there are none, if a shard that the index names is missing, or if some are pointers of Git LFS.
    """
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise CheckpointError(f"{folder} has no weights; looked for {', '.join(WEIGHT_FILES)}")
    files = [folder / name]
    if name.endswith(".index.json"):
        weight_map = read_json(folder / name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{folder / name} must hold a `weight_map` from tensors to files")
        files = [folder / shard for shard in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise CheckpointError(f"{folder / name} names shards that {folder} does not have: {', '.join(missing) or 'none at all'}")
    check_pointers(files)
    return files


def read_tables(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return name -> tensor of all `files`.

    Raises CheckpointError, naming the file, if one is damaged, holds code, or repeats a name of another.
    """
    tables: dict[str, StoredTensor] = {}
    for file in files:
        table = _safetensors_table(file) if file.suffix == ".safetensors" else _pickle_table(file)
        twice = tables.keys() & table.keys()
        if twice:
            raise CheckpointError(f"{file} holds {min(twice)}, which {tables[min(twice)].file} holds too")
        tables |= table
    return tables


def weights_digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the names, types, shapes and values of the tensors in `files`, however they are distributed among files."""
    digest = hashlib.sha256()
    for name, stored in sorted(read_tables(files).items()):
        values = torch.empty(stored.shape, dtype=stored.dtype)
        stored.read_into(values)
        digest.update(f"{name} {stored.dtype} {list(stored.shape)}".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors_table(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            entries = [(name, tuple(found.get_shape()), found.get_dtype()) for name, found in slices]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated, or no safetensors file: {error}") from error
    for name, _, dtype in entries:
        if dtype not in _DTYPES:
            raise CheckpointError(f"{file} stores {name} as {dtype}, but must store one of {', '.join(_DTYPES)}")
    # The file ends with the tensors, without gaps, in the order of their offsets.
    offset = file.stat().st_size - sum(shape_bytes(shape, _DTYPES[dtype]) for _, shape, dtype in entries)
    table = {}
    for name, shape, dtype in entries:
        table[name] = StoredTensor(file, shape, _DTYPES[dtype], offset)
        offset += shape_bytes(shape, _DTYPES[dtype])
    return table


def _pickle_table(file: Path) -> dict[str, StoredTensor]:
    with FakeTensorMode():  # reads a pickle without its tensors, and records the offset of each storage in the file
        fakes = _load_pickle(file)
    starts = {name: getattr(fake.untyped_storage(), "_checkpoint_offset", None) for name, fake in fakes.items()}
    plain = zipfile.is_zipfile(file) and all(entry.compress_type == zipfile.ZIP_STORED for entry in zipfile.ZipFile(file).infolist())
    if plain and all(fake.is_contiguous() and starts[name] is not None for name, fake in fakes.items()):
        offsets = {name: (starts[name] or 0) + int(fake.storage_offset()) * fake.dtype.itemsize for name, fake in fakes.items()}
        return {name: StoredTensor(file, tuple(fake.shape), fake.dtype, offsets[name]) for name, fake in fakes.items()}
    # Files of PyTorch before 1.6, compressed ones, and transposed tensors are not contiguous bytes.
    return {name: StoredTensor(file, tuple(t.shape), t.dtype, loaded=t.detach()) for name, t in _load_pickle(file).items()}


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Return tensors by name. `weights_only` refuses what could run code."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors, which may be code, or is damaged: it was not loaded") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided for name, value in content.items()
    ):
        raise CheckpointError(f"{file} must hold dense tensors by name, but holds something else")
    return content
