import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nmoe.data.errors import SourceError
from nmoe.data.sources import TEXT_CUT, TEXT_LIMIT, TextFiles

TEXTS = ["first", "second\nwith two lines", "żółw 🐢", " ", "x" * 100_000]


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path, texts, kind=None, column="text"):
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=2)


def test_every_format_gives_the_same_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for number, kind in enumerate(kinds):
        write_parquet(tmp_path / f"c{number}.parquet", TEXTS, kind)
    for path in tmp_path.iterdir():
        files = TextFiles([path])
        assert list(files) == TEXTS, path.name
        assert list(files) == TEXTS, "a second reading starts anew"
    assert pq.ParquetFile(tmp_path / "c0.parquet").num_row_groups == 3


def test_string_views_are_read_too(tmp_path):
    try:
        write_parquet(tmp_path / "view.parquet", TEXTS, pa.string_view())
    except pa.ArrowNotImplementedError:
        pytest.skip("this pyarrow cannot write string views")
    assert list(TextFiles([tmp_path / "view.parquet"])) == TEXTS


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="content"))
    write_parquet(tmp_path / "a.parquet", TEXTS, column="content")
    for path in tmp_path.iterdir():
        assert list(TextFiles([path], text_key="content")) == TEXTS


def test_blank_lines_and_empty_documents_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(["a", ""]) + b"\n  \r\n" + jsonl(["b"]).rstrip())
    assert list(TextFiles([path])) == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (b'{"text": "cut', "no JSON"),
        (b'{"text": "\xff"}', "no JSON"),
        (b'["text"]', "a list"),
        (b'{"body": "x", "id": 1}', "'body', 'id'"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": 7}', "int"),
        (b"[" * 100_000, "no JSON"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, name, bad, found):
    path = tmp_path / name
    content = jsonl(["one", "two"]) + bad + b"\n" + jsonl(["four"])
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    documents = iter(TextFiles([path]))
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(SourceError) as caught:
        next(documents)
    assert caught.value.what == f"{path}:3"
    assert found in caught.value.found
    assert "'text'" in caught.value.expected


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"no gzip" + data, lambda data: data[:60]])
def test_a_damaged_gzip_is_named(tmp_path, spoil):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(spoil(gzip.compress(jsonl([str(i) * 50 for i in range(1000)]))))
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz:\d+"):
        list(TextFiles([path]))


def test_parquet_faults_are_named(tmp_path):
    write_parquet(tmp_path / "null.parquet", ["a", "b", None])
    with pytest.raises(SourceError, match=r"null\.parquet, row 2"):
        list(TextFiles([tmp_path / "null.parquet"]))
    write_parquet(tmp_path / "column.parquet", ["a"], column="body")
    with pytest.raises(SourceError, match=r"column\.parquet.*'id', 'body'"):
        list(TextFiles([tmp_path / "column.parquet"]))
    with pytest.raises(SourceError, match=r"'id' of type int64"):
        list(TextFiles([tmp_path / "column.parquet"], text_key="id"))
    whole = (tmp_path / "null.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"cut\.parquet"):
        list(TextFiles([tmp_path / "cut.parquet"]))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, newline):
    paragraphs = [f"{i} żółw " * (i % 40 + 1) + newline * (i % 3 + 2) for i in range(3000)]
    text = "".join(paragraphs)
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    pieces = list(TextFiles([path]))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(TEXT_CUT <= len(piece) < TEXT_CUT + 1000 for piece in pieces[:-1])
    assert all(piece.endswith(newline * 2) and not piece[0].isspace() for piece in pieces[:-1])


def test_blank_lines_at_a_border_of_reading_stay_together(tmp_path):
    pieces = ["x" * (2 * TEXT_CUT - 2) + "\n\n\n\n", "y\n\n"]
    (tmp_path / "book.txt").write_text("".join(pieces))
    assert list(TextFiles([tmp_path / "book.txt"])) == pieces


def test_a_short_text_is_one_document(tmp_path):
    (tmp_path / "note.md").write_bytes(b"\xef\xbb\xbf# Title\r\n\r\nBody\n")
    assert list(TextFiles([tmp_path / "note.md"])) == ["# Title\r\n\r\nBody\n"]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert list(TextFiles([tmp_path / "empty.txt"])) == []


def test_a_text_without_blank_lines_is_cut_all_the_same(tmp_path):
    text = "word " * 600_000
    (tmp_path / "wall.txt").write_text(text)
    pieces = list(TextFiles([tmp_path / "wall.txt"]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == TEXT_LIMIT


@pytest.mark.parametrize("position", [10, TEXT_CUT - 1, TEXT_CUT, 3 * TEXT_CUT + 5])
def test_text_that_is_not_utf8_is_named_with_its_position(tmp_path, position):
    # Two-byte letters from an odd position on: chunk borders fall inside of them.
    data = bytearray(b"x" + "é".encode() * (2 * TEXT_CUT))
    data[position] = 0xFF
    (tmp_path / "latin.txt").write_bytes(data)
    with pytest.raises(SourceError, match=r"latin\.txt") as caught:
        list(TextFiles([tmp_path / "latin.txt"]))
    # The bad byte itself, or the letter that it broke.
    assert int(caught.value.found.rsplit(" ", 1)[1]) in (position, position - 1)


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", ".hidden/x.txt", "b/.y.txt", "b/image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
    assert list(TextFiles([tmp_path])) == ["a.jsonl", "b/10.txt", "b/2.txt"]
    assert list(TextFiles([tmp_path / "b" / "2.txt", tmp_path / "a.jsonl"])) == ["b/2.txt", "a.jsonl"]
    assert TextFiles([tmp_path]).describe()["first"] == ["a.jsonl", "10.txt", "2.txt"]


def test_paths_are_checked_before_anything_is_read(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("missing.txt", "picture.png", "folder"):
        with pytest.raises(SourceError, match=name):
            TextFiles([tmp_path / name])


def test_a_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    files = TextFiles([tmp_path / "a.txt"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SourceError, match=r"a\.txt"):
        list(files)


def test_real_text(shared_text):
    files = TextFiles([shared_text / "peps.jsonl.gz"])
    assert sum(1 for _ in files) == 630
    assert sum(len(text) for text in files) == pytest.approx(11.4e6, rel=0.01)
