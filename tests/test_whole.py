"""Full fine-tuning: the whole transformer is trained, in one process or in pieces on several.

And what else two processes share: trackers that do not start, and the answers of judges."""
import json, runpy, sys, textwrap
from pathlib import Path
import pytest
from safetensors.torch import load_file
from helpers import Command
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.sharding import check_launch
from mt_editflow_nb.cli.eval import main as evaluate
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.whole import load_trained
from mt_editflow_nb.rewards.cache import add_replies, new_replies
from mt_editflow_nb.training.budget import plan, plan_text
from mt_editflow_nb.training.checkpoints import checkpoint_damage

# one row an optimiser step: while one process learns from it, the other one has none
settings = ['lora_rank=none', 'sessions_per_iteration=2', 'group=2', 'keep=1', 'turns=1', 'num_steps=2', 'iterations=2',
            'eval_sessions=3', 'batch=2', 'updates=2', 'lr=1e-4', 'kl_weight=0.1', 'old_decay=0.5', 'ema=0.5',
            'save_every=1', 'eval_every=1']

script = textwrap.dedent("""
    import os, shutil, signal, sys
    from pathlib import Path
    from unittest.mock import patch
    sys.path.insert(0, sys.argv[1])
    from forked import in_processes
    import torch
    from torch.distributed import barrier
    from mt_editflow_nb.algorithm import iterate
    from mt_editflow_nb.algorithm.config import make_config
    from mt_editflow_nb.cli.eval import main as evaluate
    from mt_editflow_nb.cli.train import main, parse_overrides
    from mt_editflow_nb.data.files import InputError
    from mt_editflow_nb.data.signals import Stopped
    from mt_editflow_nb.training import tracking
    from mt_editflow_nb.algorithm.processes import collect_answers, share_answers, sum_statistics
    from mt_editflow_nb.rewards.cache import Cached
    from mt_editflow_nb.rewards.cube import Scores, judge_usage
    from mt_editflow_nb.rewards.engines import Ask, Reply
    from mt_editflow_nb.rewards import edival_models
    from mt_editflow_nb.rewards.edival_rules import Question
    from mt_editflow_nb.rewards.edival_tools import LocalTools
    from mt_editflow_nb.training.train import train

    folder, settings = Path(sys.argv[2]), sys.argv[3:]
    real = iterate.rollout

    def stopped_at(at, only=False):
        def rollout(*args, iteration, **kw):
            if iteration == at and only: os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, iteration=iteration, **kw)
        return patch.object(iterate, 'rollout', rollout)

    def no_tracker(*args): raise InputError('track: expected a tracker, received none')

    def say(rank, name, status): print(f'[{name} {rank}: {status}]', flush=True)

    def run(rank, name, *more): say(rank, name, main([*settings, *more, '--run', str(folder/name)]))

    def only_train(rank, name, *more):
        c = make_config(parse_overrides([*settings, *more]))
        try: say(rank, name, train(c, folder/name, progress=False) and 0)
        except Stopped as e: say(rank, name, 128 + e.signum)

    def alone(rank):
        only_train(rank, 'fewer')                                       # which two processes have begun
        only_train(rank, 'one')

    def two(rank):
        run(rank, 'two')
        with stopped_at(1, only=rank == 1): only_train(rank, 'stopped')
        if not rank: shutil.copytree(folder/'stopped', folder/'fewer')
        barrier()
        only_train(rank, 'stopped')
        only_train(rank, 'sft', 'algorithm=sft', 'batch=3', 'old_decay=0', 'kl_weight=0', 'keep=null', 'iterations=1',
                   'eval_every=0')
        with patch.object(tracking, 'start_tracker', no_tracker): run(rank, 'untracked', 'track=[tensorboard]')
        answers(rank)
        say(rank, 'resumed', main(['--resume', str(folder/'memory')]))
        bug(rank)

    class Says:
        model = 'm'
        def __init__(self, text): self.text = text
        def __call__(self, asks): return [Reply(self.text, tokens=3) for _ in asks]

    def asked(rank, questions):
        file = folder/f'host_{rank}'/'judge.sqlite'                     # no disk is shared
        share_answers(file)
        engine = Cached(Says(f'process {rank}'), file)
        said = [reply.text for reply in engine([Ask((), q) for q in questions])]
        collect_answers(file)
        say(rank, 'asked', f'{said} {engine.calls} calls')

    def answers(rank):
        asked(rank, [f'question {rank}', f'question {rank + 1}'])       # both ask number 1
        asked(rank, ['question 0', 'question 1', 'question 2', f'only {rank}'])
        scores = Scores((), *[None]*4, calls=tuple(dict(error='', tokens=10, seconds=.5) for _ in range(rank + 1)))
        say(rank, 'usage', sum_statistics(judge_usage(scores, price=2e5), largest=()))
        edival(rank)
        own = ['--out', str(folder/f'host_{rank}'/'eval')]
        say(rank, 'eval', evaluate(['--n', '3', '--turns', '1', '--steps', '1', '--judge', 'tiny:direct', *own]))

    def edival(rank):
        "EdiVal's questions, by tools in each process."
        file = folder/f'host_{rank}'/'edival.sqlite'
        def engine(*args, cache, **kw): return Cached(Says(f'yes, process {rank}'), cache)
        for words in (('cat',), (f'dog {rank}',)):
            share_answers(file)
            with patch.object(edival_models, 'load_engine', engine): tools = LocalTools(cache=file)
            said = tools.asker.many([Question((), 'text', ()), Question((), 'name', words)])
            collect_answers(file)
            say(rank, 'edival', f'{said} {tools.asker.engine.calls} calls')

    def failing_with(error, who):
        "Fails in one process after an iteration, while the others pass the transformer, for which they need it."
        def rollout(*args, iteration, **kw):
            if iteration and int(os.environ['RANK']) == who: raise error
            return real(*args, iteration=iteration, **kw)
        return patch.object(iterate, 'rollout', rollout)

    plain = ['eval_every=0', 'kl_weight=0', 'old_decay=0']     # how weights are trained has nothing to do with these

    def bug(rank):
        with failing_with(KeyError('forgotten'), 1): run(rank, 'bug', *plain)

    def memory(rank):
        with failing_with(torch.OutOfMemoryError('scripted'), 0):
            run(rank, 'memory', *plain, 'sessions_per_iteration=1', 'group=6')     # which the processes share

    print('memory', in_processes(3, memory), 'bug', in_processes(2, two), in_processes(1, alone))
""")

