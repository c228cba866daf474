"""Labels are the mean of both orders, what the order does is told, and nothing is asked twice."""

import fcntl
import gzip
import json

import numpy as np
import pytest

from qrm.data import convert, demo, tokens
from qrm.data.comparisons import DataError, DataReport
from qrm.data.rows import as_row
from qrm.data.sources import load_splits
from qrm.data.tokens import Reading
from qrm.policy import judges, labels
from qrm.policy.labels import Kept, Output, Verdicts
from qrm.policy.questions import Answer, Options
from qrm.rewards import resampling
from qrm.training import config as config_lib
from tests.helpers import command


def data(path, **more):
    return config_lib.build({'data.path': str(path), 'data.cache': '', **more}).data


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def read(path):
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == '.gz' else content
    return [json.loads(line) for line in content.splitlines()]


def pairs_of(tmp_path, rows, which='all', **more):
    return labels.read_pairs(data(write(tmp_path / 'in.jsonl', rows), **more), which)


class Judge:
    """Says what `answer` makes of prompt, first and second response; counts what it is asked."""

    def __init__(self, answer, name='judge', identity='judge'):
        self.answer, self.name, self.identity, self.asked = answer, name, identity, []

    def __call__(self, pairs):
        for place, pair in enumerate(pairs):
            found = self.answer(pair.prompt, *pair.responses)
            self.asked.append((pair.prompt, *pair.responses))
            yield place, found if isinstance(found, Answer) else Answer(found)


@pytest.fixture
def use(monkeypatch):
    """Puts judges in the place of those that functions would be, by name."""
    def put(**known):
        for name, judge in known.items():
            judge.name = name
        monkeypatch.setitem(judges.KINDS, 'function', lambda spec, options: known[spec.name])
        return [judges.parse(f'{name}=function:m:f') for name in known]

    return put


def run(specs, source, target, output=None, **kwargs):
    return labels.label_file(specs, Options(), data(source), str(target), output or Output(),
                             **kwargs)


# P(first) in the order of the row and in the other one; and what the row says.
TABLE = [(0.9, 0.2, 1.0), (0.8, 0.7, 0.0), (1.0, 1.0, 0.5), (None, 0.4, 1.0), (0.4, 0.6, None)]
ROWS = [{'prompt': f'p{i}', 'responses': ['x', 'y']} | (
    {} if known is None else {'preference': known}) for i, (*_, known) in enumerate(TABLE)]


def by_table(prompt, first, second):
    return TABLE[int(prompt[1:])][0 if (first, second) == ('x', 'y') else 1]


def test_bias_consistency_and_agreement_by_hand(tmp_path):
    pairs, _ = pairs_of(tmp_path, ROWS)
    assert [pair.known for pair in pairs] == [1.0, 0.0, 0.5, 1.0, None]
    with Kept(str(tmp_path / 'kept')) as kept:
        verdicts = labels.ask(Judge(by_table), pairs, kept)
    # (.9 + 1 - .2) / 2, (.8 + 1 - .7) / 2, (1 + 1 - 1) / 2, none, (.4 + 1 - .6) / 2.
    np.testing.assert_allclose(verdicts.labels(), [0.85, 0.55, 0.5, np.nan, 0.4])
    found = labels.summarise(pairs, verdicts)
    value = {name: found[name]['value'] for name in (
        'first', 'consistent', 'ties', 'accuracy', 'log_loss')}
    # Of .05, .25, .5 and 0; the first and the last are decided alike; the third is a tie.
    assert value == pytest.approx({
        'first': 0.2, 'consistent': 0.5, 'ties': 0.25, 'accuracy': 0.5,
        'log_loss': -(np.log(0.85) + np.log(0.45) + np.log(0.5)) / 3})
    assert found['first']['low'] is None  # of 4 prompts
    assert found['unanswered'] == 0.1
    assert found['unanswered_pairs'] == 0.2
    assert (found['pairs'], found['questions'], found['known'], found['known_ties']) == (5, 10, 3,
                                                                                        1)
    assert verdicts.asked == 10


