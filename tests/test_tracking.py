"What trackers are sent is what the run folder holds, also after a stop; without them nothing changes."
import json, shutil, sys, types
import pytest, torch
from test_training import lines, small
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.train import main
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.training import progress
from mt_editflow_nb.training.progress import clocked
from mt_editflow_nb.training.tracking import scalars, tracked_name
from mt_editflow_nb.training.train import experiment

fields = small | dict(iterations=3, save_every=1, eval_every=2, turns=1)

@pytest.fixture(scope='module')
def untracked(tmp_path_factory):
    run = tmp_path_factory.mktemp('untracked')/'run'
    experiment(make_config(fields), run, progress=False)
    return run

def events(run):
    "What TensorBoard would show: name -> {step: number}, and name -> steps of pictures."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(run/'tensorboard'), size_guidance=dict(scalars=0, images=0)).Reload()
    tags = found.Tags()
    numbers = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags['scalars']}
    return numbers, {tag: [e.step for e in found.Images(tag)] for tag in tags['images']}

def logged(run, name):
    return [json.loads(line) for line in (run/name).read_text().splitlines()]

def test_tensorboard_shows_what_the_run_folder_holds(tmp_path, untracked):
    "Numbers, pictures, settings; the same after a stop, of which nothing is seen twice."
    pytest.importorskip('tensorboard')
    config = make_config(fields | dict(track=['tensorboard']))
    run = tmp_path/'run'
    experiment(config, run, progress=False)
    assert lines(run) == lines(untracked) and not (untracked/'tensorboard').exists()
    for state in ('whole', 'gone on with'):
        numbers, pictures = events(run)
        for row in logged(run, 'metrics.jsonl'):
            shown = {name: dict(numbers[name])[row['iteration']] for name in scalars(row)}
            assert shown == pytest.approx(scalars(row))
        assert [step for step, _ in numbers['loss']] == [0, 1, 2], state
        assert [step for step, _ in numbers['heldout_O']] == [1]          # after two iterations, 0 and 1
        assert {f'time/{name}' for name in logged(run, 'timings.jsonl')[0] if name != 'iteration'} <= set(numbers)
        assert {'before_O/1', 'after_O/1', 'lr', 'passes/trained'} <= set(numbers)
        assert pictures['rollouts'] == [0, 1, 2] and 'heldout_0' in pictures
        shutil.rmtree(run/'checkpoints'/'000003')                           # as if killed in the last iteration
        (run/'after.safetensors').unlink(missing_ok=True)
        experiment(config, run, progress=False)
    written = next((run/'tensorboard').glob('*/hparams.yml')).read_text()
    assert 'lora_rank: 2' in written

def test_the_split_of_the_seconds(monkeypatch):
    "Sampling lasts until the last pass without gradients has ended; training begins with the first one that has them."
    now = [100.]
    def velocity(*args): now[0] += 2
    monkeypatch.setattr(progress, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
    editor = types.SimpleNamespace(velocity=velocity)
    with clocked(editor) as clock:
        with torch.no_grad():
            for _ in range(3):
                now[0] += .5                                                  # texts and pictures are encoded
                editor.velocity(*'1234')
        now[0] += 1.25                                                        # the judge
        editor.velocity(*'1234')
        with torch.no_grad(): editor.velocity(*'1234')                        # the old policy is compared
        now[0] += .75                                                         # the optimiser
    assert clock.seconds() == dict(seconds=13.5, rollout=7.5, judge=1.25, training=4.75)
    assert editor.velocity is velocity

def test_the_timings_of_a_run(untracked):
    "Evaluations stand beside the phases, at the iteration after them."
    rows = logged(untracked, 'timings.jsonl')
    for row in rows:
        assert all(row[name] > 0 for name in ('seconds', 'rollout', 'judge', 'training', 'edits_per_second'))
        assert row['peak_GB'] > .05
    *others, third = [row['evaluation'] for row in rows]
    assert third > max(others)                                                 # before the third, `eval_every` is 2
    assert all(row['lr'] > 0 and row['passes']['sampled'] == 1*2*1*2 for row in logged(untracked, 'metrics.jsonl'))

def test_trackio_is_told_the_same_name_again(tmp_path, monkeypatch):
    "A module with trackio's functions notes what accelerate's tracker hands to it."
    accelerate = pytest.importorskip('accelerate.tracking')
    if 'trackio' not in accelerate.LOGGER_TYPE_TO_CLASS: pytest.skip('this accelerate does not know trackio')
    started = []
    sent = []
    told = []
    fake = types.ModuleType('trackio')
    def log(values, step): sent.append((step, values))
    def init(**options):
        started.append(options)
        return types.SimpleNamespace(log=log, finish=lambda: None)
    fake.init = init
    fake.Image = lambda pixels: ('picture', pixels.shape[-1])
    fake.config = types.SimpleNamespace(update=lambda values, **_: told.append(values))
    monkeypatch.setitem(sys.modules, 'trackio', fake)
    monkeypatch.setattr(accelerate, 'get_available_trackers', lambda: ['trackio'])
    config = make_config(fields | dict(track=['trackio'], eval_every=0))
    run = tmp_path/'run'
    experiment(config, run, progress=False)
    shutil.rmtree(run/'checkpoints'/'000003')
    (run/'after.safetensors').unlink()
    experiment(config, run, progress=False)
    assert started == [dict(project='mt_editflow_nb', name=tracked_name(run), resume='allow')]*2
    assert len(told) == 1 and told[0]['lora_rank'] == 2 and told[0]['track'] == '["trackio"]'
    assert [step for step, values in sent if 'loss' in values] == [0, 1, 2, 2]
    assert (0, dict(rollouts=('picture', 3))) in sent

def test_wrong_trackers_are_one_line(tmp_path, capsys, monkeypatch):
    "A misspelt name, and one that is not installed, are found before there is a run folder."
    with pytest.raises(InputError, match="track: expected one of .*received 'tensorbord' .did you mean 'tensorboard'"):
        make_config(dict(track=['tensorbord']))
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])
    assert main(['track=[wandb]', '--run', str(tmp_path/'run')]) == 2
    said = 'mtef_train: track: expected wandb to be installed (pip install wandb), received'
    assert capsys.readouterr().err == said + ' none\n'
    assert not (tmp_path/'run').exists()

def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, capsys, monkeypatch, untracked):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
    class Failing(GeneralTracker):
        name = 'failing'
        requires_logging_directory = False
        tracker = None
        def __init__(self, project): super().__init__()
        def log(self, values, step): raise ConnectionError('the line\nis cut')
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, 'failing', Failing)
    experiment(make_config(fields | dict(track=['failing'])), tmp_path/'run', progress=False)
    assert lines(tmp_path/'run') == lines(untracked)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('track:')]
    assert said == ['track: failing has failed and is left out from here on: the line is cut']
