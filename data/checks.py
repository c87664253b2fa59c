"""Checks before a run: data sets, class names, saved prompts."""

from data.errors import Problem
from data.features import read_whole, tensor_digest


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
    if tensor_digest(read_whole(args.load, "--load")) != origin["tensors"]:
        raise Problem(f"{start}is damaged: its tensors have changed")
    if origin["weights"] != weights:
        name = f"{origin['backbone']} {origin['pretrained']}".strip()
        raise Problem(f"{start}was trained with other weights ({name})")
    if args.base_to_new and learned & {*classes[(len(classes) + 1) // 2:]}:
        raise Problem(f"{start}was trained on classes of the new half, too")
    if getattr(args, "class_specific", False) and learned != {*classes}:
        raise Problem(f"{start}holds contexts of other classes (--class-specific)")
