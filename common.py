"""What the four methods share, in the order in which a run uses it: flags, the runs of a command,
CLIP, few-shot samples, image features, class features, schedule and batches, evaluation. What no
reader of a method needs (file formats, downloads, the cache, records, tables) is in data/.

Shapes: N images, B of them in a batch, V views of each, C classes, M context tokens, L tokens in
all, W the width of the text tower, D the features'.
"""

import sys

from data.errors import Parser, Problem, number, one_line_errors, several, words

if __name__ == "__main__":      # python common.py: tables, which need none of what follows
    from data import compare
    with one_line_errors():
        compare.main()
    sys.exit()

import argparse
import functools
import math
import os
import random
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import (
    CenterCrop, Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, Resize)
from tqdm import tqdm

from data import backbone, checks, export, predict, records, sweep, text_tower
from data.files import CATALOGUE, Data, Item, known, load_data
from data.images import cached, content_digests, image_key, load_pixels
from data.text_tower import check_length, gradients, in_chunks, nearest_words, pad, text_feature

HERE = Path(__file__).resolve().parent
TINY_CLIP = f"local-dir:{HERE / 'data' / 'tiny_clip'}"
progress = functools.partial(tqdm, disable=None, leave=False)   # no bar without a terminal


# ---------------------------------------------------------------- flags

