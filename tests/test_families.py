"""Every family of editors with random weights in its real classes: the same pictures as diffusers' own call, training
that changes the adapter only, adapters of this package and of other tools, four bits, bfloat16, and what is refused."""
import json, os, stat, sys
from contextlib import contextmanager
from unittest.mock import patch
import diffusers, numpy as np, pytest, torch
from PIL import Image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from safetensors.torch import load_file, save_file
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.iterate import iterate
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import Session
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.editor import at_size, check_instructions, set_shape, to_vae, transformer_timestep
from mt_editflow_nb.editing.flux2 import tiny_klein
from mt_editflow_nb.editing.loading import FAMILIES, KEPT_IN_16_BITS, find_editor, load_editor, nf4_config
from mt_editflow_nb.editing.lora import load_lora, lora_parameters, save_lora
from mt_editflow_nb.editing.qwen import tiny_qwen
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.rewards.cube import Scores
from mt_editflow_nb.training.budget import editor_configs, plan, weightless_editor
from mt_editflow_nb.training.parts import load_configured_editor

SIZE = 64
STEPS = 3
GUIDANCE = dict(FluxKontextPipeline=2.5, Flux2KleinPipeline=4., QwenImageEditPipeline=4., QwenImageEditPlusPipeline=4.)

@pytest.fixture(scope='session', params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp('twins')/request.param
    if request.param == 'FluxKontextPipeline': return find_editor('tiny')[0]
    return tiny_klein(path) if 'Flux2' in request.param else tiny_qwen(path, plus='Plus' in request.param)

def load(folder, **kw): return load_editor(folder, size=SIZE, **kw)

@pytest.fixture(scope='session')
def editor(folder): return load(folder)

def noise_picture(width, height):
    "Grey noise, the same whenever it is asked for."
    grey = np.random.default_rng(0).normal(128, 60, (height, width)).clip(0, 255)
    return Image.fromarray(grey.astype(np.uint8)).convert('RGB')

@pytest.fixture(scope='session')
def session(): return Session('a', noise_picture(SIZE, SIZE), ['add a ring', 'remove the ring'])

def small_condition():
    "Plus shows its text encoder a copy of 384² pixels; here a small one."
    return patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2)

@contextmanager
def small_pipelines(width, height):
    "The fixed areas of Qwen's pipelines, brought to this size."
    of_condition = pipeline_qwenimage_edit_plus.calculate_dimensions
    def dimensions(area, ratio): return width, height, None                        # Qwen-Image-Edit
    def dimensions_plus(area, ratio): return of_condition(area, ratio) if area == 112**2 else (width, height)
    with small_condition(), patch.object(pipeline_qwenimage_edit, 'calculate_dimensions', dimensions), \
         patch.object(pipeline_qwenimage_edit_plus, 'calculate_dimensions', dimensions_plus):
        yield

