"""Tests of the experiments: what only an honest pipeline finds, what is printed and drawn."""

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
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import count, product
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from pytest import approx, fixture, raises
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import finetune
import iwm
import lab.data
import test_iwm
import train
from lab import checkpoints, machine, measures, pictures, shapes, tables
from test_iwm import IDENTITY, TINY, act, close, each, noise, seeded, tiny

CPU, SPLITS = torch.device("cpu"), ("train", "val", "test")
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
    """patch(owner, name=new) until the test ends."""
    return lambda owner, **new: [monkeypatch.setattr(owner, *item) for item in new.items()]


@fixture
def spy(patch):
    """spy(owner, name, look) shows look the arguments of each call."""

    def spy(owner, name, look):
        real = getattr(owner, name)
        patch(owner, **{name: lambda *args, **kw: (look(*args), real(*args, **kw))[1]})

    return spy


@fixture
def steps(spy):
    """For each step of AdamW {parameter with a gradient: (lr, weight decay, *betas)}."""
    steps = []

    def look(adam, *_):
        found = ((p, g) for g in adam.param_groups for p in g["params"] if p.grad is not None)
        steps.append({p: (g["lr"], g["weight_decay"], *g["betas"]) for p, g in found})

    spy(torch.optim.AdamW, "step", look)
    return steps


@fixture
def call(monkeypatch, patch, capsys, tmp_path):
    """Runs a script in an empty folder -> what it prints or the line it ends with."""
    monkeypatch.chdir(tmp_path)
    patch(shapes, SIZES=dict(train=40, val=12, test=12))
    patch(train, draw=lambda *_: None, draw_curves=lambda *_: None)
    always = {train: FLAGS, finetune: "run --device=cpu ", pictures: "last.pt "}

    def call(flags="", script=train):
        patch(sys, argv=["", *(always[script] + flags).split()])
        try:
            script.main()
        except SystemExit as end:
            assert end.code and "\n" not in end.code, "one line"
            return end.code
        return "".join(capsys.readouterr())

    return call


# ---- Measures ------------------------------------------------------------------------------------


def test_rankme_is_the_effective_rank():
    """Singular values 3 and 1: exp(-3/4 log 3/4 - 1/4 log 1/4) = 1.755."""
    q = torch.linalg.qr(torch.randn(100, 5, generator=seeded())).Q
    features = q, torch.ones(50, 8), q[:, :2] * torch.tensor([3, 1]), q / 0
    found = [measures.rankme(f) for f in features]
    close(found, [5, 1, 1.755, math.nan], "five equal, a constant, (3, 1), not finite", 0.01)


@pytest.mark.filterwarnings("error")
def test_a_linear_probe_reads_small_features():
    labels = torch.arange(800) % 4
    f = F.one_hot(labels, 16) + 0.1 * torch.randn(800, 16, generator=seeded())
    f[:, :4] /= 1000
    asked = f[400::4], labels[400::4]  # one class: its own mean would hide it
    found = [measures.linear_accuracy(f[:n], labels[:n], *asked) for n in (400, 1)]
    close(found, [1.0, 1.0], "accuracy of separable classes, of one image", 0.05)


def test_knn_is_a_naive_one():
    train, test = torch.randn(1200, 4, generator=seeded()).split([100, 1100])
    labels = torch.arange(100) % 3
    near, i = F.cosine_similarity(test[:, None], train, dim=2).topk(20)
    votes = F.one_hot(labels[i]) * (near / 0.07).exp()[:, :, None]
    truth = votes.sum(dim=1).argmax(dim=1)
    close(measures.knn_accuracy(train, labels, test, truth), 1.0, "agree with a naive one")


def test_mean_iou_worked_by_hand():
    found = finetune.mean_iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]), 4)
    assert found == approx((1 / 2 + 2 / 3) / 2), "classes 2, 3 do not count"


@each("i", range(4))
def test_only_an_ignored_component_has_an_error(i):
    model, others = tiny(), torch.arange(7) != i
    model.imagine = lambda image, action: model.targets(act(image, action * others))
    ends = torch.where(torch.arange(4) == i, TINY.jitter_range, IDENTITY)
    errors = measures.measure_components(model, noise(2))

    close(measures.sweep_params(i, TINY)[[0, -1]], ends, f"ends of sweep {i}")
    close([*errors.values()], 0.27 * torch.eye(4)[i], f"{[*errors]}, number {i} ignored", 0.02)


def test_planning_is_measured_in_shares_of_the_range(patch):
    model, images = tiny(conditioning="none", image_size=8), noise(999, 8)
    params = iwm.jitter_params(999, TINY, seeded(), always=True)
    goals = iwm.jitter(images, params)
    nothing = measures.measure_planning(model, images, seeded()).values()
    patch(model, plan=lambda a, b: params if torch.equal(b, goals) else 0 * params)
    everything = measures.measure_planning(model, images, seeded()).values()

    close([*nothing], [1.0] + [0.25] * 4, "the identity misses a quarter of the range", 0.03)
    close([*everything], [0.0] * 5, "errors of a perfect planner", 1e-4)


