"""The flags of the four methods: what they are, what --load fills in, and what goes together.

check_flags: with each other; check_data, check_clip: with data and with CLIP."""

import argparse
import contextlib
import copy
import math
import os
from functools import partial

import torch
from safetensors.torch import load_file

from data.errors import Parser, Problem
from data.features import tensor_digest
from data.load import FOLDER, check_template, dataset_names, is_embedded, listed
from data.results import records


# ---------------------------------------------------------------- argparse types

def bounded(text, kind, low, what):
    """Return a number of at least `low`. Raises argparse's error if a flag's text is none."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value < (2**31 if kind is int else math.inf):
            return value
    raise argparse.ArgumentTypeError(f"{text[:40]!r}: wants {what}")


def split(text, kind):
    """Return a list of values, separated by commas."""
    return [kind(part) for part in text.split(",")]


count = partial(bounded, kind=int, low=1, what="a whole number above 0")
whole = partial(bounded, kind=int, low=0, what="a whole number, 0 or more")
positive = partial(bounded, kind=float, low=math.ulp(0), what="a number above 0")
nonnegative = partial(bounded, kind=float, low=0, what="a number, 0 or more")
counts, wholes, nonnegatives = (partial(split, kind=kind) for kind in (count, whole, nonnegative))


def words(value):
    """Return the words of a context, which may also be written a_photo_of_a."""
    found = " ".join(value.replace("_", " ").split())
    if not found or set("{}") & set(found):
        raise argparse.ArgumentTypeError(f"{value!r}: wants words, and no braces")
    return found


# ---------------------------------------------------------------- the flags

def flags(doc, lr, batch_size, n_ctx, embedded_lr=None):
    """Return a parser with the flags of every method; a method adds its own.

    embedded_lr  the default learning rate on the embedded data sets, if it differs"""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    also = f"; embedded data: {embedded_lr}" if embedded_lr else ""

    add = p.add_argument_group("data and CLIP").add_argument
    add("--dataset", type=dataset_names, metavar="NAME,...",
        help="data sets, folders of class folders, or all of 'embedded' or 'papers' (shapes)")
    add("--data-root", default=str(FOLDER), metavar="DIR",
        help="where data sets are, laid out as CoOp's users have them (data/sets)")
    add("--template", type=check_template, metavar="TEXT",
        help="hand-crafted prompt, {} for the class name; several, separated by |, are averaged")
    add("--test-images", type=count, metavar="N",
        help="test on a random sample of N images, equally many of each class (all)")
    add("--validation", action="store_true",
        help="test on the validation images instead: to choose settings")
    add("--backbone", metavar="NAME",
        help="open_clip's, local-dir:PATH or tiny_clip (embedded data: tiny_clip; else ViT-B-16)")
    add("--pretrained", metavar="TAG",
        help="the weights: an open_clip tag, 'random', or a file, beside --backbone (openai)")
    add("--device", choices=["cpu", "cuda"], help="(embedded data: cpu; else cuda if there is one)")
    add("--precision", choices=["fp32", "amp"],
        help="amp: image features and, on a GPU, training in 16 bits (amp on cuda, fp32 on cpu)")
    add("--class-chunk", type=count, metavar="N",
        help="classes per pass of the text encoder: fewer, less memory (cpu: 128, cuda: 1024)")

    add = p.add_argument_group("training").add_argument
    add("--shots", type=counts, default=[4], metavar="N,...",
        help="training images per class (4)")
    add("--seeds", type=wholes, default=[1], metavar="N,...", help="a run for each (1)")
    add("--epochs", type=count, metavar="N",
        help="passes over the training images (50, 100 or 200, by the shots; RESTORE: 10)")
    add("--lr", type=positive, default=(lr, embedded_lr or lr),     # `settle` takes one of them
        help=f"learning rate ({lr}{also})")
    add("--batch-size", type=count, default=batch_size, metavar="N",
        help=f"training images per step ({batch_size})")
    add("--views", type=whole, default=10, metavar="N",
        help="random crops encoded once per training image; 0: new ones every epoch (10)")
    add("--n-ctx", type=count, default=n_ctx, metavar="N",
        help=f"learned context tokens ({n_ctx})")

    add = p.add_argument_group("evaluation").add_argument
    add("--base-to-new", action="store_true",
        help="train on the first half of the classes, test each half among its own classes")
    add("--transfer", type=dataset_names, default=[], metavar="NAME,...",
        help="other data sets to test the prompt on")
    add("--load", metavar="FILE",
        help="test this saved prompt, with its data set, template and CLIP, instead of training")
    add("--predict", nargs="+", default=[], metavar="IMAGE",
        help="images to name the class of, after the training or with --load")

    add = p.add_argument_group("output").add_argument
    add("--out", default="runs/results.jsonl", metavar="FILE",
        help="a line of results is added here for every run (runs/results.jsonl)")
    add("--again", action="store_true", help="repeat runs that --out has already")
    add("--save", metavar="FILE", help="save the prompt of a single run")
    add("--export", metavar="FILE",
        help="write the run, to repeat it in another framework (data/results/export.py)")
    add("--cache", metavar="DIR",
        help="where image features are kept (DATA_ROOT/cache)")
    return p


def parse(parser, argv=None):
    """Return the values of all flags; `typed` holds those that were given.

    With --load, flags of the training come from the prompt file. Raises Problem where flags do not
    go together."""
    # argparse puts no default over what a Namespace holds: `missing` stays where no flag is given.
    defaults, missing = vars(parser.parse_args([])), object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, missing)))
    typed = {name: value for name, value in vars(given).items() if value is not missing}
    args = argparse.Namespace(**{**defaults, **typed}, defaults=defaults, typed=typed)
    args.cache = args.cache or os.path.join(args.data_root, "cache")
    args.origin = records.read_origin(args.load) if args.load else None
    if args.origin:
        take_from(args, args.origin)
    args.dataset = args.dataset or ["shapes"]
    check_flags(args)
    return args


def take_from(args, origin):
    """Fill args from the origin of a saved prompt, see data/results/records.py.

    A typed data set or CLIP wins; other flags of the training that contradict it raise Problem."""
    trained = {"shots": [origin["shots"]], "seeds": [origin["seed"]], **origin["flags"]}
    free = {"dataset": [origin["dataset"]]}
    if "backbone" not in args.typed:
        free |= {"backbone": origin["backbone"], "pretrained": origin["pretrained"]}
    for name in records.OF_A_TEST:
        trained.pop(name, None)
    if args.typed.get("dataset", free["dataset"]) == free["dataset"]:   # others have their own
        free["template"] = origin["flags"].get("template")
    for name, value in trained.items():
        if args.typed.get(name, value) != value:
            raise Problem(f"--load {args.load}: was not trained with --{name.replace('_', '-')} "
                          + str(args.typed[name]).strip("[]"))
    for name, value in {**free, **trained, **args.typed}.items():
        setattr(args, name, value)


def settle(args, dataset):
    """Return a copy of the flags for one data set, with the defaults that depend on it."""
    args, embedded = copy.copy(args), is_embedded(dataset)
    args.dataset = dataset
    usual_lr = args.defaults["lr"][embedded]
    args.lr = usual_lr if args.lr == args.defaults["lr"] else args.lr
    if not args.backbone and os.path.isfile(args.pretrained or ""):
        raise Problem(f"--pretrained {args.pretrained}: wants --backbone, whose name tells the "
                      "activation: ViT-B-16-quickgelu (as OpenAI's weights) or ViT-B-16")
    args.backbone = args.backbone or ("tiny_clip" if embedded else "ViT-B-16")
    local = args.backbone == "tiny_clip" or args.backbone.startswith("local-dir:")
    if local and args.pretrained:
        raise Problem(f"--pretrained {args.pretrained}: {args.backbone} holds its own weights; "
                      "another --backbone takes a tag")
    args.pretrained = args.pretrained or ("" if local else "openai")
    cuda = torch.cuda.is_available()        # warns if the driver is too old
    if args.device == "cuda" and not cuda:
        raise Problem("--device cuda: PyTorch sees no CUDA device here; "
                      "leave the flag out to use the CPU")
    args.device = args.device or ("cuda" if cuda and not embedded else "cpu")
    usual_precision = "amp" if args.device == "cuda" else "fp32"
    args.precision = args.precision or usual_precision
    args.defaults = {**args.defaults, "lr": usual_lr, "precision": usual_precision}
    args.class_chunk = args.class_chunk or (1024 if args.device == "cuda" else 128)
    return args


def check_flags(args):
    """Raise Problem where flags do not go together, or where a run could not write its results."""
    for name, value in args.typed.items():
        if isinstance(value, str) and not value.strip():
            raise Problem(f"--{name.replace('_', '-')}: is empty")
    if set(args.transfer) & set(args.dataset):
        raise Problem("--transfer: names the data set that is learned")
    if getattr(args, "class_specific", False) and (args.base_to_new or args.transfer):
        raise Problem("--class-specific has no context for classes that were not learned: "
                      "no --base-to-new, no --transfer")
    if {"n_ctx", "ctx_init"} <= {*args.typed} and not args.defaults["ctx_init"] and not args.load:
        raise Problem("--n-ctx beside --ctx-init: take one of them, either tells how many tokens")
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


def check_data(args, data):
    """Raise Problem where a data set does not serve the protocol; print its note."""
    if args.base_to_new and len(data.classnames) < 4:
        raise Problem(f"{data.name}: --base-to-new needs two classes or more in each half")
    if not data.train and not args.load:
        raise Problem(f"{data.name} has no training images; it is for --transfer or --load")
    if data.note:
        print(f"{data.name}: {data.note}")


def check_clip(args, clip, sets, method):
    """Raise Problem where CLIP does not serve the data sets, or the prompt of --load."""
    check_names(args, clip, sets)
    if args.origin:
        check_origin(args, method, clip.weights, sets[0])


def check_names(args, clip, sets):
    """Raise Problem where classes of a user's folder have the same prompt; name unknown words.

    The published ImageNet has two such pairs. The tiny CLIP's embeddings of words that it has
    never met are zeros."""
    met = clip.text.token_embedding.weight.ne(0).any(-1).tolist()
    texts = [(args.template or "").replace("|", " "), getattr(args, "ctx_init", "") or ""]
    for data in sets:
        prompts = {}
        for name in data.classnames:
            text = " ".join(name.replace("_", " ").split())
            tokens = tuple(clip.tokenizer.encode(text))
            if data.own and tokens in prompts:
                raise Problem(f"{data.name}: classes {prompts[tokens]!r} and {name!r} have the "
                              "same prompt; give each class a name of its own")
            prompts[tokens] = name
            texts.append(text)
    words = dict.fromkeys(word.strip(".,") for text in texts for word in text.split())
    words = [word for word in words if word not in ("", "{}")]
    strange = [word for word in words if not all(met[t] for t in clip.tokenizer.encode(word))]
    if strange:
        print(f"this CLIP has never met {listed([*map(repr, strange)])}; for your own images take "
              "--backbone ViT-B-16 (a download of 600 MB)")


def check_origin(args, method, weights, data):
    """Raise Problem where the prompt of --load cannot be tested as the flags ask for it."""
    origin, start = args.origin, f"--load {args.load}: "
    learned, classes = {*map(tuple, origin["classes"])}, list(enumerate(data.classnames))
    if origin["method"] != method:
        raise Problem(f"{start}was saved by {origin['method']}, not by {method}")
    if tensor_digest(load_file(args.load)) != origin["tensors"]:
        raise Problem(f"{start}is damaged: its tensors have changed")
    if origin["weights"] != weights:
        name = f"{origin['backbone']} {origin['pretrained']}".strip()
        raise Problem(f"{start}was trained with other weights ({name})")
    if args.base_to_new and learned & {*classes[(len(classes) + 1) // 2:]}:
        raise Problem(f"{start}was trained on classes of the new half, too")
    if getattr(args, "class_specific", False) and learned != {*classes}:
        raise Problem(f"{start}holds contexts of other classes (--class-specific)")
