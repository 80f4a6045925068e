"""From the sharded state to folders that outlive the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ray_dwm.config import to_yaml
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.records import read_json
from ray_dwm.data.tokenization import FOLDER, copy_tokenizer
from ray_dwm.engine.mesh import is_main
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.replay import write_trajectory
from ray_dwm.models.hf import save_dwm, save_lm


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
        config = parts.config
        steps = config.train.steps
        save_lm(
            config.run_dir / "hf",
            parts.lower.model.config,
            cast(dict[str, Tensor], state),
            config_yaml=to_yaml(config),
            name=config.name,
            tokens=steps * config.train.global_batch * parts.seq_len,
            steps=steps,
            weighting=config.weighting_label,
        )
        copy_tokenizer(train.folder / FOLDER, config.run_dir / "hf")
    dist.barrier()
