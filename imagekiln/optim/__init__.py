"""Optimizers, learning-rate schedules, moving averages of weights, and Langevin diffusion at the right temperature."""

from __future__ import annotations

from imagekiln.optim.adamw_8bit import AdamW8bit
from imagekiln.optim.adaptive_samplers import PSGLD, SGNHT
from imagekiln.optim.auto import BudgetControl, auto
from imagekiln.optim.bank import SampleBank
from imagekiln.optim.build import build
from imagekiln.optim.ema import Average
from imagekiln.optim.gradient_noise import gradient_noise
from imagekiln.optim.langevin import describe, langevin, place
from imagekiln.optim.samplers import BAOAB, SGHMC, SGLD, LeimkuhlerMatthews
from imagekiln.optim.schedules import multiplier
from imagekiln.optim.temperature import anneals_twice, schedule
from imagekiln.optim.thermometer import Verdict, verify

__all__ = [
    "BAOAB",
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "AdamW8bit",
    "Average",
    "BudgetControl",
    "LeimkuhlerMatthews",
    "SampleBank",
    "Verdict",
    "anneals_twice",
    "auto",
    "build",
    "describe",
    "gradient_noise",
    "langevin",
    "multiplier",
    "place",
    "schedule",
    "verify",
]
