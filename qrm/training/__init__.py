"""One run: from a config to checkpoints, and what can be had from them."""
