"""Says what a file of preference data says, and writes it as rows that every command reads.

    qrm data --input=FILE
    qrm data --input=FILE --format=pku-saferlhf:safer --output=rows.jsonl
    qrm data --formats
"""

from absl import flags

from qrm.commands import launch

_FORMATS = flags.DEFINE_bool('formats', False, 'List all formats, and what each says where.')
_INPUT = flags.DEFINE_string('input', '', 'File of rows: .jsonl, .json, either with .gz, .parquet.')
_OUTPUT = flags.DEFINE_string('output', '', "File to write, .jsonl; '': none.")
_FORMAT = flags.DEFINE_string('format', 'auto', 'As data.format of a config.')
_COLUMNS = flags.DEFINE_list('columns', [], 'As data.columns: key=place,…')
_ATTRIBUTES = flags.DEFINE_list('attributes', [], 'As data.attributes.')
_VOTES = flags.DEFINE_string('votes', 'share', 'As data.votes.')
_STRENGTHS = flags.DEFINE_string('strengths', 'ignored', 'As data.strengths.')


def main() -> None:
    from qrm.data import convert, formats
    from qrm.training import config as config_lib
    from qrm.training.schema import ConfigError

    if _FORMATS.value:
        for name in formats.FORMATS:
            print(name, *(f'  {topic}: {place}' for topic, place in formats.describe(name).items()),
                  sep='\n')
        return
    if not _INPUT.value:
        raise ConfigError('expected --input or --formats')
    config = config_lib.build({
        'data.path': _INPUT.value, 'data.format': _FORMAT.value,
        'data.columns': tuple(_COLUMNS.value), 'data.attributes': tuple(_ATTRIBUTES.value),
        'data.votes': _VOTES.value, 'data.strengths': _STRENGTHS.value})
    config_lib.check(config)
    print(convert.convert(config.data, _OUTPUT.value))


if __name__ == '__main__':
    launch.run(main)
