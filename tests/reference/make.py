"""Train a method on a small CLIP with made-up weights; compare with reference vectors.

    python tests/reference/make.py weights coop_end FILE.safetensors   made-up weights, for a port
    python tests/reference/make.py FOLDER                              our own vectors anew

README.md describes the files. Tests use `follow` to see every step of a script's training."""

import functools
import importlib
import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # where common.py and conftest.py are

import common  # noqa: E402
from conftest import make_run  # noqa: E402

TOKENIZER = open_clip.SimpleTokenizer()
SMALL = {"embed": 128, "v_width": 128, "v_layers": 2, "patch": 8, "image": 32, "t_width": 128,
         "t_layers": 4, "ctx": 77, "vocab": 49408}
COLUMNS = {"coop": ["loss"], "prograd": ["loss", "l_g", "cosine"],
           "mvp_mi": ["loss", "bound", "image_bound"], "restore": ["loss", "consistency"]}
NAMES = ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road",
         "Industrial Buildings"]


# ---------------------------------------------------------------- made-up weights and images

def draw(name, shape):
    """Return standard normal numbers that depend on a name alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def clip_weight(name, shape):
    """Return the weight `name` of the small CLIP."""
    if name == "logit_scale":
        return torch.tensor(np.log(100.0), dtype=torch.float32)
    x = draw(name, shape)
    if "ln_" in name and name.endswith("weight"):
        x = 1 + 0.1 * x
    elif name.endswith("bias") or name == "token_embedding.weight":
        x = 0.02 * x
    elif name == "positional_embedding":
        x = 0.01 * x
    elif name in ("visual.class_embedding", "visual.positional_embedding"):
        x = x / shape[-1] ** 0.5
    elif name in ("visual.proj", "text_projection"):
        x = x / shape[0] ** 0.5
    else:
        x = x / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(x.astype(np.float32))


def file_name(name):
    """Return what the files call a parameter of restore.py."""
    for ours, theirs in {"P.": "text_prompts.", "Q.": "visual_prompts.",
                         "image_surgery": "visual_surgery"}.items():
        name = name.replace(ours, theirs)
    return name


def restore_start(name, shape):
    """Return where RESTORE's parameter starts, except P.0, which starts as words."""
    name = file_name(name)
    x = draw(f"restore/{name}", shape).astype(np.float32)
    if name.endswith("norm.weight"):
        x = 1 + 0.1 * x
    elif name.endswith("bias") or "_prompts." in name:
        x = 0.02 * x
    else:
        x = x / shape[-1] ** 0.5
    return torch.from_numpy(x.astype(np.float32))


