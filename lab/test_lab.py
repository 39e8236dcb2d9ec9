"""Tests of the experiments: what only an honest pipeline can find, and what is printed and drawn."""

import colorsys
import json
import math
import os
import random
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, fields, replace
from itertools import count, cycle, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageSequence, PngImagePlugin
from pytest import approx, fixture, raises
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import finetune
import iwm
import lab.data
import lab.measures
import lab.pictures
import lab.shapes
import lab.tables
import test_iwm
import train
from lab import machine
from test_iwm import IDENTITY, TINY, act, close, each, every_mode, noise, seeded, tiny


class TestProbes:
    def test_rankme_is_the_effective_rank(self):
        """Singular values 3 and 1: exp(-3/4 log 3/4 - 1/4 log 1/4) = 1.755."""
        q = torch.linalg.qr(torch.randn(100, 5, generator=seeded())).Q
        features = (
            q,
            torch.ones(50, 8),
            q[:, :2] * torch.tensor([3, 1]),
            q * torch.tensor([1, 1, 1, 1, math.nan]),
        )
        found = [lab.measures.rankme(f) for f in features]
        close(found, [5, 1, 1.755, math.nan], "five equal, a constant, (3, 1), not finite", 0.01)

    @each("probe, scale", [("knn_accuracy", 1), ("linear_accuracy", 1000)])
    def test_probes_find_separable_classes(self, probe, scale):
        """A linear probe reads small features as well."""
        labels = torch.arange(800) % 4
        f = F.one_hot(labels, 16) + 0.1 * torch.randn(800, 16, generator=seeded())
        f[:, :4] /= scale
        test = f[400::4], labels[400::4]  # one class: its own mean would hide it
        close(getattr(lab.measures, probe)(f[:400], labels[:400], *test), 1.0, "accuracy", 0.05)

    def test_knn_is_a_naive_one(self):
        train, test = torch.randn(1200, 4, generator=seeded()).split([100, 1100])
        labels = torch.arange(100) % 3
        near, i = F.cosine_similarity(test[:, None], train, dim=2).topk(20)
        votes = F.one_hot(labels[i]) * (near / 0.07).exp()[:, :, None]
        truth = votes.sum(dim=1).argmax(dim=1)
        close(
            lab.measures.knn_accuracy(train, labels, test, truth), 1.0, "agreement with a naive one"
        )

    @pytest.mark.filterwarnings("error")
    def test_one_training_image_is_enough(self):
        labels = torch.full((5,), 3)
        found = lab.measures.linear_accuracy(torch.rand(1, 8), labels[:1], torch.rand(5, 8), labels)
        close(found, 1.0, "accuracy")


@each("name, value", [("patch", 5), ("pred_width", 18), ("conditioning", 0), ("context", 1)])
def test_a_wrong_setting_is_named(name, value):
    with raises(ValueError, match=name):
        iwm.Config(**{name: value})


@each("i", range(4))
def test_only_an_ignored_component_has_an_error(i):
    model, others = tiny(), torch.arange(7) != i
    model.imagine = lambda image, action: model.targets(act(image, action * others))
    ends = torch.where(torch.arange(4) == i, TINY.jitter_range, IDENTITY)
    errors = lab.measures.measure_components(model, noise(2))

    close(lab.measures.sweep_params(i, TINY)[[0, -1]], ends, f"ends of sweep {i}")
    close([*errors.values()], 0.27 * torch.eye(4)[i], f"{[*errors]}, number {i} ignored", 0.02)


def test_planning_is_measured_in_shares_of_the_range(monkeypatch):
    """A planner that finds everything has no error; the identity misses a quarter of the range."""
    model, images = tiny(conditioning="none", image_size=8), noise(999, 8)
    nothing = [*lab.measures.measure_planning(model, images, seeded()).values()]
    params = iwm.jitter_params(999, TINY, seeded(), always=True)
    monkeypatch.setattr(model, "plan", lambda images, goals: params)
    everything = [*lab.measures.measure_planning(model, images, seeded()).values()]

    close(nothing[0], 1.0, "plan_left of doing nothing")
    close(nothing[1:], [0.25] * 4, "plan_error_* of doing nothing", 0.03)
    close(everything, [0.0] * 5, "plan_left and plan_error_* of a perfect planner", 1e-4)


