"""python common.py: the recorded runs as tables and pictures, or the list of the data sets.

Imports nothing heavy, so that it answers at once."""

import json
import os
import re
import sys
from pathlib import Path
from statistics import fmean, mode

from data import results
from data.errors import Parser, Problem, several
from data.results import (CATALOGUE, MEASURED, average, average_title, every_record,
                          mean_and_deviation, mean_record, plural, shots_of)

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "published.json"
# Published numbers stand beside runs of other values of these flags, but of no others.
SETTINGS = results.ELSEWHERE | {"views", "precision", "epochs", "n_ctx", "ctx_init"}
LONGEST = 40  # characters of a name beside its numbers; a longer one stands above them


def main():
    p = Parser(description="Compares the recorded runs, or lists the data sets.")
    add = p.add_argument
    add("file", nargs="?", default="runs/results.jsonl", help="result lines (runs/results.jsonl)")
    add("--against", metavar="NAME",
        help="a row, such as coop: how far are the others above it, and on how many data sets?")
    add("--datasets", type=several(str), metavar="NAME,...",
        help="only these, as the tables name them (all)")
    add("--classes", action="store_true",
        help="accuracy class by class, and what each is most often taken for")
    add("--markdown", action="store_true", help="tables to paste into notes")
    add("--plot", action="store_true",
        help="draw pictures, of the averages if there are some, into the folder of the lines")
    add("--data", action="store_true", help="list the data sets: images, template, folder")
    add("--data-root", default=str(HERE), metavar="DIR", help="where they are looked for (data)")
    args = p.parse_args()
    if args.data:
        from data.files import list_data
        return list_data(args.data_root)
    records, odd = results.read(args.file)
    if odd:
        print(f"{args.file}: passed over {plural(odd, 'line')} without a record", file=sys.stderr)
    groups = chosen(results.group(records), args.datasets)
    if args.classes:
        classes(groups, args.markdown)
    elif args.against:
        against(groups, args.against, args.markdown)
    else:
        tables(groups, args.markdown)
    if args.plot:
        from data import pictures
        pictures.draw(groups, Path(args.file).parent)


def chosen(groups, datasets):
    """The groups without other data sets than these (None: all). Raises Problem: unknown one."""
    every = dict.fromkeys(dataset for sets in groups.values() for dataset in sets)
    for dataset in datasets or ():
        if dataset not in every:
            raise Problem(f"--datasets {dataset}: there are runs on {', '.join(every)}")
    groups = {key: {dataset: sets[dataset] for dataset in sets if dataset in (datasets or every)}
              for key, sets in groups.items()}
    return {key: sets for key, sets in groups.items() if sets}


# ---------------------------------------------------------------- means over seeds

def tables(groups, markdown=False):
    """Prints mean ± deviation over the seeds: first averages over data sets, then each of them."""
    for (suite, backbone, protocol), sets in groups.items():
        methods, over, notes = average(sets) if len(sets) > 1 else ({}, {}, [])
        if methods:
            eleven = all(len(some) == 11 and set(some) <= set(CATALOGUE) for some in over.values())
            theirs = published("average over 11") if suite == "papers" and eleven else []
            title = f"{average_title(suite, over)}, {backbone}, {protocol}"
            of_methods(title, methods, protocol, markdown, theirs)
        for note in notes:
            print(f"\n{note}")
    for (_, backbone, protocol), sets in groups.items():
        for dataset, methods in sets.items():
            transfer(f"{dataset}, {backbone}, {protocol}", dataset, methods, markdown)
    for (suite, backbone, protocol), sets in groups.items():
        fold = markdown and len(sets) > 1
        if fold:
            print(f"\n<details><summary>{protocol}, data set by data set</summary>")
        if len(sets) > 1:
            title = f"{results.SUITES[suite]}, {backbone}, {protocol}"
            by_data_set(title, sets, protocol, markdown)
        for dataset, methods in sets.items():
            theirs = published(dataset) if suite == "papers" else []
            of_methods(f"{dataset}, {backbone}, {protocol}", methods, protocol, markdown, theirs)
        if fold:
            print("\n</details>")


