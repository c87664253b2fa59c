"""Recorded runs as pictures, one per question. Only this file needs matplotlib."""

import io
import math
import re
from pathlib import Path
from statistics import mode

import numpy as np

from data.errors import Problem
from data.results import average, average_title, every_record, mean_and_deviation, plural, shots_of

METHODS = {"coop": "CoOp", "prograd": "ProGrad", "mvp_mi": "MVP-MI", "restore": "RESTORE"}
WORDS = {  # the README's, for flags that have some
    "--blend 0": "no surgery", "--blend 0,0": "no surgery", "--shift-weight 0": "no consistency",
    "--towers text": "text prompts only", "--towers vision": "vision prompts only",
    "--prompts coupled": "coupled prompts", "--shift gram": "Gram norms",
    "--projection 0": "no projection", "--mi-weight 0": "no mutual information",
    "--augment 0": "no augmentation", "--classifier soft": "soft view",
    "--classifier mean": "mean of both views", "--class-specific": "a context for each class",
    "--views 0": "new views every epoch", "--position middle": "name in the middle",
    "--position front": "name in front",
}
# Colours that the colour-blind tell apart (Okabe and Ito 2008); markers and dashes differ as well,
# for print in grey. The four methods have the first four wherever they appear.
STYLES = [("#D55E00", "o", "-"), ("#0072B2", "s", "--"), ("#009E73", "^", "-."),
          ("#000000", "D", ":"), ("#E69F00", "v", (0, (5, 1))),
          ("#CC79A7", "P", (0, (3, 1, 1, 1))), ("#56B4E9", "X", (0, (1, 1))),
          ("#999999", "<", (0, (8, 3)))]
QUIET = {"color": "#777777", "linewidth": 0.9, "zorder": 0}
DOTTED = {"linestyle": (0, (1, 2)), **QUIET}
MOST = len(STYLES)  # names in one picture


def draw(groups, folder):
    """Draws what the runs can answer (`results.group`) into PNG files in `folder`.

    Prints each file, its question, and what it leaves out. Raises Problem without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Problem("--plot needs matplotlib: pip install matplotlib") from None
    drawn = set()
    for name, world, few_shot, base_to_new, sets in worlds(groups):
        for question in (accuracy_over_shots, base_against_new, change_by_data_set, conflicts,
                         gap_against_gain, bound):
            figure = Figure(figsize=(6.4, 4.3), dpi=130, layout="constrained")
            if question is change_by_data_set:
                title, left_out = question(figure, *sets)
            else:
                title, left_out = question(figure, few_shot, base_to_new)
            if not title:
                continue
            figure.suptitle(f"{title}\n", fontsize=11)
            legend(figure)
            below = 1 - 0.31 / figure.get_size_inches()[1]
            figure.text(0.5, below, quoted(world), ha="center", fontsize=9, color="#555555")
            slug = re.sub(r"[^\w.-]+", "-", f"{name}-{question.__name__.replace('_', '-')}")
            slug = slug.strip("-.")[-100:]
            while slug in drawn:
                slug += "-2"
            drawn.add(slug)
            image = io.BytesIO()
            figure.savefig(image, metadata={"Software": None})
            file = Path(folder) / f"{slug}.png"
            file.with_suffix(".part").write_bytes(image.getvalue())
            file.with_suffix(".part").replace(file)  # whole or not at all
            print(f"{file}: {title}")
            if left_out:
                print(f"  left out, since a picture holds {MOST} names: {'; '.join(left_out)}")


def worlds(groups):
    """Yields (file name, title, few-shot, base to new, sets) of averages, or of single data sets.

    few-shot and base to new are {name: {shots: {seed: record}}}, empty where there are no runs;
    sets the same by data set ({data set: ...}, {data set: ...}), for averages only. What is
    in an average has no pictures of its own: they would be too many to look at."""
    suites = {}
    for (suite, backbone, protocol), sets in groups.items():
        suites.setdefault((suite, backbone), {"few-shot": {}, "base-to-new": {}})[protocol] = sets
    names = [(suite, dataset) for (suite, _), protocols in suites.items()
             for dataset in dict.fromkeys(d for sets in protocols.values() for d in ("", *sets))]
    for (suite, backbone), protocols in suites.items():
        averages = {protocol: average(sets) for protocol, sets in protocols.items()
                    if len(sets) > 1}
        over = {(protocol, n): datasets for protocol, (_, overs, _) in averages.items()
                for n, datasets in overs.items()}
        few_shot, base_to_new = (averages.get(protocol, ({},))[0] for protocol in protocols)
        several = f"-{backbone}" if names.count((suite, "")) > 1 else ""
        if over:
            yield (f"{suite}{several}", f"{average_title(suite, over)}, {backbone}", few_shot,
                   base_to_new, tuple(protocols.values()))
        averaged = {(protocol, d) for (protocol, _), datasets in over.items() for d in datasets}
        for dataset in dict.fromkeys(d for sets in protocols.values() for d in sets):
            few_shot, base_to_new = (
                {} if (protocol, dataset) in averaged else sets.get(dataset, {})
                for protocol, sets in protocols.items())
            several = f"-{backbone}" if names.count((suite, dataset)) > 1 else ""
            yield f"{dataset}{several}", f"{dataset}, {backbone}", few_shot, base_to_new, ({}, {})


def legend(figure):
    """A legend of as many columns as the labels leave room for, below, where it adds its height."""
    labels = [x for axes in figure.axes for x in axes.get_legend_handles_labels()[1]]
    width, height = figure.get_size_inches()
    columns = min(5, max(1, int(18 * width) // (max(map(len, labels)) + 7)))
    figure.set_size_inches(width, height + 0.16 * math.ceil(len(labels) / columns))
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=columns)


def quoted(text):
    """The text as matplotlib prints it: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def in_words(label):
    """"restore --blend 0 [3fa2]" -> "RESTORE, no surgery [3fa2]", as the README says it."""
    form = re.compile(r"(\S+?)( --.*?)?((?: \[[^]]*\])?(?:, loaded)?)", re.DOTALL)
    method, flags, rest = form.fullmatch(label).groups()
    parts = [METHODS.get(method, method)]
    for flag in re.split(" (?=--)", flags.strip()) if flags else []:
        start = re.sub("^--ctx-init '?(.*?)'?$", r'from "\1"', flag)
        parts.append(WORDS.get(flag, start))
    return quoted(", ".join(parts) + rest)


