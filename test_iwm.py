"""The exercises of iwm.py: a class grades one, and a failing test names the idea that is broken.

python test_iwm.py my_iwm.py          # the hand-out: iwm.py with exercises 1 to 9 emptied
IWM=my_iwm pytest -q test_iwm.py      # points for each exercise; -k TestJitter for one alone
"""

import ast
import importlib
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import nn

import iwm as reference

iwm = importlib.import_module(os.environ.get("IWM", "iwm"))
each = pytest.mark.parametrize
every_mode = each("mode", ["none", "sequence", "feature"])
TINY = reference.Config(32, patch=4, width=32, depth=2, heads=2, pred_width=16, pred_depth=2)
IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])


@pytest.fixture
def put(monkeypatch):
    def put(name, value):
        for module in ("iwm", iwm.__name__):
            monkeypatch.setattr(f"{module}.{name}", value, raising=False)

    return put


@pytest.fixture(autouse=True)
def only_its_own_part(request, put):
    """A class takes what it GRADES from IWM=my_iwm, all else from iwm.py."""
    names = getattr(request.cls, "GRADES", "")
    if names == "everything":
        return
    mine = {name: part_of(iwm, name) for name in names.split()}
    for name, value in vars(reference).items():
        if getattr(value, "__module__", "") == "iwm":
            put(name, value)
    for name, part in mine.items():
        if part is not None:  # a helper may be written in place instead
            put(name, part)


def part_of(module, name):
    for step in name.split("."):
        module = getattr(module, step, None)
    return module


def graded():
    return {name: part for name, part in globals().items() if hasattr(part, "GRADES")}


def hand_out(path):
    """Write iwm.py to `path`, with what exercises 1 to 9 grade emptied.

    Signatures and docstrings stay. So does each `__init__`: tests reach the layers by their names.
    """
    if os.path.exists(path):
        sys.exit(f"{path} exists: remove it, or name another file")
    exercise_of = {
        name: part.__doc__[len("Exercise ")]
        for part in graded().values()
        if part.__doc__.startswith("Exercise")
        for name in part.GRADES.split()
    }
    source = Path(reference.__file__).read_text()
    lines = source.splitlines()

    def empty(nodes, prefix=""):
        for node in reversed(nodes):  # from the end, so that line numbers stay true
            name = prefix + getattr(node, "name", "")
            if isinstance(node, ast.ClassDef):
                empty(node.body, f"{name}.")
            elif name in exercise_of:
                first = node.body[0]
                start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
                what = f'raise NotImplementedError("exercise {exercise_of[name]}: {name}")'
                lines[start : node.end_lineno] = [" " * first.col_offset + what]

    empty(ast.parse(source).body)
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session", autouse=True)
def points(request, record_testsuite_property):
    """With IWM=my_iwm the last lines say: tests passed of all, and the first broken idea."""
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    lines = []
    for name, part in graded().items():
        passed, failed = (
            [report for report in reporter.stats.get(kind, []) if f"::{name}::" in report.nodeid]
            for kind in ("passed", "failed")
        )
        line = f"{len(passed)} of {len(passed) + len(failed)}{broken_idea(failed)}"
        if (passed or failed) and "IWM" in os.environ:
            record_testsuite_property(name, line)
            lines.append(f"{part.__doc__.split(':')[0]}, {name}: {line}")
    request.config.add_cleanup(lambda: reporter.write_line("\n".join(lines)))


def broken_idea(failed):
    if not failed:
        return ""
    message = failed[0].longrepr.reprcrash.message.splitlines()[0]
    if message.startswith("NotImplementedError: exercise"):
        return f", not written yet: {message.split()[-1]}"
    idea = failed[0].nodeid.split("::test_")[1].replace("_", " ")
    return f", broken: {idea}: {message.removeprefix('AssertionError: ')}"


