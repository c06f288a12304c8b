"Faults that people ran into, each tried where it enters: the right value is in the test."
import json, shutil, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, psutil, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from helpers import PATIENCE, wait_for
import mt_editflow_nb
from mt_editflow_nb.ablation import notebook
from mt_editflow_nb.ablation.notebook import config_content
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.train import stop_notebook
from mt_editflow_nb.data import files
from mt_editflow_nb.data.files import InputError, add_missing_lines, append_json_line, read_json_lines
from mt_editflow_nb.data.sessions import save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.data.tables import save_table
from mt_editflow_nb.editing import loading
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import (
    adapter_config, check_magnitude, find_adapter, lora_parameters, match_adapter, read_adapter, save_lora)
from mt_editflow_nb.evaluation.running import read_outcomes, write_outcomes
from mt_editflow_nb.evaluation.scores import Outcomes
from mt_editflow_nb.training import best_adapters
from mt_editflow_nb.training.checkpoints import last_checkpoint, save_checkpoint, write_checkpoint
from mt_editflow_nb.rewards.agreement import load_labels
from mt_editflow_nb.rewards.cube import Judge
from mt_editflow_nb.rewards.engines import JudgeFailed, Reply, load_vlm
from mt_editflow_nb.rewards.judges import load_mode
from mt_editflow_nb.rewards.answers import read_json_score, read_json_scores
from mt_editflow_nb.training.budget import remembered_batch
from mt_editflow_nb.training.runs import cut_log, open_run, read_config
from mt_editflow_nb.training.source import session_source
from mt_editflow_nb.training.best_adapters import keep_best
from mt_editflow_nb.training.iteration_log import say_untrained
from mt_editflow_nb.training.train import experiment, opened_run

def refused(f, *args, **kw):
    "The one line with which something is refused."
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

# --- settings that teach nothing, or destroy what was learnt

@pytest.mark.parametrize('field,value', [('weight_decay', 1e9), ('min_std', .5), ('beta', 1e30), ('lora_alpha', 1e30),
                                         ('guidance', 1e30), ('kl_weight', 1e30), ('noise_level', 1e4)])
def test_numbers_out_of_all_proportion(field, value):
    "In float32 they overflow, or (`min_std`, rewards lie in [0, 1]) leave no advantage at all."
    grpo = dict(algorithm='grpo') if field == 'noise_level' else {}
    assert refused(make_config, grpo | {field: value}).startswith(f'{field}: expected a number less than')

@pytest.mark.parametrize('values', [dict(turn_weights={3: 1}), dict(crop='square'), dict(on_bad='skip'),
                                    dict(allow_outside=True), dict(streaming=True), dict(eval_sessions=10**9),
                                    dict(compile='inductr')], ids=str)
def test_settings_that_the_shape_world_has_no_use_for(values):
    "Also in a plan and in a sweep, which make no sessions."
    assert refused(make_config, values).startswith(f'{next(iter(values))}: expected ')

def test_a_run_that_trained_nothing_says_so(tmp_path, capsys):
    for rows, said in (([0, 0], 1), ([0, 4], 0), ([], 0)):
        lines = [json.dumps(dict(iteration=i, rows=n)) + '\n' for i, n in enumerate(rows)]
        (tmp_path/'metrics.jsonl').write_text(''.join(lines))
        say_untrained(tmp_path)
        assert capsys.readouterr().err.count('nothing was trained') == said

def test_near_misses_of_words():
    assert "did you mean 'think'?" in refused(make_config, dict(judge='tiny:thnk'))
    assert "sessions: expected 'shapeworld'" in refused(session_source, make_config(dict(sessions='shapwrld')))
    assert "did you mean 'shapeworld'?" in refused(session_source, make_config(dict(sessions='shapwrld')))

# --- a folder instead of what lies in it

