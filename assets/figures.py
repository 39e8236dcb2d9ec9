"""python assets/figures.py: claims.png, and the tables between markers in README, RESULTS."""

import json
import re
import statistics as st
import sys
from math import atanh, sqrt, tanh
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LINES = [json.loads(line) for line in (HERE / "results.jsonl").open(encoding="utf-8")]
T95 = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31)  # Student's t by degrees of freedom
GAIN = "learned predictor - random predictor"
NAMES = {"mrr": "MRR", "mrr_pooled": "pooled MRR", "hit1": "H@1", "knn": "kNN", GAIN: "gain"}
TUNED = f"random predictor|learned predictor|{GAIN}|encoder|end-to-end"
SHARED = [f"{x} predictor, {y}" for x in ("random", "learned") for y in ("shared", "one each")]
BY_RUN = {  # table: studies, columns, tasks of the finetuning rows
    "grid": ("grid preset long", "mrr|mrr_pooled|hit1|plan_left|knn|linear", "classify"),
    "short": ("short", "mrr|hit1|knn|linear", "classify"),
    "dial": ("dial pixels", f"mrr|hit1|knn|linear|attentive|{TUNED.split('|enc')[0]}", "classify"),
    "finetuning": ("grid preset long", f"attentive|{TUNED}", "classify"),
    "shapes": ("preset earlier", f"attentive|{TUNED.split('|enc')[0]}", "shape"),
    "segment": ("preset earlier", f"linear per patch|{TUNED}", "segment"),
    "tasks": ("preset earlier", "|".join(["attentive", *SHARED]), "shape colour texture"),
}  # fmt: skip


def runs(study, run=None):
    found = [d for d in LINES if d["study"] == study and run in (None, d.get("run"))]
    return found or sys.exit(f"error: results.jsonl has no runs {study} {run or ''}")


def get(d, key, tasks="classify"):
    """A measure on test images, or a finetuning row's accuracy in percent; None if not there."""
    if " - " in key:
        a, b = (get(d, k, tasks) for k in key.split(" - "))
        return None if None in (a, b) else a - b
    if key in d["trained"]:
        return d["trained"][key] * (100 if key in ("knn", "linear") else 1)
    rows = [r for r in d.get("finetune", []) if (r["row"], r["tasks"]) == (key, tasks.split())]
    return 100 * st.mean(st.mean(r["test"].values()) for r in rows) if rows else None


def values(study, run, key, tasks="classify"):
    return [v for d in runs(study, run) if (v := get(d, key, tasks)) is not None]


def cell(found, n, seeds):
    """Mean±sample deviation (n, if not all seeds); below three seeds no result: each of them."""
    mean = f"{st.mean(found):.{n}f}±{st.stdev(found):.{n}f}" if found[2:] else ""
    text = mean or ", ".join(f"{v:.{n}f}" for v in found) or "-"
    return text if len(found) in (0, seeds) else f"{text} ({len(found)})"


def by_run(studies, columns, tasks):
    """A row for each labelled run of which the first column was measured."""
    keys = columns.split("|")
    yield "run", "seeds", *(NAMES.get(k, k) for k in keys)
    found = [d for s in studies.split() for d in runs(s) if "label" in d and get(d, keys[0], tasks)]
    for s, run, label in dict.fromkeys((d["study"], d["run"], d["label"]) for d in found):
        row, n = [values(s, run, k, tasks) for k in keys], len(runs(s, run))
        digits = [3 if k[:3] in ("mrr", "hit", "pla") else 1 for k in keys]
        yield label, str(n), *(cell(of, d, n) for of, d in zip(row, digits))


def pearson(x, y, strength=None):
    """r and its 95 % interval (Fisher) over the grid's models that are told an action; these."""
    found = [d for d in runs("grid") if strength in (None, d["settings"]["strength"])]
    found = [d for d in found if d["run"][:4] not in ("none", "ijep") and get(d, y) is not None]
    r = st.correlation([get(d, x) for d in found], [get(d, y) for d in found])
    return r, *(tanh(atanh(r) + s * 1.96 / sqrt(len(found) - 3)) for s in (-1, 1)), found


def spectrum():
    yield "", "all", "strength 1", "strength 2"
    for y in ("linear", "knn", "attentive", "learned predictor", GAIN):
        found = [pearson("mrr", y, s) for s in (None, 1, 2)]
        yield NAMES.get(y, y), *(f"{r:+.2f} [{a:+.2f},{b:+.2f}] {len(n)}" for r, a, b, n in found)


