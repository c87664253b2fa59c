"""Where the pictures of a data set lie and what they show: one reader per layout.

`catalogue.json` holds the facts (folders, templates, addresses)."""

import difflib
import json
import random
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data import world
from data.checks import unreadable
from data.download import DRIVE, fetch, provide, provide_images
from data.errors import Problem, regular_file

CATALOGUE = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
FOLDER_TEMPLATE = "a photo of a {}."
PUBLISHED, SEEDED = "published split", "seeded 50/20/30 split"
Item = namedtuple("Item", "path label classname")


@dataclass
class Data:
    """A data set: lists of Item, class names by label, and its templates ("a photo of a {}.").

    note    what a run prints about it
    origin  who divided it into train, val and test: another division gives other results"""
    name: str
    classnames: list
    template: str
    prograd_template: str
    train: list
    val: list
    test: list
    note: str = ""
    origin: str = ""
    crop: float = 0.08  # random crops keep this part of a picture's area, at least


def known(name):
    """A data set's name, or a folder's full path however it was written; else raises Problem."""
    if name in CATALOGUE:
        return name
    if name and Path(name).is_dir():
        return str(Path(name).resolve())
    near = difflib.get_close_matches(name, CATALOGUE, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "no such folder either;"
    raise Problem(f"unknown data set {name!r}: {hint} known are {', '.join(CATALOGUE)}, "
                  "or a folder with one sub-folder per class")


def load_data(name, root, template=None):
    """The data set `name` of the catalogue below folder `root`, or any folder of class folders.

    template  another written prompt than the data set's own

    Downloads what can be downloaded. Raises Problem: unknown name, missing files, split of the
    wrong form, no room or no permission."""
    name, root = known(name), Path(root).resolve()
    spec = CATALOGUE.get(name, {})
    try:
        parts, origin, note = READERS[spec.get("kind", "own")](name, spec, root)
    except OSError as error:
        cause = f"{name}: {error.filename or root}: {error.strerror or error}"
        raise Problem(cause + "; --data-root DIR takes another folder" * bool(spec)) from None
    names = {}
    for item in (item for part in parts.values() for item in part):
        first = names.setdefault(item.label, item.classname)
        if first != item.classname:
            raise Problem(f"{name}: label {item.label} stands for {first!r} and {item.classname!r}")
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise Problem(f"{name}: needs two classes or more, labelled 0, 1, 2, ...; "
                      f"found labels {sorted(names)[:5]}...")
    if not parts["test"]:
        raise Problem(f"{name}: no picture is left to test on")
    own = spec.get("template", FOLDER_TEMPLATE)
    crop = world.CROP if spec.get("kind") == "world" else Data.crop
    return Data(name, [names[label] for label in range(len(names))], template or own,
                template or spec.get("prograd_template", own), **parts, note=note, origin=origin,
                crop=crop)


def list_data(root):
    """Prints for every data set its images in train, val and test, its template and its folder.

    Looks only: nothing is downloaded or drawn."""
    print(f"{'data set':<16} {'train':>7} {'val':>7} {'test':>7}   {'template':<42} folder")
    for name, spec in CATALOGUE.items():
        folder, split = Path(root) / spec["images"], Path(root) / spec.get("split", "")
        if not folder.is_dir():
            how = "drawn" if spec["kind"] == "world" else "downloaded" if "archive" in spec else ""
            state = f"{how} on first use" if how else "not there"
        elif not split.exists():
            state = "pictures only, so far" if "drive" in spec else "no split file"
        else:
            try:
                data = load_data(name, root)
                state = " ".join(f"{len(part):7d}" for part in (data.train, data.val, data.test))
            except Problem as problem:
                state = str(problem)
        print(f"{name:<16} {state:<23}   {spec['template']:<42} {folder}")


# ----------------- one reader per layout: (name, spec, root) -> lists of Item, origin, note

def read_split(name, spec, root):
    """CoOp's split files: {"train": [[path, label, classname], ...], "val": ..., "test": ...}."""
    images, file = provide_images(name, spec, root), root / spec["split"]
    try:
        if "drive" in spec:
            provide(file, root / f".{name}.lock",
                    lambda: fetch(DRIVE + spec["drive"], file, check=parse_split))
        split = parse_split(file)
    except Problem as problem:
        if file.exists() or not spec.get("folders"):
            raise Problem(f"{name}: {problem}; the split file belongs at {file}") from None
        note = f"{SEEDED}, NOT the papers' split: {problem}; that belongs at {file}"
        return seeded_split(images, spec), SEEDED, note
    rename = spec.get("rename", {})
    return {part: [Item(images / path, label, rename.get(name, name)) for path, label, name in rows]
            for part, rows in split.items()}, PUBLISHED, ""


def read_aircraft(name, spec, root):
    """FGVC Aircraft's own lists."""
    provide_images(name, spec, root, check_aircraft)
    return aircraft_lists(root / spec["lists"]), PUBLISHED, ""


def aircraft_lists(folder):
    """variants.txt, images_variant_{train,val,test}.txt ("0034309 747-400"), images/0034309.jpg."""
    labels, parts = {v: k for k, v in enumerate(lines(folder / "variants.txt"))}, {}
    for part in ("train", "val", "test"):
        file, parts[part] = folder / f"images_variant_{part}.txt", []
        for line in lines(file):
            image, _, variant = line.partition(" ")
            if variant not in labels:
                raise Problem(f"{file}: {line!r} names no variant of variants.txt")
            parts[part].append(Item(folder / "images" / f"{image}.jpg", labels[variant], variant))
    return parts


def check_aircraft(folder, counts):
    """Raises Problem if not all was unpacked: nobody publishes a checksum of this archive."""
    parts = aircraft_lists(folder)
    found = [len(items) for items in parts.values()]
    if found != counts:
        raise Problem(f"its lists name {found} pictures for train, val and test, not {counts}")
    if broken := unreadable([item.path for items in parts.values() for item in items]):
        raise Problem(f"{len(broken)} of its pictures cannot be read, first {broken[0].name}")


def read_imagenet(name, spec, root):
    """ImageNet: images/{train,val}/FOLDER. As in the papers its val pictures are the test set."""
    images, names = provide_images(name, spec, root), class_names(root / spec["names"])
    parts = {"train": in_folders(images / "train", names), "val": [],
             "test": in_folders(images / "val", names)}
    return parts, PUBLISHED, ""


def read_variant(name, spec, root):
    """A shifted ImageNet, for testing only: FOLDER of classnames.txt, or numbers (ImageNetV2).

    Absent classes are left out."""
    images, names = provide_images(name, spec, root), class_names(root / spec["names"])
    if spec.get("numbered"):
        names = {str(k): classname for k, classname in enumerate(names.values())}
    names = {folder: name for folder, name in names.items() if (images / folder).is_dir()}
    return {"train": [], "val": [], "test": in_folders(images, names)}, PUBLISHED, ""


def read_world(name, spec, root):
    """The embedded data sets, drawn on first use."""
    folder = world.build(root, name)
    if not (root / spec["split"]).exists() or not (root / spec["images"]).is_dir():
        raise Problem(f"{name}: {folder} holds something else: remove it, and it is drawn anew")
    return read_split(name, spec, root)[0], "embedded", ""


def read_own(name, _, __):
    """One's own folder: class folders, or train and test (or val) with class folders in each."""
    folder, origin = Path(name), SEEDED
    test = next((part for part in ("test", "val") if (folder / part).is_dir()), None)
    if test and (folder / "train").is_dir() and (places := sub_folders(folder / "train")):
        names, origin = {place.name: place.name for place in places}, f"own train/{test} folders"
        for place in sub_folders(folder / test):
            if place.name not in names:
                raise Problem(f"{place}: there is no such class in {folder / 'train'}")
        parts = {"train": in_folders(folder / "train", names), "val": [],
                 "test": in_folders(folder / test, names)}
    else:
        parts = seeded_split(folder)
    names = list(dict.fromkeys(item.classname for item in parts["train"]))
    note = (f"{len(names)} classes ({', '.join(names[:4])}{', ...' * (len(names) > 4)}), pictures: "
            f"{len(parts['train'])} for training, {len(parts['test'])} for testing; {origin}")
    return parts, origin, note


READERS = {"split": read_split, "aircraft": read_aircraft, "imagenet": read_imagenet,
           "variant": read_variant, "world": read_world, "own": read_own}


def parse_split(file):
    """{"train" | "val" | "test": [[path, label, classname], ...]} of a split file, else Problem."""
    try:
        parts = json.loads(regular_file(file).read_text(encoding="utf-8"))
        parts = {part: parts[part] for part in ("train", "val", "test")}
        for path, label, classname in (row for rows in parts.values() for row in rows):
            if type(label) is not int or "\0" in path:
                raise ValueError
            (path + classname).encode()  # two texts, and no lone surrogate in them
        return parts
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Problem(f'{file}: not a split file, those look like {{"train": [["path", 0, "name"], '
                      '...], "val": ..., "test": ...}') from None


def seeded_split(folder, spec={}):
    """50% train, 20% val, 30% test of each class folder, at least one picture for train and test.

    The same every time."""
    places = [place for place in sub_folders(folder) if place.name not in spec.get("ignore", [])]
    parts = {"train": [], "val": [], "test": []}
    rename, rng = spec.get("rename", {}), random.Random(1)
    if len(places) < 2:
        raise Problem(f"{folder}: expected one sub-folder per class, at least two, "
                      f"found {len(places)}")
    for label, place in enumerate(places):
        paths = pictures_in(place)
        n, classname = len(paths), rename.get(place.name, place.name)
        if n < 2:
            raise Problem(f"{place}: a class needs at least two pictures, one to learn from and "
                          f"one to test on; found {n}")
        rng.shuffle(paths)
        a, b = max(1, round(0.5 * n)), min(round(0.7 * n), n - 1)
        for part, some in zip(parts, (paths[:a], paths[a:b], paths[max(a, b):])):
            parts[part] += [Item(path, label, classname) for path in some]
    return parts


def in_folders(images, names):
    """All pictures of images/FOLDER for each FOLDER -> class name, always in the same order."""
    for folder, classname in names.items():
        if not (images / folder).is_dir():
            raise Problem(f"missing folder {images / folder} (the pictures of {classname!r})")
    return [Item(path, label, classname) for label, (folder, classname) in enumerate(names.items())
            for path in pictures_in(images / folder)]


def sub_folders(folder):
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def pictures_in(folder):
    """The paths of all pictures below a folder, sorted."""
    endings = Image.registered_extensions()
    return sorted(path for path in folder.rglob("*")
                  if path.suffix.lower() in endings and not path.name.startswith("."))


def class_names(file):
    """classnames.txt: a line "n01440764 tench" per class -> {folder: name}, in the file's order."""
    return dict(line.split(" ", 1) for line in lines(file) if " " in line)


def lines(file):
    try:
        text = regular_file(file).read_text(encoding="utf-8")
    except Problem as problem:
        raise Problem(f"{problem}; data/README.md tells where it comes from") from None
    except ValueError as error:
        raise Problem(f"{file}: is not text ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
