"""A trace of a few steps, where `train.profile` asks for one."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from ray_dwm.config import RunConfig
from ray_dwm.engine.mesh import is_main


class StepProfiler:
    """Writes profile/steps-A-B.json.gz of rank 0 into the run folder, for Perfetto (ui.perfetto.dev) or Chrome."""

    def __init__(self, config: RunConfig) -> None:
        train = config.train
        self._first, self._stop = train.profile_first, train.profile_first + train.profile_steps
        self._wanted = train.profile and is_main()
        self._folder = config.run_dir / "profile"
        self._running: profile | None = None
        self._last = 0

    def before(self, step: int) -> None:
        """Start or end before LM step `step` (from 0)."""
        if step == self._stop:
            self.close()
        if self._wanted and step == self._first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=activities, profile_memory=True, record_shapes=True)
            self._running.start()
        self._last = step

    def close(self) -> None:
        """Write what has been traced, if anything."""
        if self._running is None:
            return
        self._running.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps-{self._first:09d}-{self._last:09d}.json.gz"
        self._running.export_chrome_trace(str(path))
        self._running = None
