"""Training with and without noise on one code path, and what its weights predict: last, averaged, together.

Settings: optimizer (sgd, adamw), lr, momentum, eps, weight_decay, clip_norm; rate ("cosine" to a tenth, "constant",
"cycles" to 0); and at most one of

    temperature   Langevin noise with D = T / number of examples, where the law says
    diffusion     the same by D
    article       sqrt(2 D) xi added to the weights after the step, without the learning rate, as articles do
    gradient      annealed gradient noise (Neelakantan et al. 2015), its eta
    rho           sharpness-aware minimisation (Foret et al. 2021)

with heat ("constant", "cosine") as the schedule of temperature and diffusion. Shapes: B examples, K classes, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagekiln.core import mix
from imagekiln.optim import SampleBank, gradient_noise, langevin, place, schedule
from imagekiln.optim.bank import calibration_error
from imagekiln.optim.temperature import Cycles

from .protocol import Settings

CYCLES = Cycles(num=4, explore=0.75)
PER_CYCLE = 3
SAMPLES = CYCLES.num * PER_CYCLE
TAIL = 1 / 3
"""Without cycles, samples are taken evenly over this last share of a training."""

LossOf = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Trained:
    """The model with its last weights, and the samples; `loss` of the last tenth of the steps."""

    model: nn.Module
    bank: SampleBank
    loss: float


def make_optimizer(model: nn.Module, settings: Settings, num_data: int, seed: int) -> torch.optim.Optimizer:
    """The optimizer with whatever noise the settings ask for."""
    lr, decay = settings["lr"], settings.get("weight_decay", 0.0)
    named = list(model.named_parameters())
    if settings.get("optimizer", "sgd") == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            named, lr=lr, eps=settings.get("eps", 1e-8), weight_decay=decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            named, lr=lr, momentum=settings.get("momentum", 0.9), weight_decay=decay, fused=True
        )
    diffusion = settings.get("diffusion", settings.get("temperature", 0.0) / num_data)
    if diffusion:
        langevin(optimizer, diffusion=diffusion, seed=mix(seed, "noise"), law="matched")
    if settings.get("gradient"):
        gradient_noise(optimizer, eta=settings["gradient"], seed=mix(seed, "noise"))
    return optimizer


def rate(settings: Settings, progress: float) -> float:
    """Factor of the learning rate."""
    kind = settings.get("rate", "cosine")
    if kind == "cycles":
        return max(CYCLES.lr(progress), 1e-3)
    return 1.0 if kind == "constant" else 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def fit(
    model: nn.Module,
    batch_of: Callable[[int], Any],
    loss_of: LossOf,
    settings: Settings,
    *,
    num_steps: int,
    num_data: int,
    seed: int,
) -> Trained:
    """Train, collecting samples; a training that leaves the finite numbers stops there."""
    optimizer, bank = make_optimizer(model, settings, num_data, seed), SampleBank(SAMPLES)
    shake = torch.Generator().manual_seed(mix(seed, "article"))
    cycles = settings.get("rate") == "cycles"
    heat = CYCLES if cycles else schedule(settings.get("heat", "constant"))
    parameters, losses = list(model.parameters()), []
    model.train()
    for step in range(num_steps):
        progress, batch = step / num_steps, batch_of(step)
        torch.manual_seed(mix(seed, "step", step))
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * rate(settings, progress)
        place(optimizer, step=step, factor=heat(progress))
        loss = _differentiate(model, batch, loss_of, optimizer, settings)
        if step >= 0.9 * num_steps:
            losses.append(float(loss))
        if step % 100 == 0 and not math.isfinite(float(loss)):
            return Trained(model, bank, math.nan)
        optimizer.step()
        if settings.get("article"):
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn(p.shape, generator=shake), alpha=(2 * settings["article"]) ** 0.5)
        if collects(step, num_steps, cycles):
            bank.add(model)
    return Trained(model.eval(), bank, sum(losses) / max(1, len(losses)))


def collects(step: int, num_steps: int, cycles: bool) -> bool:
    """Whether a sample is taken after this step: `SAMPLES` in all, the last after the last step."""
    if cycles:
        return CYCLES.collects(step, num_steps, PER_CYCLE)
    taken = [int(SAMPLES * max(0.0, at / num_steps - (1 - TAIL)) / TAIL + 1e-9) for at in (step, step + 1)]
    return taken[1] > taken[0]


def _differentiate(
    model: nn.Module, batch: Any, loss_of: LossOf, optimizer: torch.optim.Optimizer, settings: Settings
) -> Tensor:
    """Gradients of the loss, at the weights or, for rho > 0, where it is highest near them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    if settings.get("rho"):
        gradients = [p.grad.clone() for p in parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        uphill = [gradient * (settings["rho"] / (norm + 1e-12)) for gradient in gradients]
        with torch.no_grad():
            torch._foreach_add_(parameters, uphill)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        with torch.no_grad():
            torch._foreach_sub_(parameters, uphill)
    if settings.get("clip_norm"):
        torch.nn.utils.clip_grad_norm_(parameters, settings["clip_norm"])
    return loss.detach()


# -- what was learned -------------------------------------------------------------------------------------------------


@torch.no_grad()
def readings(trained: Trained, predict: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Probabilities by readout: last, average (of the samples' weights) and ensemble (of their predictions)."""
    model = trained.model.eval()
    found = {"last": predict(model)}
    if not len(trained.bank) or not math.isfinite(trained.loss):
        return {name: torch.full_like(found["last"], math.nan) for name in ("last", "average", "ensemble")}
    last = {name: value.clone() for name, value in model.state_dict().items()}
    total = torch.zeros_like(found["last"])
    for sample in trained.bank._samples:
        model.load_state_dict(sample)
        total += predict(model)
    model.load_state_dict(trained.bank.mean())
    found |= {"average": predict(model), "ensemble": total / len(trained.bank)}
    model.load_state_dict(last)
    return found


def classified(probabilities_BK: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Accuracy in percent, mean negative log-likelihood in nats, expected calibration error in percent."""
    if not bool(torch.isfinite(probabilities_BK).all()):
        return {"accuracy": math.nan, "nll": math.nan, "ece": math.nan}
    right = (probabilities_BK.argmax(1) == labels_B).double().mean()
    nll = -probabilities_BK.double().clamp_min(1e-12).log()[torch.arange(len(labels_B)), labels_B].mean()
    return {
        "accuracy": 100 * float(right),
        "nll": float(nll),
        "ece": 100 * calibration_error(probabilities_BK, labels_B),
    }


def in_parts(function: Callable[[Tensor], Tensor], inputs: Tensor, size: int = 500) -> Tensor:
    """A function of many inputs, some at a time."""
    return torch.cat([function(part) for part in inputs.split(size)])


def epochs(num: int, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Indices of the batch of a step: a new order every epoch, whole batches only."""
    per_epoch, orders = num // batch, dict[int, Tensor]()

    def rows(step: int) -> Tensor:
        epoch, at = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = torch.randperm(num, generator=torch.Generator().manual_seed(mix(seed, "order", epoch)))
        return orders[epoch][at * batch : (at + 1) * batch]

    return rows


def grid(name: str, values: Sequence[Any], **fixed: Any) -> tuple[dict[str, Any], ...]:
    """Settings that differ in one value."""
    return tuple({**fixed, name: value} for value in values)
