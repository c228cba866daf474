"""qrm: distributional reward models in JAX and Flax."""

import os

# Before `transformers` is imported: it would announce that PyTorch is not installed.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

from qrm.training.reward_model import RewardModel, Scores, load

__all__ = ['RewardModel', 'Scores', 'load']
