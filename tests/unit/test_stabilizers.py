"""Stabilizers against independent float64 computations and closed forms, and as settings of families."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from imagekiln import testing
from imagekiln.config import StabilizeConfig, StabilizeCriticConfig
from imagekiln.core import Batch, Progress
from imagekiln.engine import recipe as recipes
from imagekiln.engine import registry
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets import dcgan, mlp_gan
from imagekiln.nets import stabilizers as stab
from imagekiln.nets.adversarial import cross_entropy_critic
from imagekiln.nets.augmentation import blit


def answers(seed: int, count: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, dtype=torch.float64)


# -- LeCam ------------------------------------------------------------------------------------------------------------


def test_lecam_agrees_with_averages_by_hand():
    """Averages whose weights decay by 0.9 a batch and sum to one, however few batches there were."""
    lecam, history = stab.LeCam(decay=0.9), []
    for step in range(6):
        real, fake = answers(step) + 1, answers(step + 100) - 1
        history.append((float(real.mean()), float(fake.mean())))
        weights = np.array([0.9 ** (step - index) for index in range(step + 1)])
        a_real, a_fake = np.array(history).T @ weights / weights.sum()
        expected = np.mean((real.numpy() - a_fake) ** 2) + np.mean((fake.numpy() - a_real) ** 2)
        assert float(lecam(real, fake)) == pytest.approx(expected, rel=1e-5)


def test_lecam_pulls_answers_towards_the_other_side_and_not_the_averages():
    lecam = stab.LeCam()
    real, fake = answers(0).requires_grad_(), answers(1).requires_grad_()
    lecam(answers(2), answers(3))
    lecam.eval()
    by_real, by_fake = torch.autograd.grad(lecam(real, fake), (real, fake))
    a_real, a_fake = (float(total / lecam.mass) for total in (lecam.sum_real, lecam.sum_fake))
    assert torch.allclose(by_real, 2 * (real.detach() - a_fake) / 5, atol=1e-6)
    assert torch.allclose(by_fake, 2 * (fake.detach() - a_real) / 5, atol=1e-6)


def test_lecam_keeps_its_averages_in_evaluation_mode_and_from_what_is_no_number():
    lecam = stab.LeCam()
    lecam(answers(0), answers(1))
    before = {key: value.clone() for key, value in lecam.state_dict().items()}
    lecam(torch.tensor([math.nan, 1.0]), torch.ones(2))
    lecam.eval()(answers(2), answers(3))
    assert all(torch.equal(value, before[key]) for key, value in lecam.state_dict().items())
    untouched = stab.LeCam().eval()
    assert float(untouched(torch.tensor([2.0]), torch.tensor([3.0]))) == 13.0


# -- answers and features ---------------------------------------------------------------------------------------------


def test_consistency_is_a_mean_square_with_gradients_on_both_sides():
    a, b = answers(0).requires_grad_(), answers(1).requires_grad_()
    value = stab.consistency(a, b)
    assert float(value.detach()) == pytest.approx(float(np.mean((a.detach().numpy() - b.detach().numpy()) ** 2)))
    by_a, by_b = torch.autograd.grad(value, (a, b))
    assert torch.equal(by_a, -by_b) and torch.allclose(by_a, 2 * (a - b).detach() / 5)


def test_exchanged_labels_are_exchanged_in_pairs_and_as_often_as_asked():
    real, fake = torch.arange(2000.0), -torch.arange(2000.0) - 1
    torch.manual_seed(0)
    a, b = stab.exchange_labels(real, fake, 0.1)
    swapped = a != real
    assert torch.equal(a[swapped], fake[swapped]) and torch.equal(b[swapped], real[swapped])
    assert torch.equal(b[~swapped], fake[~swapped])
    assert abs(float(swapped.float().mean()) - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 2000)
    state = torch.get_rng_state()
    assert stab.exchange_labels(real, fake, 0.0) == (real, fake) and torch.equal(state, torch.get_rng_state())


def test_exchanged_labels_are_smoothing_on_average():
    """Over pairs with equal answers, exchanging a share s is cross-entropy with both targets smoothed by s."""
    torch.manual_seed(0)
    real, fake, share = torch.full((50_000,), 1.5), torch.full((50_000,), -0.5), 0.2
    noisy = cross_entropy_critic(*stab.exchange_labels(real, fake, share))
    smooth = cross_entropy_critic(real, fake, smooth_real=share, smooth_fake=share)
    assert float(noisy) == pytest.approx(float(smooth), abs=5 * 2 * math.sqrt(share * (1 - share) / 50_000))


def test_targets_may_be_smoothed_picture_by_picture():
    real, fake, shares = answers(0), answers(1), torch.rand(5, dtype=torch.float64) * 0.3
    together = cross_entropy_critic(real, fake, smooth_real=shares)
    alone = [
        cross_entropy_critic(real[i : i + 1], fake[i : i + 1], smooth_real=float(shares[i])) for i in range(len(real))
    ]
    assert float(together) == pytest.approx(float(torch.stack(alone).mean()))


def test_feature_matching_is_the_squared_distance_of_means():
    torch.manual_seed(0)
    real, fake = torch.randn(4, 7, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    real.requires_grad_()
    value = stab.feature_matching(real, fake)
    gap = real.detach().numpy().mean(0) - fake.detach().numpy().mean(0)
    assert float(value.detach()) == pytest.approx(float(gap @ gap))
    value.backward()
    assert real.grad is None and np.allclose(fake.grad.numpy(), np.tile(-2 * gap / 6, (6, 1)))


def test_minibatch_discrimination_agrees_with_loops():
    torch.manual_seed(0)
    layer = stab.MinibatchDiscrimination(4, kernels=3, dims=2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    kernels = np.tensordot(x.numpy(), layer.weight.detach().numpy(), axes=1)
    expected = np.zeros((5, 3))
    for i in range(5):
        for j in range(5):
            for k in range(3):
                expected[i, k] += (i != j) * math.exp(-np.abs(kernels[i, k] - kernels[j, k]).sum())
    found = layer(x)
    assert torch.equal(found[:, :4], x) and np.allclose(found[:, 4:].detach().numpy(), expected)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),), fast_mode=True)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_instance_noise_has_its_deviation_and_fades():
    torch.manual_seed(0)
    images = torch.ones(64, 3, 16, 16)
    noise = stab.instance_noise(images, 0.3) - images
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.3 / math.sqrt(count)
    assert abs(float(noise.var()) / 0.09 - 1) < 5 * math.sqrt(2 / count)
    state = torch.get_rng_state()
    assert stab.instance_noise(images, stab.fading(0.3, 1.0)) is images
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_are_mirrored_and_shifted_and_nothing_else():
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 16, 8)
    ways = torch.cartesian_prod(torch.arange(2), torch.arange(-2, 3), torch.arange(-1, 2))
    flip, down, right = ways.unbind(1)
    possible = blit(picture.expand(30, -1, -1, -1), flip > 0, torch.zeros_like(flip), down, right)
    changed = stab.mirrored_and_shifted(picture.expand(300, -1, -1, -1))
    same = (changed[:, None] == possible).flatten(2).all(2)
    assert same.any(1).all() and same.any(0).all()  # no other way, and every way


# -- in a game --------------------------------------------------------------------------------------------------------


def test_what_is_off_draws_nothing_computes_nothing_and_keeps_nothing():
    for config in (StabilizeConfig(), StabilizeCriticConfig()):
        stabilize, images = stab.Stabilizers(config), torch.rand(2, 3, 8, 8)
        on_real, on_fake, state = answers(0), answers(1), torch.get_rng_state()
        assert stabilize.seen(images, 0.5) is images
        assert stabilize.exchanged(on_real, on_fake) == (on_real, on_fake)
        assert stabilize.penalty(None, (images, images), (on_real, on_fake)) == 0  # type: ignore[arg-type]
        assert not stabilize.state_dict()
        assert torch.equal(state, torch.get_rng_state())


def test_lecam_and_consistency_are_added_with_their_weights_for_real_pictures_and_fakes():
    torch.manual_seed(0)
    seen, asked = (torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)), []

    def critic(images: torch.Tensor) -> torch.Tensor:
        asked.append(images)
        return images[:, 0, 0, 0]

    said = [critic(images) for images in seen]
    total = stab.Stabilizers(StabilizeConfig(lecam=0.3, consistency=10.0)).penalty(critic, seen, said)
    expected = 0.3 * stab.LeCam()(*said)
    for before, after in zip(said, asked[2:], strict=True):
        expected = expected + 10 * (before - after[:, 0, 0, 0]).square().mean()
    assert float(total) == pytest.approx(float(expected), rel=1e-6)


# -- the start --------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, 4), nn.Linear(64, 48)
    return nn.Sequential(*layers, nn.Embedding(50, 40))


@pytest.mark.parametrize(
    ("scheme", "variance"),
    [
        ("normal", lambda fan_in, fan_out: 0.02**2),
        ("xavier", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        ("he", lambda fan_in, fan_out: 2 / fan_in),
    ],
)
def test_initial_weights_have_the_variance_of_their_scheme(scheme, variance):
    net = stab.initialize(network(), scheme)
    for layer, fans in ((net[0], (16 * 9, 32 * 9)), (net[3], (64, 48))):
        assert float(layer.weight.detach().var()) == pytest.approx(variance(*fans), rel=0.15)
        assert not layer.bias.any()
    assert float(net[4].weight.detach().std()) < 0.3  # torch's own are of deviation 1
    assert torch.equal(net[1].weight, torch.ones(32))


def test_orthogonal_rows_are_perpendicular():
    net = stab.initialize(network(), "orthogonal")
    for layer in (net[0], net[2], net[3]):
        rows = layer.weight.flatten(1)
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def test_weights_that_are_computed_and_unknown_schemes_are_refused():
    with pytest.raises(UsageError, match="computed weight"):
        stab.initialize(nn.Sequential(spectral_norm(nn.Linear(3, 3))), "he")
    with pytest.raises(UsageError, match="choose orthogonal"):
        stab.initialize(nn.Linear(3, 3), "lecun")  # type: ignore[arg-type]


# -- in families ------------------------------------------------------------------------------------------------------


def built(name: str, **settings):
    torch.manual_seed(0)
    return recipes.build(testing._recipe(name, {"family": settings}), testing.SHAPE, testing.CLASSES)


def critic_loss(family, fraction: float = 0.0):
    """The discriminator's loss, and its logits of real pictures and of fakes."""
    torch.manual_seed(1)
    batch, logits = Batch(torch.rand(6, *testing.SHAPE), torch.arange(6) % 3), []
    handle = family.discriminator.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    loss = family.loss("discriminator", batch, Progress(int(1000 * fraction), 1000))
    handle.remove()
    return float(loss.total.detach()), *torch.cat(logits).double().chunk(2)


