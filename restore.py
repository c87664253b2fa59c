"""RESTORE: learn prompts in both towers, and keep the two towers' features moving together.

Yang et al., "RESTORE: Towards Feature Shift for Vision-Language Prompt Learning", arXiv 2403.06136.

Prompts learned in one tower, or in both apart from each other, move the towers' features apart, and
what CLIP's pre-training aligned is lost: new classes suffer. RESTORE measures that movement, the
feature shift, and holds it near to equal in both towers. CLIP itself stays frozen.

The towers, with n prompt tokens put into each of their first K blocks: l = 1, ..., K
    X_0 = [start, "a photo of a", name_c, ".", end] + positions                 Prompt.encode_text
    X_l = text block l of [first token of X_(l-1), P_l, X_(l-1) after its first 1 + n tokens]
    Y_0 = [class token, patches of the image] + positions                       Prompt.encode_image
    Y_l = vision block l of [Y_(l-1) less its prompt tokens, Q_l]
    (l = 1: of the layer norm of that, CLIP's ln_pre). Blocks after K run as they are, on all of the
    tokens, the last prompts' states too.
    t_c and i(x) are CLIP's last layer norm and projection of X's end token and of Y's class token
    after the last block: both of D numbers and not yet of length 1

The loss; on the right, the function that computes it
    shift_l = mean of |h_l - h_l^0| / |h_l^0|               feature shift         feature_shift
    L_fs    = mean_l (shift_l^vision - shift_l^text)^2      consistency           consistency
    A(z)    = z + down(QuickGELU(up(LN(z))))                surgery block         Surgery
    w_c     = b A(t_c) + (1 - b) t_c, then length 1         one A, b per tower    Prompt.operate
    f(x)    = b A(i(x)) + (1 - b) i(x), then length 1       another A and b       Prompt.operate
    p(c|x)  = softmax_c(tau f(x) . w_c)                     CLIP's classifier     train
    L       = -log p(y|x), mean over a batch, + gamma L_fs                        train
    G       = dL/dv of every learned number v               its gradient          train

    x, y     an image and its label, one of the C classes that are learned
    P_l, Q_l the prompts, learned: n = 2 vectors for each of K = 9 blocks (or as many as both
             towers have), as wide as the text (vision) tower's states; P_1 starts as the first n
             tokens of "a photo of a", all others as noise, N(0, 0.02^2). Only P_1 gets positions,
             those of the tokens whose place it takes. The others of "a photo of a" stay as they are
    A        learned, by -log p alone, since L_fs is of states before it: a layer norm and two
             linear maps with biases, up (D to 4 D) and down, which starts as zeros, so that
             A(z) = z (the rest as PyTorch does); QuickGELU(h) = h sigmoid(1.702 h)
    b        a number, not learned, 0.1 at the start; 0 leaves the surgery out (--blend). Since
             b A(z) + (1 - b) z = z + b down(...), it scales what A adds
    h_l      a token's state after block l, of all blocks: the end token's (the mean is over the C
             classes) or the class token's (over the batch); h_l^0 the same, of the same crop, in
             CLIP as it is, without P and Q but with all of "a photo of a". Towers of different
             depth are paired at their last blocks
    tau      CLIP's logit scale, not its logarithm: 100 in OpenAI's models
    gamma    10, the weight of the consistency (--shift-weight)

L_fs would let both shifts grow, as long as they grow alike. For that case there is the surgery: it
corrects the features that come out of a tower, and more so when the tower has moved further: at the
end of epoch E // 3 (the fourth of ten), and only then, b grows by 0.02 (text) or 0.005 (vision)
times that tower's shift, a mean over its blocks and the epoch's batches. Moment and numbers are the
authors' code's, without a reason.

The update, once for each batch, SGD: to G come weight decay, then momentum (u = 0 at first)
    u <- 0.9 u + (G + 0.0005 v),  v <- v - r u
    r = 1e-5 in epoch e = 0; in epochs e = 1, ..., E - 1 it is lr (1 + cos(pi (e - 1) / E)) / 2
    with E = 10 epochs and lr = 0.0035 (0.0005 on the repository's own small data sets)
    A batch is 4 of the training images, shuffled anew in every epoch; the last one is not used if
    it is smaller, unless it is the only one. Of every image ten random crops, flipped or not, are
    its views; of the ten one is drawn whenever it is used (--views 0: new ones). The texts of all C
    classes are in every batch.

The test: argmax_c f(x) . w_c over the classes that are tested (--base-to-new: the learned half,
then the other half by itself), for images resized as CLIP itself does, without a random crop.

The authors' released code differs from their paper: class Released, below.

Try first:  python restore.py --base-to-new                 compare its new classes with coop.py's
            python restore.py --shift-weight 0 --blend 0    independent prompts, nothing else (IVLP)
            python restore.py --towers text --shift-weight 0 --blend 0              one tower alone
"""

