"""What the four methods share, in the order in which a run uses it: flags, CLIP, data and few-shot samples, image features,
class features, the training schedule, evaluation and the record of a run. The methods themselves are in their own files.

Shapes: N images, C classes, L tokens, W the text tower's width, D the dimension of the features.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, transforms
from tqdm import tqdm

from data.files import CATALOGUE, Data, Problem, known, load_data

HERE = Path(__file__).parent
TINY_CLIP = f"local-dir:{HERE / 'data' / 'tiny_clip'}"
progress = functools.partial(tqdm, disable=None, leave=False)  # no bar where stderr is not a terminal


# ---------------------------------------------------------------- flags and errors

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(message)


def number(kind=float, low=0.0, high=math.inf, low_ok=False):
    """An argparse type: an int or float in (low, high), or [low, high) with low_ok."""
    def parse(text):
        value = kind(text)
        if not (low <= value < high and (low_ok or value > low)):
            raise argparse.ArgumentTypeError(f"{text} is out of range: wants {'at least' if low_ok else 'more than'} {low:g}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def several(kind):
    """An argparse type: values separated by commas."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = f"list (1,2,3) of {kind.__name__}"
    return parse


def words(text):
    """An argparse type: the words of a context, which may also be written a_photo_of_a."""
    return " ".join(text.replace("_", " ").split())


