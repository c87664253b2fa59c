"""What a run leaves behind, a line of results and a file of what was learned; and all lines together as tables and pictures."""

import contextlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.errors import Problem
from data.images import write_whole


def check_writable(out, save, shots, seeds):
    """Raises Problem if the results or what is learned could not be written: now rather than after the training."""
    try:
        saved = [save.format(shots=n, seed=seed) for n in shots for seed in seeds] if save else []
    except (KeyError, IndexError, AttributeError, ValueError):
        raise Problem(f"--save {save}: only {{shots}} and {{seed}} are filled in") from None
    if len(set(saved)) < len(saved):
        raise Problem("--save: several runs would write one file; put {shots} and {seed} into its name")
    for file in map(Path, (out, *saved)):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise Problem(f"cannot write {file}")


def append_line(file, line):
    """Adds a line in one write, so that lines of several processes do not mix; a line that was cut short is closed first."""
    with open(file, "ab+") as out:
        cut = out.seek(0, os.SEEK_END) and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n"
        out.write(b"\n" * bool(cut) + line.encode() + b"\n")


def save(file, prompt, meaning):
    """What was learned, as safetensors; `meaning`, a dict of what it depends on, goes into the metadata."""
    write_whole(file, prompt.state_dict(), {"meaning": json.dumps(meaning)})


