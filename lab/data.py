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

from lab.checkpoints import whole
from lab.machine import QUIET
from lab.shapes import load_shapes

SUFFIXES = {*torchvision.datasets.folder.IMG_EXTENSIONS, ".jfif"}


def read_image(file: Path, size: int) -> np.ndarray:
    """The middle square, upright, on white: RGB [3, size, size] uint8."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode[0] in "IF":  # Pillow would cut the values off at 255
        raise ValueError(f"pixels of kind {image.mode}, convert them to 8 bits")
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image)[:, :, :3].transpose(2, 0, 1).copy()


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
    found["test"] = found["test"] or found.pop("val")  # without test/, val/ is the test set
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
    size = recipe.image_size
    if recipe.data == "shapes":
        made = load_shapes(size)
        data = {split: (of["images"], of["shape"]) for split, of in made.items()}
    elif recipe.data in ("cifar10", "cifar100"):
        data = read_cifar(recipe.data, size)
    else:
        data = read_folders(Path(recipe.data), size, cache)
    if "val" not in data:  # hold out a tenth of the training images, the same for every seed
        images, labels = data["train"]
        n = min(max(len(labels) // 10, 1), 5000)
        data |= {"val": (images[:n], labels[:n]), "train": (images[n:], labels[n:])}
    if len(data["train"][1]) < 9:
        sys.exit(f"{recipe.data} has {len(data['train'][1])} training images: too few")
    need = sum(images.nbytes for images, _ in data.values())
    if device.type == "cuda" and need < torch.cuda.mem_get_info(device)[0] / 2:
        data = {split: [part.to(device) for part in parts] for split, parts in data.items()}
    return data


def load_tasks(names: list[str], recipe, labels: int, device, cache: Path) -> dict:
    """{task: its data}, with the first `labels` training images (0: all of them).

    Any data can classify; shapes have shape, colour, texture, background and segment. Data of your
    own is a branch here: {task: {split: (images, labels)}}, labels [n] or, for pixels, [n, S, S].
    """
    known = ("classify",)
    if recipe.data == "shapes":
        known = ("shape", "colour", "texture", "background", "segment")
        names = ["shape" if name == "classify" else name for name in names]
    for name in set(names) - set(known):
        sys.exit(f"task {name}: on {recipe.data or 'this data'} choose among {', '.join(known)}")
    if recipe.data == "shapes":
        splits = load_shapes(recipe.image_size)
        data = {n: {s: (made["images"], made[n]) for s, made in splits.items()} for n in names}
    else:
        data = {"classify": load_data(recipe, device, cache)}
    for splits in data.values():
        n = len(splits["train"][1])
        if labels > n:
            sys.exit(f"--labels {labels} is more than the {n} training images")
        splits["train"] = tuple(part[: labels or n] for part in splits["train"])
    return data


def to_float(images: Tensor, device=None) -> Tensor:
    """uint8 0..255 -> float 0..1, on the device."""
    return images.to(device).float() / 255


def fingerprint(data: dict) -> str:
    """Tells data sets apart: a hash of all labels and of some images of each split."""
    parts = [(y, x[:: max(len(x) // 16, 1)]) for x, y in data.values()]
    found = b"".join(part.cpu().numpy().tobytes() for part in sum(parts, ()))
    return hashlib.sha256(found).hexdigest()[:16]
