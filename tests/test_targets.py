"Supervised training on the targets of a public set: from its files to a trained adapter."
import io, textwrap
from dataclasses import replace
import datasets, numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.distill import distill
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.algorithm.supervised import supervise
from mt_editflow_nb.data.files import InputError, read_json_lines
from mt_editflow_nb.data.importers import import_set
from mt_editflow_nb.data.sessions import load_sessions, save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions, teacher_images
from mt_editflow_nb.data.tables import open_sessions, save_table
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.training.checkpoints import last_checkpoint
from mt_editflow_nb.training.source import session_source
from mt_editflow_nb.training.train import train

@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    "No hub, a cache of one's own, and no pause of five seconds at the end of a stream."
    monkeypatch.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')

def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'PNG')
    return dict(bytes=file.getvalue(), path=None)

def as_magicbrush(sessions, path):
    "Scenes of the shape world in MagicBrush's layout: a row a turn, pictures embedded."
    rows = []
    for s in sessions:
        before = [s.image, *map(Image.fromarray, teacher_images(s))]
        for t, text in enumerate(s.instructions, 1):
            pictures = dict(source_img=png(np.asarray(before[t - 1])), mask_img=None)
            rows.append(dict(img_id=s.id, turn_index=t, instruction=text, **pictures,
                             target_img=png(np.asarray(before[t]))))
    pq.write_table(pa.Table.from_pylist(rows[::-1]), path)

def test_from_parquet_to_an_adapter_with_the_losses_of_the_shape_world(tmp_path):
    world = shape_sessions(2, 2, seed=3)
    as_magicbrush(world, tmp_path/'train.parquet')
    file = import_set('magicbrush', tmp_path/'train.parquet', tmp_path/'mine/s.jsonl').path
    config = make_config(dict(algorithm='sft', sessions=str(file), heldout='training', sessions_per_iteration=2,
                              group=2, iterations=2, num_steps=2, lora_rank=1, exposure_turns=1))
    train(config, tmp_path/'run', progress=False)
    rows = read_json_lines(tmp_path/'run'/'metrics.jsonl')
    found = [row['loss'] for row in rows]
    policy = Policy(config, load_editor(lora_rank=1, seed=config.seed))
    losses = []
    for i in range(2): losses.append(supervise(config, policy, world, load_judge('verifier'), i).metrics['loss'])
    assert found == pytest.approx(losses, rel=1e-4) and found[0] != found[1]
    assert [(row['iteration'], row['rows']) for row in rows] == [(0, 8), (1, 8)] and min(found) > 0
    assert (tmp_path/'run'/'lora'/'pytorch_lora_weights.safetensors').is_file()
    assert last_checkpoint(tmp_path/'run').name == '000002' and list((tmp_path/'run'/'rollouts').glob('*.png'))

def test_distillation_on_targets_of_a_file_is_that_on_the_shape_world(tmp_path):
    world = shape_sessions(2, 2, seed=3)
    as_magicbrush(world, tmp_path/'train.parquet')
    file = import_set('magicbrush', tmp_path/'train.parquet', tmp_path/'mine/s.jsonl').path
    taught = load_sessions(file, targets=True)
    config = make_config(dict(algorithm='distill', group=2, iterations=2, num_steps=1, lora_rank=1))
    def learn(sessions):
        return distill(config, Policy(config, load_editor(lora_rank=1)), sessions, load_judge('verifier'), 0)
    from_file = learn(taught)
    from_world = learn(world)
    assert from_file.metrics['loss'] == pytest.approx(from_world.metrics['loss'], rel=1e-4)
    assert from_file.metrics['passes'] == dict(sampled=8, trained=4, reference=4) and from_file.scores.names == ()
    assert from_world.metrics['success'] == from_world.scores.success_PGT.mean((0, 1)).tolist()

@pytest.mark.parametrize('algorithm', ['sft', 'distill'])
def test_sessions_without_targets_are_refused_before_anything_is_loaded(tmp_path, algorithm):
    file = save_sessions(shape_sessions(3, 2), tmp_path)
    config = make_config(dict(algorithm=algorithm, sessions=str(file)))
    with pytest.raises(InputError, match='sessions.jsonl:1: `targets`: expected the right results'):
        train(config, tmp_path/'run', progress=False)
    assert not (tmp_path/'run').exists()

def test_targets_of_a_large_table_are_asked_for_without_decoding_it(tmp_path):
    "Above some thousand rows pictures are decoded when they are needed; that a row has none is known at once."
    world = shape_sessions(3, 2)
    taught = replace(world[1], targets=[Image.fromarray(x) for x in teacher_images(world[1])])
    save_table(world, tmp_path/'none.parquet')
    save_table([world[0], taught, world[2]], tmp_path/'one.parquet')
    for name in ('none', 'one'):
        with pytest.raises(InputError, match=f'{name}.parquet: row 0: `targets`: expected the right results'):
            open_sessions(tmp_path/f'{name}.parquet', targets=True, decode=False)
    with pytest.warns(UserWarning, match='2 sessions left out'):
        kept = open_sessions(tmp_path/'one.parquet', targets=True, decode=False, on_bad='skip')
    assert [s.id for s in kept] == [taught.id]

def test_sessions_in_parquet_are_batches_of_the_same_sessions(tmp_path):
    world = shape_sessions(5, 2, seed=3)
    file = save_sessions(world, tmp_path/'lines')
    save_table(world, tmp_path/'table'/'a.parquet')
    def source(path): return session_source(make_config(dict(sessions=str(path), sessions_per_iteration=2, seed=1)))
    lines = source(file)
    table = source(tmp_path/'table')
    assert [s.id for s in lines.heldout] == [s.id for s in table.heldout]         # by the pixels of the pictures
    def content(batch): return [(s.id, s.image.tobytes()) for s in batch]
    for i in range(4): assert content(lines.batch(i)) == content(table.batch(i))
    with pytest.raises(InputError, match='allow_outside'):
        session_source(make_config(dict(sessions=str(tmp_path/'table'), allow_outside=True)))
    with pytest.raises(InputError, match='hf:no/such: expected a data set, received one that cannot be read'):
        source('hf:no/such')