def close(ours, expected, message, atol=1e-5, rtol=0.0):
    """Equal up to rounding; else the message says what was expected, and found."""
    assert ours is not None, f"{message}: got None"
    a, b = torch.as_tensor(ours), torch.as_tensor(expected)
    few = f"\nexpected {b}\ngot      {a}" if a.numel() < 30 else ""
    tolerance = dict(atol=atol, rtol=rtol, check_dtype=False, equal_nan=True)
    torch.testing.assert_close(a, b, msg=lambda found: f"{message}{few}\n{found}", **tolerance)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, size=32):
    return torch.rand(n, 3, size, size, generator=seeded())


def some_images():
    """Noise, black, white, greys, and colours with equal channels."""
    images = noise(64)
    images[0], images[1], images[2:6] = 0, 1, images[2:6, :1]
    images[6:12] = (3 * images[6:12]).round() / 3
    return images


def quartiles(values):
    return values.nanquantile(torch.linspace(0, 1, 5), dim=0)


def differ(a, b):
    return (a - b).abs().max() > 1e-3


def tiny(**changes):
    """A tiny IWM whose teacher has moved away from its encoder."""
    torch.manual_seed(0)
    model = iwm.IWM(replace(TINY, **changes))
    for p in model.teacher.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    return model


def act(images, action):
    """What actions make of clean images: a perfect world model. Any flag spoils it."""
    params = IDENTITY + action[:, :4] * TINY.jitter_strengths
    images = reference.jitter(images.expand(len(action), -1, -1, -1), params)
    return images + action[:, 4:].sum(dim=1).view(-1, 1, 1, 1)


class TestJitter:
    """Exercise 1: colours change by four numbers, each image's its own."""

    GRADES = "jitter shift_hue blend jitter_params"
    DRAWS = torch.rand(64, 4, generator=seeded(1))
    PARAMS = torch.cat([2 * DRAWS[:, :3], DRAWS[:, 3:] - 0.5], dim=1)

    @each("names", [*zip(reference.JITTER), reference.JITTER], ids="-".join)
    def test_operations_and_order_are_torchvisions(self, names):
        expected, params = some_images(), IDENTITY.repeat(64, 1)
        for name in names:
            i, adjust = reference.JITTER.index(name), getattr(TF, f"adjust_{name}")
            params[:, i] = self.PARAMS[:, i]
            images = zip(expected, params[:, i])
            expected = torch.stack([adjust(image, p.item()) for image, p in images])

        what = f"not torchvision's {', then '.join(names)}"
        close(iwm.jitter(some_images(), params), expected, what)

    def test_greys_are_finite_in_every_type(self):
        """A grey pixel has chroma 0, and 1e-8 is 0 in float16."""
        ours = iwm.jitter(some_images().half(), self.PARAMS.half())
        close(ours.isnan().sum(), 0, "NaN pixels in float16")

    def test_draws_fill_their_range_evenly(self):
        c = replace(TINY, strength=5, hue=0.2)
        always = iwm.jitter_params(9999, c, seeded(), always=True)
        maybe = iwm.jitter_params(9999, c, seeded())
        jittered = [(p != IDENTITY).any(dim=1).float().mean() for p in (always, maybe)]
        found = quartiles(always[:, [0, 3]])

        close(jittered, [1, 0.8], "share jittered: always, with probability 0.8", 0.02)
        close(found.T[0], [0, 0.75, 1.5, 2.25, 3], "quartiles of brightness", 0.05)
        close(found.T[1], [-0.5, -0.25, 0, 0.25, 0.5], "quartiles of hue", 0.05)
        close(always.T.corrcoef(), torch.eye(4), "the four numbers are correlated", 0.05)


