"What a long run of a real editor relies on: the averaged adapter, GRPO-Guard's steps, the monitor on local edits."
import io, json
import copied, numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from mt_editflow_nb.algorithm.batch import make_batch
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.iterate import grpo_terms, sampling_options
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.data.shapeworld import shape_sessions, teacher_images
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.evaluation.running import trained_with, training_of
from mt_editflow_nb.training.monitor import identity_edits
from mt_editflow_nb.training.train import train

def test_copies_of_the_tiny_editor_are_what_is_read():
    "Tests load copies: with the same numbers and settings, and with memory of their own for what is trained."
    read, _ = copied.read_pipeline('tiny', None, torch.device('cpu'), torch.float32)
    one = load_editor().pipe
    another = load_editor().pipe
    assert one.config == read.config and one.scheduler.config == read.scheduler.config
    for name in ('transformer', 'vae', 'text_encoder', 'text_encoder_2'):
        part, other, original = (getattr(pipe, name) for pipe in (one, another, read))
        assert str(part.config) == str(original.config) and not part.training
        a = part.state_dict()
        b = other.state_dict()
        c = original.state_dict()
        assert a.keys() == c.keys() and all(torch.equal(a[k], c[k]) for k in c)
        shared = {a[k].data_ptr() == b[k].data_ptr() for k in a}
        assert shared == {name != 'transformer'}
        assert not any(p.requires_grad for p in part.parameters())

# --- the average of the adapter

def test_the_moving_average_is_the_one_computed_by_hand(tmp_path, monkeypatch):
    "e_0 is the adapter before training, e_i = d e_(i-1) + (1 - d) p_i; the last one is what is handed out."
    settings = dict(sessions_per_iteration=1, group=2, turns=1, num_steps=2, lora_rank=2, iterations=3, save_every=1,
                    eval_sessions=2, lr=1e-3)
    start = [p.detach().clone() for n, p in load_editor(lora_rank=2).transformer.named_parameters() if 'lora_' in n]
    monkeypatch.setattr('mt_editflow_nb.training.checkpoints._drop_older', lambda folder: None)
    editors = {d: train(make_config(settings | dict(ema=d)), tmp_path/str(d), progress=False) for d in (0, .75)}
    def saved(i): return load_file(tmp_path/'0.75'/'checkpoints'/f'{i:06d}'/'state.safetensors')
    expected = start
    for i in (1, 2, 3):
        tensors = saved(i)
        expected = [.75*e + .25*tensors[f'param.{k}'] for k, e in enumerate(expected)]
        for k, e in enumerate(expected): torch.testing.assert_close(tensors[f'ema.{k}'], e)
    for ours, e in zip(lora_of(editors[.75]), expected): torch.testing.assert_close(ours, e)
    for k, plain in enumerate(lora_of(editors[0])):                # training itself does not see the average
        assert torch.equal(plain, saved(3)[f'param.{k}'])
    assert not any(torch.equal(a, b) for a, b in zip(lora_of(editors[.75])[1::2], lora_of(editors[0])[1::2]))

def test_settings_of_training_are_found_wherever_an_adapter_lies(tmp_path):
    "RUN/lora, what keep_best has kept, and the adapter of a checkpoint; beside a config.json that is no run's, none."
    (tmp_path/'config.json').write_text(json.dumps(dict(config=dict(editor='me/editor', num_steps=7, size=64))))
    for place in ('lora', 'best/000050', 'checkpoints/000050/lora', 'transformer'):
        (tmp_path/place).mkdir(parents=True)
        assert [trained_with(tmp_path/place)[name] for name in ('editor', 'steps', 'size')] == ['me/editor', 7, 64]
    for place in ('lora', 'best/000050', 'checkpoints/000050/lora'):                 # and the file itself
        (tmp_path/place/'pytorch_lora_weights.safetensors').write_bytes(b'')
        assert trained_with(tmp_path/place/'pytorch_lora_weights.safetensors')['steps'] == 7
    (tmp_path/'transformer'/'config.json').write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert trained_with(tmp_path/'transformer')['steps'] == 7
    (tmp_path/'config.json').write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert trained_with(tmp_path/'lora') == {} and training_of(None) == {}

def lora_of(editor): return [p.detach() for n, p in editor.transformer.named_parameters() if 'lora_' in n]

# --- GRPO-Guard

def relative_gradients(**settings):
    """Norms of the loss's gradient with respect to the velocity at each stochastic step, over the noise's own norm.

    Before the first update, with advantages of 1: what is left is the factor that the step's formula puts there."""
    config = make_config(dict(algorithm='grpo', sampler='flow', noise_level=.7, num_steps=6, sessions_per_iteration=1,
                              group=2, turns=1, batch=2) | settings)
    policy = Policy(config, load_editor(lora_rank=2))
    sessions = shape_sessions(1, 1)
    sampled = rollout(policy.editor, sessions, **sampling_options(config, sessions, 0))
    batch = make_batch(sampled, torch.ones(1, 2, 1), torch.arange(2))
    velocities = []
    velocity = policy.velocity
    def kept(*args):
        velocities.append(velocity(*args))
        return velocities[-1]
    policy.velocity = kept
    losses = [loss for loss, *_ in grpo_terms(config, policy, batch)]
    gradients = [torch.autograd.grad(loss, v)[0] for loss, v in zip(losses, velocities)]
    noise = sampled.next_TKNLC[0].double() - sampled.mean_TKNLC[0].double()
    return torch.tensor([float(g.norm()/n.norm()) for g, n in zip(gradients, noise)]).double(), sampled