def run_path(argv):
    "As `python FILE ...`, in a process that has imported everything."
    sys.argv = argv
    runpy.run_path(argv[0], run_name='__main__')

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    (folder/'script.py').write_text(script)
    command = Command(run_path, [str(folder/'script.py'), str(Path(__file__).parent), str(folder), *settings],
                      folder/'script')
    errors = command.end()[1]
    return folder, command.said() + errors

def weights(run): return load_file(run/'transformer'/'diffusion_pytorch_model.safetensors')

def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)

def log(run): return [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]

def test_two_processes_are_one(runs):
    "AdamW divides by the gradient's size, so that rounding counts where a gradient is next to nothing."
    folder, said = runs
    for line in ('[one 0: 0]', '[two 0: 0]', '[two 1: 0]'): assert line in said, said[-3000:]
    base = load_editor().transformer.state_dict()
    assert largest_difference(weights(folder/'one'), base) > 1e-4                                # it was trained
    assert largest_difference(weights(folder/'one'), weights(folder/'two')) < 1e-5
    for x, y in zip(log(folder/'one'), log(folder/'two'), strict=True):
        assert x['rows'] == y['rows'] and x['if'] == pytest.approx(y['if'], abs=1e-4)
        assert x['loss'] == pytest.approx(y['loss'], abs=1e-4)
        assert x['grad_norm'] == pytest.approx(y['grad_norm'], rel=1e-3)

def test_resumed(runs):
    "To the same bits with as many processes, and to nearly the same with another number."
    folder, said = runs
    for line in ('[stopped 0: 143]', '[stopped 1: 143]', '[stopped 0: 0]', '[stopped 1: 0]', '[fewer 0: 0]'):
        assert line in said, said[-3000:]
    assert len(list((folder/'stopped'/'checkpoints'/'000002'/'state').glob('__[01]_*'))) == 2      # a piece each
    assert largest_difference(weights(folder/'two'), weights(folder/'stopped')) == 0
    assert log(folder/'two') == log(folder/'stopped')
    assert largest_difference(weights(folder/'two'), weights(folder/'fewer')) < 1e-5

def test_what_one_process_raises_ends_all(runs):
    "At once, though the others wait in an exchange of weights; of a full card, half the rows are remembered."
    folder, said = runs
    assert '[bug 1: 2]' in said and '[bug 0:' not in said and 'bug [2, 0]' in said, said[-3000:]
    assert said.count("process 1: KeyError: 'forgotten'; the last checkpoint is kept") == 1
    assert 'in rollout' in said                                                               # its own traceback
    assert said.count('mtef_train: process 0: OutOfMemoryError: scripted; the last checkpoint is kept') == 1
    assert 'memory [0, 2, 2]' in said and '[memory 0: 2]' in said, said[-3000:]
    for name in ('bug', 'memory'): assert (folder/name/'checkpoints'/'000001').is_dir()
    assert json.loads((folder/'memory'/'batch.json').read_text()) == dict(batch=1)
    assert '[resumed 0: 0]' in said and '[resumed 1: 0]' in said, said[-3000:]

