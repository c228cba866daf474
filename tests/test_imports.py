"""Imports point one way: a module imports only modules that stand before it in this list."""

import ast

from tests.helpers import ROOT

ORDER = [
    'comparisons', 'demo', 'data', 'tokens', 'packing', 'sharding', 'flash', 'attention',
    'backbone', 'distributions', 'heads', 'network', 'costs', 'weights', 'losses', 'worlds', 'mlp',
    'devices', 'step', 'config', 'inference', 'resampling', 'statistics', 'metrics', 'diagnostics',
    'verdict', 'selection', 'workdir', 'checkpoints', 'model', 'train', 'score', 'divergences',
    'figures', 'experiment_figures', 'analysis', 'winrate', 'evaluate', 'reproduce', 'compare',
    'identifiability', 'best_of_n', 'benchmark',
]
LINEN = {'backbone', 'heads'}


def imports(path):
    """Dotted names of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_every_module_has_a_place():
    modules = {path.stem for path in (ROOT / 'qrm').glob('*.py')} - {'__init__'}
    assert modules == set(ORDER)


def test_imports_point_one_way():
    for place, name in enumerate(ORDER):
        for imported in imports(ROOT / 'qrm' / f'{name}.py'):
            parts = imported.split('.')
            assert parts[0] != 'experiments', f'{name} imports {imported}'
            if parts[0] == 'qrm':
                assert parts[1] in ORDER[:place], f'{name} imports {imported}'


def test_linen_stays_in_the_backbone_and_the_heads():
    users = {
        name for name in ORDER
        if any(i.split('.')[0] == 'flax' for i in imports(ROOT / 'qrm' / f'{name}.py'))
    }
    assert users == LINEN
