"""Check which names a query uses on PostgreSQL, and translate its parameters.

A read-only transaction still permits everything except changing rows: reading server files, ending other sessions,
taking locks that block workers, sleeping. A query is therefore tokenised, and rejected unless every function in it is
listed below and no name belongs to the system catalogs. Whatever is not recognised is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from persyn.errors import UsageError
from persyn.sql.tokens import Token, scan

#: Functions without side effects that read only their arguments.
_FUNCTION_NAMES = """
    any_value array_agg avg bit_and bit_or bool_and bool_or corr count covar_pop covar_samp every json_agg
    json_object_agg jsonb_agg jsonb_object_agg max min mode percentile_cont percentile_disc regr_avgx regr_avgy
    regr_count regr_intercept regr_r2 regr_slope stddev stddev_pop stddev_samp string_agg sum var_pop var_samp variance
    cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
    abs cbrt ceil ceiling degrees div exp floor gcd ln log log10 mod pi power radians random round scale sign sqrt trunc
    width_bucket greatest least
    ascii bit_length btrim char_length character_length chr concat concat_ws format initcap left length lower lpad
    ltrim md5 octet_length overlay position quote_literal regexp_count regexp_instr regexp_like regexp_match
    regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table regexp_substr repeat replace reverse right
    rpad rtrim sha256 split_part starts_with string_to_array string_to_table strpos substr substring to_hex translate
    trim upper encode decode convert_from convert_to
    age clock_timestamp date date_bin date_part date_trunc extract isfinite justify_hours justify_interval make_date
    make_interval make_timestamptz now statement_timestamp timezone to_char to_date to_number to_timestamp
    array_append array_cat array_length array_lower array_position array_positions array_prepend array_remove
    array_to_json array_to_string array_upper cardinality generate_series generate_subscripts unnest
    json_array_elements json_array_elements_text json_array_length json_build_array json_build_object json_each
    json_each_text json_extract_path json_extract_path_text json_object_keys json_typeof jsonb_array_elements
    jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path jsonb_extract_path_text jsonb_object_keys jsonb_path_exists jsonb_path_query
    jsonb_path_query_array jsonb_path_query_first jsonb_pretty jsonb_typeof row_to_json to_json to_jsonb
    coalesce nullif num_nonnulls num_nulls
"""
#: Keywords that may precede a parenthesis, including types with a length.
_KEYWORD_NAMES = """
    all and any array as between by case cast cross cube distinct else end escape except exists filter first for from
    group grouping having ilike in inner intersect interval is join lateral left like limit materialized not offset on
    or over partition recursive right rollup row select sets similar some then union using values when where with
    bit char character decimal float numeric time timestamp varchar varying
"""
FUNCTIONS, _KEYWORDS = frozenset(_FUNCTION_NAMES.split()), frozenset(_KEYWORD_NAMES.split())
#: Keywords that introduce a name defined in the query, after which a parenthesis lists its columns.
_BEFORE_A_NAME = frozenset(("as", "with", "recursive"))
_REFUSED_NAMES = re.compile(r"_?pg_|information_schema$")
#: Prefixes of string literals and names with escapes, whose end or meaning cannot be determined from the tokens alone.
_WITH_ESCAPES = frozenset(("e", "u", "b", "x", "n"))


def checked(statement: str, parameters: Mapping[str, Any]) -> str:
    """Translate a statement for psycopg: `%` doubled, `:name` as `%(name)s`; raise `UsageError` if not allowed."""
    tokens = list(scan(statement))
    for first, second in pairwise(tokens):
        if first.kind == "name" and first.name in _WITH_ESCAPES and second.text[0] in "'&\"":
            raise UsageError(f"a string or name that begins with {first.text}{second.text[0]} is not allowed here")
    told = [token for token in tokens if token.kind not in ("blank", "comment")]
    while told and told[-1].text == ";":
        tokens.remove(told.pop())
    before: list[Token] = [Token("sign", "")] * 2
    for token in told:
        _require_harmless(token, before, parameters)
        before = [*before[-1:], token]
    return "".join(
        f"%({token.text[1:]})s" if token.kind == "parameter" else token.text.replace("%", "%%") for token in tokens
    )


def _require_harmless(token: Token, before: list[Token], parameters: Mapping[str, Any]) -> None:
    if token.text == ";":
        raise UsageError("only one statement is allowed")
    if token.kind == "parameter" and token.text[1:] not in parameters:
        raise UsageError(f"the query has a parameter {token.text} without a value")
    if token.name is not None and _REFUSED_NAMES.match(token.name):
        raise UsageError(
            f"{token.text} belongs to PostgreSQL itself and is not allowed here; docs/store.md lists the tables"
        )
    if token.kind in ("text", "dollar") and before[-1].kind in ("text", "dollar"):
        raise UsageError("two string literals follow each other; join them with ||")
    if token.text == "(":
        _require_known(*before)


def _require_known(first: Token, second: Token) -> None:
    """Require that a name before a parenthesis is a permitted function, or not a function."""
    name = second.name
    if name is None or (first.kind == "name" and first.name in _BEFORE_A_NAME):
        return
    is_word = second.kind == "name" and name in _KEYWORDS
    if first.text == "." or not (is_word or name in FUNCTIONS):
        raise UsageError(f"the function {second.text} is not allowed here; docs/sql.md lists the allowed functions")
