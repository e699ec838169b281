"""Check a model's chat template by rendering conversations; needs no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import eq

from jinja2 import TemplateError

from persyn.errors import PermanentError, shorten
from persyn.llm import tool_forms
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Finding, Message, ModelSpec
from persyn.llm.reasoning import MarkerReader
from persyn.llm.template import Conversation, LostText, Template
from persyn.llm.tool_template import SAMPLE_CALLED, SAMPLE_TOOLS, SAMPLE_TURNS, ToolTemplate

#: Text that a careless template alters: whitespace, markup, quotes, braces, capitals, and great length.
_TEXT = (
    "Two  spaces, a\ttab,\n\nlines\n  that are indented; 1 < 2 && <b>3 > 2</b>, \"double\" and 'single' quotes, a\\b, "
    "{{ 7 * 7 }} {% if x %} {# none #}, [x] | *y* | #z, $1.50, 100 %, É, ß, \N{SNOWMAN}, \N{GRINNING FACE}. "
)
_SYSTEM: Message = {"role": "system", "content": f"S: {_TEXT}So much of a system turn."}
_USER: Message = {"role": "user", "content": f"U: {_TEXT}So much of a user turn."}
_ASSISTANT: Message = {"role": "assistant", "content": f"A: {_TEXT}So much of an assistant turn."}
_AGAIN: Message = {"role": "user", "content": f"A long one: {_TEXT * 100}So much of a user turn."}

#: <think>, [THINK], <|START_THINKING|>, <reasoning>, and what closes them; also markers that PerSyn does not know.
_THINKING = re.compile(r"[<\[◁][^<>\[\]\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]▷]", re.IGNORECASE)

_ADVICE = "correct the chat template (chat_template.jinja in the model's folder) or choose another model"


class _Fault(Exception):
    """Why a template cannot be used."""


def check(spec: ModelSpec, *, answers: bool = True) -> list[Finding]:
    """The findings about a model's chat template; loads only its tokenizer.

    answers: whether the model writes responses; a reward model only reads them.
    Raises `EngineError` when the model has no tokenizer.
    """
    return look_over(Chat(load_tokenizer(spec)), answers=answers)


def require(spec: ModelSpec, chat: Chat, *, answers: bool = True) -> Chat:
    """Return the chat; `PermanentError` if its template would lose text or does not open a response."""
    for finding in look_over(chat, answers=answers):
        if finding.level == "error":
            raise PermanentError(f"{spec.model!r}: {finding.message}")
    return chat


def look_over(chat: Chat, *, answers: bool = True) -> list[Finding]:
    """One finding on the topic "template", and more if there is more to report."""
    if chat.template is None:
        message = "no chat template: prompts become plain 'User:' and 'Assistant:' turns, for a base model"
        return [Finding("warning", "template", message)]
    try:
        warnings = list(_conversations(chat.template))
        if answers:
            warnings += _generation_prompt(chat.template)
    except _Fault as fault:
        return [Finding("error", "template", f"{fault}; {_ADVICE}")]
    warnings += _end(chat)
    message = f"a turn ends with {chat.tokenizer.convert_ids_to_tokens(chat.end_id)!r}"
    if chat.template.frame(("system", "user"), opens=True).folds:
        message += "; the text of a system turn opens the first user turn"
    found = Finding("warning" if warnings else "ok", "template", "; ".join([message, *warnings]))
    about_reasoning = _reasoning(chat) if answers else ()
    return [
        found,
        *_variables(chat.template, str(chat.tokenizer.chat_template)),
        *about_reasoning,
        *_date(chat.template),
    ]


def look_over_tools(template: ToolTemplate, *, calls: bool = True) -> list[Finding]:
    """At most one finding on the topic "tools": what happens to prompts with tools.

    calls: whether the model's calls are read in the form that the template writes.
    """
    try:
        template.answered(Conversation(SAMPLE_TURNS, "Yes.", tools=SAMPLE_TOOLS))
        template.answered(SAMPLE_CALLED)
    except TemplateError as error:
        return [Finding("warning", "tools", f"prompts with tools fail: the chat template: {shorten(str(error))}")]
    if calls and tool_forms.written_by(template) is None:
        message = "the form of its calls is not known: they stay a part of the text, unless tool_parser names the form"
        return [Finding("warning", "tools", message)]
    return []


def _conversations(template: Template) -> Iterator[str]:
    """Render every kind of conversation; one that is rejected, but not lost, is a warning."""
    for turns in ([_USER], [_AGAIN], [_SYSTEM, _USER], [_USER, _ASSISTANT]):
        _render(template, turns)
    try:
        for opening in ([], [_SYSTEM]):
            _render(template, [*opening, _USER, _ASSISTANT, _AGAIN])
            _render(template, [*opening, _USER, _ASSISTANT, _AGAIN, _ASSISTANT, _USER])
    except _Fault as fault:
        if isinstance(fault.__cause__, LostText):
            raise
        yield str(fault)


def _render(template: Template, turns: Sequence[Message]) -> None:
    try:
        if turns[-1]["role"] == "user":
            template.prompt(turns)
        else:
            template.finished(turns)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        fails = "loses text" if isinstance(error, LostText) else "fails"
        raise _Fault(f"the chat template {fails} for the turns {roles}: {shorten(str(error))}") from error


def _generation_prompt(template: Template) -> Iterator[str]:
    """Compare the end of a prompt with how a finished conversation continues from the user's text to the response."""
    opening = template.frame(("user",), opens=True).texts[-1]
    header = template.frame(("user", "assistant"), opens=False).texts[1]
    shared = "".join(a for a, _ in takewhile(lambda pair: eq(*pair), zip(opening, header, strict=False)))
    lead, extra = (_THINKING.sub("", text[len(shared) :]).strip() for text in (header, opening))
    if not (opening.strip() or lead):
        raise _Fault("the chat template writes nothing between the user's text and the response")
    if extra and (lead or not shared.strip()):
        raise _Fault(f"the generation prompt ends with {opening!r}, where a finished response follows {header!r}")
    if lead and ("assistant" in lead.lower() or not shared.strip() or not _opens_turn(template)):
        begins = header[len(shared) :]
        raise _Fault(f"the chat template has no complete generation prompt: responses would begin with {begins!r}")
    if lead:
        yield f"it writes {lead!r} between the generation prompt and a response, which the model has to write itself"
    if extra:
        yield f"the generation prompt ends with {extra!r}, which a finished conversation does not have"


