"""A folder that diffusers loads: the U-Net as `UNet2DModel`, and a whole pipeline for a flow without labels.

Our U-Net has the state dict and config of `UNet2DModel`, so writing is two files; the proof is loading them with the
real class and comparing outputs. A rectified flow without classes also becomes a `DDPMPipeline` with
`FlowMatchEulerDiscreteScheduler`, which is plain Euler in time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from imagekiln.engine.generate import Model
from imagekiln.engine.run import write_whole
from imagekiln.errors import UsageError

TOLERANCE = 1e-5


def write(model: Model, out: Path) -> dict[str, Any]:
    """Write `unet/` (and `model_index.json` with `scheduler/` where a stock pipeline can sample it) and load it back.

    Raises:
        UsageError: the model has no U-Net of that shape, diffusers is not installed, or what it computes differs.
    """
    unet: Any = next((part for part in model.family.children() if hasattr(part, "diffusers_config")), None)
    if unet is None:
        raise UsageError(
            f"A {model.family.config.name} model has no network that diffusers knows. Use --to safetensors."
        )
    config = unet.diffusers_config()
    tensors = {key: value.detach().cpu().contiguous() for key, value in unet.diffusers_state_dict().items()}
    write_whole(out / "unet" / "config.json", json.dumps(config, indent=2) + "\n")
    write_whole(out / "unet" / "diffusion_pytorch_model.safetensors", to_bytes(tensors, {"format": "pt"}))
    pipeline = _write_pipeline(model, config, out)
    difference = _difference(unet, config, out)
    if difference > TOLERANCE:
        raise UsageError(
            f"diffusers computes something else from {out / 'unet'}: outputs differ by {difference:.2g}, more than "
            f"{TOLERANCE:g}. Please report this with the versions `imagekiln doctor` prints."
        )
    what = "Pipeline and U-Net" if pipeline else "U-Net"
    sentence = f"{what} written to {out}; loaded back by diffusers, outputs differ by at most {difference:.2g}."
    return {
        "format": "diffusers",
        "path": str(out),
        "difference": difference,
        "pipeline": pipeline,
        "sentence": sentence,
    }


def _write_pipeline(model: Model, config: dict[str, Any], out: Path) -> bool:
    """A stock pipeline feeds neither labels nor other targets than the flow's velocity."""
    family = model.family.config
    if config["num_class_embeds"] is not None or getattr(family, "path", "") != "rf" or family.target != "v":
        return False
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    write_whole(out / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    write_whole(out / "model_index.json", json.dumps(index, indent=2) + "\n")
    return True


@torch.no_grad()
def _difference(unet: Any, config: dict[str, Any], out: Path) -> float:
    """Largest difference of outputs on random pictures, in float32."""
    try:
        from diffusers import UNet2DModel
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"The files are written to {out}, but diffusers, which would prove that they load, is not usable here "
            f"({error}). pip install 'imagekiln[sd]'."
        ) from error
    theirs = UNet2DModel.from_pretrained(out / "unet").eval()
    generator = torch.Generator().manual_seed(0)
    shape = (2, config["in_channels"], config["sample_size"], config["sample_size"])
    images, times = torch.randn(shape, generator=generator), torch.tensor([10.0, 700.0])
    labels = torch.tensor([0, config["num_class_embeds"] - 1]) if config["num_class_embeds"] else None
    ours = unet.eval()(images, times, labels)
    return float((ours - theirs(images, times, class_labels=labels).sample).abs().max())
