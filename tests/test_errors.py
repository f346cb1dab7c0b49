"""Who says that something is wrong, and how."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import errors

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("rank", "said", "waited"), [
    (None, "error: no such ratio\n", []),
    ("0", "error: no such ratio\n", []),
    ("2", "error: rank 2: no such ratio\n", [errors.HEAD_START]),
])
def test_rank_0_speaks_first(monkeypatch, capsys, rank, said, waited):
    pauses = []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    def main():
        raise errors.UserError("no such ratio")

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == said and pauses == waited


@pytest.mark.parametrize(("error", "said"), [
    (FileNotFoundError(2, "No such file or directory", "a.png"), "cannot use a.png (No such file or directory)"),
    (OSError(28, "No space left on device"), "No space left on device")])
def test_what_the_operating_system_refuses_is_a_sentence(monkeypatch, capsys, error, said):
    monkeypatch.delenv("RANK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"


def in_a_process(code: str, **settings) -> subprocess.Popen:
    code = f"from utils import errors\ndef main():\n    {code}\nerrors.run(main)"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONIOENCODING": "utf-8"}, **settings)


def test_names_that_are_no_text_are_printed_escaped():
    process = in_a_process(r"print('caf\udce9')")
    assert process.communicate() == (rb"caf\udce9" + b"\n", b"") and process.returncode == 0


def test_an_output_that_nobody_reads_ends_it_without_a_word():
    process = in_a_process("print(1, flush=True); input(); print(2)", stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_the_first_line_of_an_error_is_never_empty():
    assert errors.first_line(OSError(28, "No space left on device")) == "No space left on device"
    assert errors.first_line(RuntimeError("\nunexpected pos\nand more")) == "unexpected pos"
    assert errors.first_line(KeyError()) == "KeyError"
