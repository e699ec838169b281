"""Measure how far new prompts are from the calibration prompts, on what a router reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persyn.llm import options
from persyn.llm.protocols import Message, ModelSpec
from persyn.method.intervals import Vector
from persyn.router.inputs import text_of
from persyn.router.kinds import design
from persyn.router.kinds.base import Prompts

#: Runs of letters and digits, and single other characters, so that every text has a word.
_WORD = r"\w+|[^\w\s]"
#: Prompts compared at once.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Conversations:
    """Prompts to compare; labels: of each in the fields that the router reads."""

    messages: Sequence[Sequence[Message]]
    labels: Mapping[str, Sequence[str | None]]


def by_states(spec: ModelSpec, home: Path, known: Conversations, new: Conversations) -> tuple[Vector, Vector] | None:
    """Distances on the states of a router's encoders, standardised, with its labels; None if it reads no states.

    spec: of the engine that routes. home: where states are cached.
    returns: (N,) and (M,) distances to the nearest other known prompt, 0 to 2: 1 less the cosine.
    Raises `HostLacks`, `EngineError` or `UsageError` where the checkpoint or a model is missing or has changed.
    """
    from persyn.router import checkpoint, encoders  # bring torch

    manifest = checkpoint.read_manifest(Path(spec.model))
    if not manifest.is_frozen or not (manifest.backbone or manifest.embedding):
        return None
    read = encoders.of_checkpoint(spec, manifest, options.decode(spec, options.RouteOptions), home)
    points = [read.read(each.messages, each.labels, keep=True) for each in (known, new)]
    read.release()
    return _of_states(*points)


def by_words(known: Sequence[Sequence[Message]], new: Sequence[Sequence[Message]]) -> tuple[Vector, Vector]:
    """Distances on TF-IDF of the words; see `by_states`.

    A word is rare if few of the *other* known prompts have it. So an unknown word counts most, in a new prompt like in
    a known one that alone has it.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    texts = [text_of(messages) for messages in (*known, *new)]
    counts = CountVectorizer(token_pattern=_WORD).fit_transform(texts).astype(np.float64)
    counts.data = 1 + np.log(counts.data)
    mine, others = counts[: len(known)], counts[len(known) :]
    frequency, n = np.asarray((mine > 0).sum(axis=0)).ravel(), len(known)
    idf = 1 + np.log((1 + n) / (1 + frequency))
    without_itself = 1 + np.log(n / np.maximum(frequency, 1))

    def rows(given: Any, weights: Vector) -> Any:
        return normalize(given @ sparse.diags_array(weights)).tocsr()

    points = rows(mine, idf)
    return _nearest(rows(mine, without_itself), points, is_same=True), _nearest(rows(others, idf), points)


def _of_states(known: Prompts, new: Prompts) -> tuple[Vector, Vector]:
    made = design.fit(known)
    points, others = design.unit(made.encode(known)), design.unit(made.encode(new))
    return _nearest(points, points, is_same=True), _nearest(others, points)


def _nearest(rows: Any, points: Any, *, is_same: bool = False) -> Vector:
    """(M,) distances of M rows of length 1 to the nearest of N points; is_same: other than the point of its place."""
    found = np.empty(rows.shape[0])
    for start in range(0, len(found), _CHUNK):
        part = rows[start : start + _CHUNK]
        product = part @ points.T
        similarities = np.asarray(product if isinstance(product, np.ndarray) else product.toarray())
        if is_same:
            places = np.arange(len(similarities))
            similarities[places, start + places] = -np.inf
        found[start : start + _CHUNK] = 1.0 - similarities.max(axis=1)
    return found
