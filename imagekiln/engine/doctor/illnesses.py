"""The illnesses of a training: what each is known by, what it is called, what helps, and where that is written.

Every trigger is a pure function of a `History`, the numbers of the looks so far. It returns what it goes by, or None.
A threshold without a paper is this package's own, calibrated by `benchmarks/doctor.py`. No family is named: a *critic*
is a phase that logs `on_real` and `on_fake`, everything else goes by keys that any family may log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, pstdev

Evidence = Mapping[str, float | str]
"""What a trigger goes by: the numbers and words of its sentence."""

HIGHEST_P = 0.85
"""Of an augmentation: above it the generator learns to draw augmented pictures (Karras et al. 2020, section 3)."""

ROUNDING = 1e-6
"""0.85 in float32 is a little more than 0.85."""


class History:
    """The looks of a run, oldest first: rows of numbers, each with its `nimg`.

    total_nimg: length of the run in images.

    >>> history = History([{"nimg": 10, "a/loss": 3.0}, {"nimg": 20}, {"nimg": 30, "a/loss": 1.0}], 40)
    >>> history.values("a/loss"), history.last("a/loss", 3), history.phases("loss"), history.fraction
    ([3.0, 1.0], None, ['a'], 0.75)
    """

    def __init__(self, rows: Sequence[Mapping[str, float]], total_nimg: int) -> None:
        self.rows, self.total_nimg = list(rows), total_nimg

    @property
    def fraction(self) -> float:
        """Share of the run that is done."""
        return self.rows[-1]["nimg"] / max(1, self.total_nimg) if self.rows else 0.0

    def values(self, key: str) -> list[float]:
        """All values of a key, oldest first; looks without it are left out."""
        return [row[key] for row in self.rows if key in row]

    def last(self, key: str, count: int) -> list[float] | None:
        """The newest `count` values, or None when there are not as many, or when the newest look has none."""
        values = self.values(key)
        return values[-count:] if len(values) >= count and key in self.rows[-1] else None

    def phases(self, part: str) -> list[str]:
        """Names of the phases that log a part."""
        keys = dict.fromkeys(key for row in self.rows for key in row if key.endswith(f"/{part}"))
        return [key.removesuffix(f"/{part}") for key in keys if not key.startswith(_NO_PHASE)]

    @property
    def critics(self) -> list[str]:
        """Phases that tell real pictures from drawn ones."""
        return [phase for phase in self.phases("on_real") if f"{phase}/on_fake" in self.rows[-1]]


_NO_PHASE = ("drawn/", "probe/", "held_out/", "dial/")


@dataclass(frozen=True)
class Illness:
    """One kind of trouble.

    reads: the signals. trigger: evidence from a history, or None. sentence: what is seen, with the evidence's names in
    braces. remedy: what a person may do. acts: what `act` may do, in this order. source: where it is described.
    """

    name: str
    reads: tuple[str, ...]
    trigger: Callable[[History], Evidence | None]
    sentence: str
    remedy: str
    acts: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Finding:
    """An illness that shows, and what it was recognised by."""

    illness: Illness
    evidence: Evidence

    def sentence(self, kimg: float, picture: str | None) -> str:
        """All of it in one sentence for a person."""
        shown = f" (see {picture})" if picture else ""
        seen = self.illness.sentence.format_map(self.evidence)
        return f"After {kimg:.4g} kimg it looks like {self.illness.name}: {seen}{shown}; {self.illness.remedy}."


def diagnose(history: History) -> list[Finding]:
    """All illnesses that show at the newest look."""
    found = [(illness, illness.trigger(history)) for illness in ILLNESSES if history.rows]
    return [Finding(illness, evidence) for illness, evidence in found if evidence is not None]


# -- triggers ---------------------------------------------------------------------------------------------------------


def mode_collapse(history: History) -> Evidence | None:
    """Drawn pictures are alike: less than 0.4 of the spread of real ones, or kinds that are 0.6 of them gone.

    Two looks long, and not from the start on: a young network draws one thing only and then another, so a fifth of the
    run is over and it drew several for two looks before, or half of the run is over.
    """
    last, missing = history.last("drawn/diversity", 2), history.values("drawn/missing") or [0.0]
    if last is None:
        return None
    values, evidence = history.values("drawn/diversity"), {"diversity": last[-1], "missing": missing[-1]}
    grown = history.fraction >= 0.2
    if grown and min(missing[-2:]) >= 0.6 and _settled(missing[:-2]) < 0.4:
        return evidence
    held = -_settled([-value for value in values[:-2]])
    fell = grown and held >= 0.4 and fmean(last) < 0.6 * held
    stuck = history.fraction >= 0.5 and len(values) >= 4 and last[-1] < 1.2 * values[-4]
    return evidence if fmean(last) < 0.4 and (fell or stuck) else None


def mode_drop(history: History) -> Evidence | None:
    """Kinds that make up a quarter of the real pictures are missing, and were not or should have come by now.

    Three looks long, because a kind comes and goes; the first fifth of a run finds them.
    """
    last, values = history.last("drawn/missing", 3), history.values("drawn/missing")
    if last is None or min(last) < 0.25 or mode_collapse(history):
        return None
    known = _settled(values[:-3], 3)
    lost = history.fraction >= 0.2 and known < 0.4 and min(last) >= known + 0.2
    stuck = history.fraction >= 0.5 and len(values) >= 5 and min(last) >= 0.5 and last[-1] >= values[-5]
    return {"missing": last[-1]} if lost or stuck else None


def overfitting(history: History) -> Evidence | None:
    """(E D(train) - E D(held out)) / (E D(train) - E D(fake)) above 0.3 over the last looks, above 0 in each."""
    sides = [history.last(f"probe/{side}", 3) for side in ("train", "held_out", "fake")]
    if any(side is None for side in sides):
        return None
    train, held_out, fake = (fmean(side) for side in sides if side is not None)
    if train - fake < 0.1 or any(one <= other for one, other in zip(*sides[:2], strict=True)):
        return None
    share = (train - held_out) / (train - fake)
    return {"share": share} if share > 0.3 else None


def vanishing_gradient(history: History) -> Evidence | None:
    """A critic is sure of everything, and the gradient of who plays against it fell to a tenth of its highest."""
    for critic in history.critics:
        loss, gap = history.last(f"{critic}/loss", 2), _gap(history, critic)
        if loss is None or not (max(abs(x) for x in loss) < 0.05 and min(gap[-2:]) > 2):
            continue
        for phase in history.phases("grad_norm"):
            if phase in history.critics:
                continue
            norms = history.values(f"{phase}/grad_norm")
            if max(norms[-2:]) < 0.1 * max(norms):
                return {"loss": loss[-1], "fall": norms[-1] / max(norms)}
        if min(gap[-2:]) > 12:
            return {"loss": loss[-1], "fall": 1.0}
    return None


def exploding_gradient(history: History) -> Evidence | None:
    """A phase's mean gradient norm is 20 times the median of the looks before."""
    for phase in history.phases("grad_norm"):
        *before, newest = history.values(f"{phase}/grad_norm")
        if len(before) >= 4 and newest > 20 * median(before[-16:]) > 0:
            return {"phase": phase, "times": newest / median(before[-16:])}
    return None


