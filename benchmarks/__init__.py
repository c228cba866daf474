"""Measurements on machines that are at hand for minutes only."""