def test_a_folder_of_sessions_says_which_file(tmp_path):
    file = save_sessions(shape_sessions(4, 1), tmp_path)
    assert f'name the file, {file}' in refused(session_source, make_config(dict(sessions=str(tmp_path))))

def test_a_run_folder_is_no_adapter(tmp_path):
    for name in ('checkpoints/000003/lora', 'checkpoints/000012/lora', 'rollouts'): (tmp_path/name).mkdir(parents=True)
    assert f'such as {tmp_path}/checkpoints/000012/lora, received a run folder' in refused(find_adapter, tmp_path)
    (tmp_path/'lora').mkdir()
    assert refused(find_adapter, tmp_path, 'init_lora') == (
        f'init_lora: {tmp_path}: expected the folder of an adapter, such as {tmp_path}/lora, received a run folder')

# --- what a job stands for is its content

def test_a_sweeps_job_depends_on_all_that_it_reads(tmp_path):
    "Pictures outside the file's folder, right results, a parquet file, the adapter that training starts from."
    sessions = shape_sessions(3, 1)
    file = save_sessions(sessions, tmp_path/'a')
    inside = json.loads(file.read_text().splitlines()[0])
    (tmp_path/'b').mkdir()
    outside = tmp_path/'b'/'mine.jsonl'
    outside.write_text(json.dumps(inside | dict(image=f"../a/{inside['image']}")) + '\n')
    fields = dict(sessions=str(outside), heldout='training')
    assert 'sessions' in config_content(make_config(fields | dict(allow_outside=True)))
    table = tmp_path/'mine.parquet'
    save_table(sessions, table)
    before = config_content(make_config(dict(sessions=str(table))))
    save_table(shape_sessions(3, 1, seed=5), table)
    assert config_content(make_config(dict(sessions=str(table))))['sessions'] != before['sessions']
    editor = load_editor(lora_rank=2)
    found = []
    for n in range(2):
        with torch.no_grad(): lora_parameters(editor)[0].add_(n)
        save_lora(editor, tmp_path/'adapter')
        found.append(config_content(make_config(dict(init_lora=str(tmp_path/'adapter'), lora_rank=2)))['init_lora'])
    assert found[0] != found[1]

def test_a_sweep_plans_what_training_takes(tmp_path, monkeypatch):
    "Bad sessions that are left out, and a set that is streamed: neither refused by a plan nor opened as a whole."
    file = save_sessions(shape_sessions(5, 1), tmp_path/'a')
    good = config_content(make_config(dict(sessions=str(file))))['sessions']
    bad = [dict(id='x', image='gone.png', instructions=['x']), dict(id='y', image=3, targets=7), [1]]
    with open(file, 'a') as f: f.write(''.join(json.dumps(row) + '\n' for row in bad) + '{"no\n')
    fields = dict(sessions=str(file), on_bad='skip', heldout='training')
    assert config_content(make_config(fields))['sessions'] == good == session_source(make_config(fields)).train_hash
    assert 'expected' in refused(config_content, make_config(fields | dict(on_bad='stop')))
    opened = []
    real = notebook.open_sessions
    monkeypatch.setattr(notebook, 'open_sessions', lambda path, **kw: opened.append(path) or real(path, **kw))
    held = save_sessions(shape_sessions(2, 1, 'heldout'), tmp_path/'b')
    table = tmp_path/'mine.parquet'
    save_table(shape_sessions(3, 1), table)
    config = make_config(dict(sessions=str(table), streaming=True, heldout=str(held), sessions_per_iteration=1))
    source = session_source(config)
    assert {'sessions': source.train_hash, 'heldout': source.heldout_hash}.items() <= config_content(config).items()
    assert opened == [str(held)]

# --- adapters as other tools save them, and as nobody should

