"Every recipe is valid, names its sources, can be planned, and runs an iteration on the tiny twin of its family; the plan's numbers against independent counts."
import importlib, json
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np, pytest, torch
from PIL import Image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from safetensors.torch import load_file
from readme import root
from test_families import judge
from mt_editflow_nb.editing.loading import find_editor, load_editor
from mt_editflow_nb.editing.lora import lora_parameters
from mt_editflow_nb.editing.flux2 import tiny_klein
from mt_editflow_nb.editing.editor import Text
from mt_editflow_nb.training.budget import DECODER_NUMBERS, PEAK, PUBLISHED, TRANSFORMERS, advice, count_rows, editor_configs, find_batch, judge_bytes, profile_row, weightless_editor, weightless_text, plan, plan_text, weight_bytes
from mt_editflow_nb.editing.qwen import tiny_qwen
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import Session
from mt_editflow_nb.algorithm.iterate import iterate
from mt_editflow_nb.algorithm import policy as policies
from mt_editflow_nb.algorithm.policy import Policy, make_optimizer
from mt_editflow_nb.training.train import load_for
from mt_editflow_nb.cli.train import main, read_recipe
from mt_editflow_nb.algorithm.config import make_config

training = importlib.import_module('mt_editflow_nb.training.train')
recipes = sorted((root/'experiments/recipes').glob('*.yaml'))

@pytest.fixture(scope='session')
def twins(tmp_path_factory):
    d = tmp_path_factory.mktemp('twins')
    return dict(FluxKontextPipeline=find_editor('tiny')[0], Flux2KleinPipeline=tiny_klein(d/'klein'),
                QwenImageEditPipeline=tiny_qwen(d/'qwen'), QwenImageEditPlusPipeline=tiny_qwen(d/'plus', plus=True))

def noise_session(id, seed): return Session(id, Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)), ['add a ring', 'remove it'])

@pytest.mark.parametrize('path', recipes, ids=lambda p: p.stem)
def test_recipe(path, twins):
    assert 'Published starting point' in path.read_text()
    sources = ('Edit-R1', 'Flow-GRPO', 'DiffusionNFT', 'Flow-Factory', 'UniRL', 'verl-omni', 'MT-EditFlow', 'ours')
    for line in path.read_text().splitlines(): assert line.startswith(('#', 'editor:')) or any(x in line.partition('  # ')[2] for x in sources), line
    published = make_config(read_recipe(path))
    assert published.editor in PUBLISHED and published.size == 512 and published.quantize == 'nf4'
    small = dict(editor=str(twins[PUBLISHED[published.editor]['pipeline']]), size=64, sessions_per_iteration=2, group=2, num_steps=min(published.num_steps, 4), turns=2,
                 window=min(published.window, 2), min_std=0., iterations=2, judge='verifier')    # another judge scores below
    c = make_config(read_recipe(path) | small)
    editor, passes = load_for(c, lora_rank=c.lora_rank), []
    policy = Policy(c, editor)
    velocity = editor.velocity
    editor.velocity = lambda x, *a: (passes.append((len(x), torch.is_grad_enabled())), velocity(x, *a))[1]
    for o in policy.old: o += .01                                     # off-policy, as after some iterations
    with patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2):
        metrics = iterate(c, policy, [noise_session('a', 1), noise_session('b', 2)], judge, 0)[0]
    assert np.isfinite(metrics['loss'])
    if metrics['rows'] == 4:                                            # rows without an advantage are skipped
        planned = count_rows(c, 2)
        assert sum(n for n, grad in passes if grad) == planned['trained']
        assert sum(n for n, grad in passes if not grad) == planned['sampled'] + planned['compared']

# --- the plan's arithmetic

