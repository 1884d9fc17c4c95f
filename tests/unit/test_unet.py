"""The U-Net is diffusers' `UNet2DModel`, trains, and repeats itself bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imagekiln.errors import UsageError
from imagekiln.nets import layers
from imagekiln.nets.unet import UNet, UNetConfig, _sinusoids

CONFIGS = {
    "28 px, labels, default": UNetConfig(
        28, 1, 1, (16, 32, 48), 1, (False, True, True), True, 16, 8, "default", 0.0, 10
    ),
    "28 px, labels, scale_shift": UNetConfig(
        28, 1, 1, (16, 32, 32), 2, (False, False, True), True, 32, 8, "scale_shift", 0.0, 11
    ),
    "16 px, no attention, one level": UNetConfig(16, 3, 3, (16,), 1, (False,), False, 64, 4, "scale_shift"),
    "16 px, mid attention, other output": UNetConfig(16, 4, 6, (32, 16), 3, (True, False), True, 16, 16),
    "uneven picture": UNetConfig(16, 3, 3, (8, 24), 1, (False, True), True, 8, 4, "default", 0.1),
}
TINY = UNetConfig(8, 3, 3, (16, 32), 1, (False, True), True, 16, 8, "scale_shift", 0.0, 4)


def randomised(config: UNetConfig, seed: int = 0) -> UNet:
    """A net in which no weight is zero, so that nothing hides."""
    torch.manual_seed(seed)
    net = UNet(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return net


def example(config: UNetConfig, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(1)
    images = torch.randn(3, config.in_channels, config.sample_size, width or config.sample_size)
    classes = config.num_class_embeds
    return images, torch.tensor([0.0, 13.5, 999.0]), None if classes is None else torch.arange(3) + classes - 3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_kernel", [True, False])
def test_equals_diffusers(name, with_kernel, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    if not with_kernel:
        monkeypatch.setattr(layers, "_kernel_fault", lambda: "switched off")
    elif layers._kernel_fault():
        pytest.skip(layers.fused_norm_available())
    config = CONFIGS[name]
    net = randomised(config)
    twin = diffusers.UNet2DModel.from_config(net.diffusers_config()).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    assert {key: value.shape for key, value in net.state_dict().items()} == {
        key: value.shape for key, value in twin.state_dict().items()
    }
    images, times, labels = example(config, width=20 if name == "uneven picture" else None)
    with torch.no_grad():
        found, wanted = net(images, times, labels), twin(images, times, labels).sample
    assert found.shape == (3, config.out_channels, *images.shape[2:])
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_equal_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    net = randomised(CONFIGS["28 px, labels, default"])
    twin = diffusers.UNet2DModel.from_config(net.diffusers_config()).eval()
    twin.load_state_dict(net.state_dict())
    images, times, labels = example(net.config)
    net(images, times, labels).square().sum().backward()
    twin(images, times, labels).sample.square().sum().backward()
    theirs = dict(twin.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in theirs.values())
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-3, atol=1e-6 * largest.item())


@pytest.mark.parametrize("size", [(7, 7), (9, 5), (1, 1)])
def test_sizes_that_do_not_halve_evenly_work(size):
    net = randomised(UNetConfig(8, 3, 3, (8, 8, 8), 1, (False, False, True), True, 8, 4))
    images = torch.randn(2, 3, *size)
    assert net(images, torch.zeros(2)).shape == images.shape


def test_starts_as_zero_and_every_parameter_learns_after_one_step():
    torch.manual_seed(0)
    net = UNet(TINY)
    images, times, labels = example(TINY)
    assert net(images, times, labels).abs().max() == 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # zeros give way from the output inwards: conv_out, then conv2 and to_out, then all before them
        optimizer.zero_grad()
        F.mse_loss(net(images, times, labels), images).backward()
        optimizer.step()
    F.mse_loss(net(images, times, labels), images).backward()
    flat = [key for key, parameter in net.named_parameters() if parameter.grad.abs().max() == 0]
    assert flat == []


def test_bfloat16_autocast_stays_near_float32_and_returns_float32():
    net = randomised(CONFIGS["28 px, labels, scale_shift"])
    given = example(net.config)
    with torch.no_grad():
        exact = net(*given)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(*given)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_two_trainings_are_bit_equal():
    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = UNet(TINY)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        images, times, labels = example(TINY)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                prediction = net(images, times, labels)
            F.mse_loss(prediction, images).backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in net.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(trained(), trained(), strict=True))


def test_labels_and_times_matter_and_dropout_follows_the_mode():
    net = randomised(UNetConfig(8, 3, 3, (16, 32), 1, (False, True), True, 16, 8, "default", 0.5, 4))
    images, times, labels = example(net.config)
    plain = net(images, times, labels)
    assert torch.equal(plain, net(images, times, labels))
    assert not torch.equal(plain, net(images, times, labels.flip(0)))
    assert not torch.equal(plain, net(images, times + 1, labels))
    net.train()
    assert not torch.equal(net(images, times, labels), net(images, times, labels))


def test_a_picture_does_not_depend_on_its_neighbours():
    net = randomised(TINY)
    images, times, labels = example(TINY)
    together = net(images, times, labels)
    alone = torch.cat([net(images[i : i + 1], times[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [49, 1100])
def test_attention_in_bfloat16_is_attention(tokens):
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, 3, tokens, 16).bfloat16().unbind(0)
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    doubles = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    y = layers.attention(*inputs)
    weights = torch.softmax(doubles[0] @ doubles[1].transpose(-2, -1) / 4, dim=-1)
    wanted = weights @ doubles[2]
    pairs = [(y, wanted)]
    pairs += zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(wanted, doubles, dy.double()), strict=True)
    for found, exact in pairs:
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() / exact.norm() < 0.02


def test_time_waves_start_with_cosines():
    waves = _sinusoids(torch.tensor([0.0, torch.pi]), 4)
    torch.testing.assert_close(waves[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(waves[1, [0, 2]], torch.tensor([-1.0, 0.0]), atol=1e-6, rtol=0)
    assert _sinusoids(torch.zeros(2), 5).shape == (2, 5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attention": (True,)}, "one entry for each level"),
        ({"block_out_channels": (), "attention": ()}, "at least one level"),
        ({"block_out_channels": (64, 100, 256)}, "multiple of norm_num_groups"),
        ({"attention_head_dim": 48}, "does not divide a level of 128 channels"),
        ({"resnet_time_scale_shift": "spatial"}, "scale_shift"),
        ({"layers_per_block": 0}, "at least 1"),
    ],
)
def test_impossible_configs_are_refused_in_words(changes, words):
    with pytest.raises(UsageError, match=words):
        UNetConfig(**changes)


def test_labels_are_given_exactly_when_the_net_has_them():
    images, times, labels = example(TINY)
    with pytest.raises(UsageError, match="no labels were given"):
        UNet(TINY)(images, times)
    with pytest.raises(UsageError, match="labels were given"):
        UNet(UNetConfig(8, block_out_channels=(32,), attention=(False,), add_attention=False))(images, times, labels)
