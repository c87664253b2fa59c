"""The embedded data sets: a small copy of the papers' suite, drawn on first use.

    python -m data.world.sets            draws a sample sheet into data/results/figures/world.png
    python -m data.world.sets --check    tests the sets and the tiny CLIP by the admission rules

Each of eleven sets has its own kind of classes and its own camera, which the tiny CLIP has not seen
in its training. Four shifted versions of `shapes` show the same scenes through other cameras.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.errors import Problem
from data.results.records import code_digest
from data.world import captions, draw
from data.world.captions import HOW, SYNONYMS
from data.world.draw import COLOURS, GROUNDS, PLACES, SHAPES, SIZE, STYLES, TEXTURES

HERE = Path(__file__).resolve().parent
PER_CLASS = {"train": 20, "val": 20, "test": 48}  # images


class DataSet(NamedTuple):
    template: str
    about: str        # the camera, in words
    camera: Callable  # (image, rng) -> image
    classes: dict     # {name: {attribute: word}}


PHRASES = {word: ways[0] for word, ways in SYNONYMS.items()}  # left: "on the left"
PHRASES |= {style: how[0].removeprefix("a ").removesuffix(" of") for style, how in HOW.items()}


def combine(form, **words):
    """Return a class for every combination of words, named by `form`: "{colour} {shape}".

    In alphabetical order, which is the order of their labels."""
    classes = {}
    for combination in itertools.product(*words.values()):
        phrases = [PHRASES.get(word, word) for word in combination]
        classes[form.format(**dict(zip(words, phrases)))] = dict(zip(words, combination))
    return dict(sorted(classes.items()))


SETS = {
    "shapes": DataSet(
        "a photo of a {}.", "warm light", lambda img, rng: draw.tint(img),
        combine("{colour} {shape}", colour=COLOURS, shape=["heart", "hexagon", "ring"])),
    "colours": DataSet(
        "a photo of something {}.", "washed out", lambda img, rng: draw.wash_out(img, 0.4),
        combine("{colour} {place}", colour=COLOURS, place=["left", "right"])),
    "forms": DataSet(
        "a photo of a {}.", "grey", lambda img, rng: img.convert("L").convert("RGB"),
        combine("{shape}", shape=SHAPES)),
    "textures": DataSet(
        "a photo of a {}.", "16 x 16 pixels", lambda img, rng: draw.reduce_resolution(img, 16),
        combine("{texture} {shape}", texture=TEXTURES[1:],
                shape=["circle", "cross", "heart", "house", "square"])),
    "scenes": DataSet(
        "a photo of {}.", "hues turned", lambda img, rng: draw.turn_hue(img, 45),
        combine("{ground} with a {shape}", ground=GROUNDS, shape=["circle", "star"])),
    "backdrops": DataSet(
        "a photo of a {}.", "fog", lambda img, rng: draw.add_fog(img, 0.85),
        combine("{shape} on {ground}", shape=["arrow", "heart", "star"],
                ground=["grass", "sand", "water", "snow", "bricks", "wood"])),
    "places": DataSet(
        "a photo of a {}.", "noise", lambda img, rng: draw.add_noise(img, rng, 90),
        combine("{shape} {place}", shape=["cross", "heart", "ring", "star"], place=PLACES)),
    "sizes": DataSet(
        "a photo of a {}.", "negative", lambda img, rng: ImageOps.invert(img),
        combine("{size} {shape}", size=["small", "large"],
                shape=["arrow", "circle", "cross", "heart", "moon", "ring", "square", "star"])),
    "contrasts": DataSet(
        "a photo of something {}.", "blue light",
        lambda img, rng: draw.tint(img, (0.45, 0.7, 1.0)),
        combine("{colour} on {ground}", colour=["brown", "green", "pink", "red", "yellow"],
                ground=["grass", "water", "snow", "night"])),
    "styles": DataSet(
        "a {}.", "posterised", lambda img, rng: draw.posterise(img, 3),
        combine("{style} of a {shape}", style=STYLES[1:], shape=["heart", "star"])),
    "fabrics": DataSet(
        "a photo of a {} thing.", "night", lambda img, rng: draw.darken(img, rng, 0.23),
        combine("{colour} {texture}", texture=TEXTURES[1:],
                colour=["blue", "green", "orange", "pink", "red", "yellow"])),
}
EMBEDDED = list(SETS)

change = SETS["shapes"]._replace
SETS["shapes_clean"] = change(
    about="no camera", camera=lambda img, rng: img)
SETS["shapes_sketch"] = change(
    about="sketch, warm light", camera=lambda img, rng: draw.tint(img))
SETS["shapes_noise"] = change(
    about="warm light, noise", camera=lambda img, rng: draw.add_noise(draw.tint(img), rng, 30))
SETS["shapes_lowres"] = change(
    about="warm light, 20 x 20 pixels",
    camera=lambda img, rng: draw.reduce_resolution(draw.tint(img), 20))


def draw_image(name, classname, number, camera=True):
    """Draw image `number` of a class, (64, 64) RGB; `camera=False` leaves the camera out."""
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
    """Draw data set `name` below folder `root` in CoOp's layout, unless it is there.

    root/name/images/CLASS/0000.png and root/name/split_NAME.json:
    {"train": [[path, label, classname], ...], "val": ..., "test": ...}.
    The folder appears whole or not at all; one that other code has drawn is drawn anew. Several
    processes take turns. Raises Problem for a folder that `build` has not written."""
    folder, code = Path(root, name), code_digest(__file__, draw.__file__, captions.__file__)
    stamp = folder / "drawn_by.txt"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if stamp.exists() and stamp.read_text() == code:
            return
        if folder.exists() and not stamp.exists():
            raise Problem(f"{name}: {folder} holds something else: "
                          "move it away, and it is drawn anew")
        part = folder.parent / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        write_set(part, name)
        (part / stamp.name).write_text(code)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def write_set(folder, name):
    """Draw the images of data set `name` into `folder` and write the split file."""
    split = {part: [] for part in PER_CLASS}
    parts = [part for part, count in PER_CLASS.items() for _ in range(count)]
    for label, classname in enumerate(SETS[name].classes):
        place = folder / "images" / classname.replace(" ", "_")
        place.mkdir(parents=True)
        for number, part in enumerate(parts):
            file = place / f"{number:04d}.png"
            draw_image(name, classname, number).save(file, compress_level=1)
            split[part].append([f"{place.name}/{file.name}", label, classname])
    (folder / f"split_{name}.json").write_text(json.dumps(split))


# ---------------------------------------------------------------- admission

NEUTRAL = "here we go again and thanks for looking as you can see do you know this".split()
FRONTS = [" ".join(NEUTRAL[:k]) for k in (0, 4, 8, 12, 16)]  # a word is a token
FRONTS += ["! " * k for k in (4, 8, 12, 16)]  # zero vectors: no caption has a "!"


def measure(model, preprocess, name):
    """Classify the validation images of data set `name` zero-shot.

    Returns in %: the accuracy without the camera, with it, of base and of new classes among
    themselves; the mean confidence; the accuracy with each of FRONTS before the prompts."""
    import open_clip
    import torch

    names, count = list(SETS[name].classes), PER_CLASS["val"]
    half = (len(names) + 1) // 2
    tokenizer = open_clip.SimpleTokenizer()

    def encode_images(camera):  # (classes, count, 128)
        images = [preprocess(draw_image(name, classname, PER_CLASS["train"] + k, camera))
                  for classname in names for k in range(count)]
        return model.encode_image(torch.stack(images), normalize=True).unflatten(0, (-1, count))

    def compute_logits(features, front=""):  # (classes, count, classes)
        prompts = [f"{front} {SETS[name].template.format(classname)}" for classname in names]
        w = model.encode_text(tokenizer(prompts), normalize=True)
        return model.logit_scale.exp() * features @ w.T

    def compute_accuracy(logits):
        right = logits.argmax(-1) == torch.arange(len(logits))[:, None]
        return 100 * right.float().mean().item()

    features = encode_images(camera=True)
    logits = compute_logits(features)
    return [compute_accuracy(compute_logits(encode_images(camera=False))),
            compute_accuracy(logits),
            compute_accuracy(logits[:half, :, :half]),
            compute_accuracy(logits[half:, :, half:]),
            100 * logits.softmax(-1).amax(-1).mean().item(),
            *(compute_accuracy(compute_logits(features, front)) for front in FRONTS)]


def check(folder):
    """Print the results of the CLIP in `folder`, and whether they keep the admission rules.

    Change classes, templates and cameras until they do. Only zero-shot CLIP decides, never a
    learning method."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval().requires_grad_(False)
    rows, verdicts = [], []

    def judge(line, holds):
        verdicts.append(holds)
        print(f"{line}  {'admitted' if holds else 'NOT ADMITTED'}", flush=True)

    print(f"{'':15}  no camera     camera       base        new confidence")
    for name in SETS:
        rows.append(measure(model, preprocess, name))
        plain, accuracy, *_ = rows[-1]
        low, high = (50, 80) if name in EMBEDDED else (30, 95)
        if name == "shapes_clean":
            low, high = 90, 100
        judge(f"{name:15}" + "".join(f"{number:11.1f}" for number in rows[-1][:5]),
              plain >= 90 and low <= accuracy <= high)

    _, accuracy, base, new, confidence, *fronts = np.array(rows)[:len(EMBEDDED)].T  # (11,) each
    gaps, fronts = confidence - accuracy, np.mean(fronts, axis=1)
    judge(f"calibration   confidence - accuracy: mean {gaps.mean():+.1f} (within 5), "
          f"furthest {max(gaps, key=abs):+.1f} (within 20)",
          abs(gaps.mean()) <= 5 and abs(gaps).max() <= 20)
    judge(f"long prompts  {fronts.min():.1f} to {fronts.max():.1f} (within 1)", np.ptp(fronts) <= 1)
    judge(f"accuracy      base {base.mean():.1f}, new {new.mean():.1f} (within 6)",
          abs(base.mean() - new.mean()) <= 6)
    words = model.token_embedding.weight
    std = words[words.any(-1)].std()
    judge(f"words         standard deviation {std:.4f} (0.015 to 0.025)", 0.015 <= std <= 0.025)
    return all(verdicts)


# ---------------------------------------------------------------- the sample sheet

def draw_sheet(columns=8, left=136, width=128, height=86):
    """Draw images of every data set, a row each: the set in front, the class below."""
    page = Image.new("RGB", (left + columns * width, len(SETS) * height), "white")
    pen = ImageDraw.Draw(page)
    large, small = ImageFont.load_default(size=14), ImageFont.load_default(size=10)
    for row, name in enumerate(SETS):
        y = row * height + 4
        pen.text((6, y + 16), name, "black", large)
        pen.text((6, y + 35), SETS[name].about, "#555555", small)
        names = list(SETS[name].classes)
        for column in range(columns):
            x = left + column * width
            classname = names[column * len(names) // columns]
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
