"Judges behind HTTP: faults of servers, two processes on one cache, replay, secrets, a real `transformers serve`."
import hashlib, json, math, multiprocessing, re, signal, socket, threading, time, urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pytest, torch, transformers
from packaging.version import Version
from helpers import PATIENCE, Command, wait_for
from mt_editflow_nb.rewards.cache import Cached
from mt_editflow_nb.rewards.engines import Ask, Local
from mt_editflow_nb.rewards.servers import Server, data_url
from mt_editflow_nb.algorithm.fusion import advantages
from mt_editflow_nb.rewards.judges import Item, PROMPTS, TINY_PROMPTS, load_mode, prompt
from mt_editflow_nb.rewards.cube import Judge, TurnScorer, judge_items, load_judge
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.shapeworld import shape_sessions, teacher_images

good = '{"reasoning": "it moved", "score": 6}'
faults = { # name -> (status, body) of a try, or a word
    '429': (429, '{"error": {"message": "slow down"}}'), '500': (500, 'Internal Server Error'),
    '503': (503, '<html>busy</html>'), 'hangs': 'hang', 'closes': 'close', 'closes in the middle': 'half',
    'html': (200, '<html>It works!</html>'), 'no choices': (200, '{"choices": []}'),
    'no json': 'The edit is a seven, I would say.', 'out of range': '{"reasoning": "", "score": 10}',
    'nan': '{"reasoning": "", "score": NaN}', 'empty': '', 'refusal': "I'm sorry, but I can't help with that.",
    'two scores': '{"score": 1} {"score": 9}'}

def completion(content, **choice):
    "The body of a chat completion."
    plain = dict(index=0, finish_reason='stop', message=dict(role='assistant', content=content), logprobs=None)
    usage = dict(prompt_tokens=5, completion_tokens=2, total_tokens=7)
    fields = dict(id='x', object='chat.completion', created=0, model='m', usage=usage)
    return json.dumps(fields | dict(choices=[plain | choice]))

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with self.server.lock:
            self.server.seen.append(body)
            n = len(self.server.seen) - 1
        what = self.server.script(n, body)
        if what == 'close':
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if what == 'hang': return self.server.closing.wait()      # longer than anybody's patience
        if what == 'half':
            self.close_connection = True
            return self.send(200, '{"id": "x", "choi', missing=99)
        self.send(*(what if isinstance(what, tuple) else (200, completion(what))))
    def send(self, status, text, missing=0):
        data = text.encode()
        try:
            self.send_response(status)
            self.send_header('Content-Type', 'application/json' if text[:1] == '{' else 'text/html')
            self.send_header('Content-Length', str(len(data) + missing))
            self.end_headers()
            self.wfile.write(data)
        except OSError: pass            # the client did not wait

class Faulty(ThreadingHTTPServer):
    "A chat server on loopback. `script(n, request)` gives what try n gets: a fault, or an answer."
    daemon_threads = True
    request_queue_size = 64
    def __init__(self, script):
        self.script = script
        self.seen = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/v1'
        threading.Thread(target=self.serve_forever, daemon=True).start()
    def handle_error(self, *a): pass
    def __enter__(self): return self
    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "The client's pauses between tries, a hundredth as long."
    import openai._base_client as client
    for name in ('INITIAL_RETRY_DELAY', 'MAX_RETRY_DELAY'): monkeypatch.setattr(client, name, .01)

picture = np.zeros((8, 8, 3), np.uint8)
def engine(server, **kw): return Server('m', server.url, **dict(retries=2, timeout=300, concurrency=8) | kw)
def item(n=0): return Item('if', (picture, picture + n), ('make it red',))
think = load_mode('think')

@pytest.mark.parametrize('name', faults)
def test_one_fault_is_repaired_by_another_try(name):
    with Faulty(lambda n, body: good if n else faults[name]) as server:
        patience = 3 if name == 'hangs' else 300                   # also the time in which the second try must answer
        verdict, = think(engine(server, timeout=patience), [item()], PROMPTS)
    if name in ('html', 'no choices'):                       # no bad luck: another server
        assert math.isnan(verdict.score) and 'no chat completion' in verdict.error
    else: assert verdict.score == 6/9 and len(server.seen) == 2

