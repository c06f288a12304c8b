"""The commands. Their libraries take seconds to load: a signal in that time is answered with one line."""
from importlib import import_module
from mt_editflow_nb import module_to_run
from mt_editflow_nb.data.signals import stop_at_once

def _command(name):
    "What a console script calls: loads a command, and runs it."
    def run():
        stop_at_once(f'mtef_{name}')
        return import_module(f'{__name__}.{name}').main()
    return run

run_init, run_train, run_eval = map(_command, ('init', 'train', 'eval'))
run_sweep, run_report, run_data = map(_command, ('sweep', 'report', 'data'))
run_push, run_tools = map(_command, ('push', 'tools'))

module = module_to_run()                                             # python -m mt_editflow_nb.cli.eval
if module and module.startswith(f'{__name__}.'): stop_at_once(f'mtef_{module.rpartition(".")[2]}')