def of_methods(title, methods, protocol, markdown, theirs=()):
    """Prints a data set, or an average: rows are methods, columns shots, or base, new and H."""
    records, columns = every_record(methods), list(MEASURED[protocol])
    shots = sorted({r["shots"] for r in records})
    if protocol == "few-shot":
        rows = [[label, *(zero_shot(some, "accuracy", n) for n in shots)]
                for label, some in templates(records)]
        rows += [[label, *([r["accuracy"] for r in runs.get(n, {}).values()] for n in shots)]
                 for label, runs in methods.items()]
        header = ["accuracy", *(plural(n, "shot") for n in shots)]
        return table(title, header, rows, markdown)
    shifted = any(r.get("shift_after") for r in records)
    for n in shots:
        some = [r for r in records if r["shots"] == n]
        rows = []
        for label, which in templates(some):
            rows.append([label, *(zero_shot(which, column, n) for column in columns)])
            if label == "zero-shot":
                rows += published_rows("zeroshot", which, rows[-1], theirs)
        for label, runs in methods.items():
            which = list(runs.get(n, {}).values())
            if which:
                gaps = [r["shift_after"]["gap"] for r in which if r.get("shift_after")]
                gap = [f"{fmean(gaps):.2f}"] if gaps else []
                rows.append([label, *([r[column] for r in which] for column in columns), *gap])
                rows += published_rows(which[0]["method"], which, rows[-1], theirs)
        header = ["accuracy", *columns, *["shift gap"] * shifted]
        table(f"{title}, {plural(n, 'shot')}", header, rows, markdown)


def templates(records):
    """[(label, records)]: a zero-shot classifier for each template that was asked for."""
    found = {}
    for r in records:
        template = r["changed"].get("template")
        label = f"zero-shot --template{results.typed(template)}" if template else "zero-shot"
        found.setdefault(label, []).append(r)
    return list(found.items())


def zero_shot(records, column, shots):
    """Zero-shot's number beside the `column` of runs, as a list of one value or none."""
    return [mode(values)] if (values := [r[MEASURED[r["protocol"]][column]]
                                         for r in records if r["shots"] == shots]) else []


def by_data_set(title, sets, protocol, markdown, deviations=False):
    """Prints methods by data sets, and the average over the data sets that all rows have."""
    averages, over, notes = average(sets)
    for n in shots_of(sets):
        there = [d for d, methods in sets.items() if any(n in runs for runs in methods.values())]
        columns = {**{dataset: sets[dataset] for dataset in there},
                   **({"average": averages} if n in over else {})}
        short = results.short_names(columns)
        for part in MEASURED[protocol] if deviations or len(there) > 1 else ():
            rows = [["zero-shot", *(zero_shot(every_record(methods), part, n)
                                    for methods in columns.values())]]
            for label in dict.fromkeys(label for methods in sets.values() for label in methods):
                runs = [methods.get(label, {}).get(n, {}) for methods in columns.values()]
                cells = [[r[part] for r in some.values()] for some in runs]
                if not deviations:  # but of the average; the tables that follow have the others
                    each = [[fmean(cell)] if cell else [] for cell in cells[:len(there)]]
                    cells[:len(there)] = each
                if any(cells):
                    rows.append([label, *cells])
            header = [part, *(short[column] for column in columns)]
            table(f"{title}, {plural(n, 'shot')}", header, rows, markdown)
    return notes


def transfer(title, source, methods, markdown):
    """Prints what the runs on one data set give on others, and on its shifted versions.

    These are those that bear its name, as imagenet_sketch and shapes_noise do."""
    for shifted, kind in ((False, "other data sets"), (True, "shifted versions")):
        sets = {}  # as if the methods had been learned there
        for label, runs in methods.items():
            for r in every_record({label: runs}):
                for target in sorted(r["transfer"]):
                    if target.startswith(source) == shifted:
                        there = sets.setdefault(target, {}).setdefault(label, {})
                        there.setdefault(r["shots"], {})[r["seed"]] = {
                            **r, **r["transfer"][target], "protocol": "few-shot"}
        if sets:
            title_of_kind = f"{title}, transfer to {kind}"
            for note in by_data_set(title_of_kind, sets, "few-shot", markdown, deviations=True):
                print(f"\n{note}")


