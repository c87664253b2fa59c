"""RESTORE: prompts in both encoders, with a penalty on unequal feature shifts.

Yang et al.: "RESTORE: Towards Feature Shift for Vision-Language Prompt Learning", arXiv 2403.06136.
(paper) marks what its abstract and figures say; we could not read its equations.

If prompts change one encoder only, or both independently, image and text features drift apart; the
alignment that CLIP was pre-trained for is lost, and new classes suffer (paper). RESTORE measures
the feature shift, how far the prompts move a state after each block, and penalizes its difference
between the encoders (paper). CLIP is frozen.

The encoders. n prompt vectors enter block l for l = 1 ... K, P_l the text's, Q_l the image's.
Only the loss ties P to Q (paper). Where they enter: the authors' code. Tokens count from 0:
    X_0 = [start] "a photo of a" [name of c] "." [end], plus positions
    X_l = text block l of X_(l-1); before it, P_l replaces tokens 1 ... n (P_1 gets their positions)
    Y_0 = ln_pre([class token, patches, Q_1], plus positions, but none for Q_1)
    Y_l = image block l of Y_(l-1); before it, from l = 2 on, Q_l replaces the last n tokens
    After block K nothing is replaced: the prompts' tokens go on like any others.
    t_c, i(x) = text feature at the end token, image feature at the class token, not normalized

The loss, for a batch of images x with labels y, among C classes:
    shift_l = mean of |s_l - s_l^0| / |s_l^0|, over the C classes (text) or the batch (image)
    L_fs    = mean over blocks of (shift_l^image - shift_l^text)^2      consistency; formula: ours
    A(z)    = z + down(QuickGELU(up(LN(z))))                surgery block, one per encoder
    w_c     = b_t A(t_c) + (1 - b_t) t_c, normalized        class feature
    f(x)    = b_i A(i(x)) + (1 - b_i) i(x), normalized      image feature
    p(c|x)  = softmax_c(tau * f(x) . w_c)                   CLIP's classifier
    L       = mean over the batch of -log p(y|x), + gamma L_fs

    P, Q   n = 2 vectors of the encoders' widths W_t, W_i; K = 9 blocks, or fewer if an encoder has
           fewer; P_1 starts as the first n words, the others as noise (all: authors' code)
    s_l    state of the end token or class token after block l, also beyond K; s_l^0 without
           prompts, of the same text or crop. Of a deeper encoder only the last blocks are
           compared, as many as the other has. The relative norm is ours
    A      a feed-forward adapter (paper) of this form (authors' code). `down` starts at zero
           (ours), so that A(z) = z in the beginning
    b      0.1, not trained. Once, after epoch E // 3 of 0 ... E-1, if it is not the last:
           b_t += 0.02 * mean shift^text and b_i += 0.005 * mean shift^image, over blocks and that
           epoch. More shift, more surgery, but barely. (all: authors' code, but its shifts are
           norms of the prompts)
    tau    CLIP's learned inverse temperature, 100 in OpenAI's models (clip.logit_scale below)
    gamma  10 (ours)

SGD (momentum 0.9, weight decay 5e-4) trains P, Q and A; to it, s^0 and b are constants. L_fs
compares how far the encoders move, not in which direction. Both may move far, if equally. Against
this shortcut the paper has the surgery, which the first term of L trains to correct the final
features. It acts after the last block: it is no part of L_fs, and makes no shift smaller.

Test: argmax_c f(x) . w_c, with the same prompts and surgery for trained and new classes.

Try: it takes a minute at most on the default data set, "shapes". The numbers, accuracies on base /
new classes, are for --dataset embedded --seeds 1,2,3: means over its eleven small data sets.
Zero-shot, the tiny CLIP used has 75.3 / 76.5.
    python coop.py --base-to-new --shots 16                            83.6 / 70.9
    python restore.py --base-to-new --shots 16                         84.5 / 78.1   gap 0.03
    ... --blend 0                                                      84.5 / 78.3   gap 0.03
    ... --shift-weight 0                                               82.0 / 75.5   gap 0.31
    ... --shift-weight 0 --blend 0                                     82.0 / 75.3   gap 0.32
The gap is the mean over blocks of |shift_l^image - shift_l^text| after training. L_fs closes it and
helps; the surgery changes at most 0.2 here.

The released code differs from the paper: its L_fs compares norms of the prompts, not features, and
it makes Q_l from P_l (class Released, below). SGD, schedule and dropping the incomplete batch are
CoOp's; 10 epochs, batches of 4 and lr 0.0035 the authors' (0.0005 on shapes, embedded: ours).
Ours: each epoch draws one of ten fixed random crops of each image; with --views 0, a fresh one.
"""

