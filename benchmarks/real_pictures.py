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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parent))
from planted import codec, noisy, photographs, resample, transformations, uint8

from rpo.curation.controls import biased, biases
from rpo.curation.label_rules import decide, measure
from rpo.curation.leakage import REFUSE_ABOVE, WARN_ABOVE, leakage
from rpo.curation.stages.check import CheckStage

BARS = {"no_op": 0.95, "kept": 0.95, "moved": 0.95, "replaced": 0.98}
DROPPED_AS = {"no_op": {"no_op"}, "moved": {"moved", "no_op", "over_edit"}, "replaced": {"moved", "over_edit", "no_op"}}
"""What counts is that the row is dropped: a mirror image is a motion, and a soft picture that moves by a little is unchanged."""


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


def encoded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A stand-in for an autoencoder: soft, with a little noise of its own."""
    return noisy(resample(image, 0.75), rng, 1.5)


def _rewards(images: Sequence[np.ndarray]) -> np.ndarray:
    """(images, 2): warmth (red less blue) and mean luminance of the center, which an encoding changes at random only."""
    edge = images[0].shape[0] // 4
    means = np.array([image[edge:-edge, edge:-edge].mean((0, 1)) for image in images])
    return np.stack([means[:, 0] - means[:, 2], means.mean(1)], 1)


def floor_lines(pictures: Sequence[np.ndarray]) -> list[Line]:
    """Labels of two rewards on planted edits, and the control of a reward that adds a constant to what was encoded."""
    rng = np.random.default_rng(0)
    pictures = [uint8(16 + p * (224 / 255)) for p in pictures]  # noise that is cut off at white would darken it, a bias that is real
    original, second, nothing = ([encoded(p, rng) for p in pictures] for _ in range(3))
    edits = {
        "nothing: a third encoding": (nothing, 0),
        "better: brighter and warmer": ([encoded(uint8(p * (1.08, 1.04, 1.0) + 3), rng) for p in pictures], 1),
        "worse: darker and colder": ([encoded(uint8(p * (0.92, 0.96, 1.0) - 3), rng) for p in pictures], -1),
    }
    source, first = _rewards(pictures), _rewards(original)
    noise = 3 * np.abs(_rewards(second) - first).mean(0) * np.random.default_rng(1).normal(size=(2, len(pictures), 2))
    scores, again = first + noise[0], _rewards(second) + noise[1]
    constant = 20 * (again - scores).std(0)  # a reward that likes what was encoded
    lines, n = [], len(pictures)
    for biased_by, name in ((np.zeros(2), "unbiased rewards"), (constant, "rewards with a constant bias")):
        measured = measure(scores + biased_by, again + biased_by, scores + biased_by, scores)
        before = replace(measured, floors=tuple(1.96 * np.sqrt(((scores + biased_by - source) ** 2).mean(0))))
        for edit, (images, truth) in edits.items():
            margins = _rewards(images) + noise[1] - scores
            settings = {"votes_min": 2, "by": 0, "kappa": 1.0, "preferences": None}
            ids = [str(i) for i in range(n)]
            labels, old = (decide("vote", ids, margins, floors, **settings) for floors in (measured, before))
            given, wrong = float((labels != 0).mean()), float(((labels != 0) & (labels != truth)).mean())
            kept, bar, met = (given, "labels ≤ 2 %", given <= 0.02) if truth == 0 else (wrong, "wrong ≤ 5 %", wrong <= 0.05)
            told = f"labels {given:.0%} (floor by root mean square of the shift: {(old != 0).mean():.0%}), wrong {wrong:.0%}"
            lines.append(Line(section="floors", planted=f"{edit}; {name}", value=kept, bar=bar, met=met, n=n, detail=told))
        found = biases({"source": source, "original": scores + biased_by, "neutral": scores + biased_by}, ["a", "b"], measured)
        caught = float(np.mean([biased(bias) for bias in (found["roundtrip"] or {}).values()]))
        wanted = 1.0 if biased_by.any() else 0.0
        lines.append(
            Line(
                section="floors", planted=f"control; {name}", value=caught, bar=f"caught {wanted:.0%}", met=caught == wanted, n=n,
                detail=", ".join(f"{bias['shift']:+.2f} floors" for bias in (found["roundtrip"] or {}).values()),
            )
        )  # fmt: skip
    return lines


def _cleanness(images: Sequence[np.ndarray]) -> np.ndarray:
    """(images, 2): minus the log of the noise of luminance and of color, by the Laplacian of Laplacians (Immerkaer, 1996)."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    found = []
    for image in images:
        values = image.astype(float)
        parts = (values.mean(-1), values[..., 0] - values[..., 2])
        found.append([-np.log(np.median(np.abs(ndimage.convolve(part, kernel))) / 6 + 0.3) for part in parts])
    return np.array(found)


