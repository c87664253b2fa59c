"""A small world of pictures and sentences, drawn with Pillow: what the embedded data sets and the
tiny CLIP are made of.

A *scene* is a dict of words, one per attribute below. `draw(scene, rng)` makes its picture,
`caption(scene, rng)` says something true about it. `pretrain.py` learns the tiny CLIP from such
pairs; `build(root, name)` writes a labelled data set of pictures that went through a camera which
the tiny CLIP has never seen, in CoOp's file layout.

    python data/world.py            draws samples of every data set into data/figures/world.png
    python data/world.py --check    the zero-shot accuracy of every data set, and the rules' verdict

There are fifteen data sets, the papers' suite in miniature: eleven with different kinds of classes,
each through a camera of its own, and four shifted versions of the largest, `shapes`. The rules,
written before any accuracy was looked at:

  1. A set is admitted by its zero-shot accuracy alone, on the test pictures of all of its classes
     with its own template: at least 90 % without its camera, 50 to 80 % with it. The strength of a
     camera may be set so that this holds.
  2. Where a kind of classes stays below 90 % without a camera, its words are narrowed, or another
     kind takes its place.
  3. A set has 6 to 24 classes, in an order shuffled by random.Random(the set's name).
  4. A template says what a person would write for the set.
  5. The shifted versions have the scenes, the classes and the class order of `shapes`. Zero-shot
     accuracy is between 30 and 95 % on them; `shapes_clean`, which is `shapes` without a camera,
     only has to be above 90 %.
  6. Nothing about a set is chosen by what a learning method does on it.
"""

import itertools
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

HERE = Path(__file__).resolve().parent
SIZE = 64  # pixels of a picture's side
N = 2 * SIZE  # pictures are drawn at twice the size and reduced

SHAPES = ["arrow", "circle", "cross", "diamond", "heart", "hexagon",
          "house", "moon", "ring", "square", "star", "triangle"]
COLOURS = {
    "blue":   (50, 85, 215),
    "brown":  (125, 75, 35),
    "green":  (45, 155, 60),
    "orange": (245, 140, 25),
    "pink":   (245, 130, 185),
    "purple": (130, 55, 165),
    "red":    (215, 35, 40),
    "yellow": (245, 220, 50),
}
TEXTURES = ["plain", "striped", "dotted", "checkered"]
SIZES = {"small": 15, "medium": 21, "large": 28}  # half the width of the object, in pixels
PLACES = {"center": (0, 0), "left": (-11, 0), "right": (11, 0), "top": (0, -11), "bottom": (0, 11)}
GROUNDS = {
    "grass":  (110, 165, 75),
    "sand":   (222, 200, 150),
    "water":  (95, 160, 195),
    "sky":    (165, 205, 240),
    "snow":   (238, 242, 246),
    "bricks": (165, 95, 80),
    "wood":   (175, 130, 85),
    "night":  (25, 25, 50),
}
STYLES = ["photo", "sketch", "cartoon", "grainy", "blurry", "faded", "dark", "bright"]
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": list(COLOURS),
    "texture": TEXTURES,
    "size": list(SIZES),
    "place": list(PLACES),
    "ground": list(GROUNDS),
    "style": STYLES,
}


def scene(rng, **given):
    """A random scene, {attribute: word}; those `given` are fixed to a word or a list of words."""
    words = {}
    for attribute, choices in ATTRIBUTES.items():
        choices = given.get(attribute, choices)
        words[attribute] = rng.choice(choices if isinstance(choices, list) else [choices])
    if words["texture"] != "plain" and "texture" not in given and rng.random() < 0.5:
        words["texture"] = "plain"
    return words


# ---------------------------------------------------------------- sentences

