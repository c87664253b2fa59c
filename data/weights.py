"""CLIP models: open_clip's names and tags, weights files of every kind, and their activation."""

import difflib
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path

import open_clip
import torch
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from data.errors import Problem
from data.features import digest, tensor_digest

TINY_CLIP = Path(__file__).resolve().parent / "world" / "tiny_clip"
OFFLINE = ("; to try without a download: --backbone tiny_clip (it knows few words), --pretrained "
           "random, or `python prograd.py`")


def create(name, tag, chosen=True):
    """Return an open_clip model and what belongs to it, by the names of the fields of common.Clip.

    name    an open_clip model, or local-dir:PATH
    tag     one of its pretrained tags, a weights file, or "random"
    chosen  whether the user named the model: a file of unknown activation needs that
    Raises Problem: no such model or weights, or a text encoder that is not CLIP's."""
    local = name.startswith("local-dir:")
    if not local and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, ["tiny_clip", *open_clip.list_models()], 3, 0.3)
        raise Problem(f"unknown backbone {name!r}: did you mean {' or '.join(near) or 'ViT-B-16'}? "
                      "(or local-dir:PATH)")
    spec = {} if local else open_clip.get_pretrained_cfg(name, tag)
    state, quick = None, bool(spec.get("quick_gelu"))
    if not local and tag != "random" and not spec:
        state, quick = read_weights(name, tag, chosen)
    elif spec:
        name = name.removesuffix("-quickgelu")      # the tag decides
        check_network(spec, name, tag)
    flags = {"pretrained_text": False}
    if local or spec:
        flags = {"require_pretrained": True, "pretrained": tag if spec else None}
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, force_quick_gelu=quick, **flags)
        if state:
            model.load_state_dict(state)
    except Exception as error:          # whatever goes wrong inside open_clip
        cause = " ".join(str(error).split())[:300]
        raise Problem(f"cannot load {name} {tag}: {cause}{OFFLINE if spec else ''}") from None
    text = text_encoder(model)
    tokenizer = open_clip.get_tokenizer(name) if is_causal(text) else None
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


def read_weights(name, file, chosen):
    """Return the state dict of a weights file, and whether its activation is QuickGELU.

    OpenAI's files are TorchScript archives, and QuickGELU; of others the model's name tells."""
    if not Path(file).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
        raise Problem(f"--pretrained {file}: {name} has {tags}; there is no such file either")
    if is_torchscript(file):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # deprecated, but the form of OpenAI's files
            state = torch.jit.load(file, map_location="cpu").state_dict()
        for key in ("input_resolution", "context_length", "vocab_size"):
            state.pop(key, None)
        return state, True
    try:
        state = open_clip.factory.load_state_dict(file)
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError("holds something else than tensors")
    except Exception:       # whatever torch or safetensors raise
        raise Problem(f"--pretrained {file}: is no file of CLIP weights (TorchScript, safetensors, "
                      "or torch.save of tensors)") from None
    quick = name.endswith("-quickgelu")
    sibling = f"{name}-quickgelu"
    if not quick and sibling in open_clip.list_models():
        if not chosen:
            raise Problem(f"--pretrained {file}: does not say which activation it was trained with;"
                          f" add --backbone {sibling} (as OpenAI's weights) or --backbone {name}")
        print(f"{file}: taken as weights with GELU; for QuickGELU, as OpenAI's, "
              f"say --backbone {sibling}")
    return state, quick


def is_torchscript(file):
    return zipfile.is_zipfile(file) and any(
        name.endswith("constants.pkl") for name in zipfile.ZipFile(file).namelist())


def check_network(spec, name, tag, seconds=4):
    """Use what was downloaded earlier without asking the hub, which takes 50 s to fail.

    Raises Problem if the weights were not downloaded earlier either."""
    from huggingface_hub import constants, try_to_load_from_cache   # slow, and not always needed

    repository = spec.get("hf_hub", "").rstrip("/")
    if not repository:
        return
    files = [try_to_load_from_cache(repository, file) for file in
             ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")]
    if any(isinstance(file, str) for file in files):
        constants.HF_HUB_OFFLINE = True             # they are here: nobody needs to be asked
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()    # it knows the proxies, too
    except urllib.error.HTTPError:
        pass                                        # it has answered
    except OSError as error:
        raise Problem(f"{name} {tag}: its weights are not here and {constants.ENDPOINT} cannot be "
                      f"reached ({getattr(error, 'reason', error)}); --backbone local-dir:PATH or "
                      f"--pretrained FILE take weights from a file{OFFLINE}") from None


def text_encoder(model):
    """Return the module that holds the text encoder: the model itself, or its part `text`."""
    return model if hasattr(model, "token_embedding") else getattr(model, "text", None)


def is_causal(text):
    """Whether it is CLIP's causal transformer, read at the end token."""
    blocks = getattr(getattr(text, "transformer", None), "resblocks", [None])
    return (type(blocks[0]) is open_clip.transformer.ResidualAttentionBlock
            and getattr(text, "attn_mask", None) is not None
            and getattr(text, "cls_emb", None) is None)


def backbone_name(backbone):
    """Return a backbone's name for the record: "tiny_clip", wherever the repository is."""
    folder = Path(backbone.removeprefix("local-dir:")).resolve()
    return "tiny_clip" if folder == TINY_CLIP else backbone