def oscillation(history: History) -> Evidence | None:
    """What separates real from fake swings by half its mean or more and turns round again and again."""
    for critic in history.critics:
        gap = _gap(history, critic)[-6:]
        if len(gap) < 6 or history.fraction < 0.1:
            continue
        middle = fmean(gap)
        turns = sum((a - middle) * (b - middle) < 0 for a, b in pairwise(gap))
        if turns >= 3 and pstdev(gap) > max(0.5 * abs(middle), 0.5):
            return {"turns": turns, "swing": pstdev(gap)}
    return None


def checkerboard(history: History) -> Evidence | None:
    """Two-pixel patterns have eight times the power they have in real pictures, and do not fade."""
    last = history.last("drawn/grid", 3)
    if last is None or history.fraction < 0.2 or min(last) < 8 or last[-1] < 0.7 * last[0] or mode_collapse(history):
        return None
    return {"grid": last[-1]}


def memorization(history: History) -> Evidence | None:
    """Every fourth drawn picture is a training picture."""
    last = history.last("drawn/copies", 2)
    return {"copies": last[-1]} if last is not None and min(last) > 1 / 4 else None


def dead_codes(history: History) -> Evidence | None:
    """Hardly more than one code is in use, or less than 0.3 of those that were. The first quarter finds the codes."""
    settled = History([row for row in history.rows if row["nimg"] > 0.25 * history.total_nimg], history.total_nimg)
    for phase in settled.phases("perplexity"):
        last, highest = settled.last(f"{phase}/perplexity", 2), max(settled.values(f"{phase}/perplexity"), default=0.0)
        if last is not None and (max(last) < 0.3 * highest or max(last) < 1.2):
            return {"perplexity": last[-1], "highest": highest}
    return None


