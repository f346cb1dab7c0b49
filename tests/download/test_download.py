"""Downloads from a server on this machine that truncates, drops, corrupts and lies; Pillow and hashlib are judges."""
import hashlib
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.download import command as download
from utils.download import fetch, sources, verify
from utils.errors import run

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Serves `files`; `faults` holds, for each path, what shall go wrong with its next requests, in order."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range header
        self.absent = 404  # what is said of files that are not there
        self.ranges, self.tag, self.lengths, self.delay = True, True, True, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, asked = request.path, request.headers["Range"]
        self.requests.append((path, asked))
        fault = self.faults[path].pop(0) if self.faults.get(path) else None
        if isinstance(fault, int):
            request.send_error(fault)
            return
        if path not in self.files:
            request.send_error(self.absent)
            return
        content = self.files[path]
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start and request.headers["If-Range"] not in (None, tag):
            start = 0
        if start >= len(content) > 0 and start:
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.tag:
            request.send_header("ETag", tag)
        if self.lengths:
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        body = content[start:]
        if fault is not None:
            body = fault(body)
        try:
            for i in range(0, len(body), 1 << 14):
                request.wfile.write(body[i:i + (1 << 14)])
                time.sleep(self.delay)
        except OSError:  # the client was killed
            pass


def drop_after(count: int):
    return lambda body: body[:count]


def flip(body: bytes) -> bytes:
    return body[:-100] + bytes([body[-100] ^ 1]) + body[-99:]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def known(content: bytes) -> dict:
    """What checksums.json should say, by Pillow and hashlib alone."""
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "shape": list(pixels.shape),
            "dtype": str(pixels.dtype), "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()}


RNG = np.random.default_rng(0)
GREY = {f"{name}.tif": encoded(RNG.integers(0, 256, (200, 300), dtype=np.uint8), "TIFF") for name in ("a", "b", "ü c")}
ORIGINALS = {name: RNG.integers(0, 256, shape, dtype=np.uint8)
             for name, shape in {"0801": (41, 60, 3), "0802": (64, 33, 3)}.items()}
