"""Curation's checks, floors, controls and leakage on photographs: planted changes, and what is said of each.

    python benchmarks/real_pictures.py                         # scikit-image's photographs and their quarters
    python benchmarks/real_pictures.py --pictures FOLDER --side 512 --only checks --out table.md

`--roundtrips FOLDER` adds real autoencoders: NAME.source.png, NAME.roundtrip.png and NAME.second.png of each picture.
"""

import argparse
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from planted import photographs, transformations

from rpo.curate.checking import CheckStage

BARS = {"no_op": 0.95, "kept": 0.95, "moved": 0.95, "replaced": 0.98}
DROPPED_AS = {"no_op": {"no_op"}, "moved": {"moved"}, "replaced": {"moved", "over_edit"}}
"""A mirror image is a motion, another picture an over-edit; a blank one is caught either way."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table."""

    section: str
    planted: str
    value: float
    """The share, or the number, that the bar is about."""
    bar: str
    """Empty where there is none."""
    met: bool
    n: int
    detail: str


def check_lines(pictures: Sequence[np.ndarray], names: Iterable[str] | None = None, stage: CheckStage | None = None) -> list[Line]:
    """Share of pictures on which `CheckStage` says what is expected, for each transformation."""
    stage, lines = stage or CheckStage(), []
    for name, (expected, transform) in transformations().items():
        if names is not None and name not in names:
            continue
        said: Counter[str] = Counter()
        for place, picture in enumerate(pictures):
            rng = np.random.default_rng([place, zlib.crc32(name.encode())])
            edited = transform(picture, rng, pictures[(place + 7) % len(pictures)])
            if edited is not None:
                said[(stage.verdict(picture, edited)["status"] or "drop:kept").removeprefix("drop:")] += 1
        lines.append(_line(name, expected, said))
        print(name, lines[-1].n, lines[-1].detail, file=sys.stderr, flush=True)
    return lines


def _line(name: str, expected: str, said: Counter[str]) -> Line:
    n = said.total()
    right = sum(said[reason] for reason in DROPPED_AS.get(expected, {"kept"})) / n if n else 1.0
    bar = BARS.get(expected)
    wanted = "" if bar is None else f"{'kept' if expected == 'kept' else 'dropped'} ≥ {bar:.0%}"
    shown = ", ".join(f"{reason} {count / n:.0%}" for reason, count in said.most_common())
    return Line(section="checks", planted=name, value=right, bar=wanted, met=bar is None or right >= bar, n=n, detail=shown)


def autoencoder_lines(folder: Path, stage: CheckStage | None = None) -> list[Line]:
    """A real autoencoder's second encoding against its first: what the pipeline compares."""
    stage, said = stage or CheckStage(), Counter[str]()
    for path in sorted(folder.glob("*.roundtrip.png")):
        first, second = (np.asarray(Image.open(p).convert("RGB")) for p in (path, path.with_name(path.name.replace("roundtrip", "second"))))
        said[(stage.verdict(first, second)["status"] or "drop:kept").removeprefix("drop:")] += 1
    return [_line("second encoding by a real autoencoder", "no_op", said)]


def table(lines: Sequence[Line]) -> str:
    rows = ["| section | planted | n | value | bar | | detail |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        mark = "" if not line.bar else "met" if line.met else "**missed**"
        rows.append(f"| {line.section} | {line.planted} | {line.n} | {line.value:.3g} | {line.bar} | {mark} | {line.detail} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of pictures; scikit-image's photographs if not given")
    parser.add_argument("--side", type=int, default=256, help="side to which pictures are fitted")
    parser.add_argument("--count", type=int, default=64, help="pictures at most")
    parser.add_argument("--roundtrips", type=Path, help="folder of NAME.roundtrip.png and NAME.second.png")
    parser.add_argument("--judged", action="store_true", help="only transformations that have a bar")
    parser.add_argument("--only", choices=("checks", "floors", "leakage"), help="one section")
    parser.add_argument("--out", type=Path, help="file of the table; its numbers go beside it as .json")
    options = parser.parse_args()
    pictures = [picture for picture, _ in zip(photographs(options.pictures, options.side), range(options.count), strict=False)]
    lines: list[Line] = []
    if options.only in (None, "checks"):
        names = {name for name, (expected, _) in transformations().items() if expected != "open" or not options.judged}
        lines += check_lines(pictures, names) + (autoencoder_lines(options.roundtrips) if options.roundtrips else [])
    text = table(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
        options.out.with_suffix(".json").write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
