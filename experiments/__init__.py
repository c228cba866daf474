"""Mains, one a command: flags, and a function of `qrm` that they are passed to.

`python -m experiments.NAME` in a clone is `qrm NAME` where qrm is installed.
"""

import os

# Before these libraries are imported: they would announce themselves on every start.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
