"Input that was once taken without a word, or refused late: one line each."
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from mt_editflow_nb.ablation.sweeps import read_sweep
from mt_editflow_nb.cli import data, eval_run, init, push, report, sweep, tools, train
from mt_editflow_nb.cli import eval as evaluate
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.training.train import prepare

def test_training(tmp_path, capsys):
    (tmp_path/'twice.yaml').write_text('lr: 1e-3\ngroup: 4\nlr: 5e-1\n')
    for argv, part in ((['--plan', 'sessions=/nothere.jsonl'], 'sessions: expected a file that is there'),
                       (['--run', '~nobodyx/run'], '~nobodyx/run: expected'),
                       (['--resume', '~nobodyx/run'], '~nobodyx/run: expected'),
                       (['--plan', str(tmp_path/'twice.yaml')], 'lr: expected a field once')):
        assert train.main(argv) == 2
        said, = capsys.readouterr().err.splitlines()
        assert part in said
    (tmp_path/'sweep.yaml').write_text('notebook: train.ipynb\nseeds: [0]\nfixed: {lr: 1e-3}\nseeds: [1]\n')
    with pytest.raises(InputError, match='seeds: expected a field once, received it twice, in lines 2 and 4'):
        read_sweep(tmp_path/'sweep.yaml')
    (tmp_path/'once.yaml').write_text('lr: 1e-3\njudge_options: {a: 1}\neval_judge_options: {a: 1}\n')
    assert train.read_recipe(tmp_path/'once.yaml')['lr'] == 1e-3

def test_a_home_in_an_option_that_no_shell_expands(tmp_path, monkeypatch, capsys):
    "`--out=~/x` means a folder at home, and none that is called ~."
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_sessions(shape_sessions(2, 1), tmp_path/'mine')
    assert data.main(['stats', 'mine/sessions.jsonl', '--table=~/numbers.csv']) == 0
    assert report.main(['~/nothing']) == 2 and f'{tmp_path}/nothing' in capsys.readouterr().err
    def plan_nothing(path, out): raise InputError(f'{path} {out}')
    monkeypatch.setattr(sweep, 'plan_sweep', plan_nothing)
    assert sweep.main(['~/a.yaml', '--out=~/b']) == 2 and f'{tmp_path}/a.yaml {tmp_path}/b' in capsys.readouterr().err
    assert (tmp_path/'numbers.csv').is_file() and not (tmp_path/'~').exists()

def test_the_verifier_and_another_size_are_found_before_the_editor_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_run, 'load_editor', lambda *args, **kw: pytest.fail('weights were read'))
    assert evaluate.main(['--size', '64', '--n', '1', '--out', str(tmp_path/'out')]) == 2
    assert "--judge: expected MODEL:MODE (the verifier reads the shape world's 48 pixels" in capsys.readouterr().err

def test_sessions_and_a_structure_that_exclude_each_other(tmp_path, capsys):
    "Structures are of plain sessions: the card of `undo` would name the dependent ones."
    command = ['--structure', 'undo', '--n', '1', '--out', str(tmp_path/'out')]
    assert evaluate.main([*command, '--sessions', 'shapeworld:dependent']) == 2
    said = capsys.readouterr().err
    assert said.startswith('mtef_eval: --structure: expected') and 'shapeworld:dependent' in said
    assert said.count('\n') == 1 and not (tmp_path/'out').exists()

def test_settings_stand_before_and_after_options(tmp_path, capsys):
    assert train.main(['iterations=3', '--plan', 'group=1']) == 2
    assert capsys.readouterr().err.startswith('mtef_train: group: expected ')
    assert train.main(['--resume', str(tmp_path), 'group=4']) == 2
    assert "no other setting (the configuration is in the run folder), received 'group=4'" in capsys.readouterr().err

def test_an_evaluation_that_never_comes_is_a_warning(capsys):
    for every, warned in ((0, 0), (1, 0), (2, 1), (5, 1)):
        prepare(make_config(dict(iterations=2, eval_every=every, eval_sessions=2)))
        assert capsys.readouterr().err.count(f'warning: eval_every={every} has no effect with iterations=2') == warned

@pytest.mark.parametrize('command, argv', [
    (init.main, ['~nobodyx/mine']), (push.main, ['~nobodyx/run', 'me/mine']), (tools.main, ['--features', '~nobodyx']),
    (evaluate.main, ['--lora', '~nobodyx/lora']), (train.main, ['--plan', 'sessions=~nobodyx/mine.jsonl'])])
def test_a_home_that_is_not_here(command, argv, capsys):
    assert command(argv) == 2
    said, = capsys.readouterr().err.splitlines()
    assert 'expected ~ or ~USER of this machine' in said and '~nobodyx' in said

def test_a_judge_that_is_not_there_is_found_before_the_editor_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_run, 'load_editor', lambda *args, **kw: pytest.fail('weights were read'))
    judge = ['--judge', 'model@http://127.0.0.1:9/v1:direct', '--judge-options', '{retries: 0}']
    assert evaluate.main([*judge, '--n', '1', '--out', str(tmp_path/'out')]) == 2
    assert 'nobody listens there' in capsys.readouterr().err.splitlines()[-1]

def test_a_notebook_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'prepare', lambda config: None)
    monkeypatch.setattr(train, 'start_notebook', lambda *args: SimpleNamespace(poll=lambda: -9, returncode=-9))
    with pytest.raises(InputError, match=r'killed by signal 9 \(memory\?\); go on with: mtef_train ... --run'):
        train.run_notebook(Path(__file__), None, tmp_path)

def test_a_page_holds_no_picture_from_outside_unless_asked(tmp_path, capsys):
    file = save_sessions(shape_sessions(1, 1), tmp_path/'a')
    (tmp_path/'b').mkdir()
    outside = tmp_path/'b'/'s.jsonl'
    page = tmp_path/'page.html'
    outside.write_text(file.read_text().replace('images/', '../a/images/'))
    assert data.main(['show', str(outside), str(page)]) == 2 and not page.exists()
    assert "inside the file's folder" in capsys.readouterr().err
    assert data.main(['show', str(outside), str(page), '--allow-outside']) == 0 and page.exists()

@pytest.mark.parametrize('error, place', [
    (MemoryError(), 'this machine'), (torch.OutOfMemoryError('CUDA out of memory. Tried 20 GiB'), 'the GPU'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), 'this machine')])
def test_an_evaluation_without_memory_is_one_line(tmp_path, monkeypatch, capsys, error, place):
    def load_nothing(*args, **kw): raise error
    monkeypatch.setattr(eval_run, 'load_editor', load_nothing)
    assert evaluate.main(['--n', '1', '--batch', '7', '--out', str(tmp_path/'out')]) == 2
    said, = capsys.readouterr().err.splitlines()
    assert f'{place} has too little memory' in said and '(now 7)' in said
