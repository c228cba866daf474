"""Rules of benchmarks: against rewardbench's own code, and by hand."""

import json

import numpy as np
import pytest

from qrm.analysis import benchmarks
from qrm.data import demo, suites
from qrm.data.comparisons import Comparison, DataError
from qrm.data.seen import Seen
from qrm.data.suites import Question
from qrm.rewards import selection
from qrm.training.workdir import WorkdirError
from tests.helpers import ROOT, small_pairwise_model, small_reward_model

REFERENCE = json.loads((ROOT / 'tests/reference/benchmarks.json').read_text())


def question(subset, right=1, wrong=1, kind='', group=''):
    responses = tuple(f'r{i}' for i in range(right + wrong))
    return Question(Comparison(f'{subset} {group} {kind}', 'p', responses, group or 'g'), right,
                    subset, kind)


def numbers(suite, questions, scores, weights=None):
    """Numbers of a suite by name."""
    protocol = benchmarks.PROTOCOLS[suite]
    values = np.array([protocol.judge(q, np.array(s, float))
                       for q, s in zip(questions, scores, strict=True)])
    weights = np.ones(len(questions)) if weights is None else np.array(weights)
    return {cell.name: cell.value(values, weights) for cell in protocol.cells(questions)}


def test_best_of_four_is_that_of_rewardbench():
    """Equal highest scores share what is right."""
    found = [benchmarks.best(question('Focus', 1, 3), np.array(s))[0] for s in REFERENCE['four']]
    np.testing.assert_allclose(found, REFERENCE['four_results'], rtol=1e-12)
    assert {0.5, 1.0, 0.0} <= set(found)


def test_ties_composite_is_that_of_rewardbench():
    rows = REFERENCE['ties']
    questions = [question('Ties', row['num_correct'], len(row['scores']) - row['num_correct'],
                          *row['id'].split(':')) for row in rows]
    found = numbers('reward-bench-2', questions, [row['scores'] for row in rows])
    assert found['Ties'] == pytest.approx(REFERENCE['ties_score'], rel=1e-12)
    assert found['mean of subsets'] == found['Ties']


def test_sections_are_those_of_rewardbench():
    """A subset's accuracy is kept as the weight of one right question beside one that is wrong."""
    metrics = REFERENCE['metrics']
    questions = [question(name) for name in metrics for _ in range(2)]
    weights = [share for value in metrics.values() for share in (value, 1.0 - value)]
    found = numbers('reward-bench', questions, [(1, 0), (0, 1)] * len(metrics), weights)
    for section, value in REFERENCE['sections'].items():
        assert found[section] == pytest.approx(value, rel=1e-12)
    assert found['average'] == pytest.approx(np.mean(list(REFERENCE['sections'].values())))


def test_prior_sets_count_by_half():
    """Chat 1, Reasoning 0, prior sets (1 + 0) / 2: (1 + 0 + .5 / 2) / 2.5."""
    questions = [question(name) for name in (
        'mt-bench-med', 'hep-cpp', 'shp', 'summarize', 'anthropic_harmless')]
    found = numbers('reward-bench', questions, [(1, 0), (0, 0), (2, 1), (1, 1), (1, 0)])
    assert found['Prior Sets'] == 0.5  # without harmless
    assert found['average'] == pytest.approx(1.25 / 2.5)
    with pytest.raises(DataError, match="subset 'new', expected those of RewardBench"):
        numbers('reward-bench', [question('new')], [(1, 0)])


def test_rm_bench_by_hand():
    """Of chosen 1, 2, 3 and rejected 0, 2, 4: hard pairs are chosen i, rejected j > i.

    Ahead are 1 > 0, 2 > 0, 3 > 0 and 3 > 2; equal is not ahead.
    """
    scores = [(1, 2, 3, 0, 2, 4)]
    found = numbers('rm-bench', [question('chat', 3, 3)], scores)
    assert found['chat'] == found['mean of domains'] == pytest.approx(4 / 9)
    assert found['hard'] == 0.0  # (1, 2), (1, 4), (2, 4)
    assert found['normal'] == pytest.approx(1 / 3)  # (1, 0), (2, 2), (3, 4)
    assert found['easy'] == 1.0  # (2, 0), (3, 0), (3, 2)
    questions = [question(name, 3, 3) for name in ('math', 'safety-refuse', 'safety-response')]
    wrong = (0, 0, 0, 1, 1, 1)
    found = numbers('rm-bench', questions, [*scores, *scores, wrong])
    assert found['safety'] == pytest.approx(2 / 9)
    assert found['mean of domains'] == pytest.approx((4 / 9 + 2 / 9) / 2)


def test_rm_bench_as_its_own_code():
    """`compute_accuracy` of its repository, on the same scores; the halves of safety are pooled."""
    rows = REFERENCE['styles']
    found = numbers('rm-bench', [question(row['domain'], 3, 3) for row in rows],
                    [row['score_chosen'] + row['score_rejected'] for row in rows])
    names = {'hard_acc': 'hard', 'normal_acc': 'normal', 'easy_acc': 'easy',
             'total_avg_acc': 'mean of domains'}
    for name, value in REFERENCE['styles_results'].items():
        assert found[names.get(name, name)] == pytest.approx(value, rel=1e-12)


def test_judge_bench_counts_all_alike_and_ppe_subsets():
    questions = [question('mmlu-pro'), question('mmlu-pro'), question('livecodebench')]
    scores = [(1, 0), (0, 0), (0, 1)]
    assert numbers('judge-bench', questions, scores) == {
        'all': pytest.approx(1 / 3), 'mmlu-pro': 0.5, 'livecodebench': 0.0}
    assert numbers('ppe-correctness', questions, scores)['mean of subsets'] == 0.25


