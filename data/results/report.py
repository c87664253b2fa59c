"""What a run prints: its accuracies, and predictions for single images."""

from data.results import tables


def show(title, record, note):
    """Print a record's accuracies, their KL divergence from zero-shot CLIP, and a note."""
    if record["protocol"] == "base-to-new":
        rows = [(name, record[f"zero_shot_{name}"], record[name], record["kl"].get(name))
                for name in ("base", "new", "harmonic")]
    else:
        rows = [("all classes", record["zero_shot"], record["accuracy"],
                 record["kl"]["all classes"])]
    rows += [(name, target["zero_shot"], target["accuracy"], None)
             for name, target in record["transfer"].items()]
    grid = [["", "zero-shot", record["method"], "KL to zero-shot"]]
    for name, zero_shot, accuracy, kl in rows:
        tail = "" if kl is None else f"{kl:.2f}"
        grid.append([name, f"{zero_shot:.1f}", f"{accuracy:.1f}", tail])
    tables.show(title, grid, [note])


def show_predictions(method, files, classnames, zero_shot, ours):
    """Print the likeliest classes of images, with probabilities in percent.

    zero_shot, ours  (values, places) of the largest probabilities, (files, top) each"""
    names = [name.replace("_", " ") for name in classnames]
    columns = [tensor.tolist() for pair in (ours, zero_shot) for tensor in pair]
    for file, *rows in zip(files, *columns):
        grid = [[method, "", "zero-shot", ""]]
        for p, k, q, j in zip(*rows):
            grid.append([names[k], f"{100 * p:.1f}", names[j], f"{100 * q:.1f}"])
        tables.show(file, grid)
