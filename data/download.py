"""Downloads of images and split files: resumed, verified, whole, by one process at a time."""

import hashlib
import shutil
import ssl
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from data.errors import Problem

DRIVE = "https://drive.google.com/uc?export=download&id="
BLOCK = 1 << 20     # bytes


def provide_images(name, spec, root):
    """Return the folder of a data set's images; download it if it or classnames.txt is missing.

    Raises Problem: no address, no connection, wrong content, or a part of it is there already."""
    if not is_complete(spec, root):
        try:
            if "archive" not in spec:
                raise Problem("images or class names are missing, and no script can download them")
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):
                if not is_complete(spec, root):         # else another process has just finished
                    download_images(name, spec, root)
        except Problem as problem:
            raise missing(name, spec, root, problem) from None
    return root / spec["images"]


def download_images(name, spec, root):
    """Download and unpack the archive of a data set. Raises Problem as `provide_images` does."""
    url, place = spec["archive"]["url"], root / spec["archive"].get("place", spec["images"])
    if is_filled(place):
        raise Problem(f"{place} is incomplete: complete it, or move it away to download it anew")
    file = root / f"{name}-{url.rsplit('/', 1)[1]}"
    if not file.exists():                   # else an earlier run had no space to unpack it
        print(f"{name}: downloading {url} to {root}, then the split file and CLIP's weights if "
              "they are missing", flush=True)
        fetch(url, file, spec["archive"].get("md5"))
    try:
        unpack(file, spec["archive"]["take"], place)
    except Problem:
        file.unlink()                       # the next download may be a better one
        raise
    file.unlink()


def provide_split(name, spec, root, check):
    """Download a data set's split file if it is missing. Raises Problem if that is impossible."""
    file = root / spec["split"]
    if not file.exists():
        with FileLock(root / f".{name}.lock"):
            if not file.exists():
                fetch(DRIVE + spec["drive"], file, check=check)


def missing(name, spec, root, why):
    """Return the Problem with a data set that is not there: why, what belongs where, a way out."""
    files = [str(root / spec[key]) for key in ("images", "names", "split") if key in spec]
    return Problem(f"{name}: {why}. Expected: {' and '.join(files)} (data/README.md; --data-root "
                   "DIR takes another folder). `python prograd.py` needs no download.")


def is_complete(spec, root):
    """Return whether a data set's images and class names are there."""
    return all(is_filled(root / spec[key]) for key in ("images", "names") if key in spec)


def is_filled(path):
    """Return whether a path is a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def fetch(url, path, md5=None, check=None):
    """Download to path.part, verify, rename to `path`; continue where an earlier run stopped.

    check  function of the downloaded file that raises Problem if its content is wrong
    Raises Problem: no connection, a broken connection, wrong content."""
    part, version = path.with_name(path.name + ".part"), path.with_name(path.name + ".version")
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = version.read_text() if version.exists() else ""
    have = part.stat().st_size if tag and part.exists() else 0
    headers = {"User-Agent": "python"}
    if have:                                # a server whose file has changed sends all of it
        headers.update({"Range": f"bytes={have}-", "If-Range": tag})
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            receive(answer, part, version, have)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:   # 416: all of it is there already
            raise Problem(f"cannot download {url} ({error})") from None
    except urllib.error.URLError as error:
        raise Problem(f"cannot download {url} ({error.reason})") from None
    except (HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise Problem(f"the connection to {url} broke ({error or type(error).__name__}): "
                      "run again to go on from there") from None
    try:
        if check:
            check(part)
        if md5 and md5_of(part) != md5:
            raise Problem("wrong checksum")
    except Problem as problem:
        part.unlink()
        version.unlink(missing_ok=True)
        raise Problem(f"{url} is not the file that was expected ({problem})") from None
    part.replace(path)
    version.unlink(missing_ok=True)


def receive(answer, part, version, have):
    """Write an HTTP answer to `part`, after its first `have` bytes if the answer is the rest.

    The file `version` keeps what tells this version of the content from others."""
    have = have if answer.status == 206 else 0
    total = have + answer.length if answer.length else None
    bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None)
    with open(part, "ab" if have else "wb") as out, bar:
        tag = answer.headers.get("ETag", "W/")          # W/: a weak one, of no use here
        version.write_text(answer.headers.get("Last-Modified", "") if tag[:2] == "W/" else tag)
        while block := answer.read(BLOCK):
            out.write(block)
            bar.update(len(block))
    if total and part.stat().st_size < total:
        raise ConnectionError(f"after {part.stat().st_size} of {total} bytes")


def md5_of(file):
    """Return the MD5 checksum of a file."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest()


def unpack(file, take, place):
    """Unpack an archive and move what `take` names in it to `place`, in one step.

    take  a path inside the archive; if that is an archive, the next one is a path inside it"""
    work = place.with_name(f".{place.name}-unfinished")
    shutil.rmtree(work, ignore_errors=True)             # left by a killed run
    try:
        for depth, inner in enumerate(take):
            unpack_all(file, work / str(depth))
            file = work / str(depth) / inner
            if not file.exists():
                raise Problem(f"the archive holds no {inner}")
        file.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def unpack_all(file, folder):
    """Unpack a zip or tar archive of plain files and folders below `folder`; else raise Problem."""
    folder.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    kind = stat.S_IFMT(member.external_attr >> 16)
                    check_member(folder, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                archive.extractall(folder)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter=filter_member)
                while archive.fileobj.read(BLOCK):      # gzip's checksum stands at the end
                    pass
    except Problem:
        raise
    except Exception as error:                          # zlib.error, LZMAError, RuntimeError, ...
        if getattr(error, "errno", None):               # the disk is at fault
            raise
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise Problem(f"{file.name}: not an archive that can be unpacked ({cause})") from None


def filter_member(member, folder):
    """Return a tar member that may be unpacked, without its owner and special permissions."""
    check_member(folder, member.name, member.isreg() or member.isdir())
    return tarfile.data_filter(member, folder)


def check_member(folder, name, plain):
    """Raise Problem unless a member is a plain file or folder that lands below `folder`.

    No data set needs links, and with links an archive can write anywhere (CVE-2025-4517)."""
    if not plain:
        raise Problem(f"the archive is refused: {name!r} is neither a file nor a folder")
    if not (Path(folder) / name).resolve().is_relative_to(Path(folder).resolve()):
        raise Problem(f"the archive is refused: {name!r} would land outside its folder")
