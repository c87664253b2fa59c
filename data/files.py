"""Where the pictures of a data set lie and what they show: split files, folders, downloads.

`catalogue.json` holds the facts (folders, templates, addresses); here is one reader per kind of layout."""

import contextlib
import difflib
import hashlib
import json
import random
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from data import world
from data.errors import Problem

CATALOGUE = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
DRIVE = "https://drive.google.com/uc?export=download&id="
FOLDER_TEMPLATE = "a photo of a {}."
Item = namedtuple("Item", "path label classname")


@dataclass
class Data:
    """A data set: lists of Item, class names by label, and the templates ("a photo of a {}.") of CLIP and of ProGrad."""
    name: str
    classnames: list
    template: str
    prograd_template: str
    train: list
    val: list
    test: list
    note: str = ""


def known(name):
    """The name, if it is a data set's or an existing folder's; else raises Problem, with the nearest names."""
    if name not in CATALOGUE and not (name and Path(name).is_dir()):
        near = difflib.get_close_matches(name, CATALOGUE, n=3, cutoff=0.4)
        raise Problem(f"unknown data set {name!r}: {'did you mean ' + ' or '.join(near) + '?' if near else 'no such folder either;'}"
                      f" known are {', '.join(CATALOGUE)}, or a folder with one sub-folder per class")
    return name


def load_data(name, root):
    """The data set `name` of the catalogue below folder `root`, or any folder with one sub-folder per class.

    Downloads what can be downloaded. Raises Problem: unknown name, missing files, split of the wrong form."""
    spec, root = CATALOGUE.get(name), Path(root)
    if spec is None:
        spec, parts, note = {}, seeded_split(Path(known(name))), "seeded 50/20/30 split"
    else:
        parts, note = READERS[spec["kind"]](name, spec, root)
    names = {}
    for part in parts.values():
        for item in part:
            if names.setdefault(item.label, item.classname) != item.classname:
                raise Problem(f"{name}: label {item.label} stands for both {names[item.label]!r} and {item.classname!r}")
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise Problem(f"{name}: needs two classes or more, labelled 0, 1, 2, ...; found labels {sorted(names)[:5]}...")
    if not parts["test"]:
        raise Problem(f"{name}: no picture is left to test on")
    template = spec.get("template", FOLDER_TEMPLATE)
    return Data(name, [names[label] for label in range(len(names))], template, spec.get("prograd_template", template),
                parts["train"], parts["val"], parts["test"], note)


def list_data(root):
    """Prints for every data set whether it is there, its images in train, val and test, its template and its folder.

    Looks only: nothing is downloaded or drawn."""
    for name, spec in CATALOGUE.items():
        folder, counts = Path(root) / spec["images"], "not there"
        if folder.is_dir() and "split" in spec and not (Path(root) / spec["split"]).exists():
            counts = "no split file"
        elif folder.is_dir():
            try:
                data = load_data(name, root)
                counts = " ".join(f"{len(part):7d}" for part in (data.train, data.val, data.test))
            except Problem as problem:
                counts = str(problem)
        elif spec["kind"] == "world":
            counts = "drawn on first use"
        print(f"{name:<16} {counts:<24} {spec['template']:<42} {folder}")


# ---------------------------------------------------------------- one reader per layout: (name, spec, root) -> parts, note

def read_split(name, spec, root):
    """CoOp's split files: {"train": [[path, label, classname], ...], "val": ..., "test": ...}, paths below the images."""
    images, file = provide_images(name, spec, root), root / spec["split"]
    if not file.exists() and "drive" in spec:
        try:
            fetch(DRIVE + spec["drive"], file, check=parse_split)
        except Problem as problem:
            if not spec.get("folders"):
                raise Problem(f"{problem}; put the split file at {file}") from None
            return seeded_split(images, spec), f"seeded 50/20/30 split, NOT the papers' split: {problem}"
    if not file.exists():
        raise Problem(f"{name}: no split file {file}")
    rename = spec.get("rename", {})
    parts = parse_split(file)
    return {part: [Item(images / path, label, rename.get(classname, classname)) for path, label, classname in rows]
            for part, rows in parts.items()}, ""