@each("split", ["val", "test"])
def test_measure_probes_the_teacher_on_its_split(split, patch, spy):
    model, looks, images = small(), [], marked()[split][0] / 255

    def look(model, images, *_, jitter_of=None):
        looks.append((images, jitter_of))
        return dict(mrr=0, hit1=0)

    patch(iwm, measure_mrr=look)
    patch(measures, measure_components=look, measure_planning=look, rankme=lambda f: f)
    spy(train.IWM, "targets", look)
    found = measures.measure(model, marked(), split, 3, 9)["rankme"]

    close(found, model.teacher(images[:9]).mean(dim=1), f"features of {split}")
    for seen, _ in looks:
        close(seen, images[: len(seen)], f"images of {split}")
    assert [of for _, of in looks if of] == [iwm.Config()], "one bank is the paper's"


def coded(labels):
    """For shapes.shapes: images tell their factors; random labels are wrong for half a class."""

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
        names = "shape", "colour", "texture", "background"
        return dict(zip(names, truth ^ wrong[:4]), images=images.byte(), mask=mask)

    return shapes


@each("labels, val, test", [
    ("true true opposite", (0.8, 1), (0, 0.2)),  # learn
    ("true random random", (0.39, 0.61), (0.39, 0.61)),  # leak: chance and four deviations
    ("random true true", (0.2, 0.8), (0.2, 0.8)),  # shuffled
])  # fmt: skip
def test_only_what_images_tell_is_learned(labels, val, test, call, patch):
    call()
    patch(shapes, SIZES=dict.fromkeys(SPLITS, 320), shapes=coded(labels.split()))
    patch(iwm, random_crop_flip=lambda images, *_: images)  # a crop would lose the code
    segment, tasks = "encoder --task=segment --epochs=12", "end-to-end --task=shape,colour"
    for protocol in ("table", "average", tasks, segment):
        call(f"--epochs=4 --batch-size=32 --lr=.02 --protocol={protocol}", finetune)
    data, rows = train.load_data(RECIPE, CPU, None), read("run/finetune.jsonl")
    for split, (low, high) in (("val", val), ("test", test)):
        probes = measures.measure(small(), data, split, 1, 320)
        measured = {"row": "measure", split: {name: probes[name] for name in ("knn", "linear")}}
        for row in [*rows, measured]:
            for task, score in row[split].items():
                if task == "segment" and 0 < low < 0.8:
                    score += 0.3  # mIoU by chance is 0.2
                assert low <= score <= high, f"{row['row']}: {task} of {split}"


# ---- Training ------------------------------------------------------------------------------------


