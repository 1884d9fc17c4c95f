r"""What a frozen network learns beside its weights: low-rank changes of layers, and new words.

LoRA (Hu et al. 2021, arXiv:2106.09685), equation 3, of a layer with weights W:

    y = W x + s B A x,   A of r x in, B of out x r, s = alpha / r

B begins at zero, so that training begins with the network as it was. DoRA (Liu et al. 2024, arXiv:2402.09353) also
learns how long each row of the changed weights is, with the length's own gradient left out (section 4.3):

    y = m / |W + s B A| (W + s B A) x

Textual inversion (Gal et al. 2022, arXiv:2208.01618) learns nothing but the numbers of a new word.

Shapes: r rank; in, out of a layer; V new tokens of W numbers each.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagekiln.errors import RecipeError
from imagekiln.nets.pretrained import Pretrained

LAYERS = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.add_?_proj", "*.to_add_out", "*.?_proj", "*.out_proj")
"""Names of layers that are changed: those of attention, in denoisers and in text encoders."""


class LowRank(nn.Module):
    """The change of one linear layer."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, lengths: bool = False) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.length = nn.Parameter(layer.weight.detach().norm(dim=1)) if lengths else None

    def forward(self, x: Tensor, answer: Tensor, layer: nn.Linear) -> Tensor:
        """What the changed layer answers to x. answer: what the layer itself does."""
        change = F.linear(F.linear(x, self.down), self.up) * self.scale
        if self.length is None:
            return answer + change
        row_norm = (layer.weight + self.scale * (self.up @ self.down)).norm(dim=1).detach()
        plain = answer if layer.bias is None else answer - layer.bias
        changed = (plain + change) * (self.length / row_norm)
        return changed if layer.bias is None else changed + layer.bias

    def merged(self, layer: nn.Linear) -> Tensor:
        """Weights (out, in) with which a layer answers as the changed one does."""
        weight = layer.weight + self.scale * (self.up @ self.down)
        return weight if self.length is None else weight * (self.length / weight.norm(dim=1))[:, None]


class Adapters(nn.Module):
    """Low-rank changes of the layers of some networks of a pretrained model.

    >>> model = Pretrained("random:sd1")
    >>> len(Adapters(model, ["denoiser"], rank=2, alpha=2.0).parts)
    24
    """

    def __init__(
        self, model: Pretrained, networks: Sequence[str], rank: int, alpha: float, lengths: bool = False
    ) -> None:
        super().__init__()
        self.parts, self.lengths = nn.ModuleDict(), lengths
        for key, layer in layers(model, networks):
            self.parts[_safe(key)] = LowRank(layer, rank, alpha, lengths)
            layer.register_forward_hook(_Change(model, key))

    def added(self) -> dict[str, Any]:
        """The changes by layer, as `Pretrained.added` takes them."""
        return {_plain(name): part for name, part in self.parts.items()}


class NewWord(nn.Module):
    """The numbers of one new word in every text encoder that reads by CLIP's rules.

    token: as captions write it, such as "<my-cup>". start: a word whose numbers it begins with. count: tokens it is.

    Raises `RecipeError` when the model knows the token, or the start is not one token.
    """

    def __init__(self, model: Pretrained, token: str, start: str, count: int) -> None:
        super().__init__()
        self.token = token
        self.vectors = nn.ParameterDict()
        names = [token, *(f"{token}_{place}" for place in range(1, count))]
        for key, encoder, tokenizer in zip(list(model.networks())[1:3], model.encoders, model.tokenizers, strict=False):
            numbers = tokenizer(start, add_special_tokens=False)["input_ids"]
            if len(numbers) != 1:
                raise RecipeError(f"family.word.start = {start!r} is {len(numbers)} tokens; expected one common word.")
            if any(name in tokenizer.get_vocab() for name in names):
                raise RecipeError(
                    f"family.word.token = {token!r}: the model knows it. Expected a new one, such as '<my-cup>'."
                )
            tokenizer.add_tokens(names)
            table = encoder.get_input_embeddings()
            rows = table.weight.detach()[numbers[0]].expand(count, -1).clone()
            rows[1:] += 0.01 * rows.std() * torch.randn_like(rows[1:])  # equal ones would stay equal
            self.vectors[key] = nn.Parameter(rows)
            reading = _Reading(model, key, table.num_embeddings)
            table.register_forward_pre_hook(reading.known)
            table.register_forward_hook(reading.numbers)

    def added(self) -> dict[str, Any]:
        """The numbers by encoder, as `Pretrained.added` takes them."""
        return dict(self.vectors.items())


def layers(model: Pretrained, networks: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are changed in these networks, by "network.name"."""
    for network in networks:
        for name, layer in model.networks()[network].named_modules():
            if isinstance(layer, nn.Linear) and any(fnmatch.fnmatch(f".{name}", pattern) for pattern in LAYERS):
                yield f"{network}.{name}", layer


class _Change:
    """A hook of a layer: adds what is learned for it at the moment."""

    def __init__(self, model: Pretrained, key: str) -> None:
        self.model, self.key = model, key

    def __call__(self, layer: Any, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        part = self.model.added.get(self.key)
        return answer if part is None else part(given[0], answer, layer)


class _Reading:
    """Two hooks of a table of tokens: unknown numbers are read as the first one, and answered by what is learned."""

    def __init__(self, model: Pretrained, key: str, size: int) -> None:
        self.model, self.key, self.size = model, key, size
        self._asked: Tensor | None = None

    def known(self, table: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before: only numbers that the table has."""
        self._asked = given[0]
        return (torch.where(given[0] < self.size, given[0], 0), *given[1:])

    def numbers(self, table: Any, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        """After: the new word's numbers in their places."""
        rows, asked = self.model.added.get(self.key), self._asked
        if rows is None or asked is None:
            return answer
        place = (asked - self.size).clamp(0, len(rows) - 1)
        return torch.where((asked >= self.size)[..., None], rows[place].to(answer.dtype), answer)


def _safe(key: str) -> str:
    return key.replace(".", "/")


def _plain(name: str) -> str:
    return name.replace("/", ".")
