"""Write records as shards, wherever fsspec writes to."""

import io
import json
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write_tar(url, samples):
    """`samples`: of each, name of a file -> bytes."""
    with fsspec.open(url, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in ((name, data) for sample in samples for name, data in sample.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def to_samples(records, images, first=0):
    """Samples of records with one image in a folder or none."""
    samples = []
    for number, record in enumerate(records, start=first):
        picture = {f"{number:04}.png": (images / record["image"]).read_bytes()} if "image" in record else {}
        named = record | dict.fromkeys(record.keys() & {"image"}, f"{number:04}.png")
        samples.append({f"{number:04}.json": json.dumps(named).encode()} | picture)
    return samples


def write_parquet(url, records, images, rows=3):
    """`rows`: of a row group."""
    row = [
        {
            "conversations": record["conversations"],
            "image": {"bytes": (images / record["image"]).read_bytes(), "path": None} if "image" in record else None,
        }
        for record in records
    ]
    turn = pa.struct({"from": pa.string(), "value": pa.string()})
    schema = pa.schema({"conversations": pa.list_(turn), "image": IMAGE})
    with fsspec.open(url, "wb") as file:
        pq.write_table(pa.Table.from_pylist(row, schema=schema), file, row_group_size=rows)
