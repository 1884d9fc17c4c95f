"""No training step waits for its device: on a GPU, reading one number stops the host until all work is done.

Not asked here, because the toy has no captions: words that change from step to step, which are read on the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from imagekiln import testing
from imagekiln.engine import registry
from imagekiln.engine.guard import LAG_STEPS, Guard


class NoReading(TorchDispatchMode):
    """Stands for a device: whoever asks a tensor for its number fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read from a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", registry.names())
def test_a_step_reads_no_number(name: str, tmp_path: Path) -> None:
    trainer = testing._trainer(name, tmp_path, steps=100)
    trainer.step()  # what is read once a run
    trainer.guard = Guard(late=True)
    with NoReading():
        for _ in range(LAG_STEPS):  # then the first answers are read, which have long arrived
            trainer.step()
    assert trainer.state.nimg == (1 + LAG_STEPS) * trainer.images_per_step
