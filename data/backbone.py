"""Which CLIP a run stands on: the names that open_clip knows, and what its text tower must be."""

import difflib
from pathlib import Path

import open_clip

from data.download import ask_hub_once
from data.errors import Problem


def create(name, tag, device):
    """open_clip's model (frozen, in eval mode), its image transform and its tokenizer.

    Raises Problem if there is no such model or weights, or if its text tower is not CLIP's."""
    local = name.startswith("local-dir:")
    if not local and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        raise Problem(f"unknown backbone {name!r}: did you mean {' or '.join(near) or 'ViT-B-16'}? "
                      "(or local-dir:PATH)")
    spec = {} if local else open_clip.get_pretrained_cfg(name, tag)
    if not local and tag != "random" and not spec and not Path(tag).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
        raise Problem(f"--pretrained {tag}: {name} has {tags}, or give a file")
    if spec.get("hf_hub"):
        ask_hub_once()
    flags = {"require_pretrained": True}
    if tag == "random":
        flags = {"pretrained_text": False}
    elif not local:
        # OpenAI's weights were trained with QuickGELU, which open_clip takes from the model's name
        # and only warns about: here the tag decides. A file has no tag: its model's name does.
        name = name.removesuffix("-quickgelu") if spec else name
        flags.update(pretrained=tag, force_quick_gelu=bool(spec.get("quick_gelu")))
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, device=device, **flags)
    except Exception as error:  # whatever went wrong in open_clip, the way out is the same
        raise Problem(f"cannot load {name} {tag}: {error} "
                      "(no network? --pretrained FILE takes a weights file)") from None
    tokenizer = open_clip.get_tokenizer(name) if causal(text_tower(model)) else None
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        raise Problem(f"--backbone {name}: its text tower is not CLIP's causal transformer, "
                      "which the prompts are for")
    return model.eval().requires_grad_(False), transform, tokenizer


def text_tower(model):
    """The module that holds the text tower: the model itself, or its part `text`."""
    return model if hasattr(model, "token_embedding") else getattr(model, "text", None)


def causal(text):
    """Whether it is CLIP's causal transformer, read at the end token."""
    blocks = getattr(getattr(text, "transformer", None), "resblocks", [None])
    return (type(blocks[0]) is open_clip.transformer.ResidualAttentionBlock
            and getattr(text, "attn_mask", None) is not None
            and getattr(text, "cls_emb", None) is None)
