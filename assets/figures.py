"""python assets/figures.py: claims.png, and the tables between markers in README, RESULTS."""

import json
import re
import statistics as st
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
LINES = [json.loads(line) for line in (HERE / "results.jsonl").open(encoding="utf-8")]
FRACTIONS = "mrr mrr_1 mrr_2 mrr_paper mrr_pooled hit1 plan_left".split()  # all others: percent
GAIN = "learned predictor - random predictor"
NAMES = {"mrr": "MRR", "mrr_paper": "MRR, paper's bank", "mrr_pooled": "pooled MRR", "hit1": "H@1"}
NAMES |= {"mrr_1": "MRR, bank 1", "mrr_2": "MRR, bank 2", "knn": "kNN", GAIN: "gain"}
TUNED = f"random predictor|learned predictor|{GAIN}"
SHARED = [f"{x} predictor, {y}" for x in ("random", "learned") for y in ("shared", "one each")]
DEFAULT = f"mrr|mrr_paper|hit1|plan_left|attentive|{TUNED}|encoder|end-to-end|scratch"
BY_RUN = {  # table: studies, columns, tasks of the finetuning rows
    "grid": ("grid preset long", "mrr|mrr_pooled|hit1|plan_left|knn|linear", "classify"),
    "short": ("short", "mrr|hit1|knn|linear", "classify"),
    "banks": ("banks", "mrr_1|mrr_2|knn|linear|random predictor|learned predictor", "classify"),
    "dial": ("dial pixels", f"mrr|hit1|knn|linear|attentive|{TUNED}", "classify"),
    "finetuning": ("grid preset long", f"attentive|{TUNED}|encoder|end-to-end", "classify"),
    "shapes": ("preset earlier", f"attentive|{TUNED}", "shape"),
    "default": ("default", DEFAULT, "shape"),
    "segment": ("preset earlier", f"linear per patch|{TUNED}|encoder|end-to-end", "segment"),
    "tasks": ("preset earlier", "|".join(["attentive", *SHARED]), "shape colour texture"),
}
GPU = "preset|batch|mode|hidden|ms|images/s|GiB|GFLOP/image|of peak".split("|")
# The grid's cells that are told an action: strength 1 with two blocks and with more, strength 2
TOLD = "x1-jitter-shallow x1-shallow x1-jitter x1 x1-ten shallow feature sequence".split()


def runs(study, run=None):
    return [d for d in LINES if d["study"] == study and run in (None, d.get("run"))]


def values(study, run, key, tasks="classify"):
    """A measure on test images, or a finetuning row's percentage, of the runs that have it."""
    if " - " in key:
        parts = (values(study, run, k, tasks) for k in key.split(" - "))
        return [a - b for a, b in zip(*parts, strict=True)]
    found = [d["trained"][key] for d in runs(study, run) if key in d["trained"]]
    for d in runs(study, run):
        tuned = [r for r in d.get("finetune", []) if (r["row"], r["tasks"]) == (key, tasks.split())]
        found += [st.mean(st.mean(r["test"].values()) for r in tuned)] if tuned else []
    return found if key in FRACTIONS else [100 * value for value in found]


def by_run(studies, columns, tasks):
    """A row for each labelled run: mean±sample deviation; below three seeds each of them."""
    keys = columns.split("|")
    yield "run", "seeds", *(NAMES.get(key, key) for key in keys)
    lines = [d for study in studies.split() for d in runs(study) if "label" in d]
    for study, run, label in dict.fromkeys((d["study"], d["run"], d["label"]) for d in lines):
        row = [label, str(len(runs(study, run)))]
        for key in keys:
            v, n = values(study, run, key, tasks), 3 if key in FRACTIONS else 1
            each = ", ".join(f"{x:.{n}f}" for x in v) or "-"
            row.append(f"{st.mean(v):.{n}f}±{st.stdev(v):.{n}f}" if len(v) > 2 else each)
        if row[2:] != ["-"] * len(keys):
            yield row


