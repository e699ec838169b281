"""Render a dataset card: README.md with front matter for the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persyn.config import load_config
from persyn.dataset.formats import PARQUET
from persyn.dataset.manifest import File, Manifest
from persyn.dataset.markdown import code, table, text
from persyn.dataset.usage import has_reasoning_field
from persyn.llm import quality

_NOT_STATED = "not stated"
#: Upper bound of rows -> the hub's size category for a dataset with fewer rows.
_SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
    10**9: "100M<n<1B",
}
#: `load_dataset` does not accept "." as a folder.
_LOAD = """\
from pathlib import Path

from datasets import load_dataset

folder = str(Path.cwd())  # or the repository's name on the hub
"""
_MOST_DOMAINS = 20
_FILTERS = {
    "finish_reason": "finish reason other than {finish_reasons}",
    "quality": "quality below {min_quality:g}",
    "unscored": "no quality score",
    "wrong": "known to be wrong",
    "contaminated": "overlap with a benchmark (13 consecutive words, or the same prompt)",
    "near_duplicate": "prompt nearly identical to an earlier one (similarity {near_duplicates:g})",
    "cap": "above the limit of {cap:,} rows per teacher",
}


def render(manifest: Manifest) -> str:
    """The card of a dataset, rendered from its manifest alone."""
    parts = [
        f"---\n{_front_matter(manifest)}\n---",
        f"# {text(manifest.run)}",
        _what(manifest),
        "## Teachers",
        _teachers(manifest),
        _licences(manifest),
        "## Counts",
        _counts(manifest),
        "## Use",
        _use(manifest),
        "## Provenance",
        _provenance(manifest),
        "To recreate it from the same store:",
        code(manifest.export.command(manifest.run), "sh"),
        "`manifest.json` contains the run's complete configuration and the digests of the files.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: Manifest) -> str:
    from huggingface_hub import DatasetCardData

    size = next((name for most, name in _SIZES.items() if manifest.exported < most), "1B<n<10B")
    data = DatasetCardData(
        pretty_name=manifest.run,
        task_categories=["text-generation"],
        size_categories=[size],
        tags=["synthetic", *manifest.export.of_kind.tags, "persyn"],
        configs=[
            {
                "config_name": name,
                **({"default": True} if name == _default(manifest) else {}),
                "data_files": [{"split": file.split, "path": file.name} for file in files],
            }
            for name, files in _loadable(manifest).items()
        ],
        dataset_info=[
            {"config_name": name, "features": features}
            for name in _loadable(manifest)
            if (features := _features(manifest, name))
        ]
        or None,
    )
    return data.to_yaml(line_break="\n").strip()


def _features(manifest: Manifest, name: str) -> list[dict[str, Any]] | None:
    """The columns of a format, with that of the reasoning if it is a field of its own."""
    form = manifest.export.of_kind.formats[name]
    features = form.described(has_tools=manifest.tools).features
    if not features or not has_reasoning_field(manifest, name):
        return features
    places = [form.reasoning_in] if isinstance(form.reasoning_in, str) else form.reasoning_in or ()
    return [_with_reasoning(feature) if feature["name"] in places else feature for feature in features]


def _with_reasoning(feature: dict[str, Any]) -> dict[str, Any]:
    """A column of turns with their reasoning, however deep they are."""
    for key in ("list", "struct"):
        inner = feature.get(key)
        if isinstance(inner, list):
            is_turn = any(each["name"] == "content" for each in inner)
            reasoning = [{"name": "reasoning_content", "dtype": "string"}] if is_turn else []
            return {**feature, key: [*map(_with_reasoning, inner), *reasoning]}
    return feature


def _by_format(manifest: Manifest) -> dict[str, list[File]]:
    """The files of each format, in the order of the kind's formats."""
    forms = manifest.export.of_kind.formats
    return {name: files for name in forms if (files := [file for file in manifest.files if file.format == name])}


def _loadable(manifest: Manifest) -> dict[str, list[File]]:
    """The files that `load_dataset` finds by format name; it accepts one file type per folder."""
    formats, forms = _by_format(manifest), manifest.export.of_kind.formats
    texts = {name: files for name, files in formats.items() if forms[name].is_text}
    return texts or formats


def _default(manifest: Manifest) -> str:
    """The format that `load_dataset` reads by default."""
    return next(iter(_loadable(manifest)))


