"""Reward models in use."""
