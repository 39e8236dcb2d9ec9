"""Learn an image world model, measure it and show it.

    python train.py                                   # embedded data, no download, CPU or GPU
    python train.py --data cifar10                    # downloads through torchvision
    python train.py --data path/to/folder             # train/<class>/*.jpg and test/<class>/*.jpg (or val/)
    python train.py --conditioning none               # an ablation is one flag: see --help
    python train.py --out runs/shapes --resume        # go on with a run that was stopped
    python train.py --table runs/*                    # a table of finished runs, over their seeds
    torchrun --nproc_per_node=2 train.py              # several devices: the batch is shared among them

A run folder holds config.json, metrics.jsonl (a JSON object a measurement, on held-out training images), result.json
(the test images, read once at the end), last.pt, views.png, retrieval.png (its top: strip.png) and, with matplotlib,
curves.png.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None
try:
    import matplotlib.figure
except ImportError:
    matplotlib = None

import iwm
from iwm import IDENTITY, IWM, JITTER, PRESETS, Config

RANK = int(os.environ.get("RANK", 0))  # set by torchrun: this process ...
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # ... of so many; only rank 0 writes and prints


def die(message: str) -> NoReturn:
    """One clear line and exit code 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}{f' (rank {RANK})' * (RANK > 0)}: {message}", file=sys.stderr)
    sys.exit(2)


def brief(error: BaseException) -> str:
    """The kind of an error and the start of what it says, on one line."""
    return f"{type(error).__name__} {' '.join(str(error).split()):.80}"


def write_whole(path: Path, write):
    """Write aside, then rename: a reader never sees half a file, and a full disk leaves the old one whole."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        die(f"cannot write {path}: {error}")
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Data: uint8 images [n, 3, S, S] and int64 labels [n] for three splits. train is trained on, val (held-out training
# images) is measured while training and serves every choice, test is read once at the end
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "crescent", "heart")
TEXTURES = ("plain", "stripes", "checks", "noise")
COLOURS = 8  # bins of the object's hue
SHAPES_IMAGES = {"train": 20_000, "val": 2_000, "test": 2_000}  # the position of a split is its seed


def shapes(n: int, seed: int, size: int = 32) -> dict[str, Tensor]:
    """Objects on textured, lit backgrounds: coloured, turned, shifted and scaled at random.

    Returns images [n, 3, size, size] uint8 and the factors they were made from: shape, colour (bin of the object's
    hue), texture and background [n] int64, and the object's mask [n, size, size] bool.
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
        red = torch.stack([value, value * (1 - saturation), value * (1 - saturation)], dim=1)
        return iwm.shift_hue(red, hue)

    def pattern(kinds):  # lightness of a texture in -1..1
        turn, phase, frequency = uniform(0, math.pi), uniform(0, 2 * math.pi), uniform(4, 7)
        wave = torch.sin(frequency * (x * turn.cos() + y * turn.sin()) + phase)
        across = torch.sin(frequency * (y * turn.cos() - x * turn.sin()))
        noise = F.interpolate(torch.randn(n, 1, 6, 6, generator=generator), (size, size), mode="bilinear")[:, 0]
        return choose(kinds, [0 * wave, (3 * wave).clamp(-1, 1), (4 * wave * across).clamp(-1, 1), noise.clamp(-1, 1)])

    def ramp():  # -1..1 across the image in a random direction
        turn = uniform(0, 2 * math.pi)
        return (x * turn.cos() + y * turn.sin()) / math.sqrt(2)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shape = torch.randint(len(SHAPES), (n,), generator=generator)
    texture, background = torch.randint(len(TEXTURES), (2, n), generator=generator)

    # the object in its own coordinates (u, v); each function is positive inside and about the distance to its edge
    radius, turn = uniform(0.55, 0.8), uniform(-0.3, 0.3)  # radians: up to 17 degrees either way
    dx, dy = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)
    u, v = (dx * turn.cos() + dy * turn.sin()) / radius, (dy * turn.cos() - dx * turn.sin()) / radius
    r, angle = (u * u + v * v).sqrt(), torch.atan2(v, u)
    box = torch.maximum(u.abs(), v.abs())
    inside = {
        "disc": 0.85 - r,
        "square": 0.78 - box,
        "triangle": 0.5 - torch.stack([v, 0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v]).amax(dim=0),
        "star": 0.72 + 0.27 * torch.cos(5 * angle) - r,
        "ring": 0.24 - (r - 0.74).abs(),
        "cross": torch.minimum(0.92 - box, 0.3 - torch.minimum(u.abs(), v.abs())),
        "crescent": torch.minimum(0.95 - r, ((u - 0.45) ** 2 + v * v).sqrt() - 0.68),
        "heart": 0.56 * (1 - (1.05 * u) ** 2 - (1.2 * (0.1 - v) - 0.75 * u.abs().sqrt()) ** 2),
    }
    mask = (choose(shape, [inside[name] for name in SHAPES]) * radius * size / 2 + 0.5).clamp(0, 1)  # soft edges

    hue = uniform(0, 1)
    thing = paint(hue, uniform(0.4, 0.9), uniform(0.5, 1)) * (1 + 0.2 * pattern(texture)).unsqueeze(1)
    one, other = (paint(uniform(0, 1), uniform(0.05, 0.4), uniform(0.1, 0.75)) for _ in range(2))
    scene = torch.lerp(one, other, (0.5 + 0.5 * ramp()).unsqueeze(1)) * (1 + 0.15 * pattern(background)).unsqueeze(1)
    light = 1 + uniform(0, 0.6) * ramp()
    images = torch.lerp(scene, thing, mask.unsqueeze(1)) * light.unsqueeze(1)
    images = (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return {"images": (255 * images).round().byte(), "shape": shape, "colour": (hue.flatten() * COLOURS).long(),
            "texture": texture, "background": background, "mask": mask > 0.5}  # fmt: skip


def read_image(file: Path, size: int) -> np.ndarray:
    """The middle square of any image file. -> RGB [size, size, 3] uint8"""
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits, of which Pillow would not keep the upper ones
            image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
        return np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))


