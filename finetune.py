"""Use the learned world model: finetune the predictor on a task, beside its controls, in one table.

    python finetune.py runs/shapes/last.pt                        # a short table, in minutes
    python finetune.py runs/shapes/last.pt --epochs 10 --lr 1e-3  # trained for longer
    python finetune.py runs/shapes/last.pt --protocol table       # with kNN and linear probes
    python finetune.py runs/shapes/last.pt --protocol average     # probe K imagined variants' mean
    python finetune.py runs/shapes/last.pt --task shape,colour    # several tasks with one predictor
    python finetune.py runs/shapes/last.pt --task segment         # a class for each pixel: mIoU

The predictor gets the latents of the clean image, a mask token at every position and the null
action: it predicts the whole, untransformed image. A learned query reads what it predicts. A row is
written to finetune.jsonl beside the checkpoint as soon as it is known.
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
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

import iwm
from iwm import IWM
from lab.checkpoints import checkpoint_file
from lab.data import load_tasks, to_float
from lab.machine import QUIET, autocast, set_up
from lab.measures import mean_iou, probe
from lab.tables import finetuning_table
from train import load_checkpoint

# ---- The rows: what each makes of the checkpoint's encoder and predictor -------------------------

# "frozen" and "learned" start from the checkpoint (the encoder from its EMA teacher, as in the
# paper), and "learned" is trained; "new" starts at random and is trained, "random" is not
ROWS = {
    # row: encoder, predictor
    "attentive, random init": ("random", None),
    "attentive": ("frozen", None),
    "random predictor": ("frozen", "new"),
    "learned predictor": ("frozen", "learned"),
    "encoder": ("learned", None),
    "end-to-end": ("learned", "learned"),
    "scratch": ("new", "new"),
}
LEARNED = 0.1  # learned weights have this share of the learning rate of new ones, as in the paper
PROTOCOLS = {
    "rows": [*ROWS],
    "table": ["knn, random init", "knn, teacher", "linear, random init", "linear, teacher", *ROWS],
    "average": ["linear, teacher", "linear, predictor"]
    + [f"linear, {K} imagined" for K in (1, 8, 32)],
}


# ---- Tasks: images and what is asked of them -----------------------------------------------------


@dataclass
class Task:
    """data: split -> images [n, 3, S, S] uint8 and labels, [n] int64 or, if dense, [n, S, S]."""

    data: dict[str, tuple[Tensor, Tensor]]

    def __post_init__(self):
        self.dense = self.data["train"][1].ndim == 3
        self.classes = max(int(labels.max()) for _, labels in self.data.values()) + 1

    def head(self, config) -> nn.Module:
        """A new head: [B, N, D] -> [B, classes], or [B, classes, S, S] if the task is dense."""
        kind = DenseHead if self.dense else AttentiveHead
        return kind(config, self.classes)


# ---- Networks: an encoder, perhaps the predictor, and a head for each task -----------------------


class AttentiveHead(nn.Module):
    """One learned query attends to the latents, then a linear layer. [B, N, D] -> [B, classes].

    Multi-head attention behind a LayerNorm: the paper's head is not known in detail.
    """

    def __init__(self, config: iwm.Config, classes: int):
        super().__init__()
        D = config.width
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.attention = nn.MultiheadAttention(D, config.heads, batch_first=True)
        self.out = nn.Linear(D, classes)

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(z)
        pooled, _ = self.attention(self.query.expand(len(z), -1, -1), z, z, need_weights=False)
        return self.out(pooled.squeeze(1))


class DenseHead(nn.Module):
    """A linear layer on each patch, upsampled to pixels. [B, N, D] -> logits [B, classes, S, S].

    It is the simplest head there is: the paper's is not known.
    """

    def __init__(self, config: iwm.Config, classes: int):
        super().__init__()
        self.grid, self.patch = config.grid, config.patch
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.out = nn.Linear(config.width, classes)

    def forward(self, z: Tensor) -> Tensor:
        logits = rearrange(self.out(self.norm(z)), "b (h w) c -> b c h w", h=self.grid)
        return F.interpolate(logits.float(), scale_factor=self.patch, mode="bilinear")


class Network(nn.Module):
    """The parts of a row of the table. `model` is the checkpoint's IWM and is not changed."""

    def __init__(self, row: str, model: IWM, tasks: dict[str, Task], seed: int):
        super().__init__()
        self.config = config = model.config
        encoder, predictor = ROWS[row]
        self.parts = {"encoder": encoder, "predictor": predictor}
        torch.manual_seed(seed)
        random = IWM(config)
        self.encoder = random.encoder
        if encoder in ("frozen", "learned"):
            self.encoder.load_state_dict(model.teacher.state_dict())
        self.encoder.requires_grad_(encoder in ("learned", "new"))
        self.predictor = random.predictor if predictor else None
        if predictor == "learned":
            self.predictor.load_state_dict(model.predictor.state_dict())
        self.heads = nn.ModuleDict({name: task.head(config) for name, task in tasks.items()})
        # one token per task tells a shared predictor what is asked
        names = tasks if predictor and len(tasks) > 1 else ()
        tokens = {name: 0.02 * torch.randn(1, 1, config.pred_width) for name in names}
        self.task_tokens = nn.ParameterDict(tokens)
        self.to(next(model.parameters()).device)

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Images [B, 3, S, S] in 0..1 -> the task's logits, [B, classes] or [B, classes, S, S]."""
        z = self.encoder(images)
        if self.predictor:
            null_action = z.new_zeros(len(z), len(iwm.ACTION))
            token = self.task_tokens[task].expand(len(z), -1, -1) if self.task_tokens else None
            z = self.predictor.everywhere(z, null_action, token)
        return self.heads[task](z)

    def parameter_groups(self, lr: float) -> list[dict]:
        """New weights with lr, learned ones with a tenth of it.

        No weight decay on biases, norms and tokens, as in pretraining.
        """
        groups: dict = {}
        for part, module in self.named_children():
            rate = lr * LEARNED if self.parts.get(part) == "learned" else lr
            for name, p in module.named_parameters():
                if p.requires_grad:
                    decay = 0.05 if p.ndim == 2 and not name.endswith("bias") else 0.0
                    groups.setdefault((rate, decay), []).append(p)
        return [dict(params=ps, lr=rate, weight_decay=d) for (rate, d), ps in groups.items()]