def test_the_hand_out_is_graded(tmp_path):
    path = tmp_path / "handed_out.py"
    test_iwm.hand_out(path)
    with raises(SystemExit, match="exists"):
        test_iwm.hand_out(path)
    environment = os.environ | {"IWM": "handed_out", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", test_iwm.__file__, "-k", "TestTeacher"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)

    expected = "Exercise 7, TestTeacher: 1 of 2, not written yet: IWM.update_teacher"
    assert run.stdout.splitlines()[-1] == expected, run.stdout + run.stderr


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
            images = torch.rand(2, 3, *[config.image_size] * 2, device="cuda")
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
    return torch.arange(n).byte()[:, None, None, None].expand(-1, 3, 16, 16)


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def marked():
    """Splits of one grey each: 0 is train, 100 val, 200 test; their labels are 0, 1, 2."""
    return {s: (0 * counted(16) + 100 * i, 0 * torch.arange(16) + i) for i, s in enumerate(SPLITS)}


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
    patch(lab.shapes, SIZES=dict(train=40, val=12, test=12))
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


FACTORS = ("shape", "colour", "texture", "background")


def coded(labels):
    """For lab.shapes.shapes: images tell their factors; random labels are wrong for half a class."""

    def shapes(n, seed, size):
        g = seeded(seed)
        order = torch.randperm(n // 2, generator=g).repeat(2)
        truth = torch.stack([order // 2**bit % 2 for bit in range(4)])
        left = (torch.arange(size) < size // 2).expand(n, size, size)
        images = torch.randint(50, (n, 3, size, size), generator=g) + 50 * left[:, None]
        images += 150 * truth.T.repeat(1, size // 4)[:, None, None]
        coins = torch.randint(2, (5, n // 2), generator=g)
        coins = torch.cat([coins, 1 - coins], dim=1)
        wrong = {"true": 0 * coins, "opposite": 0 * coins + 1, "random": coins}[labels[seed]]
        mask = left ^ wrong[4, :, None, None].bool()
        return dict(zip(FACTORS, truth ^ wrong[:4]), images=images.byte(), mask=mask)

    return shapes


@each("labels, val, test", [
    ("true true opposite", (0.8, 1), (0, 0.2)),  # learn
    ("true random random", (0.39, 0.61), (0.39, 0.61)),  # leak: chance and four deviations
    ("random true true", (0.2, 0.8), (0.2, 0.8)),  # shuffled
])  # fmt: skip
def test_only_what_images_tell_is_learned(labels, val, test, call, patch):
    call()
    patch(lab.shapes, SIZES=dict.fromkeys(SPLITS, 320), shapes=coded(labels.split()))
    patch(iwm, random_crop_flip=lambda images, *_: images)  # a crop would lose the code
    ways = ["protocol=table", "task=segment --epochs=12"]
    if labels[0] == "t":
        ways += ["protocol=average", "task=shape,colour"]
    for way in ways:
        call(f"--epochs=4 --batch-size=32 --lr=.02 --{way}", finetune)
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
    look = lambda model, images, *_, **__: others.append(images) or dict(mrr=0, hit1=0)
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

    def measure(model, data, split, mrr_images, probe_images=None):
        log.measured.append((len(steps), split, mrr_images))
        names = "mrr mrr_paper hit1 plan_left knn linear target_std rankme".split()
        return dict.fromkeys(names, model.encoder.embed.weight.sum().item())

    def forward(model, images, generator):
        log.model = model
        log.batches.append(numbers(255 * images))
        log.draws.append(torch.rand(1, generator=generator).item())

    data = marked() | {"train": (counted(40), 0 * torch.arange(40))}
    patch(train, load_data=lambda *_: data, measure=measure)
    patch(lab.tables, measure=measure)
    spy(train.IWM, "forward", forward)
    spy(train.IWM, "update_teacher", lambda model, m: log.ema.append((len(steps), m)))
    flags = "--steps=40 --measure-every=20 --seed=3 --warmup=.25 --lr=.01 --ema=.9"
    call(flags + " --weight-decay=.04 --weight-decay-end=.4")
    return log


def test_a_run_measures_val_and_at_the_end_test(log):
    metrics, result = read("run/metrics.jsonl"), read("run/result.json")
    found = [m["mrr"] for m in (metrics[0], metrics[2], result["trained"], result["random"])]
    torch.manual_seed(3)
    states = train.IWM(RECIPE).state_dict(), torch.load("run/last.pt")["model"]
    fresh, last = (state["encoder.embed.weight"].sum().item() for state in states)
    val = [(0, "val", 4), (20, "val", 4), (40, "val", 4)]

    assert log.measured == [*val, (40, "test", 32), (40, "test", 4)], "(step, split, images)"
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
    tasks = {n: finetune.Task(marked() | {"train": (counted(16), torch.arange(16))}) for n in "ab"}
    seen = []

    def look(network, images, task):
        seen.append((task, numbers((255 * images).round())))

    spy(finetune.Network, "forward", look)

    def fitted(row, seed=0, model=None, epochs=20.0):
        seen.clear()
        network = finetune.Network(row, model or small(), tasks, 0)
        args = Namespace(epochs=epochs, batch_size=16, lr=0.01)  # tasks share a batch
        finetune.fit(network, tasks, seed, args, "")
        return network, [(task, images) for task, images in seen if len(images) == 8]

    return fitted


def test_finetuning_has_each_image_once_an_epoch(fitted):
    seen = fitted("attentive")[1]
    epochs = [seen[i][1] + seen[i + 2][1] for i in range(0, 80, 4)]

    assert [sorted(epoch) for epoch in epochs] == [[*range(16)]] * 20, "epochs of task a"
    assert len({*map(tuple, epochs)}) == 20, "epochs share an order"
    assert [task for task, _ in seen] == ["a", "b"] * 40, "a step has all tasks"
    assert fitted("attentive")[1] == seen != fitted("attentive", 1)[1], "order and seed"


def test_finetuning_crops_images_and_the_labels_of_pixels_with_them():
    """The class of a pixel is its brightness in steps of 50."""
    labels = (
        torch.randint(5, (8, 4, 4), generator=seeded())
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)
    )
    images = (50 * labels).byte()[:, None].expand(-1, 3, -1, -1)
    task = finetune.Task({"train": (images, labels)})
    x, truth = next(finetune.batches(task, 8, RECIPE, seeded(), CPU))
    off = (255 * x[:, 0] / 50 - truth).abs()

    assert sorted(numbers(255 * x)) != sorted(numbers(images)), "images are not cropped"
    assert (off < 0.51).float().mean() > 0.9, "labels are not cropped with their images"


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
    patch(iwm.Predictor, everywhere=look)
    patch(lab.measures, linear_accuracy=lambda x, *_: x)
    found = lab.measures.probe("linear, 5 imagined", small(), marked(), 0)["test"]

    assert len(actions) == 15, "5 for each split"
    assert len(torch.cat(actions[:5]).unique(dim=0)) == 80, "each has its own"
    assert not found[:, 4:].any() and found.abs().max() < 1, "actions of the bank"
    close(found, sum(actions[:5]) / 5, "the mean")
    actions.clear()
    lab.measures.probe("linear, predictor", small(), marked(), 0)
    assert not torch.cat(actions).any(), "the predictor's own row has the null action"


class TestNetwork:
    """Exercise 10."""

    def test_a_row_reads_the_networks_that_it_names(self, patch):
        claims = {  # 2 is the teacher, 1 the encoder, 0 random; + 10 random, 40 learned predictor
            0: ["attentive, random init", "knn, random init", "linear, random init"],
            2: ["attentive", "encoder", "knn, teacher", "linear, teacher"],
            10: ["scratch"], 12: ["random predictor"],
            42: ["learned predictor", "end-to-end", "linear, predictor", "linear, 5 imagined"],
        }  # fmt: skip

        def score(network, name, task, split):
            network.heads[name] = nn.Identity()
            return who(network(task.data[split][0] / 255, name))

        who = lambda x, *_: x.mean() + x.flatten()[0] / 1000  # ... which shows the seed
        predict = lambda self, z, *_: z + 10 + 10 * self.out.bias.mean()
        patch(iwm.Predictor, everywhere=predict)
        patch(lab.measures, knn_accuracy=lambda *x: who(*x) - 50, linear_accuracy=who)
        patch(finetune, score=score, fit=lambda *_: [{}])
        task = {"t": finetune.Task(marked())}
        for claim, row in [(c, row) for c in claims for row in claims[c]]:
            one, other = (finetune.run_row(row, small(), task, seed, None) for seed in (0, 1))
            read, too = (found["test"]["t"].item() for found in (one, other))
            assert read == approx(claim - 50 * row.startswith("knn"), abs=0.1), row
            assert (read != too) == (claim in (0, 10)), f"{row}: only random weights have a seed"

    @each("row", finetune.ROWS)
    def test_only_what_is_learned_moves(self, row, fitted):
        model, still = small(), finetune.ROWS[row][0] in ("frozen", "random")
        network, start = fitted(row, 0, model, 1.5)[0], fitted(row, 0, model, 0.5)[0].state_dict()

        for name, p in network.named_parameters():
            moved = not torch.equal(p, start[name])
            assert moved != (still and name.startswith("encoder.")), f"{name} moved: {moved}"
        for name, p in small().state_dict().items():
            close(model.state_dict()[name], p, f"{name} of the checkpoint", 0)

    def test_the_predictor_gets_latents_the_null_action_and_the_task(self, fitted, spy):
        network, given = fitted("learned predictor")[0], []
        spy(iwm.Predictor, "forward", lambda self, *x: given.extend(x))
        images = noise(2, 16)
        network(images, "b")
        z, context, asked, action, token = given

        close(z, network.encoder(images), "latents of clean images")
        close(torch.stack([context, asked]), torch.arange(4).expand(2, 2, 4), "all positions")
        close(action, torch.zeros(2, 7), "the null action")
        close(token, network.task_tokens["b"].expand(2, -1, -1), "the token of the task")
        assert not torch.equal(*network.task_tokens.values()), "tasks share a token"


def test_mean_iou_worked_by_hand():
    found = finetune.mean_iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]), 4)
    assert found == approx((1 / 2 + 2 / 3) / 2), "classes 2, 3 do not count"


def test_table_of_finetuning_over_seeds(call, patch):
    made = lab.shapes.shapes(40, 0, 16)

    def row(row, model, tasks, seed, args):
        for name, task in tasks.items():
            images, labels = task.data["train"]
            assert torch.equal(images, made["images"][:5]) and torch.equal(
                labels, made[name][:5]
            ), name
        return {"val": {}, "test": {t: seed / 10 for t in tasks}, "trainable": 7}

    call()
    patch(finetune, run_row=row)
    said = call("--task=shape,colour --seeds=2 --seed=4 --protocol=table --labels=5", finetune)
    for line in ("linear, teacher | 7", "scratch | 7"):
        assert f"| {line} | 45.0 ± 7.1 | 45.0 ± 7.1 |" in said
    said = call("--seeds=2 --seed=4 --protocol=scratch --labels=5", finetune)
    assert "| scratch | 7 | 45.0 ± 7.1 |" in said and "attentive" not in said, "one row"


# ---- A run of train.py, and its data -------------------------------------------------------------


def test_a_run_leaves_its_files(call, patch):
    patch(train, draw=DRAW)
    said = call()
    call("--measure=run/last.pt --out=again")
    result, again = read("run/result.json"), read("again/result.json")
    names = "step images seconds loss mrr hit1 target_std rankme knn linear error_hue plan_left"
    files = "config.json imagine.gif last.pt metrics.jsonl plan.png result.json retrieval.png "

    assert sorted(os.listdir("run")) == [*files.split(), "strip.png", "views.png"], "files"
    assert {*names.split()} <= read("run/metrics.jsonl")[1].keys(), "metrics.jsonl"
    assert f"{result['trained']['mrr']:.4f}" in said, "MRR is printed"
    assert result["trained"] == again["trained"], "--measure finds other numbers"


def test_a_killed_run_resumes_bit_equal(call, patch, spy):
    clock, calls = count(0, 70), []
    patch(train, time=Namespace(monotonic=lambda: next(clock)))
    flags = "--steps=50 --measure-every=25 "
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
        "--conditioning=film --patch=5 --data=no/such --device=abacus "
        "--batch-size=50 --nonsense --measure=no.pt").split()),
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


@each("script", [train, finetune])
@each("error", [KeyboardInterrupt("stopped"), OSError(28, "full"), ValueError("bug")])
def test_a_bug_has_a_traceback_other_ends_a_line(script, error, patch):
    def parse_args(parser, argv=None):
        raise error

    patch(train.argparse.ArgumentParser, parse_args=parse_args)
    with raises(ValueError if "bug" in str(error) else SystemExit, match="stopped|full|bug"):
        runpy.run_path(script.__file__, run_name="__main__")


def test_settings_train_or_are_refused_in_a_line(call):
    for i, (f, value) in enumerate(zip(fields(train.iwm.Config), cycle("01"))):
        flag = f"--{f.name.replace('_', '-')}={value}"
        trained = "random init" in call(f"--steps=2 --out={i} {flag}")
        assert os.path.exists(f"{i}/result.json") == trained, flag


# What lab.shapes.shapes calls shape 0 to 7, in the rectangle around the object
OUTLINES = """
..###.. ####### ...#... ...#... ..###.. ..###.. ..####. .##.##.
.#####. ####### ..###.. .#.##.. .#####. ..###.. .###... #######
####### ####### ..###.. ######. ##...## ####### ###.... #######
####### ####### .#####. .###### ##...## ####### ###.... .#####.
####### ####### .#####. ######. ##...## ####### ###.... .#####.
.#####. ####### ####### .#.##.. .#####. ..###.. .###... ..###..
..###.. ####### ####### ...#... ..###.. ..###.. ..####. ...#...
"""


class TestShapes:
    """What an image shows is found again in its pixels."""

    made = lab.shapes.shapes(1000, 0)

    def test_the_same_seed_draws_the_same_and_all_differ(self, patch):
        patch(lab.shapes, SIZES=dict(train=2000, val=200, test=200))
        data = train.load_data(replace(RECIPE, image_size=32), CPU, None)
        images = torch.cat([images for images, _ in data.values()])
        assert [len(labels) for _, labels in data.values()] == [2000, 200, 200], "sizes"
        assert torch.equal(images[:1000], self.made["images"]), "drawn twice"
        assert torch.equal(data["train"][1][:1000], self.made["shape"]), "labels are shapes"
        assert len(images.flatten(1).unique(dim=0)) == 2400, "all differ"
        for name, kinds in dict(shape=8, colour=8, texture=4, background=4).items():
            assert self.made[name].bincount(minlength=kinds).min() > 0.7 * 1000 / kinds, name

    def test_the_mask_has_the_outline_of_the_shape(self):
        art = torch.tensor([[c == "#" for c in line] for line in OUTLINES.split()]).float()
        art = art.view(7, 8, 7).movedim(1, 0).flatten(1)
        right = torch.zeros(8)
        for mask, shape in zip(self.made["mask"], self.made["shape"]):
            y, x = mask.nonzero().T
            box = mask[y.min() : y.max() + 1, x.min() : x.max() + 1].float()
            box = F.interpolate(box[None, None], (7, 7), mode="area").view(1, 49)
            right[shape] += torch.cdist(box, art).argmin() == shape
        assert (right / self.made["shape"].bincount()).min() > 0.5, f"most look like it: {right}"

    def test_the_hue_inside_the_mask_is_the_colour(self):
        for image, mask, colour in zip(*(self.made[name] for name in ("images", "mask", "colour"))):
            hue = colorsys.rgb_to_hsv(*image[:, mask].median(dim=1).values.tolist())[0]
            off = abs((hue - (colour + 0.5) / 8 + 0.5) % 1 - 0.5)
            assert off < 1 / 16 + 0.02, f"hue {hue:.2f} is not in bin {colour} of 8"

    @each("where", ["texture", "background"])
    def test_patterns_are_where_they_belong(self, where):
        """Checks stand out most from the mean around them, then stripes, noise, and plain."""
        images, mask = self.made["images"].amax(dim=1) / 255, self.made["mask"].float()
        contrast = (images[:, 3:-3, 3:-3] / F.avg_pool2d(images, 7, 1) - 1).abs()
        away = 1 - F.max_pool2d(mask if where == "background" else 1 - mask, 7, 1)
        for name in ("texture", "background"):
            kinds = [self.made[name] == kind for kind in range(4)]
            means = [(contrast * away)[kind].sum() / away[kind].sum() for kind in kinds]
            plain, stripes, checks, noise = means
            seen = plain < 0.8 * noise < 0.64 * stripes < 0.52 * checks
            assert seen == (name == where) == (max(means) > 1.2 * min(means)), name


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
    assert len(os.listdir("cache")) == 7, "a split is decoded once for each of them"


def test_a_folder_has_the_order_of_torchvision_shuffled(load):
    """The numbers of all runs depend on it."""
    listed = lab.data.torchvision.datasets.ImageFolder("d/train").samples
    random.Random(0).shuffle(listed)
    for i, (file, _) in enumerate(listed):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(file)
    for _ in range(2):
        data = train.load_data(replace(RECIPE, data="d"), CPU, Path("cache"))
        assert numbers(torch.cat([data["val"][0], data["train"][0]])) == [*range(24)]
        data["train"][0].zero_()  # does not reach the cache


def test_which_files_count_is_said(load, capsys):
    for folder in (".cache/cat", "cat/.ipynb_checkpoints", ".ipynb_checkpoints"):
        fill(f"d/train/{folder}", 9, "blue")
    for name in ("._0.bmp", "a.txt", "b.GIF", "c"):
        Path("d/train/cat", name).write_bytes(b"")
    for name in ("x.jfif", "y.JPG"):
        Image.new("RGB", (20, 16), "red").save(f"d/train/cat/{name}", "JPEG")
    assert load()[0] == [24, 2, 24]
    assert "train: 26 images, 3 other files not used" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_named_with_the_reason(load):
    Image.effect_noise((99, 99), 50).save("d/train/cat/0.jpg")
    os.truncate("d/train/cat/0.jpg", 2000)
    for name, mode in (("1.png", "I;16"), ("2.tif", "F")):
        Image.new(mode, (9, 9)).save(f"d/train/cat/{name}")
    text = PngImagePlugin.PngInfo()
    text.add_text("key", "a" * 3_000_000, zip=True)
    Image.new("L", (9, 9)).save("d/train/cat/3.png", pnginfo=text)
    for _ in range(2):  # nothing half decoded is kept
        with raises(SystemExit, match="4 images cannot") as end:
            load()
        for reason in ("0.jpg: .*truncated", "1.png: .*I;16", "2.tif: .*F", "3.png: .*large"):
            assert re.search(reason, end.value.code), reason
        assert not os.listdir("cache")


def test_a_full_disk_is_named_and_a_cache_cut_short_decoded_anew(load):
    resource = pytest.importorskip("resource")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, most[1]))  # bytes in a file
    with raises(OSError, match="cache"):
        load()
    resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert not os.listdir("cache"), "what was written is still there"
    right = load()
    for file in Path("cache").iterdir():
        os.truncate(file, 9000)
    assert load() == right


