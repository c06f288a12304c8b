"Every recipe is valid, names its sources, can be planned, and runs an iteration on the tiny twin of its family; the plan's numbers against independent counts."
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np, pytest, torch
from PIL import Image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from readme import root
from test_families import judge
from mt_editflow_nb import training
from mt_editflow_nb.editors import find_editor, load_editor, lora_parameters
from mt_editflow_nb.flux2 import tiny_klein
from mt_editflow_nb.plan import PUBLISHED, advice, count_rows, describe, find_batch, listen, meta_editor, meta_text, plan, plan_text, weight_bytes
from mt_editflow_nb.qwen import tiny_qwen
from mt_editflow_nb.sessions import InputError, Session
from mt_editflow_nb.training import iterate, load_for, main, make_config, read_recipe

recipes = sorted((root/'experiments/recipes').glob('*.yaml'))

@pytest.fixture(scope='session')
def twins(tmp_path_factory):
    d = tmp_path_factory.mktemp('twins')
    return dict(FluxKontextPipeline=find_editor('tiny')[0], Flux2KleinPipeline=tiny_klein(d/'klein'),
                QwenImageEditPipeline=tiny_qwen(d/'qwen'), QwenImageEditPlusPipeline=tiny_qwen(d/'plus', plus=True))

def noise_session(id, seed): return Session(id, Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)), ['add a ring', 'remove it'])

@pytest.mark.parametrize('path', recipes, ids=lambda p: p.stem)
def test_recipe(path, twins):
    assert 'Published starting point' in path.read_text() and 'Ours' in path.read_text()
    published = make_config(read_recipe(path))
    assert published.editor in PUBLISHED and published.size == 512 and published.quantize == 'nf4'
    small = dict(editor=str(twins[PUBLISHED[published.editor]['pipeline']]), size=64, sessions_per_iteration=2, group=2, num_steps=min(published.num_steps, 4), turns=2,
                 window=min(published.window, 2), adam8bit=False, min_std=0., iterations=2)
    c = make_config(read_recipe(path) | small)
    editor, passes = load_for(c, lora_rank=c.lora_rank), []
    params = lora_parameters(editor)
    velocity = editor.velocity
    editor.velocity = lambda x, *a: (passes.append((len(x), torch.is_grad_enabled())), velocity(x, *a))[1]
    old = [p.detach().clone() + .01 for p in params]                    # off-policy, as after some iterations
    with patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2):
        metrics = iterate(c, editor, params, old, torch.optim.AdamW(params, c.lr), [noise_session('a', 1), noise_session('b', 2)], judge, 0)[0]
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
    t = meta_editor(PUBLISHED[name], size=512, guidance=1.).transformer
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

@pytest.mark.parametrize('recipe,limit', [('kontext_nft', 24e9), ('klein_9b_nft', 20e9), ('qwen_edit_nft', 40e9)])
def test_memory_targets(recipe, limit):
    p = plan(make_config(read_recipe(root/f'experiments/recipes/{recipe}.yaml') | dict(turns=3)), gpu='H100')
    assert p['size'] == 512 and sum(p['memory'].values()) < limit, plan_text(p)

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
    about = describe('tiny')
    meta = meta_editor(about, size=48, guidance=2.5, dtype=torch.float32)
    real = load_editor()
    from mt_editflow_nb.editors import add_lora
    add_lora(meta, 4); add_lora(real, 4)
    text = real.encode_text(['add a ring'])
    a, b = listen(meta, meta_text(meta, text.embeds.shape[1])), listen(real, text)
    c, S = real.transformer.config, text.embeds.shape[1] + 2*real.latent_shape[0]
    attention = 4*S**2*c.num_attention_heads*c.attention_head_dim*(c.num_layers + c.num_single_layers)     # the CPU's fused kernel is not counted
    assert a['flops_forward'] == b['flops_forward'] + attention and a['flops_backward'] == b['flops_backward'] + 2*attention
    assert abs(a['activations']/b['activations'] - 1) < .05 and a['checkpointed'] < a['activations']

def test_advice_and_size():
    c = make_config(dict(editor='black-forest-labs/FLUX.2-klein-base-4B', size=520, guidance=1.))
    with pytest.raises(InputError, match='multiple of 16'): plan(c)
    p = dict(memory={'transformer': 24e9, 'activations (batch 64)': 9e9, 'judge': 0})
    assert 'quantize=nf4' in advice(p) and '24.0 GB' in advice(p) and 'checkpointing' in advice(p) and '\n' not in advice(p)

def test_batch_is_found_and_remembered(tmp_path):
    tried = []
    def card(n):
        tried.append(n)
        if n > 3: raise torch.OutOfMemoryError
    assert find_batch(card, 16, tmp_path/'batch.json') == 2 and tried == [16, 8, 4, 2]
    assert find_batch(card, 16, tmp_path/'batch.json') == 2 and len(tried) == 4
    def none(n): raise torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError): find_batch(none, 4)

def test_command(capsys, tmp_path):
    assert main(['--plan', 'lora_rank=4']) == 0
    out = capsys.readouterr().out
    assert all(x in out for x in ('memory, GB', 'rows sampled', 'minutes an iteration'))
    with patch.object(training, 'experiment', side_effect=torch.OutOfMemoryError): assert main(['--run', str(tmp_path/'x')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'too little memory' in err and 'GB' in err

@pytest.mark.parametrize('family', ['FluxKontextPipeline', 'Flux2KleinPipeline', 'QwenImageEditPlusPipeline'])
def test_bench_measures_every_family(family, twins, monkeypatch):
    "At toy size, on the CPU: the script runs; what it measures says nothing about a GPU."
    monkeypatch.syspath_prepend(str(root/'experiments'))
    import bench_gpu
    c = make_config(dict(editor=str(twins[family]), size=64, batch=2, lora_rank=2, checkpointing=True, guidance=2.5))
    row = bench_gpu.measure(c, describe(c.editor), True, False, torch.device('cpu'), torch.float32, 1)
    assert 0 < row['seconds_forward_row'] and row['edits_per_gpu_second'] == pytest.approx(c.sessions_per_iteration*c.group*3/row['seconds_iteration'])

def test_evaluation_takes_the_settings_of_training(tmp_path, capsys, monkeypatch):
    from mt_editflow_nb import card
    from mt_editflow_nb.editors import save_lora
    import json
    save_lora(load_editor(lora_rank=2), tmp_path/'run'/'lora')
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(config=dict(editor='tiny', size=48, guidance=2., num_steps=3, quantize=None))))
    asked = {}
    monkeypatch.setattr(card, 'load_editor', lambda name, **kw: (asked.update(kw, name=name), load_editor(name, **kw))[1])
    assert card.main(['--lora', str(tmp_path/'run'/'lora'), '--n', '2', '--turns', '1', '--steps', '2', '--out', str(tmp_path/'out')]) == 0
    assert asked == dict(name='tiny', quantize=None, size=48, guidance=2.)
    assert 'warning: --steps 2, but the adapter was trained with 3' in capsys.readouterr().err
