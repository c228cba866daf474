"""The command `qrm`: runs one of the mains in `experiments/` from any folder."""

import difflib
import runpy
import signal
import sys

COMMANDS = {
    'data': 'says what a file of preference data says, and writes it as rows',
    'train': 'trains a reward model',
    'evaluate': 'metrics of a run on held-out data, and what its spread is worth',
    'report': 'a page to look at, of one run or several side by side',
    'score': 'scores responses with a trained reward model',
    'normalise': 'gives the rewards of a run in use mean 0 and standard deviation 1',
    'benchmark': 'how often a reward model is right, on published benchmarks',
    'serve': 'answers over HTTP what the clients of other reward servers ask',
    'sample': 'answers prompts with a language model, N times each',
    'label': 'labels pairs of responses by a judge, asked in both orders',
    'sft': 'fine-tunes a language model on preferred responses',
    'dpo': 'trains a language model on preferences, without a reward model',
    'rl': 'optimises a language model against a reward',
    'watch': 'what the checkpoints of a policy are worth, by a reward and a judge',
    'export': 'writes a model for transformers',
    'reproduce': "the paper's experiment: two heads and a control, tables and figures",
    'published': "the paper's table explained from its authors' own code",
    'compare': 'every head on the same batches',
    'disagreement': 'whether spreads know where judges disagree',
    'identifiability': 'what each objective learns where the truth is known',
    'best_of_n': 'what choosing by each rule and proxy is worth',
    'optimise': 'policies against reward models, by the truth or another reward model',
    'campaign': 'breaks things on purpose, and counts what survives',
    'speed': 'how fast this machine trains and scores',
    'smollm2': 'makes a folder of a small pretrained model, without a hub',
    'scaling': 'what training on many accelerators would cost, by formulas',
}


def main() -> None:
    """Runs the command that the first argument names; exit code 2 if there is none."""
    # Until `processes.run` has its own handlers: an interrupted import ends without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    name, rest = sys.argv[1] if len(sys.argv) > 1 else '', sys.argv[2:]
    if name in ('-h', '-help', '--help', 'help'):
        print(usage())
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f', did you mean {close[0]}?' if close else ''
        print(f'error: no command {name!r}{hint}\n' if name else 'error: no command\n', usage(),
              sep='\n', file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f'qrm {name}', *rest]
        runpy.run_module(f'qrm.experiments.{name}', run_name='__main__')


def usage() -> str:
    """All commands, a line each."""
    lines = [f'  {name:16} {meaning}' for name, meaning in COMMANDS.items()]
    return '\n'.join(['usage: qrm COMMAND --FLAG=VALUE ...', '', *lines, '',
                      'qrm COMMAND --help lists the flags of a command.'])
