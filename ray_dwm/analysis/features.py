"""What is looked at in a sequence: its diversity, its difficulty and its likeness to the target.

Everything is of the first `seq_len` tokens of a row, which are what the LM was trained on. Rows have the same number of
tokens, so measures that grow with length (distinct n-grams, sums over n-grams) can be compared.

Legend: n = rows, r = rows of one batch, T = tokens of a row, V = vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_dwm.analysis.ranks import Floats
from ray_dwm.config.selection import DsirConfig
from ray_dwm.data.shards import Rows
from ray_dwm.data.tokenization import FOLDER, Tokenizer
from ray_dwm.selection.curriculum import Brevity
from ray_dwm.selection.dsir import LogRatios, log_ratios
from ray_dwm.selection.method import Arrays
from ray_dwm.selection.ngrams import ngrams
from ray_dwm.selection.perplexity import LogLikelihoods


@dataclass(frozen=True, slots=True)
class Feature:
    """One measure of a sequence."""

    name: str
    family: str
    title: str


FEATURES = (
    Feature("distinct_1", "diversity", "distinct tokens"),
    Feature("distinct_2", "diversity", "distinct bigrams"),
    Feature("compression_ratio", "diversity", "compression ratio"),
    Feature("batch_distance", "diversity", "distance to the batch"),
    Feature("corpus_distance", "diversity", "distance to the corpus"),
    Feature("loss", "difficulty", "current loss"),
    Feature("reference_perplexity", "difficulty", "reference perplexity"),
    Feature("document_length", "difficulty", "document length"),
    Feature("bytes_per_token", "difficulty", "bytes per token"),
    Feature("rarity", "difficulty", "token rarity"),
    Feature("dsir", "similarity", "DSIR log ratio"),
    Feature("target_cosine", "similarity", "cosine to the target"),
)
"""docs/analysis.md defines each; a compression ratio is high for repetitive text."""


def cut(rows: Rows, seq_len: int) -> Rows:
    """The beginnings of rows."""
    mask = None if rows.loss_mask is None else rows.loss_mask[:, :seq_len]
    return Rows(rows.sample_ids, rows.domains, rows.input_ids[:, :seq_len], mask)


@lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(Path(folder) / FOLDER)


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read: those of the pool and of the target sets alike."""

    folder: str
    """The pool, beside whose shards the tokenizer lies."""
    seq_len: int
    vocab_size: int
    text: bool
    """Whether it does lie there, so that rows can be read as text."""

    @property
    def dsir(self) -> DsirConfig:
        """Words as published; where there is no text, token ids."""
        return DsirConfig(features="text" if self.text else "tokens")


@dataclass(frozen=True, slots=True)
class Count:
    """What a corpus is made of, from some rows: tokens, rows that hold a token, both (V,), and hashed n-grams."""

    reading: Reading

    def __call__(self, rows: Rows) -> Arrays:
        read = self.reading
        rows, dsir = cut(rows, read.seq_len), read.dsir
        found = ngrams(rows, read.folder, dsir.features, dsir.bigrams, dsir.buckets)
        ids_nT = rows.input_ids.astype(np.int64)
        ordered_nT = np.sort(ids_nT, axis=1)
        first_nT = np.diff(ordered_nT, axis=1, prepend=-1) != 0
        return {
            "tokens": np.bincount(ids_nT.ravel(), minlength=read.vocab_size),
            "rows": np.bincount(ordered_nT[first_nT], minlength=read.vocab_size),
            "ngrams": np.bincount(found.buckets_k, minlength=dsir.buckets),
            "count": np.array(len(rows)),
        }


@dataclass(frozen=True, slots=True)
class Corpus:
    """The counts of many rows."""

    tokens_V: NDArray[np.int64]
    rows_V: NDArray[np.int64]
    ngrams: NDArray[np.int64]
    rows: int


def total(blocks: Iterable[Arrays]) -> Corpus:
    """Counts of all blocks together."""
    sums: dict[str, NDArray[np.int64]] = {}
    for block in blocks:
        sums = {name: sums.get(name, np.int64(0)) + values for name, values in block.items()}
    return Corpus(sums["tokens"], sums["rows"], sums["ngrams"], int(sums["count"]))


