"""What a configuration and its data come to, and whether they fit each other: read before anything is built."""

from __future__ import annotations

import torch

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.plan import ReadPlan
from ray_dwm.data.stages import StagedPlan
from ray_dwm.engine.given import build_learner
from ray_dwm.engine.group_dro import initial_weights
from ray_dwm.engine.identity import difference, foreign, run_identity
from ray_dwm.engine.reference import check_reference
from ray_dwm.engine.replay import ReplayedWeighting
from ray_dwm.engine.saved import list_checkpoints
from ray_dwm.errors import ConfigError, DataError
from ray_dwm.models.presets import lm_shape


def check_data(config: RunConfig) -> Manifest:
    """Read all manifests of a run and check that they fit each other and the configuration.

    Returns:
        The training set's manifest.

    Raises:
        ConfigError, DataError: naming the key or file and the remedy.
    """
    if not config.data.train:
        raise ConfigError("data.train is empty: name a folder of token shards")
    lm_shape(config.lm.preset)
    train = load_manifest(config.data.train)
    ReadPlan(rows_per_file=train.rows_per_file, global_batch=config.train.global_batch, seed=config.seed)
    if config.lm.seq_len > train.seq_len:
        raise ConfigError(
            f"lm.seq_len is {config.lm.seq_len}, the shards in {train.folder} hold {train.seq_len} tokens a sequence: "
            "lower it or prepare anew"
        )
    for name, folder in config.data.evaluation_sets.items():
        other = load_manifest(folder)
        if other.tokenizer_sha256 != train.tokenizer_sha256:
            raise DataError(
                f"{other.folder} (set {name}) was made with tokenizer {other.tokenizer_name}, {train.folder} with "
                f"{train.tokenizer_name}, another one: prepare both with the same tokenizer"
            )
        if other.seq_len < seq_len(config, train):
            raise DataError(
                f"{other.folder} (set {name}) has sequences of {other.seq_len} tokens, too short: prepare anew"
            )
        if name in config.data.target_sets and config.target_draw is not None:
            key, sequences = config.target_draw
            of_it = " of each set" if config.data.more_targets else ""
            sets = len(config.data.target_sets) if config.weighting.method == "dwm" else 1
            rows = learnt_rows(config, other)
            if rows < sequences // sets:
                raise DataError(
                    f"target set {other.folder} has {rows} sequences, {key} asks for {sequences // sets}{of_it}: "
                    "lower it or prepare a larger target set"
                )
    if config.target_draw is not None and not config.data.target:
        raise ConfigError(
            f"data.target is empty: weighting.method={config.weighting.method} needs a target set, or set "
            "weighting.method=uniform"
        )
    _check_given_dwm(config, train)
    if config.weighting.method == "group_dro":
        initial_weights(config, train.domain_names)
        check_reference(config, train, seq_len(config, train))
    return train


def check_checkpoint(config: RunConfig, train: Manifest) -> None:
    """Compare the newest checkpoint of the run folder, if there is one, with the run, before anything starts.

    Raises:
        ConfigError: it is of another model, tokenizer, optimizer or weighting.
    """
    for newest in list_checkpoints(config.run_dir / "checkpoints")[-1:]:
        if (reason := difference(newest, run_identity(config, train))) is not None:
            raise foreign(newest, reason)


def _check_given_dwm(config: RunConfig, train: Manifest) -> None:
    """Read the DWM that a run is given, so that one that does not fit is told before anything starts."""
    if config.weighting.method != "dwm":
        return
    if not config.dwm.learns:
        ReplayedWeighting(config, train.tokenizer_sha256, torch.device("cpu"))
    elif config.dwm.init_from:
        build_learner(config, train)


def learnt_rows(config: RunConfig, target: Manifest) -> int:
    """Sequences of a target set that the weighting learns from."""
    few = config.bilevel.target_sequences if config.weighting.method == "dwm" else 0
    return min(few or target.rows, target.rows)


def seq_len(config: RunConfig, train: Manifest) -> int:
    """Tokens of each sequence that are used."""
    return config.lm.seq_len or train.seq_len


def read_plan(config: RunConfig, train: Manifest) -> ReadPlan | StagedPlan:
    """The order of the training set."""
    if config.in_stages:
        return StagedPlan(
            run_dir=str(config.run_dir),
            steps=config.train.steps,
            stages=config.selection.mates.stages,
            global_batch=config.train.global_batch,
            seed=config.seed,
            block_rows=config.data.block_rows,
            window_blocks=config.data.window_blocks,
        )
    ordered = train.made_by.get("ordered") is True
    return ReadPlan(
        rows_per_file=train.rows_per_file,
        global_batch=config.train.global_batch,
        seed=config.seed,
        block_rows=config.data.block_rows,
        window_blocks=config.data.window_blocks,
        stored=config.data.order == "stored" or (config.data.order == "auto" and ordered),
    )
