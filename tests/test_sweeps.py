"Sweeps as a user runs them: two slots, a kill in the middle, a failing job, a wrong spec, two sweeps at once, Ray."
import json, os, signal, subprocess, sys
from pathlib import Path
import nbformat, psutil, pytest, yaml
from helpers import PATIENCE, wait_for
from mt_editflow_nb.ablation import jobs as jobs_module
from mt_editflow_nb.ablation import sweeps
from mt_editflow_nb.ablation.jobs import describe_sweep, is_running, job_state, job_status, run_sweep, start_ray
from mt_editflow_nb.ablation.notebook import notebook_config
from mt_editflow_nb.ablation.sweeps import Job, Plan, Sweep, plan_sweep, read_notebook
from mt_editflow_nb.cli.sweep import main
from mt_editflow_nb.data.files import InputError, locked
from readme import root

PARAMETERS = '''run: str = ''  # folder
x: int = 1  # a number
name: str = ''  # a text
iterations: int = 1  # steps
seconds: float = 0.  # a step
fail: bool = False  # at the end
silent: bool = False  # no results
stubborn: bool = False  # Ctrl-C is not heard
seed: int = 0  # luck'''
WORK = '''import json, pathlib, signal, time
folder = pathlib.Path(run)
if stubborn: signal.signal(signal.SIGINT, signal.SIG_IGN)
with open(folder/'starts', 'a') as f: f.write('x')
log = folder/'metrics.jsonl'
done = len(log.read_text().splitlines()) if log.exists() else 0
try:
    for i in range(done, iterations):
        time.sleep(0 if (folder/'fast').exists() else seconds)
        with open(log, 'a') as f: f.write(json.dumps(dict(iteration=i)) + '\\n')
except KeyboardInterrupt:
    (folder/'saved').touch()
    raise
if fail: raise RuntimeError('told to fail')
if silent: raise SystemExit
(folder/'results.json').write_text(json.dumps(dict(x=x, seed=seed)))'''

def write_notebook(path, parameters=PARAMETERS, work=WORK, kernel='python3'):
    cell = nbformat.v4.new_code_cell
    cells = [cell(parameters, metadata=dict(tags=['parameters'])), cell(work)]
    spec = dict(name=kernel, display_name=kernel, language='python')
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=spec)), path)
    return path

@pytest.fixture
def folder(tmp_path):
    write_notebook(tmp_path/'small.ipynb')
    return tmp_path

def spec(folder, name='sweep', **fields):
    path = folder/f'{name}.yaml'
    path.write_text(yaml.safe_dump(dict(notebook='small.ipynb') | fields, sort_keys=False))
    return path

def command(path, *more):
    return [sys.executable, '-m', 'mt_editflow_nb.cli.sweep', str(path), '--out', str(path.parent/'runs'), *more]

