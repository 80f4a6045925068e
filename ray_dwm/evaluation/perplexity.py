"""Loss, perplexity and bits-per-byte of an LM folder on token shards, per domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ray_dwm.core.losses import predicted_mask, token_losses
from ray_dwm.data.manifest import file_sha256, load_manifest
from ray_dwm.data.shards import Rows, ShardReader
from ray_dwm.errors import DataError, UserError
from ray_dwm.models.folders import lm_folder


@dataclass(frozen=True, slots=True)
class Result:
    """One set's (or one domain's) figures."""

    set: str
    domain: str
    """`all` for the whole set."""
    tokens: int
    loss: float
    """Nats per token."""
    loss_error: float | None
    """Standard error over sequences, as if these were drawn independently; None for a single one."""
    perplexity: float
    perplexity_error: float | None
    """The loss's, carried over to first order."""
    bits_per_byte: float
    """Comparable between tokenizers; bytes are the domains' means over all of their tokens."""
    bits_error: float | None


def load_lm(folder: Path) -> torch.nn.Module:
    """The LM of a run folder or a Hugging Face folder, in evaluation mode.

    Raises:
        UserError: where there is none.
    """
    from transformers import AutoModelForCausalLM  # takes seconds, and not all who look at losses load an LM

    path = lm_folder(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} is neither a finished run folder nor a Hugging Face folder: name one of these")
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise UserError(f"{path} cannot be loaded as an LM: {str(error).splitlines()[0]}") from None
    return model.eval()


def sequence_losses(
    model: torch.nn.Module, reader: ShardReader, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nats, counted tokens, domain code) of every sequence of a folder, each (n,)."""
    nats, tokens, domains = [], [], []
    for start in range(0, reader.manifest.rows, batch):
        rows = reader.take(np.arange(start, min(start + batch, reader.manifest.rows)))
        found = row_losses(model, rows)
        nats.append(found[0])
        tokens.append(found[1])
        domains.append(rows.domains)
    return np.concatenate(nats), np.concatenate(tokens), np.concatenate(domains)


@torch.no_grad()
def row_losses(model: torch.nn.Module, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(nats, counted tokens) of some sequences, each (n,), in one forward pass on the LM's device."""
    ids, mask = to_tensors(rows, next(model.parameters()).device)
    losses = token_losses(model(input_ids=ids).logits, ids) * mask
    return losses.double().sum(dim=1).cpu().numpy(), mask.sum(dim=1).cpu().numpy()


def to_tensors(rows: Rows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, (n, T), and which of their predictions count, (n, T-1)."""
    ids = torch.from_numpy(rows.input_ids.astype(np.int64)).to(device)
    mask = None if rows.loss_mask is None else torch.from_numpy(rows.loss_mask).to(device)
    return ids, predicted_mask(mask, ids)


def evaluate(model: torch.nn.Module, folder: Path, batch: int = 32, tokenizer: str | None = None) -> list[Result]:
    """Figures of a folder of shards: the whole set first, then every domain.

    Args:
        tokenizer: SHA-256 of the LM's tokenizer.json, where it is known.

    Raises:
        DataError: the folder is damaged, or was made for another LM.
    """
    reader = ShardReader(load_manifest(folder))
    manifest = reader.manifest
    reader.verify()
    if tokenizer not in (None, manifest.tokenizer_sha256):
        raise DataError(
            f"{folder} was made with tokenizer {manifest.tokenizer_name}, not the LM's: prepare it with that"
        )
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if manifest.vocab_size > size:
        raise DataError(
            f"{folder} has a vocabulary of {manifest.vocab_size}, the LM of {size}: prepare with the LM's tokenizer"
        )
    nats, tokens, codes = sequence_losses(model, reader, batch)
    ratios = np.array([manifest.domains[name].bytes_per_token for name in manifest.domain_names])
    parts = [("all", np.ones(len(codes), dtype=bool))]
    if len(manifest.domains) > 1:
        parts += [(name, codes == code) for code, name in enumerate(manifest.domain_names)]
    return [
        _result(manifest.folder.name, name, nats[chosen], tokens[chosen], ratios[codes[chosen]])
        for name, chosen in parts
    ]


def _result(name: str, domain: str, nats: np.ndarray, tokens: np.ndarray, bytes_per_token: np.ndarray) -> Result:
    loss, loss_error = _ratio(nats, tokens)
    bits, bits_error = _ratio(nats / math.log(2), tokens * bytes_per_token)
    perplexity = math.exp(min(loss, 700.0))
    return Result(
        set=name,
        domain=domain,
        tokens=int(tokens.sum()),
        loss=loss,
        loss_error=loss_error,
        perplexity=perplexity,
        perplexity_error=None if loss_error is None else perplexity * loss_error,
        bits_per_byte=bits,
        bits_error=bits_error,
    )


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float | None]:
    """A ratio of sums over sequences, and its standard error (Cochran 1977, section 2.11)."""
    ratio, count = float(above.sum() / below.sum()), len(above)
    if count < 2:
        return ratio, None
    spread = math.sqrt(count / (count - 1) * float(np.sum((above - ratio * below) ** 2)))
    return ratio, spread / float(below.sum())


def evaluate_folders(lm: Path, folders: Sequence[Path], batch: int = 32) -> list[Result]:
    """Figures of several folders, on a GPU where there is one."""
    model = load_lm(lm).to("cuda" if torch.cuda.is_available() else "cpu")
    path = lm_folder(lm) / "tokenizer.json"
    tokenizer = file_sha256(path) if path.is_file() else None
    return [result for folder in folders for result in evaluate(model, folder, batch, tokenizer)]


def format_table(results: Sequence[Result]) -> str:
    """A table for the terminal."""
    heads = f"{'loss':>9}{'± s.e.':>9}{'perplexity':>12}{'± s.e.':>9}{'bits/byte':>11}{'± s.e.':>9}"
    lines = [f"{'set':<16}{'domain':<14}{'tokens':>10}{heads}"]
    for r in results:
        lines.append(
            f"{r.set:<16}{r.domain:<14}{r.tokens:>10,}{r.loss:>9.4f}{_told(r.loss_error, 4)}"
            f"{r.perplexity:>12.2f}{_told(r.perplexity_error, 2)}{r.bits_per_byte:>11.4f}{_told(r.bits_error, 4)}"
        )
    return "\n".join(lines)


def _told(error: float | None, digits: int) -> str:
    return f"{'n/a' if error is None else f'{error:.{digits}f}':>9}"
