"""Every family of editors with random weights in its real classes: the same pictures as diffusers' own call, training that
changes the adapter only, an adapter that plain diffusers loads, and four bits."""
import json, sys
from unittest.mock import patch
import diffusers, numpy as np, pytest, torch
from PIL import Image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from mt_editflow_nb.editing.loading import FAMILIES, find_editor, load_editor
from mt_editflow_nb.editing.lora import add_lora, load_lora, lora_parameters, save_lora
from mt_editflow_nb.editing.flux2 import tiny_klein
from mt_editflow_nb.training.budget import editor_configs, weightless_editor, plan
from mt_editflow_nb.editing.qwen import tiny_qwen
from mt_editflow_nb.rewards.cube import Scores
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import Session
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.algorithm.iterate import iterate
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.training.train import load_for
from mt_editflow_nb.algorithm.config import make_config

SIZE, STEPS = 64, 3
GUIDANCE = dict(FluxKontextPipeline=2.5, Flux2KleinPipeline=4., QwenImageEditPipeline=4., QwenImageEditPlusPipeline=4.)

@pytest.fixture(scope='session', params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp('twins')/request.param
    if request.param == 'FluxKontextPipeline': return find_editor('tiny')[0]
    return tiny_klein(path) if 'Flux2' in request.param else tiny_qwen(path, plus='Plus' in request.param)

load = lambda folder, **kw: load_editor(folder, size=SIZE, **kw)

@pytest.fixture(scope='session')
def editor(folder): return load(folder)

@pytest.fixture(scope='session')
def session(): return Session('a', Image.effect_noise((SIZE, SIZE), 60).convert('RGB'), ['add a ring', 'remove the ring'])

def plain(pipe, family, session, noise, components=None):
    "diffusers' own call, as a user would write it; the fixed area of Qwen's pipelines is brought to this size."
    kw = dict(image=session.image, prompt=session.instructions[0], num_inference_steps=STEPS, output_type='pt')
    g, side = GUIDANCE[family], int(noise.shape[1]**.5)
    if family == 'FluxKontextPipeline':
        kw |= dict(latents=noise, guidance_scale=g, height=SIZE, width=SIZE, max_area=SIZE**2, _auto_resize=False, max_sequence_length=pipe.tokenizer_2.model_max_length)
    elif family == 'Flux2KleinPipeline':
        kw |= dict(latents=noise.transpose(1, 2).reshape(1, -1, side, side), guidance_scale=g, height=SIZE, width=SIZE, max_sequence_length=pipe.tokenizer.model_max_length)
    else: kw |= dict(latents=noise, true_cfg_scale=g, negative_prompt=' ')
    square = lambda area, ratio: (SIZE, SIZE, None)
    plus = pipeline_qwenimage_edit_plus
    with patch.object(pipeline_qwenimage_edit, 'calculate_dimensions', square), \
         patch.object(plus, 'VAE_IMAGE_SIZE', SIZE**2), patch.object(plus, 'CONDITION_IMAGE_SIZE', 112**2):
        if 'Plus' in family: kw |= dict(height=SIZE, width=SIZE)
        return pipe(**kw).images[0].permute(1, 2, 0).numpy()

def first_image(editor, session, noise):
    "Our rollout without noise, from given first noise, before rounding to 8 bits."
    floats = {}
    def keep(y): floats['y'] = (y.float()/2 + .5).clamp(0, 1).permute(0, 2, 3, 1).numpy(); return (floats['y']*255).round().astype(np.uint8)
    one = Session('a', session.image, session.instructions[:1])
    with patch.object(sys.modules[type(editor).__module__], 'to_uint8', keep), patch.object(torch, 'randn', lambda *a, **k: noise), \
         patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2):
        rollout(editor, [one], group=1, num_steps=STEPS, generator=None, kind='flow', noise_level=0., window=range(STEPS - 1))
    return floats['y'][0]

