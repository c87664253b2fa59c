"""CoOp: learn the words around the class name.

Paper: Zhou, Yang, Loy, Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134.

CLIP classifies an image by comparing it with a sentence for every class, and a few words more or less in that sentence
move the accuracy by several points. CoOp replaces the words by vectors and learns them from a few labelled images.

    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])        class feature            -> Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                           CLIP's own classifier    -> train
    L      = -log p(y|x)                                         cross-entropy            -> train

    f(x)   the image feature, from CLIP's frozen image tower, of length 1
    g      CLIP's frozen text tower; w_c its feature at the end token, of length 1
    v_m    the learned context: M vectors in the space of word embeddings, shared by all classes or one set per class
    name_c the word embeddings of the class name; it can also stand in the middle or in front of the context
    tau    CLIP's logit scale, frozen as well

Try first:  python coop.py                              4 shots on the embedded data set, in seconds
            python coop.py --shots 1,16                 few images overfit, many help
            python coop.py --base-to-new --shots 16     what it costs on classes that were not learned
            python coop.py --ctx-init "a photo of a"    start from words instead of noise
"""

import torch
import torch.nn.functional as F

import common


class Prompt(torch.nn.Module):
    """The learned context `v`, (M, W) shared by all classes or (C, M, W) class-specific, and the prompts made with it."""

    def __init__(self, clip, v, position="end"):
        super().__init__()
        self.clip, self.position, self.v = clip, position, torch.nn.Parameter(v)

    def forward(self, names):
        """Class features w (C, D), of length 1. `names`: for each class the embeddings of [name_c, "."] and its length."""
        start, end = common.start_end(self.clip)                                      # (1, W) each
        m = {"end": self.v.shape[-2], "middle": self.v.shape[-2] // 2, "front": 0}[self.position]
        heads, tails = [], []
        for c, (name, n) in enumerate(names):                                         # name (n + 1, W)
            v = self.v if self.v.ndim == 2 else self.v[c]                             # (M, W)
            heads.append(torch.cat([start, v[:m]]) if c == 0 or self.v.ndim == 3 else heads[0])
            tails.append(torch.cat([name[:n], v[m:], name[n:], end]))
        if self.v.ndim == 2:                                                          # one head for all classes
            return common.encode_text(self.clip, tails, heads[0])
        return common.encode_text(self.clip, [torch.cat(both) for both in zip(heads, tails)])

    def class_features(self, classnames):
        """Class features of any classes, for evaluation: (C, D)."""
        return self(common.name_tokens(self.clip, classnames))


def first_context(clip, args, run):
    """Where the context starts: Gaussian noise of standard deviation 0.02, or words (then M is their number)."""
    if args.ctx_init:
        v = common.embed(clip, common.tokenize(clip, args.ctx_init))
    else:
        v = 0.02 * torch.randn(args.n_ctx, clip.text.token_embedding.embedding_dim, device=clip.device)
    if args.class_specific:
        v = v.repeat(len(run.classnames), 1, 1) if args.ctx_init else 0.02 * torch.randn(len(run.classnames), *v.shape, device=clip.device)
    return v


def train(prompt, run, args):
    """Learns the context in place; returns a dict of what happened, by epoch."""
    clip, names = run.clip, common.name_tokens(run.clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)
    log = {"loss": []}
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        rows = []
        for f, y in run.batches(epoch):                                               # (B, D), (B)
            with clip.autocast():
                w = prompt(names)                                                     # (C, D), once for the whole batch
            loss = F.cross_entropy(clip.logit_scale * f @ w.T, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows.append([loss.item()])
        for key, values in zip(log, zip(*rows)):
            log[key].append(sum(values) / len(values))
    return log


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS", help="start from these words, whose number replaces --n-ctx (noise)")
    parser.add_argument("--class-specific", action="store_true", help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end", help="where the class name stands (end)")
    args = common.parse(parser)
    if args.class_specific and (args.base_to_new or args.transfer):
        raise common.Problem("--class-specific has no context for classes that it did not learn: leave out --base-to-new and --transfer")
    data, clip = common.load_data(args.dataset, args.data_root), common.load_clip(args)
    for run in common.runs("coop", args, data, clip):
        prompt = Prompt(clip, first_context(clip, args, run), args.position)
        log = common.load(run, prompt, args.load) if args.load else train(prompt, run, args)
        run.finish(prompt, log)
        print("  nearest words:", common.nearest_words(clip, prompt.v))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
