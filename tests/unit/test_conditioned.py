"""Denoisers that read text: diffusers' classes, what they start from, and the faster attention."""

from __future__ import annotations

import pytest
import torch

from imagekiln.errors import RecipeError
from imagekiln.nets.clip_text import Encoded
from imagekiln.nets.conditioned import HEAD, SECOND, denoiser, hasten

pytest.importorskip("diffusers")

WIDTH = 32


def text(seed: int = 0, count: int = 2) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(count, 5, WIDTH, generator=generator)
    return Encoded(words, words * 2, torch.randn(count, WIDTH, generator=generator))


def made(kind: str, num_augment: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    net = denoiser(kind, (4, 8, 8), depth=2, widths=(32, 64), text_width=WIDTH, num_augment=num_augment).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("kind", ["sd3", "unet"])
def test_words_and_time_change_the_answer_and_nothing_crosses_the_batch(kind: str):
    net, z = made(kind), torch.randn(2, 4, 8, 8)
    time_B = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        answer = net(z, time_B, text())
        assert answer.shape == z.shape and answer.dtype == torch.float32
        assert not torch.allclose(answer, net(z, time_B, text(1)), atol=1e-3)
        assert not torch.allclose(answer, net(z, time_B.flip(0), text()), atol=1e-3)
        alone = net(z[1:], time_B[1:], Encoded(*(part[1:] for part in text())))
    assert torch.allclose(alone, answer[1:], atol=1e-5)


@pytest.mark.parametrize("kind", ["sd3", "unet"])
def test_what_was_done_to_a_picture_changes_its_answer_alone(kind: str):
    net, z, time_B = made(kind, num_augment=15), torch.randn(3, 4, 8, 8), torch.tensor([100.0, 500.0, 900.0])
    done_BA = torch.zeros(3, 15)
    with torch.no_grad():
        plain = net(z, time_B, text(count=3))
        assert torch.equal(net(z, time_B, text(count=3), done_BA), plain)
        done_BA[1, 4] = 1
        changed = (net(z, time_B, text(count=3), done_BA) - plain).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, True, False]
    assert net.net.state_dict().keys() == made(kind).net.state_dict().keys()  # what exports write


@pytest.mark.parametrize("kind", ["sd3", "unet"])
def test_the_faster_attention_is_the_stock_one(kind: str):
    from diffusers.models import attention_processor as stock

    net, z, time_B = made(kind), torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0])
    assert all(type(one).__module__.startswith("imagekiln") for one in net.net.attn_processors.values())
    ours = net(z, time_B, text())
    ours.square().sum().backward()
    slopes = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    net.net.set_attn_processor(stock.JointAttnProcessor2_0() if kind == "sd3" else stock.AttnProcessor2_0())
    theirs = net(z, time_B, text())
    theirs.square().sum().backward()
    assert torch.allclose(ours, theirs, atol=1e-5)
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(slopes[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_attention_that_is_not_plain_stays_as_it_is():
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    kinds = {"norm_num_groups": 4, "qk_norm": "layer_norm", "residual_connection": True, "rescale_output_factor": 2.0}
    layers = [Attention(8, heads=2, dim_head=4, **{name: value}) for name, value in kinds.items()]
    layers.append(Attention(8, heads=2, dim_head=4, kv_heads=1))
    for layer in layers:
        hasten(layer)
        assert type(layer.processor) is AttnProcessor2_0
    hasten(plain := Attention(8, heads=2, dim_head=4))
    assert type(plain.processor) is not AttnProcessor2_0


def test_blocks_begin_as_the_identity():
    """Zero gates: the first answer is zero, and every block passes its tokens on."""
    torch.manual_seed(0)
    net = denoiser("sd3", (4, 8, 8), depth=2, widths=(), text_width=WIDTH).eval()
    with torch.no_grad():
        assert float(net(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 999.0]), text()).abs().max()) == 0
        block = net.net.transformer_blocks[0]
        tokens, words, temb = torch.randn(2, 16, 2 * HEAD), torch.randn(2, 5, 2 * HEAD), torch.randn(2, 2 * HEAD)
        after_words, after = block(hidden_states=tokens, encoder_hidden_states=words, temb=temb)
    assert torch.equal(after, tokens) and torch.equal(after_words, words)