def test_same_picture_as_diffusers_own_call(folder, editor, session):
    family = find_editor(folder)[1]
    noise = torch.randn(1, *editor.latent_shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = first_image(editor, session, noise), plain(editor.pipe, family, session, noise)
    assert ours.std() > .01 and np.abs(ours - theirs).max() < 1e-4

def test_guidance_is_the_published_one(folder, editor):
    "Of an editor that is loaded, of one that is planned, and of a run that says nothing; a run that names one has that one."
    family = find_editor(folder)[1]
    quiet, named = make_config(dict(editor=str(folder), size=SIZE)), make_config(dict(editor=str(folder), size=SIZE, guidance=1.5))
    assert editor.guidance == load_for(quiet).guidance == weightless_editor(editor_configs(folder), size=SIZE).guidance == GUIDANCE[family]
    assert load_for(named).guidance == 1.5
    passes = plan(quiet)['passes'], plan(make_config(dict(editor=str(folder), size=SIZE, guidance=1.)))['passes']
    assert passes == ((1, 1) if 'Kontext' in family else (2, 1))

def test_distilled_models_take_no_guidance(tmp_path):
    index = tiny_klein(tmp_path/'distilled')/'model_index.json'
    index.write_text(json.dumps(json.loads(index.read_text()) | dict(is_distilled=True)))
    assert load_editor(index.parent).guidance == 1
    assert plan(make_config(dict(editor=str(index.parent))))['passes'] == 1

def test_autoencoder_in_tiles(folder, editor):
    """Above `TILE_ABOVE` pixels the autoencoder works in tiles: the first is what it makes of that tile alone, up to where it is blended with the next.

    The editor that is shipped, trained on pictures of a tile's size, gives a picture back; Qwen's autoencoder, which normalises no
    statistics of a whole picture, gives nearly the same without tiles even with random weights."""
    family = find_editor(folder)[1]
    tile = 64 if 'Qwen' in family else editor.vae.config.sample_size
    stride = tile*3//4
    with patch('mt_editflow_nb.editing.loading.TILE_ABOVE', 2*tile - 1): one, four = load_editor(folder, size=tile), load_editor(folder, size=2*tile)
    assert four.vae.use_tiling and not one.vae.use_tiling
    if 'Qwen' in family: four.vae.enable_tiling(tile, tile, stride, stride)                       # its own are of 256 pixels
    x = np.stack([np.asarray(s.image.resize((tile, tile))) for s in shape_sessions(4, turns=1, seed=4)])
    x = x.reshape(2, 2, tile, tile, 3).transpose(0, 2, 1, 3, 4).reshape(1, 2*tile, 2*tile, 3)
    tokens = four.encode_image(x)
    first = tokens.reshape(1, four.tokens_per_side, four.tokens_per_side, -1)[:, :one.tokens_per_side, :one.tokens_per_side].reshape(1, *one.latent_shape)
    picture = four.decode(tokens)
    assert np.abs(picture[:, :stride, :stride].astype(int) - one.decode(first)[:, :stride, :stride]).max() <= 1         # a step of 8 bits
    same = lambda a, b: np.corrcoef(a.ravel(), b.ravel())[0, 1]
    if 'Kontext' in family: assert same(picture, x) > .9
    if 'Qwen' in family: four.vae.disable_tiling(); assert same(picture, four.decode(tokens)) > .8     # small tiles are mostly edges; .99 with tiles of 256

def judge(sessions, images_PGTHWC):
    "Darkness and redness: two scores that differ between members."
    x = torch.from_numpy(images_PGTHWC).float()/255
    r = torch.stack([1 - x.mean((-3, -2, -1)), x[..., 0].mean((-2, -1))], -1)
    return Scores(('if', 'cc'), r, (r[..., 0] > .5).float(), r[..., 1], r[..., 1])

def one_iteration(editor, session, **kw):
    c = make_config(dict(dict(group=3, sessions_per_iteration=2, num_steps=3, iterations=2, std='group', min_std=0., batch=4), **kw))
    flip = Session('b', session.image.transpose(Image.FLIP_TOP_BOTTOM), session.instructions)
    with patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2):
        return iterate(c, Policy(c, editor), [session, flip], judge, 0)[0]

@pytest.mark.parametrize('algorithm', ['nft', 'grpo'])
def test_training_changes_the_adapter_only(folder, session, algorithm):
    editor = load(folder, lora_rank=2, lora_targets='attention', quantize='nf4' if algorithm == 'nft' else None)     # nf4 runs too
    state = lambda: {f'{part}.{n}': p.detach().clone() for part in ('transformer', 'vae', *editor.text_encoders)
                     for n, p in [*getattr(editor.pipe, part).named_parameters(), *getattr(editor.pipe, part).named_buffers()]}
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
    def watched(*args, **kw): kept['ro'] = rollout(*args, **kw); return kept['ro']
    with patch('mt_editflow_nb.algorithm.iterate.rollout', watched): metrics = one_iteration(editor, session, algorithm='grpo')
    ro = kept['ro']
    assert {p.dtype for n, p in editor.transformer.named_parameters() if 'lora_' not in n} == {torch.bfloat16} and ro.texts_T[0].embeds.dtype == torch.bfloat16
    assert {x.dtype for x in (*lora_parameters(editor), ro.inputs_TNLC, ro.clean_TNLC, ro.path_TKNLC, ro.mean_TKNLC, ro.logp_TKN, ro.sigmas)} == {torch.float32}
    assert np.isfinite(metrics['loss']) and metrics['grad_norm'] > 0 and abs(metrics['ratio_mean'] - 1) < 1e-5

