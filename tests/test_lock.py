"""One job per folder; a dead owner's lock is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from training import lock
from training.lock import RunLock

HOLDER = """
import sys, time
from training.lock import RunLock
RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_job_is_refused_with_the_owners_name(holder, tmp_path):
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on {socket.gethostname()}; stop that job first"):
        RunLock(tmp_path)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid


def test_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    held = RunLock(tmp_path)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    held.release()
    assert not (tmp_path / "run.lock").exists()


def test_zombie_holds_nothing(holder, tmp_path):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but its parent has not looked yet
    RunLock(tmp_path).release()


def test_number_used_again_by_another_process_holds_nothing(tmp_path):
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}
    (tmp_path / "run.lock").write_text(json.dumps(mine))
    RunLock(tmp_path).release()


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"host": "a"}', "\x00\x00"])
def test_lock_cut_short_by_a_crash_is_taken_over(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    RunLock(tmp_path).release()


def test_other_hosts_lock_counts_while_it_is_touched(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}))
    stop = threading.Event()

    def beat():
        while not stop.wait(0.02):
            os.utime(path)

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(ValueError, match="in use by process 1 on elsewhere"):
            RunLock(tmp_path, silence_s=5.0)
    finally:
        stop.set()
        other.join()
    RunLock(tmp_path, silence_s=0.3).release()


def test_heartbeat_touches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.02)
    held = RunLock(tmp_path)
    os.utime(held.path, (0, 0))
    deadline = time.monotonic() + 20
    while held.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held.path.stat().st_mtime > 0
    held.release()


def test_release_leaves_a_lock_that_is_not_its_own(tmp_path):
    held = RunLock(tmp_path)
    other = json.dumps({"host": "elsewhere", "pid": 1, "started": "1"})
    held.path.write_text(other)
    held.release()
    assert held.path.read_text() == other


def test_of_many_at_once_one_gets_a_dead_lock(tmp_path):
    """Threads stand for processes: they share a process id, so the dead owner is what they race for."""
    (tmp_path / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}))
    held, refused = [], []

    def contend():
        try:
            held.append(RunLock(tmp_path))
        except ValueError:
            refused.append(1)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release()