def test_an_unknown_class_and_too_few_images_are_named(load):
    fill("d/test/horse", 1, "red")
    with raises(SystemExit, match="horse"):
        load()
    fill("few/train/cat", 9, "red")
    fill("few/test/cat", 1, "red")
    with raises(SystemExit, match="8 training images, fewer"):  # one is held out
        train.load_data(replace(RECIPE, data="few"), CPU, Path("cache"))


def test_pictures_become_upright_rgb_on_white(tmp_path):
    grey, exif = Image.linear_gradient("L"), Image.Exif()  # black above
    exif[0x112] = 3  # turned
    pictures = {f"{mode}.png": grey.convert(mode) for mode in ("1", "L", "P")}
    pictures |= {"CMYK.jpg": grey.convert("CMYK"), "turned.jpg": grey.rotate(180)}
    for mode in ("LA", "RGBA"):  # black, and transparent below
        pictures[f"{mode}.png"] = Image.new(mode, grey.size)
        pictures[f"{mode}.png"].putalpha(grey.rotate(180))
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **{"exif": exif} if name == "turned.jpg" else {})
        found = torch.from_numpy(lab.data.read_image(tmp_path / name, 10)).float()
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
    assert torch.equal(data["val"][1], again["val"][1]), "held out each time"
    assert sorted(test) == [*range(100, 120)], "test"
    patch(lab.data.torchvision.datasets, CIFAR10=lambda *_, **__: os.listdir("network"))
    assert "cannot be downloaded" in call("--data=cifar10")


