"""The pages run, and are true: fenced blocks, links, flags, settings, generated parts.

Every fenced block is Python, a command line, a recipe, or plain text. A comment above a block says how it is run:

    <!-- run: skip REASON -->          not at all
    <!-- run: tiny a.b=value ... -->   trainings last a few steps, with these settings
    <!-- run: refused 2 -->            the command is expected to end with this code
    <!-- run: file NAME -->            the block is that file beside the page, and is put into the folder

The blocks of a page share a temporary folder, which holds `photos`, and a namespace, so a page reads as one story.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils import parametrizations

import imagekiln
from imagekiln.config import DataConfig, EvalConfig, TrainConfig
from imagekiln.engine import recipe as recipes

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "records").glob("*.md")])
BLOCK = re.compile(r"(?:^<!-- run:(?P<run>[^\n]*?)-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
TINY_KIMG = 0.064
TINY = {"total_kimg": TINY_KIMG, "batch": 16, "preview_kimg": 1000, "validate_kimg": 1000, "device": "cpu"}
LONGEST = {"README.md": 160, "CONTRIBUTING.md": 120, "design.md": 200}
LONGEST_DECISION = 30


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass
class Block:
    """A fenced block and how it is to be run."""

    page: Path
    line: int
    language: str
    text: str
    skip: bool = False
    tiny: bool = False
    exit_code: int = 0
    file: str | None = None
    settings: list[str] = field(default_factory=list)

    def where(self) -> str:
        return f"{title(self.page)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        block = Block(page, text.count("\n", 0, match.start()) + 1, match["language"], match["text"])
        words = (match["run"] or "").split()
        if words[:1] == ["skip"]:
            assert words[1:], f"{block.where()}: say why it is not run"
            block.skip = True
        elif words[:1] == ["refused"]:
            block.exit_code = int(words[1])
        elif words[:1] == ["file"]:
            block.file = words[1]
        else:
            block.tiny = words[:1] == ["tiny"]
            block.settings = words[block.tiny :]
            assert all("=" in setting for setting in block.settings), block.where()
        yield block


RUNNING = [page for page in PAGES if any(b.language in ("bash", "python", "toml") for b in blocks(page))]


# -- the blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", RUNNING, ids=title)
def test_blocks_run(cli, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _take_photos(tmp_path / "photos")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.file is not None:
            assert block.text == (page.parent / block.file).read_text(encoding="utf-8"), block.where()
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        elif block.skip:
            continue
        elif block.language == "python":
            text = re.sub(r'("total_kimg": )[\d.]+', rf"\g<1>{TINY_KIMG}", block.text) if block.tiny else block.text
            exec(compile(text, block.where(), "exec"), namespace)
        elif block.language == "toml":
            recipes.complete(tomllib.loads(block.text))
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                _run(cli, block, shlex.split(line, comments=True), tmp_path)


def _run(cli, block: Block, words: list[str], folder: Path) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert words[1] in targets, f"{block.where()}: make has no target {words[1]}"
        return
    assert words[0] == "imagekiln", f"{block.where()}: {words[0]} is not run here; mark the block"
    ended = cli(*(_shortened(words, block.settings) if block.tiny else words)[1:], cwd=folder)
    assert ended.code == block.exit_code, f"{block.where()}: {' '.join(words)}\n{ended.out}\n{ended.err}"


def _shortened(words: list[str], settings: list[str]) -> list[str]:
    """A training of a few steps: no `--minutes`, no report, and tiny settings unless the page gives its own."""
    if words[1] != "train":
        return words
    if "--minutes" in words:
        at = words.index("--minutes")
        words = words[:at] + words[at + 2 :]
    given = {word.partition("=")[0] for word in words}
    tiny = [f"train.{key}={value}" for key, value in TINY.items() if f"train.{key}" not in given]
    return [*words, "--no-report", *(part for setting in [*tiny, *settings] for part in ("--set", setting))]


def _take_photos(folder: Path, num: int = 400, side: int = 8) -> None:
    """Coloured slopes of different directions, without labels."""
    folder.mkdir()
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 1, side)
    for index in range(num):
        towards, colour = random.uniform(-1, 1, 2), random.uniform(0, 255, 3)
        shade = 0.5 + 0.25 * (towards[0] * ramp[:, None] + towards[1] * ramp[None, :])
        Image.fromarray((shade[:, :, None] * colour).astype(np.uint8)).save(folder / f"{index:03d}.png")


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = list(blocks(page))
    assert {block.language for block in found} <= {"bash", "python", "toml", "text"}
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(found), "a fence is not closed"
    marked = sum(match["run"] is not None for match in BLOCK.finditer(text))
    assert text.count("<!-- run:") == marked, "a run comment stands above no block"


# -- what the pages say -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date(generate: ModuleType) -> None:
    assert doctest.testmod(generate).failed == 0
    for page, text in generate.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{title(page)}: run `make docs`"


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            assert goal.exists(), f"{title(page)} links to {target}"
            assert not anchor or anchor in _anchors(goal), f"{title(page)} links to {target}"


def test_flags_exist() -> None:
    known = {"--help", "--version"}
    for file in (ROOT / "tests" / "docs" / "help").glob("*.txt"):
        known |= set(re.findall(r"--[a-z][a-z-]*", file.read_text(encoding="utf-8")))
    measuring = set[str]()
    for file in (ROOT / "benchmarks").glob("*.py"):
        measuring |= set(re.findall(r'"(--[a-z][a-z-]*)"', file.read_text(encoding="utf-8")))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        # what benchmarks are called with is their own; the log tells how to measure again
        written = re.sub(
            r"<!-- (records|highlights|power|league|doctor|langevin):begin -->.*<!-- \1:end -->", "", text, flags=re.S
        )
        allowed = known | measuring if page == ROOT / "records" / "LOG.md" else known
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", written):
            assert flag in allowed, f"{title(page)} names {flag}"


def test_settings_exist() -> None:
    sections = {"data": DataConfig, "train": TrainConfig, "eval": EvalConfig}
    files = {"py", "json", "md"}
    for page in PAGES:
        for section, name in re.findall(r"`[^`\n]*?\b(data|train|eval)\.([a-z_]+)", page.read_text(encoding="utf-8")):
            assert name in sections[section].model_fields or name in files, f"{title(page)} names {section}.{name}"


PUBLISHED = re.findall(
    r"^\| `(\w+)` \| (32|64) \| (.*?) ?\| ([\d.]+), ([\d.]+) \|$",
    (ROOT / "docs" / "guide" / "gans.md").read_text(encoding="utf-8"),
    flags=re.M,
)


@pytest.mark.parametrize(("family", "pixels", "settings", "draws", "judges"), PUBLISHED)
def test_published_networks_have_the_size_that_the_page_says(
    family: str, pixels: str, settings: str, draws: str, judges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parametrizations._SpectralNorm, "_power_method", lambda *_: None)  # nothing to iterate on
    recipe = recipes.resolve(family, assignments=re.findall(r"`(.+?)`", settings))
    with torch.device("meta"):
        built = recipes.build(recipe, (3, int(pixels), int(pixels)), 10 if family == "biggan" else 0)
    nets = (getattr(built, name) for name in ("generator", "critic" if hasattr(built, "critic") else "discriminator"))
    million = [f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.2f}" for net in nets]
    assert million == [draws, judges]


def test_parts_for_families_of_your_own_exist() -> None:
    page = (ROOT / "docs" / "guide" / "gans.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"(?s)^Not settings but parts.*?\n\n", page, flags=re.M)
    modules = [importlib.import_module(name) for name in re.findall(r"`(imagekiln\.[\w.]+)`", paragraph)]
    for name in re.findall(r"`(\w+)`", paragraph):
        assert any(hasattr(module, name) for module in modules), name


def test_pages_are_short() -> None:
    for page in PAGES:
        by_hand = re.sub(r"(?s)<!-- (\w+):begin -->.*?<!-- \1:end -->", "", page.read_text(encoding="utf-8"))
        lines = len(by_hand.splitlines())
        limit = LONGEST_DECISION if page.parent.name == "decisions" else LONGEST.get(page.name)
        assert limit is None or lines <= limit, f"{title(page)} has {lines} lines"


def test_decisions_are_numbered_and_whole() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {page.name[:4]}: "), page.name
        for part in ("Context.", "Choice.", "Rejected.", "Revisit when"):
            assert f"**{part}" in text, f"{page.name} lacks {part}"


def test_the_design_shows_the_real_house() -> None:
    package = Path(imagekiln.__file__).parent
    house = next(b.text for b in blocks(ROOT / "docs" / "design.md") if b.text.startswith("imagekiln/"))
    rooms = {p.name + "/" for p in package.iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.name for p in package.glob("*.py") if not p.name.startswith("_")}
    shown = set(re.findall(r"(?:^  |\s{3,})([a-z_]+(?:/|\.py))(?=\s)", house, re.M))
    assert shown == rooms


def test_no_path_of_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(home|work|tmp|Users|root)/", page.read_text(encoding="utf-8")), title(page)


# -- the table of records ---------------------------------------------------------------------------------------------


def test_records_become_tables(generate: ModuleType, tmp_path: Path) -> None:
    assert "|" not in generate.records(tmp_path)
    full = {"what": "FD | digits", "value": 1.23456, "unit": "s", "n": 500, "interval": [1.0, 1.5], "seeds": [0, 1]}
    least = {"name": "b", "date": "2025-01-01", "rows": [{"what": "speed", "value": 4321.7, "interval": None}]}
    most = {
        "name": "a",
        "date": "2025-02-01T10:00:00+00:00",
        "command": "python x.py",
        "hardware": {"device": "Fast CPU, 2 threads", "cores": 4},
        "commit": "0123456789ab+changes",
        "rows": [full],
        "notes": ["Intervals are of 95 %."],
    }
    older = {**most, "date": "2024-12-31", "rows": [least["rows"][0]]}
    for name, record in {"1": least, "2": most, "3": older, "4": ["raw values"]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert generate.records(tmp_path).split("\n\n") == [
        "**a** (2025-02-01; commit 0123456789 with changes; Fast CPU, 2 threads of 4 cores; `python x.py`)",
        "| what | value | interval | n | seeds |\n|---|---|---|---|---|\n"
        "| FD \\| digits | 1.235 s | 1 .. 1.5 | 500 | 2 |",
        "Intervals are of 95 %.",
        "**b** (2025-01-01)",
        "| what | value |\n|---|---|\n| speed | 4322 |",
    ]
