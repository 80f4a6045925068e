"""The LM as a folder in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ray_dwm.errors import DataError
from ray_dwm.models.folders import RUN_CONFIG, lm_folder
from ray_dwm.models.lm import Lm

_MODEL_CARD = """---
library_name: transformers
tags: [llama, ray_dwm]
---
# {name}

A Llama LM trained with ray_dwm for {tokens:,} tokens ({steps} steps),
with {weighting} weights. The resolved configuration is in `ray_dwm_config.yaml`.
"""


def save_lm(
    folder: Path,
    config: LlamaConfig,
    state: dict[str, Tensor],
    *,
    config_yaml: str,
    name: str,
    tokens: int,
    steps: int,
    weighting: str,
) -> None:
    """Write an LM as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        state: full (unsharded) state dict on the CPU, with the names of LlamaForCausalLM.
    """
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.config.use_cache = True
    model.save_pretrained(folder)
    (folder / RUN_CONFIG).write_text(config_yaml)
    (folder / "README.md").write_text(_MODEL_CARD.format(name=name, tokens=tokens, steps=steps, weighting=weighting))


def load_lm(folder: Path, *, loss_chunk: int = 0, attention: str = "auto") -> Lm:
    """The Llama of a run folder or a Hugging Face folder, in fp32, whose forward ends in losses.

    Raises:
        DataError: its weights are missing, damaged, or not all of them.
    """
    path = lm_folder(folder)
    try:
        model, found = Lm.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager" if attention == "eager" else "sdpa",
            output_loading_info=True,
            loss_chunk=loss_chunk,
        )
        if found["missing_keys"]:
            raise ValueError(f"{sorted(found['missing_keys'])[0]} is missing")
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise DataError(f"{path} cannot be loaded as an LM ({str(error).splitlines()[0]}): train it anew") from None
    model.config.use_cache = False
    return model
