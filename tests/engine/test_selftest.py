"""Probes of attention kernels and process groups: what they find, and that they find what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run

from ray_dwm.engine import selftest
from ray_dwm.engine.selftest import GroupProbe, probe_attention, probe_group


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of the CPU are known")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_on_the_cpu(precision: str) -> None:
    probe = probe_attention(head_dim=24, seq_len=16, precision=precision)
    assert probe.device == "CPU"
    assert probe.trains == ("flash", "math")
    assert probe.forward_mode == ("math",)  # fused kernels have no forward derivative
    assert probe.auto == "flash"


def test_a_kernel_with_wrong_results_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention

    def off_in_float32(query: torch.Tensor, *rest: torch.Tensor, is_causal: bool) -> torch.Tensor:
        return right(query, *rest, is_causal=is_causal) * (1.1 if query.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(selftest.F, "scaled_dot_product_attention", off_in_float32)
    assert probe_attention(head_dim=8, seq_len=8, precision="fp32").trains == ()


@pytest.mark.parametrize(("world", "shard"), [(1, 0), (2, 0), (3, 0), (4, 2)])
def test_a_sound_group(world: int, shard: int, tmp_path: Path) -> None:
    probe: GroupProbe = run(world, tmp_path, probe_group, shard)
    assert (probe.backend, probe.world, probe.device) == ("gloo", world, "CPU")
    assert probe.sum_is_right
    assert probe.fsdp_error < 1e-6
    assert probe.bytes_per_s > 0


def _group_whose_sums_are_lost() -> GroupProbe:
    reduce = dist.all_reduce

    def lossy(values: torch.Tensor, *arguments: object) -> None:
        if values.numel() == 1 and not arguments:
            return
        reduce(values, *arguments)

    dist.all_reduce = lossy
    return probe_group()


def _group_whose_second_rank_starts_elsewhere() -> GroupProbe:
    two_layers = selftest._two_layers

    def shifted() -> torch.nn.Sequential:
        model = two_layers()
        if dist.get_rank() == 1:
            torch.nn.init.zeros_(model[0].weight)
        return model

    selftest._two_layers = shifted
    return probe_group()


def test_broken_groups_are_found(tmp_path: Path) -> None:
    assert not run(2, tmp_path / "sums", _group_whose_sums_are_lost).sum_is_right
    assert run(2, tmp_path / "fsdp", _group_whose_second_rank_starts_elsewhere).fsdp_error > 1e-3