def test_guard_makes_the_steps_weigh_alike():
    """By hand, for flow-SDE: the mean depends on v by c = ds (1 + std² (1 - s)/(2 s)), the noise's scale is S.

    The gradient of the log-density is noise c/S²; centred, S times that; and with each step's own size divided away
    noise/S (1 + a²/2), but 1 instead of 1 + a²/2 at pure noise, where 1 - s is 0."""
    a = .7
    plain, sampled = relative_gradients()
    guarded, _ = relative_gradients(guard=True)
    sigmas = sampled.sigmas.double()
    s = sigmas[:-1][sampled.steps]
    steps = -sigmas.diff()
    below_one = torch.where(s < 1, s, sigmas[1])
    std = a*(s/(1 - below_one))**.5
    c = steps[sampled.steps]*(1 + std**2*(1 - s)/(2*s))
    S = std*steps[sampled.steps]**.5
    by_hand = c/S**2
    torch.testing.assert_close(plain/plain[1], by_hand/by_hand[1], rtol=2e-3, atol=0)
    per_unit_of_noise = guarded*S           # the gradient for noise z of scale 1
    expected = 1 + a**2/2*(s < 1).double()
    torch.testing.assert_close(per_unit_of_noise/per_unit_of_noise[1], expected/expected[1], rtol=2e-3, atol=0)
    unguarded = plain*S
    assert unguarded.max()/unguarded.min() > 5 and per_unit_of_noise.max()/per_unit_of_noise.min() < 1.3

# --- the monitor's measure of edits that do nothing

def decoded(picture, quality=75):
    "A stand-in for what an autoencoder does to a photograph: a little is lost everywhere."
    f = io.BytesIO()
    Image.fromarray(picture).save(f, 'JPEG', quality=quality)
    return np.asarray(Image.open(f))

@pytest.mark.parametrize('name', ['china.jpg', 'flower.jpg'])
def test_a_local_edit_of_a_photograph_is_an_edit(name):
    "One per cent of the pixels paler: the root mean square of the whole picture is below 8, the old threshold."
    photo = np.asarray(Image.fromarray(load_sample_image(name)).resize((512, 512)))
    again = decoded(photo)
    recoloured = photo.copy()
    recoloured[230:281, 200:251] = recoloured[230:281, 200:251]//2 + 40       # 51 x 51 of 512 x 512
    recoloured = decoded(recoloured)
    assert np.sqrt(((recoloured.astype(float) - again)**2).mean()) < 8
    noisy = (again + np.random.default_rng(0).normal(0, 1, again.shape)).clip(0, 255).astype(np.uint8)
    images_PGTHWC = np.stack([again, noisy, recoloured])[None, :, None]
    assert identity_edits(photo[None], images_PGTHWC, again[None])[0, :, 0].tolist() == [True, True, False]

@pytest.mark.parametrize('name,strength', [('china.jpg', 24), ('flower.jpg', 24)])
def test_a_weak_local_edit_of_a_photograph_is_an_edit(name, strength):
    "One per cent of the pixels lighter or darker by 24 levels: a root mean square of 2.4 over the whole picture."
    photo = np.asarray(Image.fromarray(load_sample_image(name)).resize((512, 512)))
    again = decoded(photo)
    rng = np.random.default_rng(0)
    found = []
    for y, x in rng.integers(0, 460, (10, 2)):
        edited = photo.astype(int)
        square = edited[y:y + 51, x:x + 51]
        square += strength if square.mean() < 128 else -strength
        found.append(decoded(edited.clip(0, 255).astype(np.uint8)))
    images_PGTHWC = np.stack([again, *found])[None, :, None]
    assert identity_edits(photo[None], images_PGTHWC, again[None])[0, :, 0].tolist() == [True] + [False]*10

def test_nothing_after_an_edit_is_nothing():
    "The second turn returns the first one's result, decoded once more, where the first picture was empty."
    editor = load_editor()
    sessions = shape_sessions(40, 1, seed=7)
    first = np.stack([np.asarray(s.image) for s in sessions])
    def again(x): return editor.decode(editor.encode_image(x))
    edited = again(np.stack([teacher_images(s)[0] for s in sessions]))
    images_PGTHWC = np.stack([edited, again(edited)], 1)[:, None]
    assert identity_edits(first, images_PGTHWC, again(first)).tolist() == [[[False, True]]]*40

def test_the_smallest_edit_of_the_shape_world_is_an_edit():
    "Every right edit of 40 sessions is one; the input, decoded once more, is none."
    editor = load_editor()
    sessions = shape_sessions(40, 1)
    first = np.stack([np.asarray(s.image) for s in sessions])
    again = editor.decode(editor.encode_image(first))
    right = np.stack([teacher_images(s) for s in sessions])
    images_PGTHWC = np.stack([again[:, None], right], 1)
    found = identity_edits(first, images_PGTHWC, again)
    assert found[:, 0].all() and not found[:, 1].any()
    changed = (np.abs(right[:, 0].astype(int) - first).max(-1) > 20).mean((1, 2))
    assert changed.min() < .03                                     # local ones are among them