def chosen(methods):
    """(labels that a picture has room for, those left out): first the methods without flags."""
    first = sorted(methods, key=lambda label: " " in label)[:MOST]
    return [label for label in methods if label in first], [x for x in methods if x not in first]


def styled(labels):
    """[(label, style)], styles all different; a method without flags always looks alike."""
    own = {label: list(METHODS).index(label) for label in labels if label in METHODS}
    free = iter(k for k in [4, 5, 6, 7, 0, 1, 2, 3] if k not in own.values())
    for label in labels:
        colour, marker, dashes = STYLES[own[label] if label in own else next(free)]
        yield label, {"color": colour, "marker": marker, "linestyle": dashes}


def at_least(limits, span):
    """Limits of an axis, widened around their middle where they are closer than `span`."""
    low, high = limits
    more = max(0, span - (high - low)) / 2
    return low - more, high + more


def about_shots(shots):
    """What a title says where shots are no axis."""
    return f" ({plural(shots[0], 'shot')})" if len(shots) == 1 else " (numbers: shots)"


# ---------------------------------------------------------------- the questions, one picture each
# Each takes a figure and the runs {name: {shots: {seed: record}}} of both protocols, and returns
# its title (None: there is nothing to draw) and the names that it leaves out.

def accuracy_over_shots(figure, few_shot, base_to_new):
    """Accuracy over shots, mean and standard deviation over seeds, zero-shot as a line."""
    if not few_shot:
        return None, []
    axes, shots, (labels, left_out) = figure.subplots(), shots_of({"": few_shot}), chosen(few_shot)
    for k, (label, style) in enumerate(styled(labels)):
        runs = sorted(few_shot[label].items())
        points = [mean_and_deviation([r["accuracy"] for r in s.values()]) for _, s in runs]
        aside = 0.03 * (k - (len(labels) - 1) / 2)  # side by side, for the bars
        axes.errorbar([math.log2(n) + aside for n, _ in runs], *zip(*points), capsize=3,
                      label=in_words(label), **style)
    zero = [mode(r["zero_shot"] for r in every_record(few_shot) if r["shots"] == n) for n in shots]
    if len(set(zero)) == 1:
        axes.axhline(zero[0], label="zero-shot", **DOTTED)
    else:  # averages, over other data sets for other shots
        axes.plot([math.log2(n) for n in shots], zero, label="zero-shot", **DOTTED)
    axes.set_xticks([math.log2(n) for n in shots], [str(n) for n in shots])
    axes.set(xlim=at_least(axes.get_xlim(), 1), ylim=at_least(axes.get_ylim(), 10))
    axes.set(xlabel="training images per class (shots)",
             ylabel="accuracy on test images, all classes (%)")
    return "What do a few labelled images give?", left_out


