"""How many wordings that training never shows does a phrasebook understand?

Words alone; nothing is trained or drawn. For every concept of a prepared set of named pictures with all three held-out
wordings (`emoji_wordings`) it is counted whether the phrasebook of the training captions answers with the concept's
name. The first concepts are those that `emoji_text` draws; the rule was chosen on the others, after a first one had
been tried on those.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import command
import numpy as np
from emoji_text import share, shown
from emoji_wordings import KINDS, SEEN, Asked, choose, read_concepts
from record import Row, this_command, write_record

from imagekiln import api
from imagekiln import data as datasets
from imagekiln.config import DataConfig
from imagekiln.data.phrasebook import Phrasebook
from imagekiln.engine import recipe as recipes
from imagekiln.engine.models import phrasebook_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--data", type=Path, required=True, help="folder with metadata.csv: file_name, text, group, tags")
    add("--recipe", default="emoji-text", help="the recipe whose training the wordings are kept from (emoji-text)")
    add("--concepts", type=int, default=120, help="concepts that are drawn elsewhere (120)")
    add("--others", type=int, default=400, help="further concepts at most (400)")
    add("--record", action="store_true", help="write a record of the result")
    add("--records", type=Path, metavar="FOLDER", help="folder of the record (records/)")
    return arguments


def understood(book: Phrasebook, asked: Sequence[Asked], kind: str) -> np.ndarray:
    """1 where a concept's wording is answered with its name, else 0: (K, 1) float64."""
    return np.array([[float(book.say(one.prompts[kind]) == one.concept.name)] for one in asked])


def work(options: argparse.Namespace) -> Path | None:
    """Count, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        api.prepare(options.data, Path(folder, "set"), size=16, report=False)
        dataset = datasets.load(DataConfig(path=str(Path(folder, "set"))))
        concepts, captions = read_concepts(options.data, dataset.train), list(dataset.train.captions or ())
        settings = recipes.resolve(options.recipe).data
        asked = choose(concepts, options.concepts + options.others, shown(captions, settings))
        book, rows = phrasebook_of(captions, settings), []
        for name, some in (("benchmark", asked[: options.concepts]), ("other", asked[options.concepts :])):
            for kind in (*KINDS, SEEN) if some else ():
                mean, interval = share(understood(book, some, kind))
                rows.append(Row(f"{name} concepts understood, {kind}", mean, n=len(some), interval=interval))
                print(f"{rows[-1].what:<42}{mean:.3f}  [{interval[0]:.3f}, {interval[1]:.3f}]  n = {len(some)}")
        if not options.record:
            return None
        notes = [
            "Text alone: shares of concepts whose wording was answered with their name; intervals: Wilson's, 95 %. "
            "Benchmark concepts are those that `emoji_text` draws; the rule was chosen on the others, after a first "
            "one had been tried on those."
        ]
        where = {"folder": options.records} if options.records else {}
        summary = dataset.summary()
    return write_record("phrasebook", this_command(), rows, notes=notes, **where, data=summary, captions=len(book))


def main(given: Sequence[str] | None = None) -> int:
    """The exit code; given: the arguments, None = those of the process."""
    return command.run(parser(), work, given)


if __name__ == "__main__":
    sys.exit(main())
