"""WebDataset shards: tars in which the files of one key are one sample, such as `0001.jpg`, `0001.cls`, `0001.txt`.

`.cls` is the label, `.json` may hold `label` and `text` or `caption`, `.txt` is the caption. A member `classes.txt` or
`classnames.txt` names the classes, one a line. Shards are one tar, a pattern such as `set-{000000..000012}.tar` or
`set-*.tar`, a folder of tars, or an address that fsspec opens. The key is the path up to the first dot of the file name
(the WebDataset format, github.com/webdataset/webdataset).
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from imagekiln.data.archives import Spool, TarFiles
from imagekiln.data.files import Files, JoinedFiles, missing, printable, short_names
from imagekiln.data.found import EXTENSIONS, Found, Picture, as_label, as_text, listed
from imagekiln.data.metadata import MAX_CAPTION, caption, cleaned, decoded, json_object, mention_cut_captions
from imagekiln.errors import DataError, ImagekilnError, UsageError

MAX_SHARDS = 100_000
_MAX_JSON_BYTES = 4 * 2**20
_CLASS_LISTS = ("classes.txt", "classnames.txt")
_SPLIT = re.compile(r"(?:.*[-_.])?(train|val|validation|test)(?:[-_.]\d.*)?", re.IGNORECASE)


# --- names of shards -------------------------------------------------------------------------------------------------


def is_address(given: str) -> bool:
    """Whether this is no path but an address such as `s3://bucket/a.tar`, also after a `Path` has eaten a slash.

    >>> is_address("s3://b/a.tar"), is_address("http:/host/a.tar"), is_address("C:/a.tar"), is_address("a:b")
    (True, True, False, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", given) is not None and not os.path.lexists(given)


def expand(given: str) -> list[str]:
    """Paths or addresses that a pattern stands for: `{000..012}` and `{a,b}` written out, `*`, `?` and `[]` looked up.

    Raises `UsageError` for a pattern that stands for nothing or for too much.

    >>> expand("s3://b/a-{08..10}.tar"), expand("s3:/b/{x,y}.tar")
    (['s3://b/a-08.tar', 's3://b/a-09.tar', 's3://b/a-10.tar'], ['s3://b/x.tar', 's3://b/y.tar'])
    """
    parts: list[list[str]] = []
    total = 1
    for part in re.split(r"(\{[^{}]*\})", given):
        parts.append(_choices(part) if part.startswith("{") else [part])
        total *= len(parts[-1])
        if total > MAX_SHARDS:
            raise UsageError(f"{printable(given)} stands for more than {MAX_SHARDS:,} shards.")
    names = ["".join(chosen) for chosen in itertools.product(*parts)]
    if is_address(given):
        return [_whole_address(name) for name in names]
    found: list[str] = []
    for name in names:
        found += [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
    if not found:
        raise UsageError(f"{printable(given)} stands for no file that is there. {missing(Path(names[0]))}")
    absent = [name for name in names if not glob.has_magic(name) and not os.path.lexists(name)]
    if absent:
        raise UsageError(
            f"{len(absent):,} of {len(names):,} shards of {printable(given)} are missing: {listed(absent)}."
        )
    return found


def is_pattern(given: str) -> bool:
    """Whether a path that is not there is a pattern for others."""
    return glob.has_magic(given) or re.search(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", given) is not None


def _choices(braces: str) -> list[str]:
    inner = braces[1:-1]
    if limits := re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", inner):
        low, high = int(limits[1]), int(limits[2])
        if high - low >= MAX_SHARDS:
            raise UsageError(f"{braces} stands for more than {MAX_SHARDS:,} shards.")
        return [str(number).zfill(len(limits[1])) for number in range(low, high + 1)]
    return inner.split(",") if "," in inner else [braces]


def _whole_address(name: str) -> str:
    scheme, rest = name.split(":", 1)
    rest = rest.lstrip("/")
    return f"{scheme}:///{rest}" if scheme.lower() == "file" else f"{scheme}://{rest}"


# --- opening ---------------------------------------------------------------------------------------------------------


def open_shards(given: str, names: Sequence[str]) -> dict[str, Files]:
    """The shards by their short names, in order. Raises `UsageError` and `DataError`."""
    spool = Spool()
    shards: dict[str, Files] = {}
    for short, name in zip(short_names(names), names, strict=True):
        if not is_address(name):
            if not os.path.isfile(name):
                raise UsageError(f"{printable(name)} of {printable(given)} is not a file; expected a tar.")
            shards[short] = TarFiles(Path(name), spool)
            continue
        with _opened(name) as stream:
            shards[short] = TarFiles(Path(name), spool, stream)
    return shards


def _opened(address: str) -> BinaryIO:
    try:
        import fsspec
    except ImportError:
        raise UsageError(
            f"{printable(address)} is an address, and opening one needs fsspec. Install it with "
            "pip install 'imagekiln[shards]', or download the file and give its path."
        ) from None
    try:
        return cast(BinaryIO, _Remote(fsspec.open(address, "rb").open(), address))
    except Exception as error:  # every file system of fsspec has errors of its own
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> UsageError:
    why = printable(str(error) or type(error).__name__)
    return UsageError(f"{printable(address)} cannot be read ({why[:200]}). Check the address and the rights to it.")


class _Remote:
    """A remote file that tells its own errors from those of a damaged archive."""

    def __init__(self, stream: BinaryIO, address: str) -> None:
        self._stream, self._address = stream, address

    def __enter__(self) -> _Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except ImagekilnError:
            raise
        except Exception as error:
            raise _unreachable(self._address, error) from None


# --- samples ---------------------------------------------------------------------------------------------------------


def key_of(name: str) -> tuple[str, str]:
    """Key and ending of a member: the path is divided at the first dot of the file name.

    >>> key_of("a.b/0001.seg.png"), key_of("0001.JPG"), key_of("README")
    (('a.b/0001', 'seg.png'), ('0001', 'jpg'), ('README', ''))
    """
    folder, slash, file = name.rpartition("/")
    first, _, ending = file.partition(".")
    return folder + slash + first, ending.lower()


def holds_samples(files: Files) -> bool:
    """Whether a tar is a WebDataset shard: a picture's key appears again with `.cls` or `.json`."""
    sides = {key for key, ending in map(key_of, files.entries) if ending in ("cls", "json")}
    return any(key in sides for key, ending in map(key_of, files.entries) if f".{ending}" in EXTENSIONS)


def find_samples(where: Path, shards: dict[str, Files], encoding: str = "utf-8") -> Found:
    """The pictures of shards with their labels and captions, sorted by shard and key.

    where: what the set is called in messages. shards: by short name, which begins the names of several.
    Raises `DataError` when there are no pictures, or when a label or caption cannot be understood.
    """
    alone = len(shards) == 1
    files = next(iter(shards.values())) if alone else JoinedFiles(where, shards)
    found = Found(files, [])
    classes: dict[str, tuple[str, ...]] = {}
    cut: list[str] = []
    num_bare = 0
    splits = splits_of({short: shard.where for short, shard in shards.items()})
    for short, shard in shards.items():
        prefix = "" if alone else f"{short}/"
        for member in _CLASS_LISTS:
            if member in shard.entries:
                classes[prefix + member] = _class_list(shard, member, encoding)
        for _, members in sorted(_samples(shard).items()):
            picture = _picture(found, prefix, members)
            if picture is None:
                num_bare += any(ending in ("cls", "json", "txt") for ending in members)
            else:
                label, text = _said(shard, members, encoding, cut)
                found.pictures.append(Picture(prefix + picture, label, text, splits[short]))
        found.left_out += [(prefix + name, why) for name, why in shard.left_out if name.lower().endswith(EXTENSIONS)]
    if not found.pictures and not found.left_out:
        raise DataError(f"No pictures in {printable(str(where))}. Expected files ending in {', '.join(EXTENSIONS)}.")
    if num_bare:
        found.notices.append(f"{num_bare:,} samples hold no picture.")
    mention_cut_captions(found, cut)
    _name_classes(found, classes)
    return found


def split_of(short: str) -> str | None:
    """The split that the name of a file speaks of.

    >>> split_of("train-00000-of-00001"), split_of("flowers-val-000012"), split_of("trains-001"), split_of("test")
    ('train', 'validation', None, 'test')
    """
    match = _SPLIT.fullmatch(short)
    return {"val": "validation"}.get(match[1].lower(), match[1].lower()) if match else None


def splits_of(files: Mapping[str, Path]) -> dict[str, str | None]:
    """The split of each file of a set, by short name: that of its own name, else of its folder where there are several.

    >>> splits_of({"train-0": Path("set/train/0.tar"), "1": Path("set/train/1.tar"), "test-0": Path("set/test/0.tar")})
    {'train-0': 'train', '1': 'train', 'test-0': 'test'}
    """
    alone = len({path.parent for path in files.values()}) == 1  # what the one folder is called says nothing
    return {short: split_of(short) or (None if alone else split_of(path.parent.name)) for short, path in files.items()}


def _samples(shard: Files) -> dict[str, dict[str, str]]:
    """Members by ending, by key."""
    samples: dict[str, dict[str, str]] = {}
    for name in shard.entries:
        key, ending = key_of(name)
        if name not in _CLASS_LISTS:
            samples.setdefault(key, {}).setdefault(ending, name)
    return samples


def _picture(found: Found, prefix: str, members: dict[str, str]) -> str | None:
    """The picture of a sample; others that it holds are left out."""
    plain = [name for ending in EXTENSIONS if (name := members.get(ending[1:])) is not None]
    further = [n for n in members.values() if n not in plain and n.lower().endswith(EXTENSIONS)]
    if not plain and len(further) == 1:  # such as `0001.input.png`
        return further[0]
    for name in plain[1:] + further:
        why = f"its sample holds several pictures; {plain[0]} counts" if plain else "its sample holds several pictures"
        found.left_out.append((prefix + name, why))
    return plain[0] if plain else None


def _said(shard: Files, members: dict[str, str], encoding: str, cut: list[str]) -> tuple[str | None, str | None]:
    """Label and caption of a sample."""
    label = text = None
    if (name := members.get("json")) is not None:
        place = f"{printable(name)} in {printable(str(shard.where))}"
        if shard.entries[name].num_bytes > _MAX_JSON_BYTES:
            raise DataError(f"{place} is larger than {_MAX_JSON_BYTES // 2**20} MB.")
        about = json_object(decoded(shard.read(name, _MAX_JSON_BYTES), place, encoding), place)
        label = as_label(about.get("label"), place)
        text = as_text(about.get("text", about.get("caption")), place)
        cut += [name] * (len(text or "") > MAX_CAPTION)
    if (name := members.get("cls")) is not None:
        place = f"The label {printable(name)} in {printable(str(shard.where))}"
        label = as_label(decoded(shard.read(name, 1000), place, encoding), place)
    if (name := members.get("txt")) is not None:
        text, was_cut = caption(shard, name, encoding)
        cut += [name] * was_cut
    return label, cleaned(text)


def _class_list(shard: Files, name: str, encoding: str) -> tuple[str, ...]:
    place = f"{printable(name)} in {printable(str(shard.where))}"
    text = decoded(shard.read(name, _MAX_JSON_BYTES), place, encoding)
    return tuple(line.strip() for line in text.strip().split("\n"))


def _name_classes(found: Found, classes: dict[str, tuple[str, ...]]) -> None:
    """Put names for numbers, where the shards bring a list of names."""
    if not classes:
        return
    if len(set(classes.values())) > 1:
        raise DataError(f"The lists of classes differ: {listed(classes)}. Every shard of a set needs the same list.")
    file, names = next(iter(classes.items()))
    named = []
    for picture in found.pictures:
        label = picture.label
        if label is not None and label.isascii() and label.isdigit():
            if int(label) >= len(names):
                raise DataError(
                    f"{printable(picture.name)} has the label {label}, but {printable(file)} in "
                    f"{printable(str(found.files.where))} names {len(names):,} classes, numbered from 0."
                )
            label = names[int(label)]
        named.append(replace(picture, label=label))
    found.pictures = named
