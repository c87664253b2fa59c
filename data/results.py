"""What a run leaves behind, a line of results and a file of what was learned; and all lines together as tables."""

import contextlib
import json
import math
import os
import shlex
import sys
from pathlib import Path

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
