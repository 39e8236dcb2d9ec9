"""Use the learned world model: finetune the predictor on a task, beside its controls, in one table.

    python finetune.py runs/shapes/last.pt                        # the predictor and its controls
    python finetune.py runs/shapes/last.pt --protocol table --seeds 3  # every row, over seeds
    python finetune.py runs/shapes/last.pt --task shape,colour    # several tasks with one predictor
    python finetune.py runs/shapes/last.pt --task segment         # a class for each pixel: mIoU
    python finetune.py runs/shapes/last.pt --protocol average     # probe K imagined variants' mean
    python finetune.py runs/shapes/last.pt --protocol factors     # what the latents of each hold
    python finetune.py assets/cifar.pt --data cifar10             # the published weights

ROWS below says what a row makes of encoder and predictor. "Frozen" is the checkpoint's EMA teacher;
"learned" starts from the checkpoint (the encoder from the teacher) and is trained; "random" is
initialised anew. A learned query reads the latents; "knn" and "linear" read their mean.

The predictor gets the latents of the clean image, a mask token at every position and the null
action: it predicts the whole, untransformed image. A row is written to finetune.jsonl beside the
checkpoint as soon as it is known.
"""

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import iwm
from iwm import IWM
from lab import data as images_of
from lab import measures
from lab.data import to_float
from lab.machine import QUIET, autocast, set_up
from lab.measures import mean_std
from train import load_checkpoint

# row: encoder, predictor, lr of random weights (the better of 1e-3 and 3e-3 on CIFAR-10's val)
ROWS = {
    "attentive, random init": ("frozen, random", None, 3e-3),
    "attentive": ("frozen", None, 3e-3),
    "random predictor": ("frozen", "random", 1e-3),
    "learned predictor": ("frozen", "learned", 3e-3),
    "encoder": ("learned", None, 3e-3),
    "end-to-end": ("learned", "learned", 3e-3),
    "scratch": ("random", "random", 1e-3),
}
# deviation: learned weights have this share of their row's own lr; the paper's is of a random one's
LEARNED = 0.1
PROTOCOLS = {
    "predictor": list(ROWS)[:4],
    "table": ["knn, random init", "knn, teacher", "linear, random init", "linear, teacher", *ROWS],
    "average": ["linear, teacher", "linear, predictor"]
    + [f"linear, {K} imagined" for K in (1, 8, 32)],
    "factors": [f"linear, {whose}" for whose in ("random init", "encoder", "teacher", "predictor")],
}
FACTORS = ("shape", "colour", "texture", "background")  # the labels of shapes


# ---- Tasks: images and what is asked of them -----------------------------------------------------


@dataclass
class Task:
    """data: split -> images [n, 3, S, S] uint8 and labels, [n] int64 or, if dense, [n, S, S]."""

    data: dict[str, tuple[Tensor, Tensor]]

    def __post_init__(self):
        self.dense = self.data["train"][1].ndim == 3
        self.classes = max(int(labels.max()) for _, labels in self.data.values()) + 1


def load_tasks(names: list[str], recipe, labels: int, device, cache: Path) -> dict[str, Task]:
    """classify | on shapes: segment, shape, colour, texture, background. Labels: the first N."""
    if recipe.data == "shapes":
        names = ["shape" if name == "classify" else name for name in names]
    known = (*FACTORS, "segment") if recipe.data == "shapes" else ("classify",)
    for name in set(names) - set(known):
        sys.exit(f"task {name}: on {recipe.data or 'this data'} choose among {', '.join(known)}")
    if recipe.data == "shapes":
        splits = {}
        for seed, (split, n) in enumerate(images_of.SHAPES_IMAGES.items()):
            made = images_of.shapes(n, seed, recipe.image_size)
            # the class of each pixel: 0 is background, then the shapes
            made["segment"] = made["mask"] * (made["shape"] + 1)[:, None, None]
            splits[split] = made
        data = {n: {s: (made["images"], made[n]) for s, made in splits.items()} for n in names}
    else:
        data = {"classify": images_of.load_data(recipe, device, cache)}
    for splits in data.values():
        n = len(splits["train"][1])
        if labels > n:
            sys.exit(f"--labels {labels} is more than the {n} training images")
        splits["train"] = tuple(part[: labels or n] for part in splits["train"])
    return {name: Task(splits) for name, splits in data.items()}


