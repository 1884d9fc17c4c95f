"""The next character of a text: a recurrent network on the help texts that come with Python.

The text is that of `pydoc_data.topics`, always there and different from version to version of Python; its hash stands
in the facts of a record. Training, validation and test are its first 80, next 10 and last 10 percent.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imagekiln.core import mix

from .protocol import Arm, Metric, Places, Scores, Settings, Task
from .training import fit, grid, readings

LENGTH, BATCH, WIDTH = 48, 32, 128
SCORED = 240
"""Pieces of each split that are scored."""


@lru_cache(maxsize=1)
def _text() -> tuple[Tensor, int, str]:
    """Codes of all characters, how many kinds, and the hash of the text."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    kinds = {character: place for place, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([kinds[character] for character in text])
    return codes, len(kinds), hashlib.sha256(text.encode()).hexdigest()


def text_hash() -> str:
    """sha256 of the text."""
    return _text()[2]


class Network(nn.Module):
    """Embedding, one layer of gated recurrent units, and a score for every character."""

    def __init__(self, num_kinds: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_kinds, 32)
        self.recurrent = nn.GRU(32, WIDTH, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(WIDTH, num_kinds)

    def forward(self, codes_BT: Tensor) -> Tensor:
        return self.scores(self.dropout(self.recurrent(self.dropout(self.embedding(codes_BT)))[0]))


def _pieces(codes: Tensor, num: int) -> Tensor:
    """Evenly spaced pieces of LENGTH + 1 characters."""
    starts = torch.linspace(0, len(codes) - LENGTH - 2, num).long()
    return codes[starts[:, None] + torch.arange(LENGTH + 1)]


def _train(settings: Settings, seed: int, places: Places) -> Scores:
    codes, num_kinds, _ = _text()
    eight, nine = (len(codes) * share // 10 for share in (8, 9))
    num = places.num(SCORED, 8)
    held = torch.cat([_pieces(codes[eight:nine], num), _pieces(codes[nine:], num)])

    def batch_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(seed, "order", step))
        starts = torch.randint(0, eight - LENGTH - 1, (BATCH, 1), generator=generator)
        return codes[starts + torch.arange(LENGTH + 1)]

    def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
        return cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())

    def predict(model: nn.Module) -> Tensor:
        """Probabilities of the characters that came."""
        chances = model(held[:, :-1]).softmax(-1)
        return chances.gather(-1, held[:, 1:, None]).squeeze(-1)

    torch.manual_seed(mix(seed, "initial"))
    trained = fit(
        Network(num_kinds, settings.get("dropout", 0.0)),
        batch_of,
        loss_of,
        {"clip_norm": 1.0, **settings},
        num_steps=places.num(1000, 13),
        num_data=eight,
        seed=seed,
    )
    found: Scores = {}
    for name, chances in readings(trained, predict).items():
        bits = -chances.double().clamp_min(1e-12).log2()
        found[name] = {"validation": float(bits[:num].mean()), "bits": float(bits[num:].mean())}
    return found


def _arms() -> tuple[Arm, ...]:
    readouts = ("last", "average", "ensemble")
    adam = {"optimizer": "adamw", "eps": 1e-5}  # an embedding that is seldom used has no gradient to hold its noise
    return (
        Arm("AdamW", grid("lr", (2e-3, 5e-3, 1e-2), **adam), readouts),
        Arm("Langevin AdamW", grid("temperature", (0.01, 0.1, 1.0), **adam), readouts, ours=True, after="AdamW"),
        Arm("dropout", grid("dropout", (0.05, 0.1, 0.2), **adam), after="AdamW"),
        Arm("weight decay", grid("weight_decay", (0.01, 0.1, 0.3), **adam), after="AdamW"),
        Arm("AdamW, cycles", grid("lr", (2e-3, 5e-3, 1e-2), rate="cycles", **adam), ("ensemble",)),
        Arm("article's loop", grid("article", (1e-9, 1e-8, 1e-7), **adam), after="AdamW"),
    )


TEXT = Task(
    "e",
    "Characters of Python's help texts, 128 gated recurrent units, 1,000 steps",
    {"bits": Metric(lower=True, worst=math.log2(100))},
    _arms(),
    "AdamW",
    _train,
    expected="a tie for the last weights, a gain for the ensemble over the last weights",
)

TASKS = (TEXT,)
