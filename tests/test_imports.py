"""Imports point one way: a wing imports from wings before it, a room from rooms before it."""

import ast
import importlib

from tests.helpers import ROOT

HOUSE = {
    'data': ['comparisons', 'tables', 'records', 'workers', 'rows', 'verdicts', 'formats',
             'translate', 'files', 'phrases', 'demo', 'gold', 'sources', 'convert', 'suites',
             'seen', 'templates', 'orders', 'encoded', 'tokens', 'packing'],
    'rewards': ['distributions', 'heads', 'normalisation', 'losses', 'resampling', 'statistics',
                'pairwise', 'metrics', 'selection'],
    'models': ['platforms', 'sharding', 'flash', 'attention', 'architecture', 'families', 'lora',
               'parallel', 'tuning', 'transformer', 'likelihood', 'network', 'checkpoint_heads',
               'weights', 'adapters', 'smollm2'],
    'training': ['schema', 'workdir', 'checkpoints', 'devices', 'step', 'reward_objective',
                 'config', 'base', 'initial', 'interruptions', 'inference', 'features', 'saved',
                 'reward_model', 'inputs', 'loop', 'train'],
    'analysis': ['divergences', 'pooling', 'diagnostics', 'verdict', 'tables', 'winrate', 'figures',
                 'report', 'evaluate', 'benchmarks'],
    'serving': ['normalise', 'score', 'export', 'functions', 'batching', 'protocols', 'server'],
    'policy': ['objectives', 'batches', 'network', 'language_model', 'sampling', 'candidates',
               'programs', 'servers', 'questions', 'endpoint', 'judges', 'labels', 'monitor',
               'rules', 'figures', 'config', 'runs', 'sft', 'dpo', 'export', 'scoring', 'rollouts',
               'algorithms', 'watch', 'optimise', 'follow'],
    'studies': ['landscapes', 'figures', 'worlds', 'mlp', 'reproduce', 'columns', 'baselines',
                'compare', 'identifiability', 'best_of_n', 'costs', 'speed', 'scaling',
                'generated', 'strikes', 'breakages', 'campaign', 'padded', 'panels', 'published',
                'disagreement', 'paths', 'bench', 'arms', 'overoptimisation'],
    'commands': ['configs', 'processes', 'launch', 'main'],
}
ORDER = [f'{wing}.{room}' for wing, rooms in HOUSE.items() for room in rooms]
# Tests of a wing as a whole, or of what is outside of the wings.
OTHERS = {'training': ['processes'], 'commands': ['commands', 'launching'],
          'benchmarks': ['ahead', 'data', 'device', 'dpo', 'precision', 'sampling', 'serving',
                         'trl']}
LINEN = {'models.transformer', 'rewards.heads'}


def imports(path):
    """Dotted names of everything a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: a relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def file_of(place):
    return ROOT / 'qrm' / f'{place.replace(".", "/")}.py'


def test_every_room_has_a_place():
    paths = (path.relative_to(ROOT / 'qrm').with_suffix('') for path in (ROOT / 'qrm').rglob('*.py')
             if path.name != '__init__.py')
    assert sorted('.'.join(path.parts) for path in paths) == sorted(ORDER)


def test_imports_point_one_way():
    for i, place in enumerate(ORDER):
        for imported in imports(file_of(place)):
            package, *rest = imported.split('.')
            assert package not in ('experiments', 'configs', 'benchmarks', 'tests'), place
            if package == 'qrm':
                assert '.'.join(rest[:2]) in ORDER[:i], f'{place} imports {imported}'


def test_wings_have_a_sentence_and_nothing_else():
    for wing in HOUSE:
        tree = ast.parse((ROOT / 'qrm' / wing / '__init__.py').read_text(encoding='utf-8'))
        assert ast.get_docstring(tree)
        assert len(tree.body) == 1, f'qrm/{wing}/__init__.py'


def test_mains_are_short():
    for path in (ROOT / 'experiments').glob('*.py'):
        assert len(path.read_text(encoding='utf-8').splitlines()) <= 80, path.name


def test_linen_stays_in_the_decoder_and_the_heads():
    users = {place for place in ORDER
             if any(name.split('.')[0] == 'flax' for name in imports(file_of(place)))}
    assert users == LINEN


def test_tests_mirror_the_wings():
    for path in (ROOT / 'tests').glob('*/test_*.py'):
        rooms = HOUSE.get(path.parent.name, [])
        assert path.stem.removeprefix('test_') in [*rooms, *OTHERS.get(path.parent.name, [])], path


def test_programs_of_benchmarks_are_imported_beside_each_other():
    """Each defines its flags as it begins, not when it is imported."""
    for name in ('data', 'dpo', 'pages', 'precision', 'sampling', 'serving', 'trl'):
        assert callable(importlib.import_module(f'benchmarks.{name}').main)
