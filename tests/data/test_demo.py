"""Tests of the demo workloads: the truths against independent references, then the data."""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from qrm.data import demo, phrases
from qrm.data.demo import RewardDistribution

COUNT = 2000
TAUS = np.linspace(0.05, 0.95, 10)

# Three types, of which the third is far away: a bimodal density.
MIXTURE = RewardDistribution((0.5, 0.3, 0.2), (0.4, -0.3, 3.0), 0.6)
OTHER = RewardDistribution((0.6, 0.4), (-0.5, 1.5), 0.8)
SINGLE = RewardDistribution((1.0,), (0.7,), 1.3)


@pytest.fixture(scope='module', params=demo.WORKLOADS)
def workload(request):
    return request.param


def _density(distribution, x):
    """The density of a mixture from scipy.stats, independently of the code under test."""
    return sum(
        w * scipy.stats.norm.pdf(x, m, distribution.sigma)
        for w, m in zip(distribution.weights, distribution.means, strict=True)
    )


def _oriented(data, annotators='independent'):
    """Win probability of the side whose text sorts first, and whether that side was chosen.

    The order of the texts does not depend on the label, unlike the order of the responses.
    """
    chosen_first = np.array([c.responses[0] < c.responses[1] for c in data.comparisons])
    p = np.array([a.win_probability(b, annotators) for a, b in data.truths])
    return np.where(chosen_first, p, 1.0 - p), chosen_first.astype(float)


def _assert_calibrated(p, outcomes):
    """The frequency of outcomes matches their probabilities within four standard errors."""
    error = np.sqrt(np.sum(p * (1.0 - p)))
    assert abs(np.sum(outcomes - p)) < 4.0 * error


# Reward distributions.


@pytest.mark.parametrize('distribution', [MIXTURE, OTHER, SINGLE])
def test_moments_and_cdf_match_quadrature(distribution):
    def integral(f, upper=20.0):
        return scipy.integrate.quad(f, -20.0, upper, points=distribution.means, limit=200)[0]

    mean = integral(lambda x: x * _density(distribution, x))
    variance = integral(lambda x: (x - mean) ** 2 * _density(distribution, x))
    assert distribution.mean() == pytest.approx(mean, abs=1e-8)
    assert distribution.std() == pytest.approx(np.sqrt(variance), abs=1e-8)
    xs = np.array([[-1.0, 0.1], [0.9, 2.5]])
    expected = [[integral(lambda t: _density(distribution, t), x) for x in row] for row in xs]
    np.testing.assert_allclose(distribution.cdf(xs), expected, atol=1e-8)


def test_one_type_is_a_gaussian():
    reference = scipy.stats.norm(0.7, 1.3)
    assert SINGLE.mean() == pytest.approx(0.7)
    assert SINGLE.std() == pytest.approx(1.3)
    np.testing.assert_allclose(SINGLE.cdf(TAUS), reference.cdf(TAUS), atol=1e-12)
    np.testing.assert_allclose(SINGLE.quantile(TAUS), reference.ppf(TAUS), atol=1e-12)


def test_two_types_by_hand():
    # Means +2 and -2 with equal shares: mean 0, variance 2^2 + 1^2 = 5, median 0 by symmetry;
    # at 2 the upper half counts 1/2 * Phi(0) = 1/4 and the lower half 1/2 * Phi(4).
    two = RewardDistribution((0.5, 0.5), (2.0, -2.0), 1.0)
    assert two.mean() == 0.0
    assert two.std() == pytest.approx(np.sqrt(5.0))
    assert two.quantile(0.5) == pytest.approx(0.0, abs=1e-12)
    assert two.cdf(2.0) == pytest.approx(0.25 + 0.5 * 0.9999683287581669, abs=1e-12)


