"""The Inception network against a second description of the published layers in float64, and published scores."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from imagekiln.data import builtin, to_float
from imagekiln.errors import DataError, UsageError
from imagekiln.metrics import FeatureNetwork, FrechetDistance, Statistics, extract
from imagekiln.metrics import inception as module
from imagekiln.metrics.inception import Inception, random_weights

# The published tables a second time, another way: a path through a block is a string of layers, "name rowsxcolumns"
# with "/2" for stride 2 without padding; any other layer keeps the size. ">" follows, "|" goes side by side, "+" forks.
PATHS = {
    "A": "branch1x1 1x1 | branch5x5_1 1x1 > branch5x5_2 5x5"
    " | branch3x3dbl_1 1x1 > branch3x3dbl_2 3x3 > branch3x3dbl_3 3x3 | average > branch_pool 1x1",
    "B": "branch3x3 3x3/2 | branch3x3dbl_1 1x1 > branch3x3dbl_2 3x3 > branch3x3dbl_3 3x3/2 | shrink",
    "C": "branch1x1 1x1 | branch7x7_1 1x1 > branch7x7_2 1x7 > branch7x7_3 7x1"
    " | branch7x7dbl_1 1x1 > branch7x7dbl_2 7x1 > branch7x7dbl_3 1x7 > branch7x7dbl_4 7x1 > branch7x7dbl_5 1x7"
    " | average > branch_pool 1x1",
    "D": "branch3x3_1 1x1 > branch3x3_2 3x3/2"
    " | branch7x7x3_1 1x1 > branch7x7x3_2 1x7 > branch7x7x3_3 7x1 > branch7x7x3_4 3x3/2 | shrink",
    "E": "branch1x1 1x1 | branch3x3_1 1x1 > branch3x3_2a 1x3 + branch3x3_2b 3x1"
    " | branch3x3dbl_1 1x1 > branch3x3dbl_2 3x3 > branch3x3dbl_3a 1x3 + branch3x3dbl_3b 3x1"
    " | average > branch_pool 1x1",
}
PATHS["E of maxima"] = PATHS["E"].replace("average", "maximum")
KINDS = {"5b": "A", "5c": "A", "5d": "A", "6a": "B", "6b": "C", "6c": "C", "6d": "C", "6e": "C", "7a": "D", "7b": "E"}
KINDS["7c"] = "E of maxima"
STEM = [("1a_3x3", 2, 0), ("2a_3x3", 1, 0), ("2b_3x3", 1, 1), None, ("3b_1x1", 1, 0), ("4a_3x3", 1, 0), None]


def conv(w, name, x, stride, padding):
    """Convolution, normalization and ReLU one after the other, nothing folded."""
    y = functional.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
    m, v, g, b = (w[f"{name}.bn.{k}"].view(-1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias"))
    return ((y - m) / torch.sqrt(v + 0.001) * g + b).clamp(min=0)


def average(x):
    """Mean of the 3x3 neighbours that exist."""
    ones = torch.ones_like(x[:1, :1])
    return functional.avg_pool2d(x, 3, 1, 1) / functional.avg_pool2d(ones, 3, 1, 1)


def maximum(x):
    padded = functional.pad(x, (1, 1, 1, 1), value=-float("inf"))
    return padded.unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))


def shrink(x):
    return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


def layer(w, block, word, x):
    if " " not in word:
        return {"average": average, "maximum": maximum, "shrink": shrink}[word](x)
    name, _, kernel = word.partition(" ")
    rows, columns = int(kernel[0]), int(kernel[2])
    stride, padding = (2, 0) if kernel.endswith("/2") else (1, (rows // 2, columns // 2))
    return conv(w, f"Mixed_{block}.{name}", x, stride, padding)


def block(w, name, x):
    outputs = []
    for path in PATHS[KINDS[name]].split(" | "):
        y = x
        *before, last = path.split(" > ")
        for word in before:
            y = layer(w, name, word, y)
        outputs += [layer(w, name, word, y) for word in last.split(" + ")]
    return torch.cat(outputs, 1)


def reference(w, x):
    """(name, output) of every stage, float64."""
    pools = iter(("pool_1", "pool_2"))
    for stage in STEM:
        x = shrink(x) if stage is None else conv(w, f"Conv2d_{stage[0]}", x, stage[1], stage[2])
        yield next(pools) if stage is None else f"Conv2d_{stage[0]}", x
    for name in KINDS:
        x = block(w, name, x)
        yield f"Mixed_{name}", x


@pytest.fixture(scope="module")
def weights():
    return random_weights(0)


@pytest.fixture(scope="module")
def network(weights):
    return Inception(weights)


@pytest.fixture(scope="module")
def others(weights):
    """The other protocols' networks, each built when it is first needed."""
    return functools.cache(lambda protocol: Inception(weights, protocol))


