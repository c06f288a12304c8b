"Lines of a sessions file that cannot be used: each gives one line that names the file, the line and the field."
import importlib, json, shutil, struct, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.data.files import InputError, open_image
from mt_editflow_nb.data.sessions import load_edival, load_sessions, save_sessions, Session
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.rewards.agreement import load_labels

good = dict(id='b', image='ok.png', instructions=['x', 'y'])

@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    "A good picture and those that cannot be used, of which the largest takes half a second to write."
    folder = tmp_path_factory.mktemp('pictures')
    grey = np.random.default_rng(0).normal(128, 50, (32, 32)).clip(0, 255)
    Image.fromarray(grey.astype(np.uint8)).save(folder/'ok.png')
    data = (folder/'ok.png').read_bytes()
    (folder/'cut.png').write_bytes(data[:len(data)//2])
    (folder/'text.png').write_text('not an image')
    (folder/'flipped.png').write_bytes(data[:60] + bytes(255 - x for x in data[60:]))
    (folder/'empty.png').write_bytes(b'')
    (folder/'folder.png').mkdir()
    Image.new('RGB', (1, 1)).save(folder/'dot.png')
    Image.new('1', (12_000, 12_000)).save(folder/'bomb.png')
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder/'nan.tiff')
    return folder

@pytest.fixture
def folder(pictures, tmp_path):
    "A folder with a copy of the sessions."
    return shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)

