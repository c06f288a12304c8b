"A rater's choices survive whatever happens to the notebook."
import os, signal, subprocess, sys, time
from mt_editflow_nb.study import append_line, read_choices

writer = '''
import sys
from mt_editflow_nb.study import append_line
for i in range(100_000):
    append_line(sys.argv[1], dict(rater='ann', seed=0, trial=i, session=f's{i}', first='a', second='b', choice='first', seconds=1., time='', note='x'*500))
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
    with open(path, 'ab') as f: f.write(b'{"rater": "ann", "choi') # what a kill in the middle of a write would leave
    append_line(path, dict(rater='ann', seed=0, trial=999_999, session='z', first='a', second='b', choice='tie', seconds=1., time=''))
    assert read_choices(path).trial.tolist() == trials + [999_999]