def finetuned(*epochs):
    """A row for each row of finetune.py: accuracy on held-out images after some epochs, on test."""
    yield "row", "encoder", "predictor", *map(str, epochs), "test"
    for d in runs("finetuned"):
        percent = [d["curve"][n - 1] for n in epochs] + [d["test"]]
        yield d["row"], *d["parts"], *(f"{100 * value:.1f}" for value in percent)


def difference(groups, margin):
    """A group's mean, or the difference of two groups' (Welch): it, its 95 % interval, p."""
    parts = [st.variance(g) / len(g) for g in groups]
    df = sum(parts) ** 2 / sum(v**2 / (len(g) - 1) for v, g in zip(parts, groups))
    angles = np.linspace(0, np.pi / 2, 100_000)[:-1]
    density = np.cos(angles) ** (df - 1)  # Student's, over the angles instead of over t
    t, p = np.tan(angles) * df**0.5, 1 - np.cumsum(density) / np.sum(density)
    mean, error = st.mean(groups[0]) - sum(map(st.mean, groups[1:])), sum(parts) ** 0.5
    reach = error * t[np.argmax(p < 0.05)]
    apart = max(margin - abs(mean), 0) if margin else abs(mean)
    return mean, mean - reach, mean + reach, np.interp(apart / error, t, p)


def correlation(study, cells, key):
    """MRR and a measure: each cell's runs, its mean; over the means r, its 95 % interval, p."""
    found = [np.array([values(study, c, "mrr"), values(study, c, key)]) for c in cells]  # [2, runs]
    means = [np.mean(cell, axis=1, keepdims=True) for cell in found]
    r, error = np.corrcoef(np.hstack(means))[0, 1], (len(means) - 3) ** -0.5
    low, high = np.tanh(np.arctanh(r) + 1.96 * error * np.array([-1, 1]))  # Fisher
    return found, means, (r, low, high, 2 * st.NormalDist(0, error).cdf(-abs(np.arctanh(r))))


def spectrum():
    """r of MRR and a measure: over means of cells, and where strength, depth or both are equal."""
    yield "", "8 cells", "strength 1", "strength 2", "strength 1, deep: 9 runs", "within cells"
    for key in ("linear", "knn", "attentive", "learned predictor", GAIN):
        cells, means, (r, low, high, _) = correlation("grid", TOLD, key)
        groups = means[:5], means[5:], cells[2:5], [c - m for c, m in zip(cells, means)]
        row = (f"{np.corrcoef(np.hstack(group))[0, 1]:+.2f}" for group in groups)
        yield NAMES.get(key, key), f"{r:+.2f} [{low:+.2f}, {high:+.2f}]", *row


def test(c, masks, key):
    """A claim under one kind of masks: its numbers, if its interval lies as claimed, p."""
    if masks not in c:
        return "not run", "not run", 1
    study, names = c[masks]
    if c["unit"] == "r":
        found = correlation(study, names, key)[2]
    else:
        found = difference([values(study, n, key, c["tasks"]) for n in names], c.get("margin"))
    digits = 2 if c["unit"] in ("MRR", "r") else 1
    numbers = "{} [{}, {}]".format(*(f"{x:+.{digits}f}" for x in found[:3]))
    low, high = sorted(c["sign"] * end for end in found[1:3])
    least, most = (-c["margin"], c["margin"]) if "margin" in c else (0, np.inf)
    verdict = "opposite" if high < least or low > most else "not shown"
    return numbers, "holds" if least < low and high < most else verdict, found[3]


