"""Do the flags go together, are the class names fit for prompts, can the pictures be read?"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from PIL import Image
from tqdm import tqdm

from data.errors import Problem, regular_file


def check_flags(args):
    """Raises Problem where flags do not go together, or with this machine; else says what comes."""
    if args.pretrained and args.backbone.startswith("local-dir:"):
        raise Problem(f"--pretrained {args.pretrained}: {args.backbone} holds its own weights")
    if len(set(args.transfer)) < len(args.transfer):
        raise Problem(f"--transfer {','.join(args.transfer)}: names a data set twice")
    before, *behind = (args.template or "{}").split("{}")
    if len(behind) != 1 or set("{}") & {*before, *behind[0]}:
        raise Problem(f"--template {args.template!r}: needs one {{}}, where the class name stands, "
                      "and no other braces")
    if getattr(args, "class_specific", False) and (args.base_to_new or args.transfer):
        raise Problem("--class-specific has no context for classes that were not learned: "
                      "no --base-to-new, no --transfer")
    import torch  # here, since python common.py --data does without

    if args.device == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda: PyTorch sees no CUDA device here; "
                      "leave the flag out to use the CPU")
    if sys.stderr and sys.stderr.isatty():
        print("reading the model and the pictures ...", file=sys.stderr)


def check_names(clip, *data_sets):
    """Prints a line if the text tower has never met words of the class names, as the tiny CLIP.

    Raises Problem where two classes have the same prompt or one has no name. ImageNet's published
    names hold two such pairs, so that a published data set is only told of."""
    met = clip.text.token_embedding.weight.ne(0).any(-1).tolist()  # never met: zeros
    for data in data_sets:
        check_names_of(clip, met, data)


def check_names_of(clip, met, data):
    prompts, seen, strange = {}, {}, []
    for name in data.classnames:
        words = name.replace("_", " ").split()
        tokens = tuple(clip.tokenizer.encode(data.template.format(" ".join(words))))
        if not words:
            raise Problem(f"{data.name}: there is a class without a name")
        if tokens in prompts:
            same = f"{data.name}: the classes {prompts[tokens]!r} and {name!r} have the same prompt"
            if data.origin != "published split":
                raise Problem(f"{same}; give each class a name of its own")
            print(same)
        prompts[tokens] = name
        seen.setdefault(tuple(token if met[token] else None for token in tokens), set()).add(name)
        strange += [word for word in words if not all(met[t] for t in clip.tokenizer.encode(word))]
    if strange:
        alike = max(seen.values(), key=len)
        print(f"{data.name}: this CLIP has never met {listed(dict.fromkeys(strange))}"
              + f" and cannot tell apart {listed(sorted(alike))}" * (len(alike) > 1)
              + "; for your own pictures take --backbone ViT-B-16 (a download of 600 MB)")


def listed(names):
    names = list(names)
    return ", ".join(map(repr, names[:4])) + f" and {len(names) - 4} more" * (len(names) > 4)


def readable(data):
    """The data set without the pictures that cannot be read, whose number is added to its note.

    Raises Problem where none is left to test on."""
    parts = {part: getattr(data, part) for part in ("train", "val", "test")}
    broken = unreadable([item.path for items in parts.values() for item in items])
    if not broken:
        return data
    gone = set(broken)
    parts = {part: [i for i in items if i.path not in gone] for part, items in parts.items()}
    if not parts["test"]:
        raise Problem(f"{data.name}: no picture that can be read is left to test on")
    note = f"{len(broken)} pictures cannot be read and are left out, first {broken[0]}"
    return replace(data, **parts, note="; ".join(filter(None, [data.note, note])))


def unreadable(paths):
    """Those of the pictures that Pillow cannot read from beginning to end."""
    def look(path):
        try:
            with Image.open(regular_file(path)) as image:
                image.draft("RGB", (64, 64))  # a JPEG is read whole, but few of its pixels are made
                image.load()
        except Exception:  # Pillow's decoders raise anything
            return path

    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, paths), "looking at pictures", len(paths), False, disable=None)
        return [path for path in looked if path]
