"""The embedded data sets: a small copy of the papers' suite, drawn on first use.

    python -m data.world.sets            draws a sample sheet into data/results/figures/world.png
    python -m data.world.sets --check    tests the tiny CLIP and the sets against the rules below

Eleven sets have different kinds of classes, each seen through a camera that the tiny CLIP has never
seen. Four shifted versions of `shapes` show its scenes and classes through other cameras.

Classes are in alphabetical order, as in most of the papers' data sets, and there are 10 to 24 of
them in a set, so that base and new classes are at least five each (as in EuroSAT). A template says
what a person would write.

Admission, written before any method is run: zero-shot CLIP alone decides, on validation images.

  calibration    Mean over the eleven sets of confidence minus accuracy: within 5 points. No set is
                 beyond 20.
  long prompts   0, 4, 8, 12 and 16 neutral tokens, or as many zero vectors, before the template:
                 the average accuracies over the eleven sets are within 1 point of each other.
  accuracy       Each set: 90 % or more without the camera, 50 to 80 % with it. The averages of base
                 and of new classes, classified among themselves, are within 6 points of each other.
                 Shifted versions: 30 to 95 %, and shapes_clean 90 % or more.
  words          The embeddings of the words that occur have a standard deviation of 0.015 to 0.025.

Classes, templates and the strength of a camera may be changed until the rules hold. Nothing is
chosen by what a learning method does.
"""

import argparse
import ast
import hashlib
import itertools
import json
import random
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, NamedTuple

from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.errors import Problem
from data.world import draw
from data.world.captions import HOW, SYNONYMS
from data.world.draw import COLOURS, GROUNDS, PLACES, SHAPES, SIZE, STYLES

HERE = Path(__file__).resolve().parent
CROP = 0.35  # smallest area of a random crop in training; CLIP's 0.08 is for larger images
PER_CLASS = {"train": 20, "val": 20, "test": 48}  # images
STAMP = "drawn_by.txt"  # in a data set's folder: which code has drawn it


class DataSet(NamedTuple):
    template: str
    classes: dict     # {name: {attribute: word}}
    camera: Callable  # (image, rng) -> image
    about: str        # the camera, in words


def combine(form, **words):
    """Return a class for every combination of words, named by `form`: "{colour} {shape}"."""
    classes = {}
    for combination in itertools.product(*words.values()):
        given = dict(zip(words, combination))
        classes[form.format(**{attribute: say(word) for attribute, word in given.items()})] = given
    return classes


def say(word):
    """Return the captions' phrase for a word: "on the left" for left, "dark photo" for dark."""
    if word in STYLES:
        return HOW[word][0].removeprefix("a ").removesuffix(" of")
    return SYNONYMS.get(word, [word])[0]


SETS = {
    "shapes": DataSet(
        "a photo of a {}.",
        combine("{colour} {shape}", colour=COLOURS, shape=["heart", "hexagon", "ring"]),
        lambda img, rng: draw.tint(img), "warm light"),
    "colours": DataSet(
        "a photo of something {}.",
        combine("{colour} {place}", colour=COLOURS, place=["left", "right"]),
        lambda img, rng: draw.wash_out(img, 0.4), "washed out"),
    "forms": DataSet(
        "a photo of a {}.",
        combine("{shape}", shape=SHAPES),
        lambda img, rng: img.convert("L").convert("RGB"), "grey"),
    "textures": DataSet(
        "a photo of a {}.",
        combine("{texture} {shape}", texture=["striped", "dotted", "checkered"],
                shape=["circle", "cross", "heart", "house", "square"]),
        lambda img, rng: draw.reduce_resolution(img, 16), "16 x 16 pixels"),
    "scenes": DataSet(
        "a photo of {}.",
        combine("{ground} with a {shape}", ground=GROUNDS, shape=["circle", "star"]),
        lambda img, rng: draw.turn_hue(img, 45), "hues turned"),
    "backdrops": DataSet(
        "a photo of a {}.",
        combine("{shape} on {ground}", shape=["arrow", "heart", "star"],
                ground=["grass", "sand", "water", "snow", "bricks", "wood"]),
        lambda img, rng: draw.add_fog(img, 0.85), "fog"),
    "places": DataSet(
        "a photo of a {}.",
        combine("{shape} {place}", shape=["cross", "heart", "ring", "star"], place=PLACES),
        lambda img, rng: draw.add_noise(img, rng, 90), "noise"),
    "sizes": DataSet(
        "a photo of a {}.",
        combine("{size} {shape}", size=["small", "large"],
                shape=["arrow", "circle", "cross", "heart", "moon", "ring", "square", "star"]),
        lambda img, rng: ImageOps.invert(img), "negative"),
    "contrasts": DataSet(
        "a photo of something {}.",
        combine("{colour} on {ground}", colour=["brown", "green", "pink", "red", "yellow"],
                ground=["grass", "water", "snow", "night"]),
        lambda img, rng: draw.tint(img, (0.45, 0.7, 1.0)), "blue light"),
    "styles": DataSet(
        "a {}.",
        combine("{style} of a {shape}", style=STYLES[1:], shape=["heart", "star"]),
        lambda img, rng: draw.posterise(img, 3), "posterised"),
    "fabrics": DataSet(
        "a photo of a {} thing.",
        combine("{colour} {texture}", texture=["striped", "dotted", "checkered"],
                colour=["blue", "green", "orange", "pink", "red", "yellow"]),
        lambda img, rng: draw.darken(img, rng, 0.23), "night"),
}
EMBEDDED = list(SETS)
for name, about, camera in [
        ("shapes_clean", "no camera", lambda img, rng: img),
        ("shapes_sketch", "sketch, warm light", lambda img, rng: draw.tint(img)),
        ("shapes_noise", "warm light, noise",
         lambda img, rng: draw.add_noise(draw.tint(img), rng, 30)),
        ("shapes_lowres", "warm light, 20 x 20 pixels",
         lambda img, rng: draw.reduce_resolution(draw.tint(img), 20))]:
    SETS[name] = SETS["shapes"]._replace(camera=camera, about=about)