import common  # first: Ctrl-C while the libraries load ends in one line

import torch
import torch.nn.functional as F


class Surgery(torch.nn.Module):
    """A(z) = z + down(QuickGELU(up(LN(z)))) of features z (N, D)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim)
        self.up, self.down = torch.nn.Linear(dim, 4 * dim), torch.nn.Linear(4 * dim, dim)
        torch.nn.init.zeros_(self.down.weight)      # so that A(z) = z at the start
        torch.nn.init.zeros_(self.down.bias)

    def forward(self, z):
        h = self.up(self.norm(z))
        return z + self.down(h * torch.sigmoid(1.702 * h))


class Prompt(torch.nn.Module):
    """The learned prompts P and Q, and the surgery blocks of both towers with their blends b."""

    def __init__(self, clip, args):
        super().__init__()
        self.clip = clip    # no Module, so that none of its weights is learned
        self.words = common.embed(clip, args.ctx_init)                      # (words, W_t)
        n, width_t, width_v = args.n_ctx, self.words.shape[1], clip.model.visual.conv1.out_channels
        noise = lambda width: 0.02 * torch.randn(n, width, device=clip.device)
        text = [self.words[:n].clone()] + [noise(width_t) for _ in range(args.depth - 1)]
        visual = [noise(width_v) for _ in range(args.depth)]
        self.text_prompts = torch.nn.ParameterList(text if args.towers != "vision" else [])
        self.visual_prompts = torch.nn.ParameterList(visual if args.towers != "text" else [])
        b = torch.tensor(args.blend).expand(2).clone()                      # (text, vision)
        self.register_buffer("blend", b)
        dim = clip.model.visual.output_dim
        self.text_surgery = Surgery(dim) if b[0] else None
        self.visual_surgery = Surgery(dim) if b[1] else None
        self.to(clip.device)

    def text(self):
        """P: K of (n, W_t)."""
        return list(self.text_prompts)

    def visual(self):
        """Q: K of (n, W_v)."""
        return list(self.visual_prompts)

    def encode_text(self, names, prompts):
        """t_c (C, D) and the end token's state after every block (C, blocks, W_t)."""
        text, (start, end) = self.clip.text, common.start_end(self.clip)

        def encode(rows):
            x, last = common.pad(rows)                                      # (C, L, W_t), (C,)
            each, length, states = torch.arange(len(x)), x.shape[1], []
            position = text.positional_embedding[:length]
            x = x + position
            for l, block in enumerate(text.transformer.resblocks):          # l from 0: P_(l+1)
                if l < len(prompts):
                    p = prompts[l] if l else prompts[l] + position[1:1 + len(prompts[l])]
                    p = p.expand(len(x), -1, -1).to(x.dtype)                # (C, n, W_t)
                    x = torch.cat([x[:, :1], p, x[:, 1 + p.shape[1]:]], 1)
                x = block(x, attn_mask=text.attn_mask[:length, :length])
                states.append(x[each, last])                                # (C, W_t)
            return common.text_feature(text, states[-1]), torch.stack(states, 1)

        rows = [[start, self.words, name, dot, end] for name, dot in names]
        common.check_length(self.clip, rows)
        return common.in_chunks(self.clip, encode, rows)

    def encode_image(self, pixels, prompts):
        """i(x) (B, D) and the class token's state after every block (B, blocks, W_v).

        pixels (B, 3, H, W)."""
        tower, states = self.clip.model.visual, []
        x = tower.conv1(pixels).flatten(2).transpose(1, 2)                  # (B, patches, W_v)
        first = tower.class_embedding.expand(len(x), 1, -1).to(x.dtype)
        x = torch.cat([first, x], 1) + tower.positional_embedding
        own = x.shape[1]                                                    # the first 1 + patches
        for l, block in enumerate(tower.transformer.resblocks):
            if l < len(prompts):
                q = prompts[l].expand(len(x), -1, -1).to(x.dtype)           # (B, n, W_v)
                x = torch.cat([x[:, :own], q], 1)
            x = block(x if l else tower.ln_pre(x))
            states.append(x[:, 0])                                          # (B, W_v)
        return tower.ln_post(states[-1]) @ tower.proj, torch.stack(states, 1)

    def operate(self, z, surgery, b):
        """b A(z) + (1 - b) z, of length 1. z (N, D)."""
        z = b * surgery(z) + (1 - b) * z if surgery else z
        return F.normalize(z.float(), dim=-1)

    def operate_text(self, t):
        return self.operate(t, self.text_surgery, self.blend[0])

    def operate_image(self, i):
        return self.operate(i, self.visual_surgery, self.blend[1])

    def class_features(self, classnames):
        """w_c of any classes, for the test: (C, D)."""
        names = common.name_embeddings(self.clip, classnames)
        return self.operate_text(self.encode_text(names, self.text())[0])

    def image_features(self, pixels):
        """f(x), for the test: (B, D)."""
        return self.operate_image(self.encode_image(pixels, self.visual())[0])

    def consistency(self, shift_t, shift_v):
        """L_fs of the shifts of both towers, (blocks_t,) and (blocks_v,)."""
        m = min(len(shift_t), len(shift_v))
        return (shift_v[-m:] - shift_t[-m:]).square().mean()

    @torch.no_grad()
    def raise_blends(self, shift_t, shift_v):
        """b grows by 0.02 (text) or 0.005 (vision) times the mean over the shift's (blocks,)."""
        self.blend += torch.stack([0.02 * shift_t.mean(), 0.005 * shift_v.mean()]).to(self.blend)


