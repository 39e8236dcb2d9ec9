"""python assets/figures.py: claims.png, and the tables between markers in README, RESULTS."""

import json
import re
import statistics as st
import sys
from math import atan, atanh, cos, erfc, inf, pi, sqrt, tanh
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LINES = [json.loads(line) for line in (HERE / "results.jsonl").open(encoding="utf-8")]
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
STRONG, DEEP = ("shallow", "feature", "sequence"), ("x1-jitter", "x1", "x1-ten")
TOLD = ("x1-jitter-shallow", "x1-shallow", *DEEP, *STRONG)  # the grid's cells that are told


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


def tail(t, df):
    """Two-sided p of Student's t: over the angle of t its density is cos(angle) ** (df - 1)."""
    start, middles = atan(t / sqrt(df)), [(i + 0.5) / 500 for i in range(500)]
    beyond, half = ((pi / 2 - a) * sum(cos(a + (pi / 2 - a) * x) ** (df - 1) for x in middles)
                    for a in (start, 0))  # fmt: skip
    return beyond / half


def difference(groups, margin=None):
    """A group's mean, or that of two groups' difference (Welch), its 95 % interval, p."""
    parts = [st.variance(g) / len(g) for g in groups]
    df = sum(parts) ** 2 / sum(v**2 / (len(g) - 1) for v, g in zip(parts, groups))
    mean, error = st.mean(groups[0]) - sum(map(st.mean, groups[1:])), sqrt(sum(parts))
    low, high = 0, 100
    for _ in range(30):  # the t that leaves 5 % outside is between them
        t = (low + high) / 2
        low, high = (t, high) if tail(t, df) > 0.05 else (low, t)
    apart = abs(mean) if margin is None else max(margin - abs(mean), 0)
    return mean, mean - low * error, mean + low * error, tail(apart / error, df)


def pairs(study, cells, x, y):
    """Both measures of each cell's runs, if it has them; and their means by cell."""
    found = [[(get(d, x), get(d, y)) for d in runs(study, c)] for c in cells]
    found = [cell for cell in found if None not in cell[0]]
    return found, [tuple(map(st.mean, zip(*cell))) for cell in found]


def correlation(points):
    """r, its 95 % interval and p (Fisher)."""
    r, width = st.correlation(*zip(*points)), 1 / sqrt(len(points) - 3)
    low, high = (tanh(atanh(r) + s * 1.96 * width) for s in (-1, 1))
    return r, low, high, erfc(abs(atanh(r)) / width / sqrt(2))


def spectrum():
    """r of MRR and a measure: over means of cells, and where strength, depth or both are equal."""
    yield "", "8 cells", "strength 1", "strength 2", "strength 1, deep: 9 runs", "within cells"
    for y in ("linear", "knn", "attentive", "learned predictor", GAIN):
        cells, means = pairs("grid", TOLD, "mrr", y)
        inner = [(a - m, b - n) for cell, (m, n) in zip(cells, means) for a, b in cell]
        several = means[:5], means[5:], sum(pairs("grid", DEEP, "mrr", y)[0], []), inner
        r, low, high, _ = correlation(means)
        row = (f"{st.correlation(*zip(*points)):+.2f}" for points in several)
        yield NAMES.get(y, y), f"{r:+.2f} [{low:+.2f}, {high:+.2f}]", *row


def compare(c, grid, key):
    """A claim in one grid: low and high end of its 95 % interval, p, and all as a text."""
    if grid not in c:
        return 0, 0, 1, "not run"
    study, names = c[grid]
    if c["what"] == "r":
        found = pairs(study, names, *key)[1]
        value, *of = correlation(found)
        rests = f", {len(found)} cells"
    else:
        found = [values(study, run, key, c["tasks"]) for run in names]
        value, *of = difference(found, c.get("margin"))
        few = " and ".join(str(len(g)) for g in found)
        rests = f", {few} seeds" if {*map(len, found)} != {3} else ""
    numbers = [f"{x:+.{c['digits']}f}" for x in (value, *of[:2])]
    return *of, f"{c['what']} {numbers[0]} [{numbers[1]}, {numbers[2]}]{rests}"


