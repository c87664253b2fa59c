"""Recorded runs as pictures, one per question. Only this file needs matplotlib."""

import io
import math
import re
from pathlib import Path

import torch

from data.errors import Problem
from data.results import mean_and_deviation

NAMES = {"coop": "CoOp", "prograd": "ProGrad", "mvp_mi": "MVP-MI", "restore": "RESTORE"}
# Colours that the colour-blind tell apart (Okabe and Ito 2008); markers and dashes differ as well, for print in grey.
STYLES = [("#D55E00", "o", "-"), ("#0072B2", "s", "--"), ("#009E73", "^", "-."), ("#000000", "D", ":"),
          ("#E69F00", "v", (0, (5, 1))), ("#CC79A7", "P", (0, (3, 1, 1, 1))), ("#56B4E9", "X", (0, (1, 1))),
          ("#999999", "<", (0, (8, 3))), ("#F0E442", ">", (0, (2, 4)))]
QUIET = {"color": "#777777", "linewidth": 0.9, "zorder": 0}


def draw(groups, folder):
    """Draws what the runs can answer (`results.read`) into PNG files in `folder`, and prints each file and its question.

    Raises Problem if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Problem("--plot needs matplotlib: pip install matplotlib") from None
    worlds = {}
    for (dataset, backbone, protocol), methods in groups.items():
        worlds.setdefault(dataset, {}).setdefault(backbone, {})[protocol] = methods
    for dataset, backbones in worlds.items():
        for backbone, protocols in backbones.items():
            world = dataset if len(backbones) == 1 else f"{dataset}, {backbone}"
            for question in (accuracy_over_shots, base_against_new, conflicts, gap_against_gain, bound):
                figure = Figure(figsize=(6.4, 4.6), dpi=130, layout="constrained")
                title = question(figure, protocols.get("few-shot", {}), protocols.get("base-to-new", {}))
                if title:
                    figure.suptitle(f"{title}\n", fontsize=11)
                    figure.text(0.5, 0.93, world, ha="center", fontsize=9, color="#555555")
                    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=columns(figure))
                    name = re.sub(r"[^\w.-]+", "-", f"{world}-{question.__name__.replace('_', '-')}").strip("-")
                    image = io.BytesIO()
                    figure.savefig(image, metadata={"Software": None})
                    file = Path(folder) / f"{name}.png"
                    file.with_suffix(".part").write_bytes(image.getvalue())
                    file.with_suffix(".part").replace(file)  # whole or not at all
                    print(f"{file}: {title}")


def columns(figure):
    """As many columns as the labels of the legend leave room for."""
    longest = max(len(label) for axes in figure.axes for label in axes.get_legend_handles_labels()[1])
    return min(5, max(1, 115 // (longest + 7)))


def styled(methods):
    """(label, {shots: {seed: record}}, style) of every name in the results; the four methods always look alike."""
    order = [*NAMES, *(name for name in methods if name not in NAMES)]
    for name, runs in methods.items():
        method, *flags = name.split(" ", 1)
        again, k = divmod(order.index(name), len(STYLES))
        colour, marker, dashes = STYLES[k]
        face = "white" if again else colour  # more names than styles: hollow markers
        yield " ".join([NAMES.get(method, method), *flags]), runs, {"color": colour, "marker": marker, "linestyle": dashes, "markerfacecolor": face}


def records_of(methods):
    """All records of a protocol's methods."""
    return [r for runs in methods.values() for seeds in runs.values() for r in seeds.values()]


def accuracy_over_shots(figure, few_shot, base_to_new):
    """Accuracy over shots, mean and standard deviation over seeds, zero-shot as a line."""
    if not few_shot:
        return None
    axes, shots = figure.subplots(), sorted({n for runs in few_shot.values() for n in runs})
    for k, (label, runs, style) in enumerate(styled(few_shot)):
        points = [mean_and_deviation([r["accuracy"] for r in seeds.values()]) for _, seeds in sorted(runs.items())]
        x = [math.log2(n) + 0.03 * (k - len(few_shot) / 2) for n in sorted(runs)]  # side by side, for the bars
        axes.errorbar(x, *zip(*points), label=label, capsize=3, **style)
    axes.axhline(records_of(few_shot)[0]["zero_shot"], label="zero-shot", linestyle=(0, (1, 2)), **QUIET)
    axes.set_xticks([math.log2(n) for n in shots], [str(n) for n in shots])
    axes.set(xlabel="training images per class (shots)", ylabel="accuracy on test images, all classes (%)")
    return "What do a few labelled images give?"


