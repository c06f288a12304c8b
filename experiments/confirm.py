"""Evaluate the seeds of a finished `seeds.py NAME` on other held-out sessions, which no choice has seen: python experiments/confirm.py NAME

Writes experiments/results/NAME_confirmed.json: gains with their intervals over seeds, over sessions, and over both."""
import argparse, json, shlex, sys
from pathlib import Path
import numpy as np
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import load_lora
from mt_editflow_nb.evaluation.scores import Outcomes, seed_summary
from mt_editflow_nb.evaluation.running import evaluate
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.data.files import atomic_write
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.training.runs import environment

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('name')
ap.add_argument('--sessions-seed', type=int, default=1, help='of the held-out sessions; training and `seeds.py` use 0 (default: %(default)s)')
ap.add_argument('--n', type=int, default=512, help='sessions (default: %(default)s)')
a = ap.parse_args()
runs = sorted(Path('runs', a.name).glob('seed_*/lora'))
c = json.loads((runs[0].parent/'config.json').read_text())['config']
sessions, judge = shape_sessions(a.n, c['turns'] or 3, 'heldout', seed=a.sessions_seed), load_judge('verifier')

def outcomes(lora=None):
    editor = load_editor(c['editor'])
    if lora: load_lora(editor, lora)
    return evaluate(editor, sessions, judge, num_steps=c['num_steps'], progress=True, desc=str(lora or 'before'))[0]

before, after = outcomes(), [outcomes(r) for r in runs]
summary = seed_summary(before, Outcomes(*map(np.stack, zip(*after))))
atomic_write(Path('experiments/results')/f'{a.name}_confirmed.json', json.dumps(dict(command=shlex.join(['python', 'experiments/confirm.py', *sys.argv[1:]]),
    commit=environment()['commit'], seeds=len(runs), sessions=a.n, sessions_seed=a.sessions_seed, summary=summary), indent=1))
for k, v in summary.items(): print(k, round(v['before'], 2), f"{v['gain']:+.2f}", np.round(v['gain_ci'], 2), 'sessions', np.round(v['gain_ci_sessions'], 2), 'both', np.round(v['gain_ci_both'], 2))