def read_folder(folder: Path, size: int, classes: list[str], cache: Path) -> tuple[Tensor, Tensor]:
    """folder/<class>/* -> images [n, 3, size, size] uint8 and labels [n], in an order that is always the same.

    Decoded once, into a memory-mapped file in `cache` that is named after the files' names, sizes and times: training
    then needs neither the decoder nor the memory. Files that cannot be read are named, counted and left out.
    """
    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff"}
    found = [(file, label) for label, name in enumerate(classes) for file in sorted((folder / name).glob("*"))]
    files = [(f, label) for f, label in found if f.suffix.lower() in suffixes and f.name[0] != "." and f.is_file()]
    stats = [(f"{f.parent.name}/{f.name}", (stat := f.stat()).st_size, stat.st_mtime_ns) for f, _ in files]
    decoded = cache / hashlib.sha256(json.dumps([size, classes, stats]).encode()).hexdigest()[:16]

    def decode(item):
        try:
            return read_image(item[0], size)
        except Exception as error:  # a damaged file can raise anything
            tqdm.write(f"skipped {item[0]}: {error}", file=sys.stderr)

    def decode_all(aside):  # all pixels, then all labels
        random.Random(0).shuffle(files)  # so that any part of them has all classes
        labels, bar = [], tqdm(total=len(files), desc=f"decoding {folder}, once", leave=False)
        with open(aside, "wb") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in (files[i : i + 1000] for i in range(0, len(files), 1000)):  # never all of them in memory
                for image, (_, label) in zip(pool.map(decode, part), part):
                    bar.update()
                    if image is not None:
                        out.write(image.transpose(2, 0, 1).tobytes())
                        labels.append(label)
            out.write(np.array(labels, dtype=np.int64).tobytes())
        if labels and len(labels) < len(files):
            print(f"skipped {len(files) - len(labels)} of {len(files)} files of {folder}", file=sys.stderr)

    pixels = 3 * size * size
    if not decoded.exists() or decoded.stat().st_size % (pixels + 8):
        write_whole(decoded, decode_all)
    n = decoded.stat().st_size // (pixels + 8)
    if n == 0:
        die(f"{folder} has no images that can be read: put them at {folder}/<class>/*.jpg")
    images, labels = torch.from_numpy(np.memmap(decoded, np.uint8, "c")).split([n * pixels, n * 8])
    return images.view(n, 3, size, size), labels.clone().view(torch.int64)


