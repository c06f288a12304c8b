"Sessions made of pictures by a model behind a server, from the command line; the server is scripted, on loopback."
import json, re
import pytest
from PIL import Image
from mt_editflow_nb.cli.data import main, read_type_weights
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import load_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from test_judge_servers import Scripted, impatient  # noqa: F401 a fixture

def said(request):
    "The words of a question, and how many there are."
    return next(part['text'] for part in request['messages'][0]['content'] if part['type'] == 'text')

class Author:
    "Lists a cat and a bench, writes of a hat or a scarf, and says yes; the first time it writes nonsense."
    def __init__(self): self.written = 0
    def __call__(self, request):
        text = said(request)
        if text.startswith('List'): return 'Here they are: ["cat", "wooden bench"]'
        if text.startswith('This picture'): return 'Yes.'
        if text.startswith('You write'):
            self.written += 1
            if self.written == 1: return 'What a nice picture!'
            things = re.search(r'<things>\n(.*)\n</things>', text, re.S)[1].splitlines()
            new = 'hat' if 'hat' not in things else 'scarf'
            return json.dumps(dict(instruction=f'Put a {new} on the cat', new=new, position='above', other='cat'))
        return '5'

@pytest.fixture
def photos(tmp_path):
    for i, color in enumerate(('red', 'lime')):
        (tmp_path/'in'/'deep').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 24), color).save(tmp_path/'in'/'deep'/f'{i}.png')
    return tmp_path

def run(photos, url, *more):
    return main(['make', str(photos/'in'), str(photos/'in'/'own.jsonl'), '--vlm', f'model@{url}', '--turns', '2',
                 '--type', 'subject_add', *more])

def test_a_folder_of_pictures_becomes_sessions_and_nothing_is_asked_twice(photos, capsys):
    with Scripted(Author()) as server:
        assert run(photos, server.url) == 0
        asked = len(server.requests)
        first = (photos/'in'/'own.jsonl').read_bytes()
        assert '4 instructions written, 0 instructions refused, 1 instruction unreadable' in capsys.readouterr().out
        assert run(photos, server.url) == 0
        assert len(server.requests) == asked + 1                       # whether it is ready
    assert (photos/'in'/'own.jsonl').read_bytes() == first
    a, b = load_sessions(photos/'in'/'own.jsonl')
    assert (a.id, a.instructions) == ('deep/0.png', ['Put a hat on the cat', 'Put a scarf on the cat'])
    assert a.task_types == ['subject_add']*2 and a.meta['written_by'] == 'model'
    assert a.meta['format_instructions'] == ['Add [hat] on the [above] of [cat]', 'Add [scarf] on the [above] of [cat]']
    assert a.meta['available_objects'] == [['cat', 'wooden bench', 'hat'], ['cat', 'wooden bench', 'hat', 'scarf']]
    assert a.meta['unchanged_objects'] == [['cat', 'wooden bench']]*2 and a.meta['bg_consistency'] == [True, True]

def test_nonsense_for_a_whole_picture_is_one_line(photos, capsys):
    def script(request): return 'lovely' if said(request).startswith(('List', 'You write')) else '5'
    with Scripted(script) as server: assert run(photos, server.url) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all('nothing could be listed' in line for line in lines[:2])
    assert 'expected instructions for at least one picture' in lines[2] and not (photos/'in'/'own.jsonl').exists()

def test_files_that_a_selection_cannot_read_or_write(photos, capsys):
    "Both parts of a split to one file, and tables, whose pictures cannot be referred to."
    session = dict(id='a', image='in/deep/0.png', instructions=['make it red'])
    other_session = session | dict(id='b', image='in/deep/1.png')
    (photos/'s.jsonl').write_text(json.dumps(session) + '\n' + json.dumps(other_session) + '\n')
    (photos/'t.parquet').write_bytes(b'PAR1')
    one = str(photos/'one.jsonl')
    other = str(photos/'other.jsonl')
    for argv, message in ((['split', str(photos/'s.jsonl'), one, str(photos/'in/../one.jsonl')], 'than TRAIN'),
                          (['stats', str(photos/'t.parquet')], 'a JSON Lines file of sessions, received'),
                          (['show', str(photos), one], "a JSON Lines file of sessions, received a folder")):
        assert main(argv) == 2
        said, = capsys.readouterr().err.splitlines()
        assert message in said
    assert not (photos/'one.jsonl').exists()
    assert main(['split', str(photos/'s.jsonl'), one, other]) == 0                 # a share of .2
    assert len(load_sessions(one, allow_outside=True)) == len(load_sessions(other, allow_outside=True)) == 1
    for amount in ('0', '1.', '-1', 'x', 'nan'):
        assert main(['split', str(photos/'s.jsonl'), one, other, '--heldout', amount]) == 2
        assert '--heldout: expected a whole number, or a share below 1' in capsys.readouterr().err

def test_what_cannot_be_asked_for(photos, capsys):
    assert read_type_weights(['subject_add=2', 'count_change']) == dict(subject_add=2, count_change=1)
    for text in ('subject_ad', 'subject_add=x', 'subject_add=0'):
        with pytest.raises(InputError, match='did you mean|a weight above 0'): read_type_weights([text])
    assert main(['make', str(photos/'none'), 'o.jsonl', '--vlm', 'm@http://127.0.0.1:9/v1']) == 2
    assert 'a folder of pictures' in capsys.readouterr().err

def test_options_of_stats_and_sample_that_cannot_be_used(photos, tmp_path, capsys):
    "Before anything is read; a comparison that would compare nothing does not report 0."
    for options, expected in ((['--heads', '--against', 'b.jsonl'], '--against: expected no --heads'),
                              (['--picture', 'numbers.xyz'], '--picture: expected a file name that ends in one of')):
        assert main(['stats', 'none.jsonl', *options]) == 2
        assert capsys.readouterr().err.startswith(f'mtef_data: {expected}')
    shape_sessions(2)[0].image.save(tmp_path/'one.png')
    row = dict(id='a', image='one.png', instructions=['make it red'], meta=dict(licence=['CC0', 'MIT']))
    (tmp_path/'s.jsonl').write_text(json.dumps(row) + '\n')
    assert main(['stats', str(tmp_path/'s.jsonl')]) == 0
    assert "['CC0', 'MIT']" in capsys.readouterr().out
    assert main(['sample', str(tmp_path/'s.jsonl'), str(tmp_path/'t.jsonl'), '--n', '1', '--seed', '-1']) == 2
    assert capsys.readouterr().err == 'mtef_data: seed: expected a number of at least 0, received -1\n'
