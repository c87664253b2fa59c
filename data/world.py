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
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

SIZE = 64  # pixels; drawn at twice the size and reduced
SHAPES = "arrow circle cross diamond heart hexagon house moon ring square star triangle".split()
COLOURS = {"blue": (50, 85, 215), "brown": (125, 75, 35), "green": (45, 155, 60), "orange": (245, 140, 25),
           "pink": (245, 130, 185), "purple": (130, 55, 165), "red": (215, 35, 40), "yellow": (245, 220, 50)}
TEXTURES = "plain striped dotted checkered".split()
SIZES = {"small": 15, "medium": 21, "large": 28}  # half the width of the object, in pixels of the finished picture
PLACES = {"center": (0, 0), "left": (-11, 0), "right": (11, 0), "top": (0, -11), "bottom": (0, 11)}
GROUNDS = "grass sand water sky snow bricks wood night".split()
STYLES = "photo sketch cartoon grainy blurry faded dark bright".split()
ATTRIBUTES = {"shape": SHAPES, "colour": list(COLOURS), "texture": TEXTURES, "size": list(SIZES),
              "place": list(PLACES), "ground": GROUNDS, "style": STYLES}


def scene(rng, **given):
    """A random scene: attribute -> word, with those `given` fixed to a word or to a choice of words (list)."""
    words = {a: rng.choice(given.get(a, ws) if isinstance(given.get(a, ws), list) else [given[a]])
             for a, ws in ATTRIBUTES.items()}
    if words["texture"] != "plain" and "texture" not in given and rng.random() < 0.5:
        words["texture"] = "plain"
    return words


# ---------------------------------------------------------------- sentences

HOW = {"photo": ["a photo of", "a good photo of", "a clear photo of", "a sharp picture of"],
       "sketch": ["a sketch of", "a drawing of", "a pencil drawing of", "lines on paper,"],
       "cartoon": ["a cartoon of", "a comic picture of", "an illustration of"],
       "grainy": ["a grainy photo of", "a noisy picture of", "a bad photo of"],
       "blurry": ["a blurry photo of", "an unsharp picture of", "out of focus,"],
       "faded": ["a faded photo of", "an old photo of", "a pale picture of"],
       "dark": ["a dark photo of", "a photo in low light of", "at dusk,"],
       "bright": ["a bright photo of", "a photo in strong light of", "in the sun,"]}
PLAIN = ["a photo of", "a photo of", "a photo of", "a picture of", "an image of", "this is", "there is", "we see", ""]
SAY = {"small": ["small", "little", "tiny"], "large": ["large", "big", "huge"], "center": ["in the center", "in the middle"],
       "left": ["on the left", "at the left side"], "right": ["on the right", "at the right side"], "top": ["at the top", "up high"],
       "bottom": ["at the bottom", "down low"], "striped": ["striped", "with stripes"], "dotted": ["dotted", "with dots"],
       "checkered": ["checkered", "with checks"], "plain": ["plain", "of one colour"]}


def caption(scene, rng):
    """A sentence about the scene that leaves attributes out at random.

    Returns (sentence, said): `said` holds the attributes that the sentence tells, so that it is known of which other
    pictures it is true as well ("photo" alone promises nothing: every picture may be called a photo)."""
    say = lambda a: rng.choice(SAY.get(scene[a], [scene[a]]))
    chances = {"size": .25, "colour": .85, "texture": .3, "shape": .9, "place": .25, "ground": .35, "style": .4}
    said = {a for a, p in chances.items() if rng.random() < p}
    if rng.random() < 0.06:  # now and then only the ground is spoken of
        said = {"ground"} | (said & {"style"})
    if scene["size"] == "medium":
        said.discard("size")
    if said - {"style"} == {"ground"}:
        thing = rng.choice([say("ground"), f"a background of {say('ground')}", f"something on {say('ground')}"])
    else:
        words = [say(a) for a in ("size", "colour", "texture") if a in said]
        words.append(say("shape") if "shape" in said else rng.choice(["thing", "object", "shape"]))
        if "texture" in said and " " in words[-2]:  # an arrow with stripes
            words[-2:] = words[:-3:-1]
        if "colour" in said and rng.random() < 0.1:  # an arrow that is blue
            words.remove(scene["colour"])
            words += ["that", "is", scene["colour"]]
        article = rng.choice(["a", "a", "a", "the", "one"])
        thing = " ".join(["an" if article == "a" and words[0][0] in "ao" else article] + words)
        if "ground" in said:
            thing = f"{say('ground')} with {thing}" if rng.random() < 0.15 else f"{thing} {rng.choice(['on', 'over', 'in front of'])} {say('ground')}"
        if "place" in said:
            thing += " " + say("place")
    how = rng.choice(HOW[scene["style"]] if "style" in said else PLAIN)
    if scene["style"] == "photo":
        said.discard("style")
    return f"{how} {thing}{rng.choice(['.', '.', ''])}".strip(), {a: scene[a] for a in said}