def load(file, prompt, meaning):
    """Puts a saved prompt's tensors into `prompt`; raises Problem if it is of another meaning or shape."""
    try:
        with safe_open(file, "pt") as content:
            tensors, metadata = {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}
        saved = json.loads(metadata.get("meaning", "{}"))
    except FileNotFoundError:
        raise Problem(f"--load {file}: no such file") from None
    except (SafetensorError, OSError, ValueError):
        raise Problem(f"--load {file}: not a safetensors file of ours") from None
    if saved.get("method") != meaning["method"]:
        raise Problem(f"--load {file}: was saved by {saved.get('method', 'something else')}, not by {meaning['method']}")
    for key, value in saved.items():
        if meaning.get(key) != value:
            raise Problem(f"--load {file}: was learned with --{key.replace('_', '-')} {value}, not {meaning.get(key)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in prompt.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != found:
        raise Problem(f"--load {file}: holds {found}, the flags given here (and the classes) ask for {shapes}")
    prompt.load_state_dict(tensors)


# ---------------------------------------------------------------- reading the lines

# Flags that tell where a run was, not what it was.
ELSEWHERE = {"dataset", "data_root", "backbone", "pretrained", "shots", "seeds", "base_to_new", "transfer", "class_chunk",
             "device", "cache", "out", "save", "load"}


def read(file):
    """{(dataset, backbone, protocol): {name: {shots: {seed: record}}}} of a file of result lines.

    A name is the method with the flags that were not left at their defaults. Of equal runs the last one counts; lines that
    were cut short, and runs that were loaded, are passed over. Raises Problem if there is no such file."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Problem(f"{file}: no results yet; every run of a method adds a line there") from None
    except UnicodeDecodeError:
        raise Problem(f"{file}: not a file of result lines") from None
    groups = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            r = json.loads(line)
            if isinstance(r, dict) and {"method", "dataset", "protocol", "shots", "seed", "changed"} <= set(r) and "loaded" not in r:
                group = groups.setdefault((r["dataset"], r["backbone"], r["protocol"]), {})
                group.setdefault(name(r), {}).setdefault(r["shots"], {})[r["seed"]] = r
    return dict(sorted(groups.items()))


def name(record):
    """"coop", or "restore --towers text": the method and its flags, as far as they are not the defaults."""
    flags = {flag: value for flag, value in record["changed"].items() if flag not in ELSEWHERE}
    plain = lambda value: "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
    return " ".join([record["method"], *(f"--{flag.replace('_', '-')}{plain(value)}" for flag, value in flags.items())])


def mean_and_deviation(values):
    """Mean and standard deviation (over n - 1; 0 of one value) of a non-empty list."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


# ---------------------------------------------------------------- tables

def tables(groups, markdown=False):
    """Prints mean ± standard deviation over the seeds; the best of a column is bold, where the terminal can."""
    for (dataset, backbone, protocol), methods in groups.items():
        title, shots = f"{dataset}, {backbone}, {protocol}", sorted({n for runs in methods.values() for n in runs})
        every = [(label, n, list(runs[n].values())) for label, runs in methods.items() for n in sorted(runs)]
        first = every[0][2][0]
        if protocol == "few-shot":
            rows = [["zero-shot", *[[first["zero_shot"]]] * len(shots)]]
            rows += [[label, *([r["accuracy"] for r in runs.get(n, {}).values()] for n in shots)] for label, runs in methods.items()]
            table(title, ["accuracy", *(f"{n} shot{'s' * (n > 1)}" for n in shots)], rows, markdown)
        else:
            columns = ["base", "new", "harmonic"]
            rows = [["zero-shot", "", *([first[f"zero_shot_{column}"]] for column in columns)]]
            rows += [[label, str(n), *([r[column] for r in runs] for column in columns)] for label, n, runs in every]
            if any("shift_after" in r for _, _, runs in every for r in runs):
                columns, gaps = [*columns, "shift gap"], [[r["shift_after"]["gap"] for r in runs if "shift_after" in r] for *_, runs in every]
                for row, gap in zip(rows, [[], *gaps]):
                    row.append(f"{mean_and_deviation(gap)[0]:.2f}" if gap else "")
            table(title, ["accuracy", "shots", *columns], rows, markdown)
        targets = sorted({target for _, _, runs in every for r in runs for target in r["transfer"]})
        if targets:
            known = {t: r["transfer"][t]["zero_shot"] for _, _, runs in every for r in runs for t in r["transfer"]}
            rows = [["zero-shot", "", *([known[t]] for t in targets)]]
            rows += [[label, str(n), *([r["transfer"][t]["accuracy"] for r in runs if t in r["transfer"]] for t in targets)]
                     for label, n, runs in every if any(r["transfer"] for r in runs)]
            table(f"{title}, transfer", ["accuracy", "shots", *targets], rows, markdown)


def table(title, header, rows, markdown):
    """A cell is a text, or a list of values to be averaged."""
    bold = ("**", "**") if markdown else ("\033[1m", "\033[0m")
    can = markdown or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ)
    averaged = [[mean_and_deviation(cell) if isinstance(cell, list) and cell else None for cell in row] for row in rows]
    best = [max((cell[0] for cell in column if cell), default=None) for column in zip(*averaged)]
    cells = [[cell if isinstance(cell, str) else "" if not value else f"{value[0]:.1f} ± {value[1]:.1f}" if len(cell) > 1 else f"{value[0]:.1f}"
              for cell, value in zip(*both)] for both in zip(rows, averaged)]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    print(f"\n**{title}**\n" if markdown else f"\n{title}")
    if markdown:
        print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    else:
        print("  " + header[0].ljust(widths[0]), *(cell.rjust(width + 2) for cell, width in zip(header[1:], widths[1:])))
    for row, values in zip(cells, averaged):
        row = row if markdown else [row[0].ljust(widths[0]), *(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:]))]
        row = [cell[:len(cell) - len(cell.lstrip())] + bold[0] + cell.lstrip() + bold[1] if can and value and f"{value[0]:.1f}" == f"{top:.1f}" else cell
               for cell, value, top in zip(row, values, best)]
        print(f"| {' | '.join(row)} |" if markdown else "  " + " ".join(row))


# ---------------------------------------------------------------- pictures: one per question

NAMES = {"coop": "CoOp", "prograd": "ProGrad", "mvp_mi": "MVP-MI", "restore": "RESTORE"}
# Colours that the colour-blind tell apart (Okabe and Ito); marker and dashes differ as well, for print in grey.
STYLES = [("#D55E00", "o", "-"), ("#0072B2", "s", "--"), ("#009E73", "^", "-."), ("#000000", "D", ":"), ("#E69F00", "v", (0, (5, 1))),
          ("#CC79A7", "P", (0, (3, 1, 1, 1))), ("#56B4E9", "X", (0, (1, 1))), ("#999999", "<", (0, (8, 3))), ("#F0E442", ">", (0, (2, 4)))]


