"""Use the learned world model: finetune the predictor on a task, beside its controls, in one table.

    python finetune.py runs/shapes/last.pt                             # frozen teacher, finetuned predictor, controls
    python finetune.py runs/shapes/last.pt --protocol table --seeds 3  # every protocol, mean and standard deviation
    python finetune.py runs/shapes/last.pt --task shape,colour         # several tasks with one predictor
    python finetune.py runs/shapes/last.pt --task segment              # per-patch outputs, upsampled to pixels: mIoU
    python finetune.py runs/shapes/last.pt --protocol average          # a linear probe on K imagined variants' mean
    python finetune.py runs/shapes/last.pt --protocol factors          # what the latents of each network hold
    python finetune.py runs/shapes/finetune.jsonl                      # print the rows found so far
    python finetune.py runs/*/finetune.jsonl                           # mean and deviation over runs that differ by their seed

The rows of a table. "Frozen" is the checkpoint's EMA teacher; "learned" starts from the checkpoint (the encoder from
the teacher) and is trained:

    row                      encoder         predictor   head
    knn                      frozen          -           cosine kNN on mean-pooled latents
    linear                   frozen          -           ridge regression on mean-pooled latents
    attentive                frozen          -           a learned query attends to the latents, then a linear layer
    random predictor         frozen          random      attentive
    learned predictor        frozen          learned     attentive
    encoder                  learned         -           attentive
    end-to-end               learned         learned     attentive
    scratch                  random          random      attentive, everything trained
    attentive, random init   frozen, random  -           attentive
    linear, encoder          the student's latents
    linear, predictor        the predictor's output under the null action
    linear, K imagined       the mean of K imagined variants

With several tasks: one network for all ("shared") or one for each task ("one each").
With --task segment a linear layer per patch, upsampled, is the head, and "attentive" reads "linear per patch".

The predictor gets the latents of the clean image, a mask token at every position and the null action: it predicts the
whole, untransformed image. Everything learned is trained at a tenth of its row's lr, everything random at that lr.
Rows are written to finetune.jsonl beside the checkpoint as soon as they are known; --resume skips those already there.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

import iwm
import train
from iwm import IWM, Config
from train import die, to_float

# row: encoder, predictor, lr (attentive and both predictors: the better of 1e-3 and 3e-3 on CIFAR-10's val)
# deviation: so a learned predictor has 0.3 of the lr of a random one, in the paper 0.1
ROWS = {
    "attentive, random init": ("frozen, random", None, 3e-3),
    "attentive": ("frozen", None, 3e-3),
    "random predictor": ("frozen", "random", 1e-3),
    "learned predictor": ("frozen", "learned", 3e-3),
    "encoder": ("learned", None, 3e-3),
    "end-to-end": ("learned", "learned", 3e-3),
    "scratch": ("random", "random", 1e-3),
}
PROTOCOLS = {  # which rows, trained (above) or in closed form ("knn" or "linear", then whose latents)
    "predictor": ["attentive, random init", "attentive", "random predictor", "learned predictor"],
    "knn": ["knn, random init", "knn, teacher"],
    "linear": ["linear, random init", "linear, teacher"],
    "attentive": ["attentive, random init", "attentive"],
    "encoder": ["attentive", "encoder"],
    "end-to-end": ["attentive", "end-to-end"],
    "scratch": ["attentive", "scratch"],
    "table": ["knn, random init", "knn, teacher", "linear, random init", "linear, teacher", *ROWS],
    "average": ["linear, teacher", "linear, predictor", *(f"linear, {k} imagined" for k in (1, 8, 32))],
    "factors": ["linear, random init", "linear, encoder", "linear, teacher", "linear, predictor"],
}
USUAL = {"learned_lr": 0.1, "weight_decay": 0.05}  # defaults that a table names only where they were changed
VOID = 255  # pixels of a mask that have no class
FACTORS = ("shape", "colour", "texture", "background")  # the labels of shapes


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: images and what is asked of them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """One task. data: split -> images [n, 3, S, S] uint8 and labels, [n] int64 or, if dense, [n, S, S] uint8."""

    data: dict[str, tuple[Tensor, Tensor]]

    def __post_init__(self):
        self.dense = self.data["train"][1].ndim == 3
        self.ignored = VOID if self.dense else -100  # labels that do not count; classes have none
        self.classes = max(int(y.masked_fill(y == self.ignored, 0).max()) for _, y in self.data.values()) + 1


def load_tasks(names: list[str], config: Config, labels: int, device, cache: Path) -> dict[str, Task]:
    """classify | segment | shape, colour, texture, background (the factors of shapes) | a data set, by name."""
    tasks, made = {}, {}
    if config.data == "shapes":
        names = ["shape" if name == "classify" else name for name in names]
        made = {s: train.shapes(n, seed, config.image_size) for seed, (s, n) in enumerate(train.SHAPES_IMAGES.items())}
        for part in made.values():
            part["images"] = part["images"].to(device)  # once: the tasks share them
            # the class of each pixel: 0 is background, then the shapes
            part["segment"] = (part["mask"] * (part["shape"] + 1)[:, None, None]).byte()
    for name in names:
        if made and name in (*FACTORS, "segment"):
            data = {split: (part["images"], part[name].to(device)) for split, part in made.items()}
        elif name in FACTORS:
            die(f"task {name} needs --data shapes, here it is {config.data or 'not given'}")
        elif name == "segment":
            data = load_segmentation(config, device)
        elif name not in ("classify", "shapes", "cifar10", "cifar100") and not Path(name).is_dir():
            die(f"task {name} is not classify, segment, {', '.join(FACTORS)}, a data set or a folder")
        else:
            data = train.load_data(config if name == "classify" else replace(config, data=name), device, cache)
        if labels > len(data["train"][0]):
            die(f"--labels {labels} is more than the {len(data['train'][0])} training images of {name}")
        if labels:
            data["train"] = tuple(part[:labels] for part in data["train"])
        tasks[name] = Task(data)
    return tasks


def load_segmentation(config: Config, device) -> dict[str, tuple[Tensor, Tensor]]:
    """Oxford-IIIT Pet (--data pets; pet, background, border) or a folder with images/ and masks/ of the same names.

    A mask holds the class of each pixel, 0, 1, 2 ... (255: none); the last tenth of a shuffled folder is its test set.
    """
    size = config.image_size
    if config.data == "pets":
        pets = [train.download("pets", torchvision.datasets.OxfordIIITPet, split, "segmentation")
                for split in ("trainval", "test")]  # fmt: skip
        learn, test = (list(zip(found._images, found._segs)) for found in pets)
        random.Random(0).shuffle(learn)  # they are in the order of breeds
        first = 1  # its trimaps count from 1
    else:
        root, first = Path(config.data), 0
        found = sorted(path for path in (root / "images").glob("*") if path.name[0] != ".")
        masks = {path.stem: path for path in (root / "masks").glob("*")}
        both = [(path, masks[path.stem]) for path in found if path.stem in masks]
        if len(both) < 20:
            die(f"{config.data or '--data'} has {len(both)} images/NAME.* with masks/NAME.*: segment needs at least 20 "
                "(or --data pets, --data shapes)")  # fmt: skip
        random.Random(0).shuffle(both)
        tenth = len(both) // 10
        learn, test = both[:-tenth], both[-tenth:]
    data, tenth = {}, len(learn) // 10
    for split, files in (("train", learn[tenth:]), ("val", learn[:tenth]), ("test", test)):
        images, labels = [], []
        for image, mask in tqdm(files, desc=f"reading {split}", leave=False):
            try:
                with Image.open(mask) as opened, Image.open(image) as other:
                    if opened.size != other.size:
                        raise ValueError(f"their sizes differ, {opened.size} and {other.size}")
                    if opened.mode not in ("L", "P"):
                        raise ValueError("a mask needs one channel of 8 bits, the class of each pixel (255: none)")
                    label = torch.tensor(np.array(ImageOps.fit(opened, (size, size), Image.Resampling.NEAREST)))
                images.append(torch.tensor(train.read_image(image, size)))
            except Exception as error:  # a damaged file can raise anything
                die(f"{image} or {mask} cannot be read: {error}")
            labels.append(label - first)
        data[split] = torch.stack(images).permute(0, 3, 1, 2).contiguous().to(device), torch.stack(labels).to(device)
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Networks: an encoder, perhaps the predictor, and a head for each task
# ---------------------------------------------------------------------------------------------------------------------


class AttentiveHead(nn.Module):
    """One learned query attends to the latents, then a linear layer. [B, N, D] -> logits [B, classes].

    deviation: multi-head attention behind a LayerNorm; the paper's head is not known in more detail.
    """

    def __init__(self, width: int, heads: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out = nn.Linear(width, classes)

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(z)
        pooled, _ = self.attention(self.query.expand(len(z), -1, -1), z, z, need_weights=False)
        return self.out(pooled.squeeze(1))


class DenseHead(nn.Module):
    """A linear layer on each patch, upsampled to the pixels. [B, N, D] -> logits [B, classes, S, S].

    deviation: the simplest head there is; the paper's is not known.
    """

    def __init__(self, width: int, size: int, classes: int):
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, classes)

    def forward(self, z: Tensor) -> Tensor:
        side = math.isqrt(z.shape[1])
        logits = self.out(self.norm(z)).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return F.interpolate(logits.float(), (self.size, self.size), mode="bilinear")


def null_action(z: Tensor) -> Tensor:
    """The action that changes nothing, for latents z [B, N, D]. -> [B, A]"""
    return z.new_zeros(len(z), len(iwm.ACTION))


class Network(nn.Module):
    """The parts that a row of the table is made of. `model` is the checkpoint's IWM and is not changed."""

    def __init__(self, row: str, model: IWM, tasks: dict[str, Task], seed: int):
        super().__init__()
        self.config = config = model.config
        device = next(model.parameters()).device
        encoder, predictor, _ = ROWS[row]
        torch.manual_seed(seed)
        random = IWM(config).to(device)
        self.encoder = random.encoder
        if encoder in ("frozen", "learned"):
            self.encoder.load_state_dict(model.teacher.state_dict())
        if encoder.startswith("frozen"):
            self.encoder.requires_grad_(False)
        self.predictor = random.predictor if predictor else None
        if predictor == "learned":
            self.predictor.load_state_dict(model.predictor.state_dict())
        self.tasks = list(tasks)
        self.heads = nn.ModuleList([
            DenseHead(config.width, config.image_size, task.classes) if task.dense
            else AttentiveHead(config.width, config.heads, task.classes) for task in tasks.values()
        ])  # fmt: skip
        # one token per task tells a shared predictor what is asked
        several = predictor and len(tasks) > 1
        self.task_tokens = nn.Parameter(0.02 * torch.randn(len(tasks), 1, config.pred_width)) if several else None
        self.learned = [*(self.encoder.parameters() if encoder == "learned" else []),
                        *(self.predictor.parameters() if predictor == "learned" else [])]  # fmt: skip
        self.to(device)

    def forward(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each task's images (uint8) or their latents -> each task's logits. All parts share one forward pass."""
        which = torch.tensor([self.tasks.index(name) for name, part in parts.items() for _ in range(len(part))])
        z = torch.cat(list(parts.values()))
        if z.dtype == torch.uint8:
            z = self.encoder(to_float(z))
        if self.predictor:
            tokens = None if self.task_tokens is None else self.task_tokens[which]
            z = self.predictor.everywhere(z, null_action(z), tokens)
        split = z.split([len(part) for part in parts.values()])
        return {name: self.heads[self.tasks.index(name)](part) for name, part in zip(parts, split)}


# ---------------------------------------------------------------------------------------------------------------------
# Training and scores
# ---------------------------------------------------------------------------------------------------------------------


def mean_iou(predicted: Tensor, truth: Tensor, classes: int) -> float:
    """Mean over classes of intersection / union, over all pixels; a class that neither has does not count.

    predicted, truth: int tensors of one shape, classes 0..classes - 1; pixels whose truth is VOID are left out.
    """
    predicted, truth = predicted[truth != VOID], truth[truth != VOID]
    pairs = (truth.long() * classes + predicted.long()).flatten().bincount(minlength=classes**2)
    confusion = pairs.view(classes, classes).cpu().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
    return (confusion.diagonal() / union)[union > 0].mean().item()


@torch.no_grad()
def score(network: Network, name: str, task: Task, split: str, inputs: Tensor) -> float:
    """Accuracy, or mIoU of a dense task, on one split."""
    device, labels = next(network.parameters()).device, task.data[split][1]
    with train.autocast(network.config, device):
        found = torch.cat([network({name: part.to(device)})[name].argmax(dim=1) for part in inputs.split(250)]).cpu()
    return mean_iou(found, labels.cpu(), task.classes) if task.dense else (found == labels.cpu()).double().mean().item()


def fit(network: Network, tasks: dict[str, Task], inputs: dict, batch: int, lr: float, seed: int, args, title) -> bool:
    """Train everything that is not frozen, `batch` images of each task a step. -> whether the loss stayed finite

    deviation: AdamW, a cosine to 0 times a warm-up over a tenth of the steps; the learned encoder too has the lower lr.
    """
    learned, device = {id(p) for p in network.learned}, next(network.parameters()).device
    groups = {}  # (lr, weight decay) -> parameters; no decay on biases, norms and tokens, as in pretraining
    for name, p in network.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim <= 1 or name.endswith(("bias", "query", "tokens")) else args.weight_decay
            groups.setdefault((lr * args.learned_lr if id(p) in learned else lr, decay), []).append(p)
    optimizer = torch.optim.AdamW([dict(params=p, lr=r, weight_decay=d) for (r, d), p in groups.items()], fused=True)
    schedule = lambda i: min(1, 10 * (i + 1) / args.steps) * 0.5 * (1 + math.cos(math.pi * i / args.steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator(device).manual_seed(seed)
    orders = {name: torch.empty(0, dtype=torch.long) for name in tasks}
    for _ in tqdm(range(args.steps), desc=title, leave=False):
        parts, labels = {}, {}
        for name, task in tasks.items():
            images, truth = inputs[name]["train"], task.data["train"][1]
            if len(orders[name]) < batch:  # a new epoch
                orders[name] = torch.randperm(len(images), device=device, generator=generator).to(images.device)
            now, orders[name] = orders[name].tensor_split([batch])
            parts[name], labels[name] = images[now].to(device), truth[now].to(device).long()
            if args.augment:
                crop = iwm.random_crop_flip(to_float(parts[name]), network.config, generator)
                parts[name] = (255 * crop).round().byte()
        with train.autocast(network.config, device):
            logits = network(parts)
        losses = [F.cross_entropy(logits[n].float(), labels[n], ignore_index=t.ignored) for n, t in tasks.items()]
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return bool(loss.isfinite())


@torch.no_grad()
def encoded(cache: dict, who: tuple, encode, images: Tensor, config: Config, device) -> Tensor:
    """encode(float images) of all uint8 images, in chunks. Kept in `cache` until another encoder (`who`) asks."""
    if cache.get("who") != who:
        cache.clear()
        cache["who"] = who
    key = images.data_ptr(), len(images)  # tasks on the same images share them
    if key not in cache:
        with train.autocast(config, device):
            cache[key] = torch.cat([encode(to_float(part, device)) for part in images.split(250)])
    return cache[key]


def inputs_of(network: Network, row: str, tasks: dict[str, Task], seed: int, args, cache: dict) -> dict:
    """task -> split -> uint8 images or, where a frozen encoder would give the same at every step, their latents."""
    inputs = {name: {split: images for split, (images, _) in task.data.items()} for name, task in tasks.items()}
    if ROWS[row][0].startswith("frozen") and not args.augment:
        config, device = network.config, next(network.parameters()).device
        who = ROWS[row][0], seed * ("random" in ROWS[row][0])
        dtype = train.precision(config, device)
        for splits in inputs.values():
            for split, images in splits.items():
                splits[split] = encoded(cache, who, lambda x: network.encoder(x).to(dtype), images, config, device)
    return inputs


def trained_row(row: str, model: IWM, tasks: dict[str, Task], batch: int, seed: int, args, cache: dict) -> dict:
    """Train one row with one seed, choose its lr on the held-out split, read the test set once."""
    best = None
    for lr in args.lr or [ROWS[row][2]]:
        network = Network(row, model, tasks, seed)
        inputs = inputs_of(network, row, tasks, seed, args, cache)
        if not fit(network, tasks, inputs, batch, lr, seed, args, f"{row}, seed {seed}, lr {lr:g}"):
            tqdm.write(f"{row}: diverged at lr {lr:g}")
            continue
        val = {name: score(network, name, task, "val", inputs[name]["val"]) for name, task in tasks.items()}
        if best is None or sum(val.values()) > sum(best["val"].values()):
            best, chosen = {"val": val, "lr": lr}, network
    if best is None:
        die(f"{row} diverged at every lr of --lr: lower it")
    trainable = sum(p.numel() for p in chosen.parameters() if p.requires_grad)
    test = {name: score(chosen, name, task, "test", inputs[name]["test"]) for name, task in tasks.items()}
    return best | {"test": test, "trainable": trainable}


def closed_form_row(row: str, model: IWM, tasks: dict[str, Task], seed: int, pooled: dict) -> dict:
    """knn or linear (ridge regression), then whose mean-pooled latents: nothing is trained by gradient.

    "K imagined" is the mean over K random actions of what the predictor imagines (paper: does it make them invariant?).
    `pooled` keeps what each (source, seed) gave, so that kNN and linear probe share it.
    deviation: as in finetuning, the predictor gets the teacher's latents; it was trained on the student's.
    """
    probe, source = row.split(", ")
    config, device = model.config, next(model.parameters()).device
    cache = pooled.setdefault((source, seed), {})
    torch.manual_seed(seed)
    random, generator = IWM(config).to(device), torch.Generator(device).manual_seed(seed)

    def imagined(images):
        z, variants = model.teacher(images), int(source.split()[0])
        params = (iwm.jitter_params(len(z), config, generator, device, always=True) for _ in range(variants))
        return sum(model.predictor.everywhere(z, iwm.bank_actions(p, config)).float() for p in params) / variants

    encode = {
        "random init": random.encoder,
        "encoder": model.encoder,
        "teacher": model.teacher,
        "predictor": lambda images: model.predictor.everywhere(z := model.teacher(images), null_action(z)),
    }.get(source, imagined)
    accuracy = iwm.knn_accuracy if probe == "knn" else iwm.linear_accuracy
    result: dict = {"val": {}, "test": {}, "lr": None, "trainable": 0}
    for name, task in tasks.items():
        parts = {}
        for split, (images, labels) in task.data.items():
            features = encoded(cache, (), lambda x: encode(x).float().mean(dim=1), images, config, device)
            parts[split] = features, labels.to(device)
        for split in ("val", "test"):
            result[split][name] = accuracy(*parts["train"], *parts[split])
        result["trainable"] += (config.width + 1) * task.classes if probe == "linear" else 0
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The command line and the table
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="+", help="last.pt of a run of train.py or its folder; a finetune.jsonl: print "
        "its tables; several of them: mean and deviation over runs that differ by their seed")  # fmt: skip
    add("--protocol", choices=PROTOCOLS, default="predictor", help="which rows (default: predictor and its controls)")
    add("--task", default="classify", help="classify | segment | a list: factors of shapes (shape,colour,texture,"
        "background), data sets (cifar10,cifar100) or folders. factors takes all four factors by itself")  # fmt: skip
    add("--data", help="shapes | cifar10 | cifar100 | pets (segment) | a folder (default: what the checkpoint saw)")
    add("--labels", type=int, default=0, help="train on the first N labelled images only (default: 0, all)")
    add("--seeds", type=int, default=1, help="seeds per row; the table gives mean and standard deviation")
    add("--seed", type=int, default=0, help="the first of them")
    add("--steps", type=int, default=300, help="optimiser steps of a trained row")
    add("--batch-size", type=int, default=64, help="images a step, shared among the tasks")
    add("--lr", help="of random weights (default: each row's own); from a list, 1e-3,3e-3, a row takes the best on "
        "held-out images")  # fmt: skip
    add("--learned-lr", type=float, default=USUAL["learned_lr"], help="the lr of learned weights, as a share of --lr")
    add("--weight-decay", type=float, default=USUAL["weight_decay"], help="of AdamW")
    add("--augment", action="store_true", help="random crops and flips; frozen latents are then computed at every step")
    add("--out", type=Path, help="folder of finetune.jsonl (default: the checkpoint's)")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--resume", action="store_true", help="skip the rows that finetune.jsonl has from the same settings")
    parser.error = lambda message: die(f"{message}; see --help")  # one line instead of the list of all flags
    args = parser.parse_args(argv)
    args.files = [file / "last.pt" if file.is_dir() else file for file in args.checkpoint]
    args.checkpoint = args.files[0]
    if len(args.files) > 1 and {file.suffix for file in args.files} != {".jsonl"}:
        die("one checkpoint at a time: only finetune.jsonl files can be several")
    args.tasks = list(FACTORS if args.protocol == "factors" and args.task == "classify" else args.task.split(","))
    try:
        args.lr = [float(lr) for lr in args.lr.split(",")] if args.lr else []
    except ValueError:
        die(f"--lr {args.lr} is not a number, or several with commas between them")
    for name, low in {"seeds": 1, "steps": 1, "batch_size": 1, "labels": 0, "seed": 0}.items():
        if not low <= getattr(args, name) < 10**9:
            die(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be between {low} and 999999999")
    if not all(0 < lr < 10 for lr in [*args.lr, args.learned_lr]) or not 0 <= args.weight_decay <= 10:
        die("--lr and --learned-lr must be above 0, --weight-decay at least 0, all below 10")
    if len(set(args.tasks)) < len(args.tasks) or args.batch_size < len(args.tasks):
        die(f"--task {args.task}: name each task once, at most --batch-size of them")
    alone = not args.augment and len(args.tasks) == 1 and args.protocol not in ("knn", "linear", "average", "factors")
    if "segment" in args.tasks and not alone:
        die("--task segment stands alone, without --augment, and not with the protocols knn, linear, average, factors")
    return args


def load_checkpoint(path: Path, device) -> IWM:
    """last.pt of train.py -> IWM on the device. Read with weights_only: nothing in the file is run."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model = IWM(Config(**state["config"])).to(device)
        model.load_state_dict(state["model"])
        return model.requires_grad_(False)
    except Exception as error:  # a damaged or foreign file can raise anything
        die(f"{path} is not a checkpoint of train.py: {train.brief(error)}")


def read_rows(file: Path) -> list[dict]:
    """The rows of a finetune.jsonl; none if there is no such file. A last line that was cut off does not count."""
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    except (OSError, ValueError) as error:
        die(f"{file} cannot be read: {error}")


def append(file: Path, text: str):
    """Add text on a line of its own, even if the last line was cut off."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+") as lines:
            lines.seek(max(lines.tell() - 1, 0))
            if lines.read(1) not in ("", "\n"):
                lines.write("\n")
            lines.write(text)
    except OSError as error:
        die(f"cannot write {file}: {error}")


def by_settings(records: list[dict], *ignored: str) -> dict[str, dict[str, dict[int, dict]]]:
    """settings (as JSON) -> row -> seed -> record; where a row was computed twice the last one counts."""
    others, found = ("row", "seed", "val", "test", "lr", "trainable", "encoder", "seconds", *ignored), {}
    for record in records:
        settings = json.dumps({name: value for name, value in record.items() if name not in others})
        found.setdefault(settings, {}).setdefault(record["row"], {})[record["seed"]] = record
    return found


def over_runs(runs: list[list[dict]]) -> list[dict]:
    """Runs that differ by their seed as if they were one checkpoint, whose seeds are the runs; one run as it is.

    Of a run a row's score is the mean over its finetuning seeds. A row that some of the runs lack is left out.
    """
    if len(runs) == 1:
        return runs[0]
    pooled, alike = [], {}  # settings -> the rows of each run that has them
    for records in runs:
        for settings, rows in by_settings(records, "checkpoint").items():
            alike.setdefault(settings, []).append(rows)
    for tables in alike.values():
        for row in tables[0]:
            found = [[*rows[row].values()] for rows in tables if row in rows]
            if len(found) == len(tables):
                name = " ".join(seeds[0]["checkpoint"] for seeds in found)
                for seed, same in enumerate(found):
                    test = {task: statistics.mean(r["test"][task] for r in same) for task in same[0]["test"]}
                    pooled.append(same[0] | {"seed": seed, "checkpoint": name, "test": test})
    return pooled


def describe(records: list[dict]) -> str:
    """A Markdown table for each set of settings, with its heading: percent, mean and deviation over the seeds."""
    text = []
    for settings, rows in by_settings(records).items():
        now = json.loads(settings)
        measure = "mIoU" if now["tasks"] == ["segment"] else "accuracy"
        how = [f"{Path(now['data']).name}, {measure} on test images in %; {now['labels'] or 'all'} training labels"]
        if any(record["lr"] for seeds in rows.values() for record in seeds.values()):  # some row is trained
            how.append(f"{now['steps']} steps of {now['batch_size']} images{', augmented' * now['augment']}")
        if now["lrs"]:
            how.append(f"lr of {' or '.join(f'{lr:g}' for lr in now['lrs'])}")
        how += [f"{name} {now[name]:g}" for name, value in USUAL.items() if now[name] != value]
        text.append(", ".join([*how, f"checkpoint {now['checkpoint']} of {now['run']}"]))
        columns = [*now["tasks"], *(["mean"] if len(now["tasks"]) > 1 else [])]
        lines = ["| " + " | ".join(["row", "trained parameters", "of encoder", *columns, "lr", "seconds"]) + " |"]
        lines.append("|---" * (len(columns) + 5) + "|")
        for row, seeds in rows.items():
            same = list(seeds.values())
            cells = [row, f"{same[0]['trainable']:,}", f"{100 * same[0]['trainable'] / same[0]['encoder']:.0f} %"]
            scores = [record["test"] | {"mean": statistics.mean(record["test"].values())} for record in same]
            cells += [train.mean_std([100 * score[name] for score in scores], 1) for name in columns]
            cells.append(", ".join(f"{lr:g}" for lr in sorted({lr for record in same for lr in record["lr"]})) or "-")
            cells.append(f"{statistics.mean(record['seconds'] for record in same):.0f}")
            lines.append("| " + " | ".join(cells) + " |")
        text.append("\n".join(lines))
    return "\n\n".join(text)


def main():
    args = parse()
    if args.checkpoint.suffix == ".jsonl":
        try:
            tables = describe(over_runs([read_rows(file) for file in args.files]))
        except (KeyError, TypeError):
            die(f"{' '.join(map(str, args.files))}: no finetune.jsonl of this version of finetune.py")
        if not tables:
            die(f"{' '.join(map(str, args.files))}: no rows of finetune.py" + " in common" * (len(args.files) > 1))
        print(tables)
        return
    if train.WORLD > 1:
        die("finetune.py runs on one device: start it without torchrun")
    train.keep_memory()
    device = train.choose_device(args.device)
    model = load_checkpoint(args.checkpoint, device)
    run = f"{Path(model.config.data).name} {train.as_flags(model.config)}"
    config = model.config = replace(model.config, data=args.data or model.config.data, batch_size=1)
    tasks = load_tasks(args.tasks, config, args.labels, device, args.checkpoint.parent.parent / "cache")
    args.tasks = list(tasks)
    batch = min([args.batch_size // len(tasks), *(len(task.data["train"][1]) for task in tasks.values())])
    file = (args.out or args.checkpoint.parent) / "finetune.jsonl"
    settings = {name: getattr(args, name) for name in ("tasks", "labels", "steps", "batch_size", "learned_lr",
                                                       "weight_decay", "augment")}  # fmt: skip
    weights = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:12]
    settings |= {"data": config.data, "lrs": args.lr, "checkpoint": weights, "run": run}
    settings["encoder"] = sum(p.numel() for p in model.encoder.parameters())
    known = read_rows(file)
    append(file, "")  # can it be written?

    records, cache, pooled, dense = [], {}, {}, "segment" in tasks
    for row in PROTOCOLS[args.protocol]:
        if dense and row not in ROWS:
            continue
        ways = {row.replace("attentive", "linear per patch") if dense else row: [tasks]}
        if len(tasks) > 1 and row in ROWS and not row.startswith("attentive"):  # there is something to share
            ways = {f"{row}, shared": [tasks], f"{row}, one each": [{name: task} for name, task in tasks.items()]}
        repeats = args.seeds if row in ROWS or "random" in row or "imagined" in row else 1  # others have no randomness
        for (name, groups), seed in itertools.product(ways.items(), range(args.seed, args.seed + repeats)):
            record = {"row": name, "seed": seed, **settings}
            done = [old for old in known if args.resume and record.items() <= old.items()]
            if done:
                records.append(done[-1])
                continue
            started = time.monotonic()
            parts = [trained_row(row, model, group, batch, seed, args, cache) if row in ROWS
                     else closed_form_row(row, model, group, seed, pooled) for group in groups]  # fmt: skip
            record |= {split: {k: v for part in parts for k, v in part[split].items()} for split in ("val", "test")}
            record["lr"] = [part["lr"] for part in parts if part["lr"]]
            record["trainable"] = sum(part["trainable"] for part in parts)
            record["seconds"] = round(time.monotonic() - started, 1)
            records.append(record)
            append(file, json.dumps(record) + "\n")
            scores = ", ".join(f"{k} {100 * v:.1f}" for k, v in record["val"].items())
            tqdm.write(f"{name}, seed {seed}: {scores} % on held-out images, {record['seconds']:.0f} s")
    print("\n" + describe(records))
    print(f"\nrows kept in {file}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not stop a run
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped: the finished rows are kept, --resume goes on with the others")
        raise SystemExit(130) from None
