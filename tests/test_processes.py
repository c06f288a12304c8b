"Several processes give what one gives, and fail together."
import json, os, shlex, signal, socket, textwrap, time
import numpy as np, pytest, torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch.distributed import run as torchrun
from helpers import Command, PATIENCE, wait_for, processes as helper_processes
from mt_editflow_nb.algorithm import processes as processes_chapter
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.train import main, parse_overrides
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.training.checkpoints import _in_one_line
from readme import root

settings = ['sessions_per_iteration=2', 'group=3', 'turns=2', 'num_steps=2', 'iterations=2', 'eval_sessions=2',
            'batch=16', 'lora_rank=2', 'updates=2', 'std=global', 'whiten=true', 'lr=2e-4']

scenarios = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    from unittest.mock import patch
    import torch
    from mt_editflow_nb.algorithm import iterate
    from mt_editflow_nb.algorithm.config import make_config
    from mt_editflow_nb.algorithm.processes import processes
    from mt_editflow_nb.cli.train import main
    from mt_editflow_nb.data.files import InputError
    from mt_editflow_nb.training.train import train

    rank, count = processes()
    folder, settings = Path(sys.argv[1]), sys.argv[3:]
    real = iterate.rollout

    def nothing(iteration, batch): pass

    def memory(iteration, batch):
        if batch > 1: raise torch.OutOfMemoryError('scripted')

    def judge(iteration, batch):
        if iteration: raise InputError('judge: gone')

    def bug(iteration, batch):
        if iteration: raise KeyError('forgotten')

    def stop(iteration, batch):
        if iteration: os.kill(os.getpid(), signal.SIGTERM)

    def kill(iteration, batch):
        if iteration: os.kill(os.getpid(), signal.SIGKILL)

    def hang(iteration, batch):
        if iteration: time.sleep(60)

    for scenario in sys.argv[2].split(','):
        def scripted(*args, iteration, batch, **kw):
            if rank == 1: globals()[scenario](iteration, batch)
            return real(*args, iteration=iteration, batch=batch, **kw)
        with patch.object(iterate, 'rollout', scripted):
            try: status = main([*settings, '--run', str(folder/scenario)])
            except Exception as e: status = repr(e)
        print(f'[{scenario} {rank}: {status}]', flush=True)
    sys.exit(0 if status == 0 else 3)
