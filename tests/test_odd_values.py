"Every value of a record in turn is missing, or of another kind: one line that names the place, never a traceback."
import copy, io, json
import pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image
from mt_editflow_nb.cli.eval import main
from mt_editflow_nb.data import importers
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import load_edival, load_sessions
from mt_editflow_nb.data.tables import row_session
from mt_editflow_nb.evaluation.bench_items import load_benchmark
from mt_editflow_nb.evaluation.edival import load_published
import test_importers as made

ODD = (None, 5, 1.5, '', '../x', 'a\x00b', '\ud800', [], {}, [None], [[]], ['x'])

def places(value, at=()):
    "Where the values of nested dicts and lists stand."
    yield at
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for k in keys: yield from places(value[k], (*at, k))

def changed(value, at, new):
    "A copy in which another value stands in one place; `...`: nothing does."
    value = copy.deepcopy(value)
    holder = value
    for k in at[:-1]: holder = holder[k]
    if new is ...: del holder[at[-1]]
    else: holder[at[-1]] = new
    return value

def broken(record):
    "Copies of a record, each with one value wrong."
    for at in places(record):
        if not at: continue
        yield from ((at, changed(record, at, new)) for new in (*ODD, ...))

def check(record, read, *parts):
    "Whatever is refused is refused in one line that says where, and much is."
    read(copy.deepcopy(record))
    refused = 0
    for at, wrong in broken(record):
        try: read(wrong)
        except InputError as e:
            refused += 1
            assert '\n' not in str(e) and all(part in str(e) for part in parts), (at, str(e))
    assert refused > len(ODD)

@pytest.fixture
def folder(tmp_path):
    for name in ('w', 'r', 'l'): made.draw(tmp_path/f'm/{name}.png', 'white')
    return tmp_path

def line(record): return json.dumps(record).encode()

def test_importers(folder):
    steps = [dict(input_images=[f'm/{a}.png'], output_images=[f'm/{b}.png'], prompt='x') for a, b in ('wr', 'rl')]
    made.draw(folder/'0b84.png', 'red')
    pico = made.pico_row(folder, '1_a', 3)
    seed = made.seed_row(folder, 'a', 2)
    find = importers.PictureFinder(folder)
    check(pico, lambda row: importers.pico_banana_row(line(row), find))
    check(seed, lambda row: importers.seed_edit_row(line(row), find))
    check(made.edit_r2_row('0b84'), lambda row: importers.edit_r2_row(line(row), find))
    check(dict(data=steps), lambda row: importers.imgedit_row(row, find))

def test_magicbrush(folder):
    rows = [made.turn('7', 1, 'white', 'red'), made.turn('7', 2, 'red', 'lime')]
    def read(rows):
        if all(isinstance(row, dict) for row in rows): importers.magicbrush_row(rows, None)
    check(rows, read)

def test_native_lines_and_tables(folder):
    row = dict(id='a', image='m/w.png', instructions=['x', 'y'], task_types=['s', 't'], meta=dict(k=1),
               targets=['m/r.png', 'm/l.png'])
    def read(row):
        (folder/'s.jsonl').write_bytes(line(row))
        [s.image for s in load_sessions(folder/'s.jsonl')]
    check(row, read, 's.jsonl')
    pictures = dict(image=made.png('red'), targets=[made.png('red'), made.png('lime')], meta='{"k": 1}')
    check(row | pictures, row_session)

def test_edival_table(folder):
    lists = dict(task_type=['subject_add'], instructions=['Add cup'], format_instructions=['Add [cup]'],
                 unchanged_objects=['cat'], available_objects=['cat'], all_objects=['cat'])
    def read(row):
        cells = {k: v if isinstance(v, str) else repr(v) for k, v in row.items()}
        quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells.values()]     # Python 3.10's csv writes no NUL
        text = ','.join(cells) + '\r\n' + ','.join(quoted) + '\r\n'
        (folder/'e.csv').write_bytes(text.encode('utf-8', 'surrogatepass'))
        list(load_edival(folder/'e.csv'))
    check(dict(image_index='7', turns='1', bg_consistency=True) | lists, read, 'e.csv')

