"""Parameter counts of published networks, to the last digit: a row says which settings build one, and its counts.

A family gives most of them; parts, and what no setting leads to, are built by hand. Rows that a label's table has for
"anything", which the published networks do not know, are not counted.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrizations

from imagekiln.engine import recipe as recipes
from imagekiln.nets import conv_gan, latent_autoencoder
from imagekiln.nets.labels import LabelEmbedding
from imagekiln.nets.patch_discriminator import PatchDiscriminator
from imagekiln.nets.stylegan2 import Mapping

NETWORKS = ("generator", "discriminator", "critic", "encoder", "decoder", "network", "codebook")

SN_32, SN = {"generator_width": 256, "width": 128}, {"generator_width": 64, "width": 64}
FLAT = {"z_dim": 128, "shared_dim": 0, "hierarchical": False, "width": 64}
BIG_64 = {"z_dim": 120, "width": 64, "critic_width": 64}
WIDE = {"z_dim": 512, "widest": 512}
STYLE = {**WIDE, "mapping_layers": 8}
PLAIN = {**WIDE, "width": 512, "discriminator": "plain"}
R3 = {"widest": 768, "blocks": 2}
R3_LARGE = {"width": 1536, "widest": 1536, "blocks": 2, "group_width": 32}
ALONE = {"adversarial_weight": 0}
KL = {**ALONE, "kind": "kl", "width": 128, "blocks": 2}
TINY = {**ALONE, "kind": "tiny", "factor": 8, "width": 64, "blocks": 3}
VQGAN = {**ALONE, "kind": "vq", "factor": 16, "width": 128, "blocks": 2, "latent_channels": 256}

# family: rows of (pixels, classes, settings, counts of its networks in the order of NETWORKS)
PUBLISHED = {
    "dcgan": {
        "pytorch/examples, 32": (32, 0, {}, 1_068_928, 663_296),
        "pytorch/examples, 64": (64, 0, {}, 3_576_704, 2_765_568),
        "paper": (64, 0, {"width": 128, "kernel": 5}, 18_885_760, 17_232_768),
    },
    "wgan": {"64": (64, 0, {"width": 64}, 3_576_704, 2_765_568)},
    "wgan_gp": {
        "32": (32, 0, {"width": 128}, 1_204_483, 1_053_825),
        "32, ten classes": (32, 10, {"width": 128, "labels": "classifier"}, 1_218_307, 1_055_115),
        "32, projection": (32, 10, {"width": 128}, 1_218_307, 1_055_105),
        "32, small": (32, 0, {"width": 128, "networks": "convolutional"}, 5_179_907, 4_114_689),
        "64": (64, 0, {"width": 64, "networks": "layer-norm"}, 8_540_483, 7_488_001),
    },
    "sngan": {
        "32": (32, 0, SN_32, 4_276_739, 1_053_825),
        "32, ten classes": (32, 10, SN_32, 4_304_387, 1_055_105),
        "48": (48, 0, SN, 4_878_083, 10_141_441),
        "64": (64, 0, SN, 12_220_675, 10_141_441),
        "128": (128, 0, SN, 32_150_787, 29_017_857),
        # Published with batch normalisation, a gain and a bias for each of 1,408 channels: spectral norms have neither.
        "StudioGAN 32": (32, 0, {**SN, "networks": "convolutional"}, 3_812_355, 2_931_009 - 2 * 1_408),
    },
    "biggan": {
        "SAGAN 32": (32, 10, {**FLAT, "critic_width": 32}, 4_386_308, 1_075_586),
        "SAGAN 128": (128, 1000, {**FLAT, "critic_width": 64}, 42_017_412, 39_448_258),
        "32": (32, 10, {**FLAT, "critic_width": 64, "attention_at": "none"}, 4_304_387, 4_207_361),
        "StudioGAN 32": (32, 10, {"z_dim": 80, "width": 96, "critic_width": 48}, 9_416_196, 2_415_170),
        "64": (64, 1000, BIG_64, 31_969_540, 20_571_842),
        "64, one class": (64, 1, BIG_64, 31_841_668, 19_548_866),
        "128": (128, 1000, {"z_dim": 120, "width": 96, "critic_width": 96}, 70_433_988, 87_982_370),
    },
    "pggan": {
        "32": (32, 0, {**WIDE, "width": 512}, 20_719_628, 20_726_785),
        "64": (64, 0, {**WIDE, "width": 256}, 22_490_383, 22_498_049),
        "256": (256, 0, {**WIDE, "width": 64}, 23_044_309, 23_052_353),
        "1024": (1024, 0, {**WIDE, "width": 16}, 23_079_115, 23_087_249),
    },
    "stylegan1": {  # the discriminators are progressive growing's
        "32": (32, 0, {**STYLE, "width": 512, "grow_from": 4}, 22_841_356, 20_726_785),
        "64": (64, 0, {**STYLE, "width": 256, "grow_from": 4}, 25_137_935, 22_498_049),
        "256": (256, 0, {**STYLE, "width": 64, "grow_from": 4}, 26_086_229, 23_052_353),
        "1024": (1024, 0, {**STYLE, "width": 16, "grow_from": 4}, 26_219_627, 23_087_249),
    },
    "stylegan2": {
        "CIFAR-10, ten classes": (32, 10, PLAIN, 20_215_315, 23_089_664),
        "CIFAR-10": (32, 0, PLAIN, 19_947_539, 20_720_641),
        "auto 32": (32, 0, {**WIDE, "width": 512}, 19_947_539, 21_507_073),
        "auto 64": (64, 0, {**WIDE, "width": 256}, 22_243_608, 23_407_361),
        "FFHQ-256": (256, 0, {**STYLE, "width": 64}, 24_767_458, 24_001_089),
        "FFHQ-1024": (1024, 0, {**STYLE, "width": 32}, 30_370_060, 29_012_513),
    },
    "r3gan": {
        "CIFAR-10, ten classes": (32, 10, {**R3, "width": 768}, 20_781_952, 21_280_512),
        "CIFAR-10": (32, 0, {**R3, "width": 768}, 20_732_160, 20_683_776),
        "FFHQ-64": (64, 0, {**R3, "width": 384}, 22_429_824, 22_381_440),
        "FFHQ-256": (256, 0, {**R3, "width": 96}, 23_057_952, 23_009_568),
        "ImageNet-32": (32, 1000, R3_LARGE, 82_914_304, 86_548_992),
        "ImageNet-64": (64, 1000, R3_LARGE, 103_570_432, 107_205_120),
        "quarter width": (32, 0, {"width": 192, "widest": 192, "blocks": 2}, 1_644_096, 1_632_000),
    },
    "vae": {  # together 3,937,635
        "PyTorch-VAE": (64, 0, {"networks": "convolutional", "z_dim": 128}, 2_095_104, 1_842_531),
    },
    "vqvae": {  # together 662,723 and a book; 9,712,707
        "paper": (32, 0, {"width": 128}, 364_160 + 8_256, 290_307, 32_768),
        "PyTorch-VAE": (64, 0, {"width": 256, "blocks": 6, "wide_blocks": True}, 5_069_504, 4_610_435, 32_768),
    },
    "autoencoder": {
        "VQGAN, 1024 codes": (256, 0, VQGAN, 72_141_699 - 262_144, 262_144),
        "VQGAN, 16384 codes": (256, 0, {**VQGAN, "num_codes": 16_384}, 76_073_859 - 4_194_304, 4_194_304),
        "KL, factor 4": (256, 0, {**KL, "factor": 4, "latent_channels": 3}, 55_312_063),
        "KL, factor 8": (256, 0, {**KL, "factor": 8, "latent_channels": 4}, 83_653_863),
        "KL, factor 16": (256, 0, {**KL, "factor": 16, "latent_channels": 16}, 69_610_963),
        "KL, factor 32": (256, 0, {**KL, "factor": 32, "latent_channels": 64}, 103_880_131),
        "KL 64, factor 4": (64, 0, {**KL, "width": 64, "blocks": 1}, 10_757_543),
        "TAESD, 4 channels": (64, 0, TINY, 2_445_063),
        "TAESD, 16 channels": (64, 0, {**TINY, "latent_channels": 16}, 2_458_899),
    },
}
ROWS = {f"{family}: {name}": (family, *row) for family, rows in PUBLISHED.items() for name, row in rows.items()}


def kl(width: int, *times: int, latent_channels: int = 4, blocks: int = 2):
    widths = [width * each for each in times]
    return latent_autoencoder.build("kl", (3, 64, 64), widths, latent_channels=latent_channels, blocks=blocks)


PARTS = {
    "StudioGAN's generator, 32": (lambda: conv_gan.Generator(128, (3, 32, 32), 64), 3_812_355),
    "StudioGAN's discriminator, 32": (lambda: conv_gan.Discriminator((3, 32, 32), 64, spectral=False), 2_931_009),
    "StyleGAN's mapping": (lambda: Mapping(512, 512, layers=8), 2_101_248),
    "KL's encoder, factor 4": (lambda: kl(128, 1, 2, 4, latent_channels=3).encoder, 22_351_238),
    "KL's decoder, factor 4": (lambda: kl(128, 1, 2, 4, latent_channels=3).decoder, 32_960_771),
    "KL 64, factor 8": (lambda: kl(64, 1, 2, 2, 4, blocks=1), 11_939_751),
    "KL 32, factor 4": (lambda: kl(64, 1, 2, 2), 5_120_039),
    "PatchGAN of two layers": (lambda: PatchDiscriminator(3, 64, 2), 663_361),
    "PatchGAN of three layers": (lambda: PatchDiscriminator(3, 64, 3), 2_765_633),
}


def count(net: torch.nn.Module) -> int:
    unknown = sum(part.table.weight.shape[1] for part in net.modules() if isinstance(part, LabelEmbedding))
    return sum(parameter.numel() for parameter in net.parameters()) - unknown


@pytest.fixture(autouse=True)
def _without_values(monkeypatch):
    """Nothing to iterate on where tensors have no values, and "meta" takes seconds for it."""
    monkeypatch.setattr(parametrizations._SpectralNorm, "_power_method", lambda *_: None)
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", ROWS)
def test_families_have_the_published_counts(name):
    family, size, num_classes, settings, *expected = ROWS[name]
    if family == "autoencoder":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    elif family == "biggan":
        settings = {**settings, "init": "xavier"}  # "meta" cannot make orthogonal weights
    built = recipes.build(recipes.resolve(family, {"family": settings}), (3, size, size), num_classes)
    assert [count(getattr(built, network)) for network in NETWORKS if hasattr(built, network)] == expected


@pytest.mark.parametrize("name", PARTS)
def test_parts_have_the_published_counts(name):
    if name.startswith("KL"):
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    build, expected = PARTS[name]
    assert count(build()) == expected