def _opens_turn(template: Template) -> bool:
    """Whether the assistant's turn is opened, on request or always."""
    opening = template.frame(("user",), opens=True).texts[-1]
    if opening != template.frame(("user",), opens=False).texts[-1]:
        return True
    closing = template.frame(("user", "assistant"), opens=False).texts[-1]
    try:
        between = template.frame(("user", "assistant", "user"), opens=True).texts[2]
    except TemplateError:
        return False
    # A template that always opens an assistant turn also does so after the assistant's own turn.
    return not between.startswith(closing)


def _end(chat: Chat) -> Iterator[str]:
    assert chat.template is not None
    closing = chat.template.frame(("user", "assistant"), opens=False).texts[-1].strip()
    if closing and not chat.ends_turns:
        yield f"the template closes a turn with {closing!r}, which is not a special token of the tokenizer"


def _reasoning(chat: Chat) -> Iterator[Finding]:
    """What will be taken as reasoning."""
    assert chat.template is not None
    splits = MarkerReader(chat.tokenizer, str(chat.tokenizer.chat_template))
    tail = chat.template.frame(("user",), opens=True).texts[-1]
    markers = splits.opened(tail) or splits.markers
    tags = _THINKING.findall(tail)
    is_open = bool(tags) and "/" not in tags[-1] and "end" not in tags[-1].lower()
    if is_open and splits.opened(tail) is None:
        message = (
            f"the generation prompt opens {tags[-1]}, which PerSyn does not know: reasoning stays in the responses"
        )
        yield Finding("warning", "reasoning", f"{message}; for vllm, set options.reasoning_parser")
    elif markers is not None and splits.reads_prompt:
        who = "the generation prompt opens it" if splits.opened(tail) else "the model opens it, or does not reason"
        if markers.closes in tail and not splits.opened(tail):
            who = "the generation prompt has an empty one: the model is to answer at once"
        message = f"reasoning is what stands between {markers.opens!r} and {markers.closes!r}; {who}"
        yield Finding("ok", "reasoning", message)


def _variables(template: Template, source: str) -> Iterator[Finding]:
    for name in template.variables:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            message = f"the chat template has no variable {name!r}; correct chat_template_kwargs"
            yield Finding("error", "variables", message)


def _date(template: Template) -> Iterator[Finding]:
    stamp = "\N{OBJECT REPLACEMENT CHARACTER}"
    if stamp in template.apply([_USER], opens=True, strftime_now=lambda _: stamp):
        message = "the chat template writes today's date into prompts: they differ from one day to the next"
        yield Finding("warning", "date", message)