@pytest.mark.parametrize("name", ["dcgan", "cgan", "vanilla_gan"])
def test_smoothed_targets_of_families(name):
    settings = {"objective": "non-saturating"} if name == "cgan" else {}
    total, real, fake = critic_loss(built(name, smooth_real=0.1, smooth_fake=0.05, **settings))
    sure_real, sure_fake = real.sigmoid().log(), (-fake).sigmoid().log()
    expected = -(0.9 * sure_real + 0.1 * (-real).sigmoid().log()).mean()
    expected -= (0.95 * sure_fake + 0.05 * fake.sigmoid().log()).mean()
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_the_hinge_loss_has_no_targets_to_smooth():
    with pytest.raises(RecipeError, match="non-saturating"):
        built("cgan", smooth_real=0.1)


@pytest.mark.parametrize("name", ["dcgan", "sngan", "biggan"])
def test_lecam_of_families_is_added_and_its_averages_are_kept(name):
    plain, _, _ = critic_loss(built(name))
    family = built(name, stabilize={"lecam": 0.3})
    total, real, fake = critic_loss(family)
    penalty = (real - fake.mean()).square().mean() + (fake - real.mean()).square().mean()
    assert total == pytest.approx(plain + 0.3 * float(penalty), rel=1e-4)
    assert float(family.state_dict()["stabilize.lecam.mass"]) == pytest.approx(0.01)
    assert not any("lecam" in key for key in built(name).state_dict())


