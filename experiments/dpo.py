"""Trains a language model on preferences, without a reward model.

    qrm dpo --config=dpo --workdir=results/dpo --config.data.path=pairs.jsonl \
      --config.model.checkpoint=smollm2-135m
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; a rerun goes on in it.')
launch.define_config()
launch.define_process_flags()


def main() -> None:
    from qrm.policy import dpo

    dpo.train(launch.config(dpo.KEYS, dpo.check), _WORKDIR.value)


if __name__ == '__main__':
    launch.run(main, required=('config', 'workdir'))
