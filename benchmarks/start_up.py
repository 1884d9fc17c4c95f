"""How long until `imagekiln --help` answers, and until `imagekiln generate` starts to draw?

Every measurement is a new process, from its start to its end (help) or to the first call of a network (generate), with
the files in the page cache: each is run once before it is measured. Help must not import torch.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from record import Row, this_command, write_record

HELP = """
import sys
from imagekiln.cli.main import main
sys.argv = ["imagekiln", "--help"]
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
DRAW = """
import os, sys, time
from torch.nn.modules.module import register_module_forward_pre_hook

def first_call(module, inputs):
    print(time.monotonic(), file=sys.stderr, flush=True)
    os._exit(0)

register_module_forward_pre_hook(first_call)
from imagekiln.cli.main import main
sys.argv = ["imagekiln", "generate", *sys.argv[1:]]
main()
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", type=Path, help="run folder to draw with (a small one is trained when left out)")
    arguments.add_argument("--repeat", type=int, default=5, help="measurements of each (5)")
    arguments.add_argument("--record", action="store_true", help="also write a record under records/")
    return arguments


def help_sec() -> tuple[float, bool]:
    """Seconds `--help` takes, and whether it imported torch."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    return time.monotonic() - start, done.stderr.split()[-1] == "True"


def draw_sec(run: Path, folder: Path) -> float:
    """Seconds from the start of a process to its first call of a network; it stops there."""
    command = [sys.executable, "-c", DRAW, str(run), "-n", "1", "--out", str(folder)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"`imagekiln generate {run}` failed: {done.stderr.strip()}")
    return float(done.stderr.split()[-1]) - start


def small_run(folder: Path) -> Path:
    """A diffusion run of a few steps: what is measured ends before its weights matter."""
    from imagekiln import api

    return api.train("digits", "builtin:digits", folder / "run", settings={"train": {"total_kimg": 0.128}}).path


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for; 1 when help imports torch."""
    options = parser().parse_args(given)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = options.run or small_run(folder)
        help_sec(), draw_sec(run, folder / "pictures")
        helps = [help_sec() for _ in range(options.repeat)]
        draws = [draw_sec(run, folder / "pictures") for _ in range(options.repeat)]
    imports_torch = any(imported for _, imported in helps)
    rows = [
        Row.median("imagekiln --help", [seconds for seconds, _ in helps], "s"),
        Row.median("imagekiln generate, until sampling starts", draws, "s"),
    ]
    for row in rows:
        low, high = min(row.raw), max(row.raw)
        print(f"{row.what}: {row.value:.3f} s, median of {options.repeat} ({low:.3f} .. {high:.3f})")
    print(f"--help imports torch: {'YES' if imports_torch else 'no'}")
    if options.record:
        notes = ["Intervals are the smallest and the largest; files were in the page cache."]
        print(write_record("start-up", this_command(), rows, notes=notes, help_imports_torch=imports_torch))
    return 1 if imports_torch else 0


if __name__ == "__main__":
    sys.exit(main())
