"""Whole plans: what is assumed, totals by hand, the search's promises, and errors at the console."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from ray_dwm.cli import main
from ray_dwm.config import load
from ray_dwm.core.costs import Speed
from ray_dwm.core.hardware import gpu
from ray_dwm.errors import ResourceError
from ray_dwm.models.presets import llama
from ray_dwm.planning.estimate import USABLE, Estimate, estimate
from ray_dwm.planning.inputs import job
from ray_dwm.planning.plan import plan
from ray_dwm.planning.search import candidates, overrides, search
from ray_dwm.planning.utilisation import default_mfu

OVERRIDES = [
    "lm.preset=1.3b",
    "prepare.seq_len=2048",
    "train.steps=28611",
    "train.global_batch=512",
    "train.micro_batch=8",
    "train.precision=bf16",
    "bilevel.target_batch=64",
    "cluster.workers=64",
    "cluster.gpus_per_worker=1",
]
FLOPS = 6 * (1_345_423_360 - 32_000 * 2048) + 12 * 24 * 2048 * 2048


def configured(*words: str) -> Estimate:
    """The configured layout on H100s, with some overrides more."""
    found = plan(load([], [*OVERRIDES, *words]), "h100").configured
    assert found is not None
    return found


def console(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """(exit code, what it printed, what it complained of) of `ray-dwm plan`."""
    monkeypatch.setattr(sys, "argv", ["ray-dwm", "plan", *OVERRIDES, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_gpu_hours_of_30_billion_tokens_by_hand() -> None:
    """Uniform weights, all communication but the ends hidden: 30e9 tokens of 8.89 GFLOPs at 40 % of 989.5 TFLOP/s."""
    config = load([], [*OVERRIDES, "weighting.method=uniform"])
    found = plan(config, "h100", mfu=0.4, price=2.0)
    tokens = 28_611 * 512 * 2048
    by_hand = tokens * FLOPS / (0.4 * 989.5e12) / 3600
    assert by_hand == pytest.approx(187.1, abs=0.2)
    best = found.best
    assert best.gpu_hours == pytest.approx(by_hand, rel=0.02)
    assert best.gpu_hours > by_hand
    assert best.hours == pytest.approx(best.gpu_hours / 64)
    assert best.tokens_per_s == pytest.approx(tokens / best.hours / 3600)
    assert best.mfu == pytest.approx(0.4 * by_hand / best.gpu_hours)
    assert best.overhead == 0


def test_the_overhead_is_a_visit_over_n_steps() -> None:
    often, seldom = (configured(f"bilevel.every={n}") for n in (5, 20))
    assert often.visit is not None
    assert often.visit == seldom.visit
    # 64 target sequences beside a batch of 512: an eighth of a step's compute, and communication that it cannot hide.
    assert often.visit.target_gradient > often.step.compute / 8
    assert often.overhead == pytest.approx((often.weigh + often.visit.total / 5) / often.step.total)
    assert seldom.overhead == pytest.approx((often.weigh + often.visit.total / 20) / often.step.total)


def test_stages_are_visits_in_the_mean() -> None:
    """Five stages of 30 updates in 28,611 steps: every 190.74th."""
    assert configured("bilevel.stages=5", "bilevel.stage_updates=30").every == pytest.approx(28_611 / 150)


def test_a_budget_chooses_how_often() -> None:
    """64 workers have a target sequence each, so that a smaller target batch saves nothing: N makes up for it."""
    found = configured("bilevel.every=0", "bilevel.max_overhead=0.02")
    assert found.every > 5
    assert found.target_batch <= 64
    assert 0.75 * 0.02 <= found.overhead <= 0.02


@pytest.mark.parametrize(
    ("gpu_name", "preset", "compiled", "expected"),
    [
        ("h100", "1.3b", True, 0.39),
        ("h100", "7b", False, 0.33),
        ("a100", "13b", True, 0.54),
        ("h100", "370m", True, 0.8 * 0.39),
    ],
)
def test_the_mfu_that_is_assumed_is_a_published_one(
    gpu_name: str, preset: str, compiled: bool, expected: float
) -> None:
    value, source = default_mfu(gpu_name, llama(preset, 32_000), compiled, bf16=True)
    assert value == pytest.approx(expected)
    assert "torchtitan" in source


def test_what_nobody_says_is_assumed_and_named(shards: dict[str, Path]) -> None:
    nothing = job(load([], ["lm.preset=tiny"]))
    assert (nothing.llama.vocab, nothing.seq_len) == (32_000, 2048)
    assert len(nothing.assumed) == 2
    told = job(load([], ["lm.preset=tiny", "lm.seq_len=128"]), vocab=500)
    assert (told.llama.vocab, told.seq_len, told.assumed) == (500, 128, ())
    read = job(load([], ["lm.preset=tiny", f"data.train={shards['train']}"]), vocab=500)
    assert (read.llama.vocab, read.seq_len, read.assumed) == (64, 16, ())


@pytest.mark.parametrize("preset", ["370m", "1.3b", "7b"])
def test_the_best_fits_and_no_other_that_fits_is_faster(preset: str) -> None:
    wanted = job(load([], [*OVERRIDES, f"lm.preset={preset}"]))
    speed = Speed(gpu=gpu("a100-40g"), bf16=True, mfu=0.4)
    best = search(wanted, speed).best
    assert best is not None
    assert best.needed <= USABLE * 39.39 * 2**30
    tried = [estimate(x, speed) for x in candidates(wanted, offload=False)]
    assert len({overrides(x) for x in tried}) == len(tried) > 100
    assert all(x.step_seconds >= best.step_seconds / 1.005 for x in tried if x.fits)
    # What it says can be pasted, and then is what is configured.
    pasted = job(load([], [*OVERRIDES, f"lm.preset={preset}", *overrides(best).split()]))
    assert estimate(pasted, speed) == dataclasses.replace(best, job=pasted)


def test_offloading_is_the_last_resort() -> None:
    few = [*OVERRIDES, "lm.preset=13b", "cluster.workers=2", "train.global_batch=16", "bilevel.target_batch=8"]
    with pytest.raises(ResourceError, match=r"weighting\.method=uniform with parallel\.cpu_offload=true"):
        plan(load([], few), "h100")
    alone = plan(load([], [*few, "weighting.method=uniform"]), "h100").best
    assert alone.job.config.parallel.cpu_offload
    assert alone.step.transfer > 0
    roomy = plan(load([], [*few, "weighting.method=uniform", "cluster.workers=8"]), "h100").best
    assert not roomy.job.config.parallel.cpu_offload


def test_what_does_not_fit_is_told_with_what_would() -> None:
    config = load([], [*OVERRIDES, "lm.preset=70b", "cluster.workers=32"])
    with pytest.raises(ResourceError) as told:
        plan(config, "h100")
    text = str(told.value)
    assert "\n" not in text
    lean = search(job(config), Speed(gpu=gpu("h100"), bf16=True, mfu=0.33)).leanest
    assert f"{lean.needed / 2**30:.1f} GiB" in text
    assert f"{-lean.room / 2**30:.1f} GiB more" in text
    remedy = text.split("these would do: ")[1].split(", ")
    assert remedy[:2] == ["64 GPUs", "--gpu b200"]
    more = [*OVERRIDES, "lm.preset=70b", "cluster.workers=64"]
    assert plan(load([], more), "h100").best.fits
    assert plan(config, "b200").best.fits


def test_the_console_prints_a_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = console(capsys, monkeypatch, "--gpus", "32", "--price", "2", "--vocab", "50000")
    assert (code, err) == (0, "")
    labels = ("a step takes, ms", "a bi-level step takes more, ms", "a GPU sends in a mean step, GB (ms)", "bases")
    for words in (
        "32 h100",
        "MFU assumed: 33.0%",
        "all-reduce",
        "GPU-hours",
        "cost",
        "parallel.shard=",
        "GiB",
        *labels,
    ):
        assert words in out, words
    assert "vocabulary" not in out


def test_the_console_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = console(capsys, monkeypatch, "--gpu", "H200", "--mfu", "0.5", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["gpus"], found["gpu"], found["mfu_assumed"], found["parameters"]) == (64, "h200", 0.5, 1_345_423_360)
    best = found["best"]
    assert best["fits"]
    parts = dict(best["memory_bytes"])
    needed, _ = parts.pop("needed"), parts.pop("room")
    assert sum(parts.values()) == pytest.approx(needed)
    assert best["cost"] is None


WRONG = {
    "an unknown GPU": (["--gpu", "v100"], "it must be one of a100-40g, a100, h100,"),
    "an unknown preset": (["lm.preset=9b"], "lm.preset is '9b'"),
    "a mesh that does not divide": (["parallel.shard=7"], "parallel.shard is 7, which does not divide"),
    "an LM that does not fit": (["lm.preset=70b", "--gpus", "32"], "70b does not fit 32 h100"),
    "more GPUs than sequences": (["--gpus", "1024"], "cluster.workers is 1024, train.global_batch 512"),
    "no GPUs": (["--gpus", "0"], "--gpus is 0: it must be a whole number from 1 to "),
    "a part of a GPU": (["--gpus", "1.5"], "--gpus is 1.5: it must be a whole number"),
    "no number": (["--gpus", "many"], "leave it out for as many as cluster.workers"),
    "an MFU above 1": (["--mfu", "39"], "--mfu is 39: it must be a number above 0 and at most 1; leave it out for"),
    "an MFU of 0": (["--mfu", "0"], "--mfu is 0: "),
    "an MFU that is none": (["--mfu", "nan"], "--mfu is nan: "),
    "an endless price": (["--price", "inf"], "--price is inf: it must be a number above 0; leave it out for no cost"),
    "a negative price": (["--price=-2"], "--price is -2: "),
    "a vocabulary of one word": (["--vocab", "1"], "--vocab is 1: it must be a whole number from 2 to 2147483647"),
    "no network": (["--network-gbps", "0"], "--network-gbps is 0: it must be a number above 0"),
    "an endless network": (["--network-gbps", "inf"], "--network-gbps is inf: "),
    "a host without memory": (["--host-memory-gb", "-1"], "--host-memory-gb is -1: "),
    "no steps": (["train.steps=0"], "train.steps is 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, expected = WRONG[name]
    code, out, err = console(capsys, monkeypatch, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1
