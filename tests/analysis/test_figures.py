"""Tests of the figures: what is drawn is read back from the axes and from the files."""

import json

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from qrm.analysis import diagnostics, figures, verdict
from tests.helpers import pair_predictions

N_PAIRS, N_QUANTILES = 300, 10
STEPS = 60
FILES = ('figure2_reward_densities.png', 'figure3_outer_quantiles.png', 'training_curves.png')


def _random(quantiles=N_QUANTILES, shift=1.0, seed=0):
    """Quantiles of normal distributions whose means are 0.5 shift and -0.5 shift on average."""
    rng = np.random.default_rng(seed)
    spread = scipy.stats.norm.ppf((np.arange(quantiles) + 0.5) / quantiles)
    sides = (sign * 0.5 * shift + rng.standard_normal((N_PAIRS, 1)) + spread for sign in (1, -1))
    return pair_predictions(*sides)


def _rows(steps=STEPS, every=20, seed=0):
    """Rows of metrics.jsonl: every step of training, a validation after every `every` steps."""
    rng = np.random.default_rng(seed)

    def values(loss):
        return {loss: rng.normal(0.6 + 0.6 / step, 0.05), 'accuracy': rng.normal(0.7, 0.05)}

    rows = []
    for step in range(1, steps + 1):
        rows.append({'step': step, 'split': 'train'} | values('loss'))
        if step % every == 0:
            rows.append({'step': step, 'split': 'validation'} | values('nll'))
    return rows


def _diagnosed(quantiles=N_QUANTILES, **fields):
    """Predictions with ratings, and their diagnosis."""
    p = _random(quantiles)
    ratings = p.means + np.random.default_rng(1).standard_normal(2 * N_PAIRS)
    rng = np.random.default_rng(2)
    p = p._replace(**{
        'ratings': ratings.astype(np.float32), 'stds': rng.uniform(0.5, 1.5, 2 * N_PAIRS),
        'log_win': np.log(rng.uniform(0.3, 0.7, N_PAIRS)).astype(np.float32)} | fields)
    return p, diagnostics.diagnose(
        p, None, replicates=20, level=0.9, seed=0, fits_ratings=True)


def _intervals(axes):
    """(place, low, high) of the upright lines of each set."""
    return [np.array([(*line[:1, 0], *line[:, 1]) for line in lines.get_segments()])
            for lines in axes.collections]


def _axes():
    return Figure().add_subplot()


def _lines(axes):
    """Label -> line, of the lines that stand in the legend."""
    return {line.get_label(): line for line in axes.lines
            if not line.get_label().startswith('_')}


def _histograms(axes):
    """Colour -> (left edges, widths, heights) of the bars of that colour."""
    bars = {}
    for patch in axes.patches:
        bars.setdefault(patch.get_facecolor()[:3], []).append(
            (patch.get_x(), patch.get_width(), patch.get_height()))
    return {color: np.array(values).T for color, values in bars.items()}


def _mean(curve):
    x, y = curve
    return np.trapezoid(x * y, x)


@pytest.fixture
def runs():
    return {
        (workload, head): _random(quantiles, seed=i)
        for i, (workload, head, quantiles) in enumerate((
            ('helpful', 'scalar', 1), ('helpful', 'quantile', 10),
            ('harmless', 'scalar', 1), ('harmless', 'quantile', 10)))
    }


# What one panel shows.


def test_reward_densities_integrate_to_one_around_the_means_of_the_sides():
    axes, predictions = _axes(), _random(shift=3.0)
    figures.reward_densities(axes, predictions)
    lines = _lines(axes)
    assert list(lines) == ['chosen', 'rejected']
    for line, quantiles in zip(lines.values(), (predictions.chosen, predictions.rejected),
                               strict=True):
        curve = line.get_data()
        assert np.trapezoid(curve[1], curve[0]) == pytest.approx(1.0, abs=1e-3)
        assert _mean(curve) == pytest.approx(quantiles.mean(), abs=5e-3)
    assert axes.get_xlabel() == 'reward'


def test_reward_histograms_share_bins_and_count_every_response():
    axes, predictions = _axes(), _random(quantiles=1)
    figures.reward_densities(axes, predictions)
    bars = _histograms(axes)
    assert set(bars) == {to_rgba(color)[:3] for color in (figures.CHOSEN, figures.REJECTED)}
    (left_a, width_a, height_a), (left_b, width_b, height_b) = bars.values()
    np.testing.assert_array_equal(left_a, left_b)
    for width, height in ((width_a, height_a), (width_b, height_b)):
        counts = width * height * N_PAIRS
        assert counts.sum() == pytest.approx(N_PAIRS)
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-6)