def test_the_fingerprint_tells_images_and_labels_of_each_split_apart():
    data = marked()
    found = {lab.data.fingerprint(data), lab.data.fingerprint(marked())}
    for split, (images, labels) in data.items():
        for other in ((images + 1, labels), (images, labels + 1)):
            found.add(lab.data.fingerprint(data | {split: other}))
    assert len(found) == 7


def test_data_may_move(load, call):
    call("--data=d")
    os.rename("d", "moved")
    assert "random init" in call("--resume --data=moved")


TWO = """
import os, lab.shapes, train
if train.machine.RANK: os.replace = None  # only process 0 writes
lab.shapes.SIZES = dict(train=40, val=12, test=12)
train.main()
"""


def test_two_processes_have_one_gradient_and_one_writes(call, patch):
    Path("two.py").write_text(TWO)
    flags = f"-m torch.distributed.run --nproc_per_node=2 --standalone two.py {FLAGS} --steps=1"
    env = os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)}
    said = subprocess.check_output([sys.executable, *flags.split()], text=True, env=env)
    assert said.count("chance") == 1, "tables printed"
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


def test_stderr_may_be_a_logger(patch):
    patch(sys, stderr=Namespace(write=print))
    assert runpy.run_path(machine.__file__)["QUIET"]["mininterval"] == 30


