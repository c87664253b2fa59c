"""Image files to pixels, the cache of image features, and safetensors files that appear whole."""

import functools
import io
import os
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from data.errors import Problem

SECONDS = 3     # of work that a killed run loses at most


# ---------------------------------------------------------------- pixels

def rgb(image, own=False):
    """Convert a PIL image to 8-bit RGB. Raises ValueError for 16-bit and float grey.

    own  apply the EXIF orientation, and put transparent images on white"""
    if image.mode[0] in "IF":                               # Pillow would clip its values
        raise ValueError("grey of 16 bits or floats: convert it to 8 bits")
    if own:
        image = ImageOps.exif_transpose(image)
        if image.mode[-1] in "Aa" or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path, own=False):
    """Return an image file's content and its RGB image. Raises Problem if it cannot be read."""
    try:
        content = Path(path).read_bytes()
        return content, rgb(Image.open(io.BytesIO(content)), own)
    except UnidentifiedImageError:
        why = "not in a format that Pillow reads"
    except Exception as error:                              # Pillow's decoders raise anything
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise Problem(f"cannot read image {path} ({why}): mend it or take it away")


def read_rows(rows, transform, own):
    """Return uint8 (n, 3, H, W) of rows (path, view), or the Problem with one of their images.

    The random numbers of a view come from the file's content and the view's number: a view is the
    same in every run. A Problem raised in a worker would arrive inside a traceback."""
    last, pixels = None, []
    try:
        for path, view in rows:
            if path != last:
                last, (content, image) = path, read_image(path, own)
            with torch.random.fork_rng(devices=[]):         # seeds the CPU's generator only
                torch.default_generator.manual_seed(zlib.crc32(b"%d" % view, zlib.crc32(content)))
                pixels.append(transform(image))
    except Problem as problem:
        return problem
    return torch.stack(pixels)


def count_workers():
    """Return this process's share of the cores it may use, at most 16; torchrun starts several."""
    affinity = getattr(os, "sched_getaffinity", None)       # missing on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def load_pixels(rows, transform, batch_size, device, own=False, workers=None):
    """Yield uint8 batches (batch_size, 3, H, W) on the device; the last one may be smaller.

    rows       (path of an image, number of a view) each; 0 for a plain image
    transform  PIL image -> uint8 (3, H, W)
    own        see `rgb`
    workers    processes that read; by default none on the CPU, `count_workers()` on CUDA
    Raises Problem at an image that cannot be read."""
    cuda = str(device).startswith("cuda")
    workers = count_workers() if cuda and workers is None else workers or 0
    # Workers send few rows at a time: a container's /dev/shm has 64 MB, and two chunks per worker
    # pass through it, in all at most 96 rows, 14 MB at 224 pixels and 58 MB at 448.
    size = max(1, 96 // (2 * workers)) if workers else batch_size
    batches = [rows[k:k + batch_size] for k in range(0, len(rows), batch_size)]
    chunks = [batch[k:k + size] for batch in batches for k in range(0, len(batch), size)]
    workers = min(workers, len(chunks))
    read = functools.partial(read_rows, transform=transform, own=own)
    loader = DataLoader(
        chunks, batch_size=None, collate_fn=read, num_workers=workers, pin_memory=cuda,
        multiprocessing_context="fork" if workers and hasattr(os, "fork") else None,
        generator=torch.Generator())                        # leaves the global generator alone
    held = []
    for pixels in loader:
        if isinstance(pixels, Problem):
            raise pixels
        held.append(pixels.to(device, non_blocking=True))
        if sum(map(len, held)) == batch_size:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def normalize(pixels, mean, std):
    """Return float (n, 3, H, W) of uint8 pixels, as ToTensor and Normalize do to the bit.

    mean, std  three numbers each"""
    top = torch.full((), 255.0, device=pixels.device)   # CUDA multiplies by a number's reciprocal
    mean, std = (torch.as_tensor(values, dtype=torch.float32).view(3, 1, 1)
                 .to(pixels.device, non_blocking=True) for values in (mean, std))
    return pixels.float().div_(top).sub_(mean).div_(std)


# ---------------------------------------------------------------- digests

def digest(value):
    """Return 32 hexadecimal digits that stand for a value that repr shows whole."""
    return blake2b(repr(value).encode(), digest_size=16).hexdigest()


def tensor_digest(tensors):
    """Return a hex digest of {name: tensor}: names, dtypes, shapes and bytes, in name order."""
    whole = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        whole.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy())      # NumPy lacks bfloat16
    return whole.hexdigest()


