"""Downloads: whole, verified, and by one process at a time."""

import hashlib
import shutil
import stat
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException

from filelock import FileLock
from tqdm import tqdm

from data.errors import Problem, naming

DRIVE = "https://drive.google.com/uc?export=download&id="


def provide(path, lock, make):
    """Calls make() if the path is missing, in one process at a time."""
    if not path.exists():
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not path.exists():
                make()


def provide_images(name, spec, root, check=None):
    """The folder of the pictures; downloads and unpacks it if it is missing and has an address.

    check(folder, counts) raises Problem if the wrong things were unpacked."""
    images, archive = root / spec["images"], spec.get("archive")
    place = f"{images}, the split file at {root / spec['split']}" if "split" in spec else images
    place = f"{place} (--data-root names another folder)"

    def download():
        file = root / f"{name}-{archive['url'].rsplit('/', 1)[1]}"
        if not file.exists():  # else it is whole, and there was no room to unpack it
            print(f"{name}: fetching {archive['url']} into {root}, then what else is missing "
                  "(split file, CLIP's weights); --data-root names another folder", flush=True)
            fetch(archive["url"], file, archive.get("md5"))
        try:
            unpack(file, archive["take"], root / archive.get("place", spec["images"]),
                   check and (lambda folder: check(folder, archive["counts"])))
        except Problem:
            file.unlink()  # with another one it may go better
            raise
        file.unlink()

    if not images.is_dir() and not archive:
        raise Problem(f"{name}: expected the pictures in {place}; they cannot be downloaded by a "
                      "script, see data/README.md")
    try:
        provide(images, root / f".{name}.lock", download)
    except Problem as problem:
        raise Problem(f"{name}: {problem}; or put the pictures yourself in {place}") from None
    return images


def fetch(url, path, md5=None, check=None):
    """Downloads to path.part, goes on where an earlier try stopped, verifies, renames to path.

    Raises Problem: no network, a broken connection, a wrong checksum, or as check(part) does."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        resume = {"Range": f"bytes={have}-"} if have else {}
        request = urllib.request.Request(url, headers={"User-Agent": "python", **resume})
        with urllib.request.urlopen(request, timeout=60) as answer, naming(part):
            have = have if answer.status == 206 else 0
            total = have + (answer.length or 0)  # None where Content-Length is missing or senseless
            bar = tqdm(desc=path.name, total=total or None, initial=have, unit="B", unit_scale=True,
                       disable=None)
            with open(part, "ab" if have else "wb") as out, bar:
                while block := answer.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
        size = part.stat().st_size
        if size < total:
            raise Problem(f"the connection for {url} broke after {size} of {total} bytes: "
                          "run again to go on from there")
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # an earlier try had it all, or it has changed: begin again
            part.unlink()
            return fetch(url, path, md5, check)
        raise Problem(f"cannot download {url} ({error})") from None
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        cause = getattr(error, "reason", None) or error or type(error).__name__
        raise Problem(f"cannot download {url} ({cause}), no network?") from None
    try:
        if check:
            check(part)
        with open(part, "rb") as file:
            found = md5 and hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise Problem(f"wrong checksum {found}, expected {md5}")
    except Problem as problem:
        part.unlink()
        raise Problem(f"{url} did not give the file that it should: {problem}") from None
    part.replace(path)


def unpack(file, take, place, check=None):
    """Unpacks a zip or tar archive and moves what `take` names to `place`, in one step.

    `take` is a path inside the archive; when it is an archive itself, the next element is a path
    inside that one. check(folder) raises Problem if it is not to be moved."""
    work = place.with_name(f".{place.name}-unfinished")
    shutil.rmtree(work, ignore_errors=True)  # a killed run's
    try:
        for k, inner in enumerate(take):
            unpack_all(file, work / str(k))
            file = work / str(k) / inner
            if not file.exists():
                raise Problem(f"the archive holds no {inner}")
        if check:
            check(file)
        file.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def unpack_all(file, folder):
    """Unpacks plain files and folders, each below `folder`; raises Problem at anything else.

    No data set needs links, and through links an archive can write anywhere (CVE-2025-4517)."""
    folder = folder.resolve()
    folder.mkdir(parents=True)

    def refuse_unless(plain, name):
        if not plain:
            raise Problem(f"{file}: refused, since {name!r} is neither a file nor a folder")
        if not (folder / name).resolve().is_relative_to(folder):
            raise Problem(f"{file}: refused, since {name!r} would land outside its folder")

    def plain_member(member, path):
        refuse_unless(member.isreg() or member.isdir(), member.name)
        return tarfile.data_filter(member, path)

    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    kind = stat.S_IFMT(member.external_attr >> 16)
                    refuse_unless(kind in (0, stat.S_IFREG, stat.S_IFDIR), member.filename)
                archive.extractall(folder)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter=plain_member)
                while archive.fileobj.read(1 << 20):  # gzip's checksum stands at the very end
                    pass
    except Problem:
        raise
    except Exception as error:  # zlib.error, LZMAError, RuntimeError, ...: anything
        if getattr(error, "errno", None):  # but this is the disk
            raise
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise Problem(f"{file}: not an archive that can be unpacked ({cause})") from None


def ask_hub_once(seconds=4):
    """Before open_clip fetches weights: if Hugging Face's hub does not answer now, work without it.

    What was downloaded earlier is then taken, and what was not is missed at once, not after twelve
    tries in 50 s. It is a thread that asks, since looking up an address knows no timeout."""
    from huggingface_hub import constants, get_session  # here: half a second that few runs need

    answers = []

    def ask():
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))
        except Exception:  # which one depends on the hub's version
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    constants.HF_HUB_OFFLINE |= not answers
