"""ProGrad: learn the words around the class name, but never against what the written prompt knows.

Paper: Zhu, Niu, Han, Wu, Zhang, "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023, arXiv 2205.14865.

CoOp's context, learned from a few images, forgets what CLIP knew: with few shots, or on new classes, it can end below the
zero-shot classifier. ProGrad follows a gradient only as far as it does not undo the written prompt's predictions.

    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])         class feature            -> Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                           CLIP's own classifier    -> train
    L_d    = -log p(y|x)                                         the domain's loss        -> losses
    L_g    = -T^2 sum_c p_zs(c|x) log p_T(c|x)                   the general loss         -> losses
    G      = G_d                                 if G_d . G_g >= 0    the gradient used   -> project
           = G_d - lambda (G_d . G_g / |G_g|^2) G_g      otherwise

    f(x)   the image feature, from CLIP's frozen image tower, of length 1; while training, of a random crop of the image
    g      CLIP's frozen text tower; w_c its feature at the end token, of length 1
    v_m    the learned context: M vectors in the space of word embeddings, shared by all classes or one set per class
    name_c the word embeddings of the class name; it can also stand in the middle or in front of the context
    G_d    the gradient of L_d with respect to the context, G_g that of L_g; lambda is 1: all of a conflict is taken out
    p_zs   the zero-shot prediction of ProGrad's own template. p_T and p_zs have their logits divided by a temperature T (1);
           L_g is T^2 KL(p_zs || p_T) but for p_zs's entropy, which no gradient sees; it only vetoes, it is not minimised
    tau    CLIP's logit scale, frozen as well

Try first:  python prograd.py                           4 shots on the embedded data set, in seconds
            python prograd.py --base-to-new --shots 16  and the same with coop.py: what is kept of the new classes
            python prograd.py --projection 0            no projection: CoOp, started from the template
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
    """Where the context starts: in the last of M slots the words before the name in ProGrad's own template, else zeros."""
    clip, copies = run.clip, [len(run.classnames)] if args.class_specific else []
    words = common.embed(clip, args.ctx_init or run.data.prograd_template.split("{}")[0])[-args.n_ctx:]
    return F.pad(words, (0, 0, args.n_ctx - len(words), 0)).repeat(*copies, 1, 1)


def losses(logits, zero_shot, y, temperature=1.0):
    """L_d and L_g of a batch. logits and the template's zero_shot logits (B, C), labels y (B)."""
    p_zs = F.softmax(zero_shot / temperature, -1)
    log_p = F.log_softmax(logits / temperature, -1)
    return F.cross_entropy(logits, y), -temperature ** 2 * (p_zs * log_p).sum(-1).mean()


def project(g_d, g_g, strength=1.0):
    """The gradient used, G: G_d without its component against G_g. Returns G and the cosine of the two."""
    dot = (g_d * g_g).sum()
    g = g_d if dot >= 0 else g_d - strength * dot / (g_g * g_g).sum() * g_g
    return g, dot / (g_d.norm() * g_g.norm()).clamp_min(1e-20)


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip, names = run.clip, common.name_tokens(run.clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)
    zero_shot = common.template_features(clip, run.data.prograd_template, run.classnames)  # (C, D)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        for f, y in run.batches(epoch):                                               # (B, D), (B)
            with clip.autocast():
                w = prompt(names)                                                     # (C, D), once for the whole batch
            logits = clip.logit_scale * f @ w.T                                       # (B, C)
            l_d, l_g = losses(logits, clip.logit_scale * f @ zero_shot.T, y, args.temperature)
            # Both gradients go through the text tower, the expensive part, in one batched pass.
            dw = torch.stack([torch.autograd.grad(l, w, retain_graph=True)[0] for l in (l_d, l_g)])  # (2, C, D)
            g_d, g_g = torch.autograd.grad(w, prompt.v, dw, is_grads_batched=True)[0]
            prompt.v.grad, cosine = project(g_d, g_g, args.projection)                # in place of loss.backward()
            optimizer.step()
            run.log(epoch, loss=l_d, general_loss=l_g, cosine=cosine, conflicts=cosine < 0)


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS",
                        help="start from these words (those of the data set's template)")
    parser.add_argument("--class-specific", action="store_true", help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="where the class name stands (end)")
    parser.add_argument("--projection", type=common.number(low_ok=True), default=1.0, metavar="LAMBDA",
                        help="how much of a conflict is taken out (1)")
    parser.add_argument("--temperature", type=common.number(), default=1.0, metavar="T", help="of the general loss (1)")
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