def compared(study):
    """Of each line: the paper's number, ours (a difference of means, or r) with 95 %, a verdict."""
    yield "claim", "paper", "here", "verdict"
    for c in runs(study):
        if "r" in c:
            mean, low, high, *found = pearson(*c["r"])
        else:  # a group of runs less another one, or alone (Welch)
            found = [values(c["of"], run, c["measure"], c["tasks"]) for run in c["runs"]]
            mean = st.mean(found[0]) - sum(map(st.mean, found[1:]))
            half = T95[min(sum(map(len, found)) - len(found), len(T95)) - 1]
            half *= sqrt(sum(st.pvariance(g) / max(len(g) - 1, 1) for g in found))
            low, high = mean - half, mean + half
        verdict = "holds" if mean * c["sign"] > 0 else "opposite sign"
        verdict = f"**{'within the noise' if low < 0 < high else verdict}**{c['note']}"
        d, n, unit = c["digits"], min(map(len, found)), "runs" if "r" in c else "seeds"
        reach, verdict = (f" [{low:+.{d}f}, {high:+.{d}f}]", verdict) if n > 2 else ("", "**open**")
        yield c["claim"], c["paper"], f"{c['what']} {mean:+.{d}f}{reach}, {n} {unit}", verdict


def dots(axis, colour, label, x, found):
    """A dot for each seed, a line through the means."""
    axis.plot(x, [st.mean(scores) for scores in found], colour, label=label)
    for at, scores in zip(x, found):
        axis.plot([at] * len(scores), scores, "o", color=colour, alpha=0.5)
    axis.set_ylim(0, 0.8)


def draw():
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    changes = "I-JEPA", "jitter", "+ destructive", "+ strong"
    for tail, colour in (("", "C0"), ("-shallow", "C3")):
        cells = f"ijepa{tail}", f"x1-jitter{tail}", f"x1{tail}", tail[1:] or "feature"
        found = [values("grid", c, "mrr") for c in cells]
        dots(left, colour, f"{2 if tail else 6} blocks", changes, found)
    dots(left, "C2", "10 blocks", changes[2:3], [values("grid", "x1-ten", "mrr")])
    left.axhline(0.0239, color="gray", linestyle=":", label="chance")
    left.set(ylabel="MRR, each on its own bank", title="Difficulty and depth")

    for loss, colour in (("all", "C0"), ("masked", "C3")):
        found = [values("dial", f"{share}-{loss}", "mrr") for share in (3, 18, 44)]
        label = f"loss at {loss} patches".replace("masked", "hidden")
        dots(middle, colour, label, ("3 %", "19 %", "44 %"), found)
    middle.set(xlabel="share of patches hidden", ylabel="MRR", title="Masks as a dial")

    right.set(xlabel="MRR", ylabel="learned predictor, %", title="MRR against finetuning")
    for s in (1, 2):
        r, *_, of = pearson("mrr", "learned predictor", s)
        points = [get(d, "mrr") for d in of], [get(d, "learned predictor") for d in of]
        right.plot(*points, "o", color=("C4", "C1")[s - 1], label=f"strength {s}: r {r:+.2f}")

    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "claims.png", dpi=110)


draw()
tables = {name: by_run(*of) for name, of in BY_RUN.items()} | {"spectrum": spectrum()}
tables |= {name: compared(name) for name in ("claims", "effects")}
keys = "preset|batch|mode|hidden|ms|images/s|GiB|GFLOP/image|of peak".split("|")
tables["gpu"] = [keys, *([str(d.get(k, "-")) for k in keys] for d in runs("gpu", "step"))]
for page in (HERE / "RESULTS.md", HERE.parent / "README.md"):
    parts = re.split(r"<!-- table: (\S+) -->.*?<!-- end -->", page.read_text(), flags=re.S)
    for i, name in [*enumerate(parts)][1::2]:
        rows = [*(tables.pop(name, 0) or sys.exit(f"error: {page.name}: no table {name}"))]
        lines = [f"|{'|'.join(row)}|\n" for row in (rows[0], "-" * len(rows[0]), *rows[1:])]
        parts[i] = f"<!-- table: {name} -->\n{''.join(lines)}<!-- end -->"
    page.write_text("".join(parts))
sys.exit(f"error: no page has a marker for {', '.join(tables)}" if tables else 0)