def base_against_new(figure, few_shot, base_to_new):
    """New classes against base classes, with the curves on which their harmonic mean is the same."""
    if not base_to_new:
        return None
    axes, first, several = figure.subplots(), records_of(base_to_new)[0], False
    points = [(first["zero_shot_base"], first["zero_shot_new"])]
    for label, runs, style in styled(base_to_new):
        for k, (_, seeds) in enumerate(sorted(runs.items())):
            (x, dx), (y, dy) = (mean_and_deviation([r[part] for r in seeds.values()]) for part in ("base", "new"))
            axes.errorbar(x, y, dy, dx, **{**style, "linestyle": ""}, markersize=7 + 3 * k, markeredgecolor="black", capsize=2,
                          linewidth=1, label=label if k == len(runs) - 1 else None)
            several = several or k > 0
            points.append((x, y))
        axes.plot(*zip(*points[-len(runs):]), color=style["color"], linewidth=0.8)
    axes.plot(*points[0], "*", color="white", markeredgecolor="black", markersize=15, label="zero-shot")
    axes.axhline(points[0][1], linestyle=(0, (1, 2)), **QUIET)
    left, right = min(x for x, _ in points) - 4, max(x for x, _ in points) + 4
    bottom, top = min(y for _, y in points) - 9, max(y for _, y in points) + 9
    for h in range(5, 100, 5):
        xs = [left + (right - left) * k / 100 for k in range(101)]
        curve = [(x, h * x / (2 * x - h)) for x in xs if 2 * x > h and bottom < h * x / (2 * x - h) < top - 2]
        if len(curve) > 50:
            axes.plot(*zip(*curve), color="#CCCCCC", linewidth=0.9, zorder=0)
            axes.text(curve[0][0] + 0.1, curve[0][1], f"H = {h}", fontsize=7, color="#777777", va="bottom", clip_on=True)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="accuracy on base classes, which were learned (%)", ylabel="accuracy on new classes (%)")
    return "What does learning some classes cost on the others?" + " (larger: more shots)" * several


def over_training(axes, few_shot, base_to_new, key, label):
    """Draws records' `key` into `axes`: mean over seeds and over twentieths of the training, a line per protocol and shots."""
    lines = [(f"{n} shot{'s' * (n > 1)}{extra} {' '.join(name.split(' ')[1:])}", seeds.values())
             for methods, extra in ((few_shot, ""), (base_to_new, ", base to new")) for name, runs in methods.items()
             for n, seeds in sorted(runs.items()) if all(key in r for r in seeds.values())]
    for k, (text, records) in enumerate(lines):
        length = min(len(r[key]) for r in records)
        values = torch.tensor([r[key][:length] for r in records], dtype=torch.float64).mean(0)      # (epochs,)
        parts = [part.mean().item() for part in values.tensor_split(min(20, len(values)))]
        colour, marker, dashes = STYLES[k % len(STYLES)]
        axes.plot([100 * (i + 0.5) / len(parts) for i in range(len(parts))], parts, color=colour, marker=marker,
                  markersize=4, linestyle=dashes, label=text.strip() if label else None)
    axes.set(xlim=(0, 100), xlabel="part of the training (%)" if label else "")
    return bool(lines)


def conflicts(figure, few_shot, base_to_new):
    """How often ProGrad's two gradients conflict, and their cosine, as training goes on."""
    rate, cosine = figure.subplots(2, sharex=True)
    if not over_training(rate, few_shot, base_to_new, "conflicts", label=False):
        return None
    over_training(cosine, few_shot, base_to_new, "cosine", label=True)
    rate.set(ylabel="steps in conflict", ylim=(-0.05, 1.05))
    rate.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    cosine.set_ylabel("cosine of $G_d$ and $G_g$")
    cosine.axhline(0, **QUIET)
    return "ProGrad: how often would a step undo what the written prompt knows?"


def bound(figure, few_shot, base_to_new):
    """MVP-MI's lower bound of the mutual information, and log C, which it cannot pass, as training goes on."""
    axes = figure.subplots()
    if not over_training(axes, few_shot, base_to_new, "bound", label=True):
        return None
    for limit in {r["log_C"] for r in records_of(few_shot) + records_of(base_to_new) if "log_C" in r}:
        axes.axhline(limit, linestyle=(0, (1, 2)), **QUIET)
        axes.text(100, limit, f"log C of {math.exp(limit):.0f} classes", fontsize=8, color="#555555", va="bottom", ha="right")
    axes.margins(y=0.12)
    axes.set_ylabel("bound, log C - $L_{nce}$ (nats)")
    return "MVP-MI: how much does the learned view tell about the written one?"


def gap_against_gain(figure, few_shot, base_to_new):
    """RESTORE's gap between the towers' feature shifts against the gain over zero-shot: a point per run."""
    new = any("shift_after" in r for r in records_of(base_to_new))
    gain = (lambda r: r["new"] - r["zero_shot_new"]) if new else (lambda r: r["accuracy"] - r["zero_shot"])
    axes, methods = figure.subplots(), base_to_new if new else few_shot
    shifted = {name: runs for name, runs in methods.items() if any(r.get("shift_after") for r in records_of({name: runs}))}
    for label, runs, style in styled(shifted):
        points = [(r["shift_after"]["gap"], gain(r)) for r in records_of({label: runs}) if r.get("shift_after")]
        axes.plot(*zip(*points), label=label, **{**style, "linestyle": ""}, markersize=6, markeredgecolor="black")
    if not shifted:
        return None
    axes.axhline(0, **QUIET)
    axes.set(xlabel="gap between the towers' feature shifts after training",
             ylabel=f"gain over zero-shot{', new classes' if new else ''} (points)")
    return "RESTORE: do towers that move alike generalise better?"
