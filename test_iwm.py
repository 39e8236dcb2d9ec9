"""Tests: a class for each exercise of the README grades iwm.py, the rest guards the experiments.

IWM=my_iwm pytest -q -k TestJitter   # grades exercise 1 in my_iwm.py
"""

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, fields, replace
from itertools import count, cycle, product
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from pytest import approx, fixture, raises
from torch import (
    arange,
    cat,
    equal,
    eye,
    linspace,
    nn,
    ones,
    rand,
    randint,
    randn,
    stack,
    tensor,
    zeros,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import finetune
import iwm as reference
import lab.data
import lab.measures
import lab.pictures
import train
from lab import machine

iwm = importlib.import_module(os.environ.get("IWM", "iwm"))
each = pytest.mark.parametrize
every_mode = each("mode", ["none", "sequence", "feature"])
TINY = reference.Config(32, patch=4, width=32, depth=2, heads=2, pred_width=16, pred_depth=2)
IDENTITY = tensor([1.0, 1.0, 1.0, 0.0])


@pytest.fixture
def put(monkeypatch):
    def put(name, value):
        for module in ("iwm", iwm.__name__):
            monkeypatch.setattr(f"{module}.{name}", value, raising=False)

    return put


@pytest.fixture(autouse=True)
def only_its_own_part(request, put):
    """A class takes what it GRADES from IWM=my_iwm, all else from iwm.py."""
    mine = dict(vars(iwm))
    for name, value in vars(reference).items():
        if getattr(value, "__module__", "") == "iwm":
            put(name, value)
    for name in getattr(request.cls, "GRADES", "").split():
        part = eval(name, mine)
        gives_nothing = isinstance(part, type) or name in ("init_weights", "IWM.update_teacher")
        put(name, part if gives_nothing else never_none(part))


def never_none(part):
    def checked(*args, **kwargs):
        result = part(*args, **kwargs)
        if result is None:
            what = part.__doc__ or "a tensor"
            pytest.fail(f"{part.__qualname__} returned None. Expected: {what}", False)
        return result

    return checked


def close(ours, expected, message, atol=1e-5, rtol=0.0):
    """Equal up to rounding; else the message says what was expected, and found."""
    assert ours is not None, f"{message}\ngot None"
    a, b = torch.as_tensor(ours), torch.as_tensor(expected)
    few = f"\nexpected {b}\ngot      {a}" if a.numel() < 30 else ""
    msg, how = lambda found: f"{message}{few}\n{found}", dict(check_dtype=False, equal_nan=True)
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=msg, **how)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, size=32):
    return rand(n, 3, size, size, generator=seeded())


def some_images():
    """Noise, black, white, greys, and colours with equal channels."""
    images = noise(64)
    images[0], images[1], images[2:6] = 0, 1, images[2:6, :1]
    images[6:12] = (3 * images[6:12]).round() / 3
    return images


def tiny(**changes):
    """A tiny IWM whose teacher has moved away from its encoder."""
    torch.manual_seed(0)
    model = iwm.IWM(replace(TINY, **changes))
    for p in model.teacher.parameters():
        p.data.add_(0.05 * randn(p.shape))
    return model


def act(images, action):
    """What actions make of clean images: a perfect world model. Any flag spoils it."""
    params = IDENTITY + action[:, :4] * TINY.jitter_strengths
    images = reference.jitter(images.expand(len(action), -1, -1, -1), params)
    return images + action[:, 4:].sum(dim=1).view(-1, 1, 1, 1)


class TestConfig:
    GRADES = "Config setting"

    @each("name, value", [("patch", 5), ("pred_width", 18), ("conditioning", 0), ("hue", math.nan)])
    def test_a_wrong_setting_is_named(self, name, value):
        with pytest.raises(ValueError, match=name):
            iwm.Config(**{name: value})


