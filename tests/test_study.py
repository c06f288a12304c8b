"A rater's choices survive whatever happens to the notebook."
import signal, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd
from helpers import run_notebook
from mt_editflow_nb.data.files import append_json_line
from mt_editflow_nb.rewards.agreement import load_labels
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.evaluation.study import (
    RatingQueue, choices_between, export_labels, make_trials, rater_agreement, read_choices)

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

def queue(path, names, n=8):
    sessions = [replace(s, id=f's{i}') for i, s in enumerate(shape_sessions(n, 1, 'heldout'))]
    return RatingQueue(sessions, {name: np.zeros((n, 1, 48, 48, 3), np.uint8) for name in names}, path, 'ann')

def test_with_more_sessions_every_one_is_rated_once(tmp_path):
    "Numbers of trials belong to other sessions then: what was rated is known by session and systems."
    path = tmp_path/'choices.jsonl'
    few = queue(path, 'ab', 6)
    for _ in range(3): few.press('1')
    more = queue(path, 'ab')
    assert more.remaining == 5 and more.trial['session'] not in set(read_choices(path).session)
    while more.trial: more.press('2')
    assert sorted(read_choices(path).session) == [f's{i}' for i in range(8)]
    assert queue(path, 'ab', 2).remaining == 0

def test_two_pairs_of_systems_in_one_file(tmp_path):
    "Each pair has trials of its own, and `u` takes back a choice between the two that are shown."
    path = tmp_path/'choices.jsonl'
    first = queue(path, ['base', 'one'])
    while first.trial: first.press('1')
    second = queue(path, ['base', 'two'])
    assert second.remaining == 8
    second.press('u')
    assert len(read_choices(path)) == 8
    for key in '21u': second.press(key)
    choices = read_choices(path)
    assert len(choices) == 9 and second.remaining == 7 and first.trial is None
    assert len(choices_between(choices, {'two', 'base'})) == 1
    ben = choices.assign(rater='ben')                              # who agrees in everything
    assert rater_agreement(pd.concat([choices, ben])).mean == 1
    twice = np.flatnonzero(ben.session == ben.session.iloc[-1])[0]  # and now not in what was asked of both pairs
    ben.loc[ben.index[twice], 'winner'] = 'tie'
    assert rater_agreement(pd.concat([choices, ben])).mean < 1
    images = {name: np.zeros((8, 1, 48, 48, 3), np.uint8) for name in ('base', 'one')}
    sessions = [s for _, s in second.sessions.values()]
    labels = load_labels(export_labels(choices, sessions, images, tmp_path/'labels.jsonl'))
    assert len(labels.items) == 16 and (labels.truth_Q[::2] + labels.truth_Q[1::2] == 1).all()

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
    perfect = labels.truth_Q[::2]
    lazy = labels.truth_Q[1::2]
    assert len(labels.items) == 2*rated and perfect.min() >= .5 and (perfect + lazy == 1).all()