def pictures(groups, folder):
    """Draws, as far as the runs can answer: accuracy over shots, base against new, ProGrad's conflicts, RESTORE's gap against
    its gain, MVP-MI's bound. Prints the question and file of each; raises Problem if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Problem("--plot needs matplotlib: pip install matplotlib") from None
    backbones = {dataset: {b for d, b, _ in groups if d == dataset} for dataset, _, _ in groups}
    for (dataset, backbone, protocol), methods in groups.items():
        place = dataset if len(backbones[dataset]) == 1 else f"{dataset}, {backbone}"
        for draw in (accuracy_over_shots, base_against_new, conflicts, gap_against_gain, bound):
            figure = Figure(figsize=(7.2, 4.3), dpi=130, layout="constrained")
            question = draw(figure, methods, protocol)
            if question:
                figure.suptitle(f"{question}\n", fontsize=11)
                figure.text(0.5, 0.925, f"{place}, {protocol}", ha="center", fontsize=9, color="#555555")
                part = "" if protocol in draw.__doc__ else f"-{protocol}"
                file = Path(folder) / re.sub(r"[^\w.-]+", "_", f"{place}-{draw.__name__}{part}.png".replace("_", "-"))
                image = io.BytesIO()
                figure.savefig(image, metadata={"Software": None})
                file.write_bytes(image.getvalue())
                print(f"{file}: {question}")


def styled(methods):
    """(label, runs, colour, marker, dashes) of every name, the four methods always alike."""
    order = [*NAMES, *(label for label in methods if label not in NAMES)]
    for label, runs in methods.items():
        method, *flags = label.split(" ", 1)
        yield (" ".join([NAMES.get(method, method), *flags]), runs, *STYLES[order.index(label) % len(STYLES)])


def accuracy_over_shots(figure, methods, protocol):
    """few-shot: mean and standard deviation over seeds, zero-shot as a line."""
    if protocol != "few-shot":
        return None
    axes, shots = figure.subplots(), sorted({n for runs in methods.values() for n in runs})
    for label, runs, colour, marker, dashes in styled(methods):
        points = {n: mean_and_deviation([r["accuracy"] for r in seeds.values()]) for n, seeds in sorted(runs.items())}
        x = [math.log2(n) for n in points]
        axes.errorbar(x, *zip(*points.values()), label=label, color=colour, marker=marker, linestyle=dashes, capsize=3)
    zero_shot = next(r for runs in methods.values() for seeds in runs.values() for r in seeds.values())["zero_shot"]
    axes.axhline(zero_shot, color="#777777", linewidth=1, linestyle=(0, (1, 2)), label="zero-shot")
    axes.set_xticks([math.log2(n) for n in shots], [str(n) for n in shots])
    axes.set(xlabel="training images per class (shots)", ylabel="accuracy on test images, all classes (%)")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return "What do a few labelled images give?"


def base_against_new(figure, methods, protocol):
    """base-to-new: a point per method, with the curves on which the harmonic mean is the same."""
    if protocol != "base-to-new":
        return None
    axes, points = figure.subplots(), []
    for label, runs, colour, marker, _ in styled(methods):
        for n, seeds in sorted(runs.items()):
            (x, dx), (y, dy) = (mean_and_deviation([r[part] for r in seeds.values()]) for part in ("base", "new"))
            several = len({n for runs in methods.values() for n in runs}) > 1
            axes.errorbar(x, y, dy, dx, color=colour, marker=marker, markersize=7, markeredgecolor="black", linestyle="", capsize=2, linewidth=1,
                          label=f"{label}, {n} shots" if several else label)
            points.append((x, y))
    first = next(r for runs in methods.values() for seeds in runs.values() for r in seeds.values())
    points.append((first["zero_shot_base"], first["zero_shot_new"]))
    axes.plot(*points[-1], color="white", marker="*", markersize=15, markeredgecolor="black", linestyle="", label="zero-shot")
    low, high = (f(v for point in points for v in point) for f in (min, max))
    left, right = min(x for x, _ in points) - 5, max(x for x, _ in points) + 5
    bottom, top = min(y for _, y in points) - 8, max(y for _, y in points) + 8
    for h in range(5, 100, 5):
        xs = [left + (right - left) * k / 100 for k in range(101)]
        curve = [(x, h * x / (2 * x - h)) for x in xs if 2 * x > h and bottom < h * x / (2 * x - h) < top]
        if len(curve) > 3:
            axes.plot(*zip(*curve), color="#BBBBBB", linewidth=0.8, zorder=0)
            axes.text(*curve[0], f"H {h}", fontsize=7, color="#777777", va="bottom")
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="accuracy on base classes, those learned (%)", ylabel="accuracy on new classes (%)")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return "What does learning some classes cost on the others?"


def over_training(figure, methods, method, keys):
    """One panel per key of the records: its mean over seeds against the part of the training, in twentieths."""
    panels = figure.subplots(len(keys), squeeze=False, sharex=True)[:, 0]
    lines = [(label, n, list(seeds.values())) for label, runs in methods.items() if label.split()[0] == method for n, seeds in sorted(runs.items())]
    for (label, n, records), (colour, marker, dashes) in zip(lines, STYLES * len(lines)):
        for axes, key in zip(panels, keys):
            values = torch.tensor([r[key] for r in records], dtype=torch.float64).mean(0)                 # (epochs,)
            parts = [part.mean().item() for part in values.tensor_split(min(20, len(values)))]
            x = [100 * (k + 0.5) / len(parts) for k in range(len(parts))]
            flags = label.removeprefix(method)
            axes.plot(x, parts, color=colour, marker=marker, markersize=4, linestyle=dashes, label=f"{n} shot{'s' * (n > 1)}{flags}" if key == keys[0] else None)
    panels[-1].set_xlabel("part of the training (%)")
    return panels, [r for _, _, records in lines for r in records]


def conflicts(figure, methods, protocol):
    """ProGrad's conflict rate and the cosine of its gradients over the training."""
    if not any("conflicts" in r for runs in methods.values() for seeds in runs.values() for r in seeds.values()):
        return None
    (rate, cosine), _ = over_training(figure, methods, "prograd", ["conflicts", "cosine"])
    rate.set(ylabel="steps in conflict", ylim=(-0.05, 1.05))
    rate.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    cosine.set_ylabel("cosine of $G_d$, $G_g$")
    cosine.axhline(0, color="#777777", linewidth=0.8)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return "ProGrad: how often would learning undo what the written prompt knows?"


