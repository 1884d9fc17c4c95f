"""Advice on a set of pictures before anything is trained on it: what it is enough for, and what would help.

Every rule looks at counts and measures of the set alone, says one thing in plain words or nothing, and carries the
published numbers it rests on. Thresholds stand where those studies changed from one behaviour to another; they are
guides, not laws: a set of one kind of thing needs fewer pictures than a set of everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from imagekiln.data.measures import small_copies
from imagekiln.data.mirror import MOST, Handedness, handedness

if TYPE_CHECKING:
    from imagekiln.data.prepared import Prepared

Severity = Literal["fine", "hint", "warning"]

COPIED = 1000
"""Pictures below which a diffusion model trained from nothing gives them back instead of drawing new ones."""

FREE = 10_000
"""Pictures from which two diffusion models, each trained on other pictures of a kind, draw nearly the same ones."""

PLENTY = 30_000
"""Pictures from which a GAN gains little by augmentation."""

FEW_A_CLASS, ENOUGH_A_CLASS = 50, 500
UNEVEN = 10.0
"""The largest class over the smallest one from where on the small ones suffer."""

REPEATED = 0.01
"""Share of copies of other pictures that is worth a word."""

CROWD, FEWEST_IN_CROWD = 0.05, 5
"""Share of the set, and pictures, from which on one group of near copies is worth a look of its own."""

SMALL_SET_SIDE = 64
"""Side in pixels up to which sets of a few thousand pictures are usually trained."""

FEWEST_HELD_OUT = 500


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    counts_by_class: pictures by class name, those without a label not among them. image_shape: channels, height, width.
    num_train, num_held_out: pictures to learn from and to measure on. num_copies: pictures found to be copies of others
    and kept. num_enlarged: pictures whose shorter side is below that of the set. handed: None where it was not tested.
    largest_group: pictures of the largest group of copies and near copies that are kept.
    """

    num_train: int
    image_shape: tuple[int, int, int]
    counts_by_class: Mapping[str, int] = field(default_factory=dict)
    num_unlabelled: int = 0
    num_captions: int = 0
    num_held_out: int = 0
    num_copies: int = 0
    num_enlarged: int = 0
    handed: Handedness | None = None
    largest_group: int = 0

    @property
    def num_pictures(self) -> int:
        return self.num_train + self.num_held_out


@dataclass(frozen=True)
class Advice:
    """One thing to know.

    rule: its name. sentence: what to do or to expect. evidence: published numbers with their source, "" where the set
    itself is the evidence. numbers: of this set, by name.
    """

    rule: str
    severity: Severity
    sentence: str
    evidence: str
    numbers: Mapping[str, float]


def advise(facts: Facts) -> list[Advice]:
    """What there is to say, warnings first.

    >>> [(one.rule, one.severity) for one in advise(Facts(300, (3, 128, 128)))][:2]
    [('size', 'warning'), ('start', 'warning')]
    """
    found = [advice for rule in RULES if (advice := rule(facts)) is not None]
    return sorted(found, key=lambda advice: ("warning", "hint", "fine").index(advice.severity))


def facts_of(prepared: Prepared) -> Facts:
    """The facts of a prepared set; the mirror test is made here, on pictures that are kept."""
    about, rows, survey = prepared.about, prepared.rows, prepared.survey
    names = list(about["class_names"])
    labels = [int(row.get("label", -1)) for row in rows] if names else []
    kept = {row["file_name"] for row in rows}
    indices = np.array([index for index, name in enumerate(survey.names) if name in kept], np.int64)
    shape = tuple(int(side) for side in about["image_shape"])
    copies = {f["file_name"] for f in prepared.findings if "duplicate" in f["check"] and f["file_name"] in kept}
    short = np.minimum(survey.measured["height"][indices], survey.measured["width"][indices])
    return Facts(
        num_train=sum(row.get("split") != "validation" and row.get("split") != "test" for row in rows),
        image_shape=shape,  # type: ignore[arg-type]
        counts_by_class={name: labels.count(number) for number, name in enumerate(names)},
        num_unlabelled=sum(label < 0 for label in labels),
        num_captions=sum(bool(row.get("text")) for row in rows),
        num_held_out=sum(row.get("split") == "validation" for row in rows),
        num_copies=len(copies),
        num_enlarged=int((short < min(shape[1:])).sum()),
        handed=handedness(small_copies(survey.thumbs, _sample(indices))),
        largest_group=max(Counter(row["group"] for row in rows if "group" in row).values(), default=0),
    )


