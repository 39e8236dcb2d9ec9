"""Draw the README's figures from assets/results and print their numbers: python assets/figures.py (needs matplotlib)."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from finetune import over_runs, read_rows  # noqa: E402
from iwm import chance  # noqa: E402
from train import mean_std  # noqa: E402

RESULTS = HERE / "results"
GRID = RESULTS / "grid"  # NAME-sSEED.result.json and, of the same run, .finetune.jsonl
CHANCE = chance(256)
plt.rcParams |= {"figure.facecolor": "white", "axes.spines.top": False, "axes.spines.right": False, "font.size": 11}


def accuracies(rows: list[dict]) -> dict[str, dict[int, float]]:
    """Rows of a finetune.jsonl: name -> seed -> test accuracy in percent; of a row that is there twice the last counts."""
    scores = {}
    for row in rows:
        [score] = row["test"].values()  # of its only task
        scores.setdefault(row["row"], {})[row["seed"]] = 100 * score
    return scores


def seeds_of(name: str, ending: str) -> list[Path]:
    """The files of a long run: with seed 0, then with other pretraining seeds."""
    return [*RESULTS.glob(f"{name}.{ending}"), *sorted(RESULTS.glob(f"{name}-s[0-9].{ending}"))]


def runs() -> dict[str, dict[int, dict]]:
    """name -> seed -> measures on the test images, and the test accuracy of each finetuning row in percent."""
    found = {}
    for path in sorted(GRID.glob("*.result.json")):
        name, seed = re.fullmatch(r"(.+)-s(\d+)", path.name.removesuffix(".result.json")).groups()
        run = dict(json.loads(path.read_text())["trained"])
        rows = read_rows(path.with_name(path.name.replace("result.json", "finetune.jsonl")))
        run |= {row: statistics.mean(scores.values()) for row, scores in accuracies(rows).items()}
        run |= {"linear": 100 * run["linear"], "knn": 100 * run["knn"]}
        if "random predictor" in run:
            run["gain"] = run["learned predictor"] - run["random predictor"]
        found.setdefault(name, {})[int(seed)] = run
    return found


def save(figure, name: str):
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)


def conditioning(found):
    """MRR over training (the long runs, each seed a line) and at the end of short runs (each seed a point)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", width_ratios=(2, 1))
    long = (("cifar-preset", "feature, colour x 3, 28,000 steps (the preset)", "C3-"),
            ("cifar-colour", "feature, colour x 3", "C3--"), ("cifar-all", "the same, loss at all patches", "C4-"),
            ("cifar-one-block", "the same, one block masked (2,400 and 3,200 steps)", "C5-"),
            ("cifar-one-block-sequence", "the same, sequence (2,000 steps)", "C1-"),
            ("cifar-feature", "feature, strength 2", "C0-"),
            ("cifar-strength1", "feature, strength 1", "C0--"), ("cifar-ijepa", "I-JEPA", "C2-"))  # fmt: skip
    for name, label, style in long:
        for i, path in enumerate(seeds_of(name, "metrics.jsonl")):
            points = [(m["step"], m["mrr"]) for m in read_rows(path)]
            left.plot(*zip(*points), style, marker=".", label=None if i else label)
    for i, (name, colour) in enumerate((("none", "C2"), ("sequence", "C1"), ("feature", "C0"))):
        scores = [run["mrr"] for run in found.get(name, {}).values()]
        right.plot([i] * len(scores), scores, "o", color=colour)
    right.set_xticks(range(3), ("none", "sequence", "feature"))
    for axis, title in (
        (left, "20,000 steps unless said, a line a seed, 16 held-out images"),
        (right, "2,000 steps, 64 test images"),
    ):
        axis.axhline(CHANCE, color="gray", linestyle=":")
        axis.set(ylabel="MRR", ylim=(0, None), title=title)
    right.text(1, CHANCE + 0.01, "chance", color="gray", ha="center")
    left.set_xlabel("step")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, "conditioning.png")