class TestViews:
    """Exercise 2: two views of one crop, and the action that leads from x to y."""

    GRADES = "make_views make_action random_crop_flip"

    def test_crops_have_any_size_and_place(self):
        """The channels are column, row and white: their ranges in a crop are its sides."""
        axis = torch.linspace(0, 1, 32).expand(2000, 1, 32, 32)
        images = torch.cat([axis, axis.mT, torch.ones_like(axis)], dim=1)
        crop = iwm.random_crop_flip(images, TINY, seeded())
        low, high = crop.amin(dim=(2, 3)).T, crop.amax(dim=(2, 3)).T
        width, height, _ = high - low
        left, top, _ = low / (1 - high + low)
        mirrored = crop[:, 0, 0, 0] > crop[:, 0, 0, -1]

        close(crop[:, 2], torch.ones(2000, 32, 32), "a crop of white is not white")
        close(mirrored.float().mean(), 0.5, "share of crops mirrored", 0.05)
        for name, values, expected in (
            ("area", width * height, [0.3, 0.45, 0.63, 0.8, 0.95]),
            ("width / height", width / height, [0.75, 0.9, 1, 1.12, 1.33]),
            ("place, left to right", left, [0, 0.3, 0.5, 0.7, 1]),
            ("place, top - left", top - left, [-0.95, -0.27, 0, 0.27, 0.95]),
        ):
            close(quartiles(values), expected, f"quartiles of the crop's {name}", 0.06)

    def test_x_is_y_degraded_as_the_flags_say(self, put):
        """A square and an inversion stand in for jitter and blur: they commute with nothing."""
        sigmas, images = [], some_images().repeat(4, 1, 1, 1)

        def gaussian_blur(images, sigma):
            sigmas.append(sigma)
            return 1 - images

        put("gaussian_blur", gaussian_blur)
        put("jitter", lambda images, params: images**2)
        probs = dict(crop_min=1.0, jitter_prob=0, blur_prob=0.25, gray_prob=0.5, solarize_prob=0.75)
        x, y, a = iwm.make_views(images, replace(TINY, **probs), seeded())
        blurred, gray, solarized = a[:, 4:].T.reshape(3, -1, 1, 1, 1) == 1
        expected = torch.where(blurred, 1 - y, y)
        expected = torch.where(gray, TF.rgb_to_grayscale(expected, 3), expected)
        expected = torch.where(solarized, TF.solarize(expected, 0.5), expected)
        rows = [view.sort(dim=3)[0] for view in (images**2, y, expected, x)]
        sigma = torch.cat(sigmas)

        close(rows[1], rows[0], "y is more than the jittered image, or its mirror", 1e-4)
        close(a[:, 4:].mean(dim=0), [0.25, 0.5, 0.75], "the action's flags: share of each", 0.15)
        close(len(a.unique(dim=0)), 8, "flags are drawn together: combinations", 2)
        close(rows[3], rows[2], "x is not y, where flagged blurred, grey, then solarised", 1e-4)
        close(x, expected, "x and y are mirrored apart: they are not one crop", 1e-4)
        close([sigma.min(), sigma.max()], [0.05, 1.0], "least and most sigma", 0.1)

    def test_the_action_leads_from_x_to_y(self, put):
        """Image plus parameters stands in for a jittered image."""
        put("gaussian_blur", lambda images, sigma: images)
        put("jitter", lambda images, params: images[..., :4] + params[:, None, None])
        config = replace(TINY, blur_prob=0.0, gray_prob=0.0, solarize_prob=0.0)
        x, y, a = iwm.make_views(some_images(), config, seeded())
        change = (y - x)[:5, 0, 0]

        assert change.any(), "x and y share their jitter"
        close(a[:5, :4], change / TINY.jitter_strengths, "the action is not (y - x) / strength")

    def test_what_is_never_jittered_has_no_number(self):
        config, turned = replace(TINY, hue=0.0), torch.tensor([[1.0, 1.0, 1.0, 0.1]])
        found = iwm.make_action(IDENTITY[None], turned, torch.zeros(1, 3), config)
        close(found, torch.zeros(1, 7), "hue has strength 0, and a number")


