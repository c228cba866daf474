"""What the rewards of a run say."""
