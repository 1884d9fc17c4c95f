"""VGG-16 from files: the published count, maps against the plain stack of layers, and what is no such file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from imagekiln.errors import UsageError
from imagekiln.nets.vgg import Vgg16

NARROW = (4, 6, 8, 10, 12)
COLUMN_D = [0, 0, "M", 1, 1, "M", 2, 2, 2, "M", 3, 3, 3, "M", 4, 4, 4, "M"]
"""Table 1 of the paper, column D: the block of each convolution."""

ENDS = (3, 8, 15, 22, 29)
"""The last ReLU of every block."""


def stack(seed: int = 0) -> nn.Sequential:
    """The layers one after another as torchvision has them, narrow."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for block in COLUMN_D:
        if block == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, NARROW[int(block)], 3, padding=1), nn.ReLU()]
            channels = NARROW[int(block)]
    return nn.Sequential(*layers).requires_grad_(False)


def published(layers: nn.Sequential, learned: bool = False) -> dict[str, Tensor]:
    """What a published file holds, its classifier included."""
    tensors = {f"features.{key}": value for key, value in layers.state_dict().items()}
    tensors["classifier.0.weight"] = torch.zeros(3, 3)
    if learned:
        tensors |= {f"lin{place}.model.1.weight": torch.rand(1, n, 1, 1) for place, n in enumerate(NARROW)}
    return tensors


def photos(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_count_is_the_published_one():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Vgg16((3, 64, 64)).parameters()) == 14_714_688


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_are_those_of_the_stack(tmp_path: Path, channels: int):
    layers, x = stack(), photos(2, channels, 40, 33)
    save_file(published(layers), tmp_path / "vgg")
    net = Vgg16.load(tmp_path / "vgg", (channels, 40, 33))
    colours = x.expand(-1, 3, -1, -1)
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = ((colours + 1) / 2 - mean[:, None, None]) / spread[:, None, None]  # ImageNet's, of pictures in [0, 1]
    expected = [layers[: end + 1](seen) for end in ENDS]
    for ours, theirs in zip(net.maps(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert net.channel_weights is None and net.image_shape == (channels, 40, 33)


def test_half_precision_is_read_as_single(tmp_path: Path):
    tensors = published(stack(), learned=True)
    save_file({key: value.half() for key, value in tensors.items()}, tmp_path / "vgg")
    net = Vgg16.load(tmp_path / "vgg", (3, 16, 16))
    for place, weights in enumerate(net.channel_weights):
        assert torch.equal(weights, tensors[f"lin{place}.model.1.weight"].half().float())
    assert {each.dtype for each in net.maps(photos(1, 3, 16, 16))} == {torch.float32}


@pytest.mark.parametrize(("side", "count"), [(1, 1), (3, 2), (8, 4), (15, 4), (16, 5)])
def test_small_pictures_have_fewer_maps(side: int, count: int):
    maps = Vgg16((1, side, 40), NARROW).maps(photos(1, 1, side, 40))
    assert [one.shape[1] for one in maps] == list(NARROW[:count])


def test_pictures_of_other_channels_are_refused():
    with pytest.raises(UsageError, match="grey and RGB pictures, and these have 4 channels"):
        Vgg16((4, 16, 16), NARROW)


def test_a_pickle_is_refused_with_its_conversion(tmp_path: Path):
    torch.save(published(stack()), tmp_path / "vgg16.pth")
    with pytest.raises(UsageError, match=r"vgg16\.pth cannot be read .*save_file\(torch\.load\(.*weights_only=True\)"):
        Vgg16.load(tmp_path / "vgg16.pth", (3, 16, 16))


def _without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {"w": torch.zeros(1)}, r"features\.0\.weight is missing"),
        (lambda tensors: _without(tensors, "features.19.bias"), r"features\.19\.bias is missing"),
        (lambda tensors: _without(tensors, "lin3.model.1.weight"), r"lin3\.model\.1\.weight is missing"),
        (lambda tensors: tensors | {"features.1.weight": torch.zeros(4)}, r"features\.1\.weight is there .* \(4,\)"),
        (lambda tensors: tensors | {"features.2.weight": torch.zeros(4, 4, 1, 1)}, r"features\.2\.weight is there"),
        (
            lambda tensors: tensors | {"lin0.model.1.weight": torch.zeros(1, 5, 1, 1)},
            r"lin0\.model\.1\.weight is there",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change, words: str):
    save_file(change(published(stack(), learned=True)), tmp_path / "other")
    with pytest.raises(UsageError, match=rf"other holds no VGG-16 under torchvision's names: {words}"):
        Vgg16.load(tmp_path / "other", (3, 16, 16))


KEYS = (
    "features.0.weight",
    "features.0.bias",
    "features.5.weight",
    "lin0.model.1.weight",
    "linear",
    "classifier.0.bias",
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    shapes=st.dictionaries(st.sampled_from(KEYS), st.lists(st.integers(0, 3), max_size=5)),
    raw=st.none() | st.binary(max_size=40),
)
def test_any_file_is_read_or_refused(tmp_path: Path, shapes: dict[str, list[int]], raw: bytes | None):
    path = tmp_path / "any"
    if raw is None:
        save_file({**published(stack(), learned=True), **{k: torch.zeros(s) for k, s in shapes.items()}}, path)
    else:
        path.write_bytes(raw)
    try:
        assert len(Vgg16.load(path, (3, 16, 16)).maps(photos(1, 3, 16, 16))) == 5
    except UsageError as refusal:
        assert str(path) in str(refusal)
