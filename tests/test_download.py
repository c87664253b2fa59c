"""Downloads from a local server, and archives."""

import hashlib
import http.server
import io
import json
import os
import resource
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from data import download
from data.errors import Problem
from data.load import CATALOGUE, load_data

SPLIT = {"train": [["a/0.jpg", 0, "a"], ["b/0.jpg", 1, "b"]], "val": [],
         "test": [["a/1.jpg", 0, "a"], ["b/1.jpg", 1, "b"]]}


class Server(http.server.BaseHTTPRequestHandler):
    """Serve content[path]; break off each of the first `cuts` answers after half of it."""
    content, cuts, asked, validator = {}, 0, [], "ETag"

    def do_GET(self):
        body = self.content.get(self.path)
        tag = f'"{hashlib.md5(body or b"").hexdigest()}"'
        start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        if self.headers.get("If-Range", tag) != tag:
            start = 0
        self.asked.append((self.path, start))
        if body is None or start >= len(body):
            self.send_error(404 if body is None else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header(self.validator, tag)
        self.end_headers()
        half = len(body) - start if self.cuts <= 0 else (len(body) - start) // 2
        type(self).cuts -= 1
        self.wfile.write(body[start:start + half])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server in the place of EuroSAT's and Google Drive's addresses, with an archive on it."""
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    Server.content, Server.cuts, Server.asked, Server.validator = {}, 0, [], "ETag"
    address = f"http://127.0.0.1:{serving.server_address[1]}"
    monkeypatch.setattr(download, "DRIVE", f"{address}/drive/")
    monkeypatch.setitem(CATALOGUE, "eurosat", json.loads(json.dumps(CATALOGUE["eurosat"])))
    CATALOGUE["eurosat"].update(counts=[2, 0, 2])
    CATALOGUE["eurosat"]["archive"]["url"] = f"{address}/eurosat.zip"
    publish(make_zip(images(2)))
    Server.content["/drive/" + CATALOGUE["eurosat"]["drive"]] = json.dumps(SPLIT).encode()
    yield Server
    serving.shutdown()
    serving.server_close()


def publish(archive):
    """Put EuroSAT's archive on the server."""
    Server.content["/eurosat.zip"] = archive
    CATALOGUE["eurosat"]["archive"]["md5"] = hashlib.md5(archive).hexdigest()


def images(count):
    """The files of EuroSAT with two classes: {path: content}."""
    return {f"2750/{name}/{number}.jpg": f"{name}{number}" * 99
            for name in "ab" for number in range(count)}


def make_zip(contents, mode=0o100644, method=zipfile.ZIP_STORED):
    """The bytes of a zip archive of {path: content}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for path, content in contents.items():
            info = zipfile.ZipInfo(path)
            info.external_attr, info.compress_type = mode << 16, method
            archive.writestr(info, content)
    return buffer.getvalue()


def left_in(folder):
    """What is in a folder beside locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def refuse(root, *words):
    """Loading EuroSAT ends in a Problem with all of these words."""
    with pytest.raises(Problem) as problem:
        load_data("eurosat", root)
    assert all(word in str(problem.value) for word in words), problem.value


# ---------------------------------------------------------------- downloads

def test_a_data_set_is_downloaded_verified_and_unpacked_once(server, tmp_path, capsys):
    data = load_data("eurosat", tmp_path / "root")
    assert data.train[1].path.is_file() and data.origin == "published split" and not data.note
    assert "eurosat.zip" in capsys.readouterr().out
    assert load_data("eurosat", tmp_path / "root") == data and len(server.asked) == 2
    assert left_in(tmp_path / "root") == ["eurosat"]
    assert left_in(tmp_path / "root/eurosat") == ["2750", "split_zhou_EuroSAT.json"]


def test_several_processes_download_once(server, tmp_path):
    code = """if True:
        import json, sys
        from data import download, load
        download.DRIVE = sys.argv[2]
        load.CATALOGUE["eurosat"] = json.loads(sys.argv[3])
        print(load.load_data("eurosat", sys.argv[1]).origin)"""
    argv = [sys.executable, "-c", code, tmp_path, download.DRIVE, json.dumps(CATALOGUE["eurosat"])]
    runs = [subprocess.Popen(argv, cwd=Path(download.__file__).parent.parent, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for run in runs:
        out, err = run.communicate()
        assert out.endswith("published split\n"), err
    assert len(server.asked) == 2


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.cuts, half = 1, len(server.content["/eurosat.zip"]) // 2
    refuse(tmp_path, "broke", "run again to go on from there")
    assert not (tmp_path / "eurosat").exists()
    assert load_data("eurosat", tmp_path).test
    assert server.asked[:2] == [("/eurosat.zip", 0), ("/eurosat.zip", half)]
    assert left_in(tmp_path) == ["eurosat"]


def test_a_broken_download_starts_again_where_its_source_has_changed(server, tmp_path):
    server.cuts = 1
    refuse(tmp_path, "run again")
    publish(make_zip(images(3)))
    load_data("eurosat", tmp_path)
    assert server.asked[:2] == [("/eurosat.zip", 0), ("/eurosat.zip", 0)]
    assert (tmp_path / "eurosat/2750/b/2.jpg").is_file()


def test_a_broken_download_starts_again_where_nothing_tells_its_version(server, tmp_path):
    server.cuts, server.validator = 1, "X-None"
    refuse(tmp_path, "run again")
    load_data("eurosat", tmp_path)
    assert server.asked[:2] == [("/eurosat.zip", 0), ("/eurosat.zip", 0)]


def test_a_download_that_was_killed_before_its_last_step_is_finished(server, tmp_path):
    whole = server.content["/eurosat.zip"]
    (tmp_path / "eurosat-eurosat.zip.part").write_bytes(whole)
    (tmp_path / "eurosat-eurosat.zip.version").write_text(f'"{hashlib.md5(whole).hexdigest()}"')
    assert load_data("eurosat", tmp_path).test
    assert server.asked[0] == ("/eurosat.zip", len(whole)) and left_in(tmp_path) == ["eurosat"]


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    server.content["/eurosat.zip"] += b"tampered"
    refuse(tmp_path, "wrong checksum")
    assert not left_in(tmp_path)


@pytest.mark.parametrize("url, cause", [("http://127.0.0.1:9/EuroSAT.zip", "Connection refused"),
                                        (None, "404")])
def test_a_failed_download_says_why_what_belongs_where_and_what_works(server, tmp_path, url, cause):
    server.content.clear()
    CATALOGUE["eurosat"]["archive"]["url"] = url or CATALOGUE["eurosat"]["archive"]["url"]
    refuse(tmp_path, cause, "eurosat/2750", "eurosat/split_zhou_EuroSAT.json", "--data-root",
           "`python prograd.py` needs no download")


def test_an_incomplete_folder_is_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("downloaded"))
    (tmp_path / "fgvc_aircraft/images").mkdir(parents=True)
    (tmp_path / "fgvc_aircraft/variants.txt").write_text("747\n")
    with pytest.raises(Problem, match="fgvc_aircraft is incomplete"):
        load_data("fgvc_aircraft", tmp_path)


def test_without_the_split_file_a_seeded_split_is_made_and_said(server, tmp_path):
    del server.content["/drive/" + CATALOGUE["eurosat"]["drive"]]
    data = load_data("eurosat", tmp_path)
    assert data.origin == "seeded 50/20/30 split" and "NOT the papers' split" in data.note


def test_a_seeded_split_of_incomplete_images_is_refused(server, tmp_path):
    del server.content["/drive/" + CATALOGUE["eurosat"]["drive"]]
    CATALOGUE["eurosat"]["counts"] = [3, 0, 3]
    refuse(tmp_path, "has 4 images of 6")


def test_a_page_in_the_place_of_a_split_file_is_not_kept(server, tmp_path):
    server.content["/drive/" + CATALOGUE["eurosat"]["drive"]] = b"<html>too many downloads</html>"
    assert "not a split file" in load_data("eurosat", tmp_path).note
    assert left_in(tmp_path / "eurosat") == ["2750"]


def test_a_full_disk_leaves_a_part_to_go_on_from(server, tmp_path):
    half = len(server.content["/eurosat.zip"]) // 2
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, limit[1]))
    try:
        refuse(tmp_path, "File too large; --data-root DIR")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert load_data("eurosat", tmp_path).test
    assert server.asked[1] == ("/eurosat.zip", half)


