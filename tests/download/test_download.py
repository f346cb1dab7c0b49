"""Downloads from a server on this machine that truncates, drops, corrupts and lies; Pillow and hashlib are judges."""
import hashlib
import io
import json
import os
import resource
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from utils import files
from utils.download import command, fetch, verify
from utils.errors import run

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Serves `files`; `faults` has, for each path, what is to go wrong with its next requests, in order."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}  # statuses, (status, reason), or functions of the body
        self.requests: list[tuple[str, str | None]] = []  # path and Range header
        self.absent, self.ranges, self.lengths, self.delay = 404, True, True, 0.0
        self.identity = "ETag"
        answer = self.answer
        handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": lambda request: answer(request),
                                                              "log_message": lambda *_: None})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, asked = request.path, request.headers["Range"]
        self.requests.append((path, asked))
        fault = self.faults[path].pop(0) if self.faults.get(path) else None if path in self.files else self.absent
        if isinstance(fault, int | tuple):
            request.send_response(*(fault if isinstance(fault, tuple) else (fault,)))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = self.files[path]
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        start = start if request.headers["If-Range"] == tag else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.identity:
            request.send_header(self.identity, tag)
        if self.lengths:
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        body = fault(content[start:]) if fault else content[start:]
        try:
            for i in range(0, len(body), 1 << 14):
                request.wfile.write(body[i:i + (1 << 14)])
                time.sleep(self.delay)
        except OSError:  # the client was killed
            pass

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def drop_after(count: int):
    return lambda body: body[:count]


def flip(body: bytes, at: int = -100) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at:][1:]


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def known(content: bytes) -> dict:
    """What checksums.json should say, by Pillow and hashlib alone."""
    pixels = decoded(content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "shape": list(pixels.shape),
            "dtype": str(pixels.dtype), "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED, link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        if link:
            member = zipfile.ZipInfo(link)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, "../../secret.png")
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], links: dict[str, str] | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


RNG = np.random.default_rng(0)
GREY = {f"{name}.tif": encoded(RNG.integers(0, 256, (200, 300), dtype=np.uint8), "TIFF") for name in ("a", "b", "ü c")}
A = decoded(GREY["a.tif"])
ORIGINALS = {f"{name}.png": RNG.integers(0, 256, shape, dtype=np.uint8)
             for name, shape in {"0801": (41, 60, 3), "0802": (64, 33, 3)}.items()}
CUT = {file: encoded(pixels[(len(pixels) - 32) // 2:, (pixels.shape[1] - 32) // 2:][:32, :32], "PNG")
       for file, pixels in ORIGINALS.items()}
HR = zipped({f"HR/{file}": encoded(pixels, "PNG") for file, pixels in ORIGINALS.items()})


@pytest.fixture(autouse=True)
def made_sets(monkeypatch):
    """Set11 with three made pictures, one file each; DIV2K with two, cut from originals in an archive."""
    monkeypatch.setitem(verify.CHECKSUMS, "Set11", {file: known(content) for file, content in GREY.items()})
    monkeypatch.setitem(verify.CHECKSUMS, "DIV2K", {file: known(content) for file, content in CUT.items()})
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda _: None))  # before another attempt


@pytest.fixture
def home(monkeypatch):
    """A server that is the home of both sets."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    monkeypatch.setitem(fetch.HOMES, "Set11", fetch.Home(server.url + "/raw/{file}", "http://page"))
    monkeypatch.setitem(fetch.HOMES, "DIV2K", fetch.Home(server.url + "/DIV2K_valid_HR.zip", "", range(-2, 3)))
    server.files = {f"/raw/{file.replace('ü c', '%C3%BC%20c')}": content for file, content in GREY.items()}
    server.files["/DIV2K_valid_HR.zip"] = HR
    yield server
    server.stop()


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the command line; returns its exit status, what it prints, and its one sentence on stderr, if any."""
    def call(*flags: str, folder: str = ".") -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(sys, "argv", ["download", *flags])
        status = 0
        try:
            run(command.main)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert err.count("\n") == (status == 2) and "\x1b" not in out + err
        return status, out, err
    return call


