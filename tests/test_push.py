"A finished run as a model repository: in a folder, and on a hub that is an HTTP server of this test."
import base64, json, shutil, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest, torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_training import small
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.push import main, plain_options
from mt_editflow_nb.data.files import content_hash
from mt_editflow_nb.data.sessions import save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import find_editor, load_editor
from mt_editflow_nb.editing.whole import read_transformer
from mt_editflow_nb.training.train import experiment

ADDRESS = 'http://gpu7.intern:8000/v1'

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run on sessions of a file."
    folder = tmp_path_factory.mktemp('secret_project')
    save_sessions(shape_sessions(6, 2), folder)
    config = make_config(small | dict(iterations=2, sessions=str(folder/'sessions.jsonl'), heldout=2))
    experiment(config, folder/'run', progress=False)
    held = json.loads((folder/'run'/'config.json').read_text())
    held['config']['judge'] = f'Qwen/Qwen2.5-VL-7B-Instruct@{ADDRESS}:logit'      # as if a server had judged
    (folder/'run'/'config.json').write_text(json.dumps(held))
    return folder/'run'

@contextmanager
def fake_hub(monkeypatch, status=200):
    "Answers as the hub does, wants all files inside the commit, and keeps what it is asked."
    asked = []
    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def answer(self):
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            asked.append((self.command, self.path.partition('?')[0], body))
            files = json.loads(body)['files'] if 'preupload' in self.path else []
            reply = dict(url=f'{url}/ada/edits', name='ada/edits', commitUrl=f'{url}/ada/edits/commit/1', commitOid='1',
                         files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in files])
            data = json.dumps(reply if status == 200 else dict(error='no')).encode()
            self.send_response(status)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        do_GET = do_POST = do_HEAD = answer
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for module in ('huggingface_hub.constants', 'huggingface_hub.hf_api.constants'):
        monkeypatch.setattr(f'{module}.ENDPOINT', url)
    monkeypatch.setenv('HF_TOKEN', 'hf_of_this_test')
    try: yield asked
    finally: server.shutdown()

def test_nothing_leaves_without_yes(run, tmp_path, monkeypatch, capsys):
    "The folder alone: loads in plain diffusers, and holds no address and no path of this machine."
    with fake_hub(monkeypatch) as asked:
        assert main([str(run), 'ada/edits', '--to', str(tmp_path/'hub')]) == 0
    said = capsys.readouterr().out
    assert not asked and 'then add --yes' in said
    names = {p.name for p in (tmp_path/'hub').iterdir()}
    assert names == {'README.md', 'config.json', 'results.json', 'metrics.jsonl', 'curves.png', 'heldout_0.png',
                     'heldout_1.png', 'pytorch_lora_weights.safetensors'}
    assert all(name in said for name in names)
    card = ModelCard.load(tmp_path/'hub'/'README.md')
    for part in ('sessions.jsonl', 'Qwen/Qwen2.5-VL-7B-Instruct:logit', '| 2 | O |', "load_lora_weights('ada/edits')"):
        assert part in card.text
    texts = ''.join((tmp_path/'hub'/name).read_text() for name in names if not name.endswith(('.png', '.safetensors')))
    assert 'gpu7' not in texts and 'secret_project' not in texts
    import diffusers
    pipe = diffusers.FluxKontextPipeline.from_pretrained(find_editor('tiny')[0])
    pipe.load_lora_weights(str(tmp_path/'hub'))
    loaded = dict(pipe.transformer.named_parameters())
    for name, x in load_file(run/'lora'/'pytorch_lora_weights.safetensors').items():
        key = name.removeprefix('transformer.').replace('.weight', '.default_0.weight')
        assert torch.equal(loaded[key], x)

def test_upload(run, monkeypatch, capsys):
    "With --yes: a private repository, and a commit of exactly the files that were listed."
    with fake_hub(monkeypatch) as asked: assert main([str(run), 'ada/edits', '--yes', '--licence', 'mit']) == 0
    created = json.loads(next(body for _, path, body in asked if path.endswith('/repos/create')))
    assert (created['name'], created['organization']) == ('edits', 'ada')
    assert created.get('private') is True or created.get('visibility') == 'private'
    commit = next(body for _, path, body in asked if '/commit/' in path)
    files = {row['value']['path']: base64.b64decode(row['value']['content'])
             for row in map(json.loads, commit.splitlines()) if row['key'] == 'file'}
    assert files == {p.name: p.read_bytes() for p in (run/'hub').iterdir()}
    assert b'license: mit' in files['README.md']
    assert 'uploaded to ' in capsys.readouterr().out

@pytest.mark.parametrize('argv,words', [
    (['ada/edits', '--public'], '--public: expected --yes'), (['just-a-name'], 'REPO: expected OWNER/NAME'),
    (['ada/../edits'], 'REPO: expected OWNER/NAME')])
