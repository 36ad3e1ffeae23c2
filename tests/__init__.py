"""Tests of what users rely on. Nothing here may reach for a network: what needs one brings its own server."""

import os

# Before anything imports the libraries, which read these once.
os.environ.update({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"})

# The models of the tests are so small that a second thread costs more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Training takes all cores that it may: give each of pytest-xdist's workers its own, and the same number, since results
# are bit-equal for an equal number of threads only.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _each = len(_cores) // _workers
    # A worker that replaces one that has crashed has a number of its own.
    _first = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % _workers * _each
    if _each:
        os.sched_setaffinity(0, _cores[_first : _first + _each])
