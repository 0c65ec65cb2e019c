"""`rpo doctor`: is this machine ready? Each line says what was found, and what mends it."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rpo.errors import RpoError

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pyarrow", "pydantic", "scipy", "tyro")
FREE_GB_MIN = 2.0
SETUP = "make setup"


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    found: str
    mend: str | None = None
    """The line that mends it; `None` when all is well."""


def _packages() -> Iterator[Finding]:
    yield Finding("python", platform.python_version(), None if sys.version_info >= (3, 11) else "install Python 3.11 or newer")
    for package in PACKAGES:
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, "not installed", SETUP)


def _torchvision() -> Finding:
    """Absent is fine; present but broken makes every image processor of transformers fail, so it is tried in a process of its own."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "absent, as it should be")
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return Finding("torchvision", f"{version('torchvision')}, works")
    return Finding("torchvision", "installed but does not fit this torch", f"{sys.executable} -m pip uninstall torchvision")


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Finding("device", f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    return Finding("device", f"CPU, {os.cpu_count()} cores (enough for the embedded world; real models want a GPU)")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    writable = os.access(folder, os.W_OK)
    mend = None if free >= FREE_GB_MIN and writable else "choose another place with --out"
    return Finding("disk", f"{free:.0f} GB free in {folder}" + ("" if writable else ", not writable"), mend)


def _weights() -> Finding:
    from rpo.shapes.weights import checked_weights, weights_folder

    try:
        return Finding("embedded weights", f"whole, in {checked_weights(weights_folder())}")
    except RpoError as error:
        return Finding("embedded weights", "not whole", str(error))


def findings() -> Iterator[Finding]:
    """Every check, in order; what cannot be looked at without a missing package is left out."""
    missing = False
    for finding in _packages():
        missing = missing or finding.mend is not None
        yield finding
    yield _torchvision()
    yield _disk(Path.cwd())
    yield _weights()
    if not missing:
        yield _device()


def examine(console: Console, found: Iterable[Finding] | None = None) -> bool:
    """Prints every finding, of this machine if none are given; true when nothing needs mending."""
    well = True
    for finding in findings() if found is None else found:
        mark = Text("ok   ", "green") if finding.mend is None else Text("mend ", "red")
        console.print(mark, end="")
        console.print(f"{finding.what:<17} {finding.found}", soft_wrap=True)
        if finding.mend is not None:
            well = False
            console.print(f"     {'':<17} -> {finding.mend}", soft_wrap=True)
    return well
