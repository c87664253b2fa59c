"""CoOp: learn the words around the class name.

Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134.

CLIP classifies an image by comparing it with a sentence for every class; a few words more or less
in it are worth several points. CoOp replaces them by vectors, learned from a few labelled images.
CLIP itself stays frozen.

The model; on the right, the function that computes it
    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])        class feature       Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                          CLIP's classifier   train
    L      = -log p(y|x), mean over a batch                     cross-entropy       train
    G      = dL/dv                                              its gradient        train

    x, y   an image and its label, one of the C classes that are learned
    f(x)   the feature that CLIP's image tower gives it, D numbers, of length 1
    g      CLIP's text tower: the feature that it reads at the end token, of length 1
    v_m    the learned context, M = 16 vectors as wide as word embeddings (W), shared by all classes
           (--class-specific: M of them for each one, none for new ones); they start as
           noise, N(0, 0.02^2), or as the words of --ctx-init, and M is then their number
    name_c the embeddings of the class name's tokens (--position middle: behind the first M // 2 of
           v; front: before v)
    tau    CLIP's logit scale, not its logarithm: 100 in OpenAI's models

The update, once for each batch, SGD: to G come weight decay, then momentum (u = 0 at first)
    u <- 0.9 u + (G + 0.0005 v),  v <- v - r u
    r = 1e-5 in epoch e = 0; in epochs e = 1, ..., E - 1 it is lr (1 + cos(pi (e - 1) / E)) / 2
    with lr = 0.002; E = 50 epochs for 1 shot (training image per class), 100 for 2 to 7, 200 for
    more, and always 50 on ImageNet
    A batch is 32 of the training images, shuffled anew in every epoch; the last one is not used if
    it is smaller, unless it is the only one. Of every image ten random crops, flipped or not, are
    encoded before the training; of the ten one is drawn whenever it is used (--views 0: new ones).

The test: argmax_c f(x) . w_c over the classes that are tested (--base-to-new: the learned half,
then the other half by itself), for images resized as CLIP itself does, without a random crop.

Try first:  python coop.py --base-to-new --shots 16     what it costs on classes not learned
            python coop.py --ctx-init "a photo of a"    start from words instead of noise
"""

import common  # first: Ctrl-C while the libraries load ends in one line

import torch
import torch.nn.functional as F


class Prompt(torch.nn.Module):
    """The learned context v: (M, W), shared by all classes, or (C, M, W), class-specific."""

    def __init__(self, clip, v, position="end"):
        super().__init__()
        self.clip, self.position = clip, position
        self.v = torch.nn.Parameter(v)  # clip is no Module, and stays frozen

    def forward(self, names):
        """Class features w (C, D). names: C pairs, embeddings of name_c and of the "." after it."""
        start, end = common.start_end(self.clip)                        # (1, W) each
        prompts = []
        for c, (name, dot) in enumerate(names):                         # (l, W) and (1, W)
            v = self.v if self.v.ndim == 2 else self.v[c]               # (M, W)
            half = len(v) // 2
            prompts.append({
                "end": [start, v, name, dot, end],
                "middle": [start, v[:half], name, v[half:], dot, end],
                "front": [start, name, v, dot, end],
            }[self.position])
        return common.encode_text(self.clip, prompts)

    def class_features(self, classnames):
        """Class features (C, D), for the test: of any classes, or of v's if class-specific."""
        return self(common.name_embeddings(self.clip, classnames))


def first_context(run, args):
    """Where v starts: noise, or the embeddings of words; M is then the number of their tokens."""
    copies = [len(run.classnames)] if args.class_specific else []
    if args.ctx_init:
        return common.embed(run.clip, args.ctx_init).repeat(*copies, 1, 1)
    width = run.clip.text.token_embedding.embedding_dim
    return 0.02 * torch.randn(*copies, args.n_ctx, width, device=run.clip.device)


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip = run.clip
    names = common.name_embeddings(clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        for f, y in run.batches(epoch):                                 # (B, D), (B)
            with clip.autocast():                                       # on a GPU: bf16 or fp16
                w = prompt(names)                                       # (C, D)
            logits = clip.logit_scale * f @ w.T                         # (B, C)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss)


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS",
                        help="start from these words instead")
    parser.add_argument("--class-specific", action="store_true",
                        help="learn one context per class instead of one for all")
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