def base_against_new(figure, few_shot, base_to_new):
    """New classes against base classes, with the curves on which their harmonic mean is one."""
    if not base_to_new:
        return None, []
    axes, shots, every = figure.subplots(), shots_of({"": base_to_new}), every_record(base_to_new)
    labels, left_out = chosen(base_to_new)
    stars = {tuple(mode(r[zero] for r in every if r["shots"] == n)
                   for zero in ("zero_shot_base", "zero_shot_new")) for n in shots}
    points = sorted(stars)  # an average may be over other data sets for other shots
    for label, style in styled(labels):
        line = []
        for n, seeds in sorted(base_to_new[label].items()):
            (x, dx), (y, dy) = (mean_and_deviation([r[part] for r in seeds.values()])
                                for part in ("base", "new"))
            axes.errorbar(x, y, dy, dx, capsize=2, linewidth=1, markeredgecolor="black",
                          markersize=7 + 2 * shots.index(n),
                          label=None if line else in_words(label), **{**style, "linestyle": ""})
            if len(shots) > 1:
                axes.annotate(str(n), (x, y), (7, 5), textcoords="offset points", fontsize=7)
            line.append((x, y))
        axes.plot(*zip(*line), color=style["color"], linewidth=0.8)
        points += line
    axes.plot(*zip(*stars), "*", color="white", markeredgecolor="black", markersize=15,
              label="zero-shot")
    for _, new in stars:
        axes.axhline(new, **DOTTED)
    (left, right), (bottom, top) = ((min(values) - room, max(values) + room)
                                    for values, room in zip(zip(*points), (4, 9)))
    for h in range(5, 100, 5):
        xs = [left + (right - left) * k / 100 for k in range(101)]
        curve = [(x, h * x / (2 * x - h)) for x in xs
                 if 2 * x > h and bottom < h * x / (2 * x - h) < top - 2]
        if len(curve) > 50:
            axes.plot(*zip(*curve), color="#CCCCCC", linewidth=0.9, zorder=0)
            axes.text(curve[0][0] + 0.1, curve[0][1], f"H = {h}", fontsize=7, color="#777777",
                      va="bottom", clip_on=True)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="accuracy on base classes, which were learned (%)",
             ylabel="accuracy on new classes (%)")
    return f"What does learning some classes cost on the others?{about_shots(shots)}", left_out


def change_by_data_set(figure, few_shot_sets, base_to_new_sets):
    """Change of accuracy against zero-shot, of new classes if there are any, set by set."""
    sets, part, zero = base_to_new_sets, "new", "zero_shot_new"
    if len(sets) < 2:
        sets, part, zero = few_shot_sets, "accuracy", "zero_shot"
    if len(sets) < 2:
        return None, []
    counted = [r["shots"] for methods in sets.values() for r in every_record(methods)]
    shots = max(counted, key=lambda n: (counted.count(n), n))  # those of most runs
    sets = {**sets, "average": average(sets)[0]}
    present = dict.fromkeys(label for methods in sets.values() for label, runs in methods.items()
                            if shots in runs)
    labels, left_out = chosen(present)
    figure.set_size_inches(max(6.4, 2 + 0.8 * len(sets)), 4.3)
    axes = figure.subplots()
    for k, (label, style) in enumerate(styled(labels)):
        aside, first = 0.8 * (k - (len(labels) - 1) / 2) / len(labels), True
        for x, (dataset, methods) in enumerate(sets.items()):
            changes = [r[part] - r[zero] for r in methods.get(label, {}).get(shots, {}).values()]
            if changes:
                axes.errorbar(x + aside, *mean_and_deviation(changes), capsize=2, linewidth=1,
                              label=in_words(label) if first else None,
                              markersize=9 if dataset == "average" else 5,
                              **{**style, "linestyle": ""})
                first = False
    axes.axvspan(len(sets) - 1.5, len(sets) - 0.5, color="#EEEEEE", zorder=-1)
    axes.axhline(0, **QUIET)
    axes.set_xticks(range(len(sets)), map(quoted, sets), rotation=40, ha="right", fontsize=8)
    axes.set(xlim=(-0.5, len(sets) - 0.5), ylim=at_least(axes.get_ylim(), 5))
    classes = "new classes" if part == "new" else "all classes"
    axes.set_ylabel(f"accuracy on {classes},\nabove or below zero-shot (points)")
    question = "Where are new classes forgotten?" if part == "new" else "Where does learning help?"
    return f"{question} ({plural(shots, 'shot')})", left_out