def download(name: str, dataset, *arguments):
    """A torchvision dataset under ./data."""
    try:
        return dataset("data", *arguments, download=True)
    except Exception as error:  # no network, a damaged archive, no write access
        die(f"{name} is not in ./data and cannot be downloaded ({error}): try --data shapes")


def load_data(config: Config, device, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train" | "val" | "test": (images [n, 3, S, S] uint8, labels [n] int64)}, on the device.

    A split of more than 4 GiB stays on the CPU: images of a folder then stay in their memory-mapped file.
    """
    data, size = {}, config.image_size
    if config.data == "shapes":
        for seed, (split, n) in enumerate(SHAPES_IMAGES.items()):
            made = shapes(n, seed, size)
            data[split] = made["images"], made["shape"]
    elif config.data in ("cifar10", "cifar100"):
        for split in ("train", "test"):
            found = download(config.data, getattr(torchvision.datasets, config.data.upper()), split == "train")
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
            images = torch.from_numpy(found.data).permute(0, 3, 1, 2)[order]
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
            data[split] = images.contiguous(), torch.tensor(found.targets)[order]
    else:
        root = Path(config.data)
        test = root / "test" if (root / "test").is_dir() else root / "val"
        if not config.data or not (root / "train").is_dir() or not test.is_dir():
            die(f"data {config.data!r} is not shapes, cifar10, cifar100 or a folder with train/CLASS/ and test/CLASS/")
        classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir() and path.name[0] != ".")
        unknown = {path.name for path in test.iterdir() if path.is_dir() and path.name[0] != "."} - set(classes)
        if unknown:
            die(f"{test} has classes that {root / 'train'} has not: {', '.join(sorted(unknown))}")
        data["train"] = read_folder(root / "train", size, classes, cache)
        data["test"] = read_folder(test, size, classes, cache)
    if "val" not in data:  # hold out a tenth of the training images, which are in the same random order for every seed
        images, labels = data["train"]
        n = min(len(labels) // 10, 5000)
        if n == 0:
            die(f"{config.data} has {len(labels)} training images: at least 10 are needed")
        data |= {"val": (images[:n], labels[:n]), "train": (images[n:], labels[n:])}
    if config.batch_size > len(data["train"][0]):
        die(f"batch_size {config.batch_size} is larger than the {len(data['train'][0])} training images: lower it")
    small = {split: images.nbytes < 4 * 2**30 for split, (images, _) in data.items()}
    return {split: tuple(part.to(device) if small[split] else part for part in pair) for split, pair in data.items()}


def to_float(images: Tensor, device=None) -> Tensor:
    """uint8 0..255 -> float 0..1, on the device."""
    return images.to(device).float() / 255


# ---------------------------------------------------------------------------------------------------------------------
# Measures and pictures
# ---------------------------------------------------------------------------------------------------------------------


def precision(config: Config, device: torch.device) -> torch.dtype:
    """bfloat16 if that is wanted and the device has instructions for it: where it is emulated a step takes far longer."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # older torch cannot tell: float32
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if config.bf16 and native else torch.float32


def autocast(config: Config, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(config, device) == torch.bfloat16)


@torch.no_grad()
def measure(model: IWM, data: dict, split: str, mrr_images: int, probe_images: int) -> dict[str, float]:
    """MRR and its kin on the first `mrr_images` clean images of a split, the probes (accuracies in 0..1) on all of them.

    The probes read the teacher's mean-pooled latents and are fitted on the first `probe_images` training images.
    """
    (images, labels), (train_images, train_labels) = data[split], (part[:probe_images] for part in data["train"])
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)

    def pooled(images):
        return torch.cat([model.teacher(to_float(part, device)).float().mean(dim=1) for part in images.split(250)])

    with autocast(model.config, device):
        result = iwm.measure_world_model(model, to_float(images[:mrr_images], device), generator)
        result["target_std"] = model.targets(to_float(images[:500], device)).std(dim=(0, 1)).mean().item()
        train_features, features = pooled(train_images), pooled(images)
    result["rankme"] = iwm.rankme(features)
    probe = [part.to(device) for part in (train_features, train_labels, features, labels)]
    return result | {"knn": iwm.knn_accuracy(*probe), "linear": iwm.linear_accuracy(*probe)}


