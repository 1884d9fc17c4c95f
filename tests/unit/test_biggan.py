"""BigGAN: published parameter counts, attention and penalties against float64, truncation, standing statistics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import max_pool2d

from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError
from imagekiln.nets.adversarial import orthogonal_penalty
from imagekiln.nets.biggan import Discriminator, Generator, SelfAttention, standing, truncate
from imagekiln.nets.labels import LabelEmbedding

SHAPES = [(1, 8, 8), (3, 16, 16), (1, 28, 28), (3, 32, 32), (3, 24, 28), (3, 64, 64)]


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def null_rows(net: torch.nn.Module) -> int:
    """Parameters of "anything", which the published networks do not know."""
    return sum(m.table.weight.shape[1] for m in net.modules() if isinstance(m, LabelEmbedding))


def family(shape=(3, 16, 16), num_classes: int = 3, **settings):
    small = {"z_dim": 9, "width": 2, "critic_width": 2, "shared_dim": 5}
    torch.manual_seed(0)
    return recipes.build(recipes.resolve("biggan", {"family": {**small, **settings}}), shape, num_classes)


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"hierarchical": False}, {"hierarchical": False, "shared_dim": 0}], ids=str)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_way_to_condition_draws_and_learns(num_classes, settings):
    gan = family((1, 8, 8), num_classes, attention_at="full", **settings)
    labels = torch.tensor([0, 2, -1, 1]) if num_classes else None
    images = gan.generator(torch.randn(4, 9), labels)
    logits = gan.discriminator(images, labels)
    assert images.shape == (4, 1, 8, 8) and images.abs().max() <= 1 and logits.shape == (4,)
    logits.square().sum().backward()
    for net in (gan.generator, gan.discriminator):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("attention", ["full", "half", "quarter"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_and_place_of_attention(shape, attention):
    gan = family(shape, 0, attention_at=attention)
    assert gan.discriminator(gan.generator(torch.randn(2, 9))).shape == (2,)


def test_attention_stands_where_the_map_is():
    places = {"full": 1, "half": 0}
    for attention, after in places.items():
        assert family((3, 16, 16), attention_at=attention).generator.attention_after == after
    assert family((3, 16, 16), attention_at="quarter").generator.attention is None  # 4 x 4 is where the blocks begin
    with_attention = [
        any(isinstance(m, SelfAttention) for m in family((3, 16, 16), attention_at=name).discriminator.modules())
        for name in ("none", "full", "half", "quarter")
    ]
    assert with_attention == [False, False, True, True]


def test_labels_and_every_piece_of_z_matter():
    gan = family().eval()
    z = torch.randn(1, 9)
    picture = gan.generator(z, torch.tensor([0]))
    assert torch.equal(gan.generator(z), gan.generator(z, torch.tensor([-1])))
    assert not torch.allclose(gan.generator(z, torch.tensor([1])), picture)
    assert gan.generator.chunks == [3, 3, 3]
    for place in (0, 3, 6):
        other = z.clone()
        other[0, place] += 1
        assert not torch.allclose(gan.generator(other, torch.tensor([0])), picture)


def test_impossible_networks_are_refused():
    with pytest.raises(RecipeError, match=r"z_dim = 2: .* at least 3"):
        family(z_dim=2)
    with pytest.raises(RecipeError, match="shared_dim = 0"):
        family(shared_dim=0)
    with pytest.raises(RecipeError, match=r"30 x 30 .*data\.size"):
        family((3, 30, 30))


def test_orthogonal_initialisation_is_orthogonal():
    for matrix in Generator(9, (3, 16, 16), 2, num_classes=3, shared_dim=5).matrices():
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)


# -- mathematics ------------------------------------------------------------------------------------------------------


def test_attention_is_the_published_formula():
    torch.manual_seed(0)
    layer = SelfAttention(16).double().eval()
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    weights = {name: getattr(layer, name).weight[:, :, 0, 0] for name in ("query", "key", "value", "out")}
    expected = x.clone()
    for b in range(2):
        f, g, h = (torch.einsum("oc,chw->ohw", weights[name], x[b]) for name in ("query", "key", "value"))
        g, h = (max_pool2d(part[None], 2)[0].flatten(1) for part in (g, h))
        for row in range(4):
            for column in range(6):
                score = torch.exp(f[:, row, column] @ g)
                expected[b, :, row, column] += 0.7 * weights["out"] @ (h @ (score / score.sum()))
    # The layer's softmax is in float32 whatever the input.
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_orthogonal_penalty_is_that_of_the_shorter_side():
    gan = family()
    expected = 0.0
    for module in gan.generator.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            w = module.parametrizations.weight.original.detach().double().flatten(1) * 1.3 + 0.1
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            expected += float((gram - torch.diag(gram.diagonal())).square().sum())
    with torch.no_grad():
        for module in gan.generator.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.parametrizations.weight.original.mul_(1.3).add_(0.1)
    gan.requires_grad_(False)
    assert float(orthogonal_penalty(gan.generator.matrices())) == pytest.approx(expected, rel=1e-4)


def test_the_generator_pays_for_what_is_not_orthogonal():
    batch, totals = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, -1])), []
    for weight in (0.0, 0.5):
        gan = family(orthogonal_weight=weight, init="xavier")
        torch.manual_seed(1)
        loss = gan.loss("generator", batch, Progress(0, 1))
        totals.append(loss.total)
    penalty = loss.parts["orthogonal"].item()
    assert penalty > 1
    assert (totals[1] - totals[0]).item() == pytest.approx(0.5 * penalty, rel=1e-4)


def test_second_derivatives_of_the_critic_are_right():
    critic = Discriminator((1, 8, 8), 1, attention="half").double().eval()
    with torch.no_grad():
        for module in critic.modules():
            if isinstance(module, SelfAttention):
                module.gamma.fill_(0.5)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)

    def slope(x):
        return torch.autograd.grad(critic(x).sum(), x, create_graph=True)[0]

    direction, step = torch.randn_like(images), 1e-5
    (exact,) = torch.autograd.grad((slope(images) * direction).sum(), images)
    measured = (slope(images + step * direction) - slope(images - step * direction)) / (2 * step)
    # Pooling and ReLU have kinks, which this step does not cross; the softmax is in float32.
    torch.testing.assert_close(exact, measured, atol=2e-3, rtol=2e-2)


# -- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.0, 2.0])
def test_truncated_noise_has_the_distribution_of_drawing_again(threshold):
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = truncate(noise, threshold)
    assert cut.abs().max() <= threshold
    inside = math.erf(threshold / math.sqrt(2))
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * threshold * density / inside
    assert float(cut.var()) == pytest.approx(variance, rel=0.02)
    redrawn = noise[noise.abs() <= threshold]
    for share in (0.1, 0.25, 0.5, 0.9):
        assert float(cut.quantile(share)) == pytest.approx(float(redrawn.quantile(share)), abs=0.03 * threshold)


def test_truncation_is_monotone_and_ends_at_the_identity():
    noise = torch.linspace(-4, 4, 101)
    assert (truncate(noise, 0.7).diff() > 0).all()
    torch.testing.assert_close(truncate(noise, 8.0), noise, atol=1e-5, rtol=1e-5)
    assert truncate(torch.tensor([40.0, -40.0]), 8.0).tolist() == [8.0, -8.0]


def test_standing_statistics_are_the_means_over_the_batches():
    torch.manual_seed(0)
    generator = Generator(9, (1, 8, 8), 2, num_classes=3, shared_dim=5)
    inputs = [(torch.randn(16, 9), torch.randint(3, (16,))) for _ in range(3)]
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    twin = standing(generator, inputs)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    seen = []
    hook = twin.blocks[0].first_norm.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for z, labels in inputs:
            twin(z, labels)
    hook.remove()
    norm = twin.blocks[0].first_norm.norm
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean.double(), means, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), variances, atol=1e-6, rtol=1e-5)


def test_pictures_follow_the_weights_the_truncation_and_nothing_else():
    gan = family(sample={"standing": 2}).eval().requires_grad_(False)
    noise, condition = seeded_noise([1, 2], gan.noise_shape()), Condition(torch.tensor([0, 1]))
    first = gan.sample(noise, condition)
    with torch.no_grad():  # running statistics of training have no say
        for module in gan.generator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.add_(3.0)
    assert torch.equal(gan.sample(noise, condition), first)
    assert torch.equal(copy.deepcopy(gan).sample(noise, condition), first)
    options = type(gan.config.sample)
    plain = gan.sample(noise, condition, options(standing=0))
    cut = gan.sample(noise, condition, options(standing=2, truncation=0.5))
    assert not torch.allclose(plain, first) and not torch.allclose(cut, first)
    assert torch.equal(gan.sample(noise, condition), first)
    with torch.no_grad():
        gan.generator.last.parametrizations.weight.original.neg_()
        gan.generator.last.bias.add_(0.1)
    assert not torch.allclose(gan.sample(noise, condition), first)


def test_less_noise_is_less_variety():
    gan = family(num_classes=0).eval().requires_grad_(False)
    noise, options = seeded_noise(range(32), gan.noise_shape()), type(gan.config.sample)
    spread = [float(gan.generator(truncate(noise, threshold)).std(dim=0).mean()) for threshold in (0.1, 0.5, 2.0)]
    assert spread[0] < spread[1] < spread[2]
    assert options().truncation == 0
