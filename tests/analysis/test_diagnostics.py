"""Diagnostics: hand-worked numbers, independent libraries, and predictions of known truth."""

import json

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from qrm.analysis import diagnostics, verdict
from qrm.rewards import resampling
from qrm.rewards.metrics import Predictions
from tests.helpers import pair_predictions

NONE = np.empty(0, np.float32)
SETTINGS = {'replicates': 60, 'level': 0.95, 'seed': 0}


def made(n=1000, *, seed=0, quantiles=10, spread='true', annotators=0, rated=True, sharp=1.0,
         scale=1.0, shift=0.0, size=1):
    """Predictions of n comparisons of two responses, whose truth is known.

    The reward of a response is N(m, s^2) with m ~ N(0, 1) and s ~ U(0.3, 2), independent, and its
    rating is a draw. Labels are votes for the higher of two draws with logistic noise. The model
    knows m, and shows as its spread the true s or another.

    Args:
      spread: 'true', 'constant', 'function' (of m), 'noise' (another draw of s), 'reversed' or
        'none'.
      annotators: voters for a pair; 0 for one voter, whose label is hard.
      rated: whether responses have ratings.
      sharp: what the log odds of the win probability are multiplied by; 1 is calibrated.
      scale, shift: ratings are scale * reward + shift.
      size: comparisons with the same opening question.
    """
    rng = np.random.default_rng(seed)
    m, s = rng.normal(size=(n, 2)), rng.uniform(0.3, 2.0, (n, 2))
    ratings = shift + scale * (m + s * rng.normal(size=(n, 2)))
    draws = m + s * rng.normal(size=(max(annotators, 1), n, 2))
    wins = draws @ [1.0, -1.0] + rng.logistic(size=draws.shape[:2]) > 0.0
    votes = wins.mean(axis=0)
    shown = {'true': s, 'constant': np.ones_like(s), 'function': 1.0 + 0.5 * np.tanh(m),
             'noise': rng.uniform(0.3, 2.0, (n, 2)), 'reversed': 2.3 - s,
             'none': np.zeros_like(s)}[spread]
    taus = (np.arange(quantiles) + 0.5) / quantiles
    ahead = sharp * (m @ [1.0, -1.0]) / np.sqrt(1.0 + np.pi / 8.0 * (shown ** 2).sum(axis=1))
    decided, first = votes != 0.5, np.where(votes > 0.5, 0, 1)
    ahead = np.where(first == 0, ahead, -ahead)[decided]
    pairs = 2 * np.arange(n)[:, None] + np.stack([first, 1 - first], axis=1)
    values = {
        'quantiles': (m[..., None] + shown[..., None] * scipy.stats.norm.ppf(taus)
                      ).reshape(2 * n, -1),
        'taus': taus, 'means': m.ravel(), 'stds': shown.ravel(),
        'pair_stds': np.hypot(*shown.T)[decided],
        'ratings': ratings.ravel() if rated else np.full(2 * n, np.nan),
        'label': np.maximum(votes, 1.0 - votes)[decided],
        'log_win': -np.logaddexp(0.0, -ahead), 'log_loss': -np.logaddexp(0.0, ahead),
    }
    return Predictions(
        crps=np.full(2 * n, np.nan, np.float32),
        lengths=rng.integers(5, 100, 2 * n).astype(np.int32),
        comparisons=np.repeat(np.arange(n), 2).astype(np.int32),
        comparison_ids=np.array([f'comparison {i}' for i in range(n)]),
        comparison_groups=np.arange(n) // size, pairs=pairs[decided].astype(np.int32),
        **{name: np.asarray(value, np.float32) for name, value in values.items()})


def diagnose(test, validation=None, exchanged=None, *, fits_ratings=True, **settings):
    return diagnostics.diagnose(
        test, validation, exchanged, fits_ratings=fits_ratings, **SETTINGS | settings)


