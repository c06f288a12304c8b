"Judges behind servers that restart, refuse, and answer in many forms; every right value is written by hand."
import datetime, json, math, os, socket, sqlite3, threading, time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pytest, torch
from helpers import PATIENCE, wait_for
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.rewards import servers
from mt_editflow_nb.rewards.cache import Cached, merge_caches
from mt_editflow_nb.rewards.cube import Judge, Scores, TurnScorer, judge_usage, load_judge
from mt_editflow_nb.rewards.engines import Ask, Reply
from mt_editflow_nb.rewards.judges import Item, PROMPTS, load_mode
from mt_editflow_nb.rewards.servers import Server
from mt_editflow_nb.training.train import hint_at_resume

class Scripted(ThreadingHTTPServer):
    "A chat server on loopback. `script(request)` gives the fields of a choice, or a status and an error's message."
    daemon_threads = True
    allow_reuse_address = True
    def __init__(self, script, port=0, models=200):
        self.script = script
        self.models = models
        self.listed = []
        self.requests = []
        super().__init__(('127.0.0.1', port), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/v1'
        threading.Thread(target=self.serve_forever, daemon=True).start()
    def __enter__(self): return self
    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
    def handle_error(self, *_): pass

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self): self.answer(self.server.models, dict(data=self.server.listed))
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.requests.append(request)
        said = self.server.script(request)
        if isinstance(said, tuple): return self.answer(said[0], dict(error=dict(message=said[1], code=None)))
        if isinstance(said, str): said = dict(message=dict(role='assistant', content=said))
        choice = dict(index=0, finish_reason='stop') | said
        self.answer(200, dict(id='x', object='chat.completion', created=0, model='m', choices=[choice],
                              usage=dict(prompt_tokens=5, completion_tokens=2, total_tokens=7)))
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "The client's pauses between tries, a hundredth as long; no proxy of this machine."
    import openai._base_client as client
    for name in ('INITIAL_RETRY_DELAY', 'MAX_RETRY_DELAY'): monkeypatch.setattr(client, name, .01)
    for name in [n for n in os.environ if n.lower().endswith('_proxy')]: monkeypatch.delenv(name)

@pytest.fixture
def waits(monkeypatch):
    "Lines in which a judge says that it waits for its server; `waits.then` is called with each."
    class Lines(list):
        def then(self, line): pass
    lines = Lines()
    say = servers._say
    def noted(line):
        say(line)
        if 'waiting up to' in line:
            lines.append(line)
            lines.then(line)
    monkeypatch.setattr(servers, '_say', noted)
    return lines

def closed_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

picture = np.zeros((8, 8, 3), np.uint8)
item = Item('if', (picture, picture + 1), ('make it red',))
good = '{"reasoning": "it is red", "score": 6}'
def verdict(script, mode='think', **options):
    with Scripted(script) as server:
        judge = load_judge(f'm@{server.url}:{mode}', **options)
        return judge.mode(judge.engine, [item], judge.prompts)[0], server.requests

def message(content, **more): return dict(message=dict(role='assistant', content=content, **more))

@pytest.mark.parametrize('answer', [
    good, '<think>Perhaps {"score": 1}? No.</think>' + good, 'Perhaps {"score": 1}.</think>' + good,
    "{'reasoning': 'red', 'score': 6}", '{"reasoning": "red", "score": 6,}', '{"reasoning": "a\nb", "score": "6"}',
    'So:\n```json\n{"score": "6/9"}\n```\nDone.',
    message([dict(type='text', text=good)]), message(good, reasoning_content='Perhaps {"score": 1}?')])
def test_forms_of_answers_that_are_scores(answer):
    assert verdict(lambda request: answer)[0].score == 6/9

cut = dict(finish_reason='length')
filtered = dict(finish_reason='content_filter')