def test_adapters_of_all_kinds(tmp_path):
    "What can be read changes the editor as the reference does; all else is one line with the file."
    editor = load_editor(lora_rank=2)
    with torch.no_grad():
        for p in lora_parameters(editor): p.copy_(torch.linspace(-.1, .1, p.numel()).reshape(p.shape))
    reference = load_file(save_lora(editor, tmp_path/'good'))
    inner = {name.removeprefix('transformer.'): x for name, x in reference.items()}
    first, second = list(inner)[:2]
    tiny = load_editor()
    one_nan = inner[first].clone()
    one_nan[0, 3] = torch.nan
    def read(tensors, **facts):
        metadata = {'lora_adapter_metadata': json.dumps({f'transformer.{k}': v for k, v in facts.items()})}
        file = tmp_path/'adapter.safetensors'
        save_file({k: x.contiguous() for k, x in tensors.items()}, file, metadata if facts else None)
        tensors, facts, _ = read_adapter(file)
        matched = match_adapter(tiny, tensors, file)
        check_magnitude(matched, adapter_config(matched, facts), file)
        return matched
    for prefix in ('', 'transformer.', 'base_model.model.', 'diffusion_model.', 'transformer.base_model.model.'):
        assert read({prefix + k: x for k, x in inner.items()}).keys() == inner.keys()
    eight_bits = read({k: x.to(torch.float8_e4m3fn) for k, x in inner.items()})
    assert all(torch.allclose(eight_bits[k], x, atol=.01) for k, x in inner.items())
    wrong = {
        'every tensor under one name': inner | {f'transformer.{k}': x + 1 for k, x in inner.items()},
        '0 tensors that fit': {k: (x[:0] if 'lora_A' in k else x[:, :0]) for k, x in inner.items()},
        'expected finite numbers, received 1 NaN': inner | {first: one_nan},
        'expected finite numbers': {k: x.double()*1e300 for k, x in inner.items()},
        'a change of weights below 1e+06': {k: x*1e20 for k, x in inner.items()},
        'and 1 that do not': inner | {'transformer_blocks.0.norm1.linear.lora_magnitude_vector': torch.ones(4)}}
    for words, tensors in wrong.items():
        said = refused(read, tensors)
        assert words in said and 'adapter.safetensors' in said
    layer = 'lora_transformer_' + first.rpartition('.lora_')[0].replace('.', '_')
    kohya = {f'{layer}.lora_down.weight': inner[first], f'{layer}.lora_up.weight': inner[second]}
    assert len(read(kohya | {f'{layer}.alpha': torch.tensor(2.)})) == 2
    assert 'that do not' in refused(read, kohya | {f'{layer}.alpha': torch.ones(2)})
    for name, value in (('lora_alpha', float('nan')), ('lora_alpha', 0), ('lora_alpha', -4), ('lora_alpha', 1e30),
                        ('use_rslora', 'yes'), ('alpha_pattern', {'(': 1}), ('alpha_pattern', {'x': float('inf')})):
        assert 'adapter.safetensors: ' in refused(read, inner, **(dict(lora_alpha=2) | {name: value}))

def test_an_adapter_of_another_rank_is_found_before_weights_are_read(tmp_path, monkeypatch):
    editor = load_editor(lora_rank=4)
    with torch.no_grad():
        for p in lora_parameters(editor): p.fill_(.01)
    save_lora(editor, tmp_path)
    monkeypatch.setattr(loading, 'load_pipeline', lambda *args: pytest.fail('weights were read'))
    assert refused(load_editor, lora_rank=2, init_lora=tmp_path).endswith('an adapter of rank 2, received [4]')
    assert "did you mean 'inductor'" in refused(load_editor, compile='inductr')

