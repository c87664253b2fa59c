"""Speed and memory as ratios within one run, on this machine:  tests/benchmark.py [--only PART,...]

step      A training step of coop and prograd on cached features against a step that does what the
          authors' code does: encode the 32 images with CLIP's image tower (with ProGrad, the same
          again for the zero-shot teacher) and run all 77 tokens of every class through the text
          tower. ViT-B-16 with random weights, EuroSAT's 10 classes, 16 context tokens, batch 32.
encoding  Encoding JPEG files, decoding included, against bare model.encode_image on batches of the
          same size.
methods   A training step of the four methods as commands, on `shapes` with 16 shots: a long run's
          time less a short one's.
memory    Peak memory and time of a training step of coop as classes grow, each in a process of its
          own, once with glibc's malloc as it is and once made to give back what was freed
          (MALLOC_MMAP_THRESHOLD_): what is held. The authors' 77 tokens of 1,000 classes do not fit
          into 24 GiB: their memory is extrapolated, in a straight line, from 50 and 100 classes.
together  `python prograd.py` as installed, with a warm cache and no environment variable for
          threads: alone, and two and four at the same time.
killed    Encoding 800 pictures in EuroSAT's layout with ViT-B-16, killed three times on the way
          and begun again, against the same undisturbed; with and without the imports of each start.
job       The whole of `prograd.py` on EuroSAT's layout, encoding and start included, against
          the authors' way, extrapolated from ten of its steps. Made-up pictures, 10 classes,
          4 shots, 100 epochs, 200 test pictures, ViT-B-16 with random weights. Also: --job"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE), str(Path(__file__).parent)]
from conftest import EUROSAT, made_up_pictures, made_up_run

import common
import coop
import prograd
from data.files import CATALOGUE, Item

RENAMED = CATALOGUE["eurosat"]["rename"]
NAMES = ["Annual Crop Land", "Forest", *list(RENAMED.values())[1:7], "River", "Sea or Lake"]
TEMPLATE = "a centered satellite photo of {}."
RANDOM_VIT = ["--backbone", "ViT-B-16", "--pretrained", "random", "--device", "cpu"]


def timed(function, times):
    """Median seconds of a call, after one that is not counted."""
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def vit(*flags):
    """(args, clip): ViT-B-16 with random weights."""
    out = ["--out", f"{tempfile.gettempdir()}/unused.jsonl"]
    args = common.parse(common.flags("", lr=0.002, batch_size=32, n_ctx=16),
                        [*RANDOM_VIT, *out, *flags])
    more = {"ctx_init": "", "class_specific": False, "projection": 1.0, "temperature": 1.0}
    args.__dict__.update(epochs=1, **more)
    return args, common.load_clip(args)


# ------------------------------------------------------- the authors' way

def full_length_features(clip, v, names):
    """Class features as the authors compute them: every prompt padded to 77 tokens."""
    model, (start, end) = clip.model, common.start_end(clip)
    pairs = common.name_embeddings(clip, names)
    prompts = [torch.cat([start, v, *pair, end]) for pair in pairs]
    x = torch.stack([F.pad(p, (0, 0, 0, 77 - len(p))) for p in prompts])
    x = x + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    last = x[torch.arange(len(prompts)), [len(p) - 1 for p in prompts]]
    return F.normalize(last @ model.text_projection, dim=-1)


def authors_step(clip, pixels, y, v, zero_shot):
    """One step of ProGrad as in its authors' repository: the images anew, 77 tokens, and the image
    tower once more for the zero-shot teacher."""
    model, w = clip.model, full_length_features(clip, v, NAMES)
    f = model.encode_image(pixels, normalize=True)
    with torch.no_grad():
        teacher = model.encode_image(pixels, normalize=True) @ zero_shot.T
    logits, p_zs = clip.logit_scale * f @ w.T, F.softmax(clip.logit_scale * teacher, -1)
    g_d = torch.autograd.grad(F.cross_entropy(logits, y), v, retain_graph=True)[0]
    g_g = torch.autograd.grad(F.cross_entropy(logits, p_zs), v)[0]
    return prograd.project(g_d, g_g)


def noise_context():
    return torch.randn(16, 512).mul(0.02).requires_grad_()


# ------------------------------------------------------- the parts

def step(steps):
    args, clip = vit()
    f, y = F.normalize(torch.randn(32, 512), dim=-1), torch.randint(10, (32,))
    pixels = torch.randn(32, 3, 224, 224)
    zero_shot = common.template_features(clip, TEMPLATE, NAMES)
    authors = timed(lambda: authors_step(clip, pixels, y, noise_context(), zero_shot),
                    max(2, steps // 2))
    print(f"authors' way   {authors:7.3f} s a step")
    for script in (coop, prograd):
        run = made_up_run(clip, NAMES, TEMPLATE, [(f, y)] * steps, args)
        start = script.first_context(run, args)
        prompt = script.Prompt(clip, *(start if isinstance(start, tuple) else (start,)))
        each = timed(lambda: script.train(prompt, run, args), 3) / steps  # noqa: B023
        print(f"{script.__name__:<14} {each:7.3f} s a step   {authors / each:6.1f} times as fast")


def encoding(steps):
    _, clip = vit()
    with tempfile.TemporaryDirectory() as folder:
        paths = made_up_pictures(Path(folder) / "a", 64, size=256)
        items = [Item(path, 0, "") for path in paths]
        with torch.no_grad():
            batches = torch.randn(64, 3, 224, 224).split(8)
            bare = timed(lambda: [clip.model.encode_image(batch) for batch in batches], 3)
        files = timed(lambda: common.encode_images(clip, items, None), 3)
    print(f"encoding       {64 / files:.1f} JPEGs a second, {64 / bare:.1f} bare: "
          f"{bare / files:.2f} of the throughput")


def methods(steps):
    with tempfile.TemporaryDirectory() as folder:
        out, each = Path(folder) / "results.jsonl", {}
        for method, batch_size, more in (("coop", 32, 100), ("prograd", 32, 100),
                                         ("mvp_mi", 32, 100), ("restore", 4, 10)):
            seconds = []
            for epochs in (3, 3, 3 + more):  # the first one fills the cache
                flags = ["--shots", "16", "--epochs", str(epochs), "--cache", folder, "--out", out]
                subprocess.run([sys.executable, HERE / f"{method}.py", *flags],
                               stdout=subprocess.DEVNULL, check=True)
                record = json.loads(out.read_text().splitlines()[-1])
                seconds.append(record["seconds"]["training"])
            each[method] = (seconds[2] - seconds[1]) / (more * 16 * 24 / batch_size)
            print(f"{method:<14} {1000 * each[method]:7.1f} ms a step of {batch_size} images "
                  f"of shapes, {each[method] / each['coop']:.1f} times coop's")


def memory(steps):
    def child(classes, chunk, **environment):
        command = [sys.executable, __file__, "--grow", str(classes), str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True,
                              env={**os.environ, **environment})
        mib, seconds = map(float, done.stdout.split())
        what = f"chunks of {chunk}" if chunk else "77 tokens each"
        print(f"{classes:5d} classes, {what:<14} {mib:6.0f} MiB at most, "
              f"{1000 * seconds / classes:6.1f} ms a class")
        return mib, seconds / classes

    one, ten = child(100, 100), child(1000, 100)
    held = [child(classes, 100, MALLOC_MMAP_THRESHOLD_="65536")[0] for classes in (100, 1000)]
    chunks, whole = child(400, 100), child(400, 400)
    few, more = child(50, 0), child(100, 0)
    authors = more[0] + (more[0] - few[0]) / 50 * 900
    print(f"1000 classes need {ten[0] / one[0]:.2f} times the process memory of 100 with the same "
          f"chunk, {held[1] / held[0]:.2f} without what malloc keeps,\n"
          f"and {ten[0] / authors:.2f} of the authors' way ({authors:.0f} MiB, extrapolated); "
          f"400 in chunks take {chunks[1] / whole[1]:.2f} times the time of one piece")


def grow(classes, chunk):
    """In a process of its own: prints peak memory in MiB and seconds of a training step, cut and in
    chunks, or, with chunk 0, as the authors."""
    args, clip = vit("--class-chunk", str(chunk or 1))
    names = [f"number {k}" for k in range(classes)]
    clip.model.visual = None
    f, y = F.normalize(torch.randn(32, 512), dim=-1), torch.randint(classes, (32,))
    if chunk:
        run = made_up_run(clip, names, "a photo of a {}.", [(f, y)], args)
        prompt = coop.Prompt(clip, coop.first_context(run, args))
        seconds = timed(lambda: coop.train(prompt, run, args), 2)
    else:
        v, start = noise_context(), time.perf_counter()
        logits = clip.logit_scale * f @ full_length_features(clip, v, names).T
        F.cross_entropy(logits, y).backward()
        seconds = time.perf_counter() - start
    # VmHWM begins anew with the program; getrusage still counts the parent's memory in the fork.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024, seconds)


def as_installed():
    """The environment without what a user would set for threads."""
    threads = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "TORCH_NUM", "RANK", "WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if not name.startswith(threads)}


def together(steps):
    with tempfile.TemporaryDirectory() as folder:
        def wall(count):
            """Seconds until as many runs, started at once, have all ended."""
            command = [sys.executable, HERE / "prograd.py", "--cache", folder, "--again", "--out"]
            start = time.perf_counter()
            running = [subprocess.Popen([*command, f"{folder}/{count}-{k}.jsonl"],
                                        stdout=subprocess.DEVNULL, env=as_installed())
                       for k in range(count)]
            assert not any([process.wait() for process in running])
            return time.perf_counter() - start

        wall(1)  # fills the cache
        alone = wall(1)
        print(f"together       one alone {alone:.1f} s", end="", flush=True)
        for count, most in ((2, 1.6), (4, 3)):
            ratio = wall(count) / alone
            print(f", {count}: {ratio:.2f} times (wanted: {most:g})", end="", flush=True)
        print(f"; {os.cpu_count()} cores")


def eurosat_layout(root, train=4, test=20):
    """Made-up JPEGs of EuroSAT's size in its layout, with a split file: per class 4 and 20."""
    split = {"train": [], "val": [], "test": []}
    for label, name in enumerate(EUROSAT):
        paths = made_up_pictures(root / "eurosat/2750" / name, train + test)
        for k, path in enumerate(paths):
            split["train" if k < train else "test"].append([f"{name}/{path.name}", label, name])
    (root / CATALOGUE["eurosat"]["split"]).write_text(json.dumps(split))