def flags(doc, lr, batch_size, n_ctx, embedded_lr=None):
    """A parser with the flags of every method; a method adds its own, then calls `parse`.

    The embedded data sets, with their tiny CLIP, may have another learning rate."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    add, count = p.add_argument, number(int, 1, low_ok=True)
    add("--dataset", type=known, default="shapes", metavar="NAME|PATH",
        help="a data set, or a folder of class folders (shapes, which is embedded)")
    add("--data-root", default=str(HERE / "data"), metavar="DIR",
        help="where data sets are, laid out as CoOp's users have them (data)")
    add("--template", metavar="TEXT",
        help="the written prompt, with {} for the class name (the data set's own)")
    add("--skip-unreadable", action="store_true",
        help="leave pictures out that cannot be read, and say how many")
    add("--backbone", metavar="NAME",
        help="an open_clip model or local-dir:PATH (embedded data: the tiny CLIP; else ViT-B-16)")
    add("--pretrained", metavar="TAG",
        help="the weights' open_clip tag or file, or 'random' (openai)")
    add("--shots", type=several(count), default=[4], metavar="N,...",
        help="training images per class (4)")
    add("--seeds", type=several(number(int, 0, low_ok=True)), default=[1], metavar="N,...",
        help="a run for each (1)")
    add("--base-to-new", action="store_true",
        help="learn the first half of the classes, test both halves")
    add("--transfer", type=several(known), default=[], metavar="NAME,...",
        help="other data sets to test what was learned on")
    add("--n-ctx", type=count, default=n_ctx, metavar="N",
        help=f"learned context tokens ({n_ctx})")
    add("--epochs", type=count, metavar="N",
        help="passes over the training images (see the top of this help)")
    also = f"; embedded data: {embedded_lr}" if embedded_lr else ""
    add("--lr", type=number(), help=f"learning rate of SGD ({lr}{also})")
    p.learning_rates = lr, embedded_lr or lr
    add("--batch-size", type=count, default=batch_size, metavar="N",
        help=f"training images per step ({batch_size})")
    add("--views", type=number(int, 0, 2**20, low_ok=True), default=10, metavar="N",
        help="random crops encoded once per training image; 0: new ones every epoch (10)")
    add("--class-chunk", type=count, default=128, metavar="N",
        help="classes per pass of the text tower: fewer, less memory (128)")
    add("--device", choices=["cpu", "cuda"], help="where to compute (cuda where there is one)")
    add("--precision", choices=["fp32", "amp"],
        help="amp is autocast to bf16, else fp16 (amp on cuda, fp32 on cpu)")
    records.add_flags(p, HERE)
    return p


def parse(parser, argv=None):
    """The flags' values, with the defaults that depend on others; makes folders to write to.

    Raises Problem where the flags cannot be met."""
    args = parser.parse_args(argv)
    args.changed = {name: value for name, value in vars(args).items()
                    if value != parser.get_default(name)}
    embedded = CATALOGUE.get(args.dataset, {}).get("kind") == "world"
    args.backbone = args.backbone or (TINY_CLIP if embedded else "ViT-B-16")
    args.lr = args.lr or parser.learning_rates[embedded]
    checks.check_flags(args)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("amp" if args.device == "cuda" else "fp32")
    args.pretrained = args.pretrained or ("" if ":" in args.backbone else "openai")
    if args.device == "cuda":
        torch.cuda.set_device(sweep.local_rank() % torch.cuda.device_count())
    records.check_writable(args.out, args.save, args.shots, args.seeds)
    return args


# ---------------------------------------------------------------- the runs of a command

def runs(script, args, features=True, check=lambda clip, args: None):
    """Yields one Run for every number of shots and every seed, the random numbers seeded.

    script    the method's __file__
    features  False for a method that changes the image tower: it encodes its own training images
    check     (clip, args) -> raises Problem where the method does not suit this CLIP

    What --out has already is left out. Under torchrun, or in a Slurm array, every process takes its
    share. All test pictures are encoded, so found to be there and whole, before a training. Raises
    Problem where the data set cannot serve the protocol."""
    mine, processes = sweep.rank()
    if args.export:
        export.check(args, features)
    data = load_data(args.dataset, args.data_root, args.template)
    others = [load_data(name, args.data_root) for name in args.transfer]
    if args.skip_unreadable:
        data, *others = map(checks.readable, [data, *others])
    about = sweep.about([Path(script), Path(__file__)], args, data, others)
    jobs = sweep.wanted(args, data)
    todo = sweep.left(sweep.share(jobs, mine, processes), about, args)
    if todo:
        clip = load_clip(args, data.crop)
        check(clip, args)
        checks.check_names(clip, data, *others)
        halves = {"base": False, "new": True} if args.base_to_new else {}
        tests = [(name, data, *half(data.test, data.classnames, new))
                 for name, new in halves.items()]
        tests = tests or [("all classes", data, data.test, data.classnames)]
        tests += [(other.name, other, other.test, other.classnames) for other in others]
        parts = [make_part(clip, args, *test) for test in tests]
        asked = [Item(file, 0, "") for file in args.predict]
        asked = asked and make_part(clip, args, "", data, asked, data.classnames)
    for job in todo:
        items, classnames = few_shot(data.train, job.shots, job.seed), data.classnames
        if args.base_to_new:
            items, classnames = half(items, classnames, new=False)
        run = Run(about["method"], args, clip, data, parts, job.shots, job.seed, classnames, items,
                  about, job, asked)
        if features and not args.load:
            run.features = encode_images(clip, items, args.views and args.cache, run.views(0))
        run.started = time.time()
        torch.manual_seed(job.seed)
        yield run
    sweep.summary(jobs, about)


# ---------------------------------------------------------------- CLIP

@dataclass
class Clip:
    """A frozen CLIP."""
    model: torch.nn.Module  # open_clip's, whose `visual` is the image tower
    text: torch.nn.Module   # its text tower
    tokenizer: object
    preprocess: object      # PIL image -> (3, H, W), as CLIP is tested
    augment: object         # the same with a random crop and flip
    logit_scale: float      # tau
    device: str
    precision: str
    key: str                # stands for all that image features depend on beside the image
    class_chunk: int = 128
    seconds: float = 0      # spent on encoding images

    def autocast(self):
        bf16 = self.device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        kind = torch.bfloat16 if bf16 else torch.float16
        return torch.autocast(self.device, kind, enabled=self.precision == "amp")


def load_clip(args, crop=0.08):
    """The CLIP of --backbone and --pretrained. A random crop keeps `crop` to 1 of the area.

    Raises Problem if there is no such model, no weights, or a text tower that is not CLIP's."""
    torch.manual_seed(0)                                        # of --pretrained random
    model, preprocess, tokenizer = backbone.create(args.backbone, args.pretrained, args.device)
    text = backbone.text_tower(model)
    if text.positional_embedding.shape[1] < 256 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)    # threads gain nothing on matrices so small, and wait actively
    size, bicubic = model.visual.preprocess_cfg["size"], InterpolationMode.BICUBIC
    rest = [t for t in preprocess.transforms if not isinstance(t, (Resize, CenterCrop))]
    augment = Compose([RandomResizedCrop(size, (crop, 1.0), interpolation=bicubic),
                       RandomHorizontalFlip(), *rest])
    key = image_key(model.visual, preprocess, augment, args.precision, args.device)
    return Clip(model, text, tokenizer, preprocess, augment, model.logit_scale.exp().item(),
                args.device, args.precision, key, args.class_chunk)


