"""Does a model of emoji and their names draw what is asked for, in words that it was never trained on?

For concepts of the training set three wordings that training never makes: a sentence around the name (template), the
words of the name in another order or tags before the name (reworded), and tags without the name (tags). None equals a
name followed by any of its tags in any order, which is checked word by word. What is drawn is judged by a matcher that
was trained on the real pictures and shares nothing with the model (`emoji_matcher`):

  top-1   the concept's name fits the picture best among it and 19 names of other training concepts, drawn once a
          concept; nearly identical pictures and names of the same words are never among them. Chance is 5 %.
  group   the name that fits best among all names of the training set is of the concept's group (Food & Drink, ...).
          No classifier of groups: so the answer is a name that can be looked at, and nothing else had to be learned.

A model with a phrasebook (`data.phrasebook`) draws what it understands, as `generate` does, and the words as they are
written beside; how many prompts were understood as the concept's name is counted, too.

The same matcher also judges real pictures: changed ones, coarse ones, what the codec makes of them, and pictures that
it has never seen (their names then stand among themselves). Wrong names for what was drawn give the floor. Intervals
are Wilson's with 95 %, and the concept is the unit: pictures of one concept are not independent.

The same command continues what was interrupted; runs that are finished are not trained again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import command
import numpy as np
import torch
from emoji_matcher import Matcher, changed, coarse, matcher_of
from emoji_wordings import KINDS, SEEN, Asked, Concept, Trained, bag, choose, read_concepts, refuse_trained
from quality_per_minute import Logbook, our_seconds
from record import Row, this_command, write_record
from torch import Tensor

from imagekiln import api
from imagekiln import data as datasets
from imagekiln.config import DataConfig, override, read_toml
from imagekiln.core import mix
from imagekiln.data import to_float, to_uint8
from imagekiln.engine import pictures
from imagekiln.engine import recipe as recipes
from imagekiln.engine.generate import draw, options_for
from imagekiln.engine.models import Model, hash_of, open_model
from imagekiln.engine.run import Run
from imagekiln.errors import UsageError

NAMES = 20
"""Names to choose from."""
NEARLY_IDENTICAL = 0.05
"""Root mean squared difference of pixels in [0, 1] below which two pictures count as the same."""
GRID_CONCEPTS = 20
TOP, EXPECTED, WITHIN = "top-1", "top-1, expected", "top-1 within the group"
FIRST, GROUP = "first of all names", "group"
REACH = 1.959964
"""Standard deviations of a 95 % interval."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", type=Path, required=True, help="folder with metadata.csv: file_name, text, group, tags")
    add("--runs", type=Path, default=Path("runs/emoji-text"), help="folder of the runs (runs/emoji-text)")
    add("--prepared", type=Path, help="the prepared set of --data; without it RUNS/set, made if it is not there")
    add("--size", type=int, default=64, help="pixels a side of a set that is prepared here (64)")
    add("--recipe", default="emoji-text", help="the recipe (emoji-text)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting laid over the recipe")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="one training for every seed (0 1)")
    add("--concepts", type=int, default=120, help="concepts asked for, each in three wordings (120)")
    add("--skip-train", action="store_true", help="only measure what has been trained before")
    add("--nimg", type=int, help="the moment of the run after so many images (the one `generate` takes)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="how to draw (as the run says)")
    add("--matcher-only", action="store_true", help="only measure the matcher, on real pictures")
    add("--matcher-seed", type=int, default=0, help="another one is another matcher (0)")
    add("--record", action="store_true", help="write a record of the result")
    add("--name", default="emoji-text", help="name of the record (emoji-text)")
    add("--records", type=Path, metavar="FOLDER", help="folder of the record (records/)")
    return arguments


# -- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lineup:
    """Names to choose from, and which of them may stand beside the concept that was asked for.

    own_K: the concepts' places among the N names. allowed_KN: names that may be among its others. same_KN: those of its
    group. others_KM: the 19 that were drawn.
    """

    own_K: Tensor
    allowed_KN: Tensor
    same_KN: Tensor
    others_KM: Tensor

    @classmethod
    def of(cls, asked: Sequence[Concept], concepts: Sequence[Concept], images: Tensor) -> Lineup:
        """images: (N, C, H, W) uint8, the pictures of `concepts`."""
        flat_NX = images.flatten(1).double() / 255
        square_N = flat_NX.square().sum(1)
        bag_N, group_N = [bag(one.name) for one in concepts], [one.group for one in concepts]
        own, allowed, same, others = [], [], [], []
        for one in asked:
            place = next(number for number, other in enumerate(concepts) if other.row == one.row)
            distance_N = square_N + square_N[place] - 2 * flat_NX @ flat_NX[place]
            far_N = distance_N >= NEARLY_IDENTICAL**2 * flat_NX.shape[1]
            other_N = torch.tensor([one_bag != bag_N[place] for one_bag in bag_N])
            allowed.append(far_N & other_N)
            same.append(torch.tensor([group == one.group for group in group_N]))
            generator = torch.Generator().manual_seed(mix("emoji-text", "others", one.name))
            free = allowed[-1].nonzero()[:, 0]
            others.append(free[torch.randperm(len(free), generator=generator)[: NAMES - 1]])
            own.append(place)
        return cls(torch.tensor(own), torch.stack(allowed), torch.stack(same), torch.stack(others))

    def wrong(self) -> Lineup:
        """The same with every concept in the next one's place."""
        return Lineup(*(one.roll(1, 0) for one in (self.own_K, self.allowed_KN, self.same_KN, self.others_KM)))


def retrieved(scores_KN: Tensor, lineup: Lineup) -> dict[str, Tensor]:
    """What a matcher's scores of K pictures, one a concept, say: (K,) float64 each.

    top-1: the own name is strictly first among the 20 that were drawn. expected: the share of all possible draws in
    which it is, and within: the same with others of its group alone. first: it comes before all names that are allowed.
    """
    own_K1 = scores_KN.gather(1, lineup.own_K[:, None])
    ahead_KN = scores_KN >= own_K1

    def expected(allowed_KN: Tensor) -> Tensor:
        ahead, free = (ahead_KN & allowed_KN).sum(1).tolist(), allowed_KN.sum(1).tolist()
        return torch.tensor([first_of(a, n, NAMES - 1) for a, n in zip(ahead, free, strict=True)], dtype=torch.float64)

    return {
        TOP: (scores_KN.gather(1, lineup.others_KM) < own_K1).all(1).double(),
        EXPECTED: expected(lineup.allowed_KN),
        WITHIN: expected(lineup.allowed_KN & lineup.same_KN),
        FIRST: (~(ahead_KN & lineup.allowed_KN).any(1)).double(),
    }


def first_of(ahead: int, free: int, drawn: int) -> float:
    """Probability that none of the `ahead` better ones is among `drawn` of `free`; of fewer than that all are taken.

    >>> first_of(1, 19, 19), first_of(0, 100, 19), first_of(1, 38, 19)
    (0.0, 1.0, 0.5)
    """
    drawn = min(drawn, free)
    return math.comb(free - ahead, drawn) / math.comb(free, drawn)


class Judge:
    """A matcher with the names of the training set; says everything about K pictures of K concepts."""

    def __init__(self, matcher: Matcher, concepts: Sequence[Concept]) -> None:
        self.matcher, self.concepts = matcher, concepts
        self.names_ND = matcher.of_texts([one.name for one in concepts])

    def __call__(
        self, images: Tensor, asked: Sequence[Concept], lineup: Lineup, names_ND: Tensor | None = None
    ) -> dict[str, Tensor]:
        """names_ND: those of the lineup, where they are not the training set's."""
        z_KD = self.matcher.of_pictures(images)
        best_K = (z_KD @ self.names_ND.T).argmax(1).tolist()
        hits = [self.concepts[best].group == one.group for best, one in zip(best_K, asked, strict=True)]
        found = retrieved(z_KD @ (self.names_ND if names_ND is None else names_ND).T, lineup)
        return found | {GROUP: torch.tensor(hits, dtype=torch.float64)}


def share(values_KM: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The mean of values in [0, 1] with Wilson's interval, where the K rows are independent and their M values are not.

    The number of observations behind it is the one with which a share would vary as the means of the rows do.
    """
    rows_K = values_KM.mean(1)
    mean, count = float(rows_K.mean()), len(rows_K)
    variance = float(rows_K.var(ddof=1)) / count if count > 1 else 0.0
    spread = mean * (1 - mean)
    ratio = REACH**2 / (spread / variance if variance > 0 and spread > 0 else count)
    centre, half = (mean + ratio / 2) / (1 + ratio), math.sqrt(ratio * (spread + ratio / 4)) / (1 + ratio)
    return mean, (max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


# -- training and drawing ---------------------------------------------------------------------------------------------


def prepared_set(options: argparse.Namespace) -> Path:
    """The prepared set, made if it is not there."""
    folder = options.prepared or options.runs / "set"
    if not datasets.is_prepared(folder):
        command.say(f"Preparing {options.data} in {folder}.")
        api.prepare(options.data, folder, size=options.size, report=False)
    return folder


def shown(captions: Sequence[str], data: DataConfig) -> Trained:
    """What a training with these settings may show of captions; `data.fillers` around them make no wording."""
    return Trained(captions, data.tags_kept, data.wordings, data.word_dropout > 0)


def trained_run(options: argparse.Namespace, seed: int, folder: Path, dataset: datasets.Dataset) -> Run:
    """The finished run of a seed; trained or continued if it is not finished and that is allowed.

    Raises:
        UsageError: the run learned from other pictures.
    """
    run = Run(options.runs / f"emoji-text-{seed}")
    if not options.skip_train and run.status().get("state") != "finished":
        logbook = Logbook(run, f"seed {seed}")
        settings = [*options.set, f"train.seed={seed}"]
        try:
            api.train(options.recipe, str(folder.absolute()), run.path, assignments=settings, listener=logbook)
        finally:
            if run.exists():
                logbook.note()
    run = Run.open(run.path)
    if run.status().get("state") != "finished":
        command.say(f"{run.path} is not finished; what it has so far is measured.")
    if run.meta().get("data_fingerprint") != dataset.fingerprint:
        raise UsageError(f"{run.path} was trained on other pictures than those of {folder}. Give --prepared or --runs.")
    return run


def cost(run: Run) -> dict[str, float]:
    """Seconds: of the whole training by the wall and by the processor, and what the logs of both runs say."""
    whole, logs = our_seconds(run), {}
    codec = read_toml(run.recipe_path)["data"].get("codec")
    for what, one in {"model": run, **({"codec": Run(Path(codec))} if codec else {})}.items():
        if one.exists():
            logs[f"{what}'s log, wall"] = max((row.get("train_sec", 0.0) for row in one.stats()), default=0.0)
    if "cpu" not in whole:  # trained by another command, which only left its logs
        whole = {"wall": sum(logs.values())}
    return {f"training, {kind}": seconds for kind, seconds in whole.items()} | logs


def drawn(model: Model, asked: Sequence[Asked], kind: str, options: Any, as_written: bool = False) -> Tensor:
    """One picture a concept, (K, C, H, W) uint8, as `generate` understands the prompts, or of their own words."""
    seeds = [mix("emoji-text", "noise", kind, one.concept.name) for one in asked]
    prompts = [one.prompts[kind] if as_written else model.understood(one.prompts[kind]) for one in asked]
    with model.precision():
        return draw(model.family, seeds, prompts, options)


@torch.inference_mode()
def through_codec(model: Model, images: Tensor) -> Tensor | None:
    """uint8 pictures as the model's codec gives them back; None without a codec."""
    codec = model.family.codec
    if codec is None:
        return None
    parts = [codec.decode(codec.encode(to_float(part))).clamp(-1, 1).cpu() for part in images.split(64)]
    return to_uint8(torch.cat(parts))


def write_grid(path: Path, asked: Sequence[Asked], real: Tensor, by_kind: Mapping[str, Tensor]) -> None:
    """A row a concept: the real picture, then what was drawn for `KINDS` in turn. The first ones, not the best."""
    count = min(GRID_CONCEPTS, len(asked))
    cells = torch.stack([real[:count], *(by_kind[kind][:count] for kind in KINDS)], 1)
    labels = [row for row in range(count) for _ in range(cells.shape[1])]
    names = [one.concept.name.replace("\u2019", "'") for one in asked[:count]]
    pictures.write(pictures.class_rows(cells.flatten(0, 1), labels, names), path)


# -- measuring --------------------------------------------------------------------------------------------------------

Judged = dict[str, dict[str, Tensor]]
"""Values (K,) of every measure of every kind of pictures."""


def measure_real(
    judge: Judge, asked: Sequence[Concept], lineup: Lineup, dataset: Any, held: Sequence[Concept]
) -> Judged:
    """What the matcher says about real pictures: its ceiling, what harms it, and how it does on unseen concepts."""
    real = dataset.train.read([one.row for one in asked]).images
    generator = torch.Generator().manual_seed(mix("emoji-text", "changed"))
    found = {
        "real, as they are": judge(real, asked, lineup),
        "real, changed as in the matcher's training": judge(
            to_uint8(changed(to_float(real), generator)), asked, lineup
        ),
    }
    for side in (16, 8, 4):
        noisy = coarse(to_float(real), side)
        noisy = (noisy + 0.2 * torch.randn(noisy.shape, generator=generator)).clamp(-1, 1)
        found[f"real, at {side} pixels with noise"] = judge(to_uint8(noisy), asked, lineup)
    found["real, wrong names"] = judge(real, _rolled(asked), lineup.wrong())
    unseen = dataset.validation.read(range(len(held))).images
    names_ND = judge.matcher.of_texts([one.name for one in held])
    found["real, unseen by the matcher"] = judge(unseen, held, Lineup.of(held, held, unseen), names_ND)
    return found


def measure_run(
    run: Run,
    judge: Judge,
    asked: Sequence[Asked],
    lineup: Lineup,
    real: Tensor,
    nimg: int | None = None,
    drawing: Sequence[str] = (),
) -> tuple[Judged, dict[str, Tensor], Path]:
    """What the matcher says about a run's pictures, the pictures by kind, and the weights that drew them.

    drawing: sampling options as name=value, laid over the run's own.
    """
    model = open_model(run, nimg)
    concepts = [one.concept for one in asked]
    command.say(f"Drawing {len(asked) * (len(KINDS) + 1)} pictures with {model.weights}.")
    how = options_for(model.family, override({}, drawing))
    by_kind = {kind: drawn(model, asked, kind, how) for kind in (*KINDS, SEEN)}
    right = {kind: judge(images, concepts, lineup) for kind, images in by_kind.items()}
    wrong = {kind: judge(by_kind[kind], _rolled(concepts), lineup.wrong()) for kind in KINDS}
    found = {"drawn, all wordings": _together(right)}
    found |= {f"drawn, {kind}": values for kind, values in right.items()}
    found["drawn, wrong names"] = _together(wrong)
    if model.phrasebook is not None:
        written = {kind: judge(drawn(model, asked, kind, how, as_written=True), concepts, lineup) for kind in KINDS}
        found["drawn as written, all wordings"] = _together(written)
        found |= {f"drawn as written, {kind}": values for kind, values in written.items()}
        for kind in KINDS:
            meant = [float(model.understood(one.prompts[kind]) == one.concept.name) for one in asked]
            found[f"understood, {kind}"] = {"as the name": torch.tensor(meant, dtype=torch.float64)}
    given_back = through_codec(model, real)
    if given_back is not None:
        found["real, through the codec"] = judge(given_back, concepts, lineup)
    return found, by_kind, model.weights


def _together(by_kind: Judged) -> dict[str, Tensor]:
    """Values (K, M) of the M held-out wordings."""
    return {key: torch.stack([by_kind[kind][key] for kind in KINDS], 1) for key in by_kind[KINDS[0]]}


def _rolled(concepts: Sequence[Concept]) -> list[Concept]:
    return [concepts[-1], *concepts[:-1]]


# -- the record -------------------------------------------------------------------------------------------------------


def share_rows(judged: Sequence[Judged], seeds: Sequence[int]) -> list[Row]:
    """A row for every kind of pictures and measure; the interval is of the concepts, over all seeds together."""
    rows = []
    for kind in judged[0]:
        for measure in judged[0][kind]:
            values = [one[kind][measure].numpy().reshape(len(one[kind][measure]), -1) for one in judged]
            row = Row.of(f"{kind}: {measure}", [share(one)[0] for one in values], "", seeds, values[0].size)
            rows.append(replace(row, interval=share(np.concatenate(values, 1))[1]))
    return rows


def cost_rows(costs: Sequence[Mapping[str, float]], seeds: Sequence[int]) -> list[Row]:
    """Seconds that are known of every seed."""
    names = [name for name in costs[0] if all(name in one for one in costs)] if costs else []
    return [Row.of(name, [one[name] for one in costs], "s", seeds) for name in names]


def answers(asked: Sequence[Asked], judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Every prompt, and for every seed whether its picture was recognised."""
    return [
        {
            "name": one.concept.name,
            "group": one.concept.group,
            **{
                kind: {
                    "prompt": one.prompts[kind],
                    TOP: [int(run[f"drawn, {kind}"][TOP][row]) for run in judged],
                    GROUP: [int(run[f"drawn, {kind}"][GROUP][row]) for run in judged],
                }
                for kind in (*KINDS, SEEN)
            },
        }
        for row, one in enumerate(asked)
    ]


def work(options: argparse.Namespace) -> Path | None:
    """Train, draw, judge, write."""
    folder = prepared_set(options)
    dataset = datasets.load(DataConfig(path=str(folder)))
    command.say(dataset.summary())
    concepts, held = (read_concepts(options.data, side) for side in (dataset.train, dataset.validation))
    captions = dataset.train.captions or ()
    asked = choose(concepts, options.concepts, shown(captions, recipes.resolve(options.recipe, {}, options.set).data))
    if len(asked) < options.concepts:
        raise UsageError(f"--concepts {options.concepts}: only {len(asked)} have all three wordings.")
    runs = []
    for seed in () if options.matcher_only else options.seeds:
        runs.append(trained_run(options, seed, folder, dataset))
        refuse_trained(asked, shown(captions, recipes.complete(read_toml(runs[-1].recipe_path)).data))
    every = dataset.train.read(range(len(concepts))).images
    texts = [[one.name, *one.tags] for one in concepts]
    judge = Judge(matcher_of(every, texts, options.matcher_seed, say=command.say), concepts)
    chosen = [one.concept for one in asked]
    lineup = Lineup.of(chosen, concepts, every)
    real = every[[one.row for one in chosen]]
    rows, judged, weights = share_rows([measure_real(judge, chosen, lineup, dataset, held)], ()), [], []
    for seed, run in zip(options.seeds, runs, strict=False):
        found, by_kind, path = measure_run(run, judge, asked, lineup, real, options.nimg, options.option)
        judged.append(found)
        weights.append(hash_of(path))
        write_grid(options.runs / f"emoji-text-{seed}.png", asked, real, by_kind)
    if judged:
        rows = [*cost_rows([cost(run) for run in runs], options.seeds), *share_rows(judged, options.seeds), *rows]
    rows.append(Row("matcher's training, cpu", judge.matcher.cpu_sec, "s"))
    for row in rows:
        interval = f"  [{row.interval[0]:.3f}, {row.interval[1]:.3f}]" if row.interval else ""
        print(f"{row.what:<70}{row.value:>9.4g} {row.unit}{interval}")
    if not options.record:
        return None
    return write_record(
        options.name,
        this_command(),
        rows,
        notes=[
            "Values are means over the seeds, shares of pictures; sd is over the seeds. Intervals: Wilson's, 95 %, the "
            "concept is the unit, pictures of all seeds together.",
            f"top-1: among {NAMES} names, chance {1 / NAMES:.0%}. Expected: over all draws of the other names; within "
            "the group: the other names are of the same group. First: of all names of the training set; group: of "
            "the best of them.",
            "Training, wall and cpu: the codec and the model, looking and saving included; cpu is processor seconds "
            "divided by threads. The logs' seconds are of the wall.",
            "Real pictures and what was drawn are of the same concepts, chosen by a hash of their names.",
        ],
        **({"folder": options.records} if options.records else {}),
        data=dataset.summary(),
        data_fingerprint=dataset.fingerprint,
        matcher={"seed": options.matcher_seed, "parameters": sum(p.numel() for p in judge.matcher.parameters())},
        weights=weights,
        answers=answers(asked, judged) if judged else [],
    )


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


if __name__ == "__main__":
    sys.exit(main())
