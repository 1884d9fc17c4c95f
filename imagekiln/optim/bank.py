"""Samples of weights kept from a training, and what they predict together: mean, uncertainty, calibration, agreement.

For class probabilities p_s of S samples and H the entropy in nats (Depeweg et al. 2018, equation 9):

    total H(mean p_s)  =  aleatoric mean H(p_s)  +  epistemic, the mutual information of prediction and weights

Aleatoric is what every sample is unsure of, epistemic what they disagree about.

Shapes: S samples, C chains, B inputs, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imagekiln.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Prediction:
    """What samples predict together: mean_BK, and entropies total_B = aleatoric_B + epistemic_B in nats."""

    mean: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


class SampleBank:
    """Copies of a model's weights, taken while it samples.

    capacity: the most that are kept; one more replaces the oldest. dtype: of the floating point copies, None for the
        model's own; torch.bfloat16 halves the memory.

    >>> model = nn.Linear(2, 3)
    >>> bank = SampleBank(capacity=2)
    >>> for _ in range(3):
    ...     bank.add(model)
    >>> len(bank), bank.predict(model, torch.zeros(5, 2)).shape
    (2, torch.Size([2, 5, 3]))
    """

    def __init__(self, capacity: int = 32, dtype: torch.dtype | None = None) -> None:
        if capacity < 1:
            raise UsageError(f"capacity is {capacity}; a bank keeps at least 1 sample.")
        self.capacity, self.dtype = capacity, dtype
        self._samples: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._samples)

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Keep a copy of the weights and buffers of now, on the CPU."""
        sample = {}
        for name, tensor in model.state_dict().items():
            dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            sample[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        self._samples.append(sample)
        del self._samples[: -self.capacity]

    @torch.no_grad()
    def predict(self, model: nn.Module, inputs: Tensor, refresh: Callable[[nn.Module], object] | None = None) -> Tensor:
        """The output of every sample, stacked: (S, *output shape). The model given is not changed.

        refresh: called with the model of each sample before it predicts, in training mode: pass training data through
            it when it has batch statistics, which belong to other weights otherwise. Raises `UsageError` when empty.
        """
        if not self._samples:
            raise UsageError("The bank is empty: add samples before it predicts.")
        player, outputs = copy.deepcopy(model), []
        for sample in self._samples:
            player.load_state_dict(sample)
            if refresh is not None:
                refresh(player.train())
            outputs.append(player.eval()(inputs))
        return torch.stack(outputs)

    def mean(self) -> dict[str, Tensor]:
        """The average of the samples' weights, float32 at least; integers from the newest. `UsageError` when empty."""
        if not self._samples:
            raise UsageError("The bank is empty: there is nothing to average.")
        found = {}
        for name, newest in self._samples[-1].items():
            if not newest.is_floating_point():
                found[name] = newest.clone()
                continue
            wide = torch.promote_types(newest.dtype, torch.float32)
            found[name] = torch.stack([sample[name].to(wide) for sample in self._samples]).mean(0)
        return found

    def save(self, path: str | Path) -> None:
        """Write all samples as one safetensors file."""
        tensors = {f"{at:04d}/{name}": t for at, sample in enumerate(self._samples) for name, t in sample.items()}
        save_file(tensors, path)

    def load(self, path: str | Path) -> None:
        """Take the samples of a file instead of the ones kept; `CheckpointError` when it is no bank."""
        try:
            tensors: Mapping[str, Tensor] = load_file(path)
        except Exception as error:
            raise CheckpointError(f"{path} is not a bank of samples that can be read: {error}.") from None
        samples: dict[str, dict[str, Tensor]] = {}
        for key, tensor in sorted(tensors.items()):
            place, slash, name = key.partition("/")
            if not slash or not place.isdigit():
                raise CheckpointError(f"{path} is not a bank of samples: it has a tensor {key}.")
            samples.setdefault(place, {})[name] = tensor
        self._samples = [samples[place] for place in sorted(samples)][-self.capacity :]


def predictive(probabilities_SBK: Tensor) -> Prediction:
    """Mean and uncertainty of class probabilities, rows summing to 1. Raises `UsageError` for anything else.

    >>> disagree = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> round(float(predictive(disagree).epistemic), 4), float(predictive(disagree).aleatoric)
    (0.6931, 0.0)
    """
    p = probabilities_SBK.double()
    if p.ndim != 3 or p.numel() == 0 or bool((p < 0).any()) or not torch.allclose(p.sum(-1), p.new_ones(()), atol=1e-3):
        raise UsageError(
            f"Probabilities of shape {tuple(p.shape)}; expected (samples, inputs, classes), not negative, with sum 1."
        )
    mean_BK = p.mean(0)
    total_B, aleatoric_B = _entropy(mean_BK), _entropy(p).mean(0)
    return Prediction(mean_BK, total_B, aleatoric_B, (total_B - aleatoric_B).clamp_min(0))


def calibration_error(probabilities_BK: Tensor, labels_B: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| by bins of confidence, weighted by their size, in [0, 1].

    Guo et al. 2017, "On calibration of modern neural networks", equation 3; equal bins over (0, 1]. It is biased
    upwards when bins hold few. Raises `UsageError` for shapes that do not fit.

    >>> calibration_error(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1]))
    0.0
    """
    if probabilities_BK.ndim != 2 or labels_B.shape != probabilities_BK.shape[:1] or not len(labels_B) or num_bins < 1:
        raise UsageError(
            f"Probabilities of shape {tuple(probabilities_BK.shape)} and labels of shape {tuple(labels_B.shape)} in "
            f"{num_bins} bins; expected (inputs, classes), (inputs,) and at least one of each."
        )
    confidence_B, chosen_B = probabilities_BK.double().max(1)
    gap_B = (chosen_B == labels_B).double() - confidence_B
    bin_B = (confidence_B * num_bins).ceil().long().clamp(1, num_bins) - 1
    sums = gap_B.new_zeros(num_bins).index_add_(0, bin_B, gap_B)
    return float(sums.abs().sum() / len(labels_B))


def function_r_hat(outputs_CSB: Tensor) -> Tensor:
    """Split R-hat of every output over chains: (B,), near 1 where chains agree on what the network computes.

    outputs_CSB: numbers of at least 4 samples of at least one chain (say, log odds of some inputs); each chain is cut
    in half, so that one that drifts disagrees with itself (Gelman et al. 2013, section 11.4). Weights of networks have
    symmetries and need not agree. Raises `UsageError` for other shapes.

    >>> chains = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0))
    >>> bool((function_r_hat(chains) < 1.02).all())
    True
    """
    if outputs_CSB.ndim != 3 or outputs_CSB.shape[1] < 4:
        raise UsageError(
            f"Outputs of shape {tuple(outputs_CSB.shape)}; expected (chains, samples, inputs) with at least 4 samples."
        )
    half = outputs_CSB.shape[1] // 2
    split = torch.cat([outputs_CSB[:, :half], outputs_CSB[:, -half:]]).double()
    within_B = split.var(1).mean(0)
    between_B = split.mean(1).var(0)
    # Chains that stand still agree if they stand at one place, and do not otherwise.
    ratio_B = torch.where((within_B == 0) & (between_B == 0), 0.0, between_B / within_B)
    return ((half - 1) / half + ratio_B).sqrt()


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)
