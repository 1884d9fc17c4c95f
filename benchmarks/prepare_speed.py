"""How fast are pictures prepared, are the pixels right, and what does a second look cost?

Photographs of 0.5 to 1 megapixel are made from scikit-learn's two sample photographs: crops, enlarged, with sensor
noise, as JPEGs of quality 80 to 92. Ours scans, decodes, measures, hashes, resizes, splits and packs them; against it a
loop of Pillow that decodes and resizes with Lanczos on as many threads, and, where it is installed, Hugging Face
datasets' imagefolder doing the same in as many processes. Pairs are interleaved; the pixels of ours are compared with
the loop's. The peak of memory is that of a process of its own that prepares many small pictures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
from PIL import Image
from record import Row, this_command, write_record

from imagekiln import data as datasets
from imagekiln.config import DataConfig
from imagekiln.data import pixels

SIZE = 64
SOURCES = ("imagekiln", "Pillow", "datasets")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--photos", type=int, default=5000, help="photographs made for it (5000)")
    add("--rounds", type=int, default=3, help="interleaved rounds (3)")
    add("--small", type=int, default=100_000, help="small pictures for the peak of memory; 0 leaves that out (100000)")
    add("--folder", type=Path, help="where the photographs are kept and found again (a temporary folder)")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def make_photos(folder: Path, count: int, seed: int = 0) -> None:
    """`count` JPEGs of 0.5 to 1 megapixel; those that are there already stay."""
    from sklearn.datasets import load_sample_images

    samples = [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng, path = np.random.default_rng([seed, index]), folder / f"{index:06d}.jpg"
        sample = samples[index % len(samples)]
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
        if not path.exists():
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=int(rng.integers(80, 93)))


def make_small(folder: Path, count: int) -> None:
    """Many PNGs of 32 x 32 in a hundred folders, each different."""
    tile = np.zeros((32, 32, 3), np.uint8)
    for index in range(count):
        path = folder / f"{index % 100:02d}" / f"{index:06d}.png"
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
    """Hugging Face datasets: imagefolder, then a map that resizes, nothing taken from its cache."""
    import datasets as hugging_face

    with tempfile.TemporaryDirectory() as cache:
        table = hugging_face.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=cache)
        table.map(_resized, num_proc=pixels.THREADS, load_from_cache_file=False, remove_columns=table.column_names)


def _resized(row: dict[str, Any]) -> dict[str, Any]:
    whole = row["image"].convert("RGB")
    side = min(whole.size)
    left, top = (whole.width - side) / 2, (whole.height - side) / 2
    box = (left, top, left + side, top + side)
    return {"pixels": np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box)).tobytes()}


def by_ours(photos: Path, out: Path, config: datasets.PrepareConfig) -> None:
    """The whole of `imagekiln prepare` but its page."""
    shutil.rmtree(out, ignore_errors=True)
    datasets.prepare([str(photos)], out, config)


def decibels(photos: Path, out: Path) -> np.ndarray:
    """Peak signal-to-noise ratio of our pixels to `lanczos`, one a photograph, for the first 250."""
    prepared = datasets.open_prepared(out)
    survey = prepared.survey
    found = []
    for index in survey.usable[:250].tolist():
        mine = prepared.images_NCHW[survey.places[index]].transpose(1, 2, 0).astype(float)
        found.append(10 * np.log10(255**2 / np.square(mine - lanczos(photos / survey.names[index])).mean()))
    return np.array(found)


def peak_gb(source: Path, out: Path) -> float:
    """Peak of memory of a process that prepares `source`."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_gb, (source, out))


def _peak_gb(source: Path, out: Path) -> float:
    datasets.prepare([str(source)], out, datasets.PrepareConfig(size=32))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def loading(out: Path) -> float:
    """Batches of 64 pictures a second from the prepared set, in pictures."""
    loader = datasets.Loader(datasets.load(DataConfig(path=str(out))).train, 0, 64)
    start = time.perf_counter()
    for step in range(300):
        loader.batch(64 * step)
    return 300 * 64 / (time.perf_counter() - start)


def compare(folder: Path, options: argparse.Namespace, rows: list[Row]) -> None:
    """Speed against the others, pixels, and the second run."""
    photos, out, config = folder / "photos", folder / "set", datasets.PrepareConfig(size=SIZE)
    make_photos(photos, options.photos)
    cases: dict[str, Callable[[], object]] = {
        "imagekiln": partial(by_ours, photos, out, config),
        "Pillow": partial(by_pillow, photos),
        "datasets": partial(by_datasets, photos),
    }
    try:
        import datasets as _  # noqa: F401
    except ImportError:
        del cases["datasets"]
        print("Hugging Face datasets is not installed; pip install datasets to compare with it.")

    def say(index: int, now: dict[str, float]) -> None:
        rates = ", ".join(f"{name} {options.photos / seconds:.0f} pictures/s" for name, seconds in now.items())
        print(f"round {index + 1}: {rates}", flush=True)

    timers = {name: pairs.timer(case) for name, case in cases.items()}
    seconds = pairs.interleave(timers, options.rounds, 1, 0, say)
    for name, values in seconds.items():
        rates = [options.photos / value for value in values]
        rows.append(Row(f"{name}", float(np.median(rates)), "pictures/s", options.photos, raw=rates))
        if name != "imagekiln":
            ratio = pairs.ratio(values, seconds["imagekiln"])
            rows.append(Row(f"imagekiln / {name}", ratio.median, "times", options.rounds, (), (ratio.low, ratio.high)))
    psnr = decibels(photos, out)
    rows.append(Row("pixels of imagekiln against Pillow, mean", float(psnr.mean()), "dB", len(psnr)))
    rows.append(Row("pixels of imagekiln against Pillow, worst", float(psnr.min()), "dB", len(psnr)))
    again = [pairs.timer(lambda: datasets.prepare([str(photos)], out, config))(1) for _ in range(options.rounds)]
    ratio = pairs.ratio(seconds["imagekiln"], again)
    rows.append(
        Row("first run / run on unchanged data", ratio.median, "times", options.rounds, (), (ratio.low, ratio.high))
    )


def main() -> None:
    """Measure, print, record."""
    options = parser().parse_args()
    torch.set_num_threads(pixels.THREADS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        compare(folder, options, rows)
        if options.small:
            make_small(folder / "small", options.small)
            out = folder / "small-set"
            shutil.rmtree(out, ignore_errors=True)
            rows.append(Row("peak memory, small pictures", peak_gb(folder / "small", out), "GB", options.small))
            rows.append(Row("training batches of 64 from small pictures", loading(out), "pictures/s", 300))
    for row in rows:
        print(f"{row.what:<44}{row.value:>10.4g} {row.unit} {row.interval or ''}")
    if options.record:
        notes = [
            f"{pixels.THREADS} threads or processes on every side; photographs are upsampled crops of two pictures."
        ]
        print(write_record("prepare-speed", this_command(), rows, notes=notes, photos=options.photos))


if __name__ == "__main__":
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    main()
