"""Programs that several tests, their subprocesses or workers compile are compiled once."""

import os
import tempfile


def pytest_configure(config):
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:  # a worker's is that of the run
        return
    folder = tempfile.TemporaryDirectory(prefix='qrm-compilations-')
    config.add_cleanup(folder.cleanup)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder.name
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
