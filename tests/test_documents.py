"""Readers: every kind of file, bounded memory, and what is malformed refused with its place."""

import gzip
import json
import os
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from refusal import one_line
from respike.data import documents
from respike.data.documents import find_files, read_documents
from respike.data.markup import html_text, man_text, page_text, pod_text
from respike.errors import BackendError, DataError

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The rain."}]


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


BROKEN_GZIP = bytearray(gzip.compress(lines({"text": "rain " * 999}).encode(), mtime=0))
BROKEN_GZIP[12:20] = b"\xff" * 8


def texts(*paths: Path) -> list[str]:
    return [document.text for document in read_documents(paths)]


def test_every_kind_of_file_is_read_and_folders_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("# Rain\n\nIt rains.\n")
    (tmp_path / "a.txt").write_text("\ufeffplain", encoding="utf-8")
    (tmp_path / "c.html").write_text("<head><title>no</title></head><p>see &amp; hear<p>two")
    (tmp_path / "d.jsonl").write_text(lines({"text": "first"}) + "\n" + lines({"text": "second"}))
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write(lines({"text": "packed", "more": 1}))
    table = pa.table({"text": [f"row {i}" for i in range(600)], "n": list(range(600))})
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=250)
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    found = texts(tmp_path)
    assert found[:6] == ["plain", "# Rain\n\nIt rains.\n", "see & hear\ntwo",
                         "first", "second", "packed"]  # fmt: skip
    assert found[6:] == [f"row {i}" for i in range(600)]
    assert texts(tmp_path / "*.jsonl") == ["first", "second"]
    assert texts(tmp_path / "a.txt", tmp_path / "a.txt") == ["plain"], "each file once"


def test_conversations_come_from_json_lines_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"messages": TURNS}))
    parquet.write_table(pa.table({"messages": [TURNS, TURNS[:1]]}), tmp_path / "b.parquet")
    found = list(read_documents([tmp_path]))
    assert [d.messages for d in found] == [tuple(TURNS), tuple(TURNS), tuple(TURNS[:1])]
    assert found[0].identity == found[1].identity != found[2].identity
    assert [d.where for d in found[1:]] == [f"{tmp_path / 'b.parquet'}: row {i}" for i in (1, 2)]


def test_a_long_text_comes_in_pieces_cut_at_line_ends_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_TEXT_BYTES", 1000)
    text = "".join(f"line {i} of the räin\n" for i in range(20_000))
    (tmp_path / "long.txt").write_text(text)
    tracemalloc.start()
    pieces, count = [], 0
    for document in read_documents([tmp_path / "long.txt"]):
        count += 1
        assert document.text.endswith("\n")
        assert len(document.text) < 1100
        pieces.append(hash(document.text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 300
    assert peak < len(text) / 2
    assert "".join(texts(tmp_path / "long.txt")) == text
    (tmp_path / "one.txt").write_text("ä" * 5000)
    assert "".join(texts(tmp_path / "one.txt")) == "ä" * 5000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", lines({"text": "x"}, {"txt": 1}), ["line 2", "`text`", "`messages`", "`txt`"]),
        ("a.jsonl", lines({"text": "x"}) + "{oops\n", ["line 2", "not valid JSON"]),
        ("a.jsonl", lines([1]), ["line 1", "expected an object", "list"]),
        ("a.jsonl", lines({"text": 7}), ["line 1", "string `text`"]),
        ("a.jsonl", lines({"text": "x", "messages": TURNS}), ["one of them only"]),
        ("a.jsonl", lines({"messages": []}), ["`messages` is empty"]),
        ("a.jsonl", lines({"messages": ["hi"]}), ["messages[0]", "expected an object"]),
        ("a.jsonl", lines({"messages": [{"role": "me", "content": ""}]}), ["'me'", "assistant"]),
        ("a.jsonl", lines({"messages": [*TURNS, {"role": "user"}]}), ["messages[2]", "`content`"]),
        ("a.jsonl", '{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ["line 2", "not UTF-8", "byte 10"]),
        ("a.txt", b"ok \xfc", ["not UTF-8", "byte 3"]),
        ("a.jsonl.gz", b"not gzip", ["cannot be read"]),
        (
            "a.jsonl.gz",
            gzip.compress(lines({"text": "x" * 999}).encode(), mtime=0)[:-20],
            ["cannot be"],
        ),
        ("a.jsonl.gz", BROKEN_GZIP, ["cannot be read", "invalid"]),
        ("a.jsonl", lines({"messages": [{**TURNS[0], "name": "\ud800"}]}), ["surrogate"]),
        ("a.parquet", b"PAR1", ["a.parquet"]),
        ("a.docx", b"", ["unknown kind", ".parquet"]),
    ],
)
def test_what_is_malformed_is_refused_in_one_line_that_says_where(
    tmp_path: Path, name: str, content: str | bytes, words: list[str]
) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        list(read_documents([tmp_path / name]))
    one_line(caught.value, tmp_path / name, *words)


def test_paths_that_name_nothing_are_refused(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "no", "no such file"), (tmp_path, "no file in this folder"),
        (tmp_path / ("x" * 300), "too long"), ("", "an empty path"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words) as caught:
            find_files([path])
        one_line(caught.value, path)


def test_a_folder_that_may_not_be_looked_into_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:  # root may look anywhere, so the test cannot rely on modes
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="Permission denied") as caught:
        find_files([tmp_path])
    one_line(caught.value, tmp_path / "locked")


