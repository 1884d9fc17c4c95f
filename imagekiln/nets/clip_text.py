"""CLIP's text encoder with its tokenizer, of any size, trained from nothing in any script.

The network is transformers' `CLIPTextModelWithProjection` (Radford et al. 2021, arXiv:2103.00020), so its weights are
files that other programs read; `imagekiln.nets.frozen_text` has pretrained ones. Tokens are byte pairs (Sennrich et al.
2016, arXiv:1508.07909) over UTF-8, so that every script can be written: 256 bytes, 256 bytes that end a word, one token
a merge, and the two marks of a text's ends. The merges are what a tokenizer knows; they are a buffer and travel with
the weights.

Shapes: B texts, L tokens a text, W numbers a token, M merges.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from imagekiln.nets.libraries import transformers

BYTES, MARKS = 512, 2
_START, _END = "<|startoftext|>", "<|endoftext|>"


class Encoded(NamedTuple):
    """What a text encoder says.

    last_BLW: after all layers and the last normalisation. before_BLW: before the last layer. pooled_BP: of the whole.
    """

    last_BLW: Tensor
    before_BLW: Tensor
    pooled_BP: Tensor


class ClipText(nn.Module):
    """transformers' `CLIPTextModelWithProjection` and the tokenizer that belongs to it.

    context: tokens a text, the marks of its ends included; longer ones are cut. base: folder of a pretrained one, ""
    for one that is trained from nothing.
    """

    clip: Any
    context: int
    base: str = ""

    @property
    def width(self) -> int:
        """Numbers a token."""
        return int(self.clip.config.hidden_size)

    @property
    def whole_width(self) -> int:
        """Numbers of a whole text."""
        return int(self.clip.config.projection_dim)

    def tokenizer(self) -> Any:
        """transformers' `CLIPTokenizer`."""
        raise NotImplementedError

    def study(self, captions: Sequence[str]) -> None:
        """Take a vocabulary from captions, where it is not known already."""

    def read(self, captions: Sequence[str]) -> Tensor:
        """tokens_BL int64 on the CPU: start, tokens, end, and padding up to the context's length."""
        read = self.tokenizer()(
            [_utf8(caption) for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        tokens_BL: Tensor = read["input_ids"]
        return tokens_BL

    def cuts(self, caption: str) -> bool:
        """Whether `read` leaves out the end of this caption."""
        return len(self.tokenizer()(_utf8(caption), verbose=False)["input_ids"]) > self.context

    def forward(self, tokens_BL: Tensor) -> Encoded:
        said = self.clip(input_ids=tokens_BL, output_hidden_states=True)
        return Encoded(said.last_hidden_state, said.hidden_states[-2], said.text_embeds)


class TextEncoder(ClipText):
    """A text encoder that is trained from nothing; padding is the mark of a text's end.

    width, layers: of the network, with heads of 64 numbers where the width allows. context: tokens a text, the marks
    of its ends included; longer ones are cut. vocabulary: tokens in all, at least 514.

    Raises `UsageError` when transformers is not there.

    >>> encoder = TextEncoder(width=32, layers=2, context=8, vocabulary=514)
    >>> encoder(encoder.read(["a cat", "一只猫"])).last_BLW.shape
    torch.Size([2, 8, 32])
    """

    def __init__(self, width: int, layers: int, context: int, vocabulary: int) -> None:
        super().__init__()
        clip = transformers()
        heads = max(1, width // 64) if width % max(1, width // 64) == 0 else 1
        self.context, self.vocabulary = context, vocabulary
        self.clip = clip.CLIPTextModelWithProjection(
            clip.CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=context,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=vocabulary - 1,
            )
        )
        self.merges_M2: Tensor
        self.register_buffer("merges_M2", torch.full((vocabulary - BYTES - MARKS, 2), -1, dtype=torch.int32))

    def study(self, captions: Sequence[str]) -> None:
        """Take the merges from captions: again and again the commonest pair of neighbouring tokens becomes one."""
        known = _learned(captions, self.vocabulary)[: len(self.merges_M2)]
        self.merges_M2.fill_(-1)
        if known:
            self.merges_M2[: len(known)] = torch.tensor(known, dtype=torch.int32)

    def tokenizer(self) -> Any:
        """transformers' `CLIPTokenizer` of these merges."""
        merges = self.merges_M2.cpu().numpy()
        return _tokenizer(merges[merges[:, 0] >= 0].tobytes(), self.vocabulary, self.context)


# -- tokens -----------------------------------------------------------------------------------------------------------


@functools.cache
def byte_signs() -> tuple[str, ...]:
    """The sign that stands for each byte in a vocabulary: printable ones for themselves, the rest from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    order = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(rest)}
    return tuple(order[byte] for byte in (*plain, *rest))


def _vocabulary(merges: Sequence[tuple[int, int]], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Numbers of all tokens, and the merges as pairs of tokens. The marks are the last two of `size` numbers."""
    tokens = [*byte_signs(), *(f"{sign}</w>" for sign in byte_signs())]
    pairs = []
    for first, second in merges:
        pairs.append((tokens[first], tokens[second]))
        tokens.append(tokens[first] + tokens[second])
    return {token: number for number, token in enumerate(tokens)} | {_START: size - 2, _END: size - 1}, pairs


@functools.lru_cache(maxsize=8)
def _tokenizer(merges: bytes, size: int, context: int) -> Any:
    pairs = [(int(a), int(b)) for a, b in np.frombuffer(merges, np.int32).reshape(-1, 2)]
    vocabulary, named = _vocabulary(pairs, size)
    return transformers().CLIPTokenizer(vocab=vocabulary, merges=named, model_max_length=context)


def _utf8(text: str) -> str:
    """A text without halves of surrogate pairs: a class or a prompt that was no UTF-8 holds them, and they have no
    bytes to be read by."""
    return text.encode("utf-8", "ignore").decode()


def _learned(captions: Sequence[str], size: int) -> list[tuple[int, int]]:
    """At most size - 514 merges as pairs of token numbers, in the order of their making."""
    words: dict[tuple[int, ...], int] = {}
    place = {sign: number for number, sign in enumerate(byte_signs())}
    backend = _tokenizer(b"", BYTES + MARKS, 8).backend_tokenizer
    for caption in captions:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(_utf8(caption))):
            numbers = [place[sign] for sign in word]
            key = (*numbers[:-1], numbers[-1] + 256)
            words[key] = words.get(key, 0) + 1
    spelled, counts = [list(word) for word in words], list(words.values())
    merges: list[tuple[int, int]] = []
    found, where = _pairs(spelled, counts)
    while len(merges) < size - BYTES - MARKS and found:
        best = max(found, key=lambda pair: (found[pair], (-pair[0], -pair[1])))
        if found[best] < 2:
            break  # what comes once tells nothing about other texts
        new = BYTES + len(merges)
        merges.append(best)
        for index in where.pop(best):
            _replace(spelled[index], best, new, counts[index], index, found, where)
        found.pop(best, None)
    return merges


def _pairs(
    spelled: list[list[int]], counts: list[int]
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], set[int]]]:
    """How often each pair of neighbours comes, and in which words."""
    found: dict[tuple[int, int], int] = {}
    where: dict[tuple[int, int], set[int]] = {}
    for index, (word, count) in enumerate(zip(spelled, counts, strict=True)):
        for pair in itertools.pairwise(word):
            found[pair] = found.get(pair, 0) + count
            where.setdefault(pair, set()).add(index)
    return found, where


def _replace(
    word: list[int],
    pair: tuple[int, int],
    new: int,
    count: int,
    index: int,
    found: dict[tuple[int, int], int],
    where: dict[tuple[int, int], set[int]],
) -> None:
    """Write one word with the new token in the pair's place, and count its neighbours anew."""
    for old in itertools.pairwise(word):
        found[old] = found.get(old, 0) - count
    place = 0
    while place < len(word) - 1:
        if (word[place], word[place + 1]) == pair:
            word[place : place + 2] = [new]
        place += 1
    for fresh in itertools.pairwise(word):
        found[fresh] = found.get(fresh, 0) + count
        where.setdefault(fresh, set()).add(index)