def published(dataset):
    """What was published of a data set, or of "average over 11"."""
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return [row for row in rows if row["dataset"] == dataset]


def published_rows(method, records, row, theirs):
    """Published numbers of a row's method, and the difference to them, as rows of the table.

    They say what else differs: backbone, weights, seeds."""
    first, found = records[0], []
    for entry in theirs:
        columns = list(MEASURED[entry["protocol"]])
        name = re.sub("[^a-z0-9]", "", entry["method"].lower()).removesuffix("clip")
        if name != method.replace("_", "") or entry["protocol"] != first["protocol"]:
            continue
        differs = []
        if first["backbone"] != entry["backbone"]:
            differs.append(f"{first['backbone']}, not {entry['backbone']}")
        if first["pretrained"] != "openai":
            differs.append(f"weights {first['pretrained']}")
        if name != "zeroshot":
            if entry["shots"] != first["shots"] or not set(first["changed"]) <= SETTINGS:
                continue
            seeds = [",".join(map(str, some)) for some in (sorted(r["seed"] for r in records),
                                                            entry["seeds"])]
            differs += [f"seeds {seeds[0]}, not {seeds[1]}"] if seeds[0] != seeds[1] else []
        means = [fmean(cell) for cell in row[1:1 + len(columns)]]
        numbers = [entry[column] for column in columns]
        found += [[f"published: {entry['method']}, {entry['source']}",
                   *(f"{number:.2f}" for number in numbers)],
                  ["difference" + f" (here {'; '.join(differs)})" * bool(differs),
                   *(f"{mean - number:+.1f}" for mean, number in zip(means, numbers))]]
    return found


# ---------------------------------------------------------------- a row against the others

def against(groups, name, markdown):
    """Prints how far every row is above the row `name`, on average, and on how many data sets.

    Raises Problem if there is no such row."""
    names = dict.fromkeys(label for sets in groups.values() for methods in sets.values()
                          for label in methods)
    if name not in ("zero-shot", *names):
        raise Problem(f"--against {name}: no such row; there are zero-shot, {', '.join(names)}")
    for (suite, backbone, protocol), sets in groups.items():
        for n in shots_of(sets):
            rows = []
            for label in ["zero-shot", *names]:
                pairs = [(runs_of(methods, label, n, name), runs_of(methods, name, n, label))
                         for methods in sets.values()]
                pairs = [pair for pair in pairs if all(pair) and label != name]
                if pairs:
                    rows.append([label, *(difference(pairs, c) for c in MEASURED[protocol])])
            if rows:
                title = f"{results.SUITES[suite]}, {backbone}, {protocol}, {plural(n, 'shot')}"
                header = [f"above {name} by, on", *MEASURED[protocol]]
                table(title, header, rows, markdown)


def runs_of(methods, label, n, other):
    """{seed: record} of a row; zero-shot's are taken from the row it is compared with."""
    if label != "zero-shot":
        return methods.get(label, {}).get(n, {})
    return {seed: {**r, **{c: r[zero] for c, zero in MEASURED[r["protocol"]].items()}}
            for seed, r in methods.get(other, {}).get(n, {}).items()}


def difference(pairs, column):
    """"+5.2 ± 0.8, 9 of 11": mean and deviation over seeds, of the average over the data sets.

    pairs: for every data set the runs {seed: record} of one row and of the other."""
    def mean(runs):
        return fmean(r[column] for r in runs.values())

    above = sum(mean(mine) > mean(other) for mine, other in pairs)
    seeds = set.intersection(*(mine.keys() & other.keys() for mine, other in pairs))
    each = [mean_record([mine[seed] for mine, _ in pairs])[column]
            - mean_record([other[seed] for _, other in pairs])[column] for seed in sorted(seeds)]
    each = each or [fmean(mean(mine) - mean(other) for mine, other in pairs)]
    return f"{spread(each, '+')}, {above} of {len(pairs)}"


