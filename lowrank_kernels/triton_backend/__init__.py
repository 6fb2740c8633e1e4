"""The fused operators in Triton: one file per operator, each with its kernel and the launcher the dispatcher calls."""