class TestMasks:
    """Exercise 3: rectangles are masked, as many patches of each image, without bias."""

    GRADES = "block_unions sample_masks"

    @each("grid, share, K", [(8, 0.56, 36), (14, 0.82, 161), (2, 0.56, 2)])
    def test_the_context_has_the_asked_share(self, grid, share, K):
        config = replace(TINY, image_size=4 * grid, context=share)
        context, masked = iwm.sample_masks(32, config, seeded())
        both = torch.cat([context, masked], dim=1).sort(dim=1)[0]

        expected = torch.arange(grid**2).expand(32, -1)
        close(both, expected, "a patch is in both of context and masked, or in none")
        close(context.shape[1], K, f"patches in the context, {share} of {grid}²")

    def test_rectangles_have_the_asked_area(self):
        one, four = (
            iwm.block_unions(4000, replace(TINY, image_size=56, blocks=n), seeded()) for n in (1, 4)
        )
        height, width, area = one.any(2).sum(1), one.any(1).sum(1), one.sum((1, 2))
        areas, aspects = ([v.min(), v.mean(), v.max()] for v in (area / 196, height / width))

        close(height * width, area, "one block is not one rectangle")
        close(areas, [0.128, 0.175, 0.214], "least, mean, largest area", rtol=0.08)
        close(aspects, [0.71, 1.13, 1.75], "least, mean, largest height / width", rtol=0.08)
        close(one.any(dim=0).sum(), 196, "patches that rectangles reach")
        close(four.float().mean(), 0.48, "mean area of the union of four", 0.02)

    def test_masks_are_rectangles_trimmed_at_random(self):
        _, masked = iwm.sample_masks(20_000, TINY, seeded())
        _, again = iwm.sample_masks(20_000, TINY, seeded())
        board = F.one_hot(masked, 64).sum(dim=1).view(-1, 8, 8)
        same, often = board[:, :, 1:] == board[:, :, :-1], board.float().mean(dim=0)
        flipped = torch.stack([often.flip(0), often.flip(1)])

        close(again, masked, "the same generator gives other masks")
        close(len(board[:500].unique(dim=0)), 500, "different masks of 500", 50)
        close(same.float().mean(), 0.83, "share of neighbours of one kind", 0.02)
        close(flipped, often.expand(2, 8, 8), "one side is masked more often than the other", 0.025)


class TestViT:
    """Exercise 4: the encoder never sees what is masked, and knows where each patch lies."""

    GRADES = "ViT ViT.forward Block Block.forward attention gather sincos_positions init_weights"

    def test_pixels_are_normalised(self):
        encoder = tiny(width=48).encoder
        encoder.embed = encoder.blocks = encoder.norm = nn.Sequential()
        close(encoder(some_images())[:2, 0, 0], [-2, 2], "black, (0 - 0.5) / 0.25, and white")

    def test_masked_patches_are_not_seen(self):
        encoder, images, context = tiny().encoder, noise(4), torch.arange(8).expand(4, -1)
        z = encoder(images, context)
        images[:, :, 4:] = 0
        close(encoder(images, context), z, "masked pixels change the context's latents")

    def test_latents_know_where_they_are(self):
        encoder, order = tiny().encoder, torch.rand(2, 64, generator=seeded()).argsort(dim=1)
        z, grey = encoder(noise(2)), encoder(torch.ones(1, 3, 32, 32))
        expected = torch.stack([z[i, order[i]] for i in range(2)])

        assert torch.pdist(grey[0]).min() > 0.1, "equal patches have equal latents in two places"
        close(encoder(noise(2), order), expected, "patches in another order, other latents", 1e-4)
        close(z.var(dim=2, correction=0), torch.ones(2, 64), "no LayerNorm comes last", 0.01)

    def test_block_is_pytorchs(self):
        block, x = iwm.Block(16, 2), torch.rand(2, 5, 16, generator=seeded())
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0, "gelu", 1e-6, True, True)
        parts = block.qkv, block.proj, block.fc1, block.fc2, block.norm1, block.norm2
        ours = [p for part in parts for p in part.parameters()]
        for theirs, p in zip(layer.parameters(), ours):
            theirs.data = p.data
        close(block(x), layer(x), "not x + attention(norm1(x)), then x + mlp(norm2(x))")

    def test_output_projections_shrink_with_depth(self):
        """Xavier's spread over sqrt(2 i), in blocks i = 1 and 2."""
        blocks = tiny().encoder.blocks
        found = [[m.weight.std().item() for m in (b.proj, b.fc2)] for b in blocks]
        expected = [[0.125, 0.079], [0.088, 0.056]]
        close(found, expected, "spread of proj and fc2 in blocks 1 and 2", rtol=0.1)


