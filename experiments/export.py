"""Writes a trained reward model as a sequence classifier of transformers, or its adapter for peft;
a trained policy as a language model.

    qrm export --workdir=results/run --output=DIR --as=mean
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of a run, or folder or hub name of a Hugging Face checkpoint.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make.')
_AS = flags.DEFINE_enum(
    'as', None, ('mean', 'quantiles', 'merged', 'adapter'),
    "What the labels are: the mean (default), one label, or the quantiles, one for each. Of a run "
    "of train.tune='lora' they are what its head gives, with adapters 'merged' into the weights "
    "or, as 'adapter', by themselves, in the layout of peft. Of a language model 'merged' "
    "(default), all of it, or 'adapter'.")
_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', ('float32', 'bfloat16', 'float16'), 'Of the tensors.')
launch.define_step()
launch.define_raw()


def main() -> None:
    from qrm.policy import language_model
    from qrm.serving import export
    from qrm.training import reward_model

    if language_model.is_policy(_WORKDIR.value):
        from qrm.policy import export as export_policy

        run = language_model.load_run(_WORKDIR.value, step=launch.step())
        print(export_policy.export(run, _OUTPUT.value, kind=_AS.value or 'merged',
                                   dtype=_DTYPE.value))
        return
    model = reward_model.load(_WORKDIR.value, step=launch.step(), merge=False,
                              raw=flags.FLAGS.raw)
    print(export.export(model, _OUTPUT.value, kind=_AS.value or 'mean', dtype=_DTYPE.value))


if __name__ == '__main__':
    launch.run(main, required=('workdir', 'output'))