import math

import torch
import torch.nn.functional as F

import common


class Surgery(torch.nn.Module):
    """Return b A(z) + (1 - b) z, normalized, of features z, (N, D)."""

    def __init__(self, dim, b):
        super().__init__()
        self.register_buffer("b", torch.tensor(b))      # raised by raise_blends, not by SGD
        self.used = b > 0       # b = 0 at first: no block, whatever b becomes
        if self.used:
            self.norm = torch.nn.LayerNorm(dim)
            self.up, self.down = torch.nn.Linear(dim, 4 * dim), torch.nn.Linear(4 * dim, dim)
            torch.nn.init.zeros_(self.down.weight)
            torch.nn.init.zeros_(self.down.bias)

    def forward(self, z):
        if self.used:
            h = self.up(self.norm(z))
            A = z + self.down(h * torch.sigmoid(1.702 * h))             # QuickGELU
            z = self.b * A + (1 - self.b) * z
        return F.normalize(z.float(), dim=-1)


class Prompt(torch.nn.Module):
    """The prompts P and Q, and the surgery blocks."""

    def __init__(self, clip, args):
        super().__init__()
        self.clip = clip                                # not a Module: parameters() leaves it out
        visual, n = clip.model.visual, args.n_ctx       # clip.visual may be a copy in 16 bits
        if getattr(visual, "pool_type", None) != "tok":
            raise common.Problem("--backbone: RESTORE's prompts go into a vision transformer that "
                                 "is read at its class token (try ViT-B-16)")
        self.words = common.embed(clip, args.ctx_init)                      # (words, W_t)
        if n > len(self.words) and args.towers != "vision":
            raise common.Problem(f"--n-ctx {n}: the prompts replace words of --ctx-init, which has "
                                 f"{len(self.words)} tokens")
        K = min(args.depth, len(clip.text.transformer.resblocks), len(visual.transformer.resblocks))
        width_t, width_i = self.words.shape[1], visual.conv1.out_channels
        P = [self.words[:n].clone()] + [0.02 * torch.randn(n, width_t) for _ in range(K - 1)]
        Q = [0.02 * torch.randn(n, width_i) for _ in range(K)]
        self.P = torch.nn.ParameterList(P if args.towers != "vision" else [])
        self.Q = torch.nn.ParameterList(Q if args.towers != "text" else [])
        # No prompts: no surgery (ours), and shift 0, to which L_fs pulls the other encoder's.
        if len(args.blend) > 2:
            raise common.Problem("--blend: wants one number, or the text's and the image's")
        b_t, b_i = args.blend[0], args.blend[-1]
        self.text_surgery = Surgery(visual.output_dim, b_t if len(self.P) else 0.0)
        self.image_surgery = Surgery(visual.output_dim, b_i if len(self.Q) else 0.0)
        self.to(clip.device)

    def image_prompts(self):
        """Return the list of Q_1 ... Q_K, (n, W_i) each; Released makes them of P."""
        return self.Q

    def encode_text(self, names, prompts):
        """Return t_c, (C, D), and the end token's state after every block, (C, blocks, W_t)."""
        text, (start, end) = self.clip.text, common.start_end(self.clip)

        def encode(some):
            x, last = common.pad(some)                                      # (c, L, W_t), (c,)
            each, states = torch.arange(len(x), device=x.device), []
            length = x.shape[1]
            position = text.positional_embedding[:length]
            x = x + position
            for k, block in enumerate(text.transformer.resblocks):          # block l = k + 1
                if k < len(prompts):
                    p = prompts[k] if k else prompts[k] + position[1:1 + len(prompts[k])]
                    p = p.expand(len(x), -1, -1).to(x.dtype)                # (c, n, W_t)
                    x = torch.cat([x[:, :1], p, x[:, 1 + p.shape[1]:]], 1)
                x = block(x, attn_mask=text.attn_mask[:length, :length])    # causal
                states.append(x[each, last])                # the end tokens', (c, W_t)
            return text.ln_final(states[-1]) @ text.text_projection, torch.stack(states, 1)

        rows = [[start, self.words, name, dot, end] for name, dot in names]
        common.check_length(self.clip, max(sum(map(len, parts)) for parts in rows))
        return common.in_chunks(self.clip, encode, rows)

    def encode_image(self, pixels, prompts):
        """Return i(x), (B, D), and the class token's state after every block, (B, blocks, W_i)."""
        visual, states = self.clip.model.visual, []
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)                 # (B, patches, W_i)
        first = visual.class_embedding.expand(len(x), 1, -1).to(x.dtype)
        x = torch.cat([first, x], 1) + visual.positional_embedding
        own = x.shape[1]                                                    # 1 + patches
        for k, block in enumerate(visual.transformer.resblocks):
            if k < len(prompts):
                q = prompts[k].expand(len(x), -1, -1).to(x.dtype)           # (B, n, W_i)
                x = torch.cat([x[:, :own], q], 1)
            x = block(x if k else visual.ln_pre(x))
            states.append(x[:, 0])                                          # (B, W_i)
        return visual.ln_post(states[-1]) @ visual.proj, torch.stack(states, 1)

    def class_features(self, part):
        """Return the class features w_c of part.classnames, (C, D)."""
        names = common.name_embeddings(self.clip, part.classnames)
        return self.text_surgery(self.encode_text(names, self.P)[0])

    def image_features(self, pixels):
        """Return the image features f(x) of test images, (B, D)."""
        return self.image_surgery(self.encode_image(pixels, self.image_prompts())[0])

    def consistency(self, shift_t, shift_i):
        """Return L_fs of the shifts of both encoders, (blocks_t,) and (blocks_i,)."""
        return difference(shift_t, shift_i).square().mean()

    def raise_blends(self, shift_t, shift_i):
        """Let the blends grow by 0.02 (text) and 0.005 (image) times the mean shift."""
        self.text_surgery.b += 0.02 * shift_t.mean()
        self.image_surgery.b += 0.005 * shift_i.mean()


