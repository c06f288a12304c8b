"""Every recipe is valid, names its sources, can be planned, and runs an iteration on the tiny twin of its family.

The plan's numbers stand against independent counts."""
import gc, importlib, json, re
from collections import Counter
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np, pytest, torch
from PIL import Image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from safetensors.torch import load_file
from readme import root
from test_families import judge
from mt_editflow_nb.editing.loading import find_editor, load_editor
from mt_editflow_nb.editing.lora import add_lora, lora_parameters, save_lora
from mt_editflow_nb.editing.flux2 import tiny_klein
from mt_editflow_nb.editing.editor import Text
from mt_editflow_nb.training.budget import (
    DECODER_NUMBERS, PEAK_FLOPS, PUBLISHED_EDITORS, TRANSFORMER_CLASSES, advice, count_evaluations, count_rows,
    editor_configs, find_batch, judge_bytes, plan, plan_text, profile_row, weightless_editor,
    weightless_encoder, weightless_text)
from mt_editflow_nb.editing.qwen import tiny_qwen
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import Session
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.algorithm.iterate import iterate
from mt_editflow_nb.algorithm import policy as policies
from mt_editflow_nb.algorithm.policy import Policy, make_optimizer
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.training.runs import judge_fingerprint
from mt_editflow_nb.training import budget, parts
from mt_editflow_nb.training.parts import load_configured_editor, load_judges
from mt_editflow_nb.training.train import step_of
from mt_editflow_nb.cli.train import main, read_recipe
from mt_editflow_nb.algorithm.config import make_config

training = importlib.import_module('mt_editflow_nb.training.train')
recipes = sorted((root/'experiments/recipes').glob('*.yaml'))

@pytest.fixture(scope='session')
def twins(tmp_path_factory):
    d = tmp_path_factory.mktemp('twins')
    return dict(FluxKontextPipeline=find_editor('tiny')[0], Flux2KleinPipeline=tiny_klein(d/'klein'),
                QwenImageEditPipeline=tiny_qwen(d/'qwen'), QwenImageEditPlusPipeline=tiny_qwen(d/'plus', plus=True))

def noise_session(id, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    return Session(id, Image.fromarray(pixels), ['add a ring', 'remove it'])

SOURCES = ('Edit-R1', 'Flow-GRPO', 'DiffusionNFT', 'Flow-Factory', 'UniRL', 'verl-omni', 'MT-EditFlow', 'ours')

def counting(editor):
    "Record how many rows go through the transformer, and whether gradients flow."
    passes = []
    velocity = editor.velocity
    def counted(x, *args):
        passes.append((len(x), torch.is_grad_enabled()))
        return velocity(x, *args)
    editor.velocity = counted
    return passes

@pytest.mark.parametrize('path', recipes, ids=lambda p: p.stem)
def test_recipe(path, twins):
    assert 'Published starting point' in path.read_text()
    for line in path.read_text().splitlines():
        comment = line.partition('  # ')[2]
        assert line.startswith(('#', 'editor:')) or any(x in comment for x in SOURCES), line
    published = make_config(read_recipe(path))
    assert published.editor in PUBLISHED_EDITORS
    assert published.size == (384 if '384' in path.stem else 512)
    assert published.quantize == (None if 'bf16' in path.stem else 'nf4')
    assert ('@http' in published.judge) == ('vllm serve' in path.read_text()) == ('one_card' not in path.stem)
    twin = str(twins[PUBLISHED_EDITORS[published.editor]['pipeline']])
    small = dict(editor=twin, size=64, sessions_per_iteration=2, group=2, num_steps=min(published.num_steps, 3),
                 turns=2, window=min(published.window, 2), min_std=0., iterations=2, batch=8,
                 judge='verifier')                                    # see below
    config = make_config(read_recipe(path) | small)
    editor = load_configured_editor(config, lora_rank=config.lora_rank)
    layers = {type(m).__name__ for m in editor.transformer.modules()}
    assert any('Linear4bit' in name for name in layers) == (published.quantize == 'nf4')
    policy = Policy(config, editor)
    passes = counting(editor)
    for o in policy.old: o += .01                                     # off-policy, as after some iterations
    with patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2):
        metrics = iterate(config, policy, [noise_session('a', 1), noise_session('b', 2)], judge, 0)[0]
    assert np.isfinite(metrics['loss'])
    assert metrics['rows'] == 4                                         # no row is without an advantage
    planned = count_rows(config, 2)
    assert sum(n for n, grad in passes if grad) == planned['trained']
    assert sum(n for n, grad in passes if not grad) == planned['sampled'] + planned['compared']

@pytest.mark.parametrize('settings', [dict(algorithm='sft'), dict(algorithm='sft', exposure_turns=2),
                                      dict(algorithm='distill', train_timesteps=2)], ids=str)
