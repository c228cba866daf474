"""What a reward model has to beat: the longer response, a language model's likelihood, a probe.

Axes: n pairs, K responses, W features.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from qrm.analysis import evaluate
from qrm.data import sources
from qrm.data.encoded import Encoded
from qrm.policy import batches, runs
from qrm.policy.network import PolicyNetwork
from qrm.rewards import metrics
from qrm.rewards.heads import HeadConfig
from qrm.rewards.losses import LossConfig
from qrm.rewards.metrics import Predictions
from qrm.studies.columns import Judged
from qrm.training import base
from qrm.training.features import Featured, Features
from qrm.training.reward_model import RewardModel
from qrm.training.schema import ConfigError
from qrm.training.train import Prepared, prepare

# Scores of comparisons, [K] of each.
Scorer = Callable[[Sequence[Encoded]], Sequence[np.ndarray]]

# Weights of the probe's penalty, per pair and on features of mean square 1.
PENALTIES = tuple(10.0**x for x in np.arange(-4.0, 1.5, 0.5))


def longer(config: Any, prepared: Prepared) -> Scorer:
    """The number of tokens of a response."""
    return lambda items: [np.array([len(r) for r in item.responses]) for item in items]


def likelihood(config: Any, prepared: Prepared) -> Scorer:
    """The mean log-probability of a response's tokens, by the language model of the checkpoint.

    Raises:
      ConfigError: the checkpoint is that of an encoder.
      DataError: see `base.read`.
    """
    network = prepared.model.network
    if not network.architecture.causal:
        raise ConfigError("config.compare.baselines: 'likelihood' of an encoder, expected a "
                          'decoder in config.model.checkpoint')
    place = base.find(config.model.checkpoint, config.seed, 'float32', frozen=False)
    policy = PolicyNetwork(network.architecture, network.dtype, network.attention)
    params = base.start(policy, place, base.read(place, whole=True, output=True)).trained

    def scores(items: Sequence[Encoded]) -> list[np.ndarray]:
        found = runs.log_probs(policy, params, [batches.apart(item) for item in items],
                               row_length=prepared.model.row_length, rows=1)
        # Of the first token of a dialogue nothing is said.
        return [np.array([own.sum() / max(len(own) - (size == 0), 1)
                          for own, size in zip(log_probs, item.prompt_sizes, strict=True)])
                for item, log_probs in zip(items, itertools.chain.from_iterable(found),
                                           strict=True)]

    return scores


def probe(config: Any, prepared: Prepared) -> Scorer:
    """Logistic regression on what a head reads of a frozen backbone, see `fit_probe`."""
    kept, weights = _judged(prepared), _fit(prepared).weights
    return lambda items: [item.features @ weights for item in kept.of(items)]


def _judged(prepared: Prepared) -> Features:
    """Where features of what is judged are kept, in float32 as models are judged."""
    kept = prepared.model.features
    return dataclasses.replace(kept, network=dataclasses.replace(kept.network, dtype='float32'))


BASELINES = {'longer': longer, 'likelihood': likelihood, 'probe': probe}
_PROBABILITIES = ('probe',)  # whose scores are log odds


def judge(name: str, config: Any, folder: str) -> Judged:
    """What a baseline says of the test comparisons of a run, and with prompts exchanged.

    Args:
      name: one of `BASELINES`; 'probe' is of a run whose head alone is trained, 'likelihood' of
        one with a checkpoint.
      config: of a run.
      folder: whose tokenizer is used, if there is one; where features are kept, if the config does
        not say it.

    Raises:
      ConfigError: the baseline needs another kind of model.
      DataError, WorkdirError: see `train.prepare`.
    """
    prepared = prepare(config, folder)
    score = BASELINES[name](config, prepared)
    model = sized(prepared.model)
    comparisons, report = sources.load_splits(config.data, config.workload)['test']

    def predict(items: Sequence[Encoded]) -> Predictions:
        outputs = [np.asarray(of_item, np.float32)[:, None] for of_item in score(items)]
        found = metrics.predictions_of(items, outputs, HeadConfig('scalar'),
                                       LossConfig('bradley_terry'))
        if name in _PROBABILITIES:
            return found
        unknown = np.full_like(found.log_win, np.nan)
        return found._replace(log_win=unknown, log_loss=unknown)

    exchanged = evaluate.exchange_some(config, model, comparisons)
    return Judged(predict(evaluate.encode(config.data, model, comparisons, report)),
                  exchanged and predict(exchanged))


def sized(model: RewardModel) -> RewardModel:
    """The model with a reading that finds where prompts end, whatever its head reads."""
    return dataclasses.replace(
        model, reading=dataclasses.replace(model.reading, size_prompt=True))


class Probe(NamedTuple):
    """A logistic regression.

    Attributes:
      weights: [W] of the features as they are.
      scale: [W] roots of their mean squares.
      penalty: per pair, on features of mean square 1.
    """

    weights: np.ndarray
    scale: np.ndarray
    penalty: float


class Bayes(NamedTuple):
    """A linear reward with a Gaussian posterior, as of RewardUQ's Bayesian linear head.

    The Laplace approximation of `probe` (MacKay 1992, The evidence framework applied to
    classification networks): precision n l I + sum of p (1 - p) x x' over n pairs, features of
    mean square 1.

    Attributes:
      prepared: of whose features.
      probe: the mean.
      covariance: [W, W] of the weights on features of mean square 1.
    """

    prepared: Prepared
    probe: Probe
    covariance: np.ndarray

    def features(self, items: Sequence[Encoded]) -> list[np.ndarray]:
        """[K, W] of each."""
        return [item.features for item in _judged(self.prepared).of(items)]

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [n] of the reward of features [n, W], or differences."""
        scaled = x / self.probe.scale
        return x @ self.probe.weights, np.sqrt(
            np.einsum('nw,wv,nv->n', scaled, self.covariance, scaled, optimize=True))