@pytest.fixture(scope='module')
def rows():
    """Pairs of 40 prompts; the right response is the longer one."""
    comparisons = demo.generate('helpful', 'test', 40, 0).comparisons
    return [{'prompt': f'Question {i}?', 'chosen': ' '.join(c.responses) + ' And more.',
             'rejected': c.responses[0], 'subset': 'donotanswer'}
            for i, c in enumerate(comparisons)]


@pytest.fixture(scope='module')
def model(rows):
    return small_reward_model(demo.generate('helpful', 'test', 40, 0).comparisons)


def test_every_rule_beside_the_other_and_baselines(tmp_path, model, rows):
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    text = benchmarks.benchmark(
        model, 'reward-bench', str(tmp_path / 'rows.jsonl'),
        rules=[selection.parse_rule(rule) for rule in ('quantile:0.1', 'cvar:1', 'sample:1')],
        output=str(tmp_path / 'out'), replicates=50)
    result = json.loads((tmp_path / 'out/benchmark.json').read_text())
    lines = [json.loads(line) for line in (tmp_path / 'out/scores.jsonl').read_text().splitlines()]
    assert (tmp_path / 'out/benchmark.md').read_text() == text + '\n'
    # Scored one by one, by the public interface.
    turns = [f'\n\nHuman: {row["prompt"]}\n\nAssistant:' for row in rows]
    alone = [model.score([turn], [[f' {row[key].strip()}' for key in ('chosen', 'rejected')]])
             for turn, row in zip(turns, rows, strict=True)]
    means = np.array([one.rewards[0] for one in alone])
    np.testing.assert_allclose([line['mean'] for line in lines], means, atol=1e-5)
    np.testing.assert_allclose([line['cvar:1'] for line in lines], means, atol=1e-5)
    lowest = np.sort([one.quantiles[0] for one in alone])[..., 0]
    np.testing.assert_allclose([line['quantile:0.1'] for line in lines], lowest, atol=1e-5)
    drawn = np.array([line['sample:1'] for line in lines])[..., None]
    assert np.abs(np.array([one.quantiles[0] for one in alone]) - drawn).min(axis=-1).max() < 1e-5
    cell = result['cells']['Safety']
    assert cell['questions'] == 40
    assert cell['mean']['value'] == np.mean(means[:, 0] > means[:, 1])
    assert cell['mean']['low'] <= cell['mean']['value'] <= cell['mean']['high']
    assert (cell['longest']['value'], cell['shortest']['value']) == (1.0, 0.0)
    assert abs(cell['random']['value'] - 0.5) < 0.03
    assert 'read as texts in turns' in text


def test_a_pairwise_model_is_judged_by_its_win_probabilities(tmp_path, rows):
    model = small_pairwise_model(demo.generate('helpful', 'test', 40, 0).comparisons)
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    text = benchmarks.benchmark(
        model, 'reward-bench', str(tmp_path / 'rows.jsonl'), rules=[selection.parse_rule('cvar:1')],
        output=str(tmp_path / 'out'), replicates=50)
    result = json.loads((tmp_path / 'out/benchmark.json').read_text())
    lines = [json.loads(line) for line in (tmp_path / 'out/scores.jsonl').read_text().splitlines()]
    wins = model.compare([f'\n\nHuman: {row["prompt"]}\n\nAssistant:' for row in rows],
                         [[row['chosen'], row['rejected']] for row in rows])
    np.testing.assert_allclose([line['mean'] for line in lines],
                               [[own[0, 1], own[1, 0]] for own in wins], atol=1e-5)
    assert result['rules'] == ['mean']
    assert result['cells']['Safety']['mean']['value'] == np.mean([own[0, 1] > 0.5 for own in wins])
    assert 'win probabilities of a response against the others of its question' in text


def test_questions_that_a_run_was_trained_on_are_counted(tmp_path, model, rows):
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows[:5])))
    asked = [q.comparison for q in suites.load('reward-bench', str(tmp_path / 'rows.jsonl'))]
    text = benchmarks.benchmark(model, 'reward-bench', str(tmp_path / 'rows.jsonl'), rules=[],
                                seen=Seen.of('', asked[:2]), replicates=20)
    assert 'note 2: row this run was trained on' in text


def test_few_prompts_have_no_interval(tmp_path, model, rows):
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows[:20] * 2)))
    benchmarks.benchmark(model, 'reward-bench', str(tmp_path / 'rows.jsonl'),
                         rules=[], output=str(tmp_path / 'out'), replicates=20)
    result = json.loads((tmp_path / 'out/benchmark.json').read_text())
    assert result['cells']['average']['questions'] == 40
    assert result['cells']['average']['mean']['low'] is None


def test_what_cannot_be_used_is_told_before_anything_is_scored(tmp_path, model, rows, monkeypatch):
    monkeypatch.setattr(type(model), 'predict', None)
    path = tmp_path / 'rows.jsonl'
    path.write_text(json.dumps(rows[0] | {'subset': 'new'}))
    with pytest.raises(DataError, match="subset 'new', expected those of RewardBench"):
        benchmarks.benchmark(model, 'reward-bench', str(path), rules=[])
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(WorkdirError, match='rows.jsonl'):
        benchmarks.benchmark(model, 'reward-bench', str(path), rules=[], output=str(path))


def test_what_does_not_go_together(model):
    with pytest.raises(DataError, match='--prior=x with --suite=rm-bench, expected'):
        benchmarks.benchmark(model, 'rm-bench', 'y', rules=[], prior='x')
    for rule, said in (('mean-std:1', 'needs a scale .*; a benchmark judges raw rewards'),
                       ('disagreement:1', 'of a head with one member')):
        with pytest.raises(DataError, match=said):
            benchmarks.benchmark(model, 'rm-bench', 'y', rules=[selection.parse_rule(rule)])
