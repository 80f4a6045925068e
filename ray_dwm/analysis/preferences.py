"""What a weighting preferred, and when: from a run folder and its shards to the numbers of preferences.json.

Nothing here knows Ray: what is done with many rows goes through a sweep (selection/method.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.analysis import probe
from ray_dwm.analysis.favoured import Texts, extremes
from ray_dwm.analysis.features import FEATURES, Corpus, Count, Reading, measure, total
from ray_dwm.analysis.phases import Batches, Sample, sample, spans, weighted_batches
from ray_dwm.analysis.ranks import Floats
from ray_dwm.analysis.relations import RESAMPLES, Groups, relations
from ray_dwm.analysis.resampling import LEVEL
from ray_dwm.analysis.runs import Run
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.data.tokenization import FOLDER
from ray_dwm.engine.checks import seq_len
from ray_dwm.errors import DataError, UserError
from ray_dwm.models.folders import load_dwm
from ray_dwm.selection.method import Sweep

SAMPLES = 6144
CORPUS_TOKENS = 2**21
"""Of the pool, and of each target set, from which their tokens, n-grams and centroids are counted."""
_BLOCK_TOKENS = 2**18
"""That are measured in one unit of work."""
_SAMPLE, _POOL, _TARGET, _PROBE, _RESAMPLE = range(5)
"""Streams of chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is asked for."""

    samples: int = SAMPLES
    """Sequences of the run that are looked at, at most."""
    seed: int = 0
    reference: str = ""
    """Hugging Face folder of the LM whose perplexity is a measure of difficulty; empty: none."""
    reference_batch: int = 16


def _chance(asked: Asked, *stream: int) -> np.random.Generator:
    """Numbers of their own for every use."""
    return np.random.default_rng(np.random.SeedSequence((asked.seed, *stream)))


class _Study:
    """One run's analysis."""

    def __init__(self, run: Run, asked: Asked, sweep: Sweep) -> None:
        self.run, self.asked, self.sweep = run, asked, sweep
        self.pool = load_manifest(run.config.data.train)
        self.seq_len = seq_len(run.config, self.pool)
        text = (self.pool.folder / FOLDER).is_dir()
        self.reading = Reading(str(self.pool.folder), self.seq_len, self.pool.vocab_size, text)
        self.left_out: dict[str, str] = {}
        """What could not be measured -> why."""

    def corpus(self, title: str, manifest: Manifest, *stream: int) -> Corpus:
        """Counts of a set, from all of it or a random part."""
        most = max(1, CORPUS_TOKENS // self.seq_len)
        rows = None
        if manifest.rows > most:
            rows = np.sort(_chance(self.asked, *stream).choice(manifest.rows, size=most, replace=False))
        return total(self.sweep(f"counting {title}", str(manifest.folder), Count(self.reading), rows))

    def features(self, taken: Sample) -> dict[str, Floats]:
        """Name -> values of the sampled sequences, (S, r); what cannot be measured is named in `left_out`."""
        shape = taken.batches.ids_SB.shape
        targets = {name: load_manifest(folder) for name, folder in self.run.config.data.target_sets.items()}
        measuring = measure(
            self.reading,
            self.corpus("the training set", self.pool, _POOL),
            [self.corpus(f"set {name}", m, _TARGET, k) for k, (name, m) in enumerate(targets.items())],
            eos_token_id=self.pool.eos_token_id,
            batch=shape[1],
            reference=self.asked.reference,
            size=self.asked.reference_batch,
        )
        rows = self.rows_of(taken.batches.ids_SB.ravel())
        block = shape[1] * max(1, _BLOCK_TOKENS // (shape[1] * self.seq_len))
        blocks = list(self.sweep("measuring sequences", str(self.pool.folder), measuring, rows, block))
        found = {name: np.concatenate([b[name] for b in blocks]).reshape(shape) for name in blocks[0]}
        found["loss"] = taken.batches.losses_SB
        self._say_what_is_missing(found)
        return {feature.name: found[feature.name] for feature in FEATURES if feature.name in found}

    def _say_what_is_missing(self, found: Mapping[str, Floats]) -> None:
        no_text, no_target = "the shards hold no tokenizer", "the run has no target set"
        reasons = {"compression_ratio": no_text, "bytes_per_token": no_text, "dsir": no_target}
        reasons |= {"target_cosine": no_target, "reference_perplexity": "no reference LM was named (--reference)"}
        self.left_out |= {name: reason for name, reason in reasons.items() if name not in found}
        loss, guessing = np.log(found.get("reference_perplexity", np.ones(1))).mean(), math.log(self.pool.vocab_size)
        if not loss < guessing:  # so that NaN does not pass
            raise DataError(
                f"the reference LM {self.asked.reference} has a loss of {loss:.3f} nats a token, guessing has "
                f"{guessing:.3f}: name one that has learnt something, or none (--reference)"
            )

    def rows_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the pool by sample id."""
        known = open_shards(str(self.pool.folder)).sample_ids()
        order = np.argsort(known)
        places = np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)
        rows = order[places]
        if (known[rows] != ids).any():
            lost = int(ids[known[rows] != ids][0])
            raise DataError(
                f"{self.pool.folder} has no sample {lost}, which {self.run.folder} has weighed: restore the shards "
                "that the run was made with"
            )
        return rows

    def groups(self, taken: Sample) -> dict[str, Groups]:
        """Domains, and the input files where they are not the domains by another name."""
        batches = taken.batches
        groups = {"domain": Groups(batches.domains_SB, batches.names)}
        numbers, codes = np.unique(batches.ids_SB >> 32, return_inverse=True)
        codes = codes.reshape(batches.ids_SB.shape)
        pairs = len(np.unique(codes * len(batches.names) + batches.domains_SB))
        if pairs == len(np.unique(batches.domains_SB)) == len(numbers):
            self.left_out["source"] = "every domain comes from one file of its own"
        elif len(numbers) == 1:
            self.left_out["source"] = "all sequences come from one file"
        else:
            files = self.pool.made_by.get("sources", [])
            names = [files[k] if k < len(files) else f"file {k}" for k in numbers.tolist()]
            groups["source"] = Groups(codes, tuple(names))
        return groups

    def probed(self, taken: Sample) -> dict[str, Any] | None:
        """Joint effect and rank stability of the DWM's versions on a fixed sample; None where that cannot be."""
        rng, batch = _chance(self.asked, _PROBE), self.run.config.train.global_batch
        try:
            folders = probe.versions(self.run, taken.spans)
            rows = probe.probe_rows(self.pool, batch, rng)
        except DataError as error:
            self.left_out["probe"] = str(error)
            return None
        names = tuple(dict.fromkeys(str(folder) for folder in folders))
        encode = probe.EncodedByAll(names, self.seq_len)
        blocks = list(self.sweep("encoding the probe", str(self.pool.folder), encode, rows))
        draws = probe.draws(len(rows), batch, probe.ROUNDS, rng)
        of = {
            name: probe.log_weights(
                load_dwm(folder)[0].eval(),
                np.concatenate([block[str(names.index(name))] for block in blocks]),
                draws,
                self.run.config.dwm,
            )
            for name, folder in {str(folder): folder for folder in folders}.items()
        }
        found = [of[str(folder)] for folder in folders]
        joints = [probe.joint(log_weights_nR, draws) for log_weights_nR in found]
        return {
            "sequences": len(rows),
            "batch": batch,
            "draws": probe.ROUNDS,
            "versions": {span.name: folder.name for span, folder in zip(taken.spans, folders, strict=True)},
            "joint": {span.name: asdict(joint) for span, joint in zip(taken.spans, joints, strict=True)},
            "stability": probe.stability(np.stack(found), RESAMPLES, rng).plain(),
        }


def take_sample(run: Run, asked: Asked) -> tuple[Batches, Sample]:
    """All weighted batches, and those that are looked at.

    Raises:
        UserError: no weights that differ, or too few steps for an interval.
    """
    batches = weighted_batches(run)
    if not len(batches.steps_S):
        raise UserError(f"all weights in {run.folder / 'weights'} are uniform: nothing was preferred, train longer")
    phases = spans(run.config, batches.steps_S)
    return batches, sample(batches, phases, asked.samples, _chance(asked, _SAMPLE), run.name)


def preferences(run: Run, asked: Asked, sweep: Sweep) -> dict[str, Any]:
    """The numbers of preferences.json, but for what they depend on.

    Raises:
        UserError: see `take_sample`; or data that do not fit the run.
    """
    batches, taken = take_sample(run, asked)
    study = _Study(run, asked, sweep)
    chance, alike = _chance(asked, _RESAMPLE), _alike(run, batches)
    numbers = relations(taken, study.features(taken), study.groups(taken), chance, alike)
    numbers["probe"] = study.probed(taken)
    steps = np.bincount(taken.phases_S, minlength=len(taken.spans)).tolist()
    found = extremes(batches, taken.spans, Texts(run.config.data.train))
    size = taken.batches.ids_SB.shape[1]
    counts = [{"steps": count, "sequences": count * size} for count in steps]
    return {
        "run": run.name,
        "weighting": run.label,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "phases": [{**asdict(one), **count} for one, count in zip(found, counts, strict=True)],
        **numbers,
        "left_out": study.left_out,
    }


def _alike(run: Run, batches: Batches) -> int:
    """Recorded steps that one DWM version weighs on the mean; 1 of a baseline."""
    recorded = set(batches.steps_S.tolist())
    versions = [v for step, v in zip(*run.series("dwm/version", over="step"), strict=True) if step in recorded]
    return -(-len(versions) // len(set(versions))) if versions else 1