class TestJitter:  # exercise 1
    GRADES = "jitter shift_hue blend jitter_params"
    PARAMS = (rand(64, 4, generator=seeded(1)) - (1 - IDENTITY) / 2) * (1 + IDENTITY)

    @each("names", [*zip(reference.JITTER), reference.JITTER], ids="-".join)
    def test_operations_and_order_are_torchvisions(self, names):
        expected, params = some_images(), IDENTITY.repeat(64, 1)
        for name in names:
            i, adjust = reference.JITTER.index(name), getattr(TF, f"adjust_{name}")
            params[:, i] = self.PARAMS[:, i]
            expected = stack([adjust(x, p.item()) for x, p in zip(expected, params[:, i])])

        close(iwm.jitter(some_images(), params), expected, f"torchvision's {', '.join(names)}")

    @each("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_greys_are_finite_in_every_type(self, dtype):
        """A grey pixel has chroma 0, and 1e-8 is 0 in float16."""
        ours = iwm.jitter(some_images().to(dtype), self.PARAMS.to(dtype))
        close((~ours.isfinite()).sum(), 0, "infinite or NaN")

    def test_draws_fill_their_range_evenly(self):
        c = replace(TINY, strength=5, hue=0.2)
        always, maybe = (iwm.jitter_params(9999, c, seeded(), always=a) for a in (True, False))
        jittered = [(p != IDENTITY).any(dim=1).float().mean() for p in (always, maybe)]
        found = always[:, [0, 3]].quantile(linspace(0, 1, 5), dim=0).T
        expected = [[0, 0.75, 1.5, 2.25, 3], [-0.5, -0.25, 0, 0.25, 0.5]]

        close(found, expected, "quartiles of brightness and hue", 0.05)
        close(always.T.corrcoef(), eye(4), "correlation of the four", 0.05)
        close(jittered, [1, 0.8], "share jittered: always, with probability 0.8", 0.02)


class TestViews:  # exercise 2
    GRADES = "make_views make_action random_crop_flip"

    def test_crops_have_any_size_and_place(self):
        """The channels are column, row and white: their ranges in a crop are its sides."""
        axis = linspace(0, 1, 32).expand(2000, 1, 32, 32)
        crop = iwm.random_crop_flip(cat([axis, axis.mT, 0 * axis + 1], 1), TINY, seeded())
        low, high = crop.amin((2, 3)).T, crop.amax((2, 3)).T
        (width, height, _), (left, top, _) = high - low, low / (1 - high + low)
        found = stack([width * height, width / height, left, top - left])
        found = found.nanquantile(linspace(0, 1, 5), dim=1).T
        expected = [[0.3, 0.45, 0.63, 0.8, 0.95], [0.75, 0.9, 1, 1.12, 1.33]]
        expected += [[0, 0.3, 0.5, 0.7, 1], [-0.95, -0.27, 0, 0.27, 0.95]]
        mirrored = crop[:, 0, 0, 0] > crop[:, 0, 0, -1]

        close(found, expected, "quartiles of area, aspect, left, top - left", 0.06)
        close(mirrored.float().mean(), 0.5, "share mirrored", 0.05)
        close(crop[:, 2], ones(2000, 32, 32), "a crop of white")

    def test_x_is_y_degraded_as_the_flags_say(self, put):
        """A square and an inversion stand in for jitter and blur: they commute with nothing."""
        blur = Mock(side_effect=lambda v, sigma: 1 - v)
        put("gaussian_blur", blur)
        put("jitter", lambda v, params: v**2)
        probs = dict(crop_min=1.0, jitter_prob=0, blur_prob=0.25, gray_prob=0.5, solarize_prob=0.75)
        x, y, a = iwm.make_views(some_images(), replace(TINY, **probs), seeded())
        blurred, gray, solarized = a[:, 4:].T.reshape(3, 64, 1, 1, 1) == 1
        expected = torch.where(blurred, 1 - y, y)
        expected = torch.where(gray, TF.rgb_to_grayscale(expected, 3), expected)
        expected = torch.where(solarized, TF.solarize(expected, 0.5), expected)
        rows = [v.sort(dim=3)[0] for v in (y, some_images() ** 2)]
        sigma = blur.call_args[0][1]

        close(x, expected, "x: y, where flagged blurred, then grey, then solarised", 1e-4)
        close(*rows, "y: the jittered image or its mirror, rows sorted", 1e-4)
        close(a[:, 4:].mean(dim=0), [0.25, 0.5, 0.75], "share of each flag", 0.15)
        close(len(a.unique(dim=0)), 8, "combinations of flags", 2)
        close([sigma.min(), sigma.max()], [0.05, 1.0], "least and most sigma", 0.1)
        close(sigma.clamp(0.05, 1.0), sigma, "sigmas")

    def test_the_action_leads_from_x_to_y(self, put):
        """Image plus parameters stands in for a jittered image."""
        put("jitter", lambda v, params: v[..., :4] + params[:, None, None])
        config = replace(TINY, blur_prob=0.0, gray_prob=0.0, solarize_prob=0.0)
        x, y, a = iwm.make_views(some_images(), config, seeded())
        change = (y - x)[:5, 0, 0] / TINY.jitter_strengths

        assert change.any(), "x and y share their parameters"
        close(a[:5, :4], change, "(y - x) / strength")


class TestMasks:  # exercise 3
    GRADES = "block_unions sample_masks"

    @each("grid, share, K", [(8, 0.56, 36), (14, 0.82, 161), (2, 0.56, 2)])
    def test_the_context_has_the_asked_share(self, grid, share, K):
        masks = iwm.sample_masks(32, grid, replace(TINY, context=share), seeded())
        both = cat(masks, dim=1).sort(dim=1)[0]

        close(both, arange(grid**2).expand(32, -1), "each patch in one of the two")
        close(masks[0].shape[1], K, f"patches in the context, of {grid}²")

    def test_rectangles_have_the_asked_area(self):
        one, four = (iwm.block_unions(4000, 14, replace(TINY, blocks=n), seeded()) for n in (1, 4))
        height, width, area = one.any(2).sum(1), one.any(1).sum(1), one.sum((1, 2))
        found = [[v.min(), v.mean(), v.max()] for v in (area / 196, height / width)]
        expected = [[0.128, 0.175, 0.214], [0.71, 1.13, 1.75]]

        close(height * width, area, "one block is one rectangle")
        close(found, expected, "area, height / width: least, mean, most", rtol=0.08)
        close(one.any(dim=0).sum(), 196, "patches that rectangles reach")
        close(four.float().mean(), 0.48, "mean area of four", 0.02)

    def test_masks_are_rectangles_trimmed_at_random(self):
        masked, again = (iwm.sample_masks(20_000, 8, TINY, seeded())[1] for _ in range(2))
        board = F.one_hot(masked, 64).sum(dim=1).view(-1, 8, 8)
        same, often = board[:, :, 1:] == board[:, :, :-1], board.float().mean(dim=0)
        flipped = stack([often.flip(0), often.flip(1)])

        close(again, masked, "masks by the same generator")
        close(len(board[:500].unique(dim=0)), 500, "different masks of 500", 50)
        close(same.float().mean(), 0.83, "share of neighbours of one kind", 0.02)
        close(often[3:5, 3:5].mean(), 0.86, "share masked in the middle", 0.05)
        close(flipped, often.expand(2, 8, 8), "share masked, mirrored", 0.025)


class TestViT:  # exercise 4
    GRADES = "ViT ViT.forward Block Block.forward attention gather sincos_positions init_weights"

    def test_pixels_are_normalised(self):
        encoder = tiny(width=48).encoder
        encoder.embed = encoder.blocks = encoder.norm = nn.Identity()
        close(encoder(some_images())[:2, 0, 0], [-2, 2], "black, (0 - 0.5) / 0.25, and white")

    def test_masked_patches_are_not_seen(self):
        encoder, images, context = tiny().encoder, noise(4), arange(8).expand(4, -1)
        z = encoder(images, context)
        images[:, :, 4:] = 0
        close(encoder(images, context), z, "latents of row 0, with the rest black")

    def test_latents_know_where_they_are(self):
        encoder, order = tiny().encoder, rand(2, 64, generator=seeded()).argsort(dim=1)
        z, grey = encoder(noise(2)), encoder(ones(1, 3, 32, 32))
        expected = stack([z[i, order[i]] for i in range(2)])

        assert grey.std(dim=1).max() > 0.05, "equal patches have equal latents anywhere"
        close(encoder(noise(2), order), expected, "all patches in another order", 1e-4)
        close(z.var(dim=2, correction=0), ones(2, 64), "a LayerNorm comes last", 0.01)

    def test_positions_are_of_row_then_column(self):
        angle = tensor([[1, 1 / 100], [2, 2 / 100]])  # row 1, column 2; width 8
        expected = cat([angle.sin(), angle.cos()], dim=1).flatten()
        close(iwm.sincos_positions(8, 4)[6], expected, "row 1, column 2 of 4 x 4")

    def test_block_is_pytorchs(self):
        block, x = iwm.Block(16, 2), rand(2, 5, 16, generator=seeded())
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0, "gelu", 1e-6, True, True)
        parts = block.qkv, block.proj, block.fc1, block.fc2, block.norm1, block.norm2
        for p, q in zip(layer.parameters(), (p for part in parts for p in part.parameters())):
            p.data = q.data
        fc2 = tiny().encoder.blocks[1].fc2.weight.data
        close(block(x), layer(x), "x + attention(norm1(x)), then x + mlp(norm2(x))")
        close(fc2.std(), (2 / 160 / 4) ** 0.5, "fc2 of block 2: Xavier over sqrt(2 * 2)", 0.003)


