"""Tests, one class per section of iwm.py; each test is one claim. References are independent: torchvision's functional
ops, naive loops, numbers worked by hand.

    pytest -q                    # all of them
    pytest -q -k jitter          # one topic
    IWM=my_iwm pytest -q         # the same tests against another module, say a student's own
    python test_iwm.py           # no test: a benchmark of this machine
"""

import ast
import importlib
import json
import os
import random
import re
import subprocess
import sys
import time
import types
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import ColorJitter

import finetune
import train

HERE = os.path.dirname(os.path.abspath(__file__))
reference = importlib.import_module("iwm")
iwm = importlib.import_module(os.environ.get("IWM", "iwm"))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
TINY = iwm.Config(saturation=0.2, hue=0.1, width=32, depth=2, heads=2, pred_width=16, pred_depth=2, batch_size=8)
IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])  # brightness, contrast, saturation, hue


@pytest.fixture(autouse=True)
def only_its_own_part(request, monkeypatch):
    """Grading IWM=my_iwm, a test class takes from it what it GRADES and the rest from iwm.py: a gap fails its own tests."""
    own = getattr(request.cls, "GRADES", "").split()
    for name, value in list(vars(reference).items()):
        if iwm is not reference and getattr(value, "__module__", "") == "iwm":
            if name in own:
                monkeypatch.setattr(reference, name, getattr(iwm, name))
            else:
                monkeypatch.setattr(iwm, name, value, raising=False)


def close(ours, expected, message, atol=1e-5, rtol=0.0):
    """Equal up to rounding; if not, the message says what is broken, below it where and by how much."""
    assert ours.shape == expected.shape, f"{message}\nexpected shape {[*expected.shape]}, got {[*ours.shape]}"
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol, msg=lambda found: f"{message}\n{found}")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(n=64, size=32):
    """Noise, flat greys, black, white, and colours with equal channels: where colour code goes wrong."""
    images = torch.rand(n, 3, size, size, generator=seeded())
    images[0], images[1], images[2:6] = 0, 1, images[2:6, :1]
    images[6:12] = (3 * images[6:12]).round() / 3
    return images


def tiny(seed=0, **changes):
    """A tiny IWM whose teacher has moved away from the encoder, so that no test can mistake one for the other."""
    torch.manual_seed(seed)
    model = iwm.IWM(replace(TINY, **changes))
    for p in model.teacher.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    return model


