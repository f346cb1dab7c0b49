"""The cache holds what the files hold, whatever happens to it, to the files, or to whoever builds it."""
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from utils.data import luminance_cache
from utils.data.crops import TrainingCrops
from utils.data.luminance_cache import open_pictures
from utils.errors import UserError

FORK = multiprocessing.get_context("fork")


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(path: Path, pixels: np.ndarray) -> bytes:
    return cv2.imencode(path.suffix, pixels)[1].tobytes()


@pytest.fixture
def sources(tmp_path):
    """Names and luminance of what is written as lossless grey files, in the order of their paths."""
    return {"a.bmp": noise(0, 40, 31), "b folder/deep/c.TIFF": noise(1, 7, 300), "b folder/ü.bmp": noise(2, 1, 1),
            os.fsdecode(b"d\xff.png"): noise(3, 64, 64)}


@pytest.fixture
def folder(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(luminance_cache, "BATCH", 2)
    for name, picture in sources.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(path, picture))
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def holds(pictures, sources) -> bool:
    found = {name: pictures[number] for number, name in enumerate(pictures.names) if pictures[number].size}
    return list(found) == list(sources) and all(np.array_equal(found[name], sources[name]) for name in sources)


def files(cache_dir) -> list[str]:
    """The suffixes of what lies in the cache folder."""
    return sorted(path.suffix for path in cache_dir.iterdir() if path.suffix != ".lock")


@pytest.fixture
def reads(monkeypatch):
    """The names of the pictures that are decoded."""
    read, names = luminance_cache.read_picture, []

    def counted(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(luminance_cache, "read_picture", counted)
    return names


def test_the_cache_holds_what_the_files_hold(folder, cache_dir, sources, reads, capsys):
    for where in (None, cache_dir):
        pictures = open_pictures(folder, where)
        assert holds(pictures, sources) and pictures.shapes[pictures.names.index("broken.jpg")].tolist() == [0, 0]
        assert not pictures[0].flags.writeable and len(reads) == 5
        reads.clear()
    index = next(cache_dir.glob("*.json"))
    entries = json.loads(index.read_text())
    index.write_text(json.dumps(entries | {"started": time.time_ns() + 10**10}))  # as if nothing had changed lately
    assert holds(open_pictures(folder, cache_dir), sources)
    assert reads == ["broken.jpg"]  # tried again, and nothing else
    assert files(cache_dir) == [".json", ".luminance"] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("change", ["rewritten", "replaced", "size", "date", "added", "removed", "renamed"])
def test_a_changed_folder_is_read_again(folder, cache_dir, sources, capsys, change):
    """Rewritten and replaced: by a picture of the same size and date."""
    used, path, other = open_pictures(folder, cache_dir), folder / "a.bmp", noise(9, 40, 31)
    before = path.stat()
    if change in ("rewritten", "replaced"):
        sources["a.bmp"], written = other, path if change == "rewritten" else folder / "new"
        written.write_bytes(encoded(path, other))
        os.utime(written, ns=(before.st_atime_ns, before.st_mtime_ns))
        written.rename(path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    elif change == "size":
        sources["a.bmp"] = other[:20]
        path.write_bytes(encoded(path, other[:20]))
    elif change == "date":
        os.utime(path, ns=(1, before.st_mtime_ns + 1))
    elif change == "added":
        (folder / "0.bmp").write_bytes(encoded(path, other))
        sources = {"0.bmp": other, **sources}
    else:
        picture = sources.pop("a.bmp")
        if change == "removed":
            path.unlink()
        else:
            path.rename(folder / "0.bmp")
            sources = {"0.bmp": picture, **sources}
    former = {name: used[number].copy() for number, name in enumerate(used.names)}
    assert holds(open_pictures(folder, cache_dir), sources)
    assert "is built again: " in capsys.readouterr().err and files(cache_dir) == [".json", ".luminance"]
    assert all(np.array_equal(used[number], former[name]) for number, name in enumerate(used.names))


def test_a_touched_picture_of_the_same_content_is_not_read_again(folder, cache_dir, capsys):
    open_pictures(folder, cache_dir)
    (folder / "a.bmp").chmod(0o600)
    open_pictures(folder, cache_dir)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["luminance", "json"])
@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:10], lambda whole: whole[:-2], lambda whole: whole + b"\0",
    lambda whole: bytes(len(whole)), lambda whole: b"text of another program\n" * 100, lambda whole: b"{}",
    lambda whole: whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:] if len(whole) > 3001 else b"[1]",
])
def test_a_damaged_or_foreign_file_is_built_again_with_a_sentence(folder, cache_dir, sources, capsys, damage, suffix):
    open_pictures(folder, cache_dir)
    path = next(cache_dir.glob(f"*.{suffix}"))
    path.write_bytes(damage(path.read_bytes()))
    assert holds(open_pictures(folder, cache_dir), sources)
    assert capsys.readouterr().err.startswith(f"note: the cache {path.with_suffix('.luminance')} is built again: ")
    assert holds(open_pictures(folder, cache_dir), sources) and capsys.readouterr().err == ""


