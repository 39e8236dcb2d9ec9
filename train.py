"""Learn an image world model, measure it and show it.

    python train.py                                # images it draws itself: no download needed
    python train.py --data cifar10                 # downloads through torchvision
    python train.py --data path/to/folder          # train/CLASS/*.jpg and test/CLASS/*.jpg
    python train.py --conditioning none            # an ablation is one flag
    python train.py --out runs/shapes --resume     # go on with a run that was stopped
    python train.py --measure runs/shapes/last.pt  # measure and draw a checkpoint
    python train.py --table runs/*                 # finished runs, over their seeds
    torchrun --nproc_per_node=2 train.py           # several devices share the batch

A run folder holds config.json, last.pt, metrics.jsonl (held-out images), result.json (test images,
read once), imagine.gif, views.png, retrieval.png (its top: strip.png), plan.png and curves.png.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import iwm
from iwm import IWM, setting
from lab import checkpoints, machine
from lab.data import fingerprint, load_data, to_float
from lab.machine import QUIET, autocast, bf16, peak_memory, set_up
from lab.measures import measure
from lab.pictures import draw, draw_curves
from lab.tables import report, table

# ---- Recipe: the method's settings, and how it is trained ----------------------------------------


@dataclass
class Recipe(iwm.Config):
    """Every setting of a run; the command line is made from it."""

    data: str = setting("shapes", "shapes | cifar10 | cifar100 | a folder with train/ and test/")
    # optimisation, fitted to runs of a few thousand steps
    steps: int = setting(3600, "optimiser steps")
    batch_size: int = setting(32, "images a step")
    lr: float = setting(1e-3, "peak learning rate; lower it if RankMe falls to 1")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = setting(0.04, "of AdamW at the start, not on biases and norms")
    weight_decay_end: float = setting(0.4, "at the end, reached along a cosine")
    ema: float = setting(0.995, "teacher's first momentum, rises linearly to 1")
    seed: int = setting(0, "of weights, data order, views and masks")
    # measuring
    measure_every: int = setting(1200, "steps between measurements on held-out images")
    mrr_images: int = setting(32, "test images that MRR and planning average over at the end")
    # machine
    bf16: bool = setting(True, "compute in bfloat16 where the device has it")
    compile: bool = setting(False, "torch.compile the networks: a slow start, faster steps")


# for a better world model, sooner: one small rectangle is hidden (deviation 1), the loss is taken
# at all patches (2), colours change three times as much (3), the predictor is large (4)
SMALL = dict(
    saturation=0.6, hue=0.3, blocks=1, predict_all=True, patch=4, width=128, depth=4, heads=4,
    pred_width=96,
)  # fmt: skip
PRESETS = {
    # a square of 4 of 36 patches is hidden; 7 minutes of two CPU cores, MRR 0.89
    "shapes": Recipe(
        **SMALL, image_size=24, pred_depth=4, block_min=0.11, block_max=0.11, context=0.89
    ),
    # 6 of 64 patches are hidden; 7 minutes of a GPU, MRR 0.88
    "cifar": Recipe(
        **SMALL, image_size=32, pred_depth=6, block_min=0.09, block_max=0.11, context=0.91,
        data="cifar10", steps=14_000, measure_every=3500,
    ),
    # 70 minutes of a GPU; 2,000 steps of 128 have MRR 0.72, never trained to its end
    "imagenet100": Recipe(
        data="", image_size=160, width=384, depth=12, heads=6, pred_width=192, pred_depth=12,
        block_min=0.04, block_max=0.06, context=0.82, predict_all=True,
        steps=100_000, batch_size=256, ema=0.996, measure_every=10_000,
    ),
    # the paper's masks and loss; timed on a GPU, never trained
    "paper": Recipe(
        data="", steps=375_000, batch_size=1024, warmup=40 / 300, ema=0.996, measure_every=25_000
    ),
}  # fmt: skip


# ---- Training: batches, schedules, optimiser, a step, the loop -----------------------------------


def batches(images: Tensor, recipe: Recipe, start: int, device):
    """The uint8 images of each step from `start` on, on the device; they follow from (seed, step).

    The next batch is gathered and copied by a background thread while a step runs.
    """
    B, per_epoch = recipe.batch_size, len(images) // recipe.batch_size

    def gather(step):
        epoch, i = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(recipe.seed * 10**8 + epoch)
        order = torch.randperm(len(images), generator=generator)
        mine = order[i * B :][:B][machine.RANK :: machine.WORLD]
        return images[mine.to(images.device)].to(device)

    # one thread of its own: a team of them would take the step's cores
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        following = thread.submit(gather, start)
        for step in range(start, recipe.steps):
            now, following = following.result(), thread.submit(gather, step + 1)
            yield now


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
    """AdamW; no weight decay on biases and 1-D weights, as in I-JEPA."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in named if p.ndim <= 1 or name.endswith("bias")]
    groups: list[dict] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def train_step(model, optimizer, images: Tensor, step: int, recipe: Recipe, generator) -> Tensor:
    """One step on uint8 images [B, 3, S, S] -> its loss, left on the device."""
    # everything random follows from (rank, seed, step): a resumed run repeats what would have been
    generator.manual_seed(recipe.seed * 10**8 + step + machine.RANK * 10**17)
    with autocast(recipe, images.device):
        loss = model(to_float(images), generator)
    loss.backward()
    lr, weight_decay, momentum = schedule(step, recipe)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    getattr(model, "module", model).update_teacher(momentum)  # torchrun wraps the model
    return loss.detach()


