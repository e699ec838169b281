"""Compare kinds of routers on grids of real scores, by the number of calibration prompts.

    python -m studies.router_kinds GRID.jsonl.gz ... --embedding FOLDER --backbone FOLDER --field domain

A grid has a row for each response with a `label`, right or wrong (a file for `persyn responses import`), or a row for
each prompt with `scores` of its teachers, 0 to 1. For each seed, hold-out prompts are drawn, and calibration prompts of
each size from the others. Every kind is fitted to the same calibration prompts, and `auto` chooses one by
cross-validation. Finished fits are kept under --home and not repeated. The tables go to studies/router_kinds.md. No row
of a grid is stored in this repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Struct

from persyn.llm import options, scoring
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import ModelSpec
from persyn.method import routing_metrics
from persyn.method.intervals import Vector
from persyn.method.rewards import Indices, Matrix
from persyn.router import features, model, sentence_model
from persyn.router.kinds import choice, crossfit
from persyn.router.kinds.base import Examples, Prompts, quietly
from persyn.router.kinds.registry import ROUTERS
from persyn.router.model import Reader
from studies.common import error, put, table

REPORT = Path(__file__).with_suffix(".md")
SIZES = (100, 250, 500, 1000, 2500)
#: Prompts encoded before the cache is written.
_CHUNK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """A grid's prompts, with their (P, K) rewards of K teachers."""

    name: str
    prompts: Prompts
    rewards: Matrix
    teachers: Sequence[str]


class Outcome(Struct, frozen=True):
    """One kind on the hold-out of one seed; `kind` is "auto" for the choice, "oracle" for the best response.

    took: the kind that was chosen. seconds: of the processor, for all kinds of the same fit.
    """

    grid: str
    reads: str
    size: int
    seed: int
    kind: str
    reward: float
    hit1: float | None
    hit3: float | None
    took: str = ""
    seconds: float = 0.0


def main() -> None:
    """Fit what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path)
    parser.add_argument("--backbone", help="folder of a language model whose states are read")
    parser.add_argument("--embedding", help="folder of a sentence-embedding model")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of a prompt that are read")
    parser.add_argument("--field", help="also with the labels in this field of the rows")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEACHER", help="teachers that are left out")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--home", type=Path, default=Path("build/studies/router_kinds"))
    parser.add_argument("--report", type=Path, default=REPORT, help="the page whose tables are replaced")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.home.mkdir(parents=True, exist_ok=True)
    found = _kept(given.home)
    for path in given.grids:
        grid = read(path, given.field, given.without)
        for outcomes in _missing(replace_states(grid, given), given, found):
            found += outcomes
            with (given.home / "outcomes.jsonl").open("ab") as file:
                file.write(b"".join(msgspec.json.encode(each) + b"\n" for each in outcomes))
            put(given.report, report(found))


def _kept(home: Path) -> list[Outcome]:
    file = home / "outcomes.jsonl"
    return [msgspec.json.decode(line, type=Outcome) for line in file.read_bytes().splitlines()] if file.exists() else []


def read(path: Path, field: str | None, without: Sequence[str] = ()) -> Grid:
    """Read a grid without states and without some teachers."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    places = {text: place for place, text in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    cells = [(places[row["prompt"]], *cell) for row in rows for cell in _cells(row)]
    known = {teacher for _, teacher, _ in cells}
    if unknown := set(without) - known:
        raise SystemExit(f"{path} has no responses of {', '.join(sorted(unknown))}; it has those of {sorted(known)}")
    teachers = sorted(known.difference(without))
    rewards = np.full((len(places), len(teachers)), np.nan)
    for place, teacher, score in cells:
        if teacher in teachers:
            rewards[place, teachers.index(teacher)] = score
    labels: list[str | None] = [None] * len(places)
    for row in rows:
        labels[places[row["prompt"]]] = row.get(field) if field else None
    fields = {field: labels} if field and any(labels) else {}
    name = path.name.split(".")[0].removesuffix("_parallel")
    name += f" without {', '.join(without)}" if without else ""
    return Grid(name, Prompts({}, list(places), fields), rewards, teachers)


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "scores" in row:
        yield from row["scores"].items()
    elif row["label"] is not None:
        yield row["teacher"], float(row["label"])


def replace_states(grid: Grid, given: argparse.Namespace) -> Grid:
    """The grid with the states of the chosen encoders."""
    states = {}
    if given.backbone:
        states["backbone"] = _backbone(grid.prompts.texts, given)
    if given.embedding:
        states["embedding"] = _embedding(grid.prompts.texts, given)
    return replace(grid, prompts=replace(grid.prompts, states=states))


def _backbone(texts: Sequence[str], given: argparse.Namespace) -> Matrix:
    spec = ModelSpec("router_fit", given.backbone)
    reader = Reader(Chat(load_tokenizer(spec)), given.max_tokens)
    ids = [reader.ids([{"role": "user", "content": text}]) for text in texts]
    router = model.load(spec, "float32", 1, "middle").requires_grad_(False)
    batch_tokens = scoring.batch_tokens(spec, options.RouterFitOptions())
    place = features.folder(given.home, given.backbone, None, "torch.float32", "middle")
    parts = [
        features.cached(
            place, ids[first : first + _CHUNK], lambda new: model.all_features(router, new, batch_tokens, quietly)
        )
        for first in range(0, len(ids), _CHUNK)
    ]
    return np.asarray(torch.cat(parts).double().numpy())


