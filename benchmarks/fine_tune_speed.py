"""How fast and in how much memory is a whole Stable Diffusion tuned, against diffusers' own example?

A: `imagekiln`'s trainer, family `fine_tune` with `method = "full"` and its own defaults (precision "auto", moving
   average). Latents and embeddings are computed once.
B: diffusers' `train_text_to_image.py` loop through accelerate as shipped, float32 and with its moving average.
C: the same with `--mixed_precision bf16`.

All three tune the same folder: Stable Diffusion 1.5 with every width divided by `--shrink` and random weights, so that
autoencoder, text encoder and denoiser cost in proportion what they do. Weights shrink by the square of that and what a
layer remembers of a picture by less, so 256 pixels are to the default what 512 are to the original. Each runs in a
process of its own on all threads, interleaved A B C A B C. Peak memory is that of the whole process, our encoding of
all pictures included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ours
import pairs
import peer_text
import torch
from PIL import Image
from record import Row, hardware, this_command, versions, write_record

from imagekiln import data as datasets
from imagekiln.config import write_toml
from imagekiln.engine import inputs
from imagekiln.engine import recipe as recipes
from imagekiln.engine.run import Run
from imagekiln.engine.tracker import Silent
from imagekiln.engine.trainer import Trainer
from imagekiln.nets.clip_text import BYTES, MARKS, TextEncoder

OURS, PEER, PEER_BF16 = "imagekiln", "diffusers fp32", "diffusers bf16"
WIDTHS = {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": 768}
"""Of Stable Diffusion 1.5."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--rounds", type=int, default=5, help="pairs of measurements (5)")
    add("--steps", type=int, default=3, help="training steps of each measurement (3)")
    add("--warm-up", type=int, default=2, help="steps of each case before the first round (2)")
    add("--batch", type=int, default=4, help="pictures a step (4)")
    add("--size", type=int, default=256, help="height and width of pictures in pixels (256)")
    add("--pictures", type=int, default=64, help="pictures of the set (64)")
    add("--shrink", type=int, default=5, choices=(1, 2, 4, 5, 8, 10), help="what widths are divided by (5)")
    add("--record", action="store_true", help="also write a record under records/")
    return arguments


def write_base(folder: Path, shrink: int) -> None:
    """Stable Diffusion 1.5 with narrower networks and random weights, as diffusers writes it."""
    import diffusers
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    width = 8 * round(WIDTHS["text"] / shrink / 8)
    reader = TextEncoder(width=width, layers=12, context=77, vocabulary=BYTES + MARKS)
    unet = [width // shrink for width in WIDTHS["unet"]]
    vae = [8 * round(width / shrink / 8) for width in WIDTHS["vae"]]
    diffusers.StableDiffusionPipeline(
        text_encoder=CLIPTextModel(reader.clip.config),
        tokenizer=reader.tokenizer(),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=unet, cross_attention_dim=width, attention_head_dim=8, norm_num_groups=8
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=vae,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def captions(count: int) -> list[str]:
    """A caption a picture, all different.

    >>> captions(2)
    ['a photograph of thing number 0', 'a photograph of thing number 1']
    """
    return [f"a photograph of thing number {index}" for index in range(count)]


def write_pictures(folder: Path, options: argparse.Namespace) -> None:
    """The set as a user would have it."""
    folder.mkdir()
    pictures = ours.random_pictures(options.pictures, 3, options.size)
    for index, (pixels, words) in enumerate(zip(pictures, captions(options.pictures), strict=True)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{index:05d}.png", compress_level=1)
        (folder / f"{index:05d}.txt").write_text(words, encoding="utf-8")


def build_ours(options: argparse.Namespace, base: Path, pictures: Path) -> tuple[Callable[[], object], dict[str, Any]]:
    """Our case, called in its own process."""
    settings = {
        "data": {"path": str(pictures), "size": options.size},
        "family": {"name": "fine_tune", "base": str(base), "method": "full"},
        "train": {"batch": options.batch, "total_kimg": 1e3},
    }
    recipe = recipes.founded(recipes.resolve("fine_tune", settings))
    begun = inputs.begin(recipe, datasets.load(recipe.data))
    trainer = Trainer(recipe, *begun, Run.create(base.with_name("run"), write_toml(recipe), {}), Silent())
    precision = "fp32" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch.")
    return trainer.step, {"parameters": ours.parameters(trainer.family.get_submodule("tuned")), "precision": precision}


def build_peer(options: argparse.Namespace, base: Path, precision: str) -> tuple[Callable[[], object], dict[str, Any]]:
    """The peer's case, called in its own process."""
    pictures = ours.random_pictures(options.pictures, 3, options.size)
    words = captions(options.pictures)
    loop = peer_text.TextPeerLoop(base, pictures, words, batch=options.batch, mixed_precision=precision)
    said = "bfloat16" if precision == "bf16" else "fp32"
    return loop.step, {"parameters": ours.parameters(loop.unet), "precision": said}


def measure(options: argparse.Namespace, folder: Path) -> pairs.Race:
    """Run all rounds, with the model and the pictures in this folder."""
    base, pictures = folder / "base", folder / "pictures"
    write_base(base, options.shrink)
    write_pictures(pictures, options)
    workers = {
        OURS: pairs.Worker(build_ours, options, base, pictures),
        PEER: pairs.Worker(build_peer, options, base, "no"),
        PEER_BF16: pairs.Worker(build_peer, options, base, "bf16"),
    }
    return pairs.race(workers, options.rounds, options.steps, options.warm_up, options.batch)


def rows(found: pairs.Race, steps: int) -> list[Row]:
    """What is measured as rows of a record."""
    peaks = [Row(f"{name}, peak memory", peak / 1e6, "MB") for name, peak in found.peaks.items()]
    return [*found.rows(OURS, steps), *peaks]


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options = parser().parse_args(given)
    print(f"torch {versions()['torch']}, {hardware()['processor']}, load {hardware()['load_1min']}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    table = rows(found, options.steps)
    pairs.say(table)
    if options.record:
        notes = [
            "Intervals are the smallest and the largest of all rounds. The aims were 1.5 times the images/s of the "
            "example as shipped, and no more memory than it.",
            f"Stable Diffusion 1.5 with widths divided by {options.shrink}, {options.size} px, batches of "
            f"{options.batch}. Latents and embeddings are computed once on our side, at every step by the example.",
        ]
        print(write_record("fine-tune-speed", this_command(), table, notes=notes, cases=found.facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
