"""Data sets of the Hugging Face hub as a source: `hf:owner/name` or `hf:owner/name@revision`, pinned to one commit.

Only files that hold data are downloaded; scripts and pickles of a repository are never fetched. The revision is
resolved once: the folder remembers the commit, so that the same folder stays the same set when the branch moves on.
Needs the package `huggingface_hub` (`pip install 'imagekiln[hub]'`), which also keeps the user's access token.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from imagekiln import signals
from imagekiln.data.files import escapes, printable
from imagekiln.errors import DataError, DiskError, UsageError

PREFIX = "hf:"
ENDINGS = (".parquet", ".jpg", ".jpeg", ".png", ".webp", ".csv", ".jsonl", ".txt", ".tar", ".zip")
MAX_BYTES = 64 * 2**30
_ABOUT = ".hub.json"
_WORKERS = 4
_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,198}[A-Za-z0-9])?")

ProgressFn = Callable[[int, int], None]


@dataclass(frozen=True)
class _Listing:
    """A repository at one commit: the files that are data, with their sizes."""

    commit: str
    files: dict[str, int]


def parse(source: str) -> tuple[str, str]:
    """(data set's id, revision) of `hf:owner/name[@revision]`; the revision is "main" where none is given.

    Raises `UsageError`.

    >>> parse("hf:huggan/flowers-102"), parse("hf:mnist@refs/convert/parquet")
    (('huggan/flowers-102', 'main'), ('mnist', 'refs/convert/parquet'))
    """
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    revision = revision or ("" if "@" in source else "main")
    parts = name.split("/")
    sound = len(parts) <= 2 and all(_PART.fullmatch(part) for part in parts) and _REVISION.fullmatch(revision)
    if not source.startswith(PREFIX) or not sound or ".." in source or "--" in name:
        raise UsageError(f"{printable(source)!r} is no data set; expected hf:owner/name or hf:owner/name@revision.")
    return name, revision


def snapshot(
    dataset_id: str, revision: str, folder: Path, *, max_bytes: int = MAX_BYTES, progress: ProgressFn | None = None
) -> Path:
    """Download the data files of a data set into a folder, or continue, and return the folder.

    dataset_id, revision: as `parse` gives them. A folder that is complete is returned without asking the hub.
    max_bytes: of all files together. progress: called as progress(done, total).

    Raises `UsageError` without the package `huggingface_hub`, for a data set that does not exist or is closed, and for
    a folder that holds another one; `DataError` when it holds no data or too much, or the hub cannot be reached;
    `DiskError` when there is no room.
    """
    dataset_id, revision = parse(f"{PREFIX}{dataset_id}@{revision}")
    about = _remembered(folder)
    known = {"dataset": dataset_id, "revision": revision}
    if about is not None and {key: about.get(key) for key in known} != known:
        raise UsageError(f"{folder} holds {about.get('dataset')}@{about.get('revision')}. Give another folder.")
    if about is None and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something else already. Give a new folder.")
    if about is not None and about.get("complete") and _is_whole(folder, about["files"]):
        return folder
    library = _library()
    where = f"{PREFIX}{dataset_id}@{revision}"
    listing = _listed(library, dataset_id, about["commit"] if about else revision, where)
    total = sum(listing.files.values())
    if total > max_bytes:
        raise DataError(f"{where} has {total / 2**30:.1f} GiB of data; at most {max_bytes / 2**30:g} are downloaded.")
    known |= {"commit": listing.commit}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < total:
            raise DiskError(f"{where} needs {total / 2**30:.1f} GiB, more than is free at {folder}.")
        _remember(folder, {**known, "complete": False, "files": listing.files})
        _download(library, dataset_id, listing, folder, where, progress)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes on what it downloaded
        _remember(folder, {**known, "complete": True, "files": listing.files})
    except OSError as error:
        raise DiskError(f"{folder} cannot be written ({error.strerror or error}).") from None
    return folder


def _library() -> Any:
    try:
        import huggingface_hub  # the extra `hub`
        import huggingface_hub.errors
    except ImportError as error:
        raise UsageError(
            f"Data sets of the Hugging Face hub need the package huggingface_hub ({error}): "
            "pip install 'imagekiln[hub]'."
        ) from None
    return huggingface_hub


def _endpoint() -> str | None:
    """`$HF_ENDPOINT` as it is now: the library reads it only when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _listed(library: Any, dataset_id: str, revision: str, where: str) -> _Listing:
    """Ask the hub for the commit behind a revision, and its data files."""
    errors = library.errors
    try:
        found = library.HfApi(endpoint=_endpoint()).dataset_info(
            dataset_id, revision=revision, files_metadata=True, timeout=30
        )
    except errors.GatedRepoError:
        raise UsageError(
            f"{where} is open only to those who asked for it on the hub. Ask, then `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{where}: there is no such revision.") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(f"{where} does not exist on the hub, or needs `hf auth login`.") from None
    except Exception as error:  # of whatever client the library uses
        raise DataError(f"{where} cannot be reached ({_why(error)}). Run the same command again.") from None
    if not re.fullmatch(r"[0-9a-f]{40}", found.sha or ""):
        raise DataError(f"{where}: the hub names no commit.")
    files = {str(one.rfilename): int(one.size or 0) for one in found.siblings or [] if _is_data(str(one.rfilename))}
    if not files:
        raise DataError(f"{where} holds no data that is read. Expected files ending in {', '.join(ENDINGS)}.")
    return _Listing(found.sha, files)


def _is_data(name: str) -> bool:
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return name.lower().endswith(ENDINGS) and not escapes(name) and not hidden


def _download(
    library: Any, dataset_id: str, listing: _Listing, folder: Path, where: str, progress: ProgressFn | None
) -> None:
    """Every file at the commit that is not there yet; whole ones only, by the library's own renaming."""

    def fetch(name: str) -> None:
        if signals.pending() is None and not _is_whole(folder, {name: listing.files[name]}):
            library.hf_hub_download(
                dataset_id,
                name,
                repo_type="dataset",
                revision=listing.commit,
                local_dir=folder,
                endpoint=_endpoint(),
                tqdm_class=_quiet(),
            )

    with signals.deferred(), ThreadPoolExecutor(_WORKERS, "imagekiln-hub") as pool:
        try:
            for done, _ in enumerate(pool.map(fetch, listing.files), 1):
                if progress is not None:
                    progress(done, len(listing.files))
        except OSError as error:
            if error.errno is not None:  # of the disk; what the network throws has no number
                raise
            raise DataError(f"{where} cannot be reached ({_why(error)}). Run the same command again.") from None
        except Exception as error:  # of whatever client the library uses
            raise DataError(f"{where} cannot be reached ({_why(error)}). Run the same command again.") from None
    signals.raise_if_pending()


def _quiet() -> Any:
    """A progress bar that says nothing, as the library wants one."""
    from tqdm import tqdm  # comes with huggingface_hub

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})

    return Silent


def _is_whole(folder: Path, files: dict[str, int]) -> bool:
    try:
        return all(not escapes(name) and (folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _remembered(folder: Path) -> dict[str, Any] | None:
    """What the folder says it holds; None where it says nothing understandable."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        sound = re.fullmatch(r"[0-9a-f]{40}", about["commit"]) and isinstance(about["files"], dict)
        return about if sound and all(isinstance(size, int) for size in about["files"].values()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(folder: Path, about: dict[str, Any]) -> None:
    aside = folder / f"{_ABOUT}.{os.getpid()}"
    aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder / _ABOUT)


def _why(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0] or type(error).__name__)[:200]
