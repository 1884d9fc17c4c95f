"""The peer: what diffusers' `examples/unconditional_image_generation/train_unconditional.py` does, in its own classes.

The loop, optimizer, schedule, moving average and defaults are those of the example of diffusers 0.42 (`--use_ema`), run
through accelerate as there. What is left out is what costs it time and changes no weight: reading picture files (it is
given decoded pictures in memory), progress bar, trackers and previews. Its networks are `UNet2DModel`s with diffusers'
own default settings; only what fixes the size (widths, layers, where attention is) is chosen.

Shapes: N pictures of the set, B of them, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imagekiln.core import mix, seeded_noise
from imagekiln.data import to_float, to_uint8
from imagekiln.engine.run import write_whole

LEARNING_RATE = 1e-4
WARM_UP_STEPS = 500
DIFFUSION_STEPS = 1000
SIZE_KEYS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
)


class Pictures(Dataset):
    """Decoded pictures, one at a time, as the example's data set hands them out."""

    def __init__(self, images_NCHW: np.ndarray) -> None:
        self.images_NCHW = images_NCHW

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": to_float(torch.from_numpy(self.images_NCHW[index]))}


def network_config(ours: Mapping[str, Any]) -> dict[str, Any]:
    """A `UNet2DModel` of the size of ours, everything else at diffusers' defaults, so without class labels."""
    return {key: ours[key] for key in SIZE_KEYS}


class PeerLoop:
    """The example's training, a step at a time.

    network: arguments of `UNet2DModel`. total_steps: where the cosine schedule ends.
    mixed_precision: "no" as shipped, or "bf16" for its flag. One precision a process: accelerate keeps it globally.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        images_NCHW: np.ndarray,
        *,
        batch: int,
        total_steps: int,
        seed: int = 0,
        mixed_precision: str = "no",
    ) -> None:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        torch.manual_seed(mix(seed, "peer"))
        self.seed, self.total_steps, self.steps = seed, total_steps, 0
        self.accelerator = Accelerator(mixed_precision=mixed_precision)
        self.dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
        net = UNet2DModel(**network)
        self.ema = EMAModel(
            net.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=3 / 4,
            model_cls=UNet2DModel,
            model_config=net.config,
        )
        self.noise_scheduler = DDPMScheduler(num_train_timesteps=DIFFUSION_STEPS, beta_schedule="linear")
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=LEARNING_RATE, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        schedule = get_scheduler(
            "cosine", optimizer=optimizer, num_warmup_steps=WARM_UP_STEPS, num_training_steps=total_steps
        )
        loader = DataLoader(Pictures(images_NCHW), batch_size=batch, shuffle=True)
        self.net, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            net, optimizer, loader, schedule
        )
        self.ema.to(self.accelerator.device)
        self._batches = self._endless()

    def step(self) -> float:
        """One step of the example: noise of a random level, predicted; returns the loss, which the example logs."""
        clean_BCHW = next(self._batches)["input"].to(self.dtype)
        noise_BCHW = torch.randn(clean_BCHW.shape, dtype=self.dtype, device=clean_BCHW.device)
        times_B = torch.randint(0, DIFFUSION_STEPS, (len(clean_BCHW),), device=clean_BCHW.device)
        noisy_BCHW = self.noise_scheduler.add_noise(clean_BCHW, noise_BCHW, times_B)
        with self.accelerator.accumulate(self.net):
            predicted_BCHW = self.net(noisy_BCHW, times_B).sample
            loss = F.mse_loss(predicted_BCHW.float(), noise_BCHW.float())
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.ema.step(self.net.parameters())
        self.steps += 1
        return loss.detach().item()

    @torch.inference_mode()
    def draw(self, seeds: Sequence[int], evaluations: int, batch: int = 100) -> Tensor:
        """Pictures by the example's own sampler, ancestral DDPM, with the averaged weights: (N, C, H, W) uint8.

        evaluations: of the network, for every picture; the example takes 1000. Each step cuts its estimate of the
        picture to [-1, 1], without which a network so shortly trained drives pixels far out. Noise is made one seed a
        picture, the first of it that of `imagekiln.core.seeded_noise`.
        """
        config, device = self.net.config, self.accelerator.device
        shape = (config.in_channels, config.sample_size, config.sample_size)
        self.ema.store(self.net.parameters())
        self.ema.copy_to(self.net.parameters())
        scheduler = type(self.noise_scheduler).from_config(self.noise_scheduler.config)
        scheduler.set_timesteps(evaluations, device=device)
        parts = []
        for start in range(0, len(seeds), batch):
            chosen = seeds[start : start + batch]
            generators = [torch.Generator().manual_seed(mix("peer's noise", seed)) for seed in chosen]
            x = seeded_noise(chosen, shape).to(device)
            for time in scheduler.timesteps:
                answer = self.net(x, time).sample
                x = scheduler.step(answer, time, x, generator=generators).prev_sample
            parts.append(to_uint8(x).cpu())
        self.ema.restore(self.net.parameters())
        return torch.cat(parts)

    def save(self, path: Path, **facts: Any) -> None:
        """Everything needed to go on, in one file that is written whole; `facts` come back from `restore`.

        A continued training shuffles anew, so it is as good as one that was not stopped, but not bit-equal to it.
        """
        tensors = {f"net/{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"ema/{index}": value for index, value in enumerate(self.ema.shadow_params)}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{entry}": value for entry, value in state.items()}
        state = {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "ema_steps": self.ema.optimization_step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **facts,
        }
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        write_whole(path, to_bytes(tensors, {"state": json.dumps(state)}))

    def restore(self, path: Path) -> dict[str, Any]:
        """Go on from a file that `save` wrote; returns the state in it."""
        state = stored_state(path)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        self.net.load_state_dict({key[4:]: value for key, value in tensors.items() if key.startswith("net/")})
        for index, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(tensors[f"ema/{index}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, entry = key.split("/")
                moments.setdefault(int(index), {})[entry] = value
        groups = [{**group, "lr": state["lr"]} for group in self.optimizer.state_dict()["param_groups"]]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.steps, self.ema.optimization_step = state["steps"], state["ema_steps"]
        self.schedule.load_state_dict({**self.schedule.state_dict(), "last_epoch": self.steps})
        torch.manual_seed(mix(self.seed, "peer", self.steps))
        return state

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader


def stored_state(path: Path) -> dict[str, Any]:
    """The state in a file that `PeerLoop.save` wrote, without its tensors."""
    with safe_open(path, "pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return state
