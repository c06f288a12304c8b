"mtef_eval on EdiVal-Bench: the folder layout, a kill in the middle, and models of the real classes."
import csv, json, os, signal, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from helpers import PATIENCE, Command, ask, colours, detect, run_notebook, wait_for
from mt_editflow_nb.cli import run_eval
from mt_editflow_nb.cli import eval_edival, eval_free
from mt_editflow_nb.cli.eval import main
from mt_editflow_nb.evaluation.card import load_run
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import save_lora
from mt_editflow_nb.evaluation.edival import made_from, turn_file
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.rewards.edival_models import load_detector, load_features, tiny_edival_models
from mt_editflow_nb.evaluation.scores import load_outcomes
from mt_editflow_nb.rewards.cube import judge_mode

root = Path(__file__).resolve().parents[1]
natural = ['Add cat', '"Change the count of cat to 1"', "Add text 'LAMB' on the image"]
formatted = ['Add [cat]', '"Change the count of [cat] to [1]"', "Add text '[LAMB]' on the image"]
kinds = ['subject_add', 'count_change', 'text_change']

@pytest.fixture
def bench(tmp_path):
    folder = tmp_path/'bench'
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = [['image_index', 'turns', 'task_type', 'instructions', 'format_instructions', 'bg_consistency',
             'unchanged_objects', 'available_objects', 'all_objects']]
    for i in (0, 12):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        small.resize((512, 512)).save(folder/f'{i}_input_raw.jpg')
        for t in (1, 2, 3):
            told = [kinds[:t], natural[:t], formatted[:t]]
            rows.append([i, t, *told, True, ['dog'], ['dog', 'cat'], ['dog', 'cat']])
    with open(folder/'oai_instruction_generation_output.csv', 'w', newline='') as f: csv.writer(f).writerows(rows)
    return folder

def args(bench, out):
    return ['--sessions', 'edival', '--images', str(bench), '--steps', '2', '--batch', '1', '--out', str(out)]

def flags(models): return [x for name, folder in models.items() for x in (f'--{name}', str(folder))]

def wait_for_file(file, process):
    def is_there():
        assert process.is_running()
        return file.is_file()
    wait_for(is_there)

def test_killed_generation_goes_on_to_the_same_pictures(bench, tmp_path):
    out = tmp_path/'out'
    whole = tmp_path/'whole'
    command = args(bench, out) + ['--generate-only']
    process = Command(main, command, tmp_path/'log')
    wait_for_file(turn_file(out, '0', 2), process)
    process.send(signal.SIGKILL)
    process.end()
    done = {f.name: f.stat().st_mtime_ns for f in (out/'multipass').glob('[0-9]*')}
    assert main(command) == 0 and main(args(bench, whole) + ['--generate-only']) == 0
    names = sorted(f.name for f in (whole/'multipass').iterdir())
    assert names == sorted(f'{i}_input_raw{t}.png' for i in (0, 12) for t in ('', '_turn_1', '_turn_2', '_turn_3'))
    for name in names:
        a, b = (np.asarray(Image.open(o/'multipass'/name)) for o in (out, whole))
        assert a.shape == (512, 512, 3) and (a == b).all(), name
    assert all((out/'multipass'/n).stat().st_mtime_ns == t for n, t in done.items()), 'a picture was made twice'

def test_sigterm_says_how_to_go_on(bench, tmp_path):
    out = tmp_path/'out'
    process = Command(main, args(bench, out) + ['--generate-only'], tmp_path/'log')
    wait_for_file(turn_file(out, '0', 1), process)
    process.send(signal.SIGTERM)
    status, error = process.end()
    assert status == 130 and 'the same command goes on' in error and 'Traceback' not in error

def console_script(argv):
    "`mtef_eval` as a shell calls it, which answers signals to its very end."
    sys.argv = ['mtef_eval', *argv]
    return run_eval()

def test_two_interrupts_are_one(tmp_path):
    "Ctrl-C pressed three times: one line, no traceback."
    out = tmp_path/'out'
    process = Command(console_script, ['--n', '64', '--batch', '1', '--steps', '1', '--turns', '1', '--out',
                                       str(out)], tmp_path/'log')
    wait_for_file(out/'sessions'/'session_000000.safetensors', process)
    for pause in (.03, .03, 0):
        with suppress(ProcessLookupError): process.send(signal.SIGINT)      # it may have ended by then
        time.sleep(pause)
    status, error = process.end()
    assert status == 130 and 'Traceback' not in error
    assert error.count('mtef_eval: stopped by SIGINT; what is done is kept, and the same command goes on') == 1