def test_a_rank_needs_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert runpy.run_path(machine.__file__)["RANK"] == 0


@each("native, wanted", [*product([True, False], repeat=2)])
def test_bfloat16_only_where_the_cpu_has_it(native, wanted, patch):
    patch(torch.cpu, _is_avx512_bf16_supported=lambda: native)
    with train.autocast(replace(RECIPE, bf16=wanted), CPU):
        found = (torch.zeros(2, 2) @ torch.zeros(2, 2)).dtype
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
        images = train.to_float(lab.shapes.shapes(2, 7)["images"])
        found = iwm.measure_mrr(model, images, seeded())["mrr"]

        assert found > 0.3, f"MRR on shapes, which it never saw, is {found:.2f}: chance is 0.024"


# ---- Pictures: a sheet is data before it is painted ----------------------------------------------

IMAGES, STRENGTHS = torch.rand(7, 3, 16, 16, generator=seeded()), RECIPE.jitter_strengths


def told(words):
    """The changes [4] of the jitter that words tell, to two digits."""
    found = dict(line.split() for line in words.split("\n") if line[-3:-2] == ".")
    return torch.tensor([float(found.get(name, 0)) for name in iwm.JITTER])


def changed(image, words):
    return iwm.jitter(image[None], iwm.IDENTITY + told(words)[None])[0]


