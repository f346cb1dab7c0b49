"""The cache holds what the files hold, whatever happens to it, to the files, or to whoever builds it."""
import errno
import fcntl
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import sys
import time

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


@pytest.fixture
def sources(tmp_path):
    """Names and luminance of what is written as lossless grey files, in the order of their paths."""
    return {"a.png": noise(0, 40, 31), "b folder/deep/c.TIFF": noise(1, 7, 300), "b folder/ü.bmp": noise(2, 1, 1),
            os.fsdecode(b"d\xff.png"): noise(3, 64, 64)}


@pytest.fixture
def folder(tmp_path, sources):
    for name, picture in sources.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, picture)[1].tobytes())
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def holds(pictures, sources) -> bool:
    return pictures.names == list(sources) and all(
        np.array_equal(picture, source) for picture, source in zip(pictures, sources.values(), strict=True))


def files(cache_dir) -> list[str]:
    """What lies in the cache folder, without the lock."""
    return [name for name in os.listdir(cache_dir) if not name.endswith(".lock")]


def counting_reads(monkeypatch, seconds: float = 0) -> list[str]:
    """The names of the pictures that are decoded from now on."""
    read, names = luminance_cache.read_picture, []

    def counted(path):
        names.append(path.name)
        time.sleep(seconds)
        return read(path)

    monkeypatch.setattr(luminance_cache, "read_picture", counted)
    return names


def test_the_cache_holds_what_the_files_hold(folder, cache_dir, sources, monkeypatch, capsys):
    reads = counting_reads(monkeypatch)
    for where in (None, cache_dir, cache_dir):
        reads.clear()
        pictures = open_pictures(folder, where)
        assert holds(pictures, sources) and pictures.unreadable == ["broken.jpg"]
        assert not pictures[0].flags.writeable
    assert reads == ["broken.jpg"]  # tried again, and nothing else
    assert len(files(cache_dir)) == 1 and capsys.readouterr() == ("", "")
    size = sum(source.size for source in sources.values())
    assert size < (cache_dir / files(cache_dir)[0]).stat().st_size < size + 1000


@pytest.mark.parametrize("change", ["content", "date", "added", "removed", "renamed"])
def test_a_changed_folder_gets_a_new_cache_and_the_old_one_goes(folder, cache_dir, sources, change):
    open_pictures(folder, cache_dir)
    old, path = files(cache_dir), folder / "a.png"
    partial = f".{old[0][-40:]}.partial"  # as write_whole names it
    (cache_dir / partial).write_bytes(b"left by a killed process")
    (cache_dir / "of-another-folder.luminance").write_bytes(b"")
    if change in ("content", "added"):
        picture = noise(9, 40, 31)
        path = path if change == "content" else folder / "aa.png"
        path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        sources = dict(sorted({**sources, path.name: picture}.items()))
    elif change == "date":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif change == "removed":
        path.unlink()
        del sources["a.png"]
    elif change == "renamed":
        path.rename(folder / "aa.png")
        sources = {"aa.png": sources.pop("a.png"), **sources}
    assert holds(open_pictures(folder, cache_dir), sources)
    assert len(files(cache_dir)) == 2 and not {*old, partial} & {*files(cache_dir)}


def test_a_cache_in_use_is_not_removed(folder, cache_dir, sources):
    """Its user may have to map it again, in a worker."""
    used = open_pictures(folder, cache_dir)
    old = files(cache_dir)[0]
    os.utime(folder / "a.png", (1, 1))
    open_pictures(folder, cache_dir)
    assert old in files(cache_dir) and holds(pickle.loads(pickle.dumps(used)), sources)
    del used
    os.utime(folder / "a.png", (2, 2))
    open_pictures(folder, cache_dir)
    assert len(files(cache_dir)) == 1


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:10], lambda whole: whole[:-1], lambda whole: whole[:len(whole) // 2],
    lambda whole: whole[:-20], lambda whole: whole + b"\0", lambda whole: bytes(len(whole)),
    lambda whole: b"text of another program\n" * 100,
    *[lambda whole, at=at: whole[:at] + bytes([whole[at] ^ 1]) + whole[at:][1:] for at in (0, 3000, -200, -20, -9, -1)],
])
def test_a_damaged_or_foreign_file_is_built_again_with_a_sentence(folder, cache_dir, sources, capsys, damage):
    open_pictures(folder, cache_dir)
    path = cache_dir / files(cache_dir)[0]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert holds(open_pictures(folder, cache_dir), sources)
    assert capsys.readouterr().err == f"note: the cache {path} is built again: it is damaged\n"
    assert path.read_bytes() == whole and len(files(cache_dir)) == 1


