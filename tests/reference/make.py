"""Makes what goes with the reference vectors, and those of our own code; README.md describes them.

    python tests/reference/make.py weights coop_end FILE.safetensors    made-up weights, for a port
    python tests/reference/make.py complete     adds what spares a port image tower and tokenizer
    python tests/reference/make.py own          the vectors of our own code, anew
"""

import contextlib
import functools
import importlib
import json
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # where common.py and conftest.py are

import common  # noqa: E402
from conftest import made_up_run  # noqa: E402

TOKENIZER = open_clip.SimpleTokenizer()


# ---------------------------------------------------------------- made-up weights and images

@functools.cache
def made_up(name, shape):
    """The weight `name` of the small CLIP: numbers that depend on its name alone."""
    if name == "logit_scale":
        return torch.tensor(np.log(100.0), dtype=torch.float32)
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
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


def restore_start(name, shape):
    """Where RESTORE's parameter `name` starts (but text_prompts.0, which are words)."""
    seed = zlib.crc32(f"restore/{name}".encode())
    x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        x = 1 + 0.1 * x
    elif name.endswith("bias") or "_prompts." in name:
        x = 0.02 * x
    else:
        x = x / shape[-1] ** 0.5
    return torch.from_numpy(x.astype(np.float32))


def small_clip(sizes):
    """The small CLIP of config["clip"], as the scripts know a CLIP."""
    return clip_of(**sizes)