@pytest.mark.parametrize('index', [0, 3, 9])
def test_outer_quantile_shows_the_quantile_asked_for(index):
    axes, predictions = _axes(), _random()
    figures.outer_quantile(axes, predictions, index)
    expected = {
        'all responses': np.r_[predictions.chosen[:, index], predictions.rejected[:, index]],
        'chosen': predictions.chosen[:, index],
        'rejected': predictions.rejected[:, index],
    }
    lines = _lines(axes)
    assert list(lines) == list(expected)
    for label, values in expected.items():
        curve = lines[label].get_data()
        assert np.trapezoid(curve[1], curve[0]) == pytest.approx(1.0, abs=1e-3)
        assert _mean(curve) == pytest.approx(values.mean(), abs=5e-3)
    (_, width, height), = _histograms(axes).values()
    assert np.sum(width * height) == pytest.approx(1.0)
    assert f'quantile {index} (τ = {0.05 + 0.1 * index:.2f})' in axes.get_title()
    assert f'n = {2 * N_PAIRS} responses' in axes.get_title()


def test_outer_quantile_states_its_rank_correlation_with_the_mean():
    # Two quantiles m - s and m + s. With s = exp(m) the upper one rises with the mean m; the lower
    # one, m - exp(m), falls where m > 0.
    m = np.linspace(0.5, 2.0, 2 * N_PAIRS)[:, None]
    both = np.concatenate([m - np.exp(m), m + np.exp(m)], axis=1)
    predictions = pair_predictions(both[::2], both[1::2])
    for index, expected in ((0, '-1.000'), (1, '1.000')):
        axes = _axes()
        figures.outer_quantile(axes, predictions, index)
        assert axes.get_title().endswith(f' {expected}')
        legend, panel = axes.get_legend().get_window_extent(), axes.get_window_extent()
        on_the_left = legend.x1 < (panel.x0 + panel.x1) / 2
        assert on_the_left == (index == 1)  # beside the curves, which stand on the other side


def test_training_curve_shows_the_rows():
    axes, rows = _axes(), _rows()
    figures.training_curve(axes, rows)
    lines = _lines(axes)
    assert list(lines) == ['train loss, each step', 'train loss, smoothed', 'validation NLL (nats)']
    raw, smoothed, validation = (line.get_data() for line in lines.values())
    train = [row for row in rows if row['split'] == 'train']
    np.testing.assert_array_equal(raw[0], np.arange(1, STEPS + 1))
    np.testing.assert_array_equal(raw[1], [row['loss'] for row in train])
    np.testing.assert_array_equal(validation[0], [20, 40, 60])
    np.testing.assert_array_equal(
        validation[1], [row['nll'] for row in rows if row['split'] == 'validation'])
    # 60 // 20 = 3 values around each, two at the ends.
    np.testing.assert_allclose(smoothed[1][30], np.mean(raw[1][29:32]))
    np.testing.assert_allclose(smoothed[1][[0, -1]], [np.mean(raw[1][:2]), np.mean(raw[1][-2:])])


def test_training_curve_of_another_metric():
    axes, rows = _axes(), _rows()
    del rows[0]['accuracy']  # of a step without pairs
    figures.training_curve(axes, rows, 'accuracy', 'accuracy')
    raw, _, validation = _lines(axes).values()
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(2, STEPS + 1))
    np.testing.assert_array_equal(
        validation.get_ydata(), [row['accuracy'] for row in rows if row['split'] == 'validation'])
    assert axes.get_ylabel() == 'accuracy'


@pytest.mark.parametrize('rows', [[], _rows(steps=1)], ids=['no rows', 'one row'])
def test_training_curve_of_a_run_that_has_hardly_begun(rows):
    axes = _axes()
    figures.training_curve(axes, rows)
    raw, smoothed, validation = _lines(axes).values()
    assert len(raw.get_xdata()) == len(smoothed.get_xdata()) == len(rows)
    assert len(validation.get_xdata()) == 0


# Diagnostics.