class TestPredictor:
    """Exercise 5: the world model hears the action, and imagines where it is asked."""

    GRADES = (
        "Predictor Predictor.forward Predictor.mask_tokens Predictor.action_tokens"
        " Predictor.everywhere"
    )
    context, asked = reference.sample_masks(3, TINY, seeded())
    z = torch.rand(3, 36, 32, generator=seeded())

    def imagined(self, mode, action=0.0, context=context, asked=asked, extra=None, vector=0.0):
        """-> latents, and the tokens that entered the first block."""
        predictor, seen = tiny(conditioning=mode).predictor, []
        predictor.mask_token.data.add_(vector)
        predictor.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        return predictor(self.z, context, asked, action + torch.zeros(3, 7), extra), seen[0]

    @every_mode
    def test_mask_tokens_are_a_learned_vector_at_the_asked_place(self, mode):
        out, _ = self.imagined(mode)
        flipped, _ = self.imagined(mode, asked=self.asked.flip(1))
        moved, _ = self.imagined(mode, context=self.context.flip(1))
        other, _ = self.imagined(mode, vector=torch.arange(16))

        close([*out.shape], [3, 28, 32], "the shape [B, M, D]")
        assert out.std(dim=1).max() > 1e-3, "the same latent is imagined everywhere"
        close(flipped.flip(1), out, "asked in another order, other latents", 1e-4)
        assert differ(moved, out), "context latents elsewhere change nothing"
        assert differ(other, out), "the learned vector, mask_token, changes nothing"

    @every_mode
    def test_every_number_is_heard_if_it_is_told(self, mode):
        nothing, *outs = (self.imagined(mode, a)[0] for a in (0.0, *torch.eye(7)))
        heard = [not torch.equal(out, nothing) for out in outs]
        close(heard, [mode != "none"] * 7, "which numbers are heard")

    def test_sequence_has_a_layer_for_each_number(self):
        _, task = self.imagined("sequence", extra=torch.zeros(3, 1, 16))
        nothing, *acted = (self.imagined("sequence", a)[1][0] for a in (0.0, *torch.eye(7)))
        change = torch.stack(acted) - nothing

        close(task.shape[1], 1 + 7 + 64, "tokens: a task's, the action's, the patches'")
        close((change.abs().amax(dim=2) > 1e-6).sum(dim=1), [1] * 7, "tokens a number changes")
        assert torch.pdist(change.sum(dim=1)).min() > 0.1, "two numbers change their tokens alike"

    @each("what, tasks", [("all positions", 0), ("a task's token", 1)])
    def test_everywhere_is_all_positions(self, what, tasks):
        predictor, N = tiny().predictor, torch.arange(64).expand(2, 64)
        z, action, extra = torch.randn(2, 64, 32), torch.randn(2, 7), torch.randn(2, tasks, 16)
        expected = predictor(z, N, N, action, extra)
        close(predictor.everywhere(z, action, extra), expected, f"everywhere: without {what}")

    def test_feature_mixes_position_and_action(self):
        nothing, acted = (self.imagined("feature", a)[1] for a in (0.0, 1.0))
        change = (acted - nothing)[0]
        change = change[change.abs().amax(dim=1) > 1e-6]

        close(len(change), 28, "tokens that the action changes: each mask token")
        assert change.std(dim=0).max() > 1e-3, "an action changes all mask tokens alike"