def posterior_collapse(history: History) -> Evidence | None:
    """The latent code tells nothing: less than half a nat a picture, or reconstructions that are all alike."""
    for phase in history.phases("divergence_nats"):
        last = history.last(f"{phase}/divergence_nats", 2)
        if last is not None and history.fraction >= 0.1 and max(last) < 0.5:
            return {"nats": last[-1]}
    return None


def divergence(history: History) -> Evidence | None:
    """A loss that only falls has risen again by half of what it had come down.

    Beside a code-book only the phase that makes the codes is judged: what learns to follow them has a moving target.
    """
    if history.critics:
        return None
    for phase in history.phases("perplexity") or history.phases("loss"):
        values = history.values(f"{phase}/loss")
        if len(values) < 5:
            continue
        lowest, highest = min(values[:-1]), max(values[:3])
        rise = min(values[-2:]) - lowest
        if rise > 0.5 * (highest - lowest) and rise > 0.3 * abs(lowest):
            return {"phase": phase, "loss": values[-1], "lowest": lowest, "level": _worst_level(history)}
    return None


def labels_ignored(history: History) -> Evidence | None:
    """Pictures of different labels are as alike as those of one."""
    last, values = history.last("drawn/label_effect", 2), history.values("drawn/label_effect")
    if last is None or max(last) >= 0.2 or mode_collapse(history):
        return None
    never = history.fraction >= 0.35 and len(values) >= 4 and max(values[-4:]) < 0.2
    return {"effect": max(0.0, last[-1])} if never or _settled([-x for x in values]) <= -0.5 else None


def leaking_augmentation(history: History) -> Evidence | None:
    """The probability of an augmentation is above 0.85."""
    for key, value in history.rows[-1].items():
        if key.startswith("dial/") and key.endswith("_p") and value > HIGHEST_P + ROUNDING:
            return {"dial": key.removeprefix("dial/"), "value": value}
    return None


def _settled(values: Sequence[float], looks: int = 2) -> float:
    """The lowest level that held for so many looks."""
    return min((max(values[end - looks : end]) for end in range(looks, len(values) + 1)), default=math.inf)


def _gap(history: History, critic: str) -> list[float]:
    pairs = zip(history.values(f"{critic}/on_real"), history.values(f"{critic}/on_fake"), strict=False)
    return [real - fake for real, fake in pairs]


def _worst_level(history: History) -> str:
    """The noise level whose held-out loss grew most over its own lowest, in words; "" where levels are not known."""
    grown = {
        key.rpartition("@")[2]: history.values(key)[-1] / lowest
        for key in dict.fromkeys(key for row in history.rows for key in row if "@" in key)
        if (lowest := min(history.values(key))) > 0 and math.isfinite(history.values(key)[-1])
    }
    worst = max(grown, key=lambda level: grown[level], default="")
    return f", most at noise level {worst}" if worst and grown[worst] > 1.1 else ""


# -- the table --------------------------------------------------------------------------------------------------------

