"""What the benchmarks share: the memory that an arm needs."""

from types import SimpleNamespace

import torch
from pytest import approx

from benchmarks.common import alternate, watch_memory

MIB = 2**20
CPU = torch.device("cpu")


def test_memory_is_what_lives_at_once_and_what_stays():
    stays = []

    def run():
        first = torch.zeros(MIB, dtype=torch.uint8)
        stays.append(first + 1)  # 2 MiB at once
        del first
        torch.zeros(MIB // 2, dtype=torch.uint8)
        return "done"

    assert watch_memory(run, CPU) == ("done", approx(2 * MIB, abs=100), MIB)  # the 1 is a tensor too for a moment
    assert watch_memory(stays.clear, CPU)[1:] == (0, -MIB)
    assert watch_memory(lambda: None, CPU) == (None, 0, 0)


def test_an_arms_memory_counts_what_its_first_call_left():
    """As AdamW's moments: made at the end of the first step, there from the beginning of the second."""
    moments = []

    def step():
        activations = torch.zeros(4 * MIB, dtype=torch.uint8)
        del activations
        if not moments:
            moments.append(torch.zeros(MIB, dtype=torch.uint8))

    args = SimpleNamespace(warmup=2, rounds=1, threads=1)
    assert alternate({"step": step}, args, CPU, memory=True)["step"]["peak_bytes"] == 5 * MIB
    assert alternate({"step": step}, args, CPU)["step"]["peak_bytes"] is None
    assert alternate({"step": step}, SimpleNamespace(warmup=1, rounds=1, threads=1), CPU, memory=True)["step"]["peak_bytes"] is None
