"""Prints what training on many accelerators would cost, as in docs/scaling.md.

    qrm scaling [--measured=results/speed/speed.json]

With results of `qrm speed` on one device it prints instead what is predicted of those training
steps, if it is run on a device of that kind.
"""

from absl import flags

from qrm.commands import launch

_MEASURED = flags.DEFINE_string('measured', None, 'speed.json of one device, to compare with.')


def main() -> None:
    from qrm.studies import scaling

    if _MEASURED.value is not None:
        print(scaling.compare(_MEASURED.value))
    else:
        print('\n\n'.join(f'{title}:\n\n{text}' for title, text in scaling.tables().items()))


if __name__ == '__main__':
    launch.run(main)
