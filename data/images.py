"""From picture files to tensors, and a cache in which what is computed from them is kept."""

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


# ------------------------------------------------------- pictures

def file_status(path):
    """os.stat of a plain file. Raises Problem where it is missing, or a pipe, which may not end."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise Problem(f"missing picture {path} ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise Problem(f"the picture {path} is not a plain file")
    return status


def rgb(image):
    """A PIL image in 8-bit RGB. Pillow itself would make grey values of 16 bits white, floats up to
    1 black: they are scaled by their range. Raises ValueError if that is none of the known ones."""
    if image.mode[0] in "IF":
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        most = 65535 if image.mode[0] == "I" else 1 if high <= 1 else 255
        if not 0 <= low <= high <= most:
            raise ValueError(f"grey values {low:g} to {high:g}; known: 16 bits, floats to 1 or 255")
        image = Image.fromarray((values * 255 / most).round().astype(np.uint8))
    return image.convert("RGB")


class Pictures(torch.utils.data.Dataset):
    """Item i: picture i transformed for each of views[i], (V, 3, H, W), or the Problem with it.

    An augmentation's random numbers come from the file's content and the number of the view: they
    are the same in every run."""

    def __init__(self, paths, transform, views):
        self.paths, self.transform, self.views = paths, transform, views

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path, copies = self.paths[i], []
        try:
            file_status(path)
            content = Path(path).read_bytes()
            image = rgb(Image.open(io.BytesIO(content)))
            with torch.random.fork_rng(devices=[]):
                for view in self.views[i]:
                    torch.manual_seed(zlib.crc32(b"%d" % view, zlib.crc32(content)))
                    copies.append(self.transform(image))
            return torch.stack(copies)
        except Problem as problem:
            return problem
        except UnidentifiedImageError:
            return Problem(f"cannot read the picture {path} (not in a format that Pillow knows)")
        except Exception as error:  # Pillow's decoders raise anything
            cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return Problem(f"cannot read the picture {path} ({cause})")


def load_pixels(paths, transform, views, batch_size, device):
    """Yields (batch_size, 3, H, W) on the device: the views of each picture in turn. The last batch
    may be smaller. Raises Problem at a picture that cannot be read.

    views  for each picture the numbers of its augmented views"""
    workers = min(8, os.cpu_count() or 1) if device == "cuda" and len(paths) > 64 else 0
    pictures, rows = Pictures(paths, transform, views), []
    for picture in torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=workers):
        if isinstance(picture, Problem):
            raise picture
        rows += picture
        while len(rows) >= batch_size:
            yield torch.stack(rows[:batch_size]).to(device, non_blocking=True)
            rows = rows[batch_size:]
    if rows:
        yield torch.stack(rows).to(device, non_blocking=True)


# ------------------------------------------------------- the cache
#
# A folder per backbone holds pieces, safetensors files of a few seconds' work each, written as the
# rows are computed: `rows` (n, ...) and `names` (n, 16), a digest of what each row was made from.
# A piece appears whole, with a checksum for a name, and never changes. Any process may add one, and
# anybody may delete one: rows that no whole piece holds are computed again.

SECONDS = 3  # after which a piece is written: more than this is not lost


def image_key(visual, *more):
    """Stands in the cache for all that image features depend on beside the image.

    That is `more`, the weights of the image tower `visual`, and its architecture: the same weights
    mean something else with other heads, pooling or GELU."""
    plain = (bool, int, float, str, tuple, type(None))
    key = blake2b(repr(more).encode(), digest_size=16)
    for name, module in visual.named_modules():
        values = {k: v for k, v in vars(module).items() if isinstance(v, plain)}
        key.update(repr((name, type(module), values)).encode())
    for tensor in visual.state_dict().values():
        key.update(tensor.cpu().contiguous().numpy())
    return key.hexdigest()


def digest(*parts):
    """16 bytes for arrays, bytes, and what else repr shows whole."""
    whole = blake2b(digest_size=16)
    for part in parts:
        whole.update(part if isinstance(part, (bytes, np.ndarray)) else repr(part).encode())
    return whole.digest()


def cached(folder, key, names, compute, size):
    """What `compute` makes of every name: a tensor (N, ...), kept below `folder` (None: it is not).

    key, names  what the rows depend on, all of them or one each: anything that repr shows whole
    compute     (places in names, how many are missing in all) yields the rows of those places in
                some tensors (n, ...); a row must be the same to the bit in whatever company
    size        rows in a piece at most
    Processes that want the same rows at the same time share the work: each takes the next `size`
    that nobody is at, until all are there."""
    if not folder:
        return torch.cat([*compute(range(len(names)), len(names))])
    names, found, seen = [digest(name) for name in names], {}, set()
    place = {name: i for i, name in reversed([*enumerate(names)])}  # two pictures may be the same
    folder = Path(folder) / digest(key).hex()
    read_pieces(folder, place, found, seen)
    while missing := [name for name in place if name not in found]:
        start = random.SystemRandom().randrange(len(missing))  # away from the others
        with claim(folder, missing[start:] + missing[:start], size) as mine:
            read_pieces(folder, place, found, seen)  # what others have finished by now
            mine = sorted((name for name in mine if name not in found), key=place.get)
            if mine:
                rows, end = [], time.monotonic() + SECONDS
                for some in compute([place[name] for name in mine], len(missing)):
                    rows.append(some)
                    if time.monotonic() > end:
                        break
                rows = torch.cat(rows)
                held = torch.tensor([[*name] for name in mine[:len(rows)]], dtype=torch.uint8)
                piece = {"names": held, "rows": rows}
                write_whole(folder / f"{checksum(folder, piece)}.safetensors", piece)
                found.update(zip(mine, rows))
        if not mine:
            time.sleep(0.1)  # the others are at all that is left
    return torch.stack([found[name] for name in names])


@contextlib.contextmanager
def claim(folder, names, most):
    """The first `most` names that no other process is at; no other gets them within this context.

    A claim is a lock on one byte of a file: it ends with its process, however that ends, on network
    file systems, too. Where there are no locks every name is free: then work may be done twice."""
    mine = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # who writes to a network folder sees it anew
        file = open(folder / "claims", "ab")
    except OSError as error:
        raise Problem(f"cannot write to {folder} ({error.strerror}): "
                      "--cache DIR keeps features elsewhere") from None
    with file:
        for name in names:
            if len(mine) == most:
                break
            try:
                if fcntl:
                    byte = int.from_bytes(name[:5], "big")
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                mine.append(name)
            except (BlockingIOError, PermissionError):  # it is another's
                pass
            except OSError:  # there are no locks here
                mine.append(name)
        yield mine


def read_pieces(folder, names, found, seen):
    """Adds the rows of those names to `found`, {name: row}, from pieces that are not in `seen`.

    A damaged piece is deleted."""
    for file in set(folder.glob("*.safetensors")) - seen:
        seen.add(file)
        try:
            with safe_open(file, "pt") as piece:
                held = [bytes(name) for name in piece.get_tensor("names").numpy()]
            if any(name in names for name in held):
                piece = load(file.read_bytes())
                if file.stem != checksum(folder, piece):
                    raise SafetensorError("damaged")
                found.update(pair for pair in zip(held, piece["rows"]) if pair[0] in names)
        except (OSError, MemoryError):  # cleared by somebody, or not to be read just now
            pass
        except Exception:  # damage can look like anything
            with contextlib.suppress(OSError):
                file.unlink()


def checksum(folder, piece):
    """Of all that a piece says, and of the folder where it belongs."""
    parts = [(tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy())
             for tensor in (piece["names"], piece["rows"])]
    return digest(folder.name, *parts[0], *parts[1]).hex()


def content_digests(paths, folder):
    """A digest of every picture's content. Raises Problem at one that is missing or no plain file.

    To read 50,000 pictures takes minutes: the digests are kept in `folder`, too, by the pictures'
    places, sizes and times."""
    resolved, states = functools.cache(os.path.realpath), []
    for path in paths:
        status, (parent, name) = file_status(path), os.path.split(path)
        times = status.st_mtime_ns, status.st_ctime_ns
        states.append((resolved(parent), name, status.st_size, *times))

    def compute(places, missing):
        with ThreadPoolExecutor(8) as pool:  # a network folder answers several at once
            digests = pool.map(lambda i: digest(Path(paths[i]).read_bytes()), places)
            yield torch.tensor([[*content] for content in digests], dtype=torch.uint8)

    rows = cached(folder, "contents of pictures", states, compute, 4096)
    return [bytes(row) for row in rows.numpy()]


def write_whole(file, tensors, metadata=None):
    """A safetensors file that appears whole or not at all, whoever else reads or writes it.

    Raises Problem where it cannot be written."""
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=Path(file).parent)
    os.close(handle)
    try:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except (SafetensorError, OSError) as error:  # the first is how safetensors says: disk full
        os.unlink(temporary)
        why = getattr(error, "strerror", None) or error
        raise Problem(f"cannot write {file}: {why}") from None
    except BaseException:
        os.unlink(temporary)
        raise
