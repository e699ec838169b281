"""SQL queries give the same answers on both databases, and cannot do any harm."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import func, select

from persyn.db.catalog import Prompt
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.sql import ask, child, postgres, tokens
from persyn.sql.ask import Answer, Limits
from tests.factories import make_prompt

ENDLESS = "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"

#: Statements that change something, or are more than one, on any database.
WRITES = [
    "DELETE FROM prompts",
    "DELETE FROM prompts RETURNING id",
    "WITH gone AS (DELETE FROM prompts RETURNING id) SELECT * FROM gone",
    "INSERT INTO prompts (text) VALUES ('x')",
    "CREATE TEMP TABLE t AS SELECT 1 AS n",
    "ROLLBACK; DELETE FROM prompts",
    "VACUUM",
    "-- nothing",
]
SQLITE = [
    "ATTACH DATABASE '{folder}/other.db' AS other",
    "VACUUM INTO '{folder}/copy.db'",
    "PRAGMA query_only = OFF",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA writable_schema = ON",
    "PRAGMA hard_heap_limit = 0",
    "PRAGMA database_list",
    "SELECT load_extension('libm.so.6')",
    "SELECT fts3_tokenizer('simple')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('{folder}/file', 'x')",
    "SELECT edit('x')",
    "SAVEPOINT s",
    "UPDATE sqlite_master SET sql = 'x'",
    "SELECT * FROM pragma_database_list",
    "SELECT length(zeroblob(1000000000))",
    "SELECT length(hex(randomblob(60000000)))",
]
#: Exceeds the memory limit of the process.
GREEDIER = f"SELECT {', '.join(['hex(zeroblob(30000000))'] * 6)}"
GREEDY = "SELECT group_concat(hex(zeroblob(10000000)) || value) FROM json_each('[1,2,3,4,5,6,7,8,9]')"
#: Functions of PostgreSQL that do more than read rows, many for superusers only, written in various ways.
POSTGRESQL_NAMES = [
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_read_binary_file('/etc/passwd')",
    "SELECT pg_catalog.pg_ls_dir('/')",
    "SELECT pg_catalog . \"pg_ls_dir\" ('/')",
    "SELECT \"pg_read_file\"/* */('/etc/passwd')",
    "SELECT PG_READ_FILE('/etc/passwd')",
    "SELECT U&\"\\0070g_read_file\"('/etc/passwd')",
    "SELECT * FROM pg_read_file('/etc/passwd') AS t",
    "SELECT * FROM pg_stat_file('/etc/passwd')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_export(1, '/tmp/x')",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT dblink('host=/tmp', 'SELECT 1')",
    "SELECT set_config('transaction_read_only', 'off', true)",
    "SELECT set_config('role', 'none', false), 1",
    "SELECT current_setting('data_directory')",
    "SELECT query_to_xml('SELECT 1', true, true, '')",
    "SELECT table_to_xml('pg_authid', true, true, '')",
    "SELECT * FROM pg_authid",
    "SELECT * FROM pg_shadow",
    "SELECT * FROM pg_stat_activity",
    'SELECT * FROM "pg_catalog"."pg_authid"',
    "SELECT * FROM information_schema.tables",
    "SELECT pg_sleep(1000)",
    "SELECT pg_terminate_backend(1)",
    "SELECT pg_cancel_backend(1)",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_reload_conf()",
    "SELECT pg_notify('x', 'y')",
    "SELECT nextval('prompts_id_seq')",
    "SELECT public.length('x')",
    "SELECT 1 WHERE EXISTS (SELECT pg_sleep(1000))",
    "SELECT (SELECT 'x') ~ pg_read_file('/etc/passwd')",
    "SELECT $a$ $a$ || pg_read_file($b$/etc/passwd$b$)",
    "SELECT $a$ $b$ $a$ || pg_read_file('/etc/passwd') --$b$",
    "SELECT 'it''s' || pg_read_file('/etc/passwd')",
    "SELECT E'\\'' || pg_read_file('/etc/passwd') || ''",
    "SELECT e'x'\n'\\'', pg_read_file('/etc/passwd'), '",
    "SELECT 'x'\n'y'",
    "SELECT U&'\\0027', 1",
    "SELECT /* /* */ ' */ */ pg_read_file('/etc/passwd') --'",
    "SELECT 1 -- '\n, pg_read_file('/etc/passwd') -- '",
    "SELECT 1 @-- '\n pg_read_file('/etc/passwd') -- '",
    "SELECT \"'\" , pg_read_file('/etc/passwd'), '\"'",
    "SELECT a$a$ , pg_read_file('/etc/passwd') , $a$ FROM (SELECT 1) AS t",
    "CALL x()",
]
#: Commands.
POSTGRESQL = [
    "COPY prompts TO PROGRAM 'id'",
    "SELECT * FROM prompts FOR UPDATE",
    "SET ROLE NONE",
    "DO 'BEGIN END'",
    "SELECT 1 INTO t",
]


@pytest.fixture
def asked(database: Database) -> Database:
    """A store with one prompt."""
    with database.write() as session:
        make_prompt(session, "100% of 2:00 is? \N{SNOWMAN}", answer="2", meta={"level": 3})
    return database


def is_sqlite(database: Database) -> bool:
    return database.url.get_backend_name() == "sqlite"


def test_a_question_is_answered_alike_on_both_databases(asked: Database) -> None:
    answer = ask.ask(
        asked,
        "SELECT text, meta ->> 'level' AS level, NULL AS none, count(*) AS n, avg(id) AS mean, sum(1.5) AS x,\n"
        "       max(CASE WHEN text LIKE '100\\%%' ESCAPE '\\' THEN 1 ELSE 0 END) AS likes -- it's: that\n"
        "FROM prompts WHERE (id < :most) AND source = :name /* :none */ GROUP BY text, meta ->> 'level';",
        {"most": 9, "name": "prompts.jsonl"},
    )
    level = 3 if is_sqlite(asked) else "3"  # as in JSON, or as extracted by PostgreSQL: text
    assert answer == Answer(
        ["text", "level", "none", "n", "mean", "x", "likes"],
        [("100% of 2:00 is? \N{SNOWMAN}", level, None, 1, 1, 1.5, 1)],
        is_truncated=False,
    )


def test_a_parameter_is_a_value_and_never_sql(asked: Database) -> None:
    hostile = "' OR 1=1; DROP TABLE prompts; -- %s :name"
    assert ask.ask(asked, "SELECT count(*) FROM prompts WHERE text = :text", {"text": hostile}).rows == [(0,)]
    with pytest.raises(UsageError, match=r":?text"):
        ask.ask(asked, "SELECT count(*) FROM prompts WHERE text = :text")


def test_an_answer_ends_at_its_limits_and_says_so(asked: Database) -> None:
    with asked.write() as session:
        for number in range(8):
            make_prompt(session, f"{number}" * 1000)
    query = "SELECT text FROM prompts ORDER BY id DESC"
    exactly = ask.ask(asked, query, limits=Limits(rows=9))
    assert (len(exactly.rows), exactly.is_truncated) == (9, False)
    fewer = ask.ask(asked, query, limits=Limits(rows=8))
    assert (len(fewer.rows), fewer.is_truncated) == (8, True)
    # 3 texts of 1,000 characters take 3 KB, and a 4th would exceed 3.5 KB.
    smaller = ask.ask(asked, query, limits=Limits(megabytes=0.0035))
    assert (len(smaller.rows), smaller.is_truncated) == (3, True)
    with pytest.raises(UsageError, match="first row alone"):
        ask.ask(asked, query, limits=Limits(megabytes=0.0005))


def test_an_array_is_as_large_as_what_is_in_it(asked: Database) -> None:
    if is_sqlite(asked):
        pytest.skip("SQLite has no arrays")
    # 100,000 numbers of 28 bytes with a pointer each.
    query = "SELECT array_agg(g) FROM generate_series(1, 100000) AS g"
    with pytest.raises(UsageError, match="first row alone"):
        ask.ask(asked, query, limits=Limits(megabytes=1))
    ((numbers,),) = ask.ask(asked, query, limits=Limits(megabytes=5)).rows
    assert len(numbers) == 100_000


def test_an_endless_question_is_ended(asked: Database) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"longer than 0\.5 s"):
        ask.ask(asked, ENDLESS, limits=Limits(seconds=0.5))
    assert time.monotonic() - began < 60


def test_a_greedy_question_is_ended(asked: Database) -> None:
    if not is_sqlite(asked):
        pytest.skip("what a question takes of PostgreSQL's own memory is PostgreSQL's to limit")
    with pytest.raises(UsageError, match="too big"):
        ask.ask(asked, GREEDY)
    with pytest.raises(UsageError, match="too much memory"):
        ask.ask(asked, GREEDIER)


def test_what_is_no_text_is_refused(asked: Database) -> None:
    for statement, value in (("SELECT '\0'", "x"), ("SELECT '\udcff'", "x"), ("SELECT :x", "\udcff")):
        with pytest.raises(UsageError, match="invalid text"):
            ask.ask(asked, statement, {"x": value})


def test_large_numbers_are_numbers(asked: Database) -> None:
    if not is_sqlite(asked):
        answer = ask.ask(asked, "SELECT sum(v), max(v) FROM (VALUES (1e40), (0.5)) AS t(v)")
        assert answer.rows == [(1e40, 1e40)]
    assert ask.ask(asked, "SELECT sum(v) AS s FROM (SELECT 9007199254740993 AS v UNION ALL SELECT 0) AS t").rows == [
        (9007199254740993,)
    ]


def test_json_is_taken_apart(asked: Database) -> None:
    each = "json_each(meta)" if is_sqlite(asked) else "jsonb_each_text(meta)"
    ((name, value),) = ask.ask(asked, f"SELECT e.key, e.value FROM prompts, {each} AS e").rows
    assert (name, int(value)) == ("level", 3)


def test_what_no_clock_inside_the_database_ends_is_ended_from_outside(
    asked: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_sqlite(asked):
        pytest.skip("PostgreSQL looks at its clock everywhere")
    monkeypatch.setattr(ask, "_GRACE_SECONDS", 1.0)
    # A single call that compares 3e13 characters.
    with pytest.raises(UsageError, match=r"longer than 0\.5 s"):
        ask.ask(
            asked,
            "SELECT instr(hex(zeroblob(15000000)), hex(zeroblob(7000000)) || '1')",
            limits=Limits(seconds=0.5),
        )


def test_what_nobody_is_there_to_end_ends_itself(asked: Database) -> None:
    if not is_sqlite(asked):
        pytest.skip("PostgreSQL looks at its clock everywhere")
    slow = "SELECT instr(hex(zeroblob(15000000)), hex(zeroblob(7000000)) || '1')"
    request = msgspec.json.encode(ask.requested(asked, slow, {}, Limits(seconds=0.2)))
    code = "from persyn.sql import child; child._ALONE_SECONDS = 0.3; child.main()"
    ended = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGALRM


def refused(asked: Database, query: str) -> bool:
    try:
        return isinstance(child.answer(ask.requested(asked, query, {}, Limits())), child.QueryError)
    except UsageError:
        return True


def test_a_question_can_do_no_harm(asked: Database, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    own = [query.format(folder=tmp_path) for query in SQLITE] if is_sqlite(asked) else POSTGRESQL
    for query in WRITES + own:
        # The child's function called directly; a process per query would take minutes.
        assert refused(asked, query), query
    with asked.read() as session:
        assert session.scalars(select(func.count()).select_from(Prompt)).one() == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_superuser_that_gets_past_the_list_of_functions_still_reads_no_file(
    asked: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_sqlite(asked):
        pytest.skip("SQLite has no roles")
    monkeypatch.setattr(postgres, "checked", lambda statement, parameters: statement)
    with pytest.raises(UsageError, match="permission denied"):
        ask.ask(asked, "SELECT pg_read_file('/etc/passwd')")
    with pytest.raises(UsageError, match="read-only"):
        ask.ask(asked, "SELECT lo_from_bytea(0, 'x')")
    with pytest.raises(UsageError, match="cannot insert multiple commands"):
        ask.ask(asked, "SELECT 1; DELETE FROM prompts")


@pytest.mark.parametrize("query", POSTGRESQL_NAMES)
def test_a_question_names_no_function_and_no_table_of_postgresql_itself(query: str) -> None:
    with pytest.raises(UsageError):
        postgres.checked(query, {})


def test_questions_that_people_ask_pass_the_list_of_functions() -> None:
    for query in (
        "SELECT a, (b + 1) * 2 FROM t WHERE a IN (1, 2) AND (b) > ANY (SELECT 1) ORDER BY (a)",
        "WITH RECURSIVE t(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM t) SELECT count(*) FILTER (WHERE n > 1) FROM t",
        "SELECT rank() OVER (PARTITION BY a ORDER BY b DESC), percentile_cont(0.5) WITHIN GROUP (ORDER BY b) FROM t",
        'SELECT CAST(a AS numeric(10, 2)), a::text, 1e-3, .5, "A"."b c", meta #>> \'{a,b}\', x || $$it\'s$$ FROM "A"',
        "SELECT * FROM unnest(ARRAY[1, 2]) WITH ORDINALITY AS t(a, b) JOIN LATERAL (SELECT 1) AS u USING (a)",
        "SELECT date_trunc('hour', at), count(DISTINCT actor) FROM events GROUP BY ROLLUP (1) HAVING (count(*) > 1)",
        "SELECT 'pg_read_file(x)', \"of (it)\" FROM t -- pg_sleep(1)\n/* pg_sleep(1) /* ' */ */;",
    ):
        assert postgres.checked(query, {}).replace("%%", "%").rstrip() == query.rstrip(";")


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("SELECT :run, :max_tokens, :K2, :run", ["run", "max_tokens", "K2"]),
        ("SELECT to_char(now(), 'HH24:mi'), \"a:b\", 1::text -- at :noon\n/* :none */ FROM t WHERE n = :n", ["n"]),
        ("SELECT x'00', :run", ["run"]),
        ("SELECT :run, 'without an end :no", ["run"]),
    ],
)
def test_a_parameter_is_what_the_database_takes_for_one(statement: str, wanted: list[str]) -> None:
    assert tokens.parameters(statement) == wanted


def test_a_parameter_may_have_any_name(asked: Database) -> None:
    assert ask.ask(asked, "SELECT :max_tokens || :K2 AS x", {"max_tokens": "4", "K2": "2"}).rows == [("42",)]


def test_the_request_does_not_show_in_the_list_of_processes(asked: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database URL contains a password."""
    seen = []
    run = ask.subprocess.run
    monkeypatch.setattr(
        ask.subprocess, "run", lambda command, **rest: (seen.append((command, rest)), run(command, **rest))[1]
    )
    ask.ask(asked, "SELECT 1")
    ((command, rest),) = seen
    assert command[1:] == ["-P", "-m", "persyn.sql.child"]
    assert msgspec.json.decode(rest["input"])["statement"].startswith("SELECT 1")
