"""Perplexity band: losses by another path, bands by hand, budgets that a band cannot meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lms import tiny_lm
from local import task
from synthetic import make_shards

from ray_dwm.config import build
from ray_dwm.config.selection import PerplexityConfig, SelectionConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import ConfigError
from ray_dwm.selection import perplexity
from ray_dwm.selection.method import Scored
from ray_dwm.selection.methods import score
from ray_dwm.selection.perplexity import LogLikelihoods, band
from ray_dwm.selection.scores import gather


@pytest.mark.parametrize("batch", [5, 64])
def test_losses_per_token_and_their_mean_over_proxies(tmp_path: Path, batch: int) -> None:
    make_shards(tmp_path / "pool", good=9, noise=9, masked=True)
    rows = open_shards(str(tmp_path / "pool")).take(np.arange(18))
    expected, folders = np.zeros(18), []
    for seed in (0, 1):
        model = tiny_lm(seed=seed)
        folders.append(str(tmp_path / f"lm{seed}"))
        model.save_pretrained(folders[-1])
        for i, (ids, mask) in enumerate(zip(rows.input_ids, rows.loss_mask, strict=True)):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)), reduction="none").numpy()
            expected[i] += losses[mask[1:]].mean() / 2 if mask[1:].any() else 0.0
    found = LogLikelihoods(tuple(folders), batch)(rows)
    assert found["score"] == pytest.approx(-expected, abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)


def scored(losses: list[float], domains: list[int] | None = None) -> Scored:
    return Scored(-np.array(losses), np.array(domains or [0] * len(losses), dtype=np.int32))


@pytest.mark.parametrize(
    ("low", "high", "per_domain", "expected"),
    [
        (0.0, 1.0, False, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.0, 0.25, False, [3, 7]),
        (0.25, 0.75, False, [1, 2, 5, 6]),  # 2, 3, 3 and 4: of losses 1 1 2 3 3 4 9 9
        (0.75, 1.0, False, [0, 4]),
        (0.25, 0.75, True, [1, 2, 5, 6]),  # of 1 2 3 9 and of 1 3 4 9
        (0.0, 0.25, True, [3, 7]),
    ],
)
def test_bands_by_hand(low: float, high: float, per_domain: bool, expected: list[int]) -> None:
    pool = scored([9, 2, 3, 1, 9, 3, 4, 1], [0, 0, 0, 0, 1, 1, 1, 1])
    inside = band(PerplexityConfig(low=low, high=high, per_domain=per_domain), pool)
    assert np.flatnonzero(inside).tolist() == expected


def test_a_band_of_every_domain_is_of_its_own_quantiles() -> None:
    pool = scored([1, 2, 3, 4, 11, 12, 13, 14], [0, 0, 0, 0, 1, 1, 1, 1])
    options = PerplexityConfig(low=0.5, high=1.0)
    assert np.flatnonzero(band(options, pool)).tolist() == [4, 5, 6, 7]
    assert np.flatnonzero(band(replace(options, per_domain=True), pool)).tolist() == [2, 3, 6, 7]


def test_rows_are_drawn_at_random_within_the_band(tmp_path: Path) -> None:
    make_shards(tmp_path / "pool", good=300, noise=100)
    pool = Scored(-np.arange(400.0), np.repeat(np.array([0, 1], dtype=np.int32), [300, 100]))
    draws = []
    for seed in range(200):
        job = task(tmp_path / "pool", {}, seed, perplexity={"low": 0.5, "high": 1.0})
        draws.append(perplexity.choose(job, pool, 20))
        assert draws[-1].min() >= 200 and len(set(draws[-1].tolist())) == 20
    counts = np.bincount(np.concatenate(draws), minlength=400)[200:]
    assert ((counts - 20) ** 2 / 20).sum() < 267  # 99.9 % quantile of chi^2 with 199 degrees of freedom
    stratified = task(tmp_path / "pool", {}, perplexity={"low": 0.5, "high": 1.0}, stratified="true")
    assert np.bincount(pool.domains[perplexity.choose(stratified, pool, 40)]).tolist() == [30, 10]
    # The band has 100 rows of each domain: the first lacks 20 of its three quarters.
    assert np.bincount(pool.domains[perplexity.choose(stratified, pool, 160)]).tolist() == [100, 60]


@pytest.mark.parametrize("per_domain", ["false", "true"])
def test_a_budget_beyond_the_band_is_refused(tmp_path: Path, per_domain: str) -> None:
    make_shards(tmp_path / "pool", good=5, noise=5)
    pool = load_manifest(tmp_path / "pool")
    options = build(SelectionConfig, {"perplexity": {"low": "0.5", "high": "1", "per_domain": per_domain}})
    size = int(band(options.perplexity, Scored(np.arange(10.0), np.repeat(np.array([0, 1], dtype=np.int32), 5))).sum())
    perplexity.check(options, pool, size)
    with pytest.raises(ConfigError, match=f"asks for {size + 1} sequences, .* from 0.5 to 1 holds {size} of .* 10: "):
        perplexity.check(options, pool, size + 1)


@pytest.mark.parametrize(("low", "high"), [("0.5", "0.5"), ("0.6", "0.4"), ("-0.1", "1"), ("0", "1.1")])
def test_bands_that_are_none_are_refused(low: str, high: str) -> None:
    with pytest.raises(ConfigError, match=r"selection\.perplexity\.low is"):
        build(SelectionConfig, {"perplexity": {"low": low, "high": high}})


def test_what_the_proxy_knows_has_low_perplexity(tmp_path: Path) -> None:
    make_shards(tmp_path / "pool", good=60, noise=60)
    make_shards(tmp_path / "known", good=60, noise=0, seed=5)
    tiny_lm(trained_on=tmp_path / "known", steps=60).save_pretrained(tmp_path / "lm")
    job = task(tmp_path / "pool", {}, perplexity={"low": "0", "high": "0.4"})
    found = gather(score("perplexity", replace(job, proxies=(str(tmp_path / "lm"),))), job.pool)
    assert not found.domains[perplexity.choose(job, found, 48)].any()
