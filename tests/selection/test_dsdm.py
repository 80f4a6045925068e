"""DsDm: its formula by hand and by the published package, planted rows found, and the effect of leaving rows out."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lms import tiny_lm
from local import sweep, task
from numpy.typing import NDArray
from synthetic import make_shards
from texts import planted
from torch import Tensor, nn
from torch.func import functional_call

from ray_dwm.config.selection import DsdmConfig
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import ConfigError, DataError
from ray_dwm.selection import dsdm
from ray_dwm.selection.choose import highest
from ray_dwm.selection.gradients import PROJECTIONS, losses
from ray_dwm.selection.projection import project
from ray_dwm.selection.scores import Keyed, gather

OPTIONS = {"features": 256}


def spearman(x: NDArray[Any], y: NDArray[Any]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 2048}, "selection.dsdm.features is 2048: factored needs a square number, as 4096"),
        ({"features": 100, "projection": "dense"}, "selection.dsdm.features is 100: dense needs a multiple of 64"),
        ({"damping": 0.0}, "selection.dsdm.damping is 0.0: it must be greater than 0"),
        ({"kernel_rows": 9}, "selection.dsdm.kernel_rows is 9: use at least 100"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DsdmConfig(**options)


@pytest.mark.parametrize("sizes", [[5], [1] * 7, [3, 0, 2, 2], [4, 4, 1]])
def test_the_second_moment_is_of_all_rows_however_they_come(sizes: list[int]) -> None:
    features = np.random.default_rng(0).normal(size=(sum(sizes), 4)).astype(np.float32)
    parts = np.split(features, np.cumsum(sizes)[:-1])
    moment, rows = dsdm.second_moment(parts, 4)
    assert rows == len(features)
    np.testing.assert_allclose(moment, np.einsum("ni,nj->ij", features, features, dtype=np.float64) / rows, rtol=1e-5)


def test_direction_by_hand() -> None:
    """(diag(3, 1) + 0.5 * 2)^-1 (8, 6) = (2, 3); of one row's kernel, diag(4, 0), the mean eigenvalue is 4."""
    assert dsdm.solve(np.diag([3.0, 1.0]), 100, np.array([8.0, 6.0]), 0.5).tolist() == [2.0, 3.0]
    assert dsdm.solve(np.diag([4.0, 0.0]), 1, np.array([12.0, 6.0]), 0.5).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_diverged_proxy_is_named(bad: float) -> None:
    with pytest.raises(DataError, match="gradients of proxy LM p/hf are not finite, or all 0: it has div") as raised:
        dsdm.solve(np.full((2, 2), bad), 5, np.ones(2), 0.1, "p/hf")
    assert "\n" not in str(raised.value)


def test_scores_follow_the_formula(tmp_path: Path) -> None:
    """Two proxies, two target sets of which one is masked: written out with whole matrices."""
    make_shards(tmp_path / "pool", good=70, noise=60, seed=1)
    make_shards(tmp_path / "a", good=40, noise=0, seed=2)
    make_shards(tmp_path / "b", good=20, noise=20, seed=3, masked=True, counted_from=12)
    proxies = (tmp_path / "lm0", tmp_path / "lm1")
    for seed, folder in enumerate(proxies):
        tiny_lm(seed=seed).save_pretrained(folder)
    job = task(
        tmp_path / "pool", {n: tmp_path / n for n in "ab"}, seed=9, proxies=proxies, dsdm={**OPTIONS, "damping": 0.3}
    )
    found = gather(sweep("", str(tmp_path / "pool"), Keyed(dsdm.prepare(job))), job.pool).scores
    expected = []
    for number, folder in enumerate(proxies):
        look = dsdm.Features(str(folder), job.options.dsdm, 16, 9 + number)
        everything = {n: open_shards(str(tmp_path / n)) for n in ("pool", "a", "b")}
        rows = {n: reader.take(np.arange(reader.manifest.rows)) for n, reader in everything.items()}
        phi = look(rows["pool"]).astype(np.float64)
        kernel = phi.T @ phi / 130
        kernel += 0.3 * np.trace(kernel) / 130 * np.eye(256)
        counted = rows["b"].loss_mask[:, 1:].sum() / 15
        target = (look(rows["a"]).sum(axis=0) / 40 + look(rows["b"]).sum(axis=0) / counted) / 2
        expected.append(phi @ np.linalg.inv(kernel) @ target)
    assert found == pytest.approx(np.mean(expected, axis=0), rel=1e-3, abs=1e-3 * np.ptp(found))
    assert np.ptp(found) > 0.01


