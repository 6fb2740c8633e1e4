"""Commands: tuning on a GPU, and compiling the kernels for GPUs that are not here."""
