"""How fast are pictures prepared, are the pixels right, and what does a second look cost?

Photographs of 0.5 to 1 megapixel are made from the pictures of `--data`, or from scikit-learn's two sample photographs:
crops, enlarged, with sensor noise, as JPEGs of quality 80 to 92. Crops of two photographs are near duplicates of each
other, all of which are looked at closely; crops of many are like a set somebody collected. Ours scans, decodes,
measures, hashes, resizes, checks, splits and packs them; against it a loop of Pillow that decodes and resizes with
Lanczos on as many threads, and, where it is installed, Hugging Face datasets' imagefolder mapped by the same resizing
in as many processes. Every measurement is made in a fresh process, without the time that imports take, interleaved;
the pixels of ours are compared with the loop's. The peak of memory is that of a process that runs the whole command,
its page included, on many small pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
from PIL import Image
from record import Row, this_command, write_record

from imagekiln import data
from imagekiln.data import pixels

SIZE, SMALL_SIZE = 64, 32
TARGET_MB = 600
OURS, PILLOW, DATASETS = "imagekiln", "Pillow", "datasets"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", type=Path, help="folder of pictures that photographs are made from (scikit-learn's two)")
    add("--photos", type=int, default=5000, help="photographs made for it; 0 leaves speed out (5000)")
    add("--rounds", type=int, default=3, help="interleaved rounds (3)")
    add("--small", type=int, default=100_000, help="small pictures for the peak of memory; 0 leaves that out (100000)")
    add("--folder", type=Path, help="where the photographs are kept and found again (a temporary folder)")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def make_photos(folder: Path, count: int, data_folder: Path | None, seed: int = 0) -> None:
    """`count` JPEGs of 0.5 to 1 megapixel; those that are there already stay."""
    if data_folder is None:
        from sklearn.datasets import load_sample_images

        samples: list[Any] = [Image.fromarray(image) for image in load_sample_images().images]
    else:
        samples = sorted(path for path in data_folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
        np.random.default_rng(seed).shuffle(samples)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng, path = np.random.default_rng([seed, index]), folder / f"{index:06d}.jpg"
        if path.exists():
            continue
        sample = samples[index % len(samples)]
        sample = Image.open(sample).convert("RGB") if isinstance(sample, Path) else sample
        share = rng.uniform(0.6, 1.0)
        width, height = int(sample.width * share), int(sample.height * share)
        left, top = rng.integers(0, sample.width - width + 1), rng.integers(0, sample.height - height + 1)
        scale = (rng.uniform(0.5e6, 1.0e6) / (width * height)) ** 0.5
        photo = sample.resize(
            (round(width * scale), round(height * scale)),
            Image.Resampling.BICUBIC,
            box=(left, top, left + width, top + height),
        )
        noisy = np.asarray(photo, np.float32) + rng.standard_normal((photo.height, photo.width, 1), np.float32) * 4
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=int(rng.integers(80, 93)))


def make_small(folder: Path, count: int) -> None:
    """Many PNGs of 32 x 32 in the folders of ten classes, each different."""
    tile = np.zeros((32, 32, 3), np.uint8)
    for index in range(count):
        path = folder / f"{index % 10}" / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            tile[:] = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(tile).save(path, compress_level=1)


def lanczos(path: Path) -> np.ndarray:
    """The plain way: decode whole, take the centre square, resize with Lanczos: (H, W, 3) uint8."""
    with Image.open(path) as image:
        whole = image.convert("RGB")
    side = min(whole.size)
    left, top = (whole.width - side) / 2, (whole.height - side) / 2
    return np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)))


def by_pillow(photos: Path) -> np.ndarray:
    """All photographs by `lanczos`, on as many threads as ours."""
    with ThreadPoolExecutor(pixels.THREADS) as pool:
        return np.stack(list(pool.map(lanczos, sorted(photos.glob("*.jpg")))))


def by_datasets(photos: Path) -> None:
    """Hugging Face datasets: imagefolder, then a map that resizes and writes, nothing taken from its cache."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        table = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=cache)
        table.map(_resized, num_proc=pixels.THREADS, load_from_cache_file=False, remove_columns=table.column_names)


def _resized(row: dict[str, Any]) -> dict[str, Any]:
    whole = row["image"].convert("RGB")
    side = min(whole.size)
    left, top = (whole.width - side) / 2, (whole.height - side) / 2
    box = (left, top, left + side, top + side)
    return {"pixels": np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box)).tobytes()}


def by_ours(photos: Path, out: Path) -> None:
    """The whole of `imagekiln prepare` but its page."""
    shutil.rmtree(out, ignore_errors=True)
    again(photos, out)


def again(photos: Path, out: Path) -> None:
    """The same into the same folder: on unchanged data there is nothing to do."""
    data.prepare([str(photos)], out, data.PrepareConfig(size=SIZE))