class TestPredictor:  # exercise 5
    GRADES = "Predictor Predictor.forward Predictor.everywhere"
    context, asked = reference.sample_masks(3, 8, TINY, seeded())

    def imagined(self, mode, action=0.0, context=context, asked=asked, extra=None):
        """-> latents, and the tokens that entered the first block."""
        predictor, seen = tiny(conditioning=mode).predictor, []
        predictor.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        z = rand(3, 36, 32, generator=seeded())
        return predictor(z, context, asked, action + zeros(3, 7), extra), seen[0]

    @every_mode
    def test_all_tokens_know_where_they_are(self, mode):
        out, _ = self.imagined(mode)
        flipped, _ = self.imagined(mode, asked=self.asked.flip(1))
        moved, _ = self.imagined(mode, context=self.context.flip(1))

        close([*out.shape], [3, 28, 32], "the shape [B, M, D]")
        assert out.std(dim=1).max() > 1e-3, "the same latent is imagined everywhere"
        close(flipped.flip(1), out, "latents asked in another order", 1e-4)
        assert (moved - out).abs().max() > 1e-3, "context latents elsewhere change nothing"

    @every_mode
    def test_every_number_is_heard_if_it_is_told(self, mode):
        nothing, *outs = (self.imagined(mode, a)[0] for a in (0.0, *eye(7)))
        heard = [not equal(out, nothing) for out in outs]
        close(heard, [mode != "none"] * 7, "which numbers of the action are heard")

    def test_sequence_has_a_layer_for_each_number(self):
        """Asked everywhere, the action joins twice: there are twice as many others."""
        _, task = self.imagined("sequence", extra=zeros(3, 1, 16))
        _, everywhere = self.imagined("sequence", asked=arange(64).expand(3, -1))
        nothing, *acted = (self.imagined("sequence", a)[1][0] for a in (0.0, *eye(7)))
        change = stack(acted) - nothing
        found = task.shape[1], everywhere.shape[1]

        close(found, [1 + 7 + 64, 14 + 36 + 64], "tokens: with a task's; asked everywhere")
        close((change.abs().amax(dim=2) > 1e-6).sum(dim=1), [1] * 7, "tokens that a number changes")
        assert torch.pdist(change.sum(dim=1)).min() > 0.1, "two numbers change their tokens alike"

    def test_everywhere_is_all_positions(self):
        predictor = Mock()
        iwm.Predictor.everywhere(predictor, zeros(3, 64, 32), None)
        close(stack(predictor.call_args[0][1:3]), arange(64).expand(2, 3, 64), "context, asked")

    def test_feature_mixes_position_and_action(self):
        nothing, acted = (self.imagined("feature", a)[1][:, -28:] for a in (0.0, 1.0))

        assert nothing.std(dim=1).max() > 1e-3, "mask tokens are alike at all positions"
        assert (acted - nothing).std(dim=1).max() > 1e-3, "an action changes all of them alike"


class TestLoss:  # exercise 6
    GRADES = "IWM.loss IWM.targets"

    @each("asked, norm", [("masked", True), ("everywhere", False)])
    def test_what_goes_where_and_its_error(self, asked, norm, put):
        """Known tensors stand in for views, masks and what networks give."""
        model = tiny(predict_all=asked == "everywhere", target_norm=norm)
        z, h, x, y = randn(4, 36, 32), randn(4, 64, 32), noise(4), 1 - noise(4)
        action, (context, masked) = rand(4, 7), reference.sample_masks(4, 8, TINY)
        t = dict(x=x, y=y, action=action, z=z, context=context, masked=masked)
        t["everywhere"] = arange(64).expand(4, -1)
        put("make_views", Mock(return_value=(x, y, action)))
        put("sample_masks", Mock(return_value=(context, masked)))
        imagined = randn(*t[asked].shape, 32)
        networks = {model.encoder: z, model.teacher: h, model.predictor: imagined}
        for network, out in networks.items():
            network.forward = Mock(return_value=out)
        loss, h = model.loss(noise(4)), F.layer_norm(h, [32]) if norm else h
        calls = [call for network in networks for call in network.forward.call_args_list]
        given = [arg for args, more in calls for arg in (*args, *more.values())]
        found = [[n for n, v in t.items() if v.shape == g.shape and (v == g).all()] for g in given]
        error = imagined - h[arange(4)[:, None], t[asked]]

        expected = [["x"], ["context"], ["y"], ["z"], ["context"], [asked], ["action"]]
        assert found == expected, f"what encoder, teacher and predictor are given: {found}"
        close(loss, error.square().mean(), f"mean (imagined - teacher)^2, layer-normed: {norm}")

    def test_gradients_skip_the_teacher_only(self):
        model = tiny()
        model.loss(noise(4), seeded()).backward()
        reached = {n: p.grad is not None and p.grad.any() for n, p in model.named_parameters()}
        wrong = [n for n, yes in reached.items() if yes == n.startswith("teacher")]
        assert not wrong, f"a gradient too many or missing: {wrong}"

    def test_views_follow_the_generator_in_float32(self):
        model = tiny()
        encoder = model.encoder.forward = Mock(wraps=model.encoder.forward)
        model.loss(noise(4), seeded())
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(noise(4), seeded())

        one, other = (args for args, _ in encoder.call_args_list)
        close(other[0], one[0], "x, by the same generator, under bfloat16")
        close(other[1], one[1], "context, by the same generator")


class TestTeacher:  # exercise 7
    GRADES = "IWM.update_teacher"

    def test_the_teacher_is_a_moving_average(self):
        model = iwm.IWM(TINY)
        pairs = [*zip(model.teacher.parameters(), model.encoder.parameters())]
        copied = all(equal(p, q) and not p.requires_grad for p, q in pairs)
        for p, q in pairs:
            p.data.fill_(1.0), q.data.fill_(2.0)
        model.update_teacher(0.9)
        found = {f"{p.mean():.4f} and {q.mean():.4f}" for p, q in pairs}

        assert copied, "it starts as a frozen copy"
        assert found == {"1.1000 and 2.0000"}, f"teacher 1, encoder 2, momentum 0.9: {found}"


class TestMRR:  # exercise 8
    GRADES = "ranks mean_reciprocal_rank chance variants measure_mrr IWM.imagine"

    def test_ranks_worked_by_hand(self):
        bank, imagined = tensor([[0.0, 1, 3, 6], [0.9, 0.9, 4.4, 0]]).unsqueeze(2)
        same = 1 + 1e-7 * arange(4).unsqueeze(1)

        close(iwm.ranks(imagined, bank), [2, 1, 1, 4], "1 + those nearer than the true one")
        close(iwm.mean_reciprocal_rank(imagined, bank), 2.75 / 4, "mean of 1 / 2, 1, 1, 1 / 4")
        close(iwm.ranks(same, same), [2.5] * 4, "four tied, but for rounding")
        close(iwm.ranks(same * math.nan, same), [2.5] * 4, "NaN is nearer to none")

    def test_an_action_blind_model_is_at_chance(self):
        blind = iwm.measure_mrr(tiny(conditioning="none"), noise(2), seeded())["mrr"]
        close([iwm.chance(256), blind], [0.0239232] * 2, "H(256) / 256, and MRR without the action")

    def test_errors_that_cancel_spoil_all_but_pooled(self):
        """Half of the images are imagined perfectly, the others with errors."""
        model, errors = tiny(bank=64), 99 * randn(64, 64, 32, generator=seeded())
        errors -= errors.mean(dim=1, keepdim=True)
        model.imagine = lambda x, action: model.targets(act(x, action)) + errors * (x.mean() > 0.5)
        found = iwm.measure_mrr(model, noise(4), seeded())
        expected = [0.537, 0.508, 0.539, 1, 0.074]
        close([*found.values()], expected, [*found], 0.02)

    @each("i", range(4))
    def test_only_an_ignored_component_has_an_error(self, i):
        model, others = tiny(), arange(7) != i
        model.imagine = lambda image, action: model.targets(act(image, action * others))
        ends = torch.where(arange(4) == i, TINY.jitter_range, IDENTITY)
        errors = lab.measures.measure_components(model, noise(2))

        close(lab.measures.sweep_params(i, TINY)[[0, -1]], ends, f"ends of sweep {i}")
        close([*errors.values()], 0.27 * eye(4)[i], f"{[*errors]}, number {i} ignored", 0.02)

    def test_the_bank_is_the_teachers(self):
        model, action = tiny(), tensor([[0.5, -0.5, 1, 0.3, 0, 0, 0]])
        params = IDENTITY + action[:, :4] * TINY.jitter_strengths
        images, bank, imagined = iwm.variants(model, noise(1), params)
        positions = arange(64)[None]
        expected = model.predictor(model.encoder(noise(1)), positions, positions, action)

        close(images, act(noise(1), action), "the jittered images")
        close(bank, model.targets(images), "bank: the teacher's targets of them")
        close(imagined, expected, "p(student(clean image), action), everywhere", 1e-4)


