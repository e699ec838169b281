"""What a prompt's row says about the tests of its code, and which part of a response is the code.

The fields are those of public datasets, `test_list` (MBPP), `test` (HumanEval) and `input_output` (APPS), and `tests`.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from persyn.errors import shorten
from persyn.llm.sandbox.box import CannotTest, Tests

#: Failure codes of scores for prompts whose rows have no tests, or not in a known form.
FLAWS = frozenset({"no_tests", "malformed_tests"})
#: The fields with tests; a row has one of them.
FIELDS = ("tests", "test_list", "test", "input_output")
_BLOCK = re.compile(
    # Possessive, since a long line of backticks would otherwise take a time that grows with its square.
    r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<language>[\w+#.-]*+)[^\n]*+\n"
    r"(?P<code>.*?)(?:^[ \t]*+(?P=fence)[ \t]*+$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_PYTHON = {"python", "python3", "py"}
#: APPS compares with the expected value or with the only element of a list, and takes tuples for lists.
_APPS_SETUP = """
def with_lists(value):
    if isinstance(value, dict):
        return {key: with_lists(each) for key, each in value.items()}
    return [with_lists(each) for each in value] if isinstance(value, (list, tuple)) else value

def is_expected(got, expected):
    got = with_lists(got)
    return got == expected or (isinstance(expected, list) and len(expected) == 1 and got == expected[0])
"""


class Example(Struct, frozen=True):
    """An input of a script and the output that it must have."""

    input: str | list[str]
    output: str | list[str]


class InputOutput(Struct, frozen=True):
    """APPS: inputs and outputs of a script or, with `fn_name`, arguments and results of a function."""

    inputs: list[Any]
    outputs: list[Any]
    fn_name: str | None = None


class CodeFields(Struct, frozen=True):
    """The fields of a prompt's row that state its tests."""

    tests: str | list[str | Example] | None = None
    test_list: list[str] | None = None
    test: str | None = None
    input_output: str | InputOutput | None = None
    test_setup_code: str | None = None
    test_imports: list[str] | None = None
    entry_point: str | None = None
    starter_code: str | None = None


def tests_of(meta: Mapping[str, Any], prompt: str) -> Tests | list[Example]:
    """The tests of a prompt: statements, or examples for a script. `CannotTest` if there is none, or one is invalid.

    meta: the prompt's row. prompt: its text.
    """
    given = [name for name in FIELDS if meta.get(name)]
    if not given:
        raise CannotTest(f"no_tests: the prompt's row has none of {', '.join(FIELDS)}")
    if len(given) > 1:
        raise CannotTest(f"malformed_tests: the prompt's row has both {given[0]} and {given[1]}; remove one")
    try:
        fields = msgspec.convert(meta, CodeFields)
        return _of_apps(fields) if fields.input_output else _of_statements(fields, prompt)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CannotTest(f"malformed_tests: {shorten(str(error))}") from error


def flaw(meta: Mapping[str, Any]) -> str | None:
    """Why the tests in a prompt's row cannot be run, as far as that shows without running them; None if they can."""
    try:
        tests_of(meta, "")
    except CannotTest as error:
        return str(error)
    return None


def code_of(response: str) -> str | None:
    """The code in a response: the last fenced block marked as Python, else the last one without a language.

    A response without any block is code as a whole; None if it has blocks, but all are of other languages. A block that
    is not closed ends with the response.
    """
    blocks = list(_BLOCK.finditer(response))
    if not blocks:
        return response
    languages = [block["language"].lower() for block in blocks]
    wanted = _PYTHON if _PYTHON.intersection(languages) else {""}
    codes = [block["code"] for block, language in zip(blocks, languages, strict=True) if language in wanted]
    return textwrap.dedent(codes[-1]) if codes else None


def preamble_of(prompt: str, entry_point: str) -> str:
    """What a prompt that is the beginning of a program has before the function to complete; empty if it is none.

    HumanEval runs a response after its prompt, so that it and the tests can use what is defined and imported there.
    """
    try:
        body = ast.parse(code_of(prompt) or "").body
        places = [place for place, node in enumerate(body) if getattr(node, "name", "") == entry_point]
        before = body[: places[0]] if places else []
        return ast.unparse(ast.Module([part for node in before if _defines(node) for part in _if_there(node)], []))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


def _defines(node: ast.stmt) -> bool:
    """Whether a statement may define something; not an expression, nor what only a script does."""
    is_of_script = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
    return not isinstance(node, ast.Expr) and not is_of_script


def _if_there(node: ast.stmt) -> list[ast.stmt]:
    """An import as one that a missing module does not stop, since often nothing uses it."""
    if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "module", "") == "__future__":
        return [node]
    alone = [ast.Import([each]) for each in node.names] if isinstance(node, ast.Import) else [node]
    missing = ast.ExceptHandler(ast.Name("ModuleNotFoundError", ast.Load()), None, [ast.Pass()])
    return [ast.Try([each], [missing], [], []) for each in alone]


def _of_statements(fields: CodeFields, prompt: str) -> Tests | list[Example]:
    tests = fields.tests or fields.test_list or fields.test or ""
    examples = [test for test in tests if isinstance(test, Example)]
    if examples:
        if len(examples) < len(tests):
            raise ValueError("tests has both statements and examples")
        return examples
    statements = tests if isinstance(tests, str) else [test for test in tests if isinstance(test, str)]
    if not all(text.strip() for text in ([statements] if isinstance(statements, str) else statements)):
        raise ValueError("a test is empty")
    setup = "\n".join([*(fields.test_imports or ()), fields.test_setup_code or ""])
    preamble = preamble_of(prompt, fields.entry_point) if fields.entry_point else ""
    return Tests(preamble=preamble, setup=setup, tests=statements, entry_point=fields.entry_point)


def _of_apps(fields: CodeFields) -> Tests | list[Example]:
    given = fields.input_output
    if isinstance(given, str):
        given = msgspec.json.decode(given, type=InputOutput)
    assert given is not None
    if len(given.inputs) != len(given.outputs) or not given.inputs:
        raise ValueError(f"input_output has {len(given.inputs)} inputs and {len(given.outputs)} outputs")
    pairs = list(zip(given.inputs, given.outputs, strict=True))
    if given.fn_name is None:
        return [msgspec.convert({"input": input, "output": output}, Example) for input, output in pairs]
    if not given.fn_name.isidentifier():
        raise ValueError(f"fn_name is {given.fn_name!r}")
    function = f"Solution().{given.fn_name}" if "class Solution" in (fields.starter_code or "") else given.fn_name
    statements = [f"assert is_expected({function}(*{input!r}), {output!r})" for input, output in pairs]
    return Tests(setup=_APPS_SETUP, tests=statements)