CUT = {f"{name}.png": encoded(pixels[(len(pixels) - 32) // 2:, (pixels.shape[1] - 32) // 2:][:32, :32], "PNG")
       for name, pixels in ORIGINALS.items()}


@pytest.fixture(autouse=True)
def made_sets(monkeypatch):
    """Set11 with three made pictures, one file each; DIV2K with two, cut from originals in an archive."""
    monkeypatch.setitem(verify.CHECKSUMS, "Set11", {file: known(content) for file, content in GREY.items()})
    monkeypatch.setitem(verify.CHECKSUMS, "DIV2K", {file: known(content) for file, content in CUT.items()})
    monkeypatch.setattr(fetch, "PAUSE", 0.01)


@pytest.fixture
def home(monkeypatch, server):
    """The server as the home of both sets."""
    monkeypatch.setitem(sources.HOMES, "Set11", sources.Home(server.url + "/raw/{file}", "http://page"))
    monkeypatch.setitem(sources.HOMES, "DIV2K", sources.Home(server.url + "/valid_HR.zip", "http://page", range(-2, 3)))
    server.files = {f"/raw/{file.replace('ü c', '%C3%BC%20c')}": content for file, content in GREY.items()}
    server.files["/valid_HR.zip"] = zipped({f"HR/{name}.png": encoded(pixels, "PNG")
                                            for name, pixels in ORIGINALS.items()})
    return server


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def call(monkeypatch, place: Path, *flags: str) -> int:
    """Exit status of the command line, run in `place`."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["download.py", *flags])
    try:
        run(download.main)
    except SystemExit as end:
        return end.code
    return 0


def found(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# --- from the homes ------------------------------------------------------------------------------------------------

def test_files_come_as_they_are_and_only_once(tmp_path, monkeypatch, home, capsys):
    assert call(monkeypatch, tmp_path, "Set11") == 0
    assert found(tmp_path / "data") == {f"Set11/{file}": content for file, content in GREY.items()}
    assert "Set11: 3 of 3 pictures in data/Set11 are right: 3 by the checksum of the file" in capsys.readouterr().out
    home.requests.clear()
    home.http.shutdown()
    assert call(monkeypatch, tmp_path, "Set11") == 0 and home.requests == []
    (tmp_path / "data" / "Set11" / "b.tif").unlink()
    assert call(monkeypatch, tmp_path, "--check", "Set11") == 1
    assert "2 of 3" in (out := capsys.readouterr().out) and "missing: b.tif" in out


def test_only_what_is_missing_is_fetched(tmp_path, monkeypatch, home):
    put(tmp_path / "data" / "Set11", {"a.tif": GREY["a.tif"], "b.tif": GREY["b.tif"]})
    assert call(monkeypatch, tmp_path, "Set11") == 0
    assert [path for path, _ in home.requests] == ["/raw/%C3%BC%20c.tif"]


def test_pictures_are_cut_from_originals(tmp_path, monkeypatch, home, capsys):
    assert call(monkeypatch, tmp_path, "DIV2K") == 0
    pictures = found(tmp_path / "data")
    assert set(pictures) == {"DIV2K/0801.png", "DIV2K/0802.png"}  # the archive is gone
    for file, content in CUT.items():
        assert (np.asarray(Image.open(io.BytesIO(pictures[f"DIV2K/{file}"])))
                == np.asarray(Image.open(io.BytesIO(content)))).all()
    # The encoder here is not Pillow's: other bytes, the same pixels; and that is what is said.
    assert "2 by the checksum of the pixels" in capsys.readouterr().out


@pytest.mark.parametrize("shift, inside", [(2, True), (-2, True), (3, False)])
def test_a_cut_is_searched_near_the_centre_alone(shift, inside):
    original = np.random.default_rng(1).integers(0, 256, (50, 45, 3), dtype=np.uint8)  # the centre's corner: 9, 6
    cut = original[9 + shift:41 + shift, 6:38]
    wanted = {"x.png": known(encoded(cut, "PNG"))}
    match = verify.find(encoded(original, "PNG"), wanted, range(-2, 3))
    assert (match is not None) is inside
    if inside:
        assert (np.asarray(Image.open(io.BytesIO(match[1]))) == cut).all()


def test_no_network_is_one_sentence(tmp_path, monkeypatch, home, capsys):
    home.http.shutdown()
    home.http.server_close()
    assert call(monkeypatch, tmp_path, "Set11") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "no connection: Connection refused" in err and "in a browser" in err and "http://page" in err
    assert found(tmp_path) == {} and os.listdir(tmp_path / "data") == []


def test_an_address_that_moved_is_said_and_other_sets_go_on(tmp_path, monkeypatch, home, capsys):
    del home.files["/raw/a.tif"], home.files["/raw/b.tif"]
    assert call(monkeypatch, tmp_path, "Set11", "DIV2K") == 2
    err = capsys.readouterr().err
    assert "/raw/a.tif is not there, nor are 1 more; otherwise, in a browser, get" in err
    assert {Path(file).name for file in found(tmp_path / "data")} == {"ü c.tif", "0801.png", "0802.png"}


# --- faults of the way ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tag", [True, False])
def test_a_dropped_connection_goes_on_where_it_stopped(tmp_path, monkeypatch, home, tag):
    home.tag = tag
    home.faults = {"/raw/a.tif": [drop_after(9000)] * 5, "/raw/b.tif": [503]}
    assert call(monkeypatch, tmp_path, "Set11") == 0
    assert [asked for path, asked in home.requests if path == "/raw/a.tif"] == [
        None, *(f"bytes={have}-" for have in range(9000, 45001, 9000))]
    assert found(tmp_path / "data") == {f"Set11/{file}": content for file, content in GREY.items()}


def test_a_server_without_ranges_is_asked_for_all(tmp_path, monkeypatch, home):
    home.ranges = False
    home.faults = {"/raw/a.tif": [drop_after(20000), drop_after(30000)]}
    assert call(monkeypatch, tmp_path, "Set11") == 0
    assert found(tmp_path / "data") == {f"Set11/{file}": content for file, content in GREY.items()}


@pytest.mark.parametrize("tag", [True, False])
def test_a_file_that_changed_meanwhile_is_not_patched_together(tmp_path, server, monkeypatch, tag):
    monkeypatch.setattr(fetch, "PAUSE", 0)
    server.tag = tag  # without one, the length tells
    old, new = (np.random.default_rng(seed).bytes(50000 + seed) for seed in (0, 1))

    def replace(body):
        server.files["/x"] = new
        return body[:20000]

    server.files, server.faults = {"/x": old}, {"/x": [replace]}
    fetch.fetch(server.url + "/x", tmp_path / "x")
    assert found(tmp_path) == {"x": new}
    # By If-Range the server itself sends the whole; where only the length tells, a further request is needed.
    assert [asked for _, asked in server.requests] == [None, "bytes=20000-"] + [None] * (not tag)


def test_a_truncating_server_is_given_up_and_what_came_is_kept(tmp_path, monkeypatch, home, capsys):
    home.faults = {"/raw/a.tif": [drop_after(20000)] + [drop_after(0)] * 9}
    assert call(monkeypatch, tmp_path, "Set11") == 2
    err = capsys.readouterr().err
    assert f"ended after 20,000 of {len(GREY['a.tif']):,} bytes" in err and "goes on after 20,000 bytes" in err
    assert not (tmp_path / "data" / "Set11").exists()
    home.faults = {}
    home.requests.clear()
    assert call(monkeypatch, tmp_path, "Set11") == 0
    assert home.requests[0] == ("/raw/a.tif", "bytes=20000-")
    assert os.listdir(tmp_path / "data") == ["Set11"]


def test_a_wrong_checksum_is_refused_and_the_rest_goes_on(tmp_path, monkeypatch, home, capsys):
    home.faults = {"/raw/a.tif": [flip]}
    assert call(monkeypatch, tmp_path, "Set11") == 2
    assert set(found(tmp_path / "data")) == {"Set11/b.tif", "Set11/ü c.tif"}
    assert "refused: " in (err := capsys.readouterr().err) and "a.tif has the wrong checksum" in err
    assert hashlib.sha256(flip(GREY["a.tif"])).hexdigest()[:12] in err
    assert call(monkeypatch, tmp_path, "Set11") == 0  # nothing of it was kept


@pytest.mark.parametrize("damage", [flip, lambda body: b"<html>Log in" + body[12:-22] + b" " * 22])
def test_a_damaged_archive_is_refused_and_fetched_anew(tmp_path, monkeypatch, home, capsys, damage):
    good = home.files["/valid_HR.zip"]
    place = good.index(b"IDAT") + 200
    home.faults = {"/valid_HR.zip": [lambda _: damage(good) if damage is not flip else
                                     good[:place] + bytes([good[place] ^ 1]) + good[place + 1:]]}
    assert call(monkeypatch, tmp_path, "DIV2K") == 2
    assert "is damaged" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert call(monkeypatch, tmp_path, "DIV2K") == 0


@pytest.mark.parametrize("lengths, message", [(True, "bytes), and was not fetched"), (False, "and was given up")])
def test_more_bytes_than_expected_are_not_taken(tmp_path, monkeypatch, home, capsys, lengths, message):
    home.lengths = lengths
    monkeypatch.setattr(sources, "MEMBER_LIMIT", 50000)
    assert call(monkeypatch, tmp_path, "Set11") == 2
    assert message in capsys.readouterr().err and found(tmp_path / "data") == {}


SCRIPT = """
import json, sys
from utils.download import command as download
from utils.download import fetch
from utils.download import sources
from utils.download import verify
from utils import errors
url, checksums = sys.argv.pop(1), sys.argv.pop(1)
verify.CHECKSUMS.update(json.load(open(checksums)))
sources.HOMES["Set11"] = sources.Home(url + "/raw/{file}", "http://page")
fetch.PAUSE = 0
errors.run(download.main)
"""


def start(tmp_path: Path, server: Server, *flags: str, **options) -> subprocess.Popen:
    (tmp_path / "checksums.json").write_text(json.dumps({"Set11": verify.CHECKSUMS["Set11"]}))
    return subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "checksums.json"), *flags],
                            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, **options)


def test_a_killed_download_goes_on(tmp_path, monkeypatch, home, capsys):
    home.delay = 2.0  # seconds a chunk, of which the first picture has four
    process = start(tmp_path, home, "Set11")
    partial = None
    for _ in range(600):
        partial = next(iter((tmp_path / "data").rglob("*a.tif.partial")), None)
        if partial and partial.stat().st_size:
            break
        time.sleep(0.05)
    assert call(monkeypatch, tmp_path, "Set11", "--from", home.url) == 2
    assert "another download into data is running" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "data" / "Set11").exists()
    home.delay = 0
    home.requests.clear()
    have = partial.stat().st_size
    assert 0 < have < len(GREY["a.tif"])
    assert call(monkeypatch, tmp_path, "Set11") == 0
    assert home.requests[0] == ("/raw/a.tif", f"bytes={have}-")
    assert found(tmp_path / "data") == {f"Set11/{file}": content for file, content in GREY.items()}


def test_a_full_disk_is_one_sentence_and_room_helps(tmp_path, monkeypatch, home):
    process = start(tmp_path, home, "Set11", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30000,) * 2))
    err = process.communicate()[1].decode()
    assert process.returncode == 2 and err.count("\n") == 1 and "cannot write" in err and "File too large" in err
    assert not (tmp_path / "data" / "Set11").exists()
    home.requests.clear()
    assert call(monkeypatch, tmp_path, "Set11") == 0
    assert home.requests[0] == ("/raw/a.tif", "bytes=30000-")


# --- mirrors -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["files", "SET.zip", "home's archive", "one archive"])
@pytest.mark.parametrize("web", [404, 403, None], ids=["web", "storage service", "folder"])
def test_mirrors(tmp_path, monkeypatch, server, layout, web):
    files = {"files": {f"m/DIV2K/{file}": content for file, content in CUT.items()},
             "SET.zip": {"m/DIV2K.zip": zipped({f"any/{i}.png": content for i, content in enumerate(CUT.values())})},
             "home's archive": {"m/DIV2K_valid_HR.zip": zipped({f"{name}.png": encoded(pixels, "PNG")
                                                                for name, pixels in ORIGINALS.items()})},
             "one archive": {"m/my pictures.tar.gz": tarred(CUT)}}[layout]
    server.absent = web
    server.files = {"/" + name.replace(" ", "%20"): content for name, content in files.items()}
    put(tmp_path, files)
    place = server.url + "/m" if web else "m"
    if layout == "one archive":
        place += "/my%20pictures.tar.gz" if web else "/my pictures.tar.gz"
    assert call(monkeypatch, tmp_path, "DIV2K", "--from", place) == 0
    assert call(monkeypatch, tmp_path, "DIV2K", "--check") == 0
    assert found(tmp_path / "m") == {name.removeprefix("m/"): content for name, content in files.items()}


def tarred(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("flags, message", [
    (["Set11", "--from", "nowhere"], "nowhere is no archive, and no folder in which there is Set11 or Set11.zip"),
    (["Set11", "--from", "ftp://host"], "--from takes a folder"),
    (["Set11", "--from", ""], "--from must not be empty"),
    (["Set11", "--data_dir", ""], "argument --data_dir: must not be empty"),
    (["Set11", "--from", "http://a host"], "is not an address"),
    (["Set12"], "Set12 is not known here; choose from Set11"),
    (["Set11", "--form", "x"], "--help lists the flags"),
    (["Set11", "--data_dir", "file"], "cannot write into file (it is a file); choose another --data_dir"),
])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "file").write_text("")
    assert call(monkeypatch, tmp_path, *flags) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


# --- archives that mean harm ---------------------------------------------------------------------------------------

def linked_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("0801.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "../../secret.png")
        for file, content in CUT.items():
            archive.writestr("../" * 3 + file, content)
    return buffer.getvalue()


@pytest.mark.parametrize("archive", [
    zipped({f"../../{file}": content for file, content in CUT.items()} | {"../evil.png": b"", "/tmp/evil.tif": b""}),
    zipped({f"/{file}": content for file, content in CUT.items()} | {"..\\evil.png": b"evil", "..": b""}),
    linked_zip(),
    tarred({f"../../{file}": content for file, content in CUT.items()} | {"/evil.png": b"evil"}),
    tarred({f"link/{file}": content for file, content in CUT.items()}, {"link": "/tmp", "0801.png": "../secret.png"}),
], ids=["zip climbs", "zip absolute", "zip link", "tar climbs", "tar link"])
def test_nothing_is_written_but_the_pictures_of_the_set(tmp_path, monkeypatch, archive):
    put(tmp_path, {"secret.png": b"secret", "place/m.zip": archive})
    before = set(os.listdir("/tmp"))
    assert call(monkeypatch, tmp_path / "place", "DIV2K", "--from", "m.zip") == 0
    assert found(tmp_path) == {"secret.png": b"secret", "place/m.zip": archive} | {
        f"place/data/DIV2K/{file}": content for file, content in CUT.items()}
    assert not any("evil" in name for name in set(os.listdir("/tmp")) - before)


def lying_zip(size: int) -> bytes:
    """A megabyte of zeros that claims to be `size` bytes long."""
    content = zipped({"0801.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    return content.replace(struct.pack("<I", 1 << 20), struct.pack("<I", size))


@pytest.mark.parametrize("archive, message", [
    (zipped({"0801.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED), "would take 1,048,576 bytes"),
    (zipped({f"{i}.png": bytes(60000) for i in range(9)}, zipfile.ZIP_DEFLATED), "the whole archive 240,000 or more"),
    (zipped({"0801.png": bytes(150000)}), "would take 150,000 bytes"),
    (tarred({"0801.png": bytes(150000)}), "would take 150,000 bytes"),
    (tarred({"notes.txt": bytes(1 << 20)}), "would take 1,048,576 bytes"),
    (lying_zip(1000), "is damaged"),
    (zipped({"0801.png": encoded(ORIGINALS["0801"], "PNG")})[:-9], "is damaged"),
    (tarred(CUT)[:2000], "is damaged"),
    (b"<!DOCTYPE html>", "starts with b'<!DOCTYPE html>'"),
    (b"", "is damaged"),
])
def test_bombs_and_fragments_are_refused(tmp_path, monkeypatch, capsys, archive, message):
    monkeypatch.setattr(fetch, "MEMBER_LIMIT", 100000)
    monkeypatch.setattr(fetch, "ARCHIVE_LIMIT", 200000)
    put(tmp_path, {"m.zip": archive})
    assert call(monkeypatch, tmp_path, "DIV2K", "--from", "m.zip") == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert found(tmp_path) == {"m.zip": archive}


def test_a_picture_of_absurd_size_is_not_decoded(monkeypatch):
    bomb = encoded(np.zeros((100, 100), np.uint8), "PNG")
    header = struct.pack(">II", 60000, 60000)
    assert verify.find(bomb[:16] + header + bomb[24:], {"x.png": known(bomb)}) is None
    monkeypatch.setattr(verify, "MAX_PIXELS", 9999)
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("it was decoded"))
    assert verify.find(bomb + b" ", {"x.png": known(bomb)}) is None


# --- what is there -------------------------------------------------------------------------------------------------

def test_a_users_files_are_never_touched(tmp_path, monkeypatch, home, capsys):
    mine = {"a.tif": flip(GREY["a.tif"]), "b.tif": b"not a picture", "mine.PNG": b"", "notes.txt": b"", ".x.png": b""}
    put(tmp_path / "data" / "Set11", mine)
    assert call(monkeypatch, tmp_path, "Set11") == 1
    assert found(tmp_path / "data" / "Set11") == mine | {"ü c.tif": GREY["ü c.tif"]}
    out = capsys.readouterr().out
    assert "Set11: 1 of 3 pictures" in out
    assert "a.tif has the wrong checksum" in out and "b.tif is damaged or no picture (13 bytes, not " in out
    assert "test.py would average over them: 'mine.PNG'\n" in out
    assert "ignored: '.x.png', 'notes.txt'\n" in out


@pytest.mark.parametrize("content, expected", [
    (encoded(np.asarray(Image.open(io.BytesIO(GREY["a.tif"]))), "TIFF", compression="tiff_lzw"), "pixels"),
    (encoded(np.asarray(Image.open(io.BytesIO(GREY["a.tif"]))).T, "TIFF"), "is 200x300 grey uint8, not 300x200 grey"),
    (encoded(np.dstack([np.asarray(Image.open(io.BytesIO(GREY["a.tif"])))] * 3), "TIFF"), "300x200 colour uint8, not"),
    (encoded(np.zeros((200, 300), np.uint16), "TIFF"), "is 300x200 grey uint16, not 300x200 grey uint8"),
    (GREY["a.tif"][:5000], "is damaged or no picture (5,000 bytes"),
    (GREY["b.tif"], "has the wrong checksum"),
])
def test_the_verdict_on_a_file(tmp_path, monkeypatch, capsys, content, expected):
    put(tmp_path / "data" / "Set11", GREY | {"a.tif": content})
    assert call(monkeypatch, tmp_path, "--check") == (0 if expected == "pixels" else 1)
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("extra, status", [("notes.txt", 0), (".x.png", 0), ("mine.PNG", 1), ("copy of a.tif", 1)])
def test_a_further_picture_makes_it_another_set(tmp_path, monkeypatch, capsys, extra, status):
    put(tmp_path / "data" / "Set11", GREY | {extra: GREY["a.tif"]})
    assert call(monkeypatch, tmp_path, "--check") == status
    assert repr(extra) in capsys.readouterr().out


def test_a_folder_a_link_and_odd_names_in_the_way(tmp_path, monkeypatch, capsys):
    put(tmp_path / "data" / "Set11", {"b.tif": GREY["b.tif"]})
    (tmp_path / "data" / "Set11" / "a.tif").mkdir()
    (tmp_path / "data" / "Set11" / "ü c.tif").symlink_to("nowhere")
    (tmp_path / "data" / "Set11" / os.fsdecode(b"\xff\x1b[31m.png")).write_bytes(b"")
    assert call(monkeypatch, tmp_path, "--check") == 1
    out = capsys.readouterr().out
    assert "a.tif cannot be read (Is a directory)" in out and "ü c.tif cannot be read (No such file" in out
    assert "\x1b" not in out and out.encode()


def test_check_of_nothing(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, "--check") == 0
    assert capsys.readouterr().out.count("not there\n") == 6
    for name in download.NAMES:
        assert call(monkeypatch, tmp_path, "--check", name) == 1
        assert name in (out := capsys.readouterr().out) and out.count("\n") == 1
    assert found(tmp_path) == {}


def test_the_known_checksums():
    sizes = {"Set11": {(256, 256): 7, (256, 256, 3): 2, (512, 512): 2},
             "CBSD68": {(288, 480, 3): 53, (480, 288, 3): 15},
             "Urban100": {(256, 256, 3): 100}, "DIV2K": {(256, 256, 3): 100}}
    names = {"Set11": {"Monarch", "Parrots", "barbara", "boats", "cameraman", "fingerprint", "flinstones", "foreman",
                       "house", "lena256", "peppers256"},
             "CBSD68": {f"test_{i:02}" for i in range(1, 69)}, "Urban100": {f"img_{i:03}" for i in range(1, 101)},
             "DIV2K": {f"{i:04}" for i in range(801, 901)}}
    checksums = json.loads((ROOT / "utils" / "checksums.json").read_text())
    assert set(checksums) == set(sizes) == set(sources.HOMES)
    entries = [entry for files in checksums.values() for entry in files.values()]
    for key in ("sha256", "pixels"):
        digests = {entry[key] for entry in entries}
        assert len(digests) == 279 and all(len(bytes.fromhex(digest)) == 32 for digest in digests)
    for name, files in checksums.items():
        assert {Path(file).stem for file in files} == names[name]
        shapes = [tuple(entry["shape"]) for entry in files.values()]
        assert {shape: shapes.count(shape) for shape in shapes} == sizes[name]


# --- what is fetched by hand ---------------------------------------------------------------------------------------

def test_waterloo_is_counted_and_its_files_are_whole(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, "Waterloo") == 1
    assert "4,744 BMP files into data/pristine_images" in capsys.readouterr().out
    monkeypatch.setattr(verify, "WATERLOO", 12)
    colour = encoded(RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8), "BMP")
    folder = tmp_path / "data" / "pristine_images"
    put(folder, {f"{i:05}.bmp": colour for i in range(1, 12)} | {"sub/last.BMP": encoded(np.eye(9) > 0, "BMP")})
    assert call(monkeypatch, tmp_path, "Waterloo", "--check") == 0
    assert "12 whole BMP files of 12" in capsys.readouterr().out
    put(folder, {"00001.bmp": colour[:-1], "00002.bmp": b"BM", "00003.bmp": CUT["0801.png"], "00004.bmp": b""})
    assert call(monkeypatch, tmp_path, "--check") == 1
    out = capsys.readouterr().out
    assert "8 whole BMP files of 12" in out and "'00001.bmp', '00002.bmp', '00003.bmp', '00004.bmp'\n" in out
    for i in range(1, 5):
        (folder / f"0000{i}.bmp").unlink()
    assert call(monkeypatch, tmp_path, "Waterloo") == 1
    assert "8 whole" in capsys.readouterr().out


def test_weights_have_the_published_keys_and_shapes(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, "weights") == 1
    assert "weight/R_0.10_T_3_B_32/net_params_50.pkl" in capsys.readouterr().out
    path = tmp_path / "weight" / "R_0.30_T_3_B_32" / "net_params_50.pkl"
    path.parent.mkdir(parents=True)
    lines = (ROOT / "tests" / "golden" / "official_checkpoint_keys.txt").read_text().splitlines()
    number = torch.zeros(1)
    state = {}
    for line in lines:
        key, shape = line.split("\t")
        state[key] = number.expand(tuple(map(int, shape.split("x"))))
    assert len(state) == 1079
    torch.save(state, path)
    assert path.stat().st_size < 1 << 20
    assert call(monkeypatch, tmp_path, "--check") == 0
    assert "holds the 1,079 published keys and shapes" in capsys.readouterr().out
    whole = path.read_bytes()
    for damage, message in ((lambda: path.write_bytes(whole[:-1000]), "truncated"),
                            (lambda: torch.save({**state, "alpha": torch.zeros(4)}, path), "alpha is (4,), not (3,)"),
                            (lambda: torch.save({**state, "beta": number}, path), "beta does not belong there")):
        damage()
        assert call(monkeypatch, tmp_path, "--check", "weights") == 1
        assert message in capsys.readouterr().out