def feature_shift(states, frozen):
    """Return shift_l of all blocks, (blocks,), from s and s^0, (n, blocks, W) each."""
    states, frozen = states.float(), frozen.to(states.device).float()
    return ((states - frozen).norm(dim=-1) / frozen.norm(dim=-1)).mean(0)


def difference(shift_t, shift_i):
    """Return shift_l^image - shift_l^text, over the last blocks if one encoder is deeper."""
    m = min(len(shift_t), len(shift_i))
    return shift_i[-m:] - shift_t[-m:].to(shift_i.device)


@torch.no_grad()
def image_states(prompt, run, prompts, views=None, cache=None):
    """Return the class token's states of the training images, (N, blocks, W_i), on the CPU.

    With views: (N, V, blocks, W_i). On ImageNet, 16 shots and 10 views, that is 6 GB."""
    def states(pixels):
        return prompt.encode_image(pixels, prompts)[1]

    with run.clip.autocast():
        return common.encode_images(
            run.clip, run.data, run.items, cache, views, encode=states,
            kind=f"states of all blocks, {run.code}, amp {run.clip.amp}")       # in the cache's key


@torch.no_grad()
def text_states(prompt, run, prompts):
    """Return the end token's states of the classes, (C, blocks, W_t)."""
    with run.clip.autocast():
        return prompt.encode_text(common.name_embeddings(run.clip, run.classnames), prompts)[1]


def measure(prompt, run):
    """Return both encoders' shifts by block, and their mean gap: the paper's diagnostic.

    On the training images without augmentation."""
    shift_t = feature_shift(text_states(prompt, run, prompt.P), text_states(prompt, run, []))
    shift_i = feature_shift(image_states(prompt, run, prompt.image_prompts()),
                            image_states(prompt, run, [], cache=run.args.cache))
    gap = difference(shift_t, shift_i).abs().mean().item()
    return {"text": shift_t.tolist(), "vision": shift_i.tolist(), "gap": gap}


