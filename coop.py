"""CoOp: learn the words around the class name.

Paper: Zhou, Yang, Loy, Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134.

CLIP classifies an image by comparing it with a sentence for every class, and a few words more or less in that sentence
move the accuracy by several points. CoOp replaces the words by vectors and learns them from a few labelled images.

    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])         class feature            -> Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                           CLIP's own classifier    -> train
    L      = -log p(y|x)                                         cross-entropy            -> train

    f(x)   the image feature, from CLIP's frozen image tower, of length 1; while training, of a random crop of the image
    g      CLIP's frozen text tower; w_c its feature at the end token, of length 1
    v_m    the learned context: M vectors in the space of word embeddings, shared by all classes or one set per class
    name_c the word embeddings of the class name; it can also stand in the middle or in front of the context
    tau    CLIP's logit scale, frozen as well

Try first:  python coop.py                              4 shots on the embedded data set, in seconds
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
        """Class features w (C, D), of length 1. `names`: of each class the embeddings of [name_c, "."], and name_c's length."""
        start, end = common.start_end(self.clip)                                      # (1, W) each
        v = self.v.expand(len(names), -1, -1)                                         # (C, M, W)
        m = {"end": v.shape[1], "middle": v.shape[1] // 2, "front": 0}[self.position]  # how much of it is before the name
        prompts = [[start, v_c[:m], name[:n], v_c[m:], name[n:], end] for v_c, (name, n) in zip(v, names)]
        same = 1 + m if self.v.ndim == 2 else 0                                       # first tokens, the same for all c
        return common.encode_text(self.clip, prompts, shared=same)

    def class_features(self, classnames):
        """Class features of any classes, for evaluation: (C, D)."""
        return self(common.name_tokens(self.clip, classnames))


def first_context(run, args):
    """Where the context starts: Gaussian noise of standard deviation 0.02, or words (then M is their number)."""
    clip, copies = run.clip, [len(run.classnames)] if args.class_specific else []
    if args.ctx_init:
        return common.embed(clip, args.ctx_init).repeat(*copies, 1, 1)
    return 0.02 * torch.randn(*copies, args.n_ctx, clip.text.token_embedding.embedding_dim, device=clip.device)


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip, names = run.clip, common.name_tokens(run.clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        for f, y in run.batches(epoch):                                               # (B, D), (B)
            with clip.autocast():
                w = prompt(names)                                                     # (C, D), once for the whole batch
            logits = clip.logit_scale * f @ w.T                                       # (B, C)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss)


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS",
                        help="start from these words, whose number replaces --n-ctx (noise)")
    parser.add_argument("--class-specific", action="store_true", help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="where the class name stands (end)")
    args = common.parse(parser)
    for run in common.runs(__file__, args):
        prompt = Prompt(run.clip, first_context(run, args), args.position)
        if args.load:
            run.load(prompt)
        else:
            train(prompt, run, args)
        run.finish(prompt)
        print("  nearest words:", common.nearest_words(run.clip, prompt.v))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
