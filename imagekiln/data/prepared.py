"""A prepared set: pictures collected, looked at once, cleaned, split and packed, every decision on record and undoable.

A prepared set is a packed folder (`imagekiln.data.packed`) whose array holds every usable picture, also those that are
left out, so that taking a decision back costs nothing. Beside the files of a packed folder it has `findings.jsonl`
(file, check, value, threshold, reason, other file, left out or not) and `survey/` (what was measured). Preparing again
into the same folder only opens files that are new or have changed. Nothing in the user's folders is ever changed.

Shapes: N files, M usable pictures, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from imagekiln.data import collect, decisions, decode, download, frames, hub, measures, packed, pixels
from imagekiln.data.decisions import FINDINGS, Edits, PrepareConfig
from imagekiln.data.files import printable, stem
from imagekiln.data.found import Found, listed
from imagekiln.data.pack import cache_folder
from imagekiln.data.pixels import ProgressFn
from imagekiln.data.source import digest
from imagekiln.data.survey import MEASURES, THUMB, Survey
from imagekiln.errors import DataError, DiskError, UsageError, did_you_mean

URLS = "urls:"
"""Before the path of a list of addresses, as a source."""

PROPOSALS = "proposals.csv"
"""The labels that were proposed for unlabelled pictures of a set, beside it."""

_SURVEY = "survey"
_BLOCK = 1024
_SHAPING = ("size", "channels", "fit", "background", "buckets", "frames", "repair", "caption_encoding")


@dataclass
class Prepared:
    """A prepared set, opened: everything that was found and decided.

    about: `prepare.json`. rows: pictures of the set, as in `metadata.jsonl`. images_NCHW: (M, C, H, W) uint8, mapped
    from disk. findings: as in `findings.jsonl`.
    """

    folder: Path
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    images_NCHW: np.ndarray
    findings: list[dict[str, Any]]
    left_out: list[tuple[str, str]]
    survey: Survey


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a set with its survey; a packed folder without one was not cleaned."""
    return packed.is_packed(folder) and (folder / FINDINGS).is_file() and (folder / _SURVEY).is_dir()


