"""ProGrad: learn the words around the class name, but not against what the written prompt knows.

Paper: Zhu, Niu, Han, Wu, Zhang, "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023,
arXiv 2205.14865.

CoOp's context, learned from a few images, forgets what CLIP knew: with few shots, or on new
classes, it can end below the zero-shot classifier. ProGrad follows the gradient of the few images
only as far as it does not undo the predictions of a written prompt. CLIP itself stays frozen.

The model
    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])        class feature       Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                          CLIP's classifier   train
    L_d    = -log p(y|x), mean over a batch                     the domain's loss   losses
    L_g    = -sum_c p_zs(c|x) log p(c|x), mean over a batch     the general loss    losses
    G_d    = dL_d/dv,  G_g = dL_g/dv                            two gradients       gradients
    G      = G_d                                         if G_d . G_g >= 0          project
           = G_d - lambda (G_d . G_g / |G_g|^2) G_g      otherwise: a conflict      project

    x, y   an image and its label, one of the C classes that are learned
    f(x)   the feature that CLIP's image tower gives it, D numbers, of length 1
    g      CLIP's text tower: the feature that it reads at the end token, of length 1
    v_m    the learned context, M = 16 vectors as wide as word embeddings (W); the last of them
           start as the words before the name in ProGrad's template of the data set, the others as
           zeros, and are shared by all classes (--class-specific: M of them for each class)
    name_c the word embeddings of the class name (--position: or between the halves of v, or before)
    tau    CLIP's logit scale (100 in OpenAI's models)
    p_zs   the template's own prediction, zero-shot: softmax_c(tau f(x) . g(template of c))
    lambda the share of a conflict that is removed: 1 all, 0 none (--projection)
    L_g is KL(p_zs || p) plus the entropy of p_zs, which does not depend on v. It is not minimised,
    it only vetoes: in a conflict G . G_g = (1 - lambda) G_d . G_g, so that with lambda = 1 a small
    step along -G leaves L_g where it is. The dot products are over all numbers of v: one decision
    for v, with --class-specific too. With --temperature T the logits in L_g are divided by T, and
    L_g is times T^2. Words of the template that v does not take stay, frozen, before name_c.

The update, once for each batch, with that G: momentum and decay come after the projection
    u <- 0.9 u + G + 0.0005 v,  v <- v - r u       SGD: momentum (u = 0 at first), weight decay
    r = 1e-5 in epoch e = 0; in epochs e = 1, ..., E - 1 it is lr (1 + cos(pi (e - 1) / E)) / 2
    with lr = 0.002 and E = 50, 100, 200 epochs for 1, 2 to 7, 8 or more shots (ImageNet: 50)
    A batch is 32 of the training images, in random order; the last one of an epoch is not used if
    it is smaller, unless it is the only one. Of every image ten random crops are encoded before
    the training; one of the ten is drawn whenever it is used (--views 0: a new crop every time).

The test: argmax_c f(x) . w_c, for images resized as CLIP itself does, without a random crop.

Try first:  python prograd.py                           4 shots on the embedded data set
            python prograd.py --base-to-new --shots 16  what is kept of classes not learned
            python prograd.py --projection 0            CoOp, started from the template
"""

import common  # first: Ctrl-C while the libraries load ends in one line

import torch
import torch.nn.functional as F


class Prompt(torch.nn.Module):
    """The learned context v: (M, W), shared by all classes, or (C, M, W), class-specific."""

    def __init__(self, clip, v, position="end", left_over=()):
        super().__init__()
        self.clip, self.position = clip, position
        self.left_over = left_over      # embeddings (l, W) that stay before the name
        self.v = torch.nn.Parameter(v)

    def forward(self, names):
        """Class features w (C, D). names: embeddings of name_c and of the "." for each class."""
        start, end = common.start_end(self.clip)                        # (1, W) each
        prompts = []
        for c, (name, dot) in enumerate(names):                         # (l, W) and (1, W)
            v = self.v if self.v.ndim == 2 else self.v[c]               # (M, W)
            half = len(v) // 2
            name = torch.cat([*self.left_over, name])
            prompts.append({
                "end": [start, v, name, dot, end],
                "middle": [start, v[:half], name, v[half:], dot, end],
                "front": [start, name, v, dot, end],
            }[self.position])
        return common.encode_text(self.clip, prompts)

    def class_features(self, classnames):
        """Class features of any classes, for the test: (C, D)."""
        return self(common.name_embeddings(self.clip, classnames))