HOW = {
    "photo":   ["a photo of", "a good photo of", "a clear photo of", "a sharp picture of"],
    "sketch":  ["a sketch of", "a drawing of", "a pencil drawing of", "lines on paper,"],
    "cartoon": ["a cartoon of", "a comic picture of", "an illustration of"],
    "grainy":  ["a grainy photo of", "a noisy picture of", "a bad photo of"],
    "blurry":  ["a blurry photo of", "an unsharp picture of", "out of focus,"],
    "faded":   ["a faded photo of", "an old photo of", "a pale picture of"],
    "dark":    ["a dark photo of", "a photo in low light of", "at dusk,"],
    "bright":  ["a bright photo of", "a photo in strong light of", "in the sun,"],
}
PLAIN = ["a photo of", "a photo of", "a photo of", "a picture of", "an image of",
         "this is", "there is", "we see", ""]
SAY = {  # words with more than one way, or another one, to say them
    "small":     ["small", "little", "tiny"],
    "large":     ["large", "big", "huge"],
    "center":    ["in the center", "in the middle"],
    "left":      ["on the left", "at the left side"],
    "right":     ["on the right", "at the right side"],
    "top":       ["at the top", "up high"],
    "bottom":    ["at the bottom", "down low"],
    "striped":   ["striped", "with stripes"],
    "dotted":    ["dotted", "with dots"],
    "checkered": ["checkered", "with checks"],
    "plain":     ["plain", "of one colour"],
}
CHANCES = {"size": .25, "colour": .85, "texture": .3, "shape": .9, "place": .25, "ground": .35,
           "style": .4}


def caption(scene, rng):
    """A sentence about the scene that leaves attributes out at random.

    Returns (sentence, said). `said` is what the sentence tells, {attribute: word}, so that it is
    known of which other pictures it is true as well. "photo" is never in it, since every picture
    may be called a photo."""
    def say(attribute):
        return rng.choice(SAY.get(scene[attribute], [scene[attribute]]))

    said = {attribute for attribute, chance in CHANCES.items() if rng.random() < chance}
    if rng.random() < 0.06:  # now and then only the ground is spoken of
        said = {"ground"} | (said & {"style"})
    if scene["size"] == "medium":
        said.discard("size")

    if said - {"style"} == {"ground"}:
        thing = rng.choice([say("ground"), f"a background of {say('ground')}",
                            f"something on {say('ground')}"])
    else:
        thing = about_the_object(scene, said, say, rng)
        if "ground" in said:
            if rng.random() < 0.15:
                thing = f"{say('ground')} with {thing}"
            else:
                thing = f"{thing} {rng.choice(['on', 'over', 'in front of'])} {say('ground')}"
        if "place" in said:
            thing += " " + say("place")

    how = rng.choice(HOW[scene["style"]] if "style" in said else PLAIN)
    if scene["style"] == "photo":
        said.discard("style")
    sentence = f"{how} {thing}{rng.choice(['.', '.', ''])}".strip()
    return sentence, {attribute: scene[attribute] for attribute in said}


def about_the_object(scene, said, say, rng):
    """The object's article and those of its attributes that are `said`: "a large blue arrow"."""
    words = [say(attribute) for attribute in ("size", "colour", "texture") if attribute in said]
    words.append(say("shape") if "shape" in said else rng.choice(["thing", "object", "shape"]))
    if "texture" in said and " " in words[-2]:  # "with stripes" goes behind the shape
        words[-2:] = words[-1], words[-2]
    if "colour" in said and rng.random() < 0.1:  # an arrow that is blue
        words.remove(scene["colour"])
        words += ["that", "is", scene["colour"]]
    article = rng.choice(["a", "a", "a", "the", "one"])
    if article == "a" and words[0][0] in "ao":
        article = "an"
    return " ".join([article] + words)


# ---------------------------------------------------------------- pictures

def polygon(corners, radius=1.0, start=-90):
    """The corners of a regular polygon, as a list of (x, y); the first one at `start` degrees."""
    angles = [np.radians(start + 360 * i / corners) for i in range(corners)]
    return [(radius * np.cos(angle), radius * np.sin(angle)) for angle in angles]


def heart():
    t = np.linspace(0, 2 * np.pi, 30)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(np.sin(t) ** 3, -y / 16))