@pytest.mark.parametrize('answer, reason', [
    (message('<think>Perhaps {"score": 1}? But wait') | cut, 'cut at 512 tokens'),
    ('<think>Perhaps {"score": 1}? But wait', 'after the thought'),
    (message('{"draft": {"score": 1}, "sco') | cut, 'cut at 512 tokens'),
    (message(None, reasoning='I think {"score": 7}') | cut, 'cut at 512 tokens'),
    (message(None, refusal='I cannot judge this.') | filtered, 'content filter: I cannot judge this.'),
    ((400, "Unsupported parameter 'max_tokens', use 'max_completion_tokens'"), 'judge_options: {max_completion_tokens'),
    ((400, 'At most 1 image(s) may be provided in one prompt.'), '--limit-mm-per-prompt')])
def test_forms_of_answers_that_are_none_say_why(answer, reason):
    v, _ = verdict(lambda request: answer)
    assert math.isnan(v.score) and reason in v.error and '\n' not in v.error

def test_settings_reach_the_request():
    v, (request,) = verdict(lambda request: good, max_completion_tokens=900, temperature=1, extra_body=dict(top_k=5))
    assert v.score == 6/9 and 'max_tokens' not in request
    assert (request['max_completion_tokens'], request['temperature'], request['top_k']) == (900, 1, 5)
    v, (request,) = verdict(lambda request: '6', 'direct', max_tokens=77)
    assert v.score == 6/9 and request['max_tokens'] == 77
    v, _ = verdict(lambda request: message('<think>But wait') | cut, max_tokens=900)
    assert 'the answer was cut at 900 tokens' in v.error
    with pytest.raises(InputError, match="judge_options.max_\\w+: expected one of .*did you mean 'max_tokens'"):
        load_judge('m@http://a/v1:think', max_token=9)

def likely(*tokens):
    tops = [dict(token=t, bytes=b, logprob=math.log(p)) for t, b, p in tokens]
    return message('7') | dict(logprobs=dict(content=[dict(tops[0], top_logprobs=tops)]))

def test_probabilities_by_bytes_and_with_few_of_them():
    tops = likely(('bytes:\\x37', [0x37], .6), ('\u0120' + '8', None, .2))
    v, (request,) = verdict(lambda request: tops, 'logit', top_logprobs=5)
    assert v.score == pytest.approx((7*.6 + 8*.2)/.8/9) and request['top_logprobs'] == 5

@pytest.mark.parametrize('script', [
    lambda request: (400, 'Requested sample logprobs of 20, which is greater than max allowed: 5'),
    lambda request: (400, 'logprobs are not supported with reasoning models'),
    lambda request: (404, 'no such endpoint') if 'questions' in request else '7'])
def test_a_server_without_probabilities_is_named(script):
    with pytest.raises(InputError, match='expected token probabilities.*received none.*top_logprobs') as e:
        verdict(script, 'logit')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('change', [dict(logprob=None), dict(logprob=3000), dict(logprob='no'), dict(logprob=[0])])
def test_probabilities_that_are_none_say_so(change):
    tops = [dict(token='7', bytes=[0x37]) | change]
    answer = message('7') | dict(logprobs=dict(content=[dict(tops[0], top_logprobs=tops)]))
    v, _ = verdict(lambda request: answer, 'logit')
    assert math.isnan(v.score) and 'something other than probabilities' in v.error

@pytest.mark.parametrize('spelled', ['7', [300], 7, [None]])
def test_bytes_that_are_none_leave_the_text_of_a_token(spelled):
    assert verdict(lambda request: likely(('7', spelled, 1.)), 'logit')[0].score == 7/9

@pytest.mark.parametrize('answer', [message([dict(type='text', text=7)]), message(None, refusal=dict(why='no'))])
def test_answers_without_words_are_no_scores(answer):
    v, _ = verdict(lambda request: answer)
    assert math.isnan(v.score) and v.error

@pytest.mark.parametrize('name', ['edival@http://127.0.0.1:9', 'verifier'])
@pytest.mark.parametrize('share', ['all', None, True, -1])
def test_a_share_is_a_number(name, share):
    with pytest.raises(InputError, match='^max_failed: expected a share'): load_judge(name, max_failed=share)

