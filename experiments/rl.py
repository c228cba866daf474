"""Optimises a language model against a reward: PPO, GRPO, RLOO, expert iteration or best of n.

    qrm rl --config=rl:grpo --workdir=results/rl --config.model.checkpoint=smollm2-135m \
      --config.data.path=pairs.jsonl --config.reward.source=results/reward
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; a rerun goes on in it.')
launch.define_config()


def main() -> None:
    from qrm.policy import optimise

    optimise.train(launch.config(optimise.KEYS, optimise.check), _WORKDIR.value)


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
