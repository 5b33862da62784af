"""The notice to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM's notice). No torch, so that it can be heard at once."""

import os
import signal
import time

EXIT_STOPPED = 75  # the run was asked to stop, saved, and can go on: start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_NOTICE_S = 3.0  # a launcher passes a Ctrl-C that its workers got too: the echo is not a second signal


class StopNotice:
    """`requested` turns true at the first signal; a second one ends the process at once. A context manager.

    Once the context is left in good order, what is asked for is done: later signals are ignored, so that a launcher that
    tidies up does not change the exit code.
    """

    def __init__(self):
        self.requested = False
        self.first_at = 0.0

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if self.requested and error is None else handler)

    def _receive(self, number, frame):
        now = time.monotonic()
        if not self.requested:
            self.requested, self.first_at = True, now
        elif "RANK" not in os.environ or now - self.first_at > SAME_NOTICE_S:
            os._exit(128 + number)