# ---------------------------------------------------------------- pictures

def outline(shape):
    """The shape's corners on [-1, 1]^2 as a list of (x, y); x to the right, y down."""
    ring = lambda n, r=1.0, start=-90: [(r * np.cos(np.radians(start + 360 * i / n)), r * np.sin(np.radians(start + 360 * i / n))) for i in range(n)]
    if shape in ("circle", "ring"):
        return ring(28)
    if shape == "hexagon":
        return ring(6)
    if shape == "diamond":
        return [(0, -1), (.68, 0), (0, 1), (-.68, 0)]
    if shape == "square":
        return [(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]
    if shape == "triangle":
        return [(0, -.95), (.95, .75), (-.95, .75)]
    if shape == "star":
        return [p for a, b in zip(ring(5), ring(5, .42, -54)) for p in (a, b)]
    if shape == "cross":
        return [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]
    if shape == "arrow":
        return [(-1, -.25), (.15, -.25), (.15, -.75), (1, 0), (.15, .75), (.15, .25), (-1, .25)]
    if shape == "house":
        return [(0, -1), (.95, -.15), (.65, -.15), (.65, .9), (-.65, .9), (-.65, -.15), (-.95, -.15)]
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 30)
        return list(zip(np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16))
    if shape == "moon":
        outer = ring(24)
        t = np.radians(np.linspace(-62, 62, 12))
        inner = [(.45 + .95 * -np.cos(a) * .95, .95 * np.sin(a)) for a in t[::-1]]
        return [(x, y) for x, y in outer if x < .45] and [p for p in sorted(outer, key=lambda p: np.arctan2(p[1], -p[0])) if p[0] < .42] + inner
    raise ValueError(shape)


OUTLINES = {s: np.array(outline(s)) for s in SHAPES}


