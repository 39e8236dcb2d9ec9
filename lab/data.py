"""Data: train is trained on, val (held-out training images) serves every choice, test is read
once at the end. {"train" | "val" | "test": (images [n, 3, S, S] uint8, labels [n] int64)}"""

import hashlib
import math
import random
import sys
from glob import glob
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
SUFFIXES = {*torchvision.datasets.folder.IMG_EXTENSIONS, ".jfif"}


def shapes(n: int, seed: int, size: int = 32) -> dict[str, Tensor]:
    """Draw objects on textured, lit backgrounds: images [n, 3, size, size] uint8 and what they
    show, shape (8), colour (8 bins of hue), texture, background (4), all [n] int64; and the
    objects' mask [n, size, size] bool."""
    chunks = [_shapes(min(1000, n - i), seed * 1_000_003 + i, size) for i in range(0, n, 1000)]
    names = "images mask shape colour texture background".split()
    return dict(zip(names, map(torch.cat, zip(*chunks))))


def _shapes(n, seed, size):  # below, a number per image is [n, 1, 1, 1]
    generator = torch.Generator().manual_seed(seed)
    x = (torch.arange(size) + 0.5) / size * 2 - 1
    y = x[:, None]

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    def turn(x, y, angle):
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    def ramp():  # -1..1 across the image in a random direction
        return turn(x, y, uniform(0, 2 * math.pi))[0] / math.sqrt(2)

    def choose(kinds, *options):
        return torch.stack(options, dim=1)[torch.arange(n), kinds]

    def paint(hue, saturation, value):
        faint = value * (1 - saturation)
        return iwm.shift_hue(torch.cat([value, faint, faint], dim=1), hue[:, 0])

    def pattern(kinds):  # lightness in -1..1: plain, stripes, checks, noise
        along, across = turn(x, y, uniform(0, math.pi))
        phase, pitch = uniform(0, 2 * math.pi), uniform(4, 7)
        wave = torch.sin(pitch * along + phase)
        checks = 4 * wave * torch.sin(pitch * across)
        noise = torch.randn(n, 1, 6, 6, generator=generator)
        noise = F.interpolate(noise, (size, size), mode="bilinear")
        return choose(kinds, 0 * wave, 3 * wave, checks, noise).clamp(-1, 1)

    shape = torch.randint(8, (n,), generator=generator)
    texture, background = torch.randint(4, (2, n), generator=generator)

    # the object in its own coordinates (u, v): each function is positive inside
    radius, angle = uniform(0.55, 0.8), uniform(-0.3, 0.3)
    u, v = turn(x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2), angle)
    u, v = u / radius, v / radius
    r = (u * u + v * v).sqrt()
    thin, box = torch.stack([u.abs(), v.abs()]).sort(dim=0).values
    edge = choose(
        shape,
        0.85 - r,  # disc
        0.78 - box,  # square
        0.5 - torch.maximum(v, 0.866 * u.abs() - 0.5 * v),  # triangle
        0.72 + 0.27 * torch.cos(5 * torch.atan2(v, u)) - r,  # star
        0.24 - (r - 0.74).abs(),  # ring
        torch.minimum(0.92 - box, 0.3 - thin),  # cross
        torch.minimum(0.95 - r, ((u - 0.45) ** 2 + v * v).sqrt() - 0.68),  # crescent
        0.56 * (1 - (1.05 * u) ** 2 - (1.2 * (0.1 - v) - 0.75 * u.abs().sqrt()) ** 2),  # heart
    )
    mask = (edge * radius * size / 2 + 0.5).clamp(0, 1)  # soft edges

    hue = uniform(0, 1)
    thing = paint(hue, uniform(0.4, 0.9), uniform(0.5, 1)) * (1 + 0.2 * pattern(texture))
    one, other = (paint(uniform(0, 1), uniform(0.05, 0.4), uniform(0.1, 0.75)) for _ in range(2))
    scene = torch.lerp(one, other, 0.5 + 0.5 * ramp()) * (1 + 0.15 * pattern(background))
    images = torch.lerp(scene, thing, mask) * (1 + uniform(0, 0.6) * ramp())
    images = (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    images, colour = (255 * images).round().byte(), (8 * hue.flatten()).long()
    return images, mask[:, 0] > 0.5, shape, colour, texture, background


def read_image(file: Path, size: int) -> bytes:
    """The middle square, upright, on white: RGB [3, size, size]."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode[0] in "IF":  # Pillow would cut the values off at 255
        raise ValueError(f"pixels of kind {image.mode}, convert them to 8 bits")
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return b"".join(channel.tobytes() for channel in image.split()[:3])


def list_images(folder: Path) -> list[Path]:
    """folder/CLASS/**/*, sorted; a name that begins with a dot never counts."""
    names = glob("*/**/*", root_dir=folder, recursive=True)
    files = sorted(folder / name for name in names if (folder / name).is_file())
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if files:
        print(f"{folder}: {len(images)} images, {len(files) - len(images)} other files not used")
    return images


def decode(files: list[Path], size: int, cache: Path) -> Tensor:
    """Images [n, 3, size, size] uint8, decoded once into a memory-mapped file in `cache`."""
    failed, shape = [], (len(files), 3, size, size)
    key = str([size, [(str(f), f.stat().st_size, f.stat().st_mtime) for f in files]])
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.rgb"

    def read(file):
        try:
            return read_image(file, size)
        except Exception as error:  # foreign bytes can raise anything
            failed.append(f"{file}: {error}")
            return b""

    if not path.exists() or path.stat().st_size != math.prod(shape):  # cut short
        cache.mkdir(parents=True, exist_ok=True)
        with whole(path) as aside, open(aside, "wb") as decoded, ThreadPool() as threads:
            images = threads.imap(read, files)
            decoded.writelines(tqdm(images, "decoding, once", len(files), leave=False, **QUIET))
            if failed:
                sys.exit(f"{len(failed)} images cannot be read: {'; '.join(failed[:20])}")
    return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=shape))


def read_folders(root: Path, size: int, cache: Path) -> dict:
    """root/train, root/test (or val); where there are all three, val is the held-out images."""
    root, data, known = root.resolve(), {}, set()
    found = {split: list_images(root / split) for split in ("train", "val", "test")}
    found["test"] = found["test"] or found.pop("val")
    if not found["train"] or not found["test"]:
        sys.exit(f"data {root} is neither shapes, cifar10, cifar100 nor a folder that holds "
                 "train/CLASS/*.jpg and test/CLASS/*.jpg (or val/)")  # fmt: skip
    for split, files in found.items():
        if files:
            random.Random(0).shuffle(files)  # so that any part of them has all classes
            names = [file.relative_to(root).parts[1] for file in files]
            names, labels = np.unique(names, return_inverse=True)
            known = known or {*names}
            if differ := {*names} ^ known:
                sys.exit(f"{root}: train and {split} differ in {', '.join(sorted(differ))}")
            data[split] = decode(files, size, cache), torch.from_numpy(labels)
    return data


def read_cifar(name: str, size: int) -> dict:
    """CIFAR-10 or -100 through torchvision, under ./data."""
    data, dataset = {}, getattr(torchvision.datasets, name.upper())
    for split in ("train", "test"):
        try:
            found = dataset("data", split == "train", download=True)
        except (OSError, RuntimeError) as error:
            sys.exit(f"{name} is not in ./data and cannot be downloaded: try shapes ({error})")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)[order]
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        data[split] = images.contiguous(), torch.tensor(found.targets)[order]
    return data


def load_data(recipe, device, cache: Path) -> dict:
    """The splits train, val, test: on a GPU when they fit into half of its free memory."""
    data, size = {}, recipe.image_size
    if recipe.data == "shapes":
        for seed, (split, n) in enumerate(SHAPES_IMAGES.items()):
            made = shapes(n, seed, size)
            data[split] = made["images"], made["shape"]
    elif recipe.data in ("cifar10", "cifar100"):
        data = read_cifar(recipe.data, size)
    else:
        data = read_folders(Path(recipe.data), size, cache)
    if "val" not in data:  # hold out a tenth of the training images, the same for every seed
        images, labels = data["train"]
        n = min(max(len(labels) // 10, 1), 5000)
        data |= {"val": (images[:n], labels[:n]), "train": (images[n:], labels[n:])}
    n, least = len(data["train"][1]), max(recipe.batch_size, 9)
    if n < least:
        sys.exit(f"{recipe.data} has {n} training images, fewer than {least} (see --batch-size)")
    need = sum(images.nbytes for images, _ in data.values())
    if device.type == "cuda" and need < torch.cuda.mem_get_info(device)[0] / 2:
        data = {split: [part.to(device) for part in parts] for split, parts in data.items()}
    return data


def to_float(images: Tensor, device=None) -> Tensor:
    """uint8 0..255 -> float 0..1, on the device."""
    return images.to(device).float() / 255


def fingerprint(data: dict) -> str:
    """Tells data sets apart: a hash of all labels and of some images of each split."""
    parts = [(y, x[:: max(len(x) // 16, 1)]) for x, y in data.values()]
    found = b"".join(part.cpu().numpy().tobytes() for part in sum(parts, ()))
    return hashlib.sha256(found).hexdigest()[:16]
