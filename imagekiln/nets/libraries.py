"""The two libraries whose classes some networks are, found late: they are an extra, and take seconds to import."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

from imagekiln.errors import UsageError


def diffusers() -> Any:
    """diffusers. Raises `UsageError` when it is not usable here.

    >>> diffusers().__name__
    'diffusers'
    """
    return _library("diffusers")


def transformers() -> Any:
    """transformers. Raises `UsageError` when it is not usable here.

    >>> transformers().__name__
    'transformers'
    """
    return _library("transformers")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # diffusers turns a failed import of its parts into a RuntimeError
        raise UsageError(
            f"Some of this model's networks are classes of {name}, which is not usable here ({error}). "
            "pip install 'imagekiln[sd]'."
        ) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Neither progress bars nor remarks of diffusers and transformers, nor of what they use, within."""
    speakers = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    before = [speaker.get_verbosity() for speaker in speakers]
    for speaker in speakers:
        speaker.set_verbosity_error()
        speaker.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for speaker, verbosity in zip(speakers, before, strict=True):
            speaker.set_verbosity(verbosity)
            speaker.enable_progress_bar()
