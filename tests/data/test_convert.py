"""What is said of a file of preference data, and the rows that are written."""

import json

import pytest

from qrm.data import convert, formats
from qrm.data.comparisons import DataError
from qrm.data.sources import read_comparisons
from tests.data.test_formats import ROWS
from tests.helpers import command, load_config


def data(path, **changes):
    return load_config('hh', **{'data.path': str(path)} | {
        f'data.{key}': value for key, value in changes.items()}).data


def write(path, *rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.mark.parametrize('name', ROWS)
def test_what_is_written_is_read_as_the_same(name, tmp_path):
    source, target = write(tmp_path / 'in.jsonl', ROWS[name][0]), tmp_path / 'out.jsonl'
    text = convert.convert(data(source, format=name), str(target))
    assert f'read as of the format {name!r}' in text
    for topic, place in formats.describe(name).items():
        assert f'  {topic}: {place}' in text
    one, = read_comparisons(str(target))
    _, prompt, responses, expected = ROWS[name]
    assert (one.prompt if isinstance(one.prompt, str) else list(one.prompt)) == prompt
    assert [r if isinstance(r, str) else list(r) for r in one.responses] == responses
    for key, value in expected.items():
        if key != 'attributes':
            assert getattr(one, key) == value


def test_the_first_comparison_and_counts_are_shown(tmp_path):
    rows = [{'prompt': 'Why?', 'responses': ['So.', 'No.'], 'preferred': 1, 'annotator': 'a',
             'colour': 'red'},
            {'prompt': 'How?', 'responses': ['So.', 'No.'], 'ranks': [0, 0], 'annotator': 'b'},
            {'prompt': 'Who?', 'responses': ['I. ' * 300, 'Me.', 'Us.', 'Them.', 'You.'],
             'ratings': [1, 2, 3, None, 5]}, {'prompt': 'What?', 'responses': []}]
    lines = convert.convert(data(write(tmp_path / 'in.jsonl', *rows))).splitlines()
    place = tmp_path / 'in.jsonl'
    assert lines == [
        f'{place}: rows as they are read here', '', f'the first comparison ({place}:1):',
        '  prompt: Why?', '  response 0: So.', '  response 1: No.', '  preferred: 1',
        '  annotator: "a"', '', '3 comparisons of 9 responses, 1 malformed rows, 0 rows not judged',
        f"  first malformed: {place}:4 field 'responses': got empty list, expected a list of at "
        'least one response',
        '  2: with a preferred response', '  1: with a tie', '  1: with a rating',
        '  2: with an annotator', '  2: annotators', '  3: opening questions',
        "  note 1: key 'colour' not used"]
    shown = convert.convert(data(write(tmp_path / 'in.jsonl', rows[2])))
    assert '  and 1 responses more' in shown
    assert 'I. I. …' in shown


def test_responses_that_would_be_taken_to_repeat_the_prompt_are_not_written(tmp_path):
    row, chat = ROWS['helpsteer3'][0], [{'role': 'user', 'content': 'Why?'},
                                        {'role': 'assistant', 'content': 'So.'}]
    source = write(tmp_path / 'in.jsonl', row | {'response1': chat, 'response2': chat}, row)
    assert '1 malformed rows' in convert.convert(data(source), str(tmp_path / 'out.jsonl'))
    assert len(read_comparisons(str(tmp_path / 'out.jsonl'))) == 1


def test_attributes_of_a_format_are_written_without_being_asked_for(tmp_path):
    source, target = write(tmp_path / 'in.jsonl', ROWS['helpsteer'][0]), tmp_path / 'out.jsonl'
    assert '  1: with a rating' in convert.convert(data(source), str(target))
    row = json.loads(target.read_text())
    assert {name: row[name] for name in formats.attributes('helpsteer')} == {
        'helpfulness': [3.0], 'correctness': [4.0], 'coherence': [4.0], 'complexity': [1.0],
        'verbosity': [0.0]}


def test_rows_that_were_not_judged_are_counted(tmp_path):
    row = ROWS['shp'][0]
    text = convert.convert(data(write(tmp_path / 'in.jsonl', row, row | {'labels': None})))
    assert '1 comparisons of 2 responses, 0 malformed rows, 1 rows not judged' in text
    with pytest.raises(DataError, match='in.jsonl: none of its 1 rows says anything of its resp'):
        convert.convert(data(write(tmp_path / 'in.jsonl', row | {'labels': None}), format='shp'))


def test_files_of_other_formats_are_not_scored(tmp_path):
    source = write(tmp_path / 'in.jsonl', ROWS['shp'][0])
    with pytest.raises(DataError, match=r"rows of the format 'shp', expected those that "
                                        r'`qrm data --input=.*in.jsonl --output=ROWS.jsonl` wr'):
        read_comparisons(str(source))


def test_files_that_cannot_be_read_or_written_are_refused(tmp_path):
    source = write(tmp_path / 'in.jsonl', ROWS['shp'][0])
    for target in ('out.json', 'in.jsonl'):
        with pytest.raises(DataError, match=r'expected the name of a \.jsonl file that is not th'):
            convert.convert(data(source), str(tmp_path / target))
    with pytest.raises(DataError, match='expected a file of rows'):
        convert.convert(data(tmp_path))
    with pytest.raises(DataError, match=r"in.jsonl:1 field 'labels': got 7"):
        convert.convert(data(write(source, ROWS['shp'][0] | {'labels': 7})))


def test_the_command(tmp_path):
    source = write(tmp_path / 'in.jsonl', ROWS['multipref'][0])
    out, _ = command('data', f'--input={source}', '--votes=each',
                     f'--output={tmp_path / "out.jsonl"}')
    assert '4 comparisons of 8 responses' in out
    assert len(read_comparisons(str(tmp_path / 'out.jsonl'))) == 4
    out, _ = command('data', '--formats')
    assert [line for line in out.splitlines() if not line.startswith(' ')] == list(formats.FORMATS)
    _, error = command('data', code=2)
    assert 'expected --input or --formats' in error
    _, error = command('data', f'--input={source}', '--format=multiprefs', code=2)
    assert "config.data.format='multiprefs', expected" in error
