"""What was found in a set, check by check, with examples, what was done about it, and the command that undoes it."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagekiln.data.files import printable
from imagekiln.report.pictures import Picture
from imagekiln.report.specimens import single

if TYPE_CHECKING:
    from imagekiln.data.prepared import Prepared

MOST_EXAMPLES = 8
MOST_NAMED = 20
"""Files named in one command; for more, the check itself is switched off."""

MOST_GROUPS, MOST_MEMBERS = 8, 10


@dataclass(frozen=True)
class Example:
    """One finding: the file's picture, None where it has none, and its twin where it is a copy.

    value: what was measured, "" where there was nothing to measure. left_out: for this or for another reason.
    """

    name: str
    reason: str
    value: str
    left_out: bool
    picture: Picture | None
    twin: Picture | None
    twin_name: str


@dataclass(frozen=True)
class Check:
    """One check that found something: words, counts, examples, and commands with what they are for."""

    name: str
    title: str
    meaning: str
    threshold: str
    found: int
    left_out: int
    examples: tuple[Example, ...]
    commands: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Group:
    """Pictures that are copies of each other: (picture, name, kept), those that are kept first."""

    members: tuple[tuple[Picture, str, bool], ...]
    size: int


class Gallery:
    """Pictures of a prepared set by file name."""

    def __init__(self, prepared: Prepared) -> None:
        self._images_NCHW = prepared.images_NCHW
        self._row = {finding["file_name"]: int(finding["row"]) for finding in prepared.findings}
        self._row |= {row["file_name"]: int(row["row"]) for row in prepared.rows}

    def picture(self, name: str) -> Picture | None:
        """None for a file without usable pixels."""
        row = self._row.get(name, -1)
        return single(self._images_NCHW[row], printable(name)) if 0 <= row < len(self._images_NCHW) else None


# -- commands: the one place that knows them --------------------------------------------------------------------------


def restore_command(folder: str, files: Sequence[str]) -> str:
    """Brings files back that were left out.

    >>> restore_command("out", ["a b.png"])
    "imagekiln prepare --restore 'a b.png' --out out"
    """
    return _command([word for file in files for word in ("--restore", file)] + ["--out", folder])


def drop_command(folder: str, files: Sequence[str]) -> str:
    """Leaves files out that were kept."""
    return _command([word for file in files for word in ("--drop", file)] + ["--out", folder])


def spare_command(folder: str, sources: Sequence[str], leave_out: Sequence[str]) -> str:
    """Prepares again, and only these checks leave pictures out.

    >>> spare_command("out", ["photos"], ["duplicate", "blank"])
    'imagekiln prepare photos --out out --set \\'clean.leave_out=["duplicate", "blank"]\\''
    """
    names = ", ".join(f'"{name}"' for name in leave_out)
    return _command([*sources, "--out", folder, "--set", f"clean.leave_out=[{names}]"])


def _command(words: Sequence[str]) -> str:
    return " ".join(["imagekiln", "prepare", *map(_quoted, words)])


def _quoted(word: str) -> str:
    """A word for bash and zsh; one with characters that cannot be seen is spelled with escapes.

    >>> print(_quoted("a\\u202eb's.png"), _quoted("--out"))
    $'a\\u202eb\\'s.png' --out
    """
    if printable(word) == word:
        return shlex.quote(word)
    return f"$'{''.join(_escaped(char) for char in word)}'"


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if printable(char) == char:
        return f"\\{char}" if char in "\\'" else char
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# -- checks -----------------------------------------------------------------------------------------------------------


def checked(prepared: Prepared, gallery: Gallery, folder: str, sources: Sequence[str]) -> list[Check]:
    """Every check that found something, those that left most out first."""
    by_check: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for finding in prepared.findings:
        by_check[finding["check"]].append(finding)
    leave_out, kept = _leave_out(prepared), {row["file_name"] for row in prepared.rows}
    found = []
    for name, mine in by_check.items():
        about = prepared.about.get("checks", {}).get(name, {})
        files = list(dict.fromkeys(finding["file_name"] for finding in mine))
        gone = list(dict.fromkeys(f["file_name"] for f in mine if f["left_out"]))
        threshold = about.get("threshold")
        found.append(
            Check(
                name=name,
                title=about.get("title") or title_of(name),
                meaning=about.get("meaning", ""),
                threshold=number(threshold) if threshold else "",
                found=len(files),
                left_out=len(gone),
                examples=tuple(_example(finding, gallery, kept) for finding in _telling(mine)),
                commands=tuple(
                    _commands(folder, sources, name, [file for file in files if file in kept], gone, leave_out)
                ),
            )
        )
    return sorted(found, key=lambda check: (-check.left_out, -check.found, check.name))


def not_found(prepared: Prepared) -> list[str]:
    """Titles of the checks that found nothing."""
    with_findings = {finding["check"] for finding in prepared.findings}
    checks: Mapping[str, Mapping[str, Any]] = prepared.about.get("checks", {})
    return [about.get("title") or title_of(name) for name, about in checks.items() if name not in with_findings]


def title_of(check: str) -> str:
    return check.replace("_", " ").replace("-", " ").capitalize()


def number(value: float) -> str:
    """A measured value for people.

    >>> number(12.0), number(0.1234), number(2e-5)
    ('12', '0.123', 'below 0.001')
    """
    if 0 < value < 0.001:
        return "below 0.001"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.3g}"


def _telling(mine: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Examples: what was left out first, then evenly through the rest, from one end of the values to the other."""
    ranked = sorted(mine, key=lambda f: (not f["left_out"], f["value"], f["file_name"]))
    gone = [f for f in ranked if f["left_out"]]
    pool = gone if len(gone) >= MOST_EXAMPLES else ranked
    count = min(len(pool), MOST_EXAMPLES)
    return [pool[round(index * (len(pool) - 1) / max(1, count - 1))] for index in range(count)]


