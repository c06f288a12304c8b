"""Evaluate the seeds of a finished `seeds.py NAME` on other held-out sessions, which no choice has seen:

    python experiments/confirm.py NAME

Writes experiments/results/NAME_confirmed.json: gains with their intervals over seeds, over sessions, and over both."""
import argparse, shlex, sys
from pathlib import Path
import numpy as np
from mt_editflow_nb.data.files import atomic_write, to_json
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import load_lora
from mt_editflow_nb.evaluation.running import evaluate
from mt_editflow_nb.evaluation.scores import Outcomes, seed_summary
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.training.runs import environment, read_config

def outcomes_of(c, sessions, lora=None):
    "Outcomes of the base editor, or of one with an adapter."
    editor = load_editor(c.editor)
    if lora: load_lora(editor, lora)
    name = str(lora or 'before')
    return evaluate(editor, sessions, load_judge('verifier'), num_steps=c.num_steps, progress=True, desc=name)[0]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name')
    parser.add_argument('--sessions-seed', type=int, default=1,
                        help='of the held-out sessions; training and `seeds.py` use 0 (default: %(default)s)')
    parser.add_argument('--n', type=int, default=512, help='sessions (default: %(default)s)')
    a = parser.parse_args()
    adapters = sorted(Path('runs', a.name).glob('seed_*/lora'))
    c = read_config(adapters[0].parent)
    sessions = shape_sessions(a.n, c.turns or 3, 'heldout', seed=a.sessions_seed)
    before, after = outcomes_of(c, sessions), [outcomes_of(c, sessions, lora) for lora in adapters]
    summary = seed_summary(before, Outcomes(*map(np.stack, zip(*after))))
    command = shlex.join(['python', 'experiments/confirm.py', *sys.argv[1:]])
    report = dict(command=command, commit=environment()['commit'], seeds=len(adapters), sessions=a.n,
                  sessions_seed=a.sessions_seed, summary=summary)
    atomic_write(Path('experiments/results')/f'{a.name}_confirmed.json', to_json(report, indent=1))
    for name, v in summary.items():
        sessions_only, both = np.round(v['gain_ci_sessions'], 2), np.round(v['gain_ci_both'], 2)
        print(name, round(v['before'], 2), f"{v['gain']:+.2f}", np.round(v['gain_ci'], 2), 'sessions', sessions_only,
              'both', both)

if __name__ == '__main__': main()