interrupted = """import os, sys
class InterruptsTorch:
    def find_spec(self, name, path, target=None):
        if name == 'torch': os.kill(os.getpid(), {sent})
sys.meta_path.insert(0, InterruptsTorch())
"""

@pytest.mark.parametrize('module, name', [('cli.eval', 'mtef_eval'), ('cli.train', 'mtef_train'),
                                          ('training', 'mtef_train')])
@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_while_libraries_load_is_answered(tmp_path, module, name, sent):
    "The process sends it to itself in the middle of its imports."
    (tmp_path/'sitecustomize.py').write_text(interrupted.format(sent=int(sent)))
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)]))
    command = [sys.executable, '-m', f'mt_editflow_nb.{module}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert (done.returncode, done.stderr) == (128 + sent, f'{name}: stopped by {sent.name}\n')

def test_options_of_a_judge_and_pictures_elsewhere(tmp_path, capsys):
    "As in training: `--allow-outside`, and `--judge-options`, which are part of what results depend on."
    session, = shape_sessions(1, 1, 'heldout')
    folder = save_sessions([session], tmp_path/'data').parent
    (folder/'lists').mkdir()
    file = (folder/'sessions.jsonl').rename(folder/'lists'/'sessions.jsonl')
    file.write_text(file.read_text().replace('images/', '../images/'))
    command = ['--sessions', str(file), '--judge', 'tiny:think', '--steps', '1', '--out', str(tmp_path/'out')]
    assert main(command) == 2 and 'allow_outside' in capsys.readouterr().err
    short = ['--allow-outside', '--judge-options', '{max_tokens: 2, max_failed: 1}']
    assert main([*command, *short]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path/'out'/'results.json').read_text())
    assert results['unscored'] == 1                                # two tokens hold no score
    assert main([*command, '--allow-outside']) == 2 and 'judge_options' in capsys.readouterr().err

def test_another_mode_of_a_judge_is_another_judge(tmp_path, capsys):
    """One model asked otherwise gives other scores. A folder from before the mode was noted goes on, unless its results
    name another one."""
    out = tmp_path/'out'
    command = ['--n', '2', '--turns', '1', '--steps', '1', '--out', str(out), '--judge']
    assert main([*command, 'tiny:direct']) == 0, capsys.readouterr().err
    for other in ('tiny:logit', 'tiny:direct:coarse'):
        assert main([*command, other]) == 2
        said = capsys.readouterr().err
        assert 'direct' in said and 'choose another folder' in said
    assert json.loads((out/'results.json').read_text())['facts']['Protocol']['judge'] == 'tiny:direct'
    noted = out/'sessions'/'protocol.json'
    older = json.loads(noted.read_text())
    assert older.pop('judge_mode') == 'direct'
    noted.write_text(json.dumps(older))
    assert main([*command, 'tiny:logit']) == 2 and 'tiny:direct' in capsys.readouterr().err
    assert main([*command, 'tiny:direct']) == 0 and json.loads(noted.read_text())['judge_mode'] == 'direct'
    modes = {'verifier:binary': '', 'edival@http://a:1': '', 'a/b@http://c:8000/v1:think@4': 'think@4',
             'tiny:logit:coarse': 'logit:coarse', 'editscore:a/b': 'viescore', 'hpsv3:a/b': ''}
    assert {name: judge_mode(name) for name in modes} == modes