def test_the_plan_counts_what_other_algorithms_pass(settings):
    "As an iteration counts it: pictures that are given are not sampled, and a perfect state needs no teacher."
    config = make_config(settings | dict(sessions_per_iteration=2, group=2, num_steps=3, turns=3, lora_rank=2))
    policy = Policy(config, load_editor(lora_rank=2))
    step = step_of(config, 0)(config, policy, shape_sessions(2, 3), load_judge('verifier'), 0)
    planned = count_rows(config, 3)
    passes = Counter(step.metrics['passes'])
    assert planned['sampled'] == passes['sampled'] and planned['trained'] == passes['trained'] > 0
    assert planned['compared'] == passes['old'] + passes['reference']

def test_evaluations_are_counted_as_they_are_made():
    "Before and after, and in between every four iterations, but not once more at the last one."
    assert [count_evaluations(make_config(dict(iterations=8, eval_every=n))) for n in (0, 3, 4, 8)] == [2, 4, 3, 2]

@pytest.mark.parametrize('path', [p for p in recipes if 'Expected hours' in p.read_text()], ids=lambda p: p.stem)
def test_expected_hours_and_card_of_a_recipe(path):
    "The head of a recipe says what the plan says, and its card has a gigabyte to spare."
    text = path.read_text()
    config = make_config(read_recipe(path))
    said = dict(re.findall(r'(RTX 4090|L40S|A100|H100) (\d+)', text.splitlines()[1]))
    assert len(said) >= 2 and said == {card: f"{plan(config, card)['hours']:.0f}" for card in said}
    gigabytes, = re.findall(r'one GPU of (\d+) GB', text.splitlines()[0])
    p = plan(config, 'H100')
    assert sum(p['memory'].values()) < (int(gigabytes) - 1)*1e9 and not p['uncounted']
    assert (p['memory']['judge'] > 5e9) == ('one_card' in path.stem)

def test_the_line_that_serves_the_judge():
    "A judge of 32 billion parameters on a card of 80 GB: its context fits with the flags, and does not without them."
    config = dict(text_config=dict(vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                                   num_attention_heads=40, num_key_value_heads=8),
                  vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3456, num_heads=16,
                                     out_hidden_size=5120), tie_word_embeddings=False)
    model = weightless_encoder('Qwen2_5_VLForConditionalGeneration', config)
    weights = 2*sum(p.numel() for p in model.parameters())
    assert abs(weights/2e9 - 33.45) < .01                               # as its repository says
    a_token = 64*2*8*128*2    # keys and values of 64 layers
    card = 79.1*2**30         # as cards report
    assert .9*card - weights < 128_000*a_token                          # vLLM's default share, the model's context
    lines = {line for f in (root/'README.md', *recipes) for line in f.read_text().splitlines() if 'vllm serve' in line}
    for line in lines:
        share, = re.findall(r'--gpu-memory-utilization (\S+)', line)
        context, = re.findall(r'--max-model-len (\S+)', line)
        assert float(share)*card - weights > int(context)*a_token + 6e9  # and what it computes with
        assert '--limit-mm-per-prompt' in line
    assert lines

# --- the plan's arithmetic

def linear(i, o): return i*o + o
def weights(i, o): return i*o

def flux_parameters(config, h, d):
    double = 2*(linear(h, 6*h) + 4*linear(h, h) + linear(h, 4*h) + linear(4*h, h)) + 4*d
    single = linear(h, 3*h) + linear(h, 4*h) + linear(5*h, h) + 3*linear(h, h) + 2*d
    blocks = config['num_layers']*double + config['num_single_layers']*single
    inputs = linear(config['in_channels'], h) + linear(config['joint_attention_dim'], h)
    time_and_guidance = 2*(linear(256, h) + linear(h, h)) + linear(config['pooled_projection_dim'], h) + linear(h, h)
    return blocks + inputs + time_and_guidance + linear(h, 2*h) + linear(h, config['in_channels'])

def flux2_parameters(config, h, d):
    double = 8*h*h + 2*(weights(h, 6*h) + weights(3*h, h)) + 4*d
    single = weights(h, 9*h) + weights(4*h, h) + 2*d
    blocks = config['num_layers']*double + config['num_single_layers']*single
    inputs = weights(config['in_channels'], h) + weights(config['joint_attention_dim'], h)
    modulation = weights(256, h) + weights(h, h) + 2*weights(h, 6*h) + weights(h, 3*h)
    return blocks + inputs + modulation + weights(h, 2*h) + weights(h, config['in_channels'])

def qwen_parameters(config, h, d):
    double = 2*(linear(h, 6*h) + 4*linear(h, h) + linear(h, 4*h) + linear(4*h, h)) + 4*d
    inputs = linear(config['in_channels'], h) + linear(config['joint_attention_dim'], h) + config['joint_attention_dim']
    outputs = linear(h, 2*h) + linear(h, 4*config['out_channels'])
    return config['num_layers']*double + inputs + linear(256, h) + linear(h, h) + outputs