def histories(few_shot, base_to_new, key, unit=None):
    """{label: mean of the records' list `key` over seeds and twentieths of the training}.

    One for each protocol, shots and name; of an average over data sets, over those as well. In
    units of the records' number `unit`."""
    found = {}
    for methods, extra in ((few_shot, ""), (base_to_new, ", base to new")):
        for name, runs in methods.items():
            for n, seeds in sorted(runs.items()):
                records = [part for r in seeds.values() for part in r.get("of", [r])]
                if all(key in r for r in records):
                    parts = min(20, *(len(r[key]) for r in records))
                    values = [[part.mean() for part in np.array_split(r[key], parts)]
                              for r in records]
                    units = [[r.get(unit, 1)] for r in records]
                    found[f"{in_words(name)}, {plural(n, 'shot')}{extra}"] = np.mean(
                        np.divide(values, units), axis=0)
    return found


def over_training(axes, lines, label=True):
    """Draws {label: values} as lines over the training; says where two are the same."""
    spread = np.ptp(np.concatenate(list(lines.values()))) or 1
    drawn = {}
    for (name, values), (colour, marker, dashes) in zip(lines.items(), STYLES):
        same = [other for other, these in drawn.items()
                if len(these) == len(values) and abs(these - values).max() < 0.01 * spread]
        x = 100 * (np.arange(len(values)) + 0.5) / len(values)
        text = f"{name} (as {same[0]})" if same else name
        axes.plot(x, values, color=colour, marker=marker, markersize=4, linestyle=dashes,
                  label=text if label else None)
        drawn[name] = values
    axes.set(xlim=(0, 100), xlabel="part of the training (%)" if label else "")
    return list(lines)[MOST:]


def conflicts(figure, few_shot, base_to_new):
    """How often ProGrad's two gradients conflict, and their cosine, as training goes on."""
    rates, cosines = (histories(few_shot, base_to_new, key) for key in ("conflicts", "cosine"))
    if not rates or not cosines:
        return None, []
    rate, cosine = figure.subplots(2, sharex=True)
    over_training(rate, rates, label=False)
    left_out = over_training(cosine, cosines)
    rate.set(ylabel="steps in conflict", ylim=(-0.05, 1.05))
    rate.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    cosine.set(ylabel="cosine of $G_d$ and $G_g$", ylim=at_least(cosine.get_ylim(), 0.1))
    cosine.axhline(0, **QUIET)
    return "ProGrad: how often would a step undo what the written prompt knows?", left_out


def bound(figure, few_shot, base_to_new):
    """MVP-MI's lower bounds of mutual information, as shares of log C, which they cannot pass."""
    lines = {}
    for key, of in (("bound", "of the written prompt"), ("image_bound", "of mixed images")):
        for label, values in histories(few_shot, base_to_new, key, "log_C").items():
            lines[f"{label}, {of}"] = 100 * values
    if not lines:
        return None, []
    axes = figure.subplots()
    left_out = over_training(axes, lines)
    axes.axhline(100, **DOTTED)
    axes.set(ylabel="bound in % of log C", ylim=at_least(axes.get_ylim(), 5))
    return "MVP-MI: how much does the learned prompt tell, of all that there is?", left_out


def gap_against_gain(figure, few_shot, base_to_new):
    """RESTORE's gap between the towers' feature shifts against the gain over zero-shot, by run."""
    new = any(r.get("shift_after") for r in every_record(base_to_new))
    part, zero = ("new", "zero_shot_new") if new else ("accuracy", "zero_shot")
    shifted = {}
    for label, runs in (base_to_new if new else few_shot).items():
        runs = {n: [(r["shift_after"]["gap"], r[part] - r[zero]) for r in seeds.values()
                    if r.get("shift_after")] for n, seeds in sorted(runs.items())}
        if any(runs.values()):
            shifted[label] = {n: points for n, points in runs.items() if points}
    if not shifted:
        return None, []
    axes, (labels, left_out) = figure.subplots(), chosen(shifted)
    shots = sorted({n for runs in shifted.values() for n in runs})
    for label, style in styled(labels):
        for k, (n, points) in enumerate(shifted[label].items()):
            axes.plot(*zip(*points), label=None if k else in_words(label), markeredgecolor="black",
                      markersize=5 + 2 * shots.index(n), **{**style, "linestyle": ""})
            for point in points if len(shots) > 1 else ():
                axes.annotate(str(n), point, (6, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0, **QUIET)
    axes.set(xlim=at_least(axes.get_xlim(), 0.1), ylim=at_least(axes.get_ylim(), 5))
    axes.set(xlabel="gap between the towers' feature shifts after training",
             ylabel=f"gain over zero-shot{', new classes' if new else ''} (points)")
    return f"RESTORE: do towers that move alike generalise better?{about_shots(shots)}", left_out
