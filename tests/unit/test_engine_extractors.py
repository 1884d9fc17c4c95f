"""Feature networks by name, and the cache: independent of batches, keyed by content, not fooled by damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from imagekiln.data.source import MemmapSource, Table, digest
from imagekiln.engine import extractors
from imagekiln.engine.extractors import InColour, cached_features, images_key, in_colour, open_extractor, rebatched
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import FeatureNetwork, Measurement, Provenance, RandomConv, extract
from imagekiln.metrics.inception import Inception, random_weights


def pictures(n, shape=(3, 8, 8), seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_float(images):
    return images.float() / 127.5 - 1


class Counting(nn.Module):
    """Real features, and how many pictures came at once."""

    name, num_features = "counting", 2

    def __init__(self, hash_="a"):
        super().__init__()
        self.hash, self.seen = hash_, []

    def features(self, images_BCHW):
        self.seen.append(len(images_BCHW))
        return torch.stack([images_BCHW.mean((1, 2, 3)), images_BCHW.std((1, 2, 3))], 1)


def test_names_open_networks():
    for name in ("randconv", "pixels"):
        network = open_extractor(name, (3, 8, 8), pictures(70))
        assert isinstance(network, FeatureNetwork)
        assert extract(network, [as_float(pictures(4))]).shape == (4, network.num_features)
        assert network.hash and network.name.startswith(name)
    both = (
        open_extractor("pixels", (3, 8, 8), pictures(70)),
        open_extractor("pixels", (3, 8, 8), as_float(pictures(70))),
    )
    assert both[0].hash == both[1].hash


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("incepton", "Did you mean 'inception'"),
        ("dinov2", "dinov2:FOLDER"),
        ("clip:", "clip:FOLDER"),
        ("pixels", "none were given"),
        ("randconv:3", "nothing after a colon"),
    ],
)
def test_wrong_names_are_refused(name, match):
    with pytest.raises(UsageError, match=match):
        open_extractor(name, (3, 8, 8))


def test_inception_is_looked_for_where_it_says(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"here\.pth"):
        open_extractor(f"inception:{tmp_path / 'here.pth'}", (3, 8, 8))
    monkeypatch.setenv("IMAGEKILN_INCEPTION", str(tmp_path / "there.pth"))
    with pytest.raises(DataError, match=r"there\.pth"):
        open_extractor("inception", (3, 8, 8))
    monkeypatch.delenv("IMAGEKILN_INCEPTION")
    monkeypatch.setenv("IMAGEKILN_CACHE", str(tmp_path))
    monkeypatch.setattr(extractors, "URL", (tmp_path / "nowhere").as_uri() + "/")
    said = []
    with pytest.raises(DataError) as refused:
        open_extractor("inception", (3, 8, 8), say=said.append)
    text = str(refused.value)
    assert "pt_inception-2015-12-05-6726825d.pth" in text and str(tmp_path / "inception") in text and "nowhere" in text
    assert len(said) == 1 and "Downloading" in said[0]


def test_the_ways_of_published_programs_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(extractors.Inception, "load", lambda path, way: Inception(random_weights(0), way))
    opened = {name: open_extractor(f"{name}:{tmp_path}", (3, 8, 8)) for name in extractors.WAYS}
    labels = [Measurement("frechet", 1.0, 9, 9, Provenance(network.name)).label for network in opened.values()]
    assert labels == ["FID[tf]", "FID[pytorch-fid]", "FID[clean-fid]"]
    assert len({network.hash for network in opened.values()}) == 3


def test_grey_and_transparent_pictures_become_colour():
    grey = as_float(pictures(2, (1, 4, 4)))
    assert torch.equal(in_colour(grey), torch.cat([grey] * 3, 1))
    colour = as_float(pictures(2, (3, 4, 4)))
    solid, clear = torch.ones(2, 1, 4, 4), -torch.ones(2, 1, 4, 4)
    assert torch.equal(in_colour(torch.cat([colour, solid], 1)), colour)
    assert torch.equal(in_colour(torch.cat([colour, clear], 1)), torch.ones(2, 3, 4, 4))
    network = RandomConv((3, 8, 8))
    wrapped, images = InColour(network), as_float(pictures(2, (1, 8, 8)))
    assert torch.equal(wrapped.features(images), network.features(images.repeat(1, 3, 1, 1)))
    assert (wrapped.name, wrapped.hash, wrapped.num_features) == (network.name, network.hash, network.num_features)
    with pytest.raises(DataError, match="2 channels"):
        in_colour(torch.zeros(1, 2, 4, 4))


def test_batches_do_not_show_not_even_in_the_last_bit(tmp_path):
    network, images = RandomConv((3, 8, 8)), pictures(250)
    count = len(images)
    table = Table(
        images.numpy(), np.full(count, -1), (), [digest(i) for i in images.numpy()], [str(i) for i in range(count)]
    )
    source = MemmapSource(table, np.arange(count))
    given = [images, images.split(1), images.split(97), (as_float(part) for part in images.split(200)), source]
    found = [cached_features(network, pictures_, f"way {i}", tmp_path) for i, pictures_ in enumerate(given)]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], extract(network, [as_float(images)]), rtol=1e-4, atol=1e-5)


def test_the_network_sees_one_batch_size(tmp_path):
    network = Counting()
    cached_features(network, pictures(200).split(7), "k", tmp_path)
    assert network.seen == [extractors.BATCH, extractors.BATCH, 200 - 2 * extractors.BATCH]
    assert torch.equal(torch.cat(list(rebatched(as_float(pictures(20)).split(3), 6))), as_float(pictures(20)))


def test_what_is_kept_is_used_and_keyed_by_everything(tmp_path, monkeypatch):
    network, images = Counting(), pictures(5)
    first = cached_features(network, images, "k", tmp_path)
    again = cached_features(network, images, "k", tmp_path)
    assert network.seen == [5] and torch.equal(first, again)
    cached_features(network, images, "other pictures", tmp_path)
    cached_features(Counting("b"), images, "k", tmp_path)
    monkeypatch.setattr(extractors, "VERSION", extractors.VERSION + 1)
    cached_features(network, images, "k", tmp_path)
    assert network.seen == [5, 5, 5] and len(list(tmp_path.iterdir())) == 4


def test_damage_is_said_once_and_mended(tmp_path):
    network, images, said = Counting(), pictures(5), []
    first = cached_features(network, images, "k", tmp_path, said.append)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [whole[:-1], b"", whole[:-1] + bytes([whole[-1] ^ 1]), b"not a safetensors file at all"]
    for index, content in enumerate(damaged):
        path.write_bytes(content)
        assert torch.equal(cached_features(network, images, "k", tmp_path, said.append), first)
        assert len(said) == index + 1 and path.name in said[-1]
        assert path.read_bytes() == whole or torch.equal(cached_features(network, images, "k", tmp_path), first)
    cached_features(network, images, "k", tmp_path, said.append)
    assert len(said) == len(damaged) and len(network.seen) == 1 + len(damaged)


def test_no_pictures_are_refused(tmp_path):
    for nothing in (pictures(0), []):
        with pytest.raises(DataError, match="no pictures"):
            cached_features(Counting(), nothing, "k", tmp_path)
    assert not list(tmp_path.iterdir())


def test_keys_of_pictures():
    images = pictures(200)
    changed = images.clone()
    changed[199, 2, 7, 7] ^= 1
    assert images_key(images) == images_key(images.clone()) != images_key(changed)
    assert images_key(images) != images_key(images[:199])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert images_key(channels_last) == images_key(images)