@pytest.mark.parametrize('name,closed_form,billions', [
    ('black-forest-labs/FLUX.1-Kontext-dev', flux_parameters, 11.9),
    ('black-forest-labs/FLUX.2-klein-base-4B', flux2_parameters, 3.9),
    ('black-forest-labs/FLUX.2-klein-base-9B', flux2_parameters, 9.1),
    ('Qwen/Qwen-Image-Edit', qwen_parameters, 20.4)])
def test_parameters_of_the_published_models(name, closed_form, billions):
    "Parameters of a transformer against those counted layer by layer on paper."
    t = weightless_editor(PUBLISHED_EDITORS[name], size=512, guidance=1.).transformer
    n = sum(p.numel() for p in t.parameters())
    d = t.config['attention_head_dim']
    if closed_form is flux_parameters: assert t.config.guidance_embeds
    assert n == closed_form(t.config, t.config['num_attention_heads']*d, d) and round(n/1e9, 1) == billions

def test_parameters_of_the_other_parts():
    "Text encoders against the totals that their repositories publish; autoencoders against diffusers' defaults."
    import diffusers, transformers
    names = ('black-forest-labs/FLUX.1-Kontext-dev', 'black-forest-labs/FLUX.2-klein-base-4B',
             'black-forest-labs/FLUX.2-klein-base-9B', 'Qwen/Qwen-Image-Edit')
    def size(model): return sum(p.numel() for p in model.parameters())
    def encoder(name, config):
        cls = getattr(transformers, name)
        return cls(cls.config_class(**config))
    with torch.device('meta'):
        found = {name: [size(encoder(*e)) for e in PUBLISHED_EDITORS[name]['text']] for name in names}
        vaes = size(diffusers.AutoencoderKLFlux2()), size(diffusers.AutoencoderKLQwenImage())
    assert [*found.values()] == [[123_060_480, 4_762_310_656], [4_022_468_096], [8_190_735_360], [8_292_166_656]]
    others = 'black-forest-labs/FLUX.2-klein-base-4B', 'Qwen/Qwen-Image-Edit'
    published = [PUBLISHED_EDITORS[name]['vae'] for name in others]
    assert list(vaes) == published

@pytest.mark.parametrize('recipe,targets,limit', [('kontext_grpo', 'all', 24e9), ('klein_9b_nft', 'all', 20e9),
                                                  ('qwen_edit_nft', 'attention', 40e9)])
def test_memory_targets(recipe, targets, limit):
    "512 pixels, 3 turns, groups of 8, LoRA of rank 32, NF4, and a gigabyte to spare."
    config = make_config(read_recipe(root/f'experiments/recipes/{recipe}.yaml') | dict(turns=3, lora_targets=targets))
    p = plan(config, gpu='H100')
    assert (config.size, config.group, config.lora_rank, config.quantize) == (512, 8, 32, 'nf4')
    assert sum(p['memory'].values()) < limit - 1e9, plan_text(p)

def most_held(f):
    "The most bytes that a call holds at a time, from every allocation that the profiler sees."
    from torch.profiler import ProfilerActivity, profile
    gc.collect()                                     # what earlier tests left must not be freed while it is counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    return max(np.cumsum([e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']))

tiny_axes = dict(num_attention_heads=2, attention_head_dim=64, joint_attention_dim=128)
thin = {
    'black-forest-labs/FLUX.1-Kontext-dev': dict(num_layers=3, num_single_layers=6, axes_dims_rope=(16, 24, 24),
                                                 pooled_projection_dim=64, guidance_embeds=True),
    'black-forest-labs/FLUX.2-klein-base-9B': dict(num_layers=2, num_single_layers=6, axes_dims_rope=(16,)*4,
                                                   in_channels=64, guidance_embeds=False),
    'Qwen/Qwen-Image-Edit-2511': dict(num_layers=6, axes_dims_rope=(16, 24, 24), in_channels=64, out_channels=16,
                                      zero_cond_t=True)}

@pytest.mark.parametrize('name', thin)
def test_activations_against_what_the_allocator_sees(name):
    "A thin transformer of each family trains a row: the planned bytes are within 10 % of those really held."
    import diffusers
    about = dict(PUBLISHED_EDITORS[name], transformer=tiny_axes | thin[name])
    meta, real = (weightless_editor(about, size=256, guidance=1., dtype=torch.float32) for _ in range(2))
    cls = getattr(diffusers, TRANSFORMER_CLASSES[about['pipeline']])
    real.transformer = cls.from_config(about['transformer']).requires_grad_(False)
    real.device = torch.device('cpu')
    for e in (meta, real): add_lora(e, 8, targets='attention')
    shapes = weightless_text(meta, 128)
    planned = profile_row(meta, shapes)
    def some(x): return None if x is None else torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ids = None if shapes.ids is None else torch.zeros(shapes.ids.shape)
    text = Text(some(shapes.embeds), some(shapes.pooled), ids)
    torch.manual_seed(0)
    x, image = (torch.randn(1, *real.latent_shape) for _ in range(2))
    s = torch.full((1,), .5)
    def step():
        real.velocity(x, s, text, image).sum().backward()
        for p in lora_parameters(real): p.grad = None
    for kept in ('activations', 'checkpointed'):
        if kept == 'checkpointed': real.transformer.enable_gradient_checkpointing()
        step()
        assert abs((planned[kept] + planned['working'])/most_held(step) - 1) < .1