def decode(latents):
    return latents.view(-1, 3, 16, 16)


def perfect(order=slice(None)):
    """Its latents are pixels; what it imagines is 0.01 darker, and in another order."""

    def imagine(images, action):
        params = iwm.IDENTITY + action[:, :4] * STRENGTHS
        pictures = iwm.jitter(images.expand(len(action), -1, -1, -1), params)
        return model.targets(pictures[order]) - 0.01

    model = small()
    model.targets, model.imagine = lambda images: images.flatten(1)[:, None], imagine
    model.plan = lambda a, b: (
        iwm.IDENTITY + (a - 2 * b).mean(dim=(1, 2, 3))[:, None] * torch.ones(4)
    )
    return model


@each("right, order", [(True, [0, 2, 1, 3]), (False, [2, 1, 0, 3])])
def test_only_the_truth_is_framed(right, order):
    sheet = lab.pictures.retrieval(perfect(order), IMAGES, decode, seeded())
    for image, (_, words, imagined, near, truth) in zip(IMAGES, zip(*sheet.values())):
        close(changed(image, words), truth, "the truth, by the words", 0.05)
        close(imagined, near[0] - 0.01, "the nearest to what is imagined, decoded")
        assert (near[1], torch.equal(near[0], truth), "rank 1 of 4" in words) == (right,) * 3