@pytest.mark.parametrize("name", ["dcgan", "vanilla_gan"])
def test_instance_noise_of_families_is_gone_at_the_end_of_the_run(name):
    plain, noisy = built(name), built(name, stabilize={"instance_noise": 0.5})
    assert critic_loss(plain, 1.0)[0] == critic_loss(noisy, 1.0)[0]
    assert critic_loss(plain, 0.0)[0] != critic_loss(noisy, 0.0)[0]
    seen = []
    noisy.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    critic_loss(noisy, 0.5)
    torch.manual_seed(1)
    noise = seen[0] - torch.rand(6, *testing.SHAPE)
    assert float(noise.std()) == pytest.approx(0.25, rel=5 / math.sqrt(2 * noise.numel()))


STABILIZERS = {"instance_noise": 0.5, "lecam": 1.0, "consistency": 10.0, "label_noise": 0.4}
ADVERSARIAL = [name for name in registry.names() if "stabilize" in registry.load(name).Config.model_fields]


def test_every_game_of_two_networks_has_augmentation_and_stabilizers():
    families = {name: registry.load(name) for name in registry.names()}
    games = [name for name, kind in families.items() if getattr(kind, "averaged", ()) == ("generator",)]
    assert games == ADVERSARIAL
    assert all("augment" in families[name].Config.model_fields for name in games)


