"""Where a pretrained model lies: a folder as diffusers writes it, one file of weights, or a commit of the hub.

The last two become folders in the cache, once; what is read is safetensors and JSON, never pickles or code. One file,
as models are passed on among users, holds weights under the names of their first publication and no configs: these are
taken from a folder of the same name beside it, else fetched by diffusers, which knows where those of every layout are.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from imagekiln.data import cache_folder
from imagekiln.engine.run import aside_of, disk_faults
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets.libraries import diffusers, quietly
from imagekiln.nets.pretrained import PIPELINES

WANTED = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Files of a hub's model that are fetched: configs, tokenizers, weights."""

COMMIT = 40
"""Hexadecimal digits of a commit's full name."""

_SIGNS = {
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "sd3",
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": "sdxl",
    "model.diffusion_model.input_blocks.0.0.weight": "sd1",
}
"""Names of tensors that tell layouts apart, to be looked for in this order."""

_T5 = "text_encoders.t5xxl.transformer.shared.weight"
"""The third text encoder of Stable Diffusion 3, which many files leave out."""


def folder(named: str) -> Path | None:
    """The folder of the model that `family.base` names, its path made absolute; None where it names neither a folder,
    nor a file, nor a commit.

    Raises:
        RecipeError: the file holds no model of a known layout, the commit is no full one or cannot be fetched.
        DiskError: the cache cannot be written.
    """
    path = Path(named).expanduser()
    if not named or path.is_dir():
        return path.absolute() if named else None
    if path.is_file():
        return _unpacked(path)
    return _fetched(*named.split("@", 1)) if "@" in named else None


def called(folder: str) -> tuple[str, str]:
    """What others know the model in a folder by, and its commit where the folder is one that the hub's library keeps.

    >>> called("/cache/models--me--mine/snapshots/0123abc"), called("/models/sd15")
    (('me/mine', '0123abc'), ('sd15', ''))
    """
    path = Path(folder)
    kept = path.parent.parent.name
    if path.parent.name == "snapshots" and kept.startswith("models--"):
        return kept.removeprefix("models--").replace("--", "/", 1), path.name
    return path.name, ""


# -- one file ---------------------------------------------------------------------------------------------------------


def layout(names: Collection[str]) -> str:
    """ "sd1", "sdxl" or "sd3" by the names of a file's tensors; "" for none of them.

    >>> layout(["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"])
    'sd1'
    """
    return next((kind for sign, kind in _SIGNS.items() if sign in names), "")


def _unpacked(file: Path) -> Path:
    where = f"family.base = {str(file)!r}"
    if file.suffix != ".safetensors":
        raise RecipeError(f"{where} is no .safetensors file; weights as pickles can run any code.")
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{where} cannot be read ({error}). Fetch it again.") from None
    kind = layout(names)
    if not kind:
        raise RecipeError(
            f"{where} holds no whole model of Stable Diffusion 1, 2, XL or 3: it has the names of none of them. "
            "Expected denoiser, text encoders and autoencoder in one file."
        )
    configs = file.with_suffix("")
    found = cache_folder() / "bases" / f"{file.stem}-{_key(file)}"
    if not found.is_dir():
        options: dict[str, Any] = {"config": str(configs), "local_files_only": True} if configs.is_dir() else {}
        if kind == "sd1":
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if kind == "sd3" and _T5 not in names:
            options |= {"text_encoder_3": None, "tokenizer_3": None}
        try:
            with quietly():
                pipeline = getattr(diffusers(), PIPELINES[kind]).from_single_file(str(file), **options)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise RecipeError(
                f"{where} cannot be opened as {PIPELINES[kind]} ({_first(error)}). Its configs are looked for in "
                f"{configs}, a folder as diffusers writes it, else on the hub."
            ) from error
        with quietly():
            _written(found, pipeline.save_pretrained)
    return found


def _key(file: Path) -> str:
    """Of path, size and time: the weights themselves are hashed when they are used."""
    facts = file.stat()
    return hashlib.blake2b(
        f"{file.absolute()}:{facts.st_size}:{facts.st_mtime_ns}".encode(), digest_size=16
    ).hexdigest()


# -- the hub ----------------------------------------------------------------------------------------------------------


def _fetched(name: str, commit: str) -> Path:
    where = f"family.base = {f'{name}@{commit}'!r}"
    if name.count("/") != 1 or len(commit) != COMMIT or set(commit) - set("0123456789abcdef"):
        raise RecipeError(
            f"{where}: expected OWNER/NAME@COMMIT with the full name of a commit, {COMMIT} hexadecimal digits. What "
            "is behind a shorter name may be another model tomorrow."
        )
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UsageError(
            f"{where} is on the Hugging Face hub, which needs the package huggingface_hub ({error}): "
            "pip install 'imagekiln[hub]'."
        ) from None
    try:
        return Path(hub.snapshot_download(name, revision=commit, allow_patterns=list(WANTED)))
    except OSError as error:  # all that the library raises: it is not there, closed, or not to be reached
        raise RecipeError(f"{where} cannot be fetched ({_first(error)}).") from None


# -- parts ------------------------------------------------------------------------------------------------------------


def _written(where: Path, write: Any) -> None:
    """A folder that is whole or absent."""
    aside = aside_of(where)
    with disk_faults(where):
        where.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            os.replace(aside, where)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