def _embedding(texts: Sequence[str], given: argparse.Namespace) -> Matrix:
    loaded = sentence_model.load(ModelSpec("router_fit", given.embedding))
    loaded = replace(loaded, max_tokens=min(loaded.max_tokens, given.max_tokens))
    place = features.folder(given.home, given.embedding, str(loaded.max_tokens), "torch.float32", "embedding")
    ids = [list(text.encode()) for text in texts]  # the cache's keys
    parts = [
        features.cached(
            place,
            ids[first : first + _CHUNK],
            lambda new: loaded.vectors([bytes(each).decode() for each in new], quietly),
        )
        for first in range(0, len(ids), _CHUNK)
    ]
    return np.asarray(torch.cat(parts).double().numpy())


def _missing(grid: Grid, given: argparse.Namespace, found: Sequence[Outcome]) -> Iterator[list[Outcome]]:
    """Outcomes of fits that are not kept, small ones first."""
    kept = {(each.grid, each.reads, each.size, each.seed) for each in found}
    n_prompts = len(grid.prompts)
    largest = min(max(given.sizes), n_prompts * 3 // 4)
    sizes = sorted({min(size, largest) for size in given.sizes})
    read_by = {"prompt": replace(grid, prompts=replace(grid.prompts, fields={}))}
    read_by |= {f"prompt and {name}": grid for name in grid.prompts.fields}
    for size in sizes:
        for seed in given.seeds:
            drawn = np.random.default_rng(seed).permutation(n_prompts)
            for reads, one in read_by.items():
                if (grid.name, reads, size, seed) not in kept:
                    yield _compared(one, reads, seed, drawn[n_prompts - largest :][:size], drawn[: n_prompts - largest])


def _compared(grid: Grid, reads: str, seed: int, learn: Indices, asked: Indices) -> list[Outcome]:
    """Every kind, fitted to the prompts `learn` and measured on the prompts `asked`."""
    started = time.process_time()
    bench = crossfit.Bench(grid.prompts.take(learn), Examples(grid.rewards[learn], seed=seed))
    chosen = choice.choose_on(bench, list(ROUTERS.values()))
    prompts, rewards = grid.prompts.take(asked), grid.rewards[asked]
    scores = {each.kind: bench.fitted(ROUTERS[each.kind])[0].scores(prompts) for each in chosen.candidates}
    scores |= {"auto": scores[chosen.kind], "oracle": np.nan_to_num(rewards)}
    seconds = time.process_time() - started
    outcomes = []
    for kind, each in scores.items():
        measured = routing_metrics.evaluate(each, rewards)
        took = chosen.kind if kind == "auto" else ""
        reward, hit1, hit3 = measured["routed_reward"], measured["hit1"], measured["hit3"]
        assert reward is not None
        outcomes.append(Outcome(grid.name, reads, len(learn), seed, kind, reward, hit1, hit3, took, seconds))
    return outcomes


def report(found: Sequence[Outcome]) -> str:
    """The tables of every grid, with and without labels."""
    cases = dict.fromkeys((each.grid, each.reads) for each in found)
    return "".join(_case(*case, [each for each in found if (each.grid, each.reads) == case]) for case in cases)


def _case(grid: str, reads: str, found: Sequence[Outcome]) -> str:
    kinds = [kind for kind in (*ROUTERS, "auto") if any(each.kind == kind for each in found)]
    sizes = sorted({each.size for each in found})
    largest = [each for each in found if each.size == sizes[-1]]
    gains = [[kind, *(_gain(kind, [each for each in found if each.size == size]) for size in sizes)] for kind in kinds]
    details = [[kind, *_details(kind, largest)] for kind in (*kinds, "oracle")]
    took = ", ".join(sorted({each.took for each in largest if each.took}))
    seconds = np.mean([each.seconds for each in largest])
    return (
        f"### {grid}, reading the {reads}\n\nGain over the best single teacher, and the share of the gap to the oracle "
        "that it closes, by calibration prompts:\n\n"
        + table(["kind", *map(str, sizes)], gains)
        + f"At {sizes[-1]} calibration prompts, {len({each.seed for each in largest})} seeds"
        f"{took and f'; `auto` took {took}'}; all fits of a seed took {seconds:.0f} s:\n\n"
        + table(["kind", "reward", "gain, 95%", "Hit@1", "Hit@3"], details)
    )


def _paired(kind: str, found: Sequence[Outcome]) -> tuple[Vector, Vector]:
    """(S,) gains of a kind over static, and gaps of static to the oracle, by seed."""
    rewards = {
        name: {each.seed: each.reward for each in found if each.kind == name} for name in (kind, "static", "oracle")
    }
    pairs = [
        (rewards[kind][seed] - static, rewards["oracle"][seed] - static) for seed, static in rewards["static"].items()
    ]
    gains, gaps = np.array(pairs).T
    return gains, gaps


def _gain(kind: str, found: Sequence[Outcome]) -> str:
    gains, gaps = _paired(kind, found)
    spread = f" +- {error(gains / gaps):.1%}" if len(gains) > 1 else ""
    return f"{gains.mean():+.3f} ({(gains / gaps).mean():+.1%}{spread})"


def _details(kind: str, found: Sequence[Outcome]) -> list[str]:
    gains, _ = _paired(kind, found)
    mine = [each for each in found if each.kind == kind]
    hits = [[getattr(each, name) for each in mine] for name in ("hit1", "hit3")]
    shown = ["" if None in values else f"{np.mean(values):.3f}" for values in hits]
    low, high = gains.mean() - error(gains), gains.mean() + error(gains)
    interval = f"{low:+.3f} to {high:+.3f}" if len(gains) > 1 else f"{low:+.3f}"
    return [f"{np.mean([each.reward for each in mine]):.3f}", interval, *shown]


if __name__ == "__main__":
    main()
