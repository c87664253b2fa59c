"""The runs of one command: which this process does, which are recorded, what is printed."""

import itertools
import json
import os
import statistics
from collections import Counter, namedtuple
from pathlib import Path

from data import records
from data.errors import Problem

HERE = Path(__file__).resolve().parent.parent
Job = namedtuple("Job", "shots seed file title")  # file: of --load, else ""
# Flags that do not tell one run from another: places, and what a record says in other words.
ELSEWHERE = {"data_root", "device", "class_chunk", "cache", "out", "save", "load", "export",
             "predict", "again", "dataset", "transfer", "backbone", "shots", "seeds"}


# ---------------------------------------------------------------- dealing out

def whole(name):
    """The whole number in an environment variable; raises Problem if it holds none."""
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Problem(f"the environment's {name} is {text!r}, not a whole number; "
                      f"unset {name} to run alone")
    return int(text)


def rank():
    """This process's number among those that share the runs, and how many they are.

    By torchrun's RANK and WORLD_SIZE, or a Slurm array's task, else (0, 1). Raises Problem where
    they make no sense."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        mine, processes = whole("RANK"), whole("WORLD_SIZE")
        if mine >= processes:
            raise Problem(f"the environment's RANK is {mine}, but WORLD_SIZE only {processes}: "
                          "ranks count from 0")
        return mine, processes
    if "SLURM_ARRAY_TASK_ID" in env and "SLURM_ARRAY_TASK_COUNT" in env:
        mine, processes = whole("SLURM_ARRAY_TASK_ID"), whole("SLURM_ARRAY_TASK_COUNT")
        if not processes:
            raise Problem("the environment's SLURM_ARRAY_TASK_COUNT is 0: an array of no tasks")
        if "SLURM_ARRAY_TASK_MIN" in env and "SLURM_ARRAY_TASK_MAX" in env:
            steps = whole("SLURM_ARRAY_TASK_MAX") - whole("SLURM_ARRAY_TASK_MIN")
            if steps not in (0, processes - 1):
                raise Problem("the Slurm array has gaps: use one without, such as --array=0-9")
        return mine % processes, processes
    return 0, 1


def local_rank():
    """Under torchrun this process's number on its machine, else 0."""
    return whole("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0


def share(jobs, mine, processes):
    """This process's share of the jobs; a single one is everyone's own. Says if there is none."""
    some = jobs[mine::processes] if len(jobs) > 1 else jobs
    if not some:
        print(f"nothing to do for process {mine} of {processes}: there are only {len(jobs)} runs")
    return some


# ---------------------------------------------------------------- what is asked for

def about(code, args, data, others):
    """What the records of all runs of a command say: {"method": ..., "dataset": ..., ...}.

    code  the files that they are made by, the method's first
    Raises Problem where `data` cannot serve the protocol."""
    half, labels = (len(data.classnames) + 1) // 2, {item.label for item in data.test}
    if args.base_to_new and (len(data.classnames) < 4 or min(labels) >= half or max(labels) < half):
        raise Problem(f"{args.dataset}: --base-to-new needs two classes or more in each half, "
                      "and test images of both")
    if not data.train and not args.load:
        raise Problem(f"{args.dataset} has no training images; it is for --transfer or --load")
    if args.base_to_new and not args.load and not any(item.label < half for item in data.train):
        raise Problem(f"{args.dataset} has no training images of the base classes")
    if data.note:
        print(f"{data.name}: {data.note}")
    lists = (f"{os.path.basename(item.path)} {item.label} {item.classname}"
             for some in (data, *others) for item in some.train + some.test)
    return {
        "method": code[0].stem, "dataset": data.name,
        "backbone": backbone(args), "pretrained": args.pretrained,
        "protocol": "base-to-new" if args.base_to_new else "few-shot",
        "split": getattr(data, "origin", ""),
        "data": records.digest(*(line.encode(errors="replace") for line in lists)),
        "code": records.digest(*(file.read_bytes() for file in code)),
        "changed": {name: value for name, value in args.changed.items() if name not in ELSEWHERE},
        "flags": {name: value for name, value in vars(args).items() if name != "changed"}}


def backbone(args):
    """--backbone for the record: "data/tiny_clip", from wherever it was called."""
    if not args.backbone.startswith("local-dir:"):
        return args.backbone
    folder = Path(args.backbone.removeprefix("local-dir:")).resolve()
    return str(folder.relative_to(HERE) if folder.is_relative_to(HERE) else folder)


def wanted(args, data):
    """The runs that the flags ask for, a list of Job. Raises Problem at a --load that cannot serve.

    Of a class with fewer pictures than shots all are used; no class has more than its largest."""
    largest, found = max(Counter(item.label for item in data.train).values(), default=0), {}
    for shots, seed in itertools.product(args.shots, args.seeds):
        title, file = data.name, records.fill(args.load or "", shots, seed)
        if file:  # what it says of itself counts more than a flag's default
            learned = records.read(file)[2]
            shots, seed = learned.get("shots", shots), learned.get("seed", seed)
            if "dataset" in learned:
                title += f" with what was learned on {learned['dataset']}"
                every = learned["protocol"] == "few-shot" and learned["dataset"] == data.name
                if args.base_to_new and every:
                    raise Problem(f"--load {file}: was learned on all classes, none is new to it")
        elif shots > largest:
            print(f"{data.name} has no class with {shots} training images: "
                  f"using the {largest} there are")
            shots = largest
        title = f"{title}, {plural(shots)}, seed {seed}"
        found[file or (shots, seed)] = Job(shots, seed, file, title)
    of = f" of {len(found)}"
    return [job._replace(title=f"{job.title}, run {k}{of}") if len(found) > 1 else job
            for k, job in enumerate(found.values(), 1)]


# ---------------------------------------------------------------- what is there

def finished(about):
    """{(shots, seed): its last record} of the runs in --out from the same code, data and flags."""
    def identity(record):
        flags = {name: value for name, value in record["flags"].items() if name not in ELSEWHERE}
        loaded = bool(record["flags"]["load"])
        return [loaded, flags, *(record[key] for key in about if key not in ("flags", "changed"))]

    ours, found = identity(json.loads(json.dumps(about))), {}
    for record in records.recorded(about["flags"]["out"]):
        try:
            if identity(record) == ours:
                found[record["shots"], record["seed"]] = record
        except (KeyError, TypeError, AttributeError):  # another version's, or no record at all
            continue
    return found


def left(jobs, about, args):
    """Those of the jobs that --out does not have yet; says in a line which it has."""
    if args.again or args.load or args.save or args.predict or getattr(args, "export", None):
        return jobs
    have, todo = finished(about), []
    for job in jobs:
        if record := have.get((job.shots, job.seed)):
            numbers = ", ".join(f"{name} {zero_shot:.1f} -> {accuracy:.1f}"
                                for name, (zero_shot, accuracy) in scores(record).items())
            print(f"{job.title}: already in {args.out} ({numbers}); --again repeats it")
        else:
            todo.append(job)
    return todo


# ---------------------------------------------------------------- what is printed

def plural(shots):
    return f"{shots} shot{'s' * (shots != 1)}"


def scores(record):
    """{what was tested: (zero-shot, accuracy)} of a record, in percent."""
    if record["protocol"] == "base-to-new":
        parts = ("base", "new", "harmonic")
        rows = {part: (record[f"zero_shot_{part}"], record[part]) for part in parts}
    else:
        rows = {"all classes": (record["zero_shot"], record["accuracy"])}
    for name, row in record["transfer"].items():
        rows[name] = row["zero_shot"], row["accuracy"]
    return rows


def show(title, record):
    """Prints what was measured; a word stands beside what went wrong in the training."""
    rows, loss = scores(record), record.get("loss")
    width = max(34, len(title), *(2 + len(name) for name in rows))
    print(f"{title:<{width}} zero-shot {record['method']:>9}")
    for k, (name, (zero_shot, accuracy)) in enumerate(rows.items()):
        below = k == 0 and accuracy < zero_shot  # the first row: the classes that it learned
        print(f"{'  ' + name:<{width}} {zero_shot:9.1f} {accuracy:9.1f}"
              + "  below zero-shot" * below)
    if loss and loss[-1] > loss[0]:
        name = "  loss, first epoch and last"
        print(f"{name:<{width}} {loss[0]:9.3f} {loss[-1]:9.3f}  above its start")


def summary(jobs, about):
    """Prints mean ± standard deviation over the seeds, for each number of shots, by --out."""
    found, groups = finished(about), {}
    for job in jobs:
        if (job.shots, job.seed) in found:
            groups.setdefault(job.shots, []).append(scores(found[job.shots, job.seed]))
    for shots, rows in groups.items():
        if len(rows) < 2:
            continue
        title = f"{about['dataset']}, {plural(shots)}, mean ± deviation over {len(rows)} seeds"
        width = max(len(title), *(2 + len(name) for name in rows[0]))
        print(f"{title:<{width}} {'zero-shot':>12} {about['method']:>12}")
        for name in rows[0]:
            zero_shot, accuracy = zip(*(row[name] for row in rows))
            spread = f"{statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f}"
            print(f"{'  ' + name:<{width}} {statistics.mean(zero_shot):12.1f} {spread:>12}")
