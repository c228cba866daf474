"""Files, configs and rows that are damaged or changed; a function each, as in `strikes`."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qrm.data import packing, sources, tokens
from qrm.data.comparisons import Comparison, DataError, DataReport, MalformedRow
from qrm.data.tokens import Reading
from qrm.models import weights
from qrm.studies.strikes import (
    REFUSED,
    TEXTS,
    Ground,
    Outcome,
    digest,
    digests,
    score,
    tiny_config,
)
from qrm.training import config as config_lib
from qrm.training import reward_model, train, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.interruptions import exhausts_memory


def checkpoint_damaged(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """A file of a checkpoint is changed: an older good one is read or it is an error."""
    reference, _ = ground.run
    known = digests(reference)
    shutil.copytree(reference, folder / 'run')
    steps = sorted(known)
    step = steps[rng.integers(len(steps))]
    root = folder / 'run' / 'checkpoints' / str(step)
    paths = sorted(path for path in root.rglob('*') if path.is_file())
    path = paths[rng.integers(len(paths))]
    way = ('flip', 'cut', 'empty', 'exchange', 'remove')[rng.integers(5)]
    content = bytearray(path.read_bytes())
    if way == 'flip' and content:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    elif way == 'cut':
        content = content[:rng.integers(len(content) + 1)]
    elif way == 'exchange':
        content = bytearray(paths[rng.integers(len(paths))].read_bytes())
    path.write_bytes(b'' if way == 'empty' else content)
    if way == 'remove':
        path.unlink()
    where = f'{way} {path.relative_to(folder)}'
    for which in ('best', 'last', *steps):
        try:
            found = digest(reward_model.load(str(folder / 'run'), step=which).params)
        except REFUSED:
            continue
        if found not in known.values() or (which in known and found != known[which]):
            return Outcome(way, f'{where}: step {which!r} has other numbers')
    with Checkpoints(str(folder / 'run'), keep=2) as checkpoints:
        latest = checkpoints.latest
        if latest is None:
            return Outcome(way, f'{where}: no checkpoint is left')
    if digest(reward_model.load(str(folder / 'run'), step='last').params) != known[latest]:
        return Outcome(way, f'{where}: the run goes on from other numbers')
    return Outcome(f'{way}, {"older" if latest != steps[-1] else "unharmed or not the newest"}')


def not_finite(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """NaN or infinity in weights, rewards, gradients or data: named, and nothing of it on disk."""
    value = (np.nan, np.inf, -np.inf)[rng.integers(3)]
    where = ('weights', 'rewards', 'gradients', 'data')[rng.integers(4)]
    if where == 'weights':
        shutil.copytree(ground.model, folder / 'model')
        path = folder / 'model' / 'model.safetensors'
        tensors = {name: np.array(x) for name, x in weights.read_file(str(path)).items()}
        name = sorted(tensors)[rng.integers(len(tensors))]
        tensors[name].reshape(-1)[rng.integers(tensors[name].size)] = value
        weights.write_file(str(path), tensors)
        return _must_refuse(where, lambda: score(str(folder / 'model')), name, 'not finite')
    if where == 'rewards':
        model = ground.classifier
        kernel = np.array(model.params['head']['kernel'])
        kernel[rng.integers(len(kernel))] = value
        head = model.params['head'] | {'kernel': kernel}
        broken = dataclasses.replace(model, params=model.params | {'head': head})
        return _must_refuse(where, lambda: broken.score(*TEXTS), 'not finite', 'prompts[')
    if where == 'data':
        row = {'prompt': 'a', 'responses': [' b', ' c'], 'ratings': [1.0, 2.0]}
        key = ('margin', 'weight', 'preference', 'ratings')[rng.integers(4)]
        row[key] = [1.0, value] if key == 'ratings' else value
        (folder / 'rows.jsonl').write_text(json.dumps(row) + '\n')
        return _must_refuse(where, lambda: sources.read_comparisons(str(folder / 'rows.jsonl')),
                            key, 'rows.jsonl:1', 'finite')
    changes = {'optimizer.learning_rate': float(10.0 ** rng.uniform(20, 38)),
               'optimizer.name': ('adamw', 'sgd')[rng.integers(2)], 'train.checkpoint_every': 1,
               'train.max_steps': 6, 'optimizer.warmup_fraction': 0.0}
    config = tiny_config(**changes)
    outcome = _must_refuse(where, lambda: train.train(config, str(folder / 'run')), 'step', 'batch')
    if outcome.wrong == _NOT_REFUSED:  # the norms keep some such runs finite
        outcome = Outcome(f'{where}, stayed finite')
    with Checkpoints(str(folder / 'run')) as checkpoints:
        steps = checkpoints.steps
    for step in steps:
        reward_model.load(str(folder / 'run'), step=step)  # refuses what is not finite
    return outcome


def folder_changed(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """A model's folder is changed: it loads with the right rewards, or it is refused."""
    expected = ground.rewards
    shutil.copytree(ground.model, folder / 'model')
    place = folder / 'model'
    name, harmless = _change_folder(place, rng)
    try:
        found = score(str(place))
    except REFUSED as error:
        if len(str(error).splitlines()) > 40:
            return Outcome(name, f'{name}: {len(str(error).splitlines())} lines of error')
        return Outcome(f'{name}: refused', f'{name}: refused, {error}' if harmless else '')
    close = found.shape == expected.shape and np.allclose(found, expected, rtol=0.05, atol=0.05)
    if close and harmless:
        return Outcome(f'{name}: the same rewards')
    theirs = _rewards_of_transformers(place)
    if theirs is None:
        # Of a setting other rewards may be the right ones, which nothing here can tell.
        unknown = close or name.startswith('setting ')
        return Outcome(f'{name}: loaded, not compared' if unknown else f'{name}: other rewards',
                       '' if unknown else f'{name}: {found}, not {expected}')
    agrees = np.allclose(found, theirs, rtol=1e-3, atol=1e-3)
    return Outcome(f'{name}: as transformers', '' if agrees else f'{name}: {found}, not {theirs}')