def deep_png(grey, transparent):
    "An 8 x 8 picture in 16 bits of grey; its first line has the value that is transparent."
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    lines = b''.join(b'\0' + struct.pack('>8H', *[transparent if y == 0 else grey]*8) for y in range(8))
    head = struct.pack('>2I5B', 8, 8, 16, 0, 0, 0, 0)
    hidden = struct.pack('>H', transparent)
    parts = ((b'IHDR', head), (b'tRNS', hidden), (b'IDAT', zlib.compress(lines)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)

def line(**changes): return json.dumps({k: v for k, v in (good | changes).items() if v != 'DROP'})

bad_lines = {
    '{"id": "b", ': ['the line: expected JSON, received'],
    '[' * 100_000: ['the line: expected JSON, received'],
    '["b", "ok.png", ["x", "y"]]': ['JSON object'],
    'null': ['JSON object'],
    line(id='DROP'): ['`id`: expected a value, received none'],
    line(image='DROP'): ['`image`: expected a value, received none'],
    line(id=None): ['`id`', 'None'],
    line(id=True): ['`id`', 'True'],
    line(id=1.5): ['`id`', '1.5'],
    line(id=['b']): ['`id`'],
    line(id=''): ['`id`'],
    line(image=None): ['`image`', 'None'],
    line(image=3): ['`image`', '3'],
    line(image='no.png'): ['no.png: expected an image file, received none'],
    line(image='cut.png'): ['cut.png', 'expected an image, received one that cannot be read'],
    line(image='text.png'): ['text.png', 'expected an image, received one that cannot be read'],
    line(image='flipped.png'): ['flipped.png', 'expected an image, received one that cannot be read'],
    line(image='empty.png'): ['empty.png', 'expected an image, received one that cannot be read'],
    line(image='folder.png'): ['folder.png', 'expected an image, received one that cannot be read'],
    line(image='a\0b.png'): ['`image`', 'path'],
    line(instructions='x'): ['`instructions`', "'x'"],
    line(instructions={'1': 'x'}): ['`instructions`'],
    line(instructions=['x', 2]): ['`instructions`'],
    line(instructions=['x', None]): ['`instructions`'],
    line(instructions=['x', '']): ['`instructions`'],
    line(instructions=[]): ['`instructions`', '0 turns'],
    line(instructions=['x'] * 17): ['`instructions`', '17 turns'],
    line(instructions=['x', 'go on ' * 10_000]): ['`instructions` of turn 2', '4000', '60000'],
    line(instructions=['x' * 4000] * 3): ['`instructions`', '10000', 'in all 3 turns', '12000'],
    line(instructions=['x', 'a\0b']): ['`instructions`'],
    line(id='a\0b'): ['`id`', 'one line'],
    line(id='a\nb'): ['`id`', 'one line'],
    line(instructions=['x', 'turn it red \ud83d']): ['`instructions`', 'Unicode'],
    line(id='half \ud83d'): ['`id`', 'Unicode'],
    line(task_types=['x', '\ud83d']): ['`task_types`', 'Unicode'],
    line(meta={'a': [{'b': '\ud83d'}]}): ['`meta`', 'Unicode'],
    line(image='\ud83d.png'): ['`image`', 'path'],
    line(image='dot.png'): ['dot.png', '1 x 1'],
    line(image='bomb.png'): ['bomb.png', '12000 x 12000'],
    line(image='nan.tiff'): ['nan.tiff', 'from 0 to 1', 'nan'],
    line(image='../outside.png'): ['`image`', 'allow_outside', '../outside.png'],
    line(image='/etc/hostname'): ['`image`', 'allow_outside', '/etc/hostname'],
    line(image='images/../../outside.png'): ['`image`', 'allow_outside'],
    line(instructions=['x']): ['`instructions`', '2 turns', 'sessions.jsonl:1', 'received 1'],
    line(task_types='color'): ['`task_types`'],
    line(task_types=['color']): ['`task_types`', 'expected 2, one for each turn'],
    line(task_types=None): ['`task_types`'],
    line(meta=[]): ['`meta`'],
    line(meta=None): ['`meta`'],
    line(seed=1): ['`seed`: expected one of id, image', 'received an unknown name'],
    line(id='a'): ['`id`', "'a'", 'sessions.jsonl:1'],
}

@pytest.mark.parametrize('bad', bad_lines, ids=lambda x: x[:60])
def test_bad_line(folder, bad):
    path = folder/'sessions.jsonl'
    path.write_text(f'{line(id="a")}\n\n{bad}\n', encoding='utf-8')
    with pytest.raises(InputError) as e: load_sessions(path)
    message = str(e.value)
    assert message.startswith(f'{path}:3: ') and '\n' not in message and len(message) < 400 + 2*len(str(folder))
    assert all(part in message for part in bad_lines[bad]), message

@pytest.mark.parametrize('content,part', [(None, 'expected a file that can be read, received none'),
                                          (b'', 'at least one session'), (b'\n \n', 'at least one session'),
                                          (b'{"id": "\xff"}', 'UTF-8')], ids=['missing', 'empty', 'blank', 'latin-1'])
@pytest.mark.parametrize('load', [load_sessions, load_edival])
def test_bad_file(tmp_path, load, content, part):
    if load is load_edival and content in (b'', b'\n \n'): part = '`image_index`' # no header
    path = tmp_path/'sessions'
    if content is not None: path.write_bytes(content)
    with pytest.raises(InputError, match=part) as e: load(path)
    assert str(e.value).startswith(str(path)) and '\n' not in str(e.value)

def test_folder_instead_of_file(tmp_path):
    with pytest.raises(InputError, match='expected a file that can be read, received one that cannot'):
        load_sessions(tmp_path)

def test_csv_without_rows(tmp_path):
    path = tmp_path/'edival.csv'
    path.write_text('image_index,turns,task_type,instructions,format_instructions,bg_consistency,unchanged_objects,'
                    'available_objects,all_objects\n')
    with pytest.raises(InputError, match='expected at least one session, received none'): load_edival(path)

def test_files_as_other_programs_write_them(folder):
    "Byte order mark, Windows line ends, blank lines, no line end at the end, an integer as id."
    path = folder/'sessions.jsonl'
    path.write_bytes('\r\n'.join(['\ufeff' + line(id=1), '', line(id='Größe')]).encode())
    assert [s.id for s in load_sessions(path)] == ['1', 'Größe']
    path.write_text(f'{line(id=1)}\n{line(id="1")}')
    with pytest.raises(InputError, match="'1'"): load_sessions(path)

def test_photos_are_turned_upright_and_rgb(folder):
    "A phone stores the sensor's picture and a note to turn it (EXIF orientation 6: a quarter clockwise)."
    im = Image.new('RGB', (40, 20), 'black')
    im.paste('white', (0, 0, 20, 20)) # left half white: upright, that is the top half
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(folder/'phone.jpg', exif=exif, quality=95)
    (folder/'s.jsonl').write_text(f'{line(image="phone.jpg")}\n{line(id="grey")}')
    photo, grey = [s.image for s in load_sessions(folder/'s.jsonl')]
    assert photo.size == (20, 40) and photo.getpixel((10, 5))[0] > 250 > 5 > photo.getpixel((10, 35))[0]
    assert grey.mode == 'RGB'

def test_transparency_and_depth(folder):
    "Nothing that a file hides under transparent pixels is shown, and white stays white in 16 bits."
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(folder/'hidden.png')
    Image.fromarray(np.full((8, 8), 65535//2, np.uint16)).save(folder/'deep.png')
    (folder/'s.jsonl').write_text(f'{line(image="hidden.png")}\n{line(id="grey", image="deep.png")}')
    hidden, deep = [s.image for s in load_sessions(folder/'s.jsonl')]
    assert hidden.getpixel((0, 0)) == (255, 255, 255) and deep.getpixel((0, 0)) == (127, 127, 127)
    (folder/'both.png').write_bytes(deep_png(grey=0x4000, transparent=0x1234))      # 64 of 255, where it is not
    both = np.asarray(open_image(folder/'both.png'))
    assert both.shape == (8, 8, 3) and (both[1:] == 64).all() and (both[0] == 255).all()

def test_pictures_outside_the_folder_only_when_asked(folder):
    (folder/'sub').mkdir()
    file = folder/'sub'/'s.jsonl'
    for image in ('../ok.png', str(folder/'ok.png')):
        file.write_text(line(image=image))
        with pytest.raises(InputError, match='allow_outside'): load_sessions(file)
        assert load_sessions(file, allow_outside=True)[0].image.size == (32, 32)
    (folder/'sub'/'link.png').symlink_to(folder/'ok.png')      # as hub caches have them: whoever made the link decides
    for image in ('link.png', str(folder/'sub'/'link.png'), '../sub/link.png'):
        file.write_text(line(image=image))
        assert load_sessions(file)[0].image.size == (32, 32)

def test_a_path_from_home(folder, monkeypatch):
    "What no shell has expanded, as in `sessions=~/sessions.jsonl`."
    (folder/'sessions.jsonl').write_text(line())
    monkeypatch.setenv('HOME', str(folder))
    assert [s.id for s in load_sessions('~/sessions.jsonl')] == ['b']
    config = make_config(dict(sessions='~/sessions.jsonl', heldout='~/h.jsonl', init_lora='~/lora'))
    assert config.sessions == f'{folder}/sessions.jsonl' and config.init_lora == f'{folder}/lora'

@pytest.mark.parametrize('label, part', [(dict(before='../ok.png'), 'inside'), (dict(after='/etc/hostname'), 'inside'),
                                         (dict(score=float('nan')), 'from 0 to 1'), (None, 'an object')])
def test_bad_labels(folder, label, part):
    good = dict(before='ok.png', after='ok.png', instructions=['x'], score=.5)
    lines = [json.dumps(good), '['*100_000 if label is None else json.dumps(good | label)]
    (folder/'labels.jsonl').write_text('\n'.join(lines))
    with pytest.raises(InputError, match=part) as e: load_labels(folder/'labels.jsonl')
    assert f'{folder}/labels.jsonl:2' in str(e.value) and '\n' not in str(e.value)

def test_pictures_are_decoded_when_they_are_asked_for(folder):
    "Of large sets only the heads are read; what is wrong further in is found when the picture is needed."
    (folder/'s.jsonl').write_text(f'{line(image="cut.png")}\n{line(id="2")}')
    cut, good = load_sessions(folder/'s.jsonl', decode=False)
    assert good.image.size == (32, 32) and cut.instructions == ['x', 'y']
    with pytest.raises(InputError, match='cut.png: expected an image, received one that cannot be read'): cut.image
    Image.new('RGB', (16, 16), 'red').save(folder/'ok.png')
    assert good.image.size == (16, 16)                        # what is in the file now, not what was decoded before

def test_bad_sessions_can_be_left_out(folder):
    rows = [line(id='1'), line(id='2', image='no.png'), '{"half', line(id='4', instructions=['x'] * 3)]
    (folder/'s.jsonl').write_text('\n'.join(rows))
    with pytest.warns(UserWarning, match='2 sessions left out'):
        sessions = load_sessions(folder/'s.jsonl', on_bad='skip', same_turns=False)
    assert [s.id for s in sessions] == ['1', '4'] and sessions.turns.tolist() == [2, 3]
    assert sorted(m.removeprefix(f'{folder}/')[:10] for m in sessions.skipped) == ['s.jsonl:2:', 's.jsonl:3:']
    (folder/'s.jsonl').write_text('{}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(InputError, match='at least one'): load_sessions(folder/'s.jsonl', on_bad='skip')

def test_what_cannot_be_saved(tmp_path):
    image = Image.new('RGB', (4, 4))
    for sessions, part in [([], 'at least one'), ([Session('a', None, ['x'])], '`image`'),
                           ([Session('a', image, ['x'])] * 2, "'a'"),
                           ([Session('a', image, ['x']), Session('b', image, ['x', 'y'])], '1 turn as at'),
                           ([Session('a', image, ['x'], meta={'pixels': b''})], '`meta`')]:
        with pytest.raises(InputError, match=part): save_sessions(sessions, tmp_path)
    assert not (tmp_path/'sessions.jsonl').exists()

def test_interrupted_save_keeps_the_old_set(tmp_path, monkeypatch):
    old = [Session('a', Image.new('RGB', (4, 4), 'red'), ['x'])]
    path = save_sessions(old, tmp_path)
    import mt_editflow_nb.data.sessions as module
    write = module.atomic_write
    def stop_at_list(path, data):
        if path.name == 'sessions.jsonl': raise KeyboardInterrupt
        return write(path, data)
    monkeypatch.setattr(module, 'atomic_write', stop_at_list)
    new = [Session('a', Image.new('RGB', (4, 4), 'blue'), ['x'])]
    with pytest.raises(KeyboardInterrupt): save_sessions(new, tmp_path)
    assert load_sessions(path) == old

def test_a_run_reads_pictures_outside_only_when_asked(tmp_path):
    from mt_editflow_nb.algorithm.config import make_config
    from mt_editflow_nb.data.shapeworld import shape_sessions
    from mt_editflow_nb.training.source import session_source
    file = save_sessions(shape_sessions(5, 2), tmp_path/'pictures')
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    for row in rows: row['image'] = f'../pictures/{row["image"]}'
    elsewhere = tmp_path/'elsewhere'/'sessions.jsonl'
    elsewhere.parent.mkdir()
    elsewhere.write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(InputError, match='sessions.jsonl:1: `image`.*allow_outside'):
        session_source(make_config(dict(sessions=str(elsewhere))))
    source = session_source(make_config(dict(sessions=str(elsewhere), allow_outside=True)))
    assert len(source.batch(0)) == 8 and len(source.heldout) == 1
    with pytest.raises(InputError, match='allow_outside'): session_source(make_config(dict(allow_outside=True)))

def test_keys_of_files_are_kept_beside_the_index(tmp_path, monkeypatch):
    "The next process reads no file; one that has changed is read again; a record that is none is written anew."
    selecting = importlib.import_module('mt_editflow_nb.data.selecting')
    read = []
    compute = selecting._key_of_file.__wrapped__
    def noted(path, *stamp):
        read.append(Path(path).name)
        return compute(path, *stamp)
    monkeypatch.setattr(selecting, '_key_of_file', noted)
    world = shape_sessions(5, 1, seed=2)
    file = save_sessions(world, tmp_path/'set')
    def keys():
        read.clear()
        sessions = load_sessions(file)
        assert sessions[1:3].folder == file.parent
        return selecting.picture_keys(sessions, many=True), len(read)
    first, n = keys()
    assert n == 5 and len(set(first)) == 5 and keys() == (first, 0)
    changed = load_sessions(file)[3].image_path
    changed.write_bytes(changed.read_bytes() + b'x')
    now, n = keys()
    assert n == 1 and [a == b for a, b in zip(first, now)] == [True, True, True, False, True]
    (tmp_path/'set').rename(tmp_path/'moved')
    file = tmp_path/'moved'/file.name
    assert keys() == (now, 0)
    (tmp_path/'moved'/selecting.RECORD_FILE).write_bytes(b'this is no database, and long enough to be taken for one'*20)
    assert keys() == (now, 5) and keys() == (now, 0)
    (tmp_path/'moved'/selecting.RECORD_FILE).unlink()
    read.clear()
    with ThreadPoolExecutor(4) as pool:                            # processes that begin at once: one of them reads
        found = [*pool.map(lambda _: selecting.picture_keys(load_sessions(file), many=True), range(4))]
    assert found == [now]*4 and len(read) == 5
