"""CLIP models: open_clip's names and tags, weights files of every kind, and their activation."""

import difflib
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import open_clip
import torch
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from data.errors import Problem
from data.features import digest, tensor_digest

TINY_CLIP = Path(__file__).resolve().parent / "world" / "tiny_clip"
OFFLINE = ("; without a download: --pretrained FILE, --backbone local-dir:PATH or tiny_clip (it "
           "knows few words), --pretrained random, or `python prograd.py`")


def create(name, tag):
    """Return an open_clip model and what belongs to it, by the names of the fields of common.Clip.

    name  an open_clip model, local-dir:PATH, or tiny_clip
    tag   one of its pretrained tags, a weights file, or "random"
    Raises Problem: no such model or weights, or a text encoder that is not CLIP's."""
    if name == "tiny_clip":
        name = f"local-dir:{TINY_CLIP}"
    local = name.startswith("local-dir:")
    if not local and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, ["tiny_clip", *open_clip.list_models()], 3, 0.3)
        raise Problem(f"unknown backbone {name!r}: did you mean {' or '.join(near) or 'ViT-B-16'}? "
                      "(or local-dir:PATH)")
    spec = {} if local else open_clip.get_pretrained_cfg(name, tag)
    state, quick = None, bool(spec.get("quick_gelu"))
    if spec:
        avoid_waiting()
    elif not local and tag != "random":
        state, quick = read_weights(name, tag)
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, tag if spec else None, force_quick_gelu=quick, pretrained_text=False,
            require_pretrained=bool(local or spec))
        if state is not None:
            model.load_state_dict(state)
    except Exception as error:          # whatever goes wrong inside open_clip
        cause = " ".join(str(error).split())[:150]
        raise Problem(f"cannot load {name} {tag}: {cause}{OFFLINE if spec else ''}") from None
    # The text encoder is the model itself, or its part `text`. CLIP's is causal and read at the end
    # token; CoCa has a class token at the end, SigLIP no mask.
    text = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    tokenizer = open_clip.get_tokenizer(name) if causal else None
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        raise Problem(f"--backbone {name}: its text encoder is not CLIP's causal transformer, "
                      "which the prompts are for")
    model.eval().requires_grad_(False)
    activation = type(text.transformer.resblocks[0].mlp.gelu).__name__
    resize = [t for t in transform.transforms if isinstance(t, (Resize, CenterCrop))]
    weights = digest((tensor_digest(model.state_dict()), modules(model.visual), activation))
    image_key = digest((tensor_digest(model.visual.state_dict()), modules(model.visual), transform))
    return {"model": model, "text": text, "tokenizer": tokenizer, "activation": activation,
            "preprocess": Compose([*resize, PILToTensor()]), "weights": weights[:8],
            "image_key": image_key}


def modules(visual):
    """Return the architecture of an image encoder: all plain attributes of its modules.

    The number of heads, the pooling and the activation are attributes, not weights."""
    plain = (bool, int, float, str, tuple, type(None))
    return [(name, type(module).__name__,
             {k: v for k, v in vars(module).items() if isinstance(v, plain)})
            for name, module in visual.named_modules()]


def read_weights(name, file):
    """Return the state dict of a weights file, and whether its activation is QuickGELU.

    OpenAI's files are TorchScript archives, and QuickGELU; of others the model's name tells."""
    if not Path(file).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
        raise Problem(f"--pretrained {file}: {name} has {tags}; there is no such file either")
    try:
        with warnings.catch_warnings(action="ignore"):      # deprecated, but OpenAI's form
            state = torch.jit.load(file, map_location="cpu").state_dict()
        for key in ("input_resolution", "context_length", "vocab_size"):
            state.pop(key, None)
        return state, True
    except RuntimeError:                                    # no TorchScript archive
        pass
    try:
        state = open_clip.factory.load_state_dict(file)
    except Exception:                                       # whatever torch or safetensors raise
        raise Problem(f"--pretrained {file}: is no file of CLIP weights (TorchScript, safetensors, "
                      "or torch.save of tensors)") from None
    quick, sibling = name.endswith("-quickgelu"), f"{name}-quickgelu"
    if not quick and sibling in open_clip.list_models():
        print(f"{file}: taken as weights with GELU; for QuickGELU, as OpenAI's, "
              f"say --backbone {sibling}")
    return state, quick


def avoid_waiting(seconds=4):
    """Ask the hub for nothing if it cannot be reached: its client takes minutes to fail."""
    from huggingface_hub import constants           # slow, and not always needed

    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()    # it knows the proxies, too
    except urllib.error.HTTPError:
        pass                                        # it has answered
    except OSError:
        print(f"{constants.ENDPOINT} cannot be reached: only what was downloaded earlier is used")
        constants.HF_HUB_OFFLINE = True
