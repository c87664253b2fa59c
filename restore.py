"""RESTORE: learn prompts in both towers, and keep the two towers' features moving together.

Paper: Yang, Zhang, Yang, Gao, Qin, Li, Sun, Yang, Gu, "RESTORE: Towards Feature Shift for Vision-Language Prompt Learning",
2024, arXiv 2403.06136.

Prompts that are learned in one tower alone move its features away from the other tower's, and what CLIP's pre-training
aligned falls apart: new classes suffer. RESTORE measures that movement, the feature shift, and keeps it equal in both.

    w_c     = g([start, words, name_c, ".", end]),  f(x)         the towers, prompts inside    -> Prompt.encode_...
    shift_l = mean |h_l - h_l^0| / |h_l^0|                       feature shift at block l      -> feature_shift
    L_fs    = mean_l (shift_v,l - shift_t,l)^2                   shift consistency             -> consistency
    A(z)    = z + MLP(LN(z)),  z' = b A(z) + (1 - b) z           surgery of z = w_c or f(x)    -> Surgery, operate
    b      += eta shift,  once, after a third of the epochs      eta 0.02 text, 0.005 vision   -> Prompt.raise_blends
    p(c|x)  = softmax_c(tau f'(x) . w'_c)                        CLIP's own classifier         -> train
    L       = -log p(y|x) + gamma L_fs                           cross-entropy, consistency    -> train

    f, g    CLIP's image and text tower, frozen, and n prompt tokens in each of their first D blocks, learned: in the text
            tower where words 1..n stood, in the vision tower behind the patches; what the block before made of its own is dropped
    h_l     the state of the token that a tower reads its feature from (class token, end token) after block l, h_l^0 the
            same without prompts; the mean is over the classes (text) or the batch's images (vision); towers of different
            depth are paired at their last blocks; the shift that b grows by is the mean over blocks in that epoch
    w', f'  after the surgery, and only then of length 1; the blend b is 0.1 at the start; tau is CLIP's logit scale; gamma a weight (10)

The paper learns the two towers' prompts independently. The authors' released code computes the visual ones from the text
ones by a linear layer per block (--prompts coupled) and takes the prompts' Gram norm |P^T P|_F over its value at the start
for the shift (--shift gram --shift-weight 1, summed over the blocks from the second on). Both are here; the paper's are the
defaults. gamma was chosen on validation images of `shapes`, base to new, 16 shots, among 1, 3, 10, 30, 100 (3 did alike).

Try first:  python restore.py --base-to-new             compare the new classes with coop.py's
            python restore.py --shift-weight 0 --blend 0            neither consistency nor surgery: plain prompts (IVLP)
            python restore.py --towers text --shift-weight 0 --blend 0      one tower alone: where the gap opens
"""

import torch
import torch.nn.functional as F

import common