@functools.cache
def clip_of(**c):
    vision = {"image_size": c["image"], "layers": c["v_layers"], "width": c["v_width"],
              "patch_size": c["patch"]}
    text = {"context_length": c["ctx"], "vocab_size": c["vocab"], "width": c["t_width"],
            "heads": c["t_width"] // 64, "layers": c["t_layers"]}
    model = open_clip.CLIP(c["embed"], vision, text, quick_gelu=True)
    model.load_state_dict({k: made_up(k, tuple(x.shape)) for k, x in model.state_dict().items()})
    model.eval().requires_grad_(False)
    scale = model.logit_scale.exp().item()
    return common.Clip(model, model, TOKENIZER, None, None, scale, "cpu", "fp32", "")


def images(config):
    """The input batch, (B, 3, H, W): it is fed as it is, without preprocessing."""
    shape = (len(config["labels"]), 3, config["image_size"], config["image_size"])
    x = np.random.RandomState(config["image_seed"]).standard_normal(shape)
    return torch.from_numpy(x.astype(np.float32))


def noise(seed, shape):
    """A random context."""
    x = 0.02 * np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(x.astype(np.float32))


# ---------------------------------------------------------------- a script's training, step by step

@dataclass
class Training:
    """What a script's training did. `made`: parameters as the script itself starts them; `context`
    is the start of a method that learns one."""
    clip: object
    run: object
    prompt: torch.nn.Module
    context: torch.Tensor
    made: dict
    parameters_initial: dict
    logits_initial: torch.Tensor
    logits_final: torch.Tensor
    log: list        # of every step what was logged, {name: tensor}
    gradients: list  # of every step the gradients that the optimiser was given, {parameter: tensor}
    buffers: list    # of every step what else the prompt holds, {name: tensor}
    mixed: list      # of every step MVP-MI's mixtures: features (m, D), labels (m,)


def flags(config):
    """The command line for what `config` says. The one batch is an epoch; RESTORE's, all steps."""
    made = ["--lr", config["lr"], "--n-ctx", config["n_ctx"], "--ctx-init", config["context_words"]]
    epochs = config.get("epochs", 1 if config["method"] == "restore" else config["steps"])
    made += ["--epochs", epochs] if epochs else []
    if config["method"] == "restore":
        made += ["--views", 1, "--depth", config["depth"],
                 "--prompts", config["prompts"], "--shift", config["shift"],
                 "--shift-weight", config["shift_weight"],
                 "--blend", f"{config['blend_text']},{config['blend_visual']}"]
    else:
        made += ["--position", config["class_token_position"]]
        made += ["--class-specific"] if config["class_specific"] else []
    if config["method"] == "prograd":
        made += ["--projection", config["projection_strength"],
                 "--temperature", config["temperature"]]
    for key in ("mi_weight", "image_weight", "mi_temperature", "augment", "critic"):
        made += [f"--{key.replace('_', '-')}", config[key]] if key in config else []
    return [str(flag) for flag in made]


def constant(epoch, epochs, lr):
    """A schedule in place of common.learning_rate."""
    return lr


def follow(config, learning_rate=constant, clip=None, mixed=None):
    """The training of `config` by its script's main(): made-up CLIP (or another), batch and start.

    What is patched: where runs come from, the schedule, how image features are encoded and, if
    `mixed` is given, MVP-MI's mixtures: of every step the features and labels."""
    script, clip = importlib.import_module(config["method"]), clip or small_clip(config["clip"])
    restore, template = config["method"] == "restore", config.get("template", "a photo of a {}.")
    x, y = images(config), torch.tensor(config["labels"])
    with torch.no_grad():
        f = F.normalize(clip.model.encode_image(x), dim=-1)
    rows = torch.arange(len(y))
    batches = [(x, y, rows, 0 * rows)] * config["steps"] if restore else [(f, y)]
    found = {"log": [], "gradients": [], "buffers": [], "mixed": []}

    def logits(prompt):
        with torch.no_grad():
            features = F.normalize(prompt.image_features(x), dim=-1) if restore else f
            return clip.logit_scale * features @ prompt.class_features(config["classnames"]).T

    def runs(_, args, **__):
        run = made_up_run(clip, config["classnames"], template, batches, args)
        run.shots, run.data.name = config.get("shots", 1), config.get("dataset", "made up")
        run.features, run.labels = f[:, None], y                        # (B, V = 1, D), (B,)
        if config["method"] == "prograd":
            run.data.template = "{}, which ProGrad's own template is not."
        note = run.log

        def log(epoch, **values):
            named = found["prompt"].named_parameters()
            found["gradients"].append({name: p.grad.clone() for name, p in named})
            held = found["prompt"].named_buffers()
            found["buffers"].append({name: x.clone() for name, x in held})
            found["log"].append({k: torch.as_tensor(value).detach() for k, value in values.items()})
            note(epoch, **values)

        run.log, run.finish, found["run"] = log, lambda *_, **__: None, run
        torch.manual_seed(1)
        yield run

    train = script.train

    def started(prompt, run, args):
        found["made"] = {name: p.detach().clone() for name, p in prompt.named_parameters()}
        with torch.no_grad():
            if restore:
                for name, p in prompt.named_parameters():
                    if name != "text_prompts.0":
                        p.copy_(restore_start(name, tuple(p.shape)))
                if config["shift"] == "gram":
                    prompt.gram_at_start = [norms.detach() for norms in prompt.gram_norms()]
            elif config["context_seed"] is not None:
                prompt.v.copy_(noise(config["context_seed"], tuple(prompt.v.shape)))
        named = prompt.named_parameters()
        found["parameters_initial"] = {name: p.detach().clone() for name, p in named}
        found["prompt"], found["logits_initial"] = prompt, logits(prompt)
        train(prompt, run, args)

    def encode_images(clip, items, cache=None, views=None, encode=None, *_):
        return encode(x).float()[:, None]

    def mixup(*given):
        step = len(found["mixed"])
        found["mixed"].append(mixed[step] if mixed else draw(*given))
        return found["mixed"][-1]

    with contextlib.ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        argv = [f"{config['method']}.py", *flags(config), "--device", "cpu"]
        patched = [(sys, "argv", [*argv, "--out", f"{folder}/results.jsonl"]),
                   (script, "train", started), (common, "runs", runs),
                   (common, "learning_rate", learning_rate),
                   (common, "encode_images", encode_images),
                   (common, "nearest_words", lambda *_: "")]
        if draw := getattr(script, "mixup", None):
            patched.append((script, "mixup", mixup))
        for where, name, what in patched:
            patches.enter_context(mock.patch.object(where, name, what))
        with contextlib.redirect_stdout(None):
            script.main()
    found["logits_final"] = logits(found["prompt"])
    return Training(clip=clip, context=found["parameters_initial"].get("v"), **found)


# ---------------------------------------------------------------- files

def read(file):
    """The `config` and the arrays of a file."""
    with np.load(file) as content:
        arrays = {key: content[key] for key in content.files}
    return json.loads(str(arrays.pop("config"))), arrays


def write(file, config, arrays):
    """The file, and beside it the same `config` as JSON, with the numbers of the tokens."""
    arrays = {key: np.asarray(value) for key, value in arrays.items()}
    np.savez_compressed(file, config=np.array(json.dumps(config)), **arrays)
    parts = []
    for key, part in {"config": config, "tokens": tokens(config)}.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in part.items())
        parts.append(f'"{key}": {{\n{lines}\n}}')
    Path(file).with_suffix(".json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


def tokens(config):
    """The token numbers of what a port would need a tokenizer for."""
    encode, words = TOKENIZER.encode, config["context_words"]
    names = [name.replace("_", " ") for name in config["classnames"]]
    found = {"start_of_text": 49406, "end_of_text": 49407,
             "names_with_full_stop": [encode(f"{name}.") for name in names],
             "name_lengths": [len(encode(name)) for name in names]}
    if config["method"] == "prograd":
        words = words or config["template"].split("{}")[0].strip()
        found["words_left_over"] = encode(words)[len(words.split()):]
    if config["method"] == "restore":
        found["words_not_learned"] = encode(words)[config["n_ctx"]:]
    learned = {"prograd": len(words.split()), "restore": config["n_ctx"]}.get(config["method"])
    found["words_learned"] = encode(words)[:learned]
    if "template" in config:
        found["written_prompts"] = [encode(config["template"].format(name)) for name in names]
    return found


def complete(file):
    """Adds what spares a port image tower and tokenizer; what others computed stays as it is."""
    config, arrays = read(file)
    x, clip = images(config), small_clip(config["clip"])
    if config["method"] == "restore":
        arrays["images"] = x.numpy()
    else:
        with torch.no_grad():
            arrays["image_features"] = F.normalize(clip.model.encode_image(x), dim=-1).numpy()
        if config["context_seed"] is not None and "context_initial" not in arrays:
            count = [len(config["classnames"])] * config["class_specific"]
            shape = (*count, config["n_ctx"], config["clip"]["t_width"])
            arrays["context_initial"] = noise(config["context_seed"], shape)
    write(file, config, arrays)


SMALL = {"embed": 128, "v_width": 128, "v_layers": 2, "patch": 8, "image": 32, "t_width": 128,
         "t_layers": 4, "ctx": 77, "vocab": 49408}
NAMES = ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road",
         "Industrial Buildings"]


