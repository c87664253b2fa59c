"""Tables of recorded runs:  python common.py [FILE] [--all] [--against ROW] [--classes] [--plot]

A record becomes cells, one for each number: table, row, column, data set, shots, seed, value. A
printed table is a pivot of cells, with mean ± std over those in one place. Needs no torch."""

import json
import shlex
import sys
from collections import Counter, namedtuple
from itertools import product
from operator import attrgetter
from pathlib import Path
from statistics import fmean, harmonic_mean, mode, stdev

from data.errors import Parser, Problem
from data.load import FOLDER, NAMES, PUBLISHED, SUITES, is_embedded, list_data, listed
from data.results import records

HERE = Path(__file__).resolve().parent
OTHER_UNITS = ["KL base", "KL new", "shift gap"]        # the other columns are percentages
# suite "embedded data sets", about "tiny_clip, base-to-new", shots "4 shots" ("" for few-shot)
Table = namedtuple("Table", "suite about shots transfer", defaults=[False])
# seed None: zero-shot CLIP; data: digests of the weights and of the data
Cell = namedtuple("Cell", "table row column dataset shots seed value data record remark")


def main(argv=None):
    """Print tables of the recorded runs, or list the data sets."""
    p = Parser(prog="common.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("file", nargs="?", default="runs/results.jsonl", help="result lines (runs/results.jsonl)")
    add("--all", action="store_true", help="every comparison and data set (the newest, averages)")
    add("--against", metavar="ROW", help="differences to a row, such as coop or zero-shot")
    add("--classes", action="store_true", help="class by class, on the data set of the newest run")
    add("--markdown", action="store_true", help="tables in Markdown")
    add("--plot", action="store_true", help="draw pictures into the folder of the result lines")
    add("--data", action="store_true", help="list the data sets: images, template, folder")
    add("--data-root", default=str(FOLDER), metavar="DIR", help="where they are (data/sets)")
    args = p.parse_args(argv)
    if args.data:
        return list_data(args.data_root)

    found = read(args.file)
    cells, old = keep_one_version(flatten(found))
    cells = arrange(name_rows(cells))
    newest = {c.table[:2] for c in cells if c.record is found[-1]}
    shown = [c for c in cells if args.all or c.table[:2] in newest]
    if args.classes and not args.all:
        shown = [c for c in shown if c.record["dataset"] == found[-1]["dataset"]]
    rows = dict.fromkeys(c.row for c in shown)
    if args.against and args.against not in rows:
        raise Problem(f"--against {args.against}: no such row here; there are {', '.join(rows)}")
    make = list_classes(shown) if args.classes else list_tables(shown, args)
    for title, grid, notes in make:
        show(title, grid, notes, args.markdown)
    if old := sum(old[c] for c in old if args.all or c in newest):
        print(f"\nleft out: {plural(old, 'older run')} on other images, classes or weights")
    if args.plot:
        from data.results import pictures
        for file, title in pictures.draw(shown, Path(args.file).parent):
            print(f"{file}: {title}")
    if not (args.all or args.markdown):
        print("\n--all shows each data set, and all comparisons")


def plural(n, word):
    return f"{n} {word}{'s' * (n != 1)}"


def group(cells, *names):
    """Return {value of an attribute, or tuple of several: cells}, in the order of the cells."""
    groups = {}
    key = attrgetter(*names)
    for c in cells:
        groups.setdefault(key(c), []).append(c)
    return groups


def is_run(c):
    """Whether a cell is the one cell that each run has: accuracy on base, or on all classes."""
    return c.seed is not None and c.column in ("base", plural(c.shots, "shot"))


# ---------------------------------------------------------------- records to cells

def read(file):
    """Return the records of a file, oldest first. Raises Problem if there are none.

    A folder is called by the last part of its path, if no other data set has that name."""
    found, odd = records.read(file)
    if odd:
        print(f"{file}: passed over {plural(odd, 'line')} without a record", file=sys.stderr)
    if not found:
        raise Problem(f"{file}: no results yet; every run of a method adds a line there")
    ends = Counter(Path(name).name for name in {*NAMES, *(r["dataset"] for r in found)})
    for r in found:
        end = Path(r["dataset"]).name
        r["dataset"] = end if ends[end] == 1 else r["dataset"]
    return found


def flatten(found):
    """Return the cells of records, oldest first: of the method and of zero-shot CLIP.

    Flags of the test, such as --template, change zero-shot CLIP too: another comparison."""
    cells = []
    for r in found:
        flags = dict(r["changed"])
        of_test = {name: flags.pop(name) for name in records.OF_A_TEST if name in flags}
        clip = name_row(f"{r['backbone']} {r['pretrained']}".strip(), of_test)
        row = name_row(r["method"], flags)
        for table, dataset, data, scores in measure(r, f"{clip}, {r['protocol']}"):
            for column, (value, zero_shot) in scores.items():
                c = Cell(table, row, column, dataset, r["shots"], r["seed"], value,
                         r["weights"] + data, r, "")
                cells += [c, c._replace(row="zero-shot", seed=None, value=zero_shot)]
    return [c for c in cells if c.value is not None]


def measure(r, about):
    """Yield a record's table, data set, digest of it and {column: (value, zero-shot CLIP's)}."""
    shots, suite = plural(r["shots"], "shot"), r["dataset"]         # a data set of one's own
    if r["dataset"] in NAMES:
        suite = f"{'embedded' if is_embedded(r['dataset']) else 'papers'} data sets"
    table = Table(suite, about, shots)
    if r["protocol"] == "few-shot":
        table, scores = table._replace(shots=""), {shots: (r["accuracy"], r["zero_shot"])}
    else:
        kl, shift = r.get("kl") or {}, r.get("shift_after") or {}
        scores = {"base": (r["base"], r["zero_shot_base"]), "new": (r["new"], r["zero_shot_new"]),
                  "H": (r["harmonic"], r["zero_shot_harmonic"]), "KL base": (kl.get("base"), None),
                  "KL new": (kl.get("new"), None), "shift gap": (shift.get("gap"), None)}
    yield table, r["dataset"], r["data"], scores
    for target, row in r["transfer"].items():
        shifted = {target, r["dataset"]} <= {*NAMES} and target.startswith(r["dataset"])
        kind = "shifted versions" if shifted else "other data sets"
        yield (Table(f"{r['dataset']} to {kind}", about, shots, True), target,
               row["data"] + r["data"], {"accuracy": (row["accuracy"], row["zero_shot"])})


def name_row(first, flags):
    """Return a row's name, with the flags that are not at their defaults: "coop --n-ctx 4"."""
    words = [first]
    for name, value in sorted(flags.items()):
        parts = value if isinstance(value, list) else [value]
        text = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [shlex.quote(text)])]
    return " ".join(words)


