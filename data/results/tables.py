"""Tables of recorded runs:  python common.py [FILE] [--all] [--against ROW] [--classes] [--plot]

A record becomes cells, one for each number: table, row, column, data set, shots, seed, value. A
printed table is a pivot of cells, with mean ± std over those in one place. Needs no torch."""

import json
import shlex
import sys
from collections import Counter, namedtuple
from itertools import product
from pathlib import Path
from statistics import fmean, harmonic_mean, mode, stdev

from data.errors import Parser, Problem
from data.load import NAMES, PUBLISHED, SUITES, is_embedded, list_data, listed
from data.results import records

HERE = Path(__file__).resolve().parent
SETS = HERE.parent / "sets"
COLUMNS = ["base", "new", "H", "KL base", "KL new", "shift gap"]    # few-shot: "4 shots", ...
OTHER_UNITS = COLUMNS[3:]                                           # the others are percentages
# suite "embedded data sets", about "tiny_clip, base-to-new", shots "4 shots" ("" for few-shot)
Table = namedtuple("Table", "suite about shots transfer", defaults=[False])
# seed None: zero-shot CLIP; data: zero-shot CLIP's row here and at the source, digest of the data
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
    add("--data-root", default=str(SETS), metavar="DIR", help="where they are (data/sets)")
    args = p.parse_args(argv)
    if args.data:
        return list_data(args.data_root)

    found = read(args.file)
    cells, notes = keep_one_version(flatten(found))
    cells = arrange(name_rows(cells))
    newest = {c.table[:2] for c in cells if c.record is found[-1]}
    shown = [c for c in cells if args.all or c.table[:2] in newest]
    if args.classes and not args.all:
        shown = [c for c in shown if c.record["dataset"] == found[-1]["dataset"]]
    rows = dict.fromkeys(c.row for c in shown)
    if args.against and args.against not in rows:
        raise Problem(f"--against {args.against}: no such row here; there are {', '.join(rows)}")
    make = list_classes if args.classes else list_tables
    for table, title, grid in make(shown, notes, args):
        show(title, grid, notes.pop(table, []), args.markdown)
    if args.plot:
        from data.results import pictures
        for file, title in pictures.draw(shown, Path(args.file).parent):
            print(f"{file}: {title}")
    if not args.all:
        others = len({c.table[:2] for c in cells} - newest)
        print(f"\n--all shows each data set and {plural(others, 'other comparison')}")


def plural(n, word):
    return f"{n} {word}{'s' * (n != 1)}"


def group(cells, *names):
    """Return {values of these attributes: cells}, in the order of the cells."""
    groups = {}
    for c in cells:
        groups.setdefault(tuple(getattr(c, name) for name in names), []).append(c)
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
    for line, r in enumerate(found):
        end = Path(r["dataset"]).name
        r.update(line=line, dataset=end if ends[end] == 1 else r["dataset"])
    return found


def flatten(found):
    """Return the cells of records, oldest first: of the method and of zero-shot CLIP."""
    weights = {(r["backbone"], r["pretrained"]): r["weights"] for r in found}       # the newest
    cells = []
    for r in found:
        about = f"{r['backbone']} {r['pretrained']}".strip()
        if r["weights"] != weights[r["backbone"], r["pretrained"]]:
            about += f" [{r['weights'][:6]}]"
        row = name_row(r["method"], r["changed"])
        for table, dataset, data, scores in measure(r, f"{about}, {r['protocol']}"):
            for column, (value, zero_shot) in scores.items():
                c = Cell(table, row, column, dataset, r["shots"], r["seed"], value, data, r, "")
                cells += [c, c._replace(row=data[0], seed=None, value=zero_shot)]
    return [c for c in cells if c.value is not None]


def measure(r, about):
    """Yield a record's table, data set, its data and {column: (value, zero-shot CLIP's)}."""
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
    flags = {name: r["changed"][name] for name in records.OF_A_TEST if name in r["changed"]}
    own = name_row("zero-shot", flags)
    yield table, r["dataset"], (own, own, r["data"]), scores
    flags.pop("template", None)                     # a target has its own template
    for target, row in r["transfer"].items():
        shifted = {target, r["dataset"]} <= {*NAMES} and target.startswith(r["dataset"])
        kind = "shifted versions" if shifted else "other data sets"
        data = name_row("zero-shot", flags), own, row["data"] + r["data"]
        yield (Table(f"{r['dataset']} to {kind}", about, shots, True), target, data,
               {"accuracy": (row["accuracy"], row["zero_shot"])})


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
    """Return the cells on the newest version of each data set, and notes {table: [text]}.

    The rows of a table are of the same images and classes; otherwise they could not be compared."""
    newest = {(c.table, c.dataset, c.data[:2]): c.data for c in cells}
    kept = [c for c in cells if c.data == newest[c.table, c.dataset, c.data[:2]]]
    old = {(c.table, c.record["run"]) for c in cells} - {(c.table, c.record["run"]) for c in kept}
    counts = Counter(table for table, _ in old)
    return kept, {table: [f"left out: {plural(count, 'older run')} on other images or classes"]
                  for table, count in counts.items()}


def name_rows(cells):
    """Return the newest cell of each run, in rows of one setting each.

    Where a table has several settings under one name, that of the scripts as they are keeps it, or
    the newest; the others get a tag, as in "coop [773a21]"."""
    tags, newest = {}, {}
    for (table, row), some in group(cells, "table", "row").items():
        codes = {c.record["setting"]: c.record["code"] for c in reversed(some)}     # newest first
        current = records.current_code(some[0].record["method"]) if len(codes) > 1 else ""
        plain = next((key for key in codes if codes[key] == current), next(iter(codes)))
        for key in codes:
            tag = key != plain and some[0].seed is not None
            tags[table, row, key] = f" [{key[:6]}]" if tag else ""
    for c in cells:
        c = c._replace(row=c.row + tags[c.table, c.row, c.record["setting"]])
        newest[c.table, c.row, c.column, c.dataset, c.seed] = c
    return list(newest.values())


