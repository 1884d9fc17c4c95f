"""Optimizers, learning-rate schedules and moving averages of weights."""

from __future__ import annotations

from imagekiln.optim.build import build
from imagekiln.optim.ema import Average
from imagekiln.optim.schedules import multiplier

__all__ = ["Average", "build", "multiplier"]
