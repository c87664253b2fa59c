"""Speed and memory:  python tests/benchmark.py [--device cuda] [--only PART,...]

On a CPU, ratios of two measurements on the same machine, one behind the other:

step      Milliseconds of a training step of each method, and of the same step done as the authors'
          code does it: every image encoded in every step, and 77 tokens of every class. ProGrad
          encodes each image twice, once for zero-shot CLIP, and RESTORE twice, once without
          prompts. ViT-B-16, EuroSAT's 10 classes, batches of 32 (RESTORE: 4).
memory    Peak memory of the process in training steps of CoOp with 100 and 1000 classes, in chunks
          of 100, and with 77 tokens of 100 classes at once.
encoding  Images per second: the bare image encoder in fp32, JPEG files in fp32, and JPEG files
          with --precision amp.
together  Seconds of `python prograd.py` with a warm cache, alone and two at the same time.

On a GPU, in the precision that is its default (bf16, or fp16 on older ones):

images    Images per second: the bare encoder, JPEG files of 500 x 375, and ten crops of each.
training  Milliseconds of a training step of each method, and the allocator's peak, with 10 and with
          1000 classes.
whole     Seconds of `prograd.py` on EuroSAT's layout with 16 shots and 8000 test images.

All weights are random except those of the tiny CLIP; images are noise.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]
from conftest import make_images, make_run

import common
from data import features
from data.load import Item

NAMES = ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road",
         "Industrial Buildings", "Pasture Land", "Permanent Crop Land", "Residential Buildings",
         "River", "Sea or Lake"]
METHODS = ["coop", "prograd", "mvp_mi", "restore"]
VIT = ["--backbone", "ViT-B-16", "--pretrained", "random"]


def load(device="cpu", precision="fp32", chunk=128):
    return common.load_clip("ViT-B-16", "random", device, precision, chunk)


def now(clip):
    """Return the time, after a GPU has done what it was given."""
    if clip.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, times=3):
    """Return the median seconds of a call, after one that is not counted."""
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---------------------------------------------------------------- a training step

encode_text, pad = common.encode_text, common.pad


def full_pad(prompts):
    """common.pad, but always to 77 tokens."""
    x, last = pad(prompts)
    return F.pad(x, (0, 0, 0, 77 - x.shape[1])), last


def full_text(clip, shared, own):
    """common.encode_text, but of all 77 tokens of every prompt, without chunks."""
    x, last = full_pad([[*shared, *parts] for parts in own])
    text = clip.text
    x = text.transformer(x + text.positional_embedding, attn_mask=text.attn_mask)
    x = text.ln_final(x[torch.arange(len(x)), last]) @ text.text_projection
    return F.normalize(x.float(), dim=-1)


class Steps:
    """A method's own train() on random batches; `authors`: as the authors' code does a step."""

    def __init__(self, method, clip, names, authors=False):
        script = importlib.import_module(method)
        self.method, self.train, self.clip, self.authors = method, script.train, clip, authors
        self.run = make_run(clip, script, names, None, *VIT, "--device", clip.device,
                            "--epochs", "1", "--views", "1")
        self.run.batches = self.run.pixel_batches = self.batches
        size, rng = self.run.args.batch_size, torch.Generator().manual_seed(0)
        self.pixels = torch.randn(size, 3, 224, 224, generator=rng).to(clip.device)
        self.y = torch.randint(len(names), (size,), generator=rng).to(clip.device)
        self.f = F.normalize(torch.randn(size, 512, generator=rng), dim=-1).to(clip.device)
        self.run.features, self.run.labels = self.f[:, None], self.y        # MVP-MI mixes them
        if method == "restore":
            self.prompt = script.Prompt(clip, self.run.args)
            states = torch.ones(size, 1, 12, 768)                           # of 12 blocks
            script.image_states = lambda *_: states
        else:
            start = script.initial_context(self.run)
            self.prompt = script.Prompt(clip, *(start if method == "prograd" else [start]))

    def batches(self, epoch):
        """Yield a batch as often as asked for; the first step does not count."""
        rows, encoded = torch.arange(len(self.y)), self.authors and self.clip.visual
        for k in range(1 + self.count):
            if k == 1:
                self.began = now(self.clip)
            f = self.f
            if encoded and self.method == "restore":
                self.prompt.encode_image(self.pixels, [])                   # states without prompts
            elif encoded:
                f = self.clip.encode_image(self.pixels)
            if encoded and self.method == "prograd":
                self.clip.encode_image(self.pixels)                         # for zero-shot CLIP
            yield (self.pixels, self.y, rows, 0 * rows) if self.method == "restore" else (f, self.y)
        self.ended = now(self.clip)

    def seconds(self, count=5):
        """Return the mean seconds of a step."""
        self.count = count
        if self.authors:
            common.encode_text, common.pad = full_text, full_pad
        try:
            self.train(self.prompt, self.run)
        finally:
            common.encode_text, common.pad = encode_text, pad
        return (self.ended - self.began) / count


def step():
    for method in METHODS:
        ours = Steps(method, load(), NAMES).seconds()
        authors = Steps(method, load(), NAMES, authors=True).seconds(2)
        print(f"step      {method:<8} {1000 * ours:7.0f} ms, the authors' way "
              f"{1000 * authors:6.0f} ms: {authors / ours:.1f} times")


def training():
    for classes in (10, 1000):
        names = NAMES if classes == 10 else [f"{NAMES[k % 10]} {k}" for k in range(classes)]
        for method in METHODS:
            steps = Steps(method, load("cuda", "amp", 1024), names)
            torch.cuda.reset_peak_memory_stats()
            each = steps.seconds(20)
            print(f"training  {method:<8} {classes:4d} classes {1000 * each:7.1f} ms a step, "
                  f"{torch.cuda.max_memory_allocated() / 2**20:6.0f} MiB")


def memory():
    def child(*words):
        """Return the peak memory of steps in a process of its own, MiB; malloc keeps nothing."""
        done = subprocess.run([sys.executable, __file__, "--grow", *words], text=True, check=True,
                              capture_output=True, env={**os.environ,
                                                        "MALLOC_MMAP_THRESHOLD_": "65536"})
        return float(done.stdout)

    few, many, authors = child("100", "ours"), child("1000", "ours"), child("100", "authors")
    print(f"memory    100 classes {few:.0f} MiB, 1000 classes {many:.0f} MiB: {many / few:.2f} "
          f"times; 77 tokens of 100 classes {authors:.0f} MiB")


def grow(classes, way):
    """Print the peak memory of this process after two steps of CoOp, in MiB."""
    clip = load(chunk=100)
    clip.visual = clip.model.visual = None
    names = [f"number {k}" for k in range(int(classes))]
    Steps("coop", clip, names, authors=way == "authors").seconds(2)
    # getrusage's peak would count the parent's memory, too, from before the program began.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


# ---------------------------------------------------------------- images

@torch.no_grad()
def bare(clip, size, count):
    """Return the images per second of the image encoder alone, in batches."""
    x = torch.randn(size, 3, 224, 224, device=clip.device)

    def encode():
        for _ in range(count // size):
            clip.encode_image(x)
        now(clip)

    return count / timed(encode)


NOISE = common.Data("noise", NAMES, "{}", "{}")


def encoding():
    fp32, amp = load(), load(precision="amp")
    with tempfile.TemporaryDirectory() as folder:
        items = [Item(path, 0) for path in make_images(Path(folder) / "noise", 64, 256)]
        alone = bare(fp32, 8, 64)
        files = 64 / timed(lambda: common.encode_images(fp32, NOISE, items))
        half = 64 / timed(lambda: common.encode_images(amp, NOISE, items))
    print(f"encoding  bare {alone:.1f} images/s, files {files:.1f}: {files / alone:.2f} times; "
          f"amp ({amp.dtype}) {half:.1f}: {half / files:.2f} times fp32")


def images():
    clip = load("cuda", "amp", 1024)
    print(f"images    bare encoder {bare(clip, 128, 2560):6.0f} images/s ({clip.dtype})")
    with tempfile.TemporaryDirectory() as folder:
        items = [Item(Path(folder) / f"{k}.jpg", 0) for k in range(4096)]
        for item in items:                              # as large as photographs, 70 KB
            Image.effect_noise((500, 375), 25).convert("RGB").save(item.path)
        for what, some, views in (("files", items, None), ("ten crops", items[:512], range(10))):
            start = now(clip)
            count = common.encode_images(clip, NOISE, some, views=views)[..., 0].numel()
            print(f"images    {what:<12} {count / (now(clip) - start):6.0f} images/s, "
                  f"{features.count_workers()} processes read")


# ---------------------------------------------------------------- whole commands

def command(*flags):
    """Start ProGrad as a user would."""
    return subprocess.Popen([sys.executable, HERE / "prograd.py", *flags],
                            stdout=subprocess.DEVNULL)


def together():
    with tempfile.TemporaryDirectory() as folder:
        def wall(*names):
            start = time.perf_counter()
            running = [command("--cache", folder, "--out", f"{folder}/{name}")
                       for name in names]
            assert not any([process.wait() for process in running])
            return time.perf_counter() - start

        wall("first")                                                       # fills the cache
        alone, two = wall("alone"), wall("two", "more")
    print(f"together  alone {alone:.1f} s, two {two:.1f} s: {two / alone:.2f} times")


def whole():
    with tempfile.TemporaryDirectory() as folder:
        split, root = {"train": [], "val": [], "test": []}, Path(folder) / "eurosat"
        for label, name in enumerate(NAMES):            # 16 training and 800 test images of each
            for k, path in enumerate(make_images(root / "2750" / name, 816)):
                split["train" if k < 16 else "test"].append([f"{name}/{path.name}", label, name])
        (root / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
        start = time.perf_counter()
        command(*VIT, "--device", "cuda", "--dataset", "eurosat", "--data-root", folder,
                "--shots", "16", "--out", f"{folder}/r.jsonl").wait()
        wall = time.perf_counter() - start
        run = json.loads(Path(f"{folder}/r.jsonl").read_text())["seconds"]
    print(f"whole     run {run:.0f} s, with imports {wall:.0f} s")


PARTS = {"cpu": [step, memory, encoding, together],
         "cuda": [images, training, whole]}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=PARTS, default="cpu")
    p.add_argument("--only", metavar="PART,...", help="these parts (all)")
    p.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.grow:
        return grow(*args.grow)
    cuda = args.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in PARTS[args.device]:
        if not args.only or part.__name__ in args.only.split(","):
            part()


if __name__ == "__main__":
    main()