# ---------------------------------------------------------------- few-shot samples, halves

def few_shot(items, shots, seed):
    """CoOp's few-shot sample, draw for draw: `shots` items of each label, or all that it has.

    Labels in order of first appearance. Reproduces the samples that CoOp's authors published."""
    rng, by_label = random.Random(seed), {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    sample = []
    for rows in by_label.values():
        sample += rng.sample(rows, shots) if len(rows) >= shots else rows
    return sample


def half(items, classnames, new):
    """Items of the base (first ceil(C/2)) or new classes, relabelled from 0, and their names."""
    m = math.ceil(len(classnames) / 2)
    keep = range(m, len(classnames)) if new else range(m)
    items = [item._replace(label=item.label - keep.start) for item in items if item.label in keep]
    return items, [classnames[k] for k in keep]


# ---------------------------------------------------------------- images to features

@torch.no_grad()
def encode_images(clip, items, cache, views=None, encode=None, kind=""):
    """Image features f(x), of length 1: (N, D) of the images as they are, or (N, V, D) of `views`.

    views  numbers of augmented views; number k of a picture always looks the same
    cache  the folder where they are kept: each is computed once, whoever asks (None: not kept)
    encode another function than CLIP's image tower, pixels (n, 3, H, W) -> (n, D), whose features
           are taken as they are; it needs a name of its own in the cache, `kind`
    Raises Problem at a picture that is missing or cannot be read."""
    start, paths, each = time.time(), [str(item.path) for item in items], views or [0]
    encode = encode or (lambda x: F.normalize(clip.model.encode_image(x).float(), dim=-1))
    transform = clip.augment if views else clip.preprocess
    # Batches of one size, the last one filled up: else the last bits of a picture's features would
    # depend on its company.
    size = 128 if clip.device == "cuda" else 8

    def compute(rows, missing):                       # row i V + j is view j of picture i
        bar.total, some = bar.n + missing, {}
        for row in rows:
            some.setdefault(row // len(each), []).append(each[row % len(each)])
        chosen = [paths[i] for i in some]
        for pixels in load_pixels(chosen, transform, [*some.values()], size, clip.device):
            n = len(pixels)
            pixels = F.pad(pixels, (0, 0) * 3 + (0, size - n))                # (size, 3, H, W)
            bar.update(n)
            yield encode(pixels)[:n].float().cpu()                            # (n, D)

    with clip.autocast(), progress(desc="encoding images", unit="image", delay=0.5) as bar:
        contents = content_digests(paths, cache) if cache else paths
        names = [(content, view) for content in contents for view in each]
        features = cached(cache, (clip.key, kind, bool(views)), names, compute, 16 * size)
    clip.seconds += time.time() - start
    return (features.unflatten(0, (len(paths), -1)) if views else features).to(clip.device)


# ---------------------------------------------------------------- prompts to class features

def tokenize(clip, text):
    """The token numbers of a text, without start and end; raises Problem if it is too long."""
    tokens, most = clip.tokenizer.encode(text), len(clip.text.positional_embedding) - 2
    if len(tokens) > most:
        raise Problem(f"{text[:60]!r}... is {len(tokens)} tokens long; CLIP reads {most}")
    return tokens


def embed(clip, text):
    """The embeddings of a text's tokens, or of token numbers: (L, W)."""
    tokens = tokenize(clip, text) if isinstance(text, str) else text
    return clip.text.token_embedding(torch.tensor(tokens, dtype=torch.long, device=clip.device))


def start_end(clip):
    """The embeddings of the start-of-text and end-of-text tokens, (1, W) each."""
    return embed(clip, [clip.tokenizer.sot_token_id]), embed(clip, [clip.tokenizer.eot_token_id])


def name_embeddings(clip, classnames):
    """For every class the embeddings of its name and of the "." behind it: a list of two (l, W)."""
    pairs = []
    for classname in classnames:
        name = classname.replace("_", " ")
        length = len(tokenize(clip, name))
        pairs.append(embed(clip, f"{name}.").tensor_split([length]))
    return pairs


def encode_text(clip, prompts):
    """Class features w_c = g(prompt of c), of length 1: (C, D).

    A prompt is a list of parts (l, W), token embeddings without positions, from the start token to
    the end token, where the tower is read. Raises Problem if one is longer than the tower holds.

    Computes what plain_encode_text does, quicker and in less memory: see data/text_tower.py."""
    return text_tower.encode_text(clip, prompts)


def plain_encode_text(clip, prompts):
    """encode_text as one would write it down; a test holds the two together.

    CLIP pads to 77 tokens. The tower is causal: what stands behind the end changes nothing.

    For porters: pre-norm blocks, x += attention(ln_1(x)), x += mlp(ln_2(x)); q, k, v packed in this
    order in in_proj_weight (3 W, W); heads scaled by the root of their width; a causal mask; eps of
    the layer norms 1e-5; QuickGELU, x sigmoid(1.702 x), in OpenAI's models, else the erf GELU."""
    x, last = pad(prompts)                                          # (C, L, W), (C,)
    length = x.shape[1]
    x = x + clip.text.positional_embedding[:length]
    for block in clip.text.transformer.resblocks:
        x = block(x, attn_mask=clip.text.attn_mask[:length, :length])
    x = text_feature(clip.text, x[torch.arange(len(x)), last])      # ln_final, projection: (C, D)
    return F.normalize(x.float(), dim=-1)


@torch.no_grad()
def template_features(clip, template, classnames):
    """CLIP's zero-shot classifier, class features of "a photo of a {}." or the like: (C, D)."""
    start, end = start_end(clip)
    texts = [template.format(classname.replace("_", " ")) for classname in classnames]
    with clip.autocast():
        return encode_text(clip, [[start, embed(clip, text), end] for text in texts])


# ---------------------------------------------------------------- the training's schedule

def default_epochs(run):
    """CoOp's: 50, 100, 100, 200, 200 for 1, 2, 4, 8, 16 shots; 50 on ImageNet."""
    if run.shots < 2 or run.data.name == "imagenet":
        return 50
    return 100 if run.shots < 8 else 200


def learning_rate(epoch, epochs, lr):
    """The authors' schedule: an epoch at 1e-5, then half a cosine, not quite down to 0."""
    return 1e-5 if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


# ---------------------------------------------------------------- batches and evaluation

# What is tested: the pictures' features (N, D), and the written template's class features (C, D).
Part = namedtuple("Part", "name items classnames features zero_shot")


def make_part(clip, args, name, data, items, classnames):
    """A Part, encoded. Raises Problem at a bad picture, or where features are not finite."""
    features = encode_images(clip, items, args.cache)
    zero_shot = template_features(clip, data.template, classnames)
    if not features.isfinite().all() or not zero_shot.isfinite().all():
        raise Problem(f"--backbone {args.backbone} {args.pretrained}: its features are not finite, "
                      "so its weights cannot be right")
    return Part(name, items, classnames, features, zero_shot)


@dataclass
class Run:
    """One training and evaluation: (shots, seed) of a method on a data set."""
    method: str
    args: argparse.Namespace
    clip: Clip
    data: Data
    parts: list       # of Part: all classes, or the base and the new ones; then those of --transfer
    shots: int
    seed: int
    classnames: list  # of the classes to learn: all, or the base half
    items: list       # the few-shot sample, labelled from 0
    about: dict = None             # what the records of all runs of this command say
    job: sweep.Job = None          # which of them this is
    asked: Part = None             # the pictures of --predict
    features: torch.Tensor = None  # of the sample's augmented views, (N, V, D)
    started: float = field(default_factory=time.time)
    logged: dict = field(default_factory=dict)

    def load(self, prompt):
        """Puts what --load holds into `prompt`. Raises Problem if it is of another kind."""
        records.load(self, prompt)

    @functools.cached_property
    def labels(self):
        """The labels of the few-shot sample, (N,)."""
        return torch.tensor([item.label for item in self.items], device=self.clip.device)

    def plan(self, epoch):
        """The batches of an epoch, [(rows (B,), views (B,))]: the images shuffled, a view of each.

        A last batch that is not full is dropped unless it is the only one, as in CoOp's code."""
        rng = torch.Generator().manual_seed(1000003 * self.seed + epoch)
        n, size = len(self.items), self.args.batch_size
        order = torch.randperm(n, generator=rng)
        views = torch.randint(self.args.views or 1, (n,), generator=rng)
        batches = zip(order.split(size), views.split(size))
        return list(batches)[:max(1, n // size)]

    def views(self, epoch):
        """The numbers of the random crops that an epoch draws from; with --views 0 a new one."""
        return list(range(self.args.views)) or [epoch]

    def batches(self, epoch):
        """Yields (f(x) (B, D), labels (B,)) of the epoch's batches."""
        if epoch and not self.args.views:
            self.features = encode_images(self.clip, self.items, None, self.views(epoch))
        for rows, views in self.plan(epoch):
            yield self.features[rows, views], self.labels[rows]

    def pixel_batches(self, epoch):
        """Yields (pixels (B, 3, H, W), labels, rows, views (B,) each) of the epoch's batches.

        For a method that changes the image tower."""
        plan, numbers = self.plan(epoch), self.views(epoch)
        paths = [self.items[row].path for rows, _ in plan for row in rows]
        views = [[numbers[view]] for _, some in plan for view in some]
        size, device = self.args.batch_size, self.clip.device
        loader = load_pixels(paths, self.clip.augment, views, size, device)
        for (rows, views), pixels in zip(plan, loader):
            yield pixels, self.labels[rows], rows, views

    def log(self, epoch, **values):
        """Notes what a step computed, numbers or tensors; the record holds means over an epoch."""
        if epoch not in self.logged.get("loss", [epoch]):
            self.check_finite()  # once an epoch: a GPU is not made to wait at every step
        for name, value in values.items():
            steps = self.logged.setdefault(name, {}).setdefault(epoch, [])
            steps.append(torch.as_tensor(value).detach())

    def check_finite(self, *tensors):
        """Raises Problem if the last epoch's loss, or one of the tensors, is not finite."""
        epoch, losses = next(reversed(self.logged.get("loss", {}).items()), (0, [torch.zeros(())]))
        losses = torch.stack(losses)
        if not all(tensor.isfinite().all() for tensor in (losses, *tensors)):
            if self.args.load:
                raise Problem(f"--load {self.job.file}: its numbers or features are not finite")
            raise Problem(f"the training failed in epoch {epoch + 1}, with loss {losses.mean():g}: "
                          f"try a smaller --lr than {self.args.lr:g}")

    def history(self):
        """What was logged: {name: list over epochs}."""
        return {name: [torch.stack(steps).double().mean(0).tolist() for steps in epochs.values()]
                for name, epochs in self.logged.items()}

    @torch.no_grad()
    def classifiers(self, prompt, part):
        """[(image features (N, D), class features (C, D))]: zero-shot CLIP's, and the prompt's."""
        f = part.features
        if hasattr(prompt, "image_features"):  # prompts in the image tower as well
            f = encode_images(self.clip, part.items, None, encode=prompt.image_features)
        with self.clip.autocast():
            w = prompt.class_features(part.classnames)
        self.check_finite(f, w)
        return [(part.features, part.zero_shot), (f, w.float())]

    def evaluate(self, prompt, part):
        """Percent of the pictures that the template and the prompt put into their class."""
        labels = torch.tensor([item.label for item in part.items], device=self.clip.device)
        zero_shot, predicted = ((f @ w.T).argmax(-1) for f, w in self.classifiers(prompt, part))
        percent = lambda classes: 100 * classes.eq(labels).double().mean().item()
        return {"zero_shot": percent(zero_shot), "accuracy": percent(predicted),
                "per_class": records.per_class(part.classnames, labels, predicted)}

    def finish(self, prompt, **more):
        """Evaluates a prompt, saves it (unless it was loaded), records and prints it.

        prompt  a Module with class_features(classnames) -> (C, D)
        more    what the method has to tell beside what it logged"""
        trained = time.time()
        self.check_finite(*prompt.parameters())
        rows = {part.name: self.evaluate(prompt, part) for part in self.parts}
        if self.args.save and not self.args.load:
            records.save(self, prompt)
        if self.args.export:
            export.write(self, prompt, learning_rate, rows)
        record = records.add(self, prompt, rows, trained, more)  # before printing, which may fail
        self.clip.seconds = 0
        sweep.show(self.job.title, record)
        if self.asked:
            predict.show(self, *self.classifiers(prompt, self.asked))