@pytest.mark.parametrize('distribution', [MIXTURE, OTHER, SINGLE])
def test_quantile_inverts_cdf_and_keeps_the_shape(distribution):
    taus = np.array([[1e-6, 0.05, 0.3], [0.5, 0.95, 1.0 - 1e-6]])
    quantiles = distribution.quantile(taus)
    assert quantiles.shape == taus.shape
    np.testing.assert_allclose(distribution.cdf(quantiles), taus, atol=1e-12)
    for tau, quantile in zip(taus.ravel(), quantiles.ravel(), strict=True):
        reference = scipy.optimize.brentq(
            lambda x, tau=tau: (
                scipy.stats.norm.cdf(x, distribution.means, distribution.sigma)
                @ np.asarray(distribution.weights)
                - tau
            ),
            -20.0,
            20.0,
            xtol=1e-13,
        )
        assert quantile == pytest.approx(reference, abs=1e-8)


@pytest.mark.parametrize('tau', [0.0, 1.0, -0.1, np.nan])
def test_quantile_levels_are_inside_the_unit_interval(tau):
    with pytest.raises(ValueError, match='strictly between 0 and 1'):
        MIXTURE.quantile([0.5, tau])


def test_samples_follow_the_distribution():
    samples = MIXTURE.sample(np.random.default_rng(0), (200, 100))
    assert samples.shape == (200, 100)
    # Dvoretzky-Kiefer-Wolfowitz: above 0.02 with probability 2 exp(-16) for 20,000 samples.
    ordered = np.sort(samples, axis=None)
    ranks = (np.arange(ordered.size) + 0.5) / ordered.size
    assert np.max(np.abs(MIXTURE.cdf(ordered) - ranks)) < 0.02


@pytest.mark.parametrize(
    ('a', 'b'), [(MIXTURE, OTHER), (OTHER, SINGLE), (MIXTURE, MIXTURE), (SINGLE, MIXTURE)]
)
def test_win_probability_matches_monte_carlo_and_is_antisymmetric(a, b):
    rng = np.random.default_rng(1)
    size = 200_000
    frequency = np.mean(a.sample(rng, size) > b.sample(rng, size))
    p = a.win_probability(b)
    assert abs(frequency - p) < 4.0 * np.sqrt(p * (1.0 - p) / size)
    assert p + b.win_probability(a) == pytest.approx(1.0, abs=1e-12)


def test_shared_and_independent_annotators_differ_by_hand():
    # Both types find a better than b by .1 and the noise is tiny, so a shared annotator always
    # prefers a. Independent ones meet as (1, .9), (1, -1.1), (-1, .9), (-1, -1.1): three wins
    # of four.
    a = RewardDistribution((0.5, 0.5), (1.0, -1.0), 0.01)
    b = RewardDistribution((0.5, 0.5), (0.9, -1.1), 0.01)
    assert a.win_probability(b, 'shared') == pytest.approx(1.0, abs=1e-10)
    assert a.win_probability(b, 'independent') == pytest.approx(0.75, abs=1e-10)
    assert b.win_probability(a, 'shared') == pytest.approx(0.0, abs=1e-10)


def test_shared_annotators_need_the_same_types():
    with pytest.raises(ValueError, match='same type weights'):
        MIXTURE.win_probability(OTHER, 'shared')
    with pytest.raises(ValueError, match='independent, shared'):
        MIXTURE.win_probability(OTHER, 'both')


@pytest.mark.parametrize(
    ('weights', 'means', 'sigma', 'message'),
    [
        ((0.5, 0.5), (1.0,), 1.0, 'as many weights as means'),
        ((), (), 1.0, 'as many weights as means'),
        ((0.5, 0.4), (1.0, 2.0), 1.0, 'sum to 1'),
        ((1.5, -0.5), (1.0, 2.0), 1.0, 'sum to 1'),
        ((1.0,), (1.0,), 0.0, 'sigma must be positive'),
    ],
)
def test_bad_distributions_are_refused(weights, means, sigma, message):
    with pytest.raises(ValueError, match=message):
        RewardDistribution(weights, means, sigma)


# Generated data.


def test_pure_function_of_its_arguments(workload):
    data = demo.generate(workload, 'train', 50, 3)
    assert demo.generate(workload, 'train', 50, 3) == data
    assert demo.generate(workload, 'train', 50, 4).comparisons != data.comparisons


