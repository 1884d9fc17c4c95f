"""Do the checks of a set find faults that were planted in 1,000 real pictures of every set given?

Of 10 classes with 100 pictures each, 5 % get an exact copy (half of them in another file format), 5 % a near duplicate
(a crop of 95 % of each side anywhere, JPEG of quality 30, mirrored, 10 to 30 % brighter or darker), 3 % another label,
2 % become blank (one colour, half of them with noise), 2 % blurred (a Gaussian of 3 to 6 % of the short side) and 1 %
are cut off. Every set is checked alone, and all together. The thresholds were chosen on other pictures (--tuning).

A near duplicate counts as found when it and its original fall into one group; a finding is false when its two pictures
do not come from one original. Photographs that their publishers took or kept twice are real near duplicates: those
looked at and listed in ALREADY_THERE are left out of the second precision; --sheet draws all others.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from record import Row, this_command, write_record

from imagekiln.data import builtin, checks, decode, measures, source
from imagekiln.data.checks import labels
from imagekiln.data.survey import MEASURES, THUMB, Survey

CLASSES, PER_CLASS = 10, 100
SHARES = {"exact": 0.05, "near": 0.05, "swap": 0.03, "blank": 0.02, "blurred": 0.02, "cut": 0.01}
NEAR = ("crop", "quality 30", "mirror", "brightness")
TUNED_ON = frozenset({"046", "056", "075", "076", "081", "082", "083", "088", "089", "095"})
"""First letters of the class folders that thresholds were chosen on; of CIFAR-10 it was the second half."""
ALREADY_THERE = frozenset(
    {
        ("073-water-lily/image_00315.jpg", "073-water-lily/image_00372.jpg"),
        ("074-rose/image_01150.jpg", "074-rose/image_01198.jpg"),
        ("078-lotus-lotus/image_01827.jpg", "078-lotus-lotus/image_01870.jpg"),
        ("078-lotus-lotus/image_01840.jpg", "078-lotus-lotus/image_01907.jpg"),
        ("078-lotus-lotus/image_01862.jpg", "078-lotus-lotus/image_01887.jpg"),
        ("078-lotus-lotus/image_01867.jpg", "078-lotus-lotus/image_01933.jpg"),
        ("078-lotus-lotus/image_01889.jpg", "078-lotus-lotus/image_01906.jpg"),
        ("078-lotus-lotus/image_01900.jpg", "078-lotus-lotus/image_01904.jpg"),
        ("080-anthurium/image_02009.jpg", "080-anthurium/image_02056.jpg"),
        ("airplane/18999.png", "airplane/26300.png"),
        ("automobile/15462.png", "automobile/26742.png"),
        ("automobile/15462.png", "automobile/27792.png"),
        ("automobile/26742.png", "automobile/27792.png"),
    }
)
"""Pairs that were found by the checks, then looked at: the same photograph, or the same car, kept twice."""


@dataclass(frozen=True)
class File:
    """One file of a planted set. origin: the picture it was made from. fault: "" or what was done to it."""

    name: str
    label: str
    raw: bytes
    origin: str
    fault: str = ""
    true_label: str = ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", type=Path, nargs="+", required=True, help="folders of class folders, or CIFAR-10's binary files")
    add("--seeds", type=int, default=3, help="plantings, each with other pictures (3)")
    add("--tuning", action="store_true", help="plant in the pictures that thresholds were chosen on")
    add("--out", type=Path, help="keep the planted sets in this folder (a temporary one)")
    add("--sheet", type=Path, help="draw the pairs that count as false into this PNG")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def real_pictures(folder: Path, seed: int, tuning: bool) -> list[File]:
    """1,000 pictures of 10 classes, their bytes as published (CIFAR-10: as PNG)."""
    rng = np.random.default_rng([seed, 1])
    if builtin.recognise(folder):
        arrays = builtin.read(*builtin.recognise(folder))
        half = np.arange(len(arrays.labels)) >= len(arrays.labels) // 2
        found = []
        for number, label in enumerate(arrays.class_names[:CLASSES]):
            rows = np.flatnonzero((arrays.labels == number) & (half == tuning))
            for row in np.sort(rng.choice(rows, PER_CLASS, replace=False)):
                name = f"{label}/{row:05d}.png"
                found.append(File(name, label, encoded(Image.fromarray(arrays.images_NHWC[row]), "PNG"), name))
        return found
    classes = {path.name: sorted(path.glob("*.jpg")) for path in sorted(folder.iterdir()) if path.is_dir()}
    names = [name for name, files in classes.items() if len(files) >= PER_CLASS and (name[:3] in TUNED_ON) == tuning]
    found = []
    for label in sorted(rng.choice(names, CLASSES, replace=False)):
        for at in np.sort(rng.choice(len(classes[label]), PER_CLASS, replace=False)):
            name = f"{label}/{classes[label][at].name}"
            found.append(File(name, str(label), classes[label][at].read_bytes(), name))
    return found


def planted(files: Sequence[File], seed: int) -> list[File]:
    """The same files with faults, in a random order of names."""
    rng = np.random.default_rng([seed, 2])
    names = sorted({file.label for file in files})
    order, start, out = rng.permutation(len(files)), 0, list(files)
    for fault, share in SHARES.items():
        count = round(share * len(files))
        for turn, at in enumerate(order[start : start + count]):
            made = faulty(files[at], fault, turn, names, rng)
            if fault in ("exact", "near"):
                out.append(made)
            else:
                out[at] = made
        start += count
    ranks = rng.permutation(len(out))
    return [
        replace(file, name=f"{file.label}/{rank:05d}{Path(file.name).suffix}", true_label=file.true_label or file.label)
        for file, rank in zip(out, ranks, strict=True)
    ]


def faulty(file: File, fault: str, turn: int, names: Sequence[str], rng: np.random.Generator) -> File:
    """One file with one fault."""
    image = Image.open(io.BytesIO(file.raw)).convert("RGB")
    lossless = file.name.endswith(".png")
    if fault == "exact":
        other = encoded(image, "BMP" if lossless else "PNG") if turn % 2 else file.raw
        return replace(file, raw=other, fault="exact")
    if fault == "near":
        kind = NEAR[turn % len(NEAR)]
        made = near_duplicate(image, kind, rng)
        raw = made if isinstance(made, bytes) else encoded(made, "PNG" if lossless else "JPEG")
        return replace(file, raw=raw, fault=kind)
    if fault == "swap":
        label = str(rng.choice([name for name in names if name != file.label]))
        return replace(file, label=label, fault="swap", true_label=file.label)
    if fault == "cut":
        return replace(file, raw=file.raw[: int(rng.uniform(0.3, 0.9) * len(file.raw))], fault="cut")
    if fault == "blank":
        pixels = np.tile(rng.integers(0, 256, 3), (image.height, image.width, 1)).astype(float)
        pixels += rng.normal(0, 2, pixels.shape) if turn % 2 else 0
        image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    else:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.03, 0.06) * min(image.size)))
    return replace(file, raw=encoded(image, "PNG" if lossless else "JPEG"), fault=fault)


def near_duplicate(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image | bytes:
    """A picture one would call the same."""
    if kind == "crop":
        width, height = round(0.95 * image.width), round(0.95 * image.height)
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        return image.crop((left, top, left + width, top + height))
    if kind == "quality 30":
        return encoded(image, "JPEG", quality=30)
    if kind == "mirror":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    change = rng.uniform(0.1, 0.3)
    return ImageEnhance.Brightness(image).enhance(1 + change if rng.random() < 0.5 else 1 - change)


def encoded(image: Image.Image, form: str, quality: int = 90) -> bytes:
    """A picture as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, form, **({"quality": quality} if form == "JPEG" else {}))
    return stream.getvalue()


