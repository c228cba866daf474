"""Runs the notebook on the results of a tiny reproduction."""

import base64
import importlib.util
import pathlib

import nbclient
import nbformat
import pytest

from qrm.reproduce import reproduce

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'notebooks' / 'explore_quantiles.ipynb'


def _demo_config():
    spec = importlib.util.spec_from_file_location('demo_config', ROOT / 'configs' / 'demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.fixture(scope='session')
def results(tmp_path_factory):
    """Folder of a reproduction with models too small, and trained too shortly, to be good."""
    folder = tmp_path_factory.mktemp('results')
    config = _demo_config()
    config.update({
        'data': {'demo': {'train': 300, 'test': 200}},
        'model': {'sizes': {'n_embd': 32, 'n_layer': 1}},
        'train': {'max_steps': 6, 'checkpoint_every': 3, 'batch_size': 16, 'rows': 4},
        'analysis': {'bootstrap': 20, 'null_draws': 20},
    })
    reproduce(config, str(folder))
    return folder


@pytest.fixture(scope='session')
def executed(results):
    """The notebook with the outputs of a run on `results`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name='python3',
        resources={'metadata': {'path': str(NOTEBOOK.parent)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('QRM_RESULTS', str(results))
        patch.setenv('PYTHONPATH', str(ROOT))
        patch.setenv('JAX_PLATFORMS', 'cpu')
        client.execute()  # raises CellExecutionError on the first cell that fails
    return notebook


def _outputs(notebook, kind):
    """(number of the cell, content) of all outputs of a kind, such as 'image/png'."""
    return [(number, output['data'][kind])
            for number, cell in enumerate(notebook.cells) if cell.cell_type == 'code'
            for output in cell.outputs if kind in output.get('data', {})]


def test_notebook_is_committed_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == 'python3'
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_every_cell_runs(executed):
    code = [cell for cell in executed.cells if cell.cell_type == 'code']
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs
                if output.output_type == 'error']


def test_notebook_draws(executed):
    images = _outputs(executed, 'image/png')
    # Quantile functions, densities and spreads of two workloads, and the outer quantiles.
    assert len(images) == 2 + (1 + 2) + 2
    assert len({number for number, _ in images}) == 3
    assert all(len(base64.b64decode(image)) > 5_000 for _, image in images)


def test_notebook_tabulates(executed, results):
    texts = [text for _, text in _outputs(executed, 'text/markdown')]
    assert (results / 'table.md').read_text(encoding='utf-8') in texts
    joined = '\n'.join(texts)
    assert joined.count('| KDE sum without dx | **no** |') == 4
    assert joined.count('| Gaussian | yes |') == 4
    for workload in ('helpful', 'harmless'):
        assert f'**{workload}**: rank correlation of each quantile with the mean' in joined
    assert joined.count('Rank correlation of the spread with the true standard deviation') == 2


def test_notebook_scores_a_prompt(executed):
    printed = ''.join(output.text for output in executed.cells[-1].outputs
                      if output.get('name') == 'stdout')
    assert len(printed.splitlines()) == 2
    assert 'warm water' in printed
