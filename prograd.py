"""ProGrad: learn the words around the class name, but never against what the written prompt knows.

Paper: Zhu, Niu, Han, Wu, Zhang, "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023, arXiv 2205.14865.

CoOp's context, learned from a few images, forgets what CLIP knew: with few shots, or on new classes, it can end below the
zero-shot classifier. ProGrad lets a step through only as far as it does not undo the written prompt's predictions.

    w_c, p(c|x), v_1..v_M, g, f(x), tau                          as in CoOp               -> Prompt
    L_d = -log p(y|x)                                            the domain's loss        -> losses
    L_g = -T^2 sum_c p_zs(c|x) log p_T(c|x)                      the general loss         -> losses
    G   = G_d                                 if G_d . G_g >= 0  the gradient used        -> project
        = G_d - lambda (G_d . G_g / |G_g|^2) G_g      otherwise

    G_d, G_g   the gradients of L_d and L_g with respect to the context
    p_zs       the zero-shot prediction of the written template; p_T and p_zs have their logits divided by T
    L_g        is T^2 KL(p_zs || p_T) but for p_zs's own entropy, which no gradient sees; T is a temperature (1)
    lambda     1: the whole component of G_d against G_g is taken out

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
    """Where the context starts: the words before the name in ProGrad's own template (the last M of them), right-aligned in
    M slots, zeros before. The same template is the teacher's; the zero-shot accuracy that is printed is CoOp's template's."""
    words = args.ctx_init or run.data.prograd_template.split("{}")[0]
    v = torch.zeros(args.n_ctx, clip.text.token_embedding.embedding_dim, device=clip.device)
    words = common.embed(clip, common.tokenize(clip, words)[-args.n_ctx:])
    v[args.n_ctx - len(words):] = words
    if args.class_specific:
        v = v.repeat(len(run.classnames), 1, 1)
    return v


def losses(logits, zero_shot, y, temperature=1.0):
    """L_d and L_g of a batch. logits and the template's zero_shot logits (B, C), labels y (B)."""
    p_zs = F.softmax(zero_shot / temperature, -1)
    log_p = F.log_softmax(logits / temperature, -1)
    return F.cross_entropy(logits, y), -temperature ** 2 * (p_zs * log_p).sum(-1).mean()


def project(g_d, g_g, strength=1.0):
    """The gradient used, G: G_d without its component against G_g. Returns the gradient to use and the cosine of the two."""
    dot = (g_d * g_g).sum()
    g = g_d if dot >= 0 else g_d - strength * dot / (g_g * g_g).sum() * g_g
    return g, dot / (g_d.norm() * g_g.norm()).clamp_min(1e-20)


def train(prompt, run, args):
    """Learns the context in place; returns a dict of what happened, by epoch."""
    clip, names = run.clip, common.name_tokens(run.clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)
    zero_shot = common.template_features(clip, run.data.prograd_template, run.classnames)  # (C, D)
    log = {"loss": [], "general_loss": [], "cosine": [], "conflicts": []}             # conflicts: part of the steps
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        rows = []
        for f, y in run.batches(epoch):                                               # (B, D), (B)
            with clip.autocast():
                w = prompt(names)                                                     # (C, D), once for the whole batch
            l_d, l_g = losses(clip.logit_scale * f @ w.T, clip.logit_scale * f @ zero_shot.T, y, args.temperature)
            # Both gradients go through the text tower, the expensive part, in one batched pass.
            dw = torch.stack([torch.autograd.grad(l, w, retain_graph=True)[0] for l in (l_d, l_g)])
            g_d, g_g = torch.autograd.grad(w, prompt.v, dw, is_grads_batched=True)[0]
            prompt.v.grad, cosine = project(g_d, g_g, args.projection)
            optimizer.step()
            rows.append([l_d.item(), l_g.item(), cosine.item(), float(cosine < 0)])
        for key, values in zip(log, zip(*rows)):
            log[key].append(sum(values) / len(values))
    return log


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS", help="start from these words (those of the data set's template)")
    parser.add_argument("--class-specific", action="store_true", help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end", help="where the class name stands (end)")
    parser.add_argument("--projection", type=common.number(low_ok=True), default=1.0, metavar="LAMBDA", help="how much of a conflict is taken out (1)")
    parser.add_argument("--temperature", type=common.number(), default=1.0, metavar="T", help="of the general loss (1)")
    args = common.parse(parser)
    if args.class_specific and (args.base_to_new or args.transfer):
        raise common.Problem("--class-specific has no context for classes that it did not learn: leave out --base-to-new and --transfer")
    data, clip = common.load_data(args.dataset, args.data_root), common.load_clip(args)
    for run in common.runs("prograd", args, data, clip):
        prompt = Prompt(clip, first_context(clip, args, run), args.position)
        log = common.load(run, prompt, args.load) if args.load else train(prompt, run, args)
        run.finish(prompt, log)
        print("  nearest words:", common.nearest_words(clip, prompt.v))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
