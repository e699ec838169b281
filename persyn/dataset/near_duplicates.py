"""Near-duplicates among the prompts of a dataset, by MinHash; the only thing of an export that grows with its rows."""

from __future__ import annotations

from persyn.dataset.words import n_grams, words

#: Words in a row that are compared as one.
_SHINGLE = 3
#: Numbers in a signature. With the index, a prompt costs about 2 KB; 3 KB with a threshold below 0.8.
_SIGNATURE = 128
_SEED = 1


class NearDuplicates:
    """The prompts seen so far, of which no two are alike.

    threshold: the share of word triples, of all that either has, that both have; from 0.5 to 1. It is
    estimated: a pair within 0.1 of it may fall on either side, one above that is found all but always.
    """

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHash, RMinHashDeduplicator

        self._signature = RMinHash
        # More bands find pairs that are less alike, and take more memory.
        bands = 16 if threshold >= 0.8 else 32
        self._seen = RMinHashDeduplicator(
            threshold=threshold, num_perm=_SIGNATURE, use_lsh=True, num_bands=bands, seed=_SEED
        )

    def earlier(self, prompt_id: int, text: str) -> int | None:
        """An earlier prompt that this one is nearly the same as; without one it is remembered, and None returned."""
        of = words(text) or [text]
        signature = self._signature(num_perm=_SIGNATURE, seed=_SEED)
        signature.update(list(n_grams(of, _SHINGLE)) or [" ".join(of)])
        if self._seen.add(str(prompt_id), signature):
            return None
        return min(int(key) for key in self._seen.get_duplicates(signature))