def test_a_streamed_table_has_an_order_of_its_own_and_another_set_held_out(tmp_path):
    world = [*shape_sessions(5, 2, seed=3), *shape_sessions(4, 1, seed=4)]
    save_table([replace(s, id=str(i)) for i, s in enumerate(world)], tmp_path/'table'/'a.parquet')
    file = save_sessions(shape_sessions(3, 2, seed=7), tmp_path/'heldout')
    def source(**kw):
        fields = dict(sessions=str(tmp_path/'table'), heldout=str(file), sessions_per_iteration=2, seed=1)
        return session_source(make_config(fields | dict(streaming=True) | kw))
    found = source()
    ids = [[s.id for s in found.batch(i)] for i in range(9)]
    assert {len({len(world[int(id)].instructions) for id in batch}) for batch in ids} == {1}    # one length a batch
    assert sorted(sum(ids, [])) == sorted([*map(str, range(9))]*2)                              # two epochs
    assert [[s.id for s in source().batch(i)] for i in (5, 2)] == [ids[5], ids[2]]
    assert found.heldout_name == 'sessions of sessions.jsonl' and len(found.heldout) == 3
    for kw, part in ((dict(heldout=None), 'heldout: expected a file'), (dict(turn_weights={2: 1}), 'turn_weights'),
                     (dict(sessions=str(file)), 'streaming: expected parquet'), (dict(algorithm='sft'), 'targets')):
        with pytest.raises(InputError, match=part): source(**kw)

def test_a_streamed_table_leaves_out_what_cannot_be_read(tmp_path):
    "A picture without its end and a row without instructions: counted, listed once, and never in a batch."
    world = [replace(s, id=str(i)) for i, s in enumerate(shape_sessions(6, 1, seed=3))]
    save_table(world, tmp_path/'good.parquet')
    rows = datasets.load_dataset('parquet', data_files=str(tmp_path/'good.parquet'), split='train').to_list()
    rows[2]['image']['bytes'] = rows[2]['image']['bytes'][:-40]
    rows[4]['instructions'] = []
    (tmp_path/'table').mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path/'table'/'a.parquet')
    file = save_sessions(shape_sessions(3, 1, seed=7), tmp_path/'heldout')
    file.write_text(file.read_text() + 'no json\n')
    fields = dict(sessions=str(tmp_path/'table'), heldout=str(file), sessions_per_iteration=2, seed=1, streaming=True)
    with pytest.raises(InputError, match='expected JSON, received'): session_source(make_config(fields))
    source = session_source(make_config(fields | dict(on_bad='skip')))
    ids = [s.id for i in range(6) for s in source.batch(i)]
    assert sorted(ids) == sorted(['0', '1', '3', '5']*3)                              # three epochs
    told = [*source.skipped.values()]
    assert len(told) == 3 and sum("session '2'" in text for text in told) == 1
    assert sum("session '4'" in text and 'instructions' in text for text in told) == 1
    again = session_source(make_config(fields | dict(on_bad='skip')))
    assert [s.id for s in again.batch(4)] == ids[8:10]                                # a resumed run
    stopping = session_source(make_config(fields | dict(heldout=str(save_sessions(world[:1], tmp_path/'whole')))))
    with pytest.raises(InputError, match='row . of epoch 0'): [stopping.batch(i) for i in range(3)]

def test_a_folder_as_the_hub_has_them_is_read_offline(tmp_path, monkeypatch):
    "hf:FOLDER and hf:FOLDER:SPLIT: a card that names the files of each split, shards of parquet, no connection."
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path/'cache')
    world = [replace(s, id=str(i)) for i, s in enumerate(shape_sessions(7, 2, seed=3))]
    hub = tmp_path/'owner'/'edits'
    parts = {'train-00000-of-00002': world[:3], 'train-00001-of-00002': world[3:5], 'test-00000-of-00001': world[5:]}
    for name, part in parts.items(): save_table(part, hub/'data'/f'{name}.parquet')
    (hub/'README.md').write_text(textwrap.dedent("""\
        ---
        configs:
        - config_name: default
          data_files:
          - {split: train, path: data/train-*}
          - {split: test, path: data/test-*}
        ---
        # Edits
        """))
    train, test = (open_sessions(f'hf:{hub}{split}') for split in ('', ':test'))
    assert [s.id for s in train] == ['0', '1', '2', '3', '4'] and [s.id for s in test] == ['5', '6']
    assert [s.image.tobytes() for s in train] == [s.image.tobytes() for s in world[:5]]
    assert [s.instructions for s in test] == [s.instructions for s in world[5:]]
    fields = dict(sessions=f'hf:{hub}', heldout=f'hf:{hub}:test', sessions_per_iteration=1, seed=1)
    for streaming in (False, True):
        source = session_source(make_config(fields | dict(streaming=streaming)))
        assert sorted(s.id for i in range(5) for s in source.batch(i)) == ['0', '1', '2', '3', '4']
        assert [s.id for s in source.heldout] == ['5', '6']
    for name in (f'hf:{hub}:valid', 'hf:owner/none'):
        with pytest.raises(InputError, match='expected a data set, received one that cannot be read') as e:
            open_sessions(name)
        assert '\n' not in str(e.value)