def test_what_decoding_holds():
    "The full-size autoencoders with random weights decode a small picture."
    import diffusers
    kontext = dict(block_out_channels=(128, 256, 512, 512), down_block_types=('DownEncoderBlock2D',)*4,
                   up_block_types=('UpDecoderBlock2D',)*4, layers_per_block=2, latent_channels=16, use_quant_conv=False,
                   use_post_quant_conv=False)
    flux = diffusers.AutoencoderKL(**kontext)
    qwen = diffusers.AutoencoderKLQwenImage()
    assert sum(p.numel() for p in flux.parameters()) == PUBLISHED_EDITORS['black-forest-labs/FLUX.1-Kontext-dev']['vae']
    @torch.no_grad()
    def held(vae, shape): return most_held(partial(vae.decode, torch.zeros(shape)))
    assert abs(DECODER_NUMBERS[False]*96**2*4/held(flux, (1, 16, 12, 12)) - 1) < .05
    assert abs(DECODER_NUMBERS[True]*96**2*4/held(qwen, (1, 16, 1, 12, 12)) - 1) < .05

def test_judges_are_counted():
    "A judge in this process takes memory, one behind a server and the verifier none; an unknown one is named."
    from mt_editflow_nb.rewards.engines import Local
    served = judge_bytes('Qwen/Qwen2.5-VL-7B-Instruct@http://localhost:8000/v1:logit', 512, 2)
    assert judge_bytes('verifier', 512, 2) == served == 0
    whole, four = (judge_bytes(f'Qwen/Qwen2.5-VL-7B-Instruct{q}:logit', 512, 2) for q in ('', '+nf4'))
    words = 2*18*18 + 1024
    remembered = 32*words*28*2*4*128*2                              # keys and values of 28 layers, 4 heads of 128
    assert whole == 8_292_166_656*2 + remembered                    # published count
    assert .28 < (four - remembered)/(8_292_166_656*2) < .4         # a bit over a quarter: embeddings and head stay
    held = sum(p.numel()*p.element_size() for p in Local('tiny').loaded[0].parameters())
    assert held <= judge_bytes('tiny:think', 48, 4) < 200*held
    def known(name, *_): return None if name == 'some/model:think' else 0
    config = make_config(dict(judge='some/model:think'))
    with patch('mt_editflow_nb.training.budget.judge_bytes', known): p = plan(config)
    assert 'not counted: some/model:think' in plan_text(p) and p['memory']['judge'] == 0