@pytest.mark.parametrize('annotators', demo.ANNOTATORS)
def test_a_greater_count_extends_the_list(workload, annotators):
    short = demo.generate(workload, 'test', 30, 0, annotators)
    long = demo.generate(workload, 'test', 90, 0, annotators)
    assert long.comparisons[:30] == short.comparisons
    assert long.truths[:30] == short.truths


def test_format(workload):
    data = demo.generate(workload, 'train', COUNT, 0)
    assert len(data.comparisons) == len(data.truths) == COUNT
    turns = set()
    for i, c in enumerate(data.comparisons):
        assert c.id == f'{workload}/train/{i}'
        assert c.ranks == (0, 1)
        assert len(c.responses) == 2
        assert c.responses[0] != c.responses[1]
        assert c.prompt.startswith(f'\n\nHuman: {c.group}\n\nAssistant:')
        assert c.prompt.endswith('\n\nAssistant:')
        assert all(r.startswith(' ') and r == ' ' + r.strip() for r in c.responses)
        assert not any('\n' in r for r in c.responses)
        assert c.prompt.count('\n\nHuman:') == c.prompt.count('\n\nAssistant:')
        turns.add(c.prompt.count('\n\nHuman:'))
    assert turns == {1, 2, 3}


def test_splits_share_no_opening_and_no_question(workload):
    train = {c.group for c in demo.generate(workload, 'train', COUNT, 0).comparisons}
    test = {c.group for c in demo.generate(workload, 'test', COUNT, 0).comparisons}
    assert min(len(train), len(test)) > 150
    assert not train & test
    # A greeting in front does not make a question new.
    assert not any(a.endswith(b) or b.endswith(a) for a in train for b in test)


def test_the_same_response_has_the_same_truth(workload):
    data = demo.generate(workload, 'train', COUNT, 0)
    known = {}
    for comparison, pair in zip(data.comparisons, data.truths, strict=True):
        for response, truth in zip(comparison.responses, pair, strict=True):
            assert known.setdefault(response, truth) == truth


def test_a_truth_by_hand():
    # A refusal of strength 1 and a safe alternative of strength 1:
    # (1.6, -.3, .6) + (1.0, 1.8, 1.2) = (2.6, 1.5, 1.8); mean 1.3 + .45 + .36 = 2.11.
    data = demo.generate('harmless', 'train', COUNT, 0)
    truth = next(
        truth
        for comparison, pair in zip(data.comparisons, data.truths, strict=True)
        for response, truth in zip(comparison.responses, pair, strict=True)
        if response == " I can't help with that. You could tell the truth."
    )
    assert truth.weights == (0.5, 0.3, 0.2)
    np.testing.assert_allclose(truth.means, (2.6, 1.5, 1.8), atol=1e-12)
    assert truth.mean() == pytest.approx(2.11)


@pytest.mark.parametrize('annotators', demo.ANNOTATORS)
def test_labels_are_calibrated(workload, annotators):
    p, outcomes = _oriented(demo.generate(workload, 'train', COUNT, 0, annotators), annotators)
    _assert_calibrated(p, outcomes)
    likelier = np.where(p > 0.5, outcomes, 1.0 - outcomes)
    _assert_calibrated(np.maximum(p, 1.0 - p), likelier)
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
        inside = (p >= low) & (p < high)
        assert inside.sum() > 200
        _assert_calibrated(p[inside], outcomes[inside])


def test_shared_labels_follow_the_shared_probabilities(workload):
    data = demo.generate(workload, 'train', COUNT, 0, 'shared')
    matched, mismatched = demo.bayes(data, 'shared'), demo.bayes(data, 'independent')
    # The mean log ratio of the true to the wrong probabilities is a KL divergence: positive.
    assert matched.nll < mismatched.nll - 0.005
    # One type on both sides removes noise from the comparison.
    independent = demo.bayes(demo.generate(workload, 'train', COUNT, 0))
    assert matched.expected_nll < independent.expected_nll - 0.01


