"""Is this machine fit to train? Each finding is a fact and, where it hinders, what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from imagekiln.data import cache_folder
from imagekiln.engine import device
from imagekiln.nets.layers import fused_norm_available


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    fine: bool
    sentence: str


def examine() -> list[Finding]:
    """Look at versions, devices, speed features, disk and the optional packages.

    >>> examine()[0].what
    'imagekiln'
    """
    where = device.choose("auto")
    bf16 = device.autocast_dtype("auto", where) is torch.bfloat16
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    return [
        Finding("imagekiln", True, f"{metadata.version('imagekiln')}, Python {platform.python_version()}"),
        Finding("torch", True, f"{torch.__version__}"),
        Finding("device", True, f"{where}: {device.describe(where)}; available: {', '.join(device.available())}"),
        Finding("bf16", bf16, "computed in hardware" if bf16 else "not in hardware here; training runs in fp32"),
        Finding("fused normalisation", True, fused_norm_available()),
        _torchvision(),
        Finding("disk", free_gb > 2, f"{free_gb:.0f} GB free in {Path.cwd()}"),
        _cache_folder(),
        *[_optional(package, extra) for package, extra in (("diffusers", "sd"), ("tensorboard", "track"))],
    ]


def _torchvision() -> Finding:
    """A torchvision that does not match torch breaks diffusers, transformers and peft at import."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", True, "absent, and not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        mend = "it does not match torch and breaks diffusers. Remove it: pip uninstall torchvision"
        return Finding("torchvision", False, f"{mend} ({type(error).__name__})")
    return Finding("torchvision", True, "present, and not needed")


def _cache_folder() -> Finding:
    folder = cache_folder()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    writable = os.access(there, os.W_OK)
    return Finding("cache", writable, f"{folder} {'can' if writable else 'cannot'} be written")


def _optional(package: str, extra: str) -> Finding:
    try:
        return Finding(package, True, metadata.version(package))
    except metadata.PackageNotFoundError:
        return Finding(package, True, f"not installed; pip install 'imagekiln[{extra}]' adds it")
