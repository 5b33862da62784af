"""Measurements: run each as a module from the repository's root, as in `python -m benchmarks.train --help`."""
