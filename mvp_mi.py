"""MVP-MI: a learned prompt that stays informative about the hand-crafted one.

Q. Zhang: "Generalizable Prompt Tuning for Vision-Language Models", 2024, arXiv 2410.03189. Only its
abstract and summaries could be read, no equation, and there is no public code. (paper) marks what
they say. As in CoOp (coop.py), by our choice: prompt, v's start, optimizer, schedule, and
cross-entropy on images (not mixtures). All else is our guess: equations, numbers, test, and the
name, from multi-view prompts and mutual information.

A learned prompt fits the training classes, a hand-crafted one serves all classes. The method treats
them as two views of the text and maximizes their mutual information, so that the learned prompt
keeps the general meaning (paper). A learnable critic measures that information, and class-wise
Mixup of image features widens what the prompt is trained on (paper). CLIP is frozen.

    w_c    = g([start] v_1 ... v_M [name of c] "." [end])      class feature of class c
    p(c|x) = softmax_c(tau * f(x) . w_c)                        CLIP's classifier
    h_c    = g(template of the training set with the name of c) hand-crafted view, frozen
    z      = a f(x_i) + (1 - a) f(x_j), normalized              Mixup of two images of one class
    T(w,b) = cos(P w, Q b) / t                                  critic; b is an h_c or a z
    L_view = -1/(2C) sum_c [log softmax_k(T(w_c, h_k))_c        InfoNCE of the two views, both ways,
                          + log softmax_k(T(w_k, h_c))_c]       over the C trained classes
    L_img  = mean over z of -log softmax_k(T(w_k, z))_y         InfoNCE of mixtures of class y
    L      = mean over f(x) and z of -log p(y|.) + lambda L_view + mu L_img

    f(x)   unit-norm image feature of image x with label y, from the frozen image encoder   (D,)
    g      the frozen text encoder, read at the end token and normalized                    (D,)
    v      the learned context: M vectors of the text encoder's width W                     (M, W)
    tau    CLIP's learned inverse temperature, 100 in OpenAI's models (clip.logit_scale below)
    z      (D,). For each class in the batch, two are drawn. Each z mixes crops of two training
           images of that class, which may be the same; a is uniform in [0, 1]; y is the class
    P, Q   (D, D), start as the identity; t starts at 0.07. SGD trains v, P, Q and log t, decaying
           only v: decay would pull t to 1; cos ignores P's size. After training only v is kept
    lambda 1, and mu 1

What is maximized? Draw a class c at random: w_c and h_c are then random vectors. Given w_c, a
softmax guesses which h_k belongs to it, and the other way round; L_view is the mean cross-entropy
of the two guesses. The information I(w; h) is the uncertainty about the partner, log C, less what
w_c leaves of it; cross-entropy is at least that rest. So log C - L_view <= I(w; h) (van den Oord
et al. 2018). The information itself is log C, its maximum, already before training, if no two
classes have equal features. Training raises only the bound: as the critic sees them, each w_c comes
nearer to its h_c than to the other h_k. L_img is -log p(y|z) with T as logits. Likewise log C -
L_img <= I(z; y), if classes are equally frequent. P and Q are shared, so they must fit images, too.

SGD learns from --shots images of each class. --base-to-new trains on the first half of the classes,
the base classes, and then classifies the images of each half among the classes of that half.

Test (ours): argmax_c f(x) . u_c. A trained class (told by label and name, as names may repeat) has
u_c = w_c. A new one, for which v was not trained, has the mean of w_c and h_c, normalized.
--classifier soft: u = w for all.

Try: it takes a minute at most on the default data set, "shapes". The numbers, accuracies on base /
new classes, are for --dataset embedded --seeds 1,2,3: means over its eleven small data sets.
Zero-shot, the tiny CLIP used has 75.3 / 76.5.
    python coop.py --base-to-new --shots 16                            83.6 / 70.9
    python mvp_mi.py --base-to-new --shots 16                          84.3 / 77.0
    ... --mi-weight 0                                                  83.8 / 77.0, no L_view
    ... --classifier soft                                              84.3 / 75.2
    ... --classifier soft --mi-weight 0                                83.8 / 72.9, no L_view
    ... --classifier soft --image-weight 0                             84.9 / 73.9, no L_img
    ... --classifier soft --augment 0                                  84.4 / 72.4, no z, no L_img
    ... --classifier soft --critic cosine                              84.5 / 71.3, P, Q, t fixed
With the mean of w and h, L_view adds nothing on new classes. With u = w every part helps there. A
fixed critic (in L_view and L_img) is worse there than no L_view; with 4 shots it is better, 76.0 to
75.1. We do not know why.

Ours, as in coop.py: ten random crops of each image are encoded once. f(x) is of one of them, drawn
in each epoch; z takes any, drawn in each batch. --views 0: one crop, encoded anew in every epoch.
"""