class TestLoss:
    """Exercise 6: from x's context the latents of y are imagined; the teacher gets no gradient."""

    GRADES = "IWM.loss IWM.targets"

    @each("where, norm", [("the masked", True), ("all", False)])
    def test_imagined_and_targets_are_of_the_asked_patches(self, where, norm, put):
        """Known tensors stand in for views, masks and what networks give. K = M = 32."""
        model = tiny(context=0.5, predict_all=where == "all", target_norm=norm)
        x, y, a = noise(4), 1 - noise(4), torch.rand(4, 7)
        z_x, (h_y, z_hat) = torch.randn(4, 32, 32), torch.randn(2, 4, 64, 32)
        seen, hidden = reference.sample_masks(4, model.config)
        right = torch.arange(64).expand(4, -1) if where == "all" else hidden.sort(dim=1)[0]
        image = torch.arange(4)[:, None]
        put("make_views", Mock(return_value=(x, y, a)))
        put("sample_masks", Mock(return_value=(seen, hidden)))

        def encoder(images, context=None):
            close(images, x, "the encoder is not given x")
            close(context, seen, "the encoder is not given the context")
            return z_x

        def teacher(images, context=None):
            close(images, y, "the teacher is not given y")
            assert context is None or context.shape[1] == 64, "the teacher is not given all patches"
            return h_y

        def predictor(z, context, asked, action, extra=None):
            close(z, z_x, "the predictor is not given the encoder's latents")
            close(context, seen, "the predictor is not told where the context lies")
            close(action, a, "the predictor is not given the action")
            close(asked.sort(dim=1)[0], right, f"the loss is not at {where} patches")
            return z_hat[image, asked]

        model.encoder.forward, model.teacher.forward = encoder, teacher
        model.predictor.forward = predictor
        h = F.layer_norm(h_y, [32]) if norm else h_y
        error = (z_hat - h)[image, right].square().mean()

        close(model.targets(y), h, f"the teacher's latents, layer-normed: {norm}")
        close(model.loss(x), error, "not the mean of (imagined - teacher)^2")

    def test_gradients_skip_the_teacher_only(self):
        model = tiny()
        model.loss(noise(4), seeded()).backward()
        for name, p in model.named_parameters():
            reached = p.grad is not None and p.grad.any()
            assert reached != name.startswith("teacher"), f"a gradient reaches {name}: {reached}"

    @each("bf16, what", [(False, "other views or masks"), (True, "pixels are in bfloat16")])
    def test_views_follow_the_generator_in_float32(self, bf16, what):
        model = tiny(blur_prob=1.0)
        encoder = model.encoder.forward = Mock(wraps=model.encoder.forward)
        for enabled in (False, bf16):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model.loss(noise(4), seeded())
        for a, b in zip(*([*x.args, *x.kwargs.values()] for x in encoder.call_args_list)):
            close(b, a, f"the same generator: {what}")


class TestTeacher:
    """Exercise 7: the teacher starts as a copy and follows as a moving average."""

    GRADES = "IWM IWM.update_teacher"

    def test_it_starts_as_a_frozen_copy(self):
        model = iwm.IWM(TINY)
        for p, q in zip(model.teacher.parameters(), model.encoder.parameters()):
            assert p is not q, "the teacher is the encoder itself, not a copy"
            assert torch.equal(p, q), "the teacher starts unlike the encoder"
            assert not p.requires_grad, "the teacher is not frozen"
            assert q.requires_grad, "the encoder is frozen"

    def test_it_is_a_moving_average(self):
        model = iwm.IWM(TINY)
        pairs = [*zip(model.teacher.parameters(), model.encoder.parameters())]
        for p, q in pairs:
            p.data.fill_(1.0)
            q.data.fill_(2.0)
        model.update_teacher(0.9)
        for pair in pairs:
            found = [p.mean().item() for p in pair]
            close(found, [1.1, 2], "teacher 1, encoder 2 become, with momentum 0.9")


