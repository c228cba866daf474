"""Tests compile quickly, and only once what subprocesses or workers have in common."""

import gc
import os
import subprocess
import sys
import tempfile

import pytest

# Programs of tests are small and run a few times: most of the time goes into compiling them, and
# with these two it is a fifth. What they compute is the same but for rounding. The few that run
# for long are started with `helpers.optimised`.
QUICKLY = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
_LONG = ('test_commands', 'test_processes', 'test_train', 'test_features', 'test_sharding',
         'test_packing', 'test_notebooks', 'test_identifiability', 'test_step',
         'test_transformer', 'test_overoptimisation')


def pytest_configure(config):
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:  # a worker's is that of the run
        return
    folder = tempfile.TemporaryDirectory(prefix='qrm-compilations-')
    config.add_cleanup(folder.cleanup)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder.name
    os.environ['XDG_CACHE_HOME'] = folder.name  # where `data.cache` is
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    flags = f'{os.environ.get("XLA_FLAGS", "")} {QUICKLY}'.strip()
    # XLA's flags come and go, and one that it does not know ends the process.
    known = subprocess.run([sys.executable, '-c', 'import jax; jax.devices("cpu")'],
                           env=os.environ | {'XLA_FLAGS': flags}, capture_output=True)
    if not known.returncode:
        os.environ['XLA_FLAGS'] = flags


def pytest_collection_modifyitems(items):
    # A worker takes whole files: one that takes long should not be left to the end.
    items.sort(key=lambda item: item.path.stem not in _LONG)


def pytest_collection_finish():
    # To look for garbage among all that is imported takes a thirtieth of the time of tests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
    """A worker compiles thousands, see `devices.release_programs`."""
    yield
    import jax  # after the options above, which are read when it starts

    jax.clear_caches()


def pytest_report_header():
    return f'XLA_FLAGS: {os.environ.get("XLA_FLAGS", "")}'