def test_consistency_that_nobody_scored_is_counted(tmp_path, monkeypatch, capsys):
    "IF has its answer, CC has none: as of a judge whose second question fails. Table, card and results say so."
    def half_a_judge(sessions, images):
        scores = load_judge('verifier')(sessions, images)
        scores.rewards_PGTM[:, :, 1, 1] = np.nan
        scores.object_cc_PGT[:, :, 1] = scores.background_cc_PGT[:, :, 1] = np.nan
        return scores
    monkeypatch.setattr(eval_free, 'load_judge', lambda *_, **__: half_a_judge)
    command = ['--n', '3', '--turns', '2', '--steps', '1', '--out', str(tmp_path/'out')]
    for _ in range(2):                                             # the second time from what is on disk
        assert main(command) == 0
        said = capsys.readouterr()
        results = json.loads((tmp_path/'out'/'results.json').read_text())
        assert (results['unscored'], results['unscored_by_reward']) == (0, {'if': [0, 0], 'cc': [0, 3]})
        unscored = {(row['turn'], row['metric']): row['unscored'] for row in results['table']}
        assert [unscored[2, m] for m in ('IF', 'marginal', 'CC', 'O')] == [0, 0, 3, 3] and unscored[1, 'CC'] == 0
        assert 'CC of 3 of 6 turns could not be scored' in said.out + said.err
    assert 'CC unscored' in (tmp_path/'out'/'card.md').read_text()

def test_edivals_models_without_some_weights_are_refused(tmp_path):
    "transformers says so in a log, and draws them at random."
    models = tiny_edival_models(tmp_path)
    for what, load in (('detector', load_detector), ('features', load_features)):
        file = Path(models[what])/'model.safetensors'
        tensors = load_file(file)
        first = next(iter(tensors))
        save_file({name: x for name, x in tensors.items() if name != first}, file, dict(format='pt'))
        lacking = f'{what}: .*: expected all weights, received all but [0-9]+, such as'
        with pytest.raises(InputError, match=lacking): load(models[what])

def test_a_changed_first_picture_is_generated_and_scored_again(bench, tmp_path, capsys):
    "What was made of the old picture is not taken for the new one; the other session is left alone."
    out = tmp_path/'out'
    def evaluate(): assert main(args(bench, out), tools=(detect, ask, colours)) == 0, capsys.readouterr().err
    evaluate()
    def state(id):
        return [f.read_bytes() for f in (turn_file(out, id, 1), turn_file(out, id, 3), out/'scores'/f'{id}.json')]
    before = {id: state(id) for id in ('0', '12')}
    Image.new('RGB', (512, 512), 'teal').save(bench/'0_input_raw.jpg')
    evaluate()
    assert state('12') == before['12'] and all(a != b for a, b in zip(state('0'), before['0']))
    assert made_from(turn_file(out, '0', 1))

def test_scored_by_models_of_the_real_classes(bench, tmp_path, capsys):
    out = tmp_path/'out'
    models = tiny_edival_models(tmp_path)
    command = args(bench, out) + flags(models)
    assert main(command) == 0, capsys.readouterr().err
    outcomes, ids = load_outcomes(out)
    assert ids == ['0', '12'] and outcomes.success_IT.shape == (2, 3) and not np.isnan(outcomes.background_cc_IT).any()
    rows = json.loads((out/'scores'/'0.json').read_text())['rows']
    assert [r['task_type'] for r in rows] == kinds and all(r['success'] or r['why'] for r in rows)
    assert all('quality' in r for r in rows)
    card = (out/'card.md').read_text()
    assert str(models['detector']) in card and '## Quality' in card
    scoring = json.loads((out/'results.json').read_text())['facts']['Protocol']['scoring']
    assert f'features {models["features"]} (published: facebook/dinov3-vitb16-pretrain-lvd1689m)' in scoring
    assert scoring.endswith('our wording of the questions; 2 sessions (published: 572)')
    sessions, images = load_run(out)
    assert [s.instructions for s in sessions] == [natural] * 2 and images.shape == (2, 3, 512, 512, 3)
    capsys.readouterr()
    assert main(command[:-1] + [str(models['features'])]) == 2 # other judges than those that scored the folder
    error = capsys.readouterr().err
    assert 'quality is' in error and error.count('\n') == 1