class TestMRR:
    """Exercise 8: the mean of 1 / rank; ties do not help, and without the action it is chance."""

    GRADES = "ranks chance variants measure_mrr IWM.imagine"

    def test_ranks_worked_by_hand(self):
        """From (0, 0) the second is nearer than the first by L2, but not by L1."""
        bank = torch.tensor([[3, 0], [2, 2], [2.5, 2.5], [9, 9]]).view(4, 2, 1)
        imagined = torch.tensor([[0, 0], [2, 2], [2.6, 2.5], [2, 2]]).view(4, 2, 1)
        near = 1 + 1e-7 * torch.arange(4).view(4, 1, 1)
        apart = 1 + 1e-3 * torch.arange(4).view(4, 1, 1)

        close(iwm.ranks(imagined, bank), [2, 1, 1, 4], "not 1 + those nearer by L2 than the true")
        close(iwm.ranks(apart, apart), [1] * 4, "a thousandth apart is no tie")
        close(iwm.ranks(near, near), [2.5] * 4, "tied, but for rounding: not the mean rank")
        close(iwm.ranks(near * math.nan, near), [2.5] * 4, "NaN is nearer to some than to others")

    def test_the_bank_is_the_teachers(self):
        model, action = tiny(), torch.tensor([[0.5, -0.5, 1, 0.3, 0, 0, 0]])
        params = IDENTITY + action[:, :4] * TINY.jitter_strengths
        images, bank, imagined = iwm.variants(model, noise(1), params)
        positions = torch.arange(64)[None]
        expected = model.predictor(model.encoder(noise(1)), positions, positions, action)

        close(images, act(noise(1), action), "the variants are not the jittered images")
        close(bank, model.targets(images), "the bank is not the teacher's targets of the variants")
        close(imagined, expected, "imagined is not p(student(clean image), action)", 1e-4)

    def test_an_action_blind_model_is_at_chance(self):
        blind = iwm.measure_mrr(tiny(conditioning="none"), noise(2), seeded())["mrr"]
        close(iwm.chance(4), (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, "chance: not H(V) / V")
        close(blind, 0.0239232, "MRR of a model that is not told the action is not H(256) / 256")

    def test_a_bank_without_jitter_is_tied(self):
        found = iwm.measure_mrr(tiny(), noise(1), jitter_of=replace(TINY, strength=0.0))["mrr"]
        close(found, 2 / 257, "the bank's range is not that of jitter_of")

    def test_errors_that_cancel_spoil_all_but_pooled(self):
        """The mean over the patches is right; patch by patch a large error hides the action."""
        model, error = tiny(bank=64), 3000 * torch.randn(64, 32, generator=seeded())
        error -= error.mean(dim=0)

        def imagine(images, action):
            return model.targets(act(images, action)).mean(dim=1, keepdim=True) + error

        model.imagine = imagine
        found = iwm.measure_mrr(model, noise(2), seeded())
        blind = reference.chance(64)
        expected = dict(mrr=blind, hit1=1 / 64, hit5=5 / 64, mrr_pooled=1.0, chance=blind)
        for name, value in expected.items():
            close(found[name], value, f"{name} of errors that cancel over the patches", 0.012)


class TestDestructive:
    """Exercise 9: blur, grayscale and solarise, which only the source view x suffers."""

    GRADES = "gaussian_blur blur_sigma solarize grayscale"

    @each("size, low, high", [(32, 0.05, 1.0), (224, 0.1, 2.0)])
    def test_blur_is_torchvisions(self, size, low, high):
        images, sigma = noise(4, size), torch.linspace(low, high, 4)
        blurred = [TF.gaussian_blur(x, int(6 * high) + 1, s.item()) for x, s in zip(images, sigma)]

        close(iwm.blur_sigma(size), [low, high], f"least and most sigma at {size} pixels")
        found = iwm.gaussian_blur(images, sigma)
        close(found, torch.stack(blurred), "not a blur by each image's own sigma", 5e-3)

    def test_gray_and_solarize_are_torchvisions(self):
        x = some_images()
        close(iwm.grayscale(x), TF.rgb_to_grayscale(x), "not luma, one channel")
        close(iwm.solarize(x), TF.solarize(x, 0.5), "not inverted where 0.5 or brighter")


class TestPlan:
    """Planning: the action is found that imagines the goal from the image."""

    GRADES = "IWM.plan"
    START = noise(16, 8) / 2

    def planned(self, goal, **settings):
        """Plan in a known world: targets are pixels, the student sees their negatives."""
        model = tiny(image_size=8)

        def encoder(images, context=None):
            close(images, self.START, "the student is not given the image")
            return 1 - images.flatten(2)

        def targets(images):
            close(images, goal, "the teacher is not given the goal")
            return images.flatten(2)

        def predictor(z, context, asked, action, extra=None):
            close(z, 1 - self.START.flatten(2), "the predictor is not given the student's latents")
            return act(1 - z.view_as(self.START), action).flatten(2)

        model.encoder.forward, model.predictor.forward = encoder, predictor
        model.targets = targets
        model.teacher.forward = lambda images, context=None: 9 * images.flatten(2)
        with torch.inference_mode():
            return model.plan(self.START, goal, **settings)

    def test_it_walks_by_lr_from_the_identity(self):
        identity = IDENTITY.repeat(16, 1)
        brighter = reference.jitter(self.START, identity + torch.tensor([0.1, 0, 0, 0]))
        step = (self.planned(brighter, steps=1, lr=0.2) - identity) / TINY.jitter_strengths

        close(self.planned(brighter, steps=0), identity, "without a step: not the identity")
        assert (step[:, 0] > 0).all(), "the first step leads away from the goal"
        close(step[:, 0], [0.2] * 16, "Adam's first step is not lr times the strength", 1e-3)

    def test_it_finds_what_was_done(self):
        """No action is as bright as the last goal."""
        params = reference.jitter_params(16, TINY, seeded(1), always=True)
        params[-1, 0] = 2
        found = self.planned(reference.jitter(self.START, params), steps=200)

        close(found.clamp(*TINY.jitter_range), found, "what is found leaves the jitter's range")
        for i, name in enumerate(reference.JITTER):
            close(found[:-1, i], params[:-1, i], f"the {name} found is not what was done", 0.01)

    def test_an_action_blind_model_finds_nothing(self):
        found = tiny(conditioning="none").plan(noise(4), 1 - noise(4))
        close(found, IDENTITY.repeat(4, 1), "not told the action: not the identity", 0)


@pytest.mark.skipif("gamma" not in iwm.JITTER, reason="for whoever adds gamma to JITTER")
class TestGamma:
    """Exercise 16: a further operation, gamma, in each of its places."""

    GRADES = "everything"

    def test_jitter(self):
        params = torch.tensor([dict(gamma=2.0, hue=0.0).get(name, 1.0) for name in iwm.JITTER])
        found = iwm.jitter(some_images(), params.expand(64, -1))
        close(found, TF.adjust_gamma(some_images(), 2), "jitter: not images ** gamma")

    def test_settings(self):
        config, expected = iwm.Config(**vars(TINY)), [float(name != "hue") for name in iwm.JITTER]
        assert hasattr(config, "gamma"), "Config: no strength named gamma"
        close(iwm.IDENTITY, expected, "IDENTITY: gamma 1 changes nothing")
        _, _, a = iwm.make_views(noise(64), config, seeded())
        assert "gamma" in iwm.ACTION and a.shape[1] == 8, "ACTION: not eight, with gamma"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    hand_out(sys.argv[1])
