"""Data: train is trained on, val (held-out training images) serves every choice, test is read
once at the end. Each is uint8 images [n, 3, S, S] and int64 labels [n]."""

import functools
import hashlib
import json
import math
import os
import random
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import iwm
from lab.machine import QUIET, whole

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


def load_shapes(size: int) -> dict[str, dict[str, Tensor]]:
    """{"train" | "val" | "test": what `shapes` gives, and "segment"}.

    segment is the class of each pixel, [n, size, size] int64: 0 is background, then the shapes.
    """
    splits = {s: shapes(n, seed, size) for seed, (s, n) in enumerate(SHAPES_IMAGES.items())}
    for made in splits.values():
        made["segment"] = made["mask"] * (made["shape"] + 1)[:, None, None]
    return splits


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

    if not decoded.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with whole(decoded) as aside:
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


def load_data(recipe, device, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train" | "val" | "test": (images [n, 3, S, S] uint8, labels [n] int64)}.

    On a GPU when they fit into half of its free memory; else they stay, and `batches` copies.
    """
    if recipe.data == "shapes":
        made = load_shapes(recipe.image_size)
        data = {split: (of["images"], of["shape"]) for split, of in made.items()}
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


def to_float(images: Tensor, device=None) -> Tensor:
    """uint8 0..255 -> float 0..1, on the device."""
    return images.to(device).float() / 255


def fingerprint(data: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Tells data sets apart: a hash of all labels and of some images of each split."""
    found = hashlib.sha256()
    for images, labels in data.values():
        found.update(labels.cpu().numpy().tobytes())
        found.update(images[:: max(len(images) // 16, 1)].cpu().numpy().tobytes())
    return found.hexdigest()[:16]