def plain(pipe, family, session, noise, steps=STEPS):
    "diffusers' own call, as a user would write it."
    kw = dict(image=session.image, prompt=session.instructions[0], num_inference_steps=steps, output_type='pt')
    g = GUIDANCE[family]
    width, height = session.image.size
    if family == 'FluxKontextPipeline':
        kw |= dict(latents=noise, guidance_scale=g, height=height, width=width, max_area=width*height,
                   _auto_resize=False, max_sequence_length=pipe.tokenizer_2.model_max_length)
    elif family == 'Flux2KleinPipeline':
        latents = noise.transpose(1, 2).reshape(1, noise.shape[-1], height//8, width//8)
        kw |= dict(latents=latents, guidance_scale=g, height=height, width=width,
                   max_sequence_length=pipe.tokenizer.model_max_length)
    else: kw |= dict(latents=noise, true_cfg_scale=g, negative_prompt=' ')
    if 'Plus' in family: kw |= dict(height=height, width=width)
    with small_pipelines(width, height): return pipe(**kw).images[0].permute(1, 2, 0).float().numpy()

def first_image(editor, session, noise):
    "Our rollout without noise, from given first noise, before rounding to 8 bits."
    floats = {}
    def keep(y):
        floats['y'] = (y.float()/2 + .5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return (floats['y']*255).round().astype(np.uint8)
    one = Session('a', session.image, session.instructions[:1])
    with patch.object(sys.modules[type(editor).__module__], 'to_uint8', keep), small_condition(), \
         patch('mt_editflow_nb.editing.rollout.normal_noise', lambda keys, shape: noise):
        rollout(editor, [one], group=1, num_steps=STEPS, seed=0, kind='flow', noise_level=0., steps=range(STEPS - 1))
    return floats['y'][0]

def noise_for(editor): return torch.randn(1, *editor.latent_shape, generator=torch.Generator().manual_seed(1))

def shaken(editor, scale):
    "An editor whose new adapter does something."
    with torch.no_grad():
        for p in lora_parameters(editor):
            p.add_(scale*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return editor

# --- the same as diffusers

@pytest.mark.parametrize('width, height', [(80, 80), (96, 64), (64, 96)])
def test_same_picture_as_diffusers_own_call(folder, editor, width, height):
    "At three ratios, each of about 80 x 80 pixels."
    session = Session('a', noise_picture(width, height), ['add a ring'])
    family = find_editor(folder)[1]
    with at_size(editor, 80):
        set_shape(editor, width, height)
        noise = noise_for(editor)
        set_shape(editor, 80, 80)                                              # a rollout knows better
        ours = first_image(editor, session, noise)
        theirs = plain(editor.pipe, family, session, noise)
        assert editor.grid == (height//8, width//8) and noise.shape[1] == width*height//64
    assert ours.shape == theirs.shape == (height, width, 3)
    assert ours.std() > .01 and np.abs(ours - theirs).max() < 1e-4

def test_a_batch_has_one_shape(editor, session):
    wide = Session('wide', Image.new('RGB', (96, 64)), session.instructions)
    with pytest.raises(InputError, match='pictures of one shape in a batch, received 64 x 64, 80 x 48'):
        rollout(editor, [session, wide], group=1, num_steps=1, seed=0)

@contextmanager
def watched_transformer(transformer):
    "What the transformer is told, call by call."
    seen = []
    forward = type(transformer).forward
    def record(self, *args, **kw):
        seen.append((kw['timestep'].clone(), kw['hidden_states'].clone()))
        return forward(self, *args, **kw)
    with patch.object(type(transformer), 'forward', record): yield seen

def test_bfloat16_tells_the_transformer_what_diffusers_tells_it(folder, session):
    "The noise level of all 28 steps, digit for digit, and the tokens of the input picture."
    editor = load(folder, dtype='bfloat16')
    family = find_editor(folder)[1]
    noise = noise_for(editor)
    one = Session('a', session.image, session.instructions[:1])
    with watched_transformer(editor.transformer) as theirs:
        plain(editor.pipe, family, session, noise.bfloat16(), steps=28)
    with watched_transformer(editor.transformer) as ours, small_condition():
        rollout(editor, [one], group=1, num_steps=28, seed=1)
    assert len(ours) == len(theirs) == (28 if family == 'FluxKontextPipeline' else 56)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, theirs))
    mine, other = (calls[0][1][:, editor.latent_shape[0]:].float() for calls in (ours, theirs))
    assert (mine - other).abs().mean() < .02*other.std()

def test_pictures_are_read_as_diffusers_reads_them(editor):
    "In bfloat16 without a bias; in float32 bit for bit what it always was."
    grey = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    theirs = editor.pipe.image_processor.preprocess(Image.fromarray(grey[0]))
    half = type('Half', (), dict(device='cpu', dtype=torch.bfloat16))
    assert (to_vae(grey, half).reshape(theirs.shape) != theirs.bfloat16()).float().mean() < .01
    before = torch.from_numpy(grey).permute(0, 3, 1, 2).to(torch.float32)/127.5 - 1
    sigma = torch.rand(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_vae(grey, editor.vae), before) and transformer_timestep(sigma, torch.float32) is sigma

def test_guidance_is_the_published_one(folder, editor):
    "Of an editor that is loaded, of one that is planned, and of a run that says nothing; a named one is kept."
    family = find_editor(folder)[1]
    quiet, named, free = (make_config(dict(editor=str(folder), size=SIZE) | kw)
                          for kw in ({}, dict(guidance=1.5), dict(guidance=1.)))
    planned = weightless_editor(editor_configs(folder), size=SIZE)
    assert editor.guidance == load_configured_editor(quiet).guidance == planned.guidance == GUIDANCE[family]
    assert load_configured_editor(named).guidance == 1.5
    assert (plan(quiet)['passes'], plan(free)['passes']) == ((1, 1) if 'Kontext' in family else (2, 1))

def test_distilled_models_take_no_guidance(tmp_path):
    index = tiny_klein(tmp_path/'distilled')/'model_index.json'
    index.write_text(json.dumps(json.loads(index.read_text()) | dict(is_distilled=True)))
    assert load_editor(index.parent).guidance == 1
    assert plan(make_config(dict(editor=str(index.parent))))['passes'] == 1

def test_autoencoder_in_tiles(folder, editor):
    """Above `TILE_ABOVE` pixels the autoencoder works in tiles: the first is what it makes of that tile alone, up to
    where it is blended with the next.

    The editor that is shipped, trained on pictures of a tile's size, gives a picture back; Qwen's autoencoder, which
    normalises no statistics of a whole picture, gives nearly the same without tiles even with random weights."""
    family = find_editor(folder)[1]
    tile = 64 if 'Qwen' in family else editor.vae.config.sample_size
    stride = tile*3//4
    with patch('mt_editflow_nb.editing.loading.TILE_ABOVE', 2*tile - 1):
        one = load_editor(folder, size=tile)
        four = load_editor(folder, size=2*tile)
    assert four.vae.use_tiling and not one.vae.use_tiling
    if 'Qwen' in family: four.vae.enable_tiling(tile, tile, stride, stride)                # its own are of 256 pixels
    x = np.stack([np.asarray(s.image.resize((tile, tile))) for s in shape_sessions(4, turns=1, seed=4)])
    x = x.reshape(2, 2, tile, tile, 3).transpose(0, 2, 1, 3, 4).reshape(1, 2*tile, 2*tile, 3)
    tokens = four.encode_image(x)
    side = one.grid[0]
    first = tokens.reshape(1, *four.grid, -1)[:, :side, :side]
    picture = four.decode(tokens)
    alone = one.decode(first.reshape(1, *one.latent_shape))
    assert np.abs(picture[:, :stride, :stride].astype(int) - alone[:, :stride, :stride]).max() <= 1  # a step of 8 bits
    def same(a, b): return np.corrcoef(a.ravel(), b.ravel())[0, 1]
    if 'Kontext' in family: assert same(picture, x) > .9
    if 'Qwen' in family:
        four.vae.disable_tiling()
        assert same(picture, four.decode(tokens)) > .8             # small tiles are mostly edges; .99 with tiles of 256

# --- training

def judge(sessions, images_PGTHWC):
    "Darkness and redness: two scores that differ between members."
    x = torch.from_numpy(images_PGTHWC).float()/255
    r = torch.stack([1 - x.mean((-3, -2, -1)), x[..., 0].mean((-2, -1))], -1)
    return Scores(('if', 'cc'), r, (r[..., 0] > .5).float(), r[..., 1], r[..., 1])

def one_iteration(editor, session, **kw):
    usual = dict(group=2, sessions_per_iteration=2, num_steps=2, iterations=2, std='group', min_std=0., batch=4)
    config = make_config(usual | kw)
    flip = Session('b', session.image.transpose(Image.FLIP_TOP_BOTTOM), session.instructions)
    with small_condition(): return iterate(config, Policy(config, editor), [session, flip], judge, 0)[0]

@pytest.mark.parametrize('algorithm', ['nft', 'grpo'])
def test_training_changes_the_adapter_only(folder, session, algorithm):
    quantize = 'nf4' if algorithm == 'nft' else None                                       # nf4 runs too
    editor = load(folder, lora_rank=2, lora_targets='attention', quantize=quantize)
    def state():
        parts = {part: getattr(editor.pipe, part) for part in ('transformer', 'vae', *editor.text_encoders)}
        return {f'{part}.{n}': p.detach().clone() for part, m in parts.items()
                for n, p in [*m.named_parameters(), *m.named_buffers()]}
    before = state()
    metrics = one_iteration(editor, session, algorithm=algorithm)
    after = state()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all('lora_' in n for n in changed)
    assert metrics['rows'] and np.isfinite(metrics['loss'])
    if algorithm == 'grpo': assert abs(metrics['ratio_mean'] - 1) < 1e-5
    else: assert any('Linear4bit' in type(m).__name__ for m in editor.transformer.modules())

def test_bfloat16_computes_and_float32_keeps(folder, session):
    "As on a GPU: the transformer in bfloat16; adapter, latents, log-probabilities and loss in float32."
    editor = load(folder, lora_rank=2, dtype='bfloat16', checkpointing=True)
    kept = {}
    def watched(*args, **kw):
        kept['ro'] = rollout(*args, **kw)
        return kept['ro']
    with patch('mt_editflow_nb.algorithm.iterate.rollout', watched):
        metrics = one_iteration(editor, session, algorithm='grpo')
    ro = kept['ro']
    frozen = {p.dtype for n, p in editor.transformer.named_parameters() if 'lora_' not in n}
    assert frozen == {torch.bfloat16} and ro.texts_T[0].embeds.dtype == torch.bfloat16
    kept_in_float32 = (*lora_parameters(editor), ro.inputs_TNLC, ro.clean_TNLC, ro.path_TKNLC, ro.mean_TKNLC,
                       ro.logp_TKN, ro.sigmas)
    assert {x.dtype for x in kept_in_float32} == {torch.float32}
    assert np.isfinite(metrics['loss']) and metrics['grad_norm'] > 0 and abs(metrics['ratio_mean'] - 1) < 1e-5

# --- loading

@pytest.mark.parametrize('quantize', [None, 'nf4'])
def test_what_a_gpu_is_asked_for(folder, quantize):
    """Without one only the question can be tested: diffusers' own loader, bfloat16, and 4 bits for the transformer and
    the large text encoder, but not for what sees."""
    family = find_editor(folder)[1]
    asked = {}
    def loader(source, **kw):
        asked.update(kw)
        raise OSError('no further')
    with patch.object(getattr(diffusers, family), 'from_pretrained', loader), \
         patch.object(torch.cuda, 'is_available', lambda: True), pytest.raises(InputError, match='no further'):
        load_editor(folder, quantize=quantize, device='cuda')
    assert asked['dtype'] == torch.bfloat16 and ('quantization_config' in asked) == bool(quantize)
    if quantize:
        mapping = asked['quantization_config'].quant_mapping
        assert list(mapping) == ['transformer', FAMILIES[family].text_encoders[-1]]
        for c in mapping.values():
            assert c.load_in_4bit and c.bnb_4bit_quant_type == 'nf4' and c.bnb_4bit_compute_dtype == torch.bfloat16

def test_eyes_of_a_text_encoder_stay_in_16_bits(folder, editor):
    "transformers' own exchange of layers, under the configuration that a GPU would be given."
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    name = editor.text_encoders[-1]
    config = nf4_config(name, torch.bfloat16).quant_mapping[name]
    assert config.llm_int8_skip_modules == KEPT_IN_16_BITS
    encoder = getattr(editor.pipe, name)
    with torch.device('meta'): model = type(encoder)(encoder.config)
    replace_with_bnb_linear(model, modules_to_not_convert=config.llm_int8_skip_modules, quantization_config=config)
    linear = {n: isinstance(m, Linear4bit) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    kept = {n for n, four_bits in linear.items() if not four_bits}
    assert all('visual' in n or 'lm_head' in n for n in kept) and sum(linear.values()) > len(kept)
    assert any('visual' in n for n in kept) == ('Qwen' in find_editor(folder)[1])

def test_encoders_rest_elsewhere(folder):
    editor = load(folder, offload=True)
    moves = []
    m = getattr(editor.pipe, editor.text_encoders[-1])
    pictures = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    with patch.object(type(m), 'to', lambda self, device: moves.append(str(device))), small_condition():
        editor.encode_text(['x'], pictures)
    assert moves == [str(editor.device), 'cpu']

def test_encoded_instructions_are_in_memory_once(editor, session):
    "Members of a session share the text and, at first, the picture; rows are put together when they are asked for."
    x = np.asarray(session.image)
    with small_condition(): text = editor.encode_text(['add a ring', 'add a ring', 'remove it'], np.stack([x, x, x]))
    assert len(text) == 3 and len(text.once) == 2
    assert torch.equal(text[:2].embeds[0], text.embeds[1]) and not torch.equal(text.embeds[1], text.embeds[2])
    if text.negative is not None: assert len(text.negative) == 3 and len(text[1:].negative) == 2

def test_text_encoder_sees_the_picture(folder, editor, session):
    x = np.asarray(session.image)[None]
    with small_condition(): a, b = (editor.encode_text(['add a ring'], y).embeds for y in (x, 255 - x))
    assert torch.equal(a, b) == ('Qwen' not in find_editor(folder)[1])

def test_benchmark_edits_with_every_family(editor, session):
    "EdiVal-Bench's generation shows the text encoder the picture too, and brings any size to the editor's."
    from mt_editflow_nb.evaluation.edival import edit_images
    with small_condition(): out = edit_images(editor, [session.image.resize((90, 70))], ['add a ring'], num_steps=2)
    assert [im.size for im in out] == [(SIZE, SIZE)]

def test_instructions_that_would_be_cut_are_named(folder, editor, session):
    "klein and T5 cut what is too long without a word; Qwen reads everything."
    family = find_editor(folder)[1]
    long = Session('b', session.image, ['add a ring', 'make it blue '*60])
    for sessions in ([], [session]): assert check_instructions(editor, sessions) is None
    if 'Qwen' in family: assert check_instructions(editor, [session, long]) is None
    else:
        with pytest.raises(InputError, match=rf'at most {editor.max_text_tokens} .*session b, turn 2: \d+$'):
            check_instructions(editor, [session, long])

# --- adapters

def test_adapter_loads_in_plain_diffusers(folder, session, tmp_path):
    family = find_editor(folder)[1]
    editor = shaken(load(folder, lora_rank=2, lora_alpha=6), .3)
    save_lora(editor, tmp_path)
    components = getattr(FAMILIES[family], 'components', lambda f: {})(folder)
    pipe = getattr(diffusers, family).from_pretrained(folder, **components)
    noise = noise_for(editor)
    ours = first_image(editor, session, noise)
    without = plain(pipe, family, session, noise)
    pipe.load_lora_weights(str(tmp_path))
    theirs = plain(pipe, family, session, noise)
    assert np.abs(ours - theirs).max() < 1e-4 < np.abs(ours - without).max()
    again = load(folder)
    load_lora(again, tmp_path)
    assert np.abs(first_image(again, session, noise) - ours).max() < 1e-6

def test_adapters_of_other_tools(folder, session, tmp_path):
    "A peft folder, kohya's names, any file name, a hub name: the same adapter, the same picture."
    editor = shaken(load(folder, lora_rank=2, lora_alpha=4), .3)
    tensors = load_file(save_lora(editor, tmp_path/'ours'))
    noise = noise_for(editor)
    ours = first_image(editor, session, noise)
    bare = {k.removeprefix('transformer.'): x for k, x in tensors.items()}
    for name in ('peft', 'kohya', 'own'): (tmp_path/name).mkdir()
    peft = {f'base_model.model.{k}': x for k, x in bare.items()}
    save_file(peft, tmp_path/'peft'/'adapter_model.safetensors')
    facts = dict(peft_type='LORA', r=2, lora_alpha=4, target_modules=['to_q'])
    (tmp_path/'peft'/'adapter_config.json').write_text(json.dumps(facts))
    kohya = {}
    for k, x in bare.items():
        layer, _, factor = k.rpartition('.lora_')
        key = f'lora_transformer_{layer.replace(".", "_")}'
        kohya |= {f'{key}.lora_{"down" if factor[0] == "A" else "up"}.weight': x, f'{key}.alpha': torch.tensor(4.)}
    save_file(kohya, tmp_path/'kohya'/'x.safetensors')
    same = (tmp_path/'ours'/'pytorch_lora_weights.safetensors').read_bytes()
    (tmp_path/'own'/'my edit v1.safetensors').write_bytes(same)
    def fetch(repo, file): return str(tmp_path/'own'/file)
    with patch('huggingface_hub.list_repo_files', lambda repo: ['README.md', 'my edit v1.safetensors']), \
         patch('huggingface_hub.hf_hub_download', fetch):
        for source in (tmp_path/'peft', tmp_path/'kohya', tmp_path/'own'/'my edit v1.safetensors', 'some/adapter'):
            again = load(folder)
            load_lora(again, source)
            assert np.abs(first_image(again, session, noise) - ours).max() < 1e-5, source

def test_adapters_that_do_not_fit_are_refused(folder, tmp_path):
    tensors = load_file(save_lora(load(folder, lora_rank=2), tmp_path/'good'))
    n = len(tensors)
    def also(name): return {name(k): x.clone() for k, x in tensors.items() if 'blocks.0.' in k}
    deeper = also(lambda k: k.replace('blocks.0.', 'blocks.77.'))
    nan = dict(tensors) | {next(iter(tensors)): tensors[next(iter(tensors))]*float('nan')}
    cases = dict(deeper=(tensors | deeper, f'received {n} tensors that fit and {len(deeper)} that do not'),
                 other=(deeper, f'received 0 tensors that fit and {len(deeper)} that do not'),
                 one=({k: x for k, x in tensors.items() if 'lora_A' in k}, 'received 0 tensors that fit'),
                 none=(dict(x=torch.zeros(1)), 'received 0 tensors that fit and 1 that do not'),
                 nan=(nan, 'NaN'))
    editor = load(folder)
    for name, (content, message) in cases.items():
        save_file(content, tmp_path/f'{name}.safetensors')
        with pytest.raises(InputError) as e: load_lora(editor, tmp_path/f'{name}.safetensors')
        assert message in str(e.value) and f'{name}.safetensors' in str(e.value) and '\n' not in str(e.value), name
        assert not lora_parameters(editor)
    load_lora(editor, tmp_path/'good')                                                     # nothing was left behind

def test_adapters_are_files_as_all_others(tmp_path):
    "Equal adapters are equal files, readable as the umask says."
    before = os.umask(0o027)
    try: files = [save_lora(load_editor(lora_rank=2), tmp_path/str(i)) for i in range(2)]
    finally: os.umask(before)
    assert files[0].read_bytes() == files[1].read_bytes() and stat.S_IMODE(files[0].stat().st_mode) == 0o640

# --- bad input: one line that says what was received and what to do

def hub_says(error): return patch('huggingface_hub.hf_hub_download', side_effect=error)

def test_hub_answers():
    import httpx
    from huggingface_hub import errors as hub
    response = httpx.Response(404, request=httpx.Request('GET', 'https://huggingface.co'))
    cases = [(hub.GatedRepoError('x', response=response), ['https://huggingface.co/some/model', 'HF_TOKEN']),
             (hub.RepositoryNotFoundError('x', response=response), ['some/model', 'HF_TOKEN']),
             (hub.EntryNotFoundError('x'), ['expected an editing pipeline', 'received some/model']),
             (hub.LocalEntryNotFoundError('x'), ['cannot be reached'])]
    for error, parts in cases:
        with hub_says(error), pytest.raises(InputError) as e: find_editor('some/model')
        assert all(p in str(e.value) for p in parts) and '\n' not in str(e.value)

def test_other_bad_input(tmp_path, folder):
    (tmp_path/'model_index.json').write_text(json.dumps(dict(_class_name='StableDiffusionPipeline')))
    with pytest.raises(InputError, match='FluxKontextPipeline.*StableDiffusionPipeline'): load_editor(tmp_path)
    (tmp_path/'model_index.json').write_text('no json')
    with pytest.raises(InputError, match='expected the index of a pipeline, received'): load_editor(tmp_path)
    with patch('mt_editflow_nb.editing.loading.find_spec', lambda name: None), \
         pytest.raises(InputError, match='pip install bitsandbytes'): load_editor(folder, quantize='nf4')
    with pytest.raises(InputError, match='expected a multiple of'): load_editor(folder, size=SIZE + 1)

def test_klein_takes_a_megapixel(tmp_path):
    "Its pipeline shrinks larger pictures; 1024 is the largest size here, for training and for evaluation."
    folder = tiny_klein(tmp_path/'klein')
    assert load_editor(folder, size=1024).size == 1024
    with pytest.raises(InputError, match='size: expected a multiple of 8 up to 1024, received 1032'):
        load_editor(folder, size=1032)
    with pytest.raises(InputError, match='up to 1024'), at_size(load_editor(folder), 2048): pass
    pipe = diffusers.Flux2KleinPipeline.from_pretrained(folder)
    shrunk = pipe.image_processor._resize_to_target_area(Image.new('RGB', (1032,)*2))
    assert shrunk.size == (1024, 1024)

def test_damaged_weights_name_the_file(tmp_path):
    import shutil
    shutil.copytree(find_editor('tiny')[0], tmp_path/'damaged')
    file = next((tmp_path/'damaged'/'transformer').glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match='damaged') as e: load_editor(tmp_path/'damaged')
    assert '\n' not in str(e.value)