def test_annotators_change_labels_but_not_dialogues(workload):
    independent = demo.generate(workload, 'train', 200, 0).comparisons
    shared = demo.generate(workload, 'train', 200, 0, 'shared').comparisons
    assert [c.prompt for c in independent] == [c.prompt for c in shared]
    assert [set(c.responses) for c in independent] == [set(c.responses) for c in shared]
    assert [c.responses for c in independent] != [c.responses for c in shared]


@pytest.mark.parametrize('annotators', demo.ANNOTATORS)
def test_ratings_are_the_rewards_that_decided(workload, annotators):
    data = demo.generate(workload, 'train', COUNT, 0, annotators)
    assert all(c.ratings[0] > c.ratings[1] for c in data.comparisons)
    # Uniform ranks within the true distributions: over both sides together, as choosing the
    # higher one orders them. Kolmogorov-Smirnov; pairs of one annotator are dependent.
    ranks = [truth.cdf(rating) for c, pair in zip(data.comparisons, data.truths, strict=True)
             for truth, rating in zip(pair, c.ratings, strict=True)]
    assert scipy.stats.kstest(ranks, 'uniform').statistic < 0.04
    assert all((c.annotator is not None) == (annotators == 'panel') for c in data.comparisons)


def test_an_annotator_of_the_panel_has_one_type(workload):
    data = demo.generate(workload, 'train', COUNT, 0, 'panel')
    # The likelier type of each rating, given the truth; summed over an annotator's ratings.
    evidence = {}
    for comparison, pair in zip(data.comparisons, data.truths, strict=True):
        for truth, rating in zip(pair, comparison.ratings, strict=True):
            z = (rating - np.array(truth.means)) / truth.sigma
            evidence.setdefault(comparison.annotator, []).append(-0.5 * z**2)
    assert len(evidence) == 40
    totals = {name: np.sum(parts, axis=0) for name, parts in evidence.items()}
    types = {name: int(np.argmax(total)) for name, total in totals.items()}
    # Every annotator is one type beyond doubt, and there are as many of each as its share.
    margins = [np.diff(np.sort(total))[-1] for total in totals.values()]
    assert min(margins) > 5.0
    shares = data.truths[0][0].weights
    assert [list(types.values()).count(t) / 40 for t in range(len(shares))] == pytest.approx(
        shares)
    # Their noise has the scale it should: chi-square over all ratings, within 5 standard errors.
    squares = np.concatenate([-2.0 * np.stack(parts)[:, types[name]]
                              for name, parts in evidence.items()])
    assert np.mean(squares) == pytest.approx(1.0, abs=5.0 * np.sqrt(2.0 / len(squares)))


def test_the_panel_judges_as_shared_annotators_do(workload):
    data = demo.generate(workload, 'train', 200, 0, 'panel')
    for a, b in data.truths[:20]:
        assert a.win_probability(b, 'panel') == a.win_probability(b, 'shared')
    assert {c.annotator for c in data.comparisons} <= {f'annotator {i}' for i in range(40)}


def test_bayes_by_hand():
    # A gap of 1 at sigma = 1/sqrt(2) on each side: p = Phi(1) = .841344746. One pair is labelled
    # with the likelier side, one against it, one is an even tie:
    # accuracy (1 + 0 + 1/2) / 3, nll -(log p + log(1 - p) + log(1/2)) / 3.
    high = RewardDistribution((1.0,), (1.0,), np.sqrt(0.5))
    low = RewardDistribution((1.0,), (0.0,), np.sqrt(0.5))
    result = demo.bayes(demo.Demo([], [(high, low), (low, high), (low, low)]))
    assert result.accuracy == pytest.approx(0.5)
    assert result.nll == pytest.approx((0.172753779 + 1.841021645 + 0.693147181) / 3.0, abs=1e-8)
    assert result.expected_accuracy == pytest.approx((2 * 0.841344746 + 0.5) / 3.0, abs=1e-8)
    # Entropy of p: .841344746 * .172753779 + .158655254 * 1.841021645 = .437433.
    assert result.expected_nll == pytest.approx((2 * 0.437433 + 0.693147) / 3.0, abs=1e-5)


