"""Who says that something is wrong, and how."""
import pytest

from utils import errors


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


def test_the_first_line_of_an_error_is_never_empty():
    assert errors.first_line(OSError(28, "No space left on device")) == "No space left on device"
    assert errors.first_line(RuntimeError("\nunexpected pos\nand more")) == "unexpected pos"
    assert errors.first_line(KeyError()) == "KeyError"