def arrange(cells):
    """Return the cells sorted: the newest comparison first, zero-shot CLIP before the methods."""
    newest = {}
    for c in cells:
        newest[c.table[:2]] = max(c.record["line"], newest.get(c.table[:2], 0))
    order = {name: k for k, name in enumerate([*COLUMNS, *NAMES])}

    def place(c):
        return (-newest[c.table[:2]], c.table.transfer, c.table[:2],
                c.shots if c.table.shots else 0, c.seed is not None, c.row, c.shots,
                order.get(c.column, 0), order.get(c.dataset, 99), c.dataset)
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
    for (shots,), some in group(cells, "shots").items():
        learned = group([c for c in some if c.seed is not None], "row")
        rows = {row: {c.dataset for c in part} for (row,), part in learned.items()}
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
    """Return how far rows are above `other`, as cells, with the remark on how many data sets.

    The difference is of the averages over the data sets that both rows have, seed by seed."""
    found, rows = [], group(cells, "table", "row", "shots")
    for (table, row, shots), mine in rows.items():
        theirs = rows.get((table, other, shots), []) if row != other else []
        both = {c.dataset for c in mine} & {c.dataset for c in theirs}
        sets = group(mine + theirs, "row", "column", "dataset")
        for a, b in product(average(mine, both), average(theirs, both)):
            if a.column == b.column and (a.seed == b.seed or None in (a.seed, b.seed)):
                higher = [mean(sets[row, a.column, name]) > mean(sets[other, a.column, name])
                          for name in both]
                remark = f"{sum(higher)} of {len(higher)}" if len(higher) > 1 else ""
                found.append(a._replace(value=a.value - b.value, remark=remark))
    return found


# ---------------------------------------------------------------- tables
# list_... yield (table, title, grid of texts) and may add to notes {table: [text]}.

def list_tables(cells, notes, args):
    """Yield averages, transfer, single data sets (with --all all), or differences to --against."""
    for (table,), some in group(cells, "table").items():
        one = len({c.dataset for c in some}) == 1 and not table.transfer
        title = name_table(table._replace(suite=some[0].dataset) if one else table)
        if args.against:
            above = compare(some, args.against)
            alone = {c.row for c in some} - {c.row for c in above} - {args.against}
            if alone:
                notes.setdefault(table, []).append(f"no run in common with {listed(sorted(alone))}")
            if above:
                yield table, f"{title}, above {args.against}", pivot(above, sign="+")
            continue
        means, over, reasons = average_rows(some)
        notes[table] = reasons + notes.get(table, [])
        if one:
            yield table, title, pivot(some)
        elif means and not table.transfer:
            counts = " or ".join(map(str, sorted({len(sets) for sets in over.values()})))
            yield table, f"average over {counts} {title}", pivot(means + published(some, over))
        for (column,), part in group(some + means, "column").items():
            if table.transfer or not one and (args.all or not means):
                yield table, f"{title}, {column}", pivot(part, across="dataset")


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


def list_classes(cells, notes, args):
    """Yield the accuracy of each class, the worst first."""
    classes = class_cells(cells)
    if not classes:
        raise Problem("--classes: no run has recorded its classes here; run a method once more")
    for (table,), some in group(classes, "table").items():
        some = [c for row in sorted(group(some, "dataset").values(), key=mean) for c in row]
        yield table, name_table(table), pivot(some, "dataset", "row")


def class_cells(cells):
    """Return a cell for each class of each run, with what it is most often taken for."""
    found = []
    for c in filter(is_run, cells):
        for part, rows in c.record["per_class"].items():
            table = Table(f"{c.dataset}, {part}", c.table.about, plural(c.shots, "shot"))
            names = Counter(row[0] for row in rows)
            for k, (name, percent, taken, *_) in enumerate(rows):
                name += f" ({k})" * (names[name] > 1)           # two classes of one name stay two
                found.append(c._replace(table=table, dataset=name, value=percent, remark=taken))
    return [c for c in found if c.value is not None]


def name_table(table):
    return ", ".join(part for part in table[:3] if part)


def pivot(cells, down="row", across="column", sign=""):
    """Return rows of texts, the header first; the best of a column of percentages in **bold**."""
    places, best = group(cells, down, across), {}
    for (row, column), some in places.items():
        if down == "row" and not sign and some[0].column not in OTHER_UNITS:
            best[column] = max(best.get(column, 0), round(mean(some), 1))
    columns = dict.fromkeys(getattr(c, across) for c in sorted(cells, key=lambda c: c.shots))
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


def show(title, grid, notes, markdown):
    """Print a table and its notes."""
    grid = [["".join(c if c.isprintable() else "?" for c in text) for text in row] for row in grid]
    start, end = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    widths = [max(len(text.strip("*")) for text in column) for column in zip(*grid)]
    print(f"\n**{title}**\n" if markdown else f"\n{title}")
    for k, row in enumerate(grid):
        if markdown:
            print("|", " | ".join(text.replace("|", "\\|") for text in row), "|")
            print(f"|{' --- |' * len(row)}\n" * (k == 0), end="")
        else:
            line = f"  {row[0]:<{widths[0]}}"
            for text, width in zip(row[1:], widths[1:]):
                plain = text.strip("*")
                line += " " * (2 + width - len(plain))
                line += plain if plain == text else f"{start}{plain}{end}"
            print(line.rstrip())
    for note in notes:
        print(f"{'' if markdown else '  '}({note})")
