"`mtef_report` on job folders whose truth is known: a page, tables and pictures that say what is in them."
import contextlib, io, json, re, sys
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from helpers import run_module, run_script
from safetensors.numpy import save_file
from mt_editflow_nb.ablation.report import comparison_table, plot_passes, score_table
from mt_editflow_nb.ablation.passes import pass_curve, pass_table
from mt_editflow_nb.ablation.results import Outcomes, compare_points, load_results
from mt_editflow_nb.data.files import InputError, read_json, read_json_lines
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.cli.report import main
from mt_editflow_nb.evaluation.card import session_scores
from mt_editflow_nb.evaluation.scores import edival_scores
from readme import root

S = 5
I = 120
T = 2
chance = {'plain': .5, 'much better': .8, 'the same': .5}
config = dict(sessions_per_iteration=2, group=2, num_steps=3, turns=T)

def write_job(folder, draw, chances, metrics):
    "A finished job, as `mtef_sweep` leaves it."
    folder.mkdir(parents=True)
    for name, p in zip(('before', 'after'), chances):
        save_file({key: np.ascontiguousarray(x) for key, x in draw(p).items()}, folder/f'{name}.safetensors')
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in metrics))
    (folder/'config.json').write_text(json.dumps(dict(config=config)))
    (folder/'job.json').write_text(json.dumps(dict(status='done', seconds=60)))

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    rng = np.random.default_rng(0)
    plan = dict(sweep='coins', question='Which coin wins?', baseline='plain', grid=dict(a=[0, 1], b=[0, 1]),
                fixed=dict(iterations=8), notebook='coins.ipynb', points=[])
    hard = rng.random((I, 1)) < .3
    def draw(p):
        background = np.where(hard, np.nan, .9)*np.ones((I, T))
        return dict(success_NT=rng.random((I, T)) < p - .2*hard, object_cc_NT=rng.uniform(.8, 1, (I, T)),
                    background_cc_NT=background)                              # under the names of earlier versions
    metrics = [dict(iteration=i, rows=4, all_right=[.4, .3 + .01*i], cc=[.9, .8]) for i in range(8)]
    for i, (label, p) in enumerate(chance.items()):
        jobs = [dict(seed=s, folder=f'{i}-{s}') for s in range(S)]
        for job in jobs: write_job(out/job['folder'], draw, (.4, p), metrics)
        plan['points'].append(dict(label=label, values=dict(a=i % 2, b=i//2), jobs=jobs))
    (out/'2-4'/'job.json').write_text(json.dumps(dict(status='failed', error='RuntimeError: told to')))
    with open(out/'0-0'/'metrics.jsonl', 'a') as f: f.write('{"iteration": 8, "all_r')  # half a line, as a kill leaves
    (out/'coins.json').write_text(json.dumps(plan))
    (out/'other.json').write_text('{"not": "a plan"}')
    return out

@pytest.fixture(scope='module')
def reported(runs):
    "The folder of their report, and what the command has said."
    said = io.StringIO()
    with contextlib.redirect_stdout(said): assert main([str(runs), '--n-boot', '300']) == 0
    return runs/'report'/'coins', said.getvalue()

def test_report(runs, reported):
    out, said = reported
    assert 'report.html' in said and 'much better: better than the baseline' in said and 'the same: undecided' in said
    html = (out/'report.html').read_text()
    assert 'Which coin wins?' in html and 'told to' in html and '1 job is not in this report' in html
    assert html.count('data:image/png') >= 6 and 'load_results' not in html
    names = ('verdicts', 'scores', 'comparisons', 'monitor', 'cost', 'passes')
    tables = [f'{name}.{e}' for name in names for e in ('csv', 'tex')]
    pictures = [f'{name}.png' for name in ('forest', 'turns', 'plane', 'passes', 'curves', 'grid')]
    assert {p.name for p in out.iterdir()} >= {*tables, *pictures}
    after = load_results(runs/'coins.json').points['much better'].after
    scores = pd.read_csv(out/'scores.csv', index_col=[0, 1])
    assert abs(scores.loc[('much better', 1), 'marginal'] - 100*after.success_IT[..., 0].mean()) < 1e-9
    table = pd.read_csv(out/'comparisons.csv', index_col=[0, 1, 2])
    row = table.loc[('much better', 1, 'IF')]
    assert row.low < 30 < row.high and row.p_holm < .01 and table.loc[('the same', 1, 'IF'), 'seeds'] == 4
    assert (out/'verdicts.tex').read_text().count(r'\\') >= 3

def test_passes_of_a_report(reported):
    "Eight iterations of 4 sampled rows of 2 turns and 3 steps, each trained once a turn with its backward pass."
    table = pd.read_csv(reported[0]/'passes.csv', index_col=0)
    cost = 8*(4*T*3 + 3*4*T)
    assert (abs(table.passes - cost/1000) < 1e-12).all() and table.seeds.tolist() == [5, 5, 4]
    assert (abs(table.per_1000 - table.gain/(cost/1000)) < 1e-9).all()
    assert table.low['much better'] > 0 and (table.low < table.per_1000).all() and (table.per_1000 < table.high).all()
    assert (table.reached == table.seeds).all() and abs(table.reach - 100*(.37*.8)**.5).max() < 1e-9

def test_passes_on_held_out_sessions(tmp_path):
    """Runs that were tested on the way, whatever their training logs.

    One is right in none of the sessions before training, in half of them half-way and in all of them after it; the
    other one, which nobody scored while it trained, is right in none until the end."""
    points = []
    for label, half_way in (('early', 50.), ('late', 0.)):
        row = dict(passes=dict(sampled=100))
        if label == 'early': row |= dict(all_right=[.5]*T, cc=[1.]*T)
        write_job(tmp_path/label, lambda p: {name: np.full((3, T), p) for name in Outcomes._fields}, (0., 1.),
                  [dict(row, iteration=i) for i in range(4)])
        (tmp_path/label/'heldout.jsonl').write_text(json.dumps(dict(iteration=2, heldout_O=half_way)) + '\n')
        points.append(dict(label=label, values={}, jobs=[dict(seed=0, folder=label)]))
    (tmp_path/'tested.json').write_text(json.dumps(dict(sweep='tested', baseline='early', points=points)))
    results = load_results(tmp_path/'tested.json')
    table = pass_table(results, reach=50., n_boot=20)
    assert table.to_reach.tolist() == [.2, .4] and table.reached.tolist() == [1, 1]
    assert table.area.tolist() == [50., 25.]                       # straight up; level, and then straight up
    assert 'held-out' in plot_passes(results).axes[0].get_ylabel()

def test_wrong_input(runs, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    lonely = json.loads((runs/'coins.json').read_text())
    lonely['points'] = lonely['points'][:1]
    lonely['points'][0]['jobs'] = []
    (runs/'sub').mkdir(exist_ok=True)
    (runs/'sub'/'lonely.json').write_text(json.dumps(lonely))
    for argv, word in ((['nowhere'], 'expected a folder of sweeps'),
                       ([str(tmp_path/'empty')], 'expected the NAME.json'),
                       ([str(runs/'other.json')], 'expected the NAME.json'),
                       ([str(runs/'sub'/'lonely.json')], 'baseline'), ([str(runs), '--n-boot', '5'], '--n-boot'),
                       ([str(runs), '--reach', '101'], '--reach'),
                       ([str(runs), '--notebook', 'none.ipynb'], '--notebook')):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith('mtef_report: ') and word in err and err.count('\n') == 1, err

def test_damaged_jobs_are_named(runs, tmp_path, capsys):
    "A line inside a log that is not JSON, and outcomes that are cut short: one line with the file."
    torn = b'{"iteration": 0}\n{"itera\n{"iteration": 2}\n'
    for name, damage in (('metrics.jsonl', torn), ('after.safetensors', b'\x10')):
        folder = tmp_path/name
        write_job(folder/'job', lambda p: dict(zip(Outcomes._fields, np.full((3, 2, 2), p))), (0., 1.), [])
        point = dict(label='a', values={}, jobs=[dict(seed=0, folder='job')])
        (folder/'damaged.json').write_text(json.dumps(dict(sweep='damaged', baseline='a', points=[point])))
        (folder/'job'/name).write_bytes(damage)
        assert main([str(folder)]) == 2
        err = capsys.readouterr().err
        assert name in err and err.count('\n') == 1, err

def test_points_that_were_tested_on_other_sessions_are_not_compared(tmp_path):
    """Equally many sessions of equally many turns, but others: within a point, and across points.

    Jobs of older versions, which do not say, are compared with all."""
    def draw(p): return dict(zip(Outcomes._fields, np.full((3, 4, 2), p)))
    points = [dict(label=label, values={}, jobs=[dict(seed=s, folder=f'{label}{s}') for s in (0, 1)]) for label in 'ab']
    (tmp_path/'p.json').write_text(json.dumps(dict(sweep='p', baseline='b', points=points)))
    def tested_on(**heldout):
        for job in ('a0', 'a1', 'b0', 'b1'):
            if not (tmp_path/job).is_dir(): write_job(tmp_path/job, draw, (0., 1.), [])
            identity = dict(identity=dict(heldout=heldout[job])) if job in heldout else {}
            (tmp_path/job/'config.json').write_text(json.dumps(dict(config=config, **identity)))
        try: return load_results(tmp_path/'p.json')
        except InputError as e: return str(e)
    assert tested_on(a0='x', a1='x', b0='x', b1='x').points['a'].heldout == 'x'
    assert tested_on(a0='x', b1='x').points['b'].heldout == 'x' and tested_on().points['a'].heldout is None
    across = tested_on(a0='x', a1='x', b0='y', b1='y')
    within = tested_on(a0='x', a1='y', b0='x', b1='x')
    assert 'p.json: a: expected an evaluation on the same sessions' in across and 'b (identity.heldout' in across
    assert 'a, seed 1: expected' in within and 'a, seed 0' in within

def test_sessions_of_different_lengths_in_a_report(tmp_path):
    """Two sessions of one turn, one right and one wrong, two of three turns, right but for the last turn of one.

    The failed short session counts at turn 1 alone: IF 75, 100, 50 and not 75, 67, 33."""
    nan = np.nan
    turns = np.array([1, 1, 3, 3])
    after = np.array([[0, nan, nan], [1, nan, nan], [1, 1, 1], [1, 1, 0]])
    def draw(p):
        cc = np.where(np.isnan(after), nan, .81)
        return dict(zip(Outcomes._fields, (after if p else after*0, cc, cc)), **(dict(turns_I=turns) if p else {}))
    points = [dict(label=label, values={}, jobs=[dict(seed=0, folder=label)]) for label in 'ab']
    metrics = [dict(iteration=i, passes=dict(sampled=100), all_right=x, cc=y) for i, (x, y) in enumerate(
        [([.5, .4, .36], [.9, .8, 1]), ([.5], [.9]), ([.5, .4, .36], [.9, .8, None]), ([.5, .4, .64], [.9, .8, 1])])]
    for label in 'ab': write_job(tmp_path/label, draw, (0., 1.), metrics)
    (tmp_path/'p.json').write_text(json.dumps(dict(sweep='p', baseline='b', points=points)))
    results = load_results(tmp_path/'p.json')
    point = results.points['a']
    assert point.turns_I == (1, 1, 3, 3)
    scores = score_table(results).loc['a']
    assert scores.kept.tolist() == [100, 100, 50]                       # of what the same sessions had right at turn 1
    assert scores.IF.tolist() == [75, 100, 50] == edival_scores(*(x[0] for x in point.after), turns).IF.tolist()
    gain = compare_points(point.before, point.after, n_boot=20, turns_I=point.turns_I).xs('IF', level='metric')
    assert gain.difference.tolist() == [75, 100, 50]
    assert pass_table(results, n_boot=20).gain['a'] == pytest.approx(90*.5**.5)
    passes, O = pass_curve(metrics, {})
    assert passes.tolist() == [100, 400] and O == pytest.approx([60, 80])
    (tmp_path/'a'/'after.safetensors').write_bytes((tmp_path/'a'/'before.safetensors').read_bytes())
    assert load_results(tmp_path/'p.json').points['a'].turns_I == (1, 1, 3, 3)        # an older file is told by another
    success = np.array([[1, 0, nan], [1, 0, 0], [1, 1, nan]])
    right_I = session_scores(Outcomes(success, success*nan, success*nan), [2, 3, 2])
    assert right_I.tolist() == [1/2, 1/3, 1]                                       # of the turns that a session has

def test_a_large_sweep_is_reported_in_time_that_grows_with_its_jobs(tmp_path):
    "Every point is compared with the baseline, and none with every other one: 100 points have 100 rows."
    def draw(p): return dict(zip(Outcomes._fields, np.full((3, 4, 1), p)))
    points = [dict(label=f'p{i}', values={}, jobs=[dict(seed=0, folder=f'j{i}')]) for i in range(100)]
    for i in range(100): write_job(tmp_path/f'j{i}', draw, (0., float(i % 2)), [])
    (tmp_path/'large.json').write_text(json.dumps(dict(sweep='large', baseline='p0', points=points)))
    results = load_results(tmp_path/'large.json')
    assert len(score_table(results)) == 101
    O = comparison_table(results, n_boot=20).xs('O', level='metric')
    assert len(O) == 99 and (O.difference == [100.*(i % 2) for i in range(1, 100)]).all()

def test_module_returns_its_status(tmp_path, capsys):
    "`python -m mt_editflow_nb.cli.report`, and `.sweep`, do what the commands do."
    for name in ('report', 'sweep'):
        assert run_module(f'mt_editflow_nb.cli.{name}', tmp_path/'none') == 2
        said = capsys.readouterr().err
        assert said.startswith(f'mtef_{name}: ') and said.count('\n') == 1

def test_the_recipe_is_the_gain_per_pass_of_finished_sweeps(tmp_path, capsys):
    """Seeds of two sweeps are put together. All turns right with CC .81 from none right: O rises from 0 to 90, in 3
    iterations of 100 rows sampled and 100 trained, 400 passes each."""
    def draw(p): return dict(zip(Outcomes._fields, np.stack([np.full((4, 3), x) for x in (p, .81, .81)])))
    metrics = [dict(iteration=i, passes=dict(sampled=100, trained=100)) for i in range(3)]
    for seed in (0, 1):
        points = [dict(label=label, values={}, jobs=[dict(seed=seed, folder=f'{label}{seed}')]) for label in 'ab']
        for label, after in zip('ab', (1., 0.)): write_job(tmp_path/f'{label}{seed}', draw, (0., after), metrics)
        plan = dict(sweep=f's{seed}', baseline='b', points=points)
        (tmp_path/f's{seed}.json').write_text(json.dumps(plan))
    (tmp_path/'tuning.jsonl').write_text('{"method": "a"}\n{"method": "a"}\n')
    recipe = root/'experiments/recipe.py'
    results = ['--results', str(tmp_path)]
    sweeps = [str(tmp_path/f's{seed}.json') for seed in (0, 1)]
    assert run_script(recipe, *sweeps, '--ours', 'a', *results) == 0
    report = json.loads((tmp_path/'recipe.json').read_text())
    a = report['methods']['a']
    b = report['methods']['b']
    assert (report['ours'], report['passes'], report['sessions']) == ('a', 1200, 4)
    assert (a['seeds'], a['tuning_runs'], a['learns_from'], b['tuning_runs']) == (2, 2, 'scores', 0)
    assert a['O_before'] == [0]*3 and a['O_after'] == [90]*3
    before = report['turn1_success_by_type']
    after = a['turn1_success_by_type']
    first_edits = {s.task_types[0] for s in shape_sessions(4, 3, 'heldout')}
    assert (before, after) == ({name: 0 for name in first_edits}, {name: 100 for name in first_edits})
    assert [a['turn3_O_gain'], a['gain_per_1000_passes'], a['turn3_CC_change'], b['turn3_O_gain']] == pytest.approx(
        [90, 75, 0, 0])
    assert a['turn3_O_gain_ci'] == pytest.approx([90, 90]) and (tmp_path/'recipe.png').is_file()
    capsys.readouterr()
    assert run_script(recipe, '--show', 'a', *results) == 0
    assert 'O at turn 3 +90.0 [+90.0, +90.0]' in capsys.readouterr().out
    assert run_script(recipe, *sweeps, '--ours', 'c', *results) != 0
    other = report | dict(methods=dict(a=a | dict(seeds=6, turn3_O_gain=50., turn3_O_gain_ci=[38., 62.])))
    (tmp_path/'other.json').write_text(json.dumps(other))
    assert run_script(recipe, '--pool', 'recipe', 'other', '--name', 'both', *results) == 0    # 2 seeds and 6
    both = json.loads((tmp_path/'both.json').read_text())['methods']
    assert (both['a']['seeds'], both['a']['turn3_O_gain'], both['a']['turn3_O_gain_ci']) == (8, 60, [51, 69])
    assert both['a']['tuning_runs'] == 2 and both['b'] == b and (tmp_path/'both.png').is_file()
    assert run_script(recipe, '--pool', 'recipe', 'other', '--latest', 'a', '--name', 'both', *results) == 0
    both = json.loads((tmp_path/'both.json').read_text())['methods']
    assert (both['a']['seeds'], both['a']['turn3_O_gain'], both['b']) == (6, 50, b)
    assert run_script(recipe, '--pool', 'recipe', 'other', '--latest', 'aa', *results) == 2
    assert run_script(recipe, *sweeps, '--ours', 'a', '--latest', 'a', *results) == 2
    (tmp_path/'other.json').write_text(json.dumps(other | dict(sessions=5)))
    assert run_script(recipe, '--pool', 'recipe', 'other', *results) == 2
    assert '--pool: sessions: expected the same in all reports' in capsys.readouterr().err

def test_how_many_times_as_much_is_gained(monkeypatch):
    "O is the root of IF times CC: with a quarter of the sessions right it rises to 45 instead of 90."
    monkeypatch.syspath_prepend(str(root/'experiments'))
    from recipe import times_the_gain
    def outcomes(right, S=2):
        success_SIT = np.broadcast_to(np.arange(40)[:, None] < right, (S, 40, 3)).astype(float)
        return Outcomes(success_SIT, *np.full((2, S, 40, 3), .81))
    def point(right, S=2):
        return SimpleNamespace(seeds=list(range(S)), before=outcomes(0, S), after=outcomes(right, S))
    ratio, low, high = times_the_gain(point(40), point(10), draws=50)
    assert ratio == pytest.approx(2) and 1 < low < 2 < high < 4
    assert times_the_gain(point(40), point(40), draws=50) == pytest.approx([1, 1, 1])
    assert times_the_gain(point(40), point(10, S=3), draws=50) is None         # other seeds
    assert times_the_gain(point(40), point(0), draws=50) is None

def test_the_best_of_several_samples_is_the_one_that_succeeds_and_keeps_most():
    sys.path.insert(0, str(root/'experiments'))
    try: from ceiling import best_members
    finally: sys.path.pop(0)
    success_PG = torch.tensor([[0., 1, 1], [0, 0, 0], [1, 0, 0]])
    cc_PG = torch.tensor([[.9, .5, .7], [.2, .8, .1], [float('nan'), 1, 1]])
    rewards_PGTM = torch.stack([success_PG, cc_PG], -1)[:, :, None]
    turn = SimpleNamespace(names=['if', 'cc'], success_PGT=success_PG[..., None], rewards_PGTM=rewards_PGTM)
    assert best_members(turn).tolist() == [2, 1, 0]

def test_the_best_of_one_sample_is_where_the_comparison_starts():
    "Two programs on the same sessions and noise: the committed numbers of both are the same."
    one, *_ = read_json_lines(root/'experiments/results/ceiling.jsonl')
    methods = read_json(root/'experiments/results/recipe.json')['methods']
    assert one['samples'] == 1 and all(m['O_before'] == one['O'] for m in methods.values())

def test_findings_are_those_of_the_files():
    "The tables of FINDINGS.md are made from the committed results."
    assert run_script(root/'experiments/findings.py', '--check') == 0, 'run python experiments/findings.py'

def test_texts_have_the_numbers_of_the_comparison():
    "The tables of README and of the main job are outputs of notebooks, which somebody has to run again."
    methods = read_json(root/'experiments/results/recipe.json')['methods']
    tried = [row['method'] for row in read_json_lines(root/'experiments/results/tuning.jsonl')]
    readme = (root/'README.md').read_text(encoding='utf-8')
    outputs = [o for c in read_json(root/'experiments/train.ipynb')['cells'] for o in c.get('outputs', [])]
    main_job = '\n'.join(''.join(o['data']['text/plain']) for o in outputs if 'data' in o)
    for name, m in methods.items():
        assert m['tuning_runs'] == tried.count(name)
        low, high = m['turn3_O_gain_ci']
        gain = f"| {m['seeds']} | {m['turn3_O_gain']:+.1f} [{low:+.1f}, {high:+.1f}] |"
        assert any(gain in line and line.endswith(f"| {m['tuning_runs']} |") for line in readme.splitlines()), name
        row = rf"^{name} +{m['learns_from']} +{m['seeds']} +\S+ +{m['turn3_O_gain']:.2f} "
        assert re.search(row, main_job, re.MULTILINE), name