@dataclass(frozen=True, slots=True)
class Measure:
    """What rows are measured against; made by `measure`.

    A row is embedded as its tokens' counts times idf. The centroid of many rows is the sum of their vectors, of which
    the direction counts.
    """

    reading: Reading
    eos_token_id: int
    batch: int
    """Consecutive rows that are one batch."""
    idf_V: Floats
    information_V: Floats
    """-log p of each token in the pool, nats."""
    pool_V: Floats
    """Unit vector to the pool's centroid."""
    target_V: Floats | None
    """The same for the target sets, each of which counts the same; None where the run has none."""
    ratios: Floats | None
    """DSIR's log ratios of the hashed n-grams."""
    reference: str
    """Hugging Face folder of the reference LM; empty: none."""
    reference_batch: int

    def __call__(self, rows: Rows) -> Arrays:
        rows = cut(rows, self.reading.seq_len)
        columns: dict[str, NDArray[np.floating]] = {
            "distinct_1": distinct(rows.input_ids),
            "distinct_2": distinct(bigrams(rows.input_ids)),
            "document_length": -Brevity(self.eos_token_id)(rows)["score"],
            "rarity": self.information_V[rows.input_ids].mean(axis=1),
            **self._placed(rows.input_ids),
        }
        if self.reading.text:
            texts = [
                text.encode(errors="replace") for text in _tokenizer(self.reading.folder).decode_all(rows.input_ids)
            ]
            columns["compression_ratio"] = np.array([compression_ratio(text) for text in texts])
            columns["bytes_per_token"] = np.array([len(text) for text in texts]) / self.reading.seq_len
        if self.ratios is not None:
            columns["dsir"] = LogRatios(self.reading.folder, self.reading.dsir, self.ratios, "")(rows)["score"]
        if self.reference:
            found = LogLikelihoods((self.reference,), self.reference_batch)(rows)
            columns["reference_perplexity"] = found["perplexity"]
        return columns

    def _placed(self, ids_nT: NDArray[np.integer]) -> dict[str, Floats]:
        """Where rows lie: distances are 1 - cosine, to the centroid of the batch's other rows and of the pool."""
        parts = []
        for start in range(0, len(ids_nT), self.batch):  # one at a time, for a vector is as long as the vocabulary
            vectors_rV = embedded(ids_nT[start : start + self.batch], self.idf_V)
            place = {
                "batch_distance": 1 - cosines_with_others(vectors_rV),
                "corpus_distance": 1 - cosines(vectors_rV, self.pool_V),
            }
            if self.target_V is not None:
                place["target_cosine"] = cosines(vectors_rV, self.target_V)
            parts.append(place)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure(
    reading: Reading, pool: Corpus, targets: list[Corpus], *, eos_token_id: int, batch: int, reference: str, size: int
) -> Measure:
    """What rows are measured against, from counts of the pool and of the target sets.

    idf is log((1 + n) / (1 + rows with the token)), of n rows of the pool; the pool's p is (count + 1) / (tokens + V).

    Args:
        size: rows in one forward pass of the reference LM.
    """
    idf_V = np.log((1 + pool.rows) / (1 + pool.rows_V))
    probability_V = (pool.tokens_V + 1) / (pool.tokens_V.sum() + len(pool.tokens_V))
    target_V = ratios = None
    if targets:
        target_V = _unit(np.sum([_unit(target.tokens_V * idf_V) for target in targets], axis=0))
        bags = [corpus.ngrams / max(1, corpus.ngrams.sum()) for corpus in (pool, *targets)]
        ratios = log_ratios(np.mean(bags[1:], axis=0), bags[0])
    return Measure(
        reading=reading,
        eos_token_id=eos_token_id,
        batch=batch,
        idf_V=idf_V,
        information_V=-np.log(probability_V),
        pool_V=_unit(pool.tokens_V * idf_V),
        target_V=target_V,
        ratios=ratios,
        reference=reference,
        reference_batch=size,
    )


def _unit(vector: Floats) -> Floats:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12))


def bigrams(ids_nT: NDArray[np.integer]) -> NDArray[np.int64]:
    """A number for each pair of neighbours, (n, T - 1)."""
    ids_nT = ids_nT.astype(np.int64)
    return np.asarray(ids_nT[:, :-1] << 31 | ids_nT[:, 1:])


def distinct(keys_nK: NDArray[np.integer]) -> Floats:
    """Distinct n-grams over all n-grams of a row, (n,): distinct-n of Li et al. 2016 (arXiv 1510.03055)."""
    changes_nK = np.diff(np.sort(keys_nK, axis=1), axis=1) != 0
    return np.asarray((changes_nK.sum(axis=1) + 1) / keys_nK.shape[1])


def compression_ratio(text: bytes) -> float:
    """Bytes over bytes after DEFLATE (zlib, level 9), as Shaib et al. 2024 (arXiv 2403.00553) have it."""
    return len(text) / len(zlib.compress(text, 9))


def embedded(ids_rT: NDArray[np.integer], idf_V: Floats) -> NDArray[np.float32]:
    """Counts of tokens times idf, (r, V)."""
    rows, size = len(ids_rT), len(idf_V)
    keys = np.arange(rows)[:, None] * size + ids_rT
    counts_rV = np.bincount(keys.ravel(), minlength=rows * size).reshape(rows, size)
    return counts_rV.astype(np.float32) * idf_V.astype(np.float32)


def cosines(vectors_rV: NDArray[np.floating], centre_V: NDArray[np.floating]) -> Floats:
    """Cosine of each row with a vector, (r,); 0 where either is 0."""
    lengths_r = np.linalg.norm(vectors_rV, axis=1) * np.linalg.norm(centre_V)
    return _quotient(vectors_rV @ centre_V.astype(vectors_rV.dtype), lengths_r)


def cosines_with_others(vectors_rV: NDArray[np.floating]) -> Floats:
    """Cosine of each row with the sum of all the others, (r,); 0 where either is 0."""
    all_V = vectors_rV.sum(axis=0)
    own_r, with_all_r = (vectors_rV**2).sum(axis=1), vectors_rV @ all_V
    others_r = np.maximum(all_V @ all_V - 2 * with_all_r + own_r, 0.0)
    return _quotient(with_all_r - own_r, np.sqrt(own_r * others_r))


def _quotient(above_r: NDArray[np.floating], below_r: NDArray[np.floating]) -> Floats:
    return np.where(below_r > 0, above_r / np.where(below_r > 0, below_r, 1), 0.0).astype(np.float64)