@pytest.mark.parametrize('name', faults)
def test_lasting_fault_is_a_missing_score(name):
    with Faulty(lambda n, body: faults[name]) as server:
        patience = .3 if name == 'hangs' else 300
        verdict, = think(engine(server, timeout=patience), [item()], PROMPTS)
    assert math.isnan(verdict.score) and verdict.error and '\n' not in verdict.error
    assert 1 <= len(server.seen) <= 3                                     # tried within bounds

def test_prose_around_the_json_is_read():
    with Faulty(lambda n, body: 'Let me see.\n```json\n' + good + '\n```\nThat is my verdict.') as server:
        assert think(engine(server), [item()], PROMPTS)[0].score == 6/9 and len(server.seen) == 1

def test_what_no_patience_repairs_stops_the_run(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-very-secret')
    says = []
    for status, part in ((401, 'received one that it refused'), (404, "serves, received 'm'")):
        says[:] = status, '{"error": {"message": "bad key sk-very-secret"}}'
        with Faulty(lambda n, body: tuple(says)) as server:
            with pytest.raises(InputError, match=part) as e: think(engine(server), [item()], PROMPTS)
        assert 'secret' not in str(e.value) and '\n' not in str(e.value)

sessions = shape_sessions(4, turns=3, seed=8)
perfect = np.stack([teacher_images(s) for s in sessions])
first = np.stack([np.asarray(s.image) for s in sessions])
lazy = first[:, None].repeat(3, 1)
one_turn = np.concatenate([perfect[:, :1], lazy[:, 1:]], 1)
images = np.stack([perfect, lazy, one_turn, perfect[:, ::-1]], 1)                    # [P, 4, T, ...]

class Honest:
    "What a script says to a request, by a hash of the pictures: always the same score for the same question."
    def __init__(self, fails=lambda text: False): self.fails = fails
    def __call__(self, n, body):
        text = json.dumps(body['messages'])
        h = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'big')
        return (500, 'no') if self.fails(h) else f'{{"reasoning": "", "score": {h % 10}}}'

def test_failed_scores_are_masked_counted_and_leave_the_rest_alone():
    with Faulty(Honest(lambda h: h % 8 == 0)) as bad, Faulty(Honest()) as fine:
        holed, whole = (Judge(engine(s, give_up=1000), think, max_failed=.5)(sessions, images) for s in (bad, fine))
    assert 0 < holed.failed < 40 and whole.failed == 0 and holed.failed == int(holed.rewards_PGTM.isnan().sum())
    assert torch.equal(holed.rewards_PGTM[holed.mask_PGTM], whole.rewards_PGTM[holed.mask_PGTM])
    assert (whole.rewards_PGTM == 0).any()
    assert Counter(c['error'] != '' for c in holed.calls)[True] == holed.failed
    how = dict(aggregation='mean', fusion='advantage', credit='broadcast')
    got = advantages(holed.rewards_PGTM, **how)
    ok_PG = holed.mask_PGTM.all(-1).all(-1)
    assert not got[~ok_PG].any()
    compared = [p for p in range(4) if ok_PG[p].sum() > 1]
    assert compared
    for p in compared:
        assert torch.allclose(got[p][ok_PG[p]], advantages(whole.rewards_PGTM[p, ok_PG[p]][None], **how)[0])

def test_dead_server_stops_soon_and_the_run_goes_on_when_it_is_back(tmp_path):
    def dies(n, body): return (500, 'no') if n >= 40 else Honest()(n, body)
    with Faulty(dies) as server:
        judge = Judge(Cached(engine(server, concurrency=4, give_up=4), tmp_path/'judge.sqlite'), think)
        wanted = 'expected at least 80% of .* scores, received none for'
        with pytest.raises(InputError, match=wanted) as e: judge(sessions, images)
        assert len(server.seen) < 40 + 3*10 and '\n' not in str(e.value)          # the rest was not even tried
        server.script = Honest()
        n = len(server.seen)
        scores = judge(sessions, images)
        assert scores.failed == 0 and len(server.seen) - n <= 96 - 36             # what it had said before was kept

