"""CoOp: learn the words around the class name.

Zhou, Yang, Loy, Liu: "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134.

Zero-shot CLIP compares an image with one sentence per class, such as "a photo of a cat.", and its
accuracy depends on the wording. CoOp replaces the words before the class name with 16 learnable
vectors, the context, and trains them on a few labeled images with cross-entropy. CLIP is frozen.

    w_c    = g([start] v_1 ... v_M [name of c] "." [end])      class feature of class c
    p(c|x) = softmax_c(tau * f(x) . w_c)                        CLIP's classifier
    L      = mean over the batch of -log p(y|x)                 cross-entropy

    f(x)   unit-norm image feature of image x with label y, from the frozen image encoder   (D,)
    g      the frozen text encoder, read at the end token and normalized                    (D,)
    v      the learned context: M vectors of the text encoder's width W                     (M, W)
    tau    CLIP's learned inverse temperature, 100 in OpenAI's models (clip.logit_scale below)

SGD learns v alone, from --shots images of each class. Test: argmax_c f(x) . w_c over the classes
tested. One context serves all classes, also those it was not trained on: --base-to-new trains on
the first half of the classes, the base classes, and then classifies the images of each half among
the classes of that half. CoOp loses accuracy on the new half; ProGrad, MVP-MI and RESTORE (a script
each) try to prevent that.

Try: it takes a minute at most on the default data set, "shapes". The numbers, accuracies on base /
new classes, are for --dataset embedded --seeds 1,2,3: means over its eleven small data sets.
Zero-shot, the tiny CLIP used has 75.3 / 76.5.
    python coop.py --base-to-new --shots 16                            83.6 / 70.9

As in CoOp's paper: L, M, learning rate, schedule, random crops and flips; as in its code: batch
size, momentum, weight decay, dropping the last incomplete batch. As in CoCoOp, its successor: base
and new classes. Ours: ten random crops of each image are encoded once, and each epoch draws one of
them; --views 0 encodes new crops in every epoch.
"""

import math

import torch
import torch.nn.functional as F

import common


class Prompt(torch.nn.Module):
    """Soft prompts: class names with the learned context."""

    def __init__(self, clip, v, position="end"):
        super().__init__()
        self.clip = clip                                # not a Module: parameters() leaves it out
        self.v = torch.nn.Parameter(v)                  # (M, W); class-specific: (C, M, W)
        self.position = position

    def forward(self, names):
        """Return the class features w, unit-norm, (C, D).

        names  one pair per class: embeddings of its name and of ".", (l, W) each"""
        sot, eot = common.start_end(self.clip)          # start and end of text, (1, W) each
        if self.position == "end" and self.v.ndim == 2:     # all prompts begin alike: encode v once
            return common.encode_text(self.clip, [sot, self.v], [[*pair, eot] for pair in names])
        prompts = []
        for c, (name, dot) in enumerate(names):
            v = self.v if self.v.ndim == 2 else self.v[c]
            before = {"end": len(v), "middle": len(v) // 2, "front": 0}[self.position]
            prompts.append([v[:before], name, v[before:], dot, eot])
        return common.encode_text(self.clip, [sot], prompts)

    def class_features(self, part):
        """Return the class features of part.classnames, (C, D)."""
        return self(common.name_embeddings(self.clip, part.classnames))


def initial_context(run):
    """Return v before training: one vector per token of --ctx-init, or noise (CoOp's paper)."""
    per_class = [len(run.classes)] if run.args.class_specific else []   # a first dimension, or none
    if run.args.ctx_init:
        return common.embed(run.clip, run.args.ctx_init).repeat(*per_class, 1, 1)
    width = run.clip.text.token_embedding.embedding_dim
    v = 0.02 * torch.randn(*per_class, run.args.n_ctx, width)  # on the CPU: alike on every device
    return v.to(run.clip.device)


def train(prompt, run):
    """Train the prompt in place."""
    clip, args = run.clip, run.args
    names = common.name_embeddings(clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)  # 50 (1 shot or ImageNet), 100 (2-7) or 200
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        # Epoch 0 warms up at 1e-5. Then the rate falls from args.lr along half a cosine, which
        # would reach 0 two epochs after the last one (this offset: CoOp's code).
        decay = (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
        optimizer.param_groups[0]["lr"] = lr = 1e-5 if epoch == 0 else args.lr * decay
        # Shuffled mini-batches (32 images by default); an incomplete last one is dropped unless it
        # is the only one. Each image appears as one of its random crops (ten by default).
        for f, y in run.batches(epoch):                 # (B, D), (B,)
            with clip.autocast():                       # --precision amp: bf16 on GPUs
                w = prompt(names)                       # (C, D)
            logits = clip.logit_scale * f @ w.T         # (B, C)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss, lr=lr)


def flags():
    """Return the parser of this script's flags."""
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, metavar="WORDS",
                        help="words to start from, in place of the usual start")
    parser.add_argument("--class-specific", action="store_true",
                        help="one context per class (CoOp's paper); not for new classes")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="of the class name (end); front is in CoOp's code, not its paper")
    return parser


def main():
    for run in common.runs(__file__, flags()):          # for each data set, number of shots, seed
        prompt = Prompt(run.clip, initial_context(run), run.args.position)
        run.start(prompt)                               # encode images; --load: read the prompt
        if not run.args.load:
            train(prompt, run)
        # Predict argmax_c f(x) . w_c for the test images, record, print.
        run.finish(prompt)


if __name__ == "__main__":
    with common.one_line_errors():
        main()