def flags(doc, lr, batch_size, n_ctx):
    """A parser with the flags that every method has; a method adds its own to it, then calls `parse`."""
    count = number(int, 1, low_ok=True)
    p = Parser(description=doc.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--dataset", type=known, default="shapes", metavar="NAME|PATH", help="a data set, or a folder with one sub-folder per class (shapes, which is embedded)")
    p.add_argument("--data-root", default=str(HERE / "data"), metavar="DIR", help="where the data sets are, in the layout of CoOp's users (data)")
    p.add_argument("--backbone", metavar="NAME", help="an open_clip model, or local-dir:PATH (embedded data: the tiny CLIP; else ViT-B-16)")
    p.add_argument("--pretrained", metavar="TAG", help="the weights' open_clip tag or file, or 'random' (openai)")
    p.add_argument("--shots", type=several(count), default=[4], metavar="N,...", help="training images per class (4)")
    p.add_argument("--seeds", type=several(number(int, 0, 2**31, low_ok=True)), default=[1], metavar="N,...", help="random seeds, one run each (1)")
    p.add_argument("--base-to-new", action="store_true", help="learn on the first half of the classes, test on both halves")
    p.add_argument("--transfer", type=several(known), default=[], metavar="NAME,...", help="test what was learned on these data sets as well")
    p.add_argument("--n-ctx", type=count, default=n_ctx, metavar="N", help=f"learned context tokens ({n_ctx})")
    p.add_argument("--epochs", type=count, metavar="N", help="passes over the training images (the method's, by shots)")
    p.add_argument("--lr", type=number(), default=lr, help=f"learning rate of SGD ({lr})")
    p.add_argument("--batch-size", type=count, default=batch_size, metavar="N", help=f"training images per step ({batch_size})")
    p.add_argument("--views", type=number(int, 0, low_ok=True), default=10, metavar="N", help="augmented views encoded once per training image; 0: new ones every epoch (10)")
    p.add_argument("--class-chunk", type=count, default=128, metavar="N", help="classes per pass of the text tower; fewer need less memory, not less time (128)")
    p.add_argument("--device", choices=["cpu", "cuda"], help="(cuda where there is one)")
    p.add_argument("--precision", choices=["fp32", "amp"], help="amp: autocast to bf16, or fp16 where there is none (amp on cuda, fp32 on cpu)")
    p.add_argument("--cache", default=str(HERE / "data" / "cache"), metavar="DIR", help="where image features are kept (data/cache)")
    p.add_argument("--out", default="runs/results.jsonl", metavar="FILE", help="one JSON line per run is added here (runs/results.jsonl)")
    p.add_argument("--save", metavar="FILE", help="keep what was learned; of several runs: 'ctx-{shots}-{seed}.safetensors'")
    p.add_argument("--load", metavar="FILE", help="do not train, test what this file holds")
    return p


def parse(parser, argv=None):
    """The flags' values, with the defaults that depend on others; raises Problem where they cannot be met."""
    args = parser.parse_args(argv)
    embedded = CATALOGUE.get(args.dataset, {}).get("kind") == "world"
    args.backbone = args.backbone or (TINY_CLIP if embedded else "ViT-B-16")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("amp" if args.device == "cuda" else "fp32")
    args.pretrained = args.pretrained or ("" if ":" in args.backbone else "openai")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise Problem("--device cuda: PyTorch sees no CUDA device here; leave the flag out to use the CPU")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        saved = [args.save.format(shots=shots, seed=seed) for shots in args.shots for seed in args.seeds] if args.save else []
    except (KeyError, IndexError, AttributeError, ValueError):
        raise Problem(f"--save {args.save}: only {{shots}} and {{seed}} are filled in") from None
    if len(set(saved)) < len(saved):
        raise Problem("--save: several runs would write one file; put {shots} and {seed} into its name")
    for file in map(Path, (args.out, *saved)):  # found out now rather than after the training
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise Problem(f"cannot write {file}")
    return args


@contextlib.contextmanager
def one_line_errors():
    """Around main(): what the user can mend ends in one line on stderr and status 2, Ctrl-C in status 130."""
    warnings.filterwarnings("ignore", module="PIL|torch|open_clip|timm|torchvision")
    name = Path(sys.argv[0]).name
    try:
        yield
    except Problem as problem:
        status, message = 2, str(problem)
    except torch.OutOfMemoryError:
        status, message = 2, "out of GPU memory; a smaller --batch-size or backbone needs less"
    except OSError as error:  # no space, no permission, ...
        status, message = 2, f"{error.filename or 'writing'}: {error.strerror or error}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    else:
        return
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- CLIP

@dataclass
class Clip:
    """A frozen CLIP: open_clip's model, its text tower `text`, tokenizer, image transforms, and exp(logit_scale)."""
    model: torch.nn.Module
    text: torch.nn.Module
    tokenizer: object
    preprocess: object  # PIL image -> (3, H, W), as CLIP was trained
    augment: object     # the same with a random crop and flip
    logit_scale: float
    device: str
    precision: str
    key: str            # stands for the image tower's weights and preprocessing in the cache
    class_chunk: int = 128
    seconds: float = 0  # spent on encoding images

    def autocast(self):
        dtype = torch.bfloat16 if self.device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.autocast(self.device, dtype, enabled=self.precision == "amp")


def load_clip(args):
    """The CLIP of --backbone and --pretrained, frozen, in eval mode; raises Problem if there is no such model or weights."""
    name, tag = args.backbone, args.pretrained
    torch.manual_seed(0)  # --pretrained random is the same everywhere
    try:
        if name.startswith("local-dir:"):
            model, _, preprocess = open_clip.create_model_and_transforms(name, device=args.device, require_pretrained=True)
        elif tag == "random":
            model, _, preprocess = open_clip.create_model_and_transforms(known_model(name), device=args.device, pretrained_text=False)
        else:
            # OpenAI's weights were trained with QuickGELU, which open_clip takes from the model's name and only warns
            # about: here the tag decides. A file has no tag, so that its model's name does.
            spec = open_clip.get_pretrained_cfg(known_model(name), tag)
            if not spec and not Path(tag).is_file():
                raise Problem(f"--pretrained {tag}: {name} has {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'no tag'}, or give a file")
            model, _, preprocess = open_clip.create_model_and_transforms(name.removesuffix("-quickgelu") if spec else name, tag, device=args.device, require_pretrained=True,
                                           force_quick_gelu=bool(spec.get("quick_gelu")))
    except Problem:
        raise
    except Exception as error:  # whatever went wrong in open_clip, the way out is the same
        raise Problem(f"cannot load {name} {tag}: {error} (no network? a weights file can be given with --pretrained FILE)") from None
    model.eval().requires_grad_(False)
    text = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    block = getattr(getattr(text, "transformer", None), "resblocks", [None])[0]
    plain = type(block) is open_clip.transformer.ResidualAttentionBlock and getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    tokenizer = open_clip.get_tokenizer(name) if plain else None
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        raise Problem(f"--backbone {name}: its text tower is not CLIP's causal transformer, which these methods learn prompts for")
    size = model.visual.preprocess_cfg["size"]
    augment = transforms.Compose([RandomResizedCrop(size, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC), RandomHorizontalFlip(),
                                  *preprocess.transforms[2:]])
    digest = hashlib.blake2b(repr((preprocess, args.precision, args.device)).encode(), digest_size=16)
    for tensor in model.visual.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy())
    return Clip(model, text, tokenizer, preprocess, augment, model.logit_scale.exp().item(), args.device, args.precision, digest.hexdigest(), args.class_chunk)