def difficulty(found):
    """MRR by difficulty of the transformations and depth of the predictor, each seed a point, a line through the means."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    depths = {
        "6 blocks": ("C0", "x1-jitter", "x1", "feature"),
        "2 blocks": ("C3", "x1-jitter-shallow", "x1-shallow", "shallow"),
    }
    for label, (colour, *names) in depths.items():
        means = []
        for i, name in enumerate(names):
            scores = [run["mrr"] for run in found.get(name, {}).values()]
            axis.plot([i] * len(scores), scores, "o", color=colour, alpha=0.5)
            means.append(statistics.mean(scores) if scores else math.nan)
        axis.plot(range(3), means, color=colour, label=f"predictor of {label}")
    axis.axhline(CHANCE, color="gray", linestyle=":", label="chance")
    axis.set_xticks(range(3), ("jitter", "+ destructive", "+ strong jitter"))
    axis.set(ylabel="MRR, each on its own bank", ylim=(0, None))
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.08))
    save(figure, "difficulty.png")


def finetuned(run: str, label: str, rows) -> list[list[float]]:
    """Print a line of a table of finetuning and return its scores, a list for each row of finetune.py.

    Over the pretraining seeds where there are several (of each the mean over finetuning seeds), else over finetuning seeds.
    """
    found = [read_rows(path) for path in seeds_of(run, "finetune.jsonl")]
    by_row = accuracies(over_runs(found))
    scores = [[*by_row[row].values()] for row in rows]
    mrr = [json.loads(path.read_text())["trained"]["mrr"] for path in seeds_of(run, "result.json")]
    print(f"| {label} | {len(found)} | {mean_std(mrr, 3)} | {' | '.join(mean_std(s, 1) for s in scores)} |")
    return scores


def finetuning():
    """Accuracy by what is trained, of models of 20,000 steps and more: mean and deviation. Then, in print, on shapes."""
    figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
    names = ("attentive", "random predictor", "learned predictor", "encoder", "end-to-end")
    models = {"ijepa": "I-JEPA", "strength1": "world model, strength 1", "feature": "world model, strength 2",
              "preset": "world model, the preset (28,000 steps)"}  # fmt: skip
    print(f"| 20,000 steps (preset: 28,000) of | pretraining seeds | MRR | {' | '.join(names)} |\n{'|---' * 8}|")
    for i, (model, label) in enumerate(models.items()):
        scores = finetuned(f"cifar-{model}", label, names)
        means, spreads = [statistics.mean(s) for s in scores], [statistics.stdev(s) for s in scores]
        axis.errorbar([x + 0.15 * (i - 1.5) for x in range(5)], means, spreads, fmt="o", capsize=3, label=label)
    print(f"| on shapes | pretraining seeds | MRR | {' | '.join(names[:3])} |\n{'|---' * 6}|")
    finetuned("shapes", "the preset", names[:3])
    finetuned("shapes-ema0.98", "with `--ema 0.98`", names[:3])
    finetuned("shapes-all", "with `--predict-all`", names[:3])
    sizes = {row["row"]: row["trainable"] / 1e6 for row in read_rows(RESULTS / "cifar-preset.finetune.jsonl")}
    axis.set_xticks(range(5), [f"{name}\n{sizes[name]:.2f} M" for name in names])
    axis.set(xlabel="what is trained, and its parameters", ylabel="CIFAR-10 test accuracy, %")
    axis.legend(frameon=False)
    save(figure, "finetuning.png")


def correlation(points: list[tuple[float, float]]) -> str:
    """Pearson's r and its 95 % interval (Fisher's z)."""
    r, n = statistics.correlation(*zip(*points)), len(points)
    low, high = (math.tanh(math.atanh(r) + sign * 1.96 / math.sqrt(n - 3)) for sign in (-1, 1))
    return f"r {r:+.2f} ({low:+.2f} to {high:+.2f}, n = {n})"


def pairs(settings, key: str) -> list[tuple[float, float]]:
    """MRR and one other measure of every run of these settings that has it."""
    return [(run["mrr"], run[key]) for seeds in settings for run in seeds.values() if key in run]


def spectrum(found):
    """Every world model of the grid (not I-JEPA, and not those that were not told the action): MRR against accuracy."""
    found = {name: seeds for name, seeds in found.items() if name not in ("ijepa", "none")}
    strengths = ([seeds for name, seeds in found.items() if name.startswith("x1")],
                 [seeds for name, seeds in found.items() if not name.startswith("x1")])  # fmt: skip
    measures = (
        ("linear", "linear probe"),
        ("knn", "kNN"),
        ("attentive", "attentive probe"),
        ("learned predictor", "predictor finetuning"),
    )
    for key, label in (*measures, ("gain", "learned over random predictor")):
        print(f"{label} against MRR: {correlation(pairs(found.values(), key))}")
        for strength, settings in enumerate(strengths, start=1):
            print(f"    within strength {strength}: {correlation(pairs(settings, key))}")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    axes = axes.flat
    parts = {"x1": "strength 1", "sequence": "sequence", "jitter": "jitter only", "shallow": "2 blocks"}  # of a name
    for axis, (key, label) in zip(axes, measures):
        for i, (name, seeds) in enumerate(found.items()):
            words = [word for part, word in parts.items() if part in name]
            words = words if "x1" in name else ["strength 2", *words]
            points = pairs([seeds], key)  # none where these settings were not finetuned
            axis.plot([x for x, _ in points], [y for _, y in points], "o", color=f"C{i}", label=", ".join(words))
        axis.set(xlabel="MRR", ylabel=f"{label}, %", title=correlation(pairs(found.values(), key)))
        axis.title.set_fontsize(10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    save(figure, "spectrum.png")


if __name__ == "__main__":
    found = runs()
    columns = ("mrr", "knn", "linear", "attentive", "random predictor", "learned predictor", "gain")
    print(f"| run | seeds | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|")
    for name, seeds in found.items():
        cells = [[run[key] for run in seeds.values() if key in run] for key in columns]
        cells = [mean_std(v, 3 if k == "mrr" else 1) if v else "-" for k, v in zip(columns, cells)]
        print(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    conditioning(found)
    difficulty(found)
    finetuning()
    spectrum(found)