def test_readiness_is_one_question():
    with Scripted(lambda request: good) as server:
        load_judge(f'm@{server.url}:think', cache=None).check_ready()
        assert len(server.requests) == 1
    for mode, script, reason in (('logit', lambda r: (400, 'logprobs are not supported'), 'token probabilities'),
                                 ('logit', lambda r: likely(('<think>', None, .99)), 'probability 0.000'),
                                 ('think', lambda r: message('<think>so') | cut, 'cut at 512 tokens')):
        with Scripted(script) as server, pytest.raises(InputError, match=reason):
            load_judge(f'm@{server.url}:{mode}').check_ready()
    gone = load_judge(f'm@http://127.0.0.1:{closed_port()}/v1:think', retries=0)
    with pytest.raises(InputError, match='connection refused'): gone.check_ready() # it does not wait half an hour
    assert gone.engine.judge_wait == 1800

def test_causes_of_lost_connections(monkeypatch, tmp_path):
    ask = [Ask((), 'how good?')]
    def error(url): return Server('m', url, retries=0, judge_wait=0)(ask)[0].error
    assert 'connection refused' in error(f'http://127.0.0.1:{closed_port()}/v1')
    assert 'the name no-such-host.invalid is not known' in error('http://no-such-host.invalid/v1')
    with Scripted(lambda request: good) as server:
        assert 'it does not speak TLS' in error(server.url.replace('http://', 'https://'))
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path/'none.pem'))
    with pytest.raises(InputError, match='^SSL_CERT_FILE: expected a path that is there'):
        error('https://127.0.0.1:9/v1')
    (tmp_path/'none.pem').write_text('no certificate')
    with pytest.raises(InputError, match='^SSL_CERT_FILE: expected a file of cert'): error('https://127.0.0.1:9/v1')
    monkeypatch.delenv('SSL_CERT_FILE')
    monkeypatch.setenv('HTTP_PROXY', f'http://me:secret@127.0.0.1:{closed_port()}')
    said = error('http://judge.example/v1')
    assert 'the proxy that HTTP_PROXY names' in said and 'refused' in said and 'secret' not in said
    monkeypatch.setenv('ALL_PROXY', 'socks5://me:secret@127.0.0.1:1')
    with pytest.raises(InputError, match='^ALL_PROXY: expected .*HTTP proxy.*socks5') as e:
        error('http://judge.example/v1')
    assert 'secret' not in str(e.value) and '\n' not in str(e.value)

def test_a_gateway_is_not_the_server():
    "A 502 comes from a proxy or gateway: the message says so, and which address it stands at."
    with Scripted(lambda request: (502, 'Bad Gateway')) as server:
        server.models = 502
        judge = load_judge(f'm@{server.url}:think', retries=0, judge_wait=0)
        with pytest.raises(InputError) as e: judge.check_ready()
        said = str(e.value)
        assert server.url in said and 'a proxy or gateway answered' in said and '502 Bad Gateway' in said
        assert '\n' not in said
        server.models = 200                                         # it stands behind a gateway that says it is there
        judge = load_judge(f'm@{server.url}:think', retries=0, judge_wait=0)
        with pytest.raises(InputError, match=f'expected one that is ready, received m at {server.url}: a proxy or'):
            judge.check_ready()
        with pytest.raises(InputError, match=f'most often at {server.url}: a proxy or gateway answered'):
            judge(shape_sessions(1, turns=1, seed=3), np.zeros((1, 1, 1, 48, 48, 3), np.uint8))
    with Scripted(lambda request: (500, 'out of memory')) as server:
        reply, = Server('m', server.url, retries=0)([Ask((), 'how good?')])
    assert reply.error == 'the server failed (500 Internal Server Error): out of memory'

@pytest.mark.parametrize('options, reason', [
    (dict(concurrency=0), 'concurrency: expected a whole number of at least 1'), (dict(timeout=0), 'timeout'),
    (dict(max_tokens='many'), 'max_tokens'), (dict(temperature=-1), 'temperature'),
    (dict(extra_body=[1]), 'extra_body'), (dict(max_token=5), "did you mean 'max_tokens'"),
    (dict(name='x'), 'judge_options'), (dict(max_failed=2), 'max_failed'),
    (dict(progress=1), 'progress: expected true or false'), (dict(picture='gif'), 'picture'),
    (dict(model='x'), "judge_options.model: expected one of .*received an unknown name"),
    (dict(concurrency=None), 'concurrency: expected a whole number'),
    (dict(timeout=None), 'timeout: expected a number'),
    (dict(max_failed='all'), '^max_failed: expected a share'), (dict(max_failed=None), '^max_failed: expected a share'),
    (dict(extra_body=dict(since=datetime.date(2024, 1, 1))), '^extra_body: expected fields')])
