"""What the four methods share. A script's main() is one loop over the runs of a command:

    runs            reads the flags. For every data set: load and check everything (runs_on);
                    for every number of shots and seed: draw the few-shot sample, and yield a Run
      Prompt        the script's: class_features(part) -> (C, D), unit-norm. A method that changes
                    the image encoder has image_features(pixels) -> (n, D), too
      Run.start     encode test images and templates; then the sample's views, or load a prompt
      train         the script's: for each epoch, for each batch of Run.batches (or pixel_batches):
                    class features, loss, step, Run.log
      Run.finish    classify the test images; record, save, print

Files: data/sets/NAME       images and split: drawn, downloaded, or put there by you (load_data)
       data/sets/cache      digests of image files, image features (add_contents, encode_images)
       runs/results.jsonl   a line for each run, by which it is skipped later (Run.finish, runs)

All arithmetic from normalized pixels to accuracies is here, in the script or open_clip's. data/
holds the rest: flags, data sets, CLIP's weights, pixels, the cache, records and tables.

Shapes: N images, B in a mini-batch, n any number of them, V augmented views of each image. C
classes, c of them in a chunk (but w_c is the feature of class c). M context vectors, l tokens in a
piece of a prompt; S tokens that all prompts share, and L after them. W the width of the text
encoder, but of the image in (n, 3, H, W). D the dimension of the features.
"""

import sys

from data.errors import Problem, one_line_errors
from data.results import tables

if __name__ == "__main__":      # python common.py: tables of recorded runs, without importing torch
    with one_line_errors():
        tables.main()
    sys.exit()

import copy
import functools
import inspect
import itertools
import json
import math
import os
import platform
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import (
    Compose, InterpolationMode, PILToTensor, RandomHorizontalFlip, RandomResizedCrop)
from tqdm import tqdm

from data import features, weights
from data.flags import (        # noqa: F401  most are for the scripts
    check_clip, check_data, count, flags, nonnegative, nonnegatives, parse, positive, settle, whole,
    words)
from data.load import Data, Item, load_data
from data.results import export, records

THREADS = torch.get_num_threads()       # as PyTorch found them; a small CLIP gets one
progress = functools.partial(tqdm, disable=None, leave=False)   # no bar without a terminal


# ---------------------------------------------------------------- the runs of a command

def runs(script, parser, argv=None):
    """Yield a Run for every data set, number of shots and seed, with the random numbers seeded.

    script  the method's __file__

    Skips runs that --out has already. Under torchrun every process takes its share."""
    args, number = parse(parser, argv), itertools.count(1)
    jobs = share(list(itertools.product(args.dataset, args.shots, args.seeds)))
    for dataset, group in itertools.groupby(jobs, key=lambda job: job[0]):
        pairs = [(shots, seed) for _, shots, seed in group]
        for run in runs_on(dataset, pairs, script, settle(args, dataset)):
            if len(jobs) > 1:
                run.title += f", run {next(number)} of {len(jobs)}"
            if record := records.find(run):
                tables.show_run(run.title, record, f"already in {args.out}; --again repeats it")
            else:
                torch.manual_seed(run.seed)
                yield run