def digest_files(paths, folder):
    """Return a 16-byte digest of each image's content. Raises Problem if one cannot be read.

    Reading 50,000 images takes minutes, so the digests are kept in `folder` (None: they are not)
    by the images' paths, sizes and times."""
    def read(state):
        return blake2b(Path(files[state]).read_bytes(), digest_size=16).digest()

    states = []
    try:
        for path in paths:
            now = os.stat(path)
            states.append((*os.path.split(path), now.st_size, now.st_mtime_ns, now.st_ctime_ns))
        files = dict(zip(states, paths))
        store = Store(folder, "contents of images", states)
        with ThreadPoolExecutor(8) as pool:
            for content in pool.map(read, store.missing):
                store.add(torch.tensor([[*content]], dtype=torch.uint8))
    except OSError as error:
        raise Problem(f"cannot read image {error.filename} ({error.strerror}): mend it or take it "
                      "away") from None
    return [bytes(row) for row in store.rows().numpy()]


# ---------------------------------------------------------------- files of tensors

class Store:
    """Rows of tensors by name, kept below a folder in pieces, so that a killed run goes on.

    A piece is a safetensors file of a few seconds' work, rows (n, ...) and the digests of their n
    names. It is named by a checksum, appears whole and never changes; a damaged one counts as
    missing. Two cold runs at the same moment both compute what they need. An exception loses
    SECONDS of work at most, like a kill: `rows` writes what is still waiting.

    folder  None: nothing is kept or found
    key     everything that the rows depend on except their names; anything that repr shows whole
    names   of the rows that are wanted; `missing` are those that have to be added, in this order"""

    def __init__(self, folder, key, names):
        self.folder = Path(folder) / digest(key) if folder else None
        self.names, self.found, self.waiting = names, {}, []
        self.find({digest(name): name for name in names})
        self.missing = [name for name in dict.fromkeys(names) if name not in self.found]
        self.todo = iter(self.missing)
        self.due = time.monotonic() + SECONDS

    def find(self, wanted):
        """Read the rows that are kept, wanted {digest: name}."""
        for file in self.folder.glob("*.safetensors") if self.folder else []:
            try:
                with safe_open(file, "pt") as piece:
                    held = piece.metadata()["names"].split()
                    if wanted.keys().isdisjoint(held):
                        continue
                    rows = piece.get_tensor("rows")
            except Exception:               # damaged in some way, or deleted a moment ago
                continue
            if file.stem == self.checksum(held, rows):
                self.found.update(
                    (wanted[name], row) for name, row in zip(held, rows) if name in wanted)

    def add(self, rows):
        """Add the rows (n, ...) of the next n missing names. Raises Problem: cannot be written."""
        self.waiting.append(rows)
        if time.monotonic() > self.due:
            self.write()

    def write(self):
        """Write the rows that are waiting, as a piece."""
        if not self.waiting:
            return
        rows = torch.cat(self.waiting).cpu()
        names = list(islice(self.todo, len(rows)))
        self.found.update(zip(names, rows))
        self.waiting, held = [], [digest(name) for name in names]
        if self.folder:
            file = self.folder / f"{self.checksum(held, rows)}.safetensors"
            try:
                write_whole(file, {"rows": rows}, {"names": " ".join(held)})
            except Problem as problem:
                raise Problem(f"{problem}: --cache DIR keeps features elsewhere") from None
        self.due = time.monotonic() + SECONDS

    def rows(self):
        """Write the last rows; return those of all names, in their order, (N, ...)."""
        self.write()
        rows = [self.found[name] for name in self.names]
        return torch.stack(rows) if rows else torch.empty(0)

    def checksum(self, names, rows):
        """Return a digest of a piece's content and of the folder it belongs to."""
        return digest((self.folder.name, names, tensor_digest({"rows": rows})))


def write_whole(file, tensors, metadata=None):
    """Write a safetensors file that appears whole or not at all, and its folder if missing.

    Raises Problem if that is impossible."""
    part = Path(file).with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, part, metadata)
            part.chmod(0o644)                               # safetensors lets only its owner read
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:             # the second when the disk is full
        why = getattr(error, "strerror", None) or error
        raise Problem(f"cannot write {file} ({why})") from None
