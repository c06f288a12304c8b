"`mtef_report` on job folders whose truth is known: a page, tables and pictures that say what is in them."
import json, subprocess, sys
import numpy as np, pandas as pd, pytest
from safetensors.numpy import save_file
from mt_editflow_nb.ablation.report import load_results
from mt_editflow_nb.cli.report import main
from readme import root

S, N, T = 5, 120, 2
chance = {'plain': .5, 'much better': .8, 'the same': .5}

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    out, rng = tmp_path_factory.mktemp('runs'), np.random.default_rng(0)
    plan = dict(sweep='coins', question='Which coin wins?', baseline='plain', grid=dict(a=[0, 1], b=[0, 1]), fixed=dict(iterations=8), notebook='coins.ipynb', points=[])
    hard = rng.random((N, 1)) < .3
    draw = lambda p: dict(success_NT=(rng.random((N, T)) < p - .2*hard), object_cc_NT=rng.uniform(.8, 1, (N, T)), background_cc_NT=np.where(hard, np.nan, .9)*np.ones((N, T)))
    for i, (label, p) in enumerate(chance.items()):
        jobs = []
        for s in range(S):
            folder = out/f'{i}-{s}'; folder.mkdir()
            for name, q in (('before', .4), ('after', p)): save_file({k: np.ascontiguousarray(v) for k, v in draw(q).items()}, folder/f'{name}.safetensors')
            (folder/'metrics.jsonl').write_text(''.join(json.dumps(dict(iteration=i, all_right=[.4, .3], cc=[.9, .8])) + '\n' for i in range(8)))
            (folder/'job.json').write_text(json.dumps(dict(status='done', seconds=60)))
            jobs.append(dict(seed=s, folder=folder.name))
        plan['points'].append(dict(label=label, values=dict(a=i % 2, b=i//2), jobs=jobs))
    (out/'2-4'/'job.json').write_text(json.dumps(dict(status='failed', error='RuntimeError: told to')))
    (out/'coins.json').write_text(json.dumps(plan))
    (out/'other.json').write_text('{"not": "a plan"}')
    return out

def test_report(runs, capsys):
    assert main([str(runs), '--n-boot', '300']) == 0
    out = runs/'report'/'coins'
    said = capsys.readouterr().out
    assert 'report.html' in said and 'much better: better than the baseline' in said and 'the same: undecided' in said
    html = (out/'report.html').read_text()
    assert 'Which coin wins?' in html and 'told to' in html and '1 jobs are not in this report' in html and html.count('data:image/png') >= 5 and 'load_results' not in html
    assert {p.name for p in out.iterdir()} >= {f'{n}.{e}' for n in ('verdicts', 'scores', 'comparisons', 'monitor', 'cost') for e in ('csv', 'tex')} | {f'{n}.png' for n in ('forest', 'turns', 'plane', 'curves', 'grid')}
    scores, after = pd.read_csv(out/'scores.csv', index_col=[0, 1]), load_results(runs/'coins.json').points['much better'].after
    assert abs(scores.loc[('much better', 1), 'marginal'] - 100*after.success_IT[..., 0].mean()) < 1e-9
    table = pd.read_csv(out/'comparisons.csv', index_col=[0, 1, 2])
    row = table.loc[('much better', 1, 'IF')]
    assert row.low < 30 < row.high and row.p_holm < .01 and table.loc[('the same', 1, 'IF'), 'seeds'] == 4
    assert (out/'verdicts.tex').read_text().count(r'\\') >= 3

def test_wrong_input(runs, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    lonely = json.loads((runs/'coins.json').read_text())
    lonely['points'] = lonely['points'][:1]; lonely['points'][0]['jobs'] = []
    (runs/'sub').mkdir(exist_ok=True); (runs/'sub'/'lonely.json').write_text(json.dumps(lonely))
    for argv, word in ((['nowhere'], 'there is none'), ([str(tmp_path/'empty')], 'no sweep in it'), ([str(runs/'other.json')], 'not a sweep'),
                       ([str(runs/'sub'/'lonely.json')], 'baseline'), ([str(runs), '--n-boot', '5'], '--n-boot')):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith('mtef_report: ') and word in err and err.count('\n') == 1, err

def test_findings_are_those_of_the_files():
    "The tables of FINDINGS.md are made from the committed results."
    assert subprocess.run([sys.executable, root/'experiments/findings.py', '--check']).returncode == 0, 'run python experiments/findings.py'
