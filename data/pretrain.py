"""Pre-trains the tiny CLIP of data/tiny_clip on pictures and sentences of data/world.py.

    python data/pretrain.py                 about an hour on two cores, no GPU; writes data/tiny_clip

CLIP's own loss (Radford et al. 2021, figure 3) on open_clip's own classes, with two additions for so small a scale.
  * A sentence that leaves things out is also true of other pictures of its batch: those pairs are not negatives.
  * A vision transformer learns slowly from a contrastive loss alone, so for the first part of the training the picture's
    attributes are also read off its feature by linear heads, whose weight falls to zero and which are then thrown away.
"""

import argparse
import json
import math
import random
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import world
from safetensors.torch import save_file

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 80, "heads": 4, "layers": 4},
}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
LIST = [(a, w) for a, ws in world.ATTRIBUTES.items() for w in ws]


def render(seed):
    """1,000 scenes and their pictures: scenes, codes (1000, 7), pixels (1000, 3, 64, 64) uint8."""
    rng = random.Random(seed)
    scenes = [world.scene(rng) for _ in range(1000)]
    pixels = np.stack([np.asarray(world.draw(s, rng, wild=rng.random() < 0.5)) for s in scenes])
    return scenes, codes(scenes), pixels.transpose(0, 3, 1, 2)


def codes(scenes):
    """Attributes as numbers (n, 7); -1 where a scene does not tell."""
    return np.array([[ws.index(s[a]) if a in s else -1 for a, ws in world.ATTRIBUTES.items()] for s in scenes])


def encode_text(model, table, tokens):
    """CLIP's text tower on sentences sorted by length and cut to the longest of each quarter. tokens (n, 77) -> (n, 128)"""
    lengths = tokens.argmax(-1) + 1
    order = lengths.argsort()
    out = []
    for part in order.chunk(4):
        n = int(lengths[part].max())
        x = table(model.small_id[tokens[part, :n]]) + model.positional_embedding[:n]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
        out.append(x[torch.arange(len(part)), lengths[part] - 1] @ model.text_projection)
    return torch.cat(out)[order.argsort()]