SHIFTED = list(SETS)[len(EMBEDDED):]


def template(name):
    """Return the hand-crafted prompt of data set `name`, with {} for the class."""
    return SETS[name].template


def class_names(name):
    """Return the classes of data set `name` by label: in alphabetical order."""
    return sorted(SETS[name].classes)


def draw_image(name, classname, number, camera=True):
    """Draw image `number` of a class of data set `name`, (64, 64) RGB, or as without its camera.

    It depends on nothing but the arguments."""
    original = name.split("_")[0]  # shifted versions show the scenes of `shapes`
    rng = random.Random(f"{original}/{classname}/{number}")
    given = {"style": ["photo", "cartoon"]} | SETS[name].classes[classname]
    scene = draw.sample_scene(rng, **given)
    if name == "shapes_sketch":
        scene["style"] = "sketch"
    img = draw.draw(scene, rng, wild=True)
    return SETS[name].camera(img, rng) if camera else img


# ---------------------------------------------------------------- files

def build(root, name):
    """Write data set `name` below folder `root` in CoOp's layout, and return its folder.

    root/name/images/CLASS/0000.png and root/name/split_NAME.json:
    {"train": [[path, label, classname], ...], "val": ..., "test": ...}.
    The folder appears whole or not at all. It is drawn anew if other code has drawn it. Of several
    processes one draws and the others wait. Raises Problem for a folder that is not ours."""
    folder = Path(root, name)
    if read_stamp(folder) == make_stamp():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        stamp = read_stamp(folder)
        if stamp == make_stamp():
            return folder
        if stamp is None and folder.exists():
            raise Problem(f"{name}: {folder} holds something else: "
                          "move it away, and it is drawn anew")
        for left in folder.parent.glob(f".{name}-*"):  # by a process that was killed
            shutil.rmtree(left)
        with TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
            write(Path(temporary, "new"), name)
            if stamp is not None:
                folder.rename(Path(temporary, "old"))
            Path(temporary, "new").rename(folder)
    return folder


def read_stamp(folder):
    """Return the stamp of a folder that `build` has written, else None."""
    try:
        return (folder / STAMP).read_text()
    except OSError:
        return None


@cache
def make_stamp():
    """Return a digest of the code that draws, without comments and docstrings."""
    code = ""
    for file in ("draw.py", "sets.py"):
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node):
                node.body.pop(0)
        code += ast.dump(tree)
    return hashlib.sha256(code.encode()).hexdigest()


def write(folder, name):
    """Draw all images of data set `name` into `folder` and write the split file and the stamp."""
    split = {part: [] for part in PER_CLASS}
    parts = [part for part, count in PER_CLASS.items() for _ in range(count)]
    for label, classname in enumerate(class_names(name)):
        place = folder / "images" / classname.replace(" ", "_")
        place.mkdir(parents=True)
        for number, part in enumerate(parts):
            file = place / f"{number:04d}.png"
            draw_image(name, classname, number).save(file, compress_level=1)
            split[part].append([f"{place.name}/{file.name}", label, classname])
    (folder / f"split_{name}.json").write_text(json.dumps(split))
    (folder / STAMP).write_text(make_stamp())


# ---------------------------------------------------------------- admission

NEUTRAL = "here we go again and thanks for looking as you can see do you know this"  # 16 tokens


