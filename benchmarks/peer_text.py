"""The peer: what diffusers' `examples/text_to_image/train_text_to_image.py` does, in its own classes.

The loop, optimizer, schedule, moving average and defaults are those of the example of diffusers 0.42 with the flag of
its documentation, `--use_ema`, run through accelerate as there: every step encodes its pictures and its captions anew.
What is left out is what costs it time and changes no weight: reading picture files (it is given decoded pictures and
tokens in memory), progress bar, trackers and previews.

Shapes: N pictures of the set, B of them, C channels, H rows, W columns, L tokens a caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imagekiln.data import to_float

LEARNING_RATE = 1e-4
WARM_UP_STEPS = 500


class Captioned(Dataset):
    """Decoded pictures and tokens, one at a time, as the example's data set hands them out."""

    def __init__(self, images_NCHW: np.ndarray, tokens_NL: Tensor) -> None:
        self.images_NCHW, self.tokens_NL = images_NCHW, tokens_NL

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": to_float(torch.from_numpy(self.images_NCHW[index])), "input_ids": self.tokens_NL[index]}


class TextPeerLoop:
    """The example's training, a step at a time.

    base: a folder of Stable Diffusion 1 in the layout of diffusers.
    mixed_precision: "no" as shipped, or "bf16" for its flag. One precision a process: accelerate keeps it globally.
    """

    def __init__(
        self, base: Path, images_NCHW: np.ndarray, captions: Sequence[str], *, batch: int, mixed_precision: str = "no"
    ) -> None:
        from accelerate import Accelerator
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from transformers import CLIPTextModel, CLIPTokenizer

        torch.manual_seed(0)
        self.accelerator = Accelerator(mixed_precision=mixed_precision)
        self.dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
        self.noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(base, subfolder="vae").requires_grad_(False)
        self.text_encoder.to(dtype=self.dtype)
        self.vae.to(dtype=self.dtype)
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").train()
        averaged = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        self.ema = EMAModel(averaged.parameters(), model_cls=UNet2DConditionModel, model_config=averaged.config)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
        )
        tokens_NL = tokenizer(
            list(captions),
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        loader = DataLoader(Captioned(images_NCHW, tokens_NL), batch_size=batch, shuffle=True)
        schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=WARM_UP_STEPS)
        self.unet, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            unet, optimizer, loader, schedule
        )
        self._batches = self._endless()

    def step(self) -> float:
        """One step of the example: noise of a random level, predicted; returns the loss, which the example logs."""
        batch = next(self._batches)
        with self.accelerator.accumulate(self.unet):
            with torch.no_grad():  # of frozen networks, whose gradients the example does not ask for either
                clean_BCHW = self.vae.encode(batch["pixel_values"].to(self.dtype)).latent_dist.sample()
                clean_BCHW = clean_BCHW * self.vae.config.scaling_factor
                states_BLW = self.text_encoder(batch["input_ids"], return_dict=False)[0]
            noise_BCHW = torch.randn_like(clean_BCHW)
            times_B = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (len(clean_BCHW),))
            noisy_BCHW = self.noise_scheduler.add_noise(clean_BCHW, noise_BCHW, times_B)
            predicted_BCHW = self.unet(noisy_BCHW, times_B, states_BLW, return_dict=False)[0]
            loss = F.mse_loss(predicted_BCHW.float(), noise_BCHW.float())
            logged = loss.detach().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return logged

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader
