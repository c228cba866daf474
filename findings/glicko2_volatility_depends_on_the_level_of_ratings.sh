#!/usr/bin/env bash
# glicko2 2.1.0, `Player.update_player`: the function whose root is the new volatility has the square of the player's rating, less
# 1500, where Glickman's paper has the square of its deviation. The further from 1500 a rating is, the less the volatility can
# move. Comments in the code name the revision of the paper of February 2012.
#
# Expected: the same changes if all ratings are raised by one number, as only their differences count. Seen, for 10 periods of 200
# comparisons with equals, 100 of them won, and then four periods with 182 won, as a player wins who is 400 better: at 1500 it
# has gained 221, 317, 365 and 387 after each, volatility .248; at 1600, 1000 and 2500 98, 165, 214 and 252, volatility .06 as
# at the start. By the paper 212, 315, 366 and 389, volatility .265, at every level.
# Who is hurt: whoever rates systems by it, over time or on another scale: one that has changed is moved too slowly, with a
# deviation, 15.5 for 32.1, that is too small.
#
# Needs Python 3.11 or newer and a package index; fails if the behaviour changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check glicko2==2.1.0
cat > volatility.py <<'PYTHON'
import importlib.metadata
import sys
from math import exp, log, pi, sqrt

import glicko2


def by_paper(rating, deviation, volatility, games, tau=0.5, scale=173.7178):
    mu, phi = (rating - 1500) / scale, deviation / scale
    scaled = [((other - 1500) / scale, 1 / sqrt(1 + 3 * (spread / scale / pi) ** 2), score) for other, spread, score in games]
    terms = [(g, 1 / (1 + exp(-g * (mu - other))), score) for other, g, score in scaled]
    v = 1 / sum(g * g * chance * (1 - chance) for g, chance, _ in terms)
    gain = sum(g * (score - chance) for g, chance, score in terms)
    start = log(volatility ** 2)

    def slope(x):
        total = phi * phi + v + exp(x)
        return exp(x) * ((v * gain) ** 2 - total) / (2 * total ** 2) - (x - start) / tau ** 2

    low, high = start - 10, start + 10
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    variance = 1 / (1 / (phi * phi + exp(low)) + 1 / v)
    return (mu + variance * gain) * scale + 1500, sqrt(variance) * scale, exp(low / 2)


def by_package(*state_and_games):
    *state, games = state_and_games
    player = glicko2.Player(*state)
    player.update_player(*zip(*games))
    return player.rating, player.rd, player.vol


found = {}
for name, update in (('package', by_package), ('paper', by_paper)):
    for level in (1000, 1500, 1600, 2500):
        state, gains = (level, 50, 0.06), []
        for won in [100] * 10 + [182] * 4:
            state = update(*state, [(level, 30, score) for score in [1] * won + [0] * (200 - won)])
            gains.append(round(state[0] - level))
        found[name, level] = gains[-4:], round(state[1], 1), round(state[2], 3)
print(f'glicko2 {importlib.metadata.version("glicko2")}: level -> gains, deviation, volatility: {found}')
slow, exact = ([98, 165, 214, 252], 15.5, 0.06), ([212, 315, 366, 389], 32.1, 0.265)
sys.exit(any(found['package', level] != slow for level in (1000, 1600, 2500))
         or found['package', 1500] != ([221, 317, 365, 387], 31.4, 0.248)
         or any(found['paper', level] != exact for level in (1000, 1500, 1600, 2500)))
PYTHON
env/bin/python volatility.py 2> errors || { tail -3 errors; exit 1; }
