"""The first signal saves and leaves with 75, the second one leaves at once; continuing ends in the same bits."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from imagekiln.engine import checkpoint, registry

DRAWING = [name for name in registry.names() if registry.load(name).draws]


def steps_done(out: Path) -> int:
    return max((int(path.name) for path in checkpoint.stored(out / "checkpoints")), default=0)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_the_same_command_continues(
    cli, tiny, reference, ends_like, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    command = cli.start(*tiny("vae", out))
    command.wait_until(lambda: steps_done(out) >= 32)
    command.send(getattr(signal, name))
    stopped = command.wait().refused(75, name, "same command")
    assert len([line for line in stopped.err.splitlines() if "Stopped" in line]) == 1
    assert 0 < steps_done(out) < 240
    cli(*tiny("vae", out)).ok()
    ends_like(reference("vae"), out)


@pytest.mark.parametrize("family", DRAWING)
def test_every_family_continues(cli, tiny, reference, half_done, ends_like, tmp_path: Path, family: str) -> None:
    out = half_done(family, tmp_path)
    cli(*tiny(family, out)).ok()
    ends_like(reference(family), out)


def test_stopped_again_and_again(cli, tiny, reference, ends_like, tmp_path: Path) -> None:
    out, stops = tmp_path / "run", 0
    while True:
        before = steps_done(out)
        command = cli.start(*tiny("dcgan", out))
        while command.code() is None and steps_done(out) <= before + 32:
            pass
        command.send(signal.SIGINT)
        if command.wait().code == 0:
            break
        stops += 1
        assert steps_done(out) > before, "a stop must not lose what was done"
    assert stops >= 2
    ends_like(reference("dcgan"), out)


def test_the_second_signal_leaves_at_once(cli, tiny, reference, ends_like, tmp_path: Path) -> None:
    out, family = tmp_path / "run", tmp_path / "slow_step.py"
    family.write_text(SLOW)
    command = cli.start(*tiny(str(family), out))
    command.wait_until(lambda: (tmp_path / "sleeping").exists())
    for _ in range(50):  # two signals at once may arrive as one, so the user here is impatient
        command.send(signal.SIGINT)
        time.sleep(0.2)
        if command.code() is not None:
            break
    assert command.wait(1).code == 130
    assert checkpoint.load_newest(out / "checkpoints")[0] is not None, "what is on disk is whole"


SLOW = '''"""A family whose every step takes a minute."""
import pathlib
import time

import torch
from imagekiln.config import FamilyConfig
from imagekiln.core import Family, Loss, Phase


class Config(FamilyConfig):
    name: str = __file__


class Slow(Family):
    Config = Config
    optimizers = {"net": {}}
    phases = (Phase("learn", trains=("net",)),)
    averaged = ("net",)

    def __init__(self, config, image_shape, num_classes):
        super().__init__(config, image_shape, num_classes)
        self.net = torch.nn.Linear(1, image_shape[0] * image_shape[1] * image_shape[2])

    def loss(self, phase, batch, progress):
        pathlib.Path(__file__).with_name("sleeping").touch()
        time.sleep(60)
        return Loss(self.net(batch.images.mean().view(1, 1)).square().mean())

    def sample(self, noise, condition, options=None):
        return self.net(noise).view(-1, *self.image_shape).clamp(-1, 1)

    def noise_shape(self):
        return (1,)
'''


def test_a_signal_before_the_first_step(cli, tiny, tmp_path: Path) -> None:
    """While pictures are read or networks are built there is nothing to save; the next start begins anew."""
    out = tmp_path / "run"
    command = cli.start(*tiny("vae", out))
    command.send(signal.SIGTERM)
    assert command.wait().code in (75, -signal.SIGTERM)  # the latter before the handlers are in place
    cli(*tiny("vae", out)).ok()


def test_a_signal_while_drawing(cli, reference, tmp_path: Path) -> None:
    command = cli.start("generate", reference("vae"), "-n", 50_000, "--batch", 1, "--out", tmp_path / "out")
    command.wait_until(lambda: (tmp_path / "out" / "000003.png").exists())
    command.send(signal.SIGINT)
    command.wait().refused(75, "SIGINT")
    assert not list((tmp_path / "out").glob(".*")), "no half-written picture stays behind"