def trained(name: str, folder: Path, steps: int = 2, **settings):
    """A trainer after so many steps of two; the first step of Adam knows nothing but signs."""
    small = {"width": 8} if name in ("dcgan", "cgan", "sngan", "wgan", "vanilla_gan") else {}
    once = {"critic_steps": 1} if "critic_steps" in registry.load(name).Config.model_fields else {}
    trainer = testing._trainer(name, folder, steps=2, settings={"family": {**small, **once, **settings}})
    for _ in range(steps):
        trainer.step()
    return trainer


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_no_stabilizer_of_a_family_is_a_dead_setting(name, tmp_path):
    fields = registry.load(name).Config.model_fields["stabilize"].annotation.model_fields
    assert set(fields) == set(STABILIZERS) or set(fields) == set(STABILIZERS) - {"label_noise"}
    plain = trained(name, tmp_path / "plain")
    opponent = plain.family.phases[0].trains[0]
    before = plain.family.get_submodule(opponent).state_dict()
    for field in fields:
        trainer = trained(name, tmp_path / field, stabilize={field: STABILIZERS[field]})
        after = trainer.family.get_submodule(opponent).state_dict()
        assert all(value.isfinite().all() for value in after.values()), field
        assert any(not torch.equal(value, before[key]) for key, value in after.items()), field
        assert all(math.isfinite(float(values[-1])) for values in trainer._sums.values()), field


def test_a_run_with_all_of_them_is_continued_in_the_same_bits(tmp_path):
    settings = {"stabilize": STABILIZERS, "objective": "feature-matching", "minibatch_kernels": 4}
    whole = trained("dcgan", tmp_path / "whole", **settings)
    trained("dcgan", tmp_path / "parts", 1, **settings).time_event("checkpoint")
    second = trained("dcgan", tmp_path / "parts", 0, **settings)
    assert second.restore()
    second.step()
    testing._require_equal(whole, second, "the continued run differs")


@pytest.mark.parametrize("setting", ["lecam", "instance_noise"])
def test_a_setting_that_is_in_a_section_is_found_there(setting):
    with pytest.raises(RecipeError, match=rf"no such setting. Did you mean 'family.stabilize.{setting}'\?"):
        built("dcgan", **{setting: 0.3})


def test_a_wasserstein_critic_has_no_labels_that_could_be_wrong():
    with pytest.raises(RecipeError, match=r"family.stabilize.label_noise: no such setting"):
        built("wgan_gp", stabilize={"label_noise": 0.1})


@pytest.mark.parametrize("name", ["dcgan", "vanilla_gan"])
def test_feature_matching_is_a_generators_objective(name):
    family, given = built(name, objective="feature-matching"), []
    family.discriminator.requires_grad_(False)
    compute = family.discriminator.features
    family.discriminator.features = lambda *inputs: given.append(compute(*inputs)) or given[-1]
    loss = family.loss("generator", Batch(torch.rand(6, *testing.SHAPE), torch.arange(6) % 3), Progress(0, 1000)).total
    real, fake = (features.detach().double().mean(0) for features in given)
    assert float(loss.detach()) == pytest.approx(float((real - fake).square().sum()), rel=1e-4)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in family.generator.parameters())


def test_features_are_what_the_logit_is_linear_in():
    torch.manual_seed(0)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, -1])
    net = dcgan.Discriminator((3, 16, 16), 8, 3).eval()
    maps, products = net.features(images, labels).split([16 * 4 * 4, 16], dim=1)
    logits = net.main[-1](maps.view(4, 16, 4, 4)).flatten() + products.sum(1)
    assert torch.allclose(logits, net(images, labels), atol=1e-6)
    net = mlp_gan.Discriminator((3, 16, 16), 8, 3)
    assert torch.equal(net.main[-1](net.features(images, labels)).flatten(), net(images, labels))


@pytest.mark.parametrize("nets", [dcgan, mlp_gan])
def test_minibatch_discrimination_tells_a_batch_of_copies(nets):
    torch.manual_seed(0)
    images, shape = torch.rand(4, 3, 16, 16), (3, 16, 16)
    copies = images[:1].expand(4, -1, -1, -1)
    plain, net = nets.Discriminator(shape, 8).eval(), nets.Discriminator(shape, 8, minibatch_kernels=5).eval()
    net(images).sum().backward()
    assert all(weight.grad is not None for weight in net.parameters())
    with torch.no_grad():
        assert float(plain(copies)[0]) == pytest.approx(float(plain(images)[0]), abs=1e-5)
        assert abs(float(net(copies)[0]) - float(net(images)[0])) > 1e-3
    features = net.minibatch.weight.shape[0]
    assert count(net) - count(plain) == features * 5 * 5 + 5


def count(net: nn.Module) -> int:
    return sum(weight.numel() for weight in net.parameters())
