"""Downloads of images and split files: resumed, verified, whole, by one process at a time."""

import hashlib
import shutil
import ssl
import tarfile
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException

from filelock import FileLock
from tqdm import tqdm

from data.errors import Problem

DRIVE = "https://drive.google.com/uc?export=download&id="
BLOCK = 1 << 20     # bytes


def provide(name, spec, root, check=None):
    """Return the folder of a data set's images; download what is missing of it.

    check  see `fetch`: of the split file
    Raises Problem: no address, no connection, wrong content, or a part of it is there already."""
    try:
        if find_missing(spec, root):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):
                left = find_missing(spec, root)         # another process may just have finished
                if "images" in left or "names" in left:
                    download_images(name, spec, root)
                if "split" in left:
                    fetch(DRIVE + spec["drive"], root / spec["split"], check=check)
    except Problem as problem:
        files = [str(root / spec[key]) for key in ("images", "names", "split") if key in spec]
        raise Problem(f"{name}: {problem}. Expected: {' and '.join(files)} (data/README.md; "
                      "--data-root DIR takes another folder). `python prograd.py` needs no "
                      "download.") from None
    return root / spec["images"]


def find_missing(spec, root):
    """Return which are missing of a data set's "images", class "names" and "split" file."""
    return [key for key in ("images", "names", "split")
            if key in spec and not is_filled(root / spec[key])]


def is_filled(path):
    """Return whether a path is a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def download_images(name, spec, root):
    """Download and unpack the archive of a data set. Raises Problem as `provide` does."""
    if "archive" not in spec:
        raise Problem("images or class names are missing, and no script can download them")
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


def fetch(url, path, md5=None, check=None):
    """Download to path.part, verify, rename to `path`; continue where an earlier run stopped.

    check  function of the downloaded file that raises Problem if its content is wrong
    Raises Problem: no connection, a broken connection, wrong content."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "python"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            receive(answer, part, have)
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
        raise Problem(f"{url} is not the file that was expected ({problem})") from None
    part.replace(path)


def receive(answer, part, have):
    """Write an HTTP answer to `part`, after its first `have` bytes if the answer is the rest."""
    have = have if answer.status == 206 else 0
    total = have + answer.length if answer.length else None
    bar = tqdm.wrapattr(answer, "read", total, desc=part.stem, initial=have, disable=None)
    with open(part, "ab" if have else "wb") as out, bar as source:
        shutil.copyfileobj(source, out, BLOCK)
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
    """Unpack a zip or tar archive below `folder`; raise Problem if it is damaged or holds links.

    zipfile drops ".." and "/" from names and writes no links; filter_member does so for tar."""
    folder.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter=filter_member)
                while archive.fileobj.read(BLOCK):      # gzip's checksum stands at the end
                    pass
    except Exception as error:                          # zlib.error, LZMAError, RuntimeError, ...
        if getattr(error, "errno", None):               # the disk is at fault
            raise
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise Problem(f"{file.name}: not an archive that can be unpacked ({cause})") from None


def filter_member(member, folder):
    """Return a tar member that may be unpacked; raise FilterError for a link, or outside.

    No data set needs links, and with links an archive can write anywhere (CVE-2025-4517)."""
    if member.issym() or member.islnk():
        raise tarfile.FilterError(f"{member.name!r} is a link")
    return tarfile.data_filter(member, folder)
