"The package without its repository: a wheel, installed into an empty folder, does all that the commands promise."
import json, os, shutil, subprocess, sys
import nbformat, pytest
from mt_editflow_nb.ablation.report import load_results
from mt_editflow_nb.ablation.sweeps import plan_sweep
from readme import root

NAMES = ('mtef_init', 'mtef_data', 'mtef_train', 'mtef_eval', 'mtef_sweep', 'mtef_report', 'mtef_push', 'mtef_tools')
SMALL = ['sessions_per_iteration=1', 'group=2', 'turns=1', 'num_steps=2', 'lora_rank=2', 'eval_sessions=2']

# One interpreter for several commands, as importing takes longer than most of them: `[[name, argument, ...], ...]`.
COMMANDS = """
import json, os, runpy, sys
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [os.path.join('site', 'bin', name), *arguments]
    try: runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as e: assert not e.code, (name, e.code)
"""

@pytest.fixture(scope='module')
def away(tmp_path_factory):
    "Run commands in a folder with nothing but the installed wheel; dependencies are those of this environment."
    folder = tmp_path_factory.mktemp('away')
    source = folder/'source'
    source.mkdir()
    for name in ('setup.py', 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(root/name, source)
    ignored = shutil.ignore_patterns('__pycache__', 'results', '.ipynb_checkpoints')
    for name in ('mt_editflow_nb', 'experiments'): shutil.copytree(root/name, source/name, ignore=ignored)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    wheel = ['wheel', '--no-deps', '--no-build-isolation']
    subprocess.run([*pip, *wheel, '-w', str(folder), str(source)], check=True)
    shutil.rmtree(source)
    wheel, = folder.glob('*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--target', str(folder/'site'), str(wheel)], check=True)
    env = dict(os.environ, PYTHONPATH=str(folder/'site'), OMP_NUM_THREADS='1')

    def run(*commands):
        program = [sys.executable, '-c', COMMANDS, json.dumps(commands)]
        done = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run.folder = folder
    return run

@pytest.fixture(scope='module')
def said(away):
    """What all commands say. Training runs directly, and in the notebook that came with the package.

    A sweep of the user's own runs with the package's other notebook, and is reported."""
    train = ['mtef_train', *SMALL, 'iterations=2']
    fixed = ', '.join(pair.replace('=', ': ') for pair in [*SMALL, 'iterations=2', 'save_every=1', 'eval_turns=2'])
    (away.folder/'mine.yaml').write_text('question: Does it run away from the checkout?\n'
                                         'notebook: copies/ablation.ipynb\ngrid: {lr: [0.001]}\n'
                                         f'baseline: {{lr: 0.001}}\nfixed: {{{fixed}}}\nseeds: [0]\n')
    return away(*([name, '--help'] for name in NAMES), ['mtef_init', 'copies'], [*train, '--run', 'direct'],
                [*train, '--notebook', 'copies/train.ipynb', '--run', 'with space'],
                ['mtef_sweep', 'mine.yaml', '--out', 'sweeps'], ['mtef_report', 'sweeps', '--n-boot', '100'])

def test_every_command(away, said):
    for name in NAMES: assert f'usage: {name}' in said
    for run in ('direct', 'with space'):
        assert json.loads((away.folder/run/'results.json').read_text())['iterations'] == 2
    assert list((away.folder/'sweeps'/'report').rglob('*.html'))

def test_the_main_job_through_papermill(away, said):
    executed = away.folder/'with space'/'train.ipynb'
    assert 'turn' in said and 'with space/train.ipynb' in said
    outputs = [o for c in nbformat.read(executed, 4).cells for o in c.get('outputs', [])]
    # two figures, a strip of each evaluated session, and the members of a group
    pictures = [o for o in outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) == 5 and not any(o.output_type == 'error' for o in outputs)

def test_the_ablation_notebook_in_a_sweep(away, said):
    "A job folder holds what it should, and the report's chapter reads it."
    job, = plan_sweep(away.folder/'mine.yaml', away.folder/'sweeps').jobs
    files = {'job.ipynb', 'job.json', 'job.log', 'config.json', 'metrics.jsonl', 'results.json'}
    assert files | {'lora', 'checkpoints', 'rollouts'} <= {p.name for p in job.folder.iterdir()}
    config = json.loads((job.folder/'config.json').read_text())['config']
    assert job.values and config | job.values == config
    rows = [json.loads(x) for x in (job.folder/'metrics.jsonl').read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:                                                           # what the monitor reads
        assert {'identity', 'spread', 'push'} <= set(row) and set(row['push']) == {'if', 'cc'}
    point, = load_results(away.folder/'sweeps'/'mine.json').points.values()
    assert point.after.success_IT.shape == (1, 2, 2)                           # tested on more turns than trained

def test_names_to_start_with():
    "Each is the same object as in its own module, and asking for one loads no more than that module."
    import mt_editflow_nb
    from mt_editflow_nb.algorithm import fusion
    from mt_editflow_nb.data import sessions
    from mt_editflow_nb.editing import loading
    from mt_editflow_nb.training import train
    for module, name in ((fusion, 'PRESETS'), (fusion, 'advantages'), (sessions, 'Session'), (loading, 'load_editor'),
                         (train, 'train')):
        assert getattr(mt_editflow_nb, name) is getattr(module, name)
    for name in mt_editflow_nb.__all__:
        x = getattr(mt_editflow_nb, name)
        assert getattr(x, '__name__', name) == name
    with pytest.raises(AttributeError, match='load_editr'): mt_editflow_nb.load_editr
    code = ("import sys, mt_editflow_nb; mt_editflow_nb.advantages; "
            "print(*(name in sys.modules for name in ('diffusers', 'torch')))")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['False', 'True']

@pytest.mark.parametrize('option', [['-m', 'mt_editflow_nb.card'], ['-m', 'mt_editflow_nb.evaluation.card'],
                                    ['-mmt_editflow_nb.ablation.sweeps'], ['-m', 'mt_editflow_nb.cli.eval_run'],
                                    ['-Bm', 'mt_editflow_nb']], ids=' '.join)
def test_a_module_that_is_no_command_says_so(option):
    "It would do nothing, and report success."
    done = subprocess.run([sys.executable, *option, '--help'], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count('\n') == 1 and 'expected a command, mt_editflow_nb.cli.X' in done.stderr
