"""Tests: a class for each exercise of the README grades iwm.py, the rest guards the experiments.

IWM=my_iwm pytest -q -k TestJitter   # grades exercise 1 in my_iwm.py
"""

import importlib
import math
import os
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import (
    arange,
    cat,
    equal,
    eye,
    linspace,
    nn,
    ones,
    rand,
    randn,
    stack,
    tensor,
    zeros,
)

import iwm as reference
import lab.data
import lab.measures
import lab.pictures

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

    @each("name, value", [("patch", 5), ("pred_width", 18), ("conditioning", 0), ("context", 1)])
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
        masks = iwm.sample_masks(32, replace(TINY, image_size=4 * grid, context=share), seeded())
        both = cat(masks, dim=1).sort(dim=1)[0]

        close(both, arange(grid**2).expand(32, -1), "each patch in one of the two")
        close(masks[0].shape[1], K, f"patches in the context, of {grid}²")

    def test_rectangles_have_the_asked_area(self):
        one, four = (
            iwm.block_unions(4000, replace(TINY, image_size=56, blocks=n), seeded()) for n in (1, 4)
        )
        height, width, area = one.any(2).sum(1), one.any(1).sum(1), one.sum((1, 2))
        found = [[v.min(), v.mean(), v.max()] for v in (area / 196, height / width)]
        expected = [[0.128, 0.175, 0.214], [0.71, 1.13, 1.75]]

        close(height * width, area, "one block is one rectangle")
        close(found, expected, "area, height / width: least, mean, most", rtol=0.08)
        close(one.any(dim=0).sum(), 196, "patches that rectangles reach")
        close(four.float().mean(), 0.48, "mean area of four", 0.02)

    def test_masks_are_rectangles_trimmed_at_random(self):
        masked, again = (iwm.sample_masks(20_000, TINY, seeded())[1] for _ in range(2))
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
    context, asked = reference.sample_masks(3, TINY, seeded())

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
        action, (context, masked) = rand(4, 7), reference.sample_masks(4, TINY)
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
    GRADES = "ranks chance variants measure_mrr IWM.imagine"

    def test_ranks_worked_by_hand(self):
        bank, imagined = tensor([[0.0, 1, 3, 6], [0.9, 0.9, 4.4, 0]]).unsqueeze(2)
        same = 1 + 1e-7 * arange(4).unsqueeze(1)

        close(iwm.ranks(imagined, bank), [2, 1, 1, 4], "1 + those nearer than the true one")
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