def test_settings_are_of_their_kind(options, reason):
    with pytest.raises(InputError, match=reason) as e: load_judge('m@http://127.0.0.1:9/v1:think', **options)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('address', ['http://', 'http://127.0.0.1:99999/v1', 'http://a b/v1', 'http://[::1/v1',
                                     'http://me:secret@host/v1', 'httpx://host/v1', 'http://host:port/v1'])
def test_what_is_no_address_is_found_at_once(address):
    with pytest.raises(InputError, match='^judge: expected an address') as e: load_judge(f'm@{address}:think')
    assert 'secret' not in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['@http://host/v1:logit', ':think', 'verifier:binry', 'tiny', 'tiny:'])
def test_what_is_no_judge(name):
    with pytest.raises(InputError, match='^(judge|mode): expected '): load_judge(name)

@pytest.mark.parametrize('fields, message', [
    (dict(eval_judge_options=dict(a=1)), 'eval_judge_options: expected no settings'),
    (dict(preset=[1]), 'preset: expected one of'),
    (dict(attention_backend='flsh'), 'attention_backend: expected one of'),
    (dict(num_steps=10**8), 'num_steps: expected a number less'),
    (dict(judge='tiny:think', judge_options={1: 2}), 'judge_options: expected settings of an engine'),
    (dict(judge='tiny:think', judge_options=dict(model='x')), 'judge_options: expected settings of an engine'),
    (dict(judge='tiny:think', judge_options=dict(max_failed=None)), 'max_failed: expected a share'),
    (dict(judge='m@http://a/v1:think', judge_options=dict(extra_body=dict(since=datetime.date(2024, 1, 1)))),
     'extra_body: expected fields')])
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(InputError, match=f'^{message}') as e: make_config(fields)
    assert '\n' not in str(e.value)

def test_a_key_with_a_line_break_is_one_line(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'very-secret\n')
    with pytest.raises(InputError, match='^OPENAI_API_KEY: expected one line') as e:
        Server('m', 'http://127.0.0.1:9/v1')([Ask((), 'x')])
    assert 'secret' not in str(e.value) and '\n' not in str(e.value)

def test_a_server_that_restarts_is_waited_for_with_one_line(waits, capfd):
    port = closed_port()
    answers = []
    judge = Judge(Server('m', f'http://127.0.0.1:{port}/v1', retries=0, judge_wait=PATIENCE), load_mode('think'))
    waits.then = lambda line: answers.append(Scripted(lambda request: good, port))
    sessions = shape_sessions(1, turns=2, seed=3)
    images = np.zeros((1, 2, 2, 48, 48, 3), np.uint8)
    scores = judge(sessions, images)
    assert scores.failed == 0 and judge_usage(scores)['calls'] == 8
    said = capfd.readouterr().err
    assert said.count('waiting up to 10 min') == said.count('answers again') == 1 and 'connection refused' in said
    answers[0].shutdown()

def test_a_server_that_stays_away_stops_the_run_and_what_was_said_is_kept(tmp_path, capfd):
    servers = [Scripted(lambda request: good)]
    def judge():
        return load_judge(f'm@{servers[0].url}:think', cache=tmp_path/'judge.sqlite', retries=0, judge_wait=1)
    sessions = shape_sessions(2, turns=1, seed=3)
    images = np.zeros((2, 2, 1, 48, 48, 3), np.uint8)
    images[1] = 7
    judge()(sessions[:1], images[:1])
    servers[0].shutdown()
    servers[0].server_close()
    said = 'connection refused.*waited .* minutes.*before is kept; go on when it is back: mtef_train --resume runs/x$'
    with pytest.raises(InputError, match=said) as e, hint_at_resume('runs/x'): judge()(sessions, images)
    assert '\n' not in str(e.value)
    servers[0] = Scripted(lambda request: good, servers[0].server_port)
    assert judge()(sessions, images).failed == 0
    asked = [json.dumps(r['messages']) for r in servers[0].requests]
    assert len(asked) == len(set(asked)) == 2   # the first session's were on record; equal pictures are one call
    servers[0].shutdown()