# ---- Networks: an encoder, perhaps the predictor, and a head for each task -----------------------


class AttentiveHead(nn.Module):
    """One learned query attends to the latents, then a linear layer. [B, N, D] -> [B, classes].

    deviation: multi-head attention behind a LayerNorm; the paper's head is not known in detail.
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
    """A linear layer on each patch, upsampled to pixels. [B, N, D] -> logits [B, classes, S, S].

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
    """The parts of a row of the table. `model` is the checkpoint's IWM and is not changed."""

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
        self.frozen = encoder.startswith("frozen")
        self.encoder.requires_grad_(not self.frozen)
        self.predictor = random.predictor if predictor else None
        if predictor == "learned":
            self.predictor.load_state_dict(model.predictor.state_dict())
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            if task.dense:
                self.heads[name] = DenseHead(config.width, config.image_size, task.classes)
            else:
                self.heads[name] = AttentiveHead(config.width, config.heads, task.classes)
        # one token per task tells a shared predictor what is asked
        self.task_tokens = nn.ParameterDict()
        if predictor and len(tasks) > 1:
            for name in tasks:
                self.task_tokens[name] = nn.Parameter(0.02 * torch.randn(1, 1, config.pred_width))
        self.start = {"encoder": encoder, "predictor": predictor}
        self.to(device)

    def forward(self, images: Tensor, task: str) -> Tensor:
        """uint8 images [B, 3, S, S] -> the task's logits, [B, classes] or [B, classes, S, S]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            z = self.encoder(to_float(images))
        if self.predictor:
            token = self.task_tokens[task].expand(len(z), -1, -1) if self.task_tokens else None
            z = self.predictor.everywhere(z, null_action(z), token)
        return self.heads[task](z)


# ---- Training and scores -------------------------------------------------------------------------


def mean_iou(predicted: Tensor, truth: Tensor, classes: int) -> float:
    """Mean over classes of intersection / union, over all pixels of int tensors of one shape.

    A class that neither of them has does not count.
    """
    pairs = (truth.long() * classes + predicted.long()).flatten().bincount(minlength=classes**2)
    confusion = pairs.view(classes, classes).cpu().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
    return (confusion.diagonal() / union)[union > 0].mean().item()


@torch.no_grad()
def score(network: Network, name: str, task: Task, split: str) -> float:
    """Accuracy, or mIoU of a dense task, on one split."""
    (images, labels), device = task.data[split], next(network.parameters()).device
    with autocast(network.config, device):
        logits = (network(part.to(device), name) for part in images.split(250))
        found = torch.cat([part.argmax(dim=1).cpu() for part in logits])
    if task.dense:
        return mean_iou(found, labels.cpu(), task.classes)
    return (found == labels.cpu()).double().mean().item()


def make_optimizer(network: Network, lr: float, steps: int):
    """AdamW; the learned weights at a share of lr; a warm-up over a tenth, times a cosine to 0.

    No weight decay on biases, norms and tokens, as in pretraining.
    """
    groups = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            learned = network.start.get(name.split(".")[0]) == "learned"
            decay = 0.05 if p.ndim == 2 and not name.endswith("bias") else 0.0
            rate = lr * LEARNED if learned else lr
            groups.setdefault((rate, decay), []).append(p)
    groups = [dict(params=p, lr=rate, weight_decay=decay) for (rate, decay), p in groups.items()]
    optimizer = torch.optim.AdamW(groups, fused=True)

    def share(i):
        return min(1, 10 * (i + 1) / steps) * 0.5 * (1 + math.cos(math.pi * i / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def fit(network: Network, tasks: dict[str, Task], lr: float, seed: int, args, title: str):
    """Train everything that is not frozen; a step has a batch of each task, their losses add up.

    deviation: a few hundred steps without augmentation; the paper trains for 100 epochs.
    """
    device, batch = next(network.parameters()).device, args.batch_size // len(args.tasks)
    optimizer, scheduler = make_optimizer(network, lr, args.steps)
    generator = torch.Generator().manual_seed(seed)
    orders = dict.fromkeys(tasks, torch.empty(0, dtype=torch.long))
    for _ in tqdm(range(args.steps), title, leave=False, **QUIET):
        loss = 0
        for name, task in tasks.items():
            images, labels = task.data["train"]
            if len(orders[name]) < batch:  # a new epoch
                orders[name] = torch.randperm(len(images), generator=generator)
            now, orders[name] = orders[name].tensor_split([batch])
            now = now.to(images.device)
            with autocast(network.config, device):
                logits = network(images[now].to(device), name)
            truth = labels[now].to(device).long()
            loss = loss + F.cross_entropy(logits.float(), truth) / len(tasks)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if not loss.isfinite():
        sys.exit(f"{title}: the loss is not finite, lower --lr")


def trained_row(row: str, model: IWM, tasks: dict[str, Task], seed: int, args) -> dict:
    """Train one row with one seed -> its scores on the held-out and the test images."""
    network, lr = Network(row, model, tasks, seed), args.lr or ROWS[row][2]
    fit(network, tasks, lr, seed, args, f"{row}, seed {seed}")
    scores = {split: {name: score(network, name, task, split) for name, task in tasks.items()}
              for split in ("val", "test")}  # fmt: skip
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return scores | {"lr": lr, "trainable": trainable}


@torch.no_grad()
def closed_form_row(row: str, model: IWM, tasks: dict[str, Task], seed: int) -> dict:
    """knn or linear (ridge regression) on somebody's mean-pooled latents; no gradient.

    "K imagined": the mean over K random actions of what the predictor imagines.
    deviation: as in finetuning, the predictor gets the teacher's latents, not the student's.
    """
    probe, whose = row.split(", ")
    config, device = model.config, next(model.parameters()).device
    torch.manual_seed(seed)
    random, generator = IWM(config).to(device), torch.Generator(device).manual_seed(seed)

    def imagined(images):
        z = model.teacher(images)
        actions = [null_action(z)]
        if whose != "predictor":
            K, draw = int(whose.split()[0]), dict(generator=generator, device=device, always=True)
            params = (iwm.jitter_params(len(z), config, **draw) for _ in range(K))
            actions = [iwm.bank_actions(p, config) for p in params]
        return sum(model.predictor.everywhere(z, a).float() for a in actions) / len(actions)

    networks = {"random init": random.encoder, "encoder": model.encoder, "teacher": model.teacher}
    encode = networks.get(whose, imagined)

    def features(images):
        with autocast(config, device):
            parts = images.split(250)
            return torch.cat([encode(to_float(x, device)).float().mean(dim=1) for x in parts])

    accuracy = measures.knn_accuracy if probe == "knn" else measures.linear_accuracy
    result: dict = {"val": {}, "test": {}, "lr": None, "trainable": 0}
    for name, task in tasks.items():
        read = {s: (features(x), labels.to(device)) for s, (x, labels) in task.data.items()}
        for split in ("val", "test"):
            result[split][name] = accuracy(*read["train"], *read[split])
        result["trainable"] += (config.width + 1) * task.classes if probe == "linear" else 0
    return result


# ---- The command line and the table --------------------------------------------------------------


def parse(argv=None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("checkpoint", type=Path, help="last.pt of a run of train.py, or the run's folder")
    add("--protocol", choices=PROTOCOLS, default="predictor", help="which rows")
    add("--task", default="classify", help="classify | segment | shape,colour,texture,background")
    add("--data", help="shapes | cifar10 | cifar100 | a folder (default: what the checkpoint saw)")
    add("--labels", type=int, default=0, help="only the first N training images (default: all)")
    add("--seeds", type=int, default=1, help="seeds per row")
    add("--seed", type=int, default=0, help="the first of them")
    add("--steps", type=int, default=300, help="optimiser steps of a trained row (300)")
    add("--batch-size", type=int, default=64, help="images a step, shared among the tasks (64)")
    add("--lr", type=float, help="of random weights (default: each row's own)")
    add("--out", type=Path, help="folder of finetune.jsonl (default: the run's, or runs/NAME)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    parser.error = lambda message: sys.exit(f"{message}; see --help")
    args = parser.parse_args(argv)
    if args.checkpoint.is_dir():
        args.checkpoint = args.checkpoint / "last.pt"
    if args.out is None:  # the published weights do not lie in a run's folder
        run = args.checkpoint.parent
        args.out = run if (run / "config.json").exists() else Path("runs") / args.checkpoint.stem
    args.tasks = list(dict.fromkeys(args.task.split(",")))
    if args.protocol == "factors" and args.task == "classify":
        args.tasks = list(FACTORS)
    if "segment" in args.tasks and (len(args.tasks) > 1 or args.protocol in ("average", "factors")):
        sys.exit("--task segment stands alone, with the protocols predictor and table")
    if min(args.seeds, args.steps, args.batch_size // len(args.tasks)) < 1 or args.labels < 0:
        sys.exit("--seeds and --steps are 1 or more, --batch-size one or more for each task")
    return args


def describe(records: list[dict], tasks: list[str]) -> str:
    """A Markdown table: percent, mean and deviation over the seeds."""
    lines = ["| row | trained parameters | " + " | ".join([*tasks, "seconds"]) + " |"]
    lines.append("|---" * (len(tasks) + 3) + "|")
    for row, same in itertools.groupby(records, lambda record: record["row"]):
        same = list(same)
        scores = [mean_std([100 * r["test"][name] for r in same]) for name in tasks]
        seconds = mean_std([r["seconds"] for r in same], 0)
        lines.append(f"| {row} | {same[0]['trainable']:,} | {' | '.join([*scores, seconds])} |")
    return "\n".join(lines)


def main():
    args = parse()
    device = set_up(args.device)
    model = load_checkpoint(args.checkpoint, device)
    recipe = replace(model.config, data=args.data or model.config.data, batch_size=1)
    model.config = recipe
    tasks = load_tasks(args.tasks, recipe, args.labels, device, args.out.parent / "cache")
    dense = any(task.dense for task in tasks.values())
    file = args.out / "finetune.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = ("protocol", "labels", "steps", "batch_size")
    settings = {name: getattr(args, name) for name in shown}
    settings |= {"tasks": list(tasks), "data": recipe.data, "checkpoint": str(args.checkpoint)}

    records = []
    for row in PROTOCOLS[args.protocol]:
        if dense and row not in ROWS:
            continue  # a probe of pooled latents has no pixels
        ways = {row.replace("attentive", "linear per patch") if dense else row: [tasks]}
        if len(tasks) > 1 and row in ROWS and not row.startswith("attentive"):
            one_each = [{name: task} for name, task in tasks.items()]
            ways = {f"{row}, shared": [tasks], f"{row}, one each": one_each}
        for (name, groups), i in itertools.product(ways.items(), range(args.seeds)):
            began, seed = time.monotonic(), args.seed + i
            record = {"row": name, "seed": seed, "val": {}, "test": {}, "trainable": 0} | settings
            for group in groups:
                if row in ROWS:
                    part = trained_row(row, model, group, seed, args)
                else:
                    part = closed_form_row(row, model, group, seed)
                record["val"] |= part["val"]
                record["test"] |= part["test"]
                record["trainable"] += part["trainable"]
                record["lr"] = part["lr"]
            record["seconds"] = round(time.monotonic() - began, 1)
            records.append(record)
            with file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            scores = ", ".join(f"{task} {100 * v:.1f}" for task, v in record["val"].items())
            tqdm.write(f"{name}, seed {seed}: {scores} % on held-out images")
    measure = "mIoU" if dense else "accuracy"
    print(f"\n{measure} in % on test images of {recipe.data}, {args.labels or 'all'} labels\n")
    print(describe(records, list(tasks)))
    print(f"\nrows kept in {file}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the finished rows are kept")
    except OSError as error:
        sys.exit(f"{error}")
