"""Pre-trains the tiny CLIP of data/tiny_clip on pictures and sentences of data/world.py.

    python data/pretrain.py        about an hour on two cores, no GPU; writes data/tiny_clip
    python data/world.py --check   then tells what it recognises

CLIP's loss (Radford et al. 2021, figure 3) on open_clip's model: of B pictures with features f_i
and their B sentences with features w_i, all of length 1, and a learned scale s, the cross-entropy
of s w_i.f_j over the pictures j, and over the sentences i, where i = j is right; their mean.

Two things are added for so small a scale. A sentence that leaves things out is also true of other
pictures of its batch: those pairs are no negatives. And vision transformers learn slowly from this
loss alone, so for the first 60 % of the steps linear heads also read the attributes off the picture
features; their loss counts less and less.
"""

import argparse
import json
import math
import random
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import world
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 80, "heads": 4, "layers": 4},
}
PIXELS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
B, LR, WARMUP, WEIGHT_DECAY, HEADS_UNTIL = 256, 1.5e-3, 200, 0.05, 0.6


def render(seed):
    """1,000 scenes and their pictures, (1000, 3, 64, 64) uint8."""
    rng = random.Random(seed)
    scenes = [world.scene(rng) for _ in range(1000)]
    pictures = [np.asarray(world.draw(s, rng, wild=rng.random() < 0.5)) for s in scenes]
    return scenes, np.stack(pictures).transpose(0, 3, 1, 2)


def codes(scenes):
    """The attributes as numbers (n, 7); -1 where a sentence does not tell."""
    return torch.tensor([[words.index(s[a]) if a in s else -1
                          for a, words in world.ATTRIBUTES.items()] for s in scenes])


def jitter(pixels, gen):
    """Pictures (n, 3, 64, 64) uint8, each zoomed and moved a little, normalised as CLIP's are."""
    n = len(pixels)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.empty(n).uniform_(0.8, 1.05, generator=gen)
    theta[:, :, 2] = torch.empty(n, 2).uniform_(-0.12, 0.12, generator=gen)
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    x = F.grid_sample(pixels.float() / 255, grid, padding_mode="reflection", align_corners=False)
    return normalize(x, **PIXELS)


def encode_text(model, table, used, tokens):
    """CLIP's text tower, tokens (n, 77) -> (n, 128); `table` embeds the few tokens that are `used`.
    Each quarter of the sentences, by length, is cut to its longest: exact, the tower is causal."""
    rows = torch.searchsorted(used, tokens)
    last = tokens.argmax(-1)  # the end-of-text token has the highest number
    order, features = last.argsort(), []
    for part in order.chunk(4):
        n = int(last[part].max()) + 1
        x = table(rows[part, :n]) + model.positional_embedding[:n]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
        features.append(x[torch.arange(len(part)), last[part]] @ model.text_projection)
    return torch.cat(features)[order.argsort()]


def save(model, table, used, folder):
    """An open_clip local-dir in half precision. The embeddings of unused tokens are zeros."""
    model.token_embedding.weight.data.zero_()[used] = table.weight.data
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "open_clip_model.part"
    save_file({n: v.half().contiguous() for n, v in model.state_dict().items()}, unfinished)
    unfinished.replace(folder / "open_clip_model.safetensors")
    config = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PIXELS}, indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n")


def contrastive(f, w, scale, true):
    """CLIP's loss of B pictures f and sentences w, (B, D) each; true (B, B): the sentence (row) is
    true of the picture (column), so that the pair is no negative unless it is the pair itself."""
    logits = scale * F.normalize(w, dim=-1) @ F.normalize(f, dim=-1).T
    logits = logits.masked_fill(true & ~torch.eye(len(f), dtype=torch.bool), -1e4)
    right = torch.arange(len(f))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--steps", type=int, default=5500, help="batches of 256 pairs (5500)")
    p.add_argument("--pictures", type=int, default=100, help="thousands of pictures (100)")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_clip")
    args = p.parse_args()
    torch.manual_seed(0)
    gen, rng = torch.Generator().manual_seed(0), random.Random(0)
    with Pool() as pool:
        scenes, pixels = zip(*pool.map(render, range(args.pictures)))
    scenes, pixels = sum(scenes, []), torch.from_numpy(np.concatenate(pixels))
    attributes = codes(scenes)
    tokenizer = open_clip.SimpleTokenizer()
    sentences = [world.caption(rng.choice(scenes), rng)[0] for _ in range(40000)]
    used = tokenizer(sentences).unique()[1:]  # about 110; the first is 0, which fills up to 77

    model = open_clip.CLIP(**CONFIG)
    table = torch.nn.Embedding(len(used), CONFIG["text_cfg"]["width"])
    torch.nn.init.normal_(table.weight, std=0.02)
    counts = [len(words) for words in world.ATTRIBUTES.values()]
    heads = torch.nn.Linear(CONFIG["embed_dim"], sum(counts))
    learned = [v for name, v in model.named_parameters() if name != "token_embedding.weight"]
    learned += [*table.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW([
        {"params": [v for v in learned if v.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [v for v in learned if v.ndim <= 1], "weight_decay": 0}], betas=(0.9, 0.98))

    epoch = []
    for step in range(args.steps):
        if len(epoch) < B:
            epoch = torch.randperm(len(scenes), generator=gen).tolist()
        batch, epoch = epoch[:B], epoch[B:]
        sentences, told = zip(*(world.caption(scenes[i], rng) for i in batch))
        told, seen = codes(told), attributes[batch]
        true = ((told[:, None] < 0) | (told[:, None] == seen[None])).all(-1)  # (B, B)
        with torch.autocast("cpu", torch.bfloat16):
            f = model.encode_image(jitter(pixels[batch], gen)).float()
        w = encode_text(model, table, used, tokenizer(sentences))
        clip_loss = contrastive(f, w, model.logit_scale.exp().clamp(max=100), true)
        head_loss = sum(map(F.cross_entropy, heads(f).split(counts, -1), seen.T))
        loss = clip_loss + max(0, 1 - step / (HEADS_UNTIL * args.steps)) * head_loss
        lr = LR * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}  loss {clip_loss.item():.4f}, with heads {loss.item():.4f}")
    save(model, table, used, args.out)
