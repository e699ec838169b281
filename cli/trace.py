"""`persyn trace`: show the provenance and uses of one response."""

from __future__ import annotations

import click
import msgspec

from persyn.analysis import explain
from persyn.analysis import trace as history
from persyn.cli.context import JSON, RUN, cell, find_run, show, store
from persyn.settings import Settings


@click.command()
@RUN
@click.argument("prompt")
@click.option("--explain", "explained", is_flag=True, help="Also load the router, and say what decided its scores.")
@JSON
def trace(run: str, prompt: str, explained: bool, as_json: bool) -> None:
    """Show the provenance and the uses of RUN's response to PROMPT.

    PROMPT is its prompt_id or its id; each row of a dataset contains both. Provenance: scores, reward, router, teacher
    and its version, job, worker, GPUs, engine, seed. Uses: the runs that contain the prompt, and the students trained
    on their datasets.

    With --explain, the router is loaded on this host and says what decided its scores: the most similar calibration
    prompts (neighbours), words (linear), the prompt's group (clusters), or each of them (stacked).
    """
    with store() as database:
        with database.read() as session:
            of = find_run(session, run)
            prompt_id, others = history.find(session, of, prompt)
            found = history.trace(session, of, prompt_id)
            run_id = of.id
        reasons = explain.explain(database, run_id, prompt_id, Settings.from_environment()) if explained else []
    if others:
        listed = ", ".join(map(str, others))
        click.echo(f"{prompt_id} was read as a prompt_id; in its file it is also the id of prompt {listed}", err=True)
    if as_json:
        whole = msgspec.to_builtins(found) | ({"reasons": msgspec.to_builtins(reasons)} if explained else {})
        click.echo(msgspec.json.encode(whole).decode())
        return
    from_id = f" {cell(found.source_id)}" if found.source_id is not None else ""
    click.echo(f"prompt {found.prompt_id} ({found.role}), from {cell(found.source)}{from_id}: {cell(found.text)}")
    _facts(f"assigned to {cell(found.teacher)}", found.assignment)
    _table("responses that met a condition of [fallback]", found.choices)
    _facts("strategy", found.strategy)
    _facts("router", found.router)
    _table("router scores", found.router_scores)
    for reason in reasons:
        part = "" if reason.weight is None else f" (weight {reason.weight:.2f})"
        click.echo(f"\n{reason.router}{part}: {reason.title}")
        if reason.rows:
            show(list(reason.rows[0]), [list(row.values()) for row in reason.rows], as_json=False)
    if explained and not reasons:
        click.echo(f"\nnothing to explain: what a router of kind {cell(found.router['kind'])} reads has no names")
    for response in found.responses:
        if response["reasoning"] is not None:
            response["reasoning"] = history.beginning(response["reasoning"], _REASONING)
        _facts(f"response of {cell(response['teacher'])}", {k: v for k, v in response.items() if k != "teacher"})
    reasoned = any(row["reasoning_value"] is not None for row in found.scores)
    columns = (*_SCORE_COLUMNS, *_REASONING_COLUMNS) if reasoned else _SCORE_COLUMNS
    _table("raw scores", [{name: row[name] for name in columns} for row in found.scores])
    _table("events", found.events)
    _table("used by", found.uses)


#: Characters of a response's reasoning that are shown; --json has all.
_REASONING = 2_000
#: The columns of a raw score that fit on a line; --json shows all.
_SCORE_COLUMNS = ("teacher", "sample", "measure", "scorer", "value", "n_tokens", "failure", "response_id", "job_id")
_REASONING_COLUMNS = ("reasoning_value", "reasoning_n_tokens")


def _facts(title: str, facts: dict[str, object]) -> None:
    if not facts:
        return
    click.echo(f"\n{title}")
    width = max(map(len, facts))
    for name, value in facts.items():
        if value is not None:
            click.echo(f"  {name:<{width}} {cell(value)}")


def _table(title: str, rows: list[dict[str, object]]) -> None:
    if rows:
        click.echo(f"\n{title}")
        show(list(rows[0]), [list(row.values()) for row in rows], as_json=False)
