"""Writes a trained reward model as a sequence classifier of transformers, or its adapter for peft.

    qrm export --workdir=results/run --output=DIR --as=mean
"""

from absl import flags

from qrm.commands import launch

_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of a run, or folder or hub name of a Hugging Face checkpoint.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make.')
_AS = flags.DEFINE_enum(
    'as', 'mean', ('mean', 'quantiles', 'merged', 'adapter'),
    "What the labels are: the mean, one label, or the quantiles, one for each. Of a run of "
    "train.tune='lora' they are what its head gives, with adapters 'merged' into the weights or, "
    "as 'adapter', by themselves, in the layout of peft.")
_STEP = flags.DEFINE_string(
    'step', 'best', "Which checkpoint of the run: 'best', 'last' or a step.")
_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', ('float32', 'bfloat16', 'float16'), 'Of the tensors.')
launch.define_raw()


def main() -> None:
    from qrm.serving import export
    from qrm.training import reward_model

    step = int(_STEP.value) if _STEP.value.isdecimal() else _STEP.value
    model = reward_model.load(_WORKDIR.value, step=step, merge=False, raw=flags.FLAGS.raw)
    print(export.export(model, _OUTPUT.value, kind=_AS.value, dtype=_DTYPE.value))


if __name__ == '__main__':
    launch.run(main, required=('workdir', 'output'))