def _sample(indices: np.ndarray) -> np.ndarray:
    """As many as the mirror test looks at, so that not all small copies have to be read."""
    return np.sort(np.random.default_rng(0).permutation(indices)[:MOST])


# -- the rules --------------------------------------------------------------------------------------------------------


def _size(facts: Facts) -> Advice:
    """How many pictures there are against what each kind of model needs.

    Denoisers trained on disjoint sets of 80 px faces: up to about 1,000 pictures they learn them by heart, from about
    10,000 on they agree with each other, at 100,000 they draw the same pictures (Kadkhodaie et al. 2024,
    arXiv:2310.02557). GANs: good results from a few thousand pictures with ADA (Karras et al. 2020, arXiv:2006.06676).
    A VAE averages what it has not seen, so that few pictures give blur before they give copies.
    """
    n = facts.num_train
    if n < COPIED:
        sentence = (
            f"{n:,} pictures to learn from are few. A diffusion model trained from nothing will mostly give them back, "
            "a GAN needs strong augmentation, and a VAE draws blurred ones."
        )
    elif n < FREE:
        sentence = (
            f"{n:,} pictures are enough for a GAN with augmentation or for a small diffusion model, if it is stopped "
            "in time: look at the report's nearest training pictures, and at the measure of copying."
        )
    else:
        sentence = f"{n:,} pictures are enough to train any kind of model from nothing at this size."
    evidence = (
        "Diffusion models learn up to about 1,000 faces by heart and draw freely from about 10,000 on "
        "(Kadkhodaie et al. 2024, arXiv:2310.02557); GANs give good results from a few thousand pictures, if "
        "augmented (Karras et al. 2020, arXiv:2006.06676)."
    )
    severity: Severity = "warning" if n < COPIED else "hint" if n < FREE else "fine"
    return Advice("size", severity, sentence, evidence, {"pictures to learn from": n})


def _start(facts: Facts) -> Advice | None:
    """Whether to fine-tune a model of other pictures instead of training from nothing.

    StyleGAN2 on 1,000 faces of 256 px: Frechet distance 62 plain, 26 with DiffAugment, 5 to 6 with 30,000 (Zhao et al.
    2020, arXiv:2006.10738, as measured by clean-fid). Fine-tuning takes about a fifth of the training and helps most
    when the first set is varied and of a like kind (Karras et al. 2020).
    """
    if facts.num_train >= COPIED:
        return None
    sentence = (
        "With so few pictures it is better to begin with a model that was trained on many pictures of a like kind and "
        "to fine-tune it on these, than to train from nothing."
    )
    evidence = (
        "A GAN of 1,000 faces is at a Frechet distance of 62, with augmentation at 26; one of 30,000 at 5 to 6 "
        "(Zhao et al. 2020, arXiv:2006.10738, measured by clean-fid)."
    )
    return Advice("start", "warning", sentence, evidence, {"pictures to learn from": facts.num_train})


def _augment(facts: Facts) -> Advice | None:
    """What to augment besides mirroring.

    DiffAugment takes StyleGAN2's Frechet distance on CIFAR-10 from 11.1 to 9.9 with all pictures, from 23.1 to 12.2
    with 20 % and from 36.0 to 14.5 with 10 % of them (clean-fid's table of arXiv:2006.10738): the fewer, the more.
    Diffusion models: dropout 0.05 to 0.1 from 50 passes over the set on, 0.13 to 0.25 from 300 passes on (EDM's
    settings, Karras et al. 2022, arXiv:2206.00364). Learning by heart sets in after a time proportional to the number
    of pictures (arXiv:2505.16959), so stopping early keeps it away.
    """
    if facts.num_train >= PLENTY:
        return None
    sentence = (
        "For a GAN, switch augmentation on: --set family.augment.policy=ada, or diffaugment in a short run. For a "
        "diffusion model use dropout of 0.1 to 0.25 and stop when held-out loss rises; it is trained on the pictures "
        "as they are."
    )
    evidence = (
        "Augmentation took a GAN's Frechet distance from 36.0 to 14.5 with 5,000 pictures, and from 11.1 to 9.9 with "
        "50,000 (Zhao et al. 2020, arXiv:2006.10738, measured by clean-fid)."
    )
    severity: Severity = "warning" if facts.num_train < COPIED else "hint"
    return Advice("augment", severity, sentence, evidence, {"pictures to learn from": facts.num_train})