def bound(figure, methods, protocol):
    """MVP-MI's lower bound of the mutual information over the training, and log C, which it cannot pass."""
    if not any("bound" in r for runs in methods.values() for seeds in runs.values() for r in seeds.values()):
        return None
    (axes,), records = over_training(figure, methods, "mvp_mi", ["bound"])
    for limit in {r["log_C"] for r in records}:
        axes.axhline(limit, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
        axes.text(0, limit, f"log C, C = {math.exp(limit):.0f} classes", fontsize=8, color="#555555", va="bottom")
    axes.set_ylabel("log C - $L_{nce}$ (nats)")
    axes.margins(y=0.12)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return "MVP-MI: how much does the learned view tell about the written one?"


def gap_against_gain(figure, methods, protocol):
    """RESTORE's gap between the towers' feature shifts against the gain over zero-shot: a point per run."""
    which = "new" if protocol == "base-to-new" else None
    gain = lambda r: r["new"] - r["zero_shot_new"] if which else r["accuracy"] - r["zero_shot"]
    axes = figure.subplots()
    for label, runs, colour, marker, _ in styled(methods):
        points = [(r["shift_after"]["gap"], gain(r)) for seeds in runs.values() for r in seeds.values() if r.get("shift_after")]
        if points:
            axes.plot(*zip(*points), color=colour, marker=marker, markersize=6, markeredgecolor="black", linestyle="", label=label)
    if not axes.lines:
        return None
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set(xlabel="gap between the towers' feature shifts after training (mean over blocks)",
             ylabel=f"gain over zero-shot{' on new classes' if which else ''} (points)")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return "RESTORE: do the towers that move alike generalise better?"
