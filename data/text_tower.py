"""CLIP's text tower, quicker and in less memory than common.plain_encode_text, exactly the same.

1  What stands in front of the first difference between the prompts (the start token, and a context
   that all classes share) has the same states in all of them, since the tower is causal: they are
   computed once, and the other tokens attend to them.
2  The classes go through the tower in chunks, whose activations are not kept for the backward pass
   but computed again in it: memory stays flat as classes grow.
3  Under float16 gradients are made larger on their way through the tower, and smaller behind it.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.errors import Problem


def encode_text(clip, prompts):
    """common.encode_text: class features of length 1, (C, D), of C prompts, lists of (l, W)."""
    check_length(clip, prompts)
    text, skip, past = clip.text, shared_tokens(prompts), []
    half = torch.is_autocast_enabled(clip.device)
    half = half and torch.get_autocast_dtype(clip.device) == torch.float16
    scale = 1024 if half else 1     # small gradients are zeros in float16
    if skip:
        x = torch.cat(prompts[0])[:skip] + text.positional_embedding[:skip]
        x = gradient_times(1 / scale, x[None])                              # (1, skip, W)
        for block in text.transformer.resblocks:
            q, k, v = queries_keys_values(block, x)                         # (1, heads, skip, .)
            x = finish(block, x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
            past.append((k, v))

    def encode(some):
        x, last = pad(some, skip)                                           # (c, L, W), (c,)
        length = x.shape[1]
        x = gradient_times(1 / scale, x + text.positional_embedding[skip:skip + length])
        sees = torch.ones(length, skip + length, dtype=torch.bool, device=x.device).tril(skip)
        for i, block in enumerate(text.transformer.resblocks):
            q, k, v = queries_keys_values(block, x)                         # (c, heads, L, .)
            if skip:
                old_k, old_v = (t.expand(len(x), -1, -1, -1) for t in past[i])
                k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
            x = finish(block, x, F.scaled_dot_product_attention(q, k, v, attn_mask=sees))
        return (text_feature(text, x[torch.arange(len(x)), last]),)

    (w,) = in_chunks(clip, encode, prompts)
    return F.normalize(gradient_times(scale, w.float()), dim=-1)


def gradient_times(factor, x):
    """x, whose gradient is multiplied by `factor` on its way back."""
    if factor != 1 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient * factor)
    return x


def gradients(losses, w, v):
    """torch.autograd.grad(loss, v), shaped as v, of several losses of the class features w (C, D).

    From w on all go back through the text tower, the expensive part, in one batched pass."""
    dw = [torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses]
    return torch.autograd.grad(w, v, torch.stack(dw), is_grads_batched=True)[0]


def shared_tokens(prompts):
    """How many tokens at the start of all prompts are the same memory, end token excepted.

    Their gradient goes to the first prompt's tensors: the same tensors, or views of one."""
    where = lambda part: (part.data_ptr(), part.shape, part.stride())
    count = 0
    for parts in zip(*prompts):
        if len(set(map(where, parts))) > 1:
            break
        count += len(parts[0])
    return min(count, min(sum(map(len, parts)) for parts in prompts) - 1)


def in_chunks(clip, encode, prompts):
    """encode(prompts), a tuple of tensors (C, ...), for --class-chunk prompts at a time; a list."""
    size = clip.class_chunk
    chunks = [prompts[c:c + size] for c in range(0, len(prompts), size)]
    if len(chunks) > 1 and torch.is_grad_enabled():
        encode = functools.partial(checkpoint, encode, use_reentrant=False)
    return [torch.cat(column) for column in zip(*map(encode, chunks))]


def check_length(clip, prompts):
    """Raises Problem if a prompt is longer than the text tower reads."""
    longest = max(sum(map(len, parts)) for parts in prompts)
    most = len(clip.text.positional_embedding)
    if longest > most:
        raise Problem(f"the longest prompt takes {longest} tokens, CLIP reads {most}: "
                      "a smaller --n-ctx or shorter --ctx-init leaves more for the name")


def pad(prompts, skip=0):
    """Prompts less their first tokens, zeros behind (C, L, W), and where each one ends (C,)."""
    rows = [torch.cat(parts)[skip:] for parts in prompts]
    last = torch.tensor([len(row) - 1 for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), last


def queries_keys_values(block, x):
    """First half of open_clip's ResidualAttentionBlock: (C, L, W) -> three (C, heads, L, .)."""
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.view(*x.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def finish(block, x, attended):
    """Its second half: what was attended to (C, heads, L, .) into the residual stream (C, L, W)."""
    x = x + block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def text_feature(text, x):
    """The end token's last state (C, W) -> the tower's feature (C, D), not yet of length 1."""
    x, projection = text.ln_final(x), text.text_projection
    return projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection


@torch.no_grad()
def nearest_words(clip, v):
    """The vocabulary's nearest word to every context vector, v (..., M, W): one string.

    As in CoOp's paper, where they are read with care."""
    table = clip.text.token_embedding.weight.float()
    unmet = table.abs().sum(-1) == 0        # the tiny CLIP has met only a few words
    tokens = []
    for some in v.flatten(0, -2).split(64):
        tokens += torch.cdist(some.float(), table).masked_fill(unmet, math.inf).argmin(-1).tolist()
    return " ".join(clip.tokenizer.decoder[token].replace("</w>", "") for token in tokens)
