"Pictures of different ratios in one file: buckets, batches, a run from start to end, and what the commands say of it."
import json
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pytest
from PIL import Image
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.eval import main as evaluate_command
from mt_editflow_nb.data.files import InputError, content_hash, read_json, read_json_lines
from mt_editflow_nb.data.sessions import RecentPictures, Session, is_decoded, load_sessions, save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.data.sizes import bucket_sizes, fit_picture, nearest_bucket
from mt_editflow_nb.data.tables import StreamedBatches, save_table
from mt_editflow_nb.editing.rollout import resize_sessions
from mt_editflow_nb.evaluation.running import read_outcomes
from mt_editflow_nb.explore.strips import read_strips, session_strip
from mt_editflow_nb.training.runs import read_config, results_table
from mt_editflow_nb.training.source import kind_weights, session_source, trained_part
from mt_editflow_nb.training.train import experiment
from test_lengths import right_where_asked

SQUARE = (60, 60)
WIDE = (96, 64)
TALL = (48, 72)
SMALL = dict(heldout='training', sessions_per_iteration=2, group=2, iterations=3, num_steps=2, train_timesteps=1,
             lora_rank=1, judge='tiny:logit', eval_judge='tiny:logit', save_every=1)

def picture(size, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(noise).resize(size)

def mixed_sessions():
    "Four squares of one turn, three wide ones of two turns, two tall ones of two turns."
    kinds = [(SQUARE, 1)]*4 + [(WIDE, 2)]*3 + [(TALL, 2)]*2
    return [Session(f'{size[0]}x{size[1]}-{i}', picture(size, i), ['add a ring']*turns)
            for i, (size, turns) in enumerate(kinds)]

@pytest.fixture
def file(tmp_path): return save_sessions(mixed_sessions(), tmp_path/'mine', same_turns=False)

def config(file, **fields): return make_config(SMALL | dict(sessions=str(file)) | fields)

def test_an_index_knows_the_sizes_of_its_pictures(file):
    sessions = load_sessions(file, same_turns=False)
    assert sessions.sizes.tolist() == [[60, 60]]*4 + [[96, 64]]*3 + [[48, 72]]*2
    assert sessions[5:].sizes.tolist() == [[96, 64]]*2 + [[48, 72]]*2 and sessions[8].image_size == TALL

def test_kinds_are_drawn_in_proportion_to_their_sessions():
    turns = np.array([1, 1, 1, 1, 2, 2, 2, 2])
    buckets = np.array([8, 8, 8, 8, 8, 12, 12, 12])
    assert kind_weights(turns, buckets) == {(1, 8): .5, (2, 8): .125, (2, 12): .375}
    assert kind_weights(turns, buckets, {1: 1, 2: 3}) == {(1, 8): .25, (2, 8): .1875, (2, 12): .5625}
    with pytest.raises(InputError, match='turn_weights: expected numbers of turns out of 1, 2'):
        kind_weights(turns, buckets, {3: 1})

def test_a_batch_is_of_one_kind_and_an_epoch_shows_each_session_once(file):
    source = session_source(config(file, seed=3))
    assert source.kinds == pytest.approx({(1, 8): 4/9, (2, 5): 2/9, (2, 11): 3/9})
    assert source.largest_size(48, 8) == (48, 48)                          # 2304 pixels, where 56 x 40 are 2240
    assert source._replace(kinds={(1, 4): .5, (3, 9): .5}).largest_size(1024, 16) == (800, 1328)
    assert session_source(config(file, crop='square')).kinds.keys() == {(1, 8), (2, 8)}
    batches = [source.batch(i) for i in range(60)]
    for batch in batches: assert len({(len(s.instructions), nearest_bucket(*s.image.size)) for s in batch}) == 1
    seen = [s.id for batch in batches for s in batch if s.id.startswith('60x60')]
    assert all(len(set(seen[k:k + 4])) == 4 for k in range(0, len(seen) - 3, 4))
    share = np.mean([batch[0].image.size == WIDE for batch in (source.batch(i) for i in range(1000))])
    assert abs(share - 1/3) < .05

def test_the_order_is_that_of_the_seed_wherever_one_begins(file):
    "As in a run that is gone on with, and backwards; another seed has another order."
    def ids(iterations, **fields):
        source = session_source(config(file, **fields))
        return [[s.id for s in source.batch(i)] for i in iterations]
    alone = ids(range(8))
    for first in (1, 5): assert ids(range(first, 8)) == alone[first:]
    assert ids(reversed(range(8))) == alone[::-1] and ids(range(8), seed=1) != alone

def test_streamed_batches_are_of_one_kind_too(tmp_path, monkeypatch):
    monkeypatch.setattr('datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN', 0)     # seconds, after each epoch
    save_table(mixed_sessions(), tmp_path/'table.parquet')
    batches = [StreamedBatches(str(tmp_path/'table.parquet'), 2, 0)(i) for i in range(4)]
    for batch in batches: assert len({(len(s.instructions), s.image.size) for s in batch}) == 1
    mixed = StreamedBatches(str(tmp_path/'table.parquet'), 5, 0, 'square')
    assert {s.image.size for s in mixed(1)} | {s.image.size for s in mixed(0)} >= {WIDE, TALL}

def test_a_run_over_mixed_shapes_goes_on_bit_for_bit(file, tmp_path):
    "Pictures keep their ratio from training to strips, and an interrupted run ends with the same numbers."
    whole = experiment(config(file), tmp_path/'whole', right_where_asked, progress=False)
    calls = []
    def interrupted(sessions, images_PGTHWC):
        calls.append(images_PGTHWC.shape[3:5])
        if len(calls) == 5: raise KeyboardInterrupt
        return right_where_asked(sessions, images_PGTHWC)
    with pytest.raises(KeyboardInterrupt): experiment(config(file), tmp_path/'cut', interrupted, progress=False)
    assert set(calls) == {(48, 48), (40, 56), (56, 40)}
    again = experiment(config(file), tmp_path/'cut', right_where_asked, progress=False)
    assert again | dict(seconds_training=0) == whole | dict(seconds_training=0)
    rows = [read_json_lines(tmp_path/name/'metrics.jsonl') for name in ('whole', 'cut')]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    table = {(r['turn'], r['metric']): r for r in whole['table']}
    assert (table[1, 'IF']['sessions'], table[2, 'IF']['sessions']) == (9, 5)
    assert results_table(whole).splitlines()[-1].split()[-1] == '5'
    _, images = read_outcomes(tmp_path/'whole'/'before.safetensors')
    assert [x.shape[1:3] for x in images] == [(48, 48)]*4 + [(40, 56)]*3 + [(56, 40)]        # the first eight
    strips = read_strips(tmp_path/'whole')
    assert strips.sessions[5].image.size == (56, 40) and strips.images_PGTHWC[5].shape == (2, 2, 40, 56, 3)
    assert session_strip(strips, 5).count('alt="turn ') == 4 and (tmp_path/'whole'/'rollouts'/'heldout_7.png').is_file()

def test_squares_are_cut_on_request_and_in_runs_of_before(file, tmp_path):
    from mt_editflow_nb.editing.loading import load_editor
    from mt_editflow_nb.training.runs import open_run
    editor = load_editor()
    for crop, sizes in ((None, {(48, 48), (56, 40), (40, 56)}), ('square', {(48, 48)})):
        source = session_source(config(file, crop=crop)).for_editor(editor)
        assert {s.image.size for i in range(20) for s in source.batch(i)} == sizes == \
            {s.image.size for s in source.heldout}
    open_run(config(file), tmp_path/'old')
    stored = read_json(tmp_path/'old'/'config.json')
    stored['config'].pop('crop')                                        # written before there was a choice
    (tmp_path/'old'/'config.json').write_text(__import__('json').dumps(stored | dict(identity={})))
    assert read_config(tmp_path/'old').crop == 'square'

def test_the_verifier_reads_squares_alone(file):
    world = [replace(s, image=s.image.resize((96, 48))) for s in shape_sessions(4, 1)]
    wide = save_sessions(world, file.parent.parent/'wide')
    exact = dict(judge='verifier', eval_judge='verifier')
    with pytest.raises(InputError, match="crop: expected 'square' with the verifier"):
        session_source(config(wide, **exact))
    assert session_source(config(wide, crop='square', **exact)).kinds == {(1, 8): 1.}
    with pytest.raises(InputError, match='crop: expected sessions=FILE'):
        session_source(make_config(dict(crop='square')))

def test_what_cannot_be_read_is_left_out_and_listed(file, tmp_path):
    "Found when the file is read, among held-out pictures, and when a batch is made: the next of its kind stands in."
    folder = file.parent
    rows = [r for r in file.read_text().splitlines()]
    file.write_text('\n'.join([*rows, rows[0].replace('60x60-0', 'gone').replace('images/', 'images/not'), 'no json']))
    fields = dict(on_bad='skip', heldout=2)
    with pytest.raises(InputError, match='expected JSON, received'): session_source(config(file, heldout=2))
    source = session_source(config(file, **fields))
    assert len(source.skipped) == 2 and source.warnings[-1].startswith('sessions: 2 left out, the first: ')
    kept = {i: [s.id for s in source.batch(i)] for i in range(12)}
    broken = next(s for s in source.of_file if s.id in kept[0])
    whole = broken.image_path.read_bytes()
    broken.image_path.write_bytes(whole[:-60])                              # its head is good
    now = {i: [s.id for s in source.batch(i)] for i in range(12)}
    assert broken.id not in {id for ids in now.values() for id in ids} and len(source.skipped) == 3
    others = [i for i, ids in kept.items() if broken.id not in ids]
    assert others and all(now[i] == kept[i] for i in others)                 # nothing else moves
    assert f'session {broken.id}: ' in [*source.skipped.values()][-1]
    broken.image_path.write_bytes(whole)
    assert folder.is_dir()

def test_a_run_lists_what_it_has_left_out(file, tmp_path):
    file.write_text(file.read_text() + 'no json\n')
    experiment(config(file, on_bad='skip', iterations=1), tmp_path/'run', right_where_asked, progress=False)
    assert (tmp_path/'run'/'skipped.txt').read_text().startswith(f'{file}:10: the line: expected JSON, received')

def test_the_command_leaves_out_what_cannot_be_used_and_lists_it(file, tmp_path, capsys):
    "A line that is no JSON, and a picture with a good head and no end; three of nine sessions are asked for with --n."
    sessions = load_sessions(file, same_turns=False)
    broken = sessions[1].image_path
    broken.write_bytes(broken.read_bytes()[:-60])
    file.write_text(file.read_text() + 'no json\n')
    out = tmp_path/'out'
    argv = ['--sessions', str(file), '--judge', 'tiny:logit', '--steps', '1', '--n', '3', '--out', str(out)]
    assert evaluate_command(argv) == 2 and capsys.readouterr().err.count('\n') == 1
    assert evaluate_command([*argv, '--on-bad', 'skip']) == 0
    said = capsys.readouterr()
    assert f'2 sessions left out, the first: {file}:10: the line: expected JSON, received' in said.err
    listed = (out/'skipped.txt').read_text().splitlines()
    assert len(listed) == 2 and broken.name in listed[1]
    assert '2 sessions of the file are left out as unusable' in said.out
    assert 'skipped.txt' in (out/'card.md').read_text()
    assert [json.loads(row)['id'] for row in (out/'sessions.jsonl').read_text().splitlines()] == \
        ['60x60-0', '60x60-2', '60x60-3']
    assert evaluate_command(['--on-bad', 'skip', '--out', str(out)]) == 2          # the shape world has no bad ones

def test_an_evaluation_holds_few_pictures(tmp_path, monkeypatch):
    "Pictures of a file are opened and resized when they are asked for, and are the ones that were made at once before."
    world = [Session(str(i), picture((24, 16), i), ['add a ring']) for i in range(100)]
    sessions = load_sessions(save_sessions(world, tmp_path), same_turns=False)
    editor = SimpleNamespace(size=48, token_pixels=8)
    resized = resize_sessions(editor, sessions)
    assert not any(map(is_decoded, resized)) and {s.image_size for s in resized} == {(56, 40)}
    at_once = [replace(s, image=fit_picture(s.image, 56, 40)) for s in world]
    recent = RecentPictures()
    monkeypatch.setattr('mt_editflow_nb.data.sessions._recent', recent)
    assert content_hash(resized) == content_hash(at_once)
    assert [p.size for p in recent.pictures.values()] == [(56, 40)]*100     # not those of the files beside them
    again = resize_sessions(editor, resized)
    assert all(a is b for a, b in zip(again, resized))                  # nothing is opened twice over
    assert resized[7].image is resized[7].image
    in_memory = resize_sessions(editor, world)
    assert all(map(is_decoded, in_memory)) and content_hash(in_memory) == content_hash(at_once)

def test_kinds_with_few_sessions_are_named(file):
    "Four squares of one turn, three wide ones of two turns, two tall ones of two turns, in batches of three."
    said = session_source(config(file, sessions_per_iteration=3)).warnings
    text = ('sessions: 1 of 3 kinds have fewer than the 3 sessions of an iteration, which then repeats some '
            '(the first: 2 of 2 turns, pictures of about 832:1248); together they are 22% of the iterations')
    assert said == (text,)
    assert session_source(config(file)).warnings == ()

@pytest.mark.parametrize('heldout', [None, 2, .4, 'training'])
def test_what_a_run_has_trained_on_is_found_again(file, heldout):
    "For the card: held-out sessions of the same file are no training data."
    asked = config(file, heldout=heldout)
    found = trained_part(asked.model_dump())
    trained = session_source(asked).of_file
    assert [s.id for s in found] == [s.id for s in trained]
    assert len(found) == {None: 7, 2: 7, .4: 5, 'training': 9}[heldout]
    assert trained_part(asked.model_dump() | dict(streaming=True)) is None

def test_the_command_evaluates_mixed_lengths_and_shapes(file, tmp_path, capsys):
    out = tmp_path/'out'
    argv = ['--sessions', str(file), '--judge', 'tiny:logit', '--steps', '1', '--out', str(out)]
    assert evaluate_command(argv) == 0
    results = read_json(out/'results.json')
    table = {(r['turn'], r['metric']): r['sessions'] for r in results['table']}
    assert (table[1, 'marginal'], table[2, 'marginal'], results['turns'], results['unscored']) == (9, 5, 2, 0)
    card = (out/'card.md').read_text()
    assert '9 sessions of 1 to 2 turns' in card and 'in their own ratio' in card and '(no type) | 14 |' in card
    sizes = {Image.open(f).size for f in (out/'multipass').glob('*.png')}
    assert sizes == {(48, 48), (56, 40), (40, 56)} <= set(bucket_sizes(48, 8))
    again = tmp_path/'again'
    assert evaluate_command([*argv[:-1], str(again), '--crop', 'square', '--against', str(out)]) == 0
    assert {Image.open(f).size for f in (again/'multipass').glob('*.png')} == {(48, 48)}
    assert 'pictures' in (again/'card.md').read_text() and capsys.readouterr().err.count('could not be drawn') == 0
