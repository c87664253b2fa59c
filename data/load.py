"""Data sets: the images of each split with labels, the class names, and the templates.

catalogue.json lists the papers' data sets; data/world/sets.py draws the embedded ones."""

import difflib
import json
import os
import random
from collections import namedtuple
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path

from data.download import is_filled, provide
from data.errors import Problem
from data.world import sets

CATALOGUE = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
FOLDER = Path(__file__).resolve().parent / "sets"       # the data root without --data-root
NAMES = [*sets.SETS, *CATALOGUE]
SUITES = {"embedded": list(sets.EMBEDDED),
          "papers": [name for name, spec in CATALOGUE.items() if spec["counts"][0]]}  # to train on
PARTS = ["train", "val", "test"]
PART_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PUBLISHED, OWN, SEEDED = "published split", "your own split", "seeded 50/20/30 split"
ENDINGS = set(""".apng .avif .bmp .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pcx .pgm
              .png .pnm .ppm .psd .ras .sgi .tga .tif .tiff .webp""".split())

# content: digest of the file, of images that are used
Item = namedtuple("Item", "path label content", defaults=[b""])


@dataclass
class Data:
    """A data set: lists of Item, the class names by label, and templates ("a photo of a {}.")."""
    name: str
    classnames: list
    template: str
    prograd_template: str
    train: list = ()
    val: list = ()
    test: list = ()
    note: str = ""      # a line that a run prints
    origin: str = ""    # who made the split; another split gives other results
    own: bool = False   # a folder of the user
    identity: str = ""  # digest, with the images that are tested: see data/results/records.py


def dataset_names(text):
    """An argparse type: data sets, suites and folders, separated by commas, as a list of names."""
    names = []
    for part in text.split(","):
        names += SUITES.get(part.strip()) or [find_name(part.strip())]
    return names