def start_command(path, *more):
    return subprocess.Popen(command(path, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def family(process): return psutil.Process(process.pid).children(recursive=True)
def is_alive(process): return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

def lines(job):
    log = job.folder/'metrics.jsonl'
    return log.read_bytes().count(b'\n') if log.is_file() else 0

def starts(job):
    file = job.folder/'starts'
    return len(file.read_text()) if file.is_file() else 0

def test_a_failing_job_and_a_silent_one(folder, capsys):
    "The rest goes on, reasons are kept, the exit status says so; afterwards nothing that is done runs again."
    path = spec(folder, points=[dict(label='fails', fail=True), dict(label='good'), dict(label='silent', silent=True)])
    assert main([str(path), '--out', str(folder/'runs'), '--slots', '2']) == 1          # the third takes a used slot
    fails, good, silent = plan_sweep(path, folder/'runs').jobs
    assert [job_status(j) for j in (fails, good, silent)] == ['failed', 'done', 'failed']
    assert 'told to fail' in job_state(fails.folder)['error'] and 'results.json' in job_state(silent.folder)['error']
    executed = nbformat.read(fails.folder/'job.ipynb', 4)
    assert any(o.output_type == 'error' for c in executed.cells for o in c.get('outputs', []))
    assert 'Traceback' in (fails.folder/'job.log').read_text()
    out = capsys.readouterr().out
    assert '1 of 3 jobs are done' in out and 'told to fail' in out and '--retry-failed' in out
    assert main([str(path), '--out', str(folder/'runs')]) == 1
    assert [starts(j) for j in (fails, good, silent)] == [1, 1, 1]

def test_time_limit(folder, capsys):
    path = spec(folder, fixed=dict(iterations=10_000, seconds=.05), time_limit='4s')
    assert main([str(path), '--out', str(folder/'runs')]) == 1
    slow, = plan_sweep(path, folder/'runs').jobs
    assert job_status(slow) == 'failed' and not is_running(slow.folder)
    assert 'time limit of 4 s' in capsys.readouterr().out

def cut_off(folder, how):
    "A sweep of one job that a signal has ended on the way: (its file, the job, exit status, what it said)."
    path = spec(folder, fixed=dict(iterations=300, seconds=.05))
    job, = plan_sweep(path, folder/'runs').jobs
    process = start_command(path)
    wait_for(lambda: lines(job) > 5)
    jobs = family(process)
    process.send_signal(how)
    _, err = process.communicate(timeout=PATIENCE)
    wait_for(lambda: not any(map(is_alive, jobs)))                          # no job is left running unseen
    assert 5 < lines(job) < 300 and job_status(job) == 'cut' and not (job.folder/'results.json').exists()
    assert (job.folder/'saved').exists()                                    # the kernel was interrupted, not killed
    return path, job, process.returncode, err

def test_an_interrupted_sweep_ends_its_jobs_and_says_how_to_go_on(folder):
    _, _, status, said = cut_off(folder, signal.SIGINT)
    assert status == 130 and 'the same command resumes' in said and 'Traceback' not in said

def test_after_a_killed_sweep_the_same_command_goes_on(folder):
    "The jobs of a sweep that was killed end, and save what they have."
    path, job, status, _ = cut_off(folder, signal.SIGKILL)
    assert status == -signal.SIGKILL
    (job.folder/'fast').touch()
    assert subprocess.run(command(path), capture_output=True, timeout=PATIENCE).returncode == 0
    assert job_status(job) == 'done' and lines(job) == 300 and starts(job) == 2
    assert job_state(job.folder)['attempts'] == 2

def test_a_job_that_does_not_listen_is_killed(folder, monkeypatch):
    monkeypatch.setenv('MTEF_GRACE_SECONDS', '2')
    path = spec(folder, fixed=dict(iterations=10_000, seconds=.05, stubborn=True))
    job, = plan_sweep(path, folder/'runs').jobs
    process = start_command(path)
    wait_for(lambda: lines(job) > 2)
    jobs = family(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and 'the same command resumes' in err and 'Traceback' not in err
    wait_for(lambda: not any(map(is_alive, jobs)))
    assert job_status(job) == 'cut' and not (job.folder/'saved').exists()

@pytest.mark.parametrize('text', ['soon', '-1', 'inf', ''])
def test_how_long_a_job_has_to_save_is_a_number(folder, monkeypatch, capsys, text):
    monkeypatch.setenv('MTEF_GRACE_SECONDS', text)
    assert main([str(spec(folder)), '--out', str(folder/'runs')]) == 2
    said = f'mtef_sweep: MTEF_GRACE_SECONDS: expected a number of seconds, received {text!r}'
    assert capsys.readouterr().err == f'{said}\n' and not list((folder/'runs').glob('*/job.json'))

def test_two_sweeps_share_a_folder(folder):
    "Both ask for the same two jobs; each job is run once, and both sweeps end well."
    a, b = (spec(folder, name, grid=dict(x=x), fixed=dict(iterations=30, seconds=.05))
            for name, x in (('a', [1, 2]), ('b', [2, 1])))
    running = [start_command(path, '--slots', '1') for path in (a, b)]
    said = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    jobs = plan_sweep(a, folder/'runs').jobs
    assert [starts(j) for j in jobs] == [1, 1] and [lines(j) for j in jobs] == [30, 30]
    assert {p.name for p in (folder/'runs').glob('*.json')} == {'a.json', 'b.json'}
    assert len([p for p in (folder/'runs').iterdir() if p.is_dir()]) == 2

def test_the_tasks_of_an_array_share_a_sweep(folder, capsys):
    "`--jobs 1/2` and `--jobs 2/2` run all jobs, each once, and leave the plan of all of them."
    path = spec(folder, grid=dict(x=[1, 2, 3]), fixed=dict(iterations=1, seconds=.5))
    jobs = plan_sweep(path, folder/'runs').jobs
    assert main([str(path), '--out', str(folder/'runs'), '--jobs', '2/2']) == 0
    assert [job_status(j) for j in jobs] == ['new', 'done', 'new']
    capsys.readouterr()
    assert main([str(path), '--out', str(folder/'runs'), '--jobs', '1/2', '--slots', '2']) == 0
    out = capsys.readouterr().out
    assert '3 jobs (3 points x 1 seed)' in out and '2 at a time' in out and '2 of 2 jobs are done' in out
    assert [starts(j) for j in jobs] == [1, 1, 1] and [job_status(j) for j in jobs] == ['done']*3
    assert len(json.loads((folder/'runs/sweep.json').read_text())['points']) == 3
    for job in jobs: assert 'TCP' not in (job.folder/'job.log').read_text()      # two kernels may find the same port

@pytest.mark.parametrize('fields,words', [
    (dict(grid=dict(y=[1])), ['y: expected one of x, name', 'received an unknown name']),
    (dict(grid=dict(iteration=[1])), ["did you mean 'iterations'?"]),
    (dict(grid=dict(x=['1'])), ['x', "'1'", 'int']),
    (dict(grid=dict(x=[1.5])), ['x', '1.5', 'int']),
    (dict(fixed=dict(name=3)), ['name', '3', 'str']),
    (dict(fixed=dict(fail=1)), ['fail', '1', 'bool']),
    (dict(fixed=dict(run='here')), ['run']),
    (dict(fixed=dict(seed=1)), ['seed', 'seeds']),
    (dict(notebook='nowhere.ipynb'), ['notebook', 'nowhere.ipynb']),
    (dict(notebook='sweep.yaml'), ['notebook', 'expected a notebook']),
    (dict(cpus=2), ['cpus: expected one of question', 'resources', 'received an unknown name']),
    (dict(resources=dict(gpu=1)), ["resources.gpu: expected one of cpus, gpus, received an unknown name"]),
    (dict(basline='x'), ["did you mean 'baseline'?"]),
    (dict(resources=dict(cpus=0)), ['resources.cpus', '0']),
    (dict(resources=dict(gpus=1.5)), ['resources.gpus', '1.5']),
    (dict(seeds=[1, 1]), ['seeds']),
    (dict(grid=dict(x=[])), ['grid.x']),
    (dict(grid=dict(x=[1, 1])), ['two points', 'x=1']),
    (dict(baseline=dict(x=7)), ['baseline', '7']),
    (dict(time_limit=-1), ['time_limit', '-1']),
    (dict(points=[{1: 2}]), ['points']),
], ids=str)
def test_wrong_sweep(folder, capsys, fields, words):
    path = spec(folder, **fields)
    assert main([str(path), '--out', str(folder/'runs')]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'mtef_sweep: {path}: ') and err.count('\n') == 1 and all(w in err for w in words), err
    assert not (folder/'runs').exists()

@pytest.mark.parametrize('given, named', [
    (['--gpus', '0,1'], '--gpus'), (['--address', 'ray://x'], '--address'),
    (['--gpus', '0', '--slots', '1'], '--slots'), (['--gpus', '0', '--engine', 'ray'], '--engine ray')], ids=str)
def test_options_without_effect(folder, capsys, given, named):
    "The sweep's jobs have no GPU: which ones to use, and a cluster that nobody asks, are errors and not dropped."
    assert main([str(spec(folder)), '--dry-run', '--out', str(folder/'runs'), *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith('mtef_sweep: --') and named in err and 'no effect' in err and err.count('\n') == 1, err
    fine = [str(spec(folder)), '--dry-run', '--out', str(folder/'runs'), '--gpus', '0,1', '--per-gpu', '2']
    assert main(fine) == 0 and '4 at a time' in capsys.readouterr().out

def test_wrong_files(folder, capsys):
    (folder/'list.yaml').write_text('[1, 2]')
    (folder/'broken.yaml').write_text('a: [1')
    (folder/'latin.yaml').write_bytes('question: größer?'.encode('latin-1'))
    (folder/'bare.ipynb').write_text(nbformat.writes(nbformat.v4.new_notebook()))
    (folder/'half.ipynb').write_text((folder/'small.ipynb').read_text()[:500])
    write_notebook(folder/'two.ipynb', "run: str = ''\nalpha: float = 1.  # alpha = rank")
    write_notebook(folder/'julia.ipynb', kernel='julia-1.9')
    notebooks = {name: spec(folder, name, notebook=f'{name}.ipynb') for name in ('bare', 'half', 'two', 'julia')}
    for path, words in ((folder/'list.yaml', ['fields and values']), (folder/'broken.yaml', ['expected YAML']),
                        (folder/'latin.yaml', ['UTF-8']),
                        (folder/'none.yaml', ['expected a file that can be read, received none']),
                        (notebooks['bare'], ['`parameters`']), (notebooks['half'], ['expected a notebook']),
                        (notebooks['two'], ['alpha', 'papermill can read']),
                        (notebooks['julia'], ['kernel', "'julia-1.9'", 'python3'])):
        assert main([str(path), '--out', str(folder/'runs')]) == 2
        err = capsys.readouterr().err
        assert all(w in err for w in words) and err.count('\n') == 1, err
    assert not (folder/'runs').exists()

def test_a_job_is_known_by_everything_that_its_result_depends_on(folder):
    "The notebook's code, parameters, and the content of files that they name; not comments of parameters or outputs."
    (folder/'data.jsonl').write_text('{"a": 1}')
    path = spec(folder, fixed=dict(name=str(folder/'data.jsonl')))
    def folder_name(): return plan_sweep(path, folder/'runs').jobs[0].folder.name
    first = folder_name()
    write_notebook(folder/'small.ipynb', PARAMETERS.replace('# a number', '# another text'))
    assert folder_name() == first
    write_notebook(folder/'small.ipynb', work=WORK + '\nprint(1)')
    assert folder_name() != first
    write_notebook(folder/'small.ipynb', PARAMETERS.replace('x: int = 1', 'x: int = 2'))
    assert folder_name() != first
    write_notebook(folder/'small.ipynb')
    (folder/'data.jsonl').write_text('{"a": 10}')
    assert folder_name() != first
    (folder/'data.jsonl').write_text('{"a": 1}')
    assert folder_name() == first

def test_a_folder_keeps_its_name_when_parameters_change_places(folder):
    "A job that an older notebook ran is found, whatever the order of its parameters was."
    path = spec(folder, fixed=dict(x=2, iterations=3))
    job, = plan_sweep(path, folder/'runs').jobs
    assert job.folder.name.startswith('x=2_iterations=3_seed=0-')
    write_notebook(folder/'small.ipynb', '\n'.join(reversed(PARAMETERS.splitlines())))
    again, = plan_sweep(path, folder/'runs').jobs
    assert again.hash == job.hash and again.folder.name.startswith('seed=0_iterations=3_x=2-')
    job.folder.mkdir(parents=True)
    again, = plan_sweep(path, folder/'runs').jobs
    assert again.folder == job.folder

def test_a_changed_notebook_leaves_nothing_done(folder):
    path = spec(folder, seeds=[1])
    assert main([str(path), '--out', str(folder/'runs')]) == 0
    write_notebook(folder/'small.ipynb', work=WORK.replace('x=x', 'x=10*x'))
    assert [job_status(j) for j in plan_sweep(path, folder/'runs').jobs] == ['new']
    assert main([str(path), '--out', str(folder/'runs')]) == 0
    job, = plan_sweep(path, folder/'runs').jobs
    assert json.loads((job.folder/'results.json').read_text()) == dict(x=10, seed=1)

@pytest.fixture
def cluster(monkeypatch, tmp_path_factory):
    """Ray on this machine.

    It gives its own processes half a minute to start; where that is too little, it is tried again. Each of them imports
    jsonschema, which builds a grammar of URLs for seconds, but not where there is none."""
    modules = tmp_path_factory.mktemp('modules')
    (modules/'rfc3987_syntax.py').write_text('raise ImportError')
    monkeypatch.setenv('PYTHONPATH', str(modules), prepend=os.pathsep)
    for name in ('gcs_server_port_wait_time_s', 'gcs_server_request_timeout_seconds',
                 'worker_register_timeout_seconds'): monkeypatch.setenv(f'RAY_{name}', str(PATIENCE))
    monkeypatch.setenv('RAY_health_check_timeout_ms', str(1000*PATIENCE))
    ray = pytest.importorskip('ray', reason="Ray is not installed: pip install -e '.[ray]'")
    def is_up():
        try: return ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        except Exception as e:                                              # Ray's, of many kinds
            print('not yet:', e)
            ray.shutdown()
    wait_for(is_up)
    yield
    ray.shutdown()

def test_ray(folder, cluster):
    path = spec(folder, points=[dict(label='one', x=1), dict(label='two', x=2), dict(label='fails', fail=True)])
    plan = plan_sweep(path, folder/'runs')
    result = run_sweep(plan, start_ray(plan), [{}]*3, progress=False)
    assert [result[j.folder.name] for j in plan.jobs] == ['done', 'done', 'failed']
    assert [json.loads((j.folder/'results.json').read_text())['x'] for j in plan.jobs[:2]] == [1, 2]

def test_ray_is_optional(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert main([str(spec(folder)), '--out', str(folder/'runs'), '--engine', 'ray']) == 2
    assert "mt_editflow_nb[ray]" in capsys.readouterr().err

shipped = sorted((root/'experiments/sweeps').glob('*.yaml'))

@pytest.mark.parametrize('path', shipped, ids=lambda p: p.stem)
def test_shipped_sweeps(path, tmp_path):
    "Every sweep is accepted by its notebook."
    plan = plan_sweep(path, tmp_path)
    assert plan.sweep.question.endswith((')', '?'))
    if path.stem in ('recipe_ten', 'imitation_ten'): return  # one long run, for the ceiling: it compares nothing
    assert len(plan.sweep.seeds) >= 3
    fresh_seeds_of_one_setting = path.stem in ('imitation_confirm', 'supervised_more')
    assert len(plan.points) > 1 or fresh_seeds_of_one_setting

@pytest.fixture(scope='module')
def shipped_plans(tmp_path_factory):
    return {path.stem: plan_sweep(path, tmp_path_factory.mktemp('plans')) for path in shipped}

def test_the_sweeps_of_the_paper_are_there_and_share_jobs(shipped_plans):
    names = {'aggregation', 'reasoning', 'fusion', 'credit', 'algorithm', 'normaliser', 'turns', 'paper'}
    assert names <= shipped_plans.keys()
    def folders(name): return {j.folder.name for j in shipped_plans[name].jobs}
    assert folders('adaptive') <= folders('fusion') and folders('adaptive_binary') == folders('fusion_binary')
    for name in ('aggregation', 'fusion', 'credit', 'algorithm', 'paper'):
        assert len(shipped_plans[name].sweep.seeds) >= 5

def test_sweeps_at_equal_compute(shipped_plans):
    "What comments in the files say, with the configuration's defaults: as many turns, or passes, as the baseline."
    from mt_editflow_nb.algorithm.config import Config
    config = Config()
    paper = shipped_plans['paper'].points
    turns = shipped_plans['turns'].points
    edited = [p['turns']*p['sessions_per_iteration'] for p in (*turns.values(), paper['single-turn RL'])]
    assert all(abs(n/(3*config.sessions_per_iteration) - 1) < .05 for n in edited), edited
    # a rollout, and for each noise level a forward and a backward (the old policy is the trained one)
    passes = config.sessions_per_iteration*config.group*(config.num_steps + 3*config.train_timesteps)
    assert config.old_decay == 0
    assert abs(paper['supervised']['sessions_per_iteration']*config.group*3/passes - 1) < .05

def test_ablation_parameters_are_the_configuration():
    sys.path.insert(0, str(root/'experiments'))
    try: from parameters import Config, source
    finally: sys.path.pop(0)
    cells = nbformat.read(root/'experiments/ablation.ipynb', 4).cells
    cell, = [c for c in cells if 'parameters' in c.metadata.get('tags', [])]
    assert cell.source == source(), 'run python experiments/parameters.py'
    parameters = read_notebook(root/'experiments/ablation.ipynb').parameters
    assert set(parameters) == {'run', 'preset', *Config.model_fields} and all(p.help for p in parameters.values())

def ablation_sweep(tmp_path, **fields):
    path = tmp_path/'one.yaml'
    notebook = os.path.relpath(root/'experiments/ablation.ipynb', tmp_path)
    path.write_text(yaml.safe_dump(dict(notebook=notebook) | fields))
    return path

def test_a_preset_in_a_sweep_is_its_settings(tmp_path, capsys):
    "A point that names a preset is the job of one that names its settings, and its own settings override it."
    from mt_editflow_nb.algorithm.fusion import PRESETS
    points = [dict(preset='gdpo'), dict(label='local', preset='edit-r2', credit='local')]
    named, local = plan_sweep(ablation_sweep(tmp_path, points=points), tmp_path).jobs
    spelled, = plan_sweep(ablation_sweep(tmp_path, points=[PRESETS['gdpo']]), tmp_path).jobs
    assert named.folder == spelled.folder and named.label == 'preset=gdpo'
    assert local.parameters['credit'] == 'local' and local.parameters['fusion'] == 'reward'
    assert main([str(ablation_sweep(tmp_path, points=[dict(preset='gdp')])), '--out', str(tmp_path/'runs')]) == 2
    assert "did you mean 'gdpo'?" in capsys.readouterr().err

def test_the_judges_weights_are_part_of_a_job(tmp_path):
    import shutil
    judge = tmp_path/'judge'
    shutil.copytree(root/'mt_editflow_nb/assets/tiny_judge', judge)
    path = ablation_sweep(tmp_path, fixed=dict(judge=f'{judge}:direct'))
    def job_hash(): return plan_sweep(path, tmp_path).jobs[0].hash
    first = job_hash()
    assert job_hash() == first
    weights = judge/'model.safetensors'
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1                                                       # one bit of one weight
    weights.write_bytes(data)
    assert job_hash() != first

def test_names_that_papermill_only_warns_of_are_refused():
    "`papermill -p agregation min` defines a variable that nobody reads."
    values = {name: p.default for name, p in read_notebook(root/'experiments/ablation.ipynb').parameters.items()}
    assert notebook_config(values | dict(aggregation='min')).aggregation == 'min'
    with pytest.raises(InputError, match="did you mean 'aggregation'"):
        notebook_config(values | dict(agregation='min'))
    config = notebook_config(values | dict(preset='edit-r2', credit='local'))
    assert config.aggregation == 'none' and config.credit == 'local' and config.std == 'global'

def scripted_plan(tmp_path, n, **parameters):
    jobs = [Job(f'p{i}', 0, {}, parameters, tmp_path/f'j{i}', f'h{i}') for i in range(n)]
    return Plan('scripted', Sweep(notebook='x'), Path('x.ipynb'), jobs, 'p0', {})

def record(job, status, seconds):
    job.folder.mkdir(exist_ok=True)
    (job.folder/'job.json').write_text(json.dumps(dict(status=status, hash=job.hash, seconds=seconds)))
    if status == 'done': (job.folder/'results.json').write_text('{}')

def test_the_loop_with_scripted_jobs(tmp_path, monkeypatch):
    "Slots are respected, a job that another sweep runs is waited for, one whose process dies in silence has failed."
    plan = scripted_plan(tmp_path, 6, iterations=3)
    busy = set()
    most = []
    looks = []
    jobs = plan.jobs
    def elsewhere(folder):
        if folder == jobs[1].folder: looks.append(folder)
        return folder == jobs[1].folder and len(looks) < 2                     # the other sweep ends it meanwhile
    monkeypatch.setattr(jobs_module, 'is_running', elsewhere)
    def start(job, slot):
        assert slot['n'] not in busy
        busy.add(slot['n'])
        most.append(len(busy))
        polls = iter([None]*3)
        def poll():
            for running in polls: return running
            busy.discard(slot['n'])
            if job is jobs[2]: return -9
            record(job, 'done', 1.)
            return jobs_module.RUN_ELSEWHERE if job is jobs[1] else 0
        return poll, lambda force=False: None
    result = run_sweep(plan, start, [dict(n=0), dict(n=1)], progress=False, poll_seconds=.01)
    assert result == {f'j{i}': 'failed' if i == 2 else 'done' for i in range(6)} and max(most) == 2 and not busy

def test_the_time_left_counts_every_slot(tmp_path, capsys):
    """Also in the line that is written when a job has ended and no other has taken its place yet.

    Seven jobs of 100 s on two slots take 350 s, not 700."""
    plan = scripted_plan(tmp_path, 8)
    def start(job, _):
        record(job, 'running', 100.)
        polls = iter([None]*(70 if job is plan.jobs[0] else 90))               # the first ends while the second runs
        def poll():
            for running in polls: return running
            record(job, 'done', 100.)
            return 0
        return poll, lambda force=False: None
    run_sweep(plan, start, [{}, {}], poll_seconds=.01)
    assert '1 of 8 jobs, about 6 min left' in capsys.readouterr().err

def test_ten_thousand_jobs(tmp_path):
    "Planned, saved and listed in time that grows with their number: what is done for each pair of jobs would not end."
    write_notebook(tmp_path/'small.ipynb')
    path = spec(tmp_path, grid=dict(x=list(range(1000))), seeds=list(range(10)))
    plan = plan_sweep(path, tmp_path/'runs')
    sweeps.save_plan(plan, tmp_path/'runs')
    text = describe_sweep(plan, tmp_path/'runs', [{}])
    assert '10000 jobs (1000 points x 10 seeds)' in text and '10000 new' in text and '... and 950 more points' in text
    saved = json.loads((tmp_path/'runs/sweep.json').read_text())['points']
    assert len(saved) == 1000 and all([j['seed'] for j in p['jobs']] == list(range(10)) for p in saved)
    assert len({j['folder'] for p in saved for j in p['jobs']}) == 10_000

def test_an_unreadable_record_is_no_record(tmp_path):
    job = scripted_plan(tmp_path, 1).jobs[0]
    record(job, 'done', 1.)
    assert job_status(job) == 'done'
    (job.folder/'job.json').write_text('{"status": "do')
    assert job_status(job) == 'new' and job_state(job.folder) == {}
    record(job, 'running', 1.)
    with locked(job.folder, 'job.lock'): assert job_status(job) == 'running'
    assert job_status(job) == 'cut'
