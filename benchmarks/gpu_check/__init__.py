"""One command that proves this code on a new machine: `python3 -m benchmarks.gpu_check --help`."""