def in_words(changes: Tensor, flags=()) -> str:
    """Non-zero jitter changes [4] and destructive flags, one a line."""
    words = [f"{name} {change:+.2f}" for name, change in zip(JITTER, changes.tolist()) if abs(change) >= 0.005]
    words += [name for name, flag in zip(iwm.ACTION[4:], flags) if flag]
    return "\n".join(words) or "nothing"


def sheet(rows: list[list], path: Path, tile: int = 96):
    """Draw rows of cells: an image [3, S, S] in 0..1, (image, whether to frame it), or text."""
    columns = max(len(row) for row in rows)
    heights = [tile if any(not isinstance(cell, str) for cell in row) else 20 for row in rows]
    page = Image.new("RGB", (columns * (tile + 6) + 6, sum(heights) + 6 * len(rows) + 6), "white")
    draw, top = ImageDraw.Draw(page), 6
    for row, height in zip(rows, heights):
        for i, cell in enumerate(row):
            left = 6 + i * (tile + 6)
            if isinstance(cell, str):
                draw.multiline_text((left, top + 4), cell, fill="black")
                continue
            image, framed = cell if isinstance(cell, tuple) else (cell, False)
            picture = TF.to_pil_image(image.float().clamp(0, 1))
            page.paste(picture.resize((tile, tile), Image.Resampling.NEAREST), (left, top))
            if framed:
                draw.rectangle((left - 2, top - 2, left + tile + 1, top + tile + 1), outline="limegreen", width=3)
        top += height + 6
    write_whole(path, lambda aside: page.save(aside, format="PNG"))


@torch.no_grad()
def draw_views(images: Tensor, config: Config, path: Path):
    """source | source's context | target | the action in words, for clean images [B, 3, S, S] in 0..1."""
    generator = torch.Generator(images.device).manual_seed(0)
    source, target, action = iwm.make_views(images, config, generator)
    _, masked = iwm.sample_masks(len(images), config.grid, config, generator, images.device)
    seen = torch.ones(len(images), config.grid**2, device=images.device).scatter_(1, masked, 0)
    seen = F.interpolate(seen.view(-1, 1, config.grid, config.grid), scale_factor=config.patch)  # [B, 1, S, S]
    changes = action[:, :4] * config.jitter_strengths.to(action)
    rows: list[list] = [["image", "source x", "context of x", "target y", "action x -> y"]]
    for i in range(len(images)):
        context = source[i] * seen[i] + 0.5 * (1 - seen[i])
        rows.append([images[i], source[i], context, target[i], in_words(changes[i], action[i, 4:])])
    sheet(rows, path)


@torch.no_grad()
def draw_retrieval(model: IWM, images: Tensor, path: Path):
    """Uncurated: an image, an action, the nearest neighbour in the bank of what is imagined, the truth; then sweeps."""
    config, generator = model.config, torch.Generator(images.device).manual_seed(1)
    rows: list[list] = [["image", "action", "nearest", "truth", "", "image", "action", "nearest", "truth"]]
    cells = []
    with autocast(config, images.device):
        for image in images.split(1):
            params = iwm.jitter_params(config.bank, config, generator, image.device, always=True)
            pictures, bank, imagined = iwm.variants(model, image, params)
            nearest = int((bank - imagined[:1]).flatten(1).norm(dim=1).argmin())
            rank = iwm.ranks(imagined, bank)[0].item()
            words = in_words(params[0].cpu() - IDENTITY) + f"\n\nrank {rank:g} of {config.bank}"
            cells.append([image[0], words, (pictures[nearest], nearest == 0), pictures[0]])
        rows += [left + [""] + right for left, right in zip(cells[::2], cells[1::2])]
        sheet(rows[:4], path.with_name("strip.png"))
        for i, name in enumerate(JITTER):
            pictures, bank, imagined = iwm.variants(model, images[:1], iwm.sweep_params(i, config, n=8))
            neighbours = torch.cdist(imagined.flatten(1), bank.flatten(1)).argmin(dim=1).tolist()
            rows.append([f"{name}:\ntrue variants", *pictures])
            rows.append(["nearest to the\nimagined ones", *((pictures[j], j == k) for k, j in enumerate(neighbours))])
    sheet(rows, path)


