"EdiVal's rules as a training reward: scripted tools behind the real server, the tiny editor, values by hand."
import socket, threading, time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from helpers import PATIENCE, wait_for
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.eval import main as mtef_eval
from mt_editflow_nb.cli.tools import names_of_tools
from mt_editflow_nb.data.files import InputError, read_json_lines
from mt_editflow_nb.data.sessions import save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.evaluation.truth import edival_outcomes, edival_session, pixel_features, shape_ask, shape_detect
from mt_editflow_nb.rewards.cube import EdivalJudge, load_judge
from mt_editflow_nb.rewards.edival_models import float_pixels
from mt_editflow_nb.rewards.edival_rules import EdivalTools, Found, NoAnswer
from mt_editflow_nb.rewards.edival_tools import LocalTools, RemoteTools, tools_app
from mt_editflow_nb.training.source import session_source
from mt_editflow_nb.training.train import train
from test_judge_servers import impatient, waits  # noqa: F401 fixtures

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

class Served:
    "The server of `mtef_tools` around scripted tools, on loopback; how many requests each call of a kind had."
    def __init__(self, *tools, port=None):
        import uvicorn
        self.tools = tools
        self.port = port or free_port()
        app = tools_app(EdivalTools(*tools), dict(detector='scripted'))
        self.server = uvicorn.Server(uvicorn.Config(app, '127.0.0.1', self.port, log_level='critical'))
        self.url = f'http://127.0.0.1:{self.port}'
        self.thread = threading.Thread(target=self.server.run, daemon=True)
    def __enter__(self):
        self.thread.start()
        def has_started():
            assert self.thread.is_alive(), 'the server has ended'
            return self.server.started
        wait_for(has_started)
        return self
    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), 'waited in vain'

class Counting:
    "A tool that is asked in batches, and remembers how large they were."
    def __init__(self, answer):
        self.answer = answer
        self.batches = []
    def many(self, requests):
        self.batches.append(len(requests))
        return [self.answer(r) for r in requests]

def test_a_server_says_how_its_model_is_asked():
    "Answers on file are those of a server that says the same: one that asks otherwise says something else."
    modes = '', ':direct', ':logit', ':think@2', ':think@4'
    names = [names_of_tools(LocalTools(vlm=f'tiny{mode}')) for mode in modes]
    assert names[0] == names[1] and len({n['vlm'] for n in names}) == 4 and 'questions' not in names[0]
    own = LocalTools(vlm='tiny')
    own.asker.questions = own.asker.questions | {'added': 'is there one?'}
    assert names_of_tools(own) | names[0] != names[0]

@pytest.fixture(scope='module')
def told():
    "Sessions with EdiVal's lists and the shape world's instructions, which the tiny editor can read."
    pairs = [(s, edival_session(s)) for s in shape_sessions(24, 3, 'train', seed=2)]
    return [replace(edival, instructions=s.instructions) for s, edival in pairs if edival][:6]

settings = dict(sessions_per_iteration=2, group=2, num_steps=2, lora_rank=2, iterations=1, heldout='training')
same_box = Found(np.array([[.1, .1, .3, .3]]), np.array([.9]))

def of_run(folder, sessions, judge):
    "Sessions in a file, and a configuration of one iteration over them."
    file = save_sessions(sessions, folder/'data')
    return make_config(settings | dict(sessions=str(file), judge=judge, eval_judge=judge))

def constant(request): return torch.ones(len(request.images), 4), torch.ones(len(request.images), 16, 4)

