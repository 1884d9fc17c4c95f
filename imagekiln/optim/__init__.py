"""Optimizers, learning-rate schedules, moving averages of weights, and Langevin diffusion at the right temperature."""

from __future__ import annotations

from imagekiln.optim.build import build
from imagekiln.optim.ema import Average
from imagekiln.optim.langevin import langevin
from imagekiln.optim.samplers import BAOAB, SGHMC, SGLD, LeimkuhlerMatthews
from imagekiln.optim.schedules import multiplier
from imagekiln.optim.thermometer import Verdict, verify

__all__ = [
    "BAOAB",
    "SGHMC",
    "SGLD",
    "Average",
    "LeimkuhlerMatthews",
    "Verdict",
    "build",
    "langevin",
    "multiplier",
    "verify",
]
