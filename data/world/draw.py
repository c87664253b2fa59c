"""Draw the images of the embedded benchmark with Pillow.

A scene is a dict with a word for each of the ATTRIBUTES: one object on a background, in a style.
An image depends only on its scene and on `rng`, a random.Random. Do not change the order in which
numbers are taken from `rng`: the tiny CLIP was trained on these images.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

SIZE = 64  # pixels of an image's side
N = 2 * SIZE  # images are drawn at twice the size and reduced

SHAPES = ["arrow", "circle", "cross", "diamond", "heart", "hexagon",
          "house", "moon", "ring", "square", "star", "triangle"]
COLOURS = {
    "blue": (50, 85, 215), "brown": (125, 75, 35), "green": (45, 155, 60),
    "orange": (245, 140, 25), "pink": (245, 130, 185), "purple": (130, 55, 165),
    "red": (215, 35, 40), "yellow": (245, 220, 50),
}
TEXTURES = ["plain", "striped", "dotted", "checkered"]
SIZES = {"small": 15, "medium": 21, "large": 28}  # half the width of the object, in pixels
PLACES = {"center": (0, 0), "left": (-11, 0), "right": (11, 0), "top": (0, -11), "bottom": (0, 11)}
GROUNDS = {
    "grass": (110, 165, 75), "sand": (222, 200, 150), "water": (95, 160, 195),
    "sky": (165, 205, 240), "snow": (238, 242, 246), "bricks": (165, 95, 80),
    "wood": (175, 130, 85), "night": (25, 25, 50),
}
STYLES = ["photo", "sketch", "cartoon", "grainy", "blurry", "faded", "dark", "bright"]
ATTRIBUTES = {"shape": SHAPES, "colour": list(COLOURS), "texture": TEXTURES, "size": list(SIZES),
              "place": list(PLACES), "ground": list(GROUNDS), "style": STYLES}


def sample_scene(rng, **given):
    """Sample a scene, {attribute: word}; `given` fixes attributes to a word or a list of words."""
    scene = {}
    for attribute, choices in ATTRIBUTES.items():
        choices = given.get(attribute, choices)
        scene[attribute] = rng.choice(choices if isinstance(choices, list) else [choices])
    if scene["texture"] != "plain" and "texture" not in given and rng.random() < 0.5:
        scene["texture"] = "plain"
    return scene


# ---------------------------------------------------------------- outlines

def make_polygon(corners, radius=1.0, start=-90):
    """Return the corners (x, y) of a regular polygon, the first at `start` degrees."""
    angles = [np.radians(start + 360 * k / corners) for k in range(corners)]
    return [(radius * np.cos(angle), radius * np.sin(angle)) for angle in angles]


def make_heart():
    angle = np.linspace(0, 2 * np.pi, 30)
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return list(zip(np.sin(angle) ** 3, -y / 16))


def make_moon():
    """Return the corners of a crescent: the left side of a circle, then its inner edge."""
    outer = sorted(make_polygon(24), key=lambda point: np.arctan2(point[1], -point[0]))
    angles = np.radians(np.linspace(62, -62, 12))
    inner = [(.45 + .95 * -np.cos(angle) * .95, .95 * np.sin(angle)) for angle in angles]
    return [point for point in outer if point[0] < .42] + inner


def make_star():
    tips, notches = make_polygon(5), make_polygon(5, .42, -54)
    return [point for pair in zip(tips, notches) for point in pair]


OUTLINES = {  # corners on [-1, 1]^2, x to the right and y down
    "arrow": [(-1, -.25), (.15, -.25), (.15, -.75), (1, 0), (.15, .75), (.15, .25), (-1, .25)],
    "circle": make_polygon(28),
    "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
              (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)],
    "diamond": [(0, -1), (.68, 0), (0, 1), (-.68, 0)],
    "heart": make_heart(),
    "hexagon": make_polygon(6),
    "house": [(0, -1), (.95, -.15), (.65, -.15), (.65, .9), (-.65, .9), (-.65, -.15), (-.95, -.15)],
    "moon": make_moon(),
    "ring": make_polygon(28),  # its hole is half as wide
    "square": [(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)],
    "star": make_star(),
    "triangle": [(0, -.95), (.95, .75), (-.95, .75)],
}


# ---------------------------------------------------------------- images

def draw(scene, rng, wild=False):
    """Draw a scene, (64, 64) RGB. `wild` adds rotation, stretch, clutter and occlusion."""
    style = scene["style"]
    img = draw_ground(scene["ground"], rng)
    if style == "sketch":  # keeps its ground as a faint wash
        img = Image.blend(Image.new("RGB", (N, N), (244, 240, 232)), img, 0.35)
    outlines = place_outlines(scene, rng, wild)
    if wild and rng.random() < 0.6:
        draw_clutter(img, rng)
    mask = Image.new("L", (N, N))
    for outline, value in zip(outlines, (255, 0)):  # the object, its hole
        ImageDraw.Draw(mask).polygon(outline, fill=value)

    colour, pen = COLOURS[scene["colour"]], ImageDraw.Draw(img)
    if style == "sketch":
        ink = clip_colour(np.multiply(colour, .8))
        hatching = hatch(mask)
        img.paste(ink, mask=hatching)
        paint(img, hatching, ink, scene["texture"], rng, lit=False)
        for outline in outlines:
            pen.line(outline + outline[:2], fill=ink, width=4)
    elif style == "cartoon":
        paint(img, mask, colour, scene["texture"], rng, lit=False)
        pen.line(outlines[0] + outlines[0][:2], fill=(15, 15, 15), width=4)
    else:
        img.paste((0, 0, 0), (5, 6), mask.point(lambda v: v // 3))  # shadow
        paint(img, mask, colour, scene["texture"], rng, lit=True)

    if wild and rng.random() < 0.3:  # a bar in front
        x, grey = rng.randint(0, N), rng.randint(60, 200)
        end = x + rng.randint(-40, 40)
        pen.line([x, 0, end, N], fill=(grey, grey, grey), width=rng.randint(5, 11))
    return apply_style(img.reduce(2), style, rng)


def place_outlines(scene, rng, wild):
    """Return the corners of the object in the image; a ring's hole is a second outline."""
    half = 2 * SIZES[scene["size"]] * rng.uniform(.92, 1.08)
    cx, cy = (N / 2 + 2 * offset + rng.uniform(-5, 5) for offset in PLACES[scene["place"]])
    turn = np.radians(rng.uniform(-50, 50) if wild else rng.uniform(-10, 10))
    stretch = (rng.uniform(.72, 1.28), rng.uniform(.72, 1.28)) if wild else (1, 1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners = np.array(OUTLINES[scene["shape"]]) * half * stretch @ rotation + (cx, cy)
    outlines = [[tuple(corner) for corner in corners]]
    if scene["shape"] == "ring":
        outlines.append([((x - cx) * .5 + cx, (y - cy) * .5 + cy) for x, y in outlines[0]])
    return outlines


def draw_ground(ground, rng):
    """Draw the background, (128, 128) RGB."""
    r = rng.randint
    base = np.clip([channel + r(-14, 14) for channel in GROUNDS[ground]], 0, 255)

    def tone(change):
        return clip_colour(base + change)

    img = Image.new("RGB", (N, N), tone(0))
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


def clip_colour(channels):
    """Clip the channels of a colour to 0..255, and truncate them to integers."""
    return tuple(int(channel) for channel in np.clip(channels, 0, 255))


def draw_clutter(img, rng):
    """Draw a few small grey quadrilaterals."""
    for _ in range(rng.randint(1, 4)):
        x, y, w = rng.randint(0, N), rng.randint(0, N), rng.randint(5, 14)
        grey = rng.randint(60, 200)
        corners = [(x + rng.randint(-w, w), y + rng.randint(-w, w)) for _ in range(4)]
        ImageDraw.Draw(img).polygon(corners, fill=(grey, grey, grey))


def hatch(mask):
    """Return the mask reduced to diagonal lines."""
    lines = Image.new("L", (N, N))
    pen = ImageDraw.Draw(lines)
    for x in range(-N, N, 9):
        pen.line([x, N, x + N, 0], fill=255, width=3)
    lines.paste(0, mask=mask.point(lambda v: 255 - v))
    return lines


def paint(img, mask, colour, texture, rng, lit):
    """Fill the mask with the textured colour; `lit` shades it from one side."""
    colour = np.clip(np.array(colour) + [rng.randint(-16, 16) for _ in range(3)], 0, 255)
    second = clip_colour(colour * 0.45 if colour.mean() > 105 else colour + 95)
    fill = Image.new("RGB", (N, N), clip_colour(colour))
    pen = ImageDraw.Draw(fill)
    if texture == "striped":
        for x in range(-N, 2 * N, 14):
            pen.line([x, 0, x + N // 2, N], fill=second, width=5)
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


def apply_style(img, style, rng):
    """Apply the style's filter to the finished image, (64, 64) RGB."""
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
        return add_noise(img, rng, rng.uniform(18, 32))
    return img


# ---------------------------------------------------------------- cameras: (64, 64) RGB to the same

def add_noise(img, rng, sigma):
    """Add Gaussian noise; `sigma` is its standard deviation, on the scale 0 to 255."""
    generator = np.random.default_rng(rng.getrandbits(32))
    noise = generator.normal(0, sigma, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(img) + noise, 0, 255).astype(np.uint8))


def tint(img, factors=(1.0, 0.75, 0.45), gamma=1.5):
    """Apply a gamma curve and multiply the channels by `factors`; the default is warm light."""
    light = (np.asarray(img) / 255) ** gamma * factors
    return Image.fromarray((light * 255).astype(np.uint8))


def wash_out(img, keep):
    """Scale the saturation and the contrast to a light grey by `keep`, 0 to 1."""
    pale = ImageEnhance.Color(img).enhance(keep)
    return Image.blend(Image.new("RGB", img.size, (225, 225, 225)), pale, keep)


def reduce_resolution(img, pixels):
    """Reduce the image to (pixels, pixels) and enlarge it again."""
    small = img.resize((pixels, pixels), Image.Resampling.BOX)
    return small.resize(img.size, Image.Resampling.BICUBIC)


def posterise(img, levels):
    """Quantize every channel to `levels` values."""
    return img.point(lambda v: v * levels // 256 * 255 // (levels - 1))


def turn_hue(img, degrees):
    """Rotate all hues on the colour wheel."""
    hue, saturation, value = img.convert("HSV").split()
    hue = hue.point(lambda v: (v + degrees * 256 // 360) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def add_fog(img, density):
    """Blend with light grey by `density`, 0 to 1, at the top and by half of it at the bottom."""
    veil = np.linspace(density, density / 2, SIZE)[:, None, None]  # (64, 1, 1)
    behind = np.asarray(img.filter(ImageFilter.GaussianBlur(0.7)))
    return Image.fromarray((behind * (1 - veil) + 235 * veil).astype(np.uint8))


def darken(img, rng, light):
    """Scale the brightness by `light`, 0 to 1, with a blue tint and a little noise."""
    return add_noise(tint(img, (0.7 * light, 0.8 * light, light), 1.2), rng, 8)