def test_what_could_not_be_read_is_tried_again(folder, cache_dir, sources, monkeypatch, capsys):
    """A picture may have been left out for want of a permission, which changes neither its size nor its date."""
    def denied(path):
        if path.name == "a.png":
            raise UserError(f"cannot read {path}: Permission denied")
        return read(path)

    read = luminance_cache.read_picture
    with monkeypatch.context() as patch:
        patch.setattr(luminance_cache, "read_picture", denied)
        assert open_pictures(folder, cache_dir).unreadable == ["a.png", "broken.jpg"]
        assert capsys.readouterr().err == ""
    assert holds(open_pictures(folder, cache_dir), sources)
    assert "built again: pictures that could not be read can be read now\n" in capsys.readouterr().err


def test_of_many_processes_one_builds(folder, cache_dir, sources, monkeypatch):
    reads = FORK.Value("i", 0)
    read = luminance_cache.read_picture

    def counted(path):
        with reads.get_lock():
            reads.value += path.suffix != ".jpg"
        time.sleep(0.02)
        return read(path)

    def work():
        sys.exit(not holds(open_pictures(folder, cache_dir), sources))

    monkeypatch.setattr(luminance_cache, "read_picture", counted)
    processes = [FORK.Process(target=work) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert reads.value == len(sources) and len(files(cache_dir)) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_builder_leaves_nothing_that_harms(folder, cache_dir, sources, monkeypatch, number):
    draw = random.Random(0)
    for _ in range(10):
        with monkeypatch.context() as patch:
            counting_reads(patch, seconds=0.01)
            process = FORK.Process(target=open_pictures, args=(folder, cache_dir))
            process.start()
            time.sleep(draw.uniform(0, 0.06))
            os.kill(process.pid, number)
            process.join(60)
        assert holds(open_pictures(folder, cache_dir), sources)
        assert len(files(cache_dir)) == 1
        os.unlink(cache_dir / files(cache_dir)[0])


def in_a_process(work) -> str:
    """What UserError says that `work` raises in a process of its own."""
    def run():
        try:
            work()
        except UserError as error:
            end.send(str(error))

    start, end = FORK.Pipe(duplex=False)
    process = FORK.Process(target=run)
    process.start()
    end.close()
    said = start.recv()
    process.join()
    return said


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, cache_dir, sources):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        open_pictures(folder, cache_dir)

    said = in_a_process(work)
    assert re.fullmatch(r"cannot keep a cache of the pictures of \S+ in \S+ \(File too large\); choose another "
                        r"--cache_dir, or --no_cache to read them into memory at each start", said)
    assert files(cache_dir) == []
    assert holds(open_pictures(folder, cache_dir), sources)


def test_a_cache_folder_that_cannot_be_written_is_one_sentence(folder, cache_dir, monkeypatch):
    for place, reason in (("/dev/null", "it is a file"), ("/dev/null/below", "Not a directory"),
                          ("/proc/below", "No such file or directory")):
        with pytest.raises(UserError, match=rf"in {place} \({reason}\); choose another --cache_dir, or --no_cache"):
            TrainingCrops(folder, 16, cache_dir=place)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device.*--cache_dir, or --no_cache"):
        open_pictures(folder, cache_dir)
    assert files(cache_dir) == []


