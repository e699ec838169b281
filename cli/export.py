"""`persyn export`: write a run's dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from persyn.cli.context import RUN, cell, find_run, show, store
from persyn.cli.progress import counting_rows
from persyn.dataset import card
from persyn.dataset import export as dataset
from persyn.dataset.hub import Repository
from persyn.dataset.kinds import KINDS
from persyn.dataset.manifest import MANIFEST, Manifest, files_of
from persyn.dataset.options import UNKNOWN, ExportOptions
from persyn.errors import UsageError
from persyn.settings import Settings


@click.command()
@RUN
@click.option(
    "--kind",
    type=click.Choice(list(KINDS)),
    default="sft",
    help="; ".join(f"{kind.name}: {kind.summary}" for kind in KINDS.values()) + ". Default: sft.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder. Default: PERSYN_HOME/datasets/RUN, or PERSYN_HOME/datasets-KIND/RUN for another kind than sft.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(list(dict.fromkeys(name for kind in KINDS.values() for name in kind.formats))),
    help="May be repeated. Default: all built-in formats of the kind.",
)
@click.option(
    "--reasoning",
    type=click.Choice(["field", "inline", "drop"]),
    default="field",
    help="The teachers' reasoning: in a field of its own (inline in formats without one), before the answer in its "
    "text, or left out. Default: field.",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME=SHARE",
    help="A split besides train, such as test=0.05; may be repeated. A prompt is in the same split in every run.",
)
@click.option(
    "--finish-reason",
    "finish_reasons",
    multiple=True,
    metavar="REASON",
    help=f"Only responses with this finish reason: stop, length, {UNKNOWN} (not reported), or a server's own; "
    "may be repeated.",
)
@click.option("--min-quality", type=float, help="Only responses of at least this quality, in the scorer's unit.")
@click.option("--unscored", type=click.Choice(["keep", "drop"]), help="With --min-quality: responses without a score.")
@click.option("--drop-wrong", is_flag=True, help="Drop responses known to be wrong: quality 0 where 1 is right.")
@click.option(
    "--decontaminate",
    "benchmarks",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Drop rows that share 13 consecutive words with a text of this benchmark file; may be repeated.",
)
@click.option(
    "--near-duplicates",
    type=float,
    metavar="SIMILARITY",
    help="Of prompts with at least this similarity, 0.5 to 1, keep only the first.",
)
@click.option("--cap", type=int, metavar="N", help="At most N rows of each teacher, drawn by the run's seed.")
@click.option(
    "--pairs",
    type=click.Choice(["best-worst", "best-each", "all"]),
    default="best-worst",
    help="With preference, the pairs of a prompt: the one of the largest margin, the best response with each other "
    "one, or all. Default: best-worst.",
)
@click.option(
    "--min-margin",
    type=float,
    default=0.0,
    metavar="X",
    help="With preference: only pairs whose rewards differ by at least X.",
)
@click.option(
    "--higher-quality",
    is_flag=True,
    help="With preference: only pairs whose chosen response has the higher quality, so never two wrong ones.",
)
@click.option("--best", type=int, metavar="N", help="With best-of: at most N responses of a prompt. Default: all.")
@click.option("--dry-run", is_flag=True, help="Show what the dataset would contain, and write nothing.")
@click.option("--push", "repository", metavar="OWNER/NAME", help="Then push the dataset to the Hugging Face hub.")
@click.option("--public", is_flag=True, help="With --push: allow a public repository; a new one is made public.")
def export(run: str, output: Path | None, dry_run: bool, repository: str | None, public: bool, **given: Any) -> None:
    """Write the dataset of RUN, as far as it is generated; an earlier dataset in the folder is replaced as a whole.

    Without filters, it contains every response. The folder's README.md is a dataset card; 'persyn run resume'
    rewrites the dataset in PERSYN_HOME/datasets with the options of its last export. The kinds preference and best-of
    are made of the responses to calibration prompts, hold-out prompts included.
    """
    options = _options(**given)
    if public and not repository:
        raise UsageError("--public requires --push OWNER/NAME")
    if dry_run and repository:
        raise UsageError("--dry-run writes no files that --push could upload; give only one of the two")
    target = Repository(repository) if repository else None
    with store() as database:
        with database.read() as session:
            run_id = find_run(session, run).id
        folder = output or dataset.default_folder(Settings.from_environment().home, run, options.kind)
        with counting_rows() as count:
            if dry_run:
                manifest = dataset.preview(database, run_id, options, progress=count)
            else:
                manifest = dataset.write(database, run_id, folder, options, progress=count)
    _show(manifest)
    click.echo(f"{manifest.exported} rows {'would be ' if dry_run else ''}in {folder}")
    if target:
        pushed = target.push(
            folder,
            message=f"Run {manifest.run}: {manifest.exported:,} rows",
            public=public,
            manifest=MANIFEST,
            files_of=files_of,
        )
        seen = "private" if pushed.is_private else "public"
        click.echo(f"{'pushed to' if pushed.is_new else 'unchanged:'} {pushed.url} ({seen})")


def _options(
    splits: tuple[str, ...], benchmarks: tuple[Path, ...], formats: tuple[str, ...], **given: Any
) -> ExportOptions:
    shares = [_share(text) for text in splits]
    if len(dict(shares)) < len(shares):
        raise UsageError(f"a split is given twice: {', '.join(splits)}")
    given |= {"formats": formats} if formats else {}
    return ExportOptions(splits=dict(shares), benchmarks=tuple(str(path.absolute()) for path in benchmarks), **given)


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise UsageError(f"--split takes NAME=SHARE, such as test=0.05; got {text!r}") from None


def _show(manifest: Manifest) -> None:
    """Print the number of assignments by outcome."""
    kind = manifest.export.of_kind
    rows: list[tuple[str, int]] = [("assigned" if kind.name == "sft" else kind.unit, manifest.assigned)]
    rows += [(f"failed: {reason}", count) for reason, count in manifest.failed.items()]
    rows += [("no correct response", manifest.rejected)] if manifest.rejected else []
    rows += [("missing so far", manifest.missing)] if manifest.missing else []
    rows += [(kind.losses.get(name, f"dropped: {name}"), count) for name, count in manifest.dropped.items()]
    rows += [(f"  by {each.name}", each.dropped) for each in manifest.benchmarks]
    rows += [("prompts with rows", manifest.used)] if manifest.used != manifest.exported else []
    rows += [("exported", manifest.exported)]
    rows += [("  of hold-out prompts", manifest.holdout)] if manifest.holdout else []
    rows += [(f"  {split}", count) for split, count in manifest.splits.items() if len(manifest.splits) > 1]
    show(("assignments", "rows"), rows, as_json=False)
    if cut := card.cut_off(manifest):
        teachers = ", ".join(f"{cell(name)} {share}" for name, share in cut.items())
        click.echo(f"cut off at max_tokens: {teachers}; without them: --finish-reason stop", err=True)
    if manifest.wrong:
        click.echo(f"known to be wrong: {card.wrong(manifest)}; without them: --drop-wrong", err=True)
    if manifest.ambiguous:
        of_all = f"{manifest.ambiguous:,} of {manifest.responses:,} responses"
        click.echo(
            f"warning: {of_all} contain <think> or </think> themselves: where reasoning is in the text, readers may "
            "take the wrong part for the answer; --reasoning field with messages or prompt-completion is exact",
            err=True,
        )
    if silent := [each.name for each in manifest.teachers if each.exported and not each.license]:
        click.echo(
            f"warning: no licence is stated for {', '.join(silent)}: check how their responses may be used", err=True
        )
