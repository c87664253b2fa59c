"""Downloads from a local server, and archives."""

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_load import refuse

from data import download
from data.errors import Problem
from data.load import CATALOGUE, load_data

SPLIT = {"train": [["a/0.jpg", 0, "a"], ["b/0.jpg", 1, "b"]], "val": [],
         "test": [["a/1.jpg", 0, "a"], ["b/1.jpg", 1, "b"]]}


class Server(http.server.BaseHTTPRequestHandler):
    """Serve content[path]; break off the first answer after half of it where `cut` is set."""

    def do_GET(self):
        body = self.content.get(self.path)
        if body is None:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        self.asked.append((self.path, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:len(body) // 2 if self.cut else None])
        type(self).cut = False

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server in the place of EuroSAT's and Google Drive's addresses, with an archive on it."""
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    Server.cut, Server.asked = False, []
    address = f"http://127.0.0.1:{serving.server_address[1]}"
    monkeypatch.setattr(download, "DRIVE", f"{address}/drive/")
    monkeypatch.setitem(CATALOGUE, "eurosat", json.loads(json.dumps(CATALOGUE["eurosat"])))
    CATALOGUE["eurosat"].update(counts=[2, 0, 2], drive="split")
    CATALOGUE["eurosat"]["archive"]["url"] = f"{address}/eurosat.zip"
    Server.content = {"/drive/split": json.dumps(SPLIT).encode()}
    publish(2)
    yield Server
    serving.shutdown()
    serving.server_close()


def publish(count):
    """Put EuroSAT's archive on the server, with so many images of two classes."""
    archive = make_zip({f"2750/{name}/{number}.jpg": f"{name}{number}" * 99
                        for name in "ab" for number in range(count)})
    Server.content["/eurosat.zip"] = archive
    CATALOGUE["eurosat"]["archive"]["md5"] = hashlib.md5(archive).hexdigest()


def make_zip(contents):
    """The bytes of a zip archive of {path: content}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in contents.items():
            archive.writestr(path, content)
    return buffer.getvalue()


def make_tar(name, kind=tarfile.REGTYPE, target="", mode="w"):
    """The bytes of a tar archive of one empty file, or of a link to `target`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return buffer.getvalue()


def left_in(folder):
    """What is in a folder beside locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# ---------------------------------------------------------------- downloads

def test_several_runs_at_once_download_verify_and_unpack_once(server, tmp_path, capsys):
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(load_data, ["eurosat"] * 3, [tmp_path / "root"] * 3)
    assert others == [first, first] and len(server.asked) == 2
    assert first.train[1].path.is_file() and first.origin == "published split" and not first.note
    assert "eurosat.zip" in capsys.readouterr().out
    assert left_in(tmp_path / "root") == ["eurosat"]
    assert left_in(tmp_path / "root/eurosat") == ["2750", "split_zhou_EuroSAT.json"]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.cut, half = True, len(server.content["/eurosat.zip"]) // 2
    refuse("eurosat", tmp_path, "broke", "run again to go on from there")
    assert not (tmp_path / "eurosat").exists()
    assert load_data("eurosat", tmp_path).test
    assert server.asked[:2] == [("/eurosat.zip", 0), ("/eurosat.zip", half)]
    assert left_in(tmp_path) == ["eurosat"]


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    server.content["/eurosat.zip"] += b"tampered"
    refuse("eurosat", tmp_path, "wrong checksum")
    assert not left_in(tmp_path)


def test_a_failed_download_says_why_what_belongs_where_and_what_works(server, tmp_path):
    server.content.clear()
    refuse("eurosat", tmp_path, "404", "eurosat/2750", "eurosat/split_zhou_EuroSAT.json",
           "--data-root", "`python prograd.py` needs no download")


def test_an_incomplete_folder_is_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("downloaded"))
    (tmp_path / "fgvc_aircraft/images").mkdir(parents=True)
    (tmp_path / "fgvc_aircraft/variants.txt").write_text("747\n")
    with pytest.raises(Problem, match="fgvc_aircraft is incomplete"):
        load_data("fgvc_aircraft", tmp_path)


def test_what_is_no_split_file_is_not_kept(server, tmp_path):
    server.content["/drive/split"] = b"<html>too many downloads</html>"
    refuse("eurosat", tmp_path, "not the file that was expected", "eurosat/split_zhou_EuroSAT.json")
    assert left_in(tmp_path / "eurosat") == ["2750"]


# ---------------------------------------------------------------- archives

@pytest.mark.parametrize("content, words", [
    (make_tar("images/a", tarfile.SYMTYPE, "images"), "'images/a' is a link"),
    (make_tar("images/a", tarfile.LNKTYPE, "images"), "'images/a' is a link"),
    (make_tar("images/a", tarfile.FIFOTYPE), "is a special file"),
    (make_tar("../../evil"), "outside the destination"),
    (make_tar(os.path.abspath("evil")), "holds no images"),             # it landed inside
    (make_zip({"../../evil": ""}), "holds no images"),
    (make_tar("images", mode="w:gz")[:-8] + bytes(8), "not an archive that can be unpacked (CRC")])
def test_archives_that_are_damaged_or_hold_links_or_reach_outside_leave_nothing(
        tmp_path, content, words):
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "deep").mkdir()
    with pytest.raises(Problem) as problem:
        download.unpack(tmp_path / "a", ["images"], tmp_path / "deep/images")
    assert words in str(problem.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "deep"]


def test_an_archive_inside_an_archive_is_unpacked(tmp_path):
    inner = make_tar("101_ObjectCategories/face/1.jpg", mode="w:gz")
    (tmp_path / "a.zip").write_bytes(make_zip({"caltech-101/101_ObjectCategories.tar.gz": inner}))
    (tmp_path / "out/.images-unfinished/0").mkdir(parents=True)         # left by a killed run
    take = CATALOGUE["caltech101"]["archive"]["take"]
    download.unpack(tmp_path / "a.zip", take, tmp_path / "out/images")
    assert left_in(tmp_path / "out/images/face") == ["1.jpg"]
    assert left_in(tmp_path / "out") == ["images"]