def closed_form(config, kind):
    "Parameters of a transformer, counted layer by layer on paper."
    h = config['num_attention_heads']*config['attention_head_dim']
    lin = lambda i, o, bias=True: i*o + (o if bias else 0)
    d = config['attention_head_dim']
    if kind == 'flux':
        double = 2*(lin(h, 6*h) + 4*lin(h, h) + lin(h, 4*h) + lin(4*h, h)) + 4*d
        single = lin(h, 3*h) + lin(h, 4*h) + lin(5*h, h) + 3*lin(h, h) + 2*d
        return (config['num_layers']*double + config['num_single_layers']*single + lin(config['in_channels'], h) + lin(config['joint_attention_dim'], h)
                + 2*(lin(256, h) + lin(h, h)) + lin(config['pooled_projection_dim'], h) + lin(h, h) + lin(h, 2*h) + lin(h, config['in_channels']))
    if kind == 'flux2':
        lin = lambda i, o: i*o
        double = 8*h*h + 2*(lin(h, 6*h) + lin(3*h, h)) + 4*d
        single = lin(h, 9*h) + lin(4*h, h) + 2*d
        return (config['num_layers']*double + config['num_single_layers']*single + lin(config['in_channels'], h) + lin(config['joint_attention_dim'], h)
                + lin(256, h) + lin(h, h) + 2*lin(h, 6*h) + lin(h, 3*h) + lin(h, 2*h) + lin(h, config['in_channels']))
    double = 2*(lin(h, 6*h) + 4*lin(h, h) + lin(h, 4*h) + lin(4*h, h)) + 4*d
    return (config['num_layers']*double + lin(config['in_channels'], h) + lin(config['joint_attention_dim'], h) + config['joint_attention_dim']
            + lin(256, h) + lin(h, h) + lin(h, 2*h) + lin(h, 4*config['out_channels']))

@pytest.mark.parametrize('name,kind,billions', [('black-forest-labs/FLUX.1-Kontext-dev', 'flux', 11.9), ('black-forest-labs/FLUX.2-klein-base-4B', 'flux2', 3.9),
                                                ('black-forest-labs/FLUX.2-klein-base-9B', 'flux2', 9.1), ('Qwen/Qwen-Image-Edit', 'qwen', 20.4)])
def test_parameters_of_the_published_models(name, kind, billions):
    t = weightless_editor(PUBLISHED[name], size=512, guidance=1.).transformer
    n = sum(p.numel() for p in t.parameters())
    if kind == 'flux': assert t.config.guidance_embeds
    assert n == closed_form(t.config, kind) and round(n/1e9, 1) == billions

def test_parameters_of_the_other_parts():
    "Text encoders against the totals that their repositories publish; autoencoders against diffusers' defaults, which are the published ones."
    import diffusers, transformers
    size = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device('meta'):
        found = {name: [size(getattr(transformers, n)(getattr(transformers, n).config_class(**config))) for n, config in PUBLISHED[name]['text']]
                 for name in ('black-forest-labs/FLUX.1-Kontext-dev', 'black-forest-labs/FLUX.2-klein-base-4B', 'black-forest-labs/FLUX.2-klein-base-9B', 'Qwen/Qwen-Image-Edit')}
        vaes = size(diffusers.AutoencoderKLFlux2()), size(diffusers.AutoencoderKLQwenImage())
    assert [*found.values()] == [[123_060_480, 4_762_310_656], [4_022_468_096], [8_190_735_360], [8_292_166_656]]
    assert vaes == (PUBLISHED['black-forest-labs/FLUX.2-klein-base-4B']['vae'], PUBLISHED['Qwen/Qwen-Image-Edit']['vae'])

@pytest.mark.parametrize('recipe,targets,limit', [('kontext_grpo', 'all', 24e9), ('klein_9b_nft', 'all', 20e9), ('qwen_edit_nft', 'attention', 40e9)])
def test_memory_targets(recipe, targets, limit):
    "512 pixels, 3 turns, groups of 8, LoRA of rank 32, NF4, and a gigabyte to spare."
    c = make_config(read_recipe(root/f'experiments/recipes/{recipe}.yaml') | dict(turns=3, lora_targets=targets))
    p = plan(c, gpu='H100')
    assert (c.size, c.group, c.lora_rank, c.quantize) == (512, 8, 32, 'nf4') and sum(p['memory'].values()) < limit - 1e9, plan_text(p)

