"""Normalising the rewards of a run: by a reference set, which is never what judges the run.

    qrm normalise --checkpoint=results/run --split=validation

leaves `normalisation.json` in the folder of the run, with the reference set and the checkpoint that
it is of. `reward_model.load` reads it, so that it holds wherever the model is used; `evaluate` and
`benchmark` judge raw rewards.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qrm.data import sources
from qrm.data.comparisons import Comparison, DataError, DataReport, Text, in_a_line
from qrm.data.rows import opening
from qrm.rewards import normalisation, selection
from qrm.rewards.normalisation import Normalisation
from qrm.rewards.selection import Scale
from qrm.training import config as config_lib
from qrm.training import features, reward_model, saved, workdir
from qrm.training.checkpoints import Checkpoints
from qrm.training.reward_model import NORMALISATION, RewardModel
from qrm.training.workdir import WorkdirError

SPLITS = ('train', 'validation')


class _Reference(NamedTuple):
    """A reference set.

    Attributes:
      comparisons: whose responses are scored.
      path: of the file, or of the run's data.
      split: of the run's data; '' of a file.
      notes: what was noticed.
    """

    comparisons: Sequence[Comparison]
    path: str
    split: str
    notes: list[str]


def normalise(
    folder: str, *, split: str = '', source: str = '', step: int | str = 'best',
    max_length: int = 0,
) -> str:
    """Measures mean and standard deviation of a run's rewards, and keeps them in its folder.

    The reward of a response is the mean of its distribution. Each response of the reference set
    counts once, however many a prompt has; none is left out.

    Args:
      folder: of the run.
      split: of its data, one of `SPLITS`; '': a file.
      source: the file, of rows as they are scored; '': a split.
      step: which checkpoint, see `reward_model.load`.
      max_length: tokens of the longest dialogue, as there.

    Returns:
      A line that says what was done, and one for each remark.

    Raises:
      DataError: a reference set that is none, or has questions of the run's test split, or rewards
        that cannot be normalised by.
      WorkdirError: no run, or another process is running in its folder.
      ConfigError: the run is of another version.
      NonFiniteLoss: a reward is not finite; names the comparisons.
    """
    if bool(split) == bool(source):
        raise DataError('expected a reference set, either a file (--input) or a split (--split)')
    if split and split not in SPLITS:
        why = 'judges the run, and is' if split == 'test' else 'is'
        raise DataError(f'--split={split} {why} no reference set; expected {" or ".join(SPLITS)}, '
                        'or --input=FILE')
    _check_run(folder)
    with workdir.lock(folder):
        config = workdir.load_config(folder)
        config_lib.check(config)
        reference = _split(config, folder, split) if split else _file(config, folder, source)
        model = reward_model.load(folder, step=step, max_length=max_length, raw=True,
                                  keep=features.place(config, folder))
        rewards, spreads, cut = _rewards(model, reference.comparisons)
        try:
            found = normalisation.measure(rewards)
        except ValueError as error:
            raise DataError(f'{reference.path}: {error}') from error
        path, prompts = os.path.join(folder, NORMALISATION), _prompts(reference.comparisons)
        scale = _scale(found, rewards, spreads, prompts)
        count = len(set(prompts))
        before = _before(path)
        workdir.write_json(path, found.as_dict() | {
            'scale': scale and scale._asdict(), 'responses': len(rewards), 'prompts': count,
            'reference': {'path': reference.path, 'split': reference.split or None,
                          'digest': _digest(reference.comparisons)},
            'checkpoint': model.checkpoint._asdict(),
            'max_length': model.reading.max_length})
    where = f'the {split} split of {reference.path}' if split else reference.path
    return '\n'.join([
        f'{path}: rewards of checkpoint {model.checkpoint.step} are now {found}, by '
        f'{len(rewards)} responses to {count} prompt{"s" * (count != 1)} of {where}; {cut} '
        f'dialogues cut to {model.reading.max_length} tokens{before}',
        *(f'  note {note}' for note in (*reference.notes, *_unlike_best(folder, model), *(
            [] if scale else ["no prompt has two responses: the rule 'mean-std' has no scale"])))])


def clear(folder: str) -> str:
    """Makes the rewards of a run raw again; returns a line that says so.

    Raises:
      DataError: it is not normalised.
      WorkdirError: no run, or another process is running in its folder.
    """
    _check_run(folder)
    path = os.path.join(folder, NORMALISATION)
    with workdir.lock(folder):
        if not os.path.exists(path):
            raise DataError(f'{path}: no such file, rewards of this run are raw')
        before = _before(path)
        os.remove(path)
    return f'{path}: removed, rewards are raw{before}'


def _check_run(folder: str) -> None:
    if not saved.is_run(folder):
        raise WorkdirError(f'{folder}: not the folder of a run, where a normalisation is kept'
                           + workdir.runs_hint(folder))


def _split(config: Any, folder: str, split: str) -> _Reference:
    """A split of the data that the run was trained on.

    Raises:
      DataError: these are no longer to be had.
    """
    data = config.data
    source = sources.read(data, config.workload)
    if source.digest != workdir.read_seen(folder).source:
        raise DataError(f'{data.path}: no longer says what {folder} was trained on, so that its '
                        f'{split} split is not known; expected --input=FILE')
    comparisons, _ = sources.divide(source, data)[split]
    return _Reference(comparisons, data.path, split, [])


def _file(config: Any, folder: str, path: str) -> _Reference:
    """A file, with notes of what it has in common with what the run was trained on.

    Raises:
      DataError: it cannot be read, or asks what the run's test split asks.
    """
    comparisons = sources.read_comparisons(path)
    seen, notes = workdir.read_seen(folder), []
    try:
        source = sources.read(config.data, config.workload)
        unknown = '' if source.digest == seen.source else (
            f'{config.data.path} no longer says what the run was trained on')
    except (DataError, OSError) as error:
        unknown = in_a_line(error)
    if unknown:
        notes.append("whether it has questions of the run's test split cannot be told: " + unknown)
    else:
        judged = _questions(sources.divide(source, config.data)['test'][0])
        if same := [c for c in comparisons if not judged.isdisjoint(_questions([c]))]:
            raise DataError(f'{path}: {len(same)} of {len(comparisons)} rows, the first of them '
                            f"{same[0].place}, have questions of the run's test split, which "
                            'judges the run; expected other questions')
    report = DataReport(path, 'reference')
    report.notes.update(remark for c in comparisons for remark in c.remarks)
    seen.note(comparisons, report)
    notes += [f'{count}: {note}' for note, count in report.notes.items()]
    return _Reference(comparisons, os.path.abspath(path), '', notes)


def _unlike_best(folder: str, model: RewardModel) -> list[str]:
    """A note if `qrm score` and others, which use the best checkpoint, use another one."""
    with Checkpoints(folder, read_only=True) as checkpoints:
        best = checkpoints.best
    return [] if best == model.checkpoint.step else [
        f'the best checkpoint, which other commands use, is {best}: they will refuse this']


def _questions(comparisons: Iterable[Comparison]) -> set[str]:
    """What is asked: opening questions, and groups that rows name."""
    found = set()
    for c in comparisons:
        begins: Sequence[Text] = (c.prompt,) if c.prompt else c.responses
        found.update(opening(text).strip() for text in begins)
        if c.has_opening:
            found.add(c.group.strip())
    return found - {''}


def _rewards(model: RewardModel, comparisons: Sequence[Comparison]
             ) -> tuple[np.ndarray, np.ndarray, int]:
    """Means and standard deviations of all responses, and how many dialogues were cut."""
    reward_model.check_alone(model)
    encoded, cut = model.encode(comparisons)
    if not encoded:
        return np.zeros(0), np.zeros(0), cut
    distribution = model.read(jnp.asarray(np.concatenate(model.predict(encoded)))).distribution
    return (np.asarray(distribution.mean, np.float64), np.asarray(distribution.std, np.float64),
            cut)


def _scale(by: Normalisation, rewards: np.ndarray, spreads: np.ndarray,
           prompts: Sequence[str]) -> Scale | None:
    """Of the rule 'mean-std', in units of normalised rewards."""
    try:
        return selection.reference_scale(by.values(rewards), spreads / by.std, np.array(prompts))
    except ValueError:  # of one response to each prompt
        return None


def _prompts(comparisons: Sequence[Comparison]) -> list[str]:
    """Of each response the prompt, by a text that is the same for the same prompts."""
    return [text for c in comparisons
            for text in [json.dumps([c.prompt, c.tools], sort_keys=True, default=str)]
            * len(c.responses)]


def _digest(comparisons: Sequence[Comparison]) -> str:
    """Hexadecimal digest of prompts and responses, in their order."""
    found = hashlib.sha256()
    for comparison in comparisons:
        found.update(comparison.text_digest(ordered=True))
    return found.hexdigest()


def _before(path: str) -> str:
    """What was there before, as a line ends; '' if there was nothing."""
    if not os.path.exists(path):
        return ''
    try:
        values = workdir.read_json(path)
        known = Normalisation(values['mean'], values['std'])
    except (WorkdirError, KeyError, TypeError, ValueError):
        return '; before: a file that could not be read'
    return f'; before: {known}'