def test_bad_input_is_one_line(run, argv, words, capsys):
    assert main([str(run), *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'mtef_push: {words}') and err.count('\n') == 1

def test_what_the_hub_refuses_is_one_line(run, monkeypatch, capsys):
    with fake_hub(monkeypatch, status=403): assert main([str(run), 'ada/edits', '--yes']) == 2
    err = capsys.readouterr().err
    assert err.startswith('mtef_push: REPO: expected a repository that can be written to, received ada/edits: ')
    assert err.count('\n') == 1
    assert 'hf_of_this_test' not in err

def test_the_best_adapter_is_published_with_its_own_numbers(tmp_path, capsys):
    "As if the last one had become worse; the card says so. `--adapter last` publishes that one all the same."
    run = tmp_path/'run'
    experiment(make_config(small | dict(iterations=2, save_every=1, eval_every=1, keep_best=1, turns=1)), run,
               progress=False)
    results = json.loads((run/'results.json').read_text())
    row = next(r for r in results['table'] if r['metric'] == 'O')
    held = dict(json.loads((run/'heldout.jsonl').read_text()), heldout_O=row['after'] + 7)
    (run/'heldout.jsonl').write_text(json.dumps(held) + '\n')
    best = run/'best'/'000001'/'pytorch_lora_weights.safetensors'
    last = run/'lora'/'pytorch_lora_weights.safetensors'
    assert best.read_bytes() != last.read_bytes()
    for argv, file, said in (([], best, 'that of iteration 1 of 2'), (['--adapter', 'last'], last, 'the last one')):
        assert main([str(run), 'ada/edits', *argv]) == 0
        assert (run/'hub'/last.name).read_bytes() == file.read_bytes()
        assert said in (run/'hub'/'README.md').read_text()
        written = json.loads((run/'hub'/'results.json').read_text())
        assert written['adapter'] == content_hash(file) and written['iterations'] == (1 if file == best else 2)
    whole = {r['metric']: r for r in written['table']}
    assert main([str(run), 'ada/edits']) == 0
    after = {r['metric']: r['after'] for r in json.loads((run/'hub'/'results.json').read_text())['table']}
    assert after['CC'] == pytest.approx(held['heldout_CC'], abs=1e-3) and after['CC'] != whole['CC']['after']
    strips = {n: (run/'hub'/f'heldout_{n}.png').read_bytes() for n in range(2)}
    assert strips == {n: (best.parent/f'heldout_{n}.png').read_bytes() for n in range(2)}          # of this adapter
    assert strips[0] != (run/'rollouts'/'heldout_0.png').read_bytes()
    card = (run/'hub'/'README.md').read_text()
    assert 'below after iteration 1](heldout_0.png)' in card and 'pictures are its own' in card
    for file in best.parent.glob('*.png'): file.unlink()                            # of an earlier version
    assert main([str(run), 'ada/edits']) == 0
    card = (run/'hub'/'README.md').read_text()
    assert 'kept no pictures of it' in card and 'heldout_' not in card
    shutil.rmtree(run/'evaluations')
    assert main([str(run), 'ada/edits']) == 2
    assert 'mtef_push: --adapter: expected' in capsys.readouterr().err

def test_a_whole_transformer_is_published_in_pieces(tmp_path, monkeypatch, capsys):
    "`lora_rank: none`: the pieces load in plain diffusers, as the card says, and are what was trained."
    monkeypatch.setattr('mt_editflow_nb.editing.whole.SHARD_SIZE', '200KB')
    run = tmp_path/'run'
    folder = tmp_path/'hub'
    experiment(make_config(small | dict(lora_rank=None, iterations=1, turns=1, lr=1e-4)), run, progress=False)
    assert main([str(run), 'ada/edits', '--to', str(folder)]) == 0, capsys.readouterr().err
    pieces = {p.name for p in (folder/'transformer').iterdir()}
    assert pieces == {p.name for p in (run/'transformer').iterdir()} and len(pieces) > 3
    assert not (folder/'pytorch_lora_weights.safetensors').exists()
    card = ModelCard.load(folder/'README.md')
    assert 'lora' not in card.data.tags and 'A transformer for tiny' in card.text and 'load_lora' not in card.text
    assert "AutoModel.from_pretrained('ada/edits', subfolder='transformer'" in card.text
    import diffusers
    transformer = diffusers.AutoModel.from_pretrained(str(folder), subfolder='transformer')
    pipe = diffusers.FluxKontextPipeline.from_pretrained(find_editor('tiny')[0], transformer=transformer)
    trained = read_transformer(run/'transformer')
    base = load_editor().transformer.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in pipe.transformer.state_dict().items())
    assert any(not torch.equal(x, trained[name]) for name, x in base.items())
    with fake_hub(monkeypatch) as asked: assert main([str(run), 'ada/edits', '--to', str(folder), '--yes']) == 0
    commit = next(body for _, path, body in asked if '/commit/' in path)
    sent = {row['value']['path'] for row in map(json.loads, commit.splitlines()) if row['key'] == 'file'}
    assert {f'transformer/{name}' for name in pieces} <= sent
    piece = sorted((run/'transformer').glob('*.safetensors'))[0]
    piece.write_bytes(piece.read_bytes()[:-4] + b'\0\0\0\1')
    assert main([str(run), 'ada/edits']) == 2
    assert 'the transformer that results.json is about' in capsys.readouterr().err

def test_settings_of_a_judge_that_may_hold_secrets_stay_here():
    options = dict(vlm='Qwen/Qwen2.5-VL-7B-Instruct@http://gpu7.intern:8000/v1', extra_body=dict(api_key='sk-1'),
                   max_tokens=2000, price=None, progress=True, timeout=1.5)
    assert plain_options(options) == dict(max_tokens=2000, price=None, progress=True, timeout=1.5)