def test_kernel_of_a_sample_of_the_rows(tmp_path: Path) -> None:
    make_shards(tmp_path / "pool", good=400, noise=400, seed=1)
    tiny_lm().save_pretrained(tmp_path / "lm")
    look = dsdm.Features(str(tmp_path / "lm"), DsdmConfig(features=64), 16, 0)
    rows = open_shards(str(tmp_path / "pool")).take(np.arange(800))
    found = dsdm.Sampled(look, 0.25, seed=4)(rows)["features"]
    assert 150 < len(found) < 250
    halves = [dsdm.Sampled(look, 0.25, seed=4)(part)["features"] for part in (rows[:333], rows[333:])]
    assert np.concatenate(halves) == pytest.approx(found, abs=1e-5)
    assert len(dsdm.Sampled(look, 1.5, seed=4)(rows)["features"]) == 800


@pytest.mark.parametrize("projection", ["factored", "dense"])
def test_planted_documents_are_found(tmp_path: Path, projection: str) -> None:
    pool, target = planted(tmp_path)
    tiny_lm(trained_on=pool, steps=5, vocab=8192).save_pretrained(tmp_path / "lm")
    job = task(pool, {"target": target}, proxies=(tmp_path / "lm",), dsdm={"features": 64, "projection": projection})
    scored = gather(sweep("", str(pool), Keyed(dsdm.prepare(job))), job.pool)
    assert highest(job, scored, 40).tolist() == list(range(0, 80, 2))


