"""Entry points: short absl mains over the functions of `qrm`."""

import os

# Before these libraries are imported: they would announce themselves on every start.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