def train(prompt, run):
    """Train the prompt in place."""
    clip, args = run.clip, run.args
    names = common.name_embeddings(clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or 10
    text_0 = text_states(prompt, run, [])               # s^0: (C, blocks, W_t)
    views = list(range(args.views)) or [0]              # and (N, V, blocks, W_i)
    image_0 = image_states(prompt, run, [], views, args.cache if args.views else None)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        # Epoch 0 warms up at 1e-5. Then the rate falls from args.lr along half a cosine, which
        # would reach 0 two epochs after the last one (this offset: CoOp's code).
        decay = (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
        optimizer.param_groups[0]["lr"] = lr = 1e-5 if epoch == 0 else args.lr * decay
        if epoch and not args.views:                    # --views 0: s^0 of fresh crops
            image_0 = image_states(prompt, run, [], [epoch])
        # Shuffled mini-batches (4 images by default); an incomplete last one is dropped unless it
        # is the only one. Each image appears as one of its random crops (ten by default).
        for pixels, y, rows, crops in run.pixel_batches(epoch):     # (B, 3, H, W), (B,) three times
            with clip.autocast():                       # --precision amp: bf16 on GPUs
                t, s_t = prompt.encode_text(names, prompt.P)                # (C, D), states
                i, s_i = prompt.encode_image(pixels, prompt.image_prompts())    # (B, D), states
                w, f = prompt.text_surgery(t), prompt.image_surgery(i)
            logits = clip.logit_scale * f @ w.T         # (B, C)
            shift_t = feature_shift(s_t, text_0)                            # (blocks_t,)
            shift_i = feature_shift(s_i, image_0[rows, crops])              # of these very crops
            l_fs = prompt.consistency(shift_t, shift_i)
            loss = F.cross_entropy(logits, y) + args.shift_weight * l_fs
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss, lr=lr, consistency=l_fs, shift_text=shift_t,
                    shift_vision=shift_i)
        # Raise the blends once, in proportion to this epoch's shifts, if an epoch follows.
        if epoch == epochs // 3 < epochs - 1:
            history = run.history()
            prompt.raise_blends(torch.tensor(history["shift_text"][-1]),
                                torch.tensor(history["shift_vision"][-1]))


class Released(Prompt):
    """The authors' released code, where it differs from their paper.

    --prompts coupled: Q_l is a learned affine map of P_l. --shift gram: L_fs = sum over
    l = 2 ... K of the squared difference of the Gram norms |P_l P_l^T|_F and |Q_l Q_l^T|_F, each
    over its value at the start; these norms, undivided, raise the blends. Both together, with
    --shift-weight 1 --views 0, are their code, but for the random numbers and A at the start."""

    def __init__(self, clip, args):
        super().__init__(clip, args)
        self.gram = args.shift == "gram"
        if args.prompts == "coupled":
            width_t, width_i = self.P[0].shape[1], self.Q[0].shape[1]
            del self.Q
            self.projections = torch.nn.ModuleList(
                torch.nn.Linear(width_t, width_i) for _ in self.P).to(clip.device)
        self.gram_at_start = [norms.detach() for norms in self.gram_norms()]

    def image_prompts(self):
        if hasattr(self, "projections"):
            return [layer(p) for layer, p in zip(self.projections, self.P)]
        return self.Q

    def gram_norms(self):
        """Return |P_l P_l^T|_F and |Q_l Q_l^T|_F, l = 2 ... K, (K - 1,) each. K=1: l = 1, (1,)."""
        encoders = [list(prompts) for prompts in (self.P, self.image_prompts())]
        return [torch.stack([(p @ p.T).norm() for p in some[1:] or some]) for some in encoders]

    def consistency(self, shift_t, shift_i):
        if not self.gram:
            return super().consistency(shift_t, shift_i)
        text, image = (norms / start for norms, start in zip(self.gram_norms(), self.gram_at_start))
        return (text - image).square().sum()

    @torch.no_grad()
    def raise_blends(self, shift_t, shift_i):
        super().raise_blends(*(self.gram_norms() if self.gram else (shift_t, shift_i)))


def flags():
    """Return the parser of this script's flags."""
    parser = common.flags(__doc__, lr=0.0035, batch_size=4, n_ctx=2, embedded_lr=0.0005)
    parser.add_argument("--ctx-init", type=common.words, default="a photo of a", metavar="WORDS",
                        help="stand before the name; --n-ctx of them are learned (a photo of a)")
    parser.add_argument("--depth", type=common.count, default=9, metavar="K",
                        help="blocks with prompts, from the first; at most all (9)")
    parser.add_argument("--towers", choices=["both", "text", "vision"], default="both",
                        help="encoders with prompts; if one, take --shift-weight 0 (both)")
    parser.add_argument("--prompts", choices=["independent", "coupled"], default="independent",
                        help="image prompts of their own, or made from the text's (independent)")
    parser.add_argument("--shift", choices=["features", "gram"], default="features",
                        help="measured on features, or the released code's stand-in (features)")
    parser.add_argument("--shift-weight", type=common.nonnegative, default=10.0,
                        metavar="GAMMA", help="of the consistency loss; 0: off (10)")
    parser.add_argument("--blend", type=common.nonnegatives, default=[0.1], metavar="B[,B]",
                        help="of the surgery at the start, or text's,image's; 0: none (0.1)")
    return parser


def main():
    for run in common.runs(__file__, flags()):          # for each data set, number of shots, seed
        released = run.args.prompts == "coupled" or run.args.shift == "gram"
        if released and run.args.towers != "both":
            raise common.Problem("--prompts coupled and --shift gram need --towers both")
        prompt = (Released if released else Prompt)(run.clip, run.args)
        run.start(prompt)                               # encode images; --load: read the prompt
        if not run.args.load:
            train(prompt, run)
        more = {"shift_after": measure(prompt, run)} if run.items else {}   # --load: no images
        # Predict argmax_c f(x) . w_c for the test images, record, print.
        run.finish(prompt, **more)


if __name__ == "__main__":
    with common.one_line_errors():
        main()