def test_a_tie_in_one_order_alone_is_decided_otherwise(tmp_path):
    pairs, _ = pairs_of(tmp_path, [{'prompt': f'p{i}', 'responses': ['x', 'y']} for i in range(3)])
    both = [(0.5, 0.5), (0.5, 0.4), (0.1 + 0.2, 0.7)]  # the last but for rounding .3
    found = labels.summarise(pairs, Verdicts(
        [tuple(map(Answer, own)) for own in both], 6, 0.0))
    assert found['consistent']['value'] == pytest.approx(2 / 3)
    assert found['ties']['value'] == pytest.approx(1 / 3)
    assert found['first']['value'] == pytest.approx(-0.05 / 3)
    assert found['accuracy']['value'] is None  # rows say nothing
    assert found['log_loss']['value'] is None


def test_hard_answers_have_a_finite_log_loss_that_is_told(tmp_path):
    pairs, _ = pairs_of(tmp_path, ROWS[:2])
    verdicts = Verdicts([(Answer(1.0), Answer(0.0))] * 2, 4, 0.0)
    found = labels.summarise(pairs, verdicts)
    assert found['log_loss']['value'] == pytest.approx(-np.log(1e-6) / 2)  # the first is right
    assert found['limited'] == 1
    text = '\n'.join(labels.describe(judges.parse('gold:helpful'), found, verdicts))
    assert '; 1 labels gave the preferred response less than 1e-06 and were taken for it' in text