def moon():
    """A circle's left side, and back along the inner edge of the crescent."""
    outer = sorted(polygon(24), key=lambda p: np.arctan2(p[1], -p[0]))
    t = np.radians(np.linspace(62, -62, 12))
    inner = [(.45 + .95 * -np.cos(angle) * .95, .95 * np.sin(angle)) for angle in t]
    return [p for p in outer if p[0] < .42] + inner


def star():
    return [p for pair in zip(polygon(5), polygon(5, .42, -54)) for p in pair]


OUTLINES = {  # the shapes' corners on [-1, 1]^2, (x, y) with x to the right and y down
    "arrow": [(-1, -.25), (.15, -.25), (.15, -.75), (1, 0), (.15, .75), (.15, .25), (-1, .25)],
    "circle": polygon(28),
    "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
              (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)],
    "diamond": [(0, -1), (.68, 0), (0, 1), (-.68, 0)],
    "heart": heart(),
    "hexagon": polygon(6),
    "house": [(0, -1), (.95, -.15), (.65, -.15), (.65, .9), (-.65, .9), (-.65, -.15), (-.95, -.15)],
    "moon": moon(),
    "ring": polygon(28),  # its hole is half as wide
    "square": [(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)],
    "star": star(),
    "triangle": [(0, -.95), (.95, .75), (-.95, .75)],
}


