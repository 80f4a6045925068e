"""A sweep's study in Optuna's storage: compared with the sweep, filled with what is known before, continued, read back.

The storage is what a sweep is continued from: nothing that Tune has pickled is ever read.
"""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from ray_dwm.analysis.tuning import Trial, done, finished
from ray_dwm.config import RunConfig, to_dict
from ray_dwm.config.building import dotted
from ray_dwm.config.space import Domain, described
from ray_dwm.config.tune import CONTROLS, TuneConfig, default_of
from ray_dwm.data.records import read_json
from ray_dwm.engine.rundir import is_free
from ray_dwm.errors import ConfigError, TrainingError, UserError

TRIALS = "trials"
"""Folder of the trials' run folders."""
_FOLDER, _CONTROL, _BARE, _MADE_FOR = "folder", "control", "bare", "ray_dwm"
_BUSY_S = 10
"""How long SQLite waits for another process that writes, as optuna-dashboard may."""
_FEWEST = 4
"""Trials from which an importance is estimated."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Suggest:
    """Asks a study for a trial's values: what OptunaSearch calls a define-by-run space."""

    space: dict[str, Domain]

    def __call__(self, trial: Any) -> dict[str, Any]:
        """A trial of Optuna's, behind a wrapper that notes what is suggested; what is returned comes on top."""
        attributes = trial.user_attrs
        if _FOLDER not in attributes:
            trial.set_user_attr(_FOLDER, _folder_name(trial))
        for key, domain in () if attributes.get(_BARE) else self.space.items():
            if domain.kind == "choice":
                trial.suggest_categorical(key, domain.choices)
            elif domain.kind == "int":
                step = int(domain.step) or 1
                trial.suggest_int(key, int(domain.low), int(domain.high), step=step, log=domain.log)
            else:
                trial.suggest_float(key, domain.low, domain.high, step=domain.step or None, log=domain.log)
        return {_FOLDER: attributes.get(_FOLDER, _folder_name(trial)), _CONTROL: attributes.get(_CONTROL, "")}


def _folder_name(trial: Any) -> str:
    return str(trial.user_attrs.get(_FOLDER, f"{trial.number:04d}"))


def url_of(config: TuneConfig) -> str:
    """Where the study is kept."""
    return config.study or f"sqlite:///{config.folder / 'study.db'}"


@contextmanager
def _named(config: TuneConfig) -> Iterator[None]:
    """Turn what databases raise into one line, which does not show a password."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.OptunaError, ImportError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())
        raise UserError(
            f"study storage {_shown(config)} cannot be used ({reason}): wait for whoever holds it, mend it, or name "
            "another with study=URL"
        ) from None


@contextmanager
def in_use(config: TuneConfig) -> Iterator[None]:
    """The same while the sweep goes on.

    Raises:
        TrainingError: the storage is gone or full; the same command continues.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise TrainingError(
            f"sweep {config.name}: study storage {_shown(config)} failed ({reason}): the same command continues"
        ) from None


def _shown(config: TuneConfig) -> str:
    try:
        return make_url(url_of(config)).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return repr(config.study)


def check_study(config: TuneConfig, base: RunConfig) -> None:
    """Make sure that the storage can be written, and that a study of this name in it is this sweep's; changes nothing.

    Raises:
        UserError: it cannot.
        ConfigError: the study was made for something else, naming the difference.
    """
    with _named(config):
        url = make_url(url_of(config))
        if url.get_backend_name() == "sqlite":
            if url.database in (None, "", ":memory:"):
                raise sqlite3.OperationalError("it is in memory, and would be forgotten")
            path = Path(url.database)
            if not path.exists():
                if config.study and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
                    raise sqlite3.OperationalError("unable to open database file")
                return  # in the sweep's folder, which is looked at as all run folders are
            with closing(sqlite3.connect(path, timeout=2, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
        storage = _storage(config)
        if config.name in optuna.get_all_study_names(storage):
            _compare(config, base, optuna.load_study(study_name=config.name, storage=storage))


def _storage(config: TuneConfig) -> optuna.storages.RDBStorage:
    url = url_of(config)
    sqlite = make_url(url).get_backend_name() == "sqlite"
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _BUSY_S}} if sqlite else {})


def open_study(config: TuneConfig, base: RunConfig) -> optuna.Study:
    """The sweep's study, made where there is none, with all trials waiting that are known before or were interrupted.

    Raises:
        UserError, ConfigError: see check_study.
    """
    with _named(config):
        directions = ["minimize"] * len(config.objectives)
        study = optuna.create_study(
            storage=_storage(config), study_name=config.name, directions=directions, load_if_exists=True
        )
        if _MADE_FOR in study.user_attrs:
            _compare(config, base, study)
        else:
            study.set_user_attr(_MADE_FOR, _made_for(config, base))
            with warnings.catch_warnings():  # experimental, and for the dashboard's eyes alone
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(config.objectives))
        _enqueue_known(config, base, study)
        _enqueue_interrupted(study)
    return study


def _made_for(config: TuneConfig, base: RunConfig) -> dict[str, dict[str, str]]:
    """What must be the same for a study to be continued, as text."""
    own = {key: str(value) for key, value in dotted(to_dict(base)).items() if not is_free(key, base) and key != "name"}
    aims = {"measure": config.measure, "objectives": ", ".join(config.objectives)}
    # Sweeps of other folders may share a database and have the same name: their trials' runs are not here.
    folder = {"storage": str(config.folder)} if config.study else {}
    space = {key: described(domain) for key, domain in config.space.items()}
    return {"metric": aims, "space": space, "folder": folder, "configuration": own}