def found(folder: Path) -> dict[str, bytes]:
    """All files, but locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def of_set(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}/{file}": content for file, content in files.items()}


# --- from the homes ------------------------------------------------------------------------------------------------

def test_only_what_is_missing_is_fetched_and_a_users_files_are_never_touched(tmp_path, call, home):
    status, out, _ = call("Set11")
    assert status == 0 and found(tmp_path / "data") == of_set("Set11", GREY)
    assert "Set11: 3 of 3 pictures in data/Set11 are right: 3 by the checksum of the file" in out
    home.requests.clear()
    assert call("Set11")[0] == 0 and home.requests == []
    mine = {"a.tif": flip(GREY["a.tif"]), "b.tif": b"not a picture", "mine.PNG": b"", "notes.txt": b"", ".x.png": b""}
    put(tmp_path / "data" / "Set11", mine)
    (tmp_path / "data" / "Set11" / "ü c.tif").unlink()
    status, out, _ = call("--check", "Set11")
    assert status == 1 and "missing: ü c.tif" in out
    status, out, _ = call("Set11")
    assert status == 1 and [path for path, _ in home.requests] == ["/raw/%C3%BC%20c.tif"]
    assert found(tmp_path / "data" / "Set11") == mine | {"ü c.tif": GREY["ü c.tif"]}
    for said in ("Set11: 1 of 3 pictures", "a.tif has the wrong checksum", "ignored: '.x.png', 'notes.txt'\n",
                 "b.tif is damaged or no picture (13 bytes, not ", "test.py would average over them: 'mine.PNG'\n"):
        assert said in out


def test_pictures_are_cut_from_originals(tmp_path, call, home):
    status, out, _ = call("DIV2K")
    pictures = found(tmp_path / "data")
    assert status == 0 and set(pictures) == {"DIV2K/0801.png", "DIV2K/0802.png"}  # the archive is gone
    assert all((decoded(pictures[f"DIV2K/{file}"]) == decoded(content)).all() for file, content in CUT.items())
    # The encoder here is not Pillow's: other bytes, the same pixels; and that is what is said.
    assert "2 by the checksum of the pixels" in out


@pytest.mark.parametrize("shift, inside", [(2, True), (-2, True), (3, False)])
def test_a_cut_is_searched_near_the_centre_alone(shift, inside):
    original = np.random.default_rng(1).integers(0, 256, (50, 45, 3), dtype=np.uint8)  # the centre's corner: 9, 6
    cut = original[9 + shift:41 + shift, 6:38]
    match = verify.find(encoded(original, "PNG"), {"x.png": known(encoded(cut, "PNG"))}, range(-2, 3))
    assert (decoded(match[1]) == cut).all() if inside else match is None


def faults(*faults):
    return lambda home: home.faults.update({"/raw/a.tif": list(faults)})


def archive(damaged: bytes):
    return lambda home: home.faults.update({"/DIV2K_valid_HR.zip": [lambda _: damaged]})


@pytest.mark.parametrize("name, fault, message, left", [
    ("Set11", Server.stop, "(Connection refused); otherwise, in a browser, get", 0),
    ("Set11", lambda home: home.files.pop("/raw/a.tif"), "/raw/a.tif is not there (HTTP 404); otherwise, in a br", 2),
    ("Set11", faults((401, "\x1b[31mno")), r"(HTTP 401: \x1b[31mno)", 0),
    ("Set11", faults(*[503] * 9), "503 Server Error: Service Unavailable for url", 0),
    ("Set11", faults(*[drop_after(0)] * 9), "(0 bytes read, 60", 0),
    ("Set11", faults(flip), "a.tif has the wrong checksum (SHA-256 of the file", 2),
    ("Set11", lambda home: home.files.update({"/raw/a.tif": bytes(90000)}), "larger than expected (90,000 bytes", 0),
    ("Set11", lambda home: vars(home).update(lengths=False, files={"/raw/a.tif": bytes(90000)}), "larger than exp", 0),
    ("Set11", lambda _: setattr(fetch, "SLOWEST", np.inf), "is too slow, and was given up", 0),
    ("DIV2K", lambda home: home.files.pop("/DIV2K_valid_HR.zip"), "/DIV2K_valid_HR.zip is not there (HTTP 404)", 0),
    ("DIV2K", archive(flip(HR, HR.index(b"IDAT") + 200)), "is no zip or tar archive, or is damaged (Bad CRC", 0),
    ("DIV2K", archive(b"<html>Log in".ljust(len(HR))), "starts with b'<html>Log in", 0),
])
def test_what_goes_wrong_at_the_server_is_one_sentence(tmp_path, call, home, monkeypatch, name, fault, message, left):
    monkeypatch.setattr(fetch, "PICTURE_LIMIT", 70000)
    monkeypatch.setattr(fetch, "SLOWEST", 1)
    fault(home)
    status, _, err = call(name)
    assert status == 2 and message in err and len(found(tmp_path / "data" / name)) == left
    if home.faults:  # nothing wrong was kept, and other pictures go on
        home.faults.clear()
        assert call(name)[0] == 0 and set(found(tmp_path / "data")) == set(of_set(name, verify.CHECKSUMS[name]))


# --- interrupted ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("identity, ranges", [("ETag", True), ("Last-Modified", True), ("ETag", False)])
def test_a_dropped_connection_goes_on_where_it_stopped(tmp_path, call, home, identity, ranges):
    home.identity, home.ranges = identity, ranges
    home.faults = {"/raw/a.tif": [drop_after(9000)] * 5 if ranges else [drop_after(20000), drop_after(30000)],
                   "/raw/b.tif": [503]}
    assert call("Set11")[0] == 0 and found(tmp_path / "data") == of_set("Set11", GREY)
    if ranges:
        assert [asked for path, asked in home.requests if path == "/raw/a.tif"] == [
            None, *(f"bytes={have}-" for have in range(9000, 45001, 9000))]


def test_a_file_that_changed_meanwhile_is_not_patched_together(tmp_path, home):
    old, new = (np.random.default_rng(seed).bytes(50000) for seed in (0, 1))

    def replace(body):
        home.files["/x"] = new
        return body[:20000]

    home.files, home.faults = {"/x": old}, {"/x": [replace]}
    assert fetch.fetch(home.url + "/x", tmp_path, 1 << 20).read_bytes() == new
    assert [asked for _, asked in home.requests] == [None, "bytes=20000-"] and len(found(tmp_path)) == 1


def test_a_killed_download_goes_on(tmp_path, call, home, monkeypatch):
    code = ("import json, pathlib, sys; from utils.download import command, fetch, verify; url, known = sys.argv[1:]\n"
            "verify.CHECKSUMS['Set11'], fetch.HOMES['Set11'] = json.loads(known), fetch.Home(url + '/raw/{file}', '')\n"
            "command.get('Set11', None, pathlib.Path('data'))")
    home.delay = 1e6  # seconds after the first of four chunks
    process = subprocess.Popen([sys.executable, "-c", code, home.url, json.dumps(verify.CHECKSUMS["Set11"])],
                               cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    kept, have = None, 0
    while not have and process.poll() is None:
        kept = next((tmp_path / "data").rglob("*a.tif.partial"), None) if (tmp_path / "data").exists() else None
        have = kept.stat().st_size if kept else 0
        time.sleep(0.05)
    monkeypatch.setattr(files, "PATIENCE", 0)
    assert "another process is writing into data/.download" in call("Set11", "--from", home.url)[2]
    process.kill()
    process.wait()
    have = kept.stat().st_size
    assert 0 < have < len(GREY["a.tif"]) and not (tmp_path / "data" / "Set11").exists()
    home.delay = 0
    home.requests.clear()
    assert call("Set11")[0] == 0 and home.requests[0] == ("/raw/a.tif", f"bytes={have}-")
    assert found(tmp_path / "data") == of_set("Set11", GREY)


def test_a_full_disk_is_one_sentence_and_room_helps(tmp_path, call, home):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, limits[1]))
    try:
        status, _, err = call("Set11")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "cannot write" in err and "File too large" in err
    assert not (tmp_path / "data" / "Set11").exists()
    home.requests.clear()
    assert call("Set11")[0] == 0 and home.requests[0] == ("/raw/a.tif", "bytes=30000-")


# --- mirrors and archives ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mirror", [
    of_set("m/DIV2K", CUT), {"m/DIV2K_valid_HR.zip": HR}, {"m/my pictures.tar.gz": tarred(CUT)},
    {"m/DIV2K.zip": zipped({f"any/{i}.png": content for i, content in enumerate(CUT.values())})},
], ids=["files", "home's archive", "one archive", "SET.zip"])
@pytest.mark.parametrize("web", [404, 403, None], ids=["web", "storage service", "folder"])
def test_mirrors(tmp_path, call, home, mirror, web):
    home.absent, home.files = web, {"/" + name.replace(" ", "%20"): content for name, content in mirror.items()}
    put(tmp_path, mirror)
    source = (home.url + "/m" if web else "m") + "/my pictures.tar.gz" * ("m/my pictures.tar.gz" in mirror)
    assert call("DIV2K", "--from", source.replace(" ", "%20") if web else source)[0] == 0
    assert call("DIV2K", "--check")[0] == 0 and found(tmp_path / "m") == {name[2:]: mirror[name] for name in mirror}


@pytest.mark.parametrize("archive", [
    zipped({f"../../{file}": content for file, content in CUT.items()} | {"../evil.png": b"", "/tmp/evil.tif": b""}),
    zipped({f"/{file}": content for file, content in CUT.items()} | {"..\\evil.png": b"evil", "..": b""}),
    zipped({f"../../../{file}": content for file, content in CUT.items()}, link="0801.png"),
    tarred({f"../../{file}": content for file, content in CUT.items()} | {"/evil.png": b"evil"}),
    tarred({f"link/{file}": content for file, content in CUT.items()}, {"link": "/tmp", "0801.png": "../secret.png"}),
], ids=["zip climbs", "zip absolute", "zip link", "tar climbs", "tar link"])
def test_nothing_is_written_but_the_pictures_of_the_set(tmp_path, call, archive):
    before = {"secret.png": b"secret", "below/m.zip": archive}
    put(tmp_path, before)
    assert call("DIV2K", "--from", "m.zip", folder="below")[0] == 0
    assert found(tmp_path) == before | of_set("below/data/DIV2K", CUT)
    assert not any("evil" in name for name in os.listdir("/tmp"))


@pytest.mark.parametrize("archive, message", [
    (zipped({"0801.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED), "would take 1,048,576 bytes"),
    (zipped({f"{i}.png": bytes(60000) for i in range(9)}, zipfile.ZIP_DEFLATED), "the whole archive 240,000 or more"),
    (tarred({"0801.png": bytes(150000)}), "would take 150,000 bytes"),
    (tarred({"notes.txt": bytes(1 << 20)}), "would take 1,048,576 bytes"),
    *[(tarred({"0801.png": bytes(1 << 24)}, kind=kind), "would take 16,777,216 bytes")  # read before the name is known
      for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE)],
    # A megabyte of zeros that claims to be 999 bytes long
    (zipped({"0801.png": bytes(1 << 20)}, 8).replace(struct.pack("<I", 1 << 20), struct.pack("<I", 999)), "is damaged"),
    (zipped({"0801.png": encoded(ORIGINALS["0801.png"], "PNG")})[:-9], "is damaged"),
    (tarred(CUT)[:2000], "is damaged"),
    (b"<!DOCTYPE html>", "starts with b'<!DOCTYPE html>'"),
    (b"", "is damaged"),
])
def test_bombs_and_fragments_are_refused(tmp_path, monkeypatch, call, archive, message):
    monkeypatch.setattr(fetch, "PICTURE_LIMIT", 100000)
    monkeypatch.setattr(fetch, "ARCHIVE_LIMIT", 200000)
    put(tmp_path, {"m.zip": archive})
    status, out, err = call("DIV2K", "--from", "m.zip")
    assert (status, out) == (2, "") and message in err and found(tmp_path) == {"m.zip": archive}


def test_a_picture_of_absurd_size_is_not_decoded(monkeypatch):
    bomb = encoded(np.zeros((100, 100), np.uint8), "PNG")
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("it was decoded"))
    assert verify.find(bomb[:16] + struct.pack(">II", 60000, 60000) + bomb[24:], {"x.png": known(bomb)}) is None


@pytest.mark.parametrize("flags, message", [
    (["Set11", "--from", "nowhere"], "nowhere is no archive, and no folder in which there is Set11 or Set11.zip"),
    (["Set11", "--from", "ftp://host"], "--from takes a folder"),
    (["Set11", "--from", ""], "--from must not be empty"),
    (["Set11", "--data_dir", ""], "argument --data_dir: must not be empty"),
    (["Set11", "--from", "http://a host"], "cannot fetch http://a host/Set11.zip (Failed to parse"),
    (["Set12"], "Set12 is not known here; choose from Set11"),
    (["Set11", "--form", "x"], "--help lists the flags"),
    (["Set11", "--data_dir", "file"], "cannot write into file/.download/Set11 (Not a directory); choose another --da"),
])
def test_mistakes_are_one_sentence(tmp_path, call, flags, message):
    (tmp_path / "file").write_text("")
    status, out, err = call(*flags)
    assert (status, out) == (2, "") and message in err


# --- what is there -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, expected", [
    (encoded(A, "TIFF", compression="tiff_lzw"), "pixels"),
    (encoded(A.T, "TIFF"), "is 200x300 grey uint8, not 300x200 grey"),
    (encoded(np.dstack([A] * 3), "TIFF"), "300x200 colour uint8, not"),
    (encoded(np.zeros((200, 300), np.uint16), "TIFF"), "is 300x200 grey uint16, not 300x200 grey uint8"),
    (GREY["a.tif"][:5000], "is damaged or no picture (5,000 bytes"),
    (GREY["b.tif"], "has the wrong checksum"),
])
def test_the_verdict_on_a_file(tmp_path, call, content, expected):
    put(tmp_path / "data" / "Set11", GREY | {"a.tif": content})
    status, out, _ = call("--check")
    assert status == (0 if expected == "pixels" else 1) and expected in out


def test_a_folder_a_link_and_odd_names_in_the_way(tmp_path, call):
    put(tmp_path / "data" / "Set11", {"b.tif": GREY["b.tif"], "copy of b.tif": GREY["b.tif"]})
    (tmp_path / "data" / "Set11" / "a.tif").mkdir()
    (tmp_path / "data" / "Set11" / "ü c.tif").symlink_to("nowhere")
    (tmp_path / "data" / "Set11" / os.fsdecode(b"\xff\x1b[31m.png")).write_bytes(b"")
    status, out, _ = call("--check")
    assert status == 1 and "'copy of b.tif'" in out and out.encode()
    assert "a.tif cannot be read (Is a directory)" in out and "ü c.tif cannot be read (No such file" in out


def test_check_of_nothing(tmp_path, call):
    status, out, _ = call("--check")
    assert status == 0 and out.count("not there\n") == 6
    for name in command.NAMES:
        status, out, _ = call("--check", name)
        assert status == 1 and name in out and out.count("\n") == 1
    assert found(tmp_path) == {}


def test_the_known_checksums():
    sizes = {"Set11": {(256, 256): 7, (256, 256, 3): 2, (512, 512): 2},
             "CBSD68": {(288, 480, 3): 53, (480, 288, 3): 15},
             "Urban100": {(256, 256, 3): 100}, "DIV2K": {(256, 256, 3): 100}}
    names = {"Set11": {"Monarch", "Parrots", "barbara", "boats", "cameraman", "fingerprint", "flinstones", "foreman",
                       "house", "lena256", "peppers256"},
             "CBSD68": {f"test_{i:02}" for i in range(1, 69)}, "Urban100": {f"img_{i:03}" for i in range(1, 101)},
             "DIV2K": {f"{i:04}" for i in range(801, 901)}}
    checksums = json.loads((ROOT / "utils" / "download" / "checksums.json").read_text())
    assert set(checksums) == set(sizes) == set(fetch.HOMES)
    entries = [entry for pictures in checksums.values() for entry in pictures.values()]
    for key in ("sha256", "pixels"):
        digests = {entry[key] for entry in entries}
        assert len(digests) == 279 and all(len(bytes.fromhex(digest)) == 32 for digest in digests)
    for name, pictures in checksums.items():
        assert {Path(file).stem for file in pictures} == names[name]
        shapes = [tuple(entry["shape"]) for entry in pictures.values()]
        assert {shape: shapes.count(shape) for shape in shapes} == sizes[name]


# --- what is fetched by hand ---------------------------------------------------------------------------------------

def test_waterloo_is_counted_and_its_files_are_complete(tmp_path, monkeypatch, call):
    assert "4,744 BMP files into data/pristine_images" in call("Waterloo")[1]
    monkeypatch.setattr(verify, "WATERLOO", 12)
    colour = encoded(RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8), "BMP")
    folder = tmp_path / "data" / "pristine_images"
    put(folder, {f"{i:05}.bmp": colour for i in range(1, 12)} | {"sub/last.BMP": encoded(np.eye(9) > 0, "BMP")})
    status, out, _ = call("Waterloo", "--check")
    assert status == 0 and "12 complete BMP files of 12" in out
    put(folder, {"00001.bmp": colour[:-1], "00002.bmp": b"BM", "00003.bmp": CUT["0801.png"], "00004.bmp": b""})
    status, out, _ = call("--check")
    assert status == 1 and "8 complete BMP files of 12" in out
    assert "'00001.bmp', '00002.bmp', '00003.bmp', '00004.bmp'\n" in out


def test_weights_have_the_published_keys_and_shapes(tmp_path, call):
    assert "weight/R_0.10_T_3_B_32/net_params_50.pkl" in call("weights")[1]
    path = tmp_path / "weight" / "R_0.30_T_3_B_32" / "net_params_50.pkl"
    path.parent.mkdir(parents=True)
    lines = (ROOT / "tests" / "golden" / "official_checkpoint_keys.txt").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split("\t") for line in lines)}
    zeros = {shape: torch.zeros(shape, dtype=torch.float8_e4m3fn) for shape in set(shapes.values())}  # a small file
    state = {key: zeros[shape] for key, shape in shapes.items()}
    torch.save(state, path)
    assert len(state) == 1079
    status, out, _ = call("--check")
    assert status == 0 and "holds the 1,079 published keys and shapes" in out
    whole = path.read_bytes()
    for damage, message in ((lambda: path.write_bytes(whole[:-1000]), "truncated"),
                            (lambda: torch.save({**state, "alpha": torch.zeros(4)}, path), "alpha is (4,), not (3,)"),
                            (lambda: torch.save(state | {"beta": zeros[3,]}, path), "beta does not belong there")):
        damage()
        status, out, _ = call("--check", "weights")
        assert status == 1 and message in out
