"""qrm: distributional reward models in JAX and Flax."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Before `transformers` is imported: it would announce that PyTorch is not installed.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

if TYPE_CHECKING:
    from qrm.serving.functions import RewardFunction, reward
    from qrm.training.reward_model import RewardModel, Scores, load

__all__ = ['RewardFunction', 'RewardModel', 'Scores', 'load', 'reward']

_FUNCTIONS = ('RewardFunction', 'reward')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is: `import qrm` alone, as the command does, is at once."""
    if name in __all__:
        place = 'qrm.serving.functions' if name in _FUNCTIONS else 'qrm.training.reward_model'
        return getattr(importlib.import_module(place), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