@pytest.mark.parametrize('quantize', [None, 'nf4'])
def test_what_a_gpu_is_asked_for(folder, quantize):
    "Without one only the question can be tested: diffusers' own loader, bfloat16, and 4 bits for the transformer and the large text encoder."
    family, asked = find_editor(folder)[1], {}
    def loader(source, **kw): asked.update(kw); raise OSError('no further')
    with patch.object(getattr(diffusers, family), 'from_pretrained', loader), pytest.raises(InputError, match='no further'): load_editor(folder, quantize=quantize, device='cuda')
    assert asked['dtype'] == torch.bfloat16 and ('quantization_config' in asked) == bool(quantize)
    if quantize:
        q = asked['quantization_config']
        assert q.components_to_quantize == ['transformer', FAMILIES[family].text_encoders[-1]] and q.quant_backend == 'bitsandbytes_4bit'
        assert q.quant_kwargs == dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16)

def test_adapter_loads_in_plain_diffusers(folder, session, tmp_path):
    family = find_editor(folder)[1]
    editor = load(folder, lora_rank=2, lora_alpha=6)
    with torch.no_grad():
        for p in lora_parameters(editor): p.add_(.3*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    save_lora(editor, tmp_path)
    pipe = getattr(diffusers, family).from_pretrained(folder, **getattr(FAMILIES[family], 'components', lambda f: {})(folder))
    noise = torch.randn(1, *editor.latent_shape, generator=torch.Generator().manual_seed(1))
    ours, without = first_image(editor, session, noise), plain(pipe, family, session, noise)
    pipe.load_lora_weights(str(tmp_path))
    theirs = plain(pipe, family, session, noise)
    assert np.abs(ours - theirs).max() < 1e-4 < np.abs(ours - without).max()
    again = load(folder)
    load_lora(again, tmp_path)
    assert np.abs(first_image(again, session, noise) - ours).max() < 1e-6

def test_text_encoder_sees_the_picture(folder, editor, session):
    x = np.asarray(session.image)[None]
    with patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2):
        a, b = (editor.encode_text(['add a ring'], y).embeds for y in (x, 255 - x))
    assert torch.equal(a, b) == ('Qwen' not in find_editor(folder)[1])

def test_benchmark_edits_with_every_family(editor, session):
    "EdiVal-Bench's generation shows the text encoder the picture too, and brings any size to the editor's."
    from mt_editflow_nb.evaluation.edival import edit_images
    with patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2):
        out = edit_images(editor, [session.image.resize((90, 70))], ['add a ring'], num_steps=2)
    assert [im.size for im in out] == [(SIZE, SIZE)]

def test_encoders_rest_elsewhere(folder):
    editor, moves = load(folder, offload=True), []
    m = getattr(editor.pipe, editor.text_encoders[-1])
    with patch.object(type(m), 'to', lambda self, device: moves.append(str(device))):
        with patch.object(pipeline_qwenimage_edit_plus, 'CONDITION_IMAGE_SIZE', 112**2): editor.encode_text(['x'], np.zeros((1, SIZE, SIZE, 3), np.uint8))
    assert moves == [str(editor.device), 'cpu']

# --- bad input: one line that says what was received and what to do

def hub_says(error): return patch('huggingface_hub.hf_hub_download', side_effect=error)

def test_hub_answers():
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    response = httpx.Response(404, request=httpx.Request('GET', 'https://huggingface.co'))
    for error, parts in [(GatedRepoError('x', response=response), ['https://huggingface.co/some/model', 'HF_TOKEN']),
                         (RepositoryNotFoundError('x', response=response), ['some/model', 'HF_TOKEN']),
                         (EntryNotFoundError('x'), ['not an editing pipeline']), (LocalEntryNotFoundError('x'), ['cannot be reached'])]:
        with hub_says(error), pytest.raises(InputError) as e: find_editor('some/model')
        assert all(p in str(e.value) for p in parts) and '\n' not in str(e.value)

def test_other_bad_input(tmp_path, folder):
    (tmp_path/'model_index.json').write_text(json.dumps(dict(_class_name='StableDiffusionPipeline')))
    with pytest.raises(InputError, match='StableDiffusionPipeline.*FluxKontextPipeline'): load_editor(tmp_path)
    (tmp_path/'model_index.json').write_text('no json')
    with pytest.raises(InputError, match='not the index'): load_editor(tmp_path)
    with patch('mt_editflow_nb.editing.loading.find_spec', lambda name: None), pytest.raises(InputError, match='pip install bitsandbytes'): load_editor(folder, quantize='nf4')
    with pytest.raises(InputError, match='expected a multiple of'): load_editor(folder, size=SIZE + 1)
