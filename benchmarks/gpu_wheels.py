"""Fetches the wheels that a machine without network needs for the GPU check, into one folder: `make gpu-wheels`.

    python benchmarks/gpu_wheels.py --out .gpu-wheels --python 3.12 --cuda 130 --have scipy pyarrow pillow

`--have` names what the machine holds already. Of bitsandbytes' libraries only the one for that CUDA version is kept, a tenth of them.
There: `pip install --no-index --no-deps --target SITE .gpu-wheels/*.whl`, and SITE on PYTHONPATH.
"""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("gpu_requirements.txt")
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
_LIBRARY = re.compile(r"libbitsandbytes_(cuda|rocm|xpu)\w*\.so$")


def wanted(have: list[str]) -> list[str]:
    """Lines of the requirements but those of packages that are there."""
    lines = [line.strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    names = {name.lower().replace("_", "-") for name in have}
    return [line for line in lines if re.split(r"[=<>~!\[ ]", line)[0].lower() not in names]


def thin(wheel: Path, cuda: str) -> None:
    """Takes the libraries of other CUDA versions out of bitsandbytes."""
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as small:
        kept = [entry for entry in whole.infolist() if not _LIBRARY.search(entry.filename) or entry.filename.endswith(f"_cuda{cuda}.so")]
        names = {entry.filename for entry in whole.infolist()} - {entry.filename for entry in kept}
        for entry in kept:
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content = b"".join(line for line in content.splitlines(keepends=True) if line.split(b",")[0].decode() not in names)
            small.writestr(entry, content)
    partial.replace(wheel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".gpu-wheels"))
    parser.add_argument("--python", default="3.12", help="the machine's version of Python")
    parser.add_argument("--cuda", default="130", help="its torch's CUDA, as in libbitsandbytes_cuda130.so")
    parser.add_argument("--have", nargs="*", default=[], help="packages that it holds")
    arguments = parser.parse_args()
    platforms = [option for name in _PLATFORMS for option in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", arguments.python, *platforms, "--dest", str(arguments.out), *wanted(arguments.have)]
    subprocess.run(command, check=True)
    for wheel in arguments.out.glob("bitsandbytes-*.whl"):
        thin(wheel, arguments.cuda)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in sorted(arguments.out.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:6.1f} MiB {name}")
    print(f"{sum(sizes.values()):6.1f} MiB in {len(sizes)} wheels")


if __name__ == "__main__":
    main()