def read_aircraft(name, spec, root):
    """FGVC Aircraft's own lists: variants.txt, images_variant_{train,val,test}.txt ("0034309 747-400")."""
    images, lists = provide_images(name, spec, root), root / spec["lists"]
    labels = {v: k for k, v in enumerate(lines(lists / "variants.txt"))}
    parts = {}
    for part in ("train", "val", "test"):
        rows = [line.split(" ", 1) for line in lines(lists / f"images_variant_{part}.txt")]
        for row in rows:
            if len(row) != 2 or row[1] not in labels:
                raise Problem(f"{lists / f'images_variant_{part}.txt'}: {' '.join(row)!r} names no variant of variants.txt")
        parts[part] = [Item(images / f"{image}.jpg", labels[v], v) for image, v in rows]
    return parts, ""


def read_imagenet(name, spec, root):
    """ImageNet: images/{train,val}/FOLDER; as in the papers its val pictures are the test set, and there is no val."""
    images, names = provide_images(name, spec, root), class_names(root / spec["names"])
    return {"train": in_folders(images / "train", names), "val": [], "test": in_folders(images / "val", names)}, ""


def read_variant(name, spec, root):
    """A shifted ImageNet, for testing only: FOLDER of classnames.txt, or numbers (ImageNetV2). Absent classes are left out."""
    images, names = provide_images(name, spec, root), class_names(root / spec["names"])
    if spec.get("numbered"):
        names = {str(k): classname for k, classname in enumerate(names.values())}
    present = {folder: classname for folder, classname in names.items() if (images / folder).is_dir()}
    return {"train": [], "val": [], "test": in_folders(images, present)}, ""


def read_world(name, spec, root):
    """The embedded data sets, drawn on first use."""
    world.build(root, name)
    return read_split(name, spec, root)


READERS = {"split": read_split, "aircraft": read_aircraft, "imagenet": read_imagenet, "variant": read_variant, "world": read_world}


def parse_split(file):
    """{"train" | "val" | "test": [[path, label, classname], ...]} of a split file; raises Problem on any other form."""
    try:
        parts = json.loads(Path(file).read_text(encoding="utf-8"))
        if not all(type(p) is str and type(k) is int and type(c) is str for part in ("train", "val", "test") for p, k, c in parts[part]):
            raise ValueError
        return {part: parts[part] for part in ("train", "val", "test")}
    except (ValueError, KeyError, TypeError):
        raise Problem(f'{file}: not a split file, which looks like {{"train": [["path", 0, "name"], ...], "val": ..., "test": ...}}') from None


def seeded_split(folder, spec=None):
    """50% train, 20% val, 30% test of each sub-folder's pictures, at least one for train and test; the same every time."""
    spec = spec or {}
    endings = set(Image.registered_extensions())
    folders = [f for f in sorted(folder.iterdir()) if f.is_dir() and not f.name.startswith(".") and f.name not in spec.get("ignore", [])]
    parts = {"train": [], "val": [], "test": []}
    rename, rng = spec.get("rename", {}), random.Random(1)
    for label, place in enumerate(folders):
        pictures = sorted(p for p in place.rglob("*") if p.suffix.lower() in endings and not p.name.startswith("."))
        if len(pictures) < 2:
            raise Problem(f"{place}: a class needs at least two pictures, one to learn from and one to test on; found {len(pictures)}")
        rng.shuffle(pictures)
        a, b = max(1, round(0.5 * len(pictures))), min(round(0.7 * len(pictures)), len(pictures) - 1)
        for part, some in zip(parts, (pictures[:a], pictures[a:b], pictures[max(a, b):])):
            parts[part] += [Item(p, label, rename.get(place.name, place.name)) for p in some]
    if len(folders) < 2:
        raise Problem(f"{folder}: expected one sub-folder per class, at least two; found {len(folders)}")
    return parts


