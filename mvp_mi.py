"""MVP-MI: learn the words around the class name, informative about the hand-written prompt.

Paper: arXiv 2410.03189, called MVP-MI here (summaries call the method E2MIM). Of it only its
abstract and summaries could be read, no equation, and there is no public code. Marked [P] is what
they say, [O] is our reading of it, in the simplest form.

The learned and the written prompt are two views of the text [P]. Their mutual information is
maximised, so that the learned one keeps the general meaning [P]. Class-wise Mixup of the image
features widens what the prompt is trained against [P], and takes part in the mutual information,
which a learned estimator measures [P]. CLIP itself stays frozen.

The model; on the right, the function that computes it
    w_c    = g([start, v_1, ..., v_M, name_c, ".", end])        class feature       Prompt.forward
    p(c|x) = softmax_c(tau f(x) . w_c)                          CLIP's classifier   train
    h_c    = g("a photo of a [name of c]." or the like)         written prompt      train
    z      = a f(x_i) + (1 - a) f(x_j),  f~ = z / |z|           class-wise Mixup    mixup
    T(w,b) = cos(A w, B b) / t,  b an h_k or an f~              the estimator [O]   Critic
    L_view = -1/(2C) sum_c [log softmax_k(T(w_c, h_k))_c
                          + log softmax_k(T(w_k, h_c))_c]       InfoNCE [O]         info_nce
    L_img  = - mean over f~ of log softmax_k(T(w_k, f~))_y~     InfoNCE with w [O]  train
    L      = - mean over batch and f~ of log p(y|.)             [O]: f~ in it, too
             + lambda L_view + mu L_img                                             train
    G      = dL/dv                                              its gradient        train
    c and k run over all C classes that are learned: L_view compares C x C pairs of prompts, the
    same in every batch, and L_img every f~ with the C learned prompts.

    x, y   an image and its label, one of the C classes that are learned
    f(x)   the feature that CLIP's image tower gives it, D numbers, of length 1
    g      CLIP's text tower: the feature that it reads at the end token, of length 1
    v_m    the learned context, M = 16 vectors as wide as word embeddings (W), shared by all classes
           (--class-specific: M of them for each one, none for new ones); they start as
           noise, N(0, 0.02^2), or as the words of --ctx-init, and M is then their number
    name_c the embeddings of the class name's tokens (--position middle: behind the first M // 2 of
           v; front: before v)
    tau    CLIP's logit scale, not its logarithm: 100 in OpenAI's models
    f~, y~ K = 2 for each class y~ in a batch [O]: i and j are drawn, with replacement, from all
           training images of that class, each as a random crop; a is uniform in [0, 1], Beta(1, 1)
    A, B   (D, D) maps that start at the identity, t starts at 0.07: one estimator for both terms.
           A, B and log t are learned as v is, but without weight decay. --critic cosine: they
           stay as they start, T = cos / t
    lambda = 4, and t: the best harmonic mean of base and new classes on validation images, as an
           average over the repository's small data sets, of lambda 0, 1, 4, 16 and t 0.07, 0.3, 1
    mu     = 1, which was not searched

Which random variable, if the class fixes both prompts? The class: drawn uniformly it makes I(w; h)
log C as soon as no two classes share a w_c or an h_c, from the start. There is nothing to gain in
I, only in what an estimator can read of it: log C - L_view <= I(w; h) for any T (to guess the class
through a softmax costs at least the entropy that is left), and how near it comes says how well each
prompt tells, through T, which class the other means. So the estimator decides how hard the term
pulls. A fixed one ties w_c to h_c itself, and goes on asking for more distance between classes. A
learned one can reach log C by itself (t falls, A and B change), and then its gradient is gone, and
with it the regularisation. The paper's is learned, so the default is; the README has both. For
I(w; f~) the bound log C - L_img holds on average over f~ and equally frequent y~; one batch may
exceed it.

The update, once for each batch, SGD: to G come weight decay, then momentum (u = 0 at first)
    u <- 0.9 u + (G + 0.0005 v),  v <- v - r u
    r = 1e-5 in epoch e = 0; in epochs e = 1, ..., E - 1 it is lr (1 + cos(pi (e - 1) / E)) / 2
    with lr = 0.002; E = 50 epochs for 1 shot (training image per class), 100 for 2 to 7, 200 for
    more, and always 50 on ImageNet
    A batch is 32 of the training images, shuffled anew in every epoch; the last one is not used if
    it is smaller, unless it is the only one. Of every image ten random crops, flipped or not, are
    encoded before the training; of the ten one is drawn whenever it is used (--views 0: new ones).

The test: argmax_c f(x) . w'_c over the classes that are tested (--base-to-new: the learned half,
then the other half by itself), for images resized as CLIP itself does, without a random crop, with
    w'_c = w_c for classes that were learned (by name), else (w_c + h_c) / |w_c + h_c|
The context has learned nothing of other classes, and the template was fitted to none: our decision
[O]. --classifier soft takes w_c for all classes, mean the other for all. The estimator is not used.
With --transfer, h_c still is of the template of --dataset.

Try first:  python mvp_mi.py --base-to-new --shots 16       compare with coop.py's
            python mvp_mi.py --base-to-new --shots 16 --mi-weight 0 --image-weight 0
            python mvp_mi.py --mi-weight 0 --image-weight 0 --augment 0 --classifier soft   is CoOp
"""

import common  # first: Ctrl-C while the libraries load ends in one line

import math

import torch
import torch.nn.functional as F


