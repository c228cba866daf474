"""A language model that answers: sampling from it."""
