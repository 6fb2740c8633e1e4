"""What libraries read from the environment when they are imported, before any test imports them; and how the tests of
one run share the time.

No test reaches the network. Where there is no GPU, the kernels run in Triton's interpreter.
"""

import ctypes
import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before a folder's own conftest.py, which is read early where the folder is named, can import Triton.
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ["TRITON_INTERPRET"] = "1"


# What these tests kill is a process and never the machine, so nothing depends on when the disk has it.
os.fsync = lambda handle: None


def pytest_configure(config):
    # The process that only hands out tests to others needs no torch.
    if not getattr(config.option, "numprocesses", None):
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Each of several processes begins with its share of the slow tests, file by file: what they take from each other
    at the end is quick."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count == 1:
        return
    slow, quick = {}, []
    for item in items:
        if item.get_closest_marker("slow"):
            slow.setdefault(item.path, []).append(item)
        else:
            quick.append(item)
    shares = [[] for _ in range(count)]
    for tests in slow.values():
        min(shares, key=len).extend(tests)
    # Every process is handed as many tests of this list as any other.
    size = len(items) // count
    for share in shares:
        room = max(size - len(share), 0)
        share.extend(quick[:room])
        del quick[:room]
    items[:] = [item for share in shares for item in share] + quick


def _freeze():
    """What is there by now stays. The main job collects garbage after every stage, and need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    # Modules and caches of libraries pile up: after half of the tests a main job took twice its time.
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def pytest_unconfigure():
    gc.unfreeze()