class Bigram(nn.Module):
    """The smallest LM that has an embedding and a head; it can be trained to the end in a tenth of a second."""

    VOCAB, TOKENS, WEIGHT_DECAY = 12, 12, 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(self.VOCAB, 8), nn.Linear(8, self.VOCAB, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Logits."""
        del use_cache
        return SimpleNamespace(logits=self.head(self.tokens(input_ids)))

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats of a prediction."""
        return losses(self(rows).logits, rows, all_count(rows)).mean()

    def fit(self, rows: Tensor, steps: int) -> None:
        """Minimise loss and weight decay over all rows."""
        options = {"max_iter": steps, "tolerance_grad": 1e-7, "tolerance_change": 1e-10}
        optimizer = torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe", **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(rows) + self.WEIGHT_DECAY * sum(p.square().sum() for p in self.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)


def all_count(rows: Tensor) -> Tensor:
    return torch.ones_like(rows[:, 1:], dtype=torch.bool)


def chains(rng: np.random.Generator, groups: int) -> tuple[Tensor, Tensor]:
    """(groups, 10, T) rows of mixed Markov chains, and rows of the target's.

    Each group's chain is a mixture of the target's, of another that all groups have in common, and of its own, so that
    what the LM knows well need not be what the target wants.
    """

    def chain() -> NDArray[np.float64]:
        return rng.dirichlet(np.full(Bigram.VOCAB, 0.3), size=Bigram.VOCAB)

    def draw(matrix: NDArray[np.float64], rows: int) -> list[list[int]]:
        found = []
        for _ in range(rows):
            row = [int(rng.integers(Bigram.VOCAB))]
            while len(row) < Bigram.TOKENS:
                row.append(int(rng.choice(Bigram.VOCAB, p=matrix[row[-1]])))
            found.append(row)
        return found

    wanted, common = chain(), chain()
    pool = []
    for _ in range(groups):
        a, b, c = rng.dirichlet(np.ones(3))
        pool.append(draw(a * wanted + b * common + c * chain(), 10))
    return torch.tensor(pool), torch.tensor(draw(wanted, 60))


@pytest.fixture(scope="module")
def left_out() -> tuple[Bigram, Tensor, Tensor, NDArray[np.float64]]:
    """(LM trained on the whole pool, pool by groups, target rows, rise of the target loss without each group)."""
    torch.manual_seed(0)
    pool, target = chains(np.random.default_rng(0), groups=24)
    model = Bigram().double()
    model.fit(pool.flatten(0, 1), 1000)
    effects = []
    for group in range(len(pool)):
        other = copy.deepcopy(model)
        other.fit(torch.cat([pool[:group], pool[group + 1 :]]).flatten(0, 1), 100)
        effects.append((other.loss(target) - model.loss(target)).item())
    return model.float().requires_grad_(False), pool, target, np.array(effects)


@pytest.mark.parametrize("projection", ["factored", "dense"])
def test_scores_predict_what_leaving_rows_out_does(left_out: Any, projection: str) -> None:
    """By rank; scores dealt out at random would not pass, nor would the rows' losses."""
    model, pool, target, effects = left_out
    rows, function = pool.flatten(0, 1), PROJECTIONS[projection]
    phi, wanted = (function(model, x, all_count(x), 256, 0).double().numpy() for x in (rows, target))
    scores = phi @ dsdm.solve(phi.T @ phi / len(phi), len(phi), wanted.mean(axis=0), DsdmConfig().damping)
    by_group = scores.reshape(len(pool), -1).sum(axis=1)
    bar = 0.85
    assert spearman(by_group, effects) > bar
    rng = np.random.default_rng(0)
    assert max(spearman(rng.permutation(by_group), effects) for _ in range(1000)) < bar - 0.1
    nats = losses(model(rows).logits, rows, all_count(rows)).numpy().reshape(len(pool), -1).sum(axis=1)
    assert spearman(-nats, effects) < bar - 0.1


def test_scores_agree_with_the_published_package(tmp_path: Path) -> None:
    """traker's own loop over the same LM and rows, its kernel and its scores, given our projection of its gradients."""
    trak = pytest.importorskip("trak", reason="traker (extra `oracle`) is not installed")
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import AbstractProjector

    class LogLikelihood(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, ids: Tensor) -> Tensor:
            logits = functional_call(model, (weights, buffers), (ids[None],), {"use_cache": False}).logits
            return -losses(logits, ids[None], all_count(ids[None]))[0]

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            del model, weights, buffers
            return torch.ones(len(batch[0]), 1)

    class Ours(AbstractProjector):
        def __init__(self, k: int, seed: int) -> None:
            self.proj_dim, self.seed, self.proj_type = k, seed, "rademacher"

        def project(self, grads: dict[str, Tensor], model_id: int) -> Tensor:
            del model_id
            return project(grads.values(), self.proj_dim, self.seed)

    make_shards(tmp_path / "pool", good=100, noise=100, seed=1)
    make_shards(tmp_path / "target", good=40, noise=0, seed=2)
    model = tiny_lm(trained_on=tmp_path / "pool", steps=40)
    model.save_pretrained(tmp_path / "lm")
    options = {"features": 128, "projection": "dense"}
    job = task(tmp_path / "pool", {"t": tmp_path / "target"}, seed=6, proxies=(tmp_path / "lm",), dsdm=options)
    ours = gather(sweep("", str(tmp_path / "pool"), Keyed(dsdm.prepare(job))), job.pool).scores

    rows = {
        name: torch.from_numpy(open_shards(str(tmp_path / name)).take(np.arange(n)).input_ids.astype(np.int64))
        for name, n in (("pool", 200), ("target", 40))
    }
    theirs = trak.TRAKer(
        model=model,
        task=LogLikelihood(),
        train_set_size=200,
        save_dir=str(tmp_path / "trak"),
        device="cpu",
        projector=Ours(128, seed=6),
        proj_dim=128,
        use_half_precision=False,
        logging_level="ERROR",
    )
    theirs.load_checkpoint(model.state_dict(), model_id=0)
    theirs.featurize((rows["pool"],), num_samples=200)
    features = torch.from_numpy(np.array(theirs.saver.current_store["grads"]))
    theirs.score_computer.lambda_reg = float(features.square().sum()) / 128
    theirs.finalize_features()
    theirs.start_scoring_checkpoint("t", model.state_dict(), 0, num_targets=40)
    theirs.score((rows["target"],), num_samples=40)
    expected = theirs.finalize_scores("t").mean(axis=1)
    # Theirs are scaled by the mean of the kernel's inverse, which no order depends on.
    assert ours / np.linalg.norm(ours) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-4)
