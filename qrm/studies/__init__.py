"""The experiments, and the worlds, costs and clocks that they measure against."""
