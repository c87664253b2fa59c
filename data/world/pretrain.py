"""Pre-train the tiny CLIP of data/world/tiny_clip on images and captions of the embedded world.

    python -m data.world.pretrain        80 to 100 minutes on two cores, no GPU
    python -m data.world.sets --check    then tests the admission rules

Both phases minimize CLIP's loss (Radford et al. 2021, figure 3).

Phase 1 trains both encoders on short captions, with two additions for so small a scale. A caption
is often true of other images of its batch: those pairs are no negatives. Linear heads classify the
attributes from the image features, with a weight that falls to 0, because vision transformers learn
slowly from CLIP's loss alone.

Phase 2 freezes the image encoder and trains the text encoder on long captions and new images. Some
captions belong to another image, as on the web. The logit scale settles where zero-shot CLIP is
about as confident as it is accurate.
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
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from data.world.captions import long_caption, short_caption
from data.world.draw import ATTRIBUTES, draw, sample_scene

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 80, "heads": 4, "layers": 4},
}
PIXELS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
B, LR, WEIGHT_DECAY = 256, 1.5e-3, 0.05
HEADS_UNTIL = 0.6   # phase 1: the heads' weight falls to 0 over this share of the steps
OTHER_IMAGE = 0.07  # phase 2: the share of captions that belong to another image
WORD_STD = 0.02     # of OpenAI's word embeddings, for which CoOp's initial noise is made
TOKENIZER = open_clip.SimpleTokenizer()


def render(seed):
    """Draw 1,000 scenes; return them and their images, (1000, 3, 64, 64) uint8."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(1000)]
    images = [np.asarray(draw(scene, rng, wild=rng.random() < 0.5)) for scene in scenes]
    return scenes, np.stack(images).transpose(0, 3, 1, 2)


def render_all(seeds):
    """Draw 1,000 scenes a seed; return them and their images, (n, 3, 64, 64) uint8."""
    with Pool() as pool:
        scenes, images = zip(*pool.map(render, seeds))
    return sum(scenes, []), torch.from_numpy(np.concatenate(images))


def encode_attributes(scenes):
    """Return the words' numbers, (n, 7); -1 for an attribute that a caption does not tell."""
    return torch.tensor([[words.index(scene[a]) if a in scene else -1
                          for a, words in ATTRIBUTES.items()] for scene in scenes])


def jitter(images, gen):
    """Zoom and shift images (n, 3, 64, 64) uint8 a little, and normalize them as CLIP's are."""
    n = len(images)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.empty(n).uniform_(0.8, 1.05, generator=gen)
    theta[:, :, 2] = torch.empty(n, 2).uniform_(-0.12, 0.12, generator=gen)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    x = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    return normalize(x, **PIXELS)


def find_tokens(captions):
    """Return the tokens that occur in captions, sorted, (n,)."""
    words = {word for caption in captions for word in caption.split()}
    return TOKENIZER(sorted(words)).unique()[1:]  # the first is 0, which pads to 77


def encode_text(model, table, used, tokens):
    """CLIP's text encoder, tokens (n, 77) -> (n, 128); `table` embeds the tokens that are `used`.

    Each quarter of the captions, by length, is cut to its longest: exact, the encoder is causal."""
    rows = torch.searchsorted(used, tokens)
    last = tokens.argmax(-1)  # the end-of-text token has the highest number
    order, features = last.argsort(), []
    for part in order.chunk(4):
        n = int(last[part].max()) + 1
        x = table(rows[part, :n]) + model.positional_embedding[:n]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
        features.append(x[torch.arange(len(part)), last[part]] @ model.text_projection)
    return torch.cat(features)[order.argsort()]


def clip_loss(f, w, logit_scale, masked):
    """CLIP's loss of image features f and caption features w, (B, D); masked pairs do not count."""
    logits = logit_scale.exp().clamp(max=100) * F.normalize(w, dim=-1) @ F.normalize(f, dim=-1).T
    logits = logits.masked_fill(masked, -1e4)  # (captions, images)
    right = torch.arange(B)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def minimize(losses, modules, steps, warmup):
    """Minimize the losses of `steps` batches with AdamW, warm-up and a cosine schedule."""
    learned = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([  # biases, gains and the logit scale do not decay
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0}], betas=(0.9, 0.98))
    for step, loss in enumerate(losses):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = LR * min(1, (step + 1) / warmup) * cosine
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}", flush=True)


