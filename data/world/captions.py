"""Write captions for scenes: short sentences, and long captions as on the web."""

import re

HOW = {  # ways to introduce an image of each style
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
SYNONYMS = {
    "small": ["small", "little", "tiny"], "large": ["large", "big", "huge"],
    "center": ["in the center", "in the middle"],
    "left": ["on the left", "at the left side"], "right": ["on the right", "at the right side"],
    "top": ["at the top", "up high"], "bottom": ["at the bottom", "down low"],
    "striped": ["striped", "with stripes"], "dotted": ["dotted", "with dots"],
    "checkered": ["checkered", "with checks"], "plain": ["plain", "of one colour"],
}
CHANCES = {"size": .25, "colour": .85, "texture": .3, "shape": .9, "place": .25, "ground": .35,
           "style": .4}  # of being told

# Neutral text of long captions, with slots that are filled from FILL.
FRONT = ["in this picture,", "as you can see,", "here is", "look,", "new:", "hello,",
         "picture of the day {number}:", "number {number}:", "img {number} jpg", "from my album:",
         "copyright {number} {name},", "{name} and {name} made this,", "posted by {name},",
         "last {day} in {town},", "{month} {number},", "for sale,", "i like this one,",
         "according to the label,", "my friend {name} sent me this,", "breaking news:",
         "a test of the new camera:", "this picture, which was cropped, shows",
         "we were told that this is", "do you know what this is?", "page not found,",
         "best wishes from {town},", "free shipping,", "view {number} of {number},",
         "thanks for looking,", "here we go again,", "a gift for {name},", "stock image,"]
BACK = ["taken by {name}", "in {town}", "on {day}", "for the album", "free to use",
        "all rights reserved", "number {number} of {number}", "thanks for looking",
        "posted in {month}", "and nothing else", "isn't it nice", "a type of picture",
        "img {number}", "as seen on tv", "by {name} and {name}", "stock image"]
FILL = {
    "name": "anna ben clara david emma felix greta hugo ida jonas lena max nina otto paula",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "month": "january february march april may june july august september october",
    "town": "berlin london paris rome madrid oslo vienna tokyo boston lima cairo",
    "number": "3 7 12 48 60 95 2014 2017 2019 2021",
}


def short_caption(scene, rng):
    """Write a sentence about the scene that leaves attributes out at random.

    Returns the text and what it tells of the scene, {attribute: word}. The word "photo" tells
    nothing: every image may be called a photo."""
    def say(attribute):
        return rng.choice(SYNONYMS.get(scene[attribute], [scene[attribute]]))

    told = {attribute for attribute, chance in CHANCES.items() if rng.random() < chance}
    if rng.random() < 0.06:  # the ground alone
        told = {"ground"} | (told & {"style"})
    if scene["size"] == "medium":
        told.discard("size")

    if told - {"style"} == {"ground"}:
        thing = rng.choice([say("ground"), f"a background of {say('ground')}",
                            f"something on {say('ground')}"])
    else:
        thing = describe_object(scene, told, say, rng)
        if "ground" in told and rng.random() < 0.15:
            thing = f"{say('ground')} with {thing}"
        elif "ground" in told:
            thing = f"{thing} {rng.choice(['on', 'over', 'in front of'])} {say('ground')}"
        if "place" in told:
            thing += " " + say("place")

    how = rng.choice(HOW[scene["style"]] if "style" in told else PLAIN)
    if scene["style"] == "photo":
        told.discard("style")
    text = f"{how} {thing}{rng.choice(['.', '.', ''])}".strip()
    return text, {attribute: scene[attribute] for attribute in told}


def describe_object(scene, told, say, rng):
    """Write an article, the adjectives that are told, and the shape."""
    words = [say(attribute) for attribute in ("size", "colour", "texture") if attribute in told]
    words.append(say("shape") if "shape" in told else rng.choice(["thing", "object", "shape"]))
    if "texture" in told and " " in words[-2]:  # a square with stripes
        words[-2:] = words[-1], words[-2]
    if "colour" in told and rng.random() < 0.1:  # an arrow that is blue
        words.remove(scene["colour"])
        words += ["that", "is", scene["colour"]]
    article = rng.choice(["a", "a", "a", "the", "one"])
    if article == "a" and words[0][0] in "ao":
        article = "an"
    return " ".join([article] + words)


def long_caption(scene, rng):
    """Write a sentence or its tags between neutral text, about 4 to 40 tokens in all."""
    text, told = short_caption(scene, rng)
    if told and rng.random() < 0.1:
        text = list_tags(told, rng)
    parts = [text.rstrip(".")]
    if rng.random() < 0.75:
        parts.insert(0, write_front(rng.randint(1, 14), rng))
    if rng.random() < 0.35:
        parts.append(fill(rng.choice(BACK), rng))
    if rng.random() < 0.1:  # a tag at the end
        attribute = rng.choice(["shape", "colour"])
        parts.append(list_tags({attribute: scene[attribute]}, rng))
    return " ".join(parts) + rng.choice([".", ".", ""])


def write_front(count, rng):
    """Write `count` words of neutral text: phrases cut at their start, or words in any order."""
    words = []
    while len(words) < count:
        words += fill(rng.choice(FRONT), rng).split()
    if rng.random() < 0.25:
        rng.shuffle(words)
    return " ".join(words[-count:])


def list_tags(told, rng):
    """Write attributes as a list, as a table or as hashtags, in random order."""
    tags = [(a, rng.choice(SYNONYMS.get(word, [word]))) for a, word in sorted(told.items())]
    rng.shuffle(tags)
    form, between = rng.choice([("{1}", ", "), ("{0}: {1}", ", "), ("#{1}", " ")])
    return between.join(form.format(*tag) for tag in tags)


def fill(phrase, rng):
    """Fill the slots of a phrase with random words."""
    return re.sub(r"{(\w+)}", lambda slot: rng.choice(FILL[slot[1]].split()), phrase)