def test_only_one_preset_is_the_papers():
    assert [n for n, recipe in train.PRESETS.items() if not recipe.predict_all] == ["paper"]


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="its fake GPU asks for a driver")
@each("preset, mode", [*zip(train.PRESETS, ["none", "sequence", "feature", "feature"])])
def test_a_step_stays_on_the_gpu(preset, mode, patch):
    """Tensors without data: on a wrong device, or read, they raise."""
    config = replace(train.PRESETS[preset], conditioning=mode, depth=1, pred_depth=1)
    model = iwm.IWM(config)
    # neither exists for fake tensors
    patch(torch.optim, Adam=torch.optim.SGD)
    patch(torch.autograd, grad=lambda *_, **__: [images[:, 0, 0, :7]])
    patch(torch.Tensor, cpu=lambda _: pytest.fail("from device to host"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.rand(2, 3, *[config.image_size] * 2, device="cuda")
        model.to("cuda")
        imagined = model.imagine(images, images[:, 0, 0, :7])
        found = model.loss(images), imagined, model.plan(images, images, steps=2)
        model.update_teacher(0.9)

    assert {out.device.type for out in found} == {"cuda"}, f"{found}"


@fixture
def log(call, patch, spy, steps):
    """What a run of 40 steps does: train has images 0..39, val 100, test 200."""
    log = Namespace(batches=[], measured=[], draws=[], ema=[], losses=[])

    def measure(model, data, split, mrr_images, probe_images=None):
        log.measured.append((len(steps), split, mrr_images))
        weight = model.encoder.embed.weight.sum().item()
        return defaultdict(float, mrr=weight, rankme=40 - len(steps))

    def forward(model, images, generator):
        log.model = model
        log.batches.append(numbers(255 * images))
        log.draws.append(torch.rand(1, generator=generator).item())
        assert all(p.grad is None for p in model.parameters()), "a gradient is left over"

    def step(*args, real=train.train_step):
        log.losses.append(real(*args).item())
        return torch.tensor(log.losses[-1])

    data = marked() | {"train": (counted(40), 0 * torch.arange(40))}
    patch(train, load_data=lambda *_: data, measure=measure, train_step=step)
    patch(tables, measure=measure)
    spy(train.IWM, "forward", forward)
    spy(train.IWM, "update_teacher", lambda model, m: log.ema.append((len(steps), m)))
    flags = "--steps=40 --measure-every=20 --seed=3 --warmup=.25 --lr=.01 --ema=.9 "
    log.said = call(flags + "--weight-decay=.04 --weight-decay-end=.4 --conditioning=sequence")
    return log


def test_a_run_measures_val_and_at_the_end_test(log):
    metrics, result = read("run/metrics.jsonl"), read("run/result.json")
    found = [m["mrr"] for m in (metrics[0], metrics[2], result["trained"], result["random"])]
    torch.manual_seed(3)
    states = train.IWM(RECIPE).state_dict(), torch.load("run/last.pt")["model"]
    fresh, last = (state["encoder.embed.weight"].sum().item() for state in states)
    val = [(0, "val", 4), (20, "val", 4), (40, "val", 4)]
    losses = [sum(log.losses[i : i + 20]) / 20 for i in (0, 20)]

    assert log.measured == [*val, (40, "test", 32), (40, "test", 4)], "(step, split, images)"
    assert [(m["step"], m["images"]) for m in metrics] == [(0, 0), (20, 160), (40, 320)]
    assert [m["loss"] for m in metrics[1:]] == approx(losses), "means since the last"
    assert found == [fresh, last, last, fresh], "networks of first, last, trained, random"
    assert log.said.count("collapsed") == 1, "RankMe is 40, 20, 0"


def test_an_epoch_has_each_image_once(log, patch):
    epochs = [sum(log.batches[i : i + 5], []) for i in range(0, 40, 5)]
    recipe, halves = replace(RECIPE, steps=40, seed=3), []
    for rank in range(2):
        patch(machine, WORLD=2, RANK=rank)
        halves.append([numbers(x) for x in train.batches(counted(40), recipe, 7, CPU)])

    for epoch in epochs:
        assert sorted(epoch) == [*range(40)] != epoch, "an epoch, in random order"
    assert len({*map(tuple, epochs)}) == 8, "epochs share an order"
    for batch, *parts in zip(log.batches[7:], *halves, strict=True):
        assert [*map(len, parts)] == [4, 4] and sorted(sum(parts, [])) == sorted(batch), "halves"


def test_steps_processes_and_seeds_draw_anew(log, patch):
    optimizer = train.make_optimizer(log.model, RECIPE)
    for rank, recipe in ((1, replace(RECIPE, seed=3)), (0, RECIPE)):
        patch(machine, RANK=rank)
        train.train_step(log.model, optimizer, counted(8), 0, recipe, seeded())

    assert len({*log.draws}) == 42, "draws of 40 steps, another process, another seed"
    assert numbers(next(train.batches(counted(40), RECIPE, 0, CPU))) != log.batches[0]


def test_schedules_and_weight_decay_of_a_run(log, steps):
    learned = {p: name for name, p in log.model.named_parameters() if p.requires_grad}
    assert [n for n, _ in log.ema] == [*range(1, 41)], "steps before each EMA"
    for i, lr, decay, momentum in (
        (0, 0.001, 0.04, 0.9), (9, 0.01, 0.0831, 0.9225), (25, 0.005, 0.289, 0.9625),
        (39, 2.84e-5, 0.3994, 0.9975),
    ):  # fmt: skip
        assert steps[i].keys() == learned.keys() and log.ema[i][1] == approx(momentum, rel=0.01)
        for p, name in learned.items():
            expected = lr, decay * (p.ndim == 2 and "bias" not in name), 0.9, 0.95
            assert steps[i][p] == approx(expected, rel=0.01), f"lr, decay, betas of {name}, {i}"


def test_a_run_leaves_its_files(call, patch):
    graphs, real = [], nn.Module.compile
    eager = lambda graph, _: graphs.append(graph) or graph.forward
    patch(nn.Module, compile=lambda self, **_: real(self, backend=eager))
    patch(train, draw=pictures.draw)
    said = call()
    call("--measure=run/last.pt --out=again")
    call("--compile --out=compiled")
    found = [read(f"{run}/result.json")["trained"] for run in ("run", "again", "compiled")]
    names = "step images seconds loss mrr hit1 target_std rankme knn linear error_hue plan_left"
    files = "config.json imagine.gif last.pt metrics.jsonl plan.png result.json retrieval.png "

    assert sorted(os.listdir("run")) == [*files.split(), "strip.png", "views.png"]
    assert {*names.split()} <= read("run/metrics.jsonl")[1].keys()
    assert f"{found[0]['mrr']:.4f}" in said, "MRR is printed"
    assert found[0] == found[1] == found[2], "of a run, measured again, of a compiled run"
    assert len(graphs) == 3, "encoder, teacher and predictor; nothing for measuring"


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


TWO = """
import os, lab.shapes, train
if train.machine.RANK: os.replace = None  # only process 0 writes
lab.shapes.SIZES = dict(train=40, val=12, test=12)
train.main()
"""


def test_two_processes_share_one_gradient(call, patch):
    Path("two.py").write_text(TWO)
    flags = f"-m torch.distributed.run --nproc_per_node=2 --standalone two.py {FLAGS} --steps=1"
    env = os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)}
    said = subprocess.check_output([sys.executable, *flags.split()], text=True, env=env)
    assert said.count("chance") == 1, "tables printed"
    images, moments = shapes.load_shapes(16)["train"]["images"], []
    for rank in range(2):
        patch(machine, WORLD=2, RANK=rank)
        torch.manual_seed(0)
        model = train.IWM(RECIPE)
        optimizer = train.make_optimizer(model, RECIPE)
        batch = next(train.batches(images, RECIPE, 0, CPU))
        train.train_step(model, optimizer, batch, 0, RECIPE, seeded())
        moments.append([state["exp_avg"] for state in optimizer.state.values()])

    found = torch.load("run/last.pt")["optimizer"]["state"].values()
    for one, other, both in zip(*moments, found, strict=True):
        close(both["exp_avg"], (one + other) / 2, "a tenth of the gradient", 1e-6, 1e-3)