def draw_curves(metrics: list[dict], path: Path):
    if matplotlib is None:
        return
    panels = ["loss", "target_std", "rankme", "mrr chance", "knn linear", " ".join(f"error_{name}" for name in JITTER)]
    figure = matplotlib.figure.Figure(figsize=(12, 6), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, panels):
        for name in panel.split():
            points = [(m["images"], m[name]) for m in metrics if m[name] is not None]
            axis.plot(*zip(*points) if points else ([], []), marker=".", label=name)
        axis.set_ylim(bottom=0)
        axis.locator_params(axis="x", nbins=4)
        axis.set_xlabel("images seen")
        axis.legend()
    write_whole(path, lambda aside: figure.savefig(aside, dpi=80, format="png"))


# ---------------------------------------------------------------------------------------------------------------------
# The run folder and the command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None) -> tuple[Config, argparse.Namespace]:
    """Command line -> configuration (preset, then flags) and run options (out, device, resume)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="defaults to start from (default: the one that suits --data)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/ + preset + the flags that differ from it)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out (start it if there is none)")
    parser.add_argument("--table", type=Path, nargs="+", metavar="RUN", help="print a table of finished runs and stop; "
                        "with --preset they are named by their flags on top of it")  # fmt: skip
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['help']} (default of preset shapes: {f.default})")  # fmt: skip
    parser.error = lambda message: die(f"{message}; see --help")  # one line instead of the list of all flags
    args = parser.parse_args(argv)
    if args.out == Path():
        die("--out is the current folder: name a folder of its own")
    if args.table:
        print(table(args.table, [args.preset] if args.preset else PRESETS))
        sys.exit()
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    data = given.get("data", "shapes")
    preset = args.preset or {"shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar"}.get(data, "imagenet100")
    base = PRESETS[preset]
    if args.out is None:
        changed = [f"{n}={Path(str(v)).name}" for n, v in given.items() if v != getattr(base, n)]
        args.out = Path("runs") / ",".join([preset, *changed])
    try:
        stored = args.out / "config.json"
        if stored.exists() and not args.resume:
            die(f"{args.out} holds a run already: add --resume to go on with it, or choose another --out")
        if stored.exists():
            given = (asdict(base) if args.preset else {}) | given
            base = Config(**json.loads(stored.read_text()))
            changed = [f"{n} is {getattr(base, n)} there, {v} here" for n, v in given.items() if v != getattr(base, n)]
            if changed:
                die(f"{args.out} is a run with another configuration ({'; '.join(changed)}): choose another --out")
        config = replace(base, **given)
    except json.JSONDecodeError as error:
        die(f"{stored} is damaged: {error}")
    except (ValueError, TypeError, OSError) as error:
        die(f"{error}")
    if args.resume and not (args.out / "last.pt").exists():
        print(f"{args.out} has no checkpoint to resume: starting at step 0")
    return config, args


def open_run(out: Path, config: Config):
    """Make the run folder with its configuration. -> a file whose lock keeps other processes out while it is open"""
    stored = out / "config.json"
    if not stored.exists():
        write_whole(stored, lambda path: path.write_text(json.dumps(asdict(config), indent=1)))
    if not os.access(stored, os.W_OK):
        die(f"cannot write {stored}")
    lock = stored.open("a")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"another process is at work in {out}: wait for it, or choose another --out")
    except OSError:
        pass  # a file system without locks
    return lock


def choose_device(name: str | None) -> torch.device:
    if WORLD > 1 and torch.cuda.is_available() and name in (None, "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1).to(name).tolist()
        return torch.device(name)
    except Exception as error:  # each backend fails in its own way
        die(f"device {name} cannot be used: {brief(error)}; choose cuda, mps or cpu")


def keep_memory():
    """Have glibc keep freed memory: to give it back and get it anew, page by page, took up to a third of a step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems have no mallopt
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: no mapping of its own below 1 GiB
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the heap


