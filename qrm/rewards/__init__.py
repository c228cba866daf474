"""What a reward is: pure functions of numbers, without a network."""
