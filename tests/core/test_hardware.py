"""Figures of GPUs, and which GPU a driver means."""

from __future__ import annotations

import pytest

from ray_dwm.core.hardware import GPUS, gpu, recognise
from ray_dwm.errors import ConfigError


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B200", "b200"),
        ("Tesla T4", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_drivers_names_are_recognised(driver: str, name: str | None) -> None:
    assert recognise(driver) is (GPUS[name] if name else None)


def test_gpus_are_dense_and_one_way() -> None:
    """Vendors print 1,979 TFLOPS with sparsity and 900 GB/s both ways."""
    assert GPUS["h100"].bf16 == pytest.approx(1979e12 / 2)
    assert GPUS["h100"].link == 900e9 / 2
    assert GPUS["h100-pcie"].bf16 < GPUS["h100"].bf16


@pytest.mark.parametrize(
    ("name", "nominal", "reported"),
    [
        ("a100-40g", 40e9, 39.39),
        ("a100", 80e9, 79.25),
        ("h100", 80e9, 79.11),
        ("h200", 141e9, 139.72),
        ("b200", 180e9, 178.35),
        ("l40s", 48e9, 44.40),
        ("rtx4090", 24e9, 23.52),
    ],
)
def test_memory_is_what_cuda_reports(name: str, nominal: float, reported: float) -> None:
    """GiB, within a twelfth of the 10^9 bytes on the box; ECC takes some of GDDR6."""
    assert GPUS[name].memory == reported * 2**30
    assert abs(GPUS[name].memory / nominal - 1) < 1 / 12
    assert (GPUS[name].memory < nominal) == (name == "l40s")


def test_names_are_read_in_small_and_capital_letters() -> None:
    assert gpu("H100") is gpu("h100") is GPUS["h100"]


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'v100': it must be one of a100-40g, a100, h100, h100-pcie, h200, b200, "):
        gpu("v100")