def test_supervised(runs):
    "Three rows a pass for two processes: in the last pass one of them has none."
    folder, said = runs
    assert '[sft 0: 0]' in said and '[sft 1: 0]' in said, said[-3000:]
    assert log(folder/'sft')[0]['loss'] > 0

def test_a_tracker_that_does_not_start_ends_all_processes(runs):
    said = runs[1]
    assert '[untracked 0: 2]' in said and '[untracked 1: 2]' in said, said[-3000:]
    assert said.count('mtef_train: process 0: track: expected a tracker, received none') == 1

def test_answers_are_shared_without_a_shared_disk(runs):
    "Whoever was first has said it; the first process ends with everything, and the others begin with it."
    folder, said = runs
    assert "[asked 0: ['process 0', 'process 0'] 2 calls]" in said
    assert "[asked 1: ['process 1', 'process 1'] 2 calls]" in said
    assert "[asked 0: ['process 0', 'process 0', 'process 1', 'process 0'] 1 calls]" in said, said[-3000:]
    assert "[asked 1: ['process 0', 'process 0', 'process 1', 'process 1'] 1 calls]" in said
    assert add_replies(folder/'all.sqlite', new_replies(folder/'host_0'/'judge.sqlite')) == 3 + 2
    assert len(new_replies(folder/'host_1'/'judge.rank1.sqlite')) == 1          # the rest is a copy
    usage = "{'calls': 3, 'hits': 0, 'failed': 0, 'tokens': 30, 'seconds': 1.5, 'cost': 6.0}"
    assert f'[usage 0: {usage}]' in said and f'[usage 1: {usage}]' in said

def test_answers_to_edivals_questions_are_shared(runs):
    "At first both ask the same two; the second time one of them is on record, as process 0 heard it."
    folder, said = runs
    for rank in (0, 1): assert f"[edival {rank}: ['yes, process {rank}', 'yes, process {rank}'] 2 calls]" in said, said
    for rank in (0, 1): assert f"[edival {rank}: ['yes, process 0', 'yes, process {rank}'] 1 calls]" in said, said
    assert len(new_replies(folder/'host_0'/'edival.sqlite')) == 2 + 2

def test_answers_in_an_evaluation_are_shared(runs):
    "Three sessions, each with a question for IF and one for CC: the first process ends with the answers of both."
    folder, said = runs
    assert '[eval 0: 0]' in said and '[eval 1: 0]' in said, said[-3000:]
    own = len(new_replies(folder/'host_1'/'eval'/'judge.rank1.sqlite'))
    assert len(new_replies(folder/'host_0'/'eval'/'judge.sqlite')) == 3*2 and own == 2

def test_what_is_handed_out_is_evaluated(runs, tmp_path, capsys):
    folder = str(runs[0]/'one'/'transformer')
    assert evaluate(['--lora', folder, '--n', '2', '--turns', '1', '--out', str(tmp_path)]) == 0
    editor = load_editor()
    load_trained(editor, folder)
    assert largest_difference(weights(runs[0]/'one'), editor.transformer.state_dict()) == 0
    capsys.readouterr()
    assert evaluate(['--lora', folder, '--n', '2', '--quantize', 'nf4', '--out', str(tmp_path/'4')]) == 2
    assert 'quantize: expected none beside the folder of a whole transformer' in capsys.readouterr().err

def test_a_damaged_piece_is_found(runs):
    checkpoint = runs[0]/'sft'/'checkpoints'/'000001'
    piece = next((checkpoint/'state').glob('__1_*'))
    piece.write_bytes(piece.read_bytes()[:-1])
    assert checkpoint_damage(checkpoint) == f'state/{piece.name} is not as written'

@pytest.mark.parametrize('field', ['quantize=nf4', 'merge=true', 'adam8bit=true', 'lora_alpha=2', 'compile=inductor'])
def test_what_needs_an_adapter_is_refused(field):
    name, value = field.split('=')
    value = True if value == 'true' else value
    with pytest.raises(InputError, match=f'{name}: expected none beside lora_rank=none'):
        make_config({'lora_rank': 'none', name: float(value) if name == 'lora_alpha' else value})

def test_an_adapter_is_not_sharded(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(InputError, match='FSDP: expected lora_rank=none, or a launch without FSDP.*4-bit base'):
        check_launch(make_config(dict(quantize='nf4')))
    check_launch(make_config(dict(lora_rank=None)))

def test_the_plan_counts_all_weights():
    p = plan(make_config(dict(lora_rank=None, kl_weight=.1)))
    assert p['adapter'] == p['parameters'] and p['memory']['optimiser'] == 8*p['parameters']
    assert p['memory']['adapter, its gradient, old policy'] == 16*p['parameters']                  # and the base
    assert 'processes share' in plan_text(p)
