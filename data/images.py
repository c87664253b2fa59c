"""From picture files to tensors, and a cache in which what is computed from them is computed once."""

import contextlib
import functools
import io
import os
import random
import stat
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from data.errors import Problem

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# ---------------------------------------------------------------- pictures

def file_status(path):
    """os.stat of a plain file; raises Problem where it is missing, or a named pipe, which would be waited for."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise Problem(f"missing picture {path} ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise Problem(f"the picture {path} is not a plain file")
    return status


def rgb(image):
    """A PIL image in 8-bit RGB. Grey values of 16 bits, or floats from 0 to 1, are scaled by their range.

    Pillow itself would cut off what is above 255: all white, or all black."""
    if image.mode[0] in "IF":
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        most = 1 if image.mode == "F" and high <= 1 else 255 if image.mode == "F" else 65535
        if not 0 <= low <= high <= most:
            raise ValueError(f"grey values from {low:g} to {high:g}: wants 16 bits, or floats up to 1 or 255")
        image = Image.fromarray((values * 255 / most).round().astype(np.uint8))
    return image.convert("RGB")


class Pictures(torch.utils.data.Dataset):
    """Item i: picture i transformed once for each number in views[i], (V, 3, H, W); a str where it cannot be read.

    An augmentation's random numbers come from the file's content and the number of the view: the same in every run."""

    def __init__(self, paths, transform, views):
        self.paths, self.transform, self.views = paths, transform, views

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            file_status(self.paths[i])
            content = Path(self.paths[i]).read_bytes()
            image = rgb(Image.open(io.BytesIO(content)))
            copies = []
            with torch.random.fork_rng(devices=[]):
                for view in self.views[i]:
                    torch.manual_seed(zlib.crc32(b"%d" % view, zlib.crc32(content)))
                    copies.append(self.transform(image))
            return torch.stack(copies)
        except Problem as problem:
            return str(problem)
        except UnidentifiedImageError:
            return f"cannot read the picture {self.paths[i]} (not in a format that Pillow knows)"
        except Exception as error:  # Pillow's decoders raise anything
            cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return f"cannot read the picture {self.paths[i]} ({cause})"


def load_pixels(paths, transform, views, batch_size, device):
    """Yields (batch_size, 3, H, W) on the device: of each picture in turn its views. The last batch may be smaller.

    views  for each picture the numbers of its augmented views
    Raises Problem at a picture that cannot be read."""
    workers = min(8, os.cpu_count() or 1) if device == "cuda" and len(paths) > 64 else 0
    pictures = Pictures(paths, transform, views)
    rows = []
    for picture in torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=workers):
        if isinstance(picture, str):
            raise Problem(picture)
        rows += picture
        while len(rows) >= batch_size:
            yield torch.stack(rows[:batch_size]).to(device, non_blocking=True)
            rows = rows[batch_size:]
    if rows:
        yield torch.stack(rows).to(device, non_blocking=True)


# ---------------------------------------------------------------- the cache
#
# A folder per backbone holds pieces, safetensors files of some hundred rows each, written as the rows are computed:
# `rows` (n, ...), any tensor, and `names` (n, 16), a digest of what each row was made from. A piece appears whole, under
# a checksum for a name, and never changes. Any process may add one and any may lose one: what no whole piece holds is
# computed again.

def digest(*parts):
    """Of bytes, or of what repr shows: 16 bytes."""
    whole = blake2b(digest_size=16)
    for part in parts:
        whole.update(part if isinstance(part, (bytes, np.ndarray)) else repr(part).encode())
    return whole.digest()


def cached(folder, key, names, compute, piece):
    """What compute makes, a tensor with one row for each name, (N, ...); kept below `folder` (None: it is not).

    key, names  what a row depends on, all rows or one: anything with a repr
    compute     (numbers of rows to compute, how many are missing in all) -> tensor (n, ...); the same row to the bit
                in whatever company it is asked for
    piece       rows in a piece
    Processes that want the same rows at the same time share the work: each takes the next ones nobody else is at."""
    if not folder:
        return compute(range(len(names)), len(names))
    names = [digest(name) for name in names]
    number = {name: i for i, name in reversed(list(enumerate(names)))}  # two pictures may be the same
    folder, found, seen = Path(folder) / digest(key).hex(), {}, set()
    read_pieces(folder, number, found, seen)
    while missing := [name for name in number if name not in found]:
        start = random.SystemRandom().randrange(len(missing))  # where others are less likely to be
        with claim(folder, missing[start:] + missing[:start], piece) as mine:
            read_pieces(folder, number, found, seen)  # what others have finished until now
            mine = [name for name in mine if name not in found]
            if mine:
                rows = compute(sorted(number[name] for name in mine), len(missing))
                mine.sort(key=number.get)
                write_piece(folder, mine, rows)
                found.update(zip(mine, rows))
        if not mine:
            time.sleep(0.1)  # the rest is being computed elsewhere
    return torch.stack([found[name] for name in names])


@contextlib.contextmanager
def claim(folder, names, most):
    """The first names, `most` at most, that no other process is at; no other gets them within this context.

    A claim is a lock on one byte of a file. It ends with its process, however that ends, also on a network file system.
    Where there are no locks, every name is free: work may be done twice, but the pieces are whole and right all the same."""
    mine = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # who writes in a network folder sees there what others wrote
        file = open(folder / "claims", "ab")
    with file:
        for name in names:
            if len(mine) == most:
                break
            try:
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int.from_bytes(name[:5], "big"))
                mine.append(name)
            except (BlockingIOError, PermissionError):  # another's
                pass
            except OSError:  # no locks here
                mine.append(name)
        yield mine


def read_pieces(folder, names, found, seen):
    """Adds to `found` the rows {name: tensor} with the given names of the pieces that are not in `seen`.

    A damaged piece is taken away."""
    for file in folder.glob("*.safetensors"):
        if file.name in seen:
            continue
        seen.add(file.name)
        try:
            with safe_open(file, "pt") as content:
                held = content.get_tensor("names").numpy()
            if any(bytes(name) in names for name in held):
                content = load(file.read_bytes())
                if file.stem != piece_name(folder, content):
                    raise SafetensorError("damaged")
                found.update((bytes(name), row) for name, row in zip(held, content["rows"]) if bytes(name) in names)
        except FileNotFoundError:  # cleared by somebody
            pass
        except Exception:  # damage can look like anything
            with contextlib.suppress(OSError):
                file.unlink()


def piece_name(folder, content):
    """A checksum of all that a piece says, and of the folder where it belongs."""
    parts = [part for tensor in (content["names"], content["rows"])
             for part in (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy())]
    return digest(folder.name, *parts).hex()


def write_piece(folder, names, rows):
    content = {"names": torch.tensor([list(name) for name in names], dtype=torch.uint8), "rows": rows}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{piece_name(folder, content)}.safetensors", content)


@contextlib.contextmanager
def writing(folder):
    """An OSError in here ends in one line that says where, and what to do."""
    try:
        yield
    except OSError as error:
        raise Problem(f"cannot write to {folder} ({error.strerror or error}): --cache DIR keeps features elsewhere") from None


def content_digests(paths, folder):
    """A digest of every picture's content, 16 bytes. Raises Problem at a picture that is missing or no plain file.

    Reading 50,000 pictures takes minutes, so the digests are kept in `folder` as well, by place, size and times."""
    resolved, places = functools.cache(os.path.realpath), []
    for path in paths:
        status, (parent, name) = file_status(path), os.path.split(path)
        places.append((resolved(parent), name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))

    def compute(rows, missing):
        with ThreadPoolExecutor(8) as pool:  # a network folder answers many at once
            contents = pool.map(lambda row: digest(Path(paths[row]).read_bytes()), rows)
            return torch.tensor([list(content) for content in contents], dtype=torch.uint8)

    return [bytes(row) for row in cached(folder, "contents of pictures", places, compute, 4096).numpy()]


def write_whole(file, tensors, metadata=None):
    """A safetensors file that appears whole or not at all, whoever else reads or writes it."""
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=Path(file).parent)
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except (SafetensorError, OSError) as error:  # the first is how safetensors tells that the disk is full
        os.unlink(temporary)
        raise Problem(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from None
    except BaseException:
        os.unlink(temporary)
        raise
