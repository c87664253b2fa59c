"""Speed and memory as ratios within one run, on this machine:  python tests/benchmark.py [--steps N]

1  A training step of coop and prograd on cached features against a step that does what the authors' code does: encode the
   32 images with CLIP's image tower (with ProGrad, the same again for the zero-shot teacher) and run all 77 tokens of
   every class through the text tower. ViT-B-16 with random weights, EuroSAT's 10 classes, 16 context tokens, batch 32.
2  Encoding JPEG files, decoding included, against bare model.encode_image on batches of the same size."""

import argparse
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from conftest import made_up_pictures

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


def authors_step(clip, pixels, y, v, zero_shot=None):
    """One step as in the authors' repositories: images anew, 77 tokens; the second image tower is ProGrad's teacher's."""
    model, (start, end) = clip.model, common.start_end(clip)
    prompts = [torch.cat([start, v, name, end]) for name, _ in common.name_tokens(clip, NAMES)]
    x = torch.stack([F.pad(p, (0, 0, 0, 77 - len(p))) for p in prompts]) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    w = F.normalize(x[torch.arange(len(prompts)), [len(p) - 1 for p in prompts]] @ model.text_projection, dim=-1)
    f = model.encode_image(pixels, normalize=True)
    with torch.no_grad():
        teacher = model.encode_image(pixels, normalize=True) @ zero_shot.T
    l_d, l_g = prograd.losses(clip.logit_scale * f @ w.T, clip.logit_scale * teacher, y)
    g_d = torch.autograd.grad(l_d, v, retain_graph=True)[0]
    g_g = torch.autograd.grad(l_g, v)[0]
    return prograd.project(g_d, g_g)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5, help="steps of each kind (5)")
    steps = p.parse_args().steps
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
        data = common.Data("eurosat", NAMES, template, template, [], [], [])
        run = Namespace(clip=clip, classnames=NAMES, data=data, batches=lambda epoch: [(f, y)] * steps)
        prompt = script.Prompt(clip, script.first_context(clip, args, run))
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


if __name__ == "__main__":
    main()