def _what(manifest: Manifest) -> str:
    so_far = "" if manifest.finished_at else " The run was not finished when this was written: rows are missing."
    return f"{manifest.export.of_kind.about(manifest)} Made with PerSyn.{so_far}"


def _teachers(manifest: Manifest) -> str:
    rows = [
        [
            text(teacher.name),
            _model(teacher.model, teacher.revision),
            text(teacher.license or _NOT_STATED),
            f"{teacher.exported:,}",
            f"{teacher.exported / manifest.responses:.1%}",
        ]
        for teacher in manifest.teachers
    ]
    return table(["teacher", "model", "licence", _counted(manifest), "share"], rows)


def _counted(manifest: Manifest) -> str:
    """What the counts of teachers are counts of."""
    return "rows" if manifest.responses == manifest.exported else "responses"


def _licences(manifest: Manifest) -> str:
    silent = [each.name for each in manifest.teachers if each.exported and not each.license]
    said = "A teacher's licence may restrict training on its responses and redistributing them."
    if not silent:
        return f"{said} The licences are those stated in the run file."
    return f"**Warning:** no licence is stated for {', '.join(map(text, silent))}. {said} Check before doing either."


def _counts(manifest: Manifest) -> str:
    options, kind = manifest.export, manifest.export.of_kind
    said = {
        "finish_reasons": " or ".join(options.finish_reasons),
        "min_quality": options.min_quality or 0.0,
        "near_duplicates": options.near_duplicates or 0.0,
        "cap": options.cap or 0,
    }
    samples = load_config(manifest.config).generation.rows
    label = kind.unit + (f", {samples} samples of each" if kind.name == "sft" and samples > 1 else "")
    losses = {name: f"left out: {what.format(**said)}" for name, what in _FILTERS.items()} | kind.losses
    rows = [[label, manifest.assigned]]
    rows += [[f"no response: {text(reason)}", -count] for reason, count in manifest.failed.items()]
    rows += [["no correct response", -manifest.rejected]] if manifest.rejected else []
    rows += [["no response so far", -manifest.missing]] if manifest.missing else []
    rows += [[losses[name], -count] for name, count in manifest.dropped.items()]
    rows += [["prompts with rows", manifest.used]] if manifest.used != manifest.exported else []
    rows += [["**rows**", manifest.exported]]
    rows += [[f"in split {split}", count] for split, count in manifest.splits.items() if len(manifest.splits) > 1]
    parts = [table(["", "prompts"], [[str(label), f"{count:,}"] for label, count in rows])]
    if options.min_quality is not None and options.unscored == "keep":
        parts.append("Responses without a quality score (most of those outside calibration) were kept.")
    parts += _kept(manifest)
    if manifest.domains.keys() - {""}:
        parts.append(_domains(manifest))
    if manifest.benchmarks:
        benchmarks = [
            [text(each.name), f"{each.rows:,}", f"{each.dropped:,}", each.sha256] for each in manifest.benchmarks
        ]
        parts.append(table(["benchmark", "its rows", "rows left out", "SHA-256"], benchmarks))
    return "\n\n".join(parts)


def _kept(manifest: Manifest) -> list[str]:
    """Notices about responses that a reader may want to exclude, and how to exclude them."""
    said = _reasoning(manifest)
    if manifest.truncated:
        by_teacher = ", ".join(f"{text(name)} {count}" for name, count in cut_off(manifest).items())
        said.append(
            f"{manifest.truncated:,} responses are cut off at `max_tokens` (`finish_reason` is `length`): {by_teacher}."
        )
    if manifest.wrong:
        said.append(
            f"**{manifest.wrong:,} {_good(manifest)} are known to be wrong**, and were kept; `--drop-wrong` leaves "
            "them out. Unscored responses may be wrong, too."
        )
    return said