def test_linked_folders_are_read_once_and_hidden_ones_not_at_all(tmp_path: Path) -> None:
    for name in ("in/a.txt", "elsewhere/b.txt", "in/.corpus.partial/raw.jsonl", "in/.c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "in" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../in")
    found = find_files([tmp_path / "in"])
    assert found == [tmp_path / "in/a.txt", tmp_path / "in/linked/b.txt"]


def test_dates_in_conversations_are_part_of_what_they_are(tmp_path: Path) -> None:
    days = [datetime(2020, 1, day, tzinfo=UTC) for day in (1, 2)]
    rows = [[{**TURNS[0], "at": day}] for day in days]
    parquet.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    first, second = read_documents([tmp_path / "a.parquet"])
    assert first.identity != second.identity


def test_parquet_text_in_latin_1_is_refused_in_one_line(tmp_path: Path) -> None:
    column = pa.array(["good", "\u00fcber"])
    raw = column.buffers()[2].to_pybytes().replace(b"\xc3\xbc", b"\xfc\xfc")
    wrong = pa.Array.from_buffers(
        pa.string(), 2, [None, column.buffers()[1], pa.py_buffer(raw)]
    )  # fmt: skip
    parquet.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        list(read_documents([tmp_path / "a.parquet"]))
    one_line(caught.value, tmp_path / "a.parquet")


def test_a_parquet_file_without_the_columns_is_refused_with_those_it_has(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="got body, n"):
        texts(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: row 2"):
        texts(tmp_path / "b.parquet")


def test_without_pyarrow_parquet_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BackendError) as caught:
        texts(tmp_path / "a.parquet")
    assert caught.value.hint == "run `pip install 'respike[docs-in]'`"


PAGE = """<html><head><title>t</title></head><body><nav><p>Home</p></nav>
<div class="Related x"><div>Next</div></div><h1 class="header">Rain</h1>
<p>It falls
on   the <b>sea</b>.</p><pre>if wet:
    run()</pre><footer>2020</footer><p>End</p></body></html>"""


def test_a_page_is_laid_out_as_in_a_browser_and_its_furniture_left_out() -> None:
    assert page_text(PAGE) == "Rain\n\nIt falls on the sea.\n\nif wet:\n    run()\n\nEnd"


def test_text_for_measuring_keeps_all_and_the_lines_of_the_source() -> None:
    text = html_text(PAGE)
    assert text.startswith("Home\n\nNext\n\nRain\n\nIt falls\non the sea.")
    assert "2020" in text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("We are in R&D", "We are in R&D"),
        ("<p>One.</p><p>The last one about R&D", "One.\n\nThe last one about R&D"),
        ("<html><head><title>x</title><body><p>Seen</p></body></html>", "Seen"),
        ("<style>p {}</style></head><body><p>Seen</p>", "Seen"),
        ("<p>if x <y then it goes on", "if x <y then it goes on"),
    ],
)
def test_ends_that_are_left_unsaid_lose_no_text(page: str, text: str) -> None:
    assert html_text(page) == page_text(page) == text


MAN = r""".\" comment
.de IX
not this
..
.TH RAIN 3 "2020"
.SH NAME
rain_fall \- let it
rain on \fIthe sea\fP
.SH "SEE ALSO"
.nf
int rain(int \-1);
  int two;
.fi
.PP
The
.BR sun (3)
and
.B the moon
shine.
.IP "\fBERROR\fR" 4
first
"""


def test_a_man_page_is_rejoined() -> None:
    assert man_text(MAN) == (
        "NAME\n\nrain_fall - let it rain on the sea\n\nSEE ALSO\n\n"
        "int rain(int -1);\n  int two;\n\n"
        "The sun(3) and the moon shine.\n\nERROR\nfirst"
    )


POD = """package Rain;

=head1 NAME

Rain - falls C<< $x->y >> and B<I<often>>

Two E<lt>lines
are one. See L<the sun|Sun/"x">.

    verbatim  one
    two

=begin html

<p>no</p>

=end html

=cut

sub code { }
"""


def test_pod_is_rejoined_and_code_outside_left_out() -> None:
    assert pod_text(POD) == (
        "NAME\n\nRain - falls $x->y and often\n\nTwo <lines are one. See the sun.\n\n"
        "    verbatim  one\n    two"
    )