def train_both(scenes, images, steps):
    """Phase 1: train both encoders, with attribute heads, on short captions. Returns the model."""
    torch.manual_seed(0)
    gen, rng = torch.Generator().manual_seed(0), random.Random(0)
    used = find_tokens(short_caption(rng.choice(scenes), rng)[0] for _ in range(40000))
    model = open_clip.CLIP(**CONFIG)
    model.token_embedding.requires_grad_(False)  # trained as `table`, the rows that are used
    table = torch.nn.Embedding(len(used), CONFIG["text_cfg"]["width"])
    torch.nn.init.normal_(table.weight, std=WORD_STD)
    attributes = encode_attributes(scenes)
    counts = [len(words) for words in ATTRIBUTES.values()]
    heads = torch.nn.Linear(CONFIG["embed_dim"], sum(counts))

    def compute_losses():
        epoch = []
        for step in range(steps):
            if len(epoch) < B:
                epoch = torch.randperm(len(scenes), generator=gen).tolist()
            batch, epoch = epoch[:B], epoch[B:]
            captions, told = zip(*(short_caption(scenes[k], rng) for k in batch))
            seen = attributes[batch]
            told = encode_attributes(told)[:, None]
            true = ((told < 0) | (told == seen)).all(-1)  # (captions, images)
            with torch.autocast("cpu", torch.bfloat16):
                f = model.encode_image(jitter(images[batch], gen)).float()
            w = encode_text(model, table, used, TOKENIZER(captions))
            loss = clip_loss(f, w, model.logit_scale, masked=true.fill_diagonal_(False))
            head_loss = sum(map(F.cross_entropy, heads(f).split(counts, -1), seen.T))
            yield loss + max(0, 1 - step / (HEADS_UNTIL * steps)) * head_loss

    minimize(compute_losses(), [model, table, heads], steps, warmup=200)
    model.token_embedding.weight.zero_()[used] = table.weight.data
    return model


def train_text(model, scenes, features, steps):
    """Phase 2: train the text encoder on long captions; image features (n, 2, 128) are fixed."""
    torch.manual_seed(1)
    gen, rng = torch.Generator().manual_seed(1), random.Random(1)
    used = find_tokens(long_caption(rng.choice(scenes), rng) for _ in range(40000))
    known = model.token_embedding.weight[used]
    fresh = torch.normal(0, WORD_STD, known.shape)
    words = torch.where(known.any(-1, keepdim=True), known, fresh)
    table = torch.nn.Embedding.from_pretrained(words, freeze=False)
    model.visual.requires_grad_(False)
    model.logit_scale.data.fill_(math.log(1 / 0.07))  # CLIP's initial value

    def compute_losses():
        for _ in range(steps):
            shown = [rng.randrange(len(scenes)) for _ in range(B)]
            told = [rng.randrange(len(scenes)) if rng.random() < OTHER_IMAGE else k for k in shown]
            captions = [long_caption(scenes[k], rng) for k in told]
            f = features[shown, torch.randint(2, (B,), generator=gen)]
            w = encode_text(model, table, used, TOKENIZER(captions))
            yield clip_loss(f, w, model.logit_scale, masked=torch.tensor(False))

    minimize(compute_losses(), [model, table], steps, warmup=100)
    model.token_embedding.weight.zero_()[used] = table.weight.data


@torch.no_grad()
def encode_views(model, images, gen):
    """Return unit-norm features of two jittered views of each image, (n, 2, 128)."""
    views = []
    for part in images.split(250):
        pair = [model.encode_image(jitter(part, gen), normalize=True) for _ in range(2)]
        views.append(torch.stack(pair, 1))
    return torch.cat(views)


@torch.no_grad()
def rescale_words(model):
    """Scale the text encoder's residual stream so that the word embeddings have std WORD_STD.

    Every block and the end of the encoder normalize the stream, so no feature changes."""
    words = model.token_embedding.weight
    factor = WORD_STD / words[words.any(-1)].std()
    scaled = [words, model.positional_embedding]
    for block in model.transformer.resblocks:
        scaled += [*block.attn.out_proj.parameters(), *block.mlp.c_proj.parameters()]
    for weight in scaled:
        weight *= factor


def save(model, folder):
    """Write an open_clip local-dir in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: v.half().contiguous() for name, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PIXELS}, indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=5500, help="phase 1: batches of 256 pairs (5500)")
    add("--text-steps", type=int, default=1200, help="phase 2: batches (1200)")
    add("--images", type=int, default=100, help="phase 1: thousands; phase 2 draws half (100)")
    add("--out", type=Path, default=Path(__file__).parent / "tiny_clip")
    args = parser.parse_args()
    model = train_both(*render_all(range(args.images)), args.steps).half().float()
    scenes, images = render_all(range(args.images, args.images + (args.images + 1) // 2))
    features = encode_views(model.eval(), images, torch.Generator().manual_seed(1))
    train_text(model.train(), scenes, features, args.text_steps)
    rescale_words(model)
    save(model, args.out)


if __name__ == "__main__":
    main()