def encode(folder, cache):
    """In a process of its own: encodes a layout's pictures, prints a digest of the features."""
    _, clip = vit()
    items = common.load_data("eurosat", folder).test
    print("ready", flush=True)
    features = common.encode_images(clip, items, cache)
    print(hashlib.sha256(features.numpy().tobytes()).hexdigest())


def killed(steps):
    with tempfile.TemporaryDirectory() as folder:
        eurosat_layout(Path(folder), 1, 80)

        def child(cache, most=None):
            """Seconds of encoding, and in all, until it ended or was killed; what it printed."""
            command = [sys.executable, __file__, "--encode", folder, f"{folder}/{cache}"]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                       env=as_installed())
            assert process.stdout.readline() == "ready\n"
            ready = time.perf_counter()
            try:
                printed = process.communicate(timeout=most)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                printed = process.communicate()[0] or "killed"
            end = time.perf_counter()
            return end - ready, end - start, printed

        undisturbed = child("undisturbed")
        parts = [child("killed", undisturbed[0] / 4) for _ in range(3)] + [child("killed")]
        encoding, whole, printed = zip(*parts)
        assert printed == ("killed", "killed", "killed", undisturbed[2]) and undisturbed[2]
        print(f"killed         {undisturbed[0]:.0f} s of encoding; killed three times "
              f"{sum(encoding) / undisturbed[0]:.2f} times as long (wanted: 1.1), "
              f"{sum(whole) / undisturbed[1]:.2f} with imports; the same features to the bit")