def draw(scene, rng, wild=False):
    """The picture of a scene, (64, 64) RGB. `wild` rotates, stretches, clutters and covers."""
    style = scene["style"]
    img = draw_ground(scene["ground"], rng)
    if style == "sketch":  # keeps its ground as a faint wash
        img = Image.blend(Image.new("RGB", (N, N), (244, 240, 232)), img, 0.35)
    points, hole = place_outline(scene, rng, wild)
    if wild and rng.random() < 0.6:
        draw_clutter(img, rng)
    mask = Image.new("L", (N, N))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    if hole:
        ImageDraw.Draw(mask).polygon(hole, fill=0)

    colour, pen = COLOURS[scene["colour"]], ImageDraw.Draw(img)
    if style == "sketch":
        ink = tuple(int(c * .8) for c in colour)
        hatching = hatch(mask)
        img.paste(ink, mask=hatching)
        paint(img, hatching, ink, scene["texture"], rng, lit=False)
        for edge in filter(None, (points, hole)):
            pen.line(edge + edge[:2], fill=ink, width=4)
    elif style == "cartoon":
        paint(img, mask, colour, scene["texture"], rng, lit=False)
        pen.line(points + points[:2], fill=(15, 15, 15), width=4)
    else:
        img.paste((0, 0, 0), (5, 6), mask.point(lambda v: v // 3))  # its shadow
        paint(img, mask, colour, scene["texture"], rng, lit=True)

    if wild and rng.random() < 0.3:  # something in front
        x, g = rng.randint(0, N), rng.randint(60, 200)
        pen.line([x, 0, x + rng.randint(-40, 40), N], fill=(g, g, g), width=rng.randint(5, 11))
    return develop(img.reduce(2), style, rng)


def place_outline(scene, rng, wild):
    """Where the object's edge is in the picture: its corners and those of its hole, or None."""
    half = 2 * SIZES[scene["size"]] * rng.uniform(.92, 1.08)
    cx, cy = (N / 2 + 2 * offset + rng.uniform(-5, 5) for offset in PLACES[scene["place"]])
    turn = np.radians(rng.uniform(-50, 50) if wild else rng.uniform(-10, 10))
    stretch = (rng.uniform(.72, 1.28), rng.uniform(.72, 1.28)) if wild else (1, 1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    points = np.array(OUTLINES[scene["shape"]]) * half * stretch @ rotation + (cx, cy)
    points = [tuple(p) for p in points]
    if scene["shape"] != "ring":
        return points, None
    return points, [((x - cx) * .5 + cx, (y - cy) * .5 + cy) for x, y in points]


def draw_ground(ground, rng):
    """The background, (128, 128) RGB."""
    r = rng.randint
    base = shifted(GROUNDS[ground], r(-14, 14), r(-14, 14), r(-14, 14))

    def tone(change):
        return shifted(base, change, change, change)

    img = Image.new("RGB", (N, N), base)
    pen = ImageDraw.Draw(img)
    if ground == "grass":
        for _ in range(45):
            x, y = r(0, N), r(0, N)
            pen.line([x, y, x + r(-4, 4), y - r(5, 11)], fill=tone(r(-45, 30)), width=2)
    elif ground == "sand":
        pen.point([(r(0, N), r(0, N)) for _ in range(350)], fill=tone(-40))
        for _ in range(25):
            x, y = r(0, N), r(0, N)
            pen.ellipse([x, y, x + 2, y + 2], fill=tone(r(-50, 20)))
    elif ground == "water":
        for y in range(r(0, 9), N, r(10, 16)):
            start = r(0, 12)
            wave = [(x, y + 3 * ((x // 8 + start) % 2)) for x in range(0, N + 8, 8)]
            pen.line(wave, fill=tone(r(15, 40)), width=2)
    elif ground == "sky":
        for _ in range(r(2, 5)):
            x, y, w = r(-10, N), r(-5, N), r(18, 42)
            pen.ellipse([x, y, x + w, y + w // 2], fill=tone(r(40, 70)))
            pen.ellipse([x + w // 2, y - 5, x + w + w // 3, y + w // 3], fill=tone(60))
    elif ground == "snow":
        for _ in range(30):
            x, y, w = r(0, N), r(0, N), r(2, 5)
            pen.ellipse([x, y, x + w, y + w], fill=tone(r(-28, -10)))
    elif ground == "bricks":
        h, w = r(12, 17), r(24, 34)
        for row, y in enumerate(range(0, N, h)):
            pen.line([0, y, N, y], fill=tone(50), width=2)
            for x in range((row % 2) * w // 2, N, w):
                pen.line([x, y, x, y + h], fill=tone(50), width=2)
    elif ground == "wood":
        for y in range(r(0, 6), N, r(6, 10)):
            pen.line([0, y, N, y + r(-6, 6)], fill=tone(r(-40, -15)), width=r(1, 3))
    elif ground == "night":
        for _ in range(28):
            x, y, w = r(0, N), r(0, N), r(0, 2)
            pen.ellipse([x, y, x + w, y + w], fill=(235, 235, 200))
    return img


def shifted(colour, *changes):
    """The colour with its channels changed, within 0 to 255."""
    return tuple(max(0, min(255, c + change)) for c, change in zip(colour, changes))


def draw_clutter(img, rng):
    """Bits of no shape, in greys."""
    for _ in range(rng.randint(1, 4)):
        x, y, w = rng.randint(0, N), rng.randint(0, N), rng.randint(5, 14)
        g = rng.randint(60, 200)
        corners = [(x + rng.randint(-w, w), y + rng.randint(-w, w)) for _ in range(4)]
        ImageDraw.Draw(img).polygon(corners, fill=(g, g, g))


def hatch(mask):
    """The mask (128, 128), hatched."""
    lines = Image.new("L", (N, N))
    pen = ImageDraw.Draw(lines)
    for k in range(-N, N, 9):
        pen.line([k, N, k + N, 0], fill=255, width=3)
    lines.paste(0, mask=mask.point(lambda v: 255 - v))
    return lines


def paint(img, mask, colour, texture, rng, lit):
    """Fills `mask` in `img` with the textured colour; `lit` from one side, if so."""
    colour = np.clip(np.array(colour) + [rng.randint(-16, 16) for _ in range(3)], 0, 255)
    darker, lighter = np.clip(colour * 0.45, 0, 255), np.clip(colour + 95, 0, 255)
    second = tuple(int(c) for c in (darker if colour.mean() > 105 else lighter))
    fill = Image.new("RGB", (N, N), tuple(int(c) for c in colour))
    pen = ImageDraw.Draw(fill)
    if texture == "striped":
        for k in range(-N, 2 * N, 14):
            pen.line([k, 0, k + N // 2, N], fill=second, width=5)
    elif texture == "dotted":
        for y in range(2, N, 13):
            for x in range(2, N, 13):
                pen.ellipse([x, y, x + 6, y + 6], fill=second)
    elif texture == "checkered":
        for y in range(0, N, 10):
            for x in range((y // 10 % 2) * 10, N, 20):
                pen.rectangle([x, y, x + 9, y + 9], fill=second)
    if lit:
        light = Image.linear_gradient("L").resize((N, N)).rotate(rng.choice([0, 90, 180, 270]))
        fill.paste((0, 0, 0), mask=light.point(lambda v: v // 3))
    img.paste(fill, mask=mask)


def develop(img, style, rng):
    """What a style does to the finished picture, (64, 64) RGB."""
    if style == "blurry":
        return img.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 2.0)))
    if style == "faded":
        pale = Image.new("RGB", img.size, (205, 205, 205))
        return Image.blend(img, pale, rng.uniform(.35, .55))
    if style == "dark":
        return ImageEnhance.Brightness(img).enhance(rng.uniform(.4, .6))
    if style == "bright":
        return ImageEnhance.Brightness(img).enhance(rng.uniform(1.3, 1.6))
    if style == "grainy":
        return noise(img, rng, rng.uniform(18, 32))
    return img


# ---------------------------------------------------------------- cameras: picture -> picture

def noise(img, rng, sigma):
    """Gaussian noise of standard deviation `sigma` (of 255) on every channel."""
    generator = np.random.default_rng(rng.getrandbits(32))
    grain = generator.normal(0, sigma, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(img) + grain, 0, 255).astype(np.uint8))


def tint(img, factors=(1.0, 0.75, 0.45), gamma=1.5):
    """A colour cast: light as at sunset, or with more blue `factors` as on an overcast evening."""
    light = (np.asarray(img) / 255) ** gamma * factors
    return Image.fromarray((light * 255).astype(np.uint8))


def wash_out(img, keep):
    """Little colour, much light: `keep` (0 to 1) of the picture's difference from a light grey."""
    pale = ImageEnhance.Color(img).enhance(keep)
    return Image.blend(Image.new("RGB", img.size, (225, 225, 225)), pale, keep)


def lower(img, pixels):
    """A resolution of `pixels` in width and height."""
    small = img.resize((pixels, pixels), Image.Resampling.BOX)
    return small.resize(img.size, Image.Resampling.BICUBIC)


def posterise(img, levels):
    """Only `levels` values of each colour channel."""
    return img.point(lambda v: v * levels // 256 * 255 // (levels - 1))


def turn_hue(img, degrees):
    """All hues turned round the colour wheel."""
    hue, saturation, value = img.convert("HSV").split()
    hue = hue.point(lambda v: (v + degrees * 256 // 360) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def fog(img, density):
    """White in front of everything: `density` (0 to 1) at the top and half of it at the bottom."""
    veil = np.linspace(density, density / 2, SIZE)[:, None, None]  # (64, 1, 1)
    behind = np.asarray(img.filter(ImageFilter.GaussianBlur(0.7)))
    return Image.fromarray((behind * (1 - veil) + 235 * veil).astype(np.uint8))


def night(img, rng, light):
    """Little light, most of it blue, and the grain that little light brings."""
    return noise(tint(img, (0.7 * light, 0.8 * light, light), 1.2), rng, 8)


# ---------------------------------------------------------------- data sets

CROP = 0.35  # of the area, at least: the random crops of a training; 0.08 is for larger pictures
PER_CLASS = {"train": 20, "val": 20, "test": 48}  # pictures


def classes(form, **words):
    """Classes by name, {"blue heart": {"colour": "blue", "shape": "heart"}, ...}: every combination
    of the `words` of some attributes, in the `form` of a name such as "{colour} {shape}"."""
    found = {}
    for combination in itertools.product(*words.values()):
        given = dict(zip(words, combination))
        name = form.format(**{attribute: spoken(word) for attribute, word in given.items()})
        found[name] = given
    return found


def spoken(word):
    """How the captions say it: "on the left" for left, "dark photo" for dark."""
    if word in STYLES:
        return HOW[word][0].removeprefix("a ").removesuffix(" of")
    return SAY.get(word, [word])[0]


CLASSES = {
    "shapes": classes("{colour} {shape}", colour=COLOURS, shape=["heart", "hexagon", "ring"]),
    "colours": classes("{colour}", colour=COLOURS),
    "forms": classes("{shape}", shape=SHAPES),
    "textures": classes(
        "{texture} {shape}",
        texture=["striped", "dotted", "checkered"],
        shape=["circle", "cross", "heart", "house", "square", "star"]),
    "scenes": classes("{ground}", ground=GROUNDS),
    "backdrops": classes(
        "{shape} on {ground}",
        shape=["arrow", "heart", "star"],
        ground=["grass", "sand", "water", "snow", "bricks", "wood"]),
    "places": classes("{shape} {place}", place=PLACES, shape=["cross", "heart", "ring", "star"]),
    "sizes": classes(
        "{size} {shape}",
        size=["small", "large"],
        shape=["arrow", "circle", "cross", "heart", "moon", "ring", "square", "star"]),
    "contrasts": classes(
        "{colour} on {ground}",
        colour=["brown", "green", "pink", "red", "yellow"],
        ground=["grass", "water", "snow", "night"]),
    "styles": classes("{style}", style=STYLES[1:]),  # every picture may be called a photo
    "fabrics": classes(
        "{colour} {texture}",
        texture=["striped", "dotted", "checkered"],
        colour=["blue", "green", "orange", "pink", "red", "yellow"]),
}

# Rule 1 set the strength of four cameras: fog 0.6 -> 0.85, noise 40 -> 90, night 0.35 -> 0.23, hues
# turned by 120 -> 45 degrees; and `styles`, which no turn of the hue hides, changed cameras with
# `scenes`. All other first guesses stand.
CAMERAS = {  # what a camera does to its pictures, in words and as a function
    "shapes":        ("warm light",         lambda img, rng: tint(img)),
    "colours":       ("washed out",         lambda img, rng: wash_out(img, 0.4)),
    "forms":         ("grey",               lambda img, rng: img.convert("L").convert("RGB")),
    "textures":      ("16 x 16 pixels",     lambda img, rng: lower(img, 16)),
    "scenes":        ("hues turned",        lambda img, rng: turn_hue(img, 45)),
    "backdrops":     ("fog",                lambda img, rng: fog(img, 0.85)),
    "places":        ("noise",              lambda img, rng: noise(img, rng, 90)),
    "sizes":         ("negative",           lambda img, rng: ImageOps.invert(img)),
    "contrasts":     ("blue light",         lambda img, rng: tint(img, (0.45, 0.7, 1.0))),
    "styles":        ("posterised",         lambda img, rng: posterise(img, 3)),
    "fabrics":       ("night",              lambda img, rng: night(img, rng, 0.23)),
    # four shifted versions of `shapes`
    "shapes_clean":  ("no camera",          lambda img, rng: img),
    "shapes_sketch": ("sketch, warm light", lambda img, rng: tint(img)),
    "shapes_noise":  ("warm light, noise",  lambda img, rng: noise(tint(img), rng, 30)),
    "shapes_lowres": ("warm light, 20 x 20 pixels", lambda img, rng: lower(tint(img), 20)),
}


def original(name):
    """The data set whose scenes and classes `name` shows: `shapes` for the versions of it."""
    return name.split("_")[0]


def class_names(name):
    """The classes of data set `name` by label, in an order shuffled by the set's name."""
    names = list(CLASSES[original(name)])
    random.Random(original(name)).shuffle(names)
    return names


def picture(name, classname, number, camera=True):
    """Picture `number` of the class `classname` of data set `name`, (64, 64) RGB.

    It looks the same whatever else is drawn; with camera=False, as it was without its camera."""
    rng = random.Random(f"{original(name)}/{classname}/{number}")
    given = {"style": ["photo", "cartoon"]} | CLASSES[original(name)][classname]
    words = scene(rng, **given)
    if name == "shapes_sketch":
        words["style"] = "sketch"
    img = draw(words, rng, wild=True)
    return CAMERAS[name][1](img, rng) if camera else img


def build(root, name):
    """Writes data set `name` below folder `root` in CoOp's layout, unless it is there.

    root/name/images/CLASS/0000.png and root/name/split_NAME.json:
    {"train": [[path, label, classname], ...], "val": ..., "test": ...}.
    The folder appears whole or not at all. Of several processes one draws and the others wait;
    what a killed one has left is cleared away by the next."""
    root = Path(root)
    folder = root / name
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        for left in root.glob(f".{name}-*"):  # nobody draws but the holder of the lock
            shutil.rmtree(left)
        if not folder.exists():
            unfinished = root / f".{name}-unfinished"
            try:
                write(unfinished, name)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write(folder, name):
    """Draws all pictures of data set `name` into `folder` and writes the split file."""
    split = {part: [] for part in PER_CLASS}
    parts = [part for part, count in PER_CLASS.items() for _ in range(count)]
    for label, classname in enumerate(class_names(name)):
        place = folder / "images" / classname.replace(" ", "_")
        place.mkdir(parents=True)
        for number, part in enumerate(parts):
            file = place / f"{number:04d}.png"
            picture(name, classname, number).save(file, compress_level=1)
            split[part].append([f"{place.name}/{file.name}", label, classname])
    (folder / f"split_{name}.json").write_text(json.dumps(split))


# ---------------------------------------------------------------- the rules, checked

def check(names):
    """Prints zero-shot accuracies (%) without and with the camera, and what the rules say."""
    import open_clip
    import torch

    catalogue = json.loads((HERE / "catalogue.json").read_text(encoding="utf-8"))
    clip = f"local-dir:{HERE / 'tiny_clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    model.eval()
    tokenizer = open_clip.get_tokenizer(clip)
    first = PER_CLASS["train"] + PER_CLASS["val"]
    numbers = range(first, first + PER_CLASS["test"])

    @torch.no_grad()
    def zero_shot(name, camera):
        prompts = [catalogue[name]["template"].format(c) for c in class_names(name)]
        w = model.encode_text(tokenizer(prompts), normalize=True)
        right = []
        for label, classname in enumerate(class_names(name)):
            pictures = [preprocess(picture(name, classname, k, camera)) for k in numbers]
            f = model.encode_image(torch.stack(pictures), normalize=True)
            right.append((f @ w.T).argmax(-1) == label)
        return 100 * torch.cat(right).float().mean().item()

    print(f"{'data set':<15} classes  without camera  with it")
    for name in names:
        count, plain, seen = len(class_names(name)), zero_shot(name, False), zero_shot(name, True)
        if name == "shapes_clean":
            good = seen >= 90
        elif name != original(name):
            good = 30 <= seen <= 95
        else:
            good = plain >= 90 and 50 <= seen <= 80 and 6 <= count <= 24
        verdict = "admitted" if good else "NOT ADMITTED"
        print(f"{name:<15} {count:7d} {plain:15.1f} {seen:8.1f}  {verdict}")


# ---------------------------------------------------------------- the picture of all data sets

def sheet(columns=8, left=136, width=92, height=86):
    """Samples of every data set: a row each, its name and its camera in front, the class below."""
    page = Image.new("RGB", (left + columns * width, len(CAMERAS) * height), "white")
    pen = ImageDraw.Draw(page)
    large, small = ImageFont.load_default(size=14), ImageFont.load_default(size=10)
    for row, (name, (words, _)) in enumerate(CAMERAS.items()):
        y = row * height + 4
        pen.text((6, y + 16), name, "black", large)
        pen.text((6, y + 35), words, "#555555", small)
        for column, classname in enumerate(class_names(name)[:columns]):
            x = left + column * width
            page.paste(picture(name, classname, 0), (x + (width - SIZE) // 2, y))
            pen.text((x + width / 2, y + SIZE + 2), classname, "black", small, anchor="ma")
    return page


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2:] or CAMERAS)
    else:
        sheet().save(HERE / "figures" / "world.png", optimize=True)
