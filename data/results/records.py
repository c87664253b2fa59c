"""What a run leaves: a JSON line in --out, and a prompt file.

The identity of a run is everything that determines its numbers. It is made here, from three parts:

setting  the code that computes, the weights, the precision, the protocol, the flags, and the
         prompt of --load
data     contents of the test images, names of the training images, labels, class names,
         templates, and who split the images
run      setting and data, shots, seed, and contents of the few-shot sample

"Already recorded" compares `run`; a mean holds runs of one `setting`, and of one `data` each set.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data.errors import Problem

HERE = Path(__file__).resolve().parent.parent.parent
COMPUTING = [HERE / "common.py", HERE / "data" / "features.py", HERE / "data" / "weights.py"]
# Flags that change no number, or that the identity holds in another form.
ELSEWHERE = {"dataset", "data_root", "backbone", "pretrained", "shots", "seeds", "base_to_new",
             "transfer", "class_chunk", "device", "cache", "out", "save", "load", "predict",
             "export", "again"}
BESIDE = {"typed", "defaults", "origin"}        # what flags.parse puts beside the flags
# A test with --load may have others; they change zero-shot CLIP, too.
OF_A_TEST = ["template", "test_images", "validation", "precision"]
SCORES = {"few-shot": ["zero_shot", "accuracy"],
          "base-to-new": ["zero_shot_base", "zero_shot_new", "zero_shot_harmonic",
                          "base", "new", "harmonic"]}
FIELDS = {"method", "dataset", "backbone", "pretrained", "shots", "seed", "changed", "setting",
          "code", "weights", "data", "run", "protocol", "transfer", "per_class"}


# ---------------------------------------------------------------- identity

def digest(value):
    """Return 32 hexadecimal digits that stand for a value that repr shows whole."""
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


@functools.cache
def code_digest(*files):
    """Return 8 hexadecimal digits for the code in Python files, without comments and docstrings."""
    trees = []
    for file in files:
        tree = ast.parse(Path(file).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)         # a docstring
        trees.append(ast.unparse(tree))
    return digest((trees,))[:8]


def current_code(method):
    """Return the code digest of METHOD.py as it is now, "" if there is no such script."""
    script = HERE / f"{method}.py"
    return code_digest(script, *COMPUTING) if script.is_file() else ""


def flags_of(args, without=frozenset()):
    """Return the flags, {name: value}, but for some. Those of a setting are without ELSEWHERE."""
    return {name: value for name, value in vars(args).items() if name not in BESIDE | without}


def data_identity(data):
    """Return the digest of a data set as it is tested, with the contents of its test images."""
    train = [(os.path.basename(item.path), item.label) for item in data.train]
    test = [(item.content, item.label) for item in data.test]
    return digest((data.classnames, data.template, data.prograd_template, data.origin, data.own,
                   train, test))


def identify(run):
    """Return the digests `setting` and `run` of a run."""
    clip, origin = run.clip, run.args.origin or {}
    setting = digest((run.method, run.code, clip.weights, clip.dtype, clip.amp, run.protocol,
                      flags_of(run.args, ELSEWHERE),
                      [origin.get(name) for name in ("setting", "dataset", "data", "tensors")]))
    sample = [(item.content, item.label) for item in run.items]
    return setting, digest((setting, run.data.identity, run.shots, run.seed, sample))


# ---------------------------------------------------------------- what a run writes

def record_of(run, rows, more):
    """Return the record of a run, for JSON; data/README.md lists its fields.

    rows  {part: what Run.evaluate returns}
    more  histories over epochs, seconds, and what the method has to tell"""
    own = [part for part in run.parts if not part.transfer]
    if run.protocol == "base-to-new":
        scores = {}
        for name, prefix in (("zero_shot", "zero_shot_"), ("accuracy", "")):
            base, new = rows["base"][name], rows["new"][name]
            scores[f"{prefix}base"], scores[f"{prefix}new"] = base, new
            scores[f"{prefix}harmonic"] = 2 / (1 / max(base, 1e-9) + 1 / max(new, 1e-9))
    else:
        scores = {name: rows["all classes"][name] for name in ("zero_shot", "accuracy")}
    transfer = {}
    for part in run.parts:
        if part.transfer:
            row = rows[part.name]
            transfer[part.name] = {"zero_shot": row["zero_shot"], "accuracy": row["accuracy"],
                                   "data": part.data.identity}
    typed = {**run.args.typed, "template": run.args.template}       # it may come from --load
    changed = {name: value for name, value in typed.items()
               if value != run.args.defaults[name] and (name not in ELSEWHERE or name == "load")}
    return {
        "method": run.method, "dataset": run.data.name, "shots": run.shots, "seed": run.seed,
        "protocol": run.protocol, "changed": changed, **scores, "transfer": transfer,
        "kl": {part.name: rows[part.name]["kl"] for part in own},
        "per_class": {part.name: per_class(part.classnames, rows[part.name]["counts"])
                      for part in own},
        "confusion": {part.name: rows[part.name]["counts"] for part in own
                      if len(part.classes) <= 100},
        "backbone": run.clip.name, "pretrained": run.args.pretrained,
        "activation": run.clip.activation, "split": run.data.origin,
        "run": run.id, "setting": run.setting, "data": run.data.identity,
        "code": run.code, "weights": run.clip.weights, **more,
        "flags": flags_of(run.args),
        "versions": {name: metadata.version(name) for name in ("torch", "open_clip_torch")}}


def per_class(classnames, counts):
    """Return [[name, percent right, class most often taken for or None, images]] of each class."""
    rows = []
    for c, row in enumerate(counts):
        total, others = sum(row), [0 if k == c else count for k, count in enumerate(row)]
        other = classnames[others.index(max(others))] if any(others) else None
        rows.append([classnames[c], 100 * row[c] / total if total else None, other, total])
    return rows


def origin_of(run, tensors):
    """Return where a prompt comes from, for its file. tensors: their digest."""
    args = run.args
    return {"method": run.method, "dataset": args.dataset, "classes": run.classes,
            "template": run.data.template, "protocol": run.protocol, "shots": run.shots,
            "seed": run.seed, "backbone": args.backbone, "pretrained": args.pretrained,
            "weights": run.clip.weights, "precision": str(run.clip.dtype),
            "flags": flags_of(args, ELSEWHERE), "setting": run.setting,
            "data": run.data.identity, "tensors": tensors}


# ---------------------------------------------------------------- lines of results

def append(file, record):
    """Add a record to a file in one write, so that lines of several processes do not mix."""
    line = json.dumps(record).encode() + b"\n"
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as out:
        out.seek(max(0, out.seek(0, os.SEEK_END) - 1))
        cut = out.read(1) not in (b"", b"\n")           # a line that a full disk has cut short
        out.write(b"\n" + line if cut else line)


def read(file):
    """Return the records of a file, oldest first, and how many of its lines are no record."""
    records, odd = [], 0
    lines = Path(file).read_bytes().splitlines() if Path(file).is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if is_record(record):
            records.append(record)
        else:
            odd += bool(line.strip())
    return records, odd


def find(run):
    """Return the record of a run in --out, with all targets of --transfer on the same images.

    None if there is none, or if the run is made in any case: --again, --save, --export, --predict.
    """
    args = run.args
    if args.again or args.save or args.export or args.predict:
        return None
    wanted = {part.name: part.data.identity for part in run.parts if part.transfer}
    for record in reversed(read(args.out)[0]):
        found = {name: target["data"] for name, target in record["transfer"].items()}
        if record["run"] == run.id and wanted.items() <= found.items():
            return record
    return None


def is_record(record):
    """Whether a JSON value has the fields of a record."""
    return (isinstance(record, dict) and record.get("protocol") in SCORES
            and {*FIELDS, *SCORES[record["protocol"]]} <= record.keys())


def check_output(file, kind):
    """Raise Problem where a file cannot be written, or would replace one of another kind.

    kind  "results", "prompt" or "export"; --out, --save and --export write these"""
    flag = {"results": "--out", "prompt": "--save", "export": "--export"}[kind]
    path = Path(file)
    if str(file)[-1] == "/" or path.is_symlink() or path.exists() and not path.is_file():
        raise Problem(f"{flag} {file}: neither new nor a plain file")
    if path.exists() and path.stat().st_size:
        found = "results" if read(path)[0] else metadata_of(path).get("kind")
        if found != kind:
            raise Problem(f"{flag} {file}: exists and holds something else; name another file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise Problem(f"{flag} {file}: cannot write there")


# ---------------------------------------------------------------- prompt files

def metadata_of(file):
    """Return the metadata of a safetensors file, {name: text}; {} if it is no such file."""
    with contextlib.suppress(SafetensorError, OSError):
        with safe_open(file, "np") as content:
            return content.metadata() or {}
    return {}


def read_origin(file):
    """Return where a prompt file comes from, as `origin_of` writes it.

    Raises Problem if it is no prompt file."""
    if not os.path.isfile(file):
        raise Problem(f"--load {file}: there is no such file")
    told = metadata_of(file)
    if told.get("kind") != "prompt":
        raise Problem(f"--load {file}: is no prompt that --save has written")
    try:
        return json.loads(told["origin"])
    except (KeyError, ValueError):
        raise Problem(f"--load {file}: is damaged") from None
