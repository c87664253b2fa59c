"""MVP-MI: learn the words around the class name, and keep them informative about what was written by hand.

Paper: arXiv 2410.03189, called MVP-MI here. Only its abstract could be consulted: soft and hand-crafted prompts are two views
of the text, their mutual information is maximised, and a class-wise augmentation from the visual modality makes the prompt
robust on unseen classes. EVERYTHING BEYOND THAT IS OUR READING, in the simplest form.

    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])         class feature            -> Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                           CLIP's own classifier    -> train
    s_c    = w_c,  h_c = g(template of c)                        two views of class c     -> train
    L_nce  = -1/2C sum_c [log softmax_c'(s_c . h_c' / t)_c + log softmax_c'(h_c . s_c' / t)_c]   -> info_nce
    I(S;H) >= log C - L_nce                                      the bound, in nats       -> train
    f~     = sum_i a_i f(x_i),  a ~ Dirichlet(1)                 class-wise augmentation  -> augment
    L      = -log p(y|x) over x and f~, + lambda L_nce           cross-entropy and bound  -> train

    f(x)   the image feature, from CLIP's frozen image tower, of length 1; while training, of a random crop of the image
    g      CLIP's frozen text tower; w_c its feature at the end token, of length 1
    v_m    the learned context: M vectors in the space of word embeddings, shared by all classes or one set per class
    name_c the word embeddings of the class name; it can also stand in the middle or in front of the context
    tau    CLIP's logit scale, frozen as well
    t      the temperature of the bound (0.07); the lower it is, the sooner the bound is close to log C; lambda is 1
    f~     a convex combination of four image features of one class (its shots, their augmented views), of length 1 again

At test time a class is the mean of both views, of length 1, or the soft one alone (--classifier); for --transfer, too, the
written view is made with the template of --dataset. The bound is one for classes drawn at random; here they are all C
of them: read it as how well either view tells which class the other one means. t, lambda and the classifier were chosen on
validation images of `shapes`, base to new, 4 and 16 shots, seeds 1 to 3, among t 0.07, 0.3, 1; lambda 1, 4, 16 did alike.

Try first:  python mvp_mi.py --base-to-new --shots 16   and the same with coop.py: what is kept of the new classes
            python mvp_mi.py --base-to-new --shots 16 --mi-weight 0     without the mutual information
            python mvp_mi.py --mi-weight 0 --augment 0 --classifier soft        CoOp, to the last digit
"""

import math

import torch
import torch.nn.functional as F

import common


class Prompt(torch.nn.Module):
    """The learned context `v`, (M, W) shared by all classes or (C, M, W) class-specific, and the prompts made with it."""

    def __init__(self, clip, v, position="end", template=None):
        super().__init__()
        self.clip, self.position, self.v = clip, position, torch.nn.Parameter(v)
        self.template = template                                                      # of the classifier's second view, if any

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
        w = self(common.name_tokens(self.clip, classnames))
        if self.template:
            w = F.normalize(w + common.template_features(self.clip, self.template, classnames), dim=-1)
        return w


def first_context(run, args):
    """Where the context starts: Gaussian noise of standard deviation 0.02, or words (then M is their number)."""
    clip, copies = run.clip, [len(run.classnames)] if args.class_specific else []
    if args.ctx_init:
        return common.embed(clip, args.ctx_init).repeat(*copies, 1, 1)
    return 0.02 * torch.randn(*copies, args.n_ctx, clip.text.token_embedding.embedding_dim, device=clip.device)


def info_nce(s, h, t):
    """L_nce, InfoNCE between two views s, h (C, D) of length 1, both ways (van den Oord et al. 2018, equation 4)."""
    similarity, own = s @ h.T / t, torch.arange(len(s), device=s.device)              # (C, C)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def augment(features, labels, y, k, rng):
    """f~: k random convex combinations per class in the batch, of its features (N, V, D): (classes * k, D), labels."""
    made, classes = [], y.unique().repeat_interleave(k)
    for c in classes.tolist():
        own = features[labels == c].flatten(0, 1)                                     # (n V, D)
        some = own[torch.randint(len(own), (4,), generator=rng)]                      # (4, D)
        a = -torch.rand(4, generator=rng).clamp_min(1e-9).log()                       # exponential draws, over their sum:
        made.append((a / a.sum()).to(own.device) @ some)                              # uniform on the simplex, Dirichlet(1)
    return F.normalize(torch.stack(made), dim=-1), classes


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip, names = run.clip, common.name_tokens(run.clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or common.default_epochs(run)
    h = common.template_features(clip, run.data.template, run.classnames)             # (C, D), the written view
    rng = torch.Generator().manual_seed(run.seed)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        for f, y in run.batches(epoch):                                               # (B, D), (B)
            with clip.autocast():
                w = prompt(names)                                                     # (C, D), once for the whole batch
            if args.augment:
                more_f, more_y = augment(run.features, run.labels, y, args.augment, rng)
                f, y = torch.cat([f, more_f]), torch.cat([y, more_y])                 # B is larger from here on
            logits = clip.logit_scale * f @ w.T                                       # (B, C)
            l_nce = info_nce(w, h, args.mi_temperature)
            loss = F.cross_entropy(logits, y) + args.mi_weight * l_nce
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss, bound=math.log(len(h)) - l_nce)                 # in nats, log C at most


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS",
                        help="start from these words, whose number replaces --n-ctx (noise)")
    parser.add_argument("--class-specific", action="store_true", help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="where the class name stands (end)")
    parser.add_argument("--mi-weight", type=common.number(low_ok=True), default=1.0, metavar="LAMBDA",
                        help="of the mutual-information term (1)")
    parser.add_argument("--mi-temperature", type=common.number(), default=0.07, metavar="T", help="of the bound (0.07)")
    parser.add_argument("--augment", type=common.number(int, 0, low_ok=True), default=2, metavar="K",
                        help="combined features per class and batch (2)")
    parser.add_argument("--classifier", choices=["soft", "mean"], default="mean", help="the soft view, or the mean of both (mean)")
    args = common.parse(parser)
    for run in common.runs(__file__, args):
        template = run.data.template if args.classifier == "mean" else None
        prompt = Prompt(run.clip, first_context(run, args), args.position, template)
        if args.load:
            run.load(prompt)
        else:
            train(prompt, run, args)
        run.finish(prompt, log_C=math.log(len(run.classnames)))
        print("  nearest words:", common.nearest_words(run.clip, prompt.v))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
