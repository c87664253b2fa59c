"""Speed and memory as ratios within one run, on this machine:  python tests/benchmark.py [--steps N]

1  A training step of coop and prograd on cached features against a step that does what the authors' code does: encode the
   32 images with CLIP's image tower (with ProGrad, the same again for the zero-shot teacher) and run all 77 tokens of
   every class through the text tower. ViT-B-16 with random weights, EuroSAT's 10 classes, 16 context tokens, batch 32.
2  Encoding JPEG files, decoding included, against bare model.encode_image on batches of the same size.
3  Peak memory and time of a training step of coop as classes grow, each in a process of its own, once with glibc's malloc
   as it is and once made to give back what was freed (MALLOC_MMAP_THRESHOLD_): what is held. The authors' 77 tokens
   of 1,000 classes do not fit into 24 GiB: their memory is extrapolated, in a straight line, from 50 and 100 classes.
4  A training step of the four methods as commands, on `shapes` with 16 shots: a long run's time less a short one's."""

import argparse
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
from conftest import made_up_pictures, made_up_run

import common
import coop
import prograd
from data.files import CATALOGUE, Item

NAMES = ["Annual Crop Land", "Forest", *list(CATALOGUE["eurosat"]["rename"].values())[1:7], "River", "Sea or Lake"]


def timed(function, times):
    """Median seconds of a call, after one that is not counted."""
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def full_length_features(clip, v, names):
    """Class features as the authors compute them: every prompt padded to 77 tokens."""
    model, (start, end) = clip.model, common.start_end(clip)
    prompts = [torch.cat([start, v, name, end]) for name, _ in common.name_tokens(clip, names)]
    x = torch.stack([F.pad(p, (0, 0, 0, 77 - len(p))) for p in prompts]) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return F.normalize(x[torch.arange(len(prompts)), [len(p) - 1 for p in prompts]] @ model.text_projection, dim=-1)


def authors_step(clip, pixels, y, v, zero_shot):
    """One step as in the authors' repositories: images anew, 77 tokens; the second image tower is ProGrad's teacher's."""
    model, w = clip.model, full_length_features(clip, v, NAMES)
    f = model.encode_image(pixels, normalize=True)
    with torch.no_grad():
        teacher = model.encode_image(pixels, normalize=True) @ zero_shot.T
    l_d, l_g = prograd.losses(clip.logit_scale * f @ w.T, clip.logit_scale * teacher, y)
    g_d = torch.autograd.grad(l_d, v, retain_graph=True)[0]
    g_g = torch.autograd.grad(l_g, v)[0]
    return prograd.project(g_d, g_g)


