"""A small GAN in one file: the example of what a family needs."""

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import softplus

from imagekiln.config import FamilyConfig
from imagekiln.core import Family, Loss, Phase


class Config(FamilyConfig):
    name: str = __file__
    width: int = Field(32, ge=1, description="neurons of the hidden layers")


class MyGan(Family):
    Config = Config
    optimizers = {part: {"name": "adam", "lr": 2e-3, "betas": (0.5, 0.99)} for part in ("critic", "painter")}
    phases = (Phase("critic", trains=("critic",)), Phase("painter", trains=("painter",)))
    averaged = ("painter",)

    def __init__(self, config, image_shape, num_classes):
        super().__init__(config, image_shape, num_classes)
        pixels, width = image_shape[0] * image_shape[1] * image_shape[2], config.width
        self.painter = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, pixels), nn.Tanh())
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def loss(self, phase, batch, progress):
        fake = self.sample(torch.randn(len(batch.images), 8, device=batch.images.device), None)
        if phase == "painter":
            return Loss(softplus(-self.critic(fake)).mean())
        return Loss((softplus(-self.critic(batch.images)) + softplus(self.critic(fake.detach()))).mean())

    def sample(self, noise, condition, options=None):
        return self.painter(noise).view(-1, *self.image_shape)

    def noise_shape(self):
        return (8,)