def jitter(pixels, gen):
    """uint8 pictures, each zoomed and moved a little, as normalised floats."""
    n = len(pixels)
    zoom = torch.empty(n, 1).uniform_(0.8, 1.05, generator=gen)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom[:, 0]
    theta[:, :, 2] = torch.empty(n, 2).uniform_(-0.12, 0.12, generator=gen)
    x = F.grid_sample(pixels.float() / 255, F.affine_grid(theta, pixels.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    return normalise(x)


def normalise(x):
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def save(model, table, used, folder):
    """An open_clip local-dir in half precision; the rows of tokens that never occurred are zeros, so that it packs small."""
    state = {n: v.detach().clone() for n, v in model.state_dict().items()}
    state["token_embedding.weight"] = torch.zeros_like(state["token_embedding.weight"])
    state["token_embedding.weight"][used] = table.weight.detach()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: v.half().contiguous() for n, v in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": MEAN, "std": STD}}, indent=2) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5500)
    p.add_argument("--pictures", type=int, default=100, help="thousands of pictures (100)")
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--attributes", type=float, default=0.6, help="part of the training with attribute heads (0.6)")
    p.add_argument("--out", default=Path(__file__).parent / "tiny_clip", type=Path)
    p.add_argument("--config", default="{}", help="changes to CONFIG['vision_cfg'], JSON")
    args = p.parse_args()
    CONFIG["vision_cfg"].update(json.loads(args.config))
    size = CONFIG["vision_cfg"]["image_size"]
    torch.manual_seed(0)
    gen, rng, start = torch.Generator().manual_seed(0), random.Random(0), time.time()

    with Pool() as pool:
        parts = pool.map(render, range(args.pictures))
    scenes = [s for part in parts for s in part[0]]
    truth = torch.from_numpy(np.concatenate([part[1] for part in parts]))
    pixels = torch.from_numpy(np.concatenate([part[2] for part in parts]))
    if size != world.SIZE:
        pixels = torch.cat([F.interpolate(c.float(), size=(size, size), mode="bicubic", antialias=True).clamp(0, 255).byte() for c in pixels.split(1000)])
    print(f"{len(scenes)} pictures in {time.time() - start:.0f} s", flush=True)

    tokenizer = open_clip.SimpleTokenizer()
    used = sorted({t for _ in range(40000) for t in tokenizer.encode(world.caption(rng.choice(scenes), rng)[0])} | {tokenizer.sot_token_id, tokenizer.eot_token_id})
    print(f"{len(used)} tokens")
    model = open_clip.CLIP(**CONFIG)
    model.small_id = torch.zeros(49408, dtype=torch.long)
    model.small_id[used] = torch.arange(len(used))
    table = torch.nn.Embedding(len(used), CONFIG["text_cfg"]["width"])
    torch.nn.init.normal_(table.weight, std=0.02)
    heads = torch.nn.Linear(CONFIG["embed_dim"], len(LIST))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / 0.07))
    named = [(n, q) for n, q in model.named_parameters() if not n.startswith("token_embedding")] + list(table.named_parameters()) + list(heads.named_parameters())
    decay = [q for n, q in named if q.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": [q for n, q in named if q.ndim <= 1], "weight_decay": 0}], betas=(0.9, 0.98))

    test = random.Random(-1)
    names = [f"{c} {s}" for c in ("blue", "brown", "green", "pink", "red", "yellow") for s in ("arrow", "heart", "ring", "star")]
    quiz = [(i, world.draw(world.scene(test, colour=n.split()[0], shape=n.split()[1], style=["photo", "cartoon"]), test, wild=True)) for i, n in enumerate(names) for _ in range(25)]
    as_tensor = lambda pics: F.interpolate(torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in pics]).float(), size=(size, size), mode="bicubic", antialias=True).clamp(0, 255) / 255

    def zero_shot(change):
        with torch.no_grad():
            w = F.normalize(encode_text(model, table, tokenizer([f"a photo of a {n}." for n in names])), dim=-1)
            f = F.normalize(model.encode_image(normalise(as_tensor([change(x) for _, x in quiz]))), dim=-1)
            return 100 * (f @ w.T).argmax(-1).eq(torch.tensor([i for i, _ in quiz])).float().mean().item()

    start = time.time()
    epoch = []
    for step in range(args.steps):
        lr = args.lr * min(1, (step + 1) / 200) * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        if len(epoch) < args.batch_size:
            epoch = torch.randperm(len(scenes), generator=gen).tolist()
        ids, epoch = epoch[:args.batch_size], epoch[args.batch_size:]
        said = [world.caption(scenes[i], rng) for i in ids]
        told, seen = torch.from_numpy(codes([s for _, s in said])), truth[ids]
        true = ((told[:, None] < 0) | (told[:, None] == seen[None])).all(-1)  # (sentence, picture)
        with torch.autocast("cpu", torch.bfloat16):
            f = model.encode_image(jitter(pixels[ids], gen)).float()
        w = encode_text(model, table, tokenizer([c for c, _ in said]))
        logits = model.logit_scale.exp().clamp(max=100) * F.normalize(w, dim=-1) @ F.normalize(f, dim=-1).T  # (sentence, picture)
        logits = logits.masked_fill(true & ~torch.eye(len(ids), dtype=torch.bool), -1e4)
        target = torch.arange(len(ids))
        loss = clip_loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        weight = max(0, 1 - step / (args.attributes * args.steps)) if args.attributes else 0
        if weight:
            guesses = heads(f).split([len(ws) for ws in world.ATTRIBUTES.values()], -1)
            loss = loss + weight * sum(F.cross_entropy(g, seen[:, k]) for k, g in enumerate(guesses))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([q for _, q in named], 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            model.eval()
            print(f"step {step + 1}  {time.time() - start:.0f} s  loss {clip_loss.item():.3f} ({loss.item():.2f})  scale {model.logit_scale.exp().item():.1f}"
                  f"  zero-shot {zero_shot(lambda x: x):.1f}, through the tint {zero_shot(world.tint):.1f}", flush=True)
            model.train()
            save(model, table, used, args.out)


if __name__ == "__main__":
    main()