def compared(study):
    """A row for each claim: the paper's number, ours under both kinds of masks, the verdict."""
    yield "claim", "in", "paper", "paper's masks", "our masks", "verdict"
    claims, kinds = runs(study), ("theirs", "ours")
    tests = [[test(c, masks, c.get("judge", c["measure"])) for masks in kinds] for c in claims]
    p = sorted(ours[2] for _, ours in tests)  # Holm: firm are those before the first too large
    limit = next((x for i, x in enumerate(p) if x > 0.05 / (len(p) - i)), 1)
    for c, (theirs, ours) in zip(claims, tests):
        verdict = "ours only" if ours[1] == "holds" != theirs[1] else ours[1]
        verdict += " firmly" if study == "claims" and ours[2] < limit else ""
        shown = (test(c, masks, c["measure"])[0] for masks in kinds)
        yield c["claim"], c["unit"], c["paper"], *shown, c.get("verdict", "{}").format(verdict)


def fill(match):
    """A marker, and the table that it asks for."""
    head, *rows = tables[match[2]]
    return match[1] + "".join(f"|{'|'.join(row)}|\n" for row in (head, "-" * len(head), *rows))


def dots(axis, colour, line, label, x, study, cells):
    """A dot for each seed, a line through the means."""
    found = [values(study, c, "mrr") for c in cells]
    axis.plot(x, np.mean(found, axis=1), colour + line, label=label)
    axis.plot(x, found, f"{colour}o", alpha=0.5 if line == "-" else 0.2)


tables = {name: by_run(*of) for name, of in BY_RUN.items()} | {"spectrum": spectrum()}
tables |= {name: compared(name) for name in ("claims", "effects")}
tables |= {"finetuned": finetuned(1, 3, 10), "epochs": finetuned(*range(1, 11))}
tables["gpu"] = [GPU, *([str(d.get(k, "-")) for k in GPU] for d in runs("gpu", "step"))]
for page in (HERE / "RESULTS.md", HERE.parent / "README.md"):
    page.write_text(re.sub(r"(?s)(<!-- table: (\S+) -->\n).*?(?=<!-- end)", fill, page.read_text()))

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
changes = "none", "jitter", "+ destructive", "+ strong"
for blocks, tail, colour in ((6, "", "C0"), (2, "-shallow", "C3")):
    cells = f"ijepa{tail}", f"x1-jitter{tail}", f"x1{tail}", tail[1:] or "feature"
    theirs = [f"grid/{cell}" for cell in cells[1:]]
    dots(left, colour, "-", f"{blocks} blocks, 19 % hidden", changes, "grid", cells)
    dots(left, colour, ":", f"{blocks} blocks, 44 % hidden", changes[1:], "earlier", theirs)
dots(left, "C2", "-", "10 blocks, 19 % hidden", changes[2:3], "grid", ["x1-ten"])
left.axhline(0.0239, color="gray", linewidth=0.8, label="chance")
left.set(xlabel="photometric change", ylabel="MRR, each on its own bank", ylim=(0, 0.8))
left.set_title("Difficulty and depth\n(6,400 steps; with 44 % hidden 2,000)")

for loss, where, colour in (("all", "all", "C0"), ("masked", "hidden", "C3")):
    cells = [f"{share}-{loss}" for share in (3, 18, 44)]
    dots(middle, colour, "-", f"loss at {where} patches", (3, 19, 44), "dial", cells)
middle.set(xlabel="patches hidden, %", ylabel="MRR", xticks=(3, 19, 44), xlim=(0, 47))
middle.set(title="Masks as a dial\n(strong jitter, 3,200 steps)", ylim=(0, 0.8))

cells, _, (r, *_) = correlation("grid", TOLD, "learned predictor")
for run, cell, style in zip(TOLD, cells, "C4o C2o C4s C2s C2^ C1o C1s C1D".split()):
    right.plot(*cell, style, label=runs("grid", run)[0]["label"])
right.set(xlabel="MRR, each on its own bank", ylabel="learned predictor, %", ylim=(35, 60))
right.set_title(f"MRR against finetuning\n(r {r:+.2f} over the eight cells; three runs a cell)")
for axis in (left, middle, right):
    axis.legend(frameon=False, fontsize=8, ncols=1 + (axis == right))
figure.savefig(HERE / "claims.png", dpi=110)