ILLNESSES: tuple[Illness, ...] = (
    Illness(
        "mode collapse",
        ("drawn/diversity", "drawn/missing"),
        mode_collapse,
        "drawn pictures have {diversity:.2f} of the variety of real ones, and {missing:.0%} of their kinds are gone",
        "go back to a checkpoint from before, halve the learning rate, strengthen the gradient penalty",
        ("restore", "stop"),
        "Goodfellow 2016 (arXiv:1701.00160, section 5.1); spread relative to real as in Odena et al. 2017",
    ),
    Illness(
        "mode drop",
        ("drawn/missing",),
        mode_drop,
        "kinds that are {missing:.0%} of the real pictures are hardly drawn any more",
        "go back to a checkpoint from before, halve the learning rate, use a larger batch",
        ("restore", "lower_lr"),
        "Richardson and Weiss 2018 (arXiv:1805.12462)",
    ),
    Illness(
        "discriminator overfitting",
        ("probe/train", "probe/held_out", "probe/fake"),
        overfitting,
        "the discriminator takes held-out pictures for drawn ones by {share:.0%}",
        "augment what the discriminator sees, strengthen the gradient penalty, or stop at the best checkpoint",
        ("raise_gamma", "lower_critic_lr"),
        "Karras et al. 2020 (arXiv:2006.06676, eq. 1)",
    ),
    Illness(
        "vanishing gradient",
        ("loss", "grad_norm", "on_real", "on_fake"),
        vanishing_gradient,
        "the discriminator is sure of every picture (loss {loss:.2g}), so the generator learns nothing from it",
        "lower the discriminator's learning rate, strengthen its penalty, or use a loss that does not saturate",
        ("lower_critic_lr", "raise_gamma"),
        "Arjovsky and Bottou 2017 (arXiv:1701.04862)",
    ),
    Illness(
        "exploding gradient",
        ("grad_norm",),
        exploding_gradient,
        "the gradient of {phase} is {times:.0f} times as long as it was",
        "go back to a checkpoint from before, lower the learning rate, clip the gradient",
        ("restore", "stop"),
        "Pascanu et al. 2013 (arXiv:1211.5063); Brock et al. 2019 (arXiv:1809.11096, section 4)",
    ),
    Illness(
        "oscillation",
        ("on_real", "on_fake"),
        oscillation,
        "generator and discriminator run in circles ({turns} turns in six looks, swing {swing:.2g})",
        "lower both learning rates, set the first beta to 0, add a gradient penalty",
        ("lower_lr", "raise_gamma"),
        "Mescheder et al. 2018 (arXiv:1801.04406)",
    ),
    Illness(
        "checkerboard",
        ("drawn/grid",),
        checkerboard,
        "two-pixel patterns are {grid:.0f} times as strong as in real pictures",
        "use kernels divisible by the stride, or resize before convolving",
        (),
        'Odena et al. 2016 (distill.pub, "Deconvolution and checkerboard artifacts")',
    ),
    Illness(
        "memorization",
        ("drawn/copies",),
        memorization,
        "{copies:.0%} of the drawn pictures are copies of training pictures",
        "stop earlier, use more pictures or more augmentation",
        ("restore", "stop"),
        "Alaa et al. 2022 (arXiv:2102.08921)",
    ),
    Illness(
        "dead code-book",
        ("perplexity",),
        dead_codes,
        "about {perplexity:.1f} codes are in use where there were {highest:.0f}",
        "restart unused codes, lower the learning rate, lower the dimensions of a code",
        ("restore", "lower_lr"),
        "van den Oord et al. 2017 (arXiv:1711.00937); Dhariwal et al. 2020 (arXiv:2005.00341, section 3.1)",
    ),
    Illness(
        "posterior collapse",
        ("divergence_nats",),
        posterior_collapse,
        "the latent code tells {nats:.2f} nats about a picture, next to nothing",
        "lower beta, let it rise slowly from 0, or give free nats",
        (),
        "Bowman et al. 2016 (arXiv:1511.06349)",
    ),
    Illness(
        "divergence",
        ("loss", "held_out"),
        divergence,
        "the loss of {phase} rose to {loss:.3g} after {lowest:.3g}{level}",
        "go back to a checkpoint from before and lower the learning rate",
        ("restore", "stop"),
        "Karras et al. 2024 (arXiv:2312.02696, section 2)",
    ),
    Illness(
        "ignored labels",
        ("drawn/label_effect",),
        labels_ignored,
        "the label changes a drawn picture {effect:.0%} as much as a real one",
        "condition by projection, balance the classes, or raise the learning rate of the embedding",
        (),
        "Miyato and Koyama 2018 (arXiv:1802.05637)",
    ),
    Illness(
        "leaking augmentation",
        ("dial",),
        leaking_augmentation,
        "{dial} is {value:.2f}, so drawn pictures come to look augmented",
        "keep it below 0.85 and use more pictures",
        ("clamp_p",),
        "Karras et al. 2020 (arXiv:2006.06676, section 3)",
    ),
)
