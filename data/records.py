"""What a run leaves behind: a line of results, and a file of what was learned."""

import hashlib
import json
import os
import platform
import time
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError, safe_open

from data.errors import Problem, naming, regular_file
from data.images import write_whole

# a saved prompt's origin
LEARNED = {"dataset": str, "shots": int, "seed": int, "protocol": str, "classes": list}


def add_flags(p, here):
    """Adds the flags that say where things are kept, `here` the repository's folder."""
    add = p.add_argument
    add("--cache", default=str(here / "data" / "cache"), metavar="DIR",
        help="where image features are kept (data/cache)")
    add("--out", default="runs/results.jsonl", metavar="FILE",
        help="a line of results is added here for every run (runs/results.jsonl)")
    add("--again", action="store_true", help="repeat runs that --out has already")
    add("--save", metavar="FILE",
        help="keep what was learned; of several runs: 'ctx-{shots}-{seed}.safetensors'")
    add("--export", metavar="FILE",
        help="the run as safetensors, to repeat it in another framework (see data/export.py)")
    add("--load", metavar="FILE", help="do not train, test what this file holds")
    add("--predict", nargs="+", default=[], metavar="FILE", help="pictures to name the class of")


def fill(name, shots, seed):
    """The file of one run: {shots} and {seed} in the name become its numbers."""
    return name.replace("{shots}", str(shots)).replace("{seed}", str(seed))


def check_writable(out, save, shots, seeds):
    """Raises Problem if a run could not write its results: now rather than after the training."""
    saved = [fill(save, n, seed) for n in shots for seed in seeds] if save else []
    if any("{" in name or "}" in name for name in saved):
        raise Problem(f"--save {save}: only {{shots}} and {{seed}} are filled in")
    if len(set(saved)) < len(saved):
        raise Problem("--save: several runs would write one file; "
                      "put {shots} and {seed} into its name")
    for file in map(Path, saved):
        if file.resolve() == Path(out).resolve():
            raise Problem(f"--save {file}: is --out, whose results it would replace")
        if file.is_symlink():
            raise Problem(f"--save {file}: is a link; name a new or a plain file")
    for file in map(Path, (out, *saved)):
        if file.exists() and not file.is_file():
            raise Problem(f"cannot write {file}: neither new nor a plain file")
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise Problem(f"cannot write {file}")


# ---------------------------------------------------------------- lines of results

def append_line(file, line):
    """Adds a line in one write, so that lines of several processes do not mix.

    A line that was cut short is closed first."""
    with naming(file), open(file, "ab+") as out:
        cut = out.seek(0, os.SEEK_END) and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n"
        out.write(b"\n" * bool(cut) + line.encode() + b"\n")


def recorded(file):
    """The JSON values of a file of result lines; what is no JSON is passed over."""
    found = []
    for line in Path(file).read_bytes().splitlines() if Path(file).is_file() else []:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


