"""One run in a file, so that another framework can repeat it without torch, images or a tokenizer.

    python coop.py --export FILE.safetensors                            prograd.py and mvp_mi.py too

features        (N, V, D)   f(x) of the training images, V random crops of each, of length 1
labels          (N,)        their classes
rows, crops     (E, S, B)   of every step of every epoch: the images of its batch, and which crops
learning_rates  (E,)        of the epochs
start/v, end/v  (M, W)      the context before the first step and after the last
and for every part that is tested ("all classes"; or "base" and "new"; then those of --transfer)
PART/features, PART/labels  (T, D), (T,)        its test images
PART/zero_shot, PART/start, PART/end  (C, D)    class features of the template, and with the context
metadata        JSON        flags, optimizer, logit_scale, log (per epoch the means over its steps),
                            tokens (token numbers, by part), results (percent, by part)

With CLIP's text tower in the other framework that is a whole training. (MVP-MI draws its mixtures
at random, and its estimator is not told: with --augment 0 --critic cosine it can be repeated.)"""

import json
import os
import sys
from pathlib import Path

import torch

from data.errors import Problem
from data.images import write_whole

OPTIMIZER = {"name": "SGD", "momentum": 0.9, "dampening": 0, "nesterov": False,
             "weight_decay": 5e-4}


def check(args, features):
    """Raises Problem, before the training, where a run cannot be exported."""
    if not features:
        raise Problem("--export: this method learns from pixels, not from features")
    if not args.views:
        raise Problem("--export: --views 0 makes new features every epoch; give a number")
    if args.load or len(args.shots) * len(args.seeds) > 1:
        raise Problem("--export: a single run, and one that trains")
    file = Path(args.export)
    if file.is_symlink() or file.exists() and not file.is_file():
        raise Problem(f"--export {file}: neither new nor a plain file")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise Problem(f"--export {file}: cannot write there")


def tokens(clip, data, classnames):
    """Token numbers: of start, end, the names with their full stop, and the written prompts."""
    encode, names = clip.tokenizer.encode, [name.replace("_", " ") for name in classnames]
    return {"start_of_text": clip.tokenizer.sot_token_id,
            "end_of_text": clip.tokenizer.eot_token_id,
            "names_with_full_stop": [encode(f"{name}.") for name in names],
            "name_lengths": [len(encode(name)) for name in names],
            "written_prompts": [encode(data.template.format(name)) for name in names],
            "prograd_prompts": [encode(data.prograd_template.format(name)) for name in names]}


def first_context(run, prompt):
    """The context before the training: its script makes it anew, from the run's seed."""
    torch.manual_seed(run.seed)
    v = sys.modules[type(prompt).__module__].first_context(run, run.args)
    return v[0] if isinstance(v, tuple) else v      # ProGrad's has words that stay as well


@torch.no_grad()
def write(run, prompt, schedule, results):
    """Writes --export, whole or not at all, after a training.

    schedule  (epoch, epochs, lr) -> the learning rate of that epoch
    results   by part"""
    epochs = len(run.history()["loss"])
    learning_rates = [schedule(epoch, epochs, run.args.lr) for epoch in range(epochs)]
    steps = [run.plan(epoch) for epoch in range(epochs)]
    tensors = {"features": run.features, "labels": run.labels,
               "learning_rates": torch.tensor(learning_rates, dtype=torch.float64)}
    for k, name in enumerate(("rows", "crops")):
        tensors[name] = torch.stack([torch.stack([step[k] for step in plan]) for plan in steps])
    for name, v in (("end", prompt.v.clone()), ("start", first_context(run, prompt))):
        prompt.v.copy_(v)
        tensors[f"{name}/v"] = v
        for part in run.parts:
            tensors[f"{part.name}/{name}"] = prompt.class_features(part.classnames).float()
    prompt.v.copy_(tensors["end/v"])
    for part in run.parts:
        tensors[f"{part.name}/features"] = part.features
        tensors[f"{part.name}/labels"] = torch.tensor([item.label for item in part.items])
        tensors[f"{part.name}/zero_shot"] = part.zero_shot
    told = {"method": run.method, "flags": vars(run.args), "optimizer": OPTIMIZER,
            "logit_scale": run.clip.logit_scale, "log": run.history(),
            "classnames": run.classnames, "results": results,
            "tokens": {part.name: tokens(run.clip, run.data, part.classnames)
                       for part in run.parts}}
    metadata = {name: json.dumps(value) for name, value in told.items()}
    write_whole(run.args.export, {name: x.cpu() for name, x in tensors.items()}, metadata)
