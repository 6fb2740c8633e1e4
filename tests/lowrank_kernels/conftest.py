"""What the tests of the CUDA kernels share."""

import pytest

from tests.csrc.emulator import toolchain


@pytest.fixture(scope="session")
def ptx_folder(request, tmp_path_factory):
    """Where PTX is kept, from run to run if pytest has a cache."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("ptx") if cache else tmp_path_factory.mktemp("ptx")


@pytest.fixture(scope="session")
def trace(ptx_folder):
    """The program that tells what every warp of a launch does, from the headers that the kernels are built from."""
    return str(toolchain.trace(ptx_folder))