def test_shapes_are_those_of_stable_diffusion_3():
    """Parameters by hand: patches, positions, time, text, words, blocks, output."""
    depth, width, channels = 2, 2 * HEAD, 4
    net = denoiser("sd3", (channels, 8, 8), depth=depth, widths=(), text_width=WIDTH)
    patches = 4 * channels * width + width
    time_text = 256 * width + width + width * width + width
    time_text += (WIDTH + SECOND) * width + width + width * width + width
    words = (WIDTH + SECOND) * width + width

    def block(last: bool) -> int:
        modulation = 6 * width * (width + 1) + (2 if last else 6) * width * (width + 1)
        joint = 8 * width * (width + 1) - (width * (width + 1) if last else 0)
        forward = 8 * width * width + 5 * width
        return modulation + joint + forward * (1 if last else 2)

    out = 2 * width * (width + 1) + width * 4 * channels + 4 * channels
    total = patches + time_text + words + block(False) + block(True) + out
    assert sum(parameter.numel() for parameter in net.parameters()) == total


def stock(net: torch.nn.Module) -> torch.nn.Module:
    """diffusers' own network with the same weights, its own way to tell places included."""
    theirs = type(net.net).from_config(dict(net.net.config)).eval()
    theirs.load_state_dict(net.net.state_dict())
    return theirs


def answered(theirs: torch.nn.Module, z: torch.Tensor, time_B: torch.Tensor, told: Encoded) -> torch.Tensor:
    words, whole = (torch.nn.functional.pad(part, (0, SECOND)) for part in (told.before_BLW, told.pooled_BP))
    return theirs(z, encoder_hidden_states=words, pooled_projections=whole, timestep=time_B).sample


@torch.no_grad()
@pytest.mark.parametrize("side", [2, 6, 8])
def test_pictures_of_its_own_size_have_the_places_of_diffusers(side: int):
    torch.manual_seed(0)
    net = denoiser("sd3", (4, side, side), depth=2, widths=(), text_width=WIDTH).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs, z, time_B = stock(net), torch.randn(2, 4, side, side), torch.tensor([100.0, 900.0])
    assert list(net.state_dict()) == [f"net.{name}" for name in theirs.state_dict()]
    assert torch.equal(net.net.pos_embed(z), theirs.pos_embed(z))
    wide = net.wide()
    assert torch.equal(wide.pos_embed(z), theirs.pos_embed(z))
    hasten(wide)
    assert torch.equal(answered(wide, z, time_B, text()), net(z, time_B, text()))


@torch.no_grad()
def test_places_of_other_shapes_continue_those_of_its_own_size():
    """Cut from the middle of one table, by diffusers too; the place of a patch is sin and cos of its row and column."""
    net, time_B = made("sd3"), torch.tensor([100.0, 900.0])
    own, wide = net.net.pos_embed, net.wide()
    assert wide.config.pos_embed_max_size == 2 * net.net.config.pos_embed_max_size == 8
    for rows, columns in ((12, 4), (4, 12), (8, 6), (16, 16), (2, 14)):
        z = torch.randn(2, 4, rows, columns)
        torch.testing.assert_close(net(z, time_B, text()), answered(wide, z, time_B, text()), atol=1e-5, rtol=0)
        found = own(z) - own.proj(z).flatten(2).transpose(1, 2)
        down, right = (torch.arange(side // 2) + (8 - side // 2) // 2 - 2.0 for side in (rows, columns))
        rates = 10000 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
        angles_down, angles_right = down[:, None] * rates, right[:, None] * rates
        by_row = torch.cat([angles_down.sin(), angles_down.cos()], 1)[:, None].expand(-1, len(right), -1)
        by_column = torch.cat([angles_right.sin(), angles_right.cos()], 1)[None].expand(len(down), -1, -1)
        by_hand = torch.cat([by_column, by_row], -1).flatten(0, 1)
        torch.testing.assert_close(found[0], by_hand, atol=1e-4, rtol=0)
        assert net.fits(rows, columns)
    assert not net.fits(18, 2) and not net.fits(7, 8) and not net.fits(8, 5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="even size"):
        denoiser("sd3", (4, 7, 7), depth=1, widths=(), text_width=WIDTH)
    with pytest.raises(RecipeError, match="divisible by 4"):
        denoiser("unet", (4, 6, 6), depth=1, widths=(32, 32, 64), text_width=WIDTH)
    with pytest.raises(RecipeError, match="multiples of 32"):
        denoiser("unet", (4, 8, 8), depth=1, widths=(20,), text_width=WIDTH)
