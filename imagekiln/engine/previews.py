"""The sheet of a preview: the same seeds and words at every moment of a run, so that moments can be compared."""

from __future__ import annotations

from PIL import Image

from imagekiln.config import TrainConfig
from imagekiln.core import Family, mix
from imagekiln.engine import pictures
from imagekiln.engine.generate import draw, invents, labels_for
from imagekiln.engine.inputs import in_words
from imagekiln.engine.validation import Validation

PREVIEW_IMAGES = 40
LONGEST_ROW = 8
"""Pictures of a prompt at most."""


def sheet(family: Family, config: TrainConfig, validation: Validation) -> Image.Image:
    """What a family draws for `config.prompts`, a row each, or else for labels and captions of held-out pictures; of an
    autoencoder held-out pictures and what it makes of them, row by row."""
    if not invents(family):
        columns = pictures.columns_for(PREVIEW_IMAGES, 0)
        return pictures.grid(validation.pairs(family, PREVIEW_IMAGES // 2, columns), columns)
    if config.prompts:
        columns = min(LONGEST_ROW, PREVIEW_IMAGES // len(config.prompts))
        seeds = [mix(config.seed, "preview", column) for column in range(columns)] * len(config.prompts)
        wanted = [prompt for prompt in config.prompts for _ in range(columns)]
        return pictures.prompt_rows(draw(family, seeds, wanted, batch=len(seeds)), config.prompts)
    labels = labels_for(PREVIEW_IMAGES, family.num_classes)
    seeds = [mix(config.seed, "preview", index) for index in range(len(labels))]
    images = draw(family, seeds, in_words(family, validation.source, labels), batch=len(seeds))
    return pictures.grid(images, pictures.columns_for(len(seeds), family.num_classes))
