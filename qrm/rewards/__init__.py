"""What a reward is, whatever network it comes from: pure functions, and the heads."""