def digest(*parts):
    """Eight hexadecimal digits that stand for bytes."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=4).hexdigest()


def per_class(classnames, labels, predicted):
    """[[class name, percent right, the class that most others were taken for or None], ...].

    labels, predicted (N,). The percentage of a class without pictures is None."""
    n, rows = len(classnames), []
    counts = torch.bincount(labels.cpu() * n + predicted.cpu(), minlength=n * n).view(n, n)
    for c, row in enumerate(counts):  # of class c's pictures, how many were taken for each class
        right, total = row[c].item(), row.sum().item()
        row[c] = 0
        other = classnames[row.argmax()] if row.any() else None
        rows.append([classnames[c], 100 * right / total if total else None, other])
    return rows


def measured(rows):
    """A record's part that says how good it is.

    rows  {part: {"zero_shot": percent, "accuracy": percent, "per_class": list}}"""
    classes = {part: row.pop("per_class") for part, row in rows.items()}
    transfer, record = dict(rows), {}
    if "base" in rows:
        base, new = transfer.pop("base"), transfer.pop("new")
        for key, prefix in (("zero_shot", "zero_shot_"), ("accuracy", "")):
            record[f"{prefix}base"], record[f"{prefix}new"] = base[key], new[key]
            inverse = 1 / max(base[key], 1e-9) + 1 / max(new[key], 1e-9)
            record[f"{prefix}harmonic"] = 2 / inverse
    else:
        record = transfer.pop("all classes")
    classes = {part: classes[part] for part in rows if part not in transfer}
    return {**record, "transfer": transfer, "per_class": classes}


def add(run, prompt, rows, trained, more):
    """Adds a run's record to --out, and returns it.

    rows     as in `measured`
    trained  when the training had ended
    more     what the method has to tell"""
    args, now = run.args, time.time()
    cpu = platform.processor() or platform.machine()
    record = {
        **run.about, "shots": run.shots, "seed": run.seed, **measured(rows),
        **run.history(), **more,
        **({"loaded": run.job.file} if args.load else {}),
        "parameters": sum(p.numel() for p in prompt.parameters()),
        "seconds": {"encoding": run.clip.seconds, "training": trained - run.started,
                    "all": now - run.started},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "open_clip": open_clip.__version__},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu}
    append_line(args.out, json.dumps(record))
    return record


# ---------------------------------------------------------------- what was learned

def meaning(run):
    """What a prompt's tensors depend on: of another method, say, or backbone, they say nothing."""
    keys = ["pretrained", "position", "prompts", "towers", "depth"]
    if run.method == "restore":  # it learns some of these words, and keeps the others
        keys.append("ctx_init")
    flags = {key: vars(run.args)[key] for key in keys if key in vars(run.args)}
    return {"method": run.method, "backbone": run.about["backbone"], **flags}


def save(run, prompt):
    """What a run has learned, as safetensors, with two dicts in its metadata.

    meaning  what `meaning` says, which `load` compares
    learned  where it comes from"""
    learned = {"dataset": run.data.name, "shots": run.shots, "seed": run.seed,
               "protocol": run.about["protocol"], "classes": run.classnames}
    metadata = {"meaning": json.dumps(meaning(run)), "learned": json.dumps(learned)}
    write_whole(fill(run.args.save, run.shots, run.seed), prompt.state_dict(), metadata)


def read(file):
    """The tensors {name: tensor} of a saved prompt, and its two dicts (`save`).

    Raises Problem if it is no such file."""
    try:
        regular_file(file)
    except Problem as problem:
        raise Problem(f"--load {problem}") from None
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
            metadata = content.metadata() or {}
        meaning, learned = (json.loads(metadata.get(key, "{}")) for key in ("meaning", "learned"))
        whole = ({key: type(value) for key, value in learned.items()} in (LEARNED, {})
                 and all(type(name) is str for name in learned.get("classes", [])))
        if not whole or type(meaning) is not dict or not 0 <= learned.get("seed", 0) < 2**31:
            raise ValueError
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError):
        raise Problem(f"--load {file}: not a safetensors file of ours") from None
    return tensors, meaning, learned


def load(run, prompt):
    """Puts the tensors of a run's --load into `prompt`.

    Raises Problem if they are of another meaning or shape."""
    file, ours = f"--load {run.job.file}", meaning(run)
    tensors, saved, learned = read(run.job.file)
    method = saved.get("method", "something else")
    if method != ours["method"]:
        raise Problem(f"{file}: was saved by {method}, not by {ours['method']}")
    for key, value in saved.items():
        if ours.get(key) != value:
            flag = f"--{key.replace('_', '-')}"
            raise Problem(f"{file}: was learned with {flag} {value}, not {ours.get(key)}")
    if getattr(run.args, "class_specific", False) and run.classnames != learned.get("classes"):
        raise Problem(f"{file}: holds contexts of other classes (--class-specific)")
    left_over = tensors.get("left_over")    # ProGrad's, of the training set: as many as there were
    ours = getattr(prompt, "left_over", left_over)
    if left_over is not None and left_over.shape[1:] == ours.shape[1:]:
        prompt.left_over = left_over.to(ours)
    wanted = {name: tuple(tensor.shape) for name, tensor in prompt.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise Problem(f"{file}: holds {found}, "
                      f"the flags given here (and the classes) ask for {wanted}")
    prompt.load_state_dict(tensors)
    if getattr(prompt, "learned", None):    # MVP-MI treats the classes that it has learned apart
        prompt.learned = set(learned.get("classes", prompt.learned))
