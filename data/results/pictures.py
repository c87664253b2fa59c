"""Pictures of recorded runs, one for each question. Only this module needs matplotlib."""

import math
import re
from itertools import cycle
from pathlib import Path
from statistics import stdev

import numpy as np
from matplotlib.figure import Figure

from data.results.tables import average_rows, group, is_run, mean, plural

# Name, colour and marker of a method, the same in every picture; colours of Okabe and Ito (2008).
METHODS = {"coop": ("CoOp", "#D55E00", "o"), "prograd": ("ProGrad", "#0072B2", "s"),
           "mvp_mi": ("MVP-MI", "#009E73", "^"), "restore": ("RESTORE", "#000000", "D")}
OTHERS = ["#E69F00", "#CC79A7", "#56B4E9", "#999999", "#8B4513"], "vPX<>ph"    # with flags, or new
ZERO_SHOT = {"color": "#777777", "marker": "*", "linestyle": ":", "zorder": 0}
HISTORIES = {"conflicts": "steps in conflict", "cosine": "cosine of both gradients",
             "bound": "bound on MI, prompts (nats)", "image_bound": "bound on MI, images (nats)"}
MOVES = {"KL new": "KL from zero-shot CLIP, new classes (nats)",
         "shift gap": "gap between the encoders' feature shifts"}


def draw(cells, folder):
    """Draw what the cells can answer, as PNG files in a folder; yield (file, title)."""
    questions = [
        accuracy_over_shots, base_against_new, change_by_data_set, over_training, gap_against_gain]
    drawn, cells = set(), [c for c in cells if not c.table.transfer]
    for name, about, some, means in views(cells):
        for question in questions:
            figure = Figure(figsize=(6.4, 4.3), dpi=130, layout="constrained")
            title = question(figure, some, means)
            if not title:
                continue
            figure.suptitle(f"{title}\n{about}".replace("$", r"\$"), fontsize=10)
            add_legend(figure)
            stem = re.sub(r"\W+", "-", f"{name} {question.__name__}".replace("_", "-")).strip("-")
            while stem in drawn:
                stem += "-2"
            drawn.add(stem)
            file = Path(folder) / f"{stem}.png"
            figure.savefig(file.with_suffix(".part"), format="png", metadata={"Software": None})
            file.with_suffix(".part").replace(file)         # whole or not at all
            yield file, title


def views(cells):
    """Yield (file name, title, cells, averages) of each comparison, or of each data set alone."""
    for (suite, about), some in group(cells, "table.suite", "table.about").items():
        protocol = about.split(", ")[-1]
        means = [c for part in group(some, "table").values() for c in average_rows(part)[0]]
        if means:
            yield f"{suite.split()[0]} {protocol}", f"average of {suite}, {about}", some, means
            continue
        for dataset, part in group(some, "dataset").items():
            yield f"{dataset} {protocol}", f"{dataset}, {about}", part, part


def style_rows(cells):
    """Return {row: style}; a method without flags looks the same in every picture."""
    colours, markers = map(cycle, OTHERS)
    found = {}
    for row, seed in {c.row: c.seed for c in cells}.items():
        method, *flags = row.split(" ", 1)
        name, colour, marker = METHODS.get(method, (method, "", ""))
        if flags or not colour:
            colour, marker = next(colours), next(markers)
        style = ZERO_SHOT if seed is None else {"color": colour, "marker": marker}
        found[row] = {**style, "label": " ".join([name, *flags]).replace("$", r"\$")}
    return found