def fresh(module: str, work: Callable[..., object], *arguments: Path) -> pairs.Timer:
    """A timer of work in a process of its own, which has this module loaded when the clock starts: nothing that an
    earlier round left in memory counts."""

    def run(steps: int) -> float:
        if not steps:
            return 0.0
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_timed, module, work, arguments, steps).result()

    return run


def _timed(module: str, work: Callable[..., object], arguments: tuple[Path, ...], steps: int) -> float:
    importlib.import_module(module)
    torch.set_num_threads(pixels.THREADS)
    return pairs.timer(lambda: work(*arguments))(steps)


def decibels(photos: Path, out: Path) -> np.ndarray:
    """Peak signal-to-noise ratio of our pixels to `lanczos`, one a photograph, for the first 250."""
    prepared = data.open_prepared(out)
    survey = prepared.survey
    found = []
    for index in survey.usable[:250].tolist():
        mine = prepared.images_NCHW[survey.places[index]].transpose(1, 2, 0).astype(float)
        found.append(10 * np.log10(255**2 / np.square(mine - lanczos(photos / survey.names[index])).mean()))
    return np.array(found)


def peak_mb(source: Path, out: Path) -> tuple[float, float]:
    """Peak of memory in MB (a million bytes), and seconds, of a process that runs `imagekiln prepare` on `source`."""
    shutil.rmtree(out, ignore_errors=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_mb, source, out).result()


def _peak_mb(source: Path, out: Path) -> tuple[float, float]:
    from imagekiln.cli.main import main as command_line

    sys.argv = ["imagekiln", "prepare", str(source), "--out", str(out), "--size", str(SMALL_SIZE)]
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        command_line()
    if not data.is_prepared(out) or not (out / "report.html").is_file():
        raise RuntimeError("The command did not write the whole set; see above.")
    return _peak_of_this_process() * 1024 / 1e6, time.perf_counter() - start


def _peak_of_this_process() -> int:
    """In KiB. Linux counts the program that started this one into `ru_maxrss`, but not into `VmHWM`."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


def compare(folder: Path, options: argparse.Namespace, rows: list[Row]) -> None:
    """Speed against the others, pixels, and the second run."""
    photos, out = folder / "photos", folder / "set"
    make_photos(photos, options.photos, options.data)
    timers = {OURS: fresh("imagekiln.data.measures", by_ours, photos, out), PILLOW: fresh("PIL", by_pillow, photos)}
    if importlib.util.find_spec("datasets") is not None:
        timers[DATASETS] = fresh("datasets", by_datasets, photos)
    else:
        print("Hugging Face datasets is not installed; pip install datasets to compare with it.")
    timers["again"] = fresh("imagekiln.data.measures", again, photos, out)

    def say(index: int, now: dict[str, float]) -> None:
        rates = ", ".join(f"{name} {options.photos / seconds:.0f} pictures/s" for name, seconds in now.items())
        print(f"round {index + 1}: {rates}", flush=True)

    seconds = pairs.interleave(timers, options.rounds, 1, 0, say)
    unchanged = seconds.pop("again")
    for name, values in seconds.items():
        rows.append(Row.median(name, [options.photos / value for value in values], "pictures/s", options.photos))
        if name != OURS:
            ratios = [theirs / mine for theirs, mine in zip(values, seconds[OURS], strict=True)]
            rows.append(Row.median(f"{OURS} / {name}", ratios, "times", options.photos))
    ratios = [first / second for first, second in zip(seconds[OURS], unchanged, strict=True)]
    rows.append(Row.median("first run / run on unchanged data", ratios, "times", options.photos))
    psnr = decibels(photos, out)
    rows.append(Row("pixels of imagekiln against Pillow, mean", float(psnr.mean()), "dB", len(psnr)))
    rows.append(Row("pixels of imagekiln against Pillow, worst", float(psnr.min()), "dB", len(psnr)))


def main() -> None:
    """Measure, print, record."""
    options = parser().parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.photos:
            compare(folder, options, rows)
        if options.small:
            make_small(folder / "small", options.small)
            memory, seconds = peak_mb(folder / "small", folder / "small-set")
            rows.append(Row("peak memory, small pictures", memory, "MB", options.small))
            rows.append(Row("the whole command, small pictures", options.small / seconds, "pictures/s", options.small))
    for row in rows:
        print(f"{row.what:<44}{row.value:>10.4g} {row.unit} {row.interval or ''}")
    if options.record:
        made_of = f"the pictures of {options.data.name}" if options.data else "two photographs"
        notes = [
            f"{pixels.THREADS} threads or processes on every side; photographs are upsampled crops of {made_of}.",
            "Every measurement in a fresh process; intervals are the smallest and the largest of all rounds.",
            f"The aims were 2 times Pillow and datasets, 20 times a second run, 35 dB and {TARGET_MB} MB.",
        ]
        name = "prepare-memory" if not options.photos else "prepare-speed" if options.data else "prepare-speed-alike"
        print(write_record(name, this_command(), rows, notes=notes, photos=options.photos))


if __name__ == "__main__":
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    main()