class TestDestructive:  # exercise 9
    GRADES = "gaussian_blur blur_sigma solarize grayscale"

    @each("size, low, high", [(32, 0.05, 1.0), (224, 0.1, 2.0)])
    def test_blur_is_torchvisions(self, size, low, high):
        images, sigma = noise(4, size), linspace(low, high, 4)
        blurred = [TF.gaussian_blur(x, int(6 * high) + 1, s.item()) for x, s in zip(images, sigma)]

        close(iwm.blur_sigma(size), [low, high], "least and most sigma")
        close(iwm.gaussian_blur(images, sigma), stack(blurred), "gaussian_blur, 3 sigma wide")

    def test_gray_and_solarize_are_torchvisions(self):
        x = some_images()
        close(iwm.grayscale(x), TF.rgb_to_grayscale(x), "luma, one channel")
        close(iwm.solarize(x), TF.solarize(x, 0.5), "inverted where 0.5 or brighter")


class TestPlan:
    GRADES = "IWM.plan"

    def test_a_perfect_model_finds_what_is_in_range(self):
        """Its latents are the pixels. No action is as bright as the last goal."""
        images, model = noise(16) / 2, tiny()
        params = iwm.jitter_params(16, TINY, seeded(1), always=True)
        params[-1, 0] = 2
        model.predictor.everywhere = lambda z, action: act(images, action).flatten(2)
        model.targets = lambda goals: goals.flatten(2)
        found = model.plan(images, iwm.jitter(images, params), steps=200)
        result = lab.measures.measure_planning(model, images, seeded(2))
        miss = (found - params)[:-1] / (2 * TINY.jitter_strengths)

        close(miss, zeros(15, 4), "(found - true) / range", 0.01)
        close(result["plan_left"], 0.0, "plan_left", 0.05)
        close(found.clamp(*TINY.jitter_range), found, "found, within the range")

    def test_an_action_blind_model_finds_nothing(self):
        """For even draws the identity misses a quarter of the range on average."""
        model = tiny(conditioning="none", image_size=8)
        result = [*lab.measures.measure_planning(model, noise(999, 8), seeded()).values()]
        found = model.plan(noise(4, 8), 1 - noise(4, 8))

        close(found, IDENTITY.repeat(4, 1), "the identity", 0)
        close(result[0], 1.0, "plan_left")
        close(result[1:], [0.25] * 4, "plan_error_*", 0.03)
        close(sum(p.grad is not None for p in model.parameters()), 0, "weights with a gradient")


class TestProbes:
    def test_rankme_is_the_effective_rank(self):
        """Singular values 3 and 1: exp(-3/4 log 3/4 - 1/4 log 1/4) = 1.755."""
        q = torch.linalg.qr(randn(100, 5, generator=seeded())).Q
        features = q, ones(50, 8), q[:, :2] * tensor([3, 1]), q * tensor([1, 1, 1, 1, math.nan])
        found = [lab.measures.rankme(f) for f in features]
        close(found, [5, 1, 1.755, math.nan], "five equal, a constant, (3, 1), not finite", 0.01)

    @each("probe, scale", [("knn_accuracy", 1), ("linear_accuracy", 1000)])
    def test_probes_find_separable_classes(self, probe, scale):
        """A linear probe reads small features as well."""
        labels = arange(800) % 4
        f = F.one_hot(labels, 16) + 0.1 * randn(800, 16, generator=seeded())
        f[:, :4] /= scale
        test = f[400::4], labels[400::4]  # one class: its own mean would hide it
        close(getattr(lab.measures, probe)(f[:400], labels[:400], *test), 1.0, "accuracy", 0.05)

    def test_knn_is_a_naive_one(self):
        train, test = randn(1200, 4, generator=seeded()).split([100, 1100])
        labels = arange(100) % 3
        near, i = F.cosine_similarity(test[:, None], train, dim=2).topk(20)
        votes = F.one_hot(labels[i]) * (near / 0.07).exp()[:, :, None]
        truth = votes.sum(dim=1).argmax(dim=1)
        close(
            lab.measures.knn_accuracy(train, labels, test, truth), 1.0, "agreement with a naive one"
        )

    @pytest.mark.filterwarnings("error")
    def test_one_training_image_is_enough(self):
        labels = torch.full((5,), 3)
        found = lab.measures.linear_accuracy(rand(1, 8), labels[:1], rand(5, 8), labels)
        close(found, 1.0, "accuracy")


