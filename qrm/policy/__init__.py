"""A language model that answers, and learns from preferences and rewards."""
