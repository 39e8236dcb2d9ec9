"""Learn an image world model, measure it and show it.

    python train.py                                # images it draws itself: no download needed
    python train.py --data cifar10                 # downloads through torchvision
    python train.py --data path/to/folder          # train/CLASS/*.jpg and test/CLASS/*.jpg
    python train.py --conditioning none            # an ablation is one flag
    python train.py --out runs/shapes --resume     # go on with a run that was stopped
    python train.py --measure runs/shapes/last.pt  # measure and draw a checkpoint
    python train.py --table runs/*                 # finished runs, over their seeds
    torchrun --nproc_per_node=2 train.py           # several devices share the batch

A run folder holds config.json, metrics.jsonl (held-out images), result.json (test images, read once
at the end), last.pt, views.png, retrieval.png (its top: strip.png), plan.png and curves.png.
"""

import argparse
import ctypes
import functools
import hashlib
import json
import math
import os
import random
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

import iwm
from iwm import IDENTITY, IWM, JITTER, setting

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, and by nothing else
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # this process ...
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1  # ... of so many; only rank 0 writes
QUIET = dict(mininterval=0.1 if sys.stderr.isatty() else 30)  # seconds between lines of a log file


# ---- Recipe: the method's settings, and how it is trained ----------------------------------------


@dataclass
class Recipe(iwm.Config):
    """Every setting of a run; the command line is made from it."""

    data: str = setting("shapes", "shapes | cifar10 | cifar100 | a folder with train/ and test/")
    # optimisation; deviation: fitted to runs of a few thousand steps
    steps: int = setting(2400, "optimiser steps", 1)
    batch_size: int = setting(64, "images a step", 1)
    lr: float = setting(1e-3, "peak learning rate; lower it if RankMe falls to 1", 1e-12, 100)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", 0, 1)
    weight_decay: float = setting(0.04, "of AdamW at the start, not on biases and norms", 0, 100)
    weight_decay_end: float = setting(0.4, "at the end, reached along a cosine", 0, 100)
    ema: float = setting(0.995, "teacher's first momentum, rises linearly to 1", 0, 1)
    seed: int = setting(0, "of weights, data order, views and masks", 0, 10**9 - 1)
    # measuring: short runs measure less often and on fewer images
    measurements: int = setting(4, "how often a long run measures itself", 1)
    mrr_images: int = setting(
        32, "test images that MRR averages over, a share of them in short runs", 1, 500
    )
    # machine
    bf16: bool = setting(True, "compute in bfloat16 where the device has it")
    compile: bool = setting(False, "torch.compile the networks: a slow start, faster steps")

    @property
    def effort(self) -> float:
        """Share of a full measurement that a run of so many steps is worth."""
        return min(1.0, max(0.1, self.steps / 2400))


# deviation: hide little and take the loss at all patches, for a better world model
LESS = dict(block_min=0.04, block_max=0.06, context=0.82, predict_all=True)
# deviation: small models see colour change three times as much, to learn their action in minutes;
# their predictor is nearly the encoder's size
SMALL = dict(
    image_size=32, patch=4, width=128, depth=4, heads=4, pred_width=96, pred_depth=6,
    saturation=0.6, hue=0.3,
)  # fmt: skip
PRESETS = {
    # four rectangles hide 12 of 64 patches; 16 minutes of two CPU cores, MRR 0.88
    "shapes": Recipe(**SMALL, **LESS),
    # one hides 6 of them; 5 minutes of a GPU, MRR 0.88
    "cifar": Recipe(
        **SMALL, blocks=1, block_min=0.09, block_max=0.11, context=0.91, predict_all=True,
        data="cifar10", steps=14_000, batch_size=32,
    ),
    # 70 minutes of a GPU; 2,000 steps of 128 have MRR 0.72, never trained to its end
    "imagenet100": Recipe(
        **LESS, data="", image_size=160, width=384, depth=12, heads=6, pred_width=192,
        pred_depth=12, steps=100_000, batch_size=256, ema=0.996,
    ),
    # the paper's masks and loss; timed on a GPU, never trained
    "paper": Recipe(data="", steps=375_000, batch_size=1024, warmup=40 / 300, ema=0.996),
}  # fmt: skip


# ---- Data: train is trained on, val (held-out training images) serves every choice, test is read
# ---- once at the end. Each is uint8 images [n, 3, S, S] and int64 labels [n] ---------------------

SHAPES_IMAGES = {"train": 20_000, "val": 2_000, "test": 2_000}  # a split's position is its seed