# ---------------------------------------------------------------- which cells share a row

def keep_one_version(cells):
    """Return the cells on the newest version of each data set and its CLIP; count other runs.

    The rows of a table are of the same images and classes; otherwise they could not be compared."""
    newest = {(c.table, c.dataset): c.data for c in cells}
    kept = [c for c in cells if c.data == newest[c.table, c.dataset]]
    old = {(c.table, c.record["run"]) for c in cells} - {(c.table, c.record["run"]) for c in kept}
    return kept, Counter(table[:2] for table, _ in old)


def name_rows(cells):
    """Return the newest cell of each run, in rows of one setting each.

    Where a table has several settings under one name, that of the scripts as they are keeps it, or
    the newest; the others get a tag, as in "coop [773a21]"."""
    newest = {}
    for (table, row), some in group(cells, "table", "row").items():
        codes = {c.record["setting"]: c.record["code"] for c in reversed(some)}     # newest first
        current = records.current_code(some[0].record["method"]) if len(codes) > 1 else ""
        plain = next((key for key in codes if codes[key] == current), next(iter(codes)))
        for c in some:
            if c.seed is not None and c.record["setting"] != plain:
                c = c._replace(row=f"{row} [{c.record['setting'][:6]}]")
            newest[table, c.row, c.column, c.dataset, c.seed] = c
    return list(newest.values())


def arrange(cells):
    """Return the cells sorted: comparisons as first run, zero-shot CLIP before the methods."""
    comparisons = list(dict.fromkeys(c.table[:2] for c in cells))

    def place(c):
        dataset = NAMES.index(c.dataset) if c.dataset in NAMES else len(NAMES)
        return comparisons.index(c.table[:2]), c.shots, c.seed is not None, c.row, dataset
    return sorted(cells, key=place)


# ---------------------------------------------------------------- averages and differences

def mean(cells):
    return fmean(c.value for c in cells)