def test_logit_over_top_logprobs():
    def answer(n, body):
        assert body['logprobs'] and body['top_logprobs'] == 20 and body['max_tokens'] == 1
        top = [('7', .5), (' 7', .1), ('2', .2), ('I', .1), ('9', 1e-9)]
        tokens = [dict(token=t, logprob=math.log(p), bytes=None) for t, p in top]
        first_token = dict(**tokens[0], top_logprobs=tokens)
        return 200, completion('7', finish_reason='length', logprobs=dict(content=[first_token]))
    with Faulty(answer) as server: verdict, = load_mode('logit')(engine(server), [item()], PROMPTS)
    assert verdict.score == pytest.approx((7*.6 + 2*.2)/.8/9)

def test_a_rerun_costs_no_call_and_samples_stay_samples(tmp_path):
    def script(n, body): return f'{{"reasoning": "", "score": {body["seed"] % 10}}}'
    with Faulty(script) as server:
        cached = Cached(engine(server), tmp_path/'c.sqlite')
        def run(mode, **kw): return [v.score*9 for v in load_mode(mode)(cached, [item(), item(1)], PROMPTS, **kw)]
        assert run('think@4') == pytest.approx([1.5, 1.5]) and len(server.seen) == 8           # seeds 0 to 3
        assert run('think@4') == pytest.approx([1.5, 1.5]) and len(server.seen) == 8
        run('think@4', seed=1)
        assert len(server.seen) == 16                                             # another pass is another question
        Judge(cached, think)(sessions, images)
        n = len(server.seen)
        Judge(cached, think)(sessions, images)
        assert len(server.seen) == n
    offline = Judge(Cached(Server('m', server.url), tmp_path/'c.sqlite', offline=True), think)   # the server is gone
    assert offline(sessions, images).failed == 0
    with pytest.raises(InputError, match='expected every call on record in .*, received 72 of 72 that are not'):
        offline(sessions, images, seed=9)
    with pytest.raises(InputError, match='nothing to replay'):
        Cached(Server('m', server.url), tmp_path/'none.sqlite', offline=True)
    (tmp_path/'text.sqlite').write_text('this is no database, but it is long enough to be mistaken for one ' * 20)
    with pytest.raises(InputError, match='expected a file of answers that can be used, received'):
        Cached(Server('m', server.url), tmp_path/'text.sqlite')

def _writer(url, path, start):
    Cached(Server('m', url, concurrency=4), path)([Ask((), f'question {i}') for i in range(start, start + 200)])

def test_two_processes_share_a_cache(tmp_path):
    path = tmp_path/'shared.sqlite'
    process = multiprocessing.get_context('fork').Process
    with Faulty(lambda n, body: 'answer to ' + body['messages'][0]['content'][0]['text']) as server:
        jobs = [process(target=_writer, args=(server.url, path, s)) for s in (0, 100)]
        for j in jobs: j.start()
        for j in jobs: j.join(PATIENCE)
    assert [j.exitcode for j in jobs] == [0, 0]
    replies = Cached(Server('m', server.url), path, offline=True)([Ask((), f'question {i}') for i in range(300)])
    assert [r.text for r in replies] == [f'answer to question {i}' for i in range(300)]

tiny_judge = Path(__file__).resolve().parents[1]/'mt_editflow_nb'/'assets'/'tiny_judge'

def transformers_command(argv):
    "`transformers ...`, without a look for updates, in a process that has imported most of it."
    from transformers.cli.transformers import app
    app(argv)