class Prompt(torch.nn.Module):
    """The learned context v: (M, W), shared by all classes, or (C, M, W), class-specific."""

    def __init__(self, clip, v, position="end", template=None, learned=()):
        super().__init__()
        self.clip, self.position = clip, position
        self.template, self.learned = template, set(learned)
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
        """w'_c (C, D), for the test: of any classes, or of v's if class-specific."""
        w = self(common.name_embeddings(self.clip, classnames))
        if self.template is None:
            return w
        h = common.template_features(self.clip, self.template, classnames)
        known = torch.tensor([name in self.learned for name in classnames], device=w.device)
        return torch.where(known[:, None], w, F.normalize(w + h, dim=-1))


def first_context(run, args):
    """Where v starts: noise, or the embeddings of words; M is then the number of their tokens."""
    copies = [len(run.classnames)] if args.class_specific else []
    if args.ctx_init:
        return common.embed(run.clip, args.ctx_init).repeat(*copies, 1, 1)
    width = run.clip.text.token_embedding.embedding_dim
    return 0.02 * torch.randn(*copies, args.n_ctx, width, device=run.clip.device)


class Critic(torch.nn.Module):
    """The estimator T(w, b) = cos(A w, B b) / t of how well two features belong together."""

    def __init__(self, dim, t):
        super().__init__()
        self.A, self.B = torch.nn.Parameter(torch.eye(dim)), torch.nn.Parameter(torch.eye(dim))
        self.log_t = torch.nn.Parameter(torch.tensor(t).log())

    def forward(self, w, b):
        """T of all pairs of w (n, D) and b (m, D): (n, m)."""
        w, b = F.normalize(w @ self.A.T, dim=-1), F.normalize(b @ self.B.T, dim=-1)
        return w @ b.T / self.log_t.exp()


def info_nce(T):
    """L_view of T (C, C), both ways (van den Oord et al. 2018, equation 4)."""
    own = torch.arange(len(T), device=T.device)
    return (F.cross_entropy(T, own) + F.cross_entropy(T.T, own)) / 2


def mixup(features, labels, y, k, rng):
    """f~ (m, D) and y~ (m,), k for every class in y, of the training features (N, V, D)."""
    y_mix = y.unique().repeat_interleave(k)                             # (m,)
    same = (labels == y_mix[:, None]).float().cpu()                     # (m, N)
    rows = torch.multinomial(same, 2, replacement=True, generator=rng)  # (m, 2), of that class
    views = torch.randint(features.shape[1], rows.shape, generator=rng)
    a = torch.rand(len(rows), 1, generator=rng).to(features.device)
    f_i, f_j = features[rows, views].unbind(1)                          # (m, D) each
    return F.normalize(a * f_i + (1 - a) * f_j, dim=-1), y_mix


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip = run.clip
    names = common.name_embeddings(clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    h = common.template_features(clip, run.data.template, run.classnames)   # (C, D)
    critic = Critic(h.shape[1], args.mi_temperature).to(clip.device)
    if args.critic == "learned":
        optimizer.add_param_group({"params": critic.parameters(), "weight_decay": 0})
    rng = torch.Generator().manual_seed(run.seed)
    epochs = args.epochs or common.default_epochs(run)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(epoch, epochs, args.lr)
        for f, y in run.batches(epoch):                                 # (B, D), (B)
            with clip.autocast():                                       # on a GPU: bf16 or fp16
                w = prompt(names)                                       # (C, D)
            l_view, l_img = info_nce(critic(w, h)), 0
            bounds = {"bound": math.log(len(w)) - l_view}
            if args.augment:
                f_mix, y_mix = mixup(run.features, run.labels, y, args.augment, rng)
                l_img = F.cross_entropy(critic(w, f_mix).T, y_mix)
                f, y = torch.cat([f, f_mix]), torch.cat([y, y_mix])     # (B + m, D), (B + m,)
                bounds["image_bound"] = math.log(len(w)) - l_img
            logits = clip.logit_scale * f @ w.T                         # (B + m, C)
            loss = F.cross_entropy(logits, y) + args.mi_weight * l_view + args.image_weight * l_img
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss, **bounds)


def main():
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, default="", metavar="WORDS",
                        help="start from these words instead")
    parser.add_argument("--class-specific", action="store_true",
                        help="learn one context per class instead of one for all")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="where the class name stands (end)")
    weight = common.number(low_ok=True)
    parser.add_argument("--mi-weight", type=weight, default=4.0, metavar="LAMBDA",
                        help="of the mutual information of the two views (4)")
    parser.add_argument("--image-weight", type=weight, default=1.0, metavar="MU",
                        help="of the mutual information of mixed images and the learned view (1)")
    parser.add_argument("--mi-temperature", type=common.number(), default=0.07, metavar="T",
                        help="of the estimator, at the start (0.07)")
    parser.add_argument("--critic", choices=["learned", "cosine"], default="learned",
                        help="an estimator that is learned, or one that stays (learned)")
    parser.add_argument("--augment", type=common.number(int, 0, low_ok=True), default=2,
                        metavar="K", help="mixed features per class and batch (2)")
    parser.add_argument("--classifier", choices=["seen", "soft", "mean"], default="seen",
                        help="the learned view (soft), the mean of both views, or the learned one "
                             "for classes that were learned, else the mean (seen)")
    args = common.parse(parser)
    for run in common.runs(__file__, args):
        prompt = Prompt(run.clip, first_context(run, args), args.position,
                        None if args.classifier == "soft" else run.data.template,
                        run.classnames if args.classifier == "seen" else ())
        if args.load:
            run.load(prompt)
        else:
            train(prompt, run, args)
        run.finish(prompt, log_C=math.log(len(run.classnames)))
        print("  nearest words:", common.nearest_words(run.clip, prompt.v))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
