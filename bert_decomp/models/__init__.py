"""Encoders: their parts by architecture, loading and saving."""