""")

tiny = ['sessions_per_iteration=1', 'group=4', 'turns=1', 'num_steps=2', 'train_timesteps=1', 'iterations=2', 'batch=2',
        'eval_sessions=2', 'lora_rank=2', 'save_every=1', 'std=global']

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])

def play(tmp_path, names, settings=tiny, processes=2, **environment):
    """Run `mtef_train` in several processes, once for each scenario: (exit status, everything that was printed).

    torchrun starts them: without MPI, `accelerate launch --cpu` starts a single one. It forks them from a process that
    has imported everything."""
    (tmp_path/'scenarios.py').write_text(scenarios)
    launcher = ['--nproc_per_node', processes, '--master_addr', '127.0.0.1', '--master_port', free_port(), '--run-path',
                '--start-method', 'fork', tmp_path/'scenarios.py', tmp_path, ','.join(names), *settings]
    command = Command(torchrun.main, list(map(str, launcher)), tmp_path/'torchrun', **environment)
    status, errors = command.end()
    return status, command.said() + errors

split_groups = ['algorithm=grpo', 'clip=1e-2', 'lr=1e-4', 'sessions_per_iteration=1', 'group=4'] # 2 members a process

as_judged = ['learn_as_judged=true', 'updates=1', 'std=group', 'whiten=false', 'batch=3']        # a session a piece

# the second iteration repeats three edits, which two processes share
imitating = ['imitate=.5', 'imitate_edits=3', 'imitate_lr=.001', 'branching=random', 'credit=local', 'turns=3']

def right_results(run):
    "What a run has kept: the name of each edit -> the consistency that it has lost."
    lines = [line for file in run.glob('right/*/sessions.jsonl') for line in file.read_text().splitlines()]
    return {edit['id']: edit['meta']['consistency_lost'] for edit in map(json.loads, lines)}

@pytest.mark.parametrize('extra', [['algorithm=nft', 'train_timesteps=1'], split_groups, as_judged, imitating],
                         ids=['nft', 'grpo', 'as_judged', 'imitating'])
def test_two_processes_are_one(tmp_path, extra):
    "The adapter, the log and both evaluations, with whole groups on a process and with groups that they share."
    status, said = play(tmp_path, ['nothing'], [*settings, *extra])
    assert status == 0 and '[nothing 1: 0]' in said, said[-2000:]                           # there were two
    assert main([*settings, *extra, '--run', str(tmp_path/'one')]) == 0
    one, two = (load_file(tmp_path/name/'lora'/'pytorch_lora_weights.safetensors') for name in ('one', 'nothing'))
    assert one.keys() == two.keys()
    # AdamW divides by the gradient's size: where gradients cancel to rounding, a weight may take a step the other way
    differences = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
    assert (differences > 1e-5).float().mean() < 1e-3 and differences.median() < 1e-7
    assert any(one[k].abs().max() > 1e-4 for k in one if 'lora_B' in k)                     # it was trained
    a, b = ([json.loads(x) for x in (tmp_path/n/'metrics.jsonl').read_text().splitlines()] for n in ('one', 'nothing'))
    assert len(a) == len(b) == 2
    for x, y in zip(a, b):
        assert x['rows'] == y['rows'] and x['passes'] == y['passes']
        assert x.get('if') == pytest.approx(y.get('if'), abs=1e-4) and abs(x['loss'] - y['loss']) < 1e-4
    for name in ('before', 'after'):
        x, y = (load_arrays(tmp_path/n/f'{name}.safetensors') for n in ('one', 'nothing'))
        assert np.abs(x['images'].astype(int) - y['images']).max() <= 1 and x['images'].shape == y['images'].shape
        np.testing.assert_array_equal(x['success_IT'], y['success_IT'])
    a, b = (right_results(tmp_path/n) for n in ('one', 'nothing'))
    assert a.keys() == b.keys() and bool(a) == (extra is imitating)
    for name, lost in a.items(): assert lost == pytest.approx(b[name], abs=1e-3)

# --- one fails, all fail

def checkpoints(run): return sorted(p.name for p in (run/'checkpoints').iterdir())

def test_what_one_process_raises_all_raise(tmp_path):
    _, said = play(tmp_path, ['memory', 'judge', 'bug', 'stop'], [*tiny, 'save_every=2'])
    for rank in (0, 1):
        assert f'[memory {rank}: 0]' in said and f'[judge {rank}: 2]' in said and f'[stop {rank}: 143]' in said, said
    assert said.count('out of memory in iteration 0 with 2 rows a transformer call: going on with 1') == 1, said
    assert json.loads((tmp_path/'memory'/'batch.json').read_text()) == dict(batch=1)
    assert checkpoints(tmp_path/'memory') == ['000002']
    assert said.count('mtef_train: process 1: judge: gone') == 1
    assert '[bug 1: KeyError' in said and "mtef_train: process 1: KeyError: 'forgotten'" in said
    assert said.count(f'go on with: mtef_train --resume {tmp_path/"stop"}') == 1
    assert checkpoints(tmp_path/'stop') == ['000001']                              # saved though none was due

def test_a_process_that_is_killed_takes_the_run_down(tmp_path):
    status, said = play(tmp_path, ['kill'])
    assert status and ': 0]' not in said
    assert checkpoints(tmp_path/'kill') == ['000001']
    assert said.count('mtef_train: process 1: expected an answer, received the end of its connection') == 1, said
    assert said.count('received the end of its connection; the last checkpoint is kept') == 1

def meet_and_lose(folder, rank, count, victim, signum, summing, environment):
    "The body of a process: it meets the others, then `victim` gets a signal, and what the others say goes to a file."
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    from accelerate.utils import reduce
    from mt_editflow_nb.algorithm.processes import exchange, hearing_others
    assert exchange(rank) == list(range(count))
    (folder/f'{rank}.met').touch()
    if rank == victim: os.kill(os.getpid(), signum)
    try:
        with hearing_others():
            while summing: reduce(torch.ones(1))
            exchange(rank)
    except InputError as e: (folder/f'{rank}.said').write_text(str(e))

ended = 'received the end of its connection'
silent = 'within 8 seconds, received none'

def lose(folder, count, victim, signum, summing):
    "Start `count` processes that lose one of them; returns them."
    limit = 8 if signum == signal.SIGSTOP else PATIENCE
    there = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                 MTEF_PROCESS_TIMEOUT=str(limit))
    folder.mkdir()
    started = [helper_processes.Process(target=meet_and_lose, args=(folder, i, count, victim, signum, summing, there))
               for i in range(count)]
    for process in started: process.start()
    return started

def wait_for_meeting(folder, started):
    "Until all processes of a group have met."
    def have_met():
        met = [(folder/f'{rank}.met').is_file() for rank in range(len(started))]
        for there, process in zip(met, started): assert there or process.is_alive(), folder
        return all(met)
    wait_for(have_met)

def test_every_process_names_the_one_that_ended(tmp_path):
    "Killed or stopped, the first or another one, in an exchange or while gradients are summed; without a launcher."
    stopped = [(2, 0, signal.SIGSTOP, False), (4, 1, signal.SIGSTOP, False)]
    cases = [*stopped, (2, 0, signal.SIGKILL, False), (2, 1, signal.SIGKILL, True), (4, 2, signal.SIGKILL, False)]
    folders = [tmp_path/str(i) for i in range(len(cases))]
    started = []
    try:
        for folder, case in zip(folders, cases):
            started.append(lose(folder, *case))
            if case in stopped: wait_for_meeting(folder, started[-1])   # in its 8 s, so that nothing else begins then
        for (_, victim, *_), group in zip(cases, started):
            for process in group[:victim] + group[victim + 1:]: process.join(PATIENCE)
    finally:
        for process in sum(started, []): process.kill()
    for i, (count, victim, signum, summing) in enumerate(cases):
        received = silent if signum == signal.SIGSTOP else ended
        lines = {int(file.stem): file.read_text() for file in folders[i].glob('*.said')}
        assert sorted(lines) == [n for n in range(count) if n != victim], cases[i]
        for line in lines.values():
            assert line.startswith(f'process {victim}: expected an answer'), (cases[i], lines)
            assert line.endswith(f'{received}; the last checkpoint is kept'), (cases[i], lines)

def test_a_process_that_hangs_is_named(tmp_path):
    status, said = play(tmp_path, ['hang'], MTEF_PROCESS_TIMEOUT='8')
    assert status and checkpoints(tmp_path/'hang') == ['000001']
    assert 'process 1: expected an answer within 8 seconds, received none; the last checkpoint is kept' in said, said

def test_torchrun_takes_the_documented_commands():
    "Each one in the documentation; without `--`, it would take `--run` for an abbreviation of its own options."
    lines = [line for file in (root/'nbs').glob('*/*.ipynb') for cell in json.loads(file.read_text())['cells']
             for line in ''.join(cell['source']).splitlines() if line.startswith('torchrun ')]
    assert any('--run ' in line for line in lines)
    for line in lines:
        known = torchrun.parse_args(shlex.split(line, comments=True)[1:])
        assert known.module and known.training_script.startswith('mt_editflow_nb.'), line
        make_config(parse_overrides([x for x in known.training_script_args if '=' in x]))

@pytest.mark.parametrize('patience,seconds,said', [
    ('60', 0, 'expected an answer, received the end of its connection'),
    ('0.05', .1, 'expected an answer within 0.05 seconds, received none')])
def test_a_process_that_has_ended_is_told_from_a_silent_one(patience, seconds, said, monkeypatch):
    "What gloo says is the same for both."
    def barrier(*args, **kw):
        time.sleep(seconds)
        raise RuntimeError('[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 50 ms')
    monkeypatch.setenv('MTEF_PROCESS_TIMEOUT', patience)
    monkeypatch.setattr(torch.distributed, 'monitored_barrier', barrier)
    monkeypatch.setattr(processes_chapter, 'host_group', lambda: None)
    monkeypatch.setattr(processes_chapter, 'processes', lambda: (0, 2))
    with pytest.raises(InputError, match=f'^process 1: {said}; the last checkpoint is kept$'):
        processes_chapter.exchange(None)

@pytest.mark.parametrize('count,text,becomes', [
    (2, '[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:33178: Connection reset by peer', InputError),
    (2, 'The size of tensor a must match the size of tensor b', RuntimeError),
    (1, 'gloo cannot be loaded', RuntimeError)])
def test_a_broken_connection_is_a_line(count, text, becomes, monkeypatch):
    "In whichever exchange another process has ended; any other error keeps its traceback."
    monkeypatch.setattr(processes_chapter, 'processes', lambda: (1, count))
    with pytest.raises(becomes) as end, processes_chapter.hearing_others(): raise RuntimeError(text)
    line = 'another process: expected an answer, received the end of its connection; the last checkpoint is kept'
    assert str(end.value) == (line if becomes is InputError else text)

def test_a_process_that_ends_while_a_checkpoint_is_written(monkeypatch):
    "The disk is not to blame."
    monkeypatch.setattr(processes_chapter, 'processes', lambda: (1, 2))
    with pytest.raises(InputError, match='^another process: expected an answer'), _in_one_line('cannot write it'):
        raise RuntimeError('[gloo/transport/tcp/pair.cc:537] Connection closed by peer')
    with pytest.raises(InputError, match='^checkpoint: cannot write it: no space'), _in_one_line('cannot write it'):
        raise OSError('no space')
