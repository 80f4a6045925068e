"""No two lines of a figure look alike, and what belongs together shows it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from ray_dwm.analysis import figures
from ray_dwm.analysis.figures import Line, curves
from ray_dwm.analysis.line_styles import LineStyle, dashes, line_styles, method_styles, run_styles
from ray_dwm.analysis.statistics import interval
from ray_dwm.analysis.theme import INK, NEUTRAL, PALETTE
from ray_dwm.config.experiment import ExperimentConfig, MethodConfig, load_experiment

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("random", "dsir", "dsdm", "mates", "doremi", "classifier", "perplexity", "short-first", "like-first", "dwm")


def declared(**against: tuple[str, ...]) -> ExperimentConfig:
    """Methods, the first of which is the baseline, with what they are against."""
    methods = {name.replace("_", "-"): MethodConfig(against=others) for name, others in against.items()}
    return ExperimentConfig(name="x", methods=methods, baseline=next(iter(methods)), nulls=False)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_no_two_methods_look_alike(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(file)
    styles = method_styles(experiment)
    assert styles.keys() == experiment.methods.keys()
    assert len({(style.colour, str(style.dashes)) for style in styles.values()}) == len(styles)


def test_a_method_alone_is_solid_and_under_a_dwm_dashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    styles = method_styles(load_experiment(ROOT / "configs/experiments/main.yaml"))
    for name in ALONE:
        assert styles[name].colour == styles[f"{name}-dwm"].colour
        assert (styles[name].dashes, styles[f"{name}-dwm"].dashes) == (dashes(0), dashes(1))
    places = list(styles)
    assert all(places.index(f"{name}-dwm") == places.index(name) + 1 for name in ALONE)  # in the legend
    assert styles["random"].colour == INK
    assert {styles[name].colour for name in ("null-shuffled", "null-random")} == {NEUTRAL}


def test_chains_and_who_comes_second() -> None:
    experiment = declared(base=(), a=("base",), b=("a",), c=("base", "d"), d=(), e=("d", "base"))
    assert method_styles(experiment) == {
        "base": LineStyle(INK, "-"),
        "a": LineStyle(INK, dashes(1)),
        "b": LineStyle(PALETTE[0], "-"),  # against one that is dashed itself
        "c": LineStyle(PALETTE[1], "-"),  # the second that is against base
        "d": LineStyle(PALETTE[2], "-"),
        "e": LineStyle(PALETTE[2], dashes(1)),
    }


def test_more_lines_than_colours() -> None:
    assert len({(colour, str(of)) for colour, of in line_styles(45)}) == 45
    assert run_styles([False, True, True, False]) == [
        LineStyle(NEUTRAL, "-"),
        LineStyle(PALETTE[0], "-"),
        LineStyle(PALETTE[1], "-"),
        LineStyle(NEUTRAL, dashes(1)),
    ]
    alone = {f"m{n}": () for n in range(25)}
    added = {f"m{n}_dwm": (f"m{n}",) for n in range(25)}
    styles = method_styles(declared(base=(), **alone, **added))
    assert len({(colour, str(of)) for colour, of in styles.values()}) == 51


@pytest.mark.parametrize(
    ("times", "scale"),
    [
        ([[5.0, 10.0], [20.0, 50.0]], "linear"),
        ([[5.0, 10.0], [20.0, 51.0]], "log"),
        ([[0.0, 10.0], [20.0, 51.0]], "linear"),  # 0 has no logarithm
        ([], "linear"),
    ],
)
def test_time_is_logarithmic_where_methods_are_far_apart(times: list[list[float]], scale: str) -> None:
    lines = [Line("", LineStyle(INK, "-"), x, [interval([1.0])] * len(x)) for x in times]
    drawn, axes = plt.subplots()
    figures._log_where_far_apart(axes, lines)
    assert axes.get_xscale() == scale
    plt.close(drawn)


def test_long_names_have_a_line_of_the_legend_each() -> None:
    """Two beside each other would be cut off at the figure's sides."""
    short, long = (
        curves(
            [Line(f"{name} {n}", style, [1.0, 2.0], [interval([1.0])] * 2) for n, style in enumerate(line_styles(8))],
            "tokens",
        )
        for name in ("name", "curriculum, like the target first")
    )
    height = [float(svg.partition('height="')[2].partition("pt")[0]) for svg in (short, long)]
    assert height[1] - height[0] == pytest.approx(4 * 0.2 * 72, abs=0.1)