def own_restore():
    """RESTORE as in the paper: independent prompts, shift of features, towers of unlike depth."""
    config = {"method": "restore", "prompts": "independent", "shift": "features",
              "classnames": NAMES, "labels": [0, 3, 1, 4], "n_ctx": 2,
              "context_words": "a photo of a", "depth": 2, "image_seed": 7,
              "image_size": 32, "blend_text": 0.2, "blend_visual": 0.1,
              "shift_weight": 10.0, "lr": 0.0035, "momentum": 0.9, "weight_decay": 0.0005,
              "steps": 3, "clip": {**SMALL, "v_layers": 3}}
    t = follow(config)
    config["parameters"] = {name: list(p.shape) for name, p in t.prompt.named_parameters()}
    config["blend_text_after"], config["blend_visual_after"] = t.prompt.blend.tolist()
    small = [name for name, shape in config["parameters"].items() if np.prod(shape) <= 1024]
    arrays = {"log": [[float(step["loss"]), float(step["consistency"])] for step in t.log],
              "shift_text": torch.stack([step["shift_text"] for step in t.log]),
              "shift_vision": torch.stack([step["shift_vision"] for step in t.log]),
              "text_prompts_0_initial": t.parameters_initial["text_prompts.0"],
              "logits_initial": t.logits_initial, "logits_final": t.logits_final}
    for name in small:
        arrays[f"gradient_initial/{name}"] = t.gradients[0][name]
        arrays[f"final/{name}"] = t.prompt.get_parameter(name).detach()
    write(HERE / "restore_paper.npz", config, arrays)


def own_mvp_mi():
    """MVP-MI with both terms and a learned estimator; what is mixed at random is recorded."""
    config = {"method": "mvp_mi", "classnames": NAMES, "labels": [0, 3, 1, 4, 2, 2, 0, 1],
              "template": "a centered satellite photo of {}.", "n_ctx": 4, "class_specific": False,
              "class_token_position": "end", "context_words": "", "context_seed": 11,
              "image_seed": 7, "image_size": 32, "lr": 0.002, "momentum": 0.9,
              "weight_decay": 0.0005, "steps": 3, "mi_weight": 4.0, "image_weight": 1.0,
              "mi_temperature": 0.07, "augment": 2, "critic": "learned", "clip": SMALL}
    t = follow(config)
    features, labels = zip(*t.mixed)
    arrays = {"log": [[float(x) for x in step.values()] for step in t.log],
              "mixed_features": torch.stack(features), "mixed_labels": torch.stack(labels),
              "context_initial": t.context, "context_final": t.prompt.v.detach(),
              "logits_initial": t.logits_initial, "logits_final": t.logits_final}
    for k, gradients in enumerate(t.gradients):
        arrays[f"gradient_used_{k}"] = gradients["v"]
    write(HERE / "mvp_mi.npz", {**config, "columns": list(t.log[0])}, arrays)


def weights(name, file):
    """The small CLIP of a reference file, and where RESTORE's parameters start, as safetensors."""
    config, _ = read(HERE / f"{name}.npz")
    tensors = dict(small_clip(config["clip"]).model.state_dict())
    for key, shape in config.get("parameters", {}).items():
        if key != "text_prompts.0":
            tensors[f"restore/{key}"] = restore_start(key, tuple(shape))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def main(what="", *given):
    if what == "weights" and len(given) == 2:
        weights(*given)
    elif what == "complete":
        for file in sorted(HERE.glob("*.npz")):
            complete(file)
    elif what == "own":
        own_restore()
        own_mvp_mi()
        for name in ("restore_paper", "mvp_mi"):
            complete(HERE / f"{name}.npz")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