def share(jobs):
    """Return this process's part of the jobs: under torchrun a block of neighbours, else all."""
    if not ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        return jobs
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return jobs[len(jobs) * rank // processes:len(jobs) * (rank + 1) // processes]


def runs_on(dataset, pairs, script, args):
    """Yield a Run for each pair (shots, seed): load and check all, encode nothing yet."""
    # origin: what the file of --load tells of its training, or None. It has the class names, which
    # is enough for --predict: no data set is loaded then, unless a flag asks for one.
    method, origin = Path(script).stem, args.origin
    asked = {"dataset", "transfer", "base_to_new"} & {*args.typed}
    if origin and args.predict and not asked:
        classnames = [name for _, name in origin["classes"]]
        template = args.template or origin["template"]
        sets = [Data(dataset, classnames, template, prograd_template=template)]
    else:
        sets = [load_data(dataset, args.data_root, args.template),
                *(load_data(name, args.data_root) for name in args.transfer)]
        sets = [choose_tests(some, args) for some in sets]
        check_data(args, sets[0])
    data, *others = sets
    clip = load_clip(args.backbone, args.pretrained, args.device, args.precision, args.class_chunk)
    check_clip(args, clip, sets, method)
    if "OMP_NUM_THREADS" not in os.environ:     # on small matrices more threads only wait
        small = clip.text.positional_embedding.shape[1] < 256
        torch.set_num_threads(1 if small else THREADS)
    tested = ("base", "new") if args.base_to_new else ("all classes",)
    parts = [Part(which, data, *choose(data, data.test, which)) for which in tested]
    parts += [Part(other.name, other, *choose(other, other.test, "all classes"), transfer=True)
              for other in others]
    code = records.code_digest(script, *records.COMPUTING)
    most = max(Counter(item.label for item in data.train).values(), default=0)
    for shots in sorted({shots for shots, _ in pairs if shots > most and not origin}):
        print(f"{dataset}: no class has {shots} training images; using the {most} of the largest")
    for shots, seed in pairs:
        if origin:
            sample, classes = [], [tuple(pair) for pair in origin["classes"]]
        else:
            shots = min(shots, most)
            sample = few_shot(data.train, shots, seed)
            sample, classes = choose(data, sample, tested[0])       # all classes, or base
            sample = add_contents(sample, args.cache)
            known = {item.content for item in sample} & {item.content for item in data.test}
            if data.own and known:                                  # own: a user's folder
                print(f"{dataset}: training images that are test images as well: {len(known)}")
        yield Run(method, code, args, clip, data, shots, seed, sample, classes, parts)


# ---------------------------------------------------------------- few-shot samples, halves

def few_shot(items, shots, seed):
    """Return CoOp's few-shot sample, draw for draw: `shots` items of each label, or all it has.

    Labels in order of first appearance. Reproduces the samples that CoOp's authors published."""
    rng, by_label = random.Random(seed), {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    sample = []
    for rows in by_label.values():
        sample += rng.sample(rows, shots) if len(rows) >= shots else rows
    return sample


def choose(data, items, which):
    """Return the items of "base", "new" or "all classes", labels from 0; and [(old label, name)].

    The base classes are the first ceil(C / 2) of a data set, the new classes the others."""
    classes = list(enumerate(data.classnames))
    m = math.ceil(len(classes) / 2)
    classes = {"base": classes[:m], "new": classes[m:]}.get(which, classes)
    places = {label: k for k, (label, _) in enumerate(classes)}
    items = [item._replace(label=places[item.label]) for item in items if item.label in places]
    return items, classes


def choose_tests(data, args):
    """Return the data set with the test images that the flags ask for.

    --validation: the validation images instead. --test-images N: max(1, N // C) of each class,
    drawn at random, the same for every method and seed."""
    test = data.val if args.validation else data.test
    if args.validation and len({item.label for item in test}) < len(data.classnames):
        raise Problem(f"{data.name}: --validation: there are classes with no validation images")
    if args.test_images:
        test = few_shot(test, max(1, args.test_images // len(data.classnames)), seed=0)
    data = replace(data, test=add_contents(test, args.cache))
    return replace(data, identity=records.data_identity(data))


def add_contents(items, cache):
    """Return the items with digests of their image files; the cache keeps the digests."""
    contents = features.digest_files([str(item.path) for item in items], cache)
    return [item._replace(content=content) for item, content in zip(items, contents)]


# ---------------------------------------------------------------- CLIP

@dataclass
class Clip:
    """A CLIP, frozen and in evaluation mode (by data/weights.py)."""
    model: torch.nn.Module      # open_clip's, in fp32
    text: torch.nn.Module       # its text encoder
    visual: torch.nn.Module     # its image encoder in `dtype`, a copy unless fp32
    dtype: torch.dtype          # of the image features' arithmetic
    tokenizer: object
    preprocess: object          # PIL image -> uint8 tensor (3, H, W): CLIP's own resize and crop
    logit_scale: float          # tau: exp of the parameter that CLIP calls logit_scale
    device: str
    amp: bool                   # whether prompts are trained and tested under autocast to bf16
    class_chunk: int
    name: str                   # of the backbone, as recorded
    activation: str
    weights: str                # digest of weights, visual modules, activation
    image_key: str              # digest of the image encoder and its preprocessing

    def autocast(self):
        """Return autocast for a prompt's encoders: to bf16 if `amp`, else off."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.amp)

    @property
    def augment(self):
        """The training augmentation: a random crop of 8 to 100 % of the area, and a flip."""
        size, bicubic = self.model.visual.preprocess_cfg["size"], InterpolationMode.BICUBIC
        return Compose([RandomResizedCrop(size, (0.08, 1.0), interpolation=bicubic),
                        RandomHorizontalFlip(), PILToTensor()])

    def pixels(self, images):
        """Return uint8 images (n, 3, H, W) as floats, normalized with CLIP's mean and std."""
        config = self.model.visual.preprocess_cfg
        return features.normalize(images, config["mean"], config["std"])

    def encode_image(self, pixels):
        """Return f(x), unit-norm image features (n, D)."""
        return F.normalize(self.visual(pixels.to(self.dtype)).float(), dim=-1)


@functools.cache
def load_clip(backbone="tiny_clip", pretrained="", device="cpu", precision="fp32", class_chunk=128):
    """Return the Clip of --backbone and --pretrained.

    Raises Problem if there is no such model, no weights, or a text encoder that is not CLIP's."""
    torch.manual_seed(0)                                        # for --pretrained random
    rest = weights.create(backbone, pretrained)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.backends.cudnn.allow_tf32 = False     # fp32 means fp32 in convolutions, too
    model, dtype = rest["model"].to(device), feature_dtype(device, precision)
    visual = model.visual if dtype == torch.float32 else copy.deepcopy(model.visual).to(dtype)
    return Clip(visual=visual, dtype=dtype, logit_scale=model.logit_scale.exp().item(),
                device=device, amp=device == "cuda" and dtype == torch.bfloat16,
                class_chunk=class_chunk, name=backbone, **rest)


def feature_dtype(device, precision):
    """Return the type in which images are encoded: fp32. With --precision amp: bf16 where the
    processor has it, fp16 on older GPUs, and fp32 on other CPUs, where 16 bits would be slower."""
    if precision == "fp32":
        return torch.float32
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    print("--precision amp: no AVX512-bf16 or AMX here; fp32 is faster, and is used")
    return torch.float32


# ---------------------------------------------------------------- image features

@torch.no_grad()
def encode_images(clip, data, items, cache=None, views=None, encode=None, kind=""):
    """Return image features f(x), on the CPU: (N, D), or (N, V, D) of augmented `views`.

    cache   the folder where they are kept, for all runs (None: not kept)
    views   indices of augmented views; view k of an image looks the same in every run
    encode  another function, pixels (n, 3, H, W) -> (n, ...); None: CLIP's, unit-norm
    kind    names `encode` in the cache's keys
    Raises Problem at an image that is missing or cannot be read."""
    paths, numbers = [str(item.path) for item in items], views or [0]
    transform = clip.augment if views else clip.preprocess
    encode = encode or clip.encode_image
    # A row's name: content (--predict: path), view. Equal images are encoded once.
    names = list(itertools.product([item.content or item.path for item in items], numbers))
    sources = dict(zip(names, itertools.product(paths, numbers)))
    # Batches of one size, the last one filled up: else the last bits of an image's features would
    # depend on the size of its batch.
    size = 128 if clip.device == "cuda" else 8
    code = records.code_digest(features.__file__), inspect.getsource(Clip)  # they make f(x)
    key = clip.image_key, str(clip.dtype), kind, data.own, str(transform), code
    store = features.Store(cache, key, names)
    todo = [sources[name] for name in store.missing]
    batches = features.load_pixels(todo, transform, size, clip.device, data.own)
    for images in progress(batches, desc="encoding images", unit=" images", delay=0.5,
                           total=math.ceil(len(todo) / size), unit_scale=size):
        n = len(images)
        images = F.pad(images, (0, 0) * 3 + (0, size - n))                  # (size, 3, H, W)
        store.add(encode(clip.pixels(images))[:n].float())                  # (n, ...)
    found = store.rows()
    return found.unflatten(0, (len(paths), -1)) if views else found


# ---------------------------------------------------------------- prompts to class features

def embed(clip, text):
    """Return the embeddings of a text's tokens, (l, W), without start, end and positions."""
    tokens = torch.tensor(clip.tokenizer.encode(text), dtype=torch.long, device=clip.device)
    return clip.text.token_embedding(tokens)


def start_end(clip):
    """Return the embeddings of the start-of-text and end-of-text tokens, (1, W) each."""
    table, tokenizer = clip.text.token_embedding.weight, clip.tokenizer
    return [table[k:k + 1] for k in (tokenizer.sot_token_id, tokenizer.eot_token_id)]


def name_embeddings(clip, classnames):
    """Return for every class the embeddings of its name, (l, W), and of the "." after it, (1, W).

    They are tokenized together, as in CoOp's code, and then split. The "." has (0, W) where the
    tokenizer joins it to the name, as in "(red)."."""
    pairs = []
    for classname in classnames:
        name = classname.replace("_", " ")
        length = len(clip.tokenizer.encode(name))
        pairs.append(embed(clip, f"{name}.").tensor_split([length]))
    return pairs


def encode_text(clip, shared, own):
    """Return class features w_c = g(prompt of c), unit-norm, (C, D).

    shared  parts that all prompts begin with: a list of embeddings (l, W)
    own     for every class a list of the parts after them; the last one ends with the end token,
            where the encoder is read
    Raises Problem if a prompt is longer than the encoder reads.

    CLIP pads to 77 tokens. Its text encoder is causal: tokens after the end token change nothing,
    and the states of the shared tokens are the same for all classes. So a chunk is padded only to
    its longest, and the shared tokens go through the encoder once; the others attend to them."""
    text, x = clip.text, torch.cat(shared)                              # (S, W)
    skip = len(x)
    check_length(clip, skip + max(sum(map(len, parts)) for parts in own))
    _, past = through_blocks(text, (x + text.positional_embedding[:skip])[None], [])

    def encode(some):
        x, last = pad(some)                                             # (c, L, W), (c,)
        x = x + text.positional_embedding[skip:skip + x.shape[1]]
        x, _ = through_blocks(text, x, past)
        x = x[torch.arange(len(x), device=x.device), last]              # of the end tokens, (c, W)
        return [text.ln_final(x) @ text.text_projection]

    w, = in_chunks(clip, encode, own)
    return F.normalize(w.float(), dim=-1)


def through_blocks(text, x, past):
    """Return the states x (c, L, W) after all blocks, and each block's keys and values, [(k, v)].

    past  keys and values of S tokens before x, (1, heads, S, W / heads) each; or []. Given them,
          returns none
    A token sees those of past, those before it in x, and itself. ls_1 and ls_2 are open_clip's
    LayerScale, which does nothing in OpenAI's models."""
    kept, sees = [], None
    if past:
        S, L = past[0][0].shape[2], x.shape[1]
        sees = torch.ones(L, S + L, dtype=torch.bool, device=x.device).tril(S)
    for k_v, block in itertools.zip_longest(past, text.transformer.resblocks):  # no past: None
        attn = block.attn
        qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)       # (c, L, 3 W)
        # (c, heads, L, W / heads) each
        q, k, v = qkv.view(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        if past:
            k, v = (torch.cat([old.expand(len(x), -1, -1, -1), new], 2)     # S tokens, then L
                    for old, new in zip(k_v, (k, v)))
        else:
            kept.append((k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=not past)
        x = x + block.ls_1(attn.out_proj(out.transpose(1, 2).flatten(2)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, kept


def pad(prompts):
    """Return prompts of different lengths as one tensor (c, L, W), and their last places (c,).

    prompts  for each class a list of parts (l, W). A prompt's last token is repeated after its
             end, where the causal encoder never looks. One indexing serves all: on a GPU a call for
             each of 1000 classes would cost more than the encoder."""
    flat = torch.cat([part for parts in prompts for part in parts])             # (sum of l, W)
    lengths = torch.tensor([sum(map(len, parts)) for parts in prompts])
    first = lengths.cumsum(0) - lengths
    within = torch.arange(int(lengths.max())).clamp(max=lengths[:, None] - 1)   # (c, L)
    places, last = (t.to(flat.device, non_blocking=True)        # no waiting for the GPU
                    for t in (first[:, None] + within, lengths - 1))
    return flat[places], last


def in_chunks(clip, encode, prompts):
    """Return encode(prompts), a list of tensors (C, ...), computed --class-chunk prompts at a time.

    With several chunks, the backward pass runs encode again (it draws no random numbers): memory
    stays flat as classes grow. A list, as RESTORE's encode returns two: features and states."""
    size = clip.class_chunk
    chunks = [prompts[c:c + size] for c in range(0, len(prompts), size)]
    if len(chunks) > 1 and torch.is_grad_enabled():
        encode = functools.partial(checkpoint, encode, use_reentrant=False,
                                   preserve_rng_state=False)
    return [torch.cat(column) for column in zip(*map(encode, chunks))]


def check_length(clip, length):
    """Raise Problem if a prompt is longer than the text encoder reads."""
    most = len(clip.text.positional_embedding)
    if length > most:
        raise Problem(f"the longest prompt takes {length} tokens, CLIP reads {most}: "
                      "take a smaller --n-ctx, or shorter --ctx-init, --template or class names")


@torch.no_grad()
def template_features(clip, template, classnames):
    """Return zero-shot CLIP's class features of "a photo of a {}." or the like, (C, D).

    Of several templates, separated by |: the normalized mean of their unit-norm features."""
    start, end = start_end(clip)
    found = []
    for one in template.split("|"):
        texts = [one.format(classname.replace("_", " ")) for classname in classnames]
        with clip.autocast():
            found.append(encode_text(clip, [start], [[embed(clip, text), end] for text in texts]))
    return found[0] if len(found) == 1 else F.normalize(sum(found), dim=-1)


# ---------------------------------------------------------------- training and evaluation

def default_epochs(run):
    """Return CoOp's number of epochs: by the shots, and 50 on ImageNet (paper)."""
    if run.shots < 2 or run.data.name == "imagenet":
        return 50
    return 100 if run.shots < 8 else 200


@dataclass
class Part:
    """What is tested: images and the classes that compete for them."""
    name: str                       # "all classes", "base", "new", "predict", or one of --transfer
    data: Data
    items: list
    classes: list                   # [(label in the data set, name)]
    transfer: bool = False
    features: torch.Tensor = None   # f(x) of the test images, (N, D)
    zero_shot: torch.Tensor = None  # class features of the template, (C, D)

    @property
    def classnames(self):
        return [name for _, name in self.classes]

    @property
    def labels(self):
        return torch.tensor([item.label for item in self.items])


@dataclass
class Run:
    """One training and evaluation: a method on a data set, a number of shots, a seed."""
    method: str
    code: str                       # digest of the script and the modules that compute
    args: object                    # the flags, settled for this data set
    clip: Clip
    data: Data
    shots: int
    seed: int
    items: list                     # the few-shot sample, labels from 0; [] for a loaded prompt
    classes: list                   # [(label, name)] of the classes that the prompt is trained on
    parts: list                     # of Part; shared by the runs on this data set
    features: torch.Tensor = None   # f(x) of the sample's augmented views, (N, V, D)
    logged: dict = field(default_factory=dict)      # {name: {epoch: [tensor of each step]}}

    def __post_init__(self):
        args, clip, origin = self.args, self.clip, self.args.origin or {}
        self.classnames = [name for _, name in self.classes]
        self.template = origin.get("template", self.data.template)  # --load: that of the training
        self.labels = torch.tensor([item.label for item in self.items], device=clip.device)
        self.protocol = "base-to-new" if args.base_to_new else "few-shot"
        self.title = f"{self.data.name}, {self.shots}-shot, seed {self.seed}"
        if origin:
            self.title += f", prompt of {args.load}"
        self.setting, self.id = records.identify(self)  # digests

    # ------------------------------------------------ before the training

    def start(self, prompt):
        """Encode test images and templates. Then encode the sample's views, or load a prompt.

        A method that changes the image encoder (its prompt has image_features) encodes the views
        itself. Raises Problem at an image that cannot be read."""
        args, self.began = self.args, time.time()
        if args.export and hasattr(prompt, "image_features"):
            raise Problem("--export: this method trains on pixels, not on features")
        for file in args.predict:
            features.read_image(file, own=True)     # it fails now, not after the training
        for part in self.parts:
            if part.features is None and part.items:
                f = encode_images(self.clip, part.data, part.items, args.cache)
                part.features = f.to(self.clip.device)
                part.zero_shot = template_features(self.clip, part.data.template, part.classnames)
        if args.load:
            self.load(prompt)
        elif not hasattr(prompt, "image_features"):
            self.features = self.encode_views(epoch=0)
        # For --export:
        self.initial = {name: tensor.clone() for name, tensor in prompt.state_dict().items()}

    def encode_views(self, epoch):
        """Return f(x) of augmented views of the sample, (N, V, D). --views 0: one crop."""
        args = self.args
        views, cache = (list(range(args.views)), args.cache) if args.views else ([epoch], None)
        return encode_images(self.clip, self.data, self.items, cache, views).to(self.clip.device)

    def load(self, prompt):
        """Fill a prompt with the tensors of --load. They fit: see check_origin (data/flags.py)."""
        tensors = load_file(self.args.load)
        for name, buffer in prompt.named_buffers(recurse=False):    # ProGrad's left_over: any l
            if name in tensors:
                setattr(prompt, name, tensors[name].to(buffer))
        prompt.load_state_dict(tensors)

    # ------------------------------------------------ batches

    def plan(self, epoch):
        """Return an epoch's batches, rows (batches, B) and views: images shuffled, a view each.

        An incomplete last batch is dropped unless it is the only one (CoOp's code). --views 0: all
        views are 0, the place of the epoch's only crop. Drawn on the CPU: equal on all devices."""
        rng = torch.Generator().manual_seed(1000003 * self.seed + epoch)    # one for each epoch
        n = len(self.items)
        size = min(n, self.args.batch_size)
        order = torch.randperm(n, generator=rng)
        views = torch.randint(self.args.views or 1, (n,), generator=rng)
        return [some[:n - n % size].view(-1, size) for some in (order, views)]

    def batches(self, epoch):
        """Yield (f(x) (B, D), labels (B,)) of the epoch's batches."""
        if epoch and not self.args.views:               # --views 0: fresh crops
            self.features = self.encode_views(epoch)
        plan = (some.to(self.clip.device) for some in self.plan(epoch))     # to the GPU at once
        for rows, views in zip(*plan):                  # (B,) each
            yield self.features[rows, views], self.labels[rows]

    def pixel_batches(self, epoch):
        """Yield (pixels (B, 3, H, W), labels (B,), rows (B,), views (B,)) of the epoch's batches.

        For a method that changes the image encoder."""
        plan = self.plan(epoch)
        sources = [(str(self.items[row].path), view if self.args.views else epoch)
                   for row, view in zip(*(some.flatten().tolist() for some in plan))]
        loader = features.load_pixels(sources, self.clip.augment, plan[0].shape[1],
                                      self.clip.device, self.data.own)
        for rows, views, images in zip(*plan, loader):
            yield self.clip.pixels(images), self.labels[rows.to(self.labels.device)], rows, views

    # ------------------------------------------------ the record of a training

    def log(self, epoch, **values):
        """Note what a step computed, numbers or tensors; the record holds means over each epoch."""
        for name, value in values.items():
            steps = self.logged.setdefault(name, {}).setdefault(epoch, [])
            exact = torch.float64 if isinstance(value, float) else None
            steps.append(torch.as_tensor(value, dtype=exact).detach())

    def history(self):
        """Return what was logged: {name: [mean over the steps of each epoch]}."""
        return {name: [torch.stack(steps).double().mean(0).tolist() for steps in epochs.values()]
                for name, epochs in self.logged.items()}

    # ------------------------------------------------ evaluation

    @torch.no_grad()
    def classifiers(self, prompt, part):
        """Return [(image features (N, D), class features (C, D))]: zero-shot's, the prompt's."""
        f = part.features
        with self.clip.autocast():
            w = prompt.class_features(part)
            if hasattr(prompt, "image_features"):
                f = encode_images(self.clip, part.data, part.items, encode=prompt.image_features)
                f = f.to(self.clip.device)
        if not all(tensor.isfinite().all() for tensor in (f, w, part.features, part.zero_shot)):
            raise Problem(f"features are not finite: take a smaller --lr than {self.args.lr:g}, or "
                          "other weights if those of --pretrained or --load are damaged")
        return [(part.features, part.zero_shot), (f, w.float())]

    def evaluate(self, prompt, part):
        """Return how well zero-shot CLIP and the prompt classify the images of a part.

        zero_shot, accuracy  percent of the images whose class has the largest f(x) . w_c
        kl                   mean over the images of KL(zero-shot || prompt), in nats
        counts               images of each class (row) put into each class (column), (C, C)"""
        labels = part.labels.to(self.clip.device)
        logits = [self.clip.logit_scale * f @ w.T for f, w in self.classifiers(prompt, part)]
        zero_shot, predicted = (z.argmax(-1) for z in logits)
        log_zs, log_p = (z.double().log_softmax(-1) for z in logits)
        kl = F.kl_div(log_p, log_zs, reduction="batchmean", log_target=True)
        places = (labels * len(part.classes) + predicted).cpu()     # (N,)
        counts = torch.bincount(places, minlength=len(part.classes) ** 2)
        return {"zero_shot": percent(zero_shot == labels), "accuracy": percent(predicted == labels),
                "kl": kl.item(), "counts": counts.view(len(part.classes), -1).tolist()}

    def finish(self, prompt, **more):
        """Evaluate a prompt; record, save and print it.

        prompt  a Module with class_features(part) -> (C, D)
        more    further values for the record, besides what was logged"""
        args = self.args
        rows = {part.name: self.evaluate(prompt, part) for part in self.parts if part.items}
        if rows:                    # none with --load --predict alone
            cuda = self.clip.device == "cuda"
            more = {**self.history(), **more, "seconds": time.time() - self.began,
                    "parameters": sum(p.numel() for p in prompt.parameters()),
                    "device": torch.cuda.get_device_name() if cuda else platform.machine()}
            record = records.record_of(self, rows, more)
            records.append(args.out, record)        # before what follows, which may fail
            if args.save:
                self.save(prompt)
            if args.export:
                export.write(self, prompt, rows)
            tables.show_run(self.title, record, f"recorded in {args.out}")
        if args.predict:
            self.predict(prompt)

    def save(self, prompt):
        """Write the prompt to --save, with where it comes from."""
        tensors, file = prompt.state_dict(), self.args.save
        origin = records.origin_of(self, features.tensor_digest(tensors))
        features.write_whole(file, tensors, {"kind": "prompt", "origin": json.dumps(origin)})
        print(f"{self.title}: saved in {file}")

    def predict(self, prompt):
        """Print the five likeliest classes of each image of --predict, with percentages."""
        data = replace(self.data, own=True)     # a user's photographs: upright, on white
        items = [Item(file, 0) for file in self.args.predict]       # the label is not used
        classes = list(enumerate(data.classnames))
        part = Part("predict", data, items, classes)
        part.features = encode_images(self.clip, data, items).to(self.clip.device)
        part.zero_shot = template_features(self.clip, data.template, part.classnames)
        both = [(self.clip.logit_scale * f @ w.T).softmax(-1).topk(min(5, len(part.classes)))
                for f, w in self.classifiers(prompt, part)]
        tables.show_predictions(self.method, self.args.predict, part.classnames, *both)


def percent(right):
    return 100 * right.double().mean().item()