def grow(classes, chunk):
    """In a process of its own: prints peak memory in MiB and seconds of a training step, cut and in chunks, or, with chunk 0, as the authors."""
    flags = ["--backbone", "ViT-B-16", "--pretrained", "random", "--device", "cpu", "--out", f"{tempfile.gettempdir()}/unused.jsonl", "--class-chunk", str(chunk or 1)]
    args = common.parse(common.flags("", lr=0.002, batch_size=32, n_ctx=16), flags)
    clip, names = common.load_clip(args), [f"number {k}" for k in range(classes)]
    clip.model.visual = None
    f, y = F.normalize(torch.randn(32, 512), dim=-1), torch.randint(classes, (32,))
    args.__dict__.update(epochs=1, ctx_init="", class_specific=False)
    if chunk:
        run = made_up_run(clip, names, "a photo of a {}.", [(f, y)], args)
        prompt = coop.Prompt(clip, coop.first_context(run, args))
        seconds = timed(lambda: coop.train(prompt, run, args), 2)
    else:
        v = torch.randn(16, 512).requires_grad_()
        start = time.perf_counter()
        F.cross_entropy(clip.logit_scale * f @ full_length_features(clip, v, names).T, y).backward()
        seconds = time.perf_counter() - start
    # VmHWM begins anew with the program; getrusage would still count the parent's memory that was copied in the fork.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024, seconds)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5, help="steps of each kind (5)")
    p.add_argument("--grow", type=int, nargs=2, metavar=("CLASSES", "CHUNK"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.grow:
        return grow(*args.grow)
    steps = args.steps
    flags = ["--backbone", "ViT-B-16", "--pretrained", "random", "--device", "cpu", "--out", f"{tempfile.gettempdir()}/unused.jsonl"]
    args = common.parse(common.flags("", lr=0.002, batch_size=32, n_ctx=16), flags)
    clip = common.load_clip(args)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    f, y, pixels = F.normalize(torch.randn(32, 512), dim=-1), torch.randint(10, (32,)), torch.randn(32, 3, 224, 224)
    template = "a centered satellite photo of {}."
    zero_shot = common.template_features(clip, template, NAMES)
    args.__dict__.update(epochs=1, ctx_init="", class_specific=False, projection=1.0, temperature=1.0)
    seconds = {"authors' way": timed(lambda: authors_step(clip, pixels, y, torch.randn(16, 512).mul(0.02).requires_grad_(), zero_shot), max(2, steps // 2))}
    for script in (coop, prograd):
        run = made_up_run(clip, NAMES, template, [(f, y)] * steps, args)
        prompt = script.Prompt(clip, script.first_context(run, args))
        seconds[script.__name__] = timed(lambda: script.train(prompt, run, args), 3) / steps  # noqa: B023
    authors = seconds["authors' way"]
    for name, each in seconds.items():
        print(f"{name:<14} {each:7.3f} s a step   {authors / each:6.1f} times as fast")

    with tempfile.TemporaryDirectory() as folder:
        items = [Item(path, 0, "") for path in made_up_pictures(Path(folder) / "a", 64, size=256)]
        with torch.no_grad():
            bare = timed(lambda: [clip.model.encode_image(batch) for batch in torch.randn(64, 3, 224, 224).split(32)], 3)
        files = timed(lambda: common.encode_images(clip, items, None), 3)
    print(f"encoding       {64 / files:.1f} JPEGs a second, {64 / bare:.1f} bare: {bare / files:.2f} of the throughput")

    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for method, batch_size, more in (("coop", 32, 100), ("prograd", 32, 100), ("mvp_mi", 32, 100), ("restore", 4, 10)):
            seconds = []
            for epochs in (3, 3, 3 + more):  # the first one fills the cache
                flags = ["--shots", "16", "--epochs", str(epochs), "--cache", folder, "--out", f"{folder}/results.jsonl"]
                subprocess.run([sys.executable, HERE / f"{method}.py", *flags], stdout=subprocess.DEVNULL, check=True)
                seconds.append(json.loads(Path(f"{folder}/results.jsonl").read_text().splitlines()[-1])["seconds"]["training"])
            steps[method] = (seconds[2] - seconds[1]) / (more * 16 * 24 / batch_size)
            print(f"{method:<14} {1000 * steps[method]:7.1f} ms a step of {batch_size} images of shapes, {steps[method] / steps['coop']:.1f} times coop's")

    def child(classes, chunk, **environment):
        command = [sys.executable, __file__, "--grow", str(classes), str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
        mib, seconds = map(float, done.stdout.split())
        what = f"chunks of {chunk}" if chunk else "77 tokens each"
        print(f"{classes:5d} classes, {what:<14} {mib:6.0f} MiB at most, {1000 * seconds / classes:6.1f} ms a class")
        return mib, seconds / classes

    one, ten = child(100, 100), child(1000, 100)
    held = [child(classes, 100, MALLOC_MMAP_THRESHOLD_="65536")[0] for classes in (100, 1000)]
    chunks, piece = child(400, 100), child(400, 400)
    few, more = child(50, 0), child(100, 0)
    authors = more[0] + (more[0] - few[0]) / 50 * 900
    print(f"1000 classes need {ten[0] / one[0]:.2f} times the process memory of 100 with the same chunk, {held[1] / held[0]:.2f} without what malloc keeps,")
    print(f"and {ten[0] / authors:.2f} of the authors' way ({authors:.0f} MiB, extrapolated); 400 in chunks take {chunks[1] / piece[1]:.2f} times the time of one piece")


if __name__ == "__main__":
    main()
