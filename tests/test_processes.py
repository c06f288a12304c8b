"Two processes with the same global batch give the adapter that one gives, started by accelerate's launcher."
import json, os, socket, subprocess, sys
import pytest
from safetensors.torch import load_file
from mt_editflow_nb.cli.train import main

# AdamW divides by the gradient's size: rounding grows with lr
settings = ['sessions_per_iteration=2', 'group=3', 'turns=2', 'num_steps=2', 'iterations=2', 'eval_sessions=2',
            'batch=16', 'lora_rank=2', 'updates=2', 'std=global', 'whiten=true', 'lr=2e-4']

def start(arguments, processes=2, module='mt_editflow_nb.training', **environment):
    "Processes on the CPU, started by accelerate's launcher."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', str(processes),
                '--main_process_port', port, '-m', module]
    return subprocess.Popen([*launcher, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=dict(os.environ, OMP_NUM_THREADS='1', **environment))

def run(arguments, **kw):
    "(exit status, everything that was printed)."
    job = start(arguments, **kw)
    said, _ = job.communicate(timeout=900)
    return job.returncode, said

@pytest.mark.parametrize('extra', [['algorithm=nft', 'train_timesteps=1'], ['algorithm=grpo', 'clip=1e-2']],
                         ids=['nft', 'grpo'])
def test_two_processes_are_one(tmp_path, extra):
    def arguments(name): return [*settings, *extra, '--run', str(tmp_path/name)]
    status, said = run(arguments('two'))
    assert status == 0, said[-2000:]
    assert main(arguments('one')) == 0
    one, two = (load_file(tmp_path/name/'lora'/'pytorch_lora_weights.safetensors') for name in ('one', 'two'))
    assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max().item() for k in one) < 1e-5
    assert any(one[k].abs().max() > 1e-4 for k in one if 'lora_B' in k)                     # it was trained
    a, b = ([json.loads(x) for x in (tmp_path/n/'metrics.jsonl').read_text().splitlines()] for n in ('one', 'two'))
    assert len(a) == len(b) == 2
    for x, y in zip(a, b):
        assert x['rows'] == y['rows'] and x['passes'] == y['passes']
        assert x['if'] == pytest.approx(y['if'], abs=1e-4) and abs(x['loss'] - y['loss']) < 1e-4