def look(files: Sequence[File], folder: Path) -> Survey:
    """Write the files and survey them as `prepare` does."""
    count = len(files)
    measured, thumbs = np.zeros(count, MEASURES), np.zeros((count, THUMB, THUMB, 3), np.uint8)
    reasons, digests = [""] * count, [""] * count
    for index, file in enumerate(files):
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.raw)
        try:
            image = decode.open_safely(path)
        except decode.Unusable as error:
            reasons[index] = str(error)
            continue
        measured[index], thumbs[index] = measures.measure(image)
        digests[index] = source.digest(np.asarray(image))
    measures.add_hashes(measured, thumbs)
    return Survey(
        [file.name for file in files],
        [file.label for file in files],
        [None] * count,
        reasons,
        digests,
        measured,
        thumbs,
    )


def judge(files: Sequence[File], survey: Survey, sheet: list[np.ndarray] | None) -> dict[str, tuple[float, int]]:
    """What was found of what was planted: value and number behind it, by name."""
    config = checks.CleanConfig()
    found = checks.run(survey, config)
    group = checks.groups(survey, found)
    by = {name: [finding for finding in found if finding.check == name] for name in checks.CHECKS}
    fault = np.array([file.fault for file in files])
    first = {file.origin: at for at, file in enumerate(files) if not file.fault}
    out: dict[str, tuple[float, int]] = {}

    def share(what: str, right: Sequence[bool]) -> None:
        out[what] = (float(np.mean(right)) if len(right) else 1.0, len(right))

    def together(kind: str) -> list[bool]:
        return [bool(group[at] == group[first[files[at].origin]]) for at in np.flatnonzero(fault == kind)]

    def true(finding: checks.Finding) -> bool:
        return files[finding.index].origin == files[finding.other].origin

    share("exact duplicates, recall", together("exact"))
    share("exact duplicates, precision", [true(finding) for finding in by["duplicate"]])
    for kind in NEAR:
        share(f"near duplicates, {kind}, recall", together(kind))
    share("near duplicates, recall", [found for kind in NEAR for found in together(kind)])
    share("near duplicates, precision", [true(finding) for finding in by["near_duplicate"]])
    new = []
    for finding in by["near_duplicate"]:
        origins = sorted((files[finding.index].origin, files[finding.other].origin))
        if tuple(origins) not in ALREADY_THERE:
            new.append(true(finding))
            if not new[-1] and sheet is not None:
                print("   not planted:", *origins, f"residual {finding.value:.3f}", flush=True)
                sheet.append(np.concatenate([survey.thumbs[finding.index], survey.thumbs[finding.other]], 1))
    share("near duplicates, precision without those already there", new)
    for kind in ("blank", "blurred"):
        hit = np.zeros(len(files), bool)
        hit[[finding.index for finding in by[kind]]] = True
        share(f"{kind}, recall", hit[fault == kind].tolist())
        share(f"{kind}, false alarms", hit[fault != kind].tolist())
    unreadable = np.array([bool(reason) for reason in survey.reasons])
    share("unreadable, recall", unreadable[fault == "cut"].tolist())
    share("unreadable, false alarms", unreadable[fault != "cut"].tolist())
    suspicion = np.nan_to_num(labels.suspicion(survey), nan=-1.0)
    top = np.argsort(-suspicion, kind="stable")[: len(survey.usable) // 10]
    share("label swaps in the first 10 % of the ranking", np.isin(np.flatnonzero(fault == "swap"), top).tolist())
    listed = {finding.index for finding in by["suspicious_label"]}
    share("label swaps among those found suspicious", [at in listed for at in np.flatnonzero(fault == "swap").tolist()])
    share("found suspicious, all", [at in listed for at in survey.usable.tolist()])
    return out


def joined(surveys: Sequence[Survey], names: Sequence[str]) -> Survey:
    """All sets as one, every file and label named after its set."""
    return Survey(
        [f"{name}/{file}" for name, survey in zip(names, surveys, strict=True) for file in survey.names],
        [f"{name}/{label}" for name, survey in zip(names, surveys, strict=True) for label in survey.labels],
        [each for survey in surveys for each in survey.texts],
        [each for survey in surveys for each in survey.reasons],
        [each for survey in surveys for each in survey.digests],
        np.concatenate([survey.measured for survey in surveys]),
        np.concatenate([survey.thumbs for survey in surveys]),
    )


def measure(options: argparse.Namespace, out: Path, sheet: list[np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """What was found, by set and seed."""
    names = [folder.name for folder in options.data]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*names, "all together"]}
    for seed in range(options.seeds):
        sets, surveys = [], []
        for name, folder in zip(names, options.data, strict=True):
            sets.append(planted(real_pictures(folder, seed, options.tuning), seed))
            surveys.append(look(sets[-1], out / f"{name}-{seed}"))
            found[name].append(judge(sets[-1], surveys[-1], sheet))
        if len(sets) > 1:
            found["all together"].append(
                judge([file for files in sets for file in files], joined(surveys, names), None)
            )
        print(f"seed {seed} done", flush=True)
    return {name: results for name, results in found.items() if results}


def main(given: Sequence[str] | None = None) -> int:
    """Plant, look, print, and write what was asked for."""
    options = parser().parse_args(given)
    sheet: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, options.out or Path(folder), sheet)
    rows = rows_of(found)
    for row in rows:
        low, high = min(row.raw), max(row.raw)
        print(f"{row.what:80s} {row.value:7.4f}  ({low:.4f} .. {high:.4f}, n {row.n})")
    if options.sheet and sheet:
        Image.fromarray(np.concatenate(sheet)).resize((256, 128 * len(sheet)), 0).save(options.sheet)
    if options.record:
        which = (
            "the pictures that thresholds were chosen on" if options.tuning else "other pictures than for thresholds"
        )
        notes = [f"Faults planted in {which}; means over seeds, n is of the first seed.", "Thresholds: the defaults."]
        print(write_record("planted-faults", this_command(), rows, notes=notes))
    return 0


def rows_of(found: Mapping[str, Sequence[Mapping[str, tuple[float, int]]]]) -> list[Row]:
    """What was found as rows of a record."""
    return [
        Row.of(
            f"{name}: {what}",
            [result[what][0] for result in results],
            "share",
            range(len(results)),
            results[0][what][1],
        )
        for name, results in found.items()
        for what in results[0]
    ]


if __name__ == "__main__":
    sys.exit(main())