def return_memory():
    """Give back, once, what a measurement has left on the heap: else resident memory would grow with each of them."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def leave():
    """Processes end together: torchrun ends the others with the first, while rank 0 may still be saving or reporting."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def schedule(step: int, config: Config) -> tuple[float, float, float]:
    """Learning rate (linear warm-up, cosine to 1e-6), weight decay (cosine), teacher's momentum (linear to 1)."""
    warmup, done = config.warmup * config.steps, step / config.steps

    def cosine(first, last, share):
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))

    lr = cosine(config.lr, 1e-6, max(step - warmup, 0) / max(config.steps - warmup, 1))
    if step + 1 < warmup:
        lr = config.lr * (step + 1) / warmup
    weight_decay = cosine(config.weight_decay, config.weight_decay_end, done)
    return lr, weight_decay, config.ema + (1 - config.ema) * done


def make_optimizer(model: IWM, config: Config) -> torch.optim.AdamW:
    """AdamW; weight decay not on biases and 1-D weights (I-JEPA). deviation: beta2 is 0.95, for short runs."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in named if p.ndim <= 1 or name.endswith("bias")]
    groups: list[dict] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def main():
    config, args = parse()
    keep_memory()
    device = choose_device(args.device)
    torch.set_float32_matmul_precision("high")
    if WORLD > 1:
        if config.batch_size % WORLD:
            die(f"batch_size {config.batch_size} cannot be shared among {WORLD} processes: make it a multiple")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        if RANK > 0:
            dist.barrier()  # rank 0 downloads or decodes first, the others find it done
    data = load_data(config, device, args.out.parent / "cache")
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    train_images = data["train"][0]
    per_epoch = len(train_images) // config.batch_size

    torch.manual_seed(config.seed)
    model = IWM(config).to(device)
    optimizer = make_optimizer(model, config)
    start, seconds, metrics, losses = 0, 0.0, [], []
    lock = open_run(args.out, config) if RANK == 0 else None
    if args.resume and (args.out / "last.pt").exists():
        try:
            state = torch.load(args.out / "last.pt", map_location=device, weights_only=True)
            assert Config(**state["config"]) == config, "it has another configuration"
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start, seconds, metrics, losses = (state[name] for name in ("step", "seconds", "metrics", "losses"))
            del state
        except Exception as error:  # a damaged file can raise anything
            die(f"{args.out / 'last.pt'} is not a checkpoint of this run: {brief(error)}")
    if config.compile:
        for part in (model.encoder, model.teacher, model.predictor):
            part.compile()
    step_model = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model

    began = time.monotonic() - seconds
    clock = lambda: round(time.monotonic() - began, 1)

    def save(step):
        state = {"config": asdict(config), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "step": step, "seconds": clock(), "metrics": metrics, "losses": losses}  # fmt: skip
        write_whole(args.out / "last.pt", lambda path: torch.save(state, path))
        lines = "".join(json.dumps(m) + "\n" for m in metrics)
        write_whole(args.out / "metrics.jsonl", lambda path: path.write_text(lines))

    def record(step):
        """Measure, append to the metrics, refresh the pictures, save."""
        loss = torch.tensor(losses).mean().item() if losses else None
        now = {"step": step, "images": step * config.batch_size, "seconds": clock(), "loss": loss}
        now |= measure(model, data, "val", min(config.mrr_images, 16), 4000) | {"memory_gib": peak_memory(device)}
        metrics.append(now)
        if not math.isfinite(now["rankme"]):
            die(f"the latents are not finite at step {step}: lower --lr ({args.out}/last.pt is from before)")
        if step and (now["rankme"] < 2 or now["target_std"] < 0.02):
            tqdm.write(f"step {step}: RankMe {now['rankme']:.1f}, target std {now['target_std']:.3f}: the latents have "
                       "collapsed. Stop (Ctrl-C), lower --lr or raise --ema", file=sys.stderr)  # fmt: skip
        losses.clear()
        save(step)
        images = to_float(data["val"][0][:8], device)
        draw_views(images, config, args.out / "views.png")
        draw_retrieval(model, images, args.out / "retrieval.png")
        draw_curves(metrics, args.out / "curves.png")
        return_memory()

    stopped = []  # a signal asks the loop to stop after its step; a second one kills
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (stopped.append(n), signal.signal(n, signal.SIG_DFL)))
    encoder, predictor = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor))
    print(f"{args.out}: encoder {encoder:,} and predictor {predictor:,} parameters, {len(train_images)} images, "
          f"{device}" + f" x {WORLD}" * (WORLD > 1) + f", {precision(config, device)}".replace("torch.", ""))  # fmt: skip
    if matplotlib is None:
        print("no curves.png without matplotlib: pip install matplotlib")
    if start:
        print(f"going on at step {start} of {config.steps}")
    if RANK == 0 and not metrics:
        record(0)
    generator, B = torch.Generator(device), config.batch_size
    bar = tqdm(total=config.steps * B, initial=start * B, unit=" images", unit_scale=True, disable=RANK > 0,
               mininterval=0.1 if sys.stderr.isatty() else 30)  # seconds; a log file needs fewer lines  # fmt: skip
    running, saved = [], time.monotonic()
    for step in range(start, config.steps):
        # everything random in a step follows from (seed, step), so a resumed run repeats what it would have been
        if step % per_epoch == 0 or step == start:
            epoch = torch.Generator().manual_seed(config.seed * 10**8 + step // per_epoch)
            order = torch.randperm(len(train_images), generator=epoch).to(train_images.device)
        generator.manual_seed(config.seed * 10**8 + step + RANK * 10**17)
        batch = order[step % per_epoch * B :][:B][RANK::WORLD]  # each process has its share of the batch

        with autocast(config, device):
            loss = step_model(to_float(train_images[batch], device), generator)
        loss.backward()
        lr, weight_decay, momentum = schedule(step, config)
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(momentum)

        running.append(loss.detach())
        bar.update(B)
        done = step + 1
        measuring = done * config.measurements // config.steps > step * config.measurements // config.steps
        if len(running) == 20 or measuring or (stopped and WORLD == 1):  # the host reads from the device only here
            losses += torch.stack(running).tolist()
            running.clear()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", mrr=f"{metrics[-1]['mrr']:.3f}" if metrics else "", refresh=False)
            if not math.isfinite(losses[-1]):
                die(f"the loss is {losses[-1]} at step {done}, lr {lr:.2g}: lower --lr (last.pt is from before)")
            stop = torch.tensor(max(stopped, default=0), device=device)
            if WORLD > 1:  # stop together or not at all
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            if RANK == 0 and measuring:
                record(done)
            elif RANK == 0 and (stop or time.monotonic() - saved > 120):
                save(done)
                saved = time.monotonic()
            if stop:
                bar.close()
                leave()
                launcher = f"torchrun --nproc_per_node={WORLD}" if WORLD > 1 else "python"
                print(f"stopped and saved at step {done}. Go on with: {launcher} train.py --out '{args.out}' --resume")
                sys.exit(128 + int(stop))
    bar.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # everything is saved: from here on a signal just ends
        signal.signal(number, signal.SIG_DFL)
    if RANK == 0:
        report(model, data, config, args.out, clock())
        lock.close()
    leave()


def mean_std(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; of a single value just the value; "-" where one is not known (NaN)."""
    if any(map(math.isnan, values)):
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def as_flags(config: Config, presets: Iterable[str] = PRESETS) -> str:
    """What a run trains (not its data and seed) as flags on top of one of the presets, the one that leaves the fewest."""
    settings = {n: v for n, v in asdict(config).items() if n not in ("seed", "data", "measurements", "mrr_images")}
    names: list[list[str]] = []
    for preset in presets:
        flags = ["--preset", preset]
        for name, value in settings.items():
            if value != getattr(PRESETS[preset], name):
                flag = name.replace("_", "-")
                switch = {True: f"--{flag}", False: f"--no-{flag}"}
                flags.append(switch[value] if isinstance(value, bool) else f"--{flag} {value}")
        names.append(flags)
    shortest = min(names, key=len)
    return " ".join(shortest)