def test_reliability_shows_bins_with_their_intervals():
    axes, (_, diagnosis) = _axes(), _diagnosed()
    figures.reliability(axes, diagnosis)
    rows = [row for row in diagnosis['calibration']['reliability'] if row['pairs'] >= 20]
    assert len(rows) == 4
    calibrated, observed = _lines(axes).values()
    np.testing.assert_array_equal(*calibrated.get_data())
    np.testing.assert_allclose(observed.get_xdata(), [row['confidence'] for row in rows])
    np.testing.assert_allclose(observed.get_ydata(), [row['observed']['value'] for row in rows])
    lines, = _intervals(axes)
    np.testing.assert_allclose(lines[:, 1:], [
        (row['observed']['low'], row['observed']['high']) for row in rows])
    assert axes.get_title() == f'calibration error {diagnosis["calibration"]["ece"]["value"]:.3f}'


def test_spread_against_reward_shows_responses_and_means():
    axes, (p, diagnosis) = _axes(), _diagnosed()
    figures.spread_against_reward(axes, diagnosis, p)
    responses, means = _lines(axes).values()
    order = np.argsort(p.means)
    np.testing.assert_allclose(responses.get_data(), [p.means[order], p.stds[order]], rtol=1e-6)
    np.testing.assert_allclose(means.get_ydata(), p.stds[order].reshape(10, -1).mean(axis=1))
    share = diagnosis['spread']['unexplained_share']['value']
    assert f' {share:.3f} of its variance' in axes.get_title()


def test_quantiles_as_rewards_and_coverage_show_every_tau():
    _, diagnosis = _diagnosed()
    rows = diagnosis['per_tau']
    for draw, keys in ((figures.quantiles_as_rewards, ['rank_correlation_with_reward', 'accuracy']),
                       (figures.coverage, ['coverage'])):
        axes = _axes()
        draw(axes, diagnosis)
        curves = [line for label, line in _lines(axes).items() if label != 'exact']
        for line, lines, key in zip(curves, _intervals(axes), keys, strict=True):
            np.testing.assert_allclose(line.get_xdata(), [row['tau'] for row in rows])
            np.testing.assert_allclose(line.get_ydata(), [row[key]['value'] for row in rows])
            np.testing.assert_allclose(lines, [
                (row['tau'], row[key]['low'], row[key]['high']) for row in rows])


def test_diagnostics_of_every_kind_of_run_are_drawn():
    none = np.empty(0, np.float32)
    cases = {
        'all': ({}, [True] * 4),
        'no ratings': ({'ratings': np.full(2 * N_PAIRS, np.nan)}, [True, True, True, False]),
        'no spread': ({'stds': np.zeros(2 * N_PAIRS)}, [True, False, True, True]),
        'one quantile': ({'quantiles': 1, 'stds': np.zeros(2 * N_PAIRS)},
                         [True, False, False, True]),
        'no pairs': ({'pairs': np.empty((0, 2), np.int32), 'pair_stds': none, 'label': none,
                      'log_win': none, 'log_loss': none}, [False, True, True, True]),
        'few opening questions': ({'comparison_groups': np.arange(N_PAIRS) % 5}, [True] * 4),
    }
    for name, (fields, visible) in cases.items():
        p, diagnosis = _diagnosed(**fields)
        figure = figures.draw_diagnostics(diagnosis, p)
        assert [axes.get_visible() for axes in figure.axes] == visible, name
        title = ' '.join(figure.get_suptitle().split())
        assert title.endswith(verdict.conclusion(diagnosis)), name


def test_draw_diagnostics_can_be_saved(tmp_path):
    p, diagnosis = _diagnosed()
    figures.draw_diagnostics(diagnosis, p).savefig(tmp_path / 'diagnostics.png')
    assert (tmp_path / 'diagnostics.png').stat().st_size > 10_000


# Densities.


def test_density_matches_kernels_summed_by_hand():
    values = np.array([0.0, 1.0, 5.0])
    x, y = figures.density(values)
    # Scott: the standard deviation (n - 1 in the denominator) times n^(-1/5).
    bandwidth = np.std(values, ddof=1) * 3 ** -0.2
    expected = scipy.stats.norm.pdf(x[:, None], values, bandwidth).mean(axis=1)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
