"""DoReMi's domain weights: a reference LM, then a proxy LM under Group DRO, each a Ray Train run that resumes.

Xie et al. 2023 (arXiv 2305.10429), Algorithm 1 and section 2 (iterated DoReMi).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dwm.config import RunConfig, WeightingConfig, to_dict
from ray_dwm.config.group_dro import GroupDroConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.records import digest, read_metrics, write_whole
from ray_dwm.engine.group_dro import initial_weights
from ray_dwm.engine.reference import check_reference
from ray_dwm.errors import ConfigError
from ray_dwm.logs import say
from ray_dwm.orchestration.proxies import Proxy, plan_proxies, ready_proxies, to_be_trained
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.selection.doremi import FILE, read_weights, shares, short

_SETTLED = 1e-3
"""Change of any weight below which rounds end, as in the paper."""


@dataclass(frozen=True, slots=True)
class DomainWeights:
    """How a selection comes to its domain weights."""

    config: RunConfig
    given: dict[str, float] | None
    """They are there."""
    lms: tuple[Proxy, Proxy] | None
    """The first round's reference LM and proxy LM, where they are to be learnt."""

    @property
    def digest(self) -> str:
        """What they are, or what they are learnt from and how."""
        learnt = None if self.lms is None else [self.lms[1].digest, self.config.selection.doremi.rounds]
        return digest([self.given, learnt])

    def ready(self, pool: Manifest, rows: int, sweep: RaySweep, folder: Path) -> dict[str, float]:
        """Domain -> weight, after training what is not there yet; domain_weights.json in the folder says all of it.

        Args:
            rows: to be selected, of which the pool may not have enough in some domain: that is told.

        Raises:
            TrainingError: an LM could not be trained, or the weights have collapsed.
            DataError: an LM has diverged.
        """
        content = self._learn(pool, sweep)
        write_whole(folder / FILE, json.dumps(content, indent=2) + "\n")
        weights: dict[str, float] = content["weights"]
        if lacking := short(weights, rows, pool):
            say(
                f"the pool has fewer sequences than the domain weights ask for: {', '.join(lacking)}; the other "
                "domains get the rest"
            )
        return weights

    def _learn(self, pool: Manifest, sweep: RaySweep) -> dict[str, Any]:
        if self.lms is None:
            given = self.config.selection.doremi.weights
            return {"weights": self.given, "pool_shares": shares(pool), "given": given}
        config, (reference, proxy), rounds = self.config, self.lms, []
        before = shares(pool)  # what a plain reference LM sees
        for number in range(config.selection.doremi.rounds):
            if number:
                reference = _reference(config, pool, before)
                proxy = _proxy(config, pool, reference)
            rounds.append(_round(reference, proxy, pool, before, sweep))
            before = rounds[-1]["weights"]
            if rounds[-1]["largest_change"] < _SETTLED:
                break
        return {
            "weights": before,
            "pool_shares": shares(pool),
            "excess": rounds[-1]["excess"],
            "steps": config.selection.proxy.steps,
            "seed": config.selection_seed,
            "group_dro": {**to_dict(config.weighting.group_dro), "reference": rounds[-1]["reference"]},
            "rounds": rounds,
        }


def plan_domain_weights(config: RunConfig, pool: Manifest) -> DomainWeights:
    """Check what domain weights need; starts nothing.

    Raises:
        UserError: naming the key or file and the remedy.
    """
    options = config.selection
    if options.stratified:
        raise ConfigError("selection.stratified keeps the domains' shares, doremi changes them: set it to false")
    if options.doremi.weights:
        return DomainWeights(config, read_weights(Path(options.doremi.weights).expanduser(), pool), None)
    initial_weights(config, pool.domain_names)
    proxies = plan_proxies(config, pool)
    if len(proxies) > 1:
        raise ConfigError(
            f"selection.proxy names {len(proxies)} LMs, doremi has one reference LM: set selection.proxy.count to 1, "
            "or selection.proxy.folders to one folder"
        )
    proxy = _proxy(config, pool, proxies[0])
    if proxies[0].run is None and proxy.run is not None:
        check_reference(proxy.run, pool, pool.seq_len)
    return DomainWeights(config, None, (proxies[0], proxy))


def _round(reference: Proxy, proxy: Proxy, pool: Manifest, before: dict[str, float], sweep: RaySweep) -> dict[str, Any]:
    """One round: both LMs, and what the second one's game has found."""
    ready_proxies((reference,), pool, sweep)
    ready_proxies((proxy,), pool, sweep)  # whose weighting needs the reference
    assert proxy.run is not None
    lines = read_metrics(proxy.run.run_dir / "metrics.jsonl")
    weights = {name: lines[-1][f"group_dro/average/{name}"] for name in pool.domain_names}
    late = lines[-max(1, len(lines) // 10) :]
    return {
        "weights": weights,
        "largest_change": max(abs(weights[name] - before[name]) for name in weights),
        "excess": {name: _mean([line.get(f"group_dro/excess/{name}") for line in late]) for name in weights},
        "reference": str(reference.folder),
        "proxy": str(proxy.folder),
    }


def _mean(values: list[float | None]) -> float | None:
    """Of the last tenth of a run, in nats per token; None where a domain was never seen."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _proxy(config: RunConfig, pool: Manifest, reference: Proxy) -> Proxy:
    options = dataclasses.replace(config.weighting.group_dro, reference=str(reference.folder))
    weighting = WeightingConfig(method="group_dro", group_dro=options)
    return to_be_trained(
        config, pool, config.selection_seed, weighting, {**to_dict(options), "reference": reference.digest}
    )


def _reference(config: RunConfig, pool: Manifest, weights: dict[str, float]) -> Proxy:
    """A reference LM that is trained with domain weights, which stay as they are."""
    fixed = GroupDroConfig(eta=0.0, smoothing=0.0, initial=weights, max_collapsed=1.0)
    return to_be_trained(
        config, pool, config.selection_seed, WeightingConfig(method="group_dro", group_dro=fixed), to_dict(fixed)
    )