def draw_ground(ground, rng):
    """The background, (128, 128) RGB."""
    n, r = 2 * SIZE, rng.randint
    base = {"grass": (110, 165, 75), "sand": (222, 200, 150), "water": (95, 160, 195), "sky": (165, 205, 240), "snow": (238, 242, 246),
            "bricks": (165, 95, 80), "wood": (175, 130, 85), "night": (25, 25, 50)}[ground]
    base = tuple(max(0, min(255, c + r(-14, 14))) for c in base)
    tone = lambda d: tuple(max(0, min(255, c + d)) for c in base)
    img = Image.new("RGB", (n, n), base)
    d = ImageDraw.Draw(img)
    if ground == "grass":
        for _ in range(45):
            x, y = r(0, n), r(0, n)
            d.line([x, y, x + r(-4, 4), y - r(5, 11)], fill=tone(r(-45, 30)), width=2)
    elif ground == "sand":
        d.point([(r(0, n), r(0, n)) for _ in range(350)], fill=tone(-40))
        for _ in range(25):
            x, y = r(0, n), r(0, n)
            d.ellipse([x, y, x + 2, y + 2], fill=tone(r(-50, 20)))
    elif ground == "water":
        for y in range(r(0, 9), n, r(10, 16)):
            o = r(0, 12)
            d.line([(x, y + 3 * ((x // 8 + o) % 2)) for x in range(0, n + 8, 8)], fill=tone(r(15, 40)), width=2)
    elif ground == "sky":
        for _ in range(r(2, 5)):
            x, y, w = r(-10, n), r(-5, n), r(18, 42)
            d.ellipse([x, y, x + w, y + w // 2], fill=tone(r(40, 70)))
            d.ellipse([x + w // 2, y - 5, x + w + w // 3, y + w // 3], fill=tone(60))
    elif ground == "snow":
        for _ in range(30):
            x, y, w = r(0, n), r(0, n), r(2, 5)
            d.ellipse([x, y, x + w, y + w], fill=tone(r(-28, -10)))
    elif ground == "bricks":
        h, w = r(12, 17), r(24, 34)
        for row, y in enumerate(range(0, n, h)):
            d.line([0, y, n, y], fill=tone(50), width=2)
            for x in range((row % 2) * w // 2, n, w):
                d.line([x, y, x, y + h], fill=tone(50), width=2)
    elif ground == "wood":
        for y in range(r(0, 6), n, r(6, 10)):
            d.line([0, y, n, y + r(-6, 6)], fill=tone(r(-40, -15)), width=r(1, 3))
    else:
        for _ in range(28):
            x, y, w = r(0, n), r(0, n), r(0, 2)
            d.ellipse([x, y, x + w, y + w], fill=(235, 235, 200))
    return img


def paint(img, mask, colour, texture, rng, gradient):
    """Fill `mask` in `img` with the textured colour; with `gradient`, lit from one side."""
    n = 2 * SIZE
    colour = np.clip(np.array(colour) + [rng.randint(-16, 16) for _ in range(3)], 0, 255)
    other = np.clip(colour * 0.45, 0, 255) if colour.mean() > 105 else np.clip(colour + 95, 0, 255)
    fill = Image.new("RGB", (n, n), tuple(int(c) for c in colour))
    d, second = ImageDraw.Draw(fill), tuple(int(c) for c in other)
    if texture == "striped":
        for k in range(-n, 2 * n, 14):
            d.line([k, 0, k + n // 2, n], fill=second, width=5)
    elif texture == "dotted":
        for y in range(2, n, 13):
            for x in range(2, n, 13):
                d.ellipse([x, y, x + 6, y + 6], fill=second)
    elif texture == "checkered":
        for y in range(0, n, 10):
            for x in range((y // 10 % 2) * 10, n, 20):
                d.rectangle([x, y, x + 9, y + 9], fill=second)
    if gradient:
        light = Image.linear_gradient("L").resize((n, n)).rotate(rng.choice([0, 90, 180, 270])).point(lambda v: v // 3)
        fill.paste((0, 0, 0), mask=light)
    img.paste(fill, mask=mask)


def draw(scene, rng, wild=False):
    """The picture of a scene, (64, 64) RGB. `wild` rotates, stretches, clutters and covers."""
    n, style = 2 * SIZE, scene["style"]
    paper = style == "sketch"
    img = draw_ground(scene["ground"], rng)
    if paper:  # a sketch keeps its ground as a faint wash
        img = Image.blend(Image.new("RGB", (n, n), (244, 240, 232)), img, 0.35)
    half = 2 * SIZES[scene["size"]] * rng.uniform(.92, 1.08)
    cx, cy = (n / 2 + 2 * o + rng.uniform(-5, 5) for o in PLACES[scene["place"]])
    turn = np.radians(rng.uniform(-50, 50) if wild else rng.uniform(-10, 10))
    stretch = (rng.uniform(.72, 1.28), rng.uniform(.72, 1.28)) if wild else (1, 1)
    points = OUTLINES[scene["shape"]] * half * stretch
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + (cx, cy)
    points = [tuple(p) for p in points]
    d = ImageDraw.Draw(img)
    if wild and rng.random() < 0.6:  # clutter: bits of no shape, in greys
        for _ in range(rng.randint(1, 4)):
            x, y, w, g = rng.randint(0, n), rng.randint(0, n), rng.randint(5, 14), rng.randint(60, 200)
            d.polygon([(x + rng.randint(-w, w), y + rng.randint(-w, w)) for _ in range(4)], fill=(g, g, g))
    mask = Image.new("L", (n, n))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    if scene["shape"] == "ring":
        ImageDraw.Draw(mask).polygon([((x - cx) * .5 + cx, (y - cy) * .5 + cy) for x, y in points], fill=0)
    colour = COLOURS[scene["colour"]]
    if paper:
        ink = tuple(int(c * .8) for c in colour)
        hatch = Image.new("L", (n, n))
        dh = ImageDraw.Draw(hatch)
        for k in range(-n, n, 9):
            dh.line([k, n, k + n, 0], fill=255, width=3)
        hatch.paste(0, mask=mask.point(lambda v: 255 - v))
        img.paste(ink, mask=hatch)
        paint(img, hatch, ink, scene["texture"], rng, False)
        d.line(points + points[:2], fill=ink, width=4)
        if scene["shape"] == "ring":
            inner = [((x - cx) * .5 + cx, (y - cy) * .5 + cy) for x, y in points]
            d.line(inner + inner[:2], fill=ink, width=4)
    else:
        if style != "cartoon":
            img.paste((0, 0, 0), (5, 6), mask.point(lambda v: v // 3))  # its shadow
        paint(img, mask, colour, scene["texture"], rng, style != "cartoon")
        if style == "cartoon":
            d.line(points + points[:2], fill=(15, 15, 15), width=4)
    if wild and rng.random() < 0.3:  # something in front
        x, g = rng.randint(0, n), rng.randint(60, 200)
        d.line([x, 0, x + rng.randint(-40, 40), n], fill=(g, g, g), width=rng.randint(5, 11))
    img = img.reduce(2)
    if style == "blurry":
        img = img.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 2.0)))
    elif style == "faded":
        img = Image.blend(img, Image.new("RGB", img.size, (205, 205, 205)), rng.uniform(.35, .55))
    elif style == "dark":
        img = ImageEnhance.Brightness(img).enhance(rng.uniform(.4, .6))
    elif style == "bright":
        img = ImageEnhance.Brightness(img).enhance(rng.uniform(1.3, 1.6))
    elif style == "grainy":
        img = noise(img, rng, rng.uniform(18, 32))
    return img


def noise(img, rng, sigma):
    """Gaussian noise of standard deviation `sigma` (of 255) on every channel."""
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, sigma, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(img) + grain, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- cameras: picture -> picture

def tint(img, factors=(1.0, 0.75, 0.45), gamma=1.5):
    """A colour cast, as at sunset; blue `factors`: as on an overcast evening."""
    a = (np.asarray(img) / 255) ** gamma * factors
    return Image.fromarray((a * 255).astype(np.uint8))


def wash_out(img, keep):
    """Little colour, much light: `keep` (0 to 1) of the picture's difference from a light grey."""
    grey = ImageEnhance.Color(img).enhance(keep)
    return Image.blend(Image.new("RGB", img.size, (225, 225, 225)), grey, keep)


def grey(img, contrast):
    """No colour, and `contrast` (0 to 1) of the differences in brightness."""
    return ImageEnhance.Contrast(img.convert("L").convert("RGB")).enhance(contrast)


def lower(img, pixels):
    """A resolution of `pixels` in width and height."""
    return img.resize((pixels, pixels), Image.Resampling.BOX).resize(img.size, Image.Resampling.BICUBIC)


def posterise(img, levels):
    """Only `levels` values of each colour channel."""
    return img.point(lambda v: v * levels // 256 * 255 // (levels - 1))


def invert(img, part):
    """A negative; with part < 1 its contrast is that much lower."""
    return Image.blend(Image.new("RGB", img.size, (128, 128, 128)), ImageOps.invert(img), part)


def night(img, rng, light):
    """Little light, most of it blue, and the grain that little light brings."""
    return noise(tint(img, (0.7 * light, 0.8 * light, light), 1.2), rng, 8)


def turn_hue(img, degrees):
    """All hues turned round the colour wheel."""
    hue, saturation, value = img.convert("HSV").split()
    hue = hue.point(lambda v: (v + degrees * 256 // 360) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def fog(img, density):
    """White in front of everything, `density` (0 to 1) at the top and half of it at the bottom."""
    veil = np.linspace(density, density / 2, SIZE)[:, None, None]
    a = np.asarray(img.filter(ImageFilter.GaussianBlur(0.7))) * (1 - veil) + 235 * veil
    return Image.fromarray(a.astype(np.uint8))


# ---------------------------------------------------------------- data sets

PER_CLASS = {"train": 20, "val": 20, "test": 48}


def classes(form, **words):
    """Classes by name, {"blue heart": {"colour": "blue", "shape": "heart"}, ...}: every combination of
    the `words` of some attributes, in the `form` of a name such as "{colour} {shape}"."""
    found = {}
    for combination in itertools.product(*words.values()):
        given = dict(zip(words, combination))
        found[form.format(**{a: name_of(a, word) for a, word in given.items()})] = given
    return found


def name_of(attribute, word):
    """What the captions call an attribute's word: "on the left" for "left", "dark photo" for "dark"."""
    if attribute == "style":
        return HOW[word][0].removeprefix("a ").removesuffix(" of")
    return SAY.get(word, [word])[0]


# What is photographed, and the camera that does it: (picture, rng) -> picture. Rule 1 set the strength
# of five cameras: fog 0.6 -> 0.85, noise 40 -> 90, night 0.35 -> 0.23, a hue turned by 120 -> 45 degrees;
# and styles, which no turn of the hue hides, changed cameras with scenes. All other first guesses stand.
SETS = {
    "shapes": {
        "classes": classes("{colour} {shape}", colour=COLOURS, shape=["heart", "hexagon", "ring"]),
        "camera": lambda img, rng: tint(img)},
    "colours": {
        "classes": classes("{colour}", colour=COLOURS),
        "camera": lambda img, rng: wash_out(img, 0.4)},
    "forms": {
        "classes": classes("{shape}", shape=SHAPES),
        "camera": lambda img, rng: grey(img, 1.0)},
    "textures": {
        "classes": classes("{texture} {shape}", texture=["striped", "dotted", "checkered"],
                           shape=["circle", "cross", "heart", "house", "square", "star"]),
        "camera": lambda img, rng: lower(img, 16)},
    "scenes": {
        "classes": classes("{ground}", ground=GROUNDS),
        "camera": lambda img, rng: turn_hue(img, 45)},
    "backdrops": {
        "classes": classes("{shape} on {ground}", shape=["arrow", "heart", "star"],
                           ground=["grass", "sand", "water", "snow", "bricks", "wood"]),
        "camera": lambda img, rng: fog(img, 0.85)},
    "places": {
        "classes": classes("{shape} {place}", place=PLACES, shape=["cross", "heart", "ring", "star"]),
        "camera": lambda img, rng: noise(img, rng, 90)},
    "sizes": {
        "classes": classes("{size} {shape}", size=["small", "large"],
                           shape=["arrow", "circle", "cross", "heart", "moon", "ring", "square", "star"]),
        "camera": lambda img, rng: invert(img, 1.0)},
    "contrasts": {
        "classes": classes("{colour} on {ground}", colour=["brown", "green", "pink", "red", "yellow"],
                           ground=["grass", "water", "snow", "night"]),
        "camera": lambda img, rng: tint(img, (0.45, 0.7, 1.0))},
    "styles": {
        "classes": classes("{style}", style=STYLES[1:]),
        "camera": lambda img, rng: posterise(img, 3)},
    "fabrics": {
        "classes": classes("{colour} {texture}", texture=["striped", "dotted", "checkered"],
                           colour=["blue", "green", "orange", "pink", "red", "yellow"]),
        "camera": lambda img, rng: night(img, rng, 0.23)},
}
SETS |= {  # `shapes` again, shifted
    "shapes_clean": SETS["shapes"] | {"of": "shapes", "camera": lambda img, rng: img},
    "shapes_sketch": SETS["shapes"] | {"of": "shapes", "style": "sketch"},
    "shapes_noise": SETS["shapes"] | {"of": "shapes", "camera": lambda img, rng: noise(tint(img), rng, 30)},
    "shapes_lowres": SETS["shapes"] | {"of": "shapes", "camera": lambda img, rng: lower(tint(img), 20)},
}


def class_names(name):
    """The classes of data set `name` by label, in an order shuffled by its name."""
    names = list(SETS[name]["classes"])
    random.Random(SETS[name].get("of", name)).shuffle(names)
    return names


def picture(name, classname, number, camera=True):
    """Picture `number` of the class `classname` of data set `name`, (64, 64) RGB.

    It looks the same whatever else is drawn; with camera=False as it was before it was photographed."""
    spec = SETS[name]
    rng = random.Random(f"{spec.get('of', name)}/{classname}/{number}")
    words = scene(rng, **{"style": ["photo", "cartoon"]} | spec["classes"][classname])
    if "style" in spec:
        words["style"] = spec["style"]
    img = draw(words, rng, wild=True)
    return spec["camera"](img, rng) if camera else img


def build(root, name):
    """Writes data set `name` below folder `root` in CoOp's layout, unless it is there.

    root/name/images/CLASS/0000.png and root/name/split_NAME.json:
    {"train": [[path, label, classname], ...], "val": ..., "test": ...}.
    The folder appears whole or not at all. Of several processes one draws and the others wait for it;
    what a killed one left behind is cleared away by the next."""
    folder, root = Path(root) / name, Path(root)
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        for left in root.glob(f".{name}-*"):  # nobody draws but the holder of the lock
            shutil.rmtree(left)
        if not folder.exists():
            work = root / f".{name}-unfinished"
            try:
                write(work, name)
                work.rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def write(folder, name):
    """Draws all pictures of data set `name` into `folder` and writes the split file."""
    split = {part: [] for part in PER_CLASS}
    for label, classname in enumerate(class_names(name)):
        place = folder / "images" / classname.replace(" ", "_")
        place.mkdir(parents=True)
        parts = [part for part, count in PER_CLASS.items() for _ in range(count)]
        for k, part in enumerate(parts):
            picture(name, classname, k).save(place / f"{k:04d}.png", compress_level=1)
            split[part].append([f"{place.name}/{k:04d}.png", label, classname])
    (folder / f"split_{name}.json").write_text(json.dumps(split))


# ---------------------------------------------------------------- the rules, checked

def check(names):
    """Prints the zero-shot accuracy of data sets without and with their cameras, and what the rules say."""
    import open_clip
    import torch

    here = Path(__file__).parent
    catalogue = json.loads((here / "catalogue.json").read_text(encoding="utf-8"))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{here / 'tiny_clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{here / 'tiny_clip'}")
    model.eval()

    @torch.no_grad()
    def zero_shot(name, camera):
        template, right, first = catalogue[name]["template"], [], PER_CLASS["train"] + PER_CLASS["val"]
        w = model.encode_text(tokenizer([template.format(c) for c in class_names(name)]), normalize=True)
        for label, c in enumerate(class_names(name)):
            pixels = [preprocess(picture(name, c, first + k, camera)) for k in range(PER_CLASS["test"])]
            right.append((model.encode_image(torch.stack(pixels)) @ w.T).argmax(-1) == label)
        return 100 * torch.cat(right).float().mean().item()

    print("data set        classes  without camera  with it")
    for name in names:
        plain, seen = zero_shot(name, False), zero_shot(name, True)
        if name == "shapes_clean":
            good = seen >= 90
        elif "of" in SETS[name]:
            good = 30 <= seen <= 95
        else:
            good = plain >= 90 and 50 <= seen <= 80 and 6 <= len(class_names(name)) <= 24
        print(f"{name:<15} {len(class_names(name)):7d} {plain:15.1f} {seen:8.1f}  {'admitted' if good else 'NOT ADMITTED'}")


def sheet():
    """Samples of every data set, a row each."""
    rows = [[picture(n, c, 0) for c in (class_names(n) * 2)[:12]] for n in SETS]
    sheet = Image.new("RGB", (SIZE * 12, SIZE * len(rows)))
    for y, row in enumerate(rows):
        for x, img in enumerate(row):
            sheet.paste(img, (x * SIZE, y * SIZE))
    sheet.save(Path(__file__).parent / "figures" / "world.png", optimize=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2:] or SETS)
    else:
        sheet()