def test_the_verifier_reads_small_pictures_only(tmp_path, capsys):
    "Other sizes need another judge, which is said before anything is sampled; with one, any size is fine."
    few = ['size=64', 'iterations=0', 'eval_sessions=1', 'eval_judge=tiny:logit']
    assert main([*few, '--run', str(tmp_path/'a')]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith('mtef_train: judge: expected MODEL:MODE') and '48 pixels' in said and 'works at 64' in said
    assert said.endswith("received 'verifier'")
    config = make_config(dict(size=64, judge='tiny:logit', eval_judge='tiny:logit', iterations=1,
                              sessions_per_iteration=1, group=2, turns=1, num_steps=2, lora_rank=2, std='group',
                              min_std=0.))
    training.train(config, tmp_path/'b', judge, progress=False)
    assert len((tmp_path/'b'/'metrics.jsonl').read_text().splitlines()) == 1

def test_a_judge_is_loaded_once(tmp_path):
    from mt_editflow_nb.training.train import experiment
    asked = []
    class Stop(Exception): pass
    def one(name, **kw):
        asked.append(name)
        return judge
    config = make_config(dict(judge='tiny:logit', eval_judge='tiny:logit', eval_sessions=1, iterations=0))
    with patch.object(parts, 'load_judge', one), patch.object(training, 'load_configured_editor', side_effect=Stop):
        with pytest.raises(Stop): experiment(config, tmp_path/'run')
    assert asked == ['tiny:logit']

def test_both_judges_keep_their_answers(tmp_path):
    "A resumed run asks neither of them twice; a judge that is asked in another way is another judge."
    config = make_config(dict(judge='tiny:think', eval_judge='tiny:logit'))
    judge, eval_judge = load_judges(config, cache=tmp_path/'judge.sqlite')
    assert judge.engine.path == eval_judge.engine.path == tmp_path/'judge.sqlite'
    plain = judge_fingerprint('tiny:think')
    assert judge_fingerprint('tiny:think', {}) == plain != judge_fingerprint('tiny:think', dict(max_tokens=9))

def test_bytes_of_a_loaded_editor():
    "The plan of the tiny editor in NF4 against the tensors that a loaded one holds."
    editor = load_editor(quantize='nf4', lora_rank=8)
    p = plan(make_config(dict(quantize='nf4', lora_rank=8)))
    held = 0
    for m in editor.transformer.modules():
        for n, t in m.named_parameters(recurse=False):
            if 'Linear4bit' not in type(m).__name__ or n != 'weight': continue
            held += t.numel()*t.element_size() + t.quant_state.absmax.numel()*4
    for n, t in editor.transformer.named_parameters():
        if 'lora_' not in n and t.dtype != torch.uint8: held += t.numel()*t.element_size()
    assert abs(p['memory']['transformer']/held - 1) < .01
    assert p['adapter'] == sum(t.numel() for t in lora_parameters(editor))

def test_activations_of_a_loaded_editor():
    "What the meta device counts against the same transformer with numbers: autograd keeps the same tensors."
    about = editor_configs('tiny')
    meta = weightless_editor(about, size=48, guidance=2.5, dtype=torch.float32)
    real = load_editor()
    for e in (meta, real): add_lora(e, 4)
    text = real.encode_text(['add a ring'])
    a = profile_row(meta, weightless_text(meta, text.embeds.shape[1]))
    b = profile_row(real, text)
    config = real.transformer.config
    S = text.embeds.shape[1] + 2*real.latent_shape[0]
    # the CPU's fused kernel is not counted
    layers = config.num_layers + config.num_single_layers
    attention = 4*S**2*config.num_attention_heads*config.attention_head_dim*layers
    assert a['flops_forward'] == b['flops_forward'] + attention
    assert a['flops_backward'] == b['flops_backward'] + 2*attention
    assert abs(a['activations']/b['activations'] - 1) < .05 and a['checkpointed'] < a['activations']

def test_advice_and_size():
    config = make_config(dict(editor='black-forest-labs/FLUX.2-klein-base-4B', size=520, guidance=1.))
    with pytest.raises(InputError, match='multiple of 16'): plan(config)
    assert 'on a card of 16.0 GB' in advice(dict(memory={'judge': 1e9}, gpu_bytes=16e9))
    assert '+nf4' in advice(dict(memory={'judge': 1e9}))
    p = dict(memory={'transformer': 24e9, 'activations (batch 64)': 9e9, 'judge': 0})
    assert all(x in advice(p) for x in ('quantize=nf4', '24.0 GB', 'checkpointing')) and '\n' not in advice(p)
    assert '0.0 GB' not in advice(dict(memory={'transformer': 4e7, 'judge': 0}))     # small editors have numbers too

def test_the_card_that_is_found(monkeypatch):
    "Minutes are those of the card, too little memory is said, and a card without a known peak gets no number."
    name = ['NVIDIA GeForce RTX 4090']
    size = [24e9]
    config = make_config(dict(lora_rank=4))
    here = plan(config)
    assert 'no GPU is found here' in plan_text(here) and here['gpu'] == 'H100'
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda: name[0])
    monkeypatch.setattr('torch.cuda.get_device_properties', lambda i: SimpleNamespace(total_memory=size[0]))
    p = plan(config)
    assert p['minutes'] == pytest.approx(here['minutes']*PEAK_FLOPS['H100']/PEAK_FLOPS['RTX 4090'])
    assert 'estimate on NVIDIA GeForce RTX 4090' in plan_text(p)
    assert 'no GPU' not in plan_text(p) and 'too much' not in plan_text(p)
    size[0] = 1e8
    assert "too much for this card's 0.1 GB" in plan_text(plan(config)) and 'a smaller batch' in plan_text(plan(config))
    name[0] = 'Tesla T4'
    assert plan(config)['minutes'] is None and 'no peak is known for Tesla T4' in plan_text(plan(config))

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
    "Memory ends in the middle of a run: it goes on from the last checkpoint with half the rows, also when resumed."
    settings = dict(sessions_per_iteration=1, group=4, turns=1, num_steps=2, lora_rank=2, save_every=1, std='group',
                    min_std=0., eval_sessions=2)
    config = make_config(dict(settings, iterations=3, batch=4))
    iterate = training.iterate
    seen = []
    def card(config, *args):
        seen.append((args[-1], config.batch))
        if args[-1] == 1 and config.batch > 2: raise torch.OutOfMemoryError
        return iterate(config, *args)
    with patch.dict(training.STEPS, nft=card): training.train(config, tmp_path/'a', judge, progress=False)
    assert seen == [(0, 4), (1, 4), (1, 2), (2, 2)]
    assert 'out of memory in iteration 1 with 4 rows a transformer call: going on with 2' in capsys.readouterr().err
    lines = (tmp_path/'a'/'metrics.jsonl').read_text().splitlines()
    asked_for = json.loads((tmp_path/'a'/'config.json').read_text())['config']['batch']
    assert len(lines) == 3 and asked_for == 4
    (tmp_path/'a'/'checkpoints'/'000003').rename(tmp_path/'gone')      # killed after iteration 1, and resumed
    adapter = load_file(tmp_path/'a'/'lora'/'pytorch_lora_weights.safetensors')
    seen.clear()
    with patch.dict(training.STEPS, nft=card): training.train(config, tmp_path/'a', judge, progress=False)
    assert seen == [(2, 2)]
    again = load_file(tmp_path/'a'/'lora'/'pytorch_lora_weights.safetensors')
    assert all(torch.equal(adapter[k], again[k]) for k in adapter)
    def none(*args): raise torch.OutOfMemoryError
    with patch.dict(training.STEPS, nft=none), pytest.raises(torch.OutOfMemoryError):
        training.train(config, tmp_path/'b', judge, progress=False)
    assert json.loads((tmp_path/'b'/'batch.json').read_text()) == dict(batch=1)