def add_legend(figure):
    """Name every row once below the axes, and let the figure grow by that."""
    entries = {}
    for axes in figure.axes:
        entries.update(zip(*reversed(axes.get_legend_handles_labels())))
    columns = max(1, 100 // (8 + max(map(len, entries), default=0)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.18 * math.ceil(len(entries) / columns))
    figure.legend(entries.values(), entries, loc="outside lower center", fontsize=8, frameon=False,
                  ncols=columns)


def panels(figure, count, width, height):
    """Return `count` axes in at most two columns, each about width x height inches."""
    columns = min(2, max(1, count))
    rows = math.ceil(count / columns)
    figure.set_size_inches(max(6.4, 1 + width * columns), 1 + height * rows)
    return [figure.add_subplot(rows, columns, k + 1) for k in range(count)]


def center(cells):
    """Return the mean, and the standard deviation over seeds."""
    return mean(cells), stdev(c.value for c in cells) if len(cells) > 1 else 0


def widen(axes, span):
    """Let the vertical axis cover at least `span` points, so that small differences look small."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, (low + high - span) / 2), max(high, (low + high + span) / 2))


def change(r):
    """Return a record's accuracy on new (else all) classes minus zero-shot CLIP's."""
    return r["new"] - r["zero_shot_new"] if "new" in r else r["accuracy"] - r["zero_shot"]


def usual_runs(cells):
    """Return a cell for each run at the number of shots that most runs have."""
    by_shots = group(filter(is_run, cells), "shots").values()
    return max(by_shots, key=lambda some: (len(some), some[0].shots))


# ---------------------------------------------------------------- the questions, a picture each
# They draw the cells of a comparison, or their averages over data sets, into a figure, and return
# its title, or None if these cells cannot answer it.

def accuracy_over_shots(figure, cells, means):
    if cells[0].table.shots:                        # base to new
        return None
    axes, ticks, styles = figure.subplots(), sorted({c.shots for c in means}), style_rows(cells)
    for k, (row, some) in enumerate(group(means, "row").items()):
        points = group(some, "shots")
        shots = [math.log2(n) + 0.02 * k for n in points]       # side by side
        axes.errorbar(shots, *zip(*map(center, points.values())), capsize=3, **styles[row])
    axes.set_xticks([math.log2(n) for n in ticks], ticks)
    axes.set(xlabel="training images per class (shots)", ylabel="accuracy, all classes (%)")
    widen(axes, 10)
    return "What do a few labelled images give?"


def base_against_new(figure, cells, means):
    if not cells[0].table.shots:
        return None
    axes, styles = figure.subplots(), style_rows(cells)
    for (row, shots), some in group(means, "row", "shots").items():
        (x, dx), (y, dy) = (center(group(some, "column")[part]) for part in ("base", "new"))
        axes.errorbar(x, y, dy, dx, capsize=2, markersize=8, **{**styles[row], "linestyle": ""})
        name = shots if some[0].seed is not None else ""        # zero-shot CLIP has no shots
        axes.annotate(name, (x, y), (7, 5), textcoords="offset points", fontsize=7)
    widen(axes, 10)
    x, y = np.meshgrid(np.linspace(*axes.get_xlim()), np.linspace(*axes.get_ylim()))
    curves = axes.contour(x, y, 2 * x * y / (x + y), range(5, 100, 5), colors="#AAAAAA", zorder=0)
    axes.clabel(curves, fmt="H = %g", fontsize=7)
    axes.set(xlabel="accuracy on base classes (%)", ylabel="accuracy on new classes (%)")
    return "What does learning some classes cost on the others? (numbers: shots)"


def change_by_data_set(figure, cells, means):
    found = [c._replace(value=change(c.record)) for c in usual_runs(cells)]
    datasets = [*dict.fromkeys(c.dataset for c in found), "average"]
    if len(datasets) < 3:
        return None
    places, styles = group(found + average_rows(found)[0], "row", "dataset"), style_rows(cells)
    figure.set_size_inches(max(6.4, 2 + 0.8 * len(datasets)), 4.3)
    axes = figure.subplots()
    rows = list(group(found, "row"))
    for k, row in enumerate(rows):
        there = [x for x, dataset in enumerate(datasets) if (row, dataset) in places]
        points = [center(places[row, datasets[x]]) for x in there]
        places_x = [x + 0.8 * ((k + 0.5) / len(rows) - 0.5) for x in there]     # side by side
        axes.errorbar(places_x, *zip(*points), capsize=2, **styles[row], linestyle="")
    axes.axhline(0, color="#777777", linewidth=0.9)
    axes.axvspan(len(datasets) - 1.5, len(datasets) - 0.5, color="#EEEEEE", zorder=-1)
    axes.set_xticks(range(len(datasets)), datasets, rotation=40, ha="right", fontsize=8)
    classes = "new" if cells[0].table.shots else "all"
    axes.set_ylabel(f"accuracy on {classes} classes,\nabove zero-shot CLIP (points)")
    widen(axes, 5)
    return f"Where does learning help? ({plural(found[0].shots, 'shot')})"


def over_training(figure, cells, means):
    histories, found = {}, usual_runs(cells)
    for c in found:
        for key, values in c.record.items():        # lists of numbers, one an epoch
            if isinstance(values, list) and values and all(type(v) in (int, float) for v in values):
                histories.setdefault(key, {}).setdefault(c.row, []).append(values)
    keys = sorted(histories, key=[*HISTORIES, *sorted(histories)].index)
    for axes, key in zip(panels(figure, len(keys), 3.2, 1.8), keys):
        for row, lists in histories[key].items():
            parts = min(20, *map(len, lists))       # of the training, equally long
            split = [[part.mean() for part in np.array_split(values, parts)] for values in lists]
            x = 100 * (np.arange(parts) + 0.5) / parts
            axes.plot(x, np.mean(split, 0), **style_rows(cells)[row], markersize=3)
        axes.set_ylabel(HISTORIES.get(key, key), fontsize=8)
        axes.set_xlabel("part of the training (%)", fontsize=8)
    return f"How does the training go? ({plural(found[0].shots, 'shot')})" if keys else None


def gap_against_gain(figure, cells, means):
    shots, styles = usual_runs(cells)[0].shots, style_rows(cells)
    places = group([c for c in cells if c.shots == shots], "column", "row")
    columns = [column for column in MOVES if column in {column for column, _ in places}]
    for axes, column in zip(panels(figure, len(columns), 3.2, 3.2), columns):
        for row, style in styles.items():
            points = [(c.value, change(c.record)) for c in places.get((column, row), ())]
            if points:
                axes.plot(*zip(*points), **{**style, "linestyle": ""}, markersize=4)
        axes.axhline(0, color="#777777", linewidth=0.9)
        axes.set_xlabel(MOVES[column], fontsize=8)
        axes.set_ylabel("new classes, above zero-shot CLIP (points)", fontsize=8)
    title = f"Does a prompt that moves less generalize better? ({plural(shots, 'shot')})"
    return title if columns else None
