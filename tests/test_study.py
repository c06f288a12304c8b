"A rater's choices survive whatever happens to the notebook."
import signal, subprocess, sys
from pathlib import Path
from helpers import run_notebook
from mt_editflow_nb.data.files import append_json_line
from mt_editflow_nb.rewards.agreement import load_labels
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.evaluation.study import make_trials, read_choices

root = Path(__file__).resolve().parents[1]

writer = '''
import sys
from mt_editflow_nb.data.files import append_json_line
for i in range(100_000):
    row = dict(rater='ann', seed=0, trial=i, session=f's{i}', first='a', second='b', choice='first', seconds=1.)
    append_json_line(sys.argv[1], row | dict(time='', note='x'*500))
    print(i, flush=True)
'''

def test_killed_while_writing(tmp_path):
    "Every choice that was acknowledged before a SIGKILL is there, and the file goes on."
    path = tmp_path/'choices.jsonl'
    p = subprocess.Popen([sys.executable, '-c', writer, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(20): last = int(p.stdout.readline())
    p.send_signal(signal.SIGKILL)
    for line in p.stdout: last = int(line)
    p.wait()
    trials = read_choices(path).trial.tolist()
    assert trials[:last + 1] == list(range(last + 1))
    with open(path, 'ab') as f: f.write(b'{"rater": "ann", "choi')    # what a kill in the middle of a write would leave
    append_json_line(path, dict(rater='ann', seed=0, trial=999_999, session='z', first='a', second='b', choice='tie',
                                seconds=1., time=''))
    assert read_choices(path).trial.tolist() == trials + [999_999]

def test_the_rating_notebook(runner, tmp_path):
    "The toy study with choices in its file: what the notebook says of them, and labels that the judges' chapter reads."
    study = tmp_path/'study'
    sessions = shape_sessions(6, 3, 'heldout')
    for rater in ('ann', 'ben'):
        for t in make_trials([s.id for s in sessions], ('perfect', 'lazy'), rater)[:5]: # the rest is still to be rated
            better = 'first' if t['first'] == 'perfect' else 'second'
            choice = 'tie' if t['trial'] == 4 else better
            append_json_line(study/'choices.jsonl', dict(rater=rater, seed=0, **t, choice=choice, seconds=1., time=''))
    parameters = dict(study=str(study), rater='ann', judges=['verifier'])
    executed = runner.submit(run_notebook, root/'experiments/rate.ipynb', parameters).result()
    outputs = [o for c in executed.cells for o in c.get('outputs', [])]
    shown = [part for o in outputs for part in (o.get('text', ''), o.get('data', {}).get('text/plain', ''))]
    text = '\n'.join(''.join(part) for part in shown)
    assert '10 choices by 2 raters' in text and "Krippendorff's alpha: " in text
    agreement = text[text.index('agreement'):].split('verifier')[1].split()
    assert [float(x) for x in agreement[:4]] == [100., 100., 100., 8.]      # two ties are left out
    labels = load_labels(study/'labels.jsonl')
    rated = len({i.instructions for i in labels.items})
    perfect, lazy = labels.truth_N[::2], labels.truth_N[1::2]
    assert len(labels.items) == 2*rated and perfect.min() >= .5 and (perfect + lazy == 1).all()