class TestConfig:
    GRADES = "Config setting"

    def test_presets_build_and_say_what_they_are(self):
        assert {"shapes", "cifar", "imagenet100", "paper"} <= set(iwm.PRESETS)
        paper = iwm.PRESETS["paper"]
        assert (paper.width, paper.depth, paper.patch, paper.pred_depth, paper.pred_width) == (768, 12, 16, 18, 384)
        close(paper.jitter_strengths, torch.tensor([0.4, 0.4, 0.2, 0.1]), "the paper's jitter strengths")

    @pytest.mark.parametrize("wrong", [
        {"patch": 5}, {"width": 30}, {"pred_width": 18, "heads": 4}, {"conditioning": "film"}, {"steps": 0},
        {"lr": float("nan")}, {"lr": -1.0}, {"hue": float("nan")}, {"ema": 1.5}, {"bank": 1}, {"block_min": 0.3},
        {"context": 1.0}, {"crop_min": 0.0}, {"patch": 32}, {"batch_size": -2},
    ])  # fmt: skip
    def test_wrong_setting_is_refused_and_named(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            iwm.Config(**wrong)


class TestJitter:
    """Each operation equals torchvision's functional one, with parameters of its own for each image."""

    GRADES = "jitter shift_hue blend grayscale jitter_params"

    @staticmethod
    def reference(images, params):
        out = []
        for image, (b, c, s, h) in zip(images, params.tolist()):
            image = TF.adjust_contrast(TF.adjust_brightness(image, b), c)
            out.append(TF.adjust_hue(TF.adjust_saturation(image, s), h))
        return torch.stack(out)

    def test_jitter_equals_torchvision_on_random_parameters(self):
        images = some_images()
        params = 2 * torch.rand(64, 4, generator=seeded(1))
        params[:, 3] = params[:, 3] / 2 - 0.5
        close(
            iwm.jitter(images, params),
            self.reference(images, params),
            "brightness, contrast, saturation, hue, in this order",
        )

    @pytest.mark.parametrize(
        "params", [(0, 1, 1, 0), (1, 0, 1, 0), (1, 1, 0, 0), (2, 2, 2, 0.5), (1, 1, 1, -0.5), (0, 0, 0, 0)]
    )
    def test_jitter_equals_torchvision_at_the_ends_of_the_range(self, params):
        images, params = some_images(), torch.tensor(params).expand(64, 4).float()
        close(
            iwm.jitter(images, params),
            self.reference(images, params),
            "brightness, contrast, saturation, hue, in this order",
        )

    def test_jitter_with_identity_parameters_changes_nothing(self):
        images = some_images()
        close(iwm.jitter(images, IDENTITY.expand(64, 4)), images, "(1, 1, 1, 0) must change nothing", atol=2e-6)

    def test_jitter_hue_is_in_turns(self):
        """A third of a turn takes red to green; the unit is neither degrees nor radians."""
        red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
        shifted = iwm.jitter(red, torch.tensor([[1.0, 1.0, 1.0, 1 / 3]]))
        close(shifted.flatten(), torch.tensor([0.0, 1.0, 0.0]), "hue is in turns: a third of one takes red to green")

    def test_drawn_parameters_fill_their_range_and_no_more(self):
        config = replace(TINY, strength=2.0, jitter_prob=0.8)
        params = iwm.jitter_params(20_000, config, seeded())
        on = (params != IDENTITY).any(dim=1)
        assert abs(on.float().mean() - 0.8) < 0.02, "jitter_prob 0.8: one in five keeps the identity"
        low, high = params.amin(dim=0), params.amax(dim=0)
        close(low, torch.tensor([0.2, 0.2, 0.6, -0.2]), "lowest parameters: identity - strength", atol=0.01)
        close(high, torch.tensor([1.8, 1.8, 1.4, 0.2]), "highest parameters: identity + strength", atol=0.01)
        strong = iwm.jitter_params(20_000, replace(TINY, strength=9.0), seeded())
        assert strong[:, :3].min() >= 0, "factors are 0 or more"
        assert strong[:, 3].abs().max() <= 0.5, "half a turn reaches every hue"

    def test_jitter_components_are_drawn_independently(self):
        params = iwm.jitter_params(20_000, TINY, seeded(), always=True)
        assert (params.T.corrcoef() - torch.eye(4)).abs().max() < 0.05, "each of the four has a draw of its own"

    def test_strong_jitter_draws_no_pile_of_black_images(self):
        """As torchvision: uniform between max(0, 1 - strength) and 1 + strength, not clamped after drawing."""
        params = iwm.jitter_params(1000, replace(TINY, strength=5.0), seeded(), always=True)
        assert (params[:, :3] == 0).sum() <= 1 and params[:, 0].max() > 2.9, "do not clamp after drawing"

    def test_always_draws_no_identity(self):
        params = iwm.jitter_params(1000, TINY, seeded(), always=True)
        assert (params != IDENTITY).any(dim=1).all(), "a bank without identities has no duplicates"


class TestDestructive:
    GRADES = "gaussian_blur blur_sigma solarize grayscale"

    @pytest.mark.parametrize("size", [32, 96, 224])
    def test_blur_equals_torchvision_with_a_sigma_per_image(self, size):
        images = some_images(6, size)
        low, high = iwm.blur_sigma(size)
        sigma = torch.linspace(low, high, 6)
        kernel = 2 * int(-(-3 * high // 1)) + 1
        expected = torch.stack(
            [TF.gaussian_blur(image, [kernel] * 2, [s] * 2) for image, s in zip(images, sigma.tolist())]
        )
        close(
            iwm.gaussian_blur(images, sigma),
            expected,
            "a Gaussian of sigma pixels, 3 sigma each way, borders reflected",
        )

    def test_blur_is_visible_at_32_pixels(self):
        """Scaled from 224 pixels sigma would end at 0.29 pixels, which changes almost nothing."""
        noise = torch.rand(1, 3, 32, 32, generator=seeded())
        strongest = torch.tensor([iwm.blur_sigma(32)[1]])
        assert iwm.gaussian_blur(noise, strongest).std() < 0.5 * noise.std(), "sigma must not vanish at 32 pixels"

    def test_gray_and_solarize_equal_torchvision(self):
        images = some_images()
        close(iwm.grayscale(images), TF.rgb_to_grayscale(images), "luma: 0.2989 R + 0.587 G + 0.114 B, one channel")
        assert torch.equal(iwm.solarize(images), TF.solarize(images, 0.5)), (
            "invert what is 0.5 or brighter, and only that"
        )

    def test_blur_differs_between_images(self):
        config = replace(TINY, **TestViews.OFF | {"blur_prob": 1.0})
        images = torch.rand(1, 3, 32, 32, generator=seeded()).expand(64, 3, 32, 32)
        x, _, _ = iwm.make_views(images, config, seeded())
        assert x.std(dim=(1, 2, 3)).std() > 0.01, "every image needs a sigma of its own"


class TestViews:
    GRADES = "make_views make_action random_crop_flip"
    OFF = dict(crop_min=1.0, jitter_prob=0.0, blur_prob=0.0, gray_prob=0.0, solarize_prob=0.0)

    def test_views_are_images_and_the_action_has_7_numbers(self):
        x, y, a = iwm.make_views(some_images(), TINY, seeded())
        assert x.shape == y.shape == (64, 3, 32, 32) and a.shape == (64, 7), (
            "source, target, action: 4 changes, 3 flags"
        )
        for view in (x, y):
            assert view.min() >= 0 and view.max() <= 1, "views are images in 0..1; they are normalised last, in the ViT"

    def test_the_same_generator_gives_the_same_views(self):
        images = some_images()
        for one, other in zip(iwm.make_views(images, TINY, seeded(3)), iwm.make_views(images, TINY, seeded(3))):
            assert torch.equal(one, other), "draw from the generator that is passed in, and from nothing else"

    def test_both_views_share_one_crop_and_flip(self):
        config = replace(TINY, **self.OFF | {"crop_min": 0.3})
        x, y, a = iwm.make_views(some_images(), config, seeded())
        assert torch.equal(x, y), "without photometric changes x and y must be the same pixels"
        assert (a == 0).all(), "nothing changes from x to y: the action is zero"

    def test_crop_off_is_the_image_or_its_mirror(self):
        images = some_images()
        x, _, _ = iwm.make_views(images, replace(TINY, **self.OFF), seeded())
        straight = (x - images).abs().amax(dim=(1, 2, 3)) < 1e-4
        mirrored = (x - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
        assert (straight | mirrored).all(), "crop_min 1 is no crop"
        assert 15 < mirrored[6:].sum() < 50, "about half of the images are mirrored"

    def test_a_crop_repeats_the_border(self):
        """Enlarged, a crop at the image's side reads beyond the centres of the outermost pixels: white stays white."""
        white = torch.ones(64, 3, 32, 32)
        close(iwm.random_crop_flip(white, TINY, seeded()), white, "a crop of a white image is white")

    def test_crops_have_the_asked_area(self):
        """Crop an image whose channels are its coordinates: their ranges are the crop's sides."""
        axis = torch.linspace(0, 1, 64)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        images = torch.stack([x, y, 0 * x]).expand(2000, 3, 64, 64)
        crop = iwm.random_crop_flip(images, replace(TINY, crop_min=0.3), seeded())
        side = crop.amax(dim=(2, 3)) - crop.amin(dim=(2, 3))
        area, aspect = side[:, 0] * side[:, 1], side[:, 0] / side[:, 1]
        assert 0.25 < area.min() < 0.33 and 0.9 < area.max() < 1.0 and 0.6 < area.mean() < 0.66, "area in crop_min..1"
        assert 0.72 < aspect.min() and aspect.max() < 1.39, "width / height in 3/4..4/3"
        assert (crop[:, 0, 0, 0] > crop[:, 0, 0, -1]).float().mean().sub(0.5).abs() < 0.05, "half of them are mirrored"

    def test_the_target_is_jittered_only(self):
        """Nothing destructive touches y (paper section 3): with jitter off, y is the crop while x is grey."""
        x, y, a = iwm.make_views(
            some_images(),
            replace(TINY, **self.OFF | {"gray_prob": 1.0, "blur_prob": 1.0, "solarize_prob": 1.0}),
            seeded(),
        )
        plain, _, _ = iwm.make_views(some_images(), replace(TINY, **self.OFF), seeded())
        assert torch.equal(y, plain), "blur, grayscale and solarisation belong to the source view only"
        assert (x[:, 0] == x[:, 1]).all() and not torch.equal(x, y), "x must be grey here"
        assert (a[:, 4:] == 1).all() and (a[:, :4] == 0).all(), "three flags set, no jitter difference"

    def test_the_source_is_jittered_then_blurred_then_greyed_then_solarised(self):
        off = self.OFF | {"jitter_prob": 1.0, "brightness": 0.0, "saturation": 0.0, "hue": 0.0}
        plain, _, a = iwm.make_views(some_images(), replace(TINY, **off), seeded())
        blurred, _, _ = iwm.make_views(some_images(), replace(TINY, **off | {"blur_prob": 1.0}), seeded())
        for before, blur in ((plain, 0.0), (blurred, 1.0)):
            flags = {"blur_prob": blur, "gray_prob": 1.0, "solarize_prob": 1.0}
            x, _, b = iwm.make_views(some_images(), replace(TINY, **off | flags), seeded())
            assert torch.equal(a[:, :4], b[:, :4]), "the flags must not change what jitter draws"
            gray = TF.rgb_to_grayscale(before)
            expected = torch.where(gray >= 0.5, 1 - gray, gray).expand(-1, 3, -1, -1)
            assert ((x - expected).abs() < 1e-4).float().mean() > 0.99, "jittered, blurred, greyed, then solarised"

    @pytest.mark.parametrize("flag, name", list(enumerate(["blur_prob", "gray_prob", "solarize_prob"])))
    def test_each_flag_stands_for_its_operation_on_x(self, flag, name):
        x, y, a = iwm.make_views(some_images(), replace(TINY, **self.OFF | {name: 0.5}), seeded())
        changed = (x != y).flatten(1).any(dim=1)
        assert (a[:, 4 + flag] == 1).sum() in range(15, 50), f"{name} 0.5 must flag about half of the 64 images"
        assert not changed[a[:, 4 + flag] == 0].any(), "an image without the flag is changed"
        # the weakest blurs (sigma 0.05 pixels) change nothing in float32
        done = changed[12:][a[12:, 4 + flag] == 1].float().mean()
        assert done > (0.7 if name == "blur_prob" else 0.99), "an image with the flag is unchanged"

    def test_the_action_takes_x_to_y(self):
        """a = (y's parameters - x's) / strength. Brightness alone: mean(y) / mean(image) - mean(x) / mean(image)."""
        images = torch.full((200, 3, 32, 32), 0.4)
        config = replace(TINY, **self.OFF | {"jitter_prob": 0.8, "contrast": 0.0, "saturation": 0.0, "hue": 0.0})
        x, y, a = iwm.make_views(images, config, seeded())
        expected = (y - x)[:, 0, 0, 0] / 0.4 / config.brightness
        close(a[:, 0], expected, "sign or scale of the action: (y's parameter - x's) / strength", atol=1e-4)
        assert (a[:, 1:] == 0).all(), "only brightness changes here"

    def test_the_action_is_of_order_one(self):
        _, _, a = iwm.make_views(torch.rand(5000, 3, 32, 32), replace(TINY, strength=2.0), seeded())
        assert (a[:, :4].std(dim=0) > 0.5).all() and a[:, :4].abs().max() <= 2, (
            "differences are in units of the strength"
        )


class TestMasks:
    GRADES = "block_unions sample_masks"

    @pytest.mark.parametrize("grid, share", [(8, 0.57), (14, 0.55), (4, 0.56), (2, 0.5)])
    def test_masks_split_the_patches_with_the_papers_share_of_context(self, grid, share):
        context, masked = iwm.sample_masks(32, grid, TINY, seeded())
        both = torch.cat([context, masked], dim=1).sort(dim=1).values
        assert torch.equal(both, torch.arange(grid**2).expand(32, -1)), (
            "each patch must be either context or masked, once"
        )
        assert abs(context.shape[1] / grid**2 - share) < 0.07, (
            f"about {share:.0%} of the patches are context, are the two swapped?"
        )

    def test_mask_shapes_never_change(self):
        shapes = {tuple(m.shape for m in iwm.sample_masks(16, 8, TINY, seeded(s))) for s in range(20)}
        assert len(shapes) == 1, "K and M must be the same in every batch: batches and torch.compile need it"

    def test_every_patch_is_context_and_target_without_bias(self):
        _, masked = iwm.sample_masks(20_000, 8, TINY, seeded())
        often = F.one_hot(masked, 64).sum(dim=(0, 1)).view(8, 8) / 20_000
        assert often.min() > 0.03 and often.max() < 0.97, "some patch is never masked, or always"
        middle, corners = often[3:5, 3:5].mean(), often[::7, ::7].mean()
        assert middle > 2 * corners, "rectangles cover the middle more often: are context and masked patches swapped?"
        for mirrored in (often.flip(0), often.flip(1)):
            close(
                often,
                mirrored,
                "masked more often on one side than on the other: bias of the raster order?",
                atol=0.025,
            )

    def test_masks_are_blocks(self):
        """Neighbours share their fate far more often than they would if patches were masked one by one."""
        _, masked = iwm.sample_masks(500, 8, TINY, seeded())
        board = F.one_hot(masked, 64).sum(dim=1).view(-1, 8, 8)
        same = (board[:, :, 1:] == board[:, :, :-1]).float().mean()
        assert same > 0.75, "masks must be unions of rectangles, not single patches"

    def test_one_rectangle_has_the_asked_area_and_reaches_every_patch(self):
        board = iwm.block_unions(4000, 14, replace(TINY, blocks=1), seeded())
        height, width = board.any(dim=2).sum(dim=1).float(), board.any(dim=1).sum(dim=1).float()
        assert torch.equal(height * width, board.sum(dim=(1, 2)).float()), "one block must be one rectangle"
        area, aspect = height * width / 196, height / width
        assert 0.12 < area.min() and area.max() < 0.24 and abs(area.mean() - 0.175) < 0.01, "15-20 % of the image each"
        assert 0.55 < aspect.min() and aspect.max() < 1.9 and 1.0 < aspect.mean() < 1.25, "aspect ratio 0.75-1.5"
        assert board.any(dim=0).all(), "the last row and column must be reachable too"

    def test_masks_differ_between_images(self):
        _, masked = iwm.sample_masks(64, 8, TINY, seeded())
        assert len(masked.sort(dim=1).values.unique(dim=0)) > 50, "every image needs a mask of its own"


class TestViT:
    GRADES = "ViT Block attention gather sincos_positions init_weights"

    def test_encoder_gives_one_latent_per_patch(self):
        model = tiny()
        assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 64, 32), "[B, N, D] without a context"
        few = torch.arange(5).expand(2, 5)
        assert model.encoder(torch.rand(2, 3, 32, 32), few).shape == (2, 5, 32), "[B, K, D]: context patches only"

    def test_encoder_does_not_see_masked_patches(self):
        model, images = tiny(), torch.rand(4, 3, 32, 32)
        context, masked = iwm.sample_masks(4, 8, TINY, seeded())
        seen = torch.zeros(4, 64).scatter_(1, context, 1).view(4, 1, 8, 8)
        seen = seen.repeat_interleave(4, 2).repeat_interleave(4, 3)
        hidden = images * seen + torch.rand(4, 3, 32, 32) * (1 - seen)
        same = model.encoder(images, context), model.encoder(hidden, context)
        close(*same, "masked pixels reach the encoder: drop the patches before the blocks", atol=1e-6)

    def test_patches_keep_their_positions_when_gathered(self):
        """Seeing all patches in another order gives the same latents in that order."""
        model, images = tiny(), torch.rand(2, 3, 32, 32)
        order = torch.stack([torch.randperm(64, generator=seeded(s)) for s in range(2)])
        expected = iwm.gather(model.encoder(images), order)
        close(model.encoder(images, order), expected, "a patch lost its position when it was gathered")

    def test_patch_index_is_row_times_grid_plus_column(self):
        model = tiny(depth=1)
        image = torch.full((1, 3, 32, 32), 0.5)
        changed = image.clone()
        changed[:, :, 4:8, 8:12] = 1.0  # row 1, column 2
        context = torch.arange(64)[torch.arange(64) != 10].unsqueeze(0)
        same = torch.equal(model.encoder(image, context), model.encoder(changed, context))
        assert same, "patch 10 of an 8 x 8 grid is row 1, column 2"

    def test_the_encoder_knows_where_its_patches_are(self):
        """The same pixels at other positions must give other latents: without positions only their order would change."""
        model, images = tiny(), torch.rand(1, 3, 32, 32, generator=seeded())
        moved = images.roll(4, dims=3)  # every patch one column further
        latents = model.encoder(images).view(1, 8, 8, -1).roll(1, dims=2).flatten(1, 2)
        assert (model.encoder(moved) - latents).abs().max() > 0.05, "position embeddings are missing"

    def test_block_equals_pytorchs_pre_norm_layer(self):
        block = iwm.Block(16, 2)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        pairs = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "proj.", "linear1.": "fc1.", "linear2.": "fc2.",
                 "norm1.": "norm1.", "norm2.": "norm2."}  # fmt: skip
        state = {a + kind: block.state_dict()[b + kind] for a, b in pairs.items() for kind in ("weight", "bias")}
        layer.load_state_dict(state)
        x = torch.rand(2, 5, 16, generator=seeded())
        close(block(x), layer(x), "x + attention(norm(x)), then x + mlp(norm(x))", rtol=1e-4)

    def test_output_projections_start_smaller_in_deeper_blocks(self):
        """I-JEPA: those of block i are divided by sqrt(2 i), so that the residual stream does not grow with depth."""
        torch.manual_seed(0)
        blocks = iwm.ViT(replace(TINY, width=64, depth=4)).blocks
        for name in ("proj", "fc2"):
            std = torch.stack([getattr(block, name).weight.std() for block in blocks])
            expected = torch.tensor(
                [(2 / (64 + {"proj": 64, "fc2": 256}[name]) / (2 * i)) ** 0.5 for i in (1, 2, 3, 4)]
            )
            close(std, expected, f"{name} of block i: Xavier's deviation divided by sqrt(2 i)", atol=0, rtol=0.05)

    def test_content_outweighs_position_in_the_first_targets(self):
        """With weights of 0.02 at small widths four fifths of the targets' variance are the position alone."""
        torch.manual_seed(0)
        h = iwm.IWM(iwm.Config()).targets(
            torch.rand(64, 3, 1, 1, generator=seeded()).expand(64, 3, 32, 32).contiguous()
        )
        position, all_of_it = h.mean(dim=0).var(dim=0).mean(), h.var(dim=(0, 1)).mean()
        assert position < 0.4 * all_of_it, "the first targets say where a patch is, not what it shows"

    def test_positions_are_distinct_and_nearer_for_neighbours(self):
        p = iwm.sincos_positions(32, 8)
        assert p.shape == (64, 32) and len(p.unique(dim=0)) == 64, "one vector for each position, no two alike"
        distance = torch.cdist(p, p)
        assert distance[0, 1] < distance[0, 4] and distance[0, 8] < distance[0, 32], "along rows and along columns"

    def test_attention_equals_pytorchs(self):
        q, k, v = torch.rand(3, 2, 4, 10, 8, generator=seeded())
        expected = F.scaled_dot_product_attention(q, k, v)
        close(iwm.attention(q, k, v), expected, "softmax(q k^T / sqrt(d)) v", atol=1e-6, rtol=1e-5)


class TestPredictor:
    GRADES = "Predictor"

    @staticmethod
    def inputs(n=3):
        context, masked = iwm.sample_masks(n, 8, TINY, seeded())
        return torch.rand(n, context.shape[1], 32, generator=seeded(1)), context, masked

    @pytest.mark.parametrize("conditioning", ["none", "sequence", "feature"])
    def test_predictor_imagines_one_latent_per_masked_patch(self, conditioning):
        z, context, masked = self.inputs()
        out = tiny(conditioning=conditioning).predictor(z, context, masked, torch.rand(3, 7))
        assert out.shape == (3, masked.shape[1], 32), (
            "[B, M, D]: latents of the encoder's width at the masked positions"
        )

    @pytest.mark.parametrize("component", range(7))
    @pytest.mark.parametrize("conditioning", ["sequence", "feature"])
    def test_each_component_of_the_action_matters(self, conditioning, component):
        model, (z, context, masked) = tiny(conditioning=conditioning), self.inputs()
        action = torch.zeros(3, 7)
        before = model.predictor(z, context, masked, action)
        action[:, component] = 1
        change = (model.predictor(z, context, masked, action) - before).abs().max()
        assert change > 1e-4, f"the predictor does not hear component {component} of the action"

    @pytest.mark.parametrize("conditioning", ["none", "sequence", "feature"])
    def test_context_tokens_know_where_they_are(self, conditioning):
        model, (z, context, masked) = tiny(conditioning=conditioning), self.inputs()
        action = torch.zeros(3, 7)
        moved = model.predictor(z, context.flip(1), masked, action)
        assert (moved - model.predictor(z, context, masked, action)).abs().max() > 1e-3, "context positions are lost"

    @pytest.mark.parametrize("conditioning, extra", [("none", 0), ("sequence", 7), ("feature", 0)])
    def test_sequence_adds_one_token_per_component_for_every_N_others(self, conditioning, extra):
        model, (z, context, masked) = tiny(conditioning=conditioning), self.inputs()
        seen = []
        model.predictor.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
        model.predictor(z, context, masked, torch.zeros(3, 7))
        assert seen == [64 + extra], f"{conditioning}: K + M = 64 tokens and {extra} of the action"
        model.predictor.everywhere(torch.zeros(3, 64, 32), torch.zeros(3, 7))
        assert seen[1] == 2 * seen[0], "asked everywhere there are twice as many others: the action keeps its share"

    def test_feature_mixes_position_and_action_by_a_nonlinear_map(self):
        """If positions joined after the MLP, or the MLP were linear, action and position would only add up."""
        model, (z, context, masked) = tiny(conditioning="feature"), self.inputs()
        seen = []
        model.predictor.blocks[0].register_forward_hook(
            lambda module, args, out: seen.append(args[0][:, -masked.shape[1] :])
        )
        for action in (torch.zeros(3, 7), torch.ones(3, 7)):
            model.predictor(z, context, masked, action)
        change = seen[1] - seen[0]  # what the action does to the mask tokens, [3, M, W]
        assert (change - change[:, :1]).abs().max() > 1e-3, "the action must change each position in its own way"

    @pytest.mark.parametrize("conditioning", ["sequence"])
    def test_sequence_tells_the_components_apart(self, conditioning):
        """One layer shared by all action tokens could not: the transformer is blind to their order."""
        model, (z, context, masked) = tiny(conditioning=conditioning), self.inputs()
        one, other = torch.zeros(3, 7), torch.zeros(3, 7)
        one[:, 0], other[:, 1] = 1, 1
        difference = model.predictor(z, context, masked, one) - model.predictor(z, context, masked, other)
        assert difference.abs().max() > 1e-4, "each scalar of the action needs a linear layer of its own"

    def test_without_conditioning_the_action_is_not_seen(self):
        model, (z, context, masked) = tiny(conditioning="none"), self.inputs()
        one, other = (model.predictor(z, context, masked, a) for a in (torch.zeros(3, 7), torch.ones(3, 7)))
        assert torch.equal(one, other), "conditioning none: the action must not reach the predictor"

    @pytest.mark.parametrize("conditioning", ["none", "sequence", "feature"])
    def test_mask_tokens_know_where_they_are(self, conditioning):
        """Asking for the same positions in another order gives the same latents in that order, and they differ."""
        model, (z, context, masked) = tiny(conditioning=conditioning), self.inputs()
        action = torch.rand(3, 7, generator=seeded())
        out, flipped = (model.predictor(z, context, m, action) for m in (masked, masked.flip(1)))
        close(
            out.flip(1),
            flipped,
            "an imagined latent must depend on its position, not on its place in the list",
            rtol=1e-4,
        )
        assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3, "mask tokens lost their positions"


class TestIWM:
    GRADES = "IWM"

    @pytest.mark.parametrize("predict_all", [False, True])
    def test_loss_is_the_mean_squared_error_on_masked_patches_or_on_all(self, predict_all):
        """The loss written out again from the parts, with the views and masks that the same generator draws."""
        model, images = tiny(predict_all=predict_all), torch.rand(4, 3, 32, 32)
        x, y, action = iwm.make_views(images, TINY, generator := seeded(5))
        context, masked = iwm.sample_masks(4, 8, TINY, generator)
        masked = torch.arange(64).expand(4, -1) if predict_all else masked
        z_hat = model.predictor(model.encoder(x, context), context, masked, action)
        teacher = model.teacher(y)
        h = (teacher - teacher.mean(dim=2, keepdim=True)) / (
            teacher.var(dim=2, keepdim=True, unbiased=False) + 1e-5
        ).sqrt()
        total = sum(((z_hat[i, j] - h[i, patch]) ** 2).sum() for i in range(4) for j, patch in enumerate(masked[i]))
        expected = total / (masked.numel() * 32)
        message = "mean of (p(f(x), a, m) - layernorm(teacher(y)))^2 over masked patches: x to the encoder, all of y to the teacher"
        close(model.loss(images, seeded(5)), expected, message, rtol=1e-5)

    def test_targets_are_layer_normed_unless_turned_off(self):
        h = tiny().targets(torch.rand(2, 3, 32, 32))
        close(h.std(dim=2, unbiased=False), torch.ones(2, 64), "each target latent is layer-normed", atol=1e-2)
        model = tiny(target_norm=False)
        model.teacher.norm.weight.data.fill_(3.0)
        assert model.targets(torch.rand(2, 3, 32, 32)).std() > 2, (
            "target_norm=False gives the teacher's latents as they are"
        )

    def test_teacher_gets_no_gradient_encoder_and_predictor_do(self):
        model = tiny()
        model.loss(torch.rand(4, 3, 32, 32), seeded()).backward()
        assert all(p.grad is None for p in model.teacher.parameters()), (
            "the teacher received gradients: detach its output"
        )
        for part in (model.encoder, model.predictor):
            missing = [name for name, p in part.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
            assert not missing, f"no gradient reaches {missing}"

    def test_teacher_starts_as_the_encoder_and_moves_by_ema(self):
        model = iwm.IWM(TINY)
        before = [p.clone() for p in model.teacher.parameters()]
        for p, q in zip(model.encoder.parameters(), before):
            assert torch.equal(p, q), "the teacher starts as a copy of the encoder"
            p.data.add_(1.0)
        model.update_teacher(0.9)
        for p, q in zip(model.teacher.parameters(), before):
            close(p, q + 0.1, "momentum 0.9: teacher <- 0.9 teacher + 0.1 encoder")

    def test_imagine_asks_for_all_positions_of_an_unmasked_image(self):
        model, image = tiny(), torch.rand(1, 3, 32, 32)
        actions = torch.rand(5, 7, generator=seeded())
        out = model.imagine(image, actions)
        assert out.shape == (5, 64, 32), "one image, 5 actions: [5, N, D]"
        everything = torch.arange(64).unsqueeze(0)
        expected = model.predictor(model.encoder(image), everything, everything, actions[3:4])
        close(out[3:4], expected, "the student sees all patches, the predictor is asked for all of them", rtol=1e-4)

    def test_imagine_takes_several_images_each_with_its_action(self):
        model, images, actions = tiny(), torch.rand(2, 3, 32, 32), torch.rand(2, 7)
        one_by_one = torch.cat([model.imagine(images[i : i + 1], actions[i : i + 1]) for i in range(2)])
        close(model.imagine(images, actions), one_by_one, "each image goes with its own action", rtol=1e-4)

    def test_a_short_training_lowers_the_loss(self):
        model = tiny()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        images = torch.rand(32, 3, 1, 1, generator=seeded()).expand(32, 3, 32, 32)
        first = model.loss(images, seeded(1)).item()
        for step in range(40):
            loss = model.loss(images, seeded(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_teacher(0.99)
        assert model.loss(images, seeded(1)).item() < 0.7 * first, "40 steps on 32 plain colours must lower the loss"


class TestMRR:
    GRADES = "ranks mean_reciprocal_rank chance bank_actions sweep_params variants measure_world_model"

    def test_the_true_latents_have_mrr_1(self):
        bank = torch.randn(256, 4, 8, generator=seeded())
        assert iwm.mean_reciprocal_rank(bank, bank) == 1, "whoever imagines the truth has rank 1 everywhere"

    def test_an_action_blind_predictor_is_exactly_at_chance(self):
        bank = torch.randn(256, 4, 8, generator=seeded())
        blind = torch.randn(1, 4, 8, generator=seeded(1)).expand(256, 4, 8)
        assert abs(iwm.mean_reciprocal_rank(blind, bank) - 0.0239232) < 1e-6, "the same guess 256 times is chance"
        assert abs(iwm.chance(256) - 0.0239232) < 1e-6, "H(256) / 256"

    def test_ranks_worked_by_hand(self):
        bank = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
        imagined = torch.tensor([[0.9], [0.9], [4.4], [0.0]])
        assert iwm.ranks(imagined, bank).tolist() == [2, 1, 1, 4], (
            "1 + how many of the bank are nearer than the true one"
        )

    def test_ties_do_not_help(self):
        """All variants equal: each has the mean rank 2.5 of 4, not rank 1."""
        same = torch.ones(4, 3)
        found = iwm.ranks(torch.randn(4, 3, generator=seeded()), same).tolist()
        assert found == [2.5] * 4, "tied variants get the mean of the ranks that they share"

    def test_nan_does_not_help(self):
        found = iwm.mean_reciprocal_rank(torch.full((8, 3), torch.nan), torch.randn(8, 3, generator=seeded()))
        assert found < 0.25, "NaN is nearer to nothing"

    def test_the_bank_is_the_teachers_and_the_clean_image_the_students(self):
        model, image, params = tiny(), torch.rand(1, 3, 32, 32), iwm.jitter_params(4, TINY, seeded(), always=True)
        pictures, bank, imagined = iwm.variants(model, image, params)
        expected = F.layer_norm(model.teacher(pictures), [32])
        close(bank, expected, "the bank is the teacher's targets of the variants", atol=1e-4, rtol=1e-4)
        for p in model.teacher.parameters():
            p.data.zero_()
        again = iwm.variants(model, image, params)[2]
        close(again, imagined, "what is imagined starts from the student's latents, not the teacher's", rtol=1e-4)

    def test_a_shuffled_bank_is_noticed(self):
        bank = torch.randn(64, 8, generator=seeded())
        assert iwm.mean_reciprocal_rank(bank, bank.roll(1, dims=0)) < 0.2, "imagined[i] belongs to bank[i]"

    def test_a_model_without_conditioning_measures_chance(self):
        result = iwm.measure_world_model(tiny(conditioning="none"), torch.rand(2, 3, 32, 32), seeded())
        assert abs(result["mrr"] - result["chance"]) < 1e-4, "an action-blind model above chance: the measure leaks"

    def test_a_perfect_world_model_measures_1(self):
        """An oracle that jitters the image by the action and asks the teacher: the sign and scale of the bank's actions."""
        model = tiny()

        def oracle(image, action):
            params = IDENTITY + action[:, :4] * model.config.jitter_strengths
            return model.targets(iwm.jitter(image.expand(len(action), -1, -1, -1), params))

        model.imagine = oracle
        result = iwm.measure_world_model(model, torch.rand(2, 3, 32, 32), seeded())
        perfect = result["mrr"] > 0.999 and result["hit1"] > 0.999 and result["error_hue"] < 0.01
        assert perfect, "the actions do not lead from the clean image to the variants of the bank"

        def noisy(image, action):
            """Errors that differ from patch to patch and from action to action, and cancel in the mean over the patches."""
            noise = torch.randn(len(action), model.config.grid**2, model.config.width, generator=seeded())
            return oracle(image, action) + 100 * (noise - noise.mean(dim=1, keepdim=True))

        model.imagine = noisy
        result = iwm.measure_world_model(model, torch.rand(2, 3, 32, 32), seeded())
        assert result["mrr"] < 0.1 and result["mrr_pooled"] > 0.9, "pooled: means over the patches are compared"

    def test_sweeps_cover_the_range_of_one_component(self):
        params = iwm.sweep_params(3, TINY, n=5)
        close(params[:, 3], torch.tensor([-0.1, -0.05, 0.0, 0.05, 0.1]), "hue from one end of its range to the other")
        assert (params[:, :3] == 1).all(), "the other components stay at identity"


class TestProbes:
    GRADES = "rankme knn_accuracy linear_accuracy"

    def test_rankme_counts_dimensions(self):
        basis = torch.linalg.qr(torch.randn(100, 5, generator=seeded())).Q
        assert abs(iwm.rankme(basis) - 5) < 0.01, "five equal singular values: rank 5"
        assert iwm.rankme(torch.ones(50, 8)) < 1.01, "a constant has rank 1"

    def test_knn_and_linear_find_separable_classes_and_no_more(self):
        labels = torch.arange(400) % 4
        features = F.one_hot(labels, 16).float() + 0.1 * torch.randn(400, 16, generator=seeded())
        noise = torch.randn(400, 16, generator=seeded(1))
        for probe in (iwm.knn_accuracy, iwm.linear_accuracy):
            assert probe(features[:200], labels[:200], features[200:], labels[200:]) > 0.99
            assert probe(noise[:200], labels[:200], noise[200:], labels[200:]) < 0.45


class TestShapes:
    def test_shapes_are_deterministic_and_splits_differ(self):
        one, same, other = train.shapes(50, 0), train.shapes(50, 0), train.shapes(50, 1)
        assert all(torch.equal(one[name], same[name]) for name in one) and not torch.equal(
            one["images"], other["images"]
        )

    def test_factors_are_balanced_and_masks_show_objects(self):
        data = train.shapes(2000, 0)
        assert data["images"].dtype == torch.uint8 and data["images"].shape == (2000, 3, 32, 32)
        for name, kinds in (("shape", 8), ("colour", 8), ("texture", 4), ("background", 4)):
            assert (data[name].bincount(minlength=kinds) > 0.7 * 2000 / kinds).all()
        covered = data["mask"].float().mean(dim=(1, 2))
        assert 0.03 < covered.min() and covered.max() < 0.7


class TestRecipe:
    def test_schedules_start_peak_and_end_where_they_should(self):
        config = iwm.Config(steps=1000, warmup=0.1, lr=1.0, weight_decay=0.04, weight_decay_end=0.4, ema=0.99)
        lr, weight_decay, momentum = zip(*(train.schedule(step, config) for step in range(1000)))
        assert lr[0] < 0.02 and abs(max(lr) - 1) < 0.02 and lr.index(max(lr)) in range(98, 102) and lr[-1] < 1e-4
        assert abs(lr[549] - 0.5) < 0.02, "half-way down the cosine"
        assert (
            abs(weight_decay[0] - 0.04) < 1e-6
            and abs(weight_decay[-1] - 0.4) < 1e-3
            and abs(weight_decay[500] - 0.22) < 1e-3
        )
        assert momentum[0] == 0.99 and abs(momentum[500] - 0.995) < 1e-6 and momentum[-1] < 1

    def test_biases_are_not_decayed_and_the_teacher_is_not_optimised(self):
        model = tiny(conditioning="sequence")
        decayed, others = train.make_optimizer(model, TINY).param_groups
        names = {id(p): name for name, p in model.named_parameters()}
        assert others["weight_decay"] == 0 and decayed["weight_decay"] > 0
        matrices = [p for p in model.predictor.blocks.parameters() if p.ndim == 2]
        assert {id(p) for p in matrices} <= {id(p) for p in decayed["params"]}, "matrices are decayed"
        assert not [names[id(p)] for p in decayed["params"] if names[id(p)].endswith("bias") or p.ndim < 2]
        trained = [*model.encoder.parameters(), *model.predictor.parameters()]
        assert len(decayed["params"]) + len(others["params"]) == len(trained)


TINY_FLAGS = "--width 16 --depth 1 --heads 2 --pred-width 8 --pred-depth 1 --steps 4 --batch-size 8 --measurements 2 --bank 8 --mrr-images 2"


def tiny_run(folder, out):
    """Flags of a run of 4 tiny steps on the folder of tiny images."""
    return ["--data", folder, "--preset", "cifar", *TINY_FLAGS.split(), "--out", out]


def run(*arguments, cwd=None, script="train.py", **environment):
    """The script as a user calls it."""
    command = [sys.executable, os.path.join(HERE, script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or HERE, timeout=170,
                          env=os.environ | environment)  # fmt: skip


def call(script, monkeypatch, capsys, *arguments):
    """A script's main in this process, which is quicker. -> exit code, what it printed"""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    try:
        script.main()
        code = 0
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out + err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tiny images: two classes, grey, RGBA and CMYK ones among them, one file that is no image."""
    root = tmp_path_factory.mktemp("données d'essai")
    for split, n in (("train", 24), ("test", 8)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                mode = ("RGB", "L", "RGBA", "CMYK")[i % 4]
                image = Image.new("RGB", (40 + i, 36), (255 * label, 10 * i, 128)).convert(mode)
                image.save(root / split / name / f"{i}.{'png' if mode == 'RGBA' else 'jpg'}")
    (root / "train" / "cat" / "broken.jpg").write_bytes(b"no image")
    return root


class TestTrain:
    def test_the_loop_follows_the_schedules(self, folder, tmp_path, monkeypatch, capsys):
        """lr and weight decay reach the optimiser; with momentum 0 the teacher is the encoder after the step."""
        monkeypatch.setattr(train, "schedule", lambda step, config: (0.003, 0.02, 0.0))
        code, out = call(train, monkeypatch, capsys, *tiny_run(folder, tmp_path / "run"))
        assert code == 0, out
        state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
        groups = state["optimizer"]["param_groups"]
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.003, 0.02), (0.003, 0)]
        for name, weight in state["model"].items():
            if name.startswith("encoder."):
                follower = state["model"][name.replace("encoder.", "teacher.", 1)]
                assert torch.equal(weight, follower), "the teacher follows after the optimiser's step"

    def test_a_run_leaves_its_folder_and_a_resumed_one_is_equal(self, folder, tmp_path):
        """8 steps (an epoch has 5) in one go, and the same stopped after 3 and resumed: equal weights and metrics."""
        flags = f"--data {{}} --preset cifar {TINY_FLAGS} --steps 8".split()
        flags[1] = folder
        whole = run(*flags, "--out", tmp_path / "whole")
        assert whole.returncode == 0, whole.stderr
        assert "broken.jpg" in whole.stderr and "skipped 1 of 49" in whole.stderr
        assert "MRR" in whole.stdout and "random init" in whole.stdout
        names = {path.name for path in (tmp_path / "whole").iterdir()}
        assert {
            "config.json",
            "metrics.jsonl",
            "result.json",
            "last.pt",
            "views.png",
            "retrieval.png",
            "strip.png",
        } <= names
        lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 4, 8]
        assert {
            "images",
            "seconds",
            "loss",
            "target_std",
            "rankme",
            "mrr",
            "mrr_pooled",
            "chance",
            "hit1",
            "knn",
            "linear",
            "error_hue",
        } <= set(lines[0])
        assert json.loads((tmp_path / "whole" / "config.json").read_text())["pred_depth"] == 1
        in_bfloat16 = train.precision(TINY, torch.device("cpu")) == torch.bfloat16
        result = json.loads((tmp_path / "whole" / "result.json").read_text())
        assert result["config"]["bf16"] == in_bfloat16, "a result says in which precision it was computed"

        again = run(*flags, "--out", tmp_path / "whole")
        assert again.returncode == 2 and "--resume" in again.stderr and "Traceback" not in again.stderr
        other = run(*flags, "--lr", "0.1", "--resume", "--out", tmp_path / "whole")
        assert other.returncode == 2 and "lr" in other.stderr

        # in a place that knows neither UTF-8 nor a home, with a folder whose name has an accent
        bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/no"}
        stopped = subprocess.run([sys.executable, "-c", (
            "import sys, os, signal, iwm, train\n"
            "step = iwm.IWM.update_teacher\n"
            "calls = []\n"
            "def counted(self, momentum):\n"
            "    calls.append(step(self, momentum))\n"
            "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGINT)\n"
            "iwm.IWM.update_teacher = counted\n"
            "train.main()\n"), *map(str, flags), "--out", tmp_path / "parts"], capture_output=True, text=True, timeout=170, env=os.environ | bare)  # fmt: skip
        assert stopped.returncode == 130 and "--resume" in stopped.stdout, stopped.stderr
        rest = run("--out", tmp_path / "parts", "--resume", **bare)
        assert rest.returncode == 0, rest.stderr
        a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
        for name, weight in a["model"].items():
            assert torch.equal(weight, b["model"][name]), f"{name} differs after --resume"
        drop = lambda metrics: [{k: v for k, v in m.items() if k not in ("seconds", "memory_gib")} for m in metrics]
        assert str(drop(a["metrics"])) == str(drop(b["metrics"]))

        (tmp_path / "parts" / "last.pt").write_bytes(b"damaged")
        damaged = run("--out", tmp_path / "parts", "--resume")
        assert damaged.returncode == 2 and "last.pt" in damaged.stderr and "Traceback" not in damaged.stderr

    def test_a_run_killed_before_its_first_step_measures_step_0_once(self, folder, tmp_path, monkeypatch, capsys):
        flags = [*tiny_run(folder, tmp_path / "run"), "--resume"]
        with monkeypatch.context() as patched:
            patched.setattr(train.IWM, "update_teacher", lambda self, momentum: sys.exit("killed"))
            assert call(train, monkeypatch, capsys, *flags)[0] == "killed"
        assert call(train, monkeypatch, capsys, *flags)[0] == 0
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]

    def test_two_processes_in_one_folder_are_refused(self, folder, tmp_path, monkeypatch, capsys):
        flags = [*tiny_run(folder, tmp_path / "run"), "--resume"]
        step = train.IWM.update_teacher

        def second(self, momentum):
            monkeypatch.setattr(train.IWM, "update_teacher", step)
            found.append(call(train, monkeypatch, capsys, *flags))
            return step(self, momentum)

        found = []
        monkeypatch.setattr(train.IWM, "update_teacher", second)
        assert call(train, monkeypatch, capsys, *flags)[0] == 0, "the first run must not be disturbed"
        assert found[0][0] == 2 and "another process is at work" in found[0][1]

    def test_a_loss_that_is_not_finite_stops_the_run(self, folder, tmp_path, monkeypatch, capsys):
        loss = train.IWM.loss
        monkeypatch.setattr(train.IWM, "forward", lambda self, *args: loss(self, *args) * float("nan"))
        code, out = call(train, monkeypatch, capsys, *tiny_run(folder, tmp_path / "run"))
        assert code == 2 and "the loss is nan at step" in out and "last.pt" in out

    def test_the_test_images_are_measured_only_at_the_end(self, folder, tmp_path, monkeypatch, capsys):
        measure, splits = train.measure, []
        monkeypatch.setattr(train, "measure", lambda m, d, split, *a: splits.append(split) or measure(m, d, split, *a))
        assert call(train, monkeypatch, capsys, *tiny_run(folder, tmp_path / "run"))[0] == 0
        assert splits == ["val", "val", "val", "test", "test"], (
            "steps 0, 2 and 4; then the trained and a random network"
        )

    def test_every_epoch_has_an_order_of_its_own(self, folder, tmp_path, monkeypatch, capsys):
        """10 steps are two epochs of 5."""
        loss, seen = train.IWM.loss, []
        monkeypatch.setattr(train.IWM, "forward", lambda self, images, g: seen.append(images) or loss(self, images, g))
        assert call(train, monkeypatch, capsys, *tiny_run(folder, tmp_path / "run"), "--steps", 10)[0] == 0
        assert len(seen) == 10 and not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:]))

    @pytest.mark.parametrize("flags, named", [
        (["--conditioning", "film"], "conditioning"), (["--patch", "5"], "patch"), (["--steps", "0"], "steps"),
        (["--data", "no/such/folder"], "no/such/folder"), (["--device", "abacus"], "abacus"), (["--lr", "nan"], "lr"),
        (["--batch-size", "30000", "--preset", "shapes"], "batch_size"), (["--nonsense"], "--nonsense"),
        (["--seed", "-1"], "seed"), (["--strength", "1e39"], "strength"), (["--table", "no/such/run"], "no/such/run"),
    ])  # fmt: skip
    def test_a_wrong_flag_is_one_clear_line(self, flags, named, tmp_path, monkeypatch, capsys):
        code, out = call(train, monkeypatch, capsys, *flags, "--out", tmp_path / "run")
        assert code == 2 and named in out
        assert not (tmp_path / "run").exists(), "nothing may be written before the flags are checked"

    def test_a_folder_without_images_is_one_clear_line(self, tmp_path, monkeypatch, capsys):
        for split in ("train", "test"):
            (tmp_path / "d" / split / "cat").mkdir(parents=True)
        code, out = call(train, monkeypatch, capsys, "--data", tmp_path / "d", "--out", tmp_path / "run")
        assert code == 2 and "no images" in out

    def test_a_table_shares_a_row_among_seeds(self, tmp_path, monkeypatch, capsys):
        """Two seeds of the default and one other run: mean 0.3, deviation 0.141 by hand; an unfinished run is left out."""
        for name, changes, mrr in (
            ("a", {"seed": 0}, 0.2),
            ("b", {"seed": 1}, 0.4),
            ("c", {"pred_depth": 2}, 0.1),
            ("d", {}, 0),
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
            if mrr:
                found = {key: mrr for key in ("mrr", "hit1", "knn", "linear")}
                found |= {"mrr_pooled": mrr} if name == "c" else {}
                result = {"config": asdict(iwm.Config(**changes)), "trained": found, "random": found, "seconds": 60}
                (tmp_path / name / "result.json").write_text(json.dumps(result))
        code, out = call(train, monkeypatch, capsys, "--table", *(tmp_path / name for name in "abcd"))
        lines = [line for line in out.splitlines() if line.startswith("| shapes")]
        assert not code and len(lines) == 2 and f"{tmp_path / 'd'} is no finished run" in out
        assert (
            "| --preset shapes | 0.0239 | 2 | 0.300 ± 0.141 (0.300 ± 0.141) | - (-) |" in lines[0]
            and "30.0 ± 14.1" in lines[0]
        )
        assert "--pred-depth 2 | 0.0239 | 1 | 0.100 (0.100) | 0.100 (0.100) |" in lines[1]
        code, out = call(train, monkeypatch, capsys, "--preset", "cifar", "--table", tmp_path / "a")
        assert not code and "| --preset cifar " in out and "--steps 2400 " in out
        for missing in ({"config"}, {"trained"}, {"seconds"}, set(result)):
            less = {key: value for key, value in result.items() if key not in missing}
            (tmp_path / "d" / "result.json").write_text(json.dumps(less))
            code, out = call(train, monkeypatch, capsys, "--table", tmp_path / "d")
            assert code == 2 and "result.json" in out

    def test_help_explains_every_setting(self):
        result = run("--help")
        assert result.returncode == 0
        for name in iwm.Config.__dataclass_fields__:
            assert "--" + name.replace("_", "-") in result.stdout
        assert all(len(f.metadata["help"]) > 10 for f in fields(iwm.Config)), "a setting without an explanation"

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
    def test_freed_memory_is_kept_until_it_is_returned(self):
        """Between steps the heap keeps what is freed (fast); after a measurement the system gets it back (no growth)."""
        code = (
            "import re, torch, train\n"
            "resident = lambda: int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
            "train.keep_memory(); before = resident()\n"
            "parts = [torch.ones(250_000) for _ in range(300)]; del parts; kept = resident()\n"
            "train.return_memory(); print(kept - before, resident() - before)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=170)
        kept, left = map(int, found.stdout.split())  # MiB, of 286
        assert kept > 200 and left < 50


class TestFolderCache:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
    def test_images_of_any_mode_become_rgb(self, mode, tmp_path):
        """A picture of 60 x 40 pixels, dark left and light right, of which the middle square is kept."""
        ramp = torch.arange(60).expand(40, 60).mul(4).byte().numpy()
        image = Image.fromarray(ramp.astype("uint16") * 256 if mode == "I;16" else ramp)
        image = image if mode == "I;16" else image.convert(mode)
        image.save(file := tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}")
        found = train.read_image(file, 10)
        assert found.shape == (10, 10, 3) and found.dtype == "uint8"
        assert found[:, :3].mean() < 80 and found[:, -3:].mean() > 160, "the lightness of the image is lost"
        if mode == "L":  # columns 10 to 13 of the picture, of lightness 40 to 52
            assert 40 < found[:, 0].mean() < 52, (
                "the middle square is kept; the whole picture squeezed would start darker"
            )

    def test_a_strip_one_pixel_wide_needs_no_memory(self, tmp_path):
        Image.new("RGB", (1, 60_000), (9, 9, 9)).save(tmp_path / "a.png")
        assert (train.read_image(tmp_path / "a.png", 32) == 9).all()

    def test_a_folder_is_decoded_once_and_again_when_it_changes(self, folder, tmp_path, monkeypatch, capsys):
        config = replace(TINY, data=str(folder), batch_size=4)
        first = train.load_data(config, "cpu", tmp_path)
        assert {split: tuple(images.shape) for split, (images, _) in first.items()} == {
            "train": (44, 3, 32, 32), "val": (4, 3, 32, 32), "test": (16, 3, 32, 32)}  # fmt: skip
        red, labels = first["test"][0][:, 0].float().mean(dim=(1, 2)) > 60, first["test"][1]
        assert torch.equal(red, labels == 1), "labels must stay with their images"
        monkeypatch.setattr(train, "read_image", None)  # reading a file again would fail
        second = train.load_data(config, "cpu", tmp_path)
        assert all(torch.equal(a, b) for split in first for a, b in zip(first[split], second[split]))

        for file in tmp_path.glob("*"):  # as if the disk had lost its end
            os.truncate(file, file.stat().st_size - 5)
        calls = []
        monkeypatch.setattr(
            train, "read_image", lambda file, size: calls.append(file) or torch.zeros(size, size, 3).byte().numpy()
        )
        train.load_data(config, "cpu", tmp_path)
        assert len(calls) == 65, "a cache that is not whole must be made anew"
        train.load_data(replace(config, image_size=16, patch=4), "cpu", tmp_path / "other")
        assert len(calls) == 130


class TestDevices:
    @staticmethod
    def two_processes(script, code, *flags, **env):
        """Run `code`, written to the file `script`, in two gloo processes. -> the finished torchrun."""
        script.write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script, *flags]
        env = os.environ | {"PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"} | env
        done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=env)
        assert done.returncode == 0, done.stderr
        return done

    def test_two_processes_have_the_gradient_of_one(self, tmp_path):
        """DistributedDataParallel over two gloo processes, half the batch each, against the mean of both halves here."""
        code = (
            "import sys, torch, iwm, train\n"
            "torch.manual_seed(0)\n"
            "model = iwm.IWM(iwm.Config(width=32, depth=2, heads=2, pred_width=16, pred_depth=2))\n"
            "def half(model, rank):\n"
            "    images = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(5))[rank]\n"
            "    return model(images, torch.Generator().manual_seed(rank))\n"
            "torch.distributed.init_process_group('gloo')\n"
            "rank = torch.distributed.get_rank()\n"
            "shared = torch.nn.parallel.DistributedDataParallel(model)\n"
            "half(shared, rank).backward()\n"
            "if rank == 0: torch.save([p.grad for p in model.parameters() if p.requires_grad], sys.argv[1])\n"
            "train.leave()\n"  # a process that leaves before the other aborts now and then
        )
        self.two_processes(tmp_path / "half.py", code, tmp_path / "grads.pt")
        torch.manual_seed(0)
        model = iwm.IWM(iwm.Config(width=32, depth=2, heads=2, pred_width=16, pred_depth=2))
        images = torch.rand(2, 4, 3, 32, 32, generator=seeded(5))
        (sum(model(images[rank], seeded(rank)) for rank in range(2)) / 2).backward()
        grads = torch.load(tmp_path / "grads.pt", weights_only=True)
        for ours, theirs in zip((p.grad for p in model.parameters() if p.requires_grad), grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)

    def test_torchrun_trains_and_only_one_process_writes(self, folder, tmp_path):
        code = (  # train.py, but each process keeps the images of its last step
            "import iwm, os, runpy, torch\n"
            "loss = iwm.IWM.forward\n"
            "def kept(self, images, generator):\n"
            "    torch.save(images, os.path.join(os.environ['KEEP'], os.environ['RANK']))\n"
            "    return loss(self, images, generator)\n"
            "iwm.IWM.forward = kept\n"
            "replace = os.replace\n"
            "def by_rank_0(aside, path):\n"
            "    assert os.environ['RANK'] == '0', f'rank 1 writes {path}'\n"
            "    replace(aside, path)\n"
            "os.replace = by_rank_0\n"
            "runpy.run_module('train', run_name='__main__')\n"
        )
        flags = tiny_run(folder, tmp_path / "run")
        done = self.two_processes(tmp_path / "kept.py", code, *flags, KEEP=str(tmp_path))
        one, other = (torch.load(tmp_path / rank, weights_only=True) for rank in "01")
        assert len(one) == len(other) == 4 and not any((image == other).flatten(1).all(dim=1).any() for image in one), (
            "each process trains on its own half of the batch of 8"
        )
        assert done.stdout.count("random init") == 1 and done.stdout.count("parameters") == 1
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 2, 4] and [line["images"] for line in lines] == [0, 16, 32]

    @pytest.mark.parametrize("native", [True, False])
    def test_bfloat16_only_where_the_cpu_has_it(self, native, monkeypatch):
        """Emulated, bfloat16 made a step twelve times as long: a CPU without such instructions trains in float32."""
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
        for wanted in (True, False):
            with train.autocast(replace(TINY, bf16=wanted), torch.device("cpu")):
                dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            assert dtype == (torch.bfloat16 if native and wanted else torch.float32)

    def test_each_part_compiles_to_one_graph_without_recompiling(self):
        torch._dynamo.reset()
        model, graphs = tiny(), []
        for part in (model.encoder, model.teacher, model.predictor):
            part.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
        for step in range(3):
            model.loss(torch.rand(4, 3, 32, 32), seeded(step)).backward()
        assert len(graphs) == 3


class TestFinetune:
    """Predictor finetuning and its controls, on a tiny checkpoint and a few hundred shapes."""

    ARGS = types.SimpleNamespace(steps=3, learned_lr=0.1, weight_decay=0.05, augment=False, lr=[1e-2])

    @pytest.fixture
    def checkpoint(self, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "SHAPES_IMAGES", {"train": 120, "val": 40, "test": 40})
        model = tiny()
        torch.save({"config": asdict(model.config), "model": model.state_dict()}, tmp_path / "last.pt")
        return tmp_path / "last.pt"

    @staticmethod
    def tasks(*names):
        made = train.shapes(120, 0)
        data = {split: made["images"][part] for split, part in
                (("train", slice(0, 80)), ("val", slice(80, 100)), ("test", slice(100, 120)))}  # fmt: skip
        labels = {"train": slice(0, 80), "val": slice(80, 100), "test": slice(100, 120)}
        return {n: finetune.Task({s: (data[s], made[n][labels[s]]) for s in data}) for n in names}

    def network(self, row, model, *names, seed=1):
        return finetune.Network(row, model, self.tasks(*(names or ("shape",))), seed)

    def test_finetuning_starts_from_the_teacher_and_the_learned_predictor(self):
        model = tiny()
        for row, encoder, predictor in (("learned predictor", True, True), ("random predictor", True, False),
                                        ("end-to-end", True, True), ("scratch", False, False)):  # fmt: skip
            network = self.network(row, model)
            for part, loaded, origin in ((network.encoder, encoder, model.teacher),
                                         (network.predictor, predictor, model.predictor)):  # fmt: skip
                same = [torch.equal(a, b) for a, b in zip(part.parameters(), origin.parameters()) if a.ndim > 1]
                assert all(same) if loaded else not any(same), f"{row}: the wrong weights, {type(part).__name__}"

    @pytest.mark.parametrize("row, frozen", [("attentive", True), ("learned predictor", True), ("random predictor", True),
                                             ("encoder", False), ("end-to-end", False), ("scratch", False)])  # fmt: skip
    def test_finetuning_moves_what_is_trained_and_nothing_else(self, row, frozen):
        """A frozen encoder is bit-equal after training; head and predictor have moved; the checkpoint is untouched."""
        model, tasks = tiny(), self.tasks("shape")
        before = {name: p.clone() for name, p in model.state_dict().items()}
        network = self.network(row, model)
        assert frozen != any(p.requires_grad for p in network.encoder.parameters())
        start = {name: p.clone() for name, p in network.state_dict().items()}
        inputs = finetune.inputs_of(network, row, tasks, 1, self.ARGS, {})
        finetune.fit(network, tasks, inputs, 16, 1e-2, 1, self.ARGS, row)
        for name, p in network.named_parameters():
            moved = not torch.equal(p, start[name])
            if name.endswith(("in_proj_bias", "qkv.bias")):
                continue  # the key's bias has no gradient: softmax does not see it
            assert moved == (not (frozen and name.startswith("encoder"))), f"{row}: {name} moved: {moved}"
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())

    def test_finetuning_predicts_all_positions_under_the_null_action(self, monkeypatch):
        seen = {}
        network = self.network("learned predictor", tiny())
        monkeypatch.setattr(network.predictor, "forward", lambda z, context, masked, action, extra: seen.update(
            z=z, context=context, masked=masked, action=action) or z)  # fmt: skip
        images = train.shapes(5, 3)["images"]
        network({"shape": images})
        assert (seen["action"] == 0).all() and seen["action"].shape == (5, 7)
        assert torch.equal(seen["masked"], torch.arange(64).expand(5, 64)) and torch.equal(
            seen["context"], seen["masked"]
        )
        assert torch.equal(seen["z"], network.encoder(images / 255)), "the predictor must get the clean image's latents"

    def test_finetuning_learned_weights_have_a_tenth_of_the_lr(self, monkeypatch):
        made = []
        adamw = torch.optim.AdamW
        monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **kw: made.append(adamw(groups, **kw)) or made[-1])
        tasks = self.tasks("shape")
        for row in ("end-to-end", "scratch"):
            network = self.network(row, tiny())
            finetune.fit(
                network, tasks, finetune.inputs_of(network, row, tasks, 1, self.ARGS, {}), 8, 1e-2, 1, self.ARGS, ""
            )
            groups = made[-1].param_groups
            lrs = {id(p): round(group["initial_lr"], 6) for group in groups for p in group["params"]}
            for part in ("encoder", "predictor", "heads"):
                lr = 1e-3 if row == "end-to-end" and part != "heads" else 1e-2
                found = [lrs[id(p)] for p in getattr(network, part).parameters() if id(p) in lrs]
                assert found and set(found) == {lr}, f"{row}: the {part} must be trained at {lr}"

    def test_finetuning_task_tokens_tell_the_predictor_what_is_asked(self):
        network, images = self.network("learned predictor", tiny(), "shape", "colour"), train.shapes(4, 3)["images"]
        together = network({"shape": images, "colour": images})
        alone = network({"colour": images})["colour"]
        torch.testing.assert_close(together["colour"], alone, atol=1e-5, rtol=1e-4)
        network.heads[1] = network.heads[0]
        same_head = network({"shape": images, "colour": images})
        assert not torch.allclose(same_head["shape"], same_head["colour"], atol=1e-5), "the task token changes nothing"
        assert self.network("learned predictor", tiny()).task_tokens is None

    def test_finetuning_reads_the_test_images_once_after_choosing_on_held_out_ones(self, monkeypatch):
        asked = []
        values = {"val": iter([0.2, 0.9, 0.5]), "test": iter([0.7])}
        monkeypatch.setattr(
            finetune, "score", lambda n, name, task, split, x: asked.append(split) or next(values[split])
        )
        args = types.SimpleNamespace(**vars(self.ARGS) | {"lr": [1e-3, 1e-2, 1e-1], "steps": 1})
        row = finetune.trained_row("attentive", tiny(), self.tasks("shape"), 8, 0, args, {})
        assert asked == ["val"] * 3 + ["test"] and row["lr"] == 1e-2 and row["test"] == {"shape": 0.7}

    def test_mean_iou_equals_a_naive_count(self):
        truth, found = torch.randint(0, 4, (2, 3, 6, 6), generator=seeded())
        naive = []
        for c in range(5):  # class 4 is nowhere: it does not count
            both, either = ((truth == c) & (found == c)).sum().item(), ((truth == c) | (found == c)).sum().item()
            naive += [both / either] if either else []
        assert finetune.mean_iou(found, truth, 5) == pytest.approx(sum(naive) / len(naive))
        assert finetune.mean_iou(truth, truth, 5) == 1
        holes = truth.masked_fill(torch.rand(truth.shape, generator=seeded()) < 0.3, finetune.VOID)
        assert finetune.mean_iou(truth, holes, 4) == 1, "pixels without a class must not count"
        void = truth.new_full(truth.shape, finetune.VOID)  # a small split may have no class at all
        data = {"train": (found, truth), "val": (found, void)}
        assert finetune.Task(data).classes == 4

    def test_a_row_that_was_cut_off_spoils_no_other(self, tmp_path):
        file = tmp_path / "finetune.jsonl"
        file.write_text('{"row": 1}\n{"row": 2, "sc')
        finetune.append(file, '{"row": 3}\n')
        finetune.append(file, '{"row": 4}\n')
        assert [row["row"] for row in finetune.read_rows(file)] == [1, 3, 4]

    def test_finetuning_prints_a_table_keeps_its_rows_and_resumes(self, checkpoint, monkeypatch, capsys):
        flags = [checkpoint, "--steps", 2, "--batch-size", 16, "--seeds", 2, "--device", "cpu"]
        code, out = call(finetune, monkeypatch, capsys, *flags)
        assert code == 0 and "| learned predictor | " in out and "| random predictor | " in out and " ± " in out
        records = [json.loads(line) for line in (checkpoint.parent / "finetune.jsonl").read_text().splitlines()]
        assert len(records) == 8 and {"row", "seed", "test", "val", "trainable", "seconds"} <= set(records[0])
        monkeypatch.setattr(finetune, "trained_row", None)  # nothing may be trained again
        code, again = call(finetune, monkeypatch, capsys, *flags, "--resume")
        assert code == 0
        table, same = ([line for line in text.splitlines() if line.startswith("|")] for text in (out, again))
        assert table == same and len(table) == 6
        code, kept = call(finetune, monkeypatch, capsys, checkpoint.parent / "finetune.jsonl")
        assert [line for line in kept.splitlines() if line.startswith("|")] == table

    def test_rows_of_several_checkpoints_make_one_table_over_the_checkpoints(self, tmp_path, monkeypatch, capsys):
        files = []
        runs = {"a": {"p": (0.1, 0.3), "q": (0.5,)}, "b": {"q": (0.9,), "p": (0.6,)}, "other": {"p": (0.7,)}}
        for name, scores in runs.items():
            records = [
                dict(row=row, seed=seed, tasks=["x"], labels=0, steps=5, batch_size=8, augment=False, data="d", lrs=[],
                     checkpoint=name, run="other" if name == "other" else "same", encoder=10, test={"x": score}, lr=[],
                     trainable=5, seconds=1, **finetune.USUAL)
                for row, seeds in ({"only here": (0.2,)} | scores if name == "a" else scores).items()
                for seed, score in enumerate(seeds)
            ]  # fmt: skip
            files.append(tmp_path / f"{name}.jsonl")
            files[-1].write_text("".join(json.dumps(record) + "\n" for record in records))
        code, out = call(finetune, monkeypatch, capsys, *files)
        lines = [line.split(" | ")[0:4:3] for line in out.splitlines() if line.startswith("| ")]
        first, other = lines[1:3], lines[4:]  # each table has a line of names
        assert code == 0 and first == [["| p", "40.0 ± 28.3"], ["| q", "70.0 ± 28.3"]] and other == [["| p", "70.0"]]
        code, out = call(finetune, monkeypatch, capsys, files[0], tmp_path)  # a file and a run
        assert code == 2 and "one checkpoint" in out

    @pytest.mark.parametrize("flags, row", [
        (["--task", "shape,colour"], "learned predictor, one each"), (["--task", "segment"], "linear per patch"),
        (["--protocol", "factors"], "linear, predictor"), (["--protocol", "table", "--augment"], "scratch"),
        (["--protocol", "linear", "--labels", "50"], "linear, random init"),
    ])  # fmt: skip
    def test_finetuning_protocols_and_tasks_run(self, flags, row, checkpoint, monkeypatch, capsys):
        code, out = call(finetune, monkeypatch, capsys, checkpoint, "--steps", 1, "--batch-size", 16, *flags)
        assert code == 0 and f"| {row} | " in out, out

    def test_averaging_imagined_variants_of_one_action_changes_nothing(self, monkeypatch):
        """With every action null, K imagined variants are one: the same probe as on the predictor's own output."""
        monkeypatch.setattr(finetune.iwm, "jitter_params", lambda n, *_, **__: IDENTITY.expand(n, 4))
        model, tasks = tiny(), self.tasks("colour")
        asked, everywhere = [], model.predictor.everywhere
        model.predictor.everywhere = lambda z, action: asked.append(len(z)) or everywhere(z, action)
        once, thrice = (finetune.closed_form_row(f"linear, {k} imagined", model, tasks, 0, {}) for k in (1, 3))
        assert sum(asked) == (1 + 3) * 120, "K variants of each of the 120 images"
        plain = finetune.closed_form_row("linear, predictor", model, tasks, 0, {})
        assert once["test"] == thrice["test"] == plain["test"]

    def test_segmentation_reads_a_folder_of_images_and_masks(self, checkpoint, tmp_path, monkeypatch, capsys):
        for name in ("images", "masks"):
            (tmp_path / "d" / name).mkdir(parents=True)
        made = train.shapes(40, 0)
        for i in range(40):
            Image.fromarray(made["images"][i].permute(1, 2, 0).numpy()).save(tmp_path / "d" / "images" / f"{i}.jpg")
            Image.fromarray(made["mask"][i].byte().numpy()).save(tmp_path / "d" / "masks" / f"{i}.png")
        flags = ["--task", "segment", "--data", tmp_path / "d", "--steps", 1, "--batch-size", 8]
        code, out = call(finetune, monkeypatch, capsys, checkpoint, *flags)
        assert code == 0 and "mIoU" in out
        data = finetune.load_segmentation(replace(TINY, data=str(tmp_path / "d")), "cpu")
        assert {split: len(labels) for split, (_, labels) in data.items()} == {"train": 33, "val": 3, "test": 4}
        assert data["test"][1].shape == (4, 32, 32) and data["test"][1].max() == 1

    @pytest.mark.parametrize("flags, named", [
        (["--lr", "x"], "--lr"), (["--steps", "0"], "--steps"), (["--task", "hat"], "hat"), (["--labels", "-5"], "labels"),
        (["--labels", "1000"], "1000 is more than"),
        (["--task", "segment", "--data", "nowhere"], "nowhere"), (["--data", "nowhere"], "nowhere"),
        (["--task", "shape,shape"], "shape"), (["--device", "abacus"], "abacus"), (["--seeds", "0"], "--seeds"),
    ])  # fmt: skip
    def test_finetuning_refuses_in_one_line(self, flags, named, checkpoint, monkeypatch, capsys):
        code, out = call(finetune, monkeypatch, capsys, checkpoint, *flags)
        assert code == 2 and named in out and not (checkpoint.parent / "finetune.jsonl").exists()

    def test_a_file_that_is_no_checkpoint_is_one_clear_line_and_runs_no_code(
        self, checkpoint, tmp_path, monkeypatch, capsys
    ):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "hacked"),)

        state = torch.load(checkpoint, weights_only=True)
        torch.save({"config": state["config"], "model": Evil()}, tmp_path / "evil.pt")
        torch.save(state | {"config": state["config"] | {"width": 48}}, tmp_path / "other.pt")
        torch.save(state | {"config": state["config"] | {"made_up": 1}}, tmp_path / "newer.pt")
        (tmp_path / "text.pt").write_text("no checkpoint")
        (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:1000])
        for name in ("evil.pt", "other.pt", "newer.pt", "text.pt", "half.pt", "missing.pt"):
            code, out = call(finetune, monkeypatch, capsys, tmp_path / name)
            assert code == 2 and name in out and len(out.strip().splitlines()) == 1, out
        assert not (tmp_path / "hacked").exists()


class TestFuzz:
    """Seeded random input; FUZZ=300 pytest -q -k Fuzz for a long one."""

    N = int(os.environ.get("FUZZ", 12))

    def test_a_random_configuration_trains_or_is_refused_in_one_line(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(train, "SHAPES_IMAGES", {"train": 20, "val": 10, "test": 10})
        rng = random.Random(self.N)
        odd = [0, -1, 1, 2, 3, 7, 0.5, 1e-9, -0.5, 99, float("nan"), float("inf")]
        sane = {"image_size": [16, 24, 32], "patch": [4, 8], "width": [8, 16, 24], "depth": [1, 2], "heads": [1, 2, 4],
                "pred_width": [8, 16], "pred_depth": [1, 2], "blocks": [1, 4, 9], "conditioning": list("nsf"),
                "batch_size": [1, 2, 8, 20], "steps": [1, 2], "bank": [2, 5], "mrr_images": [1, 3],
                "measurements": [1, 2]}  # fmt: skip
        names = {"n": "none", "s": "sequence", "f": "feature"}
        outcomes = {0: 0, 2: 0}
        for i in range(self.N):
            flags = []
            for f in fields(iwm.Config):
                if f.name in ("data", "bf16", "compile", "target_norm"):
                    continue
                if f.name in sane:
                    value = rng.choice(sane[f.name]) if rng.random() < 0.97 else int(rng.choice(odd[:6]))
                elif rng.random() < 0.2:
                    value = rng.choice(odd)
                else:
                    continue
                value = names.get(value, value)
                flags.append(
                    f"--{f.name.replace('_', '-')}={int(value) if f.name == 'seed' and value == value and abs(value) < 1e9 else value}"
                )
            code, out = call(train, monkeypatch, capsys, *flags, "--device", "cpu", "--out", tmp_path / str(i))
            assert code in (0, 2), f"{flags}: {out}"
            assert code == 0 or not (tmp_path / str(i) / "result.json").exists()
            outcomes[code] += 1
        assert min(outcomes.values()) > 0, f"the fuzz is too tame or too wild: {outcomes}"

    @staticmethod
    def damage(whole: bytes, rng) -> bytes:
        """Some bytes changed, sometimes the end cut off."""
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 10, 1000])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return damaged[: rng.randrange(len(damaged))] if rng.random() < 0.3 else damaged

    def test_a_damaged_checkpoint_is_refused_or_harmless(self, tmp_path, capsys):
        model, rng = tiny(), random.Random(self.N)
        torch.save({"config": asdict(model.config), "model": model.state_dict()}, tmp_path / "whole.pt")
        whole = (tmp_path / "whole.pt").read_bytes()
        for _ in range(4 * self.N):
            (tmp_path / "last.pt").write_bytes(self.damage(whole, rng))
            try:
                finetune.load_checkpoint(tmp_path / "last.pt", "cpu")
            except SystemExit as error:
                out = capsys.readouterr().err
                assert error.code == 2 and "last.pt" in out and len(out.splitlines()) == 1, out

    def test_a_damaged_configuration_is_refused_or_harmless(self, tmp_path, capsys):
        whole, rng, refused = json.dumps(asdict(TINY), indent=1).encode(), random.Random(self.N), 0
        for _ in range(4 * self.N):
            (tmp_path / "config.json").write_bytes(self.damage(whole, rng))
            try:
                train.parse(["--out", str(tmp_path), "--resume"])
            except SystemExit as error:
                out = capsys.readouterr().err
                assert error.code == 2 and len(out.splitlines()) == 1, out
                refused += 1
        assert refused > 0

    @pytest.mark.filterwarnings("ignore")  # Pillow's, of what it skips in a file
    def test_a_damaged_image_is_left_out_or_harmless(self, tmp_path, capsys):
        rng, suffixes = random.Random(self.N), ("jpg", "png", "gif", "webp", "bmp", "tiff", "ppm")
        picture = Image.fromarray(train.shapes(1, 0)["images"][0].permute(1, 2, 0).numpy())
        (tmp_path / "cat").mkdir()
        for suffix in suffixes:
            picture.save(tmp_path / "cat" / f"whole.{suffix}")
            whole = (tmp_path / "cat" / f"whole.{suffix}").read_bytes()
            for i in range(self.N):
                (tmp_path / "cat" / f"{i}.{suffix}").write_bytes(self.damage(whole, rng))
        images, _ = train.read_folder(tmp_path, 16, ["cat"], tmp_path / "cache")
        n, found = (self.N + 1) * len(suffixes), len(images)
        assert len(suffixes) <= found < n and f"skipped {n - found} of {n} files" in capsys.readouterr().err


class TestReadme:
    def test_the_reading_guide_points_at_the_right_lines(self):
        """Each "`name` first-last" of the README is where iwm.py defines that function, class or method."""
        with (
            open(os.path.join(HERE, "iwm.py")) as code,
            open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme,
        ):
            tree, text = ast.parse(code.read()), readme.read()
        where = {}
        for node in (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))):
            where[node.name] = f"{node.lineno}-{node.end_lineno}"
            for part in (part for part in ast.iter_child_nodes(node) if isinstance(part, ast.FunctionDef)):
                where[f"{node.name}.{part.name}"] = f"{part.lineno}-{part.end_lineno}"
        guide = re.findall(r"`([A-Za-z_.]+)` (\d+-\d+)", text)
        assert len(guide) > 20
        assert not {name: where.get(name) for name, lines in guide if where.get(name) != lines}, "right would be these"

    @pytest.mark.parametrize("path", ["README.md", "assets/results/README.md"])
    def test_links_and_pictures_lead_somewhere(self, path):
        def anchors(path):  # of the headings, as GitHub names them
            with open(path, encoding="utf-8") as page:
                headings = [line.lstrip("# ") for line in page.read().splitlines() if line.startswith("#")]
            return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]

        with open(os.path.join(HERE, path), encoding="utf-8") as page:
            links = re.findall(r"\]\(([^)]+)\)", page.read())
        assert len(links) > 5
        for link in links:
            there, _, anchor = link.partition("#")
            there = os.path.join(HERE, os.path.dirname(path), there) if there else os.path.join(HERE, path)
            assert link.startswith("https://") or os.path.exists(there) and (not anchor or anchor in anchors(there)), (
                link
            )

    def test_the_tables_are_what_the_result_files_say(self):
        """Each line that --table and finetune.py print of assets/results stands in the page beside them."""
        results = Path(HERE, "assets", "results")
        page = (results / "README.md").read_text(encoding="utf-8").splitlines()
        printed = []
        for preset, pattern in (("cifar", "grid/*"), ("cifar", "cifar-*"), ("shapes", "shapes*")):
            printed += train.table(sorted(results.glob(f"{pattern}.result.json")), [preset]).splitlines()
        for name in re.findall(r"<summary>all rows of (\S+)</summary>", "\n".join(page)):
            runs = [finetune.read_rows(path) for path in sorted(results.glob(f"{name}.finetune.jsonl"))]
            printed += finetune.describe(finetune.over_runs(runs)).splitlines()
        assert len(printed) > 60 and not [line for line in printed if line not in page]