def test_interrupt_ends_the_waiting(waits):
    judge = Judge(Server('m', f'http://127.0.0.1:{closed_port()}/v1', retries=0, judge_wait=3600), load_mode('think'))
    sessions = shape_sessions(1, turns=1, seed=3)
    images = np.zeros((1, 2, 1, 48, 48, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt):
        with TurnScorer(judge, sessions, 2) as scorer:
            scorer(0, slice(0, 1), images)
            wait_for(lambda: waits)
            interrupted = time.monotonic()
            raise KeyboardInterrupt
    assert time.monotonic() - interrupted < PATIENCE                         # it ends now, not in an hour

def test_several_servers_take_turns_and_the_dead_one_is_left_out_until_it_is_back():
    gate = threading.Barrier(4, timeout=PATIENCE)
    def together(request):
        gate.wait()                                                          # four calls at once: two a server
        return good
    with Scripted(together) as a, Scripted(together) as b:
        judge = load_judge(f'm@{a.url},{b.url}:think', concurrency=4)
        assert [v.score for v in judge.mode(judge.engine, [item]*4, PROMPTS)] == [6/9]*4
        assert len(a.requests) == len(b.requests) == 2
    port = closed_port()
    with Scripted(lambda request: good) as a:
        server = Server('m', f'{a.url},http://127.0.0.1:{port}/v1', retries=0, concurrency=1)
        server.absent = {}
        for n in range(3): assert [r.text for r in server([Ask((), f'{n}/{i}') for i in range(3)])] == [good]*3
        with Scripted(lambda request: 'I am back', port):
            a.script = lambda request: (500, 'broken')
            assert server([Ask((), 'now?')])[0].text == 'I am back' and not server.absent

def test_unusable_answers_are_asked_again_after_the_repair(tmp_path):
    says = ['I cannot tell.']
    with Scripted(lambda request: says[0]) as server:
        def judge(): return load_judge(f'm@{server.url}:think', cache=tmp_path/'judge.sqlite', max_failed=1)
        def scores(j): return j(shape_sessions(1, turns=1, seed=3), np.zeros((1, 2, 1, 48, 48, 3), np.uint8))
        assert scores(judge()).failed == 4 and scores(judge()).failed == 4
        says[0] = good
        assert scores(judge()).failed == 0
        n = len(server.requests)
        assert scores(judge()).failed == 0 and len(server.requests) == n
        usage = judge_usage(scores(judge()))
        assert usage['calls'] == 0 and usage['hits'] == 4
        offline = load_judge(f'm@{server.url}:think', cache=tmp_path/'judge.sqlite', offline=True)
        assert scores(offline).failed == 0 and len(server.requests) == n

def test_another_address_is_another_judge(tmp_path):
    def score(server, **options):
        judge = load_judge(f'm@{server.url}:think', cache=tmp_path/'judge.sqlite', **options)
        return judge.mode(judge.engine, [item], judge.prompts)[0].score
    with Scripted(lambda request: good) as a, Scripted(lambda request: '{"score": 9}') as b:
        assert (score(a), score(b), score(a)) == (6/9, 1, 6/9) and len(a.requests) == len(b.requests) == 1
        score(a, picture='jpeg')
        assert len(a.requests) == 2 and 'data:image/jpeg' in json.dumps(a.requests[1])

def test_another_model_under_the_same_name_is_asked_anew(tmp_path, capfd):
    "What vLLM lists: `root` is the checkpoint, `created` the start of the server, which is no other model."
    ask = Ask((), 'how many?')
    def listing(root, created): return dict(id='m', object='model', owned_by='vllm', root=root, created=created)
    with Scripted(lambda request: server.answer) as server:
        def answered_by(root, created, answer):
            server.listed = [listing('elsewhere', 0) | dict(id='other'), listing(root, created)]
            server.answer = answer
            engine = Cached(Server('m', server.url), tmp_path/'c.sqlite')
            said = [r.text for r in engine([ask, Ask((), f'at {created}')])]     # the second one is always new
            return said[0], 'another model' in capfd.readouterr().err
        assert answered_by('/models/old', 1, 'one') == ('one', False)
        assert answered_by('/models/old', 2, 'two') == ('one', False)            # a restart
        assert answered_by('/models/new', 3, 'three') == ('three', True)
        assert answered_by('/models/new', 4, 'four') == ('three', False)         # said once
        offline = Cached(Server('m', server.url), tmp_path/'c.sqlite', offline=True)
        assert [r.text for r in offline([ask])] == ['three']
        assert answered_by('/models/old', 5, 'five') == ('one', True)
        server.listed = []                                                       # a server that says nothing
        assert Cached(Server('m', server.url), tmp_path/'c.sqlite')([ask])[0].text == 'one'

def test_a_cache_of_an_earlier_version_is_gone_on_with(tmp_path):
    "It has no table of what was served: whoever answers first is taken for who answered then."
    with Scripted(lambda request: 'new') as server:
        engine = Server('m', server.url)
        ask = Ask((), 'how many?')
        older = Cached(engine, tmp_path/'c.sqlite')
        older([ask])
        with sqlite3.connect(tmp_path/'c.sqlite') as db: db.execute('drop table serving')
        server.listed = [dict(id='m', root='/models/judge')]
        again = Cached(engine, tmp_path/'c.sqlite')
        again([ask, Ask((), 'another question')])
        assert again.hits == 1 and len(server.requests) == 2

def test_pictures_are_encoded_once(monkeypatch):
    with Scripted(lambda request: good) as server:
        judge = load_judge(f'm@{server.url}:think', picture='webp')
        images = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 48, 48, 3), np.uint8)
        judge(shape_sessions(1, turns=2, seed=3), images)
        assert judge.engine.pictures.encoded == 5 and len(server.requests) == 8   # a first picture and four results

