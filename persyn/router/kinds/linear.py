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
#: Rows or features up to which the regression is exact, and the rank of the approximation for more of both.
_MOST_EXACT, _RANK = 3_000, 1_000
#: Passes over the rows that find this approximation.
_ITERATIONS = 4
#: Eigenvalues below this share of the largest are 0 but for rounding.
_RESOLUTION = 1e-12
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
    rows = _Rows(made.encode(informed), word_rows)
    ridge = _Ridge(*_decomposed(rows, tick), known)
    penalty = settings["penalty"] if settings else ridge.choose()
    weight = rows.transposed(ridge.dual(penalty)).astype(np.float32)
    return Linear(made, known.means, weight[: made.width], words, idf, weight[made.width :], penalty)


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
class _Rows:
    """Q rows of F = D + V features: dense (Q, D) and sparse (Q, V) ones, which multiply faster apart."""

    dense: Matrix
    sparse: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(Q, F)."""
        return len(self.dense), self.dense.shape[1] + self.sparse.shape[1]

    def times(self, matrix: Matrix) -> Matrix:
        """(Q, N) for a matrix (F, N)."""
        width = self.dense.shape[1]
        return np.asarray(self.dense @ matrix[:width] + self.sparse @ matrix[width:])

    def transposed(self, matrix: Matrix) -> Matrix:
        """(F, N), the transpose times a matrix (Q, N)."""
        return np.vstack([self.dense.T @ matrix, self.sparse.T @ matrix])


def _decomposed(rows: _Rows, tick: Tick) -> tuple[Vector, Matrix]:
    """Squared singular values (R,) above 0 and left singular vectors (Q, R) of the rows.

    All of them if there are at most `_MOST_EXACT` rows or features, from the smaller Gram matrix, which takes a time
    that grows with the cube of its size. Of more, only the `_RANK` largest: a ridge regression shrinks the others most.
    """
    n_rows, n_features = rows.shape
    if n_features < n_rows and n_features <= _MOST_EXACT:
        whole = np.hstack([rows.dense, rows.sparse.toarray()])
        level, right = _eigen(whole.T @ whole, tick)
        return level, np.asarray(whole @ right / np.sqrt(level))
    if n_rows <= _MOST_EXACT:
        return _eigen(rows.dense @ rows.dense.T + (rows.sparse @ rows.sparse.T).toarray(), tick)
    basis, projected = _main_directions(rows, tick)
    level, turned = _eigen(projected.T @ projected, tick)
    return level, basis @ turned


def _eigen(gram: Matrix, tick: Tick) -> tuple[Vector, Matrix]:
    """Eigenvalues above 0 and eigenvectors of a symmetric matrix."""
    tick()
    level, basis = np.linalg.eigh(gram)
    tick()
    kept = level > _RESOLUTION * level.max(initial=0.0)
    return level[kept], basis[:, kept]


def _main_directions(rows: _Rows, tick: Tick) -> tuple[Matrix, Matrix]:
    """An orthonormal basis (Q, R) of the directions in which the rows vary most, and their (F, R) projections on it.

    By subspace iteration from a random start (Halko et al. 2011).
    """
    projected = np.random.default_rng(0).normal(size=(rows.shape[1], _RANK))
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(rows.times(projected))
        tick()
        projected = rows.transposed(basis)
    return basis, projected


@dataclass(frozen=True, slots=True, eq=False)
class _Ridge:
    """Ridge regression of Q rows with their squared singular values (R,) and left singular vectors (Q, R).

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