def conclusion(diagnosis):
    text = verdict.verdict(diagnosis)
    assert text.startswith('Is the spread information or decoration? ')
    return ' '.join(text.split('\n\n')[0].split()).removeprefix(
        'Is the spread information or decoration? ')


@pytest.fixture(scope='module')
def true_spread():
    return diagnose(made(annotators=7), made(seed=1, annotators=7))


# Diagnoses of predictions whose truth is known.


def test_true_quantiles_are_covered_and_their_spread_is_information(true_spread):
    ratings = true_spread['ratings']
    assert ratings['coverage_error']['value'] < 0.015
    for row in true_spread['per_tau']:
        assert row['coverage']['value'] == pytest.approx(row['tau'], abs=0.035)
        assert row['coverage']['low'] < row['coverage']['value'] < row['coverage']['high']
    assert ratings['crps_gain']['low'] > 0.0
    assert ratings['crps']['value'] + ratings['crps_gain']['value'] == pytest.approx(
        ratings['crps_constant_spread']['value'])
    assert ratings['rank_correlation_with_error']['low'] > 0.3
    spread = true_spread['spread']
    # The spread is uniform on (.3, 2) and the reward of unit variance.
    assert spread['mean']['value'] == pytest.approx(1.15, abs=0.03)
    assert spread['variation']['value'] == pytest.approx(1.7 / np.sqrt(12.0) / 1.15, abs=0.02)
    assert spread['over_reward_sd']['value'] == pytest.approx(1.15, abs=0.05)
    assert spread['unexplained_share']['value'] > 0.97
    assert abs(spread['rank_correlation_with_reward']['value']) < 0.06
    assert abs(spread['rank_correlation_with_distance']['value']) < 0.06
    assert spread['crossing_rate']['value'] == 0.0
    assert true_spread['disagreement']['spread_at_equal_margin']['low'] > 0.5
    assert conclusion(true_spread).startswith('Information: its rank correlation with the error')


def test_numbers_of_pairs_and_quantiles_match_numpy_and_scipy(true_spread):
    p = made(annotators=7)
    chosen, rejected = (p.quantiles[side].astype(np.float64) for side in p.pairs.T)
    assert true_spread['counts'] == {
        'responses': 2000, 'pairs': len(p.pairs), 'comparisons': 1000, 'opening_questions': 1000,
        'rated_responses': 2000}
    for i, row in enumerate(true_spread['per_tau']):
        assert row['tau'] == pytest.approx(0.05 + 0.1 * i)
        assert row['accuracy']['value'] == pytest.approx(np.mean(chosen[:, i] > rejected[:, i]))
        assert row['rank_correlation_with_reward']['value'] == pytest.approx(
            scipy.stats.spearmanr(p.quantiles[:, i], p.means).statistic, abs=1e-9)
    found = true_spread['calibration']
    win = np.exp(p.log_win.astype(np.float64))
    assert found['nll']['value'] == pytest.approx(
        np.mean(-p.label * np.log(win) - (1 - p.label) * np.log1p(-win)), rel=1e-5)
    assert found['brier']['value'] == pytest.approx(
        np.mean(p.label * (1 - win) ** 2 + (1 - p.label) * win ** 2), rel=1e-6)
    assert true_spread['accuracy']['value'] == pytest.approx(np.mean(win > 0.5), abs=1e-9)


def test_reliability_matches_the_calibration_error():
    p = made()
    found = diagnose(p)['calibration']
    # All labels are 1: where the model prefers the other side, it was never right.
    win = np.exp(p.log_win.astype(np.float64))
    confidence, right = np.maximum(win, 1.0 - win), win > 0.5
    of_bin = np.digitize(confidence, np.linspace(0.5, 1.0, 11)[1:-1])
    expected = sum(abs((right - confidence)[of_bin == i].sum()) for i in range(10)) / len(win)
    assert found['ece']['value'] == pytest.approx(expected)
    rows = found['reliability']
    assert [row['from'] for row in rows] == pytest.approx(np.linspace(0.5, 0.95, 10))
    assert sum(row['pairs'] for row in rows) == len(p.pairs)
    gaps = [row['pairs'] * abs(row['observed']['value'] - row['confidence'])
            for row in rows if row['pairs']]
    assert sum(gaps) / len(p.pairs) == pytest.approx(expected)
    for row in rows:
        if row['pairs']:
            assert row['from'] <= row['confidence'] <= row['to']
        else:
            assert row['observed']['reason'] == 'no pairs'