def _change_folder(place: Path, rng: np.random.Generator) -> tuple[str, bool]:
    """Changes one thing of a folder; its name, and whether the rewards must stay."""
    file = place / 'model.safetensors'
    tensors = {name: np.array(x) for name, x in weights.read_file(str(file)).items()}
    settings = json.loads((place / 'config.json').read_text())
    name = sorted(tensors)[rng.integers(len(tensors))]
    tensor = tensors[name]
    way = ('renamed', 'shape', 'integers', 'half', 'missing', 'extra', 'wrapped', 'prefix', 'cut',
           'setting', 'unknown setting', 'tokenizer', 'two sets', 'shards', 'transposed',
           'leads out')[rng.integers(16)]
    if way == 'renamed':
        tensors[name.replace('.', '_', 1)] = tensors.pop(name)
    elif way == 'shape':
        tensors[name] = np.concatenate([tensor, tensor[:1]])
    elif way == 'integers':
        tensors[name] = tensor.astype(np.int32)
    elif way == 'half':
        tensors = {key: x.astype(np.float16) for key, x in tensors.items()}
    elif way == 'missing':
        del tensors[name]
    elif way == 'extra':
        tensors[f'{name}.copy'] = tensor.copy()
    elif way == 'wrapped':
        tensors = {f'_orig_mod.{key}': x for key, x in tensors.items()}
    elif way == 'prefix':
        tensors = {key.removeprefix('model.'): x for key, x in tensors.items()}
    elif way == 'transposed':
        name = next(key for key in sorted(tensors) if tensors[key].ndim == 2
                    and tensors[key].shape[0] != tensors[key].shape[1])
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    elif way == 'setting':
        key = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size',
               'intermediate_size', 'max_position_embeddings', 'hidden_act', 'rms_norm_eps',
               'rope_theta', 'model_type')[rng.integers(10)]
        value = (0, -1, None, 'x', 3, True, [], 1e30)[rng.integers(8)]
        way = f'setting {key}'
        settings[key] = value
        if key == 'rope_theta':  # written twice, for both versions of transformers
            settings.get('rope_parameters', {}).pop('rope_theta', None)
    elif way == 'unknown setting':
        settings[f'new_{rng.integers(100)}'] = 1
    if way in ('shards', 'leads out'):
        file.unlink()
        half = len(tensors) // 2
        parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
        index = {}
        for number, part in enumerate(parts):
            weights.write_file(str(place / f'part-{number}.safetensors'), part)
            index |= {key: f'part-{number}.safetensors' for key in part}
        if way == 'leads out':
            index[name] = f'../{index[name]}'
        (place / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
        return way, way == 'shards'
    weights.write_file(str(file), tensors)
    if way == 'cut':
        content = file.read_bytes()
        file.write_bytes(content[:rng.integers(len(content))])
    elif way == 'tokenizer':
        path = place / 'tokenizer.json'
        content = path.read_bytes()
        path.write_bytes(content[:rng.integers(len(content))])
    elif way == 'two sets':
        (place / 'model.safetensors.index.json').write_text(
            json.dumps({'weight_map': dict.fromkeys(tensors, 'gone.safetensors')}))
    (place / 'config.json').write_text(json.dumps(settings))
    return way, way in ('half', 'wrapped', 'prefix', 'two sets')


def _rewards_of_transformers(place: Path) -> np.ndarray | None:
    """What transformers gives for the same texts; None if PyTorch is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(place), dtype=torch.float32).eval()
    except Exception:  # It refuses what we read: nothing to compare with.
        return None
    tokenizer = reward_model.load(str(place)).tokenizer
    rewards = []
    with torch.no_grad():
        for prompt, responses in zip(*TEXTS, strict=True):
            for response in responses:
                ids = tokenizer(prompt + response)['input_ids'] + [tokenizer.eos_token_id]
                rewards.append(float(model(torch.tensor([ids])).logits[0, 0]))
    return np.array(rewards)


_NOT_REFUSED = 'not refused'


def _must_refuse(how: str, act: Callable[[], Any], *named: str) -> Outcome:
    """Whether what is done is refused, and the message names all of these."""
    try:
        act()
    except (MalformedRow, *REFUSED) as error:
        missing = [text for text in named if text not in str(error)]
        return Outcome(how, f'{how}: {error}, which does not name {missing}' if missing else '')
    return Outcome(how, _NOT_REFUSED)


def config_changed(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """Values of a config are changed: refused in a line, or the run does what they say."""
    config = tiny_config()
    changes = {}
    for _ in range(rng.integers(1, 3)):
        key = list(config_lib.KEYS)[rng.integers(len(config_lib.KEYS))]
        if not key.startswith(('data.path', 'data.cache', 'model.checkpoint', 'model.tokenizer')):
            changes[key] = _other_value(config_lib.KEYS[key], rng)
    changes = {'train.max_steps': 2} | changes
    shown = ', '.join(f'{key}={value!r}' for key, value in changes.items())
    try:
        for key, value in changes.items():
            *sections, last = key.split('.')
            section = config
            for part in sections:
                section = section[part]
            section[last] = value
    except (TypeError, ValueError):  # what ml_collections says of a flag
        return Outcome('refused by its type')
    try:
        train.train(config, str(folder / 'run'))
    except REFUSED as error:
        traced = 'Traceback' in str(error) or len(str(error).splitlines()) > 20
        return Outcome('refused', f'{shown}: {error}' if traced else '')
    except Exception as error:
        if exhausts_memory(error):  # a command says in a line what takes less
            return Outcome('too little memory')
        return Outcome('refused', f'{shown}: {type(error).__name__}: {str(error)[:300]}')
    stored = workdir.load_config(str(folder / 'run'))
    rows = workdir.read_metrics(str(folder / 'run'))
    steps = max((row['step'] for row in rows), default=0)
    most = stored.train.max_steps
    if most and steps > most:
        return Outcome('ran', f'{shown}: {steps} steps')
    logged = [row['step'] for row in rows if row['split'] == 'train']
    if logged != list(range(1, steps + 1)):
        return Outcome('ran', f'{shown}: logged at {logged}')
    with Checkpoints(str(folder / 'run'), read_only=True) as checkpoints:
        kept = checkpoints.steps
    if len(kept) > stored.train.keep + 1 or steps not in kept:
        return Outcome('ran', f'{shown}: checkpoints {kept}')
    known = workdir.config_changes(json.loads(config_lib.absolute(config).to_json()),
                                   json.loads(stored.to_json()))
    return Outcome('ran', f'{shown}: stored as {known}' if known else '')


def _other_value(key: Any, rng: np.random.Generator) -> Any:
    """A value of the kind of a key's default, or of another kind."""
    default = key.default
    by_kind = {
        bool: (True, False), int: (0, -1, 1, 2, 3, 7, 2**31, 10**15, 10**30),
        float: (0.0, -1.0, 1.0, 0.5, 1e-30, 1e30, float('nan'), float('inf')),
        str: ('', 'x', 'none', default if isinstance(default, str) else 'y'),
        tuple: ((), ('x',), (1,), ((),), default if isinstance(default, tuple) else ()),
    }
    check = getattr(key.check, 'values', ())
    values = [*by_kind.get(type(default), (default,)), *check]
    if rng.random() < 0.2:
        values = [None, 'x', 1.5, True, (), {}]
    return values[rng.integers(len(values))]


def order_kept(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """Every comparison stands once in each epoch, over steps, hosts, devices and resumes."""
    examples, batch = int(rng.integers(1, 60)), int(rng.integers(1, 40))
    epochs, seed = int(rng.integers(1, 4)), int(rng.integers(2**31))
    total, devices = epochs * examples, int(rng.integers(1, 9))
    steps = -(-total // batch)
    resumed = int(rng.integers(steps + 1))
    lengths = rng.integers(1, 9, examples)

    seen = []
    for part in (range(resumed), range(resumed, steps)):
        for step in part:
            indices = packing.batch_indices(step, seed=seed, examples=examples, batch_size=batch,
                                            total=total)
            shares = packing.share(lengths[indices], devices)
            dealt = sorted(int(i) for own in shares for i in indices[own])
            if dealt != sorted(indices.tolist()):
                return Outcome('dealt', f'step {step}: {dealt}, not {sorted(indices.tolist())}')
            seen += indices.tolist()
    for epoch in range(epochs):
        own = sorted(seen[epoch * examples:(epoch + 1) * examples])
        if own != list(range(examples)):
            return Outcome('once an epoch', f'epoch {epoch} of {examples} by {batch}: {own}')
    return Outcome('once an epoch')


ROWS_A_TRIAL = 100


def rows_generated(ground: Ground, rng: np.random.Generator, folder: Path) -> Outcome:
    """Files of rows, valid ones and ones with a field or two changed, in any format.

    Valid rows must be read as they were meant, all others be read or named by place and field,
    and every row be counted, through to tokens. Hypothesis makes the rows, and of what fails the
    smallest example.
    """
    import hypothesis

    from qrm.studies import generated

    @hypothesis.seed(int(rng.integers(2**31)))
    @hypothesis.settings(
        max_examples=ROWS_A_TRIAL // generated.ROWS, database=None, deadline=None, print_blob=False,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(generated.files())
    def check(drawn: tuple[str, list[generated.Row]]) -> None:
        suffix, rows = drawn
        path = generated.write(folder, suffix, rows)
        if wrong := _wrong_with(path, rows, ground.classifier.tokenizer):
            raise AssertionError(f'{path}: {wrong}: {[row.values for row in rows]}')

    try:
        check()
    except AssertionError as error:
        return Outcome('wrong', str(error))
    except Exception as error:
        return Outcome('wrong', f'{type(error).__name__}: {error}')
    return Outcome('as specified, or refused by place and field')


def _wrong_with(path: str, rows: Sequence[Any], tokenizer: Any) -> str:
    """What is wrong with how a file of rows is read; '' if nothing is."""
    data = config_lib.schema.build(config_lib.KEYS, {
        'data.path': path, 'data.cache': '', 'data.max_malformed': 1.0, 'data.test_fraction': 0.3,
        'data.validation_fraction': 0.3}).data
    try:
        source = sources.read(data, 'any')
        comparisons, _ = sources.whole(source)
        reports = [_encoded(split, tokenizer) for split in sources.divide(source, data).values()]
    except DataError as error:
        return '' if str(error).startswith(path) else f'no place: {error}'
    if (read := sum(report.read for report in reports)) != len(rows):
        return f'{read} rows counted'
    for report in reports:
        if report.read != report.kept + sum(report.dropped.values()):
            return f'{report.as_dict()} does not add up'
        if report.first_malformed and not report.first_malformed.startswith(path):
            return f'no place: {report.first_malformed}'
    by_id = {comparison.id: comparison for comparison in comparisons}
    for row in rows:
        found = by_id.get(row.values['id'])
        if row.meant is not None and (
                found is None or (found.prompt, found.responses) != row.meant):
            return f'read as {found}'
    return ''


def _encoded(split: tuple[list[Comparison], DataReport], tokenizer: Any) -> DataReport:
    comparisons, report = split
    tokens.encode(comparisons, tokenizer, report, Reading(64))
    return report
