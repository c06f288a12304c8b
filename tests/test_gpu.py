"On a card: the CPU's numbers, 4 bits as diffusers loads them, and runs that go on as if nothing had happened."
import json, shutil
from contextlib import nullcontext
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file
from mt_editflow_nb.cli.train import main
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor, quantize_nf4
from mt_editflow_nb.editing.lora import lora_parameters
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.rewards.cube import load_judge

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')

def velocity_of(editor):
    x, image = (torch.randn(2, *editor.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    text = editor.encode_text(['add a red circle at the top left']*2)
    device = editor.device
    with torch.no_grad():
        return editor.velocity(x.to(device), torch.full((2,), .5, device=device), text, image.to(device)).cpu()

def relative(a, b): return float((a - b).norm()/b.norm())

def test_a_velocity_is_that_of_the_cpu():
    exact = velocity_of(load_editor('tiny', device='cpu'))
    single = velocity_of(load_editor('tiny', device='cuda', dtype='float32'))
    half = velocity_of(load_editor('tiny', device='cuda'))
    assert relative(single, exact) < 1e-4
    assert 1e-4 < relative(half.float(), exact) < .05                # it is another precision

def test_a_rollout_has_the_noise_of_the_cpu():
    sessions = shape_sessions(8, seed=3)
    made = [rollout(load_editor('tiny', device=device, dtype='float32'), sessions, group=2, num_steps=2, seed=1)
            for device in ('cpu', 'cuda')]
    pictures = [r.images_PGTHWC.astype(int) for r in made]
    first = np.abs(pictures[0] - pictures[1])[:, :, 0]
    assert first.mean() < .1                                          # of 255 levels
    verdicts = [load_judge('verifier')(sessions, r.images_PGTHWC).success_PGT for r in made]
    assert (verdicts[0] == verdicts[1]).float().mean() > .95

def test_four_bits_are_those_of_the_cpu():
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit
    on_card = load_editor('tiny', device='cuda', quantize='nf4').transformer
    here = quantize_nf4(load_editor('tiny', device='cpu').transformer, torch.float32)
    layers = {n: m for n, m in here.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    for name, layer in layers.items():
        other = on_card.get_submodule(name)
        a, b = (dequantize_4bit(m.weight.data, m.weight.quant_state).float().cpu() for m in (layer, other))
        assert relative(b, a) < .05, name              # scales of bfloat16 weights there, of float32 ones here
    assert layers

small = dict(sessions_per_iteration=2, group=4, turns=2, num_steps=3, lora_rank=4, iterations=4, save_every=2,
             eval_sessions=4, quantize='nf4', checkpointing=True, adam8bit=True)

@pytest.mark.parametrize('settings', [
    dict(algorithm='nft'), dict(algorithm='grpo'), dict(preset='self-imitation', num_steps=2, iterations=4),
    dict(quantize=None, autocast=True), dict(quantize=None, lora_rank=None, adam8bit=False)],
    ids=['nft', 'grpo', 'imitation', 'autocast', 'whole'])
def test_a_run_goes_on(tmp_path, settings):
    pairs = [f'{k}={json.dumps(v)}' for k, v in (small | settings).items()]
    whole = tmp_path/'whole'
    again = tmp_path/'again'
    assert not main([*pairs, '--run', str(whole)])
    shutil.copytree(whole, again)
    shutil.rmtree(again/'checkpoints/000004')
    assert (again/'checkpoints/000002').is_dir()                     # it goes on from there
    for name in ('lora', 'transformer', 'right/000002', 'right/000003'): shutil.rmtree(again/name, ignore_errors=True)
    for file in again.glob('results*'): file.unlink()
    shutil.rmtree(again/'evaluations'/'after', ignore_errors=True)
    (again/'after.safetensors').unlink(missing_ok=True)
    assert not main(['--resume', str(again)])
    logs = [[json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()] for run in (whole, again)]
    file = next(Path(whole).glob('lora/*.safetensors'), None) or next(Path(whole).glob('transformer/*.safetensors'))
    x = load_file(file)
    y = load_file(again/file.relative_to(whole))
    assert x.keys() == y.keys() and all(torch.isfinite(v).all() and torch.equal(v, y[k]) for k, v in x.items())
    assert logs[0] == logs[1] and len(logs[0]) == 4

def test_every_gradient_in_16_bits_is_that_of_plain_attention():
    "The backward pass of cuDNN's attention gave NaN on an H200, where torch prefers it."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    def gradient(context):
        editor = load_editor('tiny', device='cuda', lora_rank=4)
        for i, p in enumerate(lora_parameters(editor)):
            p.data = .02*torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
        x, image = (torch.randn(8, *editor.latent_shape, generator=torch.Generator().manual_seed(i)).cuda()
                    for i in range(2))
        text = editor.encode_text(['add a red circle at the top left']*8)
        with context: editor.velocity(x, torch.full((8,), .5).cuda(), text, image).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in lora_parameters(editor)])
    assert relative(gradient(nullcontext()), gradient(sdpa_kernel(SDPBackend.MATH))) < .05