def test_transformers_serve_gives_the_same_scores(tmp_path):
    pytest.importorskip('fastapi')
    pytest.importorskip('uvicorn')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    url = f'http://127.0.0.1:{port}'
    argv = ['serve', str(tiny_judge), '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    if Version(transformers.__version__) < Version('5.23'):     # reads no decision.json; pictures stand before the text
        settings = dict(labels=json.loads((tiny_judge/'decision.json').read_text())['labels'],
                        chat_template='<user>{% for _ in images %}<image>{% endfor %}{{ state }}<assistant>')
        (tmp_path/'decision.json').write_text(json.dumps(settings))
        argv += ['--decision-config', str(tmp_path/'decision.json')]
    job = Command(transformers_command, argv, tmp_path/'log', HF_HUB_OFFLINE='1')
    try:
        def is_up():
            assert job.is_running(), job.said('err')[-2000:]
            try: return urllib.request.urlopen(url + '/health', timeout=60)
            except OSError: return False
        wait_for(is_up, every=.1)
        far = Server(str(tiny_judge), url + '/v1', timeout=PATIENCE)
        near = Local('tiny')
        a, b = (Judge(e, load_mode('logit'), TINY_PROMPTS)(sessions[:1], images[:1, :2, :2]) for e in (near, far))
        assert a.failed == b.failed == 0 and len(a.rewards_PGTM.unique()) > 1
        assert torch.allclose(a.rewards_PGTM, b.rewards_PGTM, atol=1e-3, rtol=0)
        items = list(judge_items(sessions[:1], images[:1, :2, :1], [0], ('if', 'cc')).values())
        ways = ('number', 'think', 'questions')
        asks = [Ask(i.images, prompt(TINY_PROMPTS, i, how), max_tokens=24) for i in items for how in ways]
        assert [r.text for r in near(asks)] == [r.text for r in far(asks)]      # word for word where nothing is drawn
    finally:
        job.send(signal.SIGKILL)
        job.end()

def test_nf4_judge_is_a_fraction_and_says_nearly_the_same():
    full = load_judge('tiny:logit')
    small = load_judge('tiny+nf4:logit')
    assert small.engine.quantize == 'nf4' and small.prompts is TINY_PROMPTS
    assert small.engine.model == full.engine.model + '+nf4'                           # a cache tells them apart
    a, b = (j(sessions, images[:, :2]).rewards_PGTM for j in (full, small))
    def size(judge):
        weights = dict(judge.engine.loaded[0].named_parameters()).items()
        return sum(w.numel()*w.element_size() for n, w in weights if 'language_model.layers' in n and w.numel() > 999)
    assert size(small) < size(full)/7                                                 # 4 bits of 32
    assert not torch.equal(a, b) and np.corrcoef(a.flatten(), b.flatten())[0, 1] > .9

def test_training_on_a_served_judge_records_replays_and_keeps_the_key_to_itself(tmp_path, monkeypatch, capfd):
    from mt_editflow_nb.cli.train import main
    key = 'sk-0123456789abcdefSECRET'
    monkeypatch.setenv('OPENAI_API_KEY', key)
    settings = ['sessions_per_iteration=1', 'group=2', 'num_steps=2', 'turns=2', 'iterations=2', 'eval_sessions=2',
                'lora_rank=2', 'train_timesteps=1', 'save_every=1']
    fails_from = [10**9]                                                     # the number of a call
    def answer(n, body):
        time.sleep(.05)
        return (500, f'no, {key}') if n >= fails_from[0] else Honest()(n, body)
    with Faulty(answer) as server:
        judge = f'judge=m@{server.url}:think'
        assert main([*settings, judge, '--run', str(tmp_path/'run')]) == 0
        asked = len(server.seen)
        assert 0 < asked <= 2*2*2*2 + 1                                      # one more: is the judge there
        assert main([*settings, judge, '--run', str(tmp_path/'run')]) == 0 and len(server.seen) == asked
        timings = [json.loads(x) for x in (tmp_path/'run'/'timings.jsonl').read_text().splitlines()]
        usage = [t['judge_usage'] for t in timings]
        assert sum(u['calls'] for u in usage) == asked - 1 and all(u['tokens'] for u in usage)
        assert all(t['judge'] >= .05 for t in timings)                       # its seconds keep their own name
        fails_from[0] = 0
        assert main([*settings, judge, 'seed=2', '--run', str(tmp_path/'never')]) == 2  # found before anything is done
        assert not (tmp_path/'never'/'before.safetensors').exists()
        fails_from[0] = len(server.seen) + 3
        assert main([*settings, judge, 'seed=1', '--run', str(tmp_path/'down')]) == 2
        fails_from[0] = 10**9
        assert main(['--resume', str(tmp_path/'down')]) == 0
    said = capfd.readouterr()
    assert 'scores, received none for ' in said.err and 'expected one that is ready, received ' in said.err
    assert key not in said.out + said.err
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert any(p.name == 'judge.sqlite' for p in files)
    assert not [p for p in files if key.encode() in p.read_bytes()]

def test_no_key_in_notebooks():
    root = Path(__file__).resolve().parents[1]
    kinds = ('.ipynb', '.py', '.yaml', '.md')
    folders = ('nbs', 'experiments', 'tests', 'mt_editflow_nb')
    files = [p for d in folders for p in (root/d).rglob('*') if p.suffix in kinds]
    text = ''.join(p.read_text() for p in files if p != Path(__file__).resolve())
    assert not re.findall(r'sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|Bearer [A-Za-z0-9._-]{16,}', text)
    assert not re.findall(r'''(?:OPENAI_API_KEY|HF_TOKEN)['"\]]*\s*=\s*['"]\w''', text)

def test_coarse_judge_asks_once_a_session_and_a_turn_scorer_agrees():
    with Faulty(Honest()) as server:
        coarse = Judge(engine(server), think, coarse=True)
        whole = coarse(sessions, images)
        assert whole.rewards_PGTM.shape == (4, 4, 3, 2) and len(server.seen) <= 4*4*2
        assert (whole.rewards_PGTM[:, :, :1] == whole.rewards_PGTM).all()
        for judge in (coarse, Judge(engine(server), think)):
            with TurnScorer(judge, sessions, 4, seed=3) as scorer:
                for t in range(3):
                    for p in (slice(0, 1), slice(1, 4)): scorer(t, p, images[p, :, :t + 1])
                assert torch.equal(scorer.scores(images).rewards_PGTM, judge(sessions, images, seed=3).rewards_PGTM)

@contextmanager
def scored_with_lost_sessions(lost):
    "(a scorer that has scored everything of a rollout whose first sessions get no answer, its server)."
    bad = {data_url(images[p, g, 0]) for p in range(lost) for g in range(4)}
    def fails(body): return body['messages'][0]['content'][1]['image_url']['url'] in bad
    with Faulty(lambda n, body: (500, 'no') if fails(body) else Honest()(n, body)) as server:
        judge = Judge(engine(server, give_up=1000, retries=0), think, rewards=('if',), max_failed=.25)
        with TurnScorer(judge, sessions, 4) as scorer:
            for t in range(3):
                for p in range(4): scorer(t, slice(p, p + 1), images[p:p + 1, :, :t + 1])
            yield scorer, server

def test_a_piece_of_a_rollout_may_fail_altogether():
    with scored_with_lost_sessions(1) as (scorer, _):
        scores = scorer.scores(images)
        assert 0 < scores.failed <= 12 and scores.rewards_PGTM.shape == (4, 4, 3, 1)

def test_nothing_more_is_asked_once_too_much_of_the_whole_rollout_is_lost():
    with scored_with_lost_sessions(4) as (scorer, server):
        with pytest.raises(InputError, match='expected at least 75% of 48 scores, received none for'):
            scorer.scores(images)
        assert len(server.seen) < 48*.6

def test_quality_is_a_third_reward():
    with Faulty(Honest()) as server:
        scores = Judge(engine(server), think, rewards=('if', 'cc', 'quality'))(sessions[:1], images[:1])
    assert scores.names == ('if', 'cc', 'quality') and scores.rewards_PGTM.shape[-1] == 3
    with pytest.raises(InputError, match="'quality'"): Judge(None, None, TINY_PROMPTS, rewards=('quality',))