class Surgery(torch.nn.Module):
    """A(z) = z + MLP(LN(z)) on features z (N, D)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim)
        self.up, self.down = torch.nn.Linear(dim, 4 * dim), torch.nn.Linear(4 * dim, dim)
        torch.nn.init.zeros_(self.down.weight)                                        # so that A(z) = z at the start
        torch.nn.init.zeros_(self.down.bias)

    def forward(self, z):
        h = self.up(self.norm(z))
        return z + self.down(h * torch.sigmoid(1.702 * h))                            # QuickGELU


class Prompt(torch.nn.Module):
    """The learned prompts of both towers, the surgery blocks and their blends b (text, vision)."""

    def __init__(self, clip, args):
        super().__init__()
        self.clip, self.shift, self.words = clip, args.shift, common.embed(clip, args.ctx_init)  # (words, W_t)
        tower, n = clip.model.visual, args.n_ctx
        if not hasattr(tower, "class_embedding") or not hasattr(tower, "ln_pre"):
            raise common.Problem("--backbone: RESTORE's prompts go into the blocks of a vision transformer (try ViT-B-16)")
        if n > len(self.words) and args.towers != "vision":
            raise common.Problem(f"--n-ctx {n}: the prompts replace words of --ctx-init, which has {len(self.words)} tokens")
        depth = min(args.depth, len(clip.text.transformer.resblocks), len(tower.transformer.resblocks))
        if depth < args.depth:
            print(f"--depth {args.depth}: the towers have {depth} blocks in common, so {depth}")
            args.depth = depth
        noise = lambda *shape: 0.02 * torch.randn(*shape, device=clip.device)
        width_t, width_v = self.words.shape[1], len(tower.class_embedding)
        text = [self.words[:n].clone()] + [noise(n, width_t) for _ in range(depth - 1)]
        self.text_prompts = torch.nn.ParameterList(text if args.towers != "vision" else [])  # D of (n, W_t)
        if args.prompts == "coupled":
            self.projections = torch.nn.ModuleList(torch.nn.Linear(width_t, width_v) for _ in range(depth))
        else:
            visual = [noise(n, width_v) for _ in range(depth)] if args.towers != "text" else []
            self.visual_prompts = torch.nn.ParameterList(visual)                      # D of (n, W_v)
        self.register_buffer("blend", torch.tensor([args.blend, args.blend]))
        if args.blend:
            self.text_surgery, self.visual_surgery = Surgery(tower.output_dim), Surgery(tower.output_dim)
        self.to(clip.device)
        self.gram_at_start = [g.detach() for g in self.gram()]

    def visual(self):
        """The vision tower's prompts, D of (n, W_v)."""
        if hasattr(self, "projections"):
            return [project(p) for project, p in zip(self.projections, self.text_prompts)]
        return list(self.visual_prompts)

    def encode_text(self, names, prompts):
        """Class features (C, D) and the end token's state after every block (C, blocks, W_t), through open_clip's blocks."""
        text, (start, end) = self.clip.text, common.start_end(self.clip)

        def encode(rows):
            x, last = common.pad(rows)                                                # (C, L, W_t), (C,)
            position, each, states = text.positional_embedding[:x.shape[1]], torch.arange(len(x)), []
            x = x + position
            for i, block in enumerate(text.transformer.resblocks):
                if i < len(prompts):
                    p = prompts[i] + position[1:1 + len(prompts[i])] if i == 0 else prompts[i]
                    x = torch.cat([x[:, :1], p.expand(len(x), -1, -1).to(x.dtype), x[:, 1 + len(p):]], 1)
                x = block(x, attn_mask=text.attn_mask[:x.shape[1], :x.shape[1]])
                states.append(x[each, last])                                          # (C, W_t)
            return common.text_feature(text, states[-1]), torch.stack(states, 1)

        rows = [[start, self.words, name, end] for name, _ in names]
        common.check_length(self.clip, rows)
        return common.in_chunks(self.clip, encode, rows)

    def encode_image(self, pixels, prompts):
        """Image features (B, D) and the class token's state after every block (B, blocks, W_v). pixels (B, 3, H, W)."""
        visual, states = self.clip.model.visual, []
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)                           # (B, patches, W_v)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], 1) + visual.positional_embedding
        end = x.shape[1]
        for i, block in enumerate(visual.transformer.resblocks):
            if i < len(prompts):
                x = torch.cat([x[:, :end], prompts[i].expand(len(x), -1, -1).to(x.dtype)], 1)
            x = block(visual.ln_pre(x) if i == 0 else x)
            states.append(x[:, 0])                                                    # (B, W_v)
        f = visual._pool(x[:, :end])[0] @ visual.proj
        return f, torch.stack(states, 1)

    def operate(self, z, tower):
        """The surgery block: z' = b A(z) + (1 - b) z, of length 1. z (N, D)."""
        if hasattr(self, f"{tower}_surgery"):
            b = self.blend[0 if tower == "text" else 1]
            z = b * getattr(self, f"{tower}_surgery")(z) + (1 - b) * z
        return F.normalize(z.float(), dim=-1)

    def class_features(self, classnames):
        """Class features of any classes, for evaluation: (C, D)."""
        return self.operate(self.encode_text(common.name_tokens(self.clip, classnames), self.text_prompts)[0], "text")

    def image_features(self, pixels):
        """Image features with the prompts in the tower, for evaluation: (B, D)."""
        return self.operate(self.encode_image(pixels, self.visual())[0], "visual")

    def gram(self):
        """|P^T P|_F (= |P P^T|_F) of the prompts of blocks 2..D, or of the only one: (D - 1) for text, (D - 1) for vision."""
        towers = [list(prompts)[1:] or list(prompts) for prompts in (self.text_prompts, self.visual())]
        return [torch.stack([(p @ p.T).norm() for p in tower]) if tower else torch.zeros(1) for tower in towers]

    @torch.no_grad()
    def raise_blends(self, shifts):
        """Once in the training: each tower's blend grows with its shift (text, vision), so that more is operated on.

        The released code takes the Gram norm itself here, not over its value at the start."""
        if self.shift == "gram":
            shifts = [g.mean() for g in self.gram()]
        self.blend += self.blend.new_tensor([0.02 * float(shifts[0]), 0.005 * float(shifts[1])])


def feature_shift(states, frozen):
    """Per block the norm of the change over the norm of the frozen state, mean over the batch: (N, blocks, W) -> (blocks)."""
    return ((states.float() - frozen.float()).norm(dim=-1) / frozen.float().norm(dim=-1)).mean(0)


def consistency(prompt, shift_t, shift_v):
    """L_fs of the two towers' shifts (blocks_t), (blocks_v), paired at their last blocks; or the released code's."""
    if prompt.shift == "gram":
        text, vision = (g / start for g, start in zip(prompt.gram(), prompt.gram_at_start))
        return (text - vision).square().sum()
    m = min(len(shift_t), len(shift_v))
    return (shift_v[-m:] - shift_t[-m:]).square().mean()


@torch.no_grad()
def frozen_states(prompt, run, views=None):
    """What the shift is measured from: the classes' states without prompts (C, blocks, W_t), and those of the training
    images, (N, blocks, W_v), or of their augmented `views`, (N, V, blocks, W_v)."""
    clip = run.clip
    with clip.autocast():
        text = prompt.encode_text(common.name_tokens(clip, run.classnames), [])[1]
    flat = lambda pixels: prompt.encode_image(pixels, [])[1].flatten(1)
    keep = run.args.cache if run.args.views else None                                 # new views every epoch: not worth it
    vision = common.encode_images(clip, run.items, keep, views, flat, "states of all blocks")
    return text, vision.unflatten(-1, (len(clip.model.visual.transformer.resblocks), -1))