def feature_shift(states, frozen):
    """shift_l for all l, from (N, blocks, W) with prompts and without: (blocks,)."""
    change = (states.float() - frozen.float()).norm(dim=-1)                 # (N, blocks)
    return (change / frozen.float().norm(dim=-1)).mean(0)


@torch.no_grad()
def frozen_states(prompt, run, views=None):
    """h^0 of the classes (C, blocks, W_t), and of the training images, (N, blocks, W_v), or of
    augmented `views` of them, (N, V, blocks, W_v)."""
    clip = run.clip
    with clip.autocast():
        text = prompt.encode_text(common.name_embeddings(clip, run.classnames), [])[1]
    states = lambda pixels: prompt.encode_image(pixels, [])[1].flatten(1)
    cache = run.args.cache if run.args.views else None      # not kept if used in one epoch only
    vision = common.encode_images(clip, run.items, cache, views, states, "states of all blocks")
    return text, vision.unflatten(-1, (len(clip.model.visual.transformer.resblocks), -1))


@torch.no_grad()
def measure(prompt, run):
    """The paper's diagnostic, on the training images as they are: both towers' shift by block, and
    the mean gap between them."""
    clip = run.clip
    text_0, vision_0 = frozen_states(prompt, run)
    with clip.autocast():
        names = common.name_embeddings(clip, run.classnames)
        text = prompt.encode_text(names, prompt.text())[1]
    states = lambda pixels: prompt.encode_image(pixels, prompt.visual())[1].flatten(1)
    vision = common.encode_images(clip, run.items, None, None, states).view_as(vision_0)
    shift_t, shift_v = feature_shift(text, text_0), feature_shift(vision, vision_0)
    m = min(len(shift_t), len(shift_v))
    gap = (shift_v[-m:] - shift_t[-m:]).abs().mean()
    return {"text": shift_t.tolist(), "vision": shift_v.tolist(), "gap": gap.item()}


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip = run.clip
    names = common.name_embeddings(clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or 10
    text_0, vision_0 = frozen_states(prompt, run, run.views(0))
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        if epoch and not args.views:
            vision_0 = frozen_states(prompt, run, run.views(epoch))[1]
        for pixels, y, images, views in run.pixel_batches(epoch):   # (B, 3, H, W), 3 times (B,)
            with clip.autocast():
                t, h_t = prompt.encode_text(names, prompt.text())           # (C, D), states
                i, h_v = prompt.encode_image(pixels, prompt.visual())       # (B, D), states
                w, f = prompt.operate_text(t), prompt.operate_image(i)
            logits = clip.logit_scale * f @ w.T                             # (B, C)
            shift_t = feature_shift(h_t, text_0)                            # (blocks_t,)
            shift_v = feature_shift(h_v, vision_0[images, views])           # (blocks_v,)
            l_fs = prompt.consistency(shift_t, shift_v)
            loss = F.cross_entropy(logits, y) + args.shift_weight * l_fs
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss, consistency=l_fs, shift_text=shift_t, shift_vision=shift_v)
        if epoch == epochs // 3:                    # by what was logged: means over this epoch
            history = run.history()
            last = (torch.tensor(history[name][-1]) for name in ("shift_text", "shift_vision"))
            prompt.raise_blends(*last)