def new_or_resumed(recipe: Recipe, identity: str, out: Path, device, resume: bool):
    """A new run, or one that goes on -> its model, its optimiser, and where it stands."""
    torch.manual_seed(recipe.seed)
    model = IWM(recipe).to(device)
    optimizer = make_optimizer(model, recipe)
    state = dict(data=identity, step=0, seconds=0.0, losses=[], metrics=[])
    if resume and (out / "last.pt").exists():
        state |= checkpoints.read_checkpoint(out, device, Recipe)
        if state["data"] != identity:
            sys.exit(f"{out} was trained on other images than those of {recipe.data}")
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    return model, optimizer, state


def train(recipe: Recipe, data: dict, out: Path, device, resume: bool = False) -> tuple[IWM, float]:
    """Train to the end, from the beginning or from out/last.pt -> the model, and the seconds."""
    model, optimizer, state = new_or_resumed(recipe, fingerprint(data), out, device, resume)
    step, losses, metrics = state["step"], state["losses"], state["metrics"]
    began = time.monotonic() - state["seconds"]
    writes = machine.RANK == 0  # one of several processes

    def seconds():
        return time.monotonic() - began

    def save():
        now = dict(config=asdict(recipe), data=state["data"], step=step, seconds=seconds())
        now |= dict(losses=losses, metrics=metrics)
        now |= dict(model=model.state_dict(), optimizer=optimizer.state_dict())
        with checkpoints.whole(out / "last.pt") as aside, open(aside, "wb") as file:
            torch.save(now, file)
        (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))

    def record():
        loss = statistics.mean(losses) if losses else None
        now = dict(step=step, images=step * recipe.batch_size, seconds=seconds(), loss=loss)
        now |= measure(model, data, "val", mrr_images=4, probe_images=2000)
        now["memory_gib"] = peak_memory(device)
        metrics.append(now)
        losses.clear()
        if now["rankme"] < min(2, metrics[0]["rankme"] / 2):
            tqdm.write("RankMe fell below 2: collapsed, lower --lr or raise --ema", sys.stderr)
        save()
        draw_curves(metrics, out / "curves.png")

    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor)]
    print(f"{out}: encoder {sizes[0]:,} and predictor {sizes[1]:,} parameters, "
          f"{len(data['train'][1])} training images, {machine.WORLD} x {device}, "
          f"bfloat16 {bf16(recipe, device)}, from step {step}")  # fmt: skip
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(recipe), indent=1))
        if not metrics:
            record()

    if recipe.compile:
        for part in (model.encoder, model.teacher, model.predictor):  # CUDA graphs on a GPU
            part.compile(mode="reduce-overhead" if device.type == "cuda" else "default")
    step_model = nn.parallel.DistributedDataParallel(model) if machine.LAUNCHED else model
    generator, running, saved = torch.Generator(device), [], time.monotonic()
    bar = tqdm(total=recipe.steps, initial=step, disable=not writes, **QUIET)
    for images in batches(data["train"][0], recipe, step, device):
        running.append(train_step(step_model, optimizer, images, step, recipe, generator))
        step += 1
        bar.update()

        # now and then a look at the loss, a measurement (due) or a save (late)
        due = step % recipe.measure_every == 0 or step == recipe.steps
        late = time.monotonic() - saved > 120
        if len(running) < 20 and not due and not late:
            continue
        losses += torch.stack(running).tolist()  # only here the host waits for the device
        running.clear()
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if not math.isfinite(losses[-1]):
            sys.exit(f"the loss is not finite at step {step}: lower --lr")
        if writes and due:
            record()
        elif writes and late:
            save()
        if due or late:
            saved = time.monotonic()
    bar.close()
    return model, seconds()


