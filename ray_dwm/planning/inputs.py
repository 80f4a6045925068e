"""From a configuration to the plain numbers that planning is done with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ray_dwm.config import RunConfig
from ray_dwm.core.accounting import Llama
from ray_dwm.core.memory import Layout, MicroBatch
from ray_dwm.core.upper_memory import Upper
from ray_dwm.data.manifest import find_manifest
from ray_dwm.models.dwm import SIZES
from ray_dwm.models.lm import llama

USUAL_VOCABULARY = 32_000
"""Where nobody says: that of the presets' parameter counts."""
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A configured run, and what is known of its data."""

    config: RunConfig
    llama: Llama
    seq_len: int
    assumed: tuple[str, ...] = ()
    """What no file and no option says."""

    @property
    def workers(self) -> int:
        """Ranks; of an elastic group, the most."""
        return self.config.cluster.most_workers

    @property
    def layout(self) -> Layout:
        """How the LM lies on a rank."""
        c, p = self.config, self.config.parallel
        sgd = 1 if c.train.momentum else 0
        return Layout(
            compute=_BYTES[c.train.precision],
            shard=p.shard or self.workers,
            reshard=p.reshard_after_forward,
            checkpointing=p.activation_checkpointing,
            loss_chunk=p.loss_chunk,
            moments=2 if c.train.optimizer == "adamw" else sgd,
            offload=p.cpu_offload,
            gloo=c.cluster.gpus_per_worker == 0,
        )

    @property
    def local_batch(self) -> int:
        """Sequences of a worker in a step, padding included."""
        return -(-self.config.train.global_batch // self.workers)

    @property
    def micro_batch(self) -> MicroBatch:
        """What goes through the LM at a time."""
        sequences = min(self.config.train.micro_batch, self.local_batch)
        return MicroBatch(sequences=sequences, seq_len=self.seq_len, first=sequences == self.local_batch)

    @property
    def micro_batches(self) -> int:
        """Of a worker in a step."""
        return -(-self.local_batch // self.micro_batch.sequences)

    @property
    def upper(self) -> Upper | None:
        """The bi-level step; None where no DWM is learnt."""
        c, b = self.config, self.config.bilevel
        if not c.learns_dwm:
            return None
        sets = 1 + len(c.data.more_targets)
        return Upper(
            estimator=b.estimator,
            rank=b.rank,
            contracted=math.ceil(self.local_batch * b.fraction),
            targets=math.ceil(b.target_batch / sets / self.workers),
            sets=sets,
            at_theta=b.target_at == "theta",
            reuse=b.reuse > 1,
            hold=b.stage_lm == "hold",
        )

    @property
    def every(self) -> float:
        """LM steps from one bi-level step to the next, in the mean; infinite where there are none."""
        c, b = self.config, self.config.bilevel
        if not c.learns_dwm:
            return float("inf")
        if b.stages:
            return c.train.steps / (b.stages * b.stage_updates)
        return b.every

    @property
    def dwm_parameters(self) -> int:
        """Of a rank's replica of the DWM, roughly: its embedding, its bag, and a few squares of its width."""
        if self.config.weighting.method != "dwm":
            return 0
        size = SIZES[self.config.dwm.size]
        width = size["width"]
        return self.llama.vocab * (width + 1) + (4 * size["layers"] + 8 * size["batch_layers"] + 2) * width * width


def job(config: RunConfig, vocab: int = 0) -> Job:
    """What is to be planned; the shards' manifest is read where it is there, and not missed where it is not.

    Args:
        vocab: the vocabulary, where there is no manifest; 0: assume the usual one.
    """
    manifest = find_manifest(config.data.train)
    assumed = []
    if manifest is not None:
        vocab = manifest.vocab_size
    elif not vocab:
        vocab = USUAL_VOCABULARY
        assumed.append(f"vocabulary {vocab:,} (no manifest in data.train: --vocab says otherwise)")
    seq_len = config.lm.seq_len or (manifest.seq_len if manifest else config.prepare.seq_len)
    if not config.lm.seq_len and manifest is None:
        assumed.append(f"sequences of {seq_len:,} tokens (prepare.seq_len)")
    if config.lm.attention in ("math", "eager"):
        assumed.append(f"attention that saves no scores, which lm.attention={config.lm.attention} does")
    return Job(config=config, llama=llama(config.lm.preset, vocab), seq_len=seq_len, assumed=tuple(assumed))
