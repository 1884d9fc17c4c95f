"""Which device computes, and in which precision."""

from __future__ import annotations

import os
import platform

import torch

from imagekiln.core import Family
from imagekiln.errors import UsageError


def available() -> list[str]:
    """Names that `--device` takes on this machine.

    >>> "cpu" in available()
    True
    """
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def choose(name: str) -> torch.device:
    """The device of a name; `auto` takes the first GPU, else the CPU.

    Raises:
        UsageError: that device is not here; the sentence names those that are.
    """
    found = available()
    if name == "auto":
        return torch.device(found[0])
    if name == "cuda" and "cuda:0" in found:
        return torch.device("cuda:0")
    if name not in found:
        raise UsageError(
            f"train.device = {name!r}: this machine has {', '.join(found)}. Choose one of these or 'auto'."
            + (
                " This torch is a CPU build; https://pytorch.org lists the GPU builds."
                if not torch.version.cuda
                else ""
            )
        )
    return torch.device(name)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 when asked for, or on `auto` when the device multiplies in it; None = full float32."""
    if precision == "fp32":
        return None
    if precision == "bf16" or _computes_bf16(device):
        return torch.bfloat16
    return None


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions oneDNN emulates bf16 and is slower than float32.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def place(family: Family, device: torch.device) -> Family:
    """The family on a device, its convolutions laid out channels-last, which is what they are fastest in."""
    return family.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compile_parts(family: Family) -> None:
    """Compile what is trained, in place; what does not compile runs as it is."""
    import torch._dynamo  # a second of import that only this needs

    torch._dynamo.config.suppress_errors = True
    for name in dict.fromkeys(name for phase in family.phases for name in phase.trains):
        family.get_submodule(name).compile()


def describe(device: torch.device) -> str:
    """The device in words, for the run's meta data."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if platform.system() == "Darwin" else 1e6)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or os.name
