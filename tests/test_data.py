"""Data sets: downloads from a local server, archives, layouts, splits, names, pictures."""

import hashlib
import http.server
import io
import json
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import EUROSAT, made_up_pictures

import common
from data import download, files, world
from data.checks import check_names, readable
from data.files import CATALOGUE, Problem, known, load_data

HERE = Path(__file__).parent.parent


def python(code, *argv):
    """A process of its own that runs the code in the repository's folder."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def left_in(folder):
    """What lies in a folder beside locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# ------------------------- downloads

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content[path]`; cuts each of the first `cuts` answers after half of it."""
    content, cuts, asked, length = {}, 0, [], None

    def do_GET(self):
        body = self.content.get(self.path)
        start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        self.asked.append((self.path, start))
        if body is None or start >= len(body):
            self.send_error(404 if body is None else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", self.length or str(len(body) - start))
        self.end_headers()
        part = body[start:]
        if self.cuts > 0:
            type(self).cuts -= 1
            part = part[:len(part) // 2]
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Stands in for the addresses of EuroSAT, FGVC Aircraft and the split files."""
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    Server.content, Server.cuts, Server.asked, Server.length = {}, 0, [], None
    Server.address = f"http://127.0.0.1:{http_server.server_address[1]}"
    for name in ("eurosat", "fgvc_aircraft"):
        spec = json.loads(json.dumps(CATALOGUE[name]))
        spec["archive"]["url"] = f"{Server.address}/{name}.zip"
        monkeypatch.setitem(CATALOGUE, name, spec)
    monkeypatch.setattr(files, "DRIVE", f"{Server.address}/drive/")
    yield Server
    http_server.shutdown()
    http_server.server_close()


def publish(server, content, split=None):
    """Puts EuroSAT's archive on the server, and perhaps its split file."""
    server.content["/eurosat.zip"] = content
    CATALOGUE["eurosat"]["archive"]["md5"] = hashlib.md5(content).hexdigest()
    if split:
        server.content["/drive/" + CATALOGUE["eurosat"]["drive"]] = split


def zipped(folder, inside):
    """The bytes of a zip archive of all that is below the folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for path in sorted(folder.rglob("*.*")):
            z.write(path, f"{inside}/{path.relative_to(folder)}")
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path):
    """EuroSAT.zip: 2750/CLASS/CLASS_1.jpg ..."""
    for name in EUROSAT:
        made_up_pictures(tmp_path / "made" / name, 4)
    return zipped(tmp_path / "made", "2750")


SPLIT = b"""{"train": [["Forest/Forest_1.jpg", 0, "Forest"],
                       ["SeaLake/SeaLake_1.jpg", 1, "SeaLake"]],
             "val": [], "test": [["Forest/Forest_2.jpg", 0, "Forest"]]}"""


def test_eurosat_is_downloaded_verified_and_unpacked_once(server, archive, tmp_path):
    publish(server, archive, SPLIT)
    data = load_data("eurosat", tmp_path / "root")
    assert data.classnames == ["Forest", "Sea or Lake"]
    assert data.train[1].path.is_file() and not data.note and data.origin == "published split"
    assert data.template == "a centered satellite photo of {}."
    assert load_data("eurosat", tmp_path / "root") == data and len(server.asked) == 2
    assert left_in(tmp_path / "root") == ["eurosat"]


def test_what_will_be_downloaded_is_said(server, archive, tmp_path, capsys):
    publish(server, archive, SPLIT)
    load_data("eurosat", tmp_path / "root")
    out = capsys.readouterr().out
    for part in ("eurosat.zip", "split file", "CLIP's weights", "--data-root"):
        assert part in out


def test_a_seeded_split_is_said_to_be_one_and_has_an_origin_of_its_own(server, archive, tmp_path):
    publish(server, archive)
    data = load_data("eurosat", tmp_path / "root")
    assert "NOT the papers' split" in data.note and data.origin == "seeded 50/20/30 split"
    assert (data.classnames[0], len(data.train), len(data.test)) == ("Annual Crop Land", 20, 10)


def test_a_page_in_the_place_of_a_split_file_is_not_kept(server, archive, tmp_path):
    publish(server, archive, b"<html>too many downloads</html>")
    assert "did not give the file" in load_data("eurosat", tmp_path / "root").note
    assert left_in(tmp_path / "root/eurosat") == ["2750"]


def test_a_broken_download_goes_on_where_it_stopped(server, archive, tmp_path):
    publish(server, archive)
    server.cuts = 1
    with pytest.raises(Problem, match="run again"):
        load_data("eurosat", tmp_path / "root")
    assert not (tmp_path / "root/eurosat").exists()
    assert load_data("eurosat", tmp_path / "root").test
    assert server.asked[:2] == [("/eurosat.zip", 0), ("/eurosat.zip", len(archive) // 2)]


def test_a_wrong_checksum_leaves_nothing_behind(server, archive, tmp_path):
    publish(server, archive)
    server.content["/eurosat.zip"] = archive[:-9] + b"tampered!"
    with pytest.raises(Problem, match="wrong checksum"):
        load_data("eurosat", tmp_path / "root")
    assert not left_in(tmp_path / "root")


def test_no_network_names_what_belongs_where(tmp_path, server):
    CATALOGUE["eurosat"]["archive"]["url"] = "http://127.0.0.1:9/EuroSAT.zip"
    with pytest.raises(Problem) as problem:
        load_data("eurosat", tmp_path / "root")
    expected = ("eurosat/2750", "eurosat/split_zhou_EuroSAT.json", "--data-root")
    assert all(part in str(problem.value) for part in expected)


@pytest.mark.parametrize("length", ["many", "-5", "1e3", "9" * 5000])
def test_a_content_length_that_is_no_number_is_passed_over(server, archive, tmp_path, length):
    publish(server, archive, SPLIT)
    server.length = length
    assert load_data("eurosat", tmp_path / "root").test


def test_a_content_length_beyond_all_bounds_is_a_broken_connection(server, archive, tmp_path):
    publish(server, archive, SPLIT)
    server.length = "9" * 40
    with pytest.raises(Problem, match="eurosat.zip"):
        load_data("eurosat", tmp_path / "root")


def test_four_first_runs_at_once_fetch_everything_once(server, archive, tmp_path):
    publish(server, archive, SPLIT)
    code = """if True:
        import json, sys
        from data import files
        files.CATALOGUE["eurosat"]["archive"] = json.loads(sys.argv[2])
        files.DRIVE = sys.argv[3]
        print(files.load_data("eurosat", sys.argv[1]).origin)"""
    spec = json.dumps(CATALOGUE["eurosat"]["archive"])
    runs = [python(code, tmp_path / "root", spec, files.DRIVE) for _ in range(4)]
    for run in runs:
        out, err = run.communicate()
        assert out.endswith("published split\n") and run.returncode == 0, err
    assert len(server.asked) == 2


def test_a_full_disk_names_the_file_and_leaves_a_part_to_go_on_from(server, archive, tmp_path):
    publish(server, archive)
    limit, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(archive) // 2, limit[1]))
    try:
        with pytest.raises(Problem, match="eurosat.zip.part: File too large; --data-root DIR"):
            load_data("eurosat", tmp_path / "root")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert left_in(tmp_path / "root") == ["eurosat-eurosat.zip.part"]
    assert load_data("eurosat", tmp_path / "root").test


def test_no_room_to_unpack_leaves_the_archive_to_go_on_from(server, archive, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    publish(server, archive)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", full)
        with pytest.raises(Problem, match="No space left on device; --data-root DIR"):
            load_data("eurosat", tmp_path / "root")
    assert left_in(tmp_path / "root") == ["eurosat", "eurosat-eurosat.zip"]
    assert not left_in(tmp_path / "root/eurosat") and load_data("eurosat", tmp_path / "root").test
    assert [path for path, _ in server.asked].count("/eurosat.zip") == 1


def test_a_data_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("shapes", "eurosat"):
        with pytest.raises(Problem, match="--data-root DIR takes another folder"):
            load_data(name, tmp_path / "file/root")


def test_sigterm_leaves_no_half_drawn_folder(tmp_path):
    code = """if True:
        import sys
        from data import errors, world
        errors.guard()
        world.PER_CLASS["train"] = 10**6
        world.build(sys.argv[1], "shapes")"""
    run = python(code, tmp_path / "root")
    while not list(tmp_path.glob("root/.shapes-*")) and run.poll() is None:
        time.sleep(0.05)
    run.terminate()
    assert (run.communicate()[1], run.returncode) == ("", 143)
    assert not left_in(tmp_path / "root")


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: None, None),
    (lambda folder: (folder / "images/images_2.jpg").write_bytes(b"\xff\xd8 cut"), "images_2.jpg"),
    (lambda folder: (folder / "images/images_2.jpg").unlink(), "images_2.jpg"),
    (lambda folder: (folder / "images_variant_val.txt").write_text(""), "[1, 0, 1]"),
])
def test_aircraft_without_a_checksum_is_looked_through(server, tmp_path, spoil, words):
    aircraft(tmp_path / "made")
    spoil(tmp_path / "made")
    CATALOGUE["fgvc_aircraft"]["archive"]["counts"] = [1, 1, 1]
    server.content["/fgvc_aircraft.zip"] = zipped(tmp_path / "made", "fgvc-aircraft-2013b/data")
    if words:
        with pytest.raises(Problem) as problem:
            load_data("fgvc_aircraft", tmp_path / "root")
        assert words in str(problem.value) and not left_in(tmp_path / "root")
    else:
        assert load_data("fgvc_aircraft", tmp_path / "root").train[0].path.is_file()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.time()
    download.ask_hub_once()
    assert constants.HF_HUB_OFFLINE and time.time() - start < 5


# ------------------------- archives

def made_tar(file, *members, mode="w"):
    """A tar archive of members (name, type, target of a link)."""
    with tarfile.open(file, mode) as t:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            t.addfile(member)
    return file


def made_zip(file, name, content="x", mode=0o100644):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(info, content)
    return file


def refused(file, tmp_path, *words):
    """Unpacking ends in a Problem with these words, and nothing is left, inside or outside."""
    with pytest.raises(Problem) as problem:
        download.unpack(file, ["images"], tmp_path / "deep/images")
    assert all(word in str(problem.value) for word in words), problem.value
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([file.name, "deep"])


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE"])
def test_a_tar_of_anything_but_files_and_folders_is_refused(tmp_path, kind):
    (tmp_path / "deep").mkdir()
    file = made_tar(tmp_path / "a.tar", ("images/a", getattr(tarfile, kind), "images"))
    refused(file, tmp_path, "neither a file nor a folder")


def test_the_links_of_cve_2025_4517_are_refused(tmp_path):
    """Over-long chains of links end the check of where a member lands, on Python before its fix."""
    (tmp_path / "deep").mkdir()
    long, place, members = "d" * 247, "", []
    for step in "abcdefghijklmnop":
        members += [(place + long, tarfile.DIRTYPE, ""), (place + step, tarfile.SYMTYPE, long)]
        place += long + "/"
    chain = "/".join("abcdefghijklmnop")
    members += [(f"{chain}/{'l' * 254}", tarfile.SYMTYPE, "../" * 16)]
    members += [("escape", tarfile.SYMTYPE, f"{chain}/{'l' * 254}/../..")]
    members += [("escape/evil", tarfile.REGTYPE, "")]
    refused(made_tar(tmp_path / "a.tar", *members), tmp_path, "neither a file nor a folder")


def test_a_zip_with_a_link_is_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    file = made_zip(tmp_path / "a.zip", "images", "/etc", stat.S_IFLNK | 0o777)
    refused(file, tmp_path, "neither a file nor a folder")


def test_members_that_would_land_outside_are_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    refused(made_zip(tmp_path / "a.zip", "../../evil"), tmp_path, "outside")
    (tmp_path / "a.zip").unlink()
    refused(made_tar(tmp_path / "a.tar", ("../../evil", tarfile.REGTYPE, "")), tmp_path, "outside")


def damaged(kind, file):
    """An archive that cannot be unpacked."""
    noise = bytes(range(256)) * 40
    if kind.startswith("tar"):
        with tarfile.open(file, f"w:{kind[4:]}") as t:
            member = tarfile.TarInfo("images")
            member.size = len(noise)
            t.addfile(member, io.BytesIO(noise))
        content = bytearray(file.read_bytes())
        content[len(content) // 2:] = bytes(len(content) - len(content) // 2)
    else:
        made_zip(file, "images", noise)
        content = bytearray(file.read_bytes())
        entry = content.rindex(b"PK\x01\x02")
        if kind == "zip, encrypted":
            content[6] |= 1
            content[entry + 8] |= 1
        elif kind == "zip, unknown compression":
            struct.pack_into("<H", content, 8, 97)
            struct.pack_into("<H", content, entry + 10, 97)
        elif kind == "zip, damaged":
            content[36:56] = b"\xff" * 20
        else:
            content = content[:99]
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("kind", ["tar gz", "tar xz", "tar bz2", "zip, encrypted", "zip, damaged",
                                  "zip, unknown compression", "zip, cut"])
def test_an_archive_that_cannot_be_unpacked_ends_in_one_line(tmp_path, kind):
    (tmp_path / "deep").mkdir()
    refused(damaged(kind, tmp_path / "a"), tmp_path, "a: not an archive that can be unpacked (")


def test_an_archive_inside_an_archive(tmp_path):
    made_up_pictures(tmp_path / "made/face", 2)
    with tarfile.open(tmp_path / "inner.tar.gz", "w:gz") as t:
        t.add(tmp_path / "made", "101_ObjectCategories")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.write(tmp_path / "inner.tar.gz", "caltech-101/101_ObjectCategories.tar.gz")
    (tmp_path / "out/images").mkdir(parents=True)  # an empty folder is not in the way
    (tmp_path / "out/.images-unfinished/0").mkdir(parents=True)  # nor what a killed run left
    take = CATALOGUE["caltech101"]["archive"]["take"]
    download.unpack(tmp_path / "a.zip", take, tmp_path / "out/images")
    assert len(list((tmp_path / "out/images/face").iterdir())) == 2
    assert left_in(tmp_path / "out") == ["images"]


# ------------------------- layouts

def test_seeded_split_is_50_20_30_and_the_same_every_time(tmp_path):
    for name in ("b", "a"):
        made_up_pictures(tmp_path / name, 10)
    (tmp_path / "a/notes.txt").write_text("no picture")
    data = load_data(str(tmp_path), tmp_path)
    assert data.classnames == ["a", "b"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [10, 4, 6]
    assert data == load_data(str(tmp_path), tmp_path)
    assert not {item.path for item in data.train} & {item.path for item in data.test}


def test_an_own_folder_says_what_was_found(tmp_path):
    for name in "fedcba":
        made_up_pictures(tmp_path / name, 4)
    data = load_data(str(tmp_path), tmp_path)
    assert data.note == ("6 classes (a, b, c, d, ...), pictures: 12 for training, 6 for testing; "
                         "seeded 50/20/30 split")


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_folders_are_ones_own_split(tmp_path, test):
    for part, count in (("train", 3), (test, 1)):
        for name in ("cat", "dog"):
            made_up_pictures(tmp_path / part / name, count)
    data = load_data(str(tmp_path), tmp_path)
    assert data.classnames == ["cat", "dog"] and data.origin == f"own train/{test} folders"
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 0, 2]
    assert all(item.path.parts[-3:-1] == (test, item.classname) for item in data.test)
    made_up_pictures(tmp_path / test / "bird", 1)
    with pytest.raises(Problem, match="no such class"):
        load_data(str(tmp_path), tmp_path)


def test_classes_that_are_called_train_and_test_are_classes(tmp_path):
    for name in ("train", "test"):
        made_up_pictures(tmp_path / name, 4)
    assert load_data(str(tmp_path), tmp_path).classnames == ["test", "train"]


def test_a_folder_is_one_data_set_however_its_path_is_written(tmp_path, monkeypatch):
    for name in "ab":
        made_up_pictures(tmp_path / "pics" / name, 4)
    monkeypatch.chdir(tmp_path)
    ways = ["pics", "./pics", "pics/", "pics/../pics", str(tmp_path / "pics")]
    assert {load_data(way, tmp_path).name for way in ways} == {str(tmp_path / "pics")}
    assert {known(way) for way in ways} == {str(tmp_path / "pics")}
    assert load_data("pics", ".") == load_data(str(tmp_path / "pics"), ".")


def aircraft(folder):
    """FGVC Aircraft's layout, with one picture each for training, validation and test."""
    made_up_pictures(folder / "images", 3)
    (folder / "variants.txt").write_text("707-320\nA 300\n")
    (folder / "images_variant_train.txt").write_text("images_1 A 300\n")
    (folder / "images_variant_val.txt").write_text("images_2 A 300\n")
    (folder / "images_variant_test.txt").write_text("images_3 707-320\n")


def test_aircraft_layout(tmp_path):
    aircraft(tmp_path / "fgvc_aircraft")
    data = load_data("fgvc_aircraft", tmp_path)
    assert data.classnames == ["707-320", "A 300"]
    assert data.train[0].path.is_file() and data.train[0].label == 1


@pytest.fixture
def imagenets(tmp_path):
    """A data root with four classes of ImageNet, and variants of which one has two of them."""
    names = ("n01440764 tench\nn01443537 goldfish\n"
             "n01484850 great white shark\nn01491361 tiger shark\n")
    for place in ("imagenet", "imagenetv2", "imagenet-adversarial"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "classnames.txt").write_text(names)
    for k, line in enumerate(names.splitlines()):
        for part in ("train", "val"):
            made_up_pictures(tmp_path / "imagenet/images" / part / line.split()[0], 2)
        made_up_pictures(tmp_path / CATALOGUE["imagenetv2"]["images"] / str(k), 1)
        if k % 2 == 0:
            made_up_pictures(tmp_path / CATALOGUE["imagenet_a"]["images"] / line.split()[0], 1)
    return tmp_path


def test_imagenet_and_its_variants(imagenets):
    assert len(load_data("imagenet", imagenets).test) == 8
    names = [item.classname for item in load_data("imagenetv2", imagenets).test]
    assert names == ["tench", "goldfish", "great white shark", "tiger shark"]
    assert load_data("imagenet_a", imagenets).classnames == ["tench", "great white shark"]
    (imagenets / "imagenet/images/train/n01443537").rename(imagenets / "gone")
    with pytest.raises(Problem, match="n01443537"):
        load_data("imagenet", imagenets)


def test_domain_generalisation_uses_the_names_of_the_variant(cli, imagenets, monkeypatch):
    asked, original = [], common.template_features

    def spy(clip, template, names):
        asked.append(len(names))
        return original(clip, template, names)

    monkeypatch.setattr(common, "template_features", spy)
    given = {"data_root": imagenets, "backbone": common.TINY_CLIP}
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", 1,
              "--transfer", "imagenetv2,imagenet_a", dataset="imagenet", **given)
    assert run.status == 0 and asked[-3:] == [4, 4, 2]
    assert set(run.records[0]["transfer"]) == {"imagenetv2", "imagenet_a"}
    refusal = cli("coop", dataset="imagenet_a", **given).err
    assert refusal == "coop.py: imagenet_a has no training images; it is for --transfer or --load\n"


def test_list_of_data_sets(imagenets, capsys):
    (imagenets / "eurosat/2750").mkdir(parents=True)
    files.list_data(imagenets)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == "data set train val test template folder".split()
    rows = {row.split()[0]: row for row in rows}
    assert set(rows) == set(CATALOGUE) and rows["imagenet"].split()[1:4] == ["8", "0", "8"]
    assert "not there" in rows["ucf101"] and "downloaded on first use" in rows["dtd"]
    assert "pictures only, so far" in rows["eurosat"]
    assert "drawn on first use" in rows["shapes"] and not (imagenets / "shapes").exists()


def test_the_catalogue_knows_the_papers_data_sets():
    kinds = [spec["kind"] for spec in CATALOGUE.values()]
    assert sum(kind in ("split", "aircraft", "imagenet", "variant") for kind in kinds) == 15
    assert all("{}" in spec["template"] for spec in CATALOGUE.values())


def test_an_empty_folder_in_the_place_of_an_embedded_data_set(tmp_path):
    (tmp_path / "shapes").mkdir()
    with pytest.raises(Problem, match="shapes holds something else: remove it"):
        load_data("shapes", tmp_path)


# ------------------------- names and pictures

def named(names, origin="", template="a photo of a {}."):
    return common.Data("mine", names, template, template, [], [], [], origin=origin)


@pytest.mark.parametrize("pair", [("a_b", "a b"), ("Cat", "cat"), ("cat", "cat"), ("a  b", "a b")])
def test_classes_of_the_same_prompt_are_refused_by_name(tiny, pair):
    with pytest.raises(Problem, match=f"{pair[0]!r} and {pair[1]!r} have the same prompt"):
        check_names(tiny, named(["ring", *pair]))


def test_imagenets_own_pairs_are_told_of_and_used(tiny, capsys):
    check_names(tiny, named(["sunglasses", "missile", "sunglasses"], "published split"))
    assert "'sunglasses' and 'sunglasses' have the same prompt" in capsys.readouterr().out


def test_a_class_without_a_name_is_refused(tiny):
    with pytest.raises(Problem, match="without a name"):
        check_names(tiny, named(["ring", "_"]))


def test_words_that_the_tiny_clip_has_never_met_are_named(tiny, capsys):
    check_names(tiny, named(["sparrow", "red heart", "Red_Falcon", "eagle"]))
    out = capsys.readouterr().out
    assert "never met 'sparrow', 'Falcon', 'eagle' and cannot tell apart 'eagle', 'sparrow'" in out
    assert "--backbone ViT-B-16" in out and len(out.splitlines()) == 1


def test_the_tiny_clip_has_met_all_words_of_the_embedded_data_sets(tiny, capsys):
    for name, spec in CATALOGUE.items():
        if spec["kind"] == "world":
            check_names(tiny, named(world.class_names(name), template=spec["template"]))
    assert not capsys.readouterr().out


def test_unreadable_pictures_are_left_out_and_counted(tmp_path):
    for name in "ab":
        cut, gone, *_ = made_up_pictures(tmp_path / name, 10)
    whole = load_data(str(tmp_path), tmp_path)
    assert readable(whole) is whole
    cut.write_bytes(cut.read_bytes()[:-200])  # only whoever decodes it to the end finds out
    gone.unlink()
    os.mkfifo(gone)  # waits for ever, when it is opened
    data = readable(load_data(str(tmp_path), tmp_path))
    assert "2 pictures cannot be read and are left out, first " in data.note
    assert {item.path for item in whole.train + whole.val + whole.test} - {cut, gone} == {
        item.path for item in data.train + data.val + data.test}
