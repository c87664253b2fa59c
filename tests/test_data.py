"""Data sets: layouts, seeded splits, downloads from a local server."""

import hashlib
import http.server
import io
import json
import resource
import signal
import tarfile
import threading
import zipfile

import pytest
from conftest import EUROSAT, made_up_pictures

import common
from data import files
from data.files import CATALOGUE, Problem, load_data


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content[path]`; cuts each of the first `cuts` answers after half of what it should send."""
    content, cuts, asked = {}, 0, []

    def do_GET(self):
        body = self.content.get(self.path)
        start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        self.asked.append((self.path, start))
        if body is None or start >= len(body):
            self.send_error(404 if body is None else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
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
    """Stands in for the addresses of EuroSAT's archive and split file."""
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{http_server.server_address[1]}"
    Server.content, Server.cuts, Server.asked = {}, 0, []
    spec = json.loads(json.dumps(CATALOGUE["eurosat"]))
    spec["archive"]["url"] = f"{address}/EuroSAT.zip"
    monkeypatch.setitem(CATALOGUE, "eurosat", spec)
    monkeypatch.setattr(files, "DRIVE", f"{address}/drive/")
    yield Server
    http_server.shutdown()
    http_server.server_close()


def publish(server, content, path="/EuroSAT.zip"):
    server.content[path] = content
    if path == "/EuroSAT.zip":
        CATALOGUE["eurosat"]["archive"]["md5"] = hashlib.md5(content).hexdigest()


@pytest.fixture
def archive(tmp_path):
    """EuroSAT.zip: 2750/CLASS/CLASS_1.jpg ..."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name in EUROSAT:
            for path in made_up_pictures(tmp_path / "made" / name, 4):
                z.write(path, f"2750/{name}/{path.name}")
    return buffer.getvalue()


def test_eurosat_is_downloaded_verified_and_unpacked_once(server, archive, tmp_path):
    split = {"train": [["Forest/Forest_1.jpg", 0, "Forest"], ["SeaLake/SeaLake_1.jpg", 1, "SeaLake"]], "val": [], "test": [["Forest/Forest_2.jpg", 0, "Forest"]]}
    publish(server, archive)
    publish(server, json.dumps(split).encode(), "/drive/" + CATALOGUE["eurosat"]["drive"])
    data = load_data("eurosat", tmp_path / "root")
    assert data.classnames == ["Forest", "Sea or Lake"] and data.train[1].path.is_file() and not data.note
    assert data.template == "a centered satellite photo of {}."
    assert load_data("eurosat", tmp_path / "root") == data and len(server.asked) == 2
    assert sorted(p.name for p in (tmp_path / "root").iterdir() if not p.name.endswith(".lock")) == ["eurosat"]


def test_without_the_papers_split_a_seeded_one_is_made_and_said_to_be_one(server, archive, tmp_path):
    publish(server, archive)
    data = load_data("eurosat", tmp_path / "root")
    assert "NOT the papers' split" in data.note and data.classnames[0] == "Annual Crop Land" and len(data.train) == 20 and len(data.test) == 10
    publish(server, b"<html>too many downloads</html>", "/drive/" + CATALOGUE["eurosat"]["drive"])
    assert "did not give the file" in load_data("eurosat", tmp_path / "root").note
    assert not (tmp_path / "root" / CATALOGUE["eurosat"]["split"]).exists()


def test_a_broken_download_goes_on_where_it_stopped(server, archive, tmp_path):
    publish(server, archive)
    server.cuts = 1
    with pytest.raises(Problem, match="run again"):
        load_data("eurosat", tmp_path / "root")
    assert not (tmp_path / "root/eurosat").exists()
    assert load_data("eurosat", tmp_path / "root").test
    assert server.asked[:2] == [("/EuroSAT.zip", 0), ("/EuroSAT.zip", len(archive) // 2)]


def test_a_wrong_checksum_leaves_nothing_behind(server, archive, tmp_path):
    publish(server, archive)
    server.content["/EuroSAT.zip"] = archive[:-9] + b"tampered!"
    with pytest.raises(Problem, match="wrong checksum"):
        load_data("eurosat", tmp_path / "root")
    assert not [p for p in (tmp_path / "root").iterdir() if not p.name.endswith(".lock")]


def test_no_network_names_the_folder(tmp_path, server):
    CATALOGUE["eurosat"]["archive"]["url"] = "http://127.0.0.1:9/EuroSAT.zip"
    with pytest.raises(Problem, match="eurosat/2750 yourself"):
        load_data("eurosat", tmp_path / "root")


def test_a_full_disk_ends_a_download_and_leaves_a_part_to_go_on_from(server, archive, tmp_path, monkeypatch, capsys):
    publish(server, archive)
    limit, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(archive) // 2, limit[1]))
    try:
        with pytest.raises(SystemExit) as stop, common.one_line_errors():
            load_data("eurosat", tmp_path / "root")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "root/eurosat").exists() and load_data("eurosat", tmp_path / "root").test


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as z:
            z.writestr("../../evil", "x")
    else:
        with tarfile.open(file, "w") as t:
            t.addfile(tarfile.TarInfo("../../evil"))
    with pytest.raises(Problem, match="outside"):
        files.unpack(file, ["images"], tmp_path / "deep/images")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [f"a.{kind}", "deep"]


def test_an_archive_inside_an_archive(tmp_path):
    made_up_pictures(tmp_path / "made/face", 2)
    with tarfile.open(tmp_path / "inner.tar.gz", "w:gz") as t:
        t.add(tmp_path / "made", "101_ObjectCategories")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.write(tmp_path / "inner.tar.gz", "caltech-101/101_ObjectCategories.tar.gz")
    files.unpack(tmp_path / "a.zip", CATALOGUE["caltech101"]["archive"]["take"], tmp_path / "out/images")
    assert len(list((tmp_path / "out/images/face").iterdir())) == 2
    (tmp_path / "broken.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:99])
    with pytest.raises(Problem, match="remove it"):
        files.unpack(tmp_path / "broken.zip", ["x"], tmp_path / "out/other")


def test_seeded_split_is_50_20_30_and_the_same_every_time(tmp_path):
    for name in ("b", "a"):
        made_up_pictures(tmp_path / name, 10)
    (tmp_path / "a/notes.txt").write_text("no picture")
    data = load_data(str(tmp_path), tmp_path)
    assert data.classnames == ["a", "b"] and [len(p) for p in (data.train, data.val, data.test)] == [10, 4, 6]
    assert data == load_data(str(tmp_path), tmp_path) and not {i.path for i in data.train} & {i.path for i in data.test}


def test_aircraft_and_imagenet_layouts(tmp_path):
    lists = tmp_path / "fgvc_aircraft"
    made_up_pictures(lists / "images", 3)
    (lists / "variants.txt").write_text("707-320\nA 300\n")
    for part, row in (("train", "images_1 A 300"), ("val", "images_2 A 300"), ("test", "images_3 707-320")):
        (lists / f"images_variant_{part}.txt").write_text(row + "\n")
    data = load_data("fgvc_aircraft", tmp_path)
    assert data.classnames == ["707-320", "A 300"] or {i.classname for i in data.train + data.test} == {"707-320", "A 300"}
    assert data.train[0].path.is_file() and data.train[0].label == 1


@pytest.fixture
def imagenets(tmp_path):
    """A data root with four classes of ImageNet, and variants of which one has two of them."""
    names = "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\nn01491361 tiger shark\n"
    for place in ("imagenet", "imagenetv2", "imagenet-adversarial"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "classnames.txt").write_text(names)
    for k, line in enumerate(names.splitlines()):
        for part in ("train", "val"):
            made_up_pictures(tmp_path / "imagenet/images" / part / line.split()[0], 2)
        made_up_pictures(tmp_path / "imagenetv2/imagenetv2-matched-frequency-format-val" / str(k), 1)
        if k % 2 == 0:
            made_up_pictures(tmp_path / "imagenet-adversarial/imagenet-a" / line.split()[0], 1)
    return tmp_path


def test_imagenet_and_its_variants(imagenets):
    assert len(load_data("imagenet", imagenets).test) == 8
    assert [i.classname for i in load_data("imagenetv2", imagenets).test] == ["tench", "goldfish", "great white shark", "tiger shark"]
    assert load_data("imagenet_a", imagenets).classnames == ["tench", "great white shark"]
    (imagenets / "imagenet/images/train/n01443537").rename(imagenets / "gone")
    with pytest.raises(Problem, match="n01443537"):
        load_data("imagenet", imagenets)


def test_domain_generalisation_uses_the_names_of_the_variant(cli, imagenets, monkeypatch):
    asked, original = [], common.template_features
    monkeypatch.setattr(common, "template_features", lambda clip, template, names: asked.append(len(names)) or original(clip, template, names))
    run = cli("coop", "--epochs", 1, "--views", 1, "--shots", 1, "--transfer", "imagenetv2,imagenet_a", dataset="imagenet", data_root=imagenets, backbone=common.TINY_CLIP)
    assert run.status == 0 and asked == [4, 4, 2] and set(run.records[0]["transfer"]) == {"imagenetv2", "imagenet_a"}
    assert cli("coop", dataset="imagenet_a", data_root=imagenets, backbone=common.TINY_CLIP).err == "coop.py: imagenet_a has no training images; it is for --transfer or --load\n"


def test_list_of_data_sets(imagenets, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["common.py", "--data", "--data-root", str(imagenets)])
    common.main()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(CATALOGUE) and lines["imagenet"].split()[1:4] == ["8", "0", "8"] and "not there" in lines["dtd"]
    assert "drawn on first use" in lines["shapes"] and not (imagenets / "shapes").exists()


def test_the_catalogue_knows_the_papers_data_sets():
    kinds = [spec["kind"] for spec in CATALOGUE.values()]
    assert kinds.count("split") + kinds.count("aircraft") + kinds.count("imagenet") + kinds.count("variant") == 15
    assert all("{}" in spec["template"] for spec in CATALOGUE.values())
