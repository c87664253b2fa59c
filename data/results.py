"""The lines that runs leave behind, read again: named, grouped into rows, and averaged."""

import json
import re
import shlex
from itertools import count
from pathlib import Path, PurePath
from statistics import fmean, harmonic_mean, stdev

from data.errors import Problem

CATALOGUE = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
# What a run measures, and the name of zero-shot's number beside it.
MEASURED = {"few-shot": {"accuracy": "zero_shot"},
            "base-to-new": {part: f"zero_shot_{part}" for part in ("base", "new", "harmonic")}}
HISTORIES = re.compile("conflicts$|cosine$|bound")  # keys of the lists over epochs that are drawn
SUITES = {"embedded": "embedded data sets", "papers": "of the papers' data sets",
          "own": "folders of one's own"}
# Flags that tell where a run was, not what it was.
ELSEWHERE = {"dataset", "data_root", "backbone", "pretrained", "shots", "seeds", "base_to_new",
             "transfer", "class_chunk", "device", "cache", "out", "save", "load", "again", "export",
             "predict"}


# ---------------------------------------------------------------- lines to records

def read(file):
    """(records, odd): the runs of a file, oldest first, and how many of its lines hold none.

    Raises Problem if there is no such file or no such line."""
    try:
        lines = [line for line in Path(file).read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        raise Problem(f"{file}: no results yet; every run of a method adds a line there") from None
    records = []
    for line in lines:
        try:
            record = json.loads(line.decode("utf-8-sig"))
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate cannot be printed
        except (ValueError, RecursionError):
            continue
        if is_record(record):
            records.append(record)
    if not records:
        raise Problem(f"{file}: holds no line of results; every run of a method adds one")
    return records, len(lines) - len(records)


def is_record(r):
    """Whether a JSON value has what tables and pictures take from a run, and in the right form."""
    def number(value, low=-1e9, high=1e9):
        return type(value) in (int, float) and low <= value <= high

    try:
        texts = [r["method"], r["dataset"], r["backbone"]]
        texts += [r.get(key) or "" for key in ("pretrained", "code", "split", "loaded")]
        percents = [r[key] for pair in MEASURED[r["protocol"]].items() for key in pair]
        for row in r["transfer"].values():
            percents += [row["zero_shot"], row["accuracy"]]
        numbers = [r["seed"], r.get("log_C", 0), (r.get("shift_after") or {"gap": 0})["gap"]]
        for key in filter(HISTORIES.match, r):
            numbers += r[key] or [None]
        for rows in (r.get("per_class") or {}).values():
            for classname, percent, confused in rows:
                texts += [classname, confused or ""]
                percents += [percent or 0]
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    return (all(type(text) is str for text in texts) and all(map(number, numbers))
            and all(number(percent, 0, 100) for percent in percents)
            and type(r["shots"]) is int and number(r["shots"], 1) and type(r["changed"]) is dict)


# ---------------------------------------------------------------- records to rows

def group(records):
    """{(suite, backbone, protocol): {data set: {name: {shots: {seed: record}}}}}.

    Of equal runs the last one counts (and what it was not tested on, from the ones before). A run
    that was loaded adds what it was tested on to the run that saved it, if that one is there;
    otherwise it has a row of its own."""
    groups, datasets, labels = {}, dataset_names(records), code_names(records)
    learned_first = sorted(range(len(records)), key=lambda k: bool(records[k].get("loaded")))
    for line in learned_first:
        r = {**records[line], "line": line, "transfer": dict(records[line]["transfer"])}
        shots, seed, kind = r["shots"], r["seed"], CATALOGUE.get(r["dataset"], {}).get("kind")
        suite = "embedded" if kind == "world" else "papers" if kind else "own"
        backbone = f"{r['backbone']} {r.get('pretrained') or ''}".strip()
        sets = groups.setdefault((suite, backbone, r["protocol"]), {})
        methods = sets.setdefault(datasets[identity(r)], {})
        label = labels.get((name(r), r.get("code")), name(r))
        if r.get("loaded"):
            same = [some for some in every_record(methods) if is_saved_by(some, r)]
            if same:
                same[-1]["transfer"].update(r["transfer"])
                continue
            label += ", loaded"
        seeds = methods.setdefault(label, {}).setdefault(shots, {})
        before = seeds[seed]["transfer"] if seed in seeds else {}
        seeds[seed] = {**r, "transfer": {**before, **r["transfer"]}}
    order = {dataset: k for k, dataset in enumerate(CATALOGUE)}
    return {key: dict(sorted(sets.items(), key=lambda item: (order.get(item[0], 99), item[0])))
            for key, sets in sorted(groups.items())}


def is_saved_by(r, loaded):
    """Whether a run saved what another one loaded: the same name and, within 0.5, numbers."""
    alike = all(abs(r[key] - loaded[key]) < 0.5 for key in MEASURED[r["protocol"]])
    same = all(r[key] == loaded[key] for key in ("shots", "seed"))
    return alike and same and name(r) == name(loaded)


def identity(record):
    """What makes a data set: its name or folder, and its split into training and test pictures."""
    return record["dataset"], record.get("split") or ""


def dataset_names(records):
    """{identity: the name shown}, which tells the split where it is in doubt."""
    every = dict.fromkeys(map(identity, records))
    short, names = short_names({dataset for dataset, _ in every}), {}
    for dataset, split in every:
        several = len({other for where, other in every if where == dataset}) > 1
        doubt = several or (dataset in CATALOGUE and "seeded" in split)
        names[dataset, split] = short[dataset] + f" ({split or 'split unknown'})" * doubt
    return names


def short_names(datasets):
    """{data set: name}: of a folder's path as many of its last parts as tell it from the others."""
    tail = lambda path, k: PurePath("/".join(PurePath(path).parts[-k:]))
    names = {}
    for dataset in datasets:
        others = [other for other in datasets if other != dataset and other not in CATALOGUE]
        lengths = range(1, len(PurePath(dataset).parts) + 1) if dataset not in CATALOGUE else ()
        tails = (str(tail(dataset, k)) for k in lengths
                 if all(tail(dataset, k) != tail(other, k) for other in others))
        names[dataset] = next(tails, dataset)
    return names


def code_names(records):
    """{(name, code): the name shown}, with a digest of the code where it was another for some."""
    versions, shown = {}, {}
    for r in records:
        if not r.get("loaded"):
            codes = versions.setdefault(name(r), {})
            codes[r.get("code")] = codes.pop(r.get("code"), None)  # the newest last
    for label, codes in versions.items():
        digests = [code or "older" for code in codes]
        length = next(k for k in count(4) if len({d[:k] for d in digests}) == len({*digests}))
        for code, digest in zip(codes, digests):
            digest = digest if code is None else digest[:length]
            newest = ", newest" if digest == digests[-1][:len(digest)] else ""
            shown[label, code] = f"{label} [{digest}{newest}]" if len(codes) > 1 else label
    return shown


def name(record):
    """"coop", or "restore --towers text": the method, and its flags where they are no defaults."""
    flags = [f"--{flag.replace('_', '-')}{typed(value)}"
             for flag, value in record["changed"].items() if flag not in ELSEWHERE]
    return " ".join([record["method"], *flags])


def typed(value):
    """A flag's value as one would type it."""
    if isinstance(value, list):
        return " " + ",".join(typed(part).strip() for part in value)
    if value is True:
        return ""
    return f" {value:g}" if isinstance(value, float) else f" {shlex.quote(str(value))}"


def every_record(methods):
    """All records of {name: {shots: {seed: record}}}."""
    return [r for runs in methods.values() for seeds in runs.values() for r in seeds.values()]


def shots_of(sets):
    """The numbers of shots of all records of {data set: methods}, sorted."""
    return sorted({r["shots"] for methods in sets.values() for r in every_record(methods)})


def plural(n, word):
    return f"{n} {word}{'s' * (n > 1)}"


# ---------------------------------------------------------------- averages

def mean_and_deviation(values):
    """Mean and standard deviation (over n - 1; 0 of one value) of a non-empty list."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def in_common(rows):
    """(columns that all rows have, rows left out) of {row: {column: ...}}.

    A row with fewer than half of the columns of the fullest is left out: it would cost them all."""
    most = max(map(len, rows.values()))
    out = [row for row, columns in rows.items() if 2 * len(columns) < most]
    kept = [columns for row, columns in rows.items() if row not in out]
    fullest = max(kept, key=len)
    return [column for column in fullest if all(column in columns for columns in kept)], out


def average(sets):
    """The average over data sets as if it were one more: (methods, over, notes).

    For every number of shots it is taken over the data sets that all rows have, seed by seed, so
    that its deviation over seeds is that of the average. over: {shots: the data sets}; notes: lines
    that say what is not in it."""
    methods, over, notes = {}, {}, []
    for shots in shots_of(sets):
        rows = {}  # {name: {data set: {seed: record}}}
        for dataset, some in sets.items():
            for label, runs in some.items():
                if shots in runs:
                    rows.setdefault(label, {})[dataset] = runs[shots]
        common, out = in_common(rows)
        missing = [d for d in sets if d not in common and any(d in row for row in rows.values())]
        start = f"{plural(shots, 'shot')}: "
        if len(common) < 2:
            if missing:
                notes.append(f"{start}no average, since no two data sets have all rows")
            continue
        over[shots] = common
        if missing:
            notes.append(f"{start}the average is over the {len(common)} data sets that all rows "
                         f"have, without {', '.join(missing)}")
        if out:
            notes.append(f"{start}no average of what has fewer than half of the data sets: "
                         f"{'; '.join(out)}")
        for label in (label for label in rows if label not in out):
            runs = [rows[label][dataset] for dataset in common]
            seeds = sorted(set.intersection(*map(set, runs)))
            if any(len(some) > len(seeds) for some in runs):
                notes.append(f"{start}the average of {label} is over the seeds that all its data "
                             f"sets have: {', '.join(map(str, seeds)) or 'none'}")
            for seed in seeds:
                record = mean_record([some[seed] for some in runs])
                methods.setdefault(label, {}).setdefault(shots, {})[seed] = record
    return methods, over, notes


def mean_record(records):
    """The mean of runs on several data sets, as a record; they are kept in it as "of".

    Its H is that of the mean base and the mean new accuracy, as in the papers' tables (CoOp's
    82.69 and 63.22 give 71.66 there), not the mean of the data sets' H."""
    first, gaps = records[0], [(r.get("shift_after") or {}).get("gap") for r in records]
    kept = ("method", "changed", "backbone", "pretrained", "protocol", "shots", "seed")
    measured = [key for pair in MEASURED[first["protocol"]].items() for key in pair]
    mean = {key: fmean(r[key] for r in records) for key in measured}
    if first["protocol"] == "base-to-new":
        for who in ("", "zero_shot_"):
            mean[f"{who}harmonic"] = harmonic_mean([mean[f"{who}base"], mean[f"{who}new"]])
    gap = None if None in gaps else {"gap": fmean(gaps)}
    return {**{key: first.get(key) for key in kept}, **mean, "transfer": {}, "shift_after": gap,
            "of": records}


def average_title(suite, over):
    """"average over 11 embedded data sets"; `over` as `average` gives it."""
    counts = sorted({len(datasets) for datasets in over.values()})
    return f"average over {' or '.join(map(str, counts))} {SUITES[suite]}"