def test_a_run_of_one_iteration_with_a_scripted_server(told, tmp_path):
    """The detector sees the same box everywhere, the model says yes, and no feature ever changes.

    So added, replaced and recoloured things count as done, nothing was removed or moved, and no rule can read a
    background in the shape world's words. Consistency is 1, or one half where a changed background makes it void."""
    detector = Counting(lambda r: same_box)
    vlm = Counting(lambda r: 'Yes')
    with Served(detector, vlm, Counting(constant)) as server:
        config = of_run(tmp_path, told, f'edival@{server.url}')
        train(config, tmp_path/'run', progress=False)
        trained_on = session_source(config).batch(0)
    row, = read_json_lines(tmp_path/'run'/'metrics.jsonl')
    done = ('color_alter', 'subject_replace', 'subject_add')
    follows = np.array([[kind in done for kind in s.task_types] for s in trained_on])
    keeps = np.array([[1 if same else .5 for same in s.meta['bg_consistency']] for s in trained_on])
    assert follows.any() and not follows.all()
    assert row['if'] == pytest.approx(follows.mean(0)) and row['cc'] == pytest.approx(keeps.mean(0))
    assert row['all_right'] == pytest.approx(np.cumprod(follows, 1).mean(0))
    assert max(detector.batches) > 1 and max(vlm.batches) > 1            # together; what members ask alike, once

def test_server_and_process_give_the_same_as_the_benchmark(told):
    "The editor's own pictures, scored through JSON, in this process, and by the benchmark's path."
    images_PGTHWC = rollout(load_editor(), told, group=1, num_steps=5, seed=0).images_PGTHWC
    tools = shape_detect, shape_ask, pixel_features
    with Served(*tools) as server: served = load_judge(f'edival@{server.url}')(told, images_PGTHWC)
    here = EdivalJudge(SimpleNamespace(tools=EdivalTools(*tools)))(told, images_PGTHWC)
    outcomes = edival_outcomes(told, images_PGTHWC[:, 0])
    for scores in (served, here):
        np.testing.assert_array_equal(scores.success_PGT[:, 0], outcomes.success_IT)
        np.testing.assert_allclose(scores.object_cc_PGT[:, 0], outcomes.object_cc_IT, atol=1e-6)
        np.testing.assert_allclose(scores.background_cc_PGT[:, 0], outcomes.background_cc_IT, atol=1e-6)
    assert 0 < outcomes.success_IT.mean() < 1

def test_sessions_without_lists_are_refused_before_anything_is_loaded(tmp_path, capsys):
    bare = shape_sessions(2, 1, 'train')
    config = of_run(tmp_path, bare, 'edival')
    with pytest.raises(InputError, match=r"session '.*': expected EdiVal-Bench's `format_instructions` in `meta`"):
        train(config, tmp_path/'run', progress=False)
    assert not (tmp_path/'run').exists()
    assert mtef_eval(['--n', '2', '--judge', 'edival', '--out', str(tmp_path/'out')]) == 2
    error = capsys.readouterr().err
    assert 'mtef_data make writes them' in error and error.count('\n') == 1

def test_a_tool_that_fails_leaves_its_scores_out(told):
    "Half of the questions have no answer: those turns are NaN in IF, and the run stops beyond the allowed share."
    silent = Counting(lambda r: NoAnswer('it thought for too long'))
    pictures = np.stack([np.stack([np.asarray(s.image)]*3)[None] for s in told])
    with Served(Counting(lambda r: same_box), silent, Counting(constant)) as server:
        judge = load_judge(f'edival@{server.url}', max_failed=1)
        scores = judge(told, pictures)
        by_model = ('color_alter', 'subject_add', 'subject_replace', 'position_change')
        asked = np.array([[kind in by_model for kind in s.task_types] for s in told])
        np.testing.assert_array_equal(scores.rewards_PGTM[:, 0, :, 0].isnan(), asked)
        assert not scores.rewards_PGTM[..., 1].isnan().any()
        judge.max_failed = 0
        with pytest.raises(InputError, match='received none for .* it thought for too long'): judge(told, pictures)

def test_a_server_that_stays_away_is_one_line(told):
    judge = load_judge(f'edival@http://127.0.0.1:{free_port()}', retries=0)
    with pytest.raises(InputError, match='nobody listens there'): judge.check_ready(told)