def average(cells, datasets):
    """Return means over data sets: a cell for each row, column and seed that has all of them.

    H is that of the mean base and the mean new accuracy, seed by seed, as in the papers' tables."""
    means, wanted = {}, [c for c in cells if c.dataset in datasets]
    for key, some in group(wanted, "row", "column", "seed").items():
        if len(some) == len(datasets):
            means[key] = some[0]._replace(dataset="average", value=mean(some))
    for (row, column, seed), c in means.items():
        if column == "H":
            pair = [means[row, part, seed].value for part in ("base", "new")]
            means[row, column, seed] = c._replace(value=harmonic_mean(pair))
    return list(means.values())


def average_rows(cells):
    """Return a table's averages, {shots: the data sets that they are over}, and notes.

    These are the data sets that all rows have, at least two. A row with fewer than half of the data
    sets of the fullest would cost the others too many, and is left out, as is a seed that not all
    of the data sets have."""
    means, over, notes = [], {}, []
    for shots, some in group(cells, "shots").items():
        learned = group([c for c in some if c.seed is not None], "row")
        rows = {row: {c.dataset for c in part} for row, part in learned.items()}
        most = max(map(len, rows.values()))
        full = [row for row in rows if 2 * len(rows[row]) >= most]
        common = set.intersection(*(rows[row] for row in full))
        used = [c for c in some if c.dataset in common and (c.seed is None or c.row in full)]
        found = average(used, common) if len(common) > 1 else []
        means += found
        over |= {shots: common} if found else {}
        seeds = {f"{c.row} seed {c.seed}" for c in used if found and c.seed is not None}
        seeds -= {f"{c.row} seed {c.seed}" for c in found}
        left_out = sorted({c.dataset for c in some} - common | set(rows) - set(full) | seeds)
        if left_out and found:
            notes.append(f"average, {plural(shots, 'shot')}, without {listed(left_out)}")
    return means, over, notes


def compare(cells, other):
    """Return how far a table's rows are above `other`, with the remark on how many data sets.

    The difference is of the averages over the data sets that both rows have, seed by seed."""
    found, rows = [], group(cells, "row", "shots")
    for (row, shots), mine in rows.items():
        theirs = rows.get((other, shots), []) if row != other else []
        both = {c.dataset for c in mine} & {c.dataset for c in theirs}
        sets = group(mine + theirs, "row", "column", "dataset")
        for a, b in product(average(mine, both), average(theirs, both)):
            if a.column == b.column and (a.seed == b.seed or None in (a.seed, b.seed)):
                higher = [mean(sets[row, a.column, name]) > mean(sets[other, a.column, name])
                          for name in both]
                remark = f"{sum(higher)} of {len(higher)}" if len(higher) > 1 else ""
                found.append(a._replace(value=a.value - b.value, remark=remark))
    return found


# ---------------------------------------------------------------- tables: title, texts, notes

def list_tables(cells, args):
    """Yield averages, transfer, single data sets, or differences to --against.

    Where averages are over all runs, single data sets only with --all."""
    for table, some in group(cells, "table").items():
        one = len({c.dataset for c in some}) == 1 and not table.transfer
        title = name_table(table._replace(suite=some[0].dataset) if one else table)
        if args.against:
            above = compare(some, args.against)
            alone = sorted({c.row for c in some} - {c.row for c in above} - {args.against})
            if above:
                yield (f"{title}, above {args.against}", pivot(above, sign="+"),
                       [f"no run in common with {listed(alone)}"] if alone else [])
            continue
        means, over, notes = average_rows(some)
        if one:
            yield title, pivot(some), []
        elif means and not table.transfer:
            counts = " or ".join(map(str, sorted({len(sets) for sets in over.values()})))
            yield f"average over {counts} {title}", pivot(means + published(some, over)), notes
        whole = means and not notes and over.keys() == {c.shots for c in some}
        for column, part in group(some + means, "column").items():
            if table.transfer or not one and (args.all or not whole):
                yield (f"{title}, {column}", pivot(part, across="dataset"),
                       notes if table.transfer else [])


def published(cells, over):
    """Return what the papers report, as cells, beside averages over their splits of their sets."""
    found, theirs = [], all(c.record.get("split") == PUBLISHED for c in cells)
    for entry in json.loads((HERE / "published.json").read_text(encoding="utf-8")):
        about = f"{entry['backbone']} openai, {entry['protocol']}"
        complete = over.get(entry["shots"]) == set(SUITES["papers"])
        if theirs and complete and cells[0].table.about == about:
            row = f"published: {entry['method']} ({entry['source']})"
            found += [cells[0]._replace(row=row, column=column, value=entry[column])
                      for column in ("base", "new", "H")]
    return found


