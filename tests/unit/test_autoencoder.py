"""Autoencoder: counts and outputs of diffusers' classes, the loss against closed forms, discriminator, latents."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from imagekiln.core import Batch, Condition, HeldOut, Progress, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError, UsageError
from imagekiln.families.autoencoder import RAMP, SMALLEST_ERROR, Autoencoder, AutoencoderConfig
from imagekiln.families.classifier import Classifier, ClassifierConfig
from imagekiln.families.vae import Vae, VaeConfig
from imagekiln.metrics import Regression
from imagekiln.nets import latent_autoencoder as nets
from imagekiln.nets.patch_discriminator import PatchDiscriminator, smallest_side
from imagekiln.nets.vgg import Vgg16

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

KINDS = ("kl", "tiny", "vq")
COARSENESS = [(1, 32, 32, 2), (3, 64, 32, 4), (4, 128, 128, 8), (3, 32, 16, 16), (3, 64, 64, 32)]
SMALL = {"width": 8, "blocks": 1, "num_codes": 6, "adversarial_start_fraction": 0.0}


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def family(kind: str = "kl", image_shape: tuple[int, int, int] = (3, 16, 16), **settings) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(kind=kind, **{**SMALL, **settings}), image_shape, 0)


def images(count: int = 4, shape: tuple[int, int, int] = (3, 16, 16), seed: int = 1) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def judge(channels: int = 3, width: int = 8) -> Classifier:
    torch.manual_seed(5)
    return Classifier(ClassifierConfig(width=width), (channels, 16, 16), 3).eval().requires_grad_(False)


def late(fraction: float = 1.0) -> Progress:
    return Progress(round(1000 * fraction), 1000)


# -- the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_discriminator_without_normalisation_sees_contrast(seed):
    torch.manual_seed(seed)
    plain, normed = (PatchDiscriminator(3, 16, 2, normalised=normalised) for normalised in (False, True))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    assert count(normed) - count(plain) == 32 + 64, "gain and offset became one bias"
    x = images(8, (3, 32, 32))
    seen = [((net(x) - net(0.5 * x)).square().mean() / net(x).var()).item() for net in (plain, normed)]
    assert seen[0] > 2 * seen[1]


def twin_of(kind: str, model: Autoencoder):
    """A stock instance of the same class with the same weights."""
    stock = {"kl": diffusers.AutoencoderKL, "tiny": diffusers.AutoencoderTiny, "vq": diffusers.VQModel}[kind]
    twin = stock.from_config(dict(model.network.config)).eval()
    extra = (model.codebook.codes, None) if kind == "vq" else (None, model.moments)
    twin.load_state_dict(nets.diffusers_state_dict(model.network, *extra), strict=True)
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("factor", "sides"), [(4, (16, 24)), (16, (32, 48))])
def test_equals_diffusers(kind, channels_last, factor, sides):
    model = family(kind, (3, *sides), factor=factor, width=16, latent_channels=5).eval().requires_grad_(False)
    for parameter in model.parameters():  # so that no bias is zero and no group alike
        parameter.add_(0.05 * torch.randn_like(parameter))
    model.moments.mean.copy_(torch.linspace(-0.5, 0.5, 5))
    model.moments.square.copy_(torch.linspace(1.0, 3.0, 5))
    if channels_last:
        model.to(memory_format=torch.channels_last)
    twin, x = twin_of(kind, model), images(3, (3, *sides))
    with torch.no_grad():
        encoded = twin.encode(x)
        latents = {"kl": lambda: encoded.latent_dist.mode(), "tiny": lambda: encoded.latents}.get(
            kind, lambda: encoded.latents
        )()
        decoded = twin.decode(latents).sample
    torch.testing.assert_close(model.encode(x), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.decode(latents), decoded.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)))


def test_gradients_equal_diffusers():
    model = family("kl", width=16).to(memory_format=torch.channels_last)
    twin, x = twin_of("kl", model).train(), images()
    nets.pictures(model.network, nets.moments(model.network, x)[0]).square().mean().backward()
    twin.decode(twin.encode(x).latent_dist.mode()).sample.square().mean().backward()
    theirs = dict(twin.named_parameters())
    for key, parameter in model.network.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, atol=1e-6, rtol=1e-3, msg=key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "rows", "columns", "factor"), COARSENESS)
def test_every_shape(kind, channels, rows, columns, factor):
    model = family(kind, (channels, rows, columns), factor=factor, latent_channels=3).eval().requires_grad_(False)
    x = images(2, (channels, rows, columns))
    assert model.latent_shape == model.noise_shape() == (3, rows // factor, columns // factor)
    assert model.encode(x).shape == (2, *model.latent_shape) and model.reconstruct(x).shape == x.shape
    drawn = model.sample(seeded_noise([1, 2], model.noise_shape()), Condition())
    assert drawn.shape == x.shape and float(drawn.abs().max()) <= 1


def test_impossible_sizes_are_refused_with_a_way_out():
    with pytest.raises(RecipeError, match=r"30 x 30 .* multiples of 4\. Set data\.size, for example to 28"):
        family(image_shape=(3, 30, 30))
    with pytest.raises(RecipeError, match=r"4 x 4 .* at least 6\. Set it to 0, or data\.size higher"):
        family(image_shape=(3, 4, 4))
    assert family(image_shape=(3, 4, 4), adversarial_weight=0).latent_shape == (4, 1, 1)


def test_without_diffusers_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"classes of diffusers.*pip install 'imagekiln\[sd\]'\.$"):
        family()


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_reconstruction_and_nats_are_the_closed_forms():
    model, x = family(adversarial_weight=0, kl_weight=0.3), images()
    torch.manual_seed(3)
    loss = model.loss("reconstruct", Batch(x), late())
    raw, logvar = (part.detach().double() for part in nets.moments(model.network, x))
    mean = (raw - raw.mean((0, 2, 3), keepdim=True)) / (raw.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    nats = torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1).mean()
    torch.manual_seed(3)
    z = mean.float() + (logvar / 2).exp().float() * torch.randn(mean.shape)
    absolute = (x - nets.pictures(model.network, z)).abs().double().mean()
    assert loss.parts["latent_nats"].item() == pytest.approx(nats.item(), rel=1e-5)
    assert loss.parts["absolute_error"].item() == pytest.approx(absolute.item(), rel=1e-5)
    # The paper sums over the picture's numbers; ours is that sum over their count.
    assert loss.total.item() * x[0].numel() == pytest.approx((absolute * x[0].numel() + 0.3 * nats).item(), rel=1e-5)


def test_tiny_pays_nothing_for_its_latents():
    model, x = family("tiny", adversarial_weight=0, kl_weight=2.0), images()
    loss = model.loss("reconstruct", Batch(x), late())
    assert torch.equal(loss.total, loss.parts["absolute_error"]) and float(loss.parts["latent_nats"]) == 0


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_are_standardised_by_the_batch_and_then_by_all_batches(kind):
    model, x = family(kind).train(), images(8)
    with torch.no_grad():
        latents = model._encode(x).mean
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        assert (latents.var((0, 2, 3), unbiased=False) <= 1).all()
        model.after_step(late())
    torch.testing.assert_close(model.eval().encode(x), latents, atol=1e-4, rtol=1e-3)


def test_codes_are_learned_from_reconstructions_alone():
    model, x = family("vq").train(), images()
    loss = model.loss("reconstruct", Batch(x), late(0.0))
    model.after_step(late(0.0))
    expected = loss.parts["absolute_error"] + 0.25 * loss.parts["commitment"]
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6) and bool(model.codebook.started)
    before = copy.deepcopy(model.codebook.state_dict())
    model.loss("discriminate", Batch(x), late())
    model.after_step(late())
    assert all(torch.equal(value, before[key]) for key, value in model.codebook.state_dict().items())


def test_decoding_takes_the_nearest_codes():
    model = family("vq").eval().requires_grad_(False)
    z = model.encode(images())
    rows = z.double().movedim(1, -1).flatten(0, 2)
    nearest = model.codebook.codes[torch.cdist(rows, model.codebook.codes.double()).argmin(1)]
    quantised = nearest.unflatten(0, (len(z), *z.shape[2:])).movedim(-1, 1)
    torch.testing.assert_close(model.decode(z), model.decode(quantised))


# -- the distance in a judge's maps -----------------------------------------------------------------------------------


def test_maps_of_a_classifier_end_in_its_features():
    model, x = judge(), images()
    maps = model.maps(x)
    torch.testing.assert_close(maps[-1].mean((2, 3)), model.features(x))
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 16), (8, 8), (4, 4)]


def test_the_distance_is_the_closed_form_and_teaches_the_decoder_alone():
    model, x = family(adversarial_weight=0, perceptual="runs/judge", perceptual_weight=2.0), images()
    model.companion["perceptual"] = judge()
    torch.manual_seed(3)
    loss = model.loss("reconstruct", Batch(x), late())
    torch.manual_seed(3)
    y = nets.pictures(model.network, model._encode(x).latents).detach()
    layers = []
    for a, b in zip(model.companion["perceptual"].maps(x), model.companion["perceptual"].maps(y), strict=True):
        a, b = (F.normalize(part.double(), dim=1, eps=1e-3) for part in (a, b))
        layers.append((a - b).square().sum(1).mean((1, 2)))
    expected = torch.stack(layers).mean().item()
    assert loss.parts["perceptual"].item() == pytest.approx(expected, rel=1e-3)
    total = loss.parts["absolute_error"] + 2.0 * loss.parts["perceptual"]
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-4)  # and what the nats cost
    loss.total.backward()
    assert all(parameter.grad is None for parameter in model.companion["perceptual"].parameters())
    assert not any(key.startswith("companion") for key in model.state_dict())
    assert float(model._distance(x, x).abs().max()) == 0 and float(model._distance(x, -x).min()) > 0


@pytest.mark.parametrize("side", [16, 8])
def test_with_learned_weights_of_channels_the_distance_is_lpips(side):
    torch.manual_seed(2)
    vgg = Vgg16((3, side, side), (4, 4, 6, 6, 8), weighted=True).requires_grad_(False)
    for weights in vgg.features.parameters():  # maps as large as those of the published network
        torch.nn.init.normal_(weights, std=0.3)
    for weights in vgg.channel_weights:
        weights.copy_(torch.rand_like(weights))
    model = family(perceptual="vgg16.safetensors")
    x, y = (images(shape=(3, side, side), seed=seed) for seed in (1, 2))
    model.companion["perceptual"] = vgg
    maps = [[F.normalize(one.double(), dim=1) for one in vgg.maps(pictures)] for pictures in (x, y)]
    triples = zip(*maps, vgg.channel_weights, strict=False)
    terms = [F.conv2d((a - b).square(), weights.double()).mean((1, 2, 3)) for a, b, weights in triples]
    assert len(terms) == (5 if side == 16 else 4)
    torch.testing.assert_close(model._distance(x, y).double(), sum(terms), atol=0, rtol=1e-3)


def test_the_distance_is_smooth_where_a_map_is_empty():
    model, x = family(perceptual="runs/judge"), torch.zeros(2, 3, 16, 16)
    model.companion["perceptual"] = judge()
    for parameter in model.companion["perceptual"].parameters():
        parameter.zero_()
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model._distance(x, y).sum(), y)
    assert torch.equal(slope, torch.zeros_like(slope))


def test_a_judge_that_does_not_fit_is_refused():
    model, x = family(perceptual="runs/judge"), images()
    drawing = Vae(VaeConfig(width=8), (3, 16, 16), 0)
    for companion, words in (
        (None, "was not loaded"),
        (drawing, "a vae model has no maps"),
        (judge(channels=1), "pictures with 1 channels, these have 3"),
    ):
        model.companion = {} if companion is None else {"perceptual": companion}
        with pytest.raises(RecipeError, match=rf"family\.perceptual = 'runs/judge': .*{words}"):
            model.held_out(Batch(x), late())


# -- the adversary ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "capped"), [(1e6, False), (1e-3, True)])
def test_the_adaptive_weight_makes_both_slopes_alike(cap, capped):
    model, x = family(adversarial_weight=0.7, adversarial_cap=cap, perceptual="runs/judge"), images()
    model.companion["perceptual"] = judge()
    model.discriminator.requires_grad_(False)
    parameters = dict(model.network.named_parameters())
    torch.manual_seed(3)
    loss = model.loss("reconstruct", Batch(x), late())
    found = torch.autograd.grad(loss.total, list(parameters.values()))
    torch.manual_seed(3)
    latents, _, (_, nats, weight) = model._encode(x)
    y = nets.pictures(model.network, latents)
    error = (x - y).abs().mean() + model._distance(x, y).mean()
    answer = -model.discriminator(y).mean()
    last = nets.last_layer(model.network)
    slopes = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (error, answer)]
    adaptive = slopes[0] / (slopes[1] + 1e-4)
    assert (adaptive > cap) == capped
    adaptive = adaptive.clamp(max=cap).detach()
    total = error + 0.7 * adaptive * answer + weight * nats
    assert loss.parts["adaptive_weight"].item() == pytest.approx(adaptive.item(), rel=1e-4)
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)
    for key, ours, theirs in zip(parameters, found, torch.autograd.grad(total, list(parameters.values())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3, msg=key)


def test_the_adversary_comes_late_and_is_a_function_of_progress():
    model, x = family(adversarial_start_fraction=0.5).train(), images()
    for fraction, heard in ((0.0, 0.0), (0.5, 0.0), (0.5 + RAMP / 2, 0.5), (0.5 + RAMP, 1.0), (1.0, 1.0)):
        assert model._strength(late(fraction)) == pytest.approx(heard, abs=0.02)
        parts = model.loss("reconstruct", Batch(x), late(fraction)).parts
        assert ("adaptive_weight" in parts) == (heard > 0)
    for fraction, learns in ((0.0, False), (0.4, False), (0.46, True), (1.0, True)):
        model.discriminator.zero_grad()
        loss = model.loss("discriminate", Batch(x), late(fraction))
        loss.total.backward()
        moved = any(p.grad is not None and bool(p.grad.any()) for p in model.discriminator.parameters())
        assert moved == learns and bool(loss.parts) == learns
        assert all(parameter.grad is None for parameter in model.network.parameters())


def test_the_last_moment_is_taken_and_not_the_one_before_the_discriminator_is_heard():
    assert recipes.resolve("autoencoder").train.choose == "last"


def test_without_weight_there_is_no_discriminator():
    model = family(adversarial_weight=0)
    assert [phase.name for phase in model.phases] == ["reconstruct"] and not hasattr(model, "discriminator")
    assert "adversarial" not in model.loss("reconstruct", Batch(images()), late()).parts


def test_critic_loss_is_the_hinge_of_both_sides():
    model, x = family().eval(), images()
    torch.manual_seed(3)
    loss = model.loss("discriminate", Batch(x), late())
    torch.manual_seed(3)
    y = nets.pictures(model.network, model._encode(x).latents)
    real, fake = model.discriminator(x).double(), model.discriminator(y).double()
    expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("layers", "field"), [(2, 34), (3, 70)])
def test_a_logit_sees_one_patch(layers, field):
    net = PatchDiscriminator(1, 4, layers).eval()
    x = torch.rand(1, 1, 128, 128, requires_grad=True)
    logits = net(x)
    middle = logits.shape[-1] // 2
    (slope,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    rows = torch.nonzero(slope[0, 0].abs().sum(1)).flatten()
    assert int(rows[-1] - rows[0]) + 1 == field


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_has_one_patch(layers):
    side, net = smallest_side(layers), PatchDiscriminator(1, 4, layers)
    assert net(torch.zeros(2, 1, side, side)).shape[2:] == (1, 1)
    with pytest.raises(UsageError, match=f"sides of at least {side}"):
        net(torch.zeros(2, 1, side - 1, side))


# -- measuring and drawing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_errors_are_those_of_the_metrics(kind):
    model, x = family(kind).eval(), images()
    found = model.held_out(Batch(x), late())
    assert all(isinstance(value, HeldOut) and value.values.shape == (4,) for value in found.values())
    each = [Regression().update(model.reconstruct(one[None]), one[None]) for one in x]
    for name, attribute in (("mse", "mse"), ("rmse", "rmse"), ("mae", "mae"), ("psnr_db", "psnr")):
        wanted = [getattr(regression, attribute) for regression in each]
        assert found[name].values.tolist() == pytest.approx(wanted, rel=1e-4)
    y = nets.pictures(model.network, model._decodable(model.encode(x)))
    assert found[Autoencoder.monitor].values.tolist() == pytest.approx(
        (x - y).abs().flatten(1).mean(1).tolist(), rel=1e-5
    )


def test_held_out_counts_the_distance_and_not_the_discriminator():
    model, x = family(perceptual="runs/judge", perceptual_weight=3.0).eval(), images()
    model.companion["perceptual"] = judge()
    found = model.held_out(Batch(x), late())
    y = nets.pictures(model.network, model.encode(x))
    expected = (x - y).abs().flatten(1).mean(1) + 3.0 * model._distance(x, y)
    torch.testing.assert_close(found["reconstruction"].values, expected.detach())


def test_decibels_end_at_the_rounding_to_8_bits():
    grid = torch.linspace(-1, 1, 256)
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    rounded = grid.double()[((values + 1) * 127.5).round().long()]
    assert float((values - rounded).square().mean()) == pytest.approx(SMALLEST_ERROR, rel=0.02)


def test_noise_is_drawn_with_the_mean_and_spread_of_the_latents():
    model = family(latent_channels=2).train()
    wanted_mean, wanted_std = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        for _ in range(2):  # a step computed in parts
            noise = torch.randn(8, 2, 4, 4, generator=generator)
            model.moments.see(noise * wanted_std[:, None, None] + wanted_mean[:, None, None])
        model.moments.update()
    spread = model.moments.spread(torch.randn(4000, 2, 4, 4, generator=generator))
    torch.testing.assert_close(spread.mean((0, 2, 3)), wanted_mean, atol=0.15, rtol=0)
    torch.testing.assert_close(spread.std((0, 2, 3)), wanted_std, atol=0, rtol=0.1)
    before = copy.deepcopy(model.moments.state_dict())
    model.moments.see(torch.full((1, 2, 4, 4), math.nan))
    model.moments.update()
    assert all(torch.equal(value, before[key]) for key, value in model.moments.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_learns_in_bfloat16(kind):
    model, x = family(kind, width=8).train().to(memory_format=torch.channels_last), images(4)
    groups = {"reconstruct": model.network, "discriminate": model.discriminator}
    steps = {name: torch.optim.Adam(net.parameters(), 2e-3) for name, net in groups.items()}
    errors = []
    for step in range(30):
        for name, optimizer in steps.items():
            for net in groups.values():
                net.requires_grad_(net is groups[name])
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(name, Batch(x), late(step / 30))
            loss.total.backward()
            assert all(bool(p.grad.isfinite().all()) for p in groups[name].parameters() if p.grad is not None)
            optimizer.step()
            if name == "reconstruct":
                errors.append(loss.parts["absolute_error"].item())
        model.after_step(late(step / 30))
    assert errors[-1] < 0.95 * errors[0]
