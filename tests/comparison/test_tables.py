"""Tables of made-up scores, whose ranks and averages are plain to see."""
import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest

from utils.comparison.compare import Comparison, Method, Recorded, Remark, Score
from utils.comparison.published import Published
from utils.comparison.tables import (
    averages_csv,
    averages_table,
    latex,
    markdown,
    notes,
    overview_table,
    pictures_table,
    ranked,
    remark_lines,
    scores_csv,
    terminal,
    wrapped,
)


def method(name: str, **psnr: float) -> Method:
    scores = {picture: Score(Path(f"{picture}.png"), value, round(value / 100, 12)) for picture, value in psnr.items()}
    return Method(name, Path(name), scores)


def comparison(*methods: Method, published=()) -> Comparison:
    return Comparison("Set", 0.1, ["p", "q", "r"], list(methods), list(published))


def cells(table) -> list[list[str]]:
    return [["".join(value.text + ("", "*", "+")[value.rank] for value in cell) for cell in row] for row in table]


@pytest.mark.parametrize("values, expected", [
    ([30.0, 31.0, 29.0], "30.00+ 31.00* 29.00"),
    ([30.001, 30.004, 29.0], "30.00* 30.00* 29.00+"),  # equal as printed
    ([30.0, 29.0, 29.0], "30.00* 29.00+ 29.00+"),
    ([30.0, 30.0], "30.00* 30.00*"),
    ([30.0], "30.00"),
    ([30.0, None], "30.00 -"),
    ([float("inf"), 99.0, float("nan"), None], "inf* 99.00+ nan -"),
    ([9.0, 10.0, 100.0], "9.00 10.00+ 100.00*"),  # as numbers, not as text
    ([], ""),
])
def test_ranks(values, expected):
    assert " ".join(value.text + ("", "*", "+")[value.rank] for value in ranked(values, 2)) == expected


def test_published_averages_are_ranked_where_all_methods_have_all_pictures():
    full = comparison(method("a", p=30, q=32, r=34), method("b", p=20, q=20, r=20), published=[Published("X", 31.5)])
    assert cells(averages_table(full)) == [
        ["method", "PSNR (dB)", "SSIM", "pictures"], ["a", "32.00*", "0.3200*", "3 of 3"],
        ["b", "20.00", "0.2000+", "3 of 3"], ["X, published", "31.50+", "-", "-"]]
    partial = comparison(method("a", p=30, q=32), method("b", p=20, q=20), published=[Published("X", 31.5)])
    assert cells(averages_table(partial))[1:] == [
        ["a", "31.00*", "0.3100*", "2 of 3"], ["b", "20.00+", "0.2000+", "2 of 3"], ["X, published", "31.50", "-", "-"]]
    assert any("2 of 3 pictures that all methods have: all but r" in line for line in notes(partial))


def test_methods_with_different_pictures_are_ranked_over_the_common_ones():
    """a is better over its own pictures, b over those that both have."""
    table = averages_table(comparison(method("a", p=30, q=40, r=50), method("b", p=31), published=[Published("X", 60)]))
    assert cells(table) == [
        ["method", "PSNR (dB)", "SSIM", "pictures", "PSNR, 1 common", "SSIM, 1 common"],
        ["a", "40.00", "0.4000", "3 of 3", "30.00+", "0.3000+"],
        ["b", "31.00", "0.3100", "1 of 3", "31.00*", "0.3100*"],
        ["X, published", "60.00", "-", "-", "-", "-"]]


def test_without_a_common_picture_nothing_is_ranked():
    apart = comparison(method("a", p=30), method("b", q=31), method("c"))
    assert cells(averages_table(apart))[1:] == [
        ["a", "30.00", "0.3000", "1 of 3", "-", "-"], ["b", "31.00", "0.3100", "1 of 3", "-", "-"],
        ["c", "-", "-", "0 of 3", "-", "-"]]
    assert any("no average compares" in line for line in notes(apart))


def test_a_method_without_any_score_does_not_void_the_averages_of_the_others():
    apart = comparison(method("a", p=30, q=30, r=30), method("none"), method("b", p=31, q=31, r=31),
                       published=[Published("X", 30.5)])
    assert cells(averages_table(apart))[1:] == [
        ["a", "30.00", "0.3000+", "3 of 3"], ["none", "-", "-", "0 of 3"], ["b", "31.00*", "0.3100*", "3 of 3"],
        ["X, published", "30.50+", "-", "-"]]
    assert "No picture of none could be scored." in notes(apart)
    assert comparison(method("none")).common == []