def test_intervals_are_over_opening_questions(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.uniform(size=(80, 2))
    rows = [{'prompt': f'p{i}', 'responses': ['x', 'y'], 'group': f'g{i // 2}'} for i in range(80)]
    pairs, _ = pairs_of(tmp_path, rows)
    found = labels.summarise(pairs, Verdicts(
        [(Answer(a), Answer(b)) for a, b in table.tolist()], 160, 0.0))
    bias = table.mean(axis=1) - 0.5
    # Numbers of the groups in the order of their names, as clusters are drawn by.
    clusters = np.unique([row['group'] for row in rows], return_inverse=True)[1]
    weights = resampling.cluster_bootstrap_weights(clusters, labels.REPLICATES, labels.SEED)
    draws = (weights * bias).sum(axis=1) / weights.sum(axis=1)
    assert found['first'] == pytest.approx({
        'value': bias.mean(), 'low': np.quantile(draws, 0.025), 'high': np.quantile(draws, 0.975)})


def test_the_truth_of_the_demo_agrees_at_the_bayes_rate(tmp_path):
    made = demo.generate('harmless', 'test', 40, 1)
    pairs, _ = pairs_of(tmp_path, map(as_row, made.comparisons))
    with Kept(str(tmp_path / 'kept')) as kept:
        verdicts = labels.ask(judges.load(judges.parse('gold:harmless'), Options()), pairs, kept)
    found, best = labels.summarise(pairs, verdicts), demo.bayes(made)
    assert found['accuracy']['value'] == pytest.approx(best.accuracy, abs=1e-12)
    assert found['log_loss']['value'] == pytest.approx(best.nll, abs=1e-12)
    assert found['first']['value'] == pytest.approx(0.0, abs=1e-12)
    assert found['consistent']['value'] == 1.0


def test_rows_with_any_number_of_responses(tmp_path):
    rows = [{'id': 'a', 'prompt': 'p', 'responses': ['x', 'y', 'z'], 'ratings': [3, None, 1]},
            {'id': 'b', 'prompt': 'q', 'responses': ['x', 'x']},
            {'id': 'c', 'prompt': 'q', 'response': 'x'},
            {'id': 'd', 'chosen': '\n\nHuman: h\n\nAssistant: x',
             'rejected': '\n\nHuman: h\n\nAssistant: y', 'annotator': 'me', 'margin': 2.0}]
    pairs, notes = pairs_of(tmp_path, rows)
    assert [(pair.comparison.id, pair.comparison.responses, pair.known) for pair in pairs] == [
        ('a 0-1', ('x', 'y'), None), ('a 0-2', ('x', 'z'), 1.0), ('a 1-2', ('y', 'z'), None),
        ('d', (' x', ' y'), 1.0)]
    assert pairs[-1].comparison.annotator is None
    assert notes == {'pair of equal responses, not judged': 1,
                     'row with one response, not judged': 1}
    pairs, _ = pairs_of(tmp_path, rows, 'first')
    assert [pair.comparison.id for pair in pairs] == ['a 0-1', 'd']
    with pytest.raises(DataError, match='no row has two different responses to judge'):
        pairs_of(tmp_path, rows[1:3])


def test_rows_of_other_formats(tmp_path):
    rows = [{'ask': 'q', 'good': 'x', 'bad': 'y'}]
    (pair,), _ = pairs_of(tmp_path, rows, **{
        'data.columns': ('prompt=ask', 'chosen=good', 'rejected=bad')})
    assert (pair.comparison.prompt, pair.comparison.responses, pair.known) == ('q', ('x', 'y'), 1.0)


def test_soft_and_hard_labels(tmp_path):
    pairs, _ = pairs_of(tmp_path, ROWS)
    found = np.array([0.85, 0.55, 0.5, np.nan, 0.4])

    def written(*args):
        rows, dropped = labels.label_rows('j', pairs, found, Output(*args))
        assert len(rows) + sum(dropped.values()) == 5
        return [(row['prompt'], row.get('preference', row.get('preferred')))
                for row in rows], dropped

    none = {'not answered in both orders': 1}
    assert written() == ([('p0', 0.85), ('p1', 0.55), ('p2', 0.5), ('p4', 0.4)], none)
    assert written('soft', 0.6) == ([('p0', 0.85), ('p4', 0.4)],
                                    none | {'confidence below 0.6': 2})
    assert written('hard') == ([('p0', 0), ('p1', 0), ('p4', 1)], none | {'a tie': 1})
    assert written('hard', 0.8) == ([('p0', 0)],
                                    none | {'a tie': 1, 'confidence below 0.8': 2})


def test_several_judges_label_the_same_input(tmp_path, use):
    source = write(tmp_path / 'in.jsonl', ROWS)
    specs = use(table=Judge(by_table, identity='a'),
                second=Judge(lambda *_: Answer(0.25, share=0.5, read=7, written=2, cut=True),
                             identity='b'))
    message = run(specs, source, tmp_path / 'out.jsonl.gz')
    rows = read(tmp_path / 'out.jsonl.gz')
    assert [row['annotator'] for row in rows] == ['table'] * 4 + ['second'] * 5
    assert [row['id'] for row in rows[:2]] == [f'{source}:1 by table', f'{source}:2 by table']
    assert [row['preference'] for row in rows[4:]] == [0.5] * 5
    assert message.startswith(f'{tmp_path}/out.jsonl.gz: 9 rows, of 5 pairs\n')
    assert '  written: 4 rows, 1 left out (not answered in both orders)\n' in message
    assert '  probability of A and B together: mean 0.500 of all tokens\n' in message
    assert '  cost: 10 questions of 70 tokens, 20 tokens of answers, 10 questions cut; ' in message
    # Of four pairs that both have judged only the third is a tie of both.
    assert 'table and second: the same verdict on 0.250 of 4 pairs' in message
    with pytest.raises(DataError, match='expected different names'):
        run(specs[:1] * 2, source, tmp_path / 'out.jsonl.gz')


def test_labels_are_read_again_as_those_of_annotators(tmp_path, use):
    rows = [{'prompt': f'Please tell me about {i}.', 'responses': [' One.', f' Two of {i}.'],
             'group': f'g{i // 2}'} for i in range(12)]
    source = write(tmp_path / 'in.jsonl', rows)
    specs = use(mild=Judge(lambda p, a, b: 0.75 if 'One' in a else 0.5, identity='a'),
                harsh=Judge(lambda p, a, b: 1.0 if 'Two' in a else 0.0, identity='b'))
    run(specs, source, tmp_path / 'out.jsonl')
    said = convert.convert(data(tmp_path / 'out.jsonl'))
    assert '24 comparisons of 48 responses, 0 malformed rows' in said
    assert '  2: annotators' in said
    assert '  6: opening questions' in said
    assert 'note' not in said
    splits = load_splits(data(tmp_path / 'out.jsonl', **{
        'data.validation_fraction': 0.2, 'data.test_fraction': 0.2}), 'helpful')
    comparisons = [c for split, _ in splits.values() for c in split]
    tokenizer = tokens.train_tokenizer(tokens.texts_of(comparisons), 280)
    encoded = list(tokens.encode(comparisons, tokenizer, DataReport('', ''), Reading(64),
                                 named=True, annotators=('harsh', 'mild')))
    assert len(encoded) == 24
    # (.75 + 1 - .5) / 2, and 0 by one who always prefers the second of the row.
    assert {(one.annotator, float(one.preference[0, 1])) for one in encoded} == {(1, 0.625),
                                                                                (0, 0.0)}


def test_responses_that_begin_with_their_prompt_are_read_as_they_were(tmp_path, use):
    prompt = 'Tell me all of it.'
    source = write(tmp_path / 'in.jsonl', [
        {'prompt': prompt, 'responses': [f'{prompt}{prompt} x', f'{prompt}{prompt} y']}])
    run(use(j=Judge(lambda *_: 1.0)), source, tmp_path / 'out.jsonl')
    (before,), _ = labels.read_pairs(data(source), 'all')
    (after,), _ = labels.read_pairs(data(tmp_path / 'out.jsonl'), 'all')
    assert before.comparison.responses == (f'{prompt} x', f'{prompt} y')
    assert after.comparison.responses == before.comparison.responses


def test_a_run_that_was_ended_goes_on_without_asking_twice(tmp_path, use):
    source, target = write(tmp_path / 'in.jsonl', ROWS), tmp_path / 'out.jsonl'
    left = [7]

    def breaks(*asked):
        left[0] -= 1
        if left[0] < 0:
            raise DataError('gone')
        return by_table(*asked)

    with pytest.raises(DataError, match='gone'):
        run(use(j=Judge(breaks)), source, target)
    assert not target.exists()
    kept = tmp_path / 'out.jsonl.answers'
    assert len(read(kept)) == 7
    assert not any(word in kept.read_text() for word in ('p0', '"x"'))  # digests, no texts
    whole = kept.read_bytes()
    kept.write_bytes(whole + b'{"key": "cut')  # as a kill leaves it
    judge = Judge(by_table)
    message = run(use(j=judge), source, target)
    assert len(judge.asked) == 3
    assert '10 questions, 3 of them asked now' in message
    assert kept.read_bytes().startswith(whole)
    assert len(read(kept)) == 10
    expected = read(target)
    # Once more: nothing is asked, and the same is written; another judge is asked all.
    judge = Judge(by_table, name='other')
    run(use(j=judge), source, target)
    assert (judge.asked, read(target)) == ([], expected)
    judge = Judge(by_table, identity='another template')
    run(use(j=judge), source, target)
    assert len(judge.asked) == 10
    # The cache may stand elsewhere.
    judge = Judge(by_table)
    run(use(j=judge), source, tmp_path / 'second.jsonl', cache=str(kept))
    assert judge.asked == []
    assert not (tmp_path / 'second.jsonl.answers').exists()


def test_equal_questions_are_asked_once_and_failures_to_reach_a_judge_again(tmp_path):
    pairs, _ = pairs_of(tmp_path, [{'prompt': 'p', 'responses': ['x', 'y']},
                                   {'prompt': 'p', 'responses': ['y', 'x']}])
    judge = Judge(lambda p, a, b: Answer(None, 'gone', final=False) if a == 'x' else 0.25)
    for asked in (2, 1):
        with Kept(str(tmp_path / 'kept')) as kept:
            verdicts = labels.ask(judge, pairs, kept)
        assert verdicts.asked == asked
        assert verdicts.answers[0] == verdicts.answers[1][::-1]
        assert np.isnan(verdicts.labels()).all()
    assert [row['probability'] for row in read(tmp_path / 'kept')] == [0.25]


@pytest.mark.parametrize('line', [
    '[]', '{}', 'x', '{"key": "k"}', '{"key": "k", "probability": "x"}',
    '{"key": "k", "probability": 1.5}', '{"key": "k", "probability": 0.5, "more": 1}',
    '{"key": "k", "probability": 0.5, "read": "x"}', '{"key": "k", "probability": NaN}'])
def test_a_file_that_holds_no_answers_is_left_as_it_is(tmp_path, line):
    path = tmp_path / 'kept'
    path.write_text(f'{{"key": "k", "probability": 0.5}}\n{line}\n')
    with pytest.raises(DataError, match='kept:2: no answer of a judge'), Kept(str(path)):
        pass
    assert path.read_text().endswith(f'{line}\n')


def test_files_that_cannot_keep_answers(tmp_path, use):
    source = write(tmp_path / 'in.jsonl', ROWS)
    specs = use(j=Judge(by_table))
    with pytest.raises(DataError, match='expected another file to keep answers in'):
        run(specs, source, tmp_path / 'out.jsonl', cache=str(source))
    with pytest.raises(DataError, match=r'none/x: cannot be written \(No such file'):
        run(specs, source, tmp_path / 'out.jsonl', cache=str(tmp_path / 'none/x'))
    with open(tmp_path / 'kept', 'a+b') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match='kept: another process keeps answers in it'):
            run(specs, source, tmp_path / 'out.jsonl', cache=str(tmp_path / 'kept'))
    assert not (tmp_path / 'out.jsonl').exists()


