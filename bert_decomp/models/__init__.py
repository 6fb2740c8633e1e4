"""Encoders: their parts by architecture, loading and saving."""

# Registers the low-rank format, which imports most of this package. It happens here, before any module of the package:
# one that imported transformers itself would be asked for its names while it has none.
import transformers.modeling_utils  # noqa: F401
