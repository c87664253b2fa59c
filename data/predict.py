"""What a prompt says about single pictures, beside what zero-shot CLIP says."""


def show(files, classnames, method, zero_shot, learned, top=5):
    """Prints for every file the likeliest classes of both, with their probabilities in percent.

    zero_shot, learned  probabilities (files, classes)"""
    names = [name.replace("_", " ") for name in classnames]
    width = max(map(len, names))
    for file, *both in zip(files, learned, zero_shot):
        print(f"{file}\n  {method:<{width + 8}}zero-shot")
        columns = [p.topk(min(top, len(names))) for p in both]
        for p, k, q, j in zip(*(numbers.tolist() for column in columns for numbers in column)):
            print(f"  {names[k]:<{width}} {100 * p:5.1f}  {names[j]:<{width}} {100 * q:5.1f}")