def test_one_table_of_all_sets_and_ratios():
    first = comparison(method("a", p=30, q=32, r=34), method("b", p=20, q=20, r=20), published=[Published("X", 31.5)])
    other = Comparison("Other", 0.5, ["s", "t"], [method("b", s=40, t=50), method("c", s=44)], [Published("X", 45)])
    assert [["/".join(value.text + ("", "*", "+")[value.rank] for value in cell) for cell in row]
            for row in overview_table([first, other])] == [
        ["PSNR (dB) / SSIM", "Set at 10 %", "Other at 50 %"], ["a", "32.00*/0.3200*", "-"],
        ["b", "20.00/0.2000+", "40.00+/0.4000+"], ["c", "-", "44.00*/0.4400*"],  # of s alone, so that X is not ranked
        ["X, published", "31.50+", "45.00"]]


def test_what_test_py_recorded_is_a_row_of_its_own_and_never_ranked():
    own = method("own", p=30, q=31, r=32)
    own.recorded = {"p": Recorded(30.01, 0.31), "q": Recorded(31.02, 0.31), "r": Recorded(33, 0.33)}
    table = cells(averages_table(comparison(own, method("b", p=20, q=20, r=20))))
    assert table[1] == ["own", "31.00*", "0.3100*", "3 of 3"]
    assert table[3] == ["own, in scores.csv", "31.34", "0.3167", "3 of 3"]
    (line,) = [line for line in notes(comparison(own)) if line.startswith("own: scores.csv")]
    assert "at most 1.0000 dB (r) and 0.0100 in SSIM; for r that is more than either does" in line
    own.recorded["r"] = Recorded(32.05, 0.33)
    (line,) = [line for line in notes(comparison(own)) if line.startswith("own: scores.csv")]
    assert "0.0500 dB (r)" in line
    assert "more than" not in line
    own.recorded["q"] = Recorded(np.nan, np.nan)
    assert "at most inf dB (q)" in notes(comparison(own))[-1]


def test_each_picture_is_judged_by_what_rounding_and_clipping_can_do_to_it():
    """Rounding is worth 0.006 dB at 30 dB and 1.8 dB at 56; clipping, which colour files alone undergo, some tenths."""
    own = method("own", p=30, q=30, r=56)
    own.scores["q"] = own.scores["q"]._replace(colour=True)
    own.recorded = {"p": Recorded(30.2, 0.3), "q": Recorded(30.2, 0.3), "r": Recorded(57.5, 0.56)}
    (line,) = [line for line in notes(comparison(own)) if line.startswith("own: scores.csv")]
    assert "at most 1.5000 dB (r)" in line and "; for p that is more than either does: is it of these" in line


def test_each_picture_is_ranked_among_those_who_have_it():
    table = pictures_table(comparison(method("a", p=30, q=31), method("b", p=31, q=31), method("c", q=30, r=29)))
    assert [["/".join(value.text + ("", "*", "+")[value.rank] for value in cell) for cell in row] for row in table] == [
        ["PSNR (dB) / SSIM", "a", "b", "c"], ["p", "30.00+/0.3000+", "31.00*/0.3100*", "-"],
        ["q", "31.00*/0.3100*", "31.00*/0.3100*", "30.00+/0.3000+"], ["r", "-", "-", "29.00/0.2900"]]


