"""Reinforcement learning for multi-turn image editing with flow-matching models.

The names that a notebook starts with come from here, each loaded when it is first used, so that importing one
light module stays as cheap as importing torch."""
import re, sys

__version__ = "0.1.0"

_HOMES = {
    'Session': 'data.sessions', 'load_sessions': 'data.sessions', 'load_edival': 'data.sessions',
    'shape_sessions': 'data.shapeworld',
    'load_editor': 'editing.loading', 'load_lora': 'editing.lora', 'rollout': 'editing.rollout',
    'load_judge': 'rewards.cube',
    'advantages': 'algorithm.fusion', 'PRESETS': 'algorithm.fusion', 'make_config': 'algorithm.config',
    'evaluate': 'evaluation.running', 'edival_scores': 'evaluation.scores',
    'train': 'training.train', 'experiment': 'training.train',
}
__all__ = [*_HOMES]

def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)

def __dir__(): return [*globals(), *_HOMES]

def module_to_run():
    "The module of this package that `python -m` is about to run; '' where it runs something else."
    if sys.argv[:1] != ['-m']: return ''
    named = [re.fullmatch(r'(?:-\w*m)?(mt_editflow_nb(?:\.\w+)*)', argument) for argument in sys.orig_argv[1:]]
    return next((found[1] for found in named if found), '')

_commands = 'train', 'eval', 'sweep', 'report', 'data', 'init', 'push', 'tools'
_runnable = {'training', *(f'cli.{name}' for name in _commands)}
if (_module := module_to_run()) and _module.removeprefix(f'{__name__}.') not in _runnable:
    sys.exit(f'python -m {_module}: expected a command, {__name__}.cli.X, where X is {", ".join(_commands[:-1])} or '
             f'{_commands[-1]}; received a module without one')