def test_no_space_to_unpack_leaves_the_archive(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", full)
        refuse(tmp_path, "No space left on device; --data-root DIR")
    assert left_in(tmp_path) == ["eurosat", "eurosat-eurosat.zip"]
    assert not left_in(tmp_path / "eurosat")
    load_data("eurosat", tmp_path)
    assert [path for path, _ in server.asked].count("/eurosat.zip") == 1


# ---------------------------------------------------------------- archives

def refuse_archive(tmp_path, content, *words):
    """Unpacking ends in a Problem with these words, and leaves nothing inside or outside."""
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "deep").mkdir()
    with pytest.raises(Problem) as problem:
        download.unpack(tmp_path / "a", ["images"], tmp_path / "deep/images")
    assert all(word in str(problem.value) for word in words), problem.value
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "deep"]


def make_tar(*members, mode="w", content=b""):
    """The bytes of a tar archive of members (name, type, target of a link)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_tar_archive_of_anything_but_files_and_folders_is_refused(tmp_path, kind):
    refuse_archive(tmp_path, make_tar(("images/a", kind, "images")), "neither a file nor a folder")


def test_a_zip_archive_with_a_link_is_refused(tmp_path):
    content = make_zip({"images": "/etc"}, mode=stat.S_IFLNK | 0o777)
    refuse_archive(tmp_path, content, "neither a file nor a folder")


@pytest.mark.parametrize("content", [make_zip({"../../evil": ""}),
                                     make_tar(("../../evil", tarfile.REGTYPE, "")),
                                     make_tar((os.path.abspath("evil"), tarfile.REGTYPE, ""))])
def test_members_that_would_land_outside_are_refused(tmp_path, content):
    refuse_archive(tmp_path, content, "would land outside")


def test_an_archive_of_something_else_is_refused(tmp_path):
    refuse_archive(tmp_path, make_zip({"pictures/a": ""}), "holds no images")


NOISE = bytes(range(256)) * 40


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_damaged_tar_archive_is_refused(tmp_path, mode):
    content = make_tar(("images", tarfile.REGTYPE, ""), mode=mode, content=NOISE)
    refuse_archive(tmp_path, content[:len(NOISE) // 64], "not an archive that can be unpacked (")


def test_a_damaged_zip_archive_is_refused(tmp_path):
    content = bytearray(make_zip({"images": NOISE}, method=zipfile.ZIP_DEFLATED))
    content[36:56] = b"\xff" * 20
    refuse_archive(tmp_path, content, "not an archive that can be unpacked (")


def test_an_archive_inside_an_archive_is_unpacked(tmp_path):
    inner = make_tar(("101_ObjectCategories/face/1.jpg", tarfile.REGTYPE, ""), mode="w:gz")
    outer = make_zip({"caltech-101/101_ObjectCategories.tar.gz": inner})
    (tmp_path / "a.zip").write_bytes(outer)
    (tmp_path / "out/.images-unfinished/0").mkdir(parents=True)         # left by a killed run
    (tmp_path / "out/images").mkdir()                                   # empty
    take = CATALOGUE["caltech101"]["archive"]["take"]
    download.unpack(tmp_path / "a.zip", take, tmp_path / "out/images")
    assert left_in(tmp_path / "out/images/face") == ["1.jpg"]
    assert left_in(tmp_path / "out") == ["images"]