def test_bayes_accuracy_is_noisy_but_learnable(workload):
    result = demo.bayes(demo.generate(workload, 'test', COUNT, 0))
    assert 0.72 < result.expected_accuracy < 0.80
    assert 0.72 < result.accuracy < 0.80
    assert result.expected_nll < np.log(2.0) - 0.15


def test_spread_varies_and_is_no_function_of_the_mean(workload):
    truths = [t for pair in demo.generate(workload, 'train', COUNT, 0).truths for t in pair]
    means = np.array([t.mean() for t in truths])
    spreads = np.array([t.std() for t in truths])
    low, high = np.percentile(spreads, [10, 90])
    assert high / low > 1.5
    assert abs(scipy.stats.spearmanr(means, spreads).statistic) < 0.6


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('honest', 'train', 1, 0), "unknown workload 'honest'.*helpful, harmless"),
        (('helpful', 'dev', 1, 0), "unknown split 'dev'.*train, test"),
        (('helpful', 'train', 1, 0, 'both'), "unknown annotators 'both'.*independent, shared"),
        (('helpful', 'train', 0, 0), 'count must be at least 1, got 0'),
        (('helpful', 'train', 1, -1), 'seed must not be negative, got -1'),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.generate(*arguments)


def test_a_population_is_its_distributions():
    truths = [truth for pair in demo.generate('helpful', 'test', 5, 0).truths for truth in pair]
    population, items = demo.population(truths), np.array([7, 0, 3])
    taus = np.array([0.05, 0.5, 0.95])
    quantiles = population.quantile(items, taus)
    for i, row in zip(items, quantiles, strict=True):
        np.testing.assert_allclose(row, truths[i].quantile(taus), rtol=0, atol=1e-12)
    np.testing.assert_allclose(population.cdf(items, quantiles), np.tile(taus, (3, 1)), atol=1e-12)


@pytest.mark.parametrize('annotators', demo.ANNOTATORS)
def test_a_population_compares_as_its_distributions_do(annotators):
    truths = [truth for pair in demo.generate('harmless', 'test', 5, 0).truths for truth in pair]
    population, items = demo.population(truths), np.arange(10)
    np.testing.assert_allclose(population.mean(items), [t.mean() for t in truths], atol=1e-12)
    # Each against each.
    expected = [[a.win_probability(b, annotators) for b in truths] for a in truths]
    found = population.win_probability(items[:, None], items, annotators)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_prompts_are_different_ones_with_the_openings_of_their_split(workload):
    found = demo.prompts(workload, 'train', 300, 0)
    assert demo.prompts(workload, 'train', 100, 0) == found[:100]
    assert demo.prompts(workload, 'train', 100, 1) != found[:100]
    assert len({c.prompt for c in found}) == len({c.id for c in found}) == 300
    assert all(c.responses == () for c in found)
    for c in found:
        opening = c.prompt.split('\n\n')[1].removeprefix('Human: ')
        assert opening.removesuffix(c.group) in phrases.LEADS
        assert c.prompt.endswith('\n\nAssistant:')
    held_out = {c.group for c in demo.prompts(workload, 'test', 300, 0)}
    assert not held_out & {c.group for c in found}
    asked = {c.group for c in demo.generate(workload, 'test', 4000, 0).comparisons}
    assert all(any(group.endswith(one) for group in asked) for one in held_out)


def test_prompts_end_with_what_there_is(monkeypatch):
    # One question without a lead and without follow-ups is one prompt.
    question = demo._questions('helpful', 'test')[:1]
    monkeypatch.setattr(demo, '_questions', lambda *_: question)
    monkeypatch.setattr(demo.phrases, 'LEADS', ('',))
    monkeypatch.setattr(demo, '_FOLLOW_UPS', (1.0,))
    assert len(demo.prompts('helpful', 'test', 1, 0)) == 1
    with pytest.raises(ValueError, match='count=2, but 40 draws had 1 prompts'):
        demo.prompts('helpful', 'test', 2, 0)
    with pytest.raises(ValueError, match='count must be at least 1, got 0'):
        demo.prompts('helpful', 'test', 0, 0)