def list_classes(cells):
    """Yield the accuracy of each class, the worst first, with what it is most often taken for."""
    classes = []
    for c in filter(is_run, cells):
        for part, rows in c.record["per_class"].items():
            table = Table(f"{c.dataset}, {part}", c.table.about, plural(c.shots, "shot"))
            names = Counter(row[0] for row in rows)
            for k, (name, percent, taken, *_) in enumerate(rows):
                name += f" ({k})" * (names[name] > 1)           # two classes of one name stay two
                classes.append(c._replace(table=table, dataset=name, value=percent, remark=taken))
    for table, some in group(classes, "table").items():
        some = [c for row in sorted(group(some, "dataset").values(), key=mean) for c in row]
        yield name_table(table), pivot(some, "dataset", "row"), []


def name_table(table):
    return ", ".join(part for part in table[:3] if part)


def pivot(cells, down="row", across="column", sign=""):
    """Return rows of texts, the header first; the best of a column of percentages in **bold**."""
    places, best = group(cells, down, across), {}
    for (row, column), some in places.items():
        if down == "row" and not sign and some[0].column not in OTHER_UNITS:
            best[column] = max(best.get(column, 0), round(mean(some), 1))
    columns = dict.fromkeys(column for _, column in places)
    grid = [["", *columns]]
    for row in dict.fromkeys(row for row, _ in places):
        grid.append([row])
        for column in columns:
            some = places.get((row, column), [])
            bold = "**" if some and round(mean(some), 1) == best.get(column) else ""
            grid[-1].append(f"{bold}{spread(some, sign)}{bold}")
    return grid


def spread(cells, sign=""):
    """Return "81.1 ± 0.5", mean and standard deviation over seeds, and the most common remark."""
    if not cells:
        return ""
    if cells[0].column in OTHER_UNITS:
        return f"{mean(cells):{sign}.2f}"
    deviation = f" ± {stdev(c.value for c in cells):.1f}" if len(cells) > 1 else ""
    remark = mode(c.remark for c in cells)
    return f"{mean(cells):{sign}.1f}{deviation}" + (f" ({remark})" if remark else "")


def show(title, grid, notes=(), markdown=False):
    """Print a table and its notes. The best of a column is bold in Markdown only."""
    if markdown:
        print(f"\n**{title}**\n")
        for row in grid[0], ["---"] * len(grid[0]), *grid[1:]:
            print("|", " | ".join(text.replace("|", "\\|") for text in row), "|")
    else:
        print(f"\n{title}")
        grid = [[text.strip("*") for text in row] for row in grid]
        widths = [max(map(len, column)) for column in zip(*grid)]
        for name, *texts in grid:
            columns = [f"{text:>{width}}" for text, width in zip(texts, widths[1:])]
            print("  ".join([f"  {name:<{widths[0]}}", *columns]).rstrip())
    for note in notes:
        print(f"{'' if markdown else '  '}({note})")


# ---------------------------------------------------------------- what a run prints

def show_run(title, record, note):
    """Print a record's accuracies, their KL divergence from zero-shot CLIP, and a note."""
    if record["protocol"] == "base-to-new":
        rows = [(name, record[f"zero_shot_{name}"], record[name], record["kl"].get(name))
                for name in ("base", "new", "harmonic")]
    else:
        rows = [("all classes", record["zero_shot"], record["accuracy"],
                 record["kl"]["all classes"])]
    rows += [(name, target["zero_shot"], target["accuracy"], None)
             for name, target in record["transfer"].items()]
    grid = [["", "zero-shot", record["method"], "KL to zero-shot"]]
    for name, zero_shot, accuracy, kl in rows:
        tail = "" if kl is None else f"{kl:.2f}"
        grid.append([name, f"{zero_shot:.1f}", f"{accuracy:.1f}", tail])
    show(title, grid, [note])


def show_predictions(method, files, classnames, zero_shot, ours):
    """Print the likeliest classes of images, with probabilities in percent.

    zero_shot, ours  (values, places) of the largest probabilities, (files, top) each"""
    names = [name.replace("_", " ").ljust(max(map(len, classnames))) for name in classnames]
    columns = [tensor.tolist() for pair in (ours, zero_shot) for tensor in pair]
    for file, *rows in zip(files, *columns):
        grid = [[method, "%", "zero-shot", "%"]]
        for p, k, q, j in zip(*rows):
            grid.append([names[k], f"{100 * p:.1f}", names[j], f"{100 * q:.1f}"])
        show(file, grid)
