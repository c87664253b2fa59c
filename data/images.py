"""From picture files to tensors, and a cache for what is computed from them."""

import hashlib
import io
import os
import tempfile
import zlib
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.errors import Problem


class Pictures(torch.utils.data.Dataset):
    """Item i: picture i transformed once for each number in views[i], (V, 3, H, W); a str where it cannot be read.

    An augmentation's random numbers come from the file's content and the number of the view: the same in every run."""

    def __init__(self, paths, transform, views):
        self.paths, self.transform, self.views = paths, transform, views

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            content = Path(self.paths[i]).read_bytes()
            image = Image.open(io.BytesIO(content)).convert("RGB")
            copies = []
            with torch.random.fork_rng(devices=[]):
                for view in self.views[i]:
                    torch.manual_seed(zlib.crc32(b"%d" % view, zlib.crc32(content)))
                    copies.append(self.transform(image))
            return torch.stack(copies)
        except Exception as error:  # Pillow's decoders raise anything
            cause = error.strerror if isinstance(error, OSError) else str(error)
            return f"cannot read the picture {self.paths[i]} ({cause or type(error).__name__})"


def load_pixels(paths, transform, views, batch_size, device):
    """Yields (batch_size, V, 3, H, W) on the device, the pictures in order; raises Problem at one that cannot be read.

    views  for each picture the numbers of its augmented views"""
    workers = min(8, os.cpu_count() or 1) if device == "cuda" and len(paths) > 64 else 0
    for pictures in torch.utils.data.DataLoader(Pictures(paths, transform, views), batch_size, num_workers=workers, collate_fn=list):
        for picture in pictures:
            if isinstance(picture, str):
                raise Problem(picture)
        yield torch.stack(pictures).to(device, non_blocking=True)


def cached(folder, key, paths, compute):
    """The tensor that compute() makes of the pictures, kept in `folder`, in a file named after `key` and the pictures.

    A picture counts as another one when its path, size or time of change is. A damaged file is found by its checksum and
    made anew. Raises Problem where a picture is missing; with folder None nothing is kept."""
    try:
        stats = [(path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in paths]
    except OSError as error:
        raise Problem(f"missing picture {error.filename}") from None
    if not folder:
        return compute()
    name = hashlib.blake2b(repr((*key, stats)).encode(), digest_size=16).hexdigest()
    file = Path(folder) / f"{name}.safetensors"
    tensor = read_cache(file)
    if tensor is None:
        tensor = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, {"features": tensor}, {"checksum": checksum(tensor)})
    return tensor


def checksum(tensor):
    return f"{zlib.crc32(tensor.contiguous().numpy()):08x}"


def read_cache(file):
    """The cached tensor, or None where there is none or it is damaged."""
    try:
        with safe_open(file, "pt") as content:
            tensor = content.get_tensor("features")
            return tensor if content.metadata()["checksum"] == checksum(tensor) else None
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        return None


def write_whole(file, tensors, metadata):
    """A safetensors file that appears whole or not at all, whoever else reads or writes it."""
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=Path(file).parent)
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except SafetensorError as error:  # how safetensors tells that the disk is full
        os.unlink(temporary)
        raise Problem(f"cannot write {file}: {error}") from None
    except BaseException:
        os.unlink(temporary)
        raise