def find_name(text):
    """Return a data set's name, or the full path of a folder. Raises Problem if it is neither."""
    if text in NAMES:
        return text
    if os.path.isdir(text):
        return str(Path(text).resolve())
    if os.path.dirname(text):
        raise Problem(f"no such folder: {text[:200]!r}")
    near = difflib.get_close_matches(text, [*NAMES, *SUITES], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "no name and no folder;"
    raise Problem(f"unknown data set {text[:200]!r}: {hint} `python common.py --data` lists all")


def is_embedded(name):
    """Return whether a data set is one of those that are drawn on first use."""
    return name in sets.SETS


def find_spec(name):
    """Return what is known of a data set before its files are read."""
    if is_embedded(name):
        return {"kind": "embedded", "images": f"{name}/images",
                "split": f"{name}/split_{name}.json", "template": sets.SETS[name].template}
    return CATALOGUE.get(name, {"kind": "own", "template": "a photo of a {}."})


def list_data(root):
    """Print what is below `root` of each data set, its template and its folder; only looks."""
    print(f"{'data set':<16} {'images':<23} {'template':<42} folder")
    for name in NAMES:
        spec = find_spec(name)
        folder = Path(root) / spec["images"]
        state = "downloaded on first use" if "archive" in spec else "not there"
        if is_filled(folder):
            state = "found"
        elif spec["kind"] == "embedded":
            state = "drawn on first use"
        print(f"{name:<16} {state:<23} {spec['template']:<42} {folder}")


def load_data(name, root, template=None):
    """Read a data set of the catalogue below folder `root`, an embedded one, or a user's folder.

    template  replaces the data set's own; several prompts are separated by "|"
    Downloads or draws what is missing. Raises Problem: unknown name, missing files, files of the
    wrong form, a class without images, no space."""
    name = find_name(str(name))
    root = Path(root).resolve()
    spec = find_spec(name)
    if template:
        spec = {**spec, "template": template, "prograd_template": template}
    try:
        classnames, rows, origin = READERS[spec["kind"]](name, spec, root)
    except OSError as error:
        hint = "" if spec["kind"] == "own" else "; --data-root DIR takes another folder"
        where = error.filename or root
        raise Problem(f"{name}: {where}: {error.strerror or error}{hint}") from None
    items = [[Item(*row) for row in rows.get(part, [])] for part in PARTS]
    data = Data(name, classnames, spec["template"],
                spec.get("prograd_template", spec["template"]), *items,
                origin=origin, own=spec["kind"] == "own")
    check_classes(data, spec.get("parts", ["train", "test"]))
    counts = [len(part) for part in items]
    if data.own:
        data.note = (f"{len(classnames)} classes ({listed(classnames)}), images: {counts[0]} for "
                     f"training, {counts[1]} for validation, {counts[2]} for testing; {origin}")
    if origin == PUBLISHED and counts != spec["counts"]:
        data.origin = OWN
        data.note = f"{OWN}: {counts} images for train, val, test, not {spec['counts']}"
    return data


# ---------------------------------------------------------------- checks and notes

def check_template(text):
    """Return a template, or several separated by "|": each needs one {}, for the class name."""
    for prompt in text.split("|"):
        rest = prompt.replace("{}", "", 1)
        if rest == prompt or "{" in rest or "}" in rest:
            raise Problem(f"template {prompt!r}: needs one {{}}, where the class name stands, and "
                          "no other braces")
    return text


def check_classes(data, parts):
    """Raise Problem unless there are two classes, with images of each in all of these parts."""
    if len(data.classnames) < 2:
        raise Problem(f"{data.name}: found {len(data.classnames)} classes, needs two or more; in a "
                      "folder of your own a sub-folder is a class")
    for part in parts:
        found = {item.label for item in getattr(data, part)}
        empty = [name for label, name in enumerate(data.classnames) if label not in found]
        if empty:
            raise Problem(f"{data.name}: of {len(data.classnames)} classes these have no {part} "
                          f"images: {listed(empty)}")


def listed(names):
    """Return the first names as a text."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---------------------------------------------------------------- one reader per layout
#
# (name, spec, root) -> class names by label, {part: [(path, label), ...]}, origin

def read_published(name, spec, root):
    """Read the images and the split file of one of CoOp's data sets."""
    images = provide(name, spec, root, check=read_split)
    return *read_split(root / spec["split"], images), PUBLISHED


def read_embedded(name, spec, root):
    """Read an embedded data set, which is drawn on first use."""
    sets.build(root, name)
    return *read_split(root / spec["split"], root / spec["images"]), "embedded"


def read_aircraft(name, spec, root):
    """Read FGVC Aircraft: variants.txt, images_variant_{train,val,test}.txt ("0034309 747-400")."""
    images = provide(name, spec, root)
    names = read_lines(root / spec["names"])
    rows = {part: [] for part in PARTS}
    for part in PARTS:
        for line in read_lines(images.parent / f"images_variant_{part}.txt"):
            image, _, variant = line.partition(" ")
            if variant not in names:
                raise Problem(f"{images.parent}: {line!r} names no variant of variants.txt")
            rows[part].append((images / f"{image}.jpg", names.index(variant)))
    return names, rows, PUBLISHED


def read_imagenet(name, spec, root):
    """Read ImageNet, whose val images are the test set, as in CoOp, or one of its variants.

    ImageNetV2's folders are numbers of lines of classnames.txt. ImageNet-A and -R have 200 of the
    1000 classes. A shorter classnames.txt selects classes."""
    images = provide(name, spec, root)
    file = root / spec["names"]
    names = read_classnames(file)
    folders = {place.name for place in sub_folders(images)}
    if spec.get("numbered"):
        names = {str(number): classname for number, classname in enumerate(names.values())}
        if len(folders) > len(names):
            raise Problem(f"{file} has {len(names)} lines, {images} {len(folders)} folders")
    elif len(names) > spec["classes"]:
        names = {folder: classname for folder, classname in names.items() if folder in folders}
        if len(names) < spec["classes"]:
            raise Problem(f"{images} has {len(names)} of {spec['classes']} class folders: unpack "
                          f"it again, or list the classes that you want in {file}")
    rows = {part: list_classes(images / inner, names) for part, inner in spec["parts"].items()}
    return list(names.values()), rows, PUBLISHED


def read_own(name, spec, root):
    """Read a user's folder: a split file, or train and test folders, or class folders.

    A classnames.txt (folder, name) in it renames classes."""
    folder = Path(name)
    splits = sorted(folder.glob("split*.json"))
    parts = find_parts(folder)
    if len(splits) > 1:
        raise Problem(f"{folder}: has several split files: {listed([s.name for s in splits])}")
    if splits:
        origin = OWN
        names, rows = read_split(splits[0], folder)
        if not any(path.exists() for path, _ in rows["train"]):
            names, rows = read_split(splits[0], folder / "images")
    elif parts:
        origin = "own train/test folders"
        names = sorted({place.name for part in parts.values() for place in class_folders(part)})
        rows = {part: list_classes(parts[part], names) for part in parts}
    else:
        origin = SEEDED
        names, rows = divide_folders(folder)
    file = folder / "classnames.txt"
    rename = read_classnames(file) if file.exists() else {}
    unknown = [place for place in rename if place not in names]
    if unknown:
        raise Problem(f"{file}: there is no class folder {listed(unknown)}")
    return [rename.get(place, place) for place in names], rows, origin


READERS = {"split": read_published, "embedded": read_embedded, "aircraft": read_aircraft,
           "imagenet": read_imagenet, "own": read_own}


# ---------------------------------------------------------------- files and folders

def read_split(file, images=Path()):
    """Return class names by label and rows of a split file, whose paths start at `images`.

    {"train": [["path", 0, "class name"], ...], "val": ..., "test": ...}; "val" may be missing."""
    names = {}
    try:
        split = json.loads(file.read_text(encoding="utf-8-sig"))
        split = {"train": split["train"], "val": split.get("val", []), "test": split["test"]}
        for path, label, name in chain(*split.values()):
            if type(label) is not int or names.setdefault(label, name) != name:
                raise ValueError(f"label {label!r} stands for {names.get(label)!r} and {name!r}")
            (path + name).encode()          # both are texts
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"labels are not 0, 1, 2, ... but {sorted(names)[:5]} ...")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f'{file}: not a split file like {{"train": [["path", 0, "name"], ...], "val":'
                      f' ..., "test": ...}} ({error})') from None
    for part in PARTS:
        split[part] = [(images / path, label) for path, label, _ in split[part]]
    return [names[label] for label in range(len(names))], split


