"""Files in foreign layouts are read if they are unambiguous, and otherwise rejected with the field's name."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persyn.errors import UsageError
from persyn.ingest import response_rows, rows
from persyn.ingest.response_rows import Layout, ResponseRow
from persyn.ingest.rows import BadRow, PromptRow

HI = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "2+2?"}]
TURNS = [HI, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "2+2?"}]


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path, names: Mapping[str, str] | None = None) -> list[PromptRow | BadRow]:
    return list(rows.read(path, names or {}))


def one(tmp_path: Path, record: Any, names: Mapping[str, str] | None = None) -> PromptRow:
    [row] = read(jsonl(tmp_path / "p.jsonl", record), names)
    assert isinstance(row, PromptRow), row
    return row


def why(tmp_path: Path, record: Any, names: Mapping[str, str] | None = None) -> str:
    return bad_row(tmp_path, record, names).reason


def bad_row(tmp_path: Path, record: Any, names: Mapping[str, str] | None = None) -> BadRow:
    [bad] = read(jsonl(tmp_path / "p.jsonl", record), names)
    assert isinstance(bad, BadRow), bad
    return bad


# File types


PLAIN = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            PLAIN.decode().encode("utf-16"),
            r"UTF-16 text \(its first bytes are FF FE 7B 00\); convert it: iconv -f UTF-16",
        ),
        (b"\xfe\xff" + PLAIN.decode().encode("utf-16-be"), "UTF-16 text"),
        (PLAIN.decode().encode("utf-16-le"), "UTF-16LE text"),
        (PLAIN.decode().encode("utf-16-be"), "UTF-16BE text"),
        (PLAIN.decode().encode("utf-32"), "UTF-32 text"),
        (PLAIN.decode().encode("utf-32-be"), "UTF-32BE text"),
        (gzip.compress(PLAIN, mtime=0), "compressed with gzip .* a name that ends in .gz"),
        ("日本,prompt\na,b\n".encode("utf-16-le"), "UTF-16LE text"),
        ("日本,prompt\na,b\n".encode("utf-16-be"), "UTF-16BE text"),
        (b"\x28\xb5\x2f\xfd" + PLAIN, "compressed with zstd"),
        (b"PK\x03\x04" + PLAIN, "a ZIP archive or a spreadsheet"),
        (b"PAR1" + PLAIN, "Parquet .* ends in .parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.jsonl.gz"])
def test_a_file_that_is_something_else_is_named(tmp_path: Path, data: bytes, said: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    with pytest.raises(UsageError, match="decompress it once" if "gzip" in said and name.endswith(".gz") else said):
        read(path)


def test_a_name_that_promises_gzip_and_does_not_keep_it(tmp_path: Path) -> None:
    (tmp_path / "p.csv.gz").write_bytes(b"prompt\na\n")
    with pytest.raises(UsageError, match="not compressed with gzip; give it a name without"):
        read(tmp_path / "p.csv.gz")


def test_half_a_gzip_file_says_after_which_row_it_ends(tmp_path: Path) -> None:
    lines = b"".join(
        json.dumps({"prompt": f"{number} + {number * 7919 % 1000}?"}).encode() + b"\n" for number in range(5000)
    )
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0)[:-1000])
    with pytest.raises(UsageError, match=r"cannot read .* after row \d+: .* ended before"):
        read(tmp_path / "p.jsonl.gz")


def test_a_byte_that_is_no_utf8_is_placed_and_the_encoding_guessed(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "café"}\n'.encode("latin-1"))
    good, bad = read(tmp_path / "p.jsonl")
    assert isinstance(good, PromptRow)
    assert str(bad).startswith(
        "p.jsonl:2: not UTF-8 (byte 0xE9 at position 16 of the row); convert Latin-1 or Windows-1252 text"
    )


@pytest.mark.parametrize("name", ["p", "p.jsonl"])
def test_a_folder_is_said_to_be_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="is a folder; give the names of files in it"):
        rows.read(tmp_path / name)


# JSON


def test_numbers_that_are_none_are_null_as_in_parquet(tmp_path: Path) -> None:
    line = '{"prompt": "a", "answer": NaN, "x": [-Infinity, {"y": Infinity}], "z": 1.5}'
    (tmp_path / "p.jsonl").write_text(line)
    (tmp_path / "p.json").write_text(f"[{line}]")
    record = {"prompt": "a", "answer": float("nan"), "x": [float("-inf"), None], "z": 1.5}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "p.parquet")

    expected = PromptRow("a", None, None, None, {"x": [None, {"y": None}], "z": 1.5})
    assert read(tmp_path / "p.jsonl") == read(tmp_path / "p.json") == [expected]
    assert read(tmp_path / "p.parquet") == [PromptRow("a", None, None, None, {"x": [None, None], "z": 1.5})]


def test_nan_in_csv_is_the_text_that_it_is(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,answer,x\nWhat is a missing number?,NaN,nan\n")
    assert read(tmp_path / "p.csv") == [PromptRow("What is a missing number?", None, "NaN", None, {"x": "nan"})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice in one object"),
        ('{"prompt": "a", "m": [{"k" : 1, "k": NaN}]}', "the key 'k' occurs twice"),
        ('{"prompt": "a", "x": nan}', "not JSON"),
        ('{"prompt": "a", "x": 1e999}', "not JSON"),
        ('{"prompt": "a", "x": [NaN, 1e999]}', "not JSON"),
        ('{"prompt": "\\ud800", "x": NaN}', "a lone surrogate"),
        ('[{"prompt": "a"}]', "not a JSON object; a file that contains one JSON array must be named .json"),
        ("[", "not JSON: .*; a file that contains one JSON array must be named .json"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    [bad] = read(tmp_path / "p.jsonl")
    assert isinstance(bad, BadRow)
    assert re.search(said, bad.reason), bad.reason


def test_texts_that_look_like_keys_are_none(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": 'say "a": 1, "a": 2', "x": ": ", "y": {"x": '\\": '}}).meta["x"] == ": "


# The field of the prompt


def test_without_a_prompt_the_fields_are_named_and_the_way_out(tmp_path: Path) -> None:
    bad = bad_row(tmp_path, {"id": 1, "question": "2+2?", "answer": "4"})
    assert bad.reason == "neither 'prompt' nor 'messages'; the row has 'id', 'question', 'answer'"
    assert bad.names == ("prompt=question",)
    assert bad_row(tmp_path, {"query": "a", "problem": "b"}).names == ("prompt=problem", "prompt=query")
    assert bad_row(tmp_path, {"dialogue": TURNS, "id": 1}).names == ("messages=dialogue",)
    assert bad_row(tmp_path, {"instruction": "a", "context": "b", "response": "c"}).names == ("prompt=instruction",)
    many = bad_row(tmp_path, {f"f{number}": number for number in range(40)})
    assert many.reason.endswith("'f11' and 28 more")
    assert many.names == ("prompt=NAME",)


def test_a_named_field_is_read_and_the_rest_is_kept(tmp_path: Path) -> None:
    record = {"question": "2+2?", "gold": 4, "prompt": "template 3", "key": "q1", "context": "sums"}
    assert one(tmp_path, record, {"prompt": "question", "answer": "gold", "id": "key"}) == PromptRow(
        "2+2?", None, "4", "q1", {"prompt": "template 3", "context": "sums"}
    )
    assert one(tmp_path, record, {"prompt": "question", "input": "context"}).text == "2+2?\nsums"
    assert one(tmp_path, {"chat": TURNS}, {"messages": "chat"}).history == TURNS[:2]


def test_a_name_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a field querry; nothing was imported"):
        read(jsonl(tmp_path / "p.jsonl", {"query": "a"}), {"prompt": "querry"})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"conversations": []}, "'conversations' is empty"),
        ({"Prompt": None}, "'Prompt' is empty"),
        ({"prompt": json.dumps(TURNS)}, "'prompt' contains turns as JSON text, not as a list"),
        ({"prompt": [HI, {"role": "assistant", "content": "a"}]}, "'prompt': the last turn must be the user's"),
    ],
)
def test_what_there_is_in_place_of_a_prompt_is_said(tmp_path: Path, record: Any, said: str) -> None:
    assert said in why(tmp_path, record)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "Prompt": "b"}, "both 'prompt' and 'Prompt' could be its prompt"),
        ({"prompt": "a", "conversations": SAID}, "both 'prompt' and 'conversations'; one row is one conversation"),
        ({"messages": TURNS, "conversations": SAID}, "both 'messages' and 'conversations'"),
        ({"prompt": "a", "system": "b", "system_prompt": "c"}, "both 'system' and 'system_prompt'"),
        ({"prompt": "a", "answer": 1, "reference_answer": 2}, "both 'answer' and 'reference_answer'"),
        ({"messages": [SYSTEM, HI], "system": "Be long."}, "both a system turn and 'system'"),
        ({"prompt": "a", "system": {"x": 1}}, "'system' must be text"),
        ({"instruction": 3, "input": ""}, "'instruction' must be text, got 3"),
        ({"instruction": "a", "input": ["b"]}, "'input' must be text"),
        ({"instruction": "a", "input": "b", "history": ["c"]}, "'history' must be pairs of texts"),
    ],
)
def test_a_row_that_could_be_meant_in_two_ways_is_refused(tmp_path: Path, record: Any, said: str) -> None:
    assert said in why(tmp_path, record)


def test_sharegpt_is_read_by_itself_and_its_reply_kept(tmp_path: Path) -> None:
    system = {"from": "system", "value": "Be brief."}
    assert one(tmp_path, {"conversations": SAID, "id": 7}) == PromptRow("2+2?", TURNS[:2], None, "7", {})
    assert one(tmp_path, {"conversations": [system, *SAID[:2]]}) == PromptRow(
        "Hi", [SYSTEM], None, None, {"reply": "Hello."}
    )
    for names in ({"messages": "dialog"}, {"prompt": "dialog"}):
        assert one(tmp_path, {"dialog": SAID[:2]}, names) == PromptRow("Hi", None, None, None, {"reply": "Hello."})
    as_chat = {"conversation": [HI, {"role": "assistant", "content": "Hello."}]}
    assert one(tmp_path, as_chat) == PromptRow("Hi", None, None, None, {"reply": "Hello."})
    assert "unknown from 'narrator'" in why(tmp_path, {"conversations": [{"from": "narrator", "value": "x"}]})


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "Human", "value": "Hi"},
        {"role": "human", "content": "Hi"},
        {"role": "USER", "value": "Hi"},
        {"from": " user ", "content": "Hi"},
        {"Role": "user", "Content": "Hi"},
    ],
)
def test_a_turn_that_can_be_meant_in_one_way_alone_is_read(tmp_path: Path, turn: Any) -> None:
    assert one(tmp_path, {"messages": [SYSTEM, turn]}) == PromptRow("Hi", [SYSTEM], None, None, {})


def test_earlier_turns_in_pairs_are_turns_beside_a_prompt_too(tmp_path: Path) -> None:
    pairs = [["Hi", "Hello."]]
    assert one(tmp_path, {"prompt": "2+2?", "history": pairs}) == PromptRow("2+2?", TURNS[:2], None, None, {})
    as_text = {"instruction": "2+2?", "input": "", "history": json.dumps(pairs)}
    assert one(tmp_path, as_text).history == TURNS[:2]
    for record in ({"messages": TURNS, "history": pairs}, {"prompt": "a", "history": "Rome, 44 BC"}):
        assert one(tmp_path, record).meta == {"history": record["history"]}


def test_alpaca_is_read_by_itself(tmp_path: Path) -> None:
    assert one(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"}) == PromptRow(
        "Add.\n1, 2", None, None, None, {"output": "3"}
    )
    whole = {"instruction": "Go.", "input": "", "output": "x", "system": "Be brief.", "history": [["Hi", "Hello."]]}
    assert one(tmp_path, whole) == PromptRow("Go.", [SYSTEM, *TURNS[:2]], None, None, {"output": "x"})


def test_a_system_column_is_the_system_turn(tmp_path: Path) -> None:
    for record in (
        {"prompt": "Hi", "system": "Be brief."},
        {"messages": [HI], "System": "Be brief."},
        {"messages": [SYSTEM, HI], "system": "Be brief."},
        {"conversations": SAID[:2], "system_prompt": "Be brief."},
        {"prompt": "Hi", "systemPrompt": "Be brief."},
        {"prompt": "Hi", "system_message": "Be brief."},
    ):
        assert (row := one(tmp_path, record)).history == [SYSTEM]
        assert row.text == "Hi"
    assert one(tmp_path, {"prompt": "Hi", "system": ""}).history is None


def test_a_prompt_in_turns_is_read_as_messages(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": TURNS}) == PromptRow("2+2?", TURNS[:2], None, None, {})


# Turns


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tool_calls": [{"id": 1}]}, "turn 2: 'tool_calls': call 1 has no name"),
        ({"reasoning_content": "hm"}, "turn 2 has 'reasoning_content'"),
        ({"weight": 0}, "turn 2 has 'weight'"),
        ({"is_edited": False}, "turn 2 has 'is_edited'"),
        ({"content": None}, "turn 2 has no text: 'content' is null"),
        ({"content": 7}, "turn 2: 'content' must be text, got 7"),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "one text, got 2 parts (text, image_url)",
        ),
        ({"role": "judge"}, "turn 2 has the unknown role 'judge'; known: system, user, assistant"),
        ({"role": None}, "turn 2 has no 'role'"),
    ],
)
def test_a_turn_that_says_more_than_can_be_kept_is_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    assert said in why(tmp_path, {"messages": [TURNS[0], TURNS[1] | more, TURNS[2]]})


def test_a_turn_may_have_keys_that_say_nothing(tmp_path: Path) -> None:
    assert one(tmp_path, {"messages": [HI | {"tool_calls": None, "name": "", "from": None, "x": []}]}).text == "Hi"
    assert one(tmp_path, {"messages": [HI | {"function_call": {"name": None, "arguments": None}}]}).text == "Hi"
    assert one(tmp_path, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}).text == "Hi"


def test_parquet_of_turns_with_mixed_keys_is_read(tmp_path: Path) -> None:
    """As written by `datasets`: each turn is JSON text of its own."""
    from datasets import Dataset

    records = [
        {"messages": TURNS, "id": "a", "level": {"of": 1}},
        {"messages": [HI, TURNS[1] | {"tool_calls": [{"f": "x"}]}, HI], "id": "b", "level": {"is": "high"}},
    ]
    Dataset.from_list(records, on_mixed_types="use_json").to_parquet(tmp_path / "mixed.parquet")
    Dataset.from_list(records).to_parquet(tmp_path / "unified.parquet")
    assert pq.read_schema(tmp_path / "mixed.parquet").field("messages").type.value_type.extension_name == "arrow.json"

    good, bad = read(tmp_path / "mixed.parquet")
    assert good == PromptRow("2+2?", TURNS[:2], None, "a", {"level": {"of": 1}})
    assert "mixed.parquet:2: 'messages': turn 2: 'tool_calls': call 1 has 'f', which would be lost" in str(bad)
    good, bad = read(tmp_path / "unified.parquet")
    assert good == PromptRow("2+2?", TURNS[:2], None, "a", {"level": {"of": 1, "is": None}})
    assert "unified.parquet:2: 'messages': turn 2: 'tool_calls': call 1 has 'f', which would be lost" in str(bad)


def test_parquet_of_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="two columns named 'prompt'"):
        read(tmp_path / "p.parquet")


# CSV


@pytest.mark.parametrize(
    "text",
    [
        "Prompt;Answer\nA, or b?;1\n",
        " prompt \tAnswer\nA, or b?\t1\n",
        "sep=;\nPROMPT;ANSWER\nA, or b?;1\n",
        '\n\nprompt,answer\n"A, or b?",1\n',
        "answer;all, in order;prompt\n1;x;A, or b?\n",
        "prompt|answer\nA, or b?|1\n",
        'prompt, answer\n"A, or b?", "1"\n',
        "prompt;answer;;\nA, or b?;1;;\n",
        'prompt,"answer"\r"A, or b?",1\r',
    ],
)
def test_headers_as_spreadsheets_write_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_bytes(text.encode("utf-8-sig"))
    [row] = read(tmp_path / "p.csv")
    assert isinstance(row, PromptRow)
    assert (row.text, row.answer) == ("A, or b?", "1")


def test_alpaca_in_csv_may_have_no_input(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Instruction;Input;Output\nAdd.;1, 2;3\nGo.;;x\n;;\n")
    add, go, bad = read(tmp_path / "p.csv")
    assert isinstance(add, PromptRow)
    assert isinstance(go, PromptRow)
    assert (add.text, go.text) == ("Add.\n1, 2", "Go.")
    assert "neither 'prompt' nor 'messages'" in str(bad)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,x,x\na,1,2\n", "its header names the column 'x' twice"),
        ("prompt;x; x \na;1;2\n", "its header names the column 'x' twice"),
        ('"prompt\na\n', "cannot read the header .* a quote is opened and never closed"),
        ("prompt,caf\udce9\na,b\n", "cannot read the header .* not UTF-8"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=said):
        read(tmp_path / "p.csv")


def test_files_put_one_after_the_other_have_no_prompt_named_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Prompt,x\na,1\n\ufeffPrompt,x\nb,2\n", encoding="utf-8")
    first, again, second = read(tmp_path / "p.csv")
    assert isinstance(first, PromptRow)
    assert isinstance(second, PromptRow)
    assert str(again) == "p.csv:3: a repeated header, as in concatenated files"


def test_a_cell_whose_column_has_no_name_is_no_loss_in_silence(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,,\na,,\nb,,1\n")
    good, bad = read(tmp_path / "p.csv")
    assert good == PromptRow("a", None, None, None, {})
    assert "a cell in one of several columns that have no name" in str(bad)


def test_what_an_open_quote_swallows_is_counted(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,answer\na,1\n"b,2\nc,3\n"x,4\nd,5\n"e,6\nf,7\n')
    first, swallowed, good, rest = read(tmp_path / "p.csv")
    assert isinstance(first, PromptRow)
    assert isinstance(swallowed, BadRow)
    assert (swallowed.line, swallowed.rows) == (3, 3)
    assert swallowed.reason.endswith("lines 3 to 5 (3 lines) cannot be read")
    assert good == PromptRow("d", None, "5", None, {})
    assert isinstance(rest, BadRow)
    assert (rest.line, rest.rows) == (7, 2)
    assert "a quote is opened and never closed; lines 7 to 8 (2 lines) cannot be read" in rest.reason


@pytest.mark.parametrize(
    ("cell", "said"), [(b'"' + b"x\n" * 9 * 2**20, "a quote"), (b"x" * 17 * 2**20, "line 2 is longer")]
)
def test_a_cell_beyond_all_bounds_ends_the_reading(tmp_path: Path, cell: bytes, said: str) -> None:
    (tmp_path / "p.csv").write_bytes(b"prompt\n" + cell)
    with pytest.raises(UsageError, match=said):
        read(tmp_path / "p.csv")


# Responses


def responses(tmp_path: Path, record: Any, **layout: Any) -> ResponseRow | BadRow:
    [row] = response_rows.read(jsonl(tmp_path / "r.jsonl", record), Layout(**layout))
    return row


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": SAID[:2], "model": "ada"},
        {"messages": TURNS[:2], "teacher": "ada"},
        {"instruction": "Hi", "input": "", "output": "Hello.", "Model": "ada"},
        {"Prompt": "Hi", "Response": "Hello.", "Teacher": "ada"},
    ],
)
def test_responses_come_in_the_usual_layouts_too(tmp_path: Path, record: Any) -> None:
    row = responses(tmp_path, record)
    assert isinstance(row, ResponseRow), row
    assert (row.prompt.text, row.text, row.teacher, row.meta) == ("Hi", "Hello.", "ada", {})


@pytest.mark.parametrize(
    ("said", "kept"),
    [("MAX_TOKENS", "length"), ("maxTokens", "length"), ("end_turn", "stop"), ("abort", "abort"), ("None", None)],
)
def test_responses_end_in_one_word(tmp_path: Path, said: str, kept: str | None) -> None:
    row = responses(tmp_path, {"prompt": "Hi", "response": "Hel", "teacher": "ada", "finish_reason": said})
    assert isinstance(row, ResponseRow)
    assert row.finish_reason == kept


def test_responses_are_as_particular_about_turns_as_prompts(tmp_path: Path) -> None:
    bad = responses(tmp_path, {"messages": [HI | {"weight": 1}], "response": "a", "teacher": "ada"})
    assert "turn 1 has 'weight'" in str(bad)
    bad = responses(tmp_path, {"question": "Hi", "response": "a", "teacher": "ada"})
    assert isinstance(bad, BadRow)
    assert bad.reason.endswith("the row has 'question', 'response', 'teacher'")
    assert bad.names == ("prompt=question",)