def test_what_could_not_be_read_is_tried_again(folder, cache_dir, sources, monkeypatch, capsys):
    """A picture may have been left out for want of a permission, which changes neither its size nor its date."""
    def denied(path):
        if path.name == "a.bmp":
            raise UserError(f"cannot read {path}: Permission denied")
        return read(path)

    read = luminance_cache.read_picture
    with monkeypatch.context() as patch:
        patch.setattr(luminance_cache, "read_picture", denied)
        assert TrainingCrops(folder, 1, cache_dir=cache_dir).unreadable == ["a.bmp", "broken.jpg"]
    assert capsys.readouterr().err == "" and holds(open_pictures(folder, cache_dir), sources)
    assert "built again: a.bmp has changed, or can be read now\n" in capsys.readouterr().err


def test_of_many_processes_one_builds(folder, cache_dir, sources, monkeypatch):
    reads, read = FORK.Value("i", 0), luminance_cache._write

    def counted(*args):
        with reads.get_lock():
            reads.value += 1
        time.sleep(0.1)
        return read(*args)

    monkeypatch.setattr(luminance_cache, "_write", counted)
    processes = [FORK.Process(target=lambda: sys.exit(not holds(open_pictures(folder, cache_dir), sources)))
                 for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6 and reads.value == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_builder_leaves_nothing_that_harms(folder, cache_dir, sources, monkeypatch, number):
    draw, read = random.Random(0), luminance_cache.read_picture
    monkeypatch.setattr(luminance_cache, "tqdm", lambda items, *_, **__: items)  # its lock would be the killed child's
    for _ in range(10):
        with monkeypatch.context() as patch:
            patch.setattr(luminance_cache, "read_picture", lambda path: time.sleep(0.01) or read(path))
            process = FORK.Process(target=open_pictures, args=(folder, cache_dir))
            process.start()
            time.sleep(draw.uniform(0, 0.06))
            os.kill(process.pid, number)
            process.join(60)
        assert holds(open_pictures(folder, cache_dir), sources)
        for path in cache_dir.iterdir():
            path.unlink()


def test_a_cache_that_cannot_be_written_is_one_sentence(folder, cache_dir, sources):
    for place, reason in (("/dev/null", "it is a file"), ("/dev/null/below", "Not a directory"),
                          ("/proc/below", "No such file or directory")):
        with pytest.raises(UserError, match=rf"into {place} \({reason}\); choose another --cache_dir, or --no_cache"):
            TrainingCrops(folder, 16, cache_dir=place)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*luminance .File too large"):
            open_pictures(folder, cache_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ".luminance" not in files(cache_dir) and holds(open_pictures(folder, cache_dir), sources)


def test_a_finished_cache_can_be_used_where_nothing_can_be_written(folder, cache_dir, sources, monkeypatch):
    def denied(*_, **__):
        raise UserError("Permission denied")

    open_pictures(folder, cache_dir)
    for function in ("write_atomic", "lock", "make_folder"):
        monkeypatch.setattr(luminance_cache, function, denied)
    assert holds(open_pictures(folder, cache_dir), sources)


@pytest.mark.parametrize("name", ["a.bmp", "new.png"])
def test_a_folder_that_changes_meanwhile_is_not_cached(folder, cache_dir, monkeypatch, name):
    def changing(path):
        (folder / name).write_bytes(b"half a pict")
        return read(path)

    read = luminance_cache.read_picture
    with monkeypatch.context() as patch:
        patch.setattr(luminance_cache, "read_picture", changing)
        with pytest.raises(UserError, match="the pictures in .* changed while they were being read; start again when"):
            open_pictures(folder, cache_dir)
    assert files(cache_dir) == []
    assert name in TrainingCrops(folder, 1, cache_dir=cache_dir).unreadable  # by now it does not change any more


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_map_the_cache_and_do_not_copy_it(folder, cache_dir, method):
    (folder / "large.bmp").write_bytes(encoded(Path("a.bmp"), noise(5, 100, 100)))
    crops = TrainingCrops(folder, 16, cache_dir=cache_dir)
    assert len(pickle.dumps(crops)) < 3000 < sum(picture.size for picture in map(crops.pictures.__getitem__, range(6)))
    cut = list(DataLoader(crops, None, sampler=range(8), num_workers=1, multiprocessing_context=method))
    assert all((crop == TrainingCrops(folder, 16)[index]).all() for index, crop in enumerate(cut))
    kept = pickle.dumps(open_pictures(folder, cache_dir))
    luminance_cache._map.cache_clear()  # as in a worker that starts now
    (folder / "large.bmp").write_bytes(encoded(Path("a.bmp"), noise(6, 100, 100)))
    open_pictures(folder, cache_dir)
    with pytest.raises(ValueError, match="was replaced while it was in use"):
        pickle.loads(kept)[0]