def most_held(f):
    "The most bytes that a call holds at a time, from every allocation that the profiler sees."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    return max(np.cumsum([e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']))

tiny_axes = dict(num_attention_heads=2, attention_head_dim=64, joint_attention_dim=128)
@pytest.mark.parametrize('name,config', [
    ('black-forest-labs/FLUX.1-Kontext-dev', dict(tiny_axes, num_layers=3, num_single_layers=6, axes_dims_rope=(16, 24, 24), pooled_projection_dim=64, guidance_embeds=True)),
    ('black-forest-labs/FLUX.2-klein-base-9B', dict(tiny_axes, num_layers=2, num_single_layers=6, axes_dims_rope=(16,)*4, in_channels=64, guidance_embeds=False)),
    ('Qwen/Qwen-Image-Edit-2511', dict(tiny_axes, num_layers=6, axes_dims_rope=(16, 24, 24), in_channels=64, out_channels=16, zero_cond_t=True))], ids=['kontext', 'klein', 'qwen'])
def test_activations_against_what_the_allocator_sees(name, config):
    "A thin transformer of each family trains a row: the planned bytes of activations and backward pass are within 10 % of those really held."
    import diffusers
    from mt_editflow_nb.editing.lora import add_lora
    about = dict(PUBLISHED[name], transformer=config)
    meta, real = (weightless_editor(about, size=256, guidance=1., dtype=torch.float32) for _ in range(2))
    real.transformer, real.device = getattr(diffusers, TRANSFORMERS[about['pipeline']]).from_config(config).requires_grad_(False), torch.device('cpu')
    for e in (meta, real): add_lora(e, 8, targets='attention')
    shapes = weightless_text(meta, 128)
    heard, some = profile_row(meta, shapes), lambda x: None if x is None else torch.randn(x.shape)
    text = Text(some(shapes.embeds), some(shapes.pooled), None if shapes.ids is None else torch.zeros(shapes.ids.shape))
    x, image, s = torch.randn(1, *real.latent_shape), torch.randn(1, *real.latent_shape), torch.full((1,), .5)
    def step():
        real.velocity(x, s, text, image).sum().backward()
        for p in lora_parameters(real): p.grad = None
    for kept in ('activations', 'checkpointed'):
        if kept == 'checkpointed': real.transformer.enable_gradient_checkpointing()
        step()
        assert abs((heard[kept] + heard['working'])/most_held(step) - 1) < .1

def test_what_painting_holds():
    "The full-size autoencoders with random weights decode a small picture."
    import diffusers
    kontext = dict(block_out_channels=(128, 256, 512, 512), down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, layers_per_block=2,
                   latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    for qwen, vae in ((False, diffusers.AutoencoderKL(**kontext)), (True, diffusers.AutoencoderKLQwenImage())):
        if not qwen: assert sum(p.numel() for p in vae.parameters()) == PUBLISHED['black-forest-labs/FLUX.1-Kontext-dev']['vae']
        z = torch.randn(1, 16, *((1,) if qwen else ()), 12, 12)
        with torch.no_grad(): assert abs(DECODER_NUMBERS[qwen]*96**2*4/most_held(lambda: vae.decode(z)) - 1) < .05

def test_judges_are_counted():
    "A judge in this process takes memory, one behind a server and the verifier take none, and one that is not known is said to be missing."
    from mt_editflow_nb.rewards.engines import Local
    assert judge_bytes('verifier', 512, 2) == judge_bytes('Qwen/Qwen2.5-VL-7B-Instruct@http://localhost:8000/v1:logit', 512, 2) == 0
    whole, four = (judge_bytes(f'Qwen/Qwen2.5-VL-7B-Instruct{q}:logit', 512, 2) for q in ('', '+nf4'))
    words = 2*18*18 + 1024
    assert whole == 8_292_166_656*2 + 32*words*28*2*4*128*2                      # published count; keys and values of 28 layers, 4 heads of 128
    assert .28 < (four - 32*words*28*2*4*128*2)/(8_292_166_656*2) < .4           # a bit over a quarter: embeddings and head stay
    held = sum(p.numel()*p.element_size() for p in Local('tiny')._loaded[0].parameters())
    assert held <= judge_bytes('tiny:think', 48, 4) < 200*held
    with patch('mt_editflow_nb.training.budget.judge_bytes', lambda name, *_: None if name == 'some/model:think' else 0): p = plan(make_config(dict(judge='some/model:think')))
    assert 'not counted: some/model:think' in plan_text(p) and p['memory']['judge'] == 0

def test_the_verifier_reads_small_pictures_only(tmp_path, capsys):
    "A real editor with the judge left out is told so before anything is rolled out; with another judge the shape world is fine at any size."
    assert main(['size=64', 'iterations=0', 'eval_sessions=1', 'eval_judge=tiny:logit', '--run', str(tmp_path/'a')]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith('mtef_train: judge: expected MODEL:MODE') and '48 pixels' in said and 'works at 64' in said
    assert said.endswith("received 'verifier'")
    c = make_config(dict(size=64, judge='tiny:logit', eval_judge='tiny:logit', iterations=1, sessions_per_iteration=1, group=2, turns=1, num_steps=2, lora_rank=2, std='group', min_std=0.))
    training.train(c, tmp_path/'b', judge, progress=False)
    assert len((tmp_path/'b'/'metrics.jsonl').read_text().splitlines()) == 1

def test_a_judge_is_loaded_once(tmp_path):
    from mt_editflow_nb.training.train import experiment
    asked = []
    class Stop(Exception): pass
    def one(name, **kw): asked.append(name); return judge
    c = make_config(dict(judge='tiny:logit', eval_judge='tiny:logit', eval_sessions=1, iterations=0))
    with patch.object(training, 'load_judge', one), patch.object(training, 'load_for', side_effect=Stop), pytest.raises(Stop): experiment(c, tmp_path/'run')
    assert asked == ['tiny:logit']

def test_bytes_of_a_loaded_editor():
    "The plan of the tiny editor in NF4 against the tensors that a loaded one holds."
    editor = load_editor(quantize='nf4', lora_rank=8)
    p = plan(make_config(dict(quantize='nf4', lora_rank=8)))
    held = 0
    for m in editor.transformer.modules():
        for n, t in m.named_parameters(recurse=False):
            if 'Linear4bit' in type(m).__name__ and n == 'weight': held += t.numel()*t.element_size() + t.quant_state.absmax.numel()*4
    for n, t in editor.transformer.named_parameters():
        if 'lora_' not in n and t.dtype != torch.uint8: held += t.numel()*t.element_size()
    assert abs(p['memory']['transformer']/held - 1) < .01
    assert p['adapter'] == sum(t.numel() for t in lora_parameters(editor))

def test_activations_of_a_loaded_editor():
    "What the meta device counts against the same transformer with numbers: autograd keeps the same tensors."
    about = editor_configs('tiny')
    meta = weightless_editor(about, size=48, guidance=2.5, dtype=torch.float32)
    real = load_editor()
    from mt_editflow_nb.editing.lora import add_lora
    add_lora(meta, 4); add_lora(real, 4)
    text = real.encode_text(['add a ring'])
    a, b = profile_row(meta, weightless_text(meta, text.embeds.shape[1])), profile_row(real, text)
    c, S = real.transformer.config, text.embeds.shape[1] + 2*real.latent_shape[0]
    attention = 4*S**2*c.num_attention_heads*c.attention_head_dim*(c.num_layers + c.num_single_layers)     # the CPU's fused kernel is not counted
    assert a['flops_forward'] == b['flops_forward'] + attention and a['flops_backward'] == b['flops_backward'] + 2*attention
    assert abs(a['activations']/b['activations'] - 1) < .05 and a['checkpointed'] < a['activations']

def test_advice_and_size():
    c = make_config(dict(editor='black-forest-labs/FLUX.2-klein-base-4B', size=520, guidance=1.))
    with pytest.raises(InputError, match='multiple of 16'): plan(c)
    assert 'on a card of 16.0 GB' in advice(dict(memory={'judge': 1e9}, gpu_bytes=16e9)) and '+nf4' in advice(dict(memory={'judge': 1e9}))
    p = dict(memory={'transformer': 24e9, 'activations (batch 64)': 9e9, 'judge': 0})
    assert 'quantize=nf4' in advice(p) and '24.0 GB' in advice(p) and 'checkpointing' in advice(p) and '\n' not in advice(p)

def test_the_card_that_is_found(monkeypatch):
    "Minutes are those of the card, too little memory is said with what to lower, and a card without a known peak gets no number."
    name, size = ['NVIDIA GeForce RTX 4090'], [24e9]
    c = make_config(dict(lora_rank=4))
    here = plan(c)
    assert 'no GPU is found here' in plan_text(here) and here['gpu'] == 'H100'
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda: name[0])
    monkeypatch.setattr('torch.cuda.get_device_properties', lambda i: SimpleNamespace(total_memory=size[0]))
    p = plan(c)
    assert p['minutes'] == pytest.approx(here['minutes']*PEAK['H100']/PEAK['RTX 4090'])
    assert 'estimate on NVIDIA GeForce RTX 4090' in plan_text(p) and 'no GPU' not in plan_text(p) and 'too much' not in plan_text(p)
    size[0] = 1e8
    assert "too much for this card's 0.1 GB" in plan_text(plan(c)) and 'a smaller batch' in plan_text(plan(c))
    name[0] = 'Tesla T4'
    assert plan(c)['minutes'] is None and 'no peak is known for Tesla T4' in plan_text(plan(c))

def test_batch_is_found_and_remembered(tmp_path):
    tried = []
    def card(n):
        tried.append(n)
        if n > 3: raise torch.OutOfMemoryError
    assert find_batch(card, 16, tmp_path/'batch.json') == 2 and tried == [16, 8, 4, 2]
    assert find_batch(card, 16, tmp_path/'batch.json') == 2 and len(tried) == 4
    def none(n): raise torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError): find_batch(none, 4)

def test_a_run_halves_its_batch_and_remembers(tmp_path, capsys):
    "Memory that ends in the middle of a run: it goes on from the last checkpoint with half the rows, also when it is resumed, and ends as a run that began with them."
    settings = dict(sessions_per_iteration=1, group=4, turns=1, num_steps=2, lora_rank=2, save_every=1, std='group', min_std=0.)
    c, iterate, seen = make_config(dict(settings, iterations=3, batch=4)), training.iterate, []
    def card(c, *args):
        seen.append((args[-1], c.batch))
        if args[-1] == 1 and c.batch > 2: raise torch.OutOfMemoryError
        return iterate(c, *args)
    with patch.object(training, 'iterate', card): training.train(c, tmp_path/'a', judge, progress=False)
    assert seen == [(0, 4), (1, 4), (1, 2), (2, 2)]
    assert 'out of memory in iteration 1 with 4 rows a transformer call: going on with 2' in capsys.readouterr().err
    lines = (tmp_path/'a'/'metrics.jsonl').read_text().splitlines()
    assert len(lines) == 3 and json.loads((tmp_path/'a'/'config.json').read_text())['config']['batch'] == 4       # the configuration is the one asked for
    (tmp_path/'a'/'checkpoints'/'000003').rename(tmp_path/'gone')                                              # killed after iteration 1, and resumed
    adapter = load_file(tmp_path/'a'/'lora'/'pytorch_lora_weights.safetensors')
    seen.clear()
    with patch.object(training, 'iterate', card): training.train(c, tmp_path/'a', judge, progress=False)
    assert seen == [(2, 2)]
    again = load_file(tmp_path/'a'/'lora'/'pytorch_lora_weights.safetensors')
    assert all(torch.equal(adapter[k], again[k]) for k in adapter)
    def none(*args): raise torch.OutOfMemoryError
    with patch.object(training, 'iterate', none), pytest.raises(torch.OutOfMemoryError): training.train(c, tmp_path/'b', judge, progress=False)
    assert json.loads((tmp_path/'b'/'batch.json').read_text()) == dict(batch=1)

def test_8bit_adamw(tmp_path):
    "bitsandbytes' AdamW: states of a byte a number, steps close to those of 32 bits, and a run that is resumed ends as one that was not."
    import bitsandbytes as bnb
    settings = dict(sessions_per_iteration=1, group=4, turns=1, num_steps=2, lora_rank=16, save_every=1, iterations=2, std='group', min_std=0., lr=1e-3)
    c8, c32 = (make_config(dict(settings, adam8bit=x)) for x in (True, False))
    weights, opts = {}, {}
    for name, c in (('8', c8), ('32', c32)):
        training.train(c, tmp_path/name, judge, progress=False)
        weights[name] = load_file(tmp_path/name/'lora'/'pytorch_lora_weights.safetensors')
    state = load_file(tmp_path/'8'/'checkpoints'/'000002'/'state.safetensors')
    assert isinstance(make_optimizer(c8, [torch.nn.Parameter(torch.zeros(2))]), bnb.optim.AdamW8bit)
    assert any(k.startswith('adam.state1') and v.dtype == torch.uint8 for k, v in state.items())
    distance = lambda a, b: sum((a[k] - b[k]).square().sum() for k in a)**.5
    moved = sum(v.square().sum() for k, v in weights['32'].items() if 'lora_B' in k)**.5
    assert 0 < distance(weights['8'], weights['32']) < .2*moved
    (tmp_path/'8'/'checkpoints'/'000002').rename(tmp_path/'gone')
    training.train(c8, tmp_path/'8', judge, progress=False)
    again = load_file(tmp_path/'8'/'lora'/'pytorch_lora_weights.safetensors')
    assert all(torch.equal(again[k], weights['8'][k]) for k in again)
    with patch.object(policies, 'find_spec', lambda name: None), pytest.raises(InputError, match='pip install bitsandbytes'): make_optimizer(c8, [])

def test_command(capsys, tmp_path):
    assert main(['--plan', 'lora_rank=4']) == 0
    out = capsys.readouterr().out
    assert all(x in out for x in ('memory, GB', 'rows sampled', 'minutes an iteration'))
    with patch('mt_editflow_nb.cli.train.experiment', side_effect=torch.OutOfMemoryError): assert main(['--run', str(tmp_path/'x')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'too little memory' in err and 'GB' in err

@pytest.mark.parametrize('family', ['FluxKontextPipeline', 'Flux2KleinPipeline', 'QwenImageEditPlusPipeline'])
def test_bench_measures_every_family(family, twins, monkeypatch):
    "At toy size, on the CPU: the script runs; what it measures says nothing about a GPU."
    monkeypatch.syspath_prepend(str(root/'experiments'))
    import bench_gpu
    c = make_config(dict(editor=str(twins[family]), size=64, batch=2, lora_rank=2, checkpointing=True, guidance=2.5))
    row = bench_gpu.measure(c, editor_configs(c.editor), True, False, torch.device('cpu'), torch.float32, 1)
    assert 0 < row['seconds_forward_row'] and row['edits_per_gpu_second'] == pytest.approx(c.sessions_per_iteration*c.group*3/row['seconds_iteration'])

def test_bench_command(tmp_path, monkeypatch, capsys):
    "The whole script at toy size: 4 bits against bfloat16, with and without the compiler, a table and a file; a compiler that fails spoils no other row."
    monkeypatch.syspath_prepend(str(root/'experiments'))
    import bench_gpu
    recipe = str(root/'experiments/recipes/kontext_nft.yaml')
    monkeypatch.setattr('sys.argv', ['bench_gpu.py', recipe, 'checkpointing=false', '--toy', '--repeat', '1', '--out', str(tmp_path)])
    bench_gpu.main()
    result, table = json.loads((tmp_path/'bench_tiny_toy.json').read_text()), capsys.readouterr().out
    assert [(r['weights'], r['compiled']) for r in result['rows']] == [('nf4', False), ('nf4', True), ('bfloat16', False), ('bfloat16', True)]
    assert all(0 < r['kernel_share'] < 1 and r['edits_per_gpu_second'] > 0 and 'error' not in r for r in result['rows'])
    assert result['toy'] and all(x in table for x in ('seconds_iteration', 'kernel_share', 'peak_GB', 'planned', 'say nothing about a GPU'))
    def broken(c, about, nf4, compiled, *args):
        if compiled: raise NotImplementedError('no compiler')
        return result['rows'][0]
    monkeypatch.setattr(bench_gpu, 'measure', broken)
    bench_gpu.main()
    assert [r.get('error') for r in json.loads((tmp_path/'bench_tiny_toy.json').read_text())['rows']] == [None, 'NotImplementedError: no compiler']*2

def test_evaluation_takes_the_settings_of_training(tmp_path, capsys, monkeypatch):
    from mt_editflow_nb import card
    from mt_editflow_nb.editing.lora import save_lora
    import importlib, json
    save_lora(load_editor(lora_rank=2), tmp_path/'run'/'lora')
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(config=dict(editor='tiny', size=48, guidance=2., num_steps=3, quantize=None))))
    asked = {}
    monkeypatch.setattr(card, 'load_editor', lambda name, **kw: (asked.update(kw, name=name), load_editor(name, **kw))[1])
    assert card.main(['--lora', str(tmp_path/'run'/'lora'), '--n', '2', '--turns', '1', '--steps', '2', '--out', str(tmp_path/'out')]) == 0
    assert asked == dict(name='tiny', quantize=None, size=48, guidance=2.)
    assert 'warning: --steps 2, but the adapter was trained with 3' in capsys.readouterr().err
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(config=dict(editor='tiny', size=None, guidance=None, num_steps=2, quantize=None))))     # as most runs: the editor's own
    again = ['--lora', str(tmp_path/'run'/'lora'), '--n', '2', '--turns', '1']
    assert card.main([*again, '--out', str(tmp_path/'same')]) == 0 and 'warning' not in capsys.readouterr().err
    assert asked == dict(name='tiny', quantize=None, size=None, guidance=None)
    assert card.main([*again, '--guidance', '4', '--quantize', 'nf4', '--out', str(tmp_path/'other')]) == 0
    warned = capsys.readouterr().err
    assert all(f'warning: --{x}, but the adapter was trained with the default' in warned for x in ('guidance 4.0', 'quantize nf4'))
