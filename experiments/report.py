"""Writes a page to look at: verdicts, tables, figures and all test comparisons of evaluated runs.

    qrm report --workdirs=results/run
    qrm report --workdirs=results/run,results/other --output=both.html
"""

from absl import flags

from qrm.commands import launch

_WORKDIRS = flags.DEFINE_list(
    'workdirs', None, 'Folders of evaluated runs, or of several such, as `qrm reproduce` leaves '
    'them; with commas between.')
_OUTPUT = flags.DEFINE_string(
    'output', '', 'File to write. Default, of one folder: report.html in it.')


def main() -> None:
    from qrm.analysis import report

    print(report.report(_WORKDIRS.value, _OUTPUT.value))


if __name__ == '__main__':
    launch.run(main, required=('workdirs',))