def in_folders(images, names):
    """All pictures of images/FOLDER for each FOLDER -> class name, in sorted order, so that samples are the same everywhere."""
    items = []
    for label, (folder, classname) in enumerate(names.items()):
        if not (images / folder).is_dir():
            raise Problem(f"missing folder {images / folder} (the pictures of {classname!r})")
        items += [Item(p, label, classname) for p in sorted((images / folder).iterdir()) if not p.name.startswith(".")]
    return items


def class_names(file):
    """classnames.txt: a line "n01440764 tench" per class -> {folder: name}, in the file's order."""
    return dict(line.split(" ", 1) for line in lines(file) if " " in line)


def lines(file):
    try:
        return [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise Problem(f"missing file {file}; data/README.md tells where it comes from") from None


# ---------------------------------------------------------------- downloads

def provide_images(name, spec, root):
    """The folder of the pictures; downloads and unpacks it if it is missing and there is an address."""
    images, archive = root / spec["images"], spec.get("archive")
    if images.is_dir():
        return images
    if not archive:
        raise Problem(f"{name}: expected the pictures in {images}; they cannot be downloaded by a script, see data/README.md")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if not images.is_dir():
            file = root / archive["url"].rsplit("/", 1)[1]
            try:
                fetch(archive["url"], file, archive.get("md5"))
            except Problem as problem:
                raise Problem(f"{name}: {problem}; or put the pictures in {images} yourself") from None
            unpack(file, archive["take"], root / archive.get("place", spec["images"]))
            file.unlink()
    return images


def fetch(url, path, md5=None, check=None):
    """Downloads to path.part, goes on where an earlier try stopped, verifies, then renames to path. Raises Problem."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "python", **({"Range": f"bytes={have}-"} if have else {})})
        with urllib.request.urlopen(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0
            total = have + int(answer.headers.get("Content-Length") or 0)
            bar = tqdm(desc=path.name, total=total or None, initial=have, unit="B", unit_scale=True, disable=None)
            with open(part, "ab" if have else "wb") as out, bar:
                while block := answer.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
        if part.stat().st_size < total:
            raise Problem(f"the connection for {url} broke after {part.stat().st_size} of {total} bytes: run again to go on from there")
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # an earlier try had it all, or the file there has changed: begin again
            part.unlink()
            return fetch(url, path, md5, check)
        raise Problem(f"cannot download {url} ({error})") from None
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise Problem(f"cannot download {url} ({getattr(error, 'reason', None) or error or type(error).__name__}); is there a network?") from None
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise Problem(f"{url}: wrong checksum ({found}, expected {md5}); the file was removed")
    if check:
        try:
            check(part)
        except Problem:
            part.unlink()
            raise Problem(f"{url} did not give the file that it should") from None
    part.replace(path)


def unpack(file, take, place):
    """Unpacks a zip or tar archive into a folder of its own, then moves what `take` names to `place` in one step.

    `take` is a path inside the archive; when it is an archive itself, the next element is a path inside that one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=place.parent) as work:
        for k, inner in enumerate(take):
            folder = Path(work) / str(k)
            try:
                if zipfile.is_zipfile(file):
                    with zipfile.ZipFile(file) as archive:
                        for member in archive.namelist():
                            if not (folder / member).resolve().is_relative_to(folder.resolve()):
                                raise Problem(f"{file}: refused, since {member!r} would land outside its folder")
                        archive.extractall(folder)
                else:
                    with tarfile.open(file) as archive:
                        archive.extractall(folder, filter="data")
            except tarfile.FilterError as error:
                raise Problem(f"{file}: refused, since {error}") from None
            except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
                raise Problem(f"{file}: not an archive that can be unpacked ({error}); remove it and try again") from None
            file = folder / inner
            if not file.exists():
                raise Problem(f"the archive holds no {inner}")
        with contextlib.suppress(OSError):  # an empty folder in the way
            place.rmdir()
        shutil.move(file, place)