def fit_bayes(prepared: Prepared) -> Bayes:
    """The Bayesian linear head on the training pairs of a run."""
    found = _fit(prepared)
    differences = _differences(prepared.model.features.of(prepared.encoded['train']))
    return Bayes(prepared, found, posterior(found, differences))


def posterior(probe: Probe, differences: np.ndarray) -> np.ndarray:
    """Covariance [W, W] of the weights, see `Bayes`, from the pairs [n, W] that were learnt."""
    x = differences / probe.scale
    win = scipy.special.expit(differences @ probe.weights)
    precision = (x * (win * (1.0 - win))[:, None]).T @ x
    precision[np.diag_indices_from(precision)] += len(x) * probe.penalty
    return np.linalg.inv(precision)


def _fit(prepared: Prepared) -> Probe:
    return fit_probe(*(_differences(prepared.model.features.of(prepared.encoded[split]))
                       for split in ('train', 'validation')))


def fit_probe(train: np.ndarray, validation: np.ndarray) -> Probe:
    """Logistic regression without an intercept on differences between both sides of pairs.

    The mean of log(1 + exp(-w.x)) plus l/2 |w|^2 over features of mean square 1 (Hastie, Tibshirani
    & Friedman 2009, The Elements of Statistical Learning, section 4.4), l of `PENALTIES` by the
    negative log-likelihood of validation.

    Args:
      train, validation: [n, W], preferred side less the other.
    """
    scale = np.sqrt(np.mean(train**2, axis=0))
    scale[scale == 0.0] = 1.0
    train, validation = train / scale, validation / scale

    def fit(penalty: float, start: np.ndarray) -> np.ndarray:

        def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
            margin = train @ w
            value = np.mean(np.logaddexp(0.0, -margin)) + 0.5 * penalty * w @ w
            return value, penalty * w - scipy.special.expit(-margin) @ train / len(train)

        return scipy.optimize.minimize(loss, start, jac=True, method='L-BFGS-B',
                                       options={'maxiter': 1000, 'gtol': 1e-6}).x

    weights, found = np.zeros(train.shape[1]), []
    for penalty in sorted(PENALTIES, reverse=True):  # each from the one before it
        weights = fit(penalty, weights)
        found.append((np.mean(np.logaddexp(0.0, -validation @ weights)), penalty, weights))
    _, penalty, weights = min(found, key=lambda one: one[0])
    return Probe(weights / scale, scale, penalty)


def _differences(items: Sequence[Featured]) -> np.ndarray:
    """[n, W] float64 of all pairs with a preferred side."""
    return np.array([item.features[i] - item.features[j] for item in items
                     for i, j in np.argwhere(item.preference > 0.5)], np.float64)
