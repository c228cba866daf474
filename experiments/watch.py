"""Answers held-out prompts with the checkpoints of a policy, and says what that was worth.

    qrm watch --config=watch --workdir=results/watch --config.run=results/dpo \
      --config.reward.source=results/reward --config.reward.judge=results/other-reward
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of what is written.')
launch.define_config()


def main() -> None:
    from qrm.policy import follow

    print(follow.run(launch.config(follow.KEYS, follow.check), _WORKDIR.value))


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