def test_joint_scores_have_masks_of_their_own():
    says = ['{"success": 9, "preservation": 3}', '{"success": "9", "preservation": "unclear"}',
            '{"success": 12, "preservation": 0}', 'no']
    images = np.zeros((1, 4, 1, 48, 48, 3), np.uint8)
    with Scripted(lambda request: says[min(len(server.requests), 4) - 1]) as server:
        judge = load_judge(f'm@{server.url}:joint', max_failed=1, concurrency=1)
        scores = judge(shape_sessions(1, turns=1, seed=3), images)
    got = scores.rewards_PGTM[0, :, 0]
    assert got[0].tolist() == [1, np.float32(1/3)] and got[1, 0] == 1 and got[1, 1].isnan()
    assert got[2, 0].isnan() and got[2, 1] == 0 and got[3].isnan().all()
    assert scores.success_PGT[0, :2, 0].tolist() == [1, 1] and scores.success_PGT[0, 2:, 0].isnan().all()
    assert judge_usage(scores)['calls'] == 4 + 2                             # the last is asked three times

@pytest.mark.parametrize('name', ('editscore', 'unifiedreward'))
def test_reward_models_answer_with_a_list_of_two(name):
    with Scripted(lambda request: '{"reasoning": "fine", "score": [20, 5]}') as server:
        judge = load_judge(f'{name}:m@{server.url}')
        scores = judge(shape_sessions(1, turns=1, seed=3), np.zeros((1, 1, 1, 48, 48, 3), np.uint8))
    assert scores.rewards_PGTM.flatten().tolist() == pytest.approx([.8, .2]) and len(server.requests) == 1

def test_long_instructions_are_named_by_session_and_turn():
    session, = shape_sessions(1, turns=2, seed=3)
    session.instructions[1] = 'make it red and ' * 10_000
    with pytest.raises(InputError, match=f'^session {session.id}, turn 2: expected .* at most 5000 characters'):
        load_judge('tiny:logit').check_ready([session])
    with pytest.raises(InputError, match='^instructions: expected at most 10000 characters'):
        load_judge('tiny:logit')([session], np.zeros((1, 1, 2, 48, 48, 3), np.uint8))

