"Made-up miniatures in the layout of each public set, with its traps: what becomes of them, and what is refused."
import io, json, tarfile
import pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.importers import IMPORTERS, RowWriter, archive_parts, import_set, looks_like, unpack_parts
from mt_editflow_nb.data.sessions import load_sessions

COLORS = dict(white=(255, 255, 255), red=(255, 0, 0), lime=(0, 255, 0), blue=(0, 0, 255))

def draw(path, color, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(path)
    return path

def png(color):
    file = io.BytesIO()
    Image.new('RGB', (24, 16), color).save(file, 'PNG')
    return dict(bytes=file.getvalue(), path=None)

def colors(pictures): return [x.getpixel((0, 0)) for x in pictures]

def refused(*args, parts, **kw):
    with pytest.raises(InputError) as e: import_set(*args, **kw)
    assert '\n' not in str(e.value) and all(p in str(e.value) for p in parts), str(e.value)

# --- Pico-Banana

def pico_row(folder, stem, turns, shown=('red', 'lime', 'blue')):
    ids = [f'edit_turn{t}' for t in range(1, turns)] + ['final_image']
    files = []
    for t, id in enumerate(ids):
        url = f'images/multi-turn/{stem}_turn{t + 1}.png'
        draw(folder/url, shown[t])
        files.append(dict(id=id, url=url))
    draw(folder/'openimages'/f'{stem}_o.png', 'white')
    files.append(dict(id='original_input_image', url=f'https://farm8.example.com/29/{stem}_o.png'))
    return dict(files=files, metadata_edit_turn_prompts=[f'make it {c}' for c in shown[:turns]])

def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return path

def test_pico_banana_takes_the_final_image_as_the_last_turn(tmp_path):
    rows = [pico_row(tmp_path, '101_attemptB', 3), pico_row(tmp_path, '7_attemptA', 2)]
    write_lines(tmp_path/'multi-turn.jsonl', rows)
    made = import_set('pico-banana', tmp_path, tmp_path/'s.jsonl')
    long, short = load_sessions(made.path, same_turns=False, targets=True)
    assert (long.id, short.id) == ('101_attemptB', '7_attemptA')
    assert long.instructions == ['make it red', 'make it lime', 'make it blue']
    assert colors([long.image, *long.target_images()]) == list(COLORS.values())
    assert colors(short.target_images()) == [COLORS['red'], COLORS['lime']]
    assert long.meta['original_url'].endswith('101_attemptB_o.png') and 'CC BY-NC-ND' in long.meta['licence']

def test_pico_banana_takes_first_pictures_from_the_packed_files_of_open_images(tmp_path):
    "Their names are others; the set's own script writes which one it is."
    draw(tmp_path/'t.png', 'red')
    draw(tmp_path/'train_0'/'00ab.jpg', 'white')
    files = [dict(id='final_image', url='t.png'), dict(id='original_input_image', url='https://x.com/7_o.jpg')]
    row = dict(files=files, metadata_edit_turn_prompts=['a'], local_input_image='/there/openimages/train_0/00ab.jpg')
    (tmp_path/'multi-turn.jsonl').write_text(json.dumps(row))
    session, = load_sessions(import_set('pico-banana', tmp_path, tmp_path/'s.jsonl').path)
    assert session.image_path.name == '00ab.jpg' and session.meta['original_url'] == 'https://x.com/7_o.jpg'

def test_pico_banana_refuses_what_does_not_fit(tmp_path):
    good = pico_row(tmp_path, '1_a', 3)
    def only(row): return write_lines(tmp_path/'multi-turn.jsonl', [row])
    def without(id): return good | dict(files=[f for f in good['files'] if f['id'] != id])
    out = tmp_path/'s.jsonl'
    for row, parts in ((without('final_image'), [':1', '`files`', 'final_image']),
                       (without('edit_turn2'), [':1', '`files`', 'edit_turn2']),
                       (without('original_input_image'), [':1', 'original_input_image']),
                       (good | dict(files=[]), [':1', '`files`']),
                       (good | dict(metadata_edit_turn_prompts='x'), [':1', 'metadata_edit_turn_prompts', 'list'])):
        refused('pico-banana', only(row), out, parts=parts)
    twice = write_lines(tmp_path/'multi-turn.jsonl', [good, good])
    refused('pico-banana', twice, out, parts=[':2', '`id`', "'1_a'", ':1 has it'])
    (tmp_path/'openimages'/'1_a_o.png').unlink()
    refused('pico-banana', only(good), out, parts=[':1', '1_a_o.png', 'received none'])

# --- MagicBrush

def magicbrush(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path

def turn(id, index, before, after, **kw):
    return dict(img_id=id, turn_index=index, source_img=png(before), mask_img=png('white'),
                instruction=f'make it {after}', target_img=png(after)) | kw

def test_magicbrush_groups_rows_by_picture_and_orders_them_by_turn(tmp_path):
    rows = [turn('242679', 2, 'red', 'lime'), turn('9', 1, 'blue', 'red'), turn('242679', 1, 'white', 'red')]
    magicbrush(tmp_path/'data/train-00000-of-00002.parquet', rows)
    magicbrush(tmp_path/'data/train-00001-of-00002.parquet', [turn('242679', 3, 'lime', 'blue')])
    made = import_set('magicbrush', tmp_path/'data', tmp_path/'mine/s.jsonl')
    one, three = load_sessions(made.path, same_turns=False, targets=True)
    assert (one.id, three.id) == ('9', '242679')
    assert three.instructions == ['make it red', 'make it lime', 'make it blue']
    assert colors([three.image, *three.target_images()]) == list(COLORS.values())
    assert len(three.meta['masks']) == 3 and (tmp_path/'mine'/three.meta['masks'][0]).is_file()
    assert made.outside == 0

def test_magicbrush_refuses_what_does_not_fit(tmp_path):
    file = tmp_path/'t.parquet'
    out = tmp_path/'s.jsonl'
    good = turn('7', 1, 'white', 'red')
    for rows, parts in (([good, turn('7', 3, 'red', 'lime')], ['row 1', '`turn_index`', '[1, 3]']),
                        ([good, good], ['`turn_index`', '[1, 1]']),
                        ([good | dict(target_img=None)], ['row 0', '`target_img`', 'none']),
                        ([good | dict(instruction=None)], ['`instruction`', 'None']),
                        ([{k: v for k, v in good.items() if k != 'turn_index'}], ['turn_index', 'received img_id']),
                        ([good | dict(source_img=dict(bytes=b'no picture', path=None))], ['embedded picture'])):
        refused('magicbrush', magicbrush(file, rows), out, parts=parts)
    whole = magicbrush(file, [good]).read_bytes()
    file.write_bytes(whole[:len(whole)//2])
    refused('magicbrush', file, out, parts=['t.parquet', 'magicbrush'])

# --- ImgEdit

def imgedit(folder, *sessions):
    rows = []
    for steps in sessions:
        data = [dict(input_images=[a], output_images=[b], prompt=f'make {b}') for a, b in steps]
        rows.append(dict(data=data))
        for a, b in steps:
            for name in (a, b): draw(folder/name, name.split('_')[-1].removesuffix('.png'))
    pq.write_table(pa.Table.from_pylist(rows), folder/'multiturn.parquet')

def test_imgedit_says_which_picture_a_turn_edits(tmp_path):
    chain = [('m/1_white.png', 'm/1_red.png'), ('m/1_red.png', 'm/1_lime.png')]
    back = [('m/2_white.png', 'm/2_red.png'), ('m/2_white.png', 'm/2_lime.png'), ('m/2_red.png', 'm/2_blue.png')]
    imgedit(tmp_path, chain, back)
    first, second = load_sessions(import_set('imgedit', tmp_path, tmp_path/'s.jsonl').path, same_turns=False)
    assert 'input_turn' not in first.meta and second.meta['input_turn'] == [0, 0, 1]
    assert colors([second.image, *second.target_images()]) == list(COLORS.values())

def test_imgedit_knows_a_copy_by_its_content_and_a_rule_by_its_lack_of_pictures(tmp_path):
    "As the set is published: what a turn edits has a name of its own; the first turn of some sessions is a sentence."
    for name, color in (('origin_0', 'white'), ('result_0', 'red'), ('origin_1', 'red'), ('result_1', 'lime'),
                        ('origin_2', 'red'), ('result_2', 'blue')): draw(tmp_path/'deep'/'m'/f'{name}.png', color)
    def turn(k, inputs=1): return dict(input_images=[f'm/origin_{k}.png']*inputs,
                                       output_images=[f'm/result_{k}.png']*inputs, prompt=f'edit {k}')
    rule = turn(9, inputs=0) | dict(prompt='keep it round')
    pq.write_table(pa.Table.from_pylist([dict(data=[rule, turn(0), turn(1), turn(2)])]), tmp_path/'m.parquet')
    session, = load_sessions(import_set('imgedit', tmp_path, tmp_path/'s.jsonl').path)
    assert session.instructions == ['keep it round edit 0', 'edit 1', 'edit 2']
    assert session.meta['rule'] == 'keep it round' and session.meta['input_turn'] == [0, 1, 1]
    assert colors([session.image, *session.target_images()]) == [COLORS[c] for c in ('white', 'red', 'lime', 'blue')]

def test_imgedit_refuses_what_does_not_fit(tmp_path):
    imgedit(tmp_path, [('m/1_white.png', 'm/1_red.png'), ('m/3_blue.png', 'm/1_lime.png')])
    refused('imgedit', tmp_path, tmp_path/'s.jsonl', parts=['row 0', 'turn 2', '`input_images`'])
    pq.write_table(pa.Table.from_pylist([dict(data=[dict(input_images=[], output_images=['x'], prompt='y')])]),
                   tmp_path/'multiturn.parquet')
    refused('imgedit', tmp_path, tmp_path/'s.jsonl', parts=['row 0', 'turn 1', '`input_images`', 'a picture'])

def split_tar(folder, name, parts, endings):
    "The folder `m` as a split archive, and gone."
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w:gz' if name.endswith('gz') else 'w') as tar:
        for p in sorted((folder/'m').iterdir()):
            tar.add(p, f'm/{p.name}')
            p.unlink()
    data = data.getvalue()
    if not name.endswith('gz'): data = data[:512*(len(data.rstrip(b'\0'))//512 + 3)]    # less padding than a part
    for i, ending in enumerate(endings[:parts]):
        (folder/f'{name}{ending}').write_bytes(data[i*len(data)//parts:(i + 1)*len(data)//parts])

def test_split_archives_are_unpacked_and_a_missing_part_is_named(tmp_path):
    imgedit(tmp_path, [('m/1_white.png', 'm/1_red.png'), ('m/1_red.png', 'm/1_lime.png')])
    split_tar(tmp_path, 'Multiturn.tar', 3, ['.split.000', '.split.001', '.split.002'])
    out = tmp_path/'s.jsonl'
    refused('imgedit', tmp_path, out, parts=['1_white.png', 'Multiturn.tar is not unpacked yet', '--unpack'])
    middle = tmp_path/'Multiturn.tar.split.001'
    data = middle.read_bytes()
    middle.unlink()
    refused('imgedit', tmp_path, out, unpack=True, parts=['Multiturn.tar', 'parts 0 to 2, received no part 1'])
    middle.write_bytes(data)
    last = tmp_path/'Multiturn.tar.split.002'
    data = last.read_bytes()
    last.unlink()
    refused('imgedit', tmp_path, out, unpack=True, parts=['Multiturn.tar', '2 parts', 'ends early', 'last part'])
    last.write_bytes(data)
    assert import_set('imgedit', tmp_path, out, unpack=True).sessions == 1

def test_an_archive_may_not_write_outside(tmp_path):
    with tarfile.open(tmp_path/'x.tar.part-aa', 'w') as tar:
        draw(tmp_path/'p.png', 'red')
        tar.add(tmp_path/'p.png', '../outside.png')
    (archive, parts), = archive_parts(tmp_path).items()
    with pytest.raises(InputError, match='expected files inside its folder, received one outside'):
        unpack_parts(archive, parts)
    assert not (tmp_path.parent/'outside.png').exists()

# --- SEED-Data-Edit

def seed_row(folder, place, turns):
    names = [f'{place}/{c}.png' for c in COLORS]
    for name, color in zip(names, COLORS): draw(folder/'images'/name, color)
    row = dict(source_image=names[0])
    for t in range(1, turns + 1): row |= {f'instruction_{t}': f'turn {t}', f'edit_image_{t}': names[t]}
    return row

def test_seed_edit_leaves_out_the_folders_that_are_corrupt(tmp_path):
    rows = [seed_row(tmp_path, '20240330_315P_1323turns/Data/207', 3),
            seed_row(tmp_path, '20240330_315P_1323turns/Data/210', 3),
            seed_row(tmp_path, '20240330_315P_1323turns/Data/2101', 2)]
    source = write_lines(tmp_path/'annotations/split_0001.jsonl', rows)
    made = import_set('seed-edit', source, tmp_path/'s.jsonl', pictures=tmp_path)
    assert made.sessions == 2 and len(made.skipped) == 1 and 'split_0001.jsonl:2' in made.skipped[0]
    three, two = load_sessions(made.path, same_turns=False, targets=True)
    assert three.instructions == ['turn 1', 'turn 2', 'turn 3'] and len(two.targets) == 2
    assert colors([three.image, *three.target_images()]) == list(COLORS.values())

def test_seed_edit_refuses_a_gap_between_turns(tmp_path):
    row = seed_row(tmp_path, 'a', 3)
    del row['instruction_2']
    source = write_lines(tmp_path/'split_0001.jsonl', [row])
    refused('seed-edit', source, tmp_path/'s.jsonl', parts=[':1', 'from 1 on', 'instruction_3'])

# --- Edit-R2

RULE = 'Set a persistent rule for all following edits: peach color for the edited object alone.'

def edit_r2_row(name, **kw):
    objects = [['dog'], ['dog', 'cup']]
    return dict(image=f'/somebody/data/{name}.png', task_type=['subject_add', 'subject_add'], turns=2,
                instruction=[f'{RULE} With this rule active, Add a cup', 'Add a hat'],
                formatted_instruction=['Add [cup]', 'Add [hat]'], bg_consistency=[True, True],
                unchanged_objects=[['dog'], ['dog']], available_objects=objects, all_objects=objects) | kw

def test_edit_r2_keeps_the_rule_and_finds_pictures_by_name(tmp_path):
    draw(tmp_path/'pictures/0b84.png', 'red')
    for part in ('cm', 'cu'): write_lines(tmp_path/part/'train_metadata.jsonl', [edit_r2_row('0b84')])
    made = import_set('edit-r2', tmp_path, tmp_path/'s.jsonl')
    memory, understanding = load_sessions(made.path)
    assert (memory.id, understanding.id) == ('cm-train-0b84', 'cu-train-0b84')
    assert memory.meta['rule'] == f'{RULE}' and memory.instructions[0].endswith('With this rule active, Add a cup')
    assert memory.meta['format_instructions'] == ['Add [cup]', 'Add [hat]']
    assert memory.meta['available_objects'] == [['dog'], ['dog', 'cup']]

def test_edit_r2_refuses_lists_of_another_length(tmp_path):
    draw(tmp_path/'0b84.png', 'red')
    for changes, part in ((dict(turns=3), '`turns`'), (dict(all_objects=[['dog']]), '`all_objects`'),
                          (dict(instruction='Add a cup'), '`instruction`'),
                          (dict(instruction=[], turns=0), '`instruction`: expected at least one'),
                          (dict(image='../0b84.png'), 'inside its folder')):
        file = write_lines(tmp_path/'cm/train_metadata.jsonl', [edit_r2_row('0b84', **changes)])
        refused('edit-r2', file, tmp_path/'s.jsonl', pictures=tmp_path, parts=[':1', part])

# --- EdiVal-Bench

def test_edival_becomes_native_sessions(tmp_path):
    (tmp_path/'oai.csv').write_text('image_index,turns,task_type,instructions,format_instructions,bg_consistency,'
                                    'unchanged_objects,available_objects,all_objects\n'
                                    "7,1,['subject_add'],['Add cup'],['Add [cup]'],True,['cat'],['cat'],['cat']\n")
    draw(tmp_path/'images/7_input_raw.jpg', 'red')
    session, = load_sessions(import_set('edival', tmp_path, tmp_path/'s.jsonl').path)
    assert (session.id, session.instructions, session.task_types) == ('7', ['Add cup'], ['subject_add'])
    assert session.meta['format_instructions'] == ['Add [cup]']

# --- a folder

def test_a_folder_of_pictures_with_texts(tmp_path):
    for name, color in (('cat', 'white'), ('cat.1', 'red'), ('cat.2', 'lime'), ('alone', 'blue')):
        draw(tmp_path/f'in/{name}.png', color)
    (tmp_path/'in/cat.txt').write_text('make it red\n\n make it lime \n')
    made = import_set('folder', tmp_path/'in', tmp_path/'out/s.jsonl')
    assert made.outside == 3
    with pytest.raises(InputError, match='allow_outside'): load_sessions(made.path)
    session, = load_sessions(made.path, allow_outside=True, targets=True)
    assert (session.id, session.instructions) == ('cat', ['make it red', 'make it lime'])
    assert colors(session.target_images()) == [COLORS['red'], COLORS['lime']]
    (tmp_path/'in/cat.2.png').unlink()
    refused('folder', tmp_path/'in', tmp_path/'s.jsonl', parts=['cat.txt', 'targets', '2 results', 'received 1'])
    (tmp_path/'in/cat.txt').unlink()
    refused('folder', tmp_path/'in', tmp_path/'s.jsonl', parts=['mtef_data make', '3 pictures and no text'])

# --- all

def test_files_of_another_set_are_recognised(tmp_path):
    write_lines(tmp_path/'pico/multi-turn.jsonl', [pico_row(tmp_path, '1_a', 2)])
    write_lines(tmp_path/'seed/split_0001.jsonl', [seed_row(tmp_path, 'a', 1)])
    write_lines(tmp_path/'r2/train_metadata.jsonl', [edit_r2_row('x')])
    write_lines(tmp_path/'native/s.jsonl', [dict(id='a', image='a.png', instructions=['x'])])
    magicbrush(tmp_path/'mb/t.parquet', [turn('7', 1, 'white', 'red')])
    (tmp_path/'ie').mkdir()
    imgedit(tmp_path/'ie', [('m/1_white.png', 'm/1_red.png')])
    kinds = dict(pico='pico-banana', seed='seed-edit', r2='edit-r2', native='native sessions', mb='magicbrush',
                 ie='imgedit')
    for folder, kind in kinds.items():
        assert looks_like(tmp_path/folder) == [kind]
        for name in IMPORTERS:
            if name == kind: continue
            wanted = 'expected pictures' if name == 'folder' else f'expected {name}'
            refused(name, tmp_path/folder, tmp_path/'s.jsonl', parts=[wanted, f'received what looks like {kind}'])
    refused('pico-bananas', tmp_path, tmp_path/'s.jsonl', parts=['pico-banana', 'did you mean'])
    refused('edival', tmp_path/'nowhere', tmp_path/'s.jsonl', parts=['nowhere', 'a file or a folder'])
    refused('edival', tmp_path/'ie', tmp_path/'s.json', parts=['OUT', '.jsonl'])

def test_a_picture_bomb_is_refused_by_its_head(tmp_path):
    Image.new('1', (12_000, 12_000)).save(tmp_path/'bomb.png')
    (tmp_path/'bomb.txt').write_text('make it smaller')
    refused('folder', tmp_path, tmp_path/'s.jsonl', parts=['bomb.txt', '89,478,485', '12000 x 12000'])
    refused('folder', tmp_path, tmp_path/'s.jsonl', on_bad='skip', parts=['received none, as all are left out, first '])
    assert not (tmp_path/'s.jsonl').exists()

def test_what_a_session_may_not_have_is_refused_by_the_writer(tmp_path):
    writer = RowWriter(tmp_path/'s.jsonl')
    picture = draw(tmp_path/'a.png', 'red')
    for texts, part in ((['x']*17, '1 to 16 turns'), (['x', ' '], '`instructions`')):
        row = dict(id='a', image=picture, meta={}, instructions=texts)
        with pytest.raises(InputError, match=part): writer.add('here', row)

def test_one_file_ambiguous_by_name_is_found_by_its_folder(tmp_path):
    from mt_editflow_nb.data.importers import PictureFinder
    for folder in ('x/a', 'x/b'): draw(tmp_path/folder/'1.png', 'red')
    find = PictureFinder(tmp_path)
    assert find('/elsewhere/b/1.png') == tmp_path/'x/b/1.png'
    with pytest.raises(InputError, match='expected one 1.png below .*, received 2'): find('1.png')
    with pytest.raises(InputError, match='inside its folder'): find('../x/a/1.png')
