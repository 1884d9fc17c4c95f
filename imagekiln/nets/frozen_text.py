"""CLIP's text encoder as somebody else trained it: it stays as it is, and what it says of a text is remembered.

It is read from a folder of `CLIPTextModel`, `CLIPTextModelWithProjection` or `CLIPModel` with the files of its
tokenizer, or from a pipeline's folder around `text_encoder` and `tokenizer`: never pickles or code. A model without a
projection of the whole text is given the identity, so that all are of one class.

Shapes: B texts, L tokens a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagekiln.errors import RecipeError
from imagekiln.nets.clip_text import ClipText, Encoded
from imagekiln.nets.libraries import quietly, transformers
from imagekiln.nets.pretrained import RANDOM, Memory, found_at, hash_of_files, random_parts, weights

SETTING = "family.text.base"
PROJECTION = "text_projection.weight"
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""What holds a tokenizer: one of these sets of files."""


class FrozenText(ClipText):
    """A pretrained text encoder, shared by copies, without weights that are trained, averaged or stored.

    base: its folder; "random:clip" is a tiny one with random weights, to try things out with.

    Raises `RecipeError` where the folder holds something else, and `UsageError` without transformers.

    >>> encoder = FrozenText("random:clip")
    >>> encoder(encoder.read(["a cat", "一只猫"])).last_BLW.shape, list(encoder.parameters())
    (torch.Size([2, 16, 32]), [])
    """

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base, self.memory = base, Memory()
        clip, self._tokenizer = _random(base) if base.startswith(RANDOM) else _opened(base)
        self.__dict__["clip"] = clip.eval().requires_grad_(False)  # not as a sub-module: its weights stay in the folder
        self.context = int(clip.config.max_position_embeddings)
        self._tokenizer.model_max_length = self.context  # what pipelines cut texts by

    def __deepcopy__(self, memo: Any) -> FrozenText:
        return self  # it does not change

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what it says is looked up."""

    def tokenizer(self) -> Any:
        """transformers' `CLIPTokenizer` of the folder."""
        return self._tokenizer

    def forward(self, tokens_BL: Tensor) -> Encoded:
        """What it says of these tokens, in float32 whatever the precision around it: it is said once."""
        if self.clip.device != tokens_BL.device:
            self.clip.to(tokens_BL.device)
        with torch.autocast(tokens_BL.device.type, enabled=False):
            return self.memory.said(tokens_BL, super().forward)


def fingerprint(base: str) -> str:
    """Hash of the files of a text encoder: it tells them apart, quickly."""
    if base.startswith(RANDOM):
        return base
    encoder, words = _folders(base)
    wanted = (encoder, "*.json"), (encoder, "*.safetensors"), (words, "*.json"), (words, "*.txt")
    return hash_of_files(
        Path(base).expanduser(), [file for folder, kind in wanted for file in sorted(folder.glob(kind))]
    )


def _folders(base: str) -> tuple[Path, Path]:
    """Where the encoder lies, and where its tokenizer."""
    root = Path(base).expanduser()
    encoder, words = root / "text_encoder", root / "tokenizer"
    return (encoder if encoder.is_dir() else root), (words if words.is_dir() else root)


def _opened(base: str) -> tuple[Any, Any]:
    """The network of a folder, and its tokenizer."""
    folder, words = _folders(base)
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"{SETTING} = {base!r} {found_at(folder, 'no text encoder')}. Expected a folder of a CLIP text model with "
            "its tokenizer, or of a pipeline with text_encoder and tokenizer in it, as save_pretrained writes them."
        )
    network = _network(folder)
    if not any(all((words / file).is_file() for file in files) for files in TOKENIZER_FILES):
        needed = " or ".join(" with ".join(files) for files in TOKENIZER_FILES)
        raise RecipeError(f"{SETTING}: {words} holds no tokenizer. Put the text encoder's there: {needed}.")
    try:
        with quietly():
            tokenizer = transformers().CLIPTokenizer.from_pretrained(words, local_files_only=True)
    except Exception as error:  # the library's own, which have no class in common
        raise RecipeError(f"{SETTING}: the tokenizer in {words} cannot be read ({error}).") from error
    if len(tokenizer) > network.config.vocab_size:
        raise RecipeError(
            f"{SETTING} = {base!r}: its tokenizer has {len(tokenizer)} tokens, and its text encoder knows "
            f"{network.config.vocab_size}. Expected the two that belong together."
        )
    return network, tokenizer


def _network(folder: Path) -> Any:
    """`CLIPTextModelWithProjection` of a folder."""
    kind = transformers().CLIPTextModelWithProjection
    network, told = weights(kind, folder, SETTING, output_loading_info=True)
    if missing := sorted(set(told["missing_keys"]) - {PROJECTION}):
        raise RecipeError(
            f"{SETTING}: {folder} is not a CLIP text model: {missing[0]} is missing, and {len(missing) - 1} more names "
            "of its weights."
        )
    if PROJECTION in told["missing_keys"]:
        width = network.config.projection_dim = network.config.hidden_size
        network.text_projection = nn.Linear(width, width, bias=False)
        nn.init.eye_(network.text_projection.weight)
    return network.float()


def _random(base: str) -> tuple[Any, Any]:
    if base != f"{RANDOM}clip":
        raise RecipeError(f"{SETTING} = {base!r}: expected {RANDOM}clip, or a folder.")
    parts = random_parts("sd3")
    return parts["text_encoder"], parts["tokenizer"]