def test_8bit_adamw(tmp_path):
    "bitsandbytes' AdamW: states of a byte a number, steps close to 32 bits', and a resume that changes nothing."
    import bitsandbytes as bnb
    settings = dict(sessions_per_iteration=1, group=4, turns=1, num_steps=2, lora_rank=16, save_every=1,
                    eval_sessions=2, iterations=2, std='group', min_std=0., lr=1e-3)
    c8, c32 = (make_config(dict(settings, adam8bit=x)) for x in (True, False))
    weights = {}
    for name, c in (('8', c8), ('32', c32)):
        training.train(c, tmp_path/name, judge, progress=False)
        weights[name] = load_file(tmp_path/name/'lora'/'pytorch_lora_weights.safetensors')
    state = load_file(tmp_path/'8'/'checkpoints'/'000002'/'state.safetensors')
    assert isinstance(make_optimizer(c8, [torch.nn.Parameter(torch.zeros(2))]), bnb.optim.AdamW8bit)
    assert any(k.startswith('adam.state1') and v.dtype == torch.uint8 for k, v in state.items())
    def distance(a, b): return sum((a[k] - b[k]).square().sum() for k in a)**.5
    moved = sum(v.square().sum() for k, v in weights['32'].items() if 'lora_B' in k)**.5
    assert 0 < distance(weights['8'], weights['32']) < .2*moved
    (tmp_path/'8'/'checkpoints'/'000002').rename(tmp_path/'gone')
    training.train(c8, tmp_path/'8', judge, progress=False)
    again = load_file(tmp_path/'8'/'lora'/'pytorch_lora_weights.safetensors')
    assert all(torch.equal(again[k], weights['8'][k]) for k in again)
    with patch.object(policies, 'find_spec', lambda name: None):
        missing = 'adam8bit: expected bitsandbytes to be installed .pip install bitsandbytes.'
        with pytest.raises(InputError, match=missing): make_optimizer(c8, [])