@pytest.fixture(scope="module")
def exact(weights):
    return {name: value.double() for name, value in weights.items()}


def pictures(n, side=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return to_float(torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8))


@torch.inference_mode()
def test_every_stage_equals_the_published_table(network, exact):
    x = torch.randn(1, 3, 107, 107, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stages = list(reference(exact, x))
    found = list(network.walk(x.float()))
    assert [name for name, _ in found] == [name for name, _ in stages] and len(stages) == 18
    for (name, expected), (_, value) in zip(stages, found, strict=True):
        assert value.shape == expected.shape, name
        # Sums of float32 in the processor's own order: up to 1.1e-6 has been seen, by 256 bits a vector.
        assert float((value - expected).norm() / expected.norm()) < 3e-6, name
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.inference_mode()
def test_features_and_logits_of_a_picture(network, exact):
    images = pictures(1)
    *_, (_, last) = reference(exact, network.prepare(images).double())
    expected = last.mean((2, 3))
    features, logits = network.features_and_logits(images)
    assert last.shape == (1, 2048, 8, 8) and features.dtype == logits.dtype == torch.float32
    assert float((features - expected).norm() / expected.norm()) < 1e-6
    torch.testing.assert_close(logits.double(), expected @ exact["fc.weight"].T, rtol=1e-5, atol=1e-5)
    _, biased = network.features_and_logits(images, bias=True)
    torch.testing.assert_close(biased - logits, exact["fc.bias"].float()[None], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_packed_weights_change_rounding_only(network, monkeypatch):
    x = torch.randn(1, 3, 107, 107, generator=torch.Generator().manual_seed(2))
    packed = [value for _, value in network.walk(x)][-1]
    monkeypatch.setattr(module, "_has_onednn", lambda dtype: False)
    plain = [value for _, value in network.walk(x)][-1]
    # Two float32 sums in different orders, each within 1e-6 of the exact value.
    assert float((packed - plain).norm() / plain.norm()) < 3e-6


def test_extract_gives_the_same_however_pictures_are_batched(network, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1)
    images = pictures(2)
    assert isinstance(network, FeatureNetwork)
    one = extract(network, [images])
    assert one.shape == (2, network.num_features) and not one.is_inference()
    torch.testing.assert_close(extract(network, images.split(1)), one, rtol=1e-4, atol=1e-5)
    assert float((one[0] - one[1]).abs().max()) > 1e-3, "different pictures differ"
    assert network.features(images[:0]).shape == (0, 2048)


@pytest.mark.parametrize(
    ("protocol", "black", "white"),
    [("tf", -1.0, 127 / 128), ("pytorch-fid", -1.0, 1.0), ("clean-fid", -1.0, 127 / 128)],
)
def test_protocols_scale_as_published(network, others, protocol, black, white):
    network = network if protocol == "tf" else others(protocol)
    images = torch.stack([-torch.ones(3, 4, 4), torch.ones(3, 4, 4)])
    prepared = network.prepare(images)
    assert prepared.shape == (2, 3, 299, 299)
    torch.testing.assert_close(prepared[0], torch.full((3, 299, 299), black), rtol=0, atol=1e-5)
    torch.testing.assert_close(prepared[1], torch.full((3, 299, 299), white), rtol=0, atol=1e-5)


def test_pixels_are_rounded_to_256_levels_before_resizing(network):
    level = 100 / 127.5 - 1
    images = torch.full((2, 3, 4, 4), level)
    images[1] += 0.3 / 127.5
    prepared = network.prepare(images)
    assert torch.equal(prepared[0], prepared[1])


def test_names_and_hashes_tell_protocols_apart(weights, network, others):
    other = others("clean-fid")
    assert network.name == "inception-2015" and other.name == "inception-2015-clean-fid"
    assert network.hash != other.hash
    changed = dict(weights, **{"fc.bias": weights["fc.bias"] + 1})
    assert Inception(changed).hash != network.hash


def test_bfloat16_is_near_and_says_so(weights, network):
    low = Inception(weights, dtype=torch.bfloat16)
    images = pictures(1)
    found, expected = extract(low, [images]), extract(network, [images])
    assert low.name == "inception-2015-bfloat16" and low.hash != network.hash and found.dtype == torch.float32
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.05


def test_other_weights_are_refused(weights):
    lacking = {name: value for name, value in weights.items() if name != "Mixed_7c.branch_pool.bn.running_var"}
    with pytest.raises(DataError, match=r"nothing under Mixed_7c\.branch_pool\.bn\.running_var"):
        Inception(lacking)
    with pytest.raises(DataError, match=r"shape \(1000, 2048\) under fc.weight"):
        Inception(dict(weights, **{"fc.weight": torch.zeros(1000, 2048)}))
    with pytest.raises(UsageError, match="clean-fid, pytorch-fid, tf"):
        Inception(weights, "legacy")


def test_grey_pictures_are_refused(network):
    with pytest.raises(DataError, match="repeat grey"):
        network.features(torch.zeros(1, 1, 8, 8))


def test_a_missing_or_wrong_file_is_named(tmp_path):
    with pytest.raises(DataError) as missing:
        Inception.load(tmp_path / "absent.pth")
    assert all(word in str(missing.value) for word in ("absent.pth", module.URL, module.FILE))
    (tmp_path / "wrong.pth").write_bytes(b"something else")
    with pytest.raises(DataError, match="not the published Inception file"):
        Inception.load(tmp_path / "wrong.pth")


class Danger:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_file_is_read_without_running_what_is_in_it(tmp_path, weights, network, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def published(content):
        torch.save(content, tmp_path / "file.pth")
        digest = hashlib.sha256((tmp_path / "file.pth").read_bytes()).hexdigest()
        monkeypatch.setattr(module, "SHA256", digest)
        return tmp_path / "file.pth"

    with pytest.raises(DataError, match="cannot be read"):
        Inception.load(published({"fc.weight": Danger()}))
    assert not (tmp_path / "unpickled").exists()
    counts = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(1) for name in weights}
    loaded = Inception.load(published({**counts, **weights}))
    assert loaded.hash == network.hash and isinstance(loaded, nn.Module)


def published_file() -> Path | None:
    places = [os.environ.get("IMAGEKILN_INCEPTION", ""), str(Path.home() / ".cache/imagekiln/inception" / module.FILE)]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def cifar10() -> Path | None:
    places = [os.environ.get("IMAGEKILN_CIFAR10", ""), str(Path.home() / ".cache/imagekiln/cifar10")]
    return next((Path(place) for place in places if place and builtin.recognise(Path(place))), None)


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) of each split, in the order given."""
    scores = []
    for part in logits.double().chunk(splits):
        log_p = part.log_softmax(1)
        scores.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores)


@pytest.mark.slow
@pytest.mark.skipif(published_file() is None, reason="needs the published weights: set IMAGEKILN_INCEPTION to the file")
@pytest.mark.skipif(cifar10() is None, reason="needs CIFAR-10: set IMAGEKILN_CIFAR10 to the folder with its files")
@pytest.mark.timeout(7200)
def test_the_published_frechet_distance_and_score_of_cifar10():
    """torch-fidelity's own test: 5,000 training against 5,000 test pictures drawn by RandomState(2020)."""
    network = Inception.load(published_file())
    name, folder = builtin.recognise(cifar10())
    images = torch.from_numpy(builtin.read(name, folder).images_NHWC).permute(0, 3, 1, 2)
    features, logits = [], []
    for part in (images[:50_000], images[50_000:]):
        rows = np.sort(np.random.RandomState(2020).choice(len(part), 5000, replace=False))
        with torch.inference_mode():
            found = [network.features_and_logits(to_float(chunk)) for chunk in part[rows].split(100)]
        features.append(Statistics.of(torch.cat([f for f, _ in found])))
        logits.append(torch.cat([scores for _, scores in found]))
    assert FrechetDistance()(*features) == pytest.approx(10.3233274, abs=1e-4)
    shuffled = logits[0][torch.from_numpy(np.random.RandomState(2020).permutation(5000))]
    assert float(inception_score(shuffled).mean()) == pytest.approx(10.75051, rel=1e-3)