@functools.cache
def small_clip(**size):
    """Return the small CLIP of config["clip"]."""
    vision = {"image_size": size["image"], "layers": size["v_layers"], "width": size["v_width"],
              "patch_size": size["patch"]}
    text = {"context_length": size["ctx"], "vocab_size": size["vocab"], "width": size["t_width"],
            "heads": size["t_width"] // 64, "layers": size["t_layers"]}
    model = open_clip.CLIP(size["embed"], vision, text, quick_gelu=True)
    weights = model.state_dict()
    model.load_state_dict({name: clip_weight(name, tuple(x.shape)) for name, x in weights.items()})
    model.eval().requires_grad_(False)
    return common.Clip(
        model=model, text=model, visual=model.visual, dtype=torch.float32,
        tokenizer=TOKENIZER, preprocess=None, logit_scale=model.logit_scale.exp().item(),
        device="cpu", amp=False, class_chunk=128, name="", activation="", weights="", image_key="")


def images(config):
    """Return the batch (B, 3, H, W), which is not preprocessed."""
    shape = (len(config["labels"]), 3, config["image_size"], config["image_size"])
    x = np.random.RandomState(config["image_seed"]).standard_normal(shape)
    return torch.from_numpy(x.astype(np.float32))


def noise(seed, shape):
    """Return a random context."""
    x = 0.02 * np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(x.astype(np.float32))


# ---------------------------------------------------------------- a script's training, step by step

def blends(prompt):
    """Return RESTORE's blends of the text's and the image's surgery, (2,)."""
    return torch.stack([prompt.text_surgery.b, prompt.image_surgery.b])


def flags(config):
    """Return the command line of what `config` says."""
    method, words = config["method"], config["context_words"]
    given = {"lr": config["lr"], "views": 1, "epochs": config.get("epochs", 3), "ctx-init": words,
             "position": config.get("class_token_position")}
    if method == "restore":
        given["blend"] = f"{config['blend_text']},{config['blend_visual']}"
    if method == "prograd":
        given["projection"] = config.get("projection_strength")
    if method == "restore" or not words:            # else M is the number of the words' tokens
        given["n-ctx"] = config["n_ctx"]
    for key in ("depth", "prompts", "shift", "shift_weight", "mi_weight", "image_weight",
                "mi_temperature", "augment", "critic", "classifier"):
        given[key.replace("_", "-")] = config.get(key)
    argv = ["--class-specific"] if config.get("class_specific") else []
    for name, value in given.items():
        argv += [f"--{name}", str(value)] if value not in (None, "") else []
    return argv


def softened(temperature):
    """Return torch.nn.functional with predictions softened, for ProGrad's L_g in prograd_comma.

    There it is T^2 KL(softmax(zero-shot / T) || softmax(logits / T)); prograd.py has T = 1."""
    changed = {"softmax": lambda logits, dim: F.softmax(logits / temperature, dim),
               "log_softmax": lambda logits, dim: F.log_softmax(logits / temperature, dim),
               "kl_div": lambda *logits, **how: temperature ** 2 * F.kl_div(*logits, **how)}
    return SimpleNamespace(**{**vars(F), **changed})


def follow(config, clip=None, mixed=None):
    """Run a script's main() on the small CLIP and one batch; return what its training did.

    config  as in the files. Without "epochs", all steps are taken in epoch 1 of 3, where the
            learning rate is --lr itself; else every epoch has that number of steps
    mixed   of every step MVP-MI's mixtures, features and labels, instead of random ones

    config, run, prompt, optimizer, epochs      after the training
    made, initial                               parameters as the script, as `config` starts them
    logits_initial, logits_final                (B, C)
    log, gradients, rates, blends, mixed        of every step"""
    script, clip = importlib.import_module(config["method"]), clip or small_clip(**config["clip"])
    restore, x, y = config["method"] == "restore", images(config), torch.tensor(config["labels"])
    f, rows = clip.encode_image(x), torch.arange(len(y))
    batch = (x, y, rows, 0 * rows) if restore else (f, y)
    run = make_run(clip, script, config["classnames"], [batch] * config["steps"], *flags(config))
    run.features, run.labels = f[:, None], y                            # (B, V = 1, D), (B,)
    template = config.get("template", run.data.template)
    run.data.prograd_template = template
    run.data.template = run.template = "not for {}" if config["method"] == "prograd" else template
    found = SimpleNamespace(config=config, run=run, log=[], gradients=[], rates=[], blends=[],
                            mixed=[])

    def parameters():
        return {name: p.detach().clone() for name, p in found.prompt.named_parameters()}

    @torch.no_grad()
    def logits():
        features = found.prompt.image_features(x) if restore else f
        part = common.Part("", run.data, [], run.classes)
        return clip.logit_scale * features @ found.prompt.class_features(part).T

    @torch.no_grad()
    def start(prompt):
        found.prompt = prompt
        found.made = parameters()
        for name, p in prompt.named_parameters():
            if restore and name != "P.0":
                p.copy_(restore_start(name, tuple(p.shape)))
            elif not restore and config["context_seed"] is not None:
                p.copy_(noise(config["context_seed"], tuple(p.shape)))
        if config.get("shift") == "gram":
            prompt.gram_at_start = prompt.gram_norms()
        found.initial, found.logits_initial = parameters(), logits()

    def before_step(optimizer, *_):
        named = found.prompt.named_parameters()
        found.optimizer = optimizer
        found.gradients.append({name: p.grad.clone() for name, p in named})
        found.rates.append([group["lr"] for group in optimizer.param_groups])

    def log(epoch, **values):
        common.Run.log(run, epoch, **values)
        found.log.append({key: torch.as_tensor(value).detach() for key, value in values.items()})
        found.blends.append(blends(found.prompt) if restore else None)

    def progress(numbers, **_):
        found.epochs = len(numbers)
        return numbers if "epochs" in config else [1]

    def mixup(*given):
        step = len(found.mixed)
        found.mixed.append(mixed[step] if mixed else random_mixup(*given))
        return found.mixed[-1]

    run.start, run.log, run.finish = start, log, lambda *_, **__: None
    random_mixup = getattr(script, "mixup", None)
    with pytest.MonkeyPatch.context() as patch, register_optimizer_step_pre_hook(before_step):
        patch.setattr(common, "runs", lambda *_: [run])
        patch.setattr(common, "progress", progress)
        patch.setattr(common, "encode_images", lambda *_, encode, **__: encode(x).float()[:, None])
        if random_mixup:
            patch.setattr(script, "mixup", mixup)
        if config.get("temperature", 1) != 1:
            patch.setattr(script, "F", softened(config["temperature"]))
        torch.manual_seed(1)
        script.main()
    found.logits_final = logits()
    return found


def entries(t):
    """Return what a training has in common with the files: {entry: array}.

    ProGrad's general loss has the files' form, T^2 cross-entropy(p_zs, p): KL plus an entropy."""
    config, run, f = t.config, t.run, t.run.features[:, 0]
    columns = [[step[name] for name in COLUMNS[config["method"]]] for step in t.log]
    found = {"logits_initial": t.logits_initial, "logits_final": t.logits_final,
             "log": torch.tensor(columns)}
    if config["method"] == "restore":
        found["images"] = images(config)
        found["text_prompts_0_initial"] = t.initial["P.0"]
        for name in ("shift_text", "shift_vision"):
            found[name] = torch.stack([step[name] for step in t.log])
        for name, p in t.prompt.named_parameters():
            found[f"gradient_initial/{file_name(name)}"] = t.gradients[0][name]
            found[f"final/{file_name(name)}"] = p.detach()
        return found
    found.update(image_features=f, context_initial=t.initial["v"],
                 context_final=t.prompt.v.detach(), gradient_initial=t.gradients[0]["v"])
    for k, gradients in enumerate(t.gradients):
        found[f"gradient_used_{k}"] = gradients["v"]
    if config["method"] == "prograd":
        w_zs = common.template_features(run.clip, run.data.prograd_template, run.classnames)
        found["zero_shot_logits"] = logits = run.clip.logit_scale * f @ w_zs.T
        p_zs = (logits / config["temperature"]).softmax(-1)
        entropy = -(p_zs * p_zs.log()).sum(-1).mean()
        found["log"][:, 1] += config["temperature"] ** 2 * entropy
    if t.mixed:
        features, labels = zip(*t.mixed)
        found.update(mixed_features=torch.stack(features), mixed_labels=torch.stack(labels))
    return found


# ---------------------------------------------------------------- files

def read(file):
    """Return the `config` and the arrays of a file."""
    with np.load(file) as content:
        arrays = {key: content[key] for key in content.files}
    return json.loads(str(arrays.pop("config"))), arrays


def write_own(folder):
    """Write the vectors of our own code anew, for the `config` and tokens that they have."""
    for name in ("restore_paper", "mvp_mi"):
        config, arrays = read(HERE / f"{name}.npz")
        training = follow(config)
        if config["method"] == "restore":
            after = blends(training.prompt).tolist()
            config["blend_text_after"], config["blend_visual_after"] = after
        found = entries(training)
        arrays = {entry: np.asarray(found[entry]) for entry in arrays}
        np.savez_compressed(folder / name, config=np.array(json.dumps(config)), **arrays)
        told = json.loads((HERE / f"{name}.json").read_text()) | {"config": config}
        (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


def write_weights(name, file):
    """Write the small CLIP of a reference file, and where RESTORE's parameters start."""
    config, _ = read(HERE / f"{name}.npz")
    tensors = dict(small_clip(**config["clip"]).model.state_dict())
    for key, shape in config.get("parameters", {}).items():
        if key != "text_prompts.0":
            tensors[f"restore/{key}"] = restore_start(key, tuple(shape))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


if __name__ == "__main__":
    if sys.argv[1] == "weights":
        write_weights(*sys.argv[2:])
    else:
        write_own(Path(sys.argv[1]))