def judge(c, low, high, _, text):
    """Does the interval lie where the claim puts it: on one side of 0, or within its margin?"""
    (low, high), margin = sorted((c["sign"] * low, c["sign"] * high)), c.get("margin")
    least, most = (-margin, margin) if margin else (0, inf)
    if text == "not run" or high < least or low > most:
        return None if text == "not run" else "opposite"
    return "holds" if least < low and high < most else "not shown"


def compared(study):
    """A row for each claim: the paper's number, ours under both masks, the verdict, a doubt."""
    yield "claim", "paper", "paper's masks, 3 seeds", "our masks, 3 seeds", "verdict and doubt"
    lines, grids, firm = runs(study), ("theirs", "ours"), []
    tests = [[compare(c, g, c.get("judge", c["measure"])) for g in grids] for c in lines]
    order = sorted(range(len(lines)), key=lambda i: tests[i][1][2])
    for rank, i in enumerate(order if study == "claims" else ()):  # Holm, with our masks
        if tests[i][1][2] > 0.05 / (len(lines) - rank):
            break
        firm.append(i)
    for i, c in enumerate(lines):
        theirs, ours = (judge(c, *test) for test in tests[i])
        verdict = ours + " firmly" * (i in firm) + ", by construction" * ("given" in c)
        apart = theirs in ("holds", "opposite") and theirs != ours
        verdict += " with our masks" * (apart or ours == "holds" != theirs)
        verdict += f", {theirs} with the paper's" * apart
        shown = [compare(c, g, c["measure"])[3] for g in grids]
        yield (
            c["claim"],
            c["paper"],
            *shown,
            f"**{c.get('verdict', verdict)}.** {c['note']}".strip(),
        )


def dots(axis, colour, label, x, found, line="-"):
    """A dot for each seed, a line through the means."""
    axis.plot(x, [st.mean(scores) for scores in found], line, color=colour, label=label)
    for at, scores in zip(x, found):
        axis.plot([at] * len(scores), scores, "o", color=colour, alpha=0.5 if line == "-" else 0.2)
    axis.set_ylim(0, 0.8)


def draw():
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    changes = "none", "jitter", "+ destructive", "+ strong"
    for tail, colour in (("", "C0"), ("-shallow", "C3")):
        cells = f"ijepa{tail}", f"x1-jitter{tail}", f"x1{tail}", tail[1:] or "feature"
        ours = [values("grid", c, "mrr") for c in cells]
        theirs = [values("earlier", f"grid/{c}", "mrr") for c in cells[1:]]
        dots(left, colour, f"{2 if tail else 6} blocks, 19 % hidden", changes, ours)
        dots(left, colour, f"{2 if tail else 6} blocks, 44 % hidden", changes[1:], theirs, ":")
    dots(left, "C2", "10 blocks, 19 % hidden", changes[2:3], [values("grid", "x1-ten", "mrr")])
    left.axhline(0.0239, color="gray", linewidth=0.8, label="chance")
    left.set(xlabel="photometric change", ylabel="MRR, each on its own bank")

    for loss, colour in (("all", "C0"), ("masked", "C3")):
        found = [values("dial", f"{share}-{loss}", "mrr") for share in (3, 18, 44)]
        label = f"loss at {loss} patches".replace("masked", "hidden")
        dots(middle, colour, label, (3, 19, 44), found)
    middle.set(xlabel="patches hidden, %", ylabel="MRR", xticks=(3, 19, 44), xlim=(0, 47))

    cells, means = pairs("grid", TOLD, "mrr", "learned predictor")
    for run, cell in zip(TOLD, cells):
        d = runs("grid", run)[0]
        marker = {2: "o", 6: "s", 10: "^"}[d["settings"]["pred_depth"]]
        marker = "D" if run == "sequence" else marker
        colour = "C1" if run in STRONG else "C4" if "jitter" in run else "C2"
        right.plot(*zip(*cell), marker, color=colour, label=d["label"])
    right.set(xlabel="MRR, each on its own bank", ylabel="learned predictor, %", ylim=(35, 60))

    r = f"r {correlation(means)[0]:+.2f} over the eight cells"
    left.set_title("Difficulty and depth\n(6,400 steps; with 44 % hidden 2,000)")
    middle.set_title("Masks as a dial\n(strong jitter, 3,200 steps)")
    right.set_title(f"MRR against finetuning\n({r}; three runs a cell)")
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=8, ncols=1 + (axis == right))
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