class Released(Prompt):
    """What the authors' released code does where it differs from their paper.

    --prompts coupled: visual prompts are made from the text ones, Q_l by a linear layer from P_l.
    --shift gram: in L_fs the shift is the prompts' Gram norm, |P P^T|_F or |Q Q^T|_F, over what it
    was at the start, and L_fs a sum over the blocks from the second on; b grows by 0.02 or 0.005
    times the mean of the Gram norms as they then are. Both together, with --shift-weight 1, are
    their code, but for where some numbers start (README)."""

    def __init__(self, clip, args):
        super().__init__(clip, args)
        self.gram = args.shift == "gram"
        if args.prompts == "coupled":
            (n, width_t), (n, width_v) = self.text_prompts[0].shape, self.visual_prompts[0].shape
            del self.visual_prompts
            self.projections = torch.nn.ModuleList(
                torch.nn.Linear(width_t, width_v, device=clip.device) for _ in self.text_prompts)
        self.gram_at_start = [norms.detach() for norms in self.gram_norms()]

    def visual(self):
        if hasattr(self, "projections"):
            return [project(p) for project, p in zip(self.projections, self.text_prompts)]
        return super().visual()

    def gram_norms(self):
        """|P_l P_l^T|_F and |Q_l Q_l^T|_F of l = 2, ..., K (or 1, if K = 1): (K - 1,) each."""
        towers = [prompts[1:] or prompts for prompts in (self.text(), self.visual())]
        return [torch.stack([(p @ p.T).norm() for p in tower]) for tower in towers]

    def consistency(self, shift_t, shift_v):
        if not self.gram:
            return super().consistency(shift_t, shift_v)
        text, vision = (g / start for g, start in zip(self.gram_norms(), self.gram_at_start))
        return (text - vision).square().sum()

    def raise_blends(self, shift_t, shift_v):
        super().raise_blends(*(self.gram_norms() if self.gram else (shift_t, shift_v)))


def blends(text):
    """An argparse type: one blend for both towers, or the text's and the vision's."""
    both = common.several(common.number(low_ok=True))(text)
    if len(both) > 2:
        raise common.Problem(f"--blend {text}: wants one number, or the text's and the vision's")
    return both if len(both) == 2 else both[0]


def check(clip, args):
    """Raises Problem where the prompts do not fit into this CLIP; cuts --depth to its blocks."""
    tower = clip.model.visual
    if getattr(tower, "pool_type", None) != "tok" or tower.attn_pool is not None:
        raise common.Problem("--backbone: RESTORE's prompts go into a vision transformer that is "
                             "read at its class token (try ViT-B-16)")
    words = len(common.tokenize(clip, args.ctx_init))
    if args.n_ctx > words and args.towers != "vision":
        raise common.Problem(f"--n-ctx {args.n_ctx}: the prompts replace words of --ctx-init, "
                             f"which has {words} tokens")
    blocks = min(len(t.transformer.resblocks) for t in (clip.text, tower))
    if args.depth > blocks:
        print(f"--depth {args.depth}: the towers have {blocks} blocks in common, so {blocks}")
        args.depth = blocks


def main():
    parser = common.flags(__doc__, lr=0.0035, batch_size=4, n_ctx=2, embedded_lr=0.0005)
    parser.add_argument("--ctx-init", type=common.words, default="a photo of a", metavar="WORDS",
                        help="stand before the name; --n-ctx of them are learned (a photo of a)")
    parser.add_argument("--depth", type=common.number(int, 1, low_ok=True), default=9, metavar="K",
                        help="blocks with prompts, from the first (9)")
    parser.add_argument("--towers", choices=["both", "text", "vision"], default="both",
                        help="where prompts are learned (both)")
    parser.add_argument("--prompts", choices=["independent", "coupled"], default="independent",
                        help="visual prompts of their own, or made from the text's (independent)")
    parser.add_argument("--shift", choices=["features", "gram"], default="features",
                        help="measured on features, or the released code's stand-in (features)")
    parser.add_argument("--shift-weight", type=common.number(low_ok=True), default=10.0,
                        metavar="GAMMA", help="of the consistency loss; 0: off (10)")
    parser.add_argument("--blend", type=blends, default=0.1, metavar="B[,B]",
                        help="of the surgery at the start, or text's,vision's; 0: none (0.1)")
    args = common.parse(parser)
    released = args.prompts == "coupled" or args.shift == "gram"
    if released and args.towers != "both":
        raise common.Problem("--prompts coupled and --shift gram need prompts in both towers, "
                             f"not --towers {args.towers}")
    for run in common.runs(__file__, args, features=False, check=check):
        prompt = (Released if released else Prompt)(run.clip, args)
        before = measure(prompt, run) if run.items else {}      # a data set for testing has none
        if args.load:
            run.load(prompt)
        else:
            train(prompt, run, args)
        after = measure(prompt, run) if run.items else {}
        run.finish(prompt, shift_before=before, shift_after=after)
        for when, shift in (("before", before), ("after", after)):
            for tower in ("text", "vision") if shift else ():
                print(f"  shift by block {when:>6}, {tower:<6}",
                      *(f"{value:6.3f}" for value in shift[tower]),
                      f"  mean gap {shift['gap']:.3f}" if tower == "text" else "")


if __name__ == "__main__":
    with common.one_line_errors():
        main()