def shapes(n: int, seed: int, size: int = 32) -> dict[str, Tensor]:
    """Objects on textured, lit backgrounds: coloured, turned, shifted and scaled at random.

    Returns images [n, 3, size, size] uint8 and what they were made from, each [n] int64: shape (8),
    colour (8 bins of hue), texture and background (4); and the object's mask [n, size, size] bool.
    """
    chunks = [_shapes(min(1000, n - i), seed * 1_000_003 + i, size) for i in range(0, n, 1000)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _shapes(n: int, seed: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    def choose(kinds, options):  # [n], list of [n, size, size] -> [n, size, size]
        return torch.stack(options, dim=1)[torch.arange(n), kinds]

    def paint(hue, saturation, value):  # -> [n, 3, 1, 1]
        faint = value * (1 - saturation)
        return iwm.shift_hue(torch.stack([value, faint, faint], dim=1), hue)

    def pattern(kinds):  # lightness of a texture in -1..1
        turn, phase, pitch = uniform(0, math.pi), uniform(0, 2 * math.pi), uniform(4, 7)
        wave = torch.sin(pitch * (x * turn.cos() + y * turn.sin()) + phase)
        across = torch.sin(pitch * (y * turn.cos() - x * turn.sin()))
        noise = torch.randn(n, 1, 6, 6, generator=generator)
        noise = F.interpolate(noise, (size, size), mode="bilinear")[:, 0]
        options = [0 * wave, 3 * wave, 4 * wave * across, noise]  # plain, stripes, checks, noise
        return choose(kinds, [option.clamp(-1, 1) for option in options])

    def ramp():  # -1..1 across the image in a random direction
        turn = uniform(0, 2 * math.pi)
        return (x * turn.cos() + y * turn.sin()) / math.sqrt(2)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shape = torch.randint(8, (n,), generator=generator)
    texture, background = torch.randint(4, (2, n), generator=generator)

    # the object in its own coordinates (u, v); each function is positive inside
    radius, turn = uniform(0.55, 0.8), uniform(-0.3, 0.3)
    dx, dy = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)
    u = (dx * turn.cos() + dy * turn.sin()) / radius
    v = (dy * turn.cos() - dx * turn.sin()) / radius
    r, angle = (u * u + v * v).sqrt(), torch.atan2(v, u)
    box, thin = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    inside = {
        "disc": 0.85 - r,
        "square": 0.78 - box,
        "triangle": 0.5 - torch.stack([v, 0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v]).amax(dim=0),
        "star": 0.72 + 0.27 * torch.cos(5 * angle) - r,
        "ring": 0.24 - (r - 0.74).abs(),
        "cross": torch.minimum(0.92 - box, 0.3 - thin),
        "crescent": torch.minimum(0.95 - r, ((u - 0.45) ** 2 + v * v).sqrt() - 0.68),
        "heart": 0.56 * (1 - (1.05 * u) ** 2 - (1.2 * (0.1 - v) - 0.75 * u.abs().sqrt()) ** 2),
    }
    edge = choose(shape, list(inside.values())) * radius * size / 2
    mask = (edge + 0.5).clamp(0, 1)  # soft edges

    hue = uniform(0, 1)
    thing = paint(hue, uniform(0.4, 0.9), uniform(0.5, 1))
    thing = thing * (1 + 0.2 * pattern(texture)).unsqueeze(1)
    one, other = (paint(uniform(0, 1), uniform(0.05, 0.4), uniform(0.1, 0.75)) for _ in range(2))
    scene = torch.lerp(one, other, (0.5 + 0.5 * ramp()).unsqueeze(1))
    scene = scene * (1 + 0.15 * pattern(background)).unsqueeze(1)
    light = 1 + uniform(0, 0.6) * ramp()
    images = torch.lerp(scene, thing, mask.unsqueeze(1)) * light.unsqueeze(1)
    images = (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return {
        "images": (255 * images).round().byte(), "mask": mask > 0.5, "shape": shape,
        "colour": (8 * hue.flatten()).long(), "texture": texture, "background": background,
    }  # fmt: skip


def read_image(file: str, size: int) -> np.ndarray | None:
    """The middle square of an image, upright, RGB [3, size, size] uint8; None if it is damaged."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return np.array(image).transpose(2, 0, 1)
    except Exception:  # foreign bytes can raise anything
        return None


def read_folder(folder: Path, size: int, cache: Path) -> tuple[Tensor, Tensor, list[str]]:
    """folder/CLASS/**/* -> images [n, 3, size, size] uint8, labels [n] int64, names of classes.

    The order is fixed. Decoded once into a memory-mapped .npy in `cache`.
    """
    listed = torchvision.datasets.ImageFolder(folder.resolve())
    random.Random(0).shuffle(listed.samples)  # so that any part of them has all classes
    files, labels = zip(*listed.samples)
    key = json.dumps([[(f, os.stat(f).st_size, os.stat(f).st_mtime) for f in files], size])
    decoded = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"

    def decode(aside):
        pixels = np.lib.format.open_memmap(aside, "w+", np.uint8, (len(files), 3, size, size))
        damaged = []
        with ThreadPool() as threads:
            read = threads.imap(functools.partial(read_image, size=size), files)
            read = tqdm(read, f"decoding {folder}, once", len(files), leave=False, **QUIET)
            for i, image in enumerate(read):
                if image is None:
                    damaged.append(files[i])
                else:
                    pixels[i] = image
        if damaged:
            sys.exit(f"{len(damaged)} images are damaged: remove {', '.join(damaged)}")

    if not decoded.exists():
        write_whole(decoded, decode)
    pixels = np.load(decoded, mmap_mode="c")
    return torch.from_numpy(pixels), torch.tensor(labels), listed.classes


def read_folders(root: Path, size: int, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """train/, test/ (or val/) and, where there are all three, val/ as the held-out images."""
    folders = {split: root / split for split in ("train", "val", "test") if (root / split).is_dir()}
    if "test" not in folders and "val" in folders:
        folders["test"] = folders.pop("val")
    if not {"train", "test"} <= set(folders):
        sys.exit(f"data '{root}' is neither shapes, cifar10, cifar100 nor a folder that holds "
                 "train/CLASS/ and test/CLASS/ (or val/CLASS/)")  # fmt: skip
    data, known = {}, []
    for split, folder in folders.items():
        *data[split], classes = read_folder(folder, size, cache)
        known = known or classes
        if classes != known:
            differ = ", ".join(sorted({*classes} ^ {*known}))
            sys.exit(f"{folders['train']} and {folder} differ in the classes {differ}")
    return data


def read_cifar(name: str, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """CIFAR-10 or -100 through torchvision, under ./data."""
    data = {}
    for split in ("train", "test"):
        try:
            dataset = getattr(torchvision.datasets, name.upper())
            found = dataset("data", split == "train", download=True)
        except (OSError, RuntimeError) as error:
            sys.exit(f"{name} is not whole in ./data, and cannot be downloaded ({error}): "
                     "try --data shapes or a folder of images")  # fmt: skip
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)[order]
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        data[split] = images.contiguous(), torch.tensor(found.targets)[order]
    return data


def load_data(recipe: Recipe, device, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train" | "val" | "test": (images [n, 3, S, S] uint8, labels [n] int64)}.

    On a GPU when they fit into half of its free memory; else they stay, and `batches` copies.
    """
    if recipe.data == "shapes":
        data = {}
        for seed, (split, n) in enumerate(SHAPES_IMAGES.items()):
            made = shapes(n, seed, recipe.image_size)
            data[split] = made["images"], made["shape"]
    elif recipe.data in ("cifar10", "cifar100"):
        data = read_cifar(recipe.data, recipe.image_size)
    else:
        data = read_folders(Path(recipe.data), recipe.image_size, cache)
    if "val" not in data:  # hold out a tenth of the training images, the same for every seed
        images, labels = data["train"]
        n = min(len(labels) // 10, 5000)
        data |= {"val": (images[:n], labels[:n]), "train": (images[n:], labels[n:])}
    n, least = len(data["train"][1]), max(recipe.batch_size, 9)
    if n < least or not len(data["val"][1]):
        sys.exit(f"{recipe.data} has {n} training images, fewer than {least} (see --batch-size)")
    size = sum(images.nbytes for images, _ in data.values())
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
        data = {s: (images.to(device), labels.to(device)) for s, (images, labels) in data.items()}
    return data


def batches(images: Tensor, recipe: Recipe, start: int, device):
    """The uint8 images of each step from `start` on, on the device; they follow from (seed, step).

    The next batch is gathered and copied by a background thread while a step runs.
    """
    B, per_epoch = recipe.batch_size, len(images) // recipe.batch_size

    def gather(step):
        epoch, i = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(recipe.seed * 10**8 + epoch)
        order = torch.randperm(len(images), generator=generator)
        mine = order[i * B :][:B][RANK::WORLD]
        return images[mine.to(images.device)].to(device)

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(gather, start)
        for step in range(start, recipe.steps):
            now, following = following.result(), thread.submit(gather, step + 1)
            yield now


def to_float(images: Tensor, device=None) -> Tensor:
    """uint8 0..255 -> float 0..1, on the device."""
    return images.to(device).float() / 255


# ---- Measures and pictures -----------------------------------------------------------------------


def bf16(recipe: Recipe, device: torch.device) -> bool:
    """Wanted, and the device has instructions for it: emulated, a step takes far longer."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # a torch that cannot tell: float32
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return recipe.bf16 and native


def autocast(recipe: Recipe, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16(recipe, device))


@torch.no_grad()
def measure(model: IWM, data: dict, split: str, mrr_images: int, probe_images: int) -> dict:
    """MRR, components and planning on clean images of a split; probes on more of them.

    The probes read the teacher's mean-pooled latents and are fitted on training images.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)

    def pooled(part_of):
        images, labels = (part[:probe_images] for part in data[part_of])
        parts = [model.teacher(to_float(part, device)).float() for part in images.split(250)]
        return torch.cat([part.mean(dim=1) for part in parts]), labels.to(device)

    images = to_float(data[split][0][:500], device)
    with autocast(model.config, device), torch.compiler.set_stance("force_eager"):
        clean = images[:mrr_images]
        result = iwm.measure_mrr(model, clean, generator) | iwm.measure_components(model, clean)
        result |= iwm.measure_planning(model, clean, generator)
        result["target_std"] = model.targets(images).std(dim=(0, 1)).mean().item()
        known, asked = pooled("train"), pooled(split)
    result["rankme"] = iwm.rankme(asked[0])
    result["knn"] = iwm.knn_accuracy(*known, *asked)
    return result | {"linear": iwm.linear_accuracy(*known, *asked)}


@torch.no_grad()
def fit_decoder(model: IWM, images: Tensor):
    """A linear map from each target to the pixels of its patch, to look at latents.

    Ridge regression on jittered images [n, 3, S, S] in 0..1; the predictor plays no part in it.
    Returns a function: latents [B, N, D] -> images [B, 3, S, S].
    """
    c, generator = model.config, torch.Generator(images.device).manual_seed(0)
    patches = dict(h=c.grid, p=c.patch, q=c.patch)
    images = iwm.jitter(images, iwm.jitter_params(len(images), c, generator, images.device))
    h = F.pad(model.targets(images), (0, 1), value=1.0).flatten(0, 1).cpu().double()
    pixels = rearrange(images.cpu().double(), "b c (h p) (w q) -> (b h w) (c p q)", **patches)
    ridge = 1e-3 * len(images) * torch.eye(h.shape[1]).double()
    weights = torch.linalg.solve(h.T @ h + ridge, h.T @ pixels).to(images)

    def decode(h):
        pixels = F.pad(h.float(), (0, 1), value=1.0) @ weights
        return rearrange(pixels, "b (h w) (c p q) -> b c (h p) (w q)", **patches)

    return decode


def in_words(changes: Tensor, flags=()) -> str:
    """Non-zero jitter changes [4] and destructive flags, one a line."""
    words = [f"{name} {c:+.2f}" for name, c in zip(JITTER, changes) if c.abs() > 0.005]
    words += [f"x: {name}" for name, flag in zip(iwm.ACTION[len(JITTER) :], flags) if flag]
    return "\n".join(words) or "no change"


def sheet(rows: list, path: Path):
    """Draw a row of headings, then rows of texts, images [3, S, S] in 0..1 and (image, framed)."""
    page = Image.new("RGB", (102 * max(map(len, rows)) + 6, 102 * len(rows) - 60), "white")
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            left, top = 102 * j + 6, max(102 * i - 60, 6)  # tiles of 96 pixels, headings of 30
            if isinstance(cell, str):
                draw.text((left, top), cell, fill="black")
                continue
            image, framed = cell if isinstance(cell, tuple) else (cell, False)
            picture = TF.to_pil_image(image.float().clamp(0, 1).cpu())
            page.paste(picture.resize((96, 96), Image.Resampling.NEAREST), (left, top))
            if framed:
                box = (left - 2, top - 2, left + 97, top + 97)
                draw.rectangle(box, outline="limegreen", width=3)
    write_whole(path, lambda aside: page.save(aside, format="PNG"))


def draw_views(images: Tensor, recipe: Recipe, path: Path):
    """image | source | source's context | target | the action, of images [B, 3, S, S] in 0..1."""
    generator, device, g = torch.Generator(images.device).manual_seed(0), images.device, recipe.grid
    source, target, action = iwm.make_views(images, recipe, generator)
    context, _ = iwm.sample_masks(len(images), g, recipe, generator, device)
    seen = torch.zeros(len(images), g * g, device=device).scatter_(1, context, 1)
    seen = F.interpolate(seen.view(-1, 1, g, g), scale_factor=recipe.patch)  # [B, 1, S, S]
    visible = source * seen + 0.5 * (1 - seen)
    changes = (action[:, : len(JITTER)] * recipe.jitter_strengths.to(device)).cpu()
    words = [in_words(c, a[len(JITTER) :]) for c, a in zip(changes, action)]
    head = ["image", "source x", "context of x", "target y", "action x -> y"]
    sheet([head, *zip(images, source, visible, target, words)], path)


def draw_retrieval(model: IWM, images: Tensor, decode, path: Path):
    """image | action | what is imagined, decoded | nearest of the bank | truth; then sweeps."""
    config, generator = model.config, torch.Generator(images.device).manual_seed(1)
    rows = [["image", "action", "imagined,\ndecoded", "nearest\nin the bank", "truth"]]
    for image in images.split(1):
        # the first is the action shown; the others are its rivals in the bank
        params = iwm.jitter_params(config.bank, config, generator, image.device, always=True)
        pictures, bank, imagined = iwm.variants(model, image, params)
        nearest = int((bank - imagined[:1]).flatten(1).norm(dim=1).argmin())
        rank = iwm.ranks(imagined, bank)[0].item()
        words = in_words(params[0].cpu() - IDENTITY) + f"\n\nrank {rank:g} of {config.bank}"
        found = pictures[nearest], nearest == 0
        rows.append([image[0], words, decode(imagined[:1])[0], found, pictures[0]])
    sheet(rows[:7], path.with_name("strip.png"))
    for i, name in enumerate(JITTER):
        sweep = iwm.sweep_params(i, config, n=9)
        pictures, _, imagined = iwm.variants(model, images[:1], sweep)
        low, high = (sweep[[0, -1], i] - IDENTITY[i]).tolist()
        label = f"{name},\n{low:+.2f} to {high:+.2f}"
        rows += [[label, *pictures], ["imagined,\ndecoded", *decode(imagined)]]
    sheet(rows, path)


def draw_plan(model: IWM, images: Tensor, path: Path):
    """image | goal | what the found action makes of the image | both actions in words."""
    config, generator = model.config, torch.Generator(images.device).manual_seed(2)
    params = iwm.jitter_params(len(images), config, generator, images.device, always=True)
    goals = iwm.jitter(images, params)
    found = model.plan(images, goals)
    reached = iwm.jitter(images, found)
    words = [[in_words(p - IDENTITY) for p in actions.cpu()] for actions in (found, params)]
    head = ["image", "goal", "reached", "action found", "true action"]
    sheet([head, *zip(images, goals, reached, *words)], path)


@torch.no_grad()
def draw(model: IWM, data: dict, out: Path):
    """All pictures of a run folder, of the first eight held-out images: uncurated."""
    device = next(model.parameters()).device
    images = to_float(data["val"][0][:8], device)
    draw_views(images, model.config, out / "views.png")
    with autocast(model.config, device), torch.compiler.set_stance("force_eager"):
        decode = fit_decoder(model, to_float(data["train"][0][:500], device))
        draw_retrieval(model, images, decode, out / "retrieval.png")
        draw_plan(model, images, out / "plan.png")


def draw_curves(metrics: list[dict], path: Path):
    try:
        import matplotlib.figure
    except ImportError:  # an optional extra
        return
    errors = " ".join(f"error_{name}" for name in JITTER)
    panels = "loss", "target_std", "rankme", "mrr chance plan_left", "knn linear", errors
    figure = matplotlib.figure.Figure(figsize=(12, 6), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, panels):
        for name in panel.split():
            axis.plot([m["images"] for m in metrics], [m[name] for m in metrics], ".-", label=name)
        axis.set(xlabel="images seen", ylim=(0, None))
        axis.legend()
    write_whole(path, lambda aside: figure.savefig(aside, dpi=80, format="png"))


# ---- The run folder and the command line ---------------------------------------------------------


def write_whole(path: Path, write):
    """Write aside, then rename: nobody ever sees half a file; a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def parse(argv=None) -> tuple[argparse.Namespace, dict]:
    """Command line -> the options, and the settings of Recipe that were given."""
    wide = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=120)
    text = f"{__doc__}\nIn brackets: the value in the preset shapes."
    parser = argparse.ArgumentParser(description=text, formatter_class=wide)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="where to start from (default: what suits --data)")
    add("--out", type=Path, help="run folder (default: runs/ + preset + the flags that differ)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--measure", type=Path, metavar="CHECKPOINT", help="measure it, draw it, train nothing")
    add("--table", type=Path, nargs="+", metavar="RUN", help="print a table of finished runs")
    for f in fields(Recipe):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help = f"{f.metadata['help']} ({getattr(PRESETS['shapes'], f.name)})"
        add(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, help=help, **kind)
    parser.error = lambda message: sys.exit(f"{message}; see --help")  # not the list of all flags
    args = parser.parse_args(argv)
    return args, {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}


def change(recipe: Recipe, given: dict) -> Recipe:
    """The recipe with the given settings; one line if one of them is out of its range."""
    try:
        return replace(recipe, **given)
    except ValueError as error:
        sys.exit(f"{error}")


def choose_recipe(args, given: dict) -> tuple[Recipe, Path]:
    """The preset with the given settings, or the recipe of the run to go on with; its folder."""
    usual = {"shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar"}
    data = given.get("data", "shapes")
    preset = args.preset or usual.get(data, "imagenet100")  # any other data is a folder
    recipe = PRESETS[preset]
    changed = [f"{n}={Path(str(v)).name}" for n, v in given.items() if v != getattr(recipe, n)]
    out = args.out or Path("runs") / ",".join([preset, *changed])[:200]
    stored = out / "config.json"
    if not stored.exists():
        return change(recipe, given), out
    if not args.resume:
        sys.exit(f"{out} holds a run already: add --resume to go on, or choose another --out")
    recipe = Recipe(**json.loads(stored.read_text()))
    wanted = (asdict(PRESETS[preset]) if args.preset else {}) | given
    differs = [f"{n} was {getattr(recipe, n)}, now {v}" for n, v in wanted.items()
               if n != "data" and v != getattr(recipe, n)]  # fmt: skip
    if differs:
        sys.exit(f"{out} cannot go on with other settings: {'; '.join(differs)}")
    return replace(recipe, data=given.get("data", recipe.data)), out  # data may have moved


def set_up(name: str | None, shared: bool = False) -> torch.device:
    """The device; the processes, if they may share a batch; a heap that keeps what is freed."""
    if LAUNCHED and not shared:
        sys.exit("this runs on one device: start it without torchrun")
    torch.set_float32_matmul_precision("high")
    if sys.platform == "linux":  # glibc: a tenth of a CPU's step
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    name = name or there[0]
    if name.split(":")[0] not in there:
        sys.exit(f"device {name} is not here: choose {' or '.join(there)}")
    if LAUNCHED:
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        dist.init_process_group("nccl" if "cuda" in name else "gloo", timeout=timedelta(days=1))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    return torch.device(name)


def read_checkpoint(path: Path | str, device) -> dict:
    """What `save` wrote. Read with weights_only: nothing in it is run."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        sys.exit(f"{path} does not exist: name a run's folder or its last.pt")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return state | {"config": Recipe(**state["config"])}
    except Exception as error:  # foreign bytes can raise anything
        sys.exit(f"{path} is no checkpoint of train.py ({type(error).__name__})")


def load_checkpoint(path: Path | str, device) -> IWM:
    """A checkpoint of train.py -> IWM, frozen."""
    state = read_checkpoint(path, device)
    model = IWM(state["config"]).to(device)
    model.load_state_dict(state["model"])
    return model.requires_grad_(False)


def mean_std(values: list[float], digits: int = 1) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(folders: list[Path]) -> str:
    """Markdown. A run's name without its seed is its row: mean and deviation over the seeds."""
    rows: dict[str, list] = {}
    for folder in folders:
        if (folder / "result.json").exists():
            name = re.sub(r",?seed=\d+", "", folder.name)
            rows.setdefault(name, []).append(json.loads((folder / "result.json").read_text()))
        elif folder.name != "cache":
            print(f"{folder} is no finished run: left out", file=sys.stderr)
    if not rows:
        sys.exit("--table found no finished run")
    names = ("mrr", "hit1", "plan_left", "knn", "linear")
    lines = [f"| run | seeds | {' | '.join(names)} | minutes |", "|---" * (len(names) + 3) + "|"]
    for row, runs in rows.items():
        cells = [mean_std([run["trained"].get(n, math.nan) for run in runs], 3) for n in names]
        minutes = mean_std([(run["seconds"] or 0) / 60 for run in runs], 0)
        lines.append(f"| {' | '.join([row, str(len(runs)), *cells, minutes])} |")
    return "\n".join(lines)


def peak_memory(device) -> float | None:
    """Most memory held so far on a GPU, in GiB."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def report(model: IWM, data: dict, out: Path, seconds: float | None = None):
    """The last table: this network and a randomly initialised one on the test images."""
    recipe, device = model.config, next(model.parameters()).device
    mrr, probes = math.ceil(recipe.effort * recipe.mrr_images), math.ceil(recipe.effort * 10_000)
    few = math.ceil(mrr / 8)
    print(f"measuring on test images (MRR and planning: {mrr}, untrained: {few}) ...")
    torch.manual_seed(recipe.seed)
    trained = measure(model, data, "test", mrr, probes)
    untrained = measure(IWM(recipe).to(device), data, "test", few, probes)
    used = asdict(recipe) | {"bf16": bf16(recipe, device)}
    result = {"trained": trained, "random": untrained, "config": used}
    result |= {"seconds": seconds, "memory_gib": peak_memory(device)}
    write_whole(out / "result.json", lambda aside: aside.write_text(json.dumps(result, indent=1)))
    by_class = 1 / (int(data["train"][1].max()) + 1)
    chance = dict(mrr=iwm.chance(recipe.bank), hit1=1 / recipe.bank, plan_left=1)
    chance |= dict(knn=by_class, linear=by_class)
    print(f"\n{'test images':12} {'this run':>9} {'random init':>12} {'chance':>8}")
    for name, by_chance in chance.items():
        print(f"{name:12} {trained[name]:9.4f} {untrained[name]:12.4f} {by_chance:8.4f}")
    print(f"\nsee {out}" if seconds is None else f"\n{seconds / 60:.1f} minutes; see {out}")


def measure_checkpoint(args, given: dict, device):
    """--measure: the pictures and the last table of a checkpoint, on the data given."""
    model = load_checkpoint(args.measure, device)
    model.config = change(model.config, given)
    path = args.measure.resolve()
    name = path.parent.name if path.stem == "last" else path.stem
    out = args.out or Path("runs") / f"measured-{name}"
    data = load_data(replace(model.config, batch_size=1), device, out.parent / "cache")
    draw(model, data, out)
    report(model, data, out)


# ---- Training ------------------------------------------------------------------------------------


def schedule(step: int, recipe: Recipe) -> tuple[float, float, float]:
    """Learning rate (linear warm-up, cosine to 1e-6), weight decay (cosine), EMA (linear to 1)."""
    warmup, done = recipe.warmup * recipe.steps, step / recipe.steps

    def cosine(first, last, share):
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))

    lr = cosine(recipe.lr, 1e-6, max(step - warmup, 0) / max(recipe.steps - warmup, 1))
    if step + 1 < warmup:
        lr = recipe.lr * (step + 1) / warmup
    weight_decay = cosine(recipe.weight_decay, recipe.weight_decay_end, done)
    return lr, weight_decay, recipe.ema + (1 - recipe.ema) * done


def make_optimizer(model: IWM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay not on biases and 1-D weights (I-JEPA). deviation: beta2 is 0.95."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in named if p.ndim <= 1 or name.endswith("bias")]
    groups: list[dict] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def train_step(model, optimizer, images: Tensor, step: int, recipe: Recipe, generator) -> Tensor:
    """One step on uint8 images [B, 3, S, S] -> its loss, left on the device."""
    # everything random follows from (seed, step): a resumed run repeats what it would have been;
    # no two of (rank, seed, step) meet
    generator.manual_seed(recipe.seed * 10**8 + step + RANK * 10**17)
    with autocast(recipe, images.device):
        loss = model(to_float(images), generator)
    loss.backward()
    lr, weight_decay, momentum = schedule(step, recipe)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    getattr(model, "module", model).update_teacher(momentum)
    return loss.detach()


def save(out: Path, model: IWM, optimizer, log: dict):
    """last.pt: all that --resume needs; metrics.jsonl."""
    state = {"config": asdict(model.config), "model": model.state_dict()}
    state |= {"optimizer": optimizer.state_dict()} | log
    write_whole(out / "last.pt", lambda aside: torch.save(state, aside))
    lines = "".join(json.dumps(m) + "\n" for m in log["metrics"])
    write_whole(out / "metrics.jsonl", lambda aside: aside.write_text(lines))


def record(out: Path, model: IWM, optimizer, log: dict, data: dict):
    """Measure on held-out images, append it to the log and save."""
    recipe, step = model.config, log["step"]
    loss = statistics.mean(log["losses"]) if log["losses"] else None
    now = dict(step=step, images=step * recipe.batch_size, seconds=log["seconds"], loss=loss)
    sizes = math.ceil(recipe.effort * recipe.mrr_images / 8), math.ceil(recipe.effort * 2000)
    now |= measure(model, data, "val", *sizes)
    now["memory_gib"] = peak_memory(next(model.parameters()).device)
    if step and now["rankme"] < 2:
        tqdm.write("RankMe is below 2: collapsed, lower --lr or raise --ema", file=sys.stderr)
    log["metrics"].append(now)
    log["losses"] = []
    save(out, model, optimizer, log)
    draw_curves(log["metrics"], out / "curves.png")


def main():
    args, given = parse()
    if args.table:
        return print(table(args.table))
    device = set_up(args.device, shared=not args.measure)
    if args.measure:
        return measure_checkpoint(args, given, device)

    # data
    recipe, out = choose_recipe(args, given)
    if recipe.batch_size % WORLD:
        sys.exit(f"batch_size {recipe.batch_size} must be a multiple of the {WORLD} processes")
    if RANK > 0:
        dist.barrier()  # rank 0 downloads or decodes first, the others find it done
    data = load_data(recipe, device, out.parent / "cache")
    if LAUNCHED and RANK == 0:
        dist.barrier()  # now the others may

    # model
    torch.manual_seed(recipe.seed)
    model = IWM(recipe).to(device)
    optimizer = make_optimizer(model, recipe)
    log = {"step": 0, "seconds": 0.0, "losses": [], "metrics": []}
    if args.resume and (out / "last.pt").exists():
        state = read_checkpoint(out, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = {name: state[name] for name in log}
    if recipe.compile:
        for part in (model.encoder, model.teacher, model.predictor):  # CUDA graphs on a GPU
            part.compile(mode="reduce-overhead" if device.type == "cuda" else "default")
    step_model = nn.parallel.DistributedDataParallel(model) if LAUNCHED else model
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor)]
    print(f"{out}: encoder {sizes[0]:,} and predictor {sizes[1]:,} parameters, "
          f"{len(data['train'][1])} training images, {WORLD} x {device}, "
          f"bfloat16 {bf16(recipe, device)}, from step {log['step']}")  # fmt: skip
    began, saved, running = time.monotonic() - log["seconds"], time.monotonic(), []
    if RANK == 0:
        text = json.dumps(asdict(recipe), indent=1)
        write_whole(out / "config.json", lambda aside: aside.write_text(text))
    if RANK == 0 and not log["metrics"]:
        record(out, model, optimizer, log, data)

    # the loop: a step, and now and then a look at the loss, a save or a measurement
    generator = torch.Generator(device)
    times = math.ceil(recipe.effort * recipe.measurements)
    bar = tqdm(total=recipe.steps, initial=log["step"], disable=RANK > 0, **QUIET)
    for images in batches(data["train"][0], recipe, log["step"], device):
        loss = train_step(step_model, optimizer, images, log["step"], recipe, generator)
        running.append(loss)
        log["step"] += 1
        bar.update()
        # due: this step completes another 1 / times of the run
        due = log["step"] * times // recipe.steps > (log["step"] - 1) * times // recipe.steps
        late = time.monotonic() - saved > 120
        if len(running) < 20 and not due and not late:
            continue
        log["losses"] += torch.stack(running).tolist()  # only here the host waits for the device
        running, log["seconds"] = [], time.monotonic() - began
        bar.set_postfix(loss=f"{log['losses'][-1]:.3f}", refresh=False)
        if not math.isfinite(log["losses"][-1]):
            sys.exit(f"the loss is not finite at step {log['step']}: lower --lr")
        if RANK == 0 and due:
            record(out, model, optimizer, log, data)
        elif RANK == 0 and late:
            save(out, model, optimizer, log)
        saved = time.monotonic() if due or late else saved
    bar.close()

    if RANK == 0:
        draw(model, data, out)
        report(model, data, out, log["seconds"])
    if LAUNCHED:  # processes end together
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the same command with --resume goes on, two minutes back at most")
    except OSError as error:  # of the disk or the network: a full disk, a folder without access
        sys.exit(f"{error}")
