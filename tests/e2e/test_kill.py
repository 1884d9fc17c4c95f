"""Kill -9 at random moments, then the same command again: the run ends in the bits of one that was never killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from imagekiln.engine import registry

DRAWING = [name for name in registry.names() if registry.load(name).draws]
LONGEST_SEC = 600.0


def killed_until_done(
    cli, arguments: list[str], out: Path, moments: random.Random, whole_sec: float, kills: int
) -> dict:
    """Run and kill until the training has finished by itself and `kills` kills were dealt.

    Every third kill waits, after its random delay, until a checkpoint is being written.
    """

    def saving() -> bool:
        return any(out.glob("checkpoints/.aside-*"))

    dealt = in_save = 0
    while True:
        began, delay = time.monotonic(), moments.uniform(0.0, 0.6 * whole_sec) if dealt < kills else LONGEST_SEC
        command = cli.start(*arguments)
        aims = dealt % 3 == 0 and dealt < kills
        while command.code() is None and (time.monotonic() - began < delay or (aims and not saving())):
            time.sleep(0.0005)
        if command.code() is None:
            command.send(signal.SIGKILL)
            dealt += 1
            command.wait()
            in_save += saving()
            continue
        command.wait().ok()
        return {"kills": dealt, "while saving": in_save}


def survives(cli, tiny, reference, ends_like, folder: Path, family: str, kills: int) -> dict:
    whole = reference(family)
    began = time.monotonic()
    cli(*tiny(family, folder / "timed")).ok()
    whole_sec = time.monotonic() - began
    ends_like(whole, folder / "timed")
    dealt = saving = rounds = 0
    moments = random.Random(f"{family} {kills}")
    while dealt < kills:
        out = folder / f"run-{rounds}"
        # A few kills a run: with more, all of them would fall into its first steps.
        counted = killed_until_done(cli, tiny(family, out), out, moments, whole_sec, min(3, kills - dealt))
        ends_like(whole, out)
        dealt, saving, rounds = dealt + counted["kills"], saving + counted["while saving"], rounds + 1
        assert rounds <= 3 * kills, "the run ends before it can be killed"
    return {"family": family, "kills": dealt, "while saving": saving, "runs": rounds}


@pytest.mark.parametrize("family", DRAWING)
def test_three_kills(cli, tiny, reference, ends_like, tmp_path: Path, family: str) -> None:
    assert survives(cli, tiny, reference, ends_like, tmp_path, family, kills=3)["kills"] == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", DRAWING)
def test_thirty_kills(cli, tiny, reference, ends_like, tmp_path: Path, family: str) -> None:
    counted = survives(cli, tiny, reference, ends_like, tmp_path, family, kills=30)
    print(counted)
    assert counted["kills"] == 30 and counted["while saving"] > 0