def test_command(capsys, tmp_path):
    assert main(['--plan', 'lora_rank=4']) == 0
    assert main(['--plan', 'lora_rank=4', 'sessions=hf:somebody/sessions']) == 0       # which nothing fetches
    out = capsys.readouterr().out
    assert all(x in out for x in ('memory, GB', 'rows sampled', 'minutes an iteration'))
    with patch('mt_editflow_nb.cli.train.experiment', side_effect=torch.OutOfMemoryError):
        assert main(['--run', str(tmp_path/'x')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'too little memory' in err and 'GB' in err

def one_block_of_each_kind(name):
    "`editor_configs` of a transformer that is as shallow as can be."
    about = editor_configs(name)
    single = dict(num_single_layers=1) if 'num_single_layers' in about['transformer'] else {}
    return about | dict(transformer=about['transformer'] | dict(num_layers=1) | single)

@pytest.mark.parametrize('family', ['FluxKontextPipeline', 'Flux2KleinPipeline', 'QwenImageEditPlusPipeline'])
def test_bench_measures_every_family(family, twins, monkeypatch):
    "At toy size, on the CPU: the script runs; what it measures says nothing about a GPU."
    monkeypatch.syspath_prepend(str(root/'experiments'))
    import bench_gpu
    config = make_config(dict(editor=str(twins[family]), size=64, batch=2, lora_rank=2, checkpointing=True,
                              guidance=2.5))
    monkeypatch.setattr(budget, 'editor_configs', one_block_of_each_kind)
    configs = one_block_of_each_kind(config.editor)
    cpu = torch.device('cpu')
    row, exact = bench_gpu.measure(config, configs, True, 'plain', cpu, torch.float32, 1)
    edits = config.sessions_per_iteration*config.group*3
    assert 0 < row['seconds_forward_row'] and row['option'] == 'plain' and row['relative_error'] is None
    assert row['edits_per_gpu_second'] == pytest.approx(edits/row['seconds_iteration'])
    again, _ = bench_gpu.measure(config, configs, True, 'attention', cpu, torch.float32, 1, exact)
    assert again['relative_error'] < 1e-4                               # the same weights and inputs
    few = config.model_copy(update=dict(sessions_per_iteration=1, group=2, turns=2, adam8bit=True, min_std=0.))
    log, held = bench_gpu.run_iterations(few, configs, True, cpu, torch.float32)
    assert len(log) == 3 and all(np.isfinite(i['loss']) and i['grad_norm'] > 0 for i in log)
    table = bench_gpu.compare_parts(plan(few.model_copy(update=dict(quantize='nf4')))['memory'], held)
    assert table.error['adapter, its gradient, old policy'] == 0 and -.2 < table.error['rollouts'] < 1
    *encoders, quantized, autoencoder = bench_gpu.measure_encoders(few, configs, cpu, torch.float32, 1)
    for row, (name, encoder) in zip(encoders, configs['text'], strict=True):
        numbers = sum(p.numel() for p in weightless_encoder(name, encoder).parameters())
        assert row['part'] == name and row['held_GB'] == pytest.approx(4*numbers/1e9) and row['seconds_a_prompt'] > 0
    assert quantized['weights'] == 'nf4' and quantized['held_GB'] < encoders[-1]['held_GB']
    assert ('seconds_a_picture_seen' in quantized) == ('Qwen' in family)
    assert autoencoder['held_GB'] == pytest.approx(4*configs['vae']/1e9)
    spent = autoencoder['seconds_to_encode'] + autoencoder['seconds_to_decode']
    assert autoencoder['seconds_an_iteration'] == pytest.approx(2*2*spent)      # a session of two members and two turns

@pytest.mark.parametrize('name', ['black-forest-labs/FLUX.1-Kontext-dev', 'black-forest-labs/FLUX.2-klein-base-4B',
                                  'Qwen/Qwen-Image-Edit'])
def test_bench_builds_the_published_autoencoders(name, monkeypatch):
    "As many parameters as the plan has, which are those of the published files."
    monkeypatch.syspath_prepend(str(root/'experiments'))
    import bench_gpu
    autoencoder = bench_gpu.autoencoder_of(name, PUBLISHED_EDITORS[name]['pipeline'])
    assert sum(p.numel() for p in autoencoder.parameters()) == PUBLISHED_EDITORS[name]['vae']

def test_bench_command(tmp_path, monkeypatch, capsys):
    "The whole script at toy size: a table and a file; a compiler that fails spoils no other row."
    monkeypatch.delenv('TORCHDYNAMO_DISABLE')                    # as conftest.py has it
    monkeypatch.syspath_prepend(str(root/'experiments'))
    import bench_gpu
    from torch._dynamo.utils import counters
    compiled = counters['stats']['unique_graphs']
    recipe = str(root/'experiments/recipes/kontext_nft.yaml')
    few = ['checkpointing=false', 'sessions_per_iteration=1', 'group=2', 'turns=2', 'num_steps=2', 'train_timesteps=1']
    argv = [recipe, *few, '--toy', '--repeat', '1', '--out', str(tmp_path)]
    monkeypatch.setattr(bench_gpu, 'editor_configs', one_block_of_each_kind)
    monkeypatch.setattr('sys.argv', ['bench_gpu.py', *argv])
    bench_gpu.main()
    assert counters['stats']['unique_graphs'] > compiled
    file = tmp_path/'bench_tiny_toy.json'
    result = json.loads(file.read_text())
    table = capsys.readouterr().out
    options = ['plain', 'compile', 'attention', 'autocast']
    variants = [('nf4', o) for o in options] + [('bfloat16', o) for o in (*options, 'merge')]
    assert [(r['weights'], r['option']) for r in result['rows']] == variants
    assert all(r['relative_error'] < .1 for r in result['rows'] if r['option'] != 'plain')
    assert all(len(log) == 3 for log in result['iterations'].values())
    assert {'transformer', 'optimiser', 'rollouts'} < set(result['parts']['nf4'])
    assert all(0 < r['kernel_share'] < 1 and r['edits_per_gpu_second'] > 0 and 'error' not in r for r in result['rows'])
    words = ('seconds_iteration', 'kernel_share', 'peak_GB', 'planned', 'say nothing about a GPU')
    assert result['toy'] and all(x in table for x in words)
    def broken(config, about, nf4, option, *args):
        if option == 'compile': raise NotImplementedError('no compiler')
        return result['rows'][0], None
    monkeypatch.setattr(bench_gpu, 'measure', broken)
    monkeypatch.setattr(bench_gpu, 'run_iterations', lambda *args: ([], {}))
    monkeypatch.setattr(bench_gpu, 'measure_encoders', lambda *args: result['encoders'])
    bench_gpu.main()
    errors = [r.get('error') for r in json.loads(file.read_text())['rows']]
    assert errors == [None, 'NotImplementedError: no compiler', None, None, None, 'NotImplementedError: no compiler',
                      None, None, None]

def test_a_recipe_on_a_card_before_anything_is_downloaded(tmp_path, monkeypatch, capsys):
    "A pipeline with random weights, made, loaded and trained; small here, of the published size on a card."
    monkeypatch.syspath_prepend(str(root/'experiments'))
    import bench_gpu, try_card
    name = 'black-forest-labs/FLUX.1-Kontext-dev'
    small = dict(num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=32,
                 pooled_projection_dim=32)
    text = [('CLIPTextModel', dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)),
            ('T5EncoderModel', dict(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))]
    published = PUBLISHED_EDITORS[name]
    shrunk = published | dict(transformer=published['transformer'] | small, text=text)
    monkeypatch.setitem(PUBLISHED_EDITORS, name, shrunk)
    monkeypatch.setattr(bench_gpu, 'FLUX_AUTOENCODER', bench_gpu.FLUX_AUTOENCODER | dict(block_out_channels=(32,)*4))
    few = ['size=32', 'turns=2', 'group=2', 'num_steps=2', 'eval_steps=2', 'lora_rank=2', 'quantize=null',
           'sampler=flow']
    recipe = str(root/'experiments/recipes/kontext_nft.yaml')
    asked = ['try_card.py', recipe, *few, '--out', str(tmp_path), '--folder', str(tmp_path)]
    if not torch.cuda.is_available():
        monkeypatch.setattr('sys.argv', asked)
        with pytest.raises(InputError, match='card: expected a GPU'): try_card.main()
    monkeypatch.setattr(try_card, 'card', lambda: (torch.device('cpu'), 'a CPU'))
    monkeypatch.setattr('sys.argv', [*asked, 'grup=2'])
    with pytest.raises(InputError, match="did you mean 'group'"): try_card.main()
    monkeypatch.setattr('sys.argv', asked)
    try_card.main()
    report = json.loads((tmp_path/'card_kontext_nft_CPU.json').read_text())
    assert len(report['timings']) == 2 and all(np.isfinite(step['loss']) for step in report['steps'])
    assert report['held_GB'] is None                                                   # only a GPU says it
    assert 'an iteration took' in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1     # the rest is gone
    monkeypatch.setattr('sys.argv', ['try_card.py', str(root/'experiments/recipes/klein_4b_nft.yaml')])
    with pytest.raises(InputError, match='editor: expected one of black-forest-labs/FLUX.1'): try_card.main()

def test_evaluation_takes_the_settings_of_training(tmp_path, capsys, monkeypatch):
    "Settings that are not given are those of training; others are used, with a warning."
    command = importlib.import_module('mt_editflow_nb.cli.eval')
    run = importlib.import_module('mt_editflow_nb.cli.eval_run')
    lora = tmp_path/'run'/'lora'
    config = tmp_path/'run'/'config.json'
    editor = load_editor(lora_rank=2)
    with torch.no_grad(): lora_parameters(editor)[1].fill_(.1)            # else it would change nothing
    save_lora(editor, lora)
    asked = {}
    def noted(name, **kw):
        asked.update(kw, name=name)
        return load_editor(name, **kw)
    def trained_with(**fields): config.write_text(json.dumps(dict(config=dict(editor='tiny', quantize=None, **fields))))
    def evaluated(out, *more):
        return command.main(['--lora', str(lora), '--n', '2', '--turns', '1', *more, '--out', str(tmp_path/out)])
    monkeypatch.setattr(run, 'load_editor', noted)
    trained_with(size=48, guidance=2., num_steps=3)
    assert evaluated('out', '--steps', '2') == 0
    assert asked == dict(name='tiny', quantize=None, size=48, guidance=2.)
    warned = capsys.readouterr().err
    assert 'warning: ' in warned and 'steps: 2 here' in warned and 'training used 3' in warned
    trained_with(size=None, guidance=None, num_steps=2)                 # as most runs: the editor's own
    assert evaluated('same') == 0 and 'warning' not in capsys.readouterr().err
    assert asked == dict(name='tiny', quantize=None, size=None, guidance=None)
    assert evaluated('other', '--guidance', '4', '--quantize', 'nf4') == 0
    warned = capsys.readouterr().err
    assert all(x in warned for x in ('guidance: 4.0', 'quantize: nf4')) and warned.count('the default') == 2

def test_a_plan_for_several_processes(capsys):
    "48 x 4 rows of one turn and two steps: 384 sampled by all, 96 by each of four."
    few = ['sessions_per_iteration=48', 'group=4', 'turns=1', 'num_steps=2', 'lora_rank=4']
    assert main(['--plan', '--processes', '4', *few]) == 0
    said = capsys.readouterr().out
    assert 'memory of each of 4 processes, GB' in said and '4 x H100' in said
    assert 'an iteration: 384 rows sampled' in said and 'of this each process: 96 rows sampled' in said
    assert main(['--plan', *few]) == 0
    assert 'each' not in capsys.readouterr().out
    for wrong, expected in ((['--plan', '--processes', '5'], 'a multiple of the 5 processes'),
                            (['--plan', '--processes', '0'], 'a number above 0, beside --plan'),
                            (['--processes', '2'], 'a number above 0, beside --plan')):
        assert main([*wrong, *few]) == 2
        assert expected in capsys.readouterr().err
