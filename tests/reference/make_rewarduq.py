"""Writes rewarduq.npz: what RewardUQ's Bayesian linear head gives for a few made-up features.

    python tests/reference/make_rewarduq.py  # with torch 2.13.0 and rewarduq 0.1.0

Only its curvature and its standard deviations are used, on features in place of a model.
"""

import pathlib
import types

import numpy as np
import torch
from rewarduq.methods.bayesian_linear_head.bayesian_linear_head_model import (
    BayesianLinearHeadModel as Model,
)


def main() -> None:
    rng = np.random.default_rng(0)
    differences, features = rng.normal(size=(60, 5)), rng.normal(size=(7, 5))
    weights, penalty = rng.normal(size=5), 0.3
    linear = types.SimpleNamespace(weight=torch.nn.Parameter(torch.tensor(weights)[None]))
    head = types.SimpleNamespace(
        head=types.SimpleNamespace(linear=linear), H=torch.zeros(5, 5, dtype=torch.float64),
        safe_dtype=torch.float64, feat_dim=5, lambda_reg=penalty)
    Model.compute_and_set_final_hessian(head, torch.tensor(differences), 'weighted')
    np.savez(pathlib.Path(__file__).with_name('rewarduq.npz'), differences=differences,
             features=features, weights=weights, penalty=penalty,
             std=Model.std(head, torch.tensor(features)).numpy())


if __name__ == '__main__':
    main()
