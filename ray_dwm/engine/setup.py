"""From a configuration to the parts of a run: the one place where the engine's pieces are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.plan import ReadPlan
from ray_dwm.data.shards import ShardReader, open_shards
from ray_dwm.data.stages import StagedPlan
from ray_dwm.engine.attention import allow_kernels
from ray_dwm.engine.baselines import JointUpdateAwareWeighting, LossWeighting
from ray_dwm.engine.batch import BatchSource, LocalSource
from ray_dwm.engine.group_dro import GroupDroWeighting, initial_weights
from ray_dwm.engine.identity import difference, foreign, run_identity
from ray_dwm.engine.learner import DwmLearner, LocalWeightService, WeightService
from ray_dwm.engine.materialize import materialize, without_values
from ray_dwm.engine.mesh import device, init_mesh
from ray_dwm.engine.metrics import MetricSink
from ray_dwm.engine.parallelize import parallelize
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.reference import build_reference, check_reference
from ray_dwm.engine.replay import ReplayedWeighting
from ray_dwm.engine.saved import list_checkpoints
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.weigher import Weigher
from ray_dwm.engine.weighting import Weighting
from ray_dwm.errors import ConfigError, DataError
from ray_dwm.models.dwm import DwmShape, build_dwm, dwm_shape
from ray_dwm.models.hf import load_dwm
from ray_dwm.models.lm import Lm, flops_per_token, lm_config, lm_shape


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
    for name, folder in evaluation_sets(config).items():
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
        if name in target_sets(config) and config.target_draw is not None:
            key, sequences = config.target_draw
            of_it = " of each set" if config.data.more_targets else ""
            sets = len(target_sets(config)) if config.weighting.method == "dwm" else 1
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


def evaluation_sets(config: RunConfig) -> dict[str, str]:
    """Name -> shards of everything that is evaluated: the target set and the held-out sets."""
    return {**target_sets(config), **config.data.held_out}


def target_sets(config: RunConfig) -> dict[str, str]:
    """Name -> shards of what the upper level minimises."""
    return {"target": config.data.target, **config.data.more_targets} if config.data.target else {}


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


def build_learner(config: RunConfig, train: Manifest) -> DwmLearner:
    """The upper level's learner at version 0."""
    learner = DwmLearner(run_dwm_shape(config, train), config.dwm, config.bilevel, config.seed)
    if config.dwm.init_from:
        given, _ = load_dwm(Path(config.dwm.init_from).expanduser(), train.tokenizer_sha256)
        if given.shape != learner.model.shape:
            raise ConfigError(
                f"dwm.init_from={config.dwm.init_from} is of another architecture ({given.shape}): set dwm.size, "
                "dwm.lm_features and dwm.batch_attention to it"
            )
        learner.model.load_state_dict(given.state_dict())
    return learner


def run_lm_config(config: RunConfig, train: Manifest) -> LlamaConfig:
    """The LM's architecture in a run."""
    return lm_config(
        config.lm.preset,
        vocab_size=train.vocab_size,
        seq_len=seq_len(config, train),
        eos_token_id=train.eos_token_id,
        attention=config.lm.attention,
    )


def run_dwm_shape(config: RunConfig, train: Manifest) -> DwmShape:
    """The DWM's architecture in a run."""
    return dwm_shape(config.dwm.size, train.vocab_size, config.dwm.lm_features, config.dwm.batch_attention)


def build_weigher(config: RunConfig, train: Manifest, service: WeightService | None, place: torch.device) -> Weigher:
    """This rank's replica of the DWM at version 0; without `service` it is learnt in this process."""
    learner = build_learner(config, train)
    replica = build_dwm(run_dwm_shape(config, train), config.seed)
    return Weigher(config, replica, learner.state(), service or LocalWeightService(learner), place)


def build(
    config: RunConfig,
    *,
    source: BatchSource | None = None,
    service: WeightService | None = None,
    sinks: list[MetricSink] | None = None,
    on_checkpoint: Callable[[int, Path, dict[str, float]], None] | None = None,
    on_version: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    preempted: Callable[[], bool] | None = None,
    until: int = 0,
    figures: Mapping[int, Mapping[str, float]] | None = None,
) -> Parts:
    """Put a run together. Without `source` and `service` the shards are read and the DWM is learnt in this process."""
    train = check_data(config)
    mesh = init_mesh(config.parallel.shard)
    allow_kernels(config.lm.attention)
    place, tokens = device(), seq_len(config, train)
    llama = run_lm_config(config, train)
    model, fillings = without_values(lambda: Lm(llama, config.parallel.loss_chunk))
    parallelize(model, mesh, config.train.precision, config.parallel)
    materialize(model, fillings, config.seed, torch.device("cpu") if config.parallel.cpu_offload else place)
    lower = LowerLevel(model, mesh, config.train)
    targets = {name: open_shards(folder) for name, folder in target_sets(config).items()}
    weighting: Weighting | None = None
    if config.weighting.method == "dwm" and not config.dwm.learns:
        weighting = ReplayedWeighting(config, train.tokenizer_sha256, place)
    elif config.weighting.method == "dwm":
        weighting = build_weigher(config, train, service, place)
    elif config.weighting.method == "loss":
        weighting = LossWeighting(config)
    elif config.weighting.method == "joint_update_aware":
        weighting = JointUpdateAwareWeighting(config, model, targets["target"], tokens, place)
    elif config.weighting.method == "group_dro":
        weighting = GroupDroWeighting(config, train, build_reference(config, mesh))
    if source is None:
        reader: ShardReader = open_shards(config.data.train)
        source = LocalSource(reader, read_plan(config, train), dist.get_rank(), dist.get_world_size())
    return Parts(
        config=config,
        device=place,
        seq_len=tokens,
        lower=lower,
        source=source,
        targets=targets,
        evaluation={name: open_shards(folder) for name, folder in evaluation_sets(config).items()},
        domains=train.domain_names,
        flops_per_token=flops_per_token(config.lm.preset, train.vocab_size, tokens),
        weighting=weighting,
        identity=run_identity(config, train),
        mesh=dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
        sinks=sinks or [],
        on_checkpoint=on_checkpoint,
        on_version=on_version,
        should_stop=should_stop,
        preempted=preempted,
        until=until,
        figures=figures or {},
    )