class TestFakeGPU:
    """Tensors without data: on a wrong device, or read, they raise."""

    @every_mode
    @each("preset", train.PRESETS)
    def test_a_step_stays_on_the_device(self, preset, mode, monkeypatch):
        config = replace(train.PRESETS[preset], conditioning=mode, depth=1, pred_depth=1)
        model = iwm.IWM(config)
        # neither exists for fake tensors
        monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
        monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: [images[:, 0, 0, :7]])
        monkeypatch.setattr(torch.Tensor, "cpu", lambda _: pytest.fail("from device to host"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            images = rand(2, 3, *[config.image_size] * 2, device="cuda")
            model.to("cuda")
            imagined = model.imagine(images, images[:, 0, 0, :7])
            found = model.loss(images), imagined, model.plan(images, images, steps=2)
            model.update_teacher(0.9)

        assert {out.device.type for out in found} == {"cuda"}, f"{found}"


# ---- The experiments, and what only an honest pipeline can find ----------------------------------

CPU, DRAW, SPLITS = torch.device("cpu"), train.draw, ("train", "val", "test")
SIZES = "--image-size=16 --patch=8 --width=32 --depth=1 --heads=2 --pred-width=32 --pred-depth=1"
FLAGS = SIZES + " --bank=4 --batch-size=8 --steps=10 --no-bf16 --device=cpu --out=run "
RECIPE = replace(train.PRESETS["shapes"], **train.parse(FLAGS.split())[1])


def small():
    """An IWM whose encoder, teacher and predictor say 1, 2 and 3; random ones say 0."""
    torch.manual_seed(0)
    model = train.IWM(RECIPE)
    model.teacher = train.IWM(RECIPE).teacher
    for i, part in enumerate((model.encoder.norm, model.teacher.norm, model.predictor.out)):
        part.bias.data.fill_(i + 1)
    return model


def read(path):
    text = Path(path).read_text()
    return [json.loads(x) for x in text.splitlines()] if path[-1] == "l" else json.loads(text)


def counted(n):
    """Images whose pixels are their number."""
    return arange(n).byte()[:, None, None, None].expand(-1, 3, 16, 16)


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def marked():
    """Splits of one grey each: 0 is train, 100 val, 200 test; their labels are 0, 1, 2."""
    return {s: (0 * counted(16) + 100 * i, 0 * arange(16) + i) for i, s in enumerate(SPLITS)}


@fixture
def patch(monkeypatch):
    def patch(owner, **new):
        for name, value in new.items():
            monkeypatch.setattr(owner, name, value)

    return patch


@fixture
def spy(patch):
    def spy(owner, name, look):
        real = getattr(owner, name)
        patch(owner, **{name: lambda *args, **kw: (look(*args), real(*args, **kw))[1]})

    return spy


@fixture
def steps(spy):
    """Each step of AdamW: lr, weight decay, parameters of each group."""
    steps, keys = [], ("lr", "weight_decay", "params")
    look = lambda self, *_: steps.append([[g[key] for key in keys] for g in self.param_groups])
    spy(torch.optim.AdamW, "step", look)
    return steps


@fixture
def call(monkeypatch, patch, capsys, tmp_path):
    """Runs a script in an empty folder -> what it prints or the line it ends with."""
    monkeypatch.chdir(tmp_path)
    patch(lab.data, SHAPES_IMAGES=dict(train=40, val=12, test=12))
    patch(train, draw=lambda *_: None, draw_curves=lambda *_: None)

    def call(flags="", script=train):
        always = FLAGS if script is train else "run --device=cpu "
        patch(sys, argv=["", *(always + flags).split()])
        try:
            script.main()
        except SystemExit as end:
            assert end.code and "\n" not in end.code, "one line"
            return end.code
        return "".join(capsys.readouterr())

    return call


def coded(labels):
    """For lab.data.shapes: images tell their factors; random labels are wrong for half a class."""

    def shapes(n, seed, size):
        g = seeded(seed)
        order = torch.randperm(n // 2, generator=g).repeat(2)
        truth = stack([order // 2**bit % 2 for bit in range(4)])
        left = (arange(size) < size // 2).expand(n, size, size)
        images = randint(50, (n, 3, size, size), generator=g) + 50 * left[:, None]
        images += 150 * truth.T.repeat(1, size // 4)[:, None, None]
        coins = randint(2, (5, n // 2), generator=g)
        coins = cat([coins, 1 - coins], dim=1)
        wrong = {"true": 0 * coins, "opposite": 0 * coins + 1, "random": coins}[labels[seed]]
        mask = left ^ wrong[4, :, None, None].bool()
        return dict(zip(finetune.FACTORS, truth ^ wrong[:4]), images=images.byte(), mask=mask)

    return shapes


@each("labels, val, test", [
    ("true true opposite", (0.8, 1), (0, 0.2)),  # learn
    ("true random random", (0.39, 0.61), (0.39, 0.61)),  # leak: chance and four deviations
    ("random true true", (0.2, 0.8), (0.2, 0.8)),  # shuffled
])  # fmt: skip
def test_only_what_images_tell_is_learned(labels, val, test, call, patch):
    call()
    patch(lab.data, SHAPES_IMAGES=dict.fromkeys(SPLITS, 320), shapes=coded(labels.split()))
    ways = ["protocol=table", "task=segment --steps=120"]
    if labels[0] == "t":
        ways += ["protocol=average", "protocol=factors", "task=shape,colour"]
    for way in ways:
        call(f"--steps=40 --batch-size=32 --lr=.02 --{way}", finetune)
    data = train.load_data(RECIPE, CPU, None)
    for split, (low, high) in (("val", val), ("test", test)):
        rows = [(row["row"], row[split]) for row in read("run/finetune.jsonl")]
        measured = lab.measures.measure(small(), data, split, 1, 320)
        rows.append(("measure", {probe: measured[probe] for probe in ("knn", "linear")}))
        for row, task, score in ((row, *item) for row, scores in rows for item in scores.items()):
            if task == "segment" and 0 < low < 0.8:
                score += 0.3  # mIoU by chance is 0.2
            assert low <= score <= high, f"{row}: {task} of {split}, labels are {labels}"


def test_measure_probes_the_teacher_on_its_split(patch, spy):
    model, data, others = small(), marked(), []
    look = lambda model, images, *_: others.append(images) or {}
    patch(train.iwm, measure_mrr=look)
    patch(lab.measures, measure_components=look, measure_planning=look, rankme=lambda f: f)
    spy(train.IWM, "targets", look)
    for split in ("val", "test"):
        found = lab.measures.measure(model, data, split, 3, 9)["rankme"]
        images = data[split][0] / 255
        close(found, model.teacher(images[:9]).mean(dim=1), f"features of {split}")
        for seen in others[-4:]:
            close(seen, images[: len(seen)], f"images of {split}")


@fixture
def log(call, patch, spy, steps):
    """What a run of 40 steps does: train has images 0..39, val 100, test 200."""
    log = Namespace(batches=[], measured=[], draws=[], ema=[])

    def measure(model, data, split, n, _):
        log.measured.append((len(steps), split, n))
        names = "mrr hit1 plan_left knn linear target_std rankme".split()
        return dict.fromkeys(names, model.encoder.embed.weight.sum().item())

    def forward(model, images, generator):
        log.model = model
        log.batches.append(numbers(255 * images))
        log.draws.append(torch.rand(1, generator=generator).item())

    data = marked() | {"train": (counted(40), 0 * arange(40))}
    patch(train, load_data=lambda *_: data, measure=measure)
    patch(lab.measures, measure=measure)
    spy(train.IWM, "forward", forward)
    spy(train.IWM, "update_teacher", lambda model, m: log.ema.append((len(steps), m)))
    flags = "--steps=40 --measurements=20 --seed=3 --warmup=.25 --lr=.01 --ema=.9"
    call(flags + " --weight-decay=.04 --weight-decay-end=.4")
    return log


def test_a_run_measures_val_and_at_the_end_test(log):
    metrics, result = read("run/metrics.jsonl"), read("run/result.json")
    found = [m["mrr"] for m in (metrics[0], metrics[2], result["trained"], result["random"])]
    torch.manual_seed(3)
    states = train.IWM(RECIPE).state_dict(), torch.load("run/last.pt")["model"]
    fresh, last = (state["encoder.embed.weight"].sum().item() for state in states)
    val = [(0, "val", 1), (20, "val", 1), (40, "val", 1)]  # a short run measures a tenth

    assert log.measured == [*val, (40, "test", 4), (40, "test", 1)], "(step, split, images)"
    assert [(m["step"], m["images"]) for m in metrics] == [(0, 0), (20, 160), (40, 320)]
    assert found == [fresh, last, last, fresh], "networks of first, last, trained, random"


def test_an_epoch_has_each_training_image_once(log, patch):
    epochs = [sum(log.batches[i : i + 5], []) for i in range(0, 40, 5)]
    recipe, halves = replace(RECIPE, steps=40, seed=3), []
    for rank in range(2):
        patch(machine, WORLD=2, RANK=rank)
        halves.append([numbers(x) for x in train.batches(counted(40), recipe, 7, CPU)])

    for epoch in epochs:
        assert sorted(epoch) == [*range(40)] != epoch, "an epoch, in random order"
    assert len({*map(tuple, epochs)}) == 8, "epochs share an order"
    for batch, mine, yours in zip(log.batches[7:], *halves, strict=True):
        assert sorted(mine + yours) == sorted(batch), "two processes from step 7 on"
        assert len(mine) == 4, "a process has half of the batch"


def test_steps_processes_and_seeds_draw_anew(log, patch):
    optimizer = train.make_optimizer(log.model, RECIPE)
    for rank, recipe in ((1, replace(RECIPE, seed=3)), (0, RECIPE)):
        patch(machine, RANK=rank)
        train.train_step(log.model, optimizer, counted(8), 0, recipe, seeded())

    first = next(train.batches(counted(40), RECIPE, 0, CPU))
    assert len({*log.draws}) == 42, "draws of 40 steps, another process, another seed"
    assert numbers(first) != log.batches[0], "the order of another seed"


def test_schedules_and_weight_decay_of_a_run(log, steps):
    assert [n for n, _ in log.ema] == [*range(1, 41)], "steps before each EMA"
    for i, *values in (
        (0, 0.001, 0.04, 0.9), (9, 0.01, 0.0831, 0.9225), (25, 0.005, 0.289, 0.9625),
        (39, 2.84e-5, 0.3994, 0.9975),
    ):  # fmt: skip
        (lr, decay, decayed), (lr_too, none, others) = steps[i]
        found = [lr, decay, log.ema[i][1]]
        assert found == approx(values, rel=0.01), f"step {i}: lr, weight decay, momentum"
        assert (lr_too, none) == (lr, 0), f"step {i}: of biases"
    learned = [p for p in log.model.parameters() if p.requires_grad]
    assert {*map(id, decayed)} == {id(p) for p in learned if p.ndim == 2}, "decayed: matrices"
    assert {*map(id, others)} == {id(p) for p in learned if p.ndim < 2}, "the rest is not"


@fixture
def fitted(spy):
    """-> a network fitted to tasks a and b, what it saw."""
    tasks = {n: finetune.Task({"train": (counted(16), arange(16))}) for n in "ab"}
    seen = []
    spy(finetune.Network, "forward", lambda self, x, task: seen.append((task, numbers(x))))

    def fitted(row, seed=0, model=None, steps=40):
        seen.clear()
        network = finetune.Network(row, model or small(), tasks, 0)
        args = Namespace(steps=steps, batch_size=16, tasks=[*tasks])  # they share a batch
        finetune.fit(network, tasks, 0.01, seed, args, "")
        return network, [*seen]

    return fitted


def test_finetuning_has_each_image_once_an_epoch(fitted):
    seen = fitted("attentive")[1]
    epochs = [seen[i][1] + seen[i + 2][1] for i in range(0, 80, 4)]

    assert [sorted(epoch) for epoch in epochs] == [[*range(16)]] * 20, "epochs of task a"
    assert len({*map(tuple, epochs)}) == 20, "epochs share an order"
    assert [task for task, _ in seen] == ["a", "b"] * 40, "a step has all tasks"
    assert fitted("attentive")[1] == seen != fitted("attentive", 1)[1], "order and seed"


@each("row, share", [("end-to-end", 0.1), ("scratch", 1)])
def test_schedule_and_weight_decay_of_finetuning(row, share, fitted, steps):
    named = fitted(row)[0].named_parameters()
    # heads and task tokens are new
    expected = {id(p): (1 if n[0] in "ht" else share, 0.05 * (p.ndim == 2)) for n, p in named}
    for i, part in ((0, 0.25), (3, 0.986), (20, 0.5), (39, 0.00154)):
        found = {id(p): (lr, decay) for lr, decay, group in steps[i] for p in group}
        assert found.keys() == expected.keys(), "what is optimised"
        for p, (scale, decay) in expected.items():
            assert found[p] == approx((0.01 * part * scale, decay), rel=0.01), f"{row}, step {i}"


def test_k_imagined_is_the_mean_over_k_actions(patch):
    actions = []
    look = lambda self, z, action: actions.append(action) or action[:, None]
    patch(train.iwm.Predictor, everywhere=look)
    patch(lab.measures, linear_accuracy=lambda x, *_: x)
    row = "linear, 5 imagined", small(), {"t": finetune.Task(marked())}, 0
    found = finetune.closed_form_row(*row)["test"]["t"]

    assert len(actions) == 15, "5 for each split"
    assert len(cat(actions[:5]).unique(dim=0)) == 80, "each has its own"
    assert not found[:, 4:].any() and found.abs().max() < 1, "actions of the bank"
    close(found, sum(actions[:5]) / 5, "the mean")
    actions.clear()
    finetune.closed_form_row("linear, predictor", *row[1:])
    assert not cat(actions).any(), "the predictor's own row has the null action"


class TestNetwork:
    """Exercise 10."""

    def test_a_row_reads_the_networks_that_it_names(self, patch):
        claims = {  # 2 is the teacher, 1 the encoder, 0 random; + 10 random, 40 learned predictor
            0: ["attentive, random init", "knn, random init", "linear, random init"],
            1: ["linear, encoder"], 2: ["attentive", "encoder", "knn, teacher", "linear, teacher"],
            10: ["scratch"], 12: ["random predictor"],
            42: ["learned predictor", "end-to-end", "linear, predictor", "linear, 5 imagined"],
        }  # fmt: skip

        def score(network, name, task, split):
            network.heads[name] = nn.Identity()
            return who(network(task.data[split][0], name))

        who = lambda x, *_: x.mean() + x.flatten()[0] / 1000  # ... which shows the seed
        predict = lambda self, z, *_: z + 10 + 10 * self.out.bias.mean()
        patch(train.iwm.Predictor, everywhere=predict)
        patch(lab.measures, knn_accuracy=lambda *x: who(*x) - 50, linear_accuracy=who)
        patch(finetune, score=score, fit=lambda *_: None)
        task = {"t": finetune.Task(marked())}
        for claim, row in [(c, row) for c in claims for row in claims[c]]:
            trained = row in finetune.ROWS
            more = [Namespace(lr=None)] * trained
            by = finetune.trained_row if trained else finetune.closed_form_row
            one, other = (by(row, small(), task, seed, *more) for seed in (0, 1))
            read, too = (found["test"]["t"].item() for found in (one, other))
            assert read == approx(claim - 50 * row.startswith("knn"), abs=0.1), row
            assert (read != too) == (claim in (0, 10)), f"{row}: only random weights have a seed"
            assert one["lr"] == (finetune.ROWS[row][2] if trained else None), f"{row}: lr"

    @each("row", finetune.ROWS)
    def test_only_what_is_learned_moves(self, row, fitted):
        model, frozen = small(), finetune.ROWS[row][0].startswith("frozen")
        network, start = fitted(row, 0, model, 3)[0], fitted(row, 0, model, 1)[0].state_dict()

        for name, p in network.named_parameters():
            moved = not equal(p, start[name])
            assert moved != (frozen and name.startswith("encoder.")), f"{name} moved: {moved}"
        for name, p in small().state_dict().items():
            close(model.state_dict()[name], p, f"{name} of the checkpoint", 0)

    def test_the_predictor_gets_latents_the_null_action_and_the_task(self, fitted, spy):
        network, given = fitted("learned predictor")[0], []
        spy(train.iwm.Predictor, "forward", lambda self, *x: given.extend(x))
        network(counted(2), "b")
        z, context, asked, action, token = given

        close(z, network.encoder(counted(2) / 255), "latents of clean images")
        close(stack([context, asked]), arange(4).expand(2, 2, 4), "all positions")
        close(action, zeros(2, 7), "the null action")
        close(token, network.task_tokens["b"].expand(2, -1, -1), "the token of the task")
        assert not equal(*network.task_tokens.values()), "tasks share a token"


def test_mean_iou_worked_by_hand():
    found = finetune.mean_iou(tensor([[0, 1, 1, 1]]), tensor([[0, 0, 1, 1]]), 4)
    assert found == approx((1 / 2 + 2 / 3) / 2), "classes 2, 3 do not count"


def test_table_of_finetuning_over_seeds(call, patch):
    made = lab.data.shapes(40, 0, 16)

    def row(row, model, tasks, seed, *args):
        for name, task in tasks.items():
            images, labels = task.data["train"]
            assert equal(images, made["images"][:5]) and equal(labels, made[name][:5]), name
        return {"val": {}, "test": {t: seed / 10 for t in tasks}, "lr": None, "trainable": 7}

    call()
    patch(finetune, trained_row=row, closed_form_row=row)
    said = call("--task=shape,colour --seeds=2 --seed=4 --protocol=table --labels=5", finetune)
    for line in ("linear, teacher | 7", "scratch, shared | 7", "scratch, one each | 14"):
        assert f"| {line} | 45.0 ± 7.1 | 45.0 ± 7.1 |" in said


# ---- A run of train.py, and its data -------------------------------------------------------------


def test_a_run_leaves_its_files(call, patch):
    patch(train, draw=DRAW)
    said = call()
    call("--measure=run/last.pt --out=again")
    result, again = read("run/result.json"), read("again/result.json")
    names = "step images seconds loss mrr hit1 target_std rankme knn linear error_hue plan_left"
    files = "config.json last.pt metrics.jsonl plan.png result.json retrieval.png strip.png "

    assert sorted(os.listdir("run")) == [*files.split(), "views.png"], "files"
    assert {*names.split()} <= read("run/metrics.jsonl")[1].keys(), "metrics.jsonl"
    assert f"{result['trained']['mrr']:.4f}" in said, "MRR is printed"
    assert result["trained"] == again["trained"], "--measure finds other numbers"


def test_a_killed_run_resumes_bit_equal(call, patch, spy):
    clock, calls = count(0, 70), []
    patch(train, time=Namespace(monotonic=lambda: next(clock)))
    flags = "--steps=50 --measurements=20 "
    call(flags)
    spy(train.IWM, "update_teacher", lambda *_: calls.append(1) or 1 / (len(calls) - 47))
    with raises(ZeroDivisionError):
        call(flags + "--out=parts")
    assert 25 < torch.load("parts/last.pt")["step"] < 47, "saved every two minutes"
    call(flags + "--resume --out=parts")
    one, other = torch.load("run/last.pt"), torch.load("parts/last.pt")
    for m in one["metrics"] + other["metrics"]:
        del m["seconds"], m["memory_gib"]

    for name, weight in one["model"].items():
        close(other["model"][name], weight, name, 0)
    for name in ("metrics", "optimizer", "config"):
        assert str(one[name]) == str(other[name]), name


def test_table_of_runs_over_seeds(call):
    for name, seed, data, mrr in (
        ("a,seed=0", 0, "A/x", 0.2), ("a,seed=1", 1, "A/x", 0.4), ("b", 0, "B/x", 0.1), ("c", 0, "", 0),
    ):  # fmt: skip
        os.mkdir(name)
        made = {"config": asdict(replace(RECIPE, seed=seed, data=data)), "trained": {"mrr": mrr}}
        for file in ("config.json", "result.json")[: 2 if mrr else 1]:
            Path(name, file).write_text(json.dumps(made | {"seconds": 60.0}))
    said = call("--table a,seed=0 a,seed=1 b c")

    for line in ("| a | 2 | 0.300 ± 0.141 | ", "| b | 1 | 0.100 | ", "c is no finished run"):
        assert line in said


@each("script, flags", [
    *product([train], (
        "--conditioning=film --patch=5 --steps=0 --data=no/such --device=abacus --lr=nan "
        "--seed=-1 --batch-size=50 --nonsense --measure=no.pt").split()),
    *product([finetune], "--lr=x --task=hat --labels=99 --data=no/such".split()),
])  # fmt: skip
def test_a_wrong_flag_is_named_in_a_line(script, flags, call):
    call()
    assert flags.split("=")[-1].strip("-") in call(flags + " --out=new", script)
    assert not os.path.exists("new"), "written"


def test_nothing_is_overwritten_and_half_a_file_is_refused(call):
    call()
    whole = Path("run/last.pt").read_bytes()
    assert "--resume" in call() and "lr was" in call("--resume --lr=.1")
    assert "warmup was" in call("--resume --preset=paper"), "another preset"
    assert Path("run/last.pt").read_bytes() == whole, "the run has changed"
    for n in (0, 99, len(whole) // 2, len(whole) - 1):
        Path("run/last.pt").write_bytes(whole[:n])
        for flags in ("--resume", "--measure=run/last.pt"):
            assert "run/last.pt" in call(flags), flags
        assert lab.data.read_image("run/last.pt", 8) is None, "no image"


@each("script", [train, finetune])
@each("error", [KeyboardInterrupt("stopped"), OSError(28, "full"), ValueError("bug")])
def test_a_bug_has_a_traceback_other_ends_a_line(script, error, patch):
    patch(train.argparse.ArgumentParser, parse_args=lambda *_: (_ for _ in ()).throw(error))
    with raises(ValueError if "bug" in str(error) else SystemExit, match="stopped|full|bug"):
        runpy.run_path(script.__file__, run_name="__main__")


def test_settings_train_or_are_refused_in_a_line(call):
    for i, (f, value) in enumerate(zip(fields(train.iwm.Config), cycle("01"))):
        flag = f"--{f.name.replace('_', '-')}={value}"
        trained = "random init" in call(f"--steps=2 --out={i} {flag}")
        assert os.path.exists(f"{i}/result.json") == trained, flag


def test_shapes_are_repeatable_and_balanced(patch):
    patch(lab.data, SHAPES_IMAGES=dict(train=2000, val=1000, test=1000))  # whole chunks
    recipe = replace(RECIPE, image_size=8, patch=4)
    one, same = (train.load_data(recipe, CPU, None) for _ in range(2))
    images, again = (cat([x for x, _ in data.values()]) for data in (one, same))
    factors = lab.data.shapes(2000, 0, 8)

    assert equal(images, again) and equal(one["train"][1], factors["shape"]), "drawn twice"
    assert [len(y) for _, y in one.values()] == [2000, 1000, 1000], "sizes"
    assert len(images.flatten(1).unique(dim=0)) == 4000, "different ones"
    for name, kinds in (("shape", 8), ("colour", 8), ("texture", 4), ("background", 4)):
        assert factors[name].bincount(minlength=kinds).min() > 0.7 * 2000 / kinds, name


def fill(folder, n, colour):
    """Pictures of equal names, sizes and times in every folder."""
    os.makedirs(folder, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (20, 16), colour).save(f"{folder}/{i}.bmp")
        os.utime(f"{folder}/{i}.bmp", (0, 0))


@fixture
def load(call):
    """-> of ./d: numbers of images; {"split, label, strongest channel"}."""
    for split, colour in (("train", "red"), ("test", "blue")):
        fill(f"d/{split}/cat", 12, colour)
        fill(f"d/{split}/dog", 12, "lime")

    def load():
        data = train.load_data(replace(RECIPE, data="d"), CPU, Path("cache"))
        what = lambda s: {f"{s} {y} {x[:, 0, 0].argmax()}" for x, y in zip(*data[s])}
        return [len(data[s][1]) for s in SPLITS], set.union(*map(what, SPLITS))

    return load


def test_folders_keep_their_images_and_labels(load):
    right = {"train 0 0", "train 1 1", "val 0 0", "test 0 2", "test 1 1"}
    for new, *sizes in (
        (lambda: None, 22, 2, 24),
        (lambda: None, 22, 2, 24),  # from the cache
        (lambda: fill("d/train/dog/deeper", 5, "lime"), 27, 2, 24),
        (lambda: [fill("d/val/cat", 3, "red"), fill("d/val/dog", 2, "lime")], 29, 5, 24),
        (lambda: os.rename("d/val", "val"), 27, 2, 24),
        (lambda: os.rename("d/test", "d/val"), 27, 2, 24),
    ):  # fmt: skip
        new()
        assert load() == (sizes, right | ({"val 1 1"} if sizes[0] != 27 else set()))


def test_another_folder_image_or_size_is_decoded_anew(load):
    before = load()[1]
    os.mkdir("other")
    os.chdir("other")
    os.symlink("../cache", "cache")
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        fill(f"d/{folder}", 12, "blue")
    assert load()[1] != before, "a folder of the same name elsewhere"
    Image.new("RGB", (20, 16), "red").save("d/train/cat/0.bmp")
    assert load()[1] & {"train 0 0", "val 0 0"}, "an image has changed"
    larger = train.load_data(replace(RECIPE, data="d", image_size=32), CPU, Path("cache"))
    assert larger["train"][0].shape[-1] == 32


def test_damaged_images_are_named(load):
    for name in "ab":
        Path(f"d/train/cat/{name}.jpg").write_bytes(b"damaged")
    for _ in range(2):  # nothing half decoded is kept
        with raises(SystemExit, match="2 images.*cat/"):
            load()


def test_an_unknown_class_is_named(load):
    fill("d/test/horse", 1, "red")
    with raises(SystemExit, match="horse"):
        load()


def test_pictures_become_upright_rgb(tmp_path):
    grey, exif = Image.linear_gradient("L"), Image.Exif()  # black above
    exif[0x112] = 3  # turned
    pictures = {f"{mode}.png": grey.convert(mode) for mode in ("1", "L", "P")}
    pictures |= {"CMYK.jpg": grey.convert("CMYK"), "turned.jpg": grey.rotate(180)}
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **{"exif": exif} if name == "turned.jpg" else {})
        found = lab.data.read_image(tmp_path / name, 10)

        assert found.shape == (3, 10, 10), name
        assert (found[:, 0].mean(), found[:, 9].mean()) == approx((13, 242), abs=20), name


def test_cifar_keeps_its_splits_and_labels(call, patch):
    class Cifar(list):
        def __init__(self, root, train, download):
            super().__init__(range(60) if train else range(100, 120))
            self.data, self.targets = counted(256)[[*self]].movedim(1, 3).numpy(), [*self]

    patch(lab.data.torchvision.datasets, CIFAR10=Cifar)
    recipe = replace(RECIPE, data="cifar10")
    data, again = (train.load_data(recipe, CPU, None) for _ in range(2))
    one, val, test = labels = [data[s][1].tolist() for s in SPLITS]
    assert [numbers(data[s][0]) for s in SPLITS] == labels, "labels"
    assert len(val) == 6 and sorted(one + val) == [*range(60)], "held out"
    assert equal(data["val"][1], again["val"][1]), "held out each time"
    assert sorted(test) == [*range(100, 120)], "test"
    patch(lab.data.torchvision.datasets, CIFAR10=lambda *_, **__: os.listdir("network"))
    assert "cannot be downloaded" in call("--data=cifar10")


def test_data_may_move_and_names_are_cut(load, call):
    call("--data=d")
    os.rename("d", "moved")
    assert "random init" in call("--resume --data=moved")
    _, out = train.choose_recipe(*train.parse(["--data=" + "x" * 300]))
    assert len(out.name) < 250


TWO = """
import os, lab.data, train
if train.machine.RANK: os.replace = None  # only process 0 writes
lab.data.SHAPES_IMAGES = dict(train=40, val=12, test=12)
train.main()
"""


def test_two_processes_have_one_gradient_and_one_writes(call, patch):
    Path("two.py").write_text(TWO)
    flags = f"-m torch.distributed.run --nproc_per_node=2 --standalone two.py {FLAGS} --steps=1"
    env = os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)}
    said = subprocess.check_output([sys.executable, *flags.split()], text=True, env=env)
    assert said.count("random init") == 1, "tables printed"
    data, moments = train.load_data(RECIPE, CPU, None)["train"][0], []
    for rank in range(2):
        patch(machine, WORLD=2, RANK=rank)
        torch.manual_seed(0)
        model = train.IWM(RECIPE)
        optimizer = train.make_optimizer(model, RECIPE)
        batch = next(train.batches(data, RECIPE, 0, CPU))
        train.train_step(model, optimizer, batch, 0, RECIPE, seeded())
        moments.append([state["exp_avg"] for state in optimizer.state.values()])

    found = torch.load("run/last.pt")["optimizer"]["state"].values()
    for one, other, both in zip(*moments, found, strict=True):
        close(both["exp_avg"], (one + other) / 2, "a tenth of the gradient", 1e-6, 1e-3)


def test_measuring_and_finetuning_refuse_torchrun(call, patch):
    call()
    patch(machine, LAUNCHED=True)
    for script, flags in ((train, "--measure=run/last.pt"), (finetune, "")):
        assert "torchrun" in call(flags, script)


def test_a_rank_needs_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert runpy.run_path(machine.__file__)["RANK"] == 0


@each("native, wanted", [*product([True, False], repeat=2)])
def test_bfloat16_only_where_the_cpu_has_it(native, wanted, patch):
    patch(torch.cpu, _is_avx512_bf16_supported=lambda: native)
    with train.autocast(replace(RECIPE, bf16=wanted), CPU):
        found = (zeros(2, 2) @ zeros(2, 2)).dtype
    assert found == (torch.bfloat16 if native and wanted else torch.float32)


def test_steps_are_compiled_and_measuring_is_not(call, patch):
    graphs, real = [], nn.Module.compile
    eager = lambda graph, _: graphs.append(graph) or graph.forward
    patch(nn.Module, compile=lambda self, **_: real(self, backend=eager))
    call()
    call("--compile --out=compiled")
    assert len(graphs) == 3
    assert read("compiled/result.json")["trained"] == read("run/result.json")["trained"]


class TestWeights:
    def test_published_weights_load_and_model_the_action(self):
        model = train.load_checkpoint(Path("assets/cifar.pt"), torch.device("cpu"))
        images = train.to_float(lab.data.shapes(2, 7)["images"])
        found = iwm.measure_mrr(model, images, seeded())["mrr"]

        assert found > 0.3, f"MRR on shapes, which it never saw, is {found:.2f}: chance is 0.024"