def test_only_training_has_ranks(call, patch, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert runpy.run_path(machine.__file__)["RANK"] == 0
    patch(machine, LAUNCHED=True)
    for script, flags in ((train, "--measure=run/last.pt"), (finetune, "")):
        assert "torchrun" in call(flags, script)


@each("native, wanted", [*product([True, False], repeat=2)])
def test_bfloat16_only_where_the_cpu_has_it(native, wanted, patch, spy):
    model, recipe, types = small(), replace(RECIPE, bf16=wanted), []
    patch(torch.cpu, _is_avx512_bf16_supported=lambda: native)
    spy(iwm.Predictor, "forward", lambda self, z, *_: types.append(self.embed(z).dtype))
    train.train_step(model, train.make_optimizer(model, recipe), counted(8), 0, recipe, seeded())
    assert types == [torch.bfloat16 if native and wanted else torch.float32]


def test_published_weights_load_and_model_the_action():
    model = train.load_checkpoint(Path(train.__file__).with_name("assets") / "cifar.pt", CPU)
    images = train.to_float(shapes.shapes(2, 7)["images"])
    found = iwm.measure_mrr(model, images, seeded())["mrr"]
    assert found > 0.3, f"MRR on shapes, which it never saw, is {found:.2f}: chance is 0.024"


# ---- Finetuning ----------------------------------------------------------------------------------


@fixture
def fitted(spy):
    """-> a network fitted to tasks a and b, what it saw."""
    tasks = {n: finetune.Task(marked() | {"train": (counted(16), torch.arange(16))}) for n in "ab"}
    seen = []
    look = lambda network, x, task: seen.append((task, numbers((255 * x).round())))
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


def test_labels_of_pixels_are_cropped_with_them():
    """The class of a pixel is its brightness in steps of 50."""
    squares = torch.randint(5, (8, 4, 4), generator=seeded())
    labels = torch.kron(squares, torch.ones(1, 4, 4)).long()
    images = (50 * labels).byte()[:, None].expand(-1, 3, -1, -1)
    task = finetune.Task({"train": (images, labels)})
    x, truth = next(finetune.batches(task, 8, RECIPE, seeded(), CPU))
    off = (255 * x[:, 0] / 50 - truth).abs()

    assert sorted(numbers(255 * x)) != sorted(numbers(images)), "images are not cropped"
    assert (off < 0.51).float().mean() > 0.9, "labels are not cropped with their images"


class TestNetwork:
    """Exercise 10: a row is made of the networks that it names, and trains what it should."""

    @each("row", finetune.ROWS)
    def test_learned_weights_have_a_tenth_of_the_rate(self, row, fitted, steps):
        model, parts = small(), dict(zip(("encoder", "predictor"), finetune.ROWS[row]))
        rates, expected = {"new": 0.01, "learned": 0.001, "frozen": 0, "random": 0}, {}
        for name, p in fitted(row, model=model)[0].named_parameters():
            rate = rates[parts.get(name.split(".")[0], "new")]  # heads and task tokens are new
            if rate:
                expected[p] = rate, 0.05 * (p.ndim == 2)
        for i, share in ((0, 0.25), (3, 0.986), (20, 0.5), (39, 0.00154)):
            assert steps[i].keys() == expected.keys(), "what is optimised"
            for p, (rate, decay) in expected.items():
                assert steps[i][p][:2] == approx((share * rate, decay), rel=0.01), f"step {i}"
        for name, p in small().state_dict().items():
            assert torch.equal(model.state_dict()[name], p), f"{name} of the checkpoint has changed"

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
        patch(iwm.Predictor, everywhere=lambda self, z, *_: z + 10 + 10 * self.out.bias.mean())
        patch(measures, knn_accuracy=lambda *x: who(*x) - 50, linear_accuracy=who)
        patch(finetune, score=score, fit=lambda *_: [{}])
        task = {"t": finetune.Task(marked())}
        for claim, row in ((claim, row) for claim, rows in claims.items() for row in rows):
            found = [
                finetune.run_row(row, small(), task, s, None)["test"]["t"].item() for s in (0, 1)
            ]
            assert found[0] == approx(claim - 50 * row.startswith("knn"), abs=0.1), row
            assert (found[0] != found[1]) == (claim in (0, 10)), (
                f"{row}: random weights have a seed"
            )

    def test_the_predictor_is_told_the_task(self, fitted, spy):
        network, given, images = fitted("learned predictor", epochs=1)[0], [], noise(2, 16)
        spy(iwm.Predictor, "everywhere", lambda self, *x: given.extend(x))
        network(images, "b")
        z, action, token = given

        close(z, network.encoder(images), "latents of clean images")
        close(action, torch.zeros(2, 7), "the null action")
        close(token, network.task_tokens["b"].expand(2, -1, -1), "the token of the task")
        assert not torch.equal(*network.task_tokens.values()), "tasks share a token"


def test_k_imagined_is_the_mean_over_k_actions(patch):
    actions = []
    look = lambda self, z, action: actions.append(action) or action[:, None]
    patch(iwm.Predictor, everywhere=look)
    patch(measures, linear_accuracy=lambda x, *_: x)
    rows = "linear, 5 imagined", "linear, predictor"
    mean, null = (measures.probe(row, small(), marked(), 0)["test"] for row in rows)

    close(mean, sum(actions[:5]) / 5, "the mean of five")
    close(len(torch.cat(actions[:5]).unique(dim=0)), 80, "each image has its own")
    assert not mean[:, 4:].any() and mean.abs().max() < 1, "actions of the bank"
    assert not null.any(), "the predictor's own row has the null action"


def test_table_of_finetuning_over_seeds(call, patch):
    made = shapes.shapes(40, 0, 16)

    def row(row, model, tasks, seed, args):
        for name, task in tasks.items():
            for found, all_of_it in zip(task.data["train"], (made["images"], made[name])):
                assert torch.equal(found, all_of_it[:5]), f"--labels=5 of {name}"
        return {"val": {}, "test": {t: seed / 10 for t in tasks}, "trainable": 7}

    call()
    patch(finetune, run_row=row)
    flags = "--seeds=2 --seed=4 --labels=5"
    said = call(flags + " --task=shape,colour --protocol=table", finetune)
    assert "| linear, teacher | 7 | 45.0 ± 7.1 | 45.0 ± 7.1 |" in said
    said = call(flags + " --protocol=scratch", finetune)
    assert "| scratch | 7 | 45.0 ± 7.1 |" in said and "attentive" not in said, "one row"


# ---- The command line ----------------------------------------------------------------------------


def test_table_of_runs_over_seeds(call):
    for run, data, mrr in (("a,seed=0", "A", 0.2), ("a,seed=1", "A", 0.4), ("b", "B", 0.1)):
        config = asdict(replace(RECIPE, seed=int(run[-1] == "1"), data=data))
        result = {"config": config, "trained": {"mrr": mrr}, "seconds": 60.0}
        os.mkdir(run)
        Path(run, "result.json").write_text(json.dumps(result))
    said = call("--table a,seed=0 a,seed=1 b c")

    for line in ("| a | 2 | 0.300 ± 0.141 | ", "| b | 1 | 0.100 | ", "c is no finished run"):
        assert line in said


def test_a_mistake_is_named_in_a_line(call):
    call()
    wrong = {
        train: "--conditioning=film --patch=5 --pred-width=18 --context=2 --blocks=0 --bank=0 "
        "--heads=0 --data=no/such --device=abacus --batch-size=50 --nonsense --measure=no.pt",
        finetune: "--lr=x --task=hat --labels=99 --data=no/such",
    }
    for script, flag in ((s, flag) for s in wrong for flag in wrong[s].split()):
        assert flag.split("=")[-1].strip("-") in call(flag + " --out=new", script), flag
        assert not os.path.exists("new"), f"{flag} has written"
    assert "stands alone" in call("--task=shape,segment", finetune)
    assert "heads 2, not 4" in call("--measure=run --heads=4")
    assert "not finite" in call("--lr=1e30 --out=new")
    assert "not finite" in call("--lr=1e30 --epochs=9", finetune)


def test_nothing_is_overwritten_or_half_read(call):
    call()
    whole = Path("run/last.pt").read_bytes()
    assert "--resume" in call() and "lr was" in call("--resume --lr=.1")
    assert "warmup was" in call("--resume --preset=paper"), "another preset"
    assert Path("run/last.pt").read_bytes() == whole, "the run has changed"
    for n in (0, 99, len(whole) // 2, len(whole) - 1):
        Path("run/last.pt").write_bytes(whole[:n])
        for flags in ("--resume", "--measure=run/last.pt"):
            assert "run/last.pt" in call(flags), flags

    class Harm:
        def __reduce__(self):
            return os.mkdir, ("harm",)

    torch.save({"config": Harm()}, "run/last.pt")
    assert "run/last.pt" in call("--measure=run") and not os.path.exists("harm"), "it was run"


@each("script", [train, finetune])
@each("error", [KeyboardInterrupt("stopped"), OSError(28, "full"), ValueError("bug")])
def test_a_bug_has_a_traceback_other_ends_a_line(script, error, patch):
    patch(train.argparse.ArgumentParser, parse_args=Mock(side_effect=error))
    with raises(ValueError if "bug" in str(error) else SystemExit, match="stopped|full|bug"):
        runpy.run_path(script.__file__, run_name="__main__")


def test_the_hand_out_is_graded(tmp_path):
    test_iwm.hand_out(tmp_path / "my_iwm.py")
    with raises(SystemExit, match="exists"):
        test_iwm.hand_out(tmp_path / "my_iwm.py")
    env = os.environ | {"IWM": "my_iwm", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", test_iwm.__file__, "-k", "TestTeacher"]
    said = subprocess.run(command, env=env, capture_output=True, text=True).stdout

    expected = "Exercise 7, TestTeacher: 1 of 2, not written yet: IWM.update_teacher"
    assert said.splitlines()[-1] == expected, said


# ---- Data: what a drawn image shows is found again in its pixels ---------------------------------

# shape 0 to 7, in the rectangle around the object
OUTLINES = """
..###.. ####### ...#... ...#... ..###.. ..###.. ..####. .##.##.
.#####. ####### ..###.. .#.##.. .#####. ..###.. .###... #######
####### ####### ..###.. ######. ##...## ####### ###.... #######
####### ####### .#####. .###### ##...## ####### ###.... .#####.
####### ####### .#####. ######. ##...## ####### ###.... .#####.
.#####. ####### ####### .#.##.. .#####. ..###.. .###... ..###..
..###.. ####### ####### ...#... ..###.. ..###.. ..####. ...#...
"""
MADE = shapes.shapes(1000, 0)


def test_the_same_seed_draws_the_same_and_all_differ(patch):
    patch(shapes, SIZES=dict(train=2000, val=200, test=200))
    data = train.load_data(replace(RECIPE, image_size=32), CPU, None)
    images = torch.cat([images for images, _ in data.values()])
    assert len(images.flatten(1).unique(dim=0)) == 2400, "two are alike"
    for found, again in zip(data["train"], (MADE["images"], MADE["shape"])):
        assert torch.equal(found[:1000], again), "images or labels, drawn again"


def test_the_mask_has_the_outline_of_the_shape():
    art = torch.tensor([[c == "#" for c in line] for line in OUTLINES.split()]).float()
    art, right = art.view(7, 8, 7).movedim(1, 0).flatten(1), torch.zeros(8)
    for mask, shape in zip(MADE["mask"], MADE["shape"]):
        rows, columns = mask[mask.any(dim=1)].float(), mask.any(dim=0)
        box = F.interpolate(rows[None, None, :, columns], (7, 7), mode="area")
        right[shape] += torch.cdist(box.view(1, 49), art).argmin() == shape
    assert (right / MADE["shape"].bincount()).min() > 0.5, f"most look like it: {right}"


def test_the_hue_inside_the_mask_is_the_colour():
    for image, mask, colour in zip(*(MADE[name] for name in ("images", "mask", "colour"))):
        hue = colorsys.rgb_to_hsv(*image[:, mask].median(dim=1).values.tolist())[0]
        off = abs((hue - (colour + 0.5) / 8 + 0.5) % 1 - 0.5)
        assert off < 1 / 16 + 0.02, f"hue {hue:.2f} is not in bin {colour} of 8"


@each("name", ["texture", "background"])
def test_patterns_are_where_they_belong(name):
    """Checks stand out most from the mean around them, then stripes, noise, and plain."""
    images, mask = MADE["images"].amax(dim=1) / 255, MADE["mask"].float()
    contrast = (images[:, 3:-3, 3:-3] / F.avg_pool2d(images, 7, 1) - 1).abs()
    inside = 1 - F.max_pool2d(mask if name == "background" else 1 - mask, 7, 1)
    kinds = [MADE[name] == kind for kind in range(4)]
    found = [(contrast * inside)[kind].sum() / inside[kind].sum() for kind in kinds]
    plain, stripes, checks, noise = found
    assert plain < 0.8 * noise < 0.64 * stripes < 0.52 * checks, f"{found}"


def fill(folder, names, plus=0):
    """Pictures i.bmp of pixels i + plus, in a class for the last bit of i; all of one time."""
    for i in names:
        file = Path(folder, ("cat", "dog")[i % 2], f"{i}.bmp")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (i + plus,) * 3).save(file)
        os.utime(file, (0, 0))


@fixture
def load(call, tmp_path):
    """-> numbers of the images of ./d in train, val and test, after a look at their labels."""
    fill("d/train", range(24))
    fill("d/test", range(100, 124))

    def load(size=16):
        recipe, found = replace(RECIPE, data="d", image_size=size), []
        data = train.load_data(recipe, CPU, tmp_path / "cache")
        for images, labels in (data[split] for split in SPLITS):
            found.append(numbers(images))
            assert labels.tolist() == [i % 2 for i in found[-1]] and images.shape[-1] == size
            images.zero_()  # does not reach the cache
        return found

    return load


def test_a_folder_has_the_order_of_torchvision_shuffled(load):
    """The numbers of all runs depend on it."""
    listed = lab.data.torchvision.datasets.ImageFolder("d/train").imgs
    random.Random(0).shuffle(listed)
    for _ in range(2):  # decoded, then from the cache
        one, val, test = load()
        assert len(val) == 2 and val + one == [int(Path(file).stem) for file, _ in listed]
        assert sorted(test) == [*range(100, 124)] != test


def test_val_is_a_folder_or_held_out(load):
    fill("d/val", range(200, 205))
    assert [*map(sorted, load())] == [[*range(24)], [*range(200, 205)], [*range(100, 124)]]
    os.rename("d/test", "test")
    assert [*map(len, load())] == [22, 2, 5]


def test_what_has_changed_is_decoded_anew(load):
    first = load()
    for file in Path("cache").iterdir():
        os.truncate(file, 9000)
    assert load() == first, "files cut short"
    Image.new("RGB", (20, 16)).save("d/train/cat/2.bmp")
    assert load()[:2] != first[:2], "an image has changed"
    load(size=32)
    assert len(os.listdir("cache")) == 5, "train and test, train anew, both in another size"
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    fill("d/train", range(24), plus=30)
    fill("d/test", range(2))
    assert min(sum(load()[:2], [])) == 30, "a folder of the same name elsewhere"


def test_which_files_count_is_said(load, capsys):
    for folder in (".cache", "cat/.ipynb_checkpoints", ".ipynb_checkpoints"):
        fill(f"d/train/{folder}", range(9))
    for name in ("._0.bmp", "a.txt", "b.GIF", "c"):
        Path("d/train/cat", name).write_bytes(b"")
    for name in ("x.jfif", "deeper/y.JPG"):
        os.makedirs("d/train/cat/deeper", exist_ok=True)
        Image.new("L", (20, 16)).save(f"d/train/cat/{name}", "JPEG")
    assert [*map(len, load())] == [24, 2, 24]
    assert "train: 26 images, 3 other files not used" in capsys.readouterr().out


def test_unreadable_images_are_named(load):
    Image.effect_noise((99, 99), 50).save("d/train/cat/0.jpg")
    os.truncate("d/train/cat/0.jpg", 2000)
    Image.new("I;16", (9, 9)).save("d/train/cat/1.png")
    Image.new("F", (9, 9)).save("d/train/cat/2.tif")
    for _ in range(2):  # nothing half decoded is kept
        with raises(SystemExit, match="3 images cannot") as end:
            load()
        for reason in ("0.jpg: .*truncated", "1.png: .*I;16", "2.tif: .*F"):
            assert re.search(reason, end.value.code), reason
        assert not os.listdir("cache")


def test_a_full_disk_is_named(tmp_path):
    with raises(OSError, match="last.pt"), checkpoints.whole(tmp_path / "last.pt") as aside:
        aside.write_text("half")
        raise OSError(28, "full")
    assert not os.listdir(tmp_path)


def test_too_few_images_and_unknown_classes_are_named(call):
    fill("d/train", range(9))
    fill("d/test", [0, 1])
    assert "8 training images: too few" in call("--data=d"), "one is held out"
    os.rename("d/test/dog", "d/test/horse")
    assert "differ in dog, horse" in call("--data=d")


def test_pictures_become_upright_rgb_on_white(tmp_path):
    grey, turned, clear = Image.linear_gradient("L"), Image.Exif(), Image.new("LA", (256, 256))
    turned[0x112] = 3
    grey.rotate(180).save(tmp_path / "turned.jpg", exif=turned)
    clear.putalpha(grey.rotate(180))  # black, and transparent below
    for mode in ("1", "L", "P", "CMYK"):  # black above
        grey.convert(mode).save(tmp_path / f"{mode}.tif")
    for mode in ("LA", "RGBA"):
        clear.convert(mode).save(tmp_path / f"{mode}.png")
    for file in tmp_path.iterdir():
        found = lab.data.read_image(file, 10).mean(axis=(0, 2))
        assert (found[0], found[9]) == approx((13, 242), abs=20), file.name


def test_cifar_keeps_its_splits_and_labels(call, patch):
    def cifar(root, train, download):
        labels = torch.arange(60) if train else torch.arange(100, 120)
        images = counted(120)[labels].movedim(1, 3).numpy()
        return MagicMock(data=images, targets=labels.tolist(), __len__=lambda _: len(labels))

    patch(lab.data.torchvision.datasets, CIFAR10=cifar)
    data = train.load_data(replace(RECIPE, data="cifar10"), CPU, None)
    one, val, test = labels = [data[s][1].tolist() for s in SPLITS]
    assert [numbers(data[s][0]) for s in SPLITS] == labels
    assert val == torch.randperm(60, generator=seeded())[:6].tolist(), "held out at each time"
    assert sorted(one + val) == [*range(60)] and sorted(test) == [*range(100, 120)]
    patch(lab.data.torchvision.datasets, CIFAR10=Mock(side_effect=OSError))
    assert "cannot be downloaded" in call("--data=cifar10")


def test_fingerprints_differ():
    found = {lab.data.fingerprint(marked()), lab.data.fingerprint(marked())}
    for split, (images, labels) in marked().items():
        for other in ((images + 1, labels), (images, labels + 1)):
            found.add(lab.data.fingerprint(marked() | {split: other}))
    assert len(found) == 7


def test_data_may_move_but_not_change(load, call):
    call("--data=d")
    os.rename("d", "moved")
    assert "random init" in call("--resume --data=moved")
    fill("moved/train", range(26))
    assert "other images" in call("--resume --data=moved")


# ---- Pictures: a sheet is data before it is painted ----------------------------------------------

HELD_OUT = torch.randint(256, (12, 3, 16, 16), generator=seeded()).byte()
IMAGES, STRENGTHS = HELD_OUT[:8] / 255, RECIPE.jitter_strengths


def told(words):
    """The changes [4] of the jitter that words tell, to two digits."""
    found = dict(line.split() for line in words.split("\n") if line[-3:-2] == ".")
    return torch.tensor([float(found.get(name, 0)) for name in iwm.JITTER])


def changed(image, words):
    return iwm.jitter(image[None], IDENTITY + told(words)[None])[0]


def decode(latents):
    return latents.view(-1, 3, 16, 16)


def perfect(order=slice(None)):
    """Its latents are pixels; what it imagines is 0.01 darker, and in another order."""

    def imagine(images, action):
        params = IDENTITY + action[:, :4] * STRENGTHS
        pictures = iwm.jitter(images.expand(len(action), -1, -1, -1), params)
        return model.targets(pictures[order]) - 0.01

    model = small()
    model.targets, model.imagine = lambda images: images.flatten(1)[:, None], imagine
    model.plan = lambda a, b: IDENTITY + (a - 2 * b).mean(dim=(2, 3)) @ torch.ones(3, 4) / 3
    return model


@fixture
def sheets(patch, spy, tmp_path):
    """What is drawn of a perfect run: views, retrieval, plan, strip, and the film's."""
    sheets, data = [], marked() | {"val": (HELD_OUT, None)}
    fit = lambda model, images, *_: pytest.fail("not fitted on train") if images.any() else decode
    patch(pictures, fit_decoder=fit)
    spy(pictures, "paint", lambda sheet, *_, **__: sheets.append(sheet))
    pictures.draw(perfect(), data, tmp_path)
    return sheets


@each("right, order", [(True, [0, 2, 1, 3]), (False, [2, 1, 0, 3])])
def test_only_the_truth_is_framed(right, order):
    sheet = pictures.retrieval(perfect(order), IMAGES, decode, seeded())
    for image, (_, words, imagined, near, truth) in zip(IMAGES, zip(*sheet.values())):
        close(changed(image, words), truth, "the truth, by the words", 0.05)
        close(imagined, near[0] - 0.01, "the nearest to what is imagined, decoded")
        assert (near[1], torch.equal(near[0], truth), "rank 1 of 4" in words) == (right,) * 3


def test_views_hide_what_is_masked(sheets):
    image, source, seen, target, words = sheets[0].values()
    generator = seeded()
    x, y, action = iwm.make_views(IMAGES, RECIPE, generator)
    _, masked = iwm.sample_masks(8, RECIPE, generator)

    for found, expected in ((image, IMAGES), (source, x), (target, y)):
        assert torch.equal(found, expected), "image, source, target"
    hidden = (seen == 0.5)[:, 0, ::8, ::8].flatten(1).nonzero()[:, 1:]
    assert torch.equal(hidden, masked.sort(dim=1)[0]), "grey"
    close(torch.where(seen == 0.5, x, seen), x, "the context shows x")
    for line, a in zip(words, action):
        close(told(line), a[:4] * STRENGTHS, line, 0.006)
        assert [name in line for name in iwm.ACTION[4:]] == a[4:].bool().tolist(), line


def test_the_film_goes_round_without_a_jump(sheets):
    strip, *film = sheets[3:]
    changes, swept = torch.stack([told([*sheet][0]) for sheet in film]), STRENGTHS.clone()
    swept[1:3] = 0  # contrast and saturation
    steps = (changes - changes.roll(1, 0)).abs().amax(dim=0)

    assert torch.equal(torch.stack(strip["image"]), IMAGES[:6]), "six rows of the retrieval"
    assert re.search("-0.30\nto .0.30", film[0]["no change"][0]), "its range in words"
    close(steps, swept / 4, "largest step; one leads from the last to the first", 0.011)
    close(torch.stack([*changes.aminmax(dim=0)]), torch.stack([-swept, swept]), "its range", 0.006)
    for (words, _), *cells in (sheet.items() for sheet in film):
        for image, (_, (imagined, truth)) in zip(IMAGES[:4], cells, strict=True):
            close(truth, changed(image, words), f"the truth of {words}", 0.05)
            close(imagined, truth - 0.01, f"imagined, {words}")


def test_plans_show_what_was_done_and_what_was_found(sheets):
    images, goals, reached, found, done = sheets[2].values()
    params = perfect().plan(IMAGES, goals)

    assert torch.equal(images, IMAGES)
    close(reached, iwm.jitter(IMAGES, params), "reached by what was found")
    close(torch.stack([*map(told, found)]), params - IDENTITY, "what was found, in words", 0.006)
    for image, goal, words in zip(IMAGES, goals, done):
        close(changed(image, words), goal, "what was done, in words", 0.05)


def test_the_decoder_finds_the_pixels_of_targets():
    model, turn = small(), torch.linalg.qr(torch.randn(192, 192, generator=seeded())).Q
    model.targets = lambda images: F.unfold(images, 8, stride=8).mT @ turn + 1
    decode = pictures.fit_decoder(model, noise(200, 16), seeded())
    close(decode(model.targets(IMAGES)), IMAGES, "pixels", 0.1)


def test_paint_and_gif_show_their_cells(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    red, green, blue = torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4)
    page = pictures.paint({"a": [red, (green, True)], "b": ["", (blue, False)]})
    places = [(50, 90), (50, 190), (152, 190), (4, 190), (106, 190), (152, 90)]
    white, limegreen = (255, 255, 255), (50, 205, 50)
    assert [page.getpixel(place) for place in places] == [*colours, limegreen, white, white]

    pictures.save_gif([{"no change": [red]}, {"x": [green]}, {"y": [blue]}], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        found = [frame.convert("RGB").getpixel((60, 120)) for frame in ImageSequence.Iterator(gif)]
        assert found == colours and gif.info["loop"] == 0


def test_a_photograph_of_ones_own(call, spy):
    sheets, fitted = [], []
    spy(pictures, "paint", lambda sheet, *_, **__: sheets.append(sheet))
    spy(pictures, "fit_decoder", lambda model, *_: fitted.append(model.encoder.embed.weight))
    torch.save({"config": asdict(RECIPE), "model": small().state_dict()}, "last.pt")
    Image.new("RGB", (20, 50), (50, 50, 50)).save("portrait.png")
    Image.new("L", (1, 1), 51).save("tiny.png")
    Path("none.png").write_text("no image")
    call("portrait.png", pictures)
    call("tiny.png portrait.png --out=there", pictures)
    found = sheets[4]["image 1"][1], sheets[-1]["image"][0], sheets[-1]["goal"][0]

    close([255 * x.mean() for x in found], [50, 51, 50], "in the film, from one to the other", 0.1)
    assert torch.equal(*fitted, small().encoder.embed.weight), "of the checkpoint"
    assert os.listdir("there") == ["plan.png"] and Path("runs/photo-portrait/imagine.gif").exists()
    assert "none.png cannot be read" in call("none.png", pictures)
