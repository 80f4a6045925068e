"""From a configuration to the parts of a run: the one place where the engine's pieces are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import ShardReader, open_shards
from ray_dwm.engine.attention import allow_kernels
from ray_dwm.engine.baselines import JointUpdateAwareWeighting, LossWeighting
from ray_dwm.engine.batch import BatchSource, LocalSource
from ray_dwm.engine.checks import check_data, read_plan, seq_len
from ray_dwm.engine.given import build_learner, run_dwm_shape
from ray_dwm.engine.group_dro import GroupDroWeighting
from ray_dwm.engine.identity import run_identity
from ray_dwm.engine.learner import LocalWeightService, WeightService
from ray_dwm.engine.materialize import materialize, without_values
from ray_dwm.engine.mesh import device, init_mesh
from ray_dwm.engine.metrics import MetricSink
from ray_dwm.engine.parallelize import parallelize
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.reference import reference_folder
from ray_dwm.engine.replay import ReplayedWeighting
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.weigher import Weigher
from ray_dwm.engine.weighting import Weighting
from ray_dwm.models.dwm import build_dwm
from ray_dwm.models.hf import load_lm
from ray_dwm.models.lm import Lm, lm_config
from ray_dwm.models.presets import flops_per_token


def run_lm_config(config: RunConfig, train: Manifest) -> LlamaConfig:
    """The LM's architecture in a run."""
    return lm_config(
        config.lm.preset,
        vocab_size=train.vocab_size,
        seq_len=seq_len(config, train),
        eos_token_id=train.eos_token_id,
        attention=config.lm.attention,
    )


def build_weigher(config: RunConfig, train: Manifest, service: WeightService | None, place: torch.device) -> Weigher:
    """This rank's replica of the DWM at version 0; without `service` it is learnt in this process."""
    learner = build_learner(config, train)
    replica = build_dwm(run_dwm_shape(config, train), config.seed)
    return Weigher(config, replica, learner.state(), service or LocalWeightService(learner), place)


def build_reference(config: RunConfig, mesh: DeviceMesh) -> Lm | None:
    """The reference LM, laid out and computing like the run's LM: with equal weights it has equal losses."""
    folder = reference_folder(config)
    if folder is None:
        return None
    model = load_lm(folder, loss_chunk=config.parallel.loss_chunk, attention=config.lm.attention)
    model.requires_grad_(False).eval()
    return parallelize(model, mesh, config.train.precision, config.parallel)


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
    targets = {name: open_shards(folder) for name, folder in config.data.target_sets.items()}
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
        evaluation={name: open_shards(folder) for name, folder in config.data.evaluation_sets.items()},
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
