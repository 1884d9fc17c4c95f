"""Options of the VAE: what the divergence costs under beta, warm-up, free bits and a growing capacity."""

from __future__ import annotations

import pytest
import torch

from imagekiln.core import Batch, Progress
from imagekiln.engine import recipe as recipes
from imagekiln.errors import RecipeError

PIXELS = 8 * 8


def family(**settings):
    torch.manual_seed(0)
    vae = recipes.build(
        recipes.resolve("vae", {"family": {"width": 8, "z_dim": 4, **settings}}), (1, 8, 8), num_classes=0
    )
    with torch.no_grad():  # dimensions that say very different amounts
        vae.encoder.head.weight[:4] *= torch.tensor([10.0, 1.0, 0.1, 0.0])[:, None]
    return vae


def measure(vae, fraction: float = 0.5):
    """(price of the divergence in nats, divergence in nats, divergence_BZ) in float64, of the loss at this progress."""
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(1)
    loss = vae.loss("elbo", Batch(x), Progress(round(1000 * fraction), 1000))
    with torch.no_grad():
        mean, logvar = (part.double() for part in vae.encoder(x))
    divergence_BZ = (mean**2 + logvar.exp() - 1 - logvar) / 2
    price = loss.total.item() * PIXELS - loss.parts["reconstruction_nats"].item()
    assert loss.parts["divergence_nats"].item() == pytest.approx(divergence_BZ.sum(1).mean().item(), rel=1e-4)
    return price, divergence_BZ.sum(1).mean().item(), divergence_BZ


@pytest.mark.parametrize("networks", ["residual", "convolutional"])
def test_both_networks_learn(networks):
    vae, x = family(networks=networks), torch.rand(6, 1, 8, 8) * 2 - 1
    optimizer, totals = torch.optim.Adam(vae.parameters(), lr=3e-3), []
    for _ in range(20):
        optimizer.zero_grad()
        totals.append(vae.loss("elbo", Batch(x), Progress(0, 1)).total)
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < totals[0]


def test_the_divergence_is_that_of_two_gaussians():
    vae = family()
    x = torch.rand(6, 1, 8, 8)
    mean, logvar = (part.detach() for part in vae.encoder(x))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, torch.exp(logvar / 2)), normal(0.0, 1.0))
    loss = vae.loss("elbo", Batch(x), Progress(0, 1))
    assert loss.parts["divergence_nats"].item() == pytest.approx(expected.sum(1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_beta_is_a_price_a_nat(beta):
    price, divergence, _ = measure(family(beta=beta))
    assert price == pytest.approx(beta * divergence, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("fraction", "share"), [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.9, 1.0)])
def test_warm_up_raises_beta(fraction, share):
    price, divergence, _ = measure(family(beta=3.0, warmup_fraction=0.2), fraction)
    assert price == pytest.approx(3 * share * divergence, rel=1e-3, abs=1e-3)


def test_free_nats_cost_nothing_in_any_dimension():
    vae = family(free_nats=0.3, beta=2.0)
    price, divergence, divergence_BZ = measure(vae)
    by_dimension = divergence_BZ.mean(0)
    assert (by_dimension > 0.3).any() and (by_dimension < 0.3).any()
    assert price == pytest.approx(2 * by_dimension.clamp(min=0.3).sum().item(), rel=1e-3)
    assert price > 2 * divergence


def test_a_dimension_within_its_free_nats_has_no_slope():
    vae = family(free_nats=1e6)
    x = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        vae.decoder.stem.weight.zero_()  # so that the reconstruction does not look at z
    vae.loss("elbo", Batch(x), Progress(0, 1)).total.backward()
    assert vae.encoder.head.weight.grad.abs().max() == 0


@pytest.mark.parametrize(("fraction", "capacity"), [(0.0, 0.0), (0.2, 4.0), (0.4, 8.0), (1.0, 8.0)])
def test_the_capacity_grows_and_both_sides_of_it_cost(fraction, capacity):
    vae = family(capacity_nats=8.0, capacity_weight=100.0, capacity_fraction=0.4)
    price, divergence, _ = measure(vae, fraction)
    assert price == pytest.approx(100 * abs(divergence - capacity), rel=1e-3)


def test_the_divergence_is_drawn_to_the_capacity():
    vae = family(capacity_nats=5.0, capacity_weight=50.0, capacity_fraction=0.0)
    optimizer = torch.optim.Adam(vae.encoder.parameters(), lr=3e-3)
    x = torch.rand(16, 1, 8, 8) * 2 - 1
    for _ in range(60):
        optimizer.zero_grad()
        loss = vae.loss("elbo", Batch(x), Progress(0, 1))
        loss.total.backward()
        optimizer.step()
    assert abs(loss.parts["divergence_nats"].item() - 5) < 1.5


@pytest.mark.parametrize(
    "settings", [{"warmup_fraction": 0.5}, {"capacity_nats": 9.0, "capacity_fraction": 0.5}], ids=str
)
def test_held_out_pictures_pay_the_price_of_the_end(settings):
    """The validation loss ranks checkpoints, so it must not depend on how far the run is."""
    vae = family(**settings).eval()
    early, late = measure(vae, 0.1)[0], measure(vae, 1.0)[0]
    assert early == late == pytest.approx(measure(vae.train(), 1.0)[0])


def test_a_capacity_next_to_other_prices_is_refused():
    with pytest.raises(RecipeError, match=r"capacity_nats = 5\.0: a capacity replaces beta"):
        family(capacity_nats=5.0, beta=4.0)
