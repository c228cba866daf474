"""Programs that several tests or their subprocesses compile are compiled once."""

import os
import tempfile

_folder = tempfile.TemporaryDirectory(prefix='qrm-compilations-')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _folder.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