def test_weights_that_a_checkpoint_lacks_are_not_drawn_at_random(tmp_path):
    "One tensor fewer in a text encoder, in an autoencoder, in a judge: each is named."
    assets = Path(mt_editflow_nb.__file__).parent/'assets'
    def lacking(asset, part):
        shutil.copytree(assets/asset, tmp_path/asset, dirs_exist_ok=True)
        file, = (tmp_path/asset/part).glob('*.safetensors')
        tensors = load_file(file)
        tensors.pop(gone := sorted(name for name in tensors if 'k_proj' in name or 'norm1.bias' in name)[0])
        save_file(tensors, file, dict(format='pt'))
        return str(tmp_path/asset), gone.rpartition('layers.')[2]
    for part in ('text_encoder', 'vae'):
        name, gone = lacking('tiny_kontext', part)
        said = refused(load_editor, name)
        assert said.startswith(f'editor: {name}: expected all weights') and said.endswith(gone)
    name, gone = lacking('tiny_judge', '.')
    assert refused(load_vlm, name, 'cpu').endswith(gone)

# --- state that is not what it was

def test_a_flipped_bit_in_an_evaluation_is_seen(tmp_path):
    "Every eighth byte of the file: what is read is what was written, or nothing."
    outcomes = Outcomes(*np.float32([[[1, 0]], [[.9, .8]], [[.5, .4]]]))
    file = tmp_path/'before.safetensors'
    images = np.arange(96, dtype=np.uint8).reshape(1, 2, 4, 4, 3)
    write_outcomes(file, outcomes, images)
    written = file.read_bytes()
    assert np.array_equal(read_outcomes(file)[1], images)
    def read_with_a_flip(at):
        file.write_bytes(written[:at] + bytes([written[at] ^ 4]) + written[at + 1:])
        return read_outcomes(file)
    read = [read_with_a_flip(at) for at in range(0, len(written), 8)]
    unharmed = [found for found in read if found]
    assert len(unharmed) < len(read)/2
    for found in unharmed: assert np.array_equal(found[1], images) and np.array_equal(found[0], outcomes)
    file.unlink()
    assert read_outcomes(file) is None

# --- processes and signals

def test_a_kernel_that_misses_the_first_signal_is_asked_again(tmp_path):
    "A stand-in for papermill, whose child listens after a second; and one without a child, which ends at once."
    child = ('import pathlib, signal, sys, time; signal.signal(2, signal.SIG_IGN); pathlib.Path(sys.argv[1]).touch(); '
             'time.sleep(1); signal.signal(2, signal.SIG_DFL); time.sleep(60)')
    parent = ('import subprocess, sys; '
              f'sys.exit(-subprocess.run([sys.executable, "-c", {child!r}, sys.argv[1]]).returncode)')
    job = subprocess.Popen([sys.executable, '-c', parent, str(tmp_path/'ignores')], start_new_session=True)
    wait_for((tmp_path/'ignores').is_file)
    family = psutil.Process(job.pid).children()
    stop_notebook(job, signal.SIGINT)
    assert job.returncode == signal.SIGINT                           # which has ended the child: nobody was killed
    assert len(family) == 1 and not psutil.wait_procs(family, PATIENCE)[1]
    alone = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    stop_notebook(alone, signal.SIGINT)
    assert alone.returncode == -signal.SIGTERM

@pytest.mark.parametrize('changed', [dict(iteration='1'), dict(iteration=1.), dict(parameters=2), dict(parameters='1'),
                                     dict(iteration=True)], ids=str)
def test_numbers_of_another_kind_in_a_checkpoint(tmp_path, changed):
    "The one before is gone on from."
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    for iteration in range(2): save_checkpoint(tmp_path, iteration, [parameter], [], optimizer)
    file = tmp_path/'checkpoints'/'000001'/'state.json'
    said = []
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    assert last_checkpoint(tmp_path, said.append).name == '000000'
    assert 'state.json' in said[0] and 'going on from 000000' in said[0]

