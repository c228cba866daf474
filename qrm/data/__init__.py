"""Comparisons of any source, in tokens, in packed rows."""