def _example(finding: Mapping[str, Any], gallery: Gallery, kept: Set[str]) -> Example:
    other = finding["other"]
    return Example(
        name=printable(finding["file_name"]),
        reason=printable(finding["reason"]),
        value=number(finding["value"]) if finding["value"] or finding["threshold"] else "",
        left_out=finding["file_name"] not in kept,
        picture=gallery.picture(finding["file_name"]),
        twin=gallery.picture(other) if other else None,
        twin_name=printable(other),
    )


def _commands(
    folder: str,
    sources: Sequence[str],
    name: str,
    kept: Sequence[str],
    gone: Sequence[str],
    leave_out: Sequence[str],
) -> list[tuple[str, str]]:
    if not gone:
        what = "Leave them out" if len(kept) <= 3 else "Leave some of them out, by name"
        return [(what, drop_command(folder, kept[:3]))] if kept else []
    found = [("Bring one back", restore_command(folder, gone[:1]))]
    if 1 < len(gone) <= MOST_NAMED:
        found.append((f"Bring all {len(gone)} back", restore_command(folder, gone)))
    if name in leave_out:
        spared = [check for check in leave_out if check != name]
        found.append(("Never leave pictures out for this", spare_command(folder, sources, spared)))
    return found


def _leave_out(prepared: Prepared) -> list[str]:
    clean = prepared.about.get("settings", {}).get("clean", {})
    listed = clean.get("leave_out") if isinstance(clean, Mapping) else None
    return [str(name) for name in listed] if isinstance(listed, list | tuple) else []


# -- copies -----------------------------------------------------------------------------------------------------------


def grouped(prepared: Prepared, gallery: Gallery) -> tuple[list[Group], int]:
    """The largest groups of copies, and how many groups there are."""
    kept = {row["file_name"] for row in prepared.rows}
    find = _Forest([(f["file_name"], f["other"]) for f in prepared.findings if f["other"]])
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(find.names):
        members[find(name)].append(name)
    largest = sorted(members.values(), key=lambda names: (-len(names), names[0]))
    groups = []
    for names in largest[:MOST_GROUPS]:
        shown = sorted(names, key=lambda name: (name not in kept, name))[:MOST_MEMBERS]
        pictures = [(gallery.picture(name), printable(name), name in kept) for name in shown]
        groups.append(Group(tuple((p, name, own) for p, name, own in pictures if p is not None), len(names)))
    return groups, len(members)


class _Forest:
    """Which names belong together, from pairs: a forest with path halving."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._above: dict[str, str] = {}
        for one, other in pairs:
            a, b = self(one), self(other)
            self._above[max(a, b)] = min(a, b)

    @property
    def names(self) -> list[str]:
        return list(self._above)

    def __call__(self, name: str) -> str:
        self._above.setdefault(name, name)
        while self._above[name] != name:
            self._above[name] = self._above[self._above[name]]
            name = self._above[name]
        return name