@torch.no_grad()
def measure(prompt, run):
    """The paper's diagnostic, on the training images as they are: shift per block of both towers, and the gap between."""
    clip, (text_0, vision_0) = run.clip, frozen_states(prompt, run)
    with clip.autocast():
        text = prompt.encode_text(common.name_tokens(clip, run.classnames), prompt.text_prompts)[1]
    flat = lambda pixels: prompt.encode_image(pixels, prompt.visual())[1].flatten(1)
    vision = common.encode_images(clip, run.items, None, None, flat).view_as(vision_0)
    shift_t, shift_v = feature_shift(text, text_0), feature_shift(vision, vision_0)
    m = min(len(shift_t), len(shift_v))
    gap = (shift_v[-m:] - shift_t[-m:]).abs().mean()
    return {"text": shift_t.tolist(), "vision": shift_v.tolist(), "gap": gap.item()}


def train(prompt, run, args):
    """Learns the prompt in place."""
    clip, names = run.clip, common.name_tokens(run.clip, run.classnames)
    optimizer = torch.optim.SGD(prompt.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    epochs = args.epochs or 10
    text_0, vision_0 = frozen_states(prompt, run, run.views(0))                       # (C, blocks, W_t), (N, V, blocks, W_v)
    for epoch in common.progress(range(epochs), desc="training", unit="epoch"):
        optimizer.param_groups[0]["lr"] = common.learning_rate(epoch, epochs, args.lr)
        if epoch and not args.views:
            vision_0 = frozen_states(prompt, run, run.views(epoch))[1]
        for pixels, y, images, views in run.pixel_batches(epoch):                     # (B, 3, H, W), (B), (B), (B)
            with clip.autocast():
                w, text = prompt.encode_text(names, prompt.text_prompts)              # (C, D), (C, blocks, W_t)
                f, vision = prompt.encode_image(pixels, prompt.visual())              # (B, D), (B, blocks, W_v)
                w, f = prompt.operate(w, "text"), prompt.operate(f, "visual")
            logits = clip.logit_scale * f @ w.T                                       # (B, C)
            shift_t, shift_v = feature_shift(text, text_0), feature_shift(vision, vision_0[images, views])
            l_fs = consistency(prompt, shift_t, shift_v)
            loss = F.cross_entropy(logits, y) + args.shift_weight * l_fs
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(epoch, loss=loss, consistency=l_fs, shift_text=shift_t, shift_vision=shift_v)
        if args.blend and epoch + 1 == max(1, round(epochs / 3)):
            shifts = [run.history()[tower][-1] for tower in ("shift_text", "shift_vision")]  # this epoch's, by block
            prompt.raise_blends([sum(shift) / len(shift) for shift in shifts])


def main():
    parser = common.flags(__doc__, lr=0.0035, batch_size=4, n_ctx=2)
    parser.add_argument("--ctx-init", type=common.words, default="a photo of a", metavar="WORDS",
                        help="stand before the name; the first --n-ctx are learned (a photo of a)")
    parser.add_argument("--depth", type=common.number(int, 1, low_ok=True), default=9, metavar="D",
                        help="blocks with prompts, from the first (9)")
    parser.add_argument("--prompts", choices=["independent", "coupled"], default="independent",
                        help="visual prompts of their own, or made from the text ones (independent)")
    parser.add_argument("--towers", choices=["both", "text", "vision"], default="both", help="where prompts are learned (both)")
    parser.add_argument("--shift", choices=["features", "gram"], default="features",
                        help="measured on features, or the released code's stand-in (features)")
    parser.add_argument("--shift-weight", type=common.number(low_ok=True), default=10.0, metavar="GAMMA",
                        help="of the consistency loss; 0: off (10)")
    parser.add_argument("--blend", type=common.number(low_ok=True), default=0.1, metavar="B",
                        help="of the surgery blocks at the start; 0: none (0.1)")
    args = common.parse(parser)
    if args.towers != "both" and (args.prompts == "coupled" or args.shift == "gram"):
        raise common.Problem(f"--prompts coupled and --shift gram need prompts in both towers, not --towers {args.towers}")
    for run in common.runs(__file__, args, features=False):
        prompt = Prompt(run.clip, args)
        before = measure(prompt, run) if run.items else {}                            # a data set for testing has none
        if args.load:
            run.load(prompt)
        else:
            train(prompt, run, args)
        after = measure(prompt, run) if run.items else {}
        run.finish(prompt, shift_before=before, shift_after=after)
        for name, shift in (("before", before), ("after", after)):
            for tower in [key for key in shift if key != "gap"]:
                print(f"  shift {name:>6}, {tower:<6}", *(f"{value:6.3f}" for value in shift[tower]),
                      f"  gap {shift['gap']:.3f}" if tower == "text" else "")


if __name__ == "__main__":
    with common.one_line_errors():
        main()