@pytest.mark.parametrize(('spread', 'word'), [
    ('constant', 'Decoration: the spread is one constant'),
    ('function', 'Decoration: the spread is a function of the reward'),
    ('noise', 'Not shown'), ('reversed', 'Misleading'),
])
def test_spreads_that_are_not_information(spread, word):
    found = diagnose(made(spread=spread, annotators=7))
    assert conclusion(found).startswith(word)
    assert found['ratings']['crps_gain']['low'] < 1e-9
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_constant_spread_is_the_win_rate_again():
    found = diagnose(made(spread='constant'))
    assert found['spread']['variation'] == pytest.approx(
        {'value': 0.0, 'low': 0.0, 'high': 0.0}, abs=1e-12)
    assert found['spread']['unexplained_share'] == {
        'value': None, 'low': None, 'high': None, 'reason': 'the spread is constant'}
    for row in found['per_tau']:
        assert row['rank_correlation_with_reward']['value'] == pytest.approx(1.0)
        assert row['accuracy'] == found['accuracy']
    assert 'every quantile orders responses as the reward does' in ' '.join(
        verdict.verdict(found).split())


def test_a_single_number_has_no_spread():
    found = diagnose(made(spread='none', quantiles=1), fits_ratings=False)
    assert conclusion(found) == (
        'There is none: the spread is 0 everywhere: the model predicts single numbers.')
    assert found['spread']['crossing_rate']['reason'] == 'the model has one quantile'
    assert found['accuracy']['value'] == found['per_tau'][0]['accuracy']['value']


@pytest.mark.parametrize(('width', 'reason'), [
    (0.0, 'the spread is 0 everywhere: the model predicts single numbers'),
    (0.5, 'the spread is constant'),
])
def test_rounding_of_large_rewards_is_no_spread(width, reason):
    p = made(spread='constant')
    # Quantiles about rewards near 1000, as float32 has them: 6e-5 apart.
    wide = (1000.0 + p.means[:, None] + width * np.linspace(-1.0, 1.0, 10)).astype(np.float32)
    noise = np.random.default_rng(0).uniform(0.0, 5e-5, len(wide)).astype(np.float32)
    found = diagnose(p._replace(quantiles=wide, means=wide.mean(axis=1),
                                stds=wide.std(axis=1) + noise))['spread']
    name = 'unexplained_share' if width else 'variation'
    assert found[name]['reason'] == reason
    assert found['rank_correlation_with_reward']['reason'] == 'one of the two is constant'
    assert found['variation']['value'] == (pytest.approx(0.0, abs=1e-12) if width else None)


def test_crossings_are_counted_before_sorting():
    p = made()
    crossed = p._replace(quantiles=np.where(
        np.arange(2000)[:, None] % 2, p.quantiles, p.quantiles[:, [1, 0, *range(2, 10)]]))
    found, expected = diagnose(crossed), diagnose(p)
    # One of nine neighbours in every other response.
    assert found['spread']['crossing_rate']['value'] == pytest.approx(1 / 18)
    assert found['per_tau'] == expected['per_tau']


