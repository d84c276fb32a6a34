"""When a training run saves its state, and when it stops."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from parts.checkpoints.lock import Lock
from parts.checkpoints.run_log import RunLog
from parts.checkpoints.state import TrainingState, save_training
from parts.cli import Interrupted, StopRequest
from parts.distributed import DistributedEnv, all_reduce, reshard

SAVE_INTERVAL_SECONDS = 600  # between saved states without --save-every


@dataclass
class Saver:
    """Saves `state` at safe points. Every rank has a Saver and calls the same methods. The state's progress has stage,
    step, global_step and the sizes of both logs."""

    folder: Path  # of the saved states
    every: int | None  # steps between saved states; None: SAVE_INTERVAL_SECONDS
    ranks: DistributedEnv
    model: nn.Module
    state: TrainingState
    log: RunLog
    stop: StopRequest
    lock: Lock | None  # rank 0's, on the folder of the run
    last_saved: float = field(default_factory=time.monotonic)

    def save(self) -> None:
        """Save in this order: check the lock; sync the logs; sync the state; rename it; remove the oldest state (the
        last three in `save_state`). After a kill in between, the next start truncates the logs to the newest renamed
        state."""
        reshard(self.model)
        if self.lock:
            self.lock.check()
        progress = self.state.progress
        progress.metrics_size, progress.order_size = self.log.sync()
        save_training(self.folder, f"{progress.stage:03}-{progress.step:08}", self.ranks, self.state)
        self.last_saved = time.monotonic()

    def any_rank_asked_to_stop(self) -> bool:
        """Whether any rank received a signal; every rank must call it. A measurement, around which the weights may be
        exchanged for others, ends early then; the next safe point saves."""
        return bool(all_reduce([self.stop.asked])[0])

    def stop_point(self) -> None:
        """A point where the run may stop and nothing is saved: shortly after `save`, while the weights may be exchanged
        for others. Raises Interrupted if any rank received a signal."""
        if self.any_rank_asked_to_stop():
            raise Interrupted(self.interruption())

    def safe_point(self, after_step: bool = False) -> None:
        """A point where the state can be saved and the run may stop. Saves if the time (`after_step`: or the step) for
        it has come. If any rank received a signal, saves and raises Interrupted."""
        late = self.every is None and time.monotonic() - self.last_saved > SAVE_INTERVAL_SECONDS
        stop, due = all_reduce([self.stop.asked, late])
        if stop or due or (after_step and self.every and self.state.progress.global_step % self.every == 0):
            self.save()
        if stop:
            raise Interrupted(self.interruption())

    def interruption(self) -> str:
        return f"state saved in {self.folder}; run the same command again to resume"