def divide_folders(folder):
    """Return class names and rows of class folders: 50% train, 20% val, 30% test of each class.

    The same every time. Of two images one is for train and one for test."""
    places = class_folders(folder)
    rows = {part: [] for part in PARTS}
    rng = random.Random(1)
    for label, place in enumerate(places):
        paths = list_images(place)
        n = len(paths)
        rng.shuffle(paths)
        half, rest = max(1, round(0.5 * n)), min(round(0.7 * n), n - 1)
        for part, some in zip(PARTS, (paths[:half], paths[half:rest], paths[max(half, rest):])):
            rows[part] += [(path, label) for path in some]
    return [place.name for place in places], rows


def find_parts(folder):
    """Return {"train": its folder, "test": ...} of a folder that is divided so, else {}.

    val is the test set where no folder is called test."""
    places = [place for place in sub_folders(folder) if place.name.lower() in PART_OF]
    parts = {PART_OF[place.name.lower()]: place for place in places}
    if len(parts) < len(places):
        raise Problem(f"{folder}: of {listed([place.name for place in places])} two mean the same")
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    return parts if "train" in parts and "test" in parts else {}


def class_folders(folder):
    """Return the folders of classes in a folder, in order of their names.

    Raises Problem where all have the same sub-folders, as train and test: they are no classes."""
    places = sub_folders(folder)
    inner = [[place.name for place in sub_folders(place)] for place in places]
    if places and inner[0] and all(names == inner[0] for names in inner):
        raise Problem(f"{folder}: its sub-folders {listed([place.name for place in places])} all "
                      f"have the sub-folders {listed(inner[0])}: which are the classes? It may have"
                      " CLASS/image, or train/CLASS/image and test/CLASS/image")
    return places


def list_classes(folder, names):
    """Return the rows of folder/NAME for each of the names; none where there is no such folder."""
    rows = []
    for label, name in enumerate(names):
        rows += [(path, label) for path in list_images(folder / name)]
    return rows


def list_images(folder):
    """Return the paths of the images below a folder, in order; hidden ones are skipped."""
    paths = []
    for entry in scan(folder):
        if entry.is_dir():
            paths += list_images(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
            paths.append(Path(entry.path))
    return paths


def sub_folders(folder):
    """Return the folders in a folder, in order; hidden ones are skipped."""
    return [Path(entry.path) for entry in scan(folder) if entry.is_dir()]


def scan(folder):
    """Return what a folder holds, in order, except what is hidden: .ipynb_checkpoints, __MACOSX."""
    entries = os.scandir(folder) if os.path.isdir(folder) else []
    entries = [entry for entry in entries if entry.name[0] != "." and entry.name != "__MACOSX"]
    return sorted(entries, key=attrgetter("name"))


def read_classnames(file):
    """Return {folder: class name} of the lines "n01440764 tench" of a file, in their order."""
    names = {}
    for line in read_lines(file):
        words = line.split(maxsplit=1)
        if len(words) < 2 or words[0] in names:
            raise Problem(f"{file}: {line!r} is not a new folder and its class name")
        names[words[0]] = words[1]
    return names


def read_lines(file):
    """Return the lines of a text file, without blank ones."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise Problem(f"{file}: is not text ({error})") from None
    return [line.strip() for line in lines if line.strip()]