def test_auroc_of_known_disagreement():
    # The spread of the first side is a standard deviation larger where annotators disagree.
    rng = np.random.default_rng(0)
    p = made(4000)
    disagree = rng.random(4000) < 0.3
    stds = p.stds.copy()
    stds[p.pairs[:, 0]] = 10.0 + rng.normal(size=4000) + disagree
    stds[p.pairs[:, 1]] = 1e-3
    p = p._replace(pair_stds=np.hypot(*stds[p.pairs].T),
                   label=np.where(disagree, 0.6, 0.9).astype(np.float32))
    found = diagnose(p)['disagreement']
    assert (found['pairs'], found['others']) == (disagree.sum(), (~disagree).sum())
    for name in ('spread', 'spread_at_equal_margin'):
        assert found[name]['value'] == pytest.approx(scipy.stats.norm.cdf(np.sqrt(0.5)), abs=0.02)
        assert found[name]['low'] < found[name]['value'] < found[name]['high']
    assert found['margin']['value'] == pytest.approx(0.5, abs=0.03)


def test_small_margins_find_disagreement(true_spread):
    assert true_spread['disagreement']['margin']['low'] > 0.6


def test_auroc_of_known_label_noise():
    # Margins N(1, 1), of wrong labels N(-1, 1): -margin of these is ahead by 2, in units of sqrt 2.
    rng = np.random.default_rng(0)
    p = made(4000, spread='constant')
    means = np.zeros(8000, np.float32)
    means[p.pairs[:, 0]] = rng.normal(1.0, 1.0, 4000)
    found = diagnose(p._replace(means=means))['label_noise']
    assert (found['pairs'], found['others']) == (400, 3600)
    assert found['margin']['value'] == pytest.approx(scipy.stats.norm.cdf(np.sqrt(2.0)), abs=0.015)
    # A constant spread changes no order; labels made wrong at random know nothing of any.
    assert found['gain']['value'] == pytest.approx(0.0, abs=1e-12)
    assert found['spread']['value'] == pytest.approx(0.5)


def test_a_true_spread_tells_which_margins_to_trust():
    # Where the spread is small the margin is as labelled; where it is large the label is a coin's.
    rng = np.random.default_rng(0)
    p = made(4000)
    wide = np.arange(4000) % 2 == 0
    margin = np.where(wide, rng.normal(0.0, 3.0, 4000), np.abs(rng.normal(0.0, 3.0, 4000)))
    means, stds = np.zeros(8000, np.float32), np.where(wide, 42.0, 0.42).astype(np.float32)
    means[p.pairs[:, 0]] = margin
    p = p._replace(means=means, pair_stds=stds)
    assert diagnose(p)['label_noise']['gain']['low'] > 0.05
    shuffled = p._replace(pair_stds=rng.permutation(stds))
    assert diagnose(shuffled)['label_noise']['gain']['high'] < 0.02


def test_temperature_undoes_overconfidence():
    test, validation = made(sharp=3.0), made(2000, seed=1, sharp=3.0)
    found = diagnose(test, validation)['calibration']
    assert found['temperature']['low'] < 3.0 < found['temperature']['high']
    for name in ('nll', 'brier', 'ece'):
        assert found['after'][name]['value'] < found[name]['value']
    assert 'overconfident' in verdict.verdict(diagnose(test, validation))
    # Scaling by the temperature found gives the calibrated scores.
    calm = diagnose(made(sharp=3.0 / found['temperature']['value']))['calibration']
    assert found['after']['nll']['value'] == pytest.approx(calm['nll']['value'], rel=1e-5)


@pytest.mark.parametrize('held_out', [True, False])
def test_rewards_are_mapped_to_ratings_by_a_line(held_out):
    test = made(scale=4.0, shift=3.0)
    validation = made(seed=1, scale=4.0, shift=3.0) if held_out else None
    found = diagnose(test, validation, fits_ratings=False)['ratings']
    source = validation if held_out else test
    expected = scipy.stats.linregress(source.means, source.ratings)
    assert found['mapped_by'] == f'a line fitted on {"validation" if held_out else "test"}'
    assert (found['slope'], found['intercept']) == pytest.approx(
        (expected.slope, expected.intercept))
    assert found['slope'] == pytest.approx(4.0, rel=0.1)
    assert found['coverage_error']['value'] < 0.03
    raw = diagnose(test, validation)['ratings']
    assert (raw['mapped_by'], raw['slope'], raw['intercept']) == ('nothing', 1.0, 0.0)
    assert raw['coverage_error']['value'] > 0.2