import math

import torch
import torch.nn.functional as F

import common


class Prompt(torch.nn.Module):
    """Soft prompts: class names with the learned context."""

    def __init__(self, clip, v, position="end", template=None, trained=()):
        super().__init__()
        self.clip = clip                                # not a Module: parameters() leaves it out
        self.v = torch.nn.Parameter(v)                  # (M, W); class-specific: (C, M, W)
        self.position = position
        self.template = template                        # of h_c at test; None: w_c for all classes
        self.trained = set(trained)                     # (label, name): these use w_c at test

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
        """Return u_c of part.classnames, (C, D)."""
        w = self(common.name_embeddings(self.clip, part.classnames))
        if self.template is None:
            return w
        h = common.template_features(self.clip, self.template, part.classnames)
        known = torch.tensor([pair in self.trained for pair in part.classes], device=w.device)
        return torch.where(known[:, None], w, F.normalize(w + h, dim=-1))


def initial_context(run):
    """Return v before training: one vector per token of --ctx-init, or noise (CoOp's paper)."""
    per_class = [len(run.classes)] if run.args.class_specific else []   # a first dimension, or none
    if run.args.ctx_init:
        return common.embed(run.clip, run.args.ctx_init).repeat(*per_class, 1, 1)
    width = run.clip.text.token_embedding.embedding_dim
    v = 0.02 * torch.randn(*per_class, run.args.n_ctx, width)  # on the CPU: alike on every device
    return v.to(run.clip.device)


class Critic(torch.nn.Module):
    """T(w, b) = cos(P w, Q b) / t: how well two features belong together."""

    def __init__(self, dim, t):
        super().__init__()
        self.P, self.Q = torch.nn.Parameter(torch.eye(dim)), torch.nn.Parameter(torch.eye(dim))
        self.log_t = torch.nn.Parameter(torch.tensor(t).log())

    def forward(self, w, b):
        """Return T of all pairs of w (n, D) and b (m, D), (n, m)."""
        w, b = F.normalize(w @ self.P.T, dim=-1), F.normalize(b @ self.Q.T, dim=-1)
        return w @ b.T / self.log_t.exp()


def info_nce(scores):
    """Return L_view, both ways, of the critic's scores of all pairs of classes, (C, C)."""
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def mixup(features, labels, y, count, rng):
    """Return z (m, D) and its labels (m,): `count` mixtures for every class in the labels y.

    features, labels  of all training images, (N, V crops, D) and (N,)"""
    y, labels, device = y.cpu(), labels.cpu(), features.device      # drawn alike on all devices
    y_mix = y.unique().repeat_interleave(count)                             # (m,)
    same = (labels == y_mix[:, None]).float()                               # (m, N)
    rows = torch.multinomial(same, 2, replacement=True, generator=rng)      # (m, 2), of that class
    views = torch.randint(features.shape[1], rows.shape, generator=rng)
    a = torch.rand(len(rows), 1, generator=rng).to(device)
    f_i, f_j = features[rows.to(device), views.to(device)].unbind(1)        # (m, D) each
    return F.normalize(a * f_i + (1 - a) * f_j, dim=-1), y_mix.to(device)


