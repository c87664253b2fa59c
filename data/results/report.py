"""What a run prints: its accuracies, means over seeds, predictions for single images."""

import os
import statistics

from data.results import records


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
    width = max(34, len(title), *(2 + len(row[0]) for row in rows))
    print(f"{title:<{width}} zero-shot {record['method']:>9}  KL to zero-shot")
    for name, zero_shot, accuracy, kl in rows:
        tail = f"{kl:17.2f}" if kl is not None else ""
        print(f"{'  ' + name:<{width}} {zero_shot:9.1f} {accuracy:9.1f}{tail}")
    print(f"  {note}")


def show_means(out, ids):
    """Print mean ± std over seeds of those of the runs that differ in nothing else."""
    groups = {}
    for record in {record["run"]: record for record in records.read(out)[0]}.values():
        if record["run"] in ids:
            key = record["setting"], record["data"], record["shots"]
            groups.setdefault(key, []).append(record)
    for found in groups.values():
        if len(found) > 1:
            first = found[0]
            print(f"{first['dataset']}, {first['shots']}-shot: "
                  f"mean ± std over {len(found)} seeds of {first['method']}")
            for name in records.SCORES[first["protocol"]]:
                values = [record[name] for record in found]
                mean, std = statistics.mean(values), statistics.stdev(values)
                print(f"  {name:<20} {mean:6.1f} ± {std:.1f}")


def show_predictions(method, files, classnames, zero_shot, ours):
    """Print the likeliest classes of images, with probabilities in percent.

    zero_shot, ours  (values, places) of the largest probabilities, (files, top) each"""
    names = [name.replace("_", " ") for name in classnames]
    width = max(map(len, [*names, method])) + 1
    columns = [tensor.tolist() for pair in (ours, zero_shot) for tensor in pair]
    for file, *rows in zip(files, *columns):
        name = os.fsencode(file).decode(errors="replace")
        print(f"{name}\n  {method:<{width + 8}}zero-shot")
        for p, k, q, j in zip(*rows):
            print(f"  {names[k]:<{width}} {100 * p:5.1f}  {names[j]:<{width}} {100 * q:5.1f}")
