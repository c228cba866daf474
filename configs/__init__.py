"""Configs: each file states what it changes of `KEYS` in `qrm.training.config`, or of a study's."""