def test_views_hide_what_is_masked():
    sheet, again = lab.pictures.views(IMAGES, RECIPE, seeded()), seeded()
    x, y, action = iwm.make_views(IMAGES, RECIPE, again)
    _, masked = iwm.sample_masks(7, RECIPE, again)
    seen = sheet["context of x"]

    assert torch.equal(sheet["source x"], x) and torch.equal(sheet["target y"], y)
    assert torch.equal((seen == 0.5)[:, 0, ::8, ::8].flatten(1).nonzero()[:, 1:], masked), "grey"
    close(torch.where(seen == 0.5, x, seen), x, "the context shows x")
    for words, a in zip(sheet["action x -> y"], action):
        close(told(words), a[:4] * STRENGTHS, words, 0.006)
        assert [name in words for name in iwm.ACTION[4:]] == a[4:].bool().tolist(), words


def test_the_film_goes_round_without_a_jump():
    film, changes = lab.pictures.frames(perfect(), IMAGES[:2], decode), []
    for sheet in film:
        (words, labels), *cells = sheet.items()
        changes.append(told(words))
        assert [label.split(",")[0] for label in labels] == ["imagined", "truth"]
        for image, (_, (imagined, truth)) in zip(IMAGES, cells):
            close(truth, changed(image, words), f"the truth of {words}", 0.05)
            close(imagined, truth - 0.01, f"imagined, {words}")
    changes, swept = torch.stack(changes), STRENGTHS * torch.tensor([1, 0, 0, 1])
    steps = (changes - changes.roll(1, 0)).abs().amax(dim=0)

    assert [*film[0]] == ["no change", "image 1", "image 2"]
    assert "-0.30\nto +0.30" in film[0]["no change"][0], "its range"
    close(steps, swept / 4, "largest step; one leads from the last to the first", 0.011)
    close(torch.stack([*changes.aminmax(dim=0)]), torch.stack([-swept, swept]), "its range", 0.006)


