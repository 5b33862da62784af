"""One job per experiment folder: a lock file with host, process and a heartbeat."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from utils.cli import UserError

HEARTBEAT_S = 15.0
SILENCE_S = 60.0  # a lock of another host that is not touched for this long belongs to a dead job


class RunLock:
    """Holds `folder`/run.lock until `release`, which rank 0 of a run calls at its end.

    A dead owner's lock is taken over: on this host its process is gone; on another host the file's time stands still.
    Raises ValueError naming the owner if another job is alive in the folder.
    """

    def __init__(self, folder, silence_s=SILENCE_S):
        self.path = Path(folder) / "run.lock"
        self.silence_s = silence_s
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}
        with _one_at_a_time(folder):
            while not self._create():
                self._remove_if_dead()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self.thread.start()

    def _create(self):
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as stream:
            json.dump(self.owner, stream)
        return True

    def _remove_if_dead(self):
        owner = self._read()
        if owner is None:
            time.sleep(1.0)  # its writer may be between creating and filling it
            owner = self._read()
        if owner is not None and self._alive(owner):
            raise UserError(f"{self.path.parent} is in use by process {owner['pid']} on {owner['host']}; "
                            f"stop that job first, or give this one another log.exp_name")
        self.path.unlink(missing_ok=True)

    def _read(self):
        """The owner as written, or None when the file is gone or was cut short by a crash."""
        try:
            owner = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return owner if isinstance(owner, dict) and owner.keys() == self.owner.keys() else None

    def _alive(self, owner):
        if owner["host"] == self.owner["host"]:
            started = _process_start(owner["pid"])
            return started is not None and started == owner["started"]
        touched, deadline = self._touched(), time.monotonic() + self.silence_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.silence_s / 10))
            if self._touched() != touched:
                return True
        return False

    def _touched(self):
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _beat(self):
        while not self.stop.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except OSError:
                pass  # a disk that is away for a moment; the next beat tries again

    def release(self):
        self.stop.set()
        self.thread.join()
        if self._read() == self.owner:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(folder):
    """Keep other processes of this host from taking over the same dead lock at the same moment."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no flock: creating the file is still exclusive
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # also lets go of the flock


def _process_start(pid):
    """Start time of a process in clock ticks since boot, or None if it is not running (a number used again has another time)."""
    if not Path("/proc/self/stat").exists():  # not Linux: only whether it lives
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return "unknown"
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] == "Z" else after_name[19]
