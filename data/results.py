"""The lines that runs leave behind, all together as tables."""

import json
import math
import os
import shlex
import sys
from pathlib import Path

from data.errors import Problem


# ---------------------------------------------------------------- reading the lines

# Flags that tell where a run was, not what it was.
ELSEWHERE = {"dataset", "data_root", "backbone", "pretrained", "shots", "seeds", "base_to_new", "transfer", "class_chunk",
             "device", "cache", "out", "save", "load"}


WANTED = {"few-shot": {"zero_shot", "accuracy"},
          "base-to-new": {f"{zero_shot}{part}" for zero_shot in ("", "zero_shot_") for part in ("base", "new", "harmonic")}}


def read(file):
    """{(dataset, backbone, protocol): {name: {shots: {seed: record}}}} of a file of result lines.

    A name is the method with the flags that were not left at their defaults. Of equal runs the last one counts (and what it
    was not tested on, from the ones before); lines that were cut short, and runs that were loaded, are passed over.
    Raises Problem if there is no such file or no such line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Problem(f"{file}: no results yet; every run of a method adds a line there") from None
    except UnicodeDecodeError:
        raise Problem(f"{file}: not a file of result lines") from None
    groups, known = {}, {"method", "dataset", "backbone", "protocol", "shots", "seed", "changed", "transfer"}
    for line in lines:
        try:
            r = json.loads(line)
        except ValueError:
            continue
        if isinstance(r, dict) and known <= set(r) and WANTED.get(str(r["protocol"]), {""}) <= set(r) and "loaded" not in r:
            backbone = f"{r['backbone']} {r.get('pretrained', '')}".strip()
            methods = groups.setdefault((r["dataset"], backbone, r["protocol"]), {})
            seeds = methods.setdefault(name(r), {}).setdefault(r["shots"], {})
            r["transfer"] = {**seeds.get(r["seed"], r)["transfer"], **r["transfer"]}
            seeds[r["seed"]] = r
    if not groups:
        raise Problem(f"{file}: holds no line of results; every run of a method adds one")
    return dict(sorted(groups.items()))


def name(record):
    """"coop", or "restore --towers text": the method and its flags, as far as they are not the defaults."""
    flags = {flag: value for flag, value in record["changed"].items() if flag not in ELSEWHERE}
    plain = lambda value: "" if value is True else f" {value:g}" if isinstance(value, float) else f" {shlex.quote(str(value))}"
    return " ".join([record["method"], *(f"--{flag.replace('_', '-')}{plain(value)}" for flag, value in flags.items())])


def mean_and_deviation(values):
    """Mean and standard deviation (over n - 1; 0 of one value) of a non-empty list."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


# ---------------------------------------------------------------- tables

def tables(groups, markdown=False):
    """Prints mean ± standard deviation over the seeds; the best of a column is bold, where the terminal can."""
    for (dataset, backbone, protocol), methods in groups.items():
        title, every = f"{dataset}, {backbone}, {protocol}", [r for runs in methods.values() for seeds in runs.values() for r in seeds.values()]
        lines = [(label, n, list(seeds.values())) for label, runs in methods.items() for n, seeds in sorted(runs.items())]
        if protocol == "few-shot":
            shots = sorted({r["shots"] for r in every})
            rows = [["zero-shot", *[[every[0]["zero_shot"]]] * len(shots)]]
            for label, runs in methods.items():
                rows.append([label, *([r["accuracy"] for r in runs.get(n, {}).values()] for n in shots)])
            table(title, ["accuracy", *(f"{n} shot{'s' * (n > 1)}" for n in shots)], rows, markdown)
        else:
            columns, shifted = ["base", "new", "harmonic"], any("shift_after" in r for r in every)
            rows = [["zero-shot", "", *([every[0][f"zero_shot_{column}"]] for column in columns), *[""] * shifted]]
            for label, n, runs in lines:
                gaps = [r["shift_after"]["gap"] for r in runs if r.get("shift_after")]
                gap = f"{mean_and_deviation(gaps)[0]:.2f}" if gaps else ""
                rows.append([label, str(n), *([r[column] for r in runs] for column in columns), *[gap] * shifted])
            table(title, ["accuracy", "shots", *columns, *["shift gap"] * shifted], rows, markdown)
        zero_shot = {target: row["zero_shot"] for r in every for target, row in sorted(r["transfer"].items())}
        if zero_shot:
            rows = [["zero-shot", "", *([value] for value in zero_shot.values())]]
            for label, n, runs in lines:
                accuracy = [[r["transfer"][target]["accuracy"] for r in runs if target in r["transfer"]] for target in zero_shot]
                if any(accuracy):
                    rows.append([label, str(n), *accuracy])
            table(f"{title}, transfer", ["accuracy", "shots", *zero_shot], rows, markdown)


def table(title, header, rows, markdown):
    """Prints rows of cells; a cell is a text, or a list of values whose mean ± standard deviation is shown."""
    can = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
    bold = "**{}**" if markdown else "\033[1m{}\033[0m" if can else "{}"
    means = [[mean_and_deviation(cell)[0] if isinstance(cell, list) and cell else None for cell in row] for row in rows]
    best = [max((mean for mean in column if mean is not None), default=None) for column in zip(*means)]
    texts = [[cell if isinstance(cell, str) else spread(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts)]
    print(f"\n**{title}**\n" if markdown else f"\n{title}")
    for row, values in zip([header, *texts], [[None] * len(header), *means]):
        shown = [bold.format(text) if mean is not None and f"{mean:.1f}" == f"{top:.1f}" else text for text, mean, top in zip(row, values, best)]
        if markdown:
            print(f"| {' | '.join(shown)} |" + (f"\n|{' --- |' * len(header)}" if row is header else ""))
        else:
            padding = [" " * (width - len(text)) for width, text in zip(widths, row)]
            print(f"  {shown[0]}{padding[0]}", *(f"  {space}{text}" for space, text in zip(padding[1:], shown[1:])))


def spread(values):
    """Mean ± standard deviation as text; nothing of nothing."""
    return "" if not values else f"{mean_and_deviation(values)[0]:.1f}" + (f" ± {mean_and_deviation(values)[1]:.1f}" if len(values) > 1 else "")