class TestPaperScale:
    def test_the_paper_preset_steps_on_one_image(self):
        """ViT-B/16 with the 18 x 384 predictor, forward and backward."""
        model = iwm.IWM(iwm.PRESETS["paper"])
        loss = model.loss(torch.rand(1, 3, 224, 224), seeded())
        loss.backward()
        assert loss.isfinite() and sum(p.numel() for p in model.predictor.parameters()) in range(30_000_000, 36_000_000)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark, for whatever machine it runs on: python test_iwm.py. Nothing here is a test: times are never asserted
# ---------------------------------------------------------------------------------------------------------------------


class MatrixProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps every matrix product that runs inside it, to run them again alone: the floor of a step."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})


def benchmark():
    train.keep_memory()
    device = train.choose_device(None)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"{device} ({name}), torch {torch.__version__}; medians of 7, in milliseconds unless said\n")

    def median(*functions):
        """Median times in ms of functions that take turns, so that a busy machine slows all of them alike."""
        times = [[] for _ in functions]
        for _ in range(8):
            for f, found in zip(functions, times):
                start = time.perf_counter()
                f()
                torch.cuda.synchronize() if cuda else None
                found.append(1000 * (time.perf_counter() - start))
        return [sorted(found[1:])[3] for found in times]

    def row(label, value, note=""):
        print(f"| {label} | {value} | {note} |", flush=True)

    def stepper(config, images):
        model = iwm.IWM(config).to(device)
        optimizer = train.make_optimizer(model, config)

        def step():
            with train.autocast(config, device):
                loss = model.loss(images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_teacher(0.99)

        return step

    print("| what | measured | |\n|---|---|---|")
    config = iwm.PRESETS["cifar"]
    images = torch.rand(256, 3, 32, 32, device=device)
    params = iwm.jitter_params(256, config, device=device)
    one_by_one = lambda: TestJitter.reference(images, params)
    one_draw = ColorJitter(0.8, 0.8, 0.4, 0.2)
    ours, batched, loop = median(lambda: iwm.jitter(images, params), lambda: one_draw(images), one_by_one)
    row("jitter, 256 x 32 x 32, parameters per image", f"{ours:.1f}")
    row("torchvision v2.ColorJitter, one draw per batch", f"{batched:.1f}", f"{batched / ours:.1f} times ours")
    row("torchvision's functional ops, image by image", f"{loop:.0f}", f"{loop / ours:.0f} times ours")

    images = images[: config.batch_size]
    step, fp32 = stepper(config, images), stepper(replace(config, bf16=False), images)
    with MatrixProducts() as products:
        step()
    views = lambda: (iwm.make_views(images, config), iwm.sample_masks(len(images), 8, config, None, device))
    whole, single, drawing, floor = median(
        step, fp32, views, lambda: [f(*args, **kwargs) for f, args, kwargs in products.calls]
    )
    row(
        f"training step, cifar preset, batch {len(images)}",
        f"{whole:.0f}",
        f"{1000 * len(images) / whole:.0f} images/s",
    )
    row("its views and masks", f"{drawing:.1f}", f"{100 * drawing / whole:.0f} % of the step")
    row("its matrix products alone", f"{floor:.0f}", f"the step takes {whole / floor:.2f} times its floor")
    row("the step in float32", f"{single:.0f}", f"{single / whole:.1f} times bfloat16")

    def kept(config, images):
        """MiB that the forward pass keeps for the backward pass, parameters included."""
        model, storages = iwm.IWM(config).to(device), {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), train.autocast(config, device):
            loss = model.loss(images)  # its graph holds the storages while they are counted
        del loss
        return sum(storages.values()) / 2**20

    print("\n| cost as work grows (cifar preset) | images/s | MiB kept for backward |\n|---|---|---|")
    for field, values in {"batch_size": (16, 64, 256), "image_size": (16, 32, 64), "pred_depth": (3, 6, 12)}.items():
        grown = [replace(config, **{field: value}) for value in values]
        sizes = [(c.batch_size, torch.rand(c.batch_size, 3, c.image_size, c.image_size, device=device)) for c in grown]
        times = median(*(stepper(c, x) for c, (_, x) in zip(grown, sizes)))
        speeds = ", ".join(f"{1000 * b / ms:.0f}" for (b, _), ms in zip(sizes, times))
        memory = ", ".join(f"{kept(c, x):.0f}" for c, (_, x) in zip(grown, sizes))
        print(f"| {field} {', '.join(map(str, values))} | {speeds} | {memory} |", flush=True)

    print("\n| preset | encoder | predictor | patches | GFLOP per image and step |\n|---|---|---|---|---|")
    for preset, config in iwm.PRESETS.items():
        model = iwm.IWM(config)
        with FlopCounterMode(display=False) as counter:
            model.loss(torch.rand(1, 3, config.image_size, config.image_size)).backward()
        size = [f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M" for part in (model.encoder, model.predictor)]
        print(f"| {preset} | {' | '.join(size)} | {config.grid**2} | {counter.get_total_flops() / 1e9:.2f} |")
    print(f"\npeak memory of this benchmark: {train.peak_memory(device) or float('nan'):.1f} GiB")


if __name__ == "__main__":
    benchmark()
