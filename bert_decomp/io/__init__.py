"""Files: atomic writes, JSON, safetensors, manifests, and the environment that results were made in."""
