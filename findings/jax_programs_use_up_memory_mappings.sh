#!/usr/bin/env bash
# jax 0.10.2 and jaxlib 0.10.2, CPU, Linux: each compiled program keeps three or more memory mappings for as long as it is cached,
# however small it is, and Linux gives a process 65,530 of them (vm.max_map_count), whatever memory there is.
#
# Expected: that many small programs cost memory, little of it. Seen: 100 shapes of one function of three operations add 4 to 7
# mappings each, of a larger one, with sorts and sums, about 40, and `jax.clear_caches()` gives them back. What runs out first is mappings: a process
# that has none left is ended by the operating system, or by what is allocated last, with gigabytes of memory free.
# Who is hurt: test suites, notebooks and servers that see many shapes; after some thousand programs a worker is gone, and nothing
# says why. `wc -l /proc/PID/maps` does.
#
# The script stays far below the limit. Needs Linux, Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > mappings.py <<'PYTHON'
import gc
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp

COUNT = 100


def mappings():
    with open('/proc/self/maps') as lines:
        return sum(1 for _ in lines)


def small(x):
    return jnp.tanh(x @ x.T).sum()


def larger(x):
    return sum((jnp.sort(jnp.roll(jnp.tanh(x @ x.T), k, 0), axis=k % 2).cumsum(0)).mean()
               for k in range(6))


print(f'jax {version("jax")}, jaxlib {version("jaxlib")}, limit',
      open('/proc/sys/vm/max_map_count').read().strip())
found = []
for function in (small, larger):
    jitted = jax.jit(function)
    jitted(jnp.ones((1, 3))).block_until_ready()
    before = mappings()
    for n in range(2, COUNT + 2):
        jitted(jnp.ones((n, 3)))
    after = mappings()
    jax.clear_caches()
    gc.collect()
    found.append((after - before) / COUNT)
    print(f'{function.__name__}: {COUNT} programs, {after - before} mappings more, '
          f'{found[-1]:.1f} each; after clear_caches {mappings() - before} more')
    if mappings() - before > COUNT / 2:
        sys.exit('mappings stay')
sys.exit(not all(each > 2.5 for each in found))
PYTHON
JAX_PLATFORMS=cpu env/bin/python mappings.py
