"""Ridge regression of the rewards on states, labels and TF-IDF of words and word pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from persyn.llm.protocols import Tick
from persyn.method.intervals import Vector
from persyn.method.rewards import Matrix
from persyn.router.kinds import design, deviations
from persyn.router.kinds.base import Arrays, Examples, Explanation, Prompts, Values, Word, Words, quietly, unexplained
from persyn.router.kinds.design import Design
from persyn.router.kinds.deviations import Deviations

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

#: Ridge penalties, strong to weak; each source has a mean square length of 1. None: the static ranking itself.
PENALTIES = (None, 300.0, 100.0, 50.0, 30.0, 20.0, 10.0, 5.0, 3.0)
#: Words and pairs that the regression knows at most, the most frequent ones.
_MAX_WORDS = 20_000
#: Rounds that complete cells which are missing or uncertain.
_ROUNDS = 20
#: How many words an explanation names.
_NAMED = 5


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """means: (K,). weight: (D, K) of the design matrix. word_weight: (V, K) of the words with `idf` (V,)."""

    design: Design
    means: Vector
    weight: NDArray[np.float32]
    words: list[str]
    idf: NDArray[np.float32]
    word_weight: NDArray[np.float32]
    penalty: float | None

    @property
    def settings(self) -> Values:
        """The penalty."""
        return {"penalty": self.penalty}

    def scores(self, prompts: Prompts) -> Matrix:
        """Predicted rewards."""
        found = self.means + self.design.encode(prompts) @ self.weight.astype(np.float64)
        return np.asarray(found + self._word_rows(prompts) @ self.word_weight.astype(np.float64))

    def state(self) -> tuple[Arrays, Values]:
        """Weights and words."""
        arrays, values = self.design.state()
        names = ("means", "weight", "idf", "word_weight")
        given = {name: getattr(self, name) for name in names}
        return {**arrays, **given}, {**values, "words": self.words, "penalty": self.penalty}

    def explain(self, prompts: Prompts) -> list[list[Explanation]]:
        """The words that tell the teachers apart most, and what each adds to their scores."""
        if not self.words:
            return unexplained(prompts)
        rows = self._word_rows(prompts)
        return [self._explained(rows[row]) for row in range(len(prompts))]

    def _explained(self, row: Any) -> list[Explanation]:
        added = row.data[:, None] * self.word_weight[row.indices]
        top = np.argsort(-np.ptp(added, axis=1), kind="stable")[:_NAMED]
        words = [
            Word(self.words[row.indices[i]], [round(float(each), 4) for each in added[i]])
            for i in top
            if np.ptp(added[i]) > 0
        ]
        return [Words(words)] if words else []

    def _word_rows(self, prompts: Prompts) -> Any:
        """(P, V) sparse TF-IDF."""
        if not self.words:
            return np.zeros((len(prompts), 0))
        found = vectoriser(self.words)
        found.idf_ = self.idf.astype(np.float64)
        return found.transform(prompts.texts)


def fit(prompts: Prompts, examples: Examples, *, tick: Tick = quietly, settings: Values | None = None) -> Linear:
    """Choose the penalty by the reward that routing with it has, leaving each prompt out."""
    known = deviations.of(examples)
    informed = prompts.take(known.rows)
    made = design.fit(prompts)
    words, idf, word_rows = _words(informed)
    tick()
    rows = made.encode(informed)
    kernel = rows @ rows.T + np.asarray((word_rows @ word_rows.T).todense())
    tick()
    level, basis = np.linalg.eigh(kernel)
    tick()
    ridge = _Ridge(np.maximum(level, 0.0), basis, known)
    penalty = settings["penalty"] if settings else ridge.choose()
    dual = ridge.dual(penalty)
    return Linear(
        made,
        known.means,
        (rows.T @ dual).astype(np.float32),
        words,
        idf,
        np.asarray(word_rows.T @ dual).astype(np.float32),
        penalty,
    )


def restore(arrays: Arrays, values: Values) -> Linear:
    """From a state."""
    given: dict[str, Any] = {name: arrays[name] for name in ("means", "weight", "idf", "word_weight")}
    return Linear(design.restore(arrays, values), **given, words=values["words"], penalty=values["penalty"])


def vectoriser(words: list[str] | None = None) -> TfidfVectorizer:
    """TF-IDF of words and pairs that occur in at least two prompts, or of known ones."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, max_features=_MAX_WORDS, sublinear_tf=True, vocabulary=words, dtype=np.float64
    )


def _words(prompts: Prompts) -> tuple[list[str], NDArray[np.float32], Any]:
    """Words, their inverse document frequencies (V,) and the (Q, V) sparse TF-IDF of the prompts."""
    from scipy.sparse import csr_matrix

    found = vectoriser()
    try:
        found.fit(prompts.texts)
    except ValueError:  # no word occurs twice
        return [], np.zeros(0, np.float32), csr_matrix((len(prompts), 0))
    words = found.get_feature_names_out().tolist()
    idf = found.idf_.astype(np.float32)
    found.idf_ = idf.astype(np.float64)
    return words, idf, found.transform(prompts.texts)


@dataclass(frozen=True, slots=True, eq=False)
class _Ridge:
    """Kernel ridge regression of Q rows with a kernel's eigenvalues (Q,) and eigenvectors (Q, Q).

    A cell of weight w < 1 is completed with the current prediction: w value + (1 - w) prediction. Repeated, this
    minimises the weighted squared error (majorisation; Kiers 1997), with one decomposition for all teachers.
    """

    level: Vector
    basis: Matrix
    known: Deviations

    def choose(self) -> float | None:
        """The penalty whose leave-one-out predictions route best."""
        return PENALTIES[self.known.best(self._left_out(penalty) for penalty in PENALTIES)]

    def _left_out(self, penalty: float | None) -> Matrix:
        """(Q, K) predictions of each prompt by a regression without it, from the closed form."""
        if penalty is None:
            return np.zeros_like(self.known.values)
        completed, fitted = self._fit(penalty)
        leverage = (self.basis**2) @ (self.level / (self.level + penalty))
        return np.asarray(completed - (completed - fitted) / (1.0 - leverage)[:, None])

    def dual(self, penalty: float | None) -> Matrix:
        """(Q, K) coefficients of the kernel's rows."""
        if penalty is None:
            return np.zeros_like(self.known.values)
        completed, _ = self._fit(penalty)
        return np.asarray(self.basis @ ((self.basis.T @ completed) / (self.level + penalty)[:, None]))

    def _fit(self, penalty: float) -> tuple[Matrix, Matrix]:
        """(Q, K) completed values and their fit."""
        shrink = (self.level / (self.level + penalty))[:, None]
        values, weights = self.known.values, self.known.weights
        fitted = np.zeros_like(values)
        rounds = 1 if (weights == 1.0).all() else _ROUNDS
        for _ in range(rounds):
            completed = weights * values + (1.0 - weights) * fitted
            fitted = self.basis @ (shrink * (self.basis.T @ completed))
        return completed, fitted
