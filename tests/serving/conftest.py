"""A small reward model, and what it is asked."""

import pytest

from qrm.data import demo
from tests.helpers import small_pairwise_model, small_reward_model


@pytest.fixture(scope='module')
def comparisons():
    """Of four prompts, two responses to each."""
    return demo.generate('helpful', 'train', 4, 0).comparisons


@pytest.fixture(scope='module')
def model(comparisons):
    """With random weights."""
    return small_reward_model(comparisons)


@pytest.fixture(scope='module')
def pairwise_model(comparisons):
    """With random weights, of two responses."""
    return small_pairwise_model(comparisons)