def job(steps):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        eurosat_layout(root)
        flags = ["--dataset", "eurosat", "--data-root", folder, "--cache", f"{folder}/cache",
                 "--out", f"{folder}/results.jsonl", "--shots", "4", "--epochs", "100"]
        start = time.perf_counter()
        subprocess.run([sys.executable, HERE / "prograd.py", *RANDOM_VIT, *flags],
                       stdout=subprocess.DEVNULL, env=as_installed(), check=True)
        ours = time.perf_counter() - start

        _, clip = vit()
        data = common.load_data("eurosat", folder)
        paths, views = [item.path for item in data.train] * 8, [[k] for k in range(320)]
        batches = common.load_pixels(paths, clip.augment, views, 32, "cpu")  # ten of 32
        y, zero_shot = torch.randint(10, (32,)), common.template_features(clip, TEMPLATE, NAMES)
        start = time.perf_counter()
        for pixels in batches:  # decoded and augmented anew, as theirs are
            authors_step(clip, pixels, y, noise_context(), zero_shot)
        each = (time.perf_counter() - start) / 10
        start = time.perf_counter()
        tested = [item.path for item in data.test[:50]]
        for pixels in common.load_pixels(tested, clip.preprocess, [[0]] * 50, 25, "cpu"):
            with torch.no_grad():
                clip.model.encode_image(pixels)
        authors = 100 * each + 4 * (time.perf_counter() - start)  # 40 images: a step of 32 an epoch
    print(f"job            {ours:.1f} s, the authors' way {authors:.0f} s "
          f"({each:.2f} s a step): {authors / ours:.1f} times as fast")


PARTS = {part.__name__: part
         for part in (step, encoding, methods, memory, together, killed, job)}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5, help="training steps of each kind in `step` (5)")
    p.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help="these parts (all)")
    p.add_argument("--job", dest="only", action="store_const", const="job", help="this part alone")
    p.add_argument("--grow", type=int, nargs=2, help=argparse.SUPPRESS)
    p.add_argument("--encode", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.grow:
        return grow(*args.grow)
    if args.encode:
        return encode(*args.encode)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in args.only.split(","):
        PARTS[part](args.steps)


if __name__ == "__main__":
    main()