def test_length():
    p = made()
    lengths = p.lengths.copy()
    # The preferred side is twice as long in 600 pairs, half as long in 200, equal in 200.
    lengths[p.pairs[:, 1]] = 50
    lengths[p.pairs[:, 0]] = np.repeat([100, 25, 50], [600, 200, 200])
    found = diagnose(p._replace(lengths=lengths))['length']
    assert found['longer_is_preferred']['value'] == pytest.approx(0.7)
    margin = np.subtract(*p.means[p.pairs.T].astype(np.float64))
    right = (margin > 0).astype(float)
    assert found['longer_has_higher_reward']['value'] == pytest.approx(
        (right[:600].sum() + (1 - right[600:800]).sum() + 100) / 1000)
    assert found['matched_pairs'] == 200
    assert found['accuracy_matched']['value'] == pytest.approx(right[800:].mean())
    # Unrelated lengths leave the accuracy as it is.
    assert diagnose(p)['length']['accuracy_controlled']['value'] == pytest.approx(
        right.mean(), abs=0.03)


def test_intervals_are_over_opening_questions():
    p = made(400)
    # Ten copies of every comparison hold no more information than one.
    copies = 10
    offsets = 800 * np.arange(copies)[:, None, None]
    repeated = p._replace(
        pairs=(p.pairs + offsets).reshape(-1, 2),
        comparisons=(p.comparisons + offsets[:, 0] // 2).ravel(),
        comparison_ids=np.tile(p.comparison_ids, copies),
        comparison_groups=np.tile(p.comparison_groups, copies),
        **{name: np.concatenate([getattr(p, name)] * copies) for name in (
            'quantiles', 'means', 'stds', 'pair_stds', 'crps', 'ratings', 'lengths', 'label',
            'log_win', 'log_loss')})
    one, many = diagnose(p), diagnose(repeated)
    for section, name in (('calibration', 'nll'), ('ratings', 'crps'), ('spread', 'mean'),
                          ('ratings', 'rank_correlation_with_error')):
        assert many[section][name] == pytest.approx(one[section][name])


def test_intervals_contain_values_and_widen_with_the_level():
    p = made(300, annotators=5)
    wide, narrow = (diagnose(p, level=level) for level in (0.9, 0.5))
    for section, name in (('calibration', 'brier'), ('disagreement', 'margin'),
                          ('length', 'accuracy_controlled'), ('label_noise', 'margin')):
        a, b = wide[section][name], narrow[section][name]
        assert a['low'] < b['low'] < b['high'] < a['high']
        assert a['low'] < a['value'] < a['high']


# What is missing is named.


def numbers(tree):
    """All numbers with intervals in a diagnosis, by their path."""
    if isinstance(tree, dict) and {'value', 'low', 'high'} <= tree.keys():
        return {'': tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(
        tree) if isinstance(tree, list) else ()
    return {f'{key}/{path}': number for key, branch in items
            for path, number in numbers(branch).items()}


@pytest.mark.parametrize(('test', 'validation', 'missing'), [
    (made(rated=False), None, {
        'ratings/crps/': '0 test responses with one rating, fewer than 20',
        'per_tau/3/coverage/': '0 test responses with one rating, fewer than 20',
        'disagreement/spread/': 'there are no soft labels',
        'calibration/temperature/': 'there is no validation split',
        'calibration/after/nll/': 'there is no validation split'}),
    (made(annotators=7), made(300, seed=1, sharp=-1.0), {
        'calibration/temperature/': 'the win probabilities are no better than a coin'}),
    (made(scale=-1.0), None, {
        'ratings/crps/': 'ratings do not rise with the reward, so no line maps its quantiles to '
                         'theirs'}),
    (made()._replace(pairs=np.empty((0, 2), np.int32), pair_stds=NONE, label=NONE, log_win=NONE,
                     log_loss=NONE),
     None, dict.fromkeys(
        ('accuracy/', 'per_tau/0/accuracy/', 'disagreement/margin/', 'label_noise/margin/',
         'calibration/ece/', 'calibration/reliability/4/observed/', 'length/accuracy_controlled/'),
        'no pair has a preferred side')),
    (made(100), None, {'label_noise/gain/': '10 pairs with a wrong label, fewer than 20'}),
])
def test_reasons(test, validation, missing, true_spread):
    found = diagnose(test, validation, fits_ratings=False)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    of = numbers(found)
    assert of.keys() == numbers(true_spread).keys()
    for path, reason in missing.items():
        assert of[path] == {'value': None, 'low': None, 'high': None, 'reason': reason}
    for number in of.values():
        assert (number['low'] is None) == ('reason' in number)
    assert verdict.verdict(found).count('\n\n') == verdict.verdict(
        true_spread).count('\n\n')


def test_too_few_opening_questions_have_values_without_intervals():
    found = diagnose(made(300, size=11))
    assert found['counts']['opening_questions'] < resampling.MIN_GROUPS
    assert found['accuracy']['value'] > 0.5
    for number in numbers(found).values():
        assert number['low'] is None
        assert number['reason']
    assert conclusion(found).startswith('Not known')


# The verdict.


def test_the_verdict_states_its_rules_and_answers_every_question(true_spread):
    text = verdict.verdict(true_spread)
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 96
    flat = ' '.join(text.split())
    for bound in ('below 0.1 means one constant', 'below 0.1 means that the reward',
                  '(bound 0.95)', '(bound 0.05)', 'label is below 0.75', '10% of the pairs',
                  'within a factor of 1.25', '95% intervals', 'else disagreement'):
        assert bound in flat
    paragraphs = flat_paragraphs(text)
    assert [p.split('?')[0] for p in paragraphs if '?' in p] == [
        'Is the spread information or decoration', 'Does the spread vary',
        'Does it say more than the reward', 'Does it foretell errors against ratings',
        'Does it find disagreement', 'Does it help to find wrong labels',
        'Are the win probabilities calibrated', 'Is the reward length', 'Does it read the prompt']
    value = true_spread['spread']['variation']
    assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in text
    # No line ends within an interval.
    assert not any(line.endswith(',') and line[-2].isdigit() for line in text.splitlines())
    assert not any(line.startswith('[') for line in text.splitlines())


def flat_paragraphs(text):
    return [' '.join(paragraph.split()) for paragraph in text.split('\n\n')]


@pytest.mark.parametrize(('settings', 'evidence'), [
    ({'annotators': 7, 'rated': True}, 'its rank correlation with the error against ratings'),
    ({'annotators': 7, 'rated': False}, 'its AUROC for disagreement at equal margin'),
    ({'rated': False}, "what it adds to the margin's AUROC for wrong labels"),
])
def test_the_most_direct_evidence_decides(settings, evidence):
    found = conclusion(diagnose(made(**settings), fits_ratings=settings['rated']))
    assert evidence in found
    assert ('The model saw no ratings' in found) != settings['rated']


@pytest.mark.parametrize(('low', 'high', 'word'), [
    (0.01, 0.05, 'Information'), (-0.01, 0.02, 'Not shown'), (-0.05, -0.01, 'Not shown')])
def test_discounting_at_random_is_a_loss_and_shows_nothing(low, high, word):
    found = diagnose(made(rated=False), fits_ratings=False)
    found['label_noise']['gain'] = {'value': (low + high) / 2, 'low': low, 'high': high}
    assert conclusion(found).startswith(f'{word}: what it adds')


def test_the_settings_are_in_the_result(true_spread):
    settings = true_spread['settings']
    assert settings | SETTINGS | {'fits_ratings': True} == settings
    assert settings['constant_spread'] == diagnostics.CONSTANT_SPREAD
    with pytest.raises(ValueError, match='level'):
        diagnose(made(100), level=1.0)
    with pytest.raises(ValueError, match='replicates'):
        diagnose(made(100), replicates=0)


def test_prompt():
    rng = np.random.default_rng(5)
    own, shared = rng.normal(0.5, 1.0, 400), rng.normal(0.5, 1.0, 400)

    def of(margin, groups=None):
        return pair_predictions(margin[:, None], np.zeros((400, 1)), groups=groups)

    # A reward that is a function of the response alone does not change.
    same = diagnose(of(own), exchanged=of(own))
    assert same['prompt']['pairs'] == 400
    assert same['prompt']['gain'] == {'value': 0.0, 'low': 0.0, 'high': 0.0}
    assert same['prompt']['margin_gain'] == {'value': 0.0, 'low': 0.0, 'high': 0.0}
    assert same['prompt']['changed_order']['value'] == 0.0
    assert same['prompt']['rank_correlation_of_margins']['value'] == pytest.approx(1.0)
    text = ' '.join(verdict.verdict(same).split())
    assert 'Does it read the prompt? Not shown: with the prompts of 400 pairs exchanged' in text
    # One that knows nothing without its prompt is a coin with another one.
    coin = rng.normal(0.0, 1.0, 400)
    found = diagnose(of(own), exchanged=of(coin))['prompt']
    accuracy, exchanged = np.mean(own > 0), np.mean(coin > 0)
    assert found['accuracy']['value'] == pytest.approx(accuracy)
    assert found['accuracy_exchanged']['value'] == pytest.approx(exchanged)
    assert found['gain']['value'] == pytest.approx(accuracy - exchanged)
    assert found['margin_gain']['value'] == pytest.approx(
        (own.mean() - coin.mean()) / own.std(), rel=1e-5)
    assert 0.1 < found['margin_gain']['low'] < found['margin_gain']['high'] < 0.9
    assert found['changed_order']['value'] == pytest.approx(np.mean((own > 0) != (coin > 0)))
    assert found['gain']['low'] > 0.0
    assert abs(found['rank_correlation_of_margins']['value']) < 0.15
    # Pairs are matched by comparison and response, whatever else was exchanged.
    order = rng.permutation(400)[:100]
    part = of(shared)
    some = pair_predictions(shared[order, None], np.zeros((100, 1)))._replace(
        comparison_ids=part.comparison_ids[order])
    found = diagnose(of(own), exchanged=some)['prompt']
    assert found['pairs'] == 100
    assert found['accuracy']['value'] == pytest.approx(np.mean(own[order] > 0))
    assert found['accuracy_exchanged']['value'] == pytest.approx(np.mean(shared[order] > 0))
    equal = diagnose(of(np.ones(400)), exchanged=of(coin))['prompt']
    assert equal['margin_gain']['reason'] == 'all margins are equal'
    few = diagnose(of(own), exchanged=pair_predictions(np.ones((5, 1)), np.zeros((5, 1))))
    assert few['prompt']['gain']['reason'] == '5 pairs with another prompt, fewer than 20'
    none = diagnose(of(own))
    assert none['prompt']['gain']['reason'] == 'no prompts were exchanged'
    assert 'Does it read the prompt? Not known: no prompts' in ' '.join(
        verdict.verdict(none).split())


def test_pairs_of_rankings_are_matched_by_response():
    def of(comparisons, pairs, ids):
        n = len(comparisons)
        return pair_predictions(np.zeros((1, 1)), np.zeros((1, 1)))._replace(
            comparisons=np.array(comparisons, np.int32), pairs=np.array(pairs, np.int32),
            comparison_ids=np.array(ids), means=np.arange(n, dtype=np.float32))

    test = of([0, 0, 0, 1, 1], [[0, 1], [0, 2], [4, 3]], ['a', 'b'])
    other = of([0, 0, 1, 1, 1], [[1, 0], [2, 4]], ['b', 'a'])
    first, second = diagnostics.matching_pairs(test, other)
    assert (first.tolist(), second.tolist()) == ([1, 2], [1, 0])


# The place of a response.


def pairs_in_both_orders(log_odds, label=1.0):
    """Predictions of pairs with these log odds [n, 2] of the preferred response."""
    log_odds = np.array(log_odds, np.float32)
    both = log_odds.mean(axis=1)
    return pair_predictions(
        both[:, None] / 2.0, -both[:, None] / 2.0, label=label, order_log_odds=log_odds,
        log_win=-np.logaddexp(0.0, -both), log_loss=-np.logaddexp(0.0, both))


def test_what_the_place_is_worth_by_hand():
    # Right in both orders; right where it stands first, and by both; wrong by both; a tie.
    log_odds = [[3.0, 1.0], [2.0, -1.0], [1.0, -4.0], [1.0, -1.0]] * 10
    found = diagnose(pairs_in_both_orders(log_odds), fits_ratings=False)['position']
    values = {name: number['value'] for name, number in found.items()}
    assert values['accuracy'] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert values['accuracy_first'] == 1.0
    assert values['accuracy_second'] == 0.25
    assert values['flips'] == 0.75
    assert values['first_is_chosen'] == (0.5 + 1 + 1 + 1) / 4
    assert values['first_log_odds'] == pytest.approx((1.0 + 1.5 + 2.5 + 1.0) / 4)
    assert values['nll'] == pytest.approx(np.mean(np.log1p(np.exp([-2.0, -0.5, 1.5, 0.0]))))
    assert values['nll_one_order'] == pytest.approx(
        np.mean(np.log1p(np.exp(-np.array(log_odds)))), rel=1e-6)
    assert all(number['low'] <= number['value'] <= number['high'] for number in found.values())
    assert diagnostics.position(pairs_in_both_orders(log_odds), **SETTINGS) == found
    text = verdict.verdict(diagnose(pairs_in_both_orders(log_odds), fits_ratings=False))
    paragraph = ' '.join(text.split('\n\n')[-1].split())
    assert paragraph.startswith('Does it matter which response stands first? Yes: the first is '
                                'chosen at a rate of 0.875 [')
    assert 'standing first is worth 1.500 [' in paragraph
    assert 'The share 0.750 [' in paragraph


def test_a_place_that_is_worth_nothing_on_average_may_matter():
    def paragraph(log_odds):
        text = verdict.verdict(diagnose(pairs_in_both_orders(log_odds), fits_ratings=False))
        return ' '.join(text.split('\n\n')[-1].split())

    # Most decisions are for the first, by little; some against it, by as much in all.
    most = paragraph([[1.0, -1.0]] * 40 + [[-4.0, 4.0]] * 10)
    assert 'stands first? Yes: the first is chosen at a rate of 0.800 [' in most
    assert 'standing first is worth 0.000 [' in most
    even = paragraph([[1.0, -1.0], [-1.0, 1.0]] * 25)
    assert 'stands first? Not shown: the first is chosen at a rate of 0.500 [' in even


def test_soft_labels_count_in_both_orders():
    found = diagnose(pairs_in_both_orders([[2.0, 0.0]] * 40, label=0.75),
                     fits_ratings=False)['position']
    expected = [0.75 * np.log1p(np.exp(-x)) + 0.25 * np.log1p(np.exp(x)) for x in (2.0, 0.0)]
    assert found['nll_one_order']['value'] == pytest.approx(np.mean(expected), rel=1e-6)


def test_models_that_read_responses_alone_have_no_place(true_spread):
    assert {number['value'] for number in true_spread['position'].values()} == {None}
    assert true_spread['position']['flips']['reason'] == 'the model reads each response alone'
    assert 'stands first' not in verdict.verdict(true_spread)