def test_a_finished_cache_can_be_used_where_nothing_can_be_written(folder, cache_dir, sources, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    open_pictures(folder, cache_dir)
    for function in ("write_whole", "FileLock"):
        monkeypatch.setattr(luminance_cache, function, denied)
    assert holds(open_pictures(folder, cache_dir), sources)
    os.utime(folder / "a.png", (1, 1))
    with pytest.raises(UserError, match=r"\(Permission denied\); choose another --cache_dir, or --no_cache"):
        open_pictures(folder, cache_dir)


@pytest.mark.parametrize("name", ["a.png", "new.png"])
def test_a_folder_that_changes_meanwhile_is_not_cached(folder, cache_dir, sources, monkeypatch, name):
    def changing(path):
        (folder / name).write_bytes(b"half a pict")
        return read(path)

    read = luminance_cache.read_picture
    with monkeypatch.context() as patch:
        patch.setattr(luminance_cache, "read_picture", changing)
        with pytest.raises(UserError, match="the pictures in .* changed while they were being read; start again when"):
            open_pictures(folder, cache_dir)
    assert files(cache_dir) == []
    assert name in open_pictures(folder, cache_dir).unreadable  # by now it does not change any more


def test_who_waits_long_says_so(folder, cache_dir, monkeypatch, capsys):
    class Busy(luminance_cache.FileLock):
        def acquire(self, timeout=None, **more):
            if timeout:
                raise luminance_cache.Timeout(str(self.lock_file))
            return super().acquire(**more)

    monkeypatch.setattr(luminance_cache, "FileLock", Busy)
    for rank, said in (("0", f"note: waiting for another process that is reading {folder}\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        os.utime(folder / "a.png", (1, int(rank)))
        open_pictures(folder, cache_dir)
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_map_the_cache_and_do_not_copy_it(folder, cache_dir, method):
    crops = TrainingCrops(folder, 16, cache_dir=cache_dir)
    assert len(pickle.dumps(crops)) < 2000 < sum(picture.size for picture in crops.pictures)
    cut = list(DataLoader(crops, None, sampler=range(8), num_workers=1, multiprocessing_context=method))
    assert all((crop == TrainingCrops(folder, 16)[index]).all() for index, crop in enumerate(cut))


def test_only_the_very_file_is_mapped_again(folder, cache_dir):
    pictures = pickle.dumps(open_pictures(folder, cache_dir))
    path = cache_dir / files(cache_dir)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="was replaced"):
        pickle.loads(pictures)


def resident(path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    with open("/proc/self/smaps") as file:
        part = file.read().partition(str(path))[2]
    return 1024 * int(re.search(r"^Rss:\s+(\d+) kB", part, re.M)[1])


def test_memory_stays_bounded_however_many_pictures_there_are(tmp_path, cache_dir, monkeypatch):
    (tmp_path / "many").mkdir()
    for number in range(30):
        cv2.imwrite(str(tmp_path / "many" / f"{number:02}.bmp"), noise(number, 1000, 1000))
    pictures = open_pictures(tmp_path / "many", cache_dir)
    path = cache_dir / files(cache_dir)[0]
    assert resident(path) < 2**21
    monkeypatch.setattr(luminance_cache, "RESIDENT", 2**22)
    for _ in range(2):
        for number in range(30):
            assert pictures[number].sum() == noise(number, 1000, 1000).sum(dtype=int)
            assert resident(path) < 2**23
    assert resident(path) > 0


def test_a_lock_lasts_as_long_as_the_map(folder, cache_dir):
    """Which test_a_cache_in_use_is_not_removed rests on: mmap keeps the file open, and with it its lock."""
    pictures = open_pictures(folder, cache_dir)
    with open(cache_dir / files(cache_dir)[0], "r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del pictures
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_linked_folders_are_searched_but_not_in_circles(folder, sources, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture = noise(4, 9, 9)
    (elsewhere / "z.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "b folder" / "up").symlink_to(folder)
    assert holds(open_pictures(folder), {**sources, "link/z.png": picture})


def test_a_folder_that_cannot_be_searched_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match="cannot search .*/b folder/deep for pictures .Permission denied"):
        open_pictures(folder)