def measure(folder):
    """Classify the validation images of all sets with the CLIP in `folder`, zero-shot.

    Returns {name: {column: %}} and the standard deviation of the words' embeddings."""
    import open_clip
    import torch
    import torch.nn.functional as F

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer, table = open_clip.SimpleTokenizer(), model.token_embedding.weight
    neutral = table[tokenizer(NEUTRAL)[0, 1:17]]

    def encode_images(name, camera):  # (classes, images, 128)
        numbers = range(PER_CLASS["train"], PER_CLASS["train"] + PER_CLASS["val"])
        return torch.stack([model.encode_image(torch.stack(
            [preprocess(draw_image(name, classname, k, camera)) for k in numbers]), normalize=True)
            for classname in class_names(name)])

    def encode_prompts(name, front):  # front (k, width) before the template -> (classes, 128)
        tokens = tokenizer([template(name).format(c) for c in class_names(name)])
        x, end = table[tokens], tokens.argmax(-1) + len(front)
        x = torch.cat([x[:, :1], front.expand(len(x), -1, -1), x[:, 1:77 - len(front)]], 1)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        w = model.ln_final(x[torch.arange(len(x)), end]) @ model.text_projection
        return F.normalize(w, dim=-1)

    def classify(f, w):  # -> accuracy and confidence in %
        confidence, predicted = (model.logit_scale.exp() * f @ w.T).softmax(-1).max(-1)
        right = predicted == torch.arange(len(w))[:, None]
        return 100 * right.float().mean().item(), 100 * confidence.mean().item()

    rows = {}
    with torch.no_grad():
        for name in SETS:
            row = rows[name] = {}
            f, w = encode_images(name, camera=True), encode_prompts(name, neutral[:0])
            half = (len(w) + 1) // 2
            row["no camera"], _ = classify(encode_images(name, camera=False), w)
            row["camera"], row["confidence"] = classify(f, w)
            row["base"], _ = classify(f[:half], w[:half])
            row["new"], _ = classify(f[half:], w[half:])
            for k in (4, 8, 12, 16):
                row[f"{k} tokens"], _ = classify(f, encode_prompts(name, neutral[:k]))
                row[f"{k} zeros"], _ = classify(f, encode_prompts(name, 0 * neutral[:k]))
    return rows, table[table.any(-1)].std().item()


def check(folder):
    """Print the numbers and the verdicts of the rules; return whether all of them hold."""
    rows, std = measure(folder)
    verdicts = []

    def judge(line, holds):
        verdicts.append(holds)
        print(f"{line}  {'admitted' if holds else 'NOT ADMITTED'}")

    columns = ["no camera", "camera", "base", "new", "confidence"]
    print(f"{'data set':<15}{'classes':>8}" + "".join(f"{column:>11}" for column in columns))
    for name, row in rows.items():
        count = len(class_names(name))
        if name in EMBEDDED:
            holds = 10 <= count <= 24 and row["no camera"] >= 90 and 50 <= row["camera"] <= 80
        elif name == "shapes_clean":
            holds = row["camera"] >= 90
        else:
            holds = 30 <= row["camera"] <= 95
        judge(f"{name:<15}{count:8d}" + "".join(f"{row[c]:11.1f}" for c in columns), holds)
    sets_hold = all(verdicts)

    eleven = [rows[name] for name in EMBEDDED]
    mean = {column: sum(row[column] for row in eleven) / len(eleven) for column in eleven[0]}
    print(f"{'mean of eleven':<23}" + "".join(f"{mean[c]:11.1f}" for c in columns) + "\n")
    gap = mean["confidence"] - mean["camera"]
    furthest = max((row["confidence"] - row["camera"] for row in eleven), key=abs)
    judge(f"calibration   mean {gap:+.1f}, furthest {furthest:+.1f}",
          abs(gap) <= 5 and abs(furthest) <= 20)
    fronts = [mean[column] for column in mean if column == "camera" or column[0].isdigit()]
    judge(f"long prompts  {min(fronts):.1f} to {max(fronts):.1f}", max(fronts) - min(fronts) <= 1)
    judge(f"accuracy      base {mean['base']:.1f}, new {mean['new']:.1f}, and each set above",
          sets_hold and abs(mean["base"] - mean["new"]) <= 6)
    judge(f"words         standard deviation {std:.4f}", 0.015 <= std <= 0.025)
    print("admitted" if all(verdicts) else "NOT ADMITTED")
    return all(verdicts)


# ---------------------------------------------------------------- the sample sheet

def draw_sheet(columns=8, left=136, width=128, height=86):
    """Draw samples of every data set: a row each, its name and camera in front, the class below."""
    page = Image.new("RGB", (left + columns * width, len(SETS) * height), "white")
    pen = ImageDraw.Draw(page)
    large, small = ImageFont.load_default(size=14), ImageFont.load_default(size=10)
    for row, name in enumerate(SETS):
        y = row * height + 4
        pen.text((6, y + 16), name, "black", large)
        pen.text((6, y + 35), SETS[name].about, "#555555", small)
        names = class_names(name)
        for column in range(columns):
            classname, x = names[column * len(names) // columns], left + column * width
            page.paste(draw_image(name, classname, 0), (x + (width - SIZE) // 2, y))
            pen.text((x + width / 2, y + SIZE + 2), classname, "black", small, anchor="ma")
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="test the rules, draw nothing")
    parser.add_argument("--clip", type=Path, default=HERE / "tiny_clip", help="weights to test")
    args = parser.parse_args()
    if args.check:
        sys.exit(not check(args.clip))
    draw_sheet().save(HERE.parent / "results" / "figures" / "world.png", optimize=True)


if __name__ == "__main__":
    main()
