"""Files and folders are complete or not there, whatever fails in the middle of writing."""
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from utils.errors import UserError
from utils.files import append_line, lock_folder, make_folder, remove, write_atomic, write_folder_atomic

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[None]:
    """While a process of its own has the folder's lock, which then is killed."""
    code = ("import sys, pathlib; from utils.files import lock_folder\n"
            "lock = lock_folder(pathlib.Path(sys.argv[1]), ''); print('held', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == "held\n"
        yield
    finally:
        other.kill()
        other.wait()


def full_disk(*args, **kwargs):
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, name):
    write_atomic(tmp_path / "a.png", b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full_disk)
        with pytest.raises(UserError, match=r"a\.png.*No space left"):
            write_atomic(tmp_path / "a.png", b"after")
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"before"
    write_atomic(tmp_path / "a.png", lambda file: file.write(b"after"))
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"after"


def test_files_whose_names_end_alike_can_be_written_at_once(tmp_path):
    first, second = (tmp_path / f"{number}{'_' * 60}.png" for number in range(2))

    def write(file):
        file.write(b"fir")
        write_atomic(second, b"second")
        file.write(b"st")

    write_atomic(first, write)
    assert (first.read_bytes(), second.read_bytes()) == (b"first", b"second") and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("refused", ["folders", "all"])
def test_file_systems_that_cannot_synchronise_or_lock_are_written_to(tmp_path, monkeypatch, refused):
    """As Windows, CIFS and VirtualBox refuse what Linux's own file systems can do."""
    opened, unlink = os.open, os.unlink

    def no_folders(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    def no_open_files(path, *args, **kwargs):
        for descriptor in range(3, 100):
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    raise AssertionError("an open file would be removed")
        return unlink(path, *args, **kwargs)

    def refuse(*_, **__):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "open", no_folders)
    if refused == "all":
        monkeypatch.setattr(os, "fsync", refuse)
        monkeypatch.setattr(os, "chmod", refuse)
        monkeypatch.setattr(os, "unlink", no_open_files)
        monkeypatch.setattr("fcntl.flock", refuse)
        make_folder(tmp_path, "--result_dir")
        with lock_folder(tmp_path, "--result_dir"):
            pass
        monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with lock_folder(tmp_path, "--result_dir"):
        write_atomic(tmp_path / "a.png", b"picture")
    write_folder_atomic(tmp_path / "pretrained", lambda folder: write_atomic(folder / "weights", b"1"))
    append_line(tmp_path / "log.txt", "line")
    assert (tmp_path / "a.png").read_bytes() == b"picture" and (tmp_path / "pretrained" / "weights").exists()


def test_a_folder_is_one_process_s_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.files.PATIENCE", 0)
    with (held_by_another_process(tmp_path),
          pytest.raises(UserError, match="another process is writing into .*; choose another --result_dir")):
        lock_folder(tmp_path, "--result_dir")
    with lock_folder(tmp_path, "--result_dir"):
        pass


def test_what_killed_processes_left_is_removed_but_not_what_is_being_written(tmp_path):
    (tmp_path / ".pretrained-1.partial").mkdir()
    for name, age in ((".a.png-1.partial", 700), (".b.png-2.partial", 0), (".c.png-3.old", 700), ("d.partial", 700)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (os.stat(tmp_path / name).st_mtime - age,) * 2)
    os.utime(tmp_path / ".pretrained-1.partial", (1, 1))
    make_folder(tmp_path, "--result_dir")
    assert sorted(os.listdir(tmp_path)) == [".b.png-2.partial", ".c.png-3.old", "d.partial"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    write_atomic(tmp_path / ("ü" * 127), b"1")
    write_atomic(tmp_path / ("n" * 255), b"2")
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"1", b"2"}
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        write_atomic(tmp_path / "folder.png", b"a file never replaces a folder")
    assert (tmp_path / "folder.png").is_dir()


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for write in (lambda path: write_atomic(path, b""), lambda path: append_line(path, "a line"), remove):
        with pytest.raises(UserError, match="cannot write .*log.txt"):
            write(tmp_path / "file" / "log.txt")
    for folder, reason in (("file", "it is a file"), ("file/below", "Not a directory")):
        with pytest.raises(UserError, match=f"cannot write into .*{reason}.*choose another --log_dir"):
            make_folder(tmp_path / folder, "--log_dir")


def test_a_folder_that_cannot_be_written_into_is_found_out_at_once(tmp_path, monkeypatch):
    make_folder(tmp_path / "new" / "one", "--log_dir")
    assert os.listdir(tmp_path / "new" / "one") == []
    monkeypatch.setattr(os, "open", full_disk)
    with pytest.raises(UserError, match="No space left"):
        make_folder(tmp_path / "new" / "one", "--log_dir")


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "pretrained"
    write_folder_atomic(folder, lambda place: (place / "first").write_text("1"))

    def fail(place):
        (place / "second").write_text("2")
        raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_folder_atomic(folder, fail)
    assert os.listdir(folder) == ["first"]
    write_folder_atomic(folder, lambda place: (place / "second").write_text("2"))
    assert os.listdir(folder) == ["second"] and os.listdir(tmp_path) == ["pretrained"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder, replace = tmp_path / "pretrained", os.replace
    write_folder_atomic(folder, lambda place: (place / "first").write_text("1"))

    def fail(source, target):
        if str(source).endswith(".partial"):
            full_disk()
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        write_folder_atomic(folder, lambda place: (place / "second").write_text("2"))
    assert os.listdir(folder) == ["first"]


def test_a_log_grows_line_by_line(tmp_path):
    log = tmp_path / "log" / "run.txt"
    append_line(log, "[01/50] loss: 0.0312")
    append_line(log, "[02/50] loss: 0.0300")
    assert log.read_text() == "[01/50] loss: 0.0312\n[02/50] loss: 0.0300\n"


def test_files_of_a_folder_are_as_readable_as_any_other(tmp_path):
    def fill(place):
        os.close(os.open(place / "private", os.O_CREAT, 0o600))

    write_folder_atomic(tmp_path / "folder", fill)
    (tmp_path / "plain").touch()
    assert (tmp_path / "folder" / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_windows_lacks_is_not_needed():
    code = ("import model, os, sys, torch, types; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
            "import signal; del os.setsid, signal.SIGUSR1, signal.SIGHUP\n"
            "import compare, train; import test as _; from utils.download import command\n"
            "from utils.distributed import leave_process_group, stop_on_signal; leave_process_group(0)\n"
            "with stop_on_signal(): pass\n"
            "from utils.training.report import peak_memory; run = types.SimpleNamespace()\n"
            "run.process = types.SimpleNamespace(device=torch.device('cpu')); assert peak_memory(run) == 0")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
