"""One run in a safetensors file, to repeat it in another framework without images or a tokenizer.

    python coop.py --export FILE                                        prograd.py and mvp_mi.py too

features        (N, V, D)   f(x) of the training images, V random crops of each, unit-norm
labels          (N,)        their classes
rows, crops     (E, S, B)   of every step of every epoch: the images of its batch, and which crops
learning_rates  (E,)        of the epochs
start/v, end/v  (M, W)      the context before the first step and after the last
and for every part that is tested ("all classes"; or "base" and "new"; then those of --transfer)
PART/features, PART/labels  (T, D), (T,)        its test images
PART/zero_shot, PART/start, PART/end  (C, D)    class features of the template, and with the context
metadata        JSON        flags, optimizer, logit_scale, log (per epoch the means over its steps),
                            tokens (token numbers, by part), results (percent, by part)

MVP-MI draws its mixtures at random and does not export its critic: --augment 0 --critic cosine.
"""

import json

import torch

from data.features import write_whole
from data.results import records

OPTIMIZER = {"name": "SGD", "momentum": 0.9, "dampening": 0, "nesterov": False,
             "weight_decay": 5e-4}


@torch.no_grad()
def write(run, prompt, results):
    """Write --export, whole or not at all, after a training. results: by part."""
    history = run.history()
    rows, crops = map(torch.stack, zip(*(run.plan(epoch) for epoch in range(len(history["loss"])))))
    tensors = {"features": run.features, "labels": run.labels, "rows": rows, "crops": crops,
               "learning_rates": torch.tensor(history["lr"], dtype=torch.float64)}
    end = {name: tensor.clone() for name, tensor in prompt.state_dict().items()}
    for when, state in (("start", run.initial), ("end", end)):
        prompt.load_state_dict(state)
        tensors[f"{when}/v"] = state["v"]
        for part in run.parts:
            tensors[f"{part.name}/{when}"] = prompt.class_features(part).float()
    for part in run.parts:
        tensors[f"{part.name}/features"] = part.features
        tensors[f"{part.name}/labels"] = part.labels
        tensors[f"{part.name}/zero_shot"] = part.zero_shot
    told = {"method": run.method, "flags": records.flags_of(run.args), "log": history,
            "optimizer": OPTIMIZER, "logit_scale": run.clip.logit_scale,
            "classnames": run.classnames, "results": results,
            "tokens": {part.name: tokens(run.clip, part) for part in run.parts}}
    metadata = {"kind": "export", **{name: json.dumps(value) for name, value in told.items()}}
    write_whole(run.args.export, {name: x.cpu() for name, x in tensors.items()}, metadata)


def tokens(clip, part):
    """Return token numbers: of start, end, names with their full stop, hand-crafted prompts."""
    encode, data = clip.tokenizer.encode, part.data
    names = [name.replace("_", " ") for name in part.classnames]
    return {"start_of_text": clip.tokenizer.sot_token_id,
            "end_of_text": clip.tokenizer.eot_token_id,
            "names_with_full_stop": [encode(f"{name}.") for name in names],
            "name_lengths": [len(encode(name)) for name in names],
            "templates": fill(encode, data.template, names),
            "prograd_templates": fill(encode, data.prograd_template, names)}


def fill(encode, template, names):
    """Return a list for each of the templates separated by |: token numbers of every class."""
    return [[encode(one.format(name)) for name in names] for one in template.split("|")]