# ---- Checkpoints and the command line ------------------------------------------------------------


def load_checkpoint(path: Path | str, device) -> IWM:
    """A run's folder or its last.pt -> IWM, frozen."""
    return checkpoints.load_model(path, device, Recipe)


def parse(argv=None) -> tuple[argparse.Namespace, dict]:
    """Command line -> the options, and the settings of Recipe that were given."""
    wide = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=120)
    text = f"{__doc__}\nIn brackets: the values of shapes."
    parser = argparse.ArgumentParser(description=text, formatter_class=wide)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="start from it (default: what suits --data)")
    add("--out", type=Path, help="run folder (default: runs/ + preset + the flags that differ)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--measure", type=Path, metavar="CHECKPOINT", help="measure and draw it")
    add("--table", type=Path, nargs="+", metavar="RUN", help="print a table of finished runs")
    for f in fields(Recipe):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help = f"{f.metadata['help']} ({getattr(PRESETS['shapes'], f.name)})"
        add(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, help=help, **kind)
    parser.error = lambda message: sys.exit(f"{message}; see --help")  # not the list of all flags
    args = parser.parse_args(argv)
    return args, {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}


def change(recipe: Recipe, given: dict) -> Recipe:
    """The recipe with the given settings; one line if a setting is wrong."""
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
    out = args.out or Path("runs") / ",".join([preset, *changed])
    stored = out / "config.json"
    if not stored.exists():
        return change(recipe, given), out
    if not args.resume:
        sys.exit(f"{out} holds a run already: add --resume to go on, or choose another --out")
    try:
        recipe = Recipe(**json.loads(stored.read_text()))
    except (TypeError, ValueError) as error:
        sys.exit(f"{stored}: {error}")
    wanted = (asdict(PRESETS[preset]) if args.preset else {}) | given
    differs = [f"{n} was {getattr(recipe, n)}, now {v}" for n, v in wanted.items()
               if n != "data" and v != getattr(recipe, n)]  # fmt: skip
    if differs:
        sys.exit(f"{out} cannot go on with other settings: {'; '.join(differs)}")
    return replace(recipe, data=given.get("data", recipe.data)), out  # data may have moved


def measure_checkpoint(args, given: dict, device):
    """--measure: the pictures and the last table of a checkpoint, on the data given."""
    model = load_checkpoint(args.measure, device)
    free = ("data", "bank", "mrr_images", "bf16")  # the checkpoint decides everything else
    differs = [f"{n} {getattr(model.config, n)}, not {v}" for n, v in given.items()
               if n not in free and v != getattr(model.config, n)]  # fmt: skip
    if differs:
        sys.exit(f"{args.measure} was trained with {'; '.join(differs)}")
    model.config = change(model.config, given)
    file = checkpoints.checkpoint_file(args.measure)
    name = file.resolve().parent.name if file.name == "last.pt" else file.stem
    out = args.out or Path("runs") / f"measured-{name}"
    data = load_data(model.config, device, out.parent / "cache")
    out.mkdir(parents=True, exist_ok=True)
    draw(model, data, out)
    report(model, data, out)


def main():
    args, given = parse()
    if args.table:
        return print(table(args.table))
    device = set_up(args.device, shared=not args.measure)
    if args.measure:
        return measure_checkpoint(args, given, device)

    recipe, out = choose_recipe(args, given)
    if recipe.batch_size % machine.WORLD:
        sys.exit(f"batch_size {recipe.batch_size} must be a multiple of the number of processes")
    if machine.RANK > 0:
        dist.barrier()  # rank 0 downloads or decodes first, the others find it done
    data = load_data(recipe, device, out.parent / "cache")
    if machine.LAUNCHED and machine.RANK == 0:
        dist.barrier()  # now the others may

    n = len(data["train"][1])
    if n < recipe.batch_size:
        sys.exit(
            f"{recipe.data} has {n} training images: too few for --batch-size {recipe.batch_size}"
        )
    model, seconds = train(recipe, data, out, device, args.resume)
    if machine.RANK == 0:
        draw(model, data, out)
        report(model, data, out, seconds)
    if machine.LAUNCHED:  # processes end together
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the same command with --resume goes on, two minutes back at most")
    except OSError as error:  # of the disk or network: a full disk, a folder without access
        sys.exit(f"{error}")