# ---------------------------------------------------------------- class by class

def classes(groups, markdown):
    """Prints for the newest run of every row each class's accuracy and what it is taken for.

    Raises Problem if no run has recorded it."""
    found = False
    for (_, backbone, protocol), sets in groups.items():
        for dataset, methods in sets.items():
            runs = {label: [r for r in every_record({label: some}) if r.get("per_class")]
                    for label, some in methods.items()}
            newest = {label: max(some, key=lambda r: r["line"])
                      for label, some in runs.items() if some}
            found = found or bool(newest)
            for part in dict.fromkeys(part for r in newest.values() for part in r["per_class"]):
                of_classes(f"{dataset}, {backbone}, {protocol}", part, newest, markdown)
    if not found:
        raise Problem("--classes: no run has recorded its classes here; run a method once more")


def of_classes(title, part, newest, markdown):
    """Prints the classes of one part ("base", "new" or all) by rows, the worst first."""
    cells = {}  # {class: {name: (percent, most often taken for)}}
    for label, r in newest.items():
        for classname, percent, confused in r["per_class"].get(part, []):
            if percent is not None:
                cells.setdefault(classname, {})[label] = percent, confused
    worst = sorted(cells, key=lambda name: fmean(percent for percent, _ in cells[name].values()))
    rows = []
    for classname in worst:
        found = [cells[classname].get(label) for label in newest]
        rows.append([classname, *("" if cell is None else f"{cell[0]:.1f}"
                                  + f" ({cell[1]})" * bool(cell[1]) for cell in found)])
    runs = [f"{plural(r['shots'], 'shot')}, seed {r['seed']}" for r in newest.values()]
    if len(set(runs)) > 1:
        runs = [f"{label}: {run}" for label, run in zip(newest, runs)]
    part = part.removesuffix(" classes")
    table(f"{title}, {part} classes (most often taken for), worst first; "
          f"{'; '.join(dict.fromkeys(runs))}", ["class", *newest], rows, markdown)


# ---------------------------------------------------------------- how a table is printed

def table(title, header, rows, markdown):
    """Prints rows of cells: a cell is a text, or a list of values, shown as mean ± deviation.

    The best mean of a column is bold, where the terminal can."""
    can = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
    bold = "**{}**" if markdown else "\033[1m{}\033[0m" if can else "{}"
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    means = [[fmean(cell) if cell and isinstance(cell, list) else None for cell in row]
             for row in rows]
    best = [max((mean for mean in column if mean is not None), default=None)
            for column in zip(*means)]
    texts = [[spread(cell) if isinstance(cell, list) else printable(cell, markdown) for cell in row]
             for row in [header, *rows]]
    widths = [max((len(text) for text in column if k or len(text) <= LONGEST), default=0)
              for k, column in enumerate(zip(*texts))]
    title = printable(title, markdown)
    print(f"\n**{title}**\n" if markdown else f"\n{title}")
    for row, values in zip(texts, [[None] * len(header), *means]):
        shown = [bold.format(text) if mean is not None and f"{mean:.1f}" == f"{top:.1f}" else text
                 for text, mean, top in zip(row, values, best)]
        if markdown:
            rule = f"\n|{' --- |' * len(header)}" if row is texts[0] else ""
            print(f"| {' | '.join(shown)} |{rule}")
            continue
        if len(row[0]) > LONGEST:
            print(f"  {row[0]}")
            row, shown = ["", *row[1:]], ["", *shown[1:]]
        spaces = [" " * (width - len(text)) for width, text in zip(widths, row)]
        numbers = (f"  {space}{text}" for space, text in zip(spaces[1:], shown[1:]))
        print(f"  {shown[0]}{spaces[0]}{''.join(numbers)}".rstrip())


def spread(values, sign=""):
    """Mean ± standard deviation as text; nothing of nothing."""
    if not values:
        return ""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")


def printable(text, markdown):
    """The text without what would break a line or a column."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text.replace("|", "\\|") if markdown else text
