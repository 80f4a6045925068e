"""The proxy LMs of a selection: those that are named, or plain ones that are trained on the pool and kept."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray_dwm.config import BilevelConfig, DataConfig, DwmConfig, EvaluationConfig, RunConfig, WeightingConfig, to_dict
from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import MANIFEST, Manifest, file_sha256
from ray_dwm.data.records import digest, locked, read_json
from ray_dwm.errors import DataError, NotFinite, Stopped, TrainingError, UserError
from ray_dwm.logs import say
from ray_dwm.models.folders import lm_folder
from ray_dwm.models.presets import lm_shape
from ray_dwm.orchestration.run import run as train
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.work import PROXIES, timed
from ray_dwm.selection.method import any_proxy
from ray_dwm.selection.proxy import check_proxy

_FREE = ("micro_batch", "profile", "profile_first", "profile_steps", "eval_every", "eval_sequences")
"""Of section `train`: what does not change the LM that comes out."""
_UNIFORM = WeightingConfig(method="uniform")


@dataclass(frozen=True, slots=True)
class Proxy:
    """One proxy LM."""

    folder: Path
    """In Hugging Face layout; of one that is to be trained, where it will be."""
    digest: str
    """What it is: its weights, or what it is trained on and how."""
    run: RunConfig | None
    """How it is trained; None where it was named."""


def plan_proxies(config: RunConfig, pool: Manifest, check: Callable[[Path], object] = any_proxy) -> tuple[Proxy, ...]:
    """Say which proxies a selection looks through, and check those that are named; starts nothing.

    Args:
        check: what a method demands of a named proxy's folder besides.

    Raises:
        UserError: a named folder is no LM, or of another tokenizer, or too small for the pool.
    """
    options = config.selection.proxy
    if options.folders:
        named = tuple(named_lm(Path(folder), pool) for folder in options.folders)
        for proxy in named:
            check(proxy.folder)
        return named
    lm_shape(options.preset)
    return tuple(to_be_trained(config, pool, config.selection_seed + number) for number in range(options.count))


def named_lm(given: Path, pool: Manifest, option: str = "selection.proxy.folders") -> Proxy:
    """An LM that is there already, checked against the pool that it is to look at.

    Raises:
        UserError: it is no LM, or of another tokenizer, or too small for the pool; naming the option.
    """
    folder = lm_folder(given.expanduser().absolute())
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise UserError(
            f"{option}: {given} is neither a finished run folder nor a Hugging Face folder with safetensors: name one "
            "of these"
        )
    shape, tokenizer = read_json(folder / "config.json"), folder / "tokenizer.json"
    if tokenizer.is_file() and file_sha256(tokenizer) != pool.tokenizer_sha256:
        raise DataError(
            f"proxy LM {folder} has another tokenizer than the pool {pool.folder}, which was made with "
            f"{pool.tokenizer_name}: name one of that tokenizer, or leave {option} empty"
        )
    context = "max_position_embeddings" if "max_position_embeddings" in shape else "n_positions"  # GPT-2's
    for key, needed, what in (
        ("vocab_size", pool.vocab_size, "token ids"),
        (context, pool.seq_len, "tokens a sequence"),
    ):
        if shape.get(key, needed) < needed:
            raise DataError(
                f"proxy LM {folder} has {key} = {shape[key]}, the pool {pool.folder} has {needed} {what}: name one "
                f"that was trained on such data, or leave {option} empty"
            )
    digests = [file_sha256(path) for path in [folder / "config.json", *weights]]
    return Proxy(folder, hashlib.sha256("".join(digests).encode()).hexdigest(), None)


def to_be_trained(
    config: RunConfig,
    pool: Manifest,
    seed: int,
    weighting: WeightingConfig = _UNIFORM,
    weighted_by: Mapping[str, Any] | None = None,
) -> Proxy:
    """An LM that is trained on the pool as section selection.proxy says.

    Args:
        weighted_by: what the weighting does, where it is not uniform, without names of folders.
    """
    options = config.selection.proxy
    train = dataclasses.replace(
        config.train,
        steps=options.steps,
        lr=options.lr,
        warmup_steps=min(config.train.warmup_steps, options.steps // 10),
        profile=False,
    )
    lm = dataclasses.replace(config.lm, preset=options.preset, seq_len=0)
    kept = {key: value for key, value in to_dict(train).items() if key not in _FREE}
    made_of: dict[str, Any] = {"pool": file_sha256(pool.folder / MANIFEST), "preset": options.preset, "train": kept}
    if weighted_by is not None:
        made_of["weighting"] = dict(weighted_by)
    key = digest({**made_of, "seed": seed})
    storage = Path(config.storage).expanduser().absolute() / "proxies"
    run = dataclasses.replace(
        config,
        name=f"proxy-{key[:12]}",
        storage=str(storage),
        mirror="",
        seed=seed,
        data=DataConfig(train=str(pool.folder), order="shuffled"),  # a proxy must not see the easy part alone
        selection=SelectionConfig(),
        lm=lm,
        train=train,
        weighting=weighting,
        dwm=DwmConfig(),
        bilevel=BilevelConfig(),
        tracking=dataclasses.replace(config.tracking, wandb="off"),
        evaluation=EvaluationConfig(),  # scores in tasks are the run's own affair
    )
    return Proxy(run.run_dir / "hf", key, run)


def ready_proxies(proxies: tuple[Proxy, ...], pool: Manifest, sweep: RaySweep) -> tuple[str, ...]:
    """Train what is not there yet, and check that every proxy has learnt something.

    Returns:
        Their folders.

    Raises:
        DataError: one has diverged.
        Stopped: asked to end while one was trained; the same command continues.
        TrainingError: one could not be trained for another reason.
    """
    with timed(sweep.work, PROXIES):
        for proxy in proxies:
            if proxy.run is not None:
                _train(proxy.run)
    folders = tuple(str(proxy.folder) for proxy in proxies)
    check = partial(_check, folders=folders, pool=str(pool.folder), batch=sweep.options.proxy.batch)
    sweep.each("checking proxy LMs", list(range(len(folders))), check)
    return folders


def _check(number: int, *, folders: tuple[str, ...], pool: str, batch: int) -> None:
    check_proxy(folders[number], pool, batch)


def _train(run: RunConfig) -> None:
    """Train a proxy unless it is there; selections that need the same one take turns."""
    if (run.run_dir / "summary.json").is_file():
        return
    Path(run.storage).mkdir(parents=True, exist_ok=True)
    waiting = partial(say, f"another selection trains {run.run_dir}: waiting for it")
    try:
        with locked(Path(run.storage) / f".{run.name}.lock", waiting):
            say(f"training an LM on the pool for {run.train.steps} steps; it is kept: {run.run_dir}")
            train(run)  # which returns at once where another process has done it meanwhile
    except TrainingError as error:
        told = f"proxy LM {str(error).replace('train.lr', 'selection.proxy.lr')}"
        if error.kind == NotFinite.kind:
            raise DataError(told) from None
        raise (Stopped if error.kind == Stopped.kind else TrainingError)(told) from None