def _mirror(facts: Facts) -> Advice | None:
    """Whether to mirror pictures: only where they cannot be told from their mirror images (`data.mirror`).

    Mirroring doubles the set for nothing where it is right, and teaches letters the wrong way round where it is not.
    Photographs are often nearly symmetric, writing, watches and faces with their parting are not (Lin et al. 2020,
    arXiv:2006.09512).
    """
    handed = facts.handed
    if handed is None or handed.verdict == "unknown":
        return None
    numbers = {"mirror images told apart": round(handed.accuracy, 3), "pictures tested": handed.n}
    if handed.verdict == "handed":
        sentence = (
            f"Do not mirror these pictures: a simple classifier tells them from their mirror images in "
            f"{handed.accuracy:.0%} of cases, so left and right matter here, as they do in writing."
        )
        evidence = "Chance is 50%. What gives mirrored pictures away: Lin et al. 2020, arXiv:2006.09512."
        return Advice("mirror", "hint", sentence, evidence, numbers)
    sentence = (
        "Mirroring is safe: these pictures cannot be told from their mirror images. --set data.flip=true doubles "
        "what there is to learn from."
    )
    evidence = f"A simple classifier is right in {handed.accuracy:.0%} of cases, and chance is 50%."
    return Advice("mirror", "hint" if facts.num_train < PLENTY else "fine", sentence, evidence, numbers)


def _classes(facts: Facts) -> Advice | None:
    """Classes with few pictures.

    Asking by class splits the set: each class has to be learned from its own pictures and what it shares with others.
    Labels also make learning by heart easier, even labels without meaning (Gu et al. 2025, arXiv:2310.02664).
    """
    counts = facts.counts_by_class
    if len(counts) < 2:
        return None
    few = [name for name, count in counts.items() if count < FEW_A_CLASS]
    smallest = min(counts.values())
    numbers = {"classes": len(counts), "smallest class": smallest, f"classes below {FEW_A_CLASS}": len(few)}
    evidence = "Labels make learning by heart easier, even labels without meaning (Gu et al. 2025, arXiv:2310.02664)."
    if few:
        sentence = (
            f"{len(few):,} of {len(counts):,} classes have fewer than {FEW_A_CLASS} pictures: expect copies or "
            "confusion when they are asked for. Add pictures, join classes, or train without labels."
        )
        return Advice("classes", "warning", sentence, evidence, numbers)
    if smallest < ENOUGH_A_CLASS:
        sentence = (
            f"The smallest class has {smallest:,} pictures: enough to learn its look, not all its variety. Classes "
            "that look alike help each other."
        )
        return Advice("classes", "hint", sentence, evidence, numbers)
    sentence = f"Every class has at least {smallest:,} pictures, enough to be asked for by name."
    return Advice("classes", "fine", sentence, "", numbers)


def _balance(facts: Facts) -> Advice | None:
    """Classes of very different size.

    Diffusion models of long-tailed sets lose fidelity and above all variety in the rare classes (Qin et al. 2023,
    arXiv:2305.00562).
    """
    counts = [count for count in facts.counts_by_class.values() if count]
    if len(counts) < 2 or max(counts) < UNEVEN * min(counts):
        return None
    ratio = max(counts) / min(counts)
    sentence = (
        f"The largest class has {ratio:,.0f} times as many pictures as the smallest one. Rare classes will look alike "
        "and worse: add pictures to them, or leave some of the large ones out."
    )
    evidence = "With classes this uneven, rare ones lose quality and variety (Qin et al. 2023, arXiv:2305.00562)."
    return Advice("balance", "warning", sentence, evidence, {"largest over smallest": round(ratio, 1)})


def _resolution(facts: Facts) -> Advice | None:
    """The number of pictures against their size, and pictures that had to be enlarged.

    Models of 50,000 pictures of 32 px and of 70,000 of 256 px are what papers report; of a few thousand at 256 px,
    patches or pretrained networks. An enlarged picture has no detail at the finest scale, and a model learns that, too.
    """
    side = min(facts.image_shape[1:])
    share = facts.num_enlarged / max(1, facts.num_pictures)
    numbers = {"side in pixels": side, "enlarged pictures": facts.num_enlarged}
    if share > 0.1:
        sentence = (
            f"{share:.0%} of the pictures are smaller than {side} pixels and were enlarged, which makes them soft. "
            "A smaller --size learns faster and looks sharper."
        )
        return Advice("resolution", "warning" if share > 0.5 else "hint", sentence, "", numbers)
    if facts.num_train < FREE and side > SMALL_SET_SIDE:
        sentence = (
            f"{facts.num_train:,} pictures of {side} pixels are a hard start. Begin with --size {SMALL_SET_SIDE}: it "
            f"takes about {(side / SMALL_SET_SIDE) ** 2:.0f} times less work a picture and shows sooner what works."
        )
        evidence = "The work of a convolutional network grows with the number of pixels."
        return Advice("resolution", "hint", sentence, evidence, numbers)
    return None