# ---- Training and scores -------------------------------------------------------------------------


def batches(task: Task, size: int, config, generator, device):
    """Training images [B, 3, S, S] in 0..1 and labels, without end: each once an epoch.

    They are cropped and flipped as in pretraining, the labels of a dense task with them.
    """
    images, labels = task.data["train"]
    while True:
        for i in torch.randperm(len(images), generator=generator).split(size):
            x, truth = to_float(images[i.to(images.device)], device), labels[i.to(labels.device)]
            truth = truth.to(device).long()
            if task.dense:
                x = torch.cat([x, F.one_hot(truth, task.classes).movedim(3, 1)], dim=1)
            x = iwm.random_crop_flip(x, config)
            if task.dense:
                x, truth = x[:, :3], x[:, 3:].argmax(dim=1)
            yield x, truth


def fit(network: Network, tasks: dict[str, Task], seed: int, args, title: str) -> list[dict]:
    """Train everything that is not frozen -> the held-out scores after each epoch.

    A step has a batch of each task, and their losses are averaged. AdamW, its learning rate warmed
    up over a tenth of the steps, times a cosine to 0. The paper trains for 100 epochs.
    """
    device, size = next(network.parameters()).device, args.batch_size // len(tasks)
    torch.manual_seed(seed)  # of the crops
    generator = torch.Generator().manual_seed(seed)
    stream = {n: batches(t, size, network.config, generator, device) for n, t in tasks.items()}
    per_epoch = math.ceil(max(len(task.data["train"][1]) for task in tasks.values()) / size)
    steps = max(round(args.epochs * per_epoch), 1)

    def share(step):
        return min(1, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

    optimizer = torch.optim.AdamW(network.parameter_groups(args.lr), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    curve = []
    for step in tqdm(range(1, steps + 1), title, leave=False, **QUIET):
        losses = []
        for name in tasks:
            images, truth = next(stream[name])
            with autocast(network.config, device):
                logits = network(images, name)
            losses.append(F.cross_entropy(logits.float(), truth))
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % per_epoch == 0 or step == steps:
            curve.append({name: score(network, name, task, "val") for name, task in tasks.items()})
    if not loss.isfinite():
        sys.exit(f"{title}: the loss is not finite, lower --lr")
    return curve


@torch.no_grad()
def score(network: Network, name: str, task: Task, split: str) -> float:
    """Accuracy, or mIoU of a dense task, on one split."""
    (images, labels), device = task.data[split], next(network.parameters()).device
    with autocast(network.config, device):
        logits = (network(to_float(part, device), name) for part in images.split(250))
        found = torch.cat([part.argmax(dim=1).cpu() for part in logits])
    if task.dense:
        return mean_iou(found, labels.cpu(), task.classes)
    return (found == labels.cpu()).double().mean().item()


def run_row(row: str, model: IWM, tasks: dict[str, Task], seed: int, args) -> dict:
    """Train or probe one row with one seed -> what a line of finetune.jsonl says of it."""
    if row not in ROWS:  # in closed form, on mean-pooled latents
        found = {name: probe(row, model, task.data, seed) for name, task in tasks.items()}
        return {s: {n: scores[s] for n, scores in found.items()} for s in ("val", "test")}
    network = Network(row, model, tasks, seed)
    curve = fit(network, tasks, seed, args, f"{row}, seed {seed}")
    test = {name: score(network, name, task, "test") for name, task in tasks.items()}
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {"val": curve[-1], "test": test, "curve": curve, "trainable": trained}


# ---- The command line and the table --------------------------------------------------------------


def parse(argv=None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    known = [*PROTOCOLS, *ROWS]
    add("checkpoint", type=Path, help="last.pt of a run of train.py, or the run's folder")
    add("--protocol", choices=known, default="rows", metavar="P", help=" | ".join(known))
    add("--task", default="classify", help="classify | segment | shape,colour,texture,background")
    add("--data", help="shapes | cifar10 | cifar100 | a folder (default: what the checkpoint saw)")
    add("--labels", type=int, default=0, help="only the first N training images (default: all)")
    add("--seeds", type=int, default=1, help="seeds per row")
    add("--seed", type=int, default=0, help="the first of them")
    add(
        "--epochs", type=float, default=2, help="passes over the training images (2: a short table)"
    )
    add("--batch-size", type=int, default=64, help="images a step, shared among the tasks (64)")
    add("--lr", type=float, default=2e-3, help="of new weights, of learned ones a tenth (2e-3)")
    add("--out", type=Path, help="folder of finetune.jsonl (default: the run's)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    parser.error = lambda message: sys.exit(f"{message}; see --help")
    args = parser.parse_args(argv)
    args.checkpoint = checkpoint_file(args.checkpoint)
    if args.out is None:  # the published weights do not lie in a run's folder
        run = args.checkpoint.parent
        name = f"finetuned-{args.checkpoint.stem}"
        args.out = run if (run / "config.json").exists() else Path("runs") / name
    args.tasks = list(dict.fromkeys(args.task.split(",")))
    if "segment" in args.tasks and len(args.tasks) > 1:
        sys.exit("--task segment stands alone: its predictor is not shared")
    if min(args.seeds, args.batch_size // len(args.tasks)) < 1 or args.labels < 0:
        sys.exit("--seeds must be 1 or more, --batch-size one for each task, --labels 0 or more")
    return args


def main():
    args = parse()
    device = set_up(args.device)
    model = load_checkpoint(args.checkpoint, device)
    recipe = model.config = replace(model.config, data=args.data or model.config.data)
    tasks = load_tasks(args.tasks, recipe, args.labels, device, args.out.parent / "cache")
    tasks = {name: Task(data) for name, data in tasks.items()}
    dense = any(task.dense for task in tasks.values())
    rows = PROTOCOLS.get(args.protocol, [args.protocol])
    rows = [row for row in rows if row in ROWS or not dense]  # pooled latents have no pixels
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "finetune.jsonl"
    settings = {name: getattr(args, name) for name in ("labels", "epochs", "batch_size", "lr")}
    settings |= {"tasks": list(tasks), "data": recipe.data, "checkpoint": str(args.checkpoint)}

    records = []
    for row, i in itertools.product(rows, range(args.seeds)):
        began, seed = time.monotonic(), args.seed + i
        record = {"row": row, "seed": seed} | settings | run_row(row, model, tasks, seed, args)
        record["seconds"] = round(time.monotonic() - began, 1)
        records.append(record)
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        scores = ", ".join(f"{task} {100 * v:.1f}" for task, v in record["val"].items())
        tqdm.write(f"{row}, seed {seed}: {scores} % on held-out images")
    print(f"\n{'mIoU' if dense else 'accuracy'} in % on test images of {recipe.data}, "
          f"{args.labels or 'all'} labels, {args.epochs:g} epochs\n")  # fmt: skip
    print(finetuning_table(records, list(tasks)))
    print(f"\nrows kept in {file}")
    if args.epochs < 10:
        print("a short table: scratch hardly starts; try --epochs 10 --lr 1e-3")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the finished rows are kept")
    except OSError as error:
        sys.exit(f"{error}")