def test_missing_is_not_failed():
    with Scripted(lambda request: 'I cannot tell.') as server:
        judge = load_judge(f'm@{server.url}:think', max_failed=1)
        scores = judge(shape_sessions(1, turns=1, seed=3), np.zeros((1, 1, 1, 48, 48, 3), np.uint8))
    assert scores.success_PGT.dtype == torch.float32 and scores.success_PGT.isnan().all()
    assert scores.rewards_PGTM.isnan().all()

def test_caches_of_several_processes_are_joined(tmp_path, monkeypatch):
    class Says:
        model = 'm'
        def __init__(self, text): self.text = text
        def __call__(self, asks): return [Reply(self.text) for _ in asks]
    asks = [Ask((), str(i)) for i in range(4)]
    for rank in (1, 2):
        monkeypatch.setenv('RANK', str(rank))
        Cached(Says(f'process {rank}'), tmp_path/'judge.sqlite')(asks[rank:rank + 2])
    monkeypatch.setenv('RANK', '0')
    first = Cached(Says('process 0'), tmp_path/'judge.sqlite')
    assert [r.text for r in first(asks)] == ['process 0', 'process 1', 'process 1', 'process 2'] and first.calls == 1
    monkeypatch.setenv('RANK', '1')                   # a resume: every process begins with everything
    assert Cached(Says('nobody'), tmp_path/'judge.sqlite')(asks[:1])[0].text == 'process 0'
    assert merge_caches(tmp_path/'all.sqlite', [tmp_path/'judge.sqlite', tmp_path/'none.sqlite']) == 4

nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)

@pytest.mark.parametrize('change, reason', [
    (lambda s: None, 'a judge that returns `Scores`'), (lambda s: s.rewards_PGTM, 'a judge that returns `Scores`'),
    (lambda s: replace(s, rewards_PGTM=s.rewards_PGTM.transpose(0, 1)), 'the shape of the rollout'),
    (lambda s: replace(s, rewards_PGTM=s.rewards_PGTM*1e30), 'values in'),
    (lambda s: replace(s, names=('cc', 'if')), 'in this order'),
    (lambda s: replace(s, rewards_PGTM=s.rewards_PGTM.to('meta')), 'a tensor with values'),
    (lambda s: replace(s, rewards_PGTM=nested), 'a dense tensor'),
    (lambda s: replace(s, success_PGT=nested), 'a dense tensor'),
    (lambda s: replace(s, calls=(dict(error='', tokens='3', seconds=0.),)), 'a number'),
    (lambda s: replace(s, calls=(dict(error='', tokens=None, seconds=0.),)), 'a number'),
    (lambda s: replace(s, rewards_PGTM=s.rewards_PGTM.numpy()), 'a torch tensor')])
@pytest.mark.parametrize('by_turn', (True, False))
def test_scores_of_a_users_own_judge_are_checked_where_they_enter(change, reason, by_turn):
    sessions = shape_sessions(2, turns=1, seed=3)
    images = np.zeros((2, 3, 1, 48, 48, 3), np.uint8)
    class Theirs:
        rewards = ('if', 'cc')
        def score(self, sessions, images, turn=None, **kw):
            half = torch.full((2, 3, 1), .5)
            return change(Scores(('if', 'cc'), torch.stack([half, half], -1), half.round(), half, half))
        def __call__(self, sessions, images): return self.score(sessions, images)
        def check(self, scores, total=None): pass
    Theirs.by_turn = by_turn
    with pytest.raises(InputError, match=f'^judge.*{reason}') as e, TurnScorer(Theirs(), sessions, 3) as scorer:
        scorer(0, slice(0, 2), images)
        scorer.scores(images)
    assert '\n' not in str(e.value)

def test_a_key_is_masked_before_a_message_is_cut(monkeypatch):
    key = 'sk-' + 'ab'*12
    monkeypatch.setenv('OPENAI_API_KEY', key)
    for before in range(160, 201):
        line = servers._line(f'{"x"*before}{key} is refused')
        assert 'sk-' not in line and len(line) <= 200