def test_a_run_draws_held_out_images(patch, spy, tmp_path):
    painted, fitted, data, model = [], [], marked(), perfect()
    data["val"] = counted(12) * 20, torch.arange(12)
    spy(lab.pictures, "paint", lambda sheet, *_, **__: painted.append(sheet))
    patch(lab.pictures, fit_decoder=lambda _, images, *__: fitted.append(images) or decode)
    DRAW(model, data, tmp_path)
    first, plan = train.to_float(data["val"][0][:8]), painted[2]

    assert not fitted[0].any(), "the decoder is fitted on training images"
    for sheet, n in zip(painted, (8, 8, 8, 6)):
        assert torch.equal(torch.stack([*sheet["image"]]), first[:n]), "the first of val"
    close(torch.stack([painted[4][f"image {i}"][1] for i in (1, 2, 3, 4)]), first[:4], "film")
    for image, goal, words in zip(plan["image"], plan["goal"], plan["true action"]):
        close(changed(image, words), goal, "the true action", 0.02)
    found = model.plan(plan["image"], plan["goal"])
    close(plan["reached"], iwm.jitter(plan["image"], found), "reached by what was found")
    close(torch.stack([*map(told, plan["action found"])]), found - iwm.IDENTITY, "words", 0.006)


def test_the_decoder_finds_the_pixels_of_targets():
    model, turn = small(), torch.linalg.qr(torch.randn(192, 192, generator=seeded())).Q
    model.targets = lambda images: F.unfold(images, 8, stride=8).mT @ turn
    images = torch.rand(200, 3, 16, 16, generator=seeded())
    found = lab.pictures.fit_decoder(model, images, seeded())(model.targets(IMAGES))
    close(found, IMAGES, "pixels", 0.1)


def test_paint_and_gif_show_their_cells(tmp_path):
    names, film = ("red", "lime", "blue"), tmp_path / "film.gif"
    red, green, blue = (
        F.one_hot(torch.tensor(i), 3)[:, None, None] * torch.ones(3, 4, 4) for i in range(3)
    )
    page = lab.pictures.paint({"a": [red, (green, True)], "b": ["", (blue, False)]})
    places = [(50, 90), (50, 190), (152, 190), (4, 190), (106, 190), (152, 90)]
    colours = map(ImageColor.getrgb, [*names, "limegreen", "white", "white"])
    assert [page.getpixel(place) for place in places] == [*colours]

    lab.pictures.save_gif([{"no change": [red]}, {"x": [green]}, {"y": [blue]}], film)
    with Image.open(film) as gif:
        found = [frame.convert("RGB").getpixel((60, 120)) for frame in ImageSequence.Iterator(gif)]
        assert found == [*map(ImageColor.getrgb, names)] and gif.info["loop"] == 0


def test_a_photograph_of_ones_own(patch, spy, tmp_path, monkeypatch):
    sheets, fitted = [], []
    monkeypatch.chdir(tmp_path)
    torch.save({"config": asdict(RECIPE), "model": small().state_dict()}, "last.pt")
    Path("none.jpg").write_text("no image")
    spy(lab.pictures, "paint", lambda sheet, *_, **__: sheets.append(sheet))
    spy(lab.pictures, "fit_decoder", lambda model, *_: fitted.append(model))

    def run(*args):
        sheets.clear()
        patch(sys, argv=["", "last.pt", *args])
        lab.pictures.main()

    files = "portrait.jpg 20 50", "grey.png 40 40", "clear.png 40 30", "tiny.bmp 1 1"
    for i, (mode, file) in enumerate(zip(("RGB", "L", "RGBA", "RGB"), files)):
        file, *size = file.split()
        image = Image.new("RGB", [*map(int, size)], (50 + i,) * 3).convert(mode)
        image.save(file)
        run(file)
        assert Path(f"runs/photo-{Path(file).stem}/imagine.gif").exists()
        close(255 * sheets[4]["image 1"][1], 50.0 + i + torch.zeros(3, 16, 16), file, 0.1)
    Image.linear_gradient("L").save("ramp.png")
    run("ramp.png")
    whole = lab.data.read_image("ramp.png", 16)
    close(255 * sheets[0]["image"][0], torch.tensor(whole), "no crop of it", 0.1)
    run("tiny.bmp", "grey.png", "--out=there")
    found = [255 * sheets[0][name][0].mean() for name in ("image", "goal")]

    close(found, [53, 51], "from the first to the second", 0.1)
    assert os.listdir("there") == ["plan.png"] and len(sheets) == 1
    assert all(torch.equal(p, q) for p, q in zip(fitted[0].parameters(), small().parameters()))
    with raises(SystemExit, match=r"^none.jpg cannot be read[^\n]*$"):
        run("none.jpg")
