"""Finds the pictures of DATA of any kind: folders, zips and tars in the "imagefolder" convention, shards, parquet.

In a folder, zip or tar labels come from the `label` column of `metadata.csv` or `metadata.jsonl`, else from one level
of class folders; captions come from its `text` column, else from a `.txt` file of the same name. Top folders that are
named `train`, `validation` (or `val`) and `test` are splits, and classes begin below them, as with Hugging Face.
Nothing is decoded here.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from imagekiln.data import metadata, webdataset
from imagekiln.data.archives import TarFiles, files_of, is_tar
from imagekiln.data.files import SPLITS, Files, FolderFiles, normal, printable
from imagekiln.data.found import EXTENSIONS, Found, Picture, class_names, mention_passed_over, named_pictures
from imagekiln.data.parquet import find_rows
from imagekiln.errors import DataError, UsageError

__all__ = ["Found", "Picture", "class_names", "find"]


def find(source: Path | str, *, caption_encoding: str = "utf-8") -> Found:
    """The pictures of one source: sorted by name, those of a parquet file in the order of its rows.

    source: a folder, a zip, a tar, a parquet file or a folder of them, WebDataset shards as a tar, a folder of tars, a
        pattern (`set-{000..012}.tar`, `set-*.tar`) or an address for fsspec.
    caption_encoding: of captions and metadata that are not UTF-8.

    Raises `UsageError` when there is nothing like that, `DataError` when it holds no pictures, when it is not safe or
    not whole, or when labels or captions cannot be understood.
    """
    encoding = metadata.known_encoding(caption_encoding)
    given = os.path.expanduser(os.fspath(source))
    path = Path(given)
    if not os.path.lexists(path) and (webdataset.is_address(given) or webdataset.is_pattern(given)):
        return _pattern(given, encoding)
    if os.path.isdir(path):
        return _folder(path, encoding)
    if path.suffix.lower() == ".parquet" and os.path.isfile(path):
        return find_rows(path, [path])
    files = files_of(path)
    if isinstance(files, TarFiles) and webdataset.holds_samples(files):
        return _shards(path, {path.stem: files}, encoding)
    return _imagefolder(files, encoding)


def _pattern(given: str, encoding: str) -> Found:
    """What a pattern or an address stands for: shards or parquet files."""
    names = webdataset.expand(given)
    if all(name.lower().endswith(".parquet") and not webdataset.is_address(name) for name in names):
        return find_rows(Path(given), [Path(name) for name in names])
    wrong = [name for name in names if not webdataset.is_address(name) and not is_tar(Path(name))]
    if wrong:
        raise UsageError(
            f"{printable(given)} stands for {printable(wrong[0])}, which is no tar; a pattern stands for shards (tar) "
            "or for parquet files. To use pictures, give the folder they lie in."
        )
    return _shards(Path(given), webdataset.open_shards(given, names), encoding)


def _folder(path: Path, encoding: str) -> Found:
    """A folder of pictures, or of nothing but shards or parquet files."""
    files = FolderFiles(path)
    if not any(name.lower().endswith(EXTENSIONS) for name in files.entries):
        tables = sorted(name for name in files.entries if name.lower().endswith(".parquet"))
        if tables:
            return find_rows(path, [path / name for name in tables])
        tars = sorted(name for name in files.entries if is_tar(path / name))
        if tars:
            shards = webdataset.open_shards(str(path), [str(path / name) for name in tars])
            return _shards(path, shards, encoding)
    return _imagefolder(files, encoding)


def _shards(where: Path, shards: dict[str, Files], encoding: str) -> Found:
    found = webdataset.find_samples(where, shards, encoding)
    if all(picture.label is None for picture in found.pictures):
        skip = 0 if len(shards) == 1 else 1  # the shard's own name
        labels = _folder_labels([picture.name for picture in found.pictures], [], skip)
        found.pictures = [replace(picture, label=labels.get(picture.name)) for picture in found.pictures]
    return found


def _imagefolder(files: Files, encoding: str) -> Found:
    found = named_pictures(files)
    if not found.pictures and not found.left_out:
        looked = f"{printable(str(files.where))} and everything below it"
        closed = [name for name in files.entries if name.lower().endswith((".zip", ".tar", ".rar", ".7z"))]
        hint = f" It holds {len(closed):,} archives, which are not opened: unpack them." if closed else ""
        raise DataError(f"No pictures in {looked}. Expected files ending in {', '.join(EXTENSIONS)}.{hint}")
    names = [picture.name for picture in found.pictures]
    level = _common_folders(names)
    splits = _splits(names, level)
    if splits:
        counts = Counter(splits.values())
        said = ", ".join(f"{split} ({counts[split]:,})" for split in ("train", "validation", "test") if counts[split])
        found.notices.append(f"The set brings its own splits, by folder: {said}.")
    labels = _folder_labels(names, found.notices, level + bool(splits))
    found.pictures = [Picture(name, labels.get(name), split=splits.get(name)) for name in names]
    metadata.describe(found, encoding)
    mention_passed_over(found)
    return found


def _folders(name: str) -> tuple[str, ...]:
    """The folders that a picture lies in, the outer one first."""
    return tuple(name.split("/")[:-1])


def _common_folders(names: Sequence[str]) -> int:
    """How many outer folders all pictures share; a folder named like a split counts as none of them, nor as one lone
    folder that the pictures themselves lie in."""
    parts = [*{posixpath.dirname(name): _folders(name) for name in names}.values()]  # few, however many names
    level = 0
    while parts and all(len(folders) > level + 1 and folders[level] == parts[0][level] for folders in parts):
        if parts[0][level].lower() in SPLITS:
            break
        level += 1
    return level


def _splits(names: Sequence[str], level: int) -> dict[str, str]:
    """Split by name, where every picture lies below a folder that is named like one."""
    splits = {}
    for name in names:
        folders = _folders(name)
        if len(folders) <= level or folders[level].lower() not in SPLITS:
            return {}
        splits[name] = SPLITS[folders[level].lower()]
    return splits


def _folder_labels(names: Sequence[str], notices: list[str], level: int) -> dict[str, str]:
    """Class by name: one level of at least two class folders; pictures beside those folders stay unlabelled.

    level: how many folders lie above the class folders.
    """
    folders = {name: _folders(name)[level:] for name in names}
    if any(len(below) > 1 for below in folders.values()):
        notices.append(
            "Pictures lie in folders of folders, so folder names were not taken as classes. Put each class into one "
            "folder, or name the labels in metadata.csv."
        )
        return {}
    labels = {name: normal(below[0]) for name, below in folders.items() if below}
    return labels if len(set(labels.values())) > 1 else {}