@pytest.mark.parametrize(('row', 'message'), [
    ({'prompt': 'p', 'responses': 'x'}, "in.jsonl:1 field 'responses': got text, expected a list"),
    ({'prompt': 'p'}, 'in.jsonl:1: keys'),
    ('x', 'in.jsonl:1'),
])
def test_rows_that_cannot_be_read_stop_with_their_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        pairs_of(tmp_path, [row])


def test_files_that_cannot_be_read_or_written(tmp_path, use):
    specs = use(j=Judge(by_table))
    with pytest.raises(DataError, match=r'in\.txt: expected a file of rows'):
        run(specs, tmp_path / 'in.txt', tmp_path / 'out.jsonl')
    with pytest.raises(DataError, match=r'none\.jsonl: no such file'):
        run(specs, tmp_path / 'none.jsonl', tmp_path / 'out.jsonl')
    with pytest.raises(DataError, match='expected a name that ends in .jsonl'):
        run(specs, tmp_path / 'none.jsonl', tmp_path / 'out.txt')


def test_the_command_labels_a_file(tmp_path):
    made = demo.generate('helpful', 'test', 3, 0)
    source = write(tmp_path / 'in.jsonl', map(as_row, made.comparisons))
    out, _ = command('label', '--judge=true=gold:helpful', f'--input={source}', '--labels=hard',
                     f'--output={tmp_path}/out.jsonl', '--min_confidence=0.51')
    wins = [first.win_probability(second) for first, second in made.truths]
    rows = read(tmp_path / 'out.jsonl')
    assert [row['preferred'] for row in rows] == [int(win < 0.5) for win in wins
                                                  if abs(win - 0.5) > 0.01]
    assert f'{tmp_path}/out.jsonl: {len(rows)} rows, of 3 pairs\n' in out
    assert '; fewer than 30 opening questions have no interval)' in out