def _copies(facts: Facts) -> Advice | None:
    """Copies among the pictures that are kept.

    A picture that is there many times is the first to be learned by heart: repeating pictures in a set makes diffusion
    models copy them far more often (Somepalli et al. 2023, arXiv:2305.20086; Carlini et al. 2023, arXiv:2301.13188).
    """
    share = facts.num_copies / max(1, facts.num_pictures)
    if share < REPEATED:
        return None
    sentence = (
        f"{facts.num_copies:,} pictures that are copies of others are kept ({share:.0%}). A model learns repeated "
        "pictures by heart first: leave them out unless they are meant."
    )
    evidence = "Diffusion models copy repeated pictures far more often (Somepalli et al. 2023, arXiv:2305.20086)."
    return Advice("copies", "warning", sentence, evidence, {"copies kept": facts.num_copies})


def _crowd(facts: Facts) -> Advice | None:
    """One group of near copies that holds much of the set.

    Groups are joined link by link, each picture nearly the same as the next, and never divided between the sides of
    the split: a large one makes a side larger or smaller than asked for, and weighs in learning by its number.
    """
    share = facts.largest_group / max(1, facts.num_pictures)
    if facts.largest_group < FEWEST_IN_CROWD or share <= CROWD:
        return None
    sentence = (
        f"{facts.largest_group:,} pictures, {share:.0%} of the set, are near copies of each other, such as frames of "
        "one film or a series of one thing. They stay on one side of the split, and a model draws them first of all: "
        "look at the group, and keep a few of it. If they are not alike, lower clean.max_residual."
    )
    numbers = {"pictures in the largest group": facts.largest_group, "share of the set": round(share, 3)}
    return Advice("crowd", "warning", sentence, "", numbers)


def _unlabelled(facts: Facts) -> Advice | None:
    """Pictures without a label where others have one; they are learned without one, and may be given one."""
    labelled = sum(facts.counts_by_class.values())
    if not facts.num_unlabelled or not labelled:
        return None
    sentence = (
        f"{facts.num_unlabelled:,} pictures have no label. They are learned from all the same; "
        "imagekiln prepare --propagate-labels proposes labels where it can be sure."
    )
    numbers = {"with a label": labelled, "without": facts.num_unlabelled}
    return Advice("unlabelled", "hint", sentence, "", numbers)


def _captions(facts: Facts) -> Advice | None:
    """Captions for a part of the pictures only; the others have an empty one."""
    if not 0 < facts.num_captions < facts.num_pictures:
        return None
    missing = facts.num_pictures - facts.num_captions
    sentence = (
        f"{missing:,} of {facts.num_pictures:,} pictures have no caption. They are kept with an empty one, and teach "
        "the model to draw without words."
    )
    numbers = {"with a caption": facts.num_captions, "without": missing}
    return Advice("captions", "hint", sentence, "", numbers)


def _held_out(facts: Facts) -> Advice | None:
    """Pictures to measure on.

    Distances between small samples are too large, by about c / N: 5,000 real pictures of CIFAR-10 are at a Frechet
    distance of 10.3 from 5,000 others, 50,000 at 3.1 from 10,000 (measured in NVlabs/stylegan2-ada, issue 53).
    """
    if facts.num_held_out >= FEWEST_HELD_OUT:
        return None
    sentence = (
        f"{facts.num_held_out:,} pictures are held out to measure on. Distances will be rough: read their intervals, "
        "and compare only runs that were measured on the same pictures."
    )
    evidence = (
        "5,000 real pictures of CIFAR-10 are at a Frechet distance of 10 from 5,000 others, which are just as real "
        "(NVlabs/stylegan2-ada, issue 53)."
    )
    return Advice("held out", "hint", sentence, evidence, {"held out": facts.num_held_out})


RULES = (
    *(_size, _start, _classes, _balance, _augment, _mirror),
    *(_resolution, _copies, _crowd, _unlabelled, _captions, _held_out),
)
"""In the order of what matters most."""
