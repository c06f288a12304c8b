"Whole runs: killed, interrupted, out of disk, from a user's own files, and from the command line."
import importlib, json, os, random, resource, shutil, signal, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np, psutil, pytest, torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file
from helpers import PATIENCE, Command, wait_for
import mt_editflow_nb
from mt_editflow_nb.editing import loading
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import load_lora, lora_parameters, save_lora
from mt_editflow_nb.cli.eval import main as mtef_eval
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.editing.noise import normal_noise, session_keys
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.data.files import InputError, atomic_write, locked, to_json
from mt_editflow_nb.data.sessions import save_sessions
from mt_editflow_nb.data.signals import Stopped
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.training import heldout
from mt_editflow_nb.training.checkpoints import last_checkpoint
from mt_editflow_nb.cli.train import _go_where_begun, main
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.training.train import experiment, opened_run, train
from test_sweeps import write_notebook

small = dict(sessions_per_iteration=1, group=2, turns=2, num_steps=2, lora_rank=2, iterations=8, save_every=2,
             eval_sessions=2)

def pairs(**changes): return [f'{k}={json.dumps(v)}' for k, v in (small | changes).items()]
def adapter(run): return load_file(Path(run)/'lora'/'pytorch_lora_weights.safetensors')
def table(run): return json.loads((Path(run)/'results.json').read_text())['table']

def lines(run):
    log = Path(run)/'metrics.jsonl'
    return log.read_text().splitlines() if log.is_file() else []

def same_end(a, b):
    x = adapter(a)
    y = adapter(b)
    return lines(a) == lines(b) and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)

@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(threads)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nothing happened to, in a process like those below."
    run = tmp_path_factory.mktemp('whole')/'run'
    assert start(run, *pairs()).end()[0] == 0
    return run

def start(run, *args): return Command(main, [*args, '--run', str(run)], run.with_name('log'))

def wait_for_iteration(job, run, n):
    def is_done():
        assert job.is_running(), job.said('err')
        return len(lines(run)) >= n
    wait_for(is_done)

def ended_at_a_random_moment(run, sent):
    "(exit status, what it said) of a run that a signal has ended on the way."
    job = start(run, *pairs())
    moment = random.Random(sent)
    wait_for_iteration(job, run, moment.randint(1, 4))
    time.sleep(moment.random()*.1)
    job.send(sent)
    ended = job.end()
    assert len(lines(run)) < small['iterations']
    return ended

def assert_resumes(run, whole):
    "A run that is gone on with ends as one that was never stopped."
    assert Command(main, ['--resume', str(run)], run.with_name('resumed')).end()[0] == 0
    assert same_end(whole, run)
    assert table(run) == table(whole)

