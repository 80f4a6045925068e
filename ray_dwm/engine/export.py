"""From the sharded state to folders that outlive the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.records import read_json
from ray_dwm.data.tokenization import FOLDER, copy_tokenizer
from ray_dwm.engine.checks import seq_len
from ray_dwm.engine.mesh import is_main
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.plain import ForeignState, PlainPlanner, damage
from ray_dwm.engine.replay import write_trajectory
from ray_dwm.engine.saved import step_of
from ray_dwm.engine.setup import run_lm_config
from ray_dwm.errors import TrainingError, first_line
from ray_dwm.models.folders import save_dwm
from ray_dwm.models.hf import save_lm


def export_dwm(parts: Parts, train: Manifest, step: int) -> None:
    """Write the DWM version that LM step `step` (counted from 1) used to dwm/v*/, and the index of all, on rank 0."""
    if not is_main() or parts.weigher is None:
        return
    version = parts.weigher.version
    schedule, since = parts.weigher.schedule, step - 1
    while since and schedule.version(since - 1) == schedule.version(step - 1):
        since -= 1
    folder, dwm = parts.config.run_dir / "dwm" / f"v{version:06d}", parts.config.dwm
    if folder.exists() and read_json(folder / "config.json")["learnt_on"]["step"] == since:
        return
    save_dwm(
        folder,
        parts.weigher.shape,
        parts.weigher.parameters(),
        {
            "version": version,
            "tokenizer_sha256": train.tokenizer_sha256,
            "learnt_on": {
                "lm": parts.config.lm.preset,
                "step": since,
                "run": parts.config.name,
                "steps": parts.config.train.steps,
            },
            "started_from": _origin(Path(dwm.init_from)) if dwm.init_from else None,
            "applied_with": {"temperature": dwm.temperature, "floor": dwm.floor},
        },
    )
    write_trajectory(folder.parent, since, parts.config.train.steps)


def _origin(folder: Path) -> dict[str, Any]:
    """What a DWM that is learnt further was before, and before that."""
    config = read_json(folder / "config.json")
    return {key: config.get(key) for key in ("version", "learnt_on", "started_from")}


def export_lm(parts: Parts, train: Manifest) -> None:
    """Gather the LM and write it to hf/ with its tokenizer; all ranks take part, rank 0 writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(parts.lower.model, options=options)
    if is_main():
        config, llama = parts.config, parts.lower.model.config
        _write(config, train, llama, cast(dict[str, Tensor], state), config.train.steps, config.run_dir / "hf")
    dist.barrier()


def export_checkpoint(config: RunConfig, train: Manifest, checkpoint: Path, folder: Path) -> None:
    """Write the LM of a checkpoint to a folder in Hugging Face layout, in this process alone and on its CPU.

    Raises:
        TrainingError: the checkpoint is damaged, or has gone.
    """
    llama = run_lm_config(config, train)
    state = LlamaForCausalLM(llama).float().state_dict()
    reason = damage(checkpoint)  # before DCP opens its table of contents, which is a pickle
    if reason is None:
        try:
            dcp.load({"lm": state}, checkpoint_id=checkpoint, planner=PlainPlanner(), no_dist=True)
        except (CheckpointException, ForeignState, OSError) as error:
            reason = first_line(error)
    if reason is not None:
        raise TrainingError(f"the LM of checkpoint {checkpoint} cannot be read: {reason}")
    _write(config, train, llama, state, step_of(checkpoint), folder)


def _write(
    config: RunConfig, train: Manifest, llama: LlamaConfig, state: dict[str, Tensor], steps: int, folder: Path
) -> None:
    save_lm(
        folder,
        llama,
        state,
        config_yaml=to_yaml(config),
        name=config.name,
        tokens=steps * config.train.global_batch * seq_len(config, train),
        steps=steps,
        weighting=config.weighting_label,
    )
    copy_tokenizer(train.folder / FOLDER, folder)
