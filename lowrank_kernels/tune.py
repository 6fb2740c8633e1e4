"""``python -m lowrank_kernels.tune``: measure this GPU (see ``lowrank_kernels.tools.tune``)."""

from .tools.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