def _compare(config: TuneConfig, base: RunConfig, study: optuna.Study) -> None:
    there, here = study.user_attrs.get(_MADE_FOR, {}), _made_for(config, base)
    for kind, values in here.items():
        before = there.get(kind, {})
        for key in sorted(values.keys() | before.keys()):
            if values.get(key) != before.get(key):
                raise ConfigError(
                    f"study {config.name} in {_shown(config)} was made for another {kind}: {key} was "
                    f"{before.get(key, 'not there')}, now it is {values.get(key, 'not there')}: choose another name=..."
                )


def _enqueue_known(config: TuneConfig, base: RunConfig, study: optuna.Study) -> None:
    there = {_folder_name(trial) for trial in study.get_trials(deepcopy=False)}
    defaults = {key: default_of(base, key, domain) for key, domain in config.space.items()}
    known: dict[str, dict[str, Any]] = {
        "defaults": {} if None in defaults.values() else defaults,
        "uniform": {},
    }
    for number, point in enumerate(config.points, start=1):
        known[f"point-{number}"] = {key: domain.read(point[key]) for key, domain in config.space.items()}
    for name, params in known.items():
        if name not in there:
            control = name if name in CONTROLS else ""
            study.enqueue_trial(params, user_attrs={_FOLDER: name, _CONTROL: control, _BARE: not params})


def _enqueue_interrupted(study: optuna.Study) -> None:
    """What was running when a driver ended is tried again, in its own folder, where it continues."""
    trials = study.get_trials(deepcopy=False)
    newest = {_folder_name(trial): trial.number for trial in trials}
    for trial in trials:
        if trial.state == TrialState.RUNNING or (trial.state == TrialState.PRUNED and trial.values is None):
            name = _folder_name(trial)
            if newest[name] == trial.number:
                study.enqueue_trial(trial.params, user_attrs={**trial.user_attrs, _FOLDER: name})
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)


def searcher(config: TuneConfig, study: optuna.Study) -> OptunaSearch:
    """What Tune asks for the next trial. The same state of the study gives the same suggestions."""
    seed = config.seed + len(study.get_trials(deepcopy=False))
    sampler: optuna.samplers.BaseSampler
    if config.sampler == "grid":
        points = {key: domain.points for key, domain in config.space.items()}
        sampler = optuna.samplers.GridSampler(points, seed=config.seed)  # its order must not change
    elif config.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        # Independent: controls without values would leave a multivariate one nothing in common.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=config.startup, multivariate=False)
    return OptunaSearch(
        Suggest(dict(config.space)),
        metric=list(config.objectives),
        mode=["min"] * len(config.objectives),
        sampler=sampler,
        study_name=config.name,
        storage=_storage(config),
    )


def history(config: TuneConfig, study: optuna.Study) -> list[Trial]:
    """All trials, in the order in which they were first asked for; of those that were tried again, the last try."""
    latest: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        latest[_folder_name(trial)] = trial
    return [_trial(config, name, trial) for name, trial in latest.items()]


def _trial(config: TuneConfig, name: str, trial: FrozenTrial) -> Trial:
    values = dict(trial.params or trial.system_attrs.get("fixed_params", {}))
    own: dict[str, Any] = {"id": name, "control": trial.user_attrs.get(_CONTROL, ""), "values": values}
    if trial.state == TrialState.FAIL:
        record = config.folder / TRIALS / f"{name}.json"
        reason = read_json(record)["reason"] if record.is_file() else "its driver ended, see Ray's logs"
        return Trial(**own, state="failed", reason=reason)
    if trial.state == TrialState.COMPLETE:
        summary = config.folder / TRIALS / name / "summary.json"
        if summary.is_file():
            found = read_json(summary)
            loss, overhead = found["final"][f"val/{config.measure}/loss"], found["overhead_frac"]
            return Trial(**own, state="done", loss=loss, overhead=overhead)
        figures = dict(zip(config.objectives, trial.values, strict=True))
        return Trial(**own, state="ended early", loss=figures.get("loss"), overhead=figures.get("overhead"))
    return Trial(**own, state="waiting" if trial.state == TrialState.WAITING else "begun")


def left(config: TuneConfig, trials: list[Trial]) -> int:
    """Trials that are still to be run."""
    return max(0, config.total - len(finished(trials)))


def importances(config: TuneConfig, trials: list[Trial]) -> dict[str, dict[str, float]]:
    """Loss and overhead -> key -> its share of what the space explains of it, by fANOVA (Hutter et al. 2014).

    Empty where fewer than four trials with values were trained to their end, or where all of them are alike.
    """
    full = [trial for trial in done(trials) if trial.values.keys() == config.space.keys()]
    found: dict[str, dict[str, float]] = {}
    for figure in ("loss", "overhead") if len(full) >= _FEWEST else ():
        study = optuna.create_study()
        for trial in full:
            value = float(getattr(trial, figure))
            spaces = {key: distribution(domain) for key, domain in config.space.items()}
            study.add_trial(optuna.trial.create_trial(params=trial.values, distributions=spaces, value=value))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=config.seed)
        try:
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(config.space))
        except RuntimeError:  # no variance at all
            continue
        found[figure] = {key: float(share) for key, share in shares.items()}
    return found


def distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """A domain as Optuna has it."""
    if domain.kind == "choice":
        return optuna.distributions.CategoricalDistribution(domain.choices)
    if domain.kind == "int":
        step = int(domain.step) or 1
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), domain.log, step)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, domain.log, domain.step or None)
