"""What a prompt says about single pictures, beside what zero-shot CLIP says."""


def show(run, zero_shot, learned, top=5):
    """Prints for every file of --predict the likeliest classes, with probabilities in percent.

    zero_shot, learned  pairs of image features (files, D) and class features (C, D)"""
    names = [name.replace("_", " ") for name in run.data.classnames]
    width = max(map(len, names))
    both = ((run.clip.logit_scale * f @ w.T).softmax(-1) for f, w in (learned, zero_shot))
    for file, *both in zip(run.args.predict, *both):
        print(f"{file}\n  {run.method:<{width + 8}}zero-shot")
        columns = [p.topk(min(top, len(names))) for p in both]
        for p, k, q, j in zip(*(numbers.tolist() for column in columns for numbers in column)):
            print(f"  {names[k]:<{width}} {100 * p:5.1f}  {names[j]:<{width}} {100 * q:5.1f}")