def test_logs_and_notes_of_another_kind(tmp_path):
    "What a log or a note of a run holds is taken only if it is what was written there."
    good = '{"iteration": 0, "a": 1}\n'
    (tmp_path/'metrics.jsonl').write_text('{"iteration": 1e400}\n{"iteration": null}\n{"iteration": "1"}\n[0]\n' + good)
    assert cut_log(tmp_path/'metrics.jsonl', 2) == [1] and (tmp_path/'metrics.jsonl').read_text() == good
    for held in ('{"batch": true}', '{"batch": 2.5}', '{"batch": "4"}', '{"batch": [', '[4]'):
        (tmp_path/'batch.json').write_text(held)
        assert remembered_batch(tmp_path/'batch.json') is None
    whole = dict(config=make_config({}).model_dump(), environment={}, identity={}, started_in='/')
    for changed in (dict(environment=[1]), dict(resumed='x'), dict(identity='x'), dict(started_in=3), dict(config=[1])):
        (tmp_path/'config.json').write_text(json.dumps(whole | changed))
        assert 'config.json: expected the config.json of a run' in refused(read_config, tmp_path)

def test_a_finished_run_mends_what_can_be_made_again(tmp_path, capsys):
    "A picture that was cut off, results that are none, half a line inside a log: the numbers stay."
    config = make_config(dict(iterations=0, eval_sessions=1, num_steps=1, turns=1, lora_rank=2))
    run = tmp_path/'run'
    results = experiment(config, run, progress=False)
    picture = run/'rollouts'/'heldout_0.png'
    drawn = picture.read_bytes()
    picture.write_bytes(drawn[:60])
    (run/'results.json').write_text('[1]')
    (run/'timings.jsonl').write_text('{"iterat\n{}\n')
    assert experiment(config, run, progress=False) == results
    assert picture.read_bytes() == drawn and json.loads((run/'results.json').read_text()) == results

def test_an_edited_configuration_is_noticed(tmp_path):
    "Half a run with one seed and half with another is neither; what the checkpoint does not know is not compared."
    run = tmp_path/'run'
    config = make_config({})
    file = open_run(config, run)/'config.json'
    write_checkpoint(run, 1, {'param.0': torch.ones(2)}, config=config)
    def go_on():
        with opened_run(read_config(run), run, {}): return True
    assert go_on()
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | dict(config=written['config'] | dict(seed=3, iterations=999))))
    said = refused(go_on)
    assert 'checkpoints/000001' in said and 'seed is 0 there and 3 here' in said and '999' in said
    write_checkpoint(run, 1, {'param.0': torch.ones(2)})             # as older versions wrote it
    assert go_on()

def test_an_evaluation_without_a_score_is_not_the_best(tmp_path):
    config = make_config(dict(eval_every=1, keep_best=1, iterations=3))
    editor = load_editor(lora_rank=2)
    rows = [dict(iteration=n, heldout_O=score) for n, score in ((1, float('nan')), (2, None), (3, 5.))]
    for n in (1, 3):
        keep_best(config, tmp_path, rows[:n], SimpleNamespace(iteration=n, policy=SimpleNamespace(editor=editor)))
    assert [p.name for p in (tmp_path/'best').iterdir()] == ['000003']

def test_the_best_adapter_is_kept_before_its_score_is_written(tmp_path, monkeypatch):
    "A disk that is full just then costs no best adapter: the evaluation is not done yet."
    config = make_config(dict(iterations=3, eval_sessions=2, turns=1, sessions_per_iteration=1, group=2, num_steps=2,
                              lora_rank=2, batch=2, eval_every=2, keep_best=1, save_every=10))
    full = [True]
    def save(editor, folder):
        if folder.parent.name == 'best' and full.pop(): raise OSError(28, 'No space left on device', str(folder))
        return save_lora(editor, folder)
    monkeypatch.setattr(best_adapters, 'save_lora', save)
    with pytest.raises((InputError, OSError), match='No space left'): experiment(config, tmp_path/'run', progress=False)
    full.append(False)
    experiment(config, tmp_path/'run', progress=False)
    rows = read_json_lines(tmp_path/'run'/'heldout.jsonl')
    assert [row['iteration'] for row in rows] == [2] and (tmp_path/'run'/'best'/'000002').is_dir()

