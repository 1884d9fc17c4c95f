"""VQ-VAE: networks, quantisation and code-book against closed forms, the prior's probabilities."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from imagekiln.core import Batch, Condition, Progress, seeded_noise
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError
from imagekiln.nets.autoencoder import GridDecoder, GridEncoder
from imagekiln.nets.codebook import Codebook
from imagekiln.nets.token_prior import TokenPrior


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def family(num_classes: int = 0, **settings):
    small = {"width": 8, "num_codes": 6, "code_dim": 3, "prior_width": 16, "prior_layers": 2}
    torch.manual_seed(0)
    return recipes.build(recipes.resolve("vqvae", {"family": {**small, **settings}}), (1, 8, 8), num_classes)


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_every_depth_and_size(halvings):
    encoder, decoder = (net((3, 24, 40), 8, 5, halvings) for net in (GridEncoder, GridDecoder))
    z = encoder(torch.randn(2, 3, 24, 40))
    assert z.shape == (2, 5, 24 >> halvings, 40 >> halvings) and decoder(z).shape == (2, 3, 24, 40)


@pytest.mark.parametrize("settings", [{"blocks": 1}, {"blocks": 3, "wide": True}], ids=str)
def test_blocks_are_as_many_and_as_wide_as_asked_for(settings):
    for net in (GridEncoder((3, 8, 8), 8, 5, **settings), GridDecoder((3, 8, 8), 8, 5, **settings)):
        inside = 8 if settings.get("wide") else 2
        assert [block.conv1.out_channels for block in net.blocks] == [inside] * settings["blocks"]
        assert all((block.conv2.bias is None) == ("wide" in settings) for block in net.blocks)


def test_impossible_sizes_are_refused_with_a_way_out():
    with pytest.raises(RecipeError, match=r"30 x 30 .* multiples of 4\. Set data\.size, for example to 28"):
        GridEncoder((1, 30, 30), 8, 4)


# -- quantisation -----------------------------------------------------------------------------------------------------


def book(codes: list[list[float]], **settings) -> Codebook:
    result = Codebook(len(codes), len(codes[0]), **settings)
    with torch.no_grad():
        result.codes.copy_(torch.tensor(codes))
        result.total.copy_(result.codes)
        result.started.fill_(True)
    return result


def test_a_vector_becomes_the_nearest_code():
    torch.manual_seed(0)
    codebook, z = Codebook(7, 3).eval(), torch.randn(2, 3, 4, 5)
    quantised = codebook(z)
    rows = z.double().movedim(1, -1).flatten(0, 2)
    expected = torch.cdist(rows, codebook.codes.double()).argmin(1)
    assert torch.equal(quantised.indices.flatten(), expected)
    assert torch.equal(quantised.codes.movedim(1, -1).flatten(0, 2), codebook.codes[expected])


def test_the_nearest_code_is_searched_in_full_precision():
    torch.manual_seed(0)
    codebook, z = Codebook(64, 4).eval(), 2 + torch.randn(200, 4)  # a mean makes differences small beside the values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index = codebook.nearest(z)
    assert torch.equal(index, torch.cdist(z.double(), codebook.codes.double()).argmin(1))


def test_gradients_pass_straight_through_and_beta_pulls_the_encoder_alone():
    torch.manual_seed(0)
    codebook = Codebook(5, 3).eval().requires_grad_(True)
    z = torch.randn(2, 3, 2, 2, requires_grad=True)
    quantised = codebook(z)
    direction = torch.randn_like(quantised.codes)
    beta = 0.25
    total = (quantised.codes * direction).sum() + beta * quantised.commitment
    to_z, to_codes = torch.autograd.grad(total, (z, codebook.codes), allow_unused=True)
    expected = direction + beta * 2 * (z - quantised.codes).detach() / z.numel()
    torch.testing.assert_close(to_z, expected)
    assert to_codes is None


def test_perplexity_counts_the_codes_in_use():
    codebook = book([[0.0], [1.0], [2.0], [3.0]]).eval()
    for values, expected in (([0.0] * 4, 1), ([0.0, 0.0, 1.0, 1.0], 2), ([0.0, 1.0, 2.0, 3.0], 4)):
        perplexity = codebook(torch.tensor(values).view(1, 1, 2, 2)).perplexity
        assert float(perplexity) == pytest.approx(expected, rel=1e-5)


# -- the book follows -------------------------------------------------------------------------------------------------


def test_codes_are_the_moving_averages_of_their_vectors():
    torch.manual_seed(0)
    codebook = book([[0.0, 0.0], [5.0, 5.0]], decay=0.9, restart_below=0.0)
    usage, total = torch.ones(2).double(), codebook.codes.double().clone()
    for _ in range(5):
        parts = [torch.randn(1, 2, 3, 3) + 5 * (torch.rand(1, 1, 3, 3) > 0.3) for _ in range(2)]
        rows = torch.cat([part.movedim(1, -1).flatten(0, 2) for part in parts]).double()
        near = torch.cdist(rows, codebook.codes.double()).argmin(1)
        for part in parts:  # a batch computed in parts
            codebook(part)
        codebook.update()
        for k in range(2):
            usage[k] = 0.9 * usage[k] + 0.1 * (near == k).sum()
            total[k] = 0.9 * total[k] + 0.1 * rows[near == k].sum(0)
        torch.testing.assert_close(codebook.codes.double(), total / usage[:, None], atol=1e-4, rtol=1e-4)


def test_the_first_update_is_k_means():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 10.0], [10.0, 0.0], [-10.0, -10.0]])
    codebook = Codebook(3, 2)
    z = (centres[torch.arange(12) % 3] + 0.1 * torch.randn(12, 2)).T.reshape(1, 2, 3, 4)  # as many as are kept
    codebook(z)
    before = codebook.codes.clone()
    codebook.update()
    assert not torch.equal(before, codebook.codes) and bool(codebook.started)
    rows = z.movedim(1, -1).flatten(0, 2)
    # Every code is the mean of the vectors nearest to it: a fixed point of Lloyd's algorithm.
    near = torch.cdist(rows, codebook.codes).argmin(1)
    for k in near.unique():
        torch.testing.assert_close(codebook.codes[k], rows[near == k].mean(0), atol=1e-4, rtol=1e-4)
    assert float(codebook.usage.sum()) == pytest.approx(12, rel=1e-5)


@pytest.mark.parametrize("start", [True, False], ids=["start", "restart"])
def test_a_batch_computed_in_parts_fills_the_pool_from_all_of_them(start):
    torch.manual_seed(0)
    codebook = Codebook(4, 1) if start else book([[99.0]] * 4, decay=0.0)
    for size, centre in ((10, -20.0), (10, 20.0), (20, 0.0)):
        codebook(centre + 0.1 * torch.randn(size, 1, 1, 1))
    codebook.update()
    assert sorted(round(float(code) / 20) for code in codebook.codes) == [-1, 0, 0, 1]


def test_a_dead_code_starts_anew_at_a_vector_and_only_if_told():
    torch.manual_seed(0)
    z = torch.randn(1, 2, 4, 4)
    for restart in (False, True):
        codebook = book([[0.0, 0.0], [99.0, 99.0]], decay=0.5, restart_below=0.05)
        for _ in range(8):
            codebook(z)
            codebook.update(restart=restart)
        alive = torch.cdist(codebook.codes, z.movedim(1, -1).flatten(0, 2)).min(1).values.max() < 5
        assert bool(alive) == restart
        assert (codebook(z).perplexity > 1.5) == restart


def test_vectors_that_are_not_finite_are_not_learned():
    codebook = book([[0.0], [1.0]])
    codebook(torch.full((1, 1, 2, 2), torch.nan))
    codebook.update()
    assert codebook.codes.tolist() == [[0.0], [1.0]] and codebook.usage.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("start", [True, False], ids=["start", "restart"])
def test_a_part_that_is_not_finite_leaves_the_others_as_they_are(start):
    """There are two vectors in the others: one code follows them, and of five dead ones two start anew."""
    found = []
    for spoilt in (False, True):
        torch.manual_seed(0)
        codebook = Codebook(6, 2) if start else book([[99.0, 99.0 + k] for k in range(6)], decay=0.0)
        for number in range(3):
            torch.manual_seed(number)
            if number != 1:
                codebook(torch.randn(1, 2, 1, 1))
            elif spoilt:
                codebook(torch.tensor([1.0, torch.inf]).view(1, 2, 1, 1))
        codebook.update()
        found.append(codebook.state_dict())
    assert all(torch.equal(value, found[0][key]) for key, value in found[1].items())
    assert int((found[0]["codes"] < 9).all(1).sum()) == (6 if start else 3)


def test_dead_codes_take_the_vectors_of_the_pool_in_turn():
    torch.manual_seed(0)
    codebook, z = book([[99.0], [0.0], [88.0], [77.0]], decay=0.0), 0.1 * torch.randn(1, 1, 3, 4)
    torch.manual_seed(1)
    codebook(z)
    codebook.update()
    torch.manual_seed(1)
    pool = z.flatten()[torch.randperm(12)]
    torch.testing.assert_close(codebook.codes.flatten(), torch.stack([pool[0], z.mean(), pool[1], pool[2]]))


def test_a_state_of_before_the_start_starts_anew():
    torch.manual_seed(0)
    codebook, z = Codebook(4, 2), torch.randn(1, 2, 4, 4)
    fresh, codes = copy.deepcopy(codebook.state_dict()), []
    for _ in range(2):
        codebook.load_state_dict(fresh)
        torch.manual_seed(1)
        codebook(z)
        codebook.update()
        assert bool(codebook.started)
        codes.append(codebook.codes.clone())
        codebook(2 * z)
        codebook.update()
    assert torch.equal(*codes) and not torch.equal(codes[1], codebook.codes)


def test_looking_teaches_nothing():
    codebook = Codebook(3, 2).eval()
    before = {key: value.clone() for key, value in codebook.state_dict().items()}
    codebook(torch.randn(1, 2, 4, 4))
    codebook.update()
    assert all(torch.equal(value, before[key]) for key, value in codebook.state_dict().items())


# -- the prior --------------------------------------------------------------------------------------------------------


def prior(num_classes: int = 0) -> TokenPrior:
    torch.manual_seed(0)
    net = TokenPrior(num_codes=3, length=4, width=8, layers=2, num_classes=num_classes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return net.eval().requires_grad_(False)


def grids(num_codes: int, length: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(num_codes)] * length)


def log_probability(net: TokenPrior, index: torch.Tensor, labels=None) -> torch.Tensor:
    return net(index, labels).double().log_softmax(-1).gather(2, index[..., None]).sum((1, 2))


def test_probabilities_of_all_grids_sum_to_one():
    assert float(log_probability(prior(), grids(3, 4)).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_a_code_sees_only_those_before_it():
    net, index = prior(), torch.tensor([[0, 1, 2, 0]])
    for place in range(4):
        other = index.clone()
        other[0, place] = (other[0, place] + 1) % 3
        same = [torch.allclose(net(index)[0, i], net(other)[0, i], atol=1e-6) for i in range(4)]
        assert same == [i <= place for i in range(4)]


def test_draws_have_the_probabilities_of_the_prior():
    net, n = prior(), 20_000
    drawn = net.draw(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)))
    numbers = (drawn * torch.tensor([27, 9, 3, 1])).sum(1)
    share = torch.bincount(numbers, minlength=81) / n
    expected = log_probability(net, grids(3, 4)).exp()
    # Five standard errors of a share, over all 81 grids.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-4).all()


def test_extreme_noise_and_low_temperature_are_safe():
    net = prior(num_classes=2)
    drawn = net.draw(torch.tensor([[40.0] * 4, [-40.0] * 4]))
    assert drawn[0].tolist() == [2] * 4 and drawn[1].tolist() == [0] * 4
    index, noise = torch.zeros(1, 4, dtype=torch.int64), torch.randn(8, 4)
    for place in range(4):
        index[0, place] = net(index)[0, place].argmax()
    assert torch.equal(net.draw(noise, temperature=1e-3), index.expand(8, -1))


def test_labels_matter_and_no_label_is_the_null_label():
    net, index = prior(num_classes=2), torch.tensor([[0, 1, 2, 0]])
    anything = net(index)
    assert torch.equal(net(index, torch.tensor([-1])), anything)
    assert not torch.allclose(net(index, torch.tensor([0])), anything)


# -- the family -------------------------------------------------------------------------------------------------------


def test_losses_are_the_closed_forms():
    vqvae = family().eval()
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    loss = vqvae.loss("autoencode", Batch(x), Progress(0, 1))
    z = vqvae.encoder(x)
    e = vqvae.codebook(z).codes
    error = ((x - vqvae.decoder(e)).double() ** 2).mean() / x.double().var()
    assert loss.total.item() == pytest.approx((error + 0.25 * ((z - e) ** 2).mean()).item(), rel=1e-5)
    nats = vqvae.loss("prior", Batch(x), Progress(0, 1)).total
    assert nats.item() == pytest.approx(math.log(6))  # every code alike at first
    grid = vqvae.codebook(z).indices.flatten(1)
    with torch.no_grad():
        vqvae.prior.head.weight.normal_()
    nats = vqvae.loss("prior", Batch(x), Progress(0, 1)).total
    assert nats.item() == pytest.approx(-log_probability(vqvae.prior, grid).mean().item() / 4, rel=1e-5)


def test_the_prior_does_not_move_the_autoencoder_nor_the_book():
    vqvae, x = family(3), torch.rand(4, 1, 8, 8) * 2 - 1
    vqvae.loss("prior", Batch(x, torch.tensor([0, 1, 2, -1])), Progress(0, 1)).total.backward()
    assert all(p.grad is None for net in (vqvae.encoder, vqvae.decoder) for p in net.parameters())
    before = copy.deepcopy(vqvae.codebook.state_dict())
    vqvae.after_step(Progress(0, 1))
    assert all(torch.equal(value, before[key]) for key, value in vqvae.codebook.state_dict().items())


def test_pictures_are_decoded_grids_and_keep_their_shape():
    vqvae = family(2).eval().requires_grad_(False)
    noise = seeded_noise([1, 2], vqvae.noise_shape())
    assert noise.shape == (2, 4)
    index = vqvae.prior.draw(noise, torch.tensor([0, 1])).view(2, 2, 2)
    expected = vqvae.decoder(vqvae.codebook.lookup(index)).clamp(-1, 1)
    assert torch.equal(vqvae.sample(noise, Condition(torch.tensor([0, 1]))), expected)
    assert vqvae.reconstruct(torch.zeros(3, 1, 8, 8)).shape == (3, 1, 8, 8)