def table(paths: list[Path], presets: Iterable[str]) -> str:
    """Markdown of finished runs (folders, or copies of their result.json). Runs that differ by their seed share a row."""
    measures = {"mrr": ("MRR", 1, 3), "mrr_pooled": ("pooled MRR", 1, 3), "hit1": ("H@1", 1, 3),
                "knn": ("kNN %", 100, 1), "linear": ("linear %", 100, 1)}  # key: name, unit, digits  # fmt: skip
    rows: dict[tuple, dict] = {}
    for path in paths:
        file = path / "result.json" if path.is_dir() else path
        if path.is_dir() and not file.exists():
            if (path / "config.json").exists():
                print(f"{path} is no finished run: left out", file=sys.stderr)
            continue
        try:
            result = json.loads(file.read_text())
            config = Config(**result["config"])
            for who in ("trained", "random"):
                result[who].setdefault("mrr_pooled", math.nan)  # runs from before it was measured
            found = [unit * result[who][key] for key, (_, unit, _) in measures.items() for who in ("trained", "random")]
            found.append(result["seconds"] / 60)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            die(f"{file} is no result.json of a finished run: {brief(error)}")
        row = Path(config.data).name, as_flags(config, presets), f"{iwm.chance(config.bank):.4f}"
        rows.setdefault(row, {})[config.seed] = found

    if not rows:
        die("--table found no finished run")
    names = [f"{name} (random init)" for name, _, _ in measures.values()]
    lines = [f"| data | run | MRR by chance | seeds | {' | '.join(names)} | minutes |", "|---" * (len(names) + 5) + "|"]
    for row, seeds in rows.items():
        *values, minutes = zip(*seeds.values())
        cells = [f"{mean_std(trained, digits)} ({mean_std(random, digits)})"
                 for trained, random, (_, _, digits) in zip(values[::2], values[1::2], measures.values())]  # fmt: skip
        lines.append(f"| {' | '.join([*row, str(len(seeds)), *cells, mean_std(minutes, 0)])} |")
    return "\n".join(lines)