def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def none(*args): raise OSError(37, 'No locks available')
    monkeypatch.setattr(files.fcntl, 'flock', none)
    for n in range(2): append_json_line(tmp_path/'log.jsonl', dict(n=n))
    assert read_json_lines(tmp_path/'log.jsonl') == [dict(n=0), dict(n=1)]

def test_ends_of_lines_that_are_none_stay_in_a_text(tmp_path):
    "U+2028 and its like: in an instruction of a label, and in the name of a file that is listed."
    picture = Image.new('RGB', (8, 8))
    for name in ('a.png', 'b.png'): picture.save(tmp_path/name)
    words = 'make it red\u2028and small\x85'
    row = dict(before='a.png', after='b.png', instructions=[words], score=1)
    (tmp_path/'labels.jsonl').write_text(json.dumps(row, ensure_ascii=False) + '\n', encoding='utf-8')
    assert load_labels(tmp_path/'labels.jsonl').items[0].instructions == (words,)
    for _ in range(2): add_missing_lines(tmp_path/'list.txt', [words, 'other'])
    assert (tmp_path/'list.txt').read_text(encoding='utf-8') == f'{words}\nother\n'

def test_one_lost_answer_does_not_end_an_evaluation_of_small_batches():
    "Two scores of a session make a batch of their own; whether too many are lost is not seen in two."
    sessions = shape_sessions(1, 1)
    pictures = np.asarray(sessions[0].image)[None, None, None]
    class Engine:
        model = identity = 'stub'
        def __call__(self, asks): return [Reply('7' if n else 'I cannot say') for n in range(len(asks))]
    scores = Judge(Engine(), load_mode('direct'))(sessions, pictures)
    assert scores.failed == 1 and scores.rewards_PGTM.isnan().sum() == 1
    class Silent(Engine):
        def __call__(self, asks): return [Reply('I cannot say') for _ in asks]
    with pytest.raises(JudgeFailed, match='of 2 scores, received none for 2'):
        Judge(Silent(), load_mode('direct'))(sessions, pictures)
    many = shape_sessions(10, 1)
    class Half(Engine):
        def __call__(self, asks):                          # those that failed are asked again
            return [Reply('I cannot say' if 'How well was the instruction' in a.text else '7') for a in asks]
    with pytest.raises(JudgeFailed, match='of 20 scores, received none for 10'):
        Judge(Half(), load_mode('direct'))(many, np.repeat(pictures, 10, 0))

# --- answers in the forms that models give

@pytest.mark.parametrize('answer,score', [
    ('{"reasoning": "he said "hi" there", "score": 7}', 7), ('{"Score": 7}', 7), ('{score: 7}', 7),
    ('{\u201creasoning\u201d: \u201cx\u201d, \u201cscore\u201d: 7}', 7), ('{"result": {"score": "7/9"}}', 7),
    ("{'reasoning': 'it's fine', 'score': 7.5}", 7.5), ('{"reasoning": "x", "score": 7', None),
    ('{"reasoning": "perhaps score: 3}", "rating": 7}', None), ('{"scores": 7}', None), ('{"score": -7}', None),
    ('{"score": null}', None), ('{"a "b"": 1, "score": 3} or {"a "b"": 1, "score": 7}', None)])
def test_answers_that_are_not_quite_json(answer, score):
    "Read where there is one way to read them, out of 9."
    if score is None:
        with pytest.raises(ValueError): read_json_score(answer, 9)
    else: assert read_json_score(answer, 9) == pytest.approx(score/9)

def test_two_scores_that_are_not_quite_json():
    said = '{"reasoning": "a "red" square", "success": 9, "preservation": "3"}'
    assert read_json_scores(said, ('success', 'preservation'), 9) == pytest.approx(dict(success=1, preservation=1/3))
    with pytest.raises(ValueError): read_json_scores(said[:-12], ('success', 'preservation'), 9)