def test_killed_at_a_random_moment_and_resumed(whole, tmp_path):
    run = tmp_path/'a folder'
    status, _ = ended_at_a_random_moment(run, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert_resumes(run, whole)

def test_terminated_at_a_random_moment_and_resumed(whole, tmp_path):
    run = tmp_path/'a folder'
    status, said = ended_at_a_random_moment(run, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and f'--resume {run}' in said
    assert_resumes(run, whole)

@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_interrupted_at_a_random_moment(tmp_path, sent):
    "What stops a run is one function for all signals that can be answered: SIGTERM, above, is gone on from."
    run = tmp_path/'a folder'
    status, said = ended_at_a_random_moment(run, sent)
    assert status == 128 + sent and f'--resume {run}' in said

def test_what_a_run_folder_holds(whole):
    config = json.loads((whole/'config.json').read_text())
    assert config['config']['group'] == 2 and torch.__version__.startswith(config['environment']['torch'])
    assert [json.loads(x)['iteration'] for x in lines(whole)] == list(range(8))
    results = json.loads((whole/'results.json').read_text())
    expected = {(t, m) for t in (1, 2) for m in ('IF', 'marginal', 'CC', 'O')}
    assert results['sessions'] == 2 and {(r['turn'], r['metric']) for r in results['table']} == expected
    assert (whole/'results.csv').is_file() and list((whole/'rollouts').glob('heldout_*.png'))
    assert len(list((whole/'checkpoints').iterdir())) == 2
    assert not [p for p in whole.rglob('*') if p.suffix in ('.pt', '.pkl', '.bin')]

def test_adapter_of_a_run_in_plain_diffusers(whole):
    "A pipeline that has never heard of this package plays the same session, turn after turn, from the same noise."
    from diffusers import FluxKontextPipeline
    editor = load_editor()
    session, = shape_sessions(1, 2, 'heldout', seed=3)
    untrained = rollout(editor, [session], group=1, num_steps=4, seed=5)
    load_lora(editor, whole/'lora')
    ours = rollout(editor, [session], group=1, num_steps=4, seed=5)
    pipe = FluxKontextPipeline.from_pretrained(Path(mt_editflow_nb.__file__).parent/'assets'/'tiny_kontext')
    key, = session_keys([session], seed=5)
    image = session.image
    pipe.load_lora_weights(whole/'lora')
    for t, instruction in enumerate(session.instructions):
        noise = normal_noise([(*key, 'start', t, 0)], editor.latent_shape)
        image = pipe(image=image, prompt=instruction, latents=noise, num_inference_steps=4,
                     guidance_scale=editor.guidance, height=48, width=48, max_area=48*48, _auto_resize=False,
                     max_sequence_length=editor.max_text_tokens).images[0]
        assert np.abs(np.asarray(image).astype(int) - ours.images_PGTHWC[0, 0, t]).max() <= 1
    assert not torch.equal(ours.clean_TNLC, untrained.clean_TNLC)

@pytest.mark.parametrize('algorithm', ['nft', 'grpo'])
def test_full_disk_keeps_the_last_checkpoint(tmp_path, algorithm):
    "A limit on the size of files stands in for a disk that fills up after the second checkpoint."
    few = dict(algorithm=algorithm, turns=1, iterations=3, save_every=1)
    config = make_config(small | few)
    run = tmp_path/'run'
    calls = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    judge = load_judge(config.judge)
    def fills_the_disk(sessions, images):
        calls.append(1)
        if len(calls) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return judge(sessions, images)
    try:
        with pytest.raises(InputError, match='cannot write .*000003.*the last good one is .*000002'):
            train(config, run, judge=fills_the_disk, progress=False)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_checkpoint(run).name == '000002' and not list((run/'checkpoints').glob('.*'))
    train(config, run, progress=False)
    train(config, tmp_path/'whole', progress=False)
    assert same_end(tmp_path/'whole', run)

def test_a_loss_that_is_not_a_number(tmp_path, monkeypatch):
    module = importlib.import_module('mt_editflow_nb.algorithm.iterate')
    real = module.nft_loss
    calls = []
    def poisoned(*args, **kw):
        calls.append(1)
        loss, stats = real(*args, **kw)
        return (loss*float('nan') if len(calls) == 11 else loss), stats
    monkeypatch.setattr(module, 'nft_loss', poisoned)
    with pytest.raises(InputError, match='iteration 2: loss: expected finite numbers, received nan or inf') as e:
        train(make_config(small | dict(train_timesteps=2)), tmp_path/'run', progress=False)
    assert last_checkpoint(tmp_path/'run').name == '000002' and '\n' not in str(e.value)

def copied(whole, folder):
    "A finished run as if it had been stopped before its last evaluation."
    shutil.copytree(whole, folder)
    for name in ('before.safetensors', 'after.safetensors', 'results.json'): (folder/name).unlink()
    return folder

def test_without_a_good_checkpoint_nothing_is_loaded(tmp_path, whole, monkeypatch, capsys):
    run = copied(whole, tmp_path/'run')
    for folder in (run/'checkpoints').iterdir(): (folder/'state.safetensors').write_bytes(b'not weights')
    loaded = []
    monkeypatch.setattr(mt_editflow_nb.training.parts, 'load_editor', lambda *a, **kw: loaded.append(a))
    assert main(['--resume', str(run)]) == 2 and not loaded
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith('mtef_train: checkpoint: expected a checkpoint of this run, received ')
    assert '000008: ' in last
    with pytest.raises(InputError, match='checkpoint: expected a checkpoint of this run, received .*000008: ') as e:
        train(make_config(small), run, progress=False)
    assert '\n' not in str(e.value)

def flip(file):
    "Change one bit of a file."
    content = bytearray(file.read_bytes())
    content[len(content)//2] ^= 16
    file.write_bytes(content)

def says_another_iteration(file): file.write_text(json.dumps(json.loads(file.read_text()) | dict(iteration=6)))
def cut_in_half(file): file.write_bytes(file.read_bytes()[:len(file.read_bytes())//2])

@pytest.mark.parametrize('harm,name', [(flip, 'state.safetensors'), (cut_in_half, 'state.safetensors'),
                                       (says_another_iteration, 'state.json'), (cut_in_half, 'state.json')],
                         ids=lambda x: getattr(x, '__name__', x))
def test_a_damaged_checkpoint_is_never_gone_on_from(whole, tmp_path, harm, name):
    run = copied(whole, tmp_path/'run')
    said = []
    harm(run/'checkpoints'/'000008'/name)
    assert last_checkpoint(run, said.append).name == '000006'
    line, = said
    assert 'expected a checkpoint of this run, received ' in line and '000008: ' in line
    assert 'going on from 000006' in line

def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(whole, tmp_path, capsys):
    run = copied(whole, tmp_path/'run')
    flip(run/'checkpoints'/'000008'/'state.safetensors')
    with one_thread(): train(make_config(small), run, progress=False)
    said = capsys.readouterr().err
    assert 'expected a checkpoint of this run, received ' in said and '000008: ' in said
    assert 'going on from 000006' in said
    assert same_end(whole, run)

def test_logs_that_are_not_whole(whole, tmp_path, capsys):
    "Half a line inside, half a line at the end, half a `batch.json`, a log that is gone: said, and the run goes on."
    run = copied(whole, tmp_path/'run')
    shutil.rmtree(run/'checkpoints'/'000008')
    log = lines(whole)
    (run/'metrics.jsonl').write_text('\n'.join([*log[:2], log[2][:20], *log[3:7], log[7][:9]]))
    (run/'timings.jsonl').unlink()
    (run/'batch.json').write_text('{"bat')
    with one_thread(): train(make_config(small), run, progress=False)
    said = capsys.readouterr().err
    assert "metrics.jsonl: the lines of 1 of 6 iterations are missing (the first: 2)" in said
    assert "timings.jsonl: the lines of 6 of 6 iterations are missing (the first: 0)" in said
    assert lines(run) == log[:2] + log[3:]
    assert len((run/'timings.jsonl').read_text().splitlines()) == 2

def test_a_finished_run_with_a_damaged_adapter(whole, tmp_path, capsys):
    run = tmp_path/'run'
    shutil.copytree(whole, run)
    flip(run/'lora'/'pytorch_lora_weights.safetensors')
    (run/'rollouts'/'heldout_1.png').unlink()
    with one_thread(): assert main(['--resume', str(run)]) == 0
    assert 'not the adapter that was trained' in capsys.readouterr().err
    assert same_end(whole, run) and (run/'rollouts'/'heldout_1.png').is_file()

def test_only_what_it_was_made_from_goes_on(tmp_path, capsys):
    "Sessions whose pictures have changed, and another editor of the same shape, are refused with one line."
    file = save_sessions(shape_sessions(6, 1, seed=7), tmp_path/'mine')
    editor = tmp_path/'editor'
    shutil.copytree(Path(mt_editflow_nb.__file__).parent/'assets'/'tiny_kontext', editor)
    fields = dict(sessions_per_iteration=1, group=2, num_steps=2, lora_rank=2, iterations=1,
                  sessions=str(file), editor=str(editor))
    run = tmp_path/'run'
    argv = [f'{k}={v}' for k, v in fields.items()]
    assert main([*argv, '--run', str(run)]) == 0
    identity = json.loads((run/'config.json').read_text())['identity']
    assert set(identity) == {'sessions', 'heldout', 'editor', 'judge', 'eval_judge'}
    capsys.readouterr()
    picture = next((tmp_path/'mine'/'images').iterdir())
    before = picture.read_bytes()
    image = Image.open(picture).convert('RGB')
    image.putpixel((0, 0), (9, 9, 9))
    image.save(picture)
    assert main(['--resume', str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'received other' in said and 'sessions' in said
    picture.write_bytes(before)
    flip(editor/'transformer'/'diffusion_pytorch_model.safetensors')
    assert main(['--resume', str(run)]) == 2
    assert 'received another editor' in capsys.readouterr().err

def test_one_writer_and_one_folder_each(tmp_path, monkeypatch, capsys):
    "A second process in a run folder is turned away; runs that begin in the same second get folders of their own."
    run = tmp_path/'run'
    with locked(run):
        assert main([*pairs(), '--run', str(run)]) == 2
        assert 'not in use' in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, 'strftime', lambda *_: '20260101-000000')
    for _ in range(2): assert main(pairs(iterations=0, eval_sessions=1)) == 0
    names = sorted(p.name for p in (tmp_path/'runs').iterdir() if p.name[0] != '.')
    assert names == ['20260101-000000', '20260101-000000-2']
    assert oct((tmp_path/'runs'/'20260101-000000'/'results.json').stat().st_mode & 0o777) == oct(0o666 & ~umask())

def umask():
    value = os.umask(0)
    os.umask(value)
    return value

def test_killed_before_it_had_a_configuration(tmp_path):
    run = tmp_path/'run'
    for name in ('rollouts', 'checkpoints'): (run/name).mkdir(parents=True)
    assert main([*pairs(iterations=0, eval_sessions=1), '--run', str(run)]) == 0

def test_relative_paths_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    "The paths of a configuration start where the run was begun; `~` is the home folder."
    (tmp_path/'there').mkdir()
    monkeypatch.chdir(tmp_path/'there')
    monkeypatch.setenv('HOME', str(tmp_path))
    save_sessions(shape_sessions(3, 1, seed=7), tmp_path/'there'/'mine')
    fields = dict(sessions_per_iteration=1, group=2, num_steps=2, lora_rank=2, iterations=0,
                  sessions='mine/sessions.jsonl')
    assert main([*(f'{k}={v}' for k, v in fields.items()), '--run', '~/run']) == 0
    monkeypatch.chdir(tmp_path)
    assert main(['--resume', str(tmp_path/'run')]) == 0
    assert 'going on in' in capsys.readouterr().err

def test_a_judge_and_an_adapter_are_found_where_a_run_was_begun(tmp_path, monkeypatch, capsys):
    (tmp_path/'there'/'judges'/'mine').mkdir(parents=True)
    there = tmp_path/'there'
    run = tmp_path/'run'
    for fields in (dict(judge='judges/mine:think'), dict(eval_judge='editscore:judges/mine'), dict(init_lora='judges')):
        monkeypatch.chdir(tmp_path)
        atomic_write(run/'config.json', to_json(dict(config=fields, started_in=str(there))))
        _go_where_begun(run)
        assert Path.cwd() == there and 'going on in' in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for stored in ('[1]', '{}', '{"config": 3, "started_in": 4}', '{"config": {}, "started_in": "/none"}', '{'):
        (run/'config.json').write_text(stored)
        _go_where_begun(run)
        assert Path.cwd() == tmp_path

def test_a_stop_in_an_evaluation_says_how_to_go_on(tmp_path, capsys):
    judge = load_judge('verifier')
    calls = []
    def stops(sessions, images):
        calls.append(1)
        if len(calls) == 2: signal.raise_signal(signal.SIGTERM)
        return judge(sessions, images)
    config = make_config(small | dict(batch=1, iterations=1))
    with pytest.raises(Stopped): experiment(config, tmp_path/'run', judge=stops, progress=False)
    assert f'stopped by SIGTERM; go on with: mtef_train --resume {tmp_path/"run"}' in capsys.readouterr().err
    done = list((tmp_path/'run'/'evaluations'/'before').glob('*.safetensors'))
    assert len(done) == 1                                          # the first of two batches is not asked again
    experiment(config, tmp_path/'run', progress=False)
    experiment(config, tmp_path/'whole', progress=False)
    results = [json.loads((tmp_path/n/'results.json').read_text())['table'] for n in ('run', 'whole')]
    assert results[0] == results[1]

def end_notebook(notebook, run, sent):
    "Exit status of `mtef_train --notebook` that is sent a signal in its third iteration, and what it has said."
    job = start(run, *pairs(iterations=500), '--notebook', str(notebook))
    wait_for_iteration(job, run, 2)
    family = psutil.Process(job.pid).children(recursive=True)
    assert len(family) >= 2                                        # papermill and its kernel
    job.send(sent)
    end = job.end()
    _, alive = psutil.wait_procs(family, PATIENCE)
    assert not alive
    return end

@pytest.mark.skipif(not Path('experiments/train.ipynb').is_file(), reason='runs from the top of the repository')
def test_a_notebook_that_is_stopped_has_saved(tmp_path):
    run = tmp_path/'run'
    status, said = end_notebook('experiments/train.ipynb', run, signal.SIGTERM)
    assert status == 143 and f'--resume {run}' in said
    assert last_checkpoint(run) is not None

works_on = '''import os, time
from pathlib import Path
from mt_editflow_nb.data.signals import stop_requests, stop_with
stop_with(int(os.environ['MTEF_FOLLOWED_BY']))
try:
    with stop_requests():
        while True:
            with open(Path(run)/'metrics.jsonl', 'a') as f: f.write('{}\\n')
            time.sleep(.1)
finally: (Path(run)/'saved').touch()'''

def test_a_notebook_does_not_work_on_as_an_orphan(tmp_path):
    "Beside `mtef_train` that is killed: one that does what training does when it begins, and no more."
    notebook = write_notebook(tmp_path/'works_on.ipynb', "run: str = ''\nsettings: dict = {}", works_on)
    status, _ = end_notebook(notebook, tmp_path/'run', signal.SIGKILL)
    assert status == -signal.SIGKILL and (tmp_path/'run'/'saved').is_file()

def test_training_in_a_notebook_ends_with_the_command(tmp_path, monkeypatch):
    followed = []
    monkeypatch.setenv('MTEF_FOLLOWED_BY', '12345')
    monkeypatch.setattr(mt_editflow_nb.training.train, 'stop_with', followed.append)
    with opened_run(make_config(small), tmp_path/'run', {}): assert followed == [12345]

bad = {
    'unknown name': (['agregation=min'], "received an unknown name (did you mean 'aggregation'?)"),
    'wrong type': (['lr=fast'], 'lr'),
    'no such aggregation': (['aggregation=median'], 'aggregation'), 'group of one': (['group=1'], 'group'),
    'plan of a folder': (['--plan'], '--plan: expected no --run'),
    'no notebook': (['--notebook', '/etc/hostname'], 'notebook: /etc/hostname: expected a notebook'),
    'option without dashes': (['resume=x'], "resume: expected an option, --resume, received 'resume=x'"),
    'no name': (['=3'], "field=value, for example aggregation=min, received '=3'"),
    'run in a file': (['--run', '/dev/null/run'], '--run: expected a folder'),
    'judge option': (['judge_options={max_tokens: lots}', 'judge=tiny:think'], 'judge_options.max_tokens'),
    'judge name': (['judge_options={name: x}', 'judge=tiny:think'], 'judge_options'),
    'judge cache': (['judge_options={cache: x}', 'judge=tiny:think'], 'judge_options'),
    'zero turns': (['turns=0'], 'turns'), '17 turns': (['turns=17'], 'turns'), 'no value': (['lr'], 'field=value'),
    'judge': (['judge=oracle'], 'judge'), 'missing file': (['sessions=none.jsonl'], 'none.jsonl'),
    'missing recipe': (['none.yaml'], 'none.yaml'), 'editor': (['editor=./none'], 'editor'),
    'resume': (['--resume', 'none'], '--resume'), 'notebook': (['--notebook', 'none.ipynb'], 'none.ipynb'),
    'no effect': (['heldout=4'], 'heldout'), 'best without looking': (['keep_best=2'], 'keep_best')}

@pytest.mark.parametrize('name', bad)
def test_bad_input_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, part = bad[name]
    assert main([*argv, *([] if name in ('resume', 'run in a file') else ['--run', 'run'])]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count('\n') == 1 and err.startswith('mtef_train: ')
    assert not (tmp_path/'run').exists()                           # no folder that then refuses the right settings

@pytest.mark.parametrize('setting', ['lora_rank=97', 'lora_targets=[attn.to_x]', 'size=50'])
def test_what_the_editor_cannot_have_is_found_before_it_is_evaluated(tmp_path, capsys, setting):
    "The widths and names of layers are known with the editor; nothing has been sampled then."
    assert main([*pairs(), setting, '--run', str(tmp_path/'run')]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"mtef_train: {setting.partition('=')[0]}: expected ")
    assert not (tmp_path/'run'/'before.safetensors').exists() and not (tmp_path/'run'/'evaluations').exists()

@pytest.mark.parametrize('options, said', [
    (dict(lora_rank=97), 'lora_rank: expected a whole number from 1 to 96'),
    (dict(lora_rank=2, lora_targets=['attn.to_x']), 'lora_targets: expected'),
    (dict(attention_backend='flash'), 'attention_backend: expected one that can be used here, received flash: '),
    (dict(lora_rank=2, lora_targets='attention', init_lora='other'), 'only layers that are trained here')])
def test_what_does_not_fit_an_editor_is_found_before_weights_are_read(options, said, tmp_path, monkeypatch):
    "An adapter of all layers is no start for one of the attention alone."
    if 'init_lora' in options:
        editor = loading.load_editor(lora_rank=2)
        for p in lora_parameters(editor): p.data.fill_(.01)
        save_lora(editor, tmp_path)
        options = options | dict(init_lora=str(tmp_path))
    monkeypatch.setattr(loading, 'load_pipeline', lambda *args: pytest.fail('weights were read'))
    with pytest.raises(InputError, match=said): loading.load_editor(**options)

def test_an_adapter_of_another_editor_is_found_before_the_editor_is_evaluated(tmp_path, monkeypatch, capsys):
    wide = {f'transformer.transformer_blocks.0.attn.to_q.lora_{f}.weight': np.ones(shape, np.float32)
            for f, shape in dict(A=(2, 64), B=(64, 2)).items()}
    save_file(wide, tmp_path/'pytorch_lora_weights.safetensors')
    monkeypatch.setattr(loading, 'load_pipeline', lambda *args: pytest.fail('weights were read'))
    assert mtef_eval(['--lora', str(tmp_path), '--n', '1', '--out', str(tmp_path/'out')]) == 2
    assert 'an adapter of this editor, received 0 tensors that fit and 2 that do not' in capsys.readouterr().err

def broken_files(folder):
    "Session files that cannot be trained on, and what the message names."
    ok = shape_sessions(2, 2)
    save_sessions(ok, folder/'ok')
    line = (folder/'ok'/'sessions.jsonl').read_text().splitlines()[0]
    picture = folder/'ok'/json.loads(line)['image']
    def write(name, *rows):
        (folder/'ok'/name).write_text('\n'.join(rows))
        return folder/'ok'/name
    (folder/'ok'/'corrupt.png').write_bytes(picture.read_bytes()[:60])
    d = json.loads(line)
    (folder/'ok'/'empty.jsonl').write_text('')
    yield folder/'ok'/'empty.jsonl', 'empty.jsonl'
    yield write('missing.jsonl', json.dumps(d | dict(image='none.png'))), 'none.png'
    yield write('corrupt.jsonl', json.dumps(d | dict(image='corrupt.png'))), 'corrupt.png'
    shorter = json.dumps(d | dict(id='b', instructions=d['instructions'][:1]))
    yield write('uneven.jsonl', line, shorter), 'uneven.jsonl:2'
    yield write('words.jsonl', json.dumps(d | dict(instructions=['make it pop', 'add rain']))), 'make it pop'

def test_bad_session_files_are_one_line(tmp_path, capsys):
    for path, part in broken_files(tmp_path):
        training = main, [f'sessions={path}', '--run', str(tmp_path/'run')]
        evaluation = mtef_eval, ['--sessions', str(path), '--out', str(tmp_path/'out')]
        for command, argv in (training, evaluation):
            assert command(argv) == 2
            err = capsys.readouterr().err.strip().splitlines()
            assert part in err[-1] and err[-1].startswith('mtef_'), (path, err)

@pytest.mark.parametrize('turns', [1, 8])
def test_own_sessions_through_the_same_commands(tmp_path, turns, capsys):
    file = save_sessions(shape_sessions(3, turns, seed=7), tmp_path/'mine')
    run = tmp_path/'run'
    fields = {k: v for k, v in small.items() if k not in ('turns', 'eval_sessions')}
    fields |= dict(iterations=1, sessions=str(file))
    assert main([*[f'{k}={v}' for k, v in fields.items()], '--run', str(run)]) == 0
    assert json.loads((run/'results.json').read_text())['turns'] == turns
    argv = ['--sessions', str(file), '--steps', '2', '--lora', str(run/'lora'), '--out', str(tmp_path/'out')]
    assert mtef_eval(argv) == 0
    assert len((tmp_path/'out'/'scores.csv').read_text().splitlines()) == 4*turns + 1
    assert '3 sessions' in capsys.readouterr().out

variants = [dict(algorithm='grpo', sampler='flow'), dict(algorithm='grpo', sampler='cps', window=1),
            dict(algorithm='grpo', kl_weight=.1, guard=True), dict(algorithm='nft', kl_weight=.1, updates=2)]

@pytest.mark.parametrize('kw', variants, ids=str)
def test_only_the_adapter_changes(tmp_path, kw):
    config = make_config(small | dict(iterations=2, num_steps=3) | kw)
    before = load_editor(config.editor, lora_rank=2).transformer.state_dict()
    after = train(config, tmp_path/'run', progress=False).transformer.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all('lora_' in k for k in changed)

def test_runs_of_a_folder_evaluate_the_base_editor_once(tmp_path, monkeypatch):
    "What is found of it lies under a name made of all that it depends on; uncommitted code shares nothing."
    asked = []
    evaluate = heldout.evaluate_sessions
    def noted(*args, desc, **kw):
        asked.append(desc)
        return evaluate(*args, desc=desc, **kw)
    def run(name, **kw):
        asked.clear()
        fields = dict(sessions_per_iteration=1, group=2, turns=1, iterations=0, lora_rank=2, eval_sessions=2) | kw
        return experiment(make_config(fields), tmp_path/name, progress=False)['final_turn_O_before'], list(asked)
    known = dict(heldout.environment(), commit='0'*40)
    code = [known]
    monkeypatch.setattr(heldout, 'evaluate_sessions', noted)
    monkeypatch.setattr(heldout, 'environment', lambda: code[-1])
    first, both = run('first')
    assert both == ['before', 'after']
    assert run('other_rate', lr=1e-4, seed=3) == (first, ['after'])
    files = [tmp_path/name/'before.safetensors' for name in ('first', 'other_rate')]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert run('more_steps', num_steps=4)[1] == ['before', 'after']
    folder = str(Path(mt_editflow_nb.__file__).parent/'assets'/'tiny_kontext')
    assert [run(name, editor=folder)[1] for name in ('folder', 'folder_again')] == [['before', 'after']]*2
    for i, changed in enumerate((dict(torch='0'), dict(commit=known['commit'] + '-dirty'))):
        code.append(known | changed)
        assert run(f'code_{i}')[1] == ['before', 'after']

def test_the_base_is_shared_by_content(tmp_path, monkeypatch):
    "The same session file with other pictures is other data: what was found of the base editor is not taken over."
    known = dict(heldout.environment(), commit='0'*40)
    monkeypatch.setattr(heldout, 'environment', lambda: known)
    file = save_sessions(shape_sessions(4, 1, seed=7), tmp_path/'mine')
    fields = dict(sessions_per_iteration=1, group=2, num_steps=2, lora_rank=2, iterations=0,
                  sessions=str(file), heldout=2)
    def run(name): return experiment(make_config(fields), tmp_path/name, progress=False)
    run('first')
    for picture in (tmp_path/'mine'/'images').iterdir():
        inverted = Image.fromarray(255 - np.asarray(Image.open(picture).convert('RGB')))
        inverted.save(picture)
    run('second')
    before = [load_file(tmp_path/name/'before.safetensors')['images'] for name in ('first', 'second')]
    assert not torch.equal(before[0], before[1])
    assert len(list((tmp_path/'.base').glob('*.safetensors'))) == 2

def test_held_out_of_a_file_is_said(tmp_path, capsys):
    "A file is split by picture, and what is printed says so; no session is on both sides."
    file = save_sessions(shape_sessions(6, 1, seed=7), tmp_path/'mine')
    fields = dict(sessions_per_iteration=1, group=2, num_steps=2, lora_rank=2, iterations=0, sessions=str(file))
    assert main([*(f'{k}={v}' for k, v in fields.items()), 'heldout=2', '--run', str(tmp_path/'run')]) == 0
    assert 'on 2 held-out sessions of sessions.jsonl (apart by picture)' in capsys.readouterr().out
    assert main([*(f'{k}={v}' for k, v in fields.items()), 'heldout=training', '--run', str(tmp_path/'same')]) == 0
    assert 'on 6 training sessions of sessions.jsonl (nothing is held out)' in capsys.readouterr().out
