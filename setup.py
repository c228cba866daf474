"""Packaging of qrm; the distribution is called qrm-jax, as `qrm` is taken on PyPI."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name='qrm-jax',
    version='0.1.0',
    description='Distributional reward models in JAX and Flax',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    # The mains and the configs are installed inside the package, so that no other package of these
    # names is met.
    packages=[*find_packages(include=['qrm', 'qrm.*']), 'qrm.configs', 'qrm.experiments'],
    package_data={'qrm.analysis': ['page/*']},
    package_dir={'qrm.configs': 'configs', 'qrm.experiments': 'experiments'},
    entry_points={'console_scripts': ['qrm=qrm.commands.main:main']},
    python_requires='>=3.11',
    install_requires=[
        'absl-py>=2.1',
        'chex>=0.1.90',
        'datasets>=4.0',
        'etils[epath]>=1.9',
        'flax>=0.12.0',
        'huggingface_hub>=1.0',
        'jax>=0.10.0',
        'jinja2>=3.1',
        'matplotlib>=3.9',
        'ml-collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.12.0',
        'pyarrow>=15.0',
        'safetensors>=0.7',
        'scipy>=1.14',
        'tokenizers>=0.22',
        'tqdm>=4.66',
        'transformers>=5.0',
    ],
    extras_require={
        'cuda12': ['jax[cuda12]'],
        'cuda13': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'campaign': ['hypothesis>=6.100'],
        'report': ['vl-convert-python>=1.9'],
        'smollm2': ['gguf>=0.17'],
        'tensorboard': ['tensorboardX>=2.6'],
        'test': [
            'gguf>=0.17',
            'hypothesis>=6.100',
            'ipykernel>=6.29',
            'nbclient>=0.10',
            'nbformat>=5.10',
            'pytest>=8.3',
            'pytest-xdist>=3.7',
            'ruff>=0.12',
            'scikit-learn>=1.6',
            'setuptools>=77',
            'tensorboardX>=2.6',
            'vl-convert-python>=1.9',
        ],
    },
)
