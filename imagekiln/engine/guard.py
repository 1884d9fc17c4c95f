"""Updates whose loss or gradient is not finite are left out, and no step waits for its device to learn of it.

Adam's fused kernel reads on the device whether it is to step: `found_inf`, which is there for scaled gradients. SGD and
RMSprop step in any case, and where they should not have, the device puts the values of before back. What the host is to
know it asks for in the background and reads `LAG_STEPS` later, when the answer has long arrived. A CPU has nothing to
wait for, and other optimizers cannot be told: there the host reads at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

LAG_STEPS = 2


class Guard:
    """Which steps of a training had an update that was left out.

    late: whether to read later what devices find; steps must then be as many, whatever is found.

    >>> guard, weight = Guard(late=True), torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.Adam([weight], fused=True)
    >>> for nimg in (8, 16, 24):
    ...     weight.grad = torch.full((1,), float("inf") if nimg == 8 else 1.0)
    ...     stepped = guard.step(optimizer, weight.grad.isfinite().all())
    ...     guard.close(nimg)
    >>> list(guard.bad()), int(optimizer.state[weight]["step"])
    ([8], 2)
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self._finite: list[Tensor] = []
        self._answers: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def step(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> bool:
        """Step, unless `finite`, a bool tensor without dimensions, is false; False where the host knows that it is."""
        self._finite.append(finite)
        if self.late and _can_be_told(optimizer):
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif self.late and isinstance(optimizer, torch.optim.SGD | torch.optim.RMSprop):
            _step_where(finite, optimizer)
        elif finite:
            optimizer.step()
        else:
            return False
        return True

    def close(self, nimg: int) -> None:
        """A step has ended, and so many images have been seen."""
        finite, self._finite = torch.stack(self._finite).all(), []
        if finite.device.type != "cuda":
            self._answers.append((nimg, finite, None))
            return
        answer, arrived = finite.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        self._answers.append((nimg, answer, arrived))

    def bad(self, everything: bool = False) -> Iterator[int]:
        """Images seen after each step in which something was left out, oldest first; of the last steps only with
        `everything`, which waits."""
        lag = LAG_STEPS if self.late and not everything else 0
        while len(self._answers) > lag:
            nimg, finite, arrived = self._answers.popleft()
            if arrived is not None:
                arrived.synchronize()
            if not bool(finite):
                yield nimg

    def forget(self) -> None:
        """What is still to be read was of steps that are undone."""
        self._finite.clear()
        self._answers.clear()


def _can_be_told(optimizer: torch.optim.Optimizer) -> bool:
    """Fused SGD cannot: if its first step is left out, its momentum begins as whatever was in memory."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))


@torch.no_grad()
def _step_where(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step; where not finite, the optimizer's tensors are as before, and those it has just made are the zeros that SGD
    and RMSprop begin with."""
    before = {tensor: tensor.clone() for tensor in _tensors(optimizer, finite.device)}
    optimizer.step()
    for tensor in _tensors(optimizer, finite.device):
        tensor.copy_(torch.where(finite, tensor, before.get(tensor, 0.0)))


def _tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """Weights and what is remembered of them; counts of steps, which torch keeps on the host, come to the device."""
    found = [weight for group in optimizer.param_groups for weight in group["params"]]
    for state in optimizer.state.values():
        state |= {key: value.to(device) for key, value in state.items() if isinstance(value, Tensor)}
        found += [value for value in state.values() if isinstance(value, Tensor)]
    return found