def train(prompt, run):
    """Train the prompt in place."""
    clip, args = run.clip, run.args
    names = common.name_embeddings(clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    h = common.template_features(clip, run.data.template, run.classnames)      # (C, D)
    critic = Critic(h.shape[1], args.mi_temperature).to(clip.device)
    if args.critic == "learned":                        # cosine: it keeps its initial value
        optimizer.add_param_group({"params": critic.parameters(), "weight_decay": 0})
    rng = torch.Generator().manual_seed(run.seed)
    epochs = args.epochs or common.default_epochs(run)  # 50 (1 shot or ImageNet), 100 (2-7) or 200
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        # Epoch 0 warms up at 1e-5. Then the rate falls from args.lr along half a cosine, which
        # would reach 0 two epochs after the last one (this offset: CoOp's code).
        decay = (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
        optimizer.param_groups[0]["lr"] = lr = 1e-5 if epoch == 0 else args.lr * decay
        optimizer.param_groups[-1]["lr"] = lr           # of the critic, if it is learned
        # Shuffled mini-batches (32 images by default); an incomplete last one is dropped unless it
        # is the only one. Each image appears as one of its random crops (ten by default).
        for f, y in run.batches(epoch):                 # (B, D), (B,)
            with clip.autocast():                       # --precision amp: bf16 on GPUs
                w = prompt(names)                       # (C, D)
            l_view, l_img = info_nce(critic(w, h)), 0
            bounds = {"bound": math.log(len(w)) - l_view}   # on I(w; h) and I(z; y), recorded
            if args.augment:
                z, y_z = mixup(run.features, run.labels, y, args.augment, rng)  # (m, D), (m,)
                l_img = F.cross_entropy(critic(w, z).T, y_z)
                f, y = torch.cat([f, z]), torch.cat([y, y_z])                   # (B + m, ...)
                bounds["image_bound"] = math.log(len(w)) - l_img
            logits = clip.logit_scale * f @ w.T         # (B + m, C)
            loss = F.cross_entropy(logits, y) + args.mi_weight * l_view + args.image_weight * l_img
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss, lr=lr, **bounds)


def flags():
    """Return the parser of this script's flags."""
    parser = common.flags(__doc__, lr=0.002, batch_size=32, n_ctx=16)
    parser.add_argument("--ctx-init", type=common.words, metavar="WORDS",
                        help="words to start from, in place of the usual start")
    parser.add_argument("--class-specific", action="store_true",
                        help="one context per class (CoOp's paper); not for new classes")
    parser.add_argument("--position", choices=["end", "middle", "front"], default="end",
                        help="of the class name (end); front is in CoOp's code, not its paper")
    parser.add_argument("--mi-weight", type=common.nonnegative, default=1.0, metavar="LAMBDA",
                        help="weight of L_view, the two views (1)")
    parser.add_argument("--image-weight", type=common.nonnegative, default=1.0, metavar="MU",
                        help="weight of L_img, mixed images (1)")
    parser.add_argument("--mi-temperature", type=common.positive, default=0.07, metavar="t",
                        help="the critic's temperature at the start (0.07)")
    parser.add_argument("--critic", choices=["learned", "cosine"], default="learned",
                        help="a learned critic, or one that stays at its start (learned)")
    parser.add_argument("--augment", type=common.whole, default=2,
                        metavar="K", help="mixed features per class and batch; 0: no z (2)")
    parser.add_argument("--classifier", choices=["seen", "soft"], default="seen",
                        help="soft: w for all classes; seen: the mean of w and h for new ones "
                             "(seen)")
    return parser


def main():
    for run in common.runs(__file__, flags()):          # for each data set, number of shots, seed
        template = None if run.args.classifier == "soft" else run.template
        prompt = Prompt(run.clip, initial_context(run), run.args.position, template, run.classes)
        run.start(prompt)                               # encode images; --load: read the prompt
        if not run.args.load:
            train(prompt, run)
        # Predict argmax_c f(x) . u_c, record (with log C, the most a bound can reach), print.
        run.finish(prompt, log_C=math.log(len(run.classes)))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
