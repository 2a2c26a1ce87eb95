"""Ctrl-C and SIGTERM: outside training they end the run at once, inside they wait for a safe point to save at."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from core.training.errors import Interrupted


class Stop:
    """What the signal handlers leave for the loop to see."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferring = False

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        """Remember the signal for the next safe point; a second one does not wait."""
        impatient = self.signum is not None
        self.signum = signum
        if impatient or not self.deferring:
            raise Interrupted(signum)

    def install(self) -> None:
        """Make this the handler (again: Lightning puts its own in front when a fit begins)."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self.handle)

    def check(self) -> None:
        """Raise if a signal came; called where nothing is half done."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handlers are ours inside and as before outside."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