def test_published_results(folder):
    about = dict(instruction='Add cup', task_type='subject_add')
    turn = dict(instruction_following=1, object_dinov3_consistency_mean=.9, background_dinov3_consistency=.8,
                meta=about)
    def read(data):
        (folder/'multipass').mkdir(exist_ok=True)
        (folder/'multipass'/'7_input_raw.json').write_text(json.dumps(data))
        load_published(folder)
    check({'1': turn, '2': turn}, read, str(folder))

def png_cell():
    file = io.BytesIO()
    Image.new('RGB', (8, 8)).save(file, 'PNG')
    return dict(bytes=file.getvalue(), path=None)

def benchmark_read(name, file, write, images=None):
    "A reader of what `write` writes."
    def read(data):
        try: write(data)
        except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError): return     # no such table can be
        [s.image for s in load_benchmark(name, file, images)]
    return read

def test_benchmarks_of_json_files(folder):
    file = folder/'basic_edit.json'
    def write(data): file.write_text(json.dumps(data))
    item = dict(id='m/w.png', prompt='x', edit_type='add')
    check({'1': item}, benchmark_read('imgedit', file, write), 'basic_edit.json')
    lme = folder/'lme_bench.json'
    def write_lme(data): lme.write_text(json.dumps(data))
    items = [dict(id='w', turns=['a', 'b'], labels=['hard', 'soft'], category='c')]
    check(dict(items=items), benchmark_read('lme', lme, write_lme, folder/'m'), 'lme_bench.json')
    mice = folder/'cm/test_metadata.jsonl'
    mice.parent.mkdir()
    def write_mice(data): mice.write_text(json.dumps(data) + '\n')
    check(made.edit_r2_row('w'), benchmark_read('mice', mice, write_mice, folder/'m'), 'test_metadata.jsonl:1')

def test_benchmarks_of_tables(folder):
    file = folder/'t.parquet'
    def write(row): pq.write_table(pa.Table.from_pylist([row]), file)
    row = dict(key='k', task_type='add', instruction='x', instruction_language='en', input_image_raw=png_cell(),
               Intersection_exist=True)
    check(row, benchmark_read('gedit', file, write), 't.parquet')
    check(dict(index=3, image=png_cell(), context=['x', 'y']), benchmark_read('mse', file, write), 't.parquet')

def test_quality_that_others_published_is_taken_over(tmp_path):
    "HPSv3 of two sessions, 5 and 7, before 4 and 4: the mean is 6, and 2 more than before."
    (tmp_path/'multipass').mkdir()
    for i, score in enumerate((5, 7)):
        rows = {'1': dict(instruction_following=1, human_preference_score=score, meta=dict(instruction='x'))}
        before = dict(base_image_quality=dict(base_image_human_preference_score=4.))
        (tmp_path/'multipass'/f'{i}_input_raw.json').write_text(json.dumps(rows | before))
    assert main(['--import', str(tmp_path), '--out', str(tmp_path/'out')]) == 0
    row, = [line for line in (tmp_path/'out/card.md').read_text().split('## Quality')[1].splitlines() if '| 1 ' in line]
    assert '6.00 [' in row and '2.00 [' in row

def test_sessions_that_lack_a_turn_are_left_out_and_counted(tmp_path):
    "Ten made-up results, of which one has no second turn, as where a picture was missing: nine are compared."
    (tmp_path/'multipass').mkdir()
    for i in range(10):
        turns = (1, 3) if i == 4 else (1, 2, 3)
        rows = {str(t): dict(instruction_following=int(t == 1), meta=dict(instruction='x')) for t in turns}
        (tmp_path/'multipass'/f'{i}_input_raw.json').write_text(json.dumps(rows | dict(base_image_quality={})))
    assert main(['--import', str(tmp_path), '--out', str(tmp_path/'out')]) == 0
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert results['sessions'] == 9
    assert 'Sessions that lack a turn and are left out, as published: 1.' in results['notes']
    value = {(row['metric'], row['turn']): row['value'] for row in results['table']}
    assert [value['IF', t] for t in (1, 2, 3)] == [100, 0, 0]