def template_words(run, args):
    """Embeddings of the words before the name: what v starts as (m, W), and what is left over.

    As in the authors' code m is the number of words between spaces: of the 9 tokens of "a type of
    pet, a photo of a" (8 words and a comma) the last "a" is left over."""
    words = args.ctx_init or run.data.prograd_template.split("{}")[0]
    return common.embed(run.clip, words).tensor_split([len(words.split())])


def first_context(run, args):
    """Where v starts: the words at its end (the last M of them), zeros before."""
    words = template_words(run, args)[0][-args.n_ctx:]
    copies = [len(run.classnames)] if args.class_specific else []
    v = F.pad(words, (0, 0, args.n_ctx - len(words), 0))                # (M, W), zeros first
    return v.repeat(*copies, 1, 1)


def losses(logits, zero_shot, y, T=1.0):
    """L_d and L_g of a batch. logits and the template's zero_shot logits (B, C), labels y (B)."""
    p_zs = F.softmax(zero_shot / T, -1)
    log_p = F.log_softmax(logits / T, -1)
    return F.cross_entropy(logits, y), -T ** 2 * (p_zs * log_p).sum(-1).mean()


def gradients(l_d, l_g, w, v):
    """G_d and G_g: torch.autograd.grad(l_d, v) and torch.autograd.grad(l_g, v), shaped as v.

    From w on both go back through the text tower, the expensive part, in one batched pass."""
    dw = [torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in (l_d, l_g)]
    return torch.autograd.grad(w, v, torch.stack(dw), is_grads_batched=True)[0]


def project(g_d, g_g, lambda_=1.0):
    """G, that is G_d without its component against G_g; and the cosine of G_d and G_g."""
    dot = (g_d * g_g).sum()
    cosine = dot / (g_d.norm() * g_g.norm()).clamp_min(1e-20)
    if dot >= 0:
        return g_d, cosine
    return g_d - lambda_ * dot / (g_g * g_g).sum() * g_g, cosine


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
            with clip.autocast():
                w = prompt(names)                                       # (C, D)
            logits = clip.logit_scale * f @ w.T                         # (B, C)
            zero_shot = clip.logit_scale * f @ w_zs.T                   # (B, C)
            l_d, l_g = losses(logits, zero_shot, y, args.temperature)
            g_d, g_g = gradients(l_d, l_g, w, prompt.v)
            prompt.v.grad, cosine = project(g_d, g_g, args.projection)  # replaces the last one
            optimizer.step()
            run.log(epoch, loss=l_d, general_loss=l_g, cosine=cosine, conflicts=cosine < 0)


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS",
                        help="start from these words, zeros before (the template's)")
    parser.add_argument("--class-specific", action="store_true",
                        help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="where the class name stands (end)")
    parser.add_argument("--projection", type=common.number(low_ok=True), default=1.0,
                        metavar="LAMBDA", help="how much of a conflict is taken out (1)")
    parser.add_argument("--temperature", type=common.number(), default=1.0, metavar="T",
                        help="of the general loss (1)")
    args = common.parse(parser)
    for run in common.runs(__file__, args):
        prompt = Prompt(run.clip, first_context(run, args), args.position,
                        template_words(run, args)[1:])
        if args.load:
            run.load(prompt)
        else:
            train(prompt, run, args)
        run.finish(prompt)
        print("  nearest words:", common.nearest_words(run.clip, prompt.v))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
