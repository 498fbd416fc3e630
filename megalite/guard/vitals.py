"""What a rank is doing, and whether it was asked to stop: the loop's one line to the guard."""

from megalite.guard.goodput import GoodputClock
from megalite.guard.heartbeat import Heartbeat
from megalite.guard.signals import StopSignals


class Vitals:
    """Handed to the trainer; a call costs a microsecond, but for `mark`."""

    def __init__(self, clock: GoodputClock, signals: StopSignals, heartbeat: Heartbeat | None):
        """The parts, of this process; without a heartbeat nobody watches it."""
        self.clock, self._signals, self._heartbeat = clock, signals, heartbeat

    def enter(self, section: str, detail: str = "", step: int | None = None) -> None:
        """The rank turns to `section` (of `goodput.SECTIONS`), for `step` if that is another one now.

        All ranks enter the same sections in the same order, and a long one once more for each of its parts.
        """
        self.clock.enter(section)
        if self._heartbeat:
            self._heartbeat.enter(f"{section}: {detail}" if detail else section, step)

    def begin(self, step: int) -> None:
        """The run goes on from `step`."""
        self.clock.begin(step)

    def mark(self, step: int, saved_step: int = 0) -> None:
        """The run stands at `step`; the last that this process saved is `saved_step`, 0 for none."""
        self.clock.mark(step, saved_step)

    @property
    def stop_signal(self) -> str | None:
        """The name of the signal that asks this rank to stop, if any."""
        return self._signals.received
