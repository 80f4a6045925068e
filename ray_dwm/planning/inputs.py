"""From a configuration to the plain numbers that planning is done with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ray_dwm.config import RunConfig
from ray_dwm.core.accounting import Llama
from ray_dwm.core.memory import Layout, MicroBatch
from ray_dwm.core.schedules import Staged
from ray_dwm.core.upper_memory import Upper
from ray_dwm.data.manifest import Manifest, find_manifest
from ray_dwm.errors import ConfigError
from ray_dwm.models.dwm import dwm_shape
from ray_dwm.models.presets import llama

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
    notes: tuple[str, ...] = ()
    """What is easily overlooked."""

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
    def copies(self) -> int:
        """Of the LM."""
        return self.workers // self.layout.shard

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
    def rows(self) -> int:
        """Sequences of the global batch, padding included."""
        return self.local_batch * self.workers

    @property
    def head_chunks(self) -> int:
        """Parts of a micro-batch for which the LM calls its head (models/lm.py, `chunk`)."""
        chunk = self.config.parallel.loss_chunk
        return -(-self.seq_len // max(1, chunk // self.micro_batch.sequences)) if chunk else 1

    @property
    def statistics(self) -> int:
        """Numbers of the LM about each sequence that the weighting looks at (engine/weighting.py, `Statistics`)."""
        of_dwm = 2 if self.config.dwm.lm_features else 0
        numbers = {"uniform": 0, "dwm": of_dwm, "loss": 1, "joint_update_aware": self.llama.width}
        return numbers[self.config.weighting.method]

    @property
    def smallest(self) -> Job:
        """The run with the fewest workers: of an elastic group, those with most on each."""
        if not self.config.cluster.elastic:
            return self
        cluster = dataclasses.replace(self.config.cluster, workers=self.config.cluster.least_workers)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, cluster=cluster))

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
            contracted=-(-self.local_batch // round(1 / b.fraction)),
            targets=math.ceil(b.target_batch / sets / self.workers),
            at_once=c.train.micro_batch,
            sets=sets,
            at_theta=b.target_at == "theta",
            reuse=b.reuse > 1,
            hold=b.stage_lm == "hold",
            statistics=self.statistics,
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
    def update_steps(self) -> tuple[int, ...]:
        """LM steps of the bi-level steps: all of staged ones, else until reuse and checks begin anew."""
        c, b = self.config, self.config.bilevel
        if not b.stages:
            period = b.reuse * max(1, b.fidelity_every) if b.reuse > 1 else 1
            return tuple(n * b.every for n in range(min(period, -(-c.train.steps // b.every))))
        stages = Staged(
            stages=b.stages,
            updates=b.stage_updates,
            total_steps=c.train.steps,
            warmup_steps=b.warmup_steps,
            delay_steps=c.dwm.delay_steps,
        )
        return tuple(stages.start(stage) + k for stage in range(b.stages) for k in range(b.stage_updates))

    @property
    def dwm_parameters(self) -> int:
        """Of a rank's replica of the DWM, roughly: its embedding, its bag, and a few squares of its width."""
        if self.config.weighting.method != "dwm":
            return 0
        dwm = self.config.dwm
        shape = dwm_shape(dwm.size, self.llama.vocab, dwm.lm_features, dwm.batch_attention)
        width = shape.width
        return self.llama.vocab * (width + 1) + (4 * shape.layers + 8 * shape.batch_layers + 2) * width * width


def job(config: RunConfig, vocab: int = 0) -> Job:
    """What is to be planned; the shards' manifest is read where it is there, and not missed where it is not.

    Args:
        vocab: the vocabulary, where there is no manifest; 0: assume the usual one.

    Raises:
        ConfigError: the preset is not known, or sequences are longer than the shards'.
    """
    manifest = find_manifest(config.data.train)
    assumed = []
    if manifest is not None:
        vocab = manifest.vocab_size
    elif not vocab:
        vocab = USUAL_VOCABULARY
        assumed.append(f"vocabulary {vocab:,} (no manifest in data.train: --vocab says otherwise)")
    prepared = manifest.seq_len if manifest else config.prepare.seq_len
    if not config.lm.seq_len and manifest is None:
        assumed.append(f"sequences of {prepared:,} tokens (prepare.seq_len)")
    if config.lm.attention in ("math", "eager"):
        assumed.append(f"attention that saves no scores, which lm.attention={config.lm.attention} does")
    return Job(
        config=config,
        llama=llama(config.lm.preset, vocab),
        seq_len=config.lm.seq_len or prepared,
        assumed=tuple(assumed),
        notes=_notes(config, manifest, prepared),
    )


def _notes(config: RunConfig, manifest: Manifest | None, prepared: int) -> tuple[str, ...]:
    """What is easily overlooked; refused as a run would refuse it: longer sequences than the shards hold."""
    used, train = config.lm.seq_len, config.train
    if manifest is not None and used > prepared:
        raise ConfigError(
            f"lm.seq_len is {used}, the shards in {manifest.folder} hold {prepared} tokens a sequence: lower it or "
            "prepare anew"
        )
    if not 0 < used < prepared:
        return ()
    less, all_of_them = (train.steps * train.global_batch * x / 1e9 for x in (used, prepared))
    return (
        f"lm.seq_len={used} uses the first {used:,} of {prepared:,} tokens of each sequence: {less:.3g} B tokens in "
        f"train.steps={train.steps}, not {all_of_them:.3g} B",
    )
