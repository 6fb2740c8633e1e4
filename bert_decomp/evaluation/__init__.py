"""What a model is worth: metrics, latency, profile, report."""
