"""Tables: the last one of a run, finished runs side by side, rows of finetuning."""

import itertools
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import iwm
from iwm import IWM
from lab.machine import bf16, peak_memory
from lab.measures import measure


def mean_std(values: list[float], digits: int = 1) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(folders: list[Path]) -> str:
    """Markdown. Runs that differ in their seed only are a row: mean and deviation."""
    rows: dict[str, list] = {}
    for folder in folders:
        if (folder / "result.json").exists():
            run = json.loads((folder / "result.json").read_text())
            settings = json.dumps(run["config"] | {"seed": None}, sort_keys=True)
            rows.setdefault(settings, []).append(run | {"name": folder.name})
        elif folder.name != "cache":
            print(f"{folder} is no finished run: left out", file=sys.stderr)
    if not rows:
        sys.exit("--table found no finished run")
    names = ("mrr", "mrr_paper", "hit1", "plan_left", "knn", "linear")
    lines = [f"| run | seeds | {' | '.join(names)} | minutes |", "|---" * (len(names) + 3) + "|"]
    for runs in rows.values():
        name = re.sub(r",?seed=\d+", "", runs[0]["name"])
        cells = [mean_std([run["trained"].get(n, math.nan) for run in runs], 3) for n in names]
        minutes = mean_std([(run["seconds"] or 0) / 60 for run in runs], 0)
        lines.append(f"| {' | '.join([name, str(len(runs)), *cells, minutes])} |")
    return "\n".join(lines)


def report(model: IWM, data: dict, out: Path, seconds: float | None = None):
    """The last table: this network and a randomly initialised one on the test images."""
    recipe, device = model.config, next(model.parameters()).device
    few = math.ceil(recipe.mrr_images / 8)
    print(f"measuring on test images (MRR and planning: {recipe.mrr_images}, random init: {few}; "
          f"probes: all, fitted on {len(data['train'][1])} training images) ...")  # fmt: skip
    torch.manual_seed(recipe.seed)
    trained = measure(model, data, "test", recipe.mrr_images)
    untrained = measure(IWM(recipe).to(device), data, "test", few)
    used = asdict(recipe) | {"bf16": bf16(recipe, device)}
    result = {"trained": trained, "random": untrained, "config": used}
    result |= {"seconds": seconds, "memory_gib": peak_memory(device)}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    by_class = 1 / (int(data["train"][1].max()) + 1)
    chance = dict(mrr=iwm.chance(recipe.bank), mrr_paper=iwm.chance(recipe.bank))
    chance |= dict(hit1=1 / recipe.bank, plan_left=1, knn=by_class, linear=by_class)
    print(f"\n{'test images':12} {'this run':>9} {'random init':>12} {'chance':>8}")
    for name, by_chance in chance.items():
        print(f"{name:12} {trained[name]:9.4f} {untrained[name]:12.4f} {by_chance:8.4f}")
    print("\nmrr: variants from the model's own jitter; mrr_paper: from the paper's")
    print(f"see {out}" if seconds is None else f"{seconds / 60:.1f} minutes; see {out}")


def finetuning_table(records: list[dict], tasks: list[str]) -> str:
    """Rows of finetune.py as Markdown: percent, mean and deviation over the seeds."""
    lines = ["| row | trained parameters | " + " | ".join([*tasks, "seconds"]) + " |"]
    lines.append("|---" * (len(tasks) + 3) + "|")
    for row, same in itertools.groupby(records, lambda record: record["row"]):
        same = list(same)
        scores = [mean_std([100 * r["test"][name] for r in same]) for name in tasks]
        seconds = mean_std([r["seconds"] for r in same], 0)
        lines.append(
            f"| {row} | {same[0].get('trainable', 0):,} | {' | '.join([*scores, seconds])} |"
        )
    return "\n".join(lines)