@pytest.mark.parametrize('center', [0.0, 5.0])
def test_density_integrates_to_one_at_any_scale(scale, center):
    values = np.float32(center + scale * np.random.default_rng(0).standard_normal(200))
    x, y = figures.density(values)
    assert np.trapezoid(y, x) == pytest.approx(1.0, abs=1e-3)
    middle = values.mean(dtype=np.float64)
    assert np.trapezoid((x - middle) * y, x) == pytest.approx(0.0, abs=5e-3 * scale)


@pytest.mark.parametrize('values', [np.zeros(5), np.full(5, -0.3), np.array([2.0]),
                                    np.float32([0.3, 0.3 + 3e-8, 0.3])])
def test_equal_values_have_no_density(values):
    assert figures.density(values) is None
    assert np.isnan(figures.rank_correlation(values, np.arange(len(values))))


def test_constant_sides_are_lines():
    axes = _axes()
    figures.reward_densities(axes, pair_predictions(np.full((20, 1), 1.5), np.full((20, 1), -0.5)))
    lines = _lines(axes)
    assert list(lines) == ['chosen (all equal)', 'rejected (all equal)']
    assert [line.get_xdata()[0] for line in lines.values()] == [1.5, -0.5]


def test_one_constant_side_does_not_hide_the_other():
    axes = _axes()
    figures.reward_densities(
        axes, pair_predictions(np.full((N_PAIRS, 1), 1.5), _random(1).rejected))
    assert list(_lines(axes)) == ['chosen (all equal)', 'rejected']


# Figures and files.


def test_panels_of_each_figure(runs):
    def titles(figure):
        return [axes.get_title().split(',')[0] + '|' + axes.get_title() for axes in figure.axes]

    densities = titles(figures.draw_reward_densities(runs))
    assert len(densities) == 4
    for title, (workload, head) in zip(densities, runs, strict=True):
        assert workload in title
        assert f'{head}, n = {N_PAIRS} pairs' in title
    outer = titles(figures.draw_outer_quantiles(
        {workload: p for (workload, head), p in runs.items() if head == 'quantile'}))
    assert [(title.split('|')[0], index) for title in outer for index in (0, 9)
            if f'quantile {index} ' in title] == [
                ('helpful', 0), ('helpful', 9), ('harmless', 0), ('harmless', 9)]
    curves = figures.draw_training_curves({'a': _rows(), 'b': _rows(), 'c': []})
    assert [axes.get_title() for axes in curves.axes] == ['a', 'a', 'b', 'b', 'c', 'c']


def test_panels_without_a_run_are_hidden(runs):
    del runs['harmless', 'scalar']
    figure = figures.draw_reward_densities(runs)
    assert [axes.get_visible() for axes in figure.axes] == [True, True, False, True]


def test_draw_all_writes_pictures(runs, tmp_path):
    for workload, head in runs:
        folder = tmp_path / f'{workload}-{head}'
        folder.mkdir()
        (folder / 'metrics.jsonl').write_text(
            ''.join(json.dumps(row) + '\n' for row in _rows()), encoding='utf-8')
    figures.draw_all(str(tmp_path), runs)
    files = sorted((tmp_path / 'figures').iterdir())
    assert tuple(file.name for file in files) == FILES
    for file in files:
        pixels = matplotlib.image.imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 500
        assert pixels.std() > 0.05
        # Ink in every quarter, so that no column or row of panels is blank.
        half = [size // 2 for size in pixels.shape[:2]]
        for rows in (slice(half[0]), slice(half[0], None)):
            for columns in (slice(half[1]), slice(half[1], None)):
                assert pixels[rows, columns].std() > 0.05
        assert file.stat().st_size < 300_000


def test_draw_all_of_constant_rewards_without_metrics(tmp_path):
    """A model that has collapsed, in a folder whose metrics are gone, is still drawn."""
    constant = np.tile(np.linspace(-1.0, 1.0, N_QUANTILES), (20, 1))
    figures.draw_all(str(tmp_path), {('helpful', 'quantile'): pair_predictions(constant, constant)})
    assert sorted(file.name for file in (tmp_path / 'figures').iterdir()) == sorted(FILES)


def test_scalar_heads_have_no_outer_quantiles(runs, tmp_path):
    scalar = {key: p for key, p in runs.items() if key[1] == 'scalar'}
    figures.draw_all(str(tmp_path), scalar)
    assert sorted(file.name for file in (tmp_path / 'figures').iterdir()) == [FILES[0], FILES[2]]
