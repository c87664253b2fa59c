"""Checks before a run: flags that do not go together, class names, saved prompts."""

import os

from data.errors import Problem
from data.results import records


def flags(args):
    """Raise Problem where flags do not go together, or where a run could not write its results."""
    if len(set(args.transfer)) < len(args.transfer) or set(args.transfer) & set(args.dataset):
        raise Problem("--transfer: names a data set twice, or the one that is learned")
    if getattr(args, "class_specific", False) and (args.base_to_new or args.transfer):
        raise Problem("--class-specific has no context for classes that were not learned: "
                      "no --base-to-new, no --transfer")
    if {"n_ctx", "ctx_init"} <= {*args.typed} and not args.defaults["ctx_init"] and not args.load:
        raise Problem("--n-ctx beside --ctx-init: the words decide how many tokens are learned")
    if args.views > 1000:
        raise Problem(f"--views {args.views}: wants at most 1000")
    runs = [(dataset, shots, seed) for dataset in args.dataset for shots in args.shots
            for seed in args.seeds]
    if len(set(runs)) < len(runs):
        raise Problem("--dataset, --shots or --seeds name something twice")
    for flag in ("load", "save", "export"):
        if getattr(args, flag) and len(runs) > 1:
            raise Problem(f"--{flag}: wants a single run")
    if args.load and (args.save or args.export):
        raise Problem("--load beside --save or --export: the prompt is trained already")
    if args.export and not args.views:
        raise Problem("--export: wants --views above 0")
    files = {"results": args.out, "prompt": args.save, "export": args.export}
    files = {kind: file for kind, file in files.items() if file}
    if len({os.path.realpath(file) for file in files.values()}) < len(files):
        raise Problem("--out, --save and --export name the same file")
    for kind, file in files.items():
        records.check_output(file, kind)


def protocol(data, args):
    """Raise Problem where a data set cannot serve the protocol; print its note."""
    half, labels = (len(data.classnames) + 1) // 2, {item.label for item in data.test}
    if args.base_to_new and (len(data.classnames) < 4 or min(labels) >= half or max(labels) < half):
        raise Problem(f"{data.name}: --base-to-new needs two classes or more in each half")
    if not data.train and not args.load:
        raise Problem(f"{data.name} has no training images; it is for --transfer or --load")
    if data.note:
        print(f"{data.name}: {data.note}")


def names(clip, args, sets):
    """Raise Problem where two classes have the same prompt; name words that a CLIP has never met.

    ImageNet's published names hold two such pairs: a published data set is only told of. The tiny
    CLIP's embeddings of words that it has never met are zeros."""
    met = clip.text.token_embedding.weight.ne(0).any(-1).tolist()
    texts = [(args.template or "").replace("|", " "), getattr(args, "ctx_init", "") or ""]
    for data in sets:
        prompts = {}
        for name in data.classnames:
            text = " ".join(name.replace("_", " ").split())
            tokens = tuple(clip.tokenizer.encode(text))
            if tokens in prompts:
                line = f"{data.name}: classes {prompts[tokens]!r} and {name!r} have the same prompt"
                if data.own:
                    raise Problem(f"{line}; give each class a name of its own")
                print(line)
            prompts[tokens] = name
            texts.append(text)
    words = dict.fromkeys(word for text in texts for word in text.replace("{}", " ").split())
    strange = [word for word in words if not all(met[t] for t in clip.tokenizer.encode(word))]
    if strange:
        more = f" and {len(strange) - 4} more" * (len(strange) > 4)
        print(f"this CLIP has never met {', '.join(map(repr, strange[:4]))}{more}; for your own "
              "images take --backbone ViT-B-16 (a download of 600 MB)")


def origin(args, method, weights, data):
    """Raise Problem where the prompt of --load cannot be tested as the flags ask for it."""
    origin, start = args.origin, f"--load {args.load}: "
    learned, classes = {*map(tuple, origin["classes"])}, list(enumerate(data.classnames))
    if origin["method"] != method:
        raise Problem(f"{start}was saved by {origin['method']}, not by {method}")
    if origin["weights"] != weights:
        name = f"{origin['backbone']} {origin['pretrained']}".strip()
        raise Problem(f"{start}was trained with other weights ({name})")
    if args.base_to_new and learned & {*classes[(len(classes) + 1) // 2:]}:
        raise Problem(f"{start}was trained on classes of the new half, too")
    if getattr(args, "class_specific", False) and learned != {*classes}:
        raise Problem(f"{start}holds contexts of other classes (--class-specific)")