def open_prepared(folder: Path) -> Prepared:
    """Everything about a prepared set. Raises `DataError` when it is damaged."""
    about, rows, images_NCHW = packed.read_packed(folder)
    try:
        lines = (folder / FINDINGS).read_text(encoding="utf-8").split("\n")
        findings = [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise DataError(f"The prepared set {folder} is damaged ({error}). Prepare it again.") from None
    left_out = packed.read_left_out(folder)
    return Prepared(folder, about, rows, images_NCHW, findings, left_out, Survey.load(folder / _SURVEY))


def prepare(
    sources: Sequence[str],
    out: Path,
    config: PrepareConfig,
    *,
    edits: Edits | None = None,
    progress: ProgressFn | None = None,
) -> Prepared:
    """Prepare pictures into a folder, or bring the set there up to date; then it is DATA.

    sources: whatever `collect.collect` reads, `hf:owner/name`, or `urls:` and the path of a list of addresses (see
        `data.download`); none takes those of the set in `out`, whose files are then not looked at.
    config: without sources, what concerns the pixels has to be what it was.
    edits: decisions about files, by their names in the set; remembered from then on, also while a file is away.

    Raises `UsageError` for a source or file that is not there or an `out` that holds something else, `DataError` when
    nothing can be used, `DiskError` when `out` cannot be written.
    """
    decode.colour(config.background)
    pixels.require_size(config)
    unchanged = _up_to_date(sources, out, config, edits or Edits(), progress)  # what it held is let go before opening
    return open_prepared(out) if unchanged is None else unchanged


def _up_to_date(
    sources: Sequence[str], out: Path, config: PrepareConfig, wanted: Edits, progress: ProgressFn | None
) -> Prepared | None:
    """Write the set, or return it where there is nothing to write."""
    earlier = _earlier(out, sources)
    if earlier is None and wanted != Edits():
        raise UsageError(f"{out} holds no prepared set, so no decision can be changed there. Prepare it first.")
    edits = (_edits(earlier) if earlier else Edits()).then(wanted.restore, wanted.drop, wanted.labels)
    names = [str(source) for source in sources]
    if names:
        found = collect.collect([_local(name, progress) for name in names], caption_encoding=config.caption_encoding)
        if config.frames == "all":
            frames.expand(found)
        _check_names(wanted, [picture.name for picture in found.pictures])
        if earlier and _unchanged(earlier, found, config, edits):
            return earlier
    elif earlier is None:
        raise UsageError("No pictures were named. Give a folder, an archive or builtin:digits.")
    else:
        _check_names(wanted, earlier.survey.names)
        if changed := _changed_shaping(earlier, config):
            raise UsageError(f"To change {' and '.join(changed)}, the pictures are needed: name their sources again.")
    try:
        if names:
            packed.write_aside(
                out,
                lambda aside: _fill(aside, found, names, config, edits, earlier, progress),
                replace=earlier is not None,
            )
        elif earlier is not None and (_settings(earlier), _edits(earlier)) != (_plain(config), edits):
            _rewrite(earlier, out, config, edits)
    except OSError as error:
        raise DiskError(f"{out} cannot be written ({error.strerror or error}).") from None
    return None


def _local(source: str, progress: ProgressFn | None) -> str:
    """Where the files of a source are on this machine; those of a list of addresses or of the hub are fetched first."""
    if source.startswith(hub.PREFIX):
        dataset_id, revision = hub.parse(source)
        return str(hub.snapshot(dataset_id, revision, _downloads(source), progress=progress))
    if source.startswith(URLS):
        listed = Path(os.path.expanduser(source.removeprefix(URLS)))
        return str(download.fetch(listed, _downloads(str(listed.resolve())), progress=progress).folder)
    return source


def _downloads(source: str) -> Path:
    """The folder in the cache that keeps what was downloaded from a source."""
    return cache_folder() / "downloads" / hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


# --- files to a folder ----------------------------------------------------------------------------------------------


def _fill(
    folder: Path,
    found: Found,
    sources: Sequence[str],
    config: PrepareConfig,
    edits: Edits,
    earlier: Prepared | None,
    progress: ProgressFn | None,
) -> None:
    """Look at what is new, take the rest from the earlier set, and write everything."""
    notices = list(found.notices)
    (folder / _SURVEY).mkdir()
    known = _known(earlier, found, config)
    with warnings.catch_warnings(), pixels.workers() as pool:
        warnings.simplefilter("ignore")  # what Pillow mutters about odd metadata is no concern of the user
        if earlier is not None and known:
            shape: tuple[int, int] = tuple(earlier.about["image_shape"][1:])
            notices += [notice for notice in earlier.about["shaping"] if notice not in notices]
        else:
            shape = (config.size, config.size) if config.size else pixels.chosen_shape(found, pool, notices)
        shaping = notices[len(found.notices) :]
        survey = _look(folder, found, shape, config, known, earlier, pool, progress)
    if repaired := [name for name, notes in zip(survey.names, survey.notes, strict=True) if "repaired" in notes]:
        notices.append(
            f"{len(repaired):,} truncated JPEG files are used without the rows that are missing at their lower edge: "
            f"{listed(repaired)}."
        )
    usable = survey.usable
    if not len(usable):
        raise pixels.none_usable(found.files.where, [*survey.reasons, *(why for _, why in found.left_out)])
    if earlier is not None and known:
        channels: int = earlier.about["image_shape"][0]
    else:
        channels = config.channels or pixels.chosen_channels([survey.notes[index] for index in usable], notices)
    fresh = np.array([index for index in usable if survey.names[index] not in known], np.int64)
    survey.places[usable] = np.arange(len(usable))
    for name, its in pixels.kept((len(usable), channels, *shape), config).items():
        _write_images(folder / f"{name}.npy", survey, fresh, known, earlier, its, config.background)
    images_NCHW = np.load(folder / packed.FILES[0], mmap_mode="r", allow_pickle=False)
    with pixels.workers() as pool:
        hashing = pool.submit(measures.add_hashes, survey.measured, survey.thumbs)
        for part in pool.map(partial(_digest, survey, images_NCHW), np.split(fresh, range(_BLOCK, len(fresh), _BLOCK))):
            for index, content in part:
                survey.digests[index] = content
        hashing.result()
    survey.save(folder / _SURVEY)
    facts = {"sources": list(sources), "shaping": shaping, "name": _name(sources)}
    seen = decisions.Seen(survey, images_NCHW.shape, facts, notices, found.left_out)
    decisions.write(folder, seen, config, edits, _sides(earlier, config))
    if earlier:
        _keep_proposals(earlier.folder, folder)


def _look(
    folder: Path,
    found: Found,
    shape: tuple[int, int],
    config: PrepareConfig,
    known: Mapping[str, int],
    earlier: Prepared | None,
    pool: ThreadPoolExecutor,
    progress: ProgressFn | None,
) -> Survey:
    """One look at every file that is not known; the pixels of the new ones go to `pixels.Raw`, in order."""
    total = len(found.pictures)
    thumbs = np.lib.format.open_memmap(folder / _SURVEY / "thumbs.npy", "w+", np.uint8, (total, THUMB, THUMB, 3))
    survey = Survey(
        names=[picture.name for picture in found.pictures],
        labels=[picture.label for picture in found.pictures],
        texts=[picture.text for picture in found.pictures],
        reasons=[""] * total,
        digests=[""] * total,
        measured=np.zeros(total, MEASURES),
        thumbs=thumbs,
        notes=[frozenset()] * total,
        entries=[found.files.entries[picture.name] for picture in found.pictures],
        places=np.full(total, -1, np.int64),
        splits=[picture.split or "" for picture in found.pictures],
    )
    unknown = [index for index, picture in enumerate(found.pictures) if picture.name not in known]
    if earlier is not None:
        for index, picture in enumerate(found.pictures):
            if (before := known.get(picture.name)) is not None:
                survey.reasons[index] = earlier.survey.reasons[before]
                survey.digests[index] = earlier.survey.digests[before]
                survey.notes[index] = earlier.survey.notes[before]
                survey.measured[index] = earlier.survey.measured[before]
                thumbs[index] = earlier.survey.thumbs[before]
    see = partial(pixels.see, found, shape=shape, shaping=config, measure=True, repair=config.repair)
    with pixels.Raw(folder, config) as raw:
        results = pixels.in_order(pool, lambda index: see(found.pictures[index]), unknown)
        for done, (index, seen) in enumerate(results, 1 + total - len(unknown)):
            if isinstance(seen, str):
                survey.reasons[index] = seen
            else:
                raw.add(seen)
                survey.notes[index], survey.measured[index], thumbs[index] = seen.notes, seen.measured, seen.thumb
            if progress is not None:
                progress(done, total)
            if done % _BLOCK == 0:
                measures.release(thumbs)
    thumbs.flush()  # from here on they are read from the file
    measures.release(thumbs)
    return survey


def _write_images(
    target: Path,
    survey: Survey,
    fresh: np.ndarray,
    known: Mapping[str, int],
    earlier: Prepared | None,
    shape: tuple[int, ...],
    background: str,
) -> None:
    """An array of all usable pictures: new ones from the raw file beside it, the others from the earlier array."""
    usable, raw = survey.usable, target.with_suffix(".raw")
    if len(fresh) == len(usable):
        pixels.write_images(raw, target, shape, background)
        return
    part = target.with_name("fresh.npy")
    pixels.write_images(raw, part, (len(fresh), *shape[1:]), background)
    before_NCHW = np.load(earlier.folder / target.name, mmap_mode="r", allow_pickle=False) if earlier else None
    fresh_NCHW = np.load(part, mmap_mode="r", allow_pickle=False) if len(fresh) else None
    images_NCHW = np.lib.format.open_memmap(target, "w+", np.uint8, shape)
    order = {index: place for place, index in enumerate(fresh.tolist())}
    for place, index in enumerate(usable.tolist()):
        if fresh_NCHW is not None and index in order:
            images_NCHW[place] = fresh_NCHW[order[index]]
        elif earlier is not None and before_NCHW is not None:
            images_NCHW[place] = before_NCHW[earlier.survey.places[known[survey.names[index]]]]
    images_NCHW.flush()
    part.unlink()


def _digest(survey: Survey, images_NCHW: np.ndarray, rows: np.ndarray) -> list[tuple[int, str]]:
    """(file, content hash of its pixels) of some files."""
    copies_BCHW = measures.small_copies(images_NCHW, survey.places[rows])
    return [(index, digest(pixels_CHW)) for index, pixels_CHW in zip(rows.tolist(), copies_BCHW, strict=True)]


# --- what was there before ------------------------------------------------------------------------------------------


def _earlier(out: Path, sources: Sequence[str]) -> Prepared | None:
    """The set that is in `out` already. Raises `UsageError` when something else is, or a set of other pictures."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_prepared(out):
        raise UsageError(f"{out} is not an empty folder and not a prepared set. Give --out a new one.")
    earlier = open_prepared(out)
    if sources and not {str(source) for source in sources} & set(earlier.about["sources"]):
        before = ", ".join(printable(source) for source in earlier.about["sources"])
        raise UsageError(f"{out} holds a set prepared from {before}. Give --out a new folder.")
    return earlier


def _edits(earlier: Prepared) -> Edits:
    said = earlier.about["edits"]
    return Edits(tuple(said["restore"]), tuple(said["drop"]), said["labels"])


def _plain(config: PrepareConfig) -> dict[str, Any]:
    """The settings as `prepare.json` holds them."""
    return config.model_dump(mode="json")


def _settings(earlier: Prepared) -> dict[str, Any]:
    """Those of an earlier set; what did not exist when it was made was as it is by default."""
    return {**_plain(PrepareConfig()), **earlier.about["settings"]}


def _changed_shaping(earlier: Prepared, config: PrepareConfig) -> list[str]:
    """Names of the settings that concern the pixels or texts read, and differ from the earlier ones."""
    before, now = _settings(earlier), _plain(config)
    return [name for name in _SHAPING if before[name] != now[name]]


def _check_names(edits: Edits, names: Sequence[str]) -> None:
    """Raises `UsageError` for the first file of an edit that is not in the set."""
    known = set(names)
    for name in (*edits.restore, *edits.drop, *edits.labels):
        if name not in known:
            raise UsageError(f"The set has no file {printable(name)!r}. {did_you_mean(name, names)}".rstrip())


def _sides(earlier: Prepared | None, config: PrepareConfig) -> dict[str, str] | None:
    """The side of every file of an earlier set; None where its shares were others."""
    if earlier is None:
        return {}
    before, now = _settings(earlier), _plain(config)
    same = all(before[name] == now[name] for name in ("validation_fraction", "test_fraction"))
    return {row["file_name"]: row["split"] for row in earlier.rows} if same else None


def _known(earlier: Prepared | None, found: Found, config: PrepareConfig) -> dict[str, int]:
    """Files whose earlier look still counts, by name: same bytes and time, same settings, same number of channels."""
    if earlier is None:
        return {}
    if _changed_shaping(earlier, config):
        return {}
    survey = earlier.survey
    place = {name: index for index, name in enumerate(survey.names)}
    known = {
        picture.name: place[picture.name]
        for picture in found.pictures
        if picture.name in place and survey.entries[place[picture.name]] == found.files.entries[picture.name]
    }
    grey = earlier.about["image_shape"][0] == 1
    return known if config.channels or not grey or len(known) == len(found.pictures) else {}


def _unchanged(earlier: Prepared, found: Found, config: PrepareConfig, edits: Edits) -> bool:
    """Whether preparing again would write the same set."""
    survey = earlier.survey
    seen = [(p.name, p.label, p.text, found.files.entries[p.name], p.split or "") for p in found.pictures]
    before = list(zip(survey.names, survey.labels, survey.texts, survey.entries, survey.splits, strict=True))
    same = _settings(earlier) == _plain(config) and _edits(earlier) == edits
    return same and seen == before and earlier.about["unread"] == [list(pair) for pair in found.left_out]


def _rewrite(earlier: Prepared, out: Path, config: PrepareConfig, edits: Edits) -> None:
    """The same pictures under other decisions: the array and the survey are taken over as they are."""
    about = earlier.about
    facts = {key: about[key] for key in ("sources", "shaping", "name")}
    unread = [(name, why) for name, why in about["unread"]]
    seen = decisions.Seen(earlier.survey, earlier.images_NCHW.shape, facts, about["seen_notices"], unread)

    def write(folder: Path) -> None:
        for array in (packed.FILES[0], packed.BUCKETS):
            if (out / array).is_file():
                _take_over(out / array, folder / array)
        (folder / _SURVEY).mkdir()
        for file in (out / _SURVEY).iterdir():
            _take_over(file, folder / _SURVEY / file.name)
        _keep_proposals(out, folder)
        decisions.write(folder, seen, config, edits, _sides(earlier, config))

    packed.write_aside(out, write, replace=True)


def _keep_proposals(out: Path, folder: Path) -> None:
    """The table of proposed labels outlives a change of the set."""
    if (out / PROPOSALS).is_file():
        _take_over(out / PROPOSALS, folder / PROPOSALS)


def _take_over(file: Path, target: Path) -> None:
    """The same file at another place, without copying where the disk allows."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _name(sources: Sequence[str]) -> str:
    """What the set is called: after its first source."""
    return stem(Path(sources[0].rstrip("/")).expanduser().resolve().name)
