"""Find near-duplicate prompts by MinHash; this is the only part of an export whose memory grows with the rows."""

from __future__ import annotations

from persyn.dataset.ngrams import n_grams, words

#: Words per shingle.
_SHINGLE = 3
#: Hashes per signature. With the index a prompt takes about 2 KB, or 3 KB for a threshold below 0.8.
_SIGNATURE = 128
_SEED = 1


class NearDuplicates:
    """The prompts seen so far that are not near-duplicates of each other.

    threshold: minimum Jaccard similarity of word triples, 0.5 to 1. It is estimated: a pair within 0.1 of the threshold
               may be classified either way; one above that is found nearly always.
    """

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHash, RMinHashDeduplicator

        self._signature = RMinHash
        # More bands find less similar pairs, and take more memory.
        bands = 16 if threshold >= 0.8 else 32
        self._seen = RMinHashDeduplicator(
            threshold=threshold, num_perm=_SIGNATURE, use_lsh=True, num_bands=bands, seed=_SEED
        )

    def earlier(self, prompt_id: int, text: str) -> int | None:
        """The earlier prompt that this one nearly duplicates; if there is none, remember this one and return None."""
        of = words(text) or [text]
        signature = self._signature(num_perm=_SIGNATURE, seed=_SEED)
        signature.update(list(n_grams(of, _SHINGLE)) or [" ".join(of)])
        if self._seen.add(str(prompt_id), signature):
            return None
        return min(int(key) for key in self._seen.get_duplicates(signature))
