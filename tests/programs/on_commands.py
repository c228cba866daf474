"""The command `qrm`.

    python -m tests.programs.on_commands COMMAND FLAGS...
"""

from qrm.commands import main

if __name__ == '__main__':
    main.main()
