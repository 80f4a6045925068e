"""Proxy LMs: one that knows nothing is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lms import tiny_lm
from synthetic import make_shards

from ray_dwm.errors import DataError
from ray_dwm.selection.proxy import check_proxy, load_proxy


@pytest.mark.parametrize("spoil", ["untrained", "nan"])
def test_a_proxy_that_knows_nothing_is_refused(tmp_path: Path, spoil: str) -> None:
    make_shards(tmp_path / "pool", good=40, noise=40)
    model = tiny_lm()
    with torch.no_grad():
        model.model.norm.weight.mul_(float("nan") if spoil == "nan" else 5.0)
    model.save_pretrained(tmp_path / "lm")
    with pytest.raises(DataError, match=r"has a loss of (nan|\d+\.\d+) nats .* guessing has 4.159") as raised:
        check_proxy(str(tmp_path / "lm"), str(tmp_path / "pool"), batch=7)
    assert "\n" not in str(raised.value)


def test_a_proxy_that_knows_something_passes(tmp_path: Path) -> None:
    make_shards(tmp_path / "pool", good=40, noise=0)
    tiny_lm(trained_on=tmp_path / "pool", steps=30).save_pretrained(tmp_path / "lm")
    check_proxy(str(tmp_path / "lm"), str(tmp_path / "pool"), batch=16)
    assert load_proxy(str(tmp_path / "lm")) is load_proxy(str(tmp_path / "lm"))
    assert not load_proxy(str(tmp_path / "lm")).training
