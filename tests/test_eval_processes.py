"mtef_eval in several processes: killed, gone on with by another number of them, it ends with the table of one."
import json, os, signal, socket
from unittest.mock import patch
import pytest
from helpers import Command, ask, colours, detect, wait_for
from mt_editflow_nb.cli.eval import main
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.evaluation import bench_pictures, edival, running
from test_eval import args, bench  # noqa: F401 a fixture

def lme_files(folder, sessions):
    "LME-Bench's layout, with sessions of three turns of the shape world."
    (folder/'images').mkdir(parents=True)
    told = shape_sessions(sessions, 3, 'heldout')
    for s in told: s.image.save(folder/'images'/f'{s.id}.png')
    items = [dict(id=s.id, turns=s.instructions, labels=['local']*3, category='shapes') for s in told]
    (folder/'lme_bench.json').write_text(json.dumps(dict(items=items)))
    return folder

def scripted(argv): return main(argv, tools=(detect, ask, colours))

class Killed:
    "A function that ends its process, as the kernel would, in place of one of its calls."
    def __init__(self, function, call):
        self.function = function
        self.call = call
        self.calls = 0
    def __call__(self, *args, **kw):
        self.calls += 1
        if self.calls == self.call: os.kill(os.getpid(), signal.SIGKILL)
        return self.function(*args, **kw)

def killed_while_generating(argv):
    with patch.object(edival, 'save_made', Killed(edival.save_made, 3)): return scripted(argv)

def killed_while_evaluating(argv):
    with patch.object(running, 'write_session', Killed(running.write_session, 2)): return main(argv)

def killed_at_the_second_turn(argv):
    with patch.object(bench_pictures, 'save_made', Killed(bench_pictures.save_made, 3)): return main(argv)

def started(functions, argv, tmp_path):
    "A process for each function, that find each other as those of torchrun do."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    shared = dict(WORLD_SIZE=str(len(functions)), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    return [Command(function, argv, tmp_path/f'log{i}', RANK=str(i), LOCAL_RANK=str(i), **shared)
            for i, function in enumerate(functions)]

def killed(functions, argv, tmp_path):
    "Runs until one is killed; then the others are, as a launcher does."
    commands = started(functions, argv, tmp_path)
    wait_for(lambda: any(not c.is_running() for c in commands))
    status = [c.process.exitcode for c in commands]
    for c in commands:
        if c.is_running(): c.send(signal.SIGKILL)
        c.end()
    assert -signal.SIGKILL in status, [c.said('err') for c in commands]

def ended(function, count, argv, tmp_path):
    "What the first of several processes says, all of which end well."
    commands = started([function]*count, argv, tmp_path)
    for c in commands: assert c.end()[0] == 0, c.said('err')
    assert not any(c.said('out') for c in commands[1:])
    return commands[0].said('out')

def same(a, b, *names):
    for name in names: assert (a/name).read_bytes() == (b/name).read_bytes(), name

def test_edival_generated_and_scored_by_two_then_three(bench, tmp_path):  # noqa: F811
    one = tmp_path/'one'
    several = tmp_path/'several'
    assert scripted(args(bench, one)) == 0
    killed([scripted, killed_while_generating], args(bench, several), tmp_path)
    done = {f: f.stat().st_mtime_ns for f in (several/'multipass').glob('*turn*')}
    said = ended(scripted, 3, args(bench, several), tmp_path)
    assert '2 sessions, in percent' in said and done
    assert all(f.stat().st_mtime_ns == t for f, t in done.items()), 'a picture was made twice'
    same(one, several, 'scores.csv', 'outcomes.safetensors')

def test_sessions_evaluated_by_two_then_three(tmp_path):
    def command(out): return ['--n', '5', '--turns', '2', '--steps', '1', '--batch', '1', '--out', str(tmp_path/out)]
    assert main(command('one')) == 0
    killed([killed_while_evaluating, main], command('several'), tmp_path)
    kept = len(list((tmp_path/'several'/'sessions').glob('session_*')))
    assert 0 < kept < 5
    assert '5 sessions, in percent' in ended(main, 3, command('several'), tmp_path)
    same(tmp_path/'one', tmp_path/'several', 'scores.csv', 'sessions.jsonl')

def test_a_benchmark_by_two_then_three(tmp_path):
    data = lme_files(tmp_path/'data', sessions=3)
    def command(out):
        return ['--bench', 'lme', '--data', str(data), '--judge', 'verifier', '--steps', '1', '--size', '48', '--batch',
                '1', '--out', str(tmp_path/out)]
    assert main(command('one')) == 0
    killed([killed_at_the_second_turn, main], command('several'), tmp_path)
    ended(main, 3, command('several'), tmp_path)
    same(tmp_path/'one', tmp_path/'several', 'scores.csv', 'items.csv')

@pytest.mark.parametrize('wrong', [['--n', '0'], ['--editor', 'nowhere']])
def test_what_is_wrong_is_said_once(wrong, tmp_path):
    commands = started([main]*2, [*wrong, '--out', str(tmp_path/'out')], tmp_path)
    errors = [c.end() for c in commands]
    assert [status for status, _ in errors] == [2, 2]
    lines = [line for _, said in errors for line in said.splitlines() if line.startswith('mtef_eval')]
    assert len(lines) == 1
