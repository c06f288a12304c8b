"What grows: the committed measurements are complete, and grow as they should; the notebook that made them runs."
import numpy as np, pandas as pd, pytest
from helpers import run_notebook
from scipy import stats
from readme import root

measured = pd.read_csv(root/'experiments/results/scale.csv')
linear = {'sessions of an iteration': 32, 'members of a group': 32, 'turns of a session': 16,
          'processes with sessions of their own': 4, 'sessions of an evaluation': 256, 'answers kept': 10**6,
          'answers taken over': 10**6, 'sessions on disk': 10**6, 'jobs planned and listed': 10**4,
          'jobs reported': 10**4, 'rows read with the monitor': 10**5}     # line -> the largest size
constant = {'processes that share the sessions': 4, 'a thousand answers found among': 10**6,
            'hundred rows appended to': 10**5, 'one more row on the live page of': 10**5}

def lowest_exponent(line):
    "The lower end of the 95 % interval of the slope on logarithmic axes."
    x = np.log(line.n)
    y = np.log(line.seconds)
    slope = np.cov(x, y)[0, 1]/x.var(ddof=1)
    residual = y - y.mean() - slope*(x - x.mean())
    error = np.sqrt((residual**2).sum()/(len(x) - 2)/((x - x.mean())**2).sum())
    return slope - stats.t.ppf(.975, len(x) - 2)*error

def test_all_lines_are_measured():
    assert measured.groupby('line').n.max().drop('pixels of a picture').to_dict() == linear | constant
    assert (measured.groupby('line').n.nunique() >= 3).all() and (measured.seconds > 0).all()

def most(name):
    "A tree of a million answers is a little deeper than one of a thousand."
    return 1.05 if name in linear else .15

@pytest.mark.parametrize('name', linear | constant)
def test_no_line_grows_faster_than_its_work(name):
    assert lowest_exponent(measured[measured.line == name]) <= most(name)

@pytest.mark.parametrize('name', [name for name in linear | constant if name != 'jobs reported'])
def test_nor_between_the_two_largest_sizes(name):
    "Where a constant share no longer hides it; a report is measured once a size, which leaves no interval."
    line = measured[measured.line == name]
    two = line[line.n.isin(sorted(line.n.unique())[-2:])]
    assert len(two) > 2 and lowest_exponent(two) <= most(name)

def test_the_notebook(runner, tmp_path):
    some = ['answers kept', 'a thousand answers found among', 'rows read with the monitor', 'jobs planned and listed']
    parameters = dict(sizes='tiny', lines=','.join(some), repeats=1, out=str(tmp_path))
    executed = runner.submit(run_notebook, root/'experiments/scale.ipynb', parameters).result()
    table = pd.read_csv(tmp_path/'scale.csv')
    assert table.groupby('line').size().to_dict() == dict.fromkeys(some, 2) and (table.seconds > 0).all()
    assert (tmp_path/'scale.png').is_file() and (tmp_path/'scale_memory.png').is_file()
    assert 'FLUX.1-Kontext-dev' in str(executed.cells[-1].outputs)
