"""ProGrad: learn the words around the class name, but not against what the written prompt knows.

Zhu et al., "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023, arXiv 2205.14865.

CoOp's context, learned from a few images, forgets what CLIP knew: of other classes, above all.
ProGrad follows CoOp's gradient only as far as it does not undo what a written prompt predicts.
CLIP itself stays frozen.

The model; on the right, the function that computes it
    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])        class feature       Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                          CLIP's classifier   train
    L      = -log p(y|x), mean over a batch                     cross-entropy       train
    L_g    = -sum_c p_zs(c|x) log p(c|x), mean over a batch     the general loss    train
    G_d    = dL/dv,  G_g = dL_g/dv                              two gradients       train
    G      = G_d                                       if G_d . G_g >= 0            project
           = G_d - lambda (G_d . G_g / |G_g|^2) G_g    otherwise: a conflict        project

    x, y   an image and its label, one of the C classes that are learned
    f(x)   the feature that CLIP's image tower gives it, D numbers, of length 1
    g      CLIP's text tower: the feature that it reads at the end token, of length 1
    v_m    the learned context, M = 16 vectors as wide as word embeddings (W), shared by all classes
           (--class-specific: M of them for each one, none for new ones); they start as
           zeros, but the last as the words before the name in ProGrad's template of the data set;
           of these words some may be left over: they stay, frozen, before name_c
    name_c the embeddings of the class name's tokens (--position middle: behind the first M // 2 of
           v; front: before v)
    tau    CLIP's logit scale, not its logarithm: 100 in OpenAI's models
    p_zs   that template's own prediction, zero-shot: softmax_c(tau f(x) . g(template of c))
    lambda the share of a conflict that is removed, 1 (--projection)
    L_g is KL(p_zs || p) plus the entropy of p_zs, which does not depend on v. It is not minimised:
    in a conflict G . G_g = (1 - lambda) G_d . G_g, over all numbers of v at once, so that with
    lambda = 1 a small step along -G leaves the batch's L_g, to first order, where it is. With
    --temperature T the logits of both p in L_g are divided by T, and L_g is times T^2.

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

Try first:  python prograd.py --base-to-new --shots 16  what is kept of classes not learned
            python prograd.py --projection 0            CoOp, started from the template
"""

import common  # first: Ctrl-C while the libraries load ends in one line

import torch
import torch.nn.functional as F


class Prompt(torch.nn.Module):
    """The learned context v: (M, W), shared by all classes, or (C, M, W), class-specific."""

    def __init__(self, clip, v, left_over, position="end"):
        super().__init__()
        self.clip, self.position = clip, position
        self.register_buffer("left_over", left_over)  # words (l, W) that stay before the name
        self.v = torch.nn.Parameter(v)  # clip is no Module, and stays frozen

    def forward(self, names):
        """Class features w (C, D). names: C pairs, embeddings of name_c and of the "." after it."""
        start, end = common.start_end(self.clip)                        # (1, W) each
        prompts = []
        for c, (name, dot) in enumerate(names):                         # (l, W) and (1, W)
            v = self.v if self.v.ndim == 2 else self.v[c]               # (M, W)
            half = len(v) // 2
            name = torch.cat([self.left_over, name])
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
    """Where v starts: the last M words, or zeros and all words; and what is left over: as in
    the authors' code v takes as many tokens as there are words between spaces (commas add none)."""
    copies = [len(run.classnames)] if args.class_specific else []
    text = args.ctx_init or run.data.prograd_template.split("{}")[0]
    words, left_over = common.embed(run.clip, text).tensor_split([len(text.split())])
    return F.pad(words, (0, 0, args.n_ctx - len(words), 0)).repeat(*copies, 1, 1), left_over


def project(g_d, g_g, lambda_=1.0):
    """G: G_d less a share, lambda, of what goes against G_g. All are shaped as v."""
    dot = (g_d * g_g).sum()
    return g_d if dot >= 0 else g_d - lambda_ * dot / (g_g * g_g).sum() * g_g


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip = run.clip
    names = common.name_embeddings(clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)
    w_zs = common.template_features(clip, run.data.prograd_template, run.classnames)  # (C, D)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        for f, y in run.batches(epoch):                                 # (B, D), (B)
            with clip.autocast():                                       # on a GPU: bf16 or fp16
                w = prompt(names)                                       # (C, D)
            logits = clip.logit_scale * f @ w.T                         # (B, C)
            loss = F.cross_entropy(logits, y)
            p_zs = F.softmax(clip.logit_scale * f @ w_zs.T / args.temperature, -1)  # (B, C)
            l_g = args.temperature ** 2 * F.cross_entropy(logits / args.temperature, p_zs)
            optimizer.zero_grad()
            g_d, g_g = common.gradients((loss, l_g), w, prompt.v)       # both in one pass from w
            prompt.v.grad = project(g_d, g_g, args.projection)
            cosine = F.cosine_similarity(g_d.flatten(), g_g.flatten(), dim=0)
            optimizer.step()
            run.log(epoch, loss=loss, general_loss=l_g, cosine=cosine, conflicts=cosine < 0)


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS",
                        help="start from these words instead")
    parser.add_argument("--class-specific", action="store_true",
                        help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="where the class name stands (end)")
    parser.add_argument("--projection", type=common.number(low_ok=True), default=1.0,
                        metavar="LAMBDA", help="how much of a conflict is taken out (1)")
    parser.add_argument("--temperature", type=common.number(), default=1.0, help="T of L_g (1)")
    args = common.parse(parser)
    for run in common.runs(__file__, args):
        prompt = Prompt(run.clip, *first_context(run, args), args.position)
        if args.load:
            run.load(prompt)
        else:
            train(prompt, run, args)
        run.finish(prompt)
        print("  nearest words:", common.nearest_words(run.clip, prompt.v))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
