"""CLIP's text encoder of any size: tokens in any script, merges that count, and files that transformers reads."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from imagekiln.nets.clip_text import BYTES, MARKS, TextEncoder, byte_signs

pytest.importorskip("transformers")

CAPTIONS = ["a red cat", "a red dog", "the red cat sat", "blue dogs, red cats", "a cat"] * 3


def encoder(vocabulary: int = BYTES + MARKS + 20) -> TextEncoder:
    torch.manual_seed(0)
    made = TextEncoder(width=32, layers=2, context=12, vocabulary=vocabulary)
    made.study(CAPTIONS)
    return made


def tokens(made: TextEncoder, text: str) -> list[str]:
    return made.tokenizer().tokenize(text)


@pytest.mark.parametrize(
    "text", ["a cat", "Ünïcode's", "一只红色的猫", "قطة حمراء", "кошка", "😀👍🏽", "x" * 500, "", " \n "]
)
def test_any_script_is_tokens_and_comes_back(text: str):
    made = encoder()
    tokens_L = made.read([text])[0]
    assert tokens_L.shape == (12,) and tokens_L.dtype == torch.int64
    assert tokens_L[[0, -1]].tolist() == [made.vocabulary - 2, made.vocabulary - 1]
    assert int(tokens_L.min()) >= 0 and int(tokens_L.max()) < made.vocabulary
    plain = TextEncoder(width=32, layers=2, context=1024, vocabulary=BYTES + MARKS)
    back = plain.tokenizer().decode(plain.read([text])[0], skip_special_tokens=True)
    assert back.replace(" ", "") == "".join(text.lower().split())


def test_merges_are_the_commonest_pairs_one_after_the_other():
    """Against a slow restatement of the algorithm that counts everything anew for every merge."""
    made = encoder()
    place = {sign: number for number, sign in enumerate(byte_signs())}
    backend = made.tokenizer().backend_tokenizer
    words: Counter[tuple[int, ...]] = Counter()
    for caption in CAPTIONS:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(caption):
            numbers = [place[sign] for sign in word]
            words[(*numbers[:-1], numbers[-1] + 256)] += 1
    for row, pair in enumerate(made.merges_M2.tolist()):
        counts: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for neighbours in pairwise(word):
                counts[neighbours] += count
        most = max(counts.values(), default=0)
        if most < 2:
            assert pair == [-1, -1]
            continue
        assert tuple(pair) == min(found for found, count in counts.items() if count == most)
        merged: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            spelled, at = list(word), 0
            while at < len(spelled) - 1:
                if spelled[at : at + 2] == pair:
                    spelled[at : at + 2] = [BYTES + row]
                at += 1
            merged[tuple(spelled)] += count
        words = merged


def test_words_of_the_captions_are_single_tokens():
    made = encoder()
    assert tokens(made, "red cat") == ["red</w>", "cat</w>"]
    assert "".join(tokens(made, "zebra")) == "zebra</w>" and len(tokens(made, "zebra")) > 1


def test_what_has_no_bytes_is_passed_over():
    """A folder named in Latin-1 is a class whose name holds halves of surrogate pairs."""
    made = encoder()
    made.study(["caf\udce9"] * 3)
    other = encoder()
    other.study(["caf"] * 3)
    assert made.merges_M2.equal(other.merges_M2)
    assert made.read(["a caf\udce9 \ud83d"]).equal(made.read(["a caf"]))


def test_what_is_longer_than_the_context_is_known():
    made = encoder()
    words = " a" * (made.context - MARKS)
    assert not made.cuts("") and not made.cuts(words) and made.cuts(words + " a") and made.cuts("猫" * 10_000)


def test_the_vocabulary_travels_with_the_weights():
    made, other = encoder(), TextEncoder(width=32, layers=2, context=12, vocabulary=BYTES + MARKS + 20)
    other.load_state_dict(made.state_dict())
    captions = ["a red cat", "dogs"]
    assert torch.equal(made.read(captions), other.read(captions))
    tokens_BL = made.read(captions)
    for ours, theirs in zip(made.eval()(tokens_BL), other.eval()(tokens_BL), strict=True):
        assert torch.equal(ours, theirs)


def test_transformers_reads_what_was_written(tmp_path: Path):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    made = encoder().eval()
    made.clip.save_pretrained(tmp_path / "text_encoder")
    made.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    read = tokenizer(["a red cat"], padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    assert torch.equal(read["input_ids"], made.read(["a red cat"]))
    with torch.no_grad():
        theirs, ours = model(**read, output_hidden_states=True), made(read["input_ids"])
    assert torch.allclose(theirs.text_embeds, ours.pooled_BP, atol=1e-6)


def test_pooled_is_read_at_the_end_of_the_text():
    """What stands after the end of a text changes nothing: attention looks back only."""
    made = encoder().eval()
    tokens_BL = made.read(["a cat"])
    end = int((tokens_BL[0] == made.vocabulary - 1).nonzero()[0])
    changed = tokens_BL.clone()
    changed[0, end + 1 :] = 3
    with torch.no_grad():
        one, other = made(tokens_BL), made(changed)
    assert torch.allclose(one.pooled_BP, other.pooled_BP, atol=1e-6)
    assert torch.allclose(one.last_BLW[:, : end + 1], other.last_BLW[:, : end + 1], atol=1e-6)
    assert not torch.allclose(one.last_BLW[:, end + 1 :], other.last_BLW[:, end + 1 :], atol=1e-3)