def peak_memory(device) -> float | None:
    """Most memory held at any time, of the GPU or else of this process, in GiB; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if resource:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return None


def report(model: IWM, data: dict, config: Config, out: Path, seconds: float):
    """The last table: the trained network and a randomly initialised one on the test images."""
    device = next(model.parameters()).device
    torch.manual_seed(config.seed)
    print(f"measuring on {len(data['test'][0])} test images (MRR on {config.mrr_images} of them) ...")
    result: dict = {"trained": measure(model, data, "test", config.mrr_images, 10_000)}
    result["random"] = measure(IWM(config).to(device), data, "test", min(config.mrr_images, 32), 10_000)
    used = replace(config, bf16=precision(config, device) == torch.bfloat16)
    result |= {"config": asdict(used), "seconds": seconds, "memory_gib": peak_memory(device)}
    write_whole(out / "result.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    classes = int(data["train"][1].max()) + 1
    print(f"\n{'test images':24} {'this run':>9} {'random init':>12} {'chance':>8}")
    rows = [("mrr", f"MRR (bank of {config.bank})", iwm.chance(config.bank)),
            ("mrr_pooled", "MRR of pooled latents", iwm.chance(config.bank)), ("hit1", "H@1", 1 / config.bank),
            ("knn", "kNN accuracy", 1 / classes), ("linear", "linear probe accuracy", 1 / classes)]  # fmt: skip
    for key, label, by_chance in rows:
        print(f"{label:24} {result['trained'][key]:9.4f} {result['random'][key]:12.4f} {by_chance:8.4f}")
    print(f"\n{seconds / 60:.1f} minutes, peak memory {result['memory_gib'] or math.nan:.1f} GiB; see {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not stop a run
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
