"""Checkpoints of a training run: asynchronous, atomic, the last few and the best.

A checkpoint holds three items: `params`, `state` (optimiser, step, RNG key) and `meta` (data
position and fingerprint). The metric that ranks checkpoints is a held-out loss, see
`metrics.criterion`.
"""

import os
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from qrm.training.workdir import WorkdirError

_METRIC = 'loss'


class Checkpoints:
    """The checkpoints of one workdir; use as a context manager, so that saves are finished.

    Args:
      workdir: folder of the run.
      keep: how many of the last checkpoints to keep, beside the best.
      read_only: only restore; nothing in the folder is touched, and no other process waited for.

    With several processes all of them save and restore together. If one of them leaves by an
    exception, which the others may not have, it does not wait for saves to be finished.
    """

    def __init__(self, workdir: str, *, keep: int = 1, read_only: bool = False):
        self._path = os.path.abspath(os.path.join(workdir, 'checkpoints'))
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[_METRIC], reverse=True, n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        this = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=this, active_processes={this}, barrier_sync_key_prefix=f'alone{this}')
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics[_METRIC],
            best_mode='min',
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            multiprocessing_options=alone if read_only else ocp.options.MultiprocessingOptions(),
        )
        if read_only and not os.path.isdir(self._path):
            raise WorkdirError(f'{self._path}: no such folder; expected the checkpoints of a run')
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
        if kind is None or jax.process_count() == 1:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest held-out loss, the latest of equals."""
        found = [
            (-info[_METRIC], step) for step in self._manager.all_steps()
            if (info := self._manager.metrics(step)) is not None
        ]
        return max(found)[1] if found else None

    def save(
        self, step: int, params: Any, state: Any, meta: dict[str, Any], loss: float | None
    ) -> None:
        """Starts saving; `loss` is the held-out loss at this step, None if not evaluated.

        Raises:
          ValueError: a step that is not newer than the latest, or a loss that is not finite,
            which would rank this checkpoint above all others.
        """
        if loss is not None and not np.isfinite(loss):
            raise ValueError(f'held-out loss {loss} at step {step}, expected a finite number')
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=None if loss is None else {_METRIC: loss},
            force=True,
        )
        if not saved:
            raise ValueError(f'step {step} is not newer than the latest checkpoint {self.latest}')

    def restore(self, step: int, params: Any, state: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Restores (params, state, meta); the arguments give shapes, dtypes and how to split."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(params)),
                state=ocp.args.StandardRestore(_abstract(state)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        return restored['params'], restored['state'], restored['meta']

    def restore_params(self, step: int, params: Any) -> Any:
        """Restores the parameters alone; `params` gives shapes and dtypes."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(params)))
        return self._manager.restore(step, args=args)['params']


def _abstract(tree: Any) -> Any:
    """Shapes where the leaves are split, or else on this process's first device.

    So a checkpoint restores on any number of devices, split or not.
    """
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        place = leaf.sharding if isinstance(leaf.sharding, jax.sharding.NamedSharding) else local
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape, tree)