def known_model(name):
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        raise Problem(f"unknown backbone {name!r}: did you mean {' or '.join(near) or 'ViT-B-16'}? (or local-dir:PATH)")
    return name


# ---------------------------------------------------------------- few-shot samples, base and new classes

def few_shot(items, shots, seed):
    """CoOp's few-shot sample, draw for draw: `shots` items of each label, labels in order of first appearance.

    A class with fewer items gives all it has. Reproduces the index sets that CoOp's authors published."""
    rng, by_label = random.Random(seed), {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    return [item for rows in by_label.values() for item in (rng.sample(rows, shots) if len(rows) >= shots else rows)]


def half(items, classnames, new):
    """The items of the base (first ceil(C/2)) or the new classes, relabelled from 0, and their names (CoCoOp, section 4.1)."""
    m = math.ceil(len(classnames) / 2)
    keep = range(m, len(classnames)) if new else range(m)
    return [item._replace(label=item.label - keep.start) for item in items if item.label in keep], [classnames[k] for k in keep]


# ---------------------------------------------------------------- images to features

class Pictures(torch.utils.data.Dataset):
    """Item i: picture i transformed once for each number in views[i], (V, 3, H, W); a str where it cannot be read.

    An augmentation's random numbers come from the file's content and the number of the view: the same in every run."""

    def __init__(self, paths, transform, views):
        self.paths, self.transform, self.views = paths, transform, views

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            content = Path(self.paths[i]).read_bytes()
            image = Image.open(io.BytesIO(content)).convert("RGB")
            copies = []
            with torch.random.fork_rng(devices=[]):
                for view in self.views[i]:
                    torch.manual_seed(zlib.crc32(b"%d" % view, zlib.crc32(content)))
                    copies.append(self.transform(image))
            return torch.stack(copies)
        except Exception as error:  # Pillow's decoders raise anything
            return f"cannot read the picture {self.paths[i]} ({(error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__})"


def load_pixels(clip, paths, transform, views, batch_size):
    """Yields (batch_size, V, 3, H, W) on the device, the pictures in order; raises Problem at one that cannot be read."""
    workers = min(8, os.cpu_count() or 1) if clip.device == "cuda" and len(paths) > 64 else 0
    for pictures in torch.utils.data.DataLoader(Pictures(paths, transform, views), batch_size, num_workers=workers, collate_fn=list):
        for picture in pictures:
            if isinstance(picture, str):
                raise Problem(picture)
        yield torch.stack(pictures).to(clip.device, non_blocking=True)


@torch.no_grad()
def encode_images(clip, items, cache, views=None, encode=None, kind=""):
    """L2-normalised image features f(x): (N, D) of the pictures as they are, or (N, V, D) of the augmented `views`.

    They are computed once and kept in the folder `cache`, in a file named after the weights, the preprocessing and the
    pictures (path, size, time of change); a damaged file is found by its checksum and made anew. Another `encode`
    (pixels (n, 3, H, W) -> (n, D)) than CLIP's image tower needs a name of its own, `kind`, or cache=None."""
    start, paths = time.time(), [str(item.path) for item in items]
    try:
        stats = [(path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in paths]
    except OSError as error:
        raise Problem(f"missing picture {error.filename}") from None
    key = hashlib.blake2b(repr((clip.key, kind, views, stats)).encode(), digest_size=16).hexdigest()
    file = cache and Path(cache) / f"{key}.safetensors"
    features = read_cache(file) if cache else None
    if features is None:
        encode, done = encode or (lambda x: F.normalize(clip.model.encode_image(x).float(), dim=-1)), []
        size = 256 if clip.device == "cuda" else 32
        with clip.autocast(), progress(total=len(paths), desc="encoding images", unit="image") as bar:
            for pixels in load_pixels(clip, paths, clip.augment if views else clip.preprocess, [views or [0]] * len(paths), max(1, size // len(views or [0]))):
                done.append(encode(pixels.flatten(0, 1)).float().view(*pixels.shape[:2], -1).cpu())
                bar.update(len(pixels))
        features = torch.cat(done) if views else torch.cat(done)[:, 0]
        if cache:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, {"features": features}, {"checksum": checksum(features)})
    clip.seconds += time.time() - start
    return features.to(clip.device)


def checksum(tensor):
    return f"{zlib.crc32(tensor.contiguous().numpy()):08x}"


def read_cache(file):
    """The cached tensor, or None where there is none or it is damaged."""
    try:
        with safe_open(file, "pt") as content:
            features = content.get_tensor("features")
            return features if content.metadata()["checksum"] == checksum(features) else None
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        return None


def write_whole(file, tensors, metadata):
    """A safetensors file that appears whole or not at all, whoever else reads or writes it."""
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=Path(file).parent)
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except SafetensorError as error:  # how safetensors tells that the disk is full
        os.unlink(temporary)
        raise Problem(f"cannot write {file}: {error}") from None
    except BaseException:
        os.unlink(temporary)
        raise


# ---------------------------------------------------------------- prompts to class features

def tokenize(clip, text):
    """The token numbers of a text, without start and end; raises Problem if the text tower cannot hold it."""
    tokens = clip.tokenizer.encode(text)
    if len(tokens) > clip.text.positional_embedding.shape[0] - 2:
        raise Problem(f"{text[:60]!r}... is {len(tokens)} tokens long; CLIP reads {clip.text.positional_embedding.shape[0] - 2}")
    return tokens


def name_tokens(clip, classnames):
    """For every class the embeddings of [name_c, "."] and the number of its name's tokens: a list of ((L_c, W), n_c)."""
    names = [classname.replace("_", " ") for classname in classnames]
    return [(embed(clip, tokenize(clip, f"{name}.")), len(tokenize(clip, name))) for name in names]


def embed(clip, tokens):
    """Token numbers (L) -> embeddings (L, W)."""
    return clip.text.token_embedding(torch.tensor(tokens, dtype=torch.long, device=clip.device))


def start_end(clip):
    """The embeddings of the start-of-text and end-of-text tokens, (1, W) each."""
    return embed(clip, [clip.tokenizer.sot_token_id]), embed(clip, [clip.tokenizer.eot_token_id])


def encode_text(clip, tails, head=None):
    """Class features g(prompt), L2-normalised (C, D), from token embeddings without positions.

    tails  C tensors (L_c, W), each ending in the end-of-text token, where the tower reads its feature
    head   (P, W) in front of every tail, the same for all classes: start token and shared context, if any

    Exact, but cheaper than CLIP's encode_text, since the tower is causal: what stands after the end-of-text token changes
    nothing, so prompts are cut to the longest instead of padded to 77; and the head's states do not depend on the class,
    so they are computed once and every tail attends to them. More than --class-chunk classes are computed in chunks, whose
    activations are not kept but computed again in the backward pass: memory stays flat as classes grow.
    Raises Problem if a prompt is longer than the tower holds."""
    text, p = clip.text, 0 if head is None else len(head)
    check_length(clip, p + max(len(tail) for tail in tails))
    past = []                                                                                # of every block, (1, heads, P, W / heads)
    if p:
        h = (head + text.positional_embedding[:p])[None]                                     # (1, P, W)
        for block in text.transformer.resblocks:
            q, k, v = queries_keys_values(block, h)
            h = finish_block(block, h, F.scaled_dot_product_attention(q, k, v, is_causal=True))
            past += [k, v]
    chunks = [tails[c:c + clip.class_chunk] for c in range(0, len(tails), clip.class_chunk)]
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([encode_tails(text, p, past, *part) for part in chunks])
    return torch.cat([checkpoint(encode_tails, text, p, past, *part, use_reentrant=False) for part in chunks])


def encode_tails(text, p, past, *tails):
    """The text tower on tails (L_c, W) behind P tokens whose keys and values of every block are `past` -> (C, D)."""
    x = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True)                             # (C, L, W)
    x = x + text.positional_embedding[p:p + x.shape[1]]
    mask = torch.ones(x.shape[1], p + x.shape[1], dtype=torch.bool, device=x.device).tril(p) # who may look at whom
    for i, block in enumerate(text.transformer.resblocks):
        q, k, v = queries_keys_values(block, x)                                              # (C, heads, L, W / heads)
        if p:
            k, v = (torch.cat([a.expand(len(x), -1, -1, -1), b], 2) for a, b in zip(past[2 * i:2 * i + 2], (k, v)))
        x = finish_block(block, x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    x = text.ln_final(x[torch.arange(len(x)), [len(tail) - 1 for tail in tails]])            # (C, W)
    x = text.text_projection(x) if isinstance(text.text_projection, torch.nn.Linear) else x @ text.text_projection
    return F.normalize(x.float(), dim=-1)


def check_length(clip, longest):
    if longest > len(clip.text.positional_embedding):
        raise Problem(f"the longest prompt takes {longest} tokens, CLIP reads {len(clip.text.positional_embedding)}: a smaller --n-ctx or shorter --ctx-init leaves more for the name")


def queries_keys_values(block, x):
    """The first half of open_clip's ResidualAttentionBlock: (C, L, W) -> three of (C, heads, L, W / heads)."""
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.view(*x.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def finish_block(block, x, attended):
    """Its second half: what was attended to (C, heads, L, W / heads) into the residual stream (C, L, W)."""
    x = x + block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@torch.no_grad()
def nearest_words(clip, v):
    """For every context vector v (..., M, W) the vocabulary's nearest word, by Euclidean distance, as CoOp interprets its prompts."""
    table = clip.text.token_embedding.weight
    known = table.abs().sum(-1) > 0  # the tiny CLIP has met only a few words
    nearest = torch.cat([torch.cdist(some.float(), table.float()).masked_fill(~known, math.inf).argmin(-1) for some in v.flatten(0, -2).split(64)])
    return " ".join(clip.tokenizer.decoder[token].replace("</w>", "") for token in nearest.tolist())


@torch.no_grad()
def template_features(clip, template, classnames):
    """The class features of a written prompt such as "a photo of a {}." (C, D): CLIP's zero-shot classifier."""
    start, end = start_end(clip)
    prompts = [template.format(classname.replace("_", " ")) for classname in classnames]
    with clip.autocast():
        return encode_text(clip, [torch.cat([start, embed(clip, tokenize(clip, prompt)), end]) for prompt in prompts])


# ---------------------------------------------------------------- a run: its data, schedule, evaluation and record

@dataclass
class Run:
    """One training and evaluation: (shots, seed) of a method on a data set."""
    method: str
    args: argparse.Namespace
    clip: Clip
    data: Data
    others: list      # of Data, to test on as well
    shots: int
    seed: int
    classnames: list  # of the classes to learn: all, or the base half
    items: list       # the few-shot sample, labelled from 0
    started: float
    features: torch.Tensor = None

    def plan(self, epoch):
        """The batches of an epoch, [(rows (B,), views (B,))]: the training images, shuffled, one random view of each.

        A last batch that is not full is dropped unless it is the only one, as in the authors' code."""
        rng = torch.Generator().manual_seed(1000003 * self.seed + epoch)
        n, size = len(self.items), self.args.batch_size
        order, views = torch.randperm(n, generator=rng), torch.randint(self.args.views or 1, (n,), generator=rng)
        return [(order[k * size:(k + 1) * size], views[k * size:(k + 1) * size]) for k in range(max(1, n // size))]

    def views(self, epoch):
        """The numbers of the augmented views that the epoch draws from: always the same, or with --views 0 a new one."""
        return list(range(self.args.views)) or [epoch]

    def batches(self, epoch):
        """Yields (f(x) (B, D), labels (B,)): features of the epoch's batches, encoded once for all epochs and runs."""
        if self.features is None or not self.args.views:
            self.features = encode_images(self.clip, self.items, self.args.views and self.args.cache, self.views(epoch))
        for rows, views in self.plan(epoch):
            yield self.features[rows, views], self.labels[rows]

    def pixel_batches(self, epoch):
        """Yields (pixels (B, 3, H, W), labels (B,), rows (B,), views (B,)) for a method that changes the image tower."""
        plan, numbers = self.plan(epoch), self.views(epoch)
        rows, views = (torch.cat(column).tolist() for column in zip(*plan))
        loader = load_pixels(self.clip, [self.items[r].path for r in rows], self.clip.augment, [[numbers[v]] for v in views], self.args.batch_size)
        for (rows, views), pixels in zip(plan, loader):
            yield pixels[:, 0], self.labels[rows], rows, views

    @functools.cached_property
    def labels(self):
        return torch.tensor([item.label for item in self.items], device=self.clip.device)

    def finish(self, prompt, log):
        """Evaluates, prints and records a learned prompt: an nn.Module with `class_features(classnames) -> (C, D)`.

        `log` is what the method tells of its training, a dict of numbers and of lists over epochs."""
        args, data, record = self.args, self.data, {}
        trained = time.time()
        if args.save and not args.load:
            save(self, prompt, args.save.format(shots=self.shots, seed=self.seed))
        if args.base_to_new:
            base, base_names = half(data.test, data.classnames, new=False)
            new, new_names = half(data.test, data.classnames, new=True)
            rows = {"base": self.evaluate(prompt, base, base_names, data.template), "new": self.evaluate(prompt, new, new_names, data.template)}
            rows["harmonic"] = {key: 2 / sum(1 / max(rows[part][key], 1e-9) for part in ("base", "new")) for key in ("zero_shot", "accuracy")}
            for part, row in rows.items():
                record.update({part: row["accuracy"], f"zero_shot_{part}": row["zero_shot"]})
        else:
            rows = {"all classes": self.evaluate(prompt, data.test, data.classnames, data.template)}
            record.update(rows["all classes"])
        record["transfer"] = {}
        for other in self.others:
            rows[other.name] = record["transfer"][other.name] = self.evaluate(prompt, other.test, other.classnames, other.template)
        ended, encoding = time.time(), self.clip.seconds
        print(f"{f'{data.name}, {self.shots} shots, seed {self.seed}':<34} zero-shot {self.method:>9}")
        for name, row in rows.items():
            print(f"  {name:<32} {row['zero_shot']:9.1f} {row['accuracy']:9.1f}", flush=True)
        record = {
            "method": self.method, "dataset": data.name, "backbone": meaning(self)["backbone"], "pretrained": args.pretrained,
            "shots": self.shots, "seed": self.seed, "protocol": "base-to-new" if args.base_to_new else "few-shot", **record, **log,
            "parameters": sum(p.numel() for p in prompt.parameters()), "seconds": {"encoding": round(encoding, 2), "training": round(trained - self.started, 2), "all": round(ended - self.started, 2)},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__},
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(), "flags": vars(args)}
        append_line(args.out, json.dumps(record))
        self.clip.seconds = 0

    @torch.no_grad()
    def evaluate(self, prompt, items, classnames, template):
        """Percent of the items that the written template and the learned prompt put into their class."""
        labels = torch.tensor([item.label for item in items], device=self.clip.device)
        percent = lambda f, w: 100 * (f @ w.T).argmax(-1).eq(labels).double().mean().item()
        f = encode_images(self.clip, items, self.args.cache)
        with self.clip.autocast():
            w = prompt.class_features(classnames)
        learned_f = encode_images(self.clip, items, None, encode=prompt.image_features) if hasattr(prompt, "image_features") else f  # the tower may have learned
        return {"zero_shot": percent(f, template_features(self.clip, template, classnames)), "accuracy": percent(learned_f, w.float())}


def runs(method, args, data, clip):
    """Yields one Run for every number of shots and every seed, the random numbers seeded.

    Under torchrun, or in a Slurm array, the runs are dealt out: every process takes its share and adds to the same file."""
    mine, processes = next(((int(os.environ[a]), int(os.environ[b])) for a, b in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"))
                            if a in os.environ and b in os.environ), (0, 1))
    mine = (mine - int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0))) // int(os.environ.get("SLURM_ARRAY_TASK_STEP", 1)) % processes
    turn = itertools.count()
    if args.base_to_new and not all(half(data.test, data.classnames, new)[0] for new in (False, True)):
        raise Problem(f"{args.dataset}: --base-to-new needs test images of both halves of the classes")
    others = [load_data(name, args.data_root) for name in args.transfer]  # what is missing is missed before the training
    if data.note:
        print(f"{data.name}: {data.note}")
    if not data.train and not args.load:
        raise Problem(f"{args.dataset} has no training images; it is for --transfer or --load")
    largest = max((sum(item.label == k for item in data.train) for k in range(len(data.classnames))), default=0)
    for shots in args.shots:
        if shots > largest and not args.load:
            print(f"{data.name} has no class with {shots} training images: using the {largest} there are")
        for seed in args.seeds:
            if next(turn) % processes != mine:
                continue
            items, classnames = few_shot(data.train, shots, seed), data.classnames
            if args.base_to_new:
                items, classnames = half(items, classnames, new=False)
            if not items and not args.load:
                raise Problem(f"{args.dataset} has no training images of the base classes")
            torch.manual_seed(seed)
            yield Run(method, args, clip, data, others, shots, seed, classnames, items, time.time())


def default_epochs(run):
    """CoOp's training length: 50, 100, 100, 200, 200 epochs for 1, 2, 4, 8, 16 shots; 50 on ImageNet."""
    return 50 if run.shots < 2 or run.data.name == "imagenet" else 100 if run.shots < 8 else 200


def learning_rate(epoch, epochs, lr):
    """The authors' schedule: one epoch at 1e-5, then half a cosine that has not quite come down to 0 at the end."""
    return 1e-5 if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def append_line(file, line):
    """Adds a line in one write, so that lines of several processes do not mix; a line that was cut short is closed first."""
    with open(file, "ab+") as out:
        cut = out.seek(0, os.SEEK_END) and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n"
        out.write(b"\n" * bool(cut) + line.encode() + b"\n")


def save(run, prompt, file):
    """What was learned, as safetensors, with the method and what its tensors are good for in the metadata."""
    write_whole(file, prompt.state_dict(), {"method": run.method, "dataset": run.data.name, "shots": str(run.shots), "seed": str(run.seed), "meaning": json.dumps(meaning(run))})


def meaning(run):
    """The flags without which a saved prompt's tensors would mean something else."""
    keys = ["pretrained", "position", "prompts", "towers", "depth"] + ["ctx_init"] * (run.method == "restore")
    return {"backbone": run.args.backbone.removeprefix(f"local-dir:{HERE}/"), **{key: vars(run.args)[key] for key in keys if key in vars(run.args)}}


def load(run, prompt, file):
    """Puts a saved prompt's tensors into `prompt`; raises Problem if it is of another method or shape."""
    try:
        with safe_open(file, "pt") as content:
            tensors, metadata = {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}
    except FileNotFoundError:
        raise Problem(f"--load {file}: no such file") from None
    except (SafetensorError, OSError):
        raise Problem(f"--load {file}: not a safetensors file") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in prompt.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if metadata.get("method") != run.method:
        raise Problem(f"--load {file}: was saved by {metadata.get('method', 'something else')}, not by {run.method}")
    for key, value in json.loads(metadata.get("meaning", "{}")).items():
        if meaning(run).get(key) != value:
            raise Problem(f"--load {file}: was learned with --{key.replace('_', '-')} {value}, not {meaning(run).get(key)}")
    if shapes != found:
        raise Problem(f"--load {file}: holds {found}, the flags given here (and the classes) ask for {shapes}")
    prompt.load_state_dict(tensors)
    return {"loaded": file}


# ---------------------------------------------------------------- python common.py: the comparison

def compare(file, markdown=False):
    """Prints mean and standard deviation over seeds of all runs recorded in `file`, per data set, backbone and protocol."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Problem(f"{file}: no results yet; every run of a method adds a line there") from None
    except UnicodeDecodeError:
        raise Problem(f"{file}: not a file of result lines") from None
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that was cut short
            r = json.loads(line)
            if isinstance(r, dict) and {"method", "dataset", "protocol", "shots", "seed", "flags"} <= set(r) and "loaded" not in r:
                records.append(r)
    plain = {"shots", "seeds", "transfer", "out", "cache", "save", "load", "data_root", "base_to_new", "dataset", "backbone", "pretrained", "device"}
    values = {}
    for r in records:
        for flag, value in r["flags"].items():
            values.setdefault((r["method"], flag), set()).add(str(value))
    groups = {}
    for r in records:  # flags that differ between runs of a method are part of its name; the last of equal runs counts
        name = " ".join([r["method"], *(f"--{flag.replace('_', '-')} {value}" for flag, value in r["flags"].items()
                                                   if flag not in plain and value is not None and len(values[r["method"], flag]) > 1)])
        group = groups.setdefault((r["dataset"], r["backbone"], r["protocol"]), {})
        group.setdefault(name, {}).setdefault(r["shots"], {})[r["seed"]] = r
    for (dataset, backbone, protocol), methods in sorted(groups.items()):
        title, shots = f"{dataset}, {backbone}, {protocol}", sorted({n for runs in methods.values() for n in runs})
        first = next(iter(next(iter(methods.values())).values()))
        zero_shot = next(iter(first.values()))
        if protocol == "few-shot":
            rows = [["zero-shot", *[f"{zero_shot['zero_shot']:.1f}"] * len(shots)]]
            rows += [[name, *(spread([r["accuracy"] for r in runs.get(n, {}).values()]) for n in shots)] for name, runs in methods.items()]
            table(title, ["accuracy", *(f"{n} shot{'s' * (n > 1)}" for n in shots)], rows, markdown)
        else:
            columns = ["base", "new", "harmonic"]
            rows = [["zero-shot", "", *(f"{zero_shot[f'zero_shot_{c}']:.1f}" for c in columns), ""]]
            for name, runs in methods.items():
                for n, seeds in sorted(runs.items()):
                    gaps = [r["shift_after"]["gap"] for r in seeds.values() if r.get("shift_after")]
                    rows.append([name, str(n), *(spread([r[c] for r in seeds.values()]) for c in columns), f"{sum(gaps) / len(gaps):.2f}" if gaps else ""])
            table(title, ["accuracy", "shots", *columns, "shift gap"], rows, markdown)
        targets = sorted({t for runs in methods.values() for seeds in runs.values() for r in seeds.values() for t in r["transfer"]})
        if targets:
            rows = [["zero-shot", "", *(f"{zero_shot['transfer'][t]['zero_shot']:.1f}" if t in zero_shot["transfer"] else "" for t in targets)]]
            rows += [[name, str(n), *(spread([r["transfer"][t]["accuracy"] for r in seeds.values() if t in r["transfer"]]) for t in targets)]
                     for name, runs in methods.items() for n, seeds in sorted(runs.items())]
            table(f"{title}, transfer", ["accuracy", "shots", *targets], rows, markdown)


def spread(values):
    """Mean ± standard deviation (over n - 1) as text."""
    mean = sum(values) / max(1, len(values))
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}" if values else ""


def table(title, header, rows, markdown):
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    if markdown:
        print(f"\n**{title}**\n")
        for row in [header, ["---"] * len(header), *rows]:
            print("| " + " | ".join(row) + " |")
    else:
        print(f"\n{title}")
        for row in [header, *rows]:
            print("  " + row[0].ljust(widths[0]), *(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:])))


def list_data(root):
    """Prints for every data set whether it is there, its images in train, val and test, its template and its folder.

    Looks only: nothing is downloaded or drawn."""
    for name, spec in CATALOGUE.items():
        folder, counts = Path(root) / spec["images"], "not there"
        if folder.is_dir() and "split" in spec and not (Path(root) / spec["split"]).exists():
            counts = "no split file"
        elif folder.is_dir():
            try:
                data = load_data(name, root)
                counts = " ".join(f"{len(part):7d}" for part in (data.train, data.val, data.test))
            except Problem as problem:
                counts = str(problem)
        elif spec["kind"] == "world":
            counts = "drawn on first use"
        print(f"{name:<16} {counts:<24} {spec['template']:<42} {folder}")


def main():
    p = Parser(description="Compares the recorded runs, or lists the data sets.")
    p.add_argument("file", nargs="?", default="runs/results.jsonl", help="result lines (runs/results.jsonl)")
    p.add_argument("--markdown", action="store_true", help="tables to paste into notes")
    p.add_argument("--data", action="store_true", help="list the data sets instead: images in train, val, test, template, folder")
    p.add_argument("--data-root", default=str(HERE / "data"), metavar="DIR", help="where they are looked for (data)")
    args = p.parse_args()
    list_data(args.data_root) if args.data else compare(args.file, args.markdown)


if __name__ == "__main__":
    with one_line_errors():
        main()