def test_the_terminals_table_keeps_to_a_hundred_columns_and_loses_nothing():
    methods = [method(f"method {k} " + "x" * (9 * k), p=20 + k, q=30 + k, r=25) for k in range(9)]
    text = terminal(pictures_table(comparison(*methods)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for k in range(9):
        assert f"method {k} " in text
        assert f"{20 + k}.00" in text
    assert sum(line.startswith("q  ") for line in lines) == text.count("\n\n") + 1
    for block in text.split("\n\n"):  # each column begins where its head does
        head, *rows = block.splitlines()
        starts = [found.start() for found in re.finditer("method", head)]
        assert all(row[start - 2:start] == "  " and row[start] != " " for row in rows for start in starts)


def test_long_lines_are_wrapped_without_loss():
    line = "m: missing (60): " + "; ".join(f"a_picture-{k}" for k in range(60))
    text = wrapped([line])
    assert max(map(len, text.splitlines())) <= 100
    assert text.replace("\n  ", " ") == line


def test_csv_holds_all_digits_and_all_remarks():
    a = method("a,\"b\"", p=30.123456789, q=31)
    a.recorded = {"p": Recorded(30.2, 0.31)}
    a.remarks = [Remark("claim", "p claims 40.00 dB, scores 30.12 dB", "p", "p.png"), Remark("missing", "r", "r"),
                 Remark("extra", "x.png", file="x.png")]
    rows = list(csv.reader(io.StringIO(scores_csv(comparison(a)))))
    assert rows == [
        ["method", "picture", "psnr", "ssim", "recorded_psnr", "recorded_ssim", "file", "remark"],
        ["a,\"b\"", "p", "30.123456789", "0.30123456789", "30.2", "0.31", "p.png",
         "claim: p claims 40.00 dB, scores 30.12 dB"],
        ["a,\"b\"", "q", "31", "0.31", "", "", "q.png", ""],
        ["a,\"b\"", "r", "", "", "", "", "", "missing: r"],
        ["a,\"b\"", "", "", "", "", "", "x.png", "extra: x.png"]]
    rows = list(csv.DictReader(io.StringIO(averages_csv([comparison(a, published=[Published("X", 31.5)])]))))
    assert [row["source"] for row in rows] == ["measured", "published", "scores.csv"]
    assert float(rows[0]["psnr"]) == pytest.approx((30.123456789 + 31) / 2)
    assert (rows[0]["pictures"], rows[1]["psnr"], rows[1]["ssim"]) == ("2", "31.5", "")
    assert remark_lines(comparison(a)) == ['a,"b": claim (1): p claims 40.00 dB, scores 30.12 dB',
                                           'a,"b": missing (1): r', 'a,"b": extra (1): x.png']


@pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@a", "\ta"])
def test_csv_holds_no_formulas(name):
    """What a spreadsheet would compute."""
    a = method(name, p=30)
    a.remarks, a.scores["p"] = [Remark("extra", name, name, name)], a.scores["p"]._replace(ssim=-0.5)
    for text in (scores_csv(comparison(a)), averages_csv([comparison(a)])):
        cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        assert f"'{name}" in cells and name not in cells and "'-0.5" not in cells


def test_markdown_marks_and_escapes():
    a = method("<b>|*_x", p=30, q=30, r=30)
    a.remarks = [Remark("extra", "a|b.png", file="a|b.png")]
    made = comparison(a, method("b", p=29, q=29, r=29), method("c", p=28, q=28, r=28))
    text = markdown(made.title, [averages_table(made), pictures_table(made)], notes(made), remark_lines(made))
    assert r"| \<b\>\|\*\_x | **30.00** | **0.3000** | 3 of 3 |" in text
    assert "| b | <u>29.00</u> | <u>0.2900</u> | 3 of 3 |" in text
    assert "| p | **30.00** / **0.3000** | <u>29.00</u> / <u>0.2900</u> | 28.00 / 0.2800 |" in text
    assert r"extra (1): a\|b.png" in text


def test_latex_marks_escapes_and_sets_apart():
    methods = [method(r"50%_$x^2$ & \y {#}~<", p=30, q=30, r=30), method("b", p=29, q=29, r=29)]
    text = latex(averages_table(comparison(*methods, published=[Published("X", 20)])), apart=1)
    lines = text.splitlines()
    assert lines[1:5] == [r"\begin{tabular}{lccc}", r"\toprule", r"method & PSNR (dB) & SSIM & pictures \\",
                          r"\midrule"]
    assert lines[5] == (r"50\%\_\$x\textasciicircum{}2\$ \& \textbackslash{}y \{\#\}\textasciitilde{}\textless{} & "
                        r"\textbf{30.00} & \textbf{0.3000} & 3 of 3 \\")
    assert lines[6:] == [r"b & \underline{29.00} & \underline{0.2900} & 3 of 3 \\", r"\midrule",
                         r"X, published & 20.00 & - & - \\", r"\bottomrule", r"\end{tabular}"]


@pytest.mark.parametrize("name", ["[12] X", "*star"])
def test_latex_keeps_a_name_from_being_taken_for_an_option(name):
    """A row that begins with [ or * after the end of another is not text to LaTeX."""
    assert f"\n{{}}{name} & " in latex(averages_table(comparison(method(name, p=30, q=30, r=30))))
