"""Runs the notebooks on the results of tiny experiments."""

import base64

import nbclient
import nbformat
import pytest

from qrm.analysis import report
from qrm.studies.reproduce import reproduce
from tests.helpers import ROOT, load_config

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Folder of a reproduction with models too small, and trained too shortly, to be good."""
    folder = tmp_path_factory.mktemp('results')
    config = load_config('demo')
    config.update({
        'data': {'demo': {'train': 300, 'test': 200}},
        'model': {'sizes': {'hidden_size': 32, 'num_layers': 1}},
        'train': {'max_steps': 6, 'checkpoint_every': 3, 'batch_size': 16, 'rows': 1},
        'analysis': {'bootstrap': 20, 'null_draws': 20},
        'reproduce': {'models': ('scalar', 'quantile')},
    })
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, 'leave', lambda *_: None)  # the page, which no notebook shows
        reproduce(config, str(folder))
    return folder


def _execute(name, **environment):
    """A notebook with the outputs of a run in which these variables are set."""
    path = ROOT / 'notebooks' / f'{name}.ipynb'
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name='python3',
        resources={'metadata': {'path': str(path.parent)}})
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.setenv('PYTHONPATH', str(ROOT))
        patch.setenv('JAX_PLATFORMS', 'cpu')
        client.execute()  # raises CellExecutionError on the first cell that fails
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs
                if output.output_type == 'error']
    return notebook


def _outputs(notebook, kind):
    """(number of the cell, content) of all outputs of a kind, such as 'image/png'."""
    return [(number, output['data'][kind])
            for number, cell in enumerate(notebook.cells) if cell.cell_type == 'code'
            for output in cell.outputs if kind in output.get('data', {})]


def _printed(cell):
    return ''.join(output.text for output in cell.outputs if output.get('name') == 'stdout')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == 'python3'
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_quantiles_are_explored(results):
    executed = _execute('explore_quantiles', QRM_RESULTS=str(results))
    images = _outputs(executed, 'image/png')
    # Quantile functions, densities and spreads of two workloads, and the outer quantiles.
    assert len(images) == 2 + (1 + 2) + 2
    assert len({number for number, _ in images}) == 3
    assert all(len(base64.b64decode(image)) > 5_000 for _, image in images)
    joined = '\n'.join(text for _, text in _outputs(executed, 'text/markdown'))
    for workload in ('helpful', 'harmless'):
        assert f'**{workload}**: rank correlation of each quantile with the mean' in joined
    assert joined.count('Rank correlation of the spread with the true standard deviation') == 2
    printed = _printed(executed.cells[-1])
    assert len(printed.splitlines()) == 2
    assert 'warm water' in printed


def test_the_kl_table_is_explained(results):
    executed = _execute('kl_table', QRM_RESULTS=str(results))
    texts = [text for _, text in _outputs(executed, 'text/markdown')]
    assert (results / 'table.md').read_text(encoding='utf-8') in texts
    joined = '\n'.join(texts)
    assert joined.count('| KDE sum without dx | **no** |') == 4
    assert joined.count('| Gaussian | yes |') == 4
    assert len(_outputs(executed, 'image/png')) == 6
    printed = '\n'.join(_printed(cell) for cell in executed.cells if cell.cell_type == 'code')
    # Phi(sqrt 4.914) = Phi(2.2167).
    assert 'published, helpful, scalar: 4.914 nats would need an AUC of 0.9867' in printed
    # One pair at a time only its longer side is read at the end.
    assert 'batches of 1: 79 of 158 at the end' in printed
    assert 'own mean: spread of the chosen side 0.629 at first, 0.000 after' in printed
    assert 'free: spread of the chosen side 0.629 at first, 0.629 after' in printed


def test_identifiability_is_shown(tmp_path):
    (tmp_path / 'identifiability.md').write_text('the whole table')
    executed = _execute('identifiability', QRM_PAIRS='400', QRM_STEPS='30',
                        QRM_RESULTS=str(tmp_path))
    assert len(_outputs(executed, 'image/png')) == 3
    printed = [_printed(cell) for cell in executed.cells if cell.cell_type == 'code']
    assert 'ratio of the spreads' in printed[1]
    assert printed[2].count('independent annotators,') == 5
    assert printed[3].count('one annotator a pair,') == 5
    assert 'the whole table' in _outputs(executed, 'text/markdown')[-1][1]