def test_quality_is_that_of_the_benchmark_unless_it_is_not_there(bench, tmp_path, capsys, monkeypatch):
    "One line where HPSv3 cannot be had; where it can, it is loaded; scores that were made without it stay."
    models = tiny_edival_models(tmp_path/'models')
    tiny = models.pop('quality')
    def run(out, *more): return main(args(bench, tmp_path/out) + flags(models) + ['--n', '1', *more])
    monkeypatch.setattr(eval_edival, 'lacks_quality', lambda: 'no network')
    assert run('without') == 0
    said, = [line for line in capsys.readouterr().err.splitlines() if 'quality' in line]
    assert 'MizzenAI/HPSv3 cannot be had here (no network)' in said and '--quality none' in said
    card = (tmp_path/'without'/'card.md').read_text()
    assert '| quality | not scored (published: MizzenAI/HPSv3) |' in card and '## Quality' not in card
    monkeypatch.setattr(eval_edival, 'lacks_quality', lambda: '')
    load = eval_edival.load_quality
    loaded = []
    monkeypatch.setattr(eval_edival, 'load_quality', lambda name: loaded.append(name) or load(tiny))
    assert run('without') == 0 and not loaded
    assert run('with') == 0 and loaded == ['MizzenAI/HPSv3']
    assert '## Quality' in (tmp_path/'with'/'card.md').read_text()
    assert run('with', '--quality', 'none') == 2 and 'quality is' in capsys.readouterr().err

def test_judged_by_an_engine_of_the_rewards_and_replayed(bench, tmp_path, capsys):
    "The shipped tiny judge answers the benchmark's questions; its answers are kept, and replayed without it."
    out = tmp_path/'out'
    models = tiny_edival_models(tmp_path) | dict(vlm='tiny:logit')
    models['quality'] = 'none'
    command = args(bench, out) + flags(models)
    assert main(command) == 0, capsys.readouterr().err
    said = {f.name: f.read_bytes() for f in (out/'scores').iterdir()}
    assert (out/'judge.sqlite').is_file() and '| vlm | tiny:logit |' in (out/'card.md').read_text()
    for f in (out/'scores').iterdir(): f.unlink()
    assert main(command + ['--offline']) == 0, capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in (out/'scores').iterdir()} == said
    for f in (out/'scores').iterdir(): f.unlink()
    capsys.readouterr()
    assert main(command + ['--offline', '--cache', str(tmp_path/'none.sqlite')]) == 2
    error = capsys.readouterr().err
    assert 'nothing to replay' in error.splitlines()[-1] and 'Traceback' not in error

def test_the_exposure_notebook_with_two_seeds(runner, tmp_path):
    "Two adapters that change nothing: every difference is 0; and what was measured is not measured again."
    for seed in (0, 1): save_lora(load_editor(lora_rank=2), tmp_path/f'seed_{seed}/lora')
    def run(**kw):
        parameters = dict(n=2, turns=2, n_back=1, back_turns=2, steps=1, out=str(tmp_path/'out')) | kw
        runner.submit(run_notebook, root/'experiments/exposure.ipynb', parameters).result()
        return pd.read_csv(tmp_path/'out/exposure.csv')
    alone = run()
    assert set(alone.which) == {'before'}
    assert {'half-life', 'exposure', 'drift', 'long', 'undo, own words'} <= set(alone.table)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'out/measured').iterdir()}
    both = run(lora=str(tmp_path/'seed_*/lora'))
    assert len(before) == 1 and all(f.stat().st_mtime_ns == t for f, t in before.items())
    of_base = both[both.which == 'before'].drop(columns='superiority').reset_index(drop=True)
    pd.testing.assert_frame_equal(of_base, alone)
    d = both[(both.which == 'difference') & both.value.notna()]
    assert len(d) > 20 and (d[['value', 'low', 'high']] == 0).all(axis=None)
    assert (tmp_path/'out/exposure.png').is_file()

real = Path(os.environ.get('EDIVAL_DATA', 'EDIVAL_DATA'))/'edival_bench_sessions.csv'

@pytest.mark.skipif(not real.is_file(), reason='EDIVAL_DATA names no folder with the benchmark')
def test_the_benchmarks_own_file(tmp_path, capsys):
    "Two of the 572 real sessions; their pictures are made up, only those two are needed."
    for i in (0, 1): Image.new('RGB', (512, 512), 'navy').save(tmp_path/f'{i}_input_raw.jpg')
    common = ['--sessions', 'edival', '--images', str(tmp_path), '--csv', str(real), '--steps', '1']
    common += ['--out', str(tmp_path/'out')]
    assert main([*common, '--n', '2', '--generate-only']) == 0
    assert len(list((tmp_path/'out/multipass').iterdir())) == 8
    assert main([*common, '--n', '3']) == 2
    assert '2_input_raw.jpg' in capsys.readouterr().err