def test_a_server_of_tools_that_restarts_is_waited_for_with_one_line(told, waits, capfd):  # noqa: F811
    "It is gone when the first call is made, and comes when it is waited for; who interrupts need not wait for it."
    pictures = np.stack([np.stack([np.asarray(s.image)]*3)[None] for s in told[:1]])
    port = free_port()
    tools = [Counting(lambda r: same_box), Counting(lambda r: 'Yes'), Counting(constant)]
    judge = load_judge(f'edival@http://127.0.0.1:{port}', retries=0, judge_wait=3600)
    began = []
    over = threading.Event()
    waits.then = lambda line: began.append(Served(*tools, port=port).__enter__())
    assert not judge.score(told[:1], pictures).rewards_PGTM[..., 1].isnan().any()
    began[0].__exit__()
    said = capfd.readouterr().err
    assert said.count('waiting up to 60 min') == said.count('answers again') == 1 and 'nobody listens' in said
    def interrupt():
        while not over.wait(.05): judge.cancel()
    interrupting = threading.Thread(target=interrupt)
    interrupted = time.monotonic()
    waits.then = lambda line: interrupting.start()
    try:
        with pytest.raises(InputError, match='What was done before is kept'): judge.score(told[1:2], pictures)
    finally: over.set()
    assert time.monotonic() - interrupted < PATIENCE
    interrupting.join(PATIENCE)

def test_calls_at_once_are_those_of_all_processes(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert load_judge('edival@http://127.0.0.1:1', concurrency=6).engine.concurrency == 1
    assert load_judge('m@http://127.0.0.1:1/v1:think', concurrency=64).engine.concurrency == 16

def test_a_resumed_iteration_asks_the_server_nothing_again(told, tmp_path):
    "What detector and model have answered is on record, by content; the server is asked for what is new alone."
    detector = Counting(lambda r: same_box)
    vlm = Counting(lambda r: 'Yes')
    pictures = np.stack([np.stack([np.asarray(s.image)]*3)[None] for s in told])
    def scored(sessions, pictures):
        judge = load_judge(f'edival@{server.url}', cache=tmp_path/'judge.sqlite')      # as a new process loads it
        return judge(sessions, pictures).rewards_PGTM
    with Served(detector, vlm, Counting(constant)) as server:
        first = scored(told[:4], pictures[:4])
        asked = sum(detector.batches), sum(vlm.batches)
        again = scored(told[:4], pictures[:4])
        assert (sum(detector.batches), sum(vlm.batches)) == asked and min(asked) > 0
        scored(told, pictures)
        assert sum(detector.batches) > asked[0]
        load_judge(f'edival@{server.url}', cache=tmp_path/'judge.sqlite').check_ready()
        before = sum(vlm.batches)
        load_judge(f'edival@{server.url}', cache=tmp_path/'judge.sqlite').check_ready()
        assert sum(vlm.batches) == before + 1                                           # a real question, each time
    np.testing.assert_array_equal(first, again)

def test_dinov3_sees_what_the_processor_of_transformers_makes():
    "Every pixel of pictures larger and smaller than 224, alone and together; the 8-bit way is far off."
    pytest.importorskip('torchvision', reason="the processor of transformers needs torchvision")
    from transformers import ViTImageProcessorPil
    from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor
    theirs = DINOv3ViTImageProcessor()
    rng = np.random.default_rng(0)
    shapes = (512, 512), (200, 300), (91, 37), (8, 8), (224, 224)
    pictures = [Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    wanted = theirs(images=pictures, return_tensors='pt')['pixel_values']
    numbers = theirs.image_mean, theirs.image_std
    found = float_pixels(pictures, (224, 224), *numbers)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)
    torch.testing.assert_close(float_pixels(pictures[2:3], (224, 224), *numbers), wanted[2:3], atol=5e-6, rtol=0)
    rounded = ViTImageProcessorPil(size=dict(height=224, width=224), image_mean=numbers[0], image_std=numbers[1])
    assert (rounded(images=pictures, return_tensors='pt')['pixel_values'] - wanted).abs().max() > .01

def test_an_address_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(InputError, match='without a name and a password') as e: RemoteTools('http://me:hunter2@host:1')
    assert 'hunter2' not in str(e.value)

def test_a_web_server_of_another_kind_is_one_line():
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'<html>It works!</html>')
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match='^judge: expected JSON .*/tools, .*It works!'):
            RemoteTools(f'http://127.0.0.1:{server.server_port}').about     # noqa: B018 asks what the server is
    finally: server.shutdown()