def _smoothness(images: Sequence[np.ndarray]) -> np.ndarray:
    """(images, 2): minus the log of how much steeper luminance is at the borders of JPEG blocks than inside, down and across."""
    found = []
    for image in images:
        steps = [np.abs(np.diff(image.astype(float).mean(-1), axis=axis)).mean(1 - axis) for axis in (0, 1)]
        borders = [np.arange(len(step)) % 8 == 7 for step in steps]
        found.append([-np.log(step[at].mean() / (step[~at].mean() + 1e-9) + 1e-9) for step, at in zip(steps, borders, strict=True)])
    return np.array(found)


def mended_lines(pictures: Sequence[np.ndarray]) -> list[Line]:
    """Labels of edits that mend what an encoding mends in part by itself: the shift of the round trip must not hide the gain."""
    rng, lines = np.random.default_rng(0), []
    faults = {
        "denoised": ([noisy(p, rng, 15) for p in pictures], _cleanness),
        "JPEG 15 mended": ([codec(p, "JPEG", 15) for p in pictures], _smoothness),
    }
    for name, (sources, rewards) in faults.items():
        source, original, second, neutral = (
            rewards(images) for images in (sources, *([encoded(one, rng) for one in sources] for _ in range(3)))
        )
        margins = rewards([encoded(p, rng) for p in pictures]) - neutral
        measured = measure(original, second, neutral, neutral)
        before = replace(measured, floors=tuple(1.96 * np.sqrt(((original - source) ** 2).mean(0))))
        settings = {"votes_min": 2, "by": 0, "kappa": 1.0, "preferences": None}
        labels, old = (decide("vote", [str(i) for i in range(len(pictures))], margins, one, **settings) for one in (measured, before))
        right, wrong = float((labels > 0).mean()), float((labels < 0).mean())
        told = f"labels {right + wrong:.0%} (floor by root mean square of the shift: {(old != 0).mean():.0%}), wrong {wrong:.0%}"
        met = right >= 0.5 and wrong <= 0.05
        lines.append(Line(section="floors", planted=name, value=right, bar="wins ≥ 50 %", met=met, n=len(pictures), detail=told))
    return lines


ARTIFACTS = ("JPEG 75", "blur 0.7", "noise 5", "resample 0.5", "sharpen")
HONEST = ("paste 5 %", "paste 15 %", "recolor 5 %", "recolor 15 %", "inpaint 10 %")


def leakage_lines(pictures: Sequence[np.ndarray], draws: int = 40) -> list[Line]:
    """Both numbers on artifacts and on honest local edits, and verdicts where the chosen side is drawn by coin."""
    lines, table = [], transformations()
    for name in (*ARTIFACTS, *HONEST):
        pairs = []
        for place, picture in enumerate(pictures):
            edited = table[name][1](picture, np.random.default_rng([place, 3]), pictures[(place + 7) % len(pictures)])
            pairs += [(edited, picture)] if edited is not None else []
        found = leakage(pairs)
        if isinstance(found, str):
            continue
        refused = max(found.auc_low, found.paired_low) > REFUSE_ABOVE
        warned = max(found.auc, found.paired) > WARN_ABOVE
        bar, met = ("warned or refused", warned) if name in ARTIFACTS else ("not refused", not refused)
        told = (
            f"AUC {found.auc:.2f} ({found.auc_low:.2f} to {found.auc_high:.2f}), {'refused' if refused else 'warned' if warned else 'fine'}"
        )
        lines.append(Line(section="leakage", planted=name, value=found.paired, bar=bar, met=met, n=found.pairs, detail=told))
    refusals = 0
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        chosen = rng.permutation(len(pictures))[: min(30, len(pictures))]
        sides = [(pictures[i], table["JPEG 75"][1](pictures[i], rng, pictures[i])) for i in chosen]
        found = leakage([pair[:: 1 if rng.random() < 0.5 else -1] for pair in sides if pair[1] is not None], draw)  # type: ignore[misc]
        refusals += not isinstance(found, str) and max(found.auc_low, found.paired_low) > REFUSE_ABOVE
    told = f"{draws} draws of {min(30, len(pictures))} pairs"
    return [
        *lines,
        Line(section="leakage", planted="sides by coin", value=refusals, bar="refused 0", met=not refusals, n=draws, detail=told),
    ]


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
    if options.only in (None, "floors"):
        lines += floor_lines(pictures * max(400 // len(pictures), 1)) + mended_lines(pictures)
    if options.only in (None, "leakage"):
        lines += leakage_lines(pictures)
    text = table(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
        options.out.with_suffix(".json").write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
