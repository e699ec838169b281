"""Every format gives the same prompts, and a bad row is explained."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persyn.errors import UsageError
from persyn.ingest import files, rows
from persyn.ingest.rows import BadRow, PromptRow

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2+2?"},
]

WINDOWS = "not UTF-8 (byte 0x{byte} at position {number} of the row)"


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reason(tmp_path: Path, record: Any) -> str:
    [bad] = rows.read(write_jsonl(tmp_path / "bad.jsonl", record))
    assert isinstance(bad, BadRow)
    return bad.reason


def reason_of_line(tmp_path: Path, line: bytes) -> str:
    (tmp_path / "bad.jsonl").write_bytes(line)
    [bad] = rows.read(tmp_path / "bad.jsonl")
    assert isinstance(bad, BadRow)
    return bad.reason


def test_a_row_is_a_prompt_its_answer_its_id_and_the_rest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": " 2+2?\n", "answer": 4, "id": "q1", "level": 1, "tags": ["a"]})

    assert list(rows.read(path)) == [PromptRow(" 2+2?\n", None, "4", "q1", {"level": 1, "tags": ["a"]})]


def test_messages_are_the_last_user_turn_and_the_turns_before(tmp_path: Path) -> None:
    [row] = rows.read(write_jsonl(tmp_path / "p.jsonl", {"messages": TURNS}))

    assert isinstance(row, PromptRow)
    assert (row.text, row.history) == ("2+2?", TURNS[:3])


def test_equal_conversations_have_equal_hashes(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "Hi", "answer": "1", "id": 1, "level": 3},
        {"messages": [{"content": "Hi", "role": "user"}]},
        {"messages": TURNS},
        {"prompt": "2+2?"},
    )

    prompt, message, multi_turn, other = (row.content_hash for row in rows.read(path) if isinstance(row, PromptRow))
    assert prompt == message
    assert len({prompt, multi_turn, other}) == 3
    # printf '[{"content":"Hi","role":"user"}]' | sha256sum
    assert prompt == "557f6d9586f57ae72d24a7d34f47ed219efecbc197894dfead83851aaa02e87f"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    records = [
        {"prompt": 'Line one\nline "two",\u2028and ü', "messages": None, "answer": "4", "id": "q1", "kind": "x"},
        {"prompt": None, "messages": TURNS, "answer": None, "id": "q2", "kind": "y"},
    ]
    path = tmp_path / f"P{ending.upper()}"
    plain = tmp_path / "plain"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif ending.startswith(".csv"):
        with plain.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerow(records[0])
            writer.writerow({**records[1], "messages": json.dumps(TURNS)})
    elif ending.startswith(".json."):
        plain.write_text(json.dumps(records, ensure_ascii=False, indent=2))
    else:
        whole = ending == ".json"
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        plain.write_text(json.dumps(records) if whole else "\n\n".join(lines))
    if plain.exists():
        path.write_bytes(gzip.compress(plain.read_bytes()) if ending.endswith(".gz") else plain.read_bytes())

    assert list(rows.read(path)) == [
        PromptRow('Line one\nline "two",\u2028and ü', None, "4", "q1", {"kind": "x"}),
        PromptRow("2+2?", TURNS[:3], None, "q2", {"kind": "y"}),
    ]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ([1], "not a JSON object"),
        ({"question": "2+2?"}, "neither 'prompt' nor 'messages'"),
        ({}, "the row has no fields"),
        ({"prompt": None, "messages": []}, "neither 'prompt' nor 'messages'"),
        ({"prompt": "a", "messages": TURNS}, "both 'prompt' and 'messages'"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"prompt": 7}, "'prompt' must be text, got 7"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty prompt"),
        (
            {"messages": [{"role": "judge", "content": "a"}]},
            "turn 1 has the unknown role 'judge'; known: system, user, assistant",
        ),
        ({"messages": [{"role": "user"}]}, "turn 1 has no text: missing 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "turn 1: 'content' must be one text, got 1 parts (image)",
        ),
        ({"messages": "hello"}, "'messages': not JSON: JSON is malformed"),
        ({"messages": "[]"}, "the last turn must be the user's"),
        ({"messages": TURNS[:3]}, "the last turn must be the user's or a tool's, not the assistant's"),
        ({"messages": [TURNS[1], TURNS[3]]}, "turn 2 is the user's, expected the assistant's"),
        ({"messages": TURNS[2:]}, "turn 1 is the assistant's, expected the user's"),
        ({"messages": [*TURNS[:2], TURNS[0], TURNS[3]]}, "turn 3 is the system's, expected the assistant's"),
        ({"prompt": "a", "answer": [4]}, "'answer' must be text or a number"),
        ({"prompt": "a", "answer": True}, "'answer' must be text or a number"),
        ({"prompt": "a\0b"}, "a NUL character"),
        ({"prompt": "a", "x": {"y": ["\0"]}}, "a NUL character"),
        ({"prompt": "a", "\0": 1}, "a NUL character"),
        ({"messages": json.dumps([{"role": "user", "content": "a\0"}])}, "a NUL character"),
        ({"prompt": "a\ud800"}, "a lone surrogate"),
        ({"prompt": "a", "x": eval("[" * 80 + "]" * 80)}, "nested deeper than 64 levels"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, record: Any, expected: str) -> None:
    assert expected in reason(tmp_path, record)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"x": ' + b"[" * 100_000, "nested too deep"),
        (b'{"prompt": "' + b"a" * files.MAX_BYTES + b'"}', "longer than 16,777,216 bytes"),
    ],
)
def test_a_line_that_is_no_json_says_so(tmp_path: Path, line: bytes, expected: str) -> None:
    assert expected in reason_of_line(tmp_path, line)


def test_text_that_only_looks_like_a_nul_is_kept(tmp_path: Path) -> None:
    [row] = rows.read(write_jsonl(tmp_path / "p.jsonl", {"prompt": r"what is \u0000 in JSON?"}))

    assert isinstance(row, PromptRow)
    assert row.text == r"what is \u0000 in JSON?"


def test_bad_rows_keep_their_line_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    long_line = b"[" * (2 * files.MAX_BYTES + 5)
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1"}\r\n\nnonsense\n' + long_line + b'\n{"prompt": "5"}')

    first, bad, too_long, last = rows.read(path)

    assert isinstance(first, PromptRow)
    assert str(bad).startswith("p.jsonl:3: not JSON")
    assert str(too_long) == "p.jsonl:4: longer than 16,777,216 bytes"
    assert last == PromptRow("5", None, None, None, {})


def test_a_csv_row_is_placed_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'prompt,answer\n"one\ntwo",1\nthree\n\n\xff,2\n,3\n"a"b,4\nlast,\n')

    found = list(rows.read(path))

    assert found[0] == PromptRow("one\ntwo", None, "1", None, {})
    assert [(bad.line, bad.reason) for bad in found[1:-1] if isinstance(bad, BadRow)] == [
        (4, "1 fields, but the header has 2"),
        (6, WINDOWS.format(byte="FF", number=1)),
        (7, "empty prompt"),
        (8, "not CSV: ',' expected after '\"'"),
    ]
    assert found[-1] == PromptRow("last", None, None, None, {})


def test_a_quote_that_is_never_closed_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt\n"open\n' + "a row\n" * 10)

    assert [str(row) for row in rows.read(path)] == [
        "p.csv:2: not CSV: a quote is opened and never closed; lines 2 to 12 (11 lines) cannot be read"
    ]


def test_parquet_values_that_json_lacks_become_text_or_null(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    record = {"prompt": "a", "day": date(2026, 1, 2), "cost": Decimal("1.50"), "x": float("nan"), "answer": 0.5}
    pq.write_table(pa.Table.from_pylist([record]), path)

    assert list(rows.read(path)) == [
        PromptRow("a", None, "0.5", None, {"day": "2026-01-02", "cost": "1.50", "x": None})
    ]


def test_a_parquet_string_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    strings = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": strings}), path)

    first, bad, last = rows.read(path)

    assert (first, last) == (PromptRow("a", None, None, None, {}), PromptRow("c", None, None, None, {}))
    assert str(bad) == "p.parquet:2: not UTF-8"


def test_a_json_file_of_lines_says_how_to_name_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.json", {"prompt": "a"}, {"prompt": "b"})

    [bad] = rows.read(path)

    assert isinstance(bad, BadRow)
    assert "not one JSON array" in bad.reason
    assert ".jsonl" in bad.reason


def test_an_unknown_ending_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"prompts\.txt.*\.jsonl, \.jsonl\.gz.*\.parquet"):
        rows.read(tmp_path / "prompts.txt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"folder\.jsonl is a folder; give the names of files in it"):
        list(files.records(tmp_path / "folder.jsonl"))
    with pytest.raises(UsageError, match=r"there is no file .*p\.jsonl"):
        rows.read(tmp_path / "p.jsonl")


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_a_damaged_file_is_refused_as_a_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p{ending}"
    whole = gzip.compress(b'{"prompt": "a"}\n' * 1000)
    path.write_bytes(whole[:-20])

    with pytest.raises(UsageError, match="cannot read"):
        list(rows.read(path))


def test_a_parquet_column_of_bytes_is_the_text_that_they_spell(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = {
        "prompt": pa.array([b"Why?", b"\xff"], pa.binary()),
        "tags": pa.array([[b"a"], []], pa.list_(pa.binary())),
        "notes": pa.array([[(b"k", b"v")], []], pa.map_(pa.binary(), pa.binary())),
    }
    pq.write_table(pa.table(table), path)
    good, bad = rows.read(path)
    assert isinstance(good, PromptRow)
    assert (good.text, good.meta) == ("Why?", {"tags": ["a"], "notes": [["k", "v"]]})
    assert str(bad) == "p.parquet:2: not UTF-8"


def test_a_time_that_no_calendar_has_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    times = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["Why?", "How?"], "at": times}), path)
    good, bad = rows.read(path)
    assert isinstance(good, PromptRow)
    assert good.meta == {"at": "1970-01-01T00:00:00"}
    assert str(bad).startswith("p.parquet:2: a value that JSON cannot represent: ")
