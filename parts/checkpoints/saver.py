"""When a run of training is saved, and when it stops."""

import time
from pathlib import Path

from torch import nn

from parts.checkpoints.lock import Lock
from parts.checkpoints.run_log import RunLog
from parts.checkpoints.state import TrainingState, save_training
from parts.cli import Interrupted, StopRequest
from parts.distributed import DistributedEnv, all_reduce, reshard

SIGNAL_SAVE_SECONDS = 600  # seconds after which a state is saved where no number of steps was asked for


class Saver:
    """Every rank has one and calls the same methods. What is saved is `state` as it is at that moment; its progress has
    stage, step, global_step and the sizes of both logs.

    `folder` is where states lie; `every`: steps between them; `lock`: of the first rank, on the folder of the run.
    """

    def __init__(
        self,
        folder: Path,
        every: int | None,
        ranks: DistributedEnv,
        model: nn.Module,
        state: TrainingState,
        log: RunLog,
        stop: StopRequest,
        lock: Lock | None,
    ):
        self.folder, self.every, self.ranks, self.model = folder, every, ranks, model
        self.state, self.log, self.stop, self.lock = state, log, stop, lock
        self.last_saved = time.monotonic()

    def save(self) -> None:
        """In this order: the lock is still ours; the logs are on disk; all of the state is on disk; it takes its name;
        the oldest state goes (the last three in `save_state`). Killed in between, the next start cuts the logs back to
        the newest state that has a name."""
        reshard(self.model)
        if self.lock:
            self.lock.check()
        progress = self.state.progress
        progress.metrics_size, progress.order_size = self.log.sync()
        save_training(self.folder, f"{progress.stage:03}-{progress.step:08}", self.ranks, self.state)
        self.last_saved = time.monotonic()

    def safe_point(self, after_step: bool = False) -> None:
        """Here the work can be left: save when the time (`after_step`: or the step) has come; when any rank was told
        to stop, save and raise Interrupted."""
        late = self.every is None and time.monotonic() - self.last_saved > SIGNAL_SAVE_SECONDS
        stop, due = all_reduce([self.stop.asked, late])
        if stop or due or (after_step and self.every and self.state.progress.global_step % self.every == 0):
            self.save()
        if stop:
            raise Interrupted(f"state saved in {self.folder}; the same command goes on")
