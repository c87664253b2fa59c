"""One run in a file, so that another framework can repeat it without torch, pictures or a tokenizer.

`python coop.py --export FILE.safetensors` (prograd.py and mvp_mi.py too) writes

    features     (N, V, D)        f(x) of the training images, V augmented views of each, of length 1
    labels       (N,)             their classes
    rows, views  (E, S, B)        epoch by epoch the batches: which images, in order, and which views
    learning_rates  (E,)          of the epochs
    start/v, end/v  (M, W)        the context before the first step and after the last
    class_features_start, class_features_end, class_features_zero_shot
                 (C, D)           of all classes to be tested: those learned come first
    test_features, test_labels    (T, D), (T,)
    metadata     JSON strings     `flags`; `optimizer`; `logit_scale`; `classes_learned`, how many;
                                  `tokens`, token numbers; `log`, per epoch the means over its steps;
                                  `accuracy`, percent: of the prompt and of the written one

With a text tower in the other framework, whose weights open_clip can write as safetensors, that is a
whole training: start/v, batches and learning rates in, end/v and the accuracies out."""

import json

import torch

from data.errors import Problem
from data.images import write_whole

OPTIMIZER = {"name": "SGD", "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-4}


def check(args, method):
    """Raises Problem, before the training, where a run cannot be exported."""
    if method == "restore":
        raise Problem("--export: RESTORE learns from pixels, not features (tests/reference has it)")
    if args.views == 0:
        raise Problem("--export: --views 0 makes new features every epoch; give a number of views")
    if args.load or len(args.shots) * len(args.seeds) > 1:
        raise Problem("--export: one run at a time, and one that trains")


def tokens(clip, data):
    """The numbers of start and end, of names with full stop, of ProGrad's words, and of templates."""
    encode, names = clip.tokenizer.encode, [name.replace("_", " ") for name in data.classnames]
    return {"start_of_text": clip.tokenizer.sot_token_id, "end_of_text": clip.tokenizer.eot_token_id,
            "names_with_full_stop": [encode(f"{name}.") for name in names],
            "name_lengths": [len(encode(name)) for name in names],
            "written_prompts": [encode(data.template.format(name)) for name in names],
            "prograd_prompts": [encode(data.prograd_template.format(name)) for name in names]}


def write(file, run, prompt, start, class_features, test_features, learning_rates, accuracy):
    """Writes `file`, whole or not at all. Once for a run, after its training.

    start             the prompt's tensors before the first step
    class_features    {"start", "end", "zero_shot"}: (C, D)
    learning_rates    one per epoch, which also says how many there were"""
    plans = [run.plan(epoch) for epoch in range(len(learning_rates))]
    tensors = {"features": run.features, "labels": run.labels,
               "rows": torch.stack([torch.stack([rows for rows, _ in plan]) for plan in plans]),
               "views": torch.stack([torch.stack([views for _, views in plan]) for plan in plans]),
               "learning_rates": torch.tensor(learning_rates, dtype=torch.float64),
               "test_features": test_features,
               "test_labels": torch.tensor([item.label for item in run.data.test]),
               **{f"class_features_{name}": w.float() for name, w in class_features.items()},
               **{f"start/{name}": x for name, x in start.items()},
               **{f"end/{name}": x for name, x in prompt.state_dict().items()}}
    told = {"method": run.method, "flags": vars(run.args), "optimizer": OPTIMIZER,
            "logit_scale": run.clip.logit_scale, "classnames": run.data.classnames,
            "classes_learned": len(run.classnames), "shots": run.shots, "seed": run.seed,
            "tokens": tokens(run.clip, run.data), "log": run.history(), "accuracy": accuracy}
    metadata = {name: json.dumps(value) for name, value in told.items()}
    write_whole(file, {name: x.detach().cpu() for name, x in tensors.items()}, metadata)
