"""The training doctor: it notices illnesses of a running training, says so in one sentence, and may repair a little.

`signals` turns pictures into cheap numbers, `illnesses` is the table of what they mean, `acts` is all that may be done
about it, and `practice` does this at fixed moments in images seen, so that a run stays a function of its recipe.
"""

from imagekiln.engine.doctor.illnesses import ILLNESSES, Finding, History, Illness, diagnose
from imagekiln.engine.doctor.practice import Doctor, Patient

__all__ = ["ILLNESSES", "Doctor", "Finding", "History", "Illness", "Patient", "diagnose"]