def _reasoning(manifest: Manifest) -> list[str]:
    """Where the reasoning is, if there is any."""
    if not manifest.reasoning:
        return []
    counted = f"In {manifest.reasoning:,} {_counted(manifest)}, the teacher reasoned before it answered."
    if manifest.export.reasoning == "drop":
        return [f"{counted} The reasoning was left out (`--reasoning drop`)."]
    names = list(_by_format(manifest))
    fields = [f"`{name}`" for name in names if has_reasoning_field(manifest, name)]
    texts = [f"`{name}`" for name in names if not has_reasoning_field(manifest, name)]
    said = [counted]
    if fields:
        said.append(
            f"The reasoning is the last turn's `reasoning_content` in {', '.join(fields)}; a chat template that does "
            "not read this key leaves it out."
        )
    if texts:
        said.append(f"The reasoning precedes the answer, between `<think>` and `</think>`, in {', '.join(texts)}.")
    if manifest.ambiguous:
        said.append(
            f"**{manifest.ambiguous:,} responses contain such a marker themselves**: a reader of these formats may "
            "take the wrong part for the answer."
        )
    return [" ".join(said)]


def cut_off(manifest: Manifest) -> dict[str, str]:
    """For each teacher with truncated responses in the dataset, their number and share."""
    return {
        each.name: f"{each.truncated:,} of {each.exported:,} ({each.truncated / each.exported:.0%})"
        for each in manifest.teachers
        if each.truncated
    }


def wrong(manifest: Manifest) -> str:
    """The number of responses known to be wrong, and of which; a rejected one may be."""
    n = manifest.exported if manifest.export.kind == "preference" else manifest.responses
    return f"{manifest.wrong:,} of {n:,} {_good(manifest)}"


def _good(manifest: Manifest) -> str:
    """What responses are called that should not be wrong."""
    return "chosen responses" if manifest.export.kind == "preference" else "responses"


def _domains(manifest: Manifest) -> str:
    """Row counts of the largest domains; the others are summed."""
    largest = sorted(manifest.domains.items(), key=lambda domain: (-domain[1], domain[0]))
    rows = [[text(name) if name else "(none)", f"{count:,}"] for name, count in largest[:_MOST_DOMAINS]]
    if others := sum(count for _, count in largest[_MOST_DOMAINS:]):
        rows.append([f"({len(largest) - _MOST_DOMAINS:,} others)", f"{others:,}"])
    return table(["domain", "rows"], rows)


def _use(manifest: Manifest) -> str:
    formats = _by_format(manifest)
    loads = [f'load_dataset(folder, "{name}")' for name in _loadable(manifest)]
    for name, files in formats.items():
        if not manifest.export.of_kind.formats[name].is_text:
            data_files = ", ".join(f'"{file.split}": "{file.name}"' for file in files)
            note = "  # with all provenance" if name == PARQUET else ""
            loads.append(f'load_dataset("parquet", data_files={{{data_files}}}){note}')
    parts = [
        f"With `datasets`, in this folder (the default configuration is `{_default(manifest)}`):",
        code("\n".join([_LOAD, *loads]), "python"),
    ]
    for use in manifest.export.of_kind.uses:
        if snippet := use.snippet(manifest, formats):
            parts += [use.title, snippet]
    return "\n\n".join(parts)


def _provenance(manifest: Manifest) -> str:
    config = load_config(manifest.config)
    dials = f"{config.run.alpha:g}, {config.run.normalise}, {config.run.seed}"
    rows: list[Sequence[str]] = []
    if student := manifest.student:
        rows.append(["student", f"{text(student.name)}: {_model(student.model, student.revision)}"])
    rows += [
        ["quality", text(quality.name(config))],
        ["strategy", _model(config.strategy.name, config.strategy.revision)],
        ["alpha, normalisation, seed", dials],
    ]
    if manifest.router:
        router = manifest.router
        backbone = f" on {_model(router.backbone, router.revision)}" if router.backbone else ""
        rows.append(["router", f"{text(router.kind)}{backbone}, {router.sha256}"])
    rows += [
        [f"served by {text(engine)}", f"{count:,} {_counted(manifest)}"]
        for engine, count in manifest.engines.items()
        if engine
    ]
    rows += [["configuration", manifest.config_hash]]
    rows += [["run finished", f"{manifest.finished_at:%Y-%m-%d %H:%M} UTC"]] if manifest.finished_at else []
    rows += [["versions", ", ".join(f"{name} {number}" for name, number in manifest.versions.items())]]
    return table(["what", "which"], rows)


def _model(model: str, revision: str | None) -> str:
    """A model and its version; a local model by its folder name only, so that no path is published."""
    name = Path(model).name if Path(model).is_absolute() else model
    return text(name) + (f" at {text(revision)}" if revision else "")
