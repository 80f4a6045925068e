"""What follows from the configuration: data, epochs, disk, and what Ray's nodes must hold."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ray_dwm.config import RunConfig, load
from ray_dwm.data.manifest import MANIFEST, Manifest, load_manifest
from ray_dwm.data.plan import WORTH_EPOCHS
from ray_dwm.data.records import LOCK, is_locked
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.checks import check_checkpoint, check_data, read_plan, seq_len
from ray_dwm.engine.given import build_learner
from ray_dwm.engine.learner import State
from ray_dwm.engine.rundir import check, read_summary
from ray_dwm.logs import in_job
from ray_dwm.models.presets import parameter_count
from ray_dwm.orchestration.cluster import fitting, needed, room_for_workers, worker_bundle
from ray_dwm.orchestration.doctor_nodes import NodeFacts
from ray_dwm.orchestration.findings import Finding, count
from ray_dwm.orchestration.mates import check_stages
from ray_dwm.orchestration.mirror import prove
from ray_dwm.orchestration.prepare import sets_to_make
from ray_dwm.orchestration.select import plan_inline

_WEIGHT_ROW_BYTES = 26
"""A row of weights/*.parquet: 24 to 25 bytes, measured with random figures."""
_VERSIONS_HELD = 3
"""DWM versions in the object store at a time: the one before, the one in use, the one under way."""


def stand_in(nodes: Sequence[NodeFacts]) -> RunConfig:
    """What is tried where no configuration is given: a worker on every GPU, or else two on CPUs."""
    gpus = fitting([node.resources for node in nodes], {"CPU": 1, "GPU": 1})
    workers = [f"cluster.workers={gpus}", "cluster.gpus_per_worker=1", f"train.global_batch={gpus}"] if gpus else []
    return load([], ["train.precision=bf16", "weighting.method=uniform", *workers])


def check_sets(config: RunConfig) -> list[Finding]:
    """Manifests that fit each other and the run, or texts from which `train` can make them; and the epochs."""
    to_make = sets_to_make(config, missing_only=True)
    if to_make:
        outputs = [Path(output).expanduser().absolute() for _, _, output in to_make]
        found = "not there yet, `train` makes them first: " + ", ".join(map(str, outputs))
        remedy = "run `ray-dwm prepare` now to have them checked"
        if in_job() and any(output.is_relative_to(Path.cwd()) for output in outputs):
            found += "; that is the job's working folder, which is temporary, and other nodes do not see it"
            remedy = "give the data.* folders as absolute paths on storage that all nodes see"
        return [Finding("data", "warning", found, remedy)]
    train = check_data(config)
    if config.in_stages:
        check_stages(config, train)
    sizes = [f"train {train.rows} sequences of {train.seq_len} tokens"]
    sizes += [f"{name} {load_manifest(folder).rows}" for name, folder in config.data.evaluation_sets.items()]
    found = f"{', '.join(sizes)}; one tokenizer"
    rows = train.rows
    if config.data.selection != "none" and not config.in_stages:
        selection = plan_inline(config)
        rows = selection.rows
        found += f"; before training, {selection.method} selects {rows} of {train.rows}"
        train = replace(train, made_by=selection.made_by)
    stored = read_plan(config, train).stored
    return [Finding("data", "ok", found), check_epochs(config, rows, seq_len(config, train), stored)]


def check_epochs(config: RunConfig, rows: int, tokens: int, stored: bool = False) -> Finding:
    """How often the run reads the training set.

    Args:
        rows: sequences of the training set.
        tokens: those of each sequence that are used.
        stored: they are read in the order in which they are stored.
    """
    drawn = config.train.steps * config.train.global_batch
    epochs = drawn / rows
    found = f"{drawn * tokens / 1e6:,.1f} M tokens are {epochs:.2f} epochs of the training set"
    if epochs > WORTH_EPOCHS:
        remedy = f"add data or lower train.steps: beyond {WORTH_EPOCHS:g} epochs repeated data is worth little"
        return Finding("epochs", "warning", found, remedy)
    if stored and drawn < rows // config.train.global_batch * config.train.global_batch:
        found += ", in stored order: the last part of it is never seen"
        remedy = "select for a budget of train.steps * train.global_batch sequences, or data.order=shuffled"
        return Finding("epochs", "warning", found, remedy)
    return Finding("epochs", "ok", f"{found}, the first in stored order" if stored else found)


def check_shards(config: RunConfig) -> Finding:
    """All checksums, as `train` compares them at its start."""
    folders = [config.data.train, *config.data.evaluation_sets.values()]
    for folder in folders:
        open_shards(folder).verify()
    return Finding("checksums", "ok", f"all shards of {len(folders)} sets are as their manifests say")


def check_mirror(config: RunConfig) -> Finding:
    """Whether the run folder could be copied there, from here."""
    prove(config)
    return Finding("mirror", "ok", f"written and read: {config.mirror}")


def check_run_folder(config: RunConfig, temporary: bool) -> Finding:
    """Whether the run folder can be made, or belongs to this very run, with a checkpoint of it.

    Args:
        temporary: it lies in a Ray job's working folder.
    """
    check(config)
    if data_are_there(config):
        check_checkpoint(config, load_manifest(config.data.train))
    if temporary:
        found = f"{config.run_dir} lies in a Ray job's working folder, which is temporary"
        return Finding("run folder", "warning", found, "storage=/a/shared/folder")
    if is_locked(config.run_dir / LOCK):
        remedy = "wait for it, or choose another name=..."
        return Finding("run folder", "failed", f"{config.run_dir} is in use by another process", remedy)
    if read_summary(config) is not None:
        remedy = "name=... for a new run, or remove the folder"
        return Finding(
            "run folder", "warning", f"{config.run_dir} is complete already, nothing would be trained", remedy
        )
    state = "exists and is continued" if config.run_dir.exists() else "is new"
    return Finding("run folder", "ok", f"{config.run_dir} {state}")


def disk_needed(config: RunConfig, parameters: int) -> dict[str, int]:
    """Bytes that a run's folder comes to hold, by kind.

    A checkpoint has the LM and Adam's two moments in fp32; one more than are kept is there while it is written.
    """
    t, c = config.train, config.checkpoint
    kept_for_good = t.steps // c.keep_every if c.keep_every else 0
    written = -(-t.steps // c.every)
    checkpoints = min(c.keep, written) + 1 + min(kept_for_good, written)
    records = t.steps // config.tracking.weights_every
    return {
        "checkpoints": checkpoints * parameters * 12,
        "exported LM": parameters * 4,
        "weights": records * t.global_batch * _WEIGHT_ROW_BYTES,
    }


def check_disk(config: RunConfig, vocab_size: int, free: int, used: int) -> Finding:
    """Room for the run.

    Args:
        free: bytes free in storage.
        used: bytes that the run folder holds already, where the run is continued.
    """
    parts = disk_needed(config, parameter_count(config.lm.preset, vocab_size))
    wanted = sum(parts.values())
    detail = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    found = f"the run needs about {wanted / 2**30:.2f} GiB ({detail}), {free / 2**30:.2f} GiB are free"
    if free + used < wanted:
        remedy = "free space there, choose another storage=, or lower checkpoint.keep or raise checkpoint.keep_every"
        return Finding("disk", "failed", found, remedy)
    return Finding("disk", "ok", found)


def measure_disk(config: RunConfig) -> Finding:
    """See `check_disk`, of the disk as it is."""
    place = next(folder for folder in (config.run_dir, *config.run_dir.parents) if folder.is_dir())
    used = sum(path.stat().st_size for path in config.run_dir.rglob("*") if path.is_file())
    vocab_size = load_manifest(config.data.train).vocab_size
    return check_disk(config, vocab_size, shutil.disk_usage(place).free, used)


def check_object_store(config: RunConfig, nodes: Sequence[NodeFacts], dwm_bytes: int) -> list[Finding]:
    """What the workers' ingest and the DWM's versions may take in each node's object store, and whether RAM holds it.

    Args:
        dwm_bytes: size of one DWM version with its optimizer.
    """
    rows = []
    for node in nodes:
        workers = min(config.cluster.most_workers, fitting([node.resources], worker_bundle(config)))
        wanted = workers * config.cluster.ingest_memory_mb * 2**20 + _VERSIONS_HELD * dwm_bytes
        store = node.resources.get("object_store_memory", 0.0)
        if wanted > store:
            found = (
                f"{node.name} has {store / 2**20:.0f} MiB, {count(workers, 'worker')} may ask for "
                f"{wanted / 2**20:.0f} MiB: Ray would spill to disk"
            )
            remedy = "lower cluster.ingest_memory_mb, or start Ray with a larger --object-store-memory"
            rows.append(Finding("object store", "warning", found, remedy))
        if store > node.shm_bytes:
            found = (
                f"{node.name} keeps its {store / 2**20:.0f} MiB outside of /dev/shm ({node.shm_bytes / 2**20:.0f} "
                "MiB), where reading is slow"
            )
            rows.append(Finding("object store", "warning", found, "enlarge /dev/shm (a container's --shm-size)"))
    smallest = min((node.resources.get("object_store_memory", 0.0) for node in nodes), default=0.0)
    return rows or [Finding("object store", "ok", f"at least {smallest / 2**20:.0f} MiB on every node, in /dev/shm")]


def dwm_bytes(config: RunConfig, train: Manifest) -> int:
    """Size of one DWM version with its optimizer; 0 where none is learnt."""
    if not config.learns_dwm:
        return 0
    state: State = build_learner(config, train).state()
    return sum(value.numel() * value.element_size() for value in state.values())


def check_free(
    config: RunConfig, workers: int, total: dict[str, float], free: Sequence[dict[str, float]], cores: int
) -> Finding:
    """Resources that others hold at the moment; that the cluster has enough was checked before.

    Args:
        workers: those that the cluster has room for.
        free: what nobody holds on each node.
        cores: those that the machines have, whatever Ray counts.
    """
    wanted, most = needed(config, workers), config.cluster.most_workers
    shown = ", ".join(f"{amount:g} of {total.get(kind, 0.0):g} {kind}s" for kind, amount in wanted.items())
    fewer = "" if workers == most else f" with {workers} of at most {most} workers"
    row = Finding("resources", "ok", f"the run holds {shown}{fewer}")
    there = {kind: sum(node.get(kind, 0.0) for node in free) for kind in wanted}
    busy = [f"{there[kind]:g} {kind}s" for kind, amount in wanted.items() if there[kind] < amount]
    room = room_for_workers(config, list(free))
    if busy or room < workers:
        now = f"{' and '.join(busy)} are free" if busy else f"{room} of {workers} workers find a node with room"
        remedy = "wait: the run starts when others have ended"
        return replace(row, state="warning", found=f"{row.found}, but now only {now}", remedy=remedy)
    if workers * config.cluster.cpus_per_worker > cores:
        found = f"{row.found}, and its {count(workers, 'worker')} share {count(cores, 'core')}"
        return replace(row, state="warning", found=found, remedy="lower cluster.workers: they slow each other down")
    return row


def _manifests(config: RunConfig) -> list[Path]:
    folders = [config.data.train, *config.data.evaluation_sets.values()]
    return [Path(folder).expanduser().absolute() / MANIFEST for folder in folders if folder]


def data_are_there(config: RunConfig) -> bool:
    """Whether all sets have been prepared."""
    return bool(config.data.train) and all(path.is_file() for path in _manifests(config))


def input_files(config: RunConfig) -> list[Path]:
    """What every node must see: manifests, and the tokenizer where text is still to be prepared."""
    files = _manifests(config)
    if config.prepare.tokenizer:
        files.append(Path(config.prepare.tokenizer).expanduser().absolute() / "tokenizer.json")
    return [file for file in files if file.is_file()]
