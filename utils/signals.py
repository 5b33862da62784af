"""The notice to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM's notice)."""

import os
import signal
import time

from utils import distributed

EXIT_STOPPED = 75  # the run was asked to stop, saved, and can go on: start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_NOTICE_S = 3.0  # a launcher passes a Ctrl-C that its workers got too: the echo is not a second signal


class StopNotice:
    """`requested` turns true at the first signal; a second one ends the process at once. A context manager."""

    def __init__(self):
        self.requested = False
        self.first_at = 0.0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        now = time.monotonic()
        if not self.requested:
            self.requested, self.first_at = True, now
        elif not distributed.launched() or now - self.first_at > SAME_NOTICE_S:
            os._exit(128 + number)
