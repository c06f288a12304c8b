"""How fast and how large is a real editor on this machine?

    python experiments/bench_gpu.py [RECIPE.yaml | field=value ...]

Builds the full-size transformer from its published configuration with random weights (speed and memory do not depend
on their values), block by block, in NF4 and in bf16, and measures

- what an iteration is made of, rows that only go forward (sampling) and rows that go forward and backward (training),
  plain and with each option of the configuration, with the error that the option makes in a velocity;
- the plan's memory part by part, beside what is held;
- three whole iterations: rollout, loss, gradient checkpointing and optimiser (8-bit AdamW where the recipe has it),
- text encoders and autoencoder: seconds a prompt and a picture, what an iteration spends in them, and their memory.

In the iterations, encoded texts and pictures are random numbers of the right shape. `kernel_share` says which part of a
training step's time lies in matrix products, attention and 4-bit kernels.

Prints tables and writes experiments/results/bench_NAME.json. On a card of 80 GB, about ten minutes each:

    for r in kontext_nft klein_4b_nft; do python experiments/bench_gpu.py experiments/recipes/$r.yaml; done

Without a GPU it runs the tiny editor's configuration on the CPU (`--toy` asks for that anywhere), compiled without a
code generator: that tests the script, in about two minutes of a core with `--repeat 1`. Its numbers say nothing about a
GPU."""
import argparse, gc, platform, time
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
from mt_editflow_nb.data.files import atomic_write, one_line, to_json
from mt_editflow_nb.data.sessions import Session
from mt_editflow_nb.editing.editor import RepeatedText, Text, deduplicate, to_vae
from mt_editflow_nb.editing.loading import (
    KEPT_IN_16_BITS, TILE_ABOVE, autocast_velocity, find_editor, quantize_nf4, use_attention)
from mt_editflow_nb.editing.lora import add_lora, lora_parameters, merged
from mt_editflow_nb.editing.samplers import sigma_schedule
from mt_editflow_nb.rewards.cube import Scores
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.iterate import iterate
from mt_editflow_nb.algorithm.policy import Policy, make_optimizer
from mt_editflow_nb.training.budget import (
    PEAK_FLOPS, PUBLISHED_EDITORS, count_rows, editor_configs, plan, profile_row, weightless_editor,
    weightless_encoder, weightless_text)
from mt_editflow_nb.cli.train import parse_overrides, read_recipe

def fill(module, device, home=None):
    "Random weights, drawn on the device; they stay there, or are held at `home`, tensor by tensor."
    module.to_empty(device=home or device)
    for name, p in module.named_parameters():
        if p.ndim > 1: p.data.copy_(torch.empty_like(p, device=device).normal_(0, .02))
        else: p.data.fill_(1. if 'norm' in name else 0.)
    for buffer in module.buffers(): buffer.zero_()

def real_editor(config, configs, device, dtype, nf4):
    "The transformer with random weights; each block is quantised as soon as it exists: bf16 is never held whole."
    torch.manual_seed(0)                                        # the same weights for every option
    editor = weightless_editor(configs, size=config.size or configs.get('size'), guidance=config.guidance, dtype=dtype)
    editor.device = device
    for name, child in editor.transformer.named_children():
        if 'blocks' not in name:
            fill(child, device)
            continue
        for block in child:
            fill(block, device)
            if nf4: quantize_nf4(torch.nn.ModuleDict(dict(blocks=block)), dtype)
    position = getattr(editor.transformer, 'pos_embed', None)
    if hasattr(position, 'pos_freqs'):                          # Qwen's tables are neither weights nor buffers
        axes = list(editor.transformer.config.axes_dims_rope)
        editor.transformer.pos_embed = type(position)(theta=10000, axes_dim=axes, scale_rope=True)
    added = add_lora(editor, config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets)
    for p in added: p.data.normal_(0, .01)
    if config.checkpointing: editor.transformer.enable_gradient_checkpointing()
    return editor

def random_text(text, device):
    "Random text rows of the shapes of weightless ones."
    def some(x): return None if x is None else torch.randn(x.shape, device=device).to(x.dtype)
    ids = None if text.ids is None else torch.zeros(text.ids.shape, device=device)
    negative = None
    if text.negative is not None:                               # one row of memory, as in FLUX.2
        row = random_text(text.negative[:1], device)
        negative = Text(row.embeds.expand(len(text), -1, -1), ids=row.ids)
    return Text(some(text.embeds), some(text.pooled), ids, None, negative)

def seconds(f, device, repeat):
    "Mean time of a call, after one to warm up."
    def wait():
        if device.type == 'cuda': torch.cuda.synchronize()
    f()
    wait()
    start = time.perf_counter()
    for _ in range(repeat): f()
    wait()
    return (time.perf_counter() - start)/repeat

# parts of the names of kernels on a GPU, and of operators on the CPU, which has no kernels
KERNELS = ('gemm', 'cutlass', 'flash', 'attention', 'fmha', 'sm90', 'sm80', 'dequant', 'kgemm', 'nvjet')
OPERATORS = ('addmm', 'aten::mm', 'bmm', 'attention', '4bit')

def kernel_share(f, device):
    "The part of a step's time that lies in matrix products, attention and 4-bit kernels."
    from torch.profiler import ProfilerActivity, profile
    cuda = device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as prof:
        f()
        if cuda: torch.cuda.synchronize()
    events = [(e.key.lower(), e.self_device_time_total if cuda else e.self_cpu_time_total) for e in prof.key_averages()]
    names = KERNELS if cuda else OPERATORS
    matching = sum(t for k, t in events if any(name in k for name in names))
    return matching/max(1, sum(t for _, t in events))

def weights_name(nf4, dtype): return 'nf4' if nf4 else str(dtype).split('.')[-1]

OPTIONS = ('plain', 'compile', 'attention', 'autocast', 'tf32', 'merge')

def options_of(config, device, dtype, nf4):
    "The options that there are here, and for these weights; the CPU has no TF32, 4 bits cannot be merged."
    absent = {'tf32': device.type == 'cpu', 'merge': nf4, 'autocast': dtype == torch.float32}
    return [option for option in OPTIONS if not absent.get(option)]

def with_option(option, editor, device):
    "Switch an option on; on the CPU by what stands for it there."
    cuda = device.type == 'cuda'
    if option == 'compile': editor.transformer.compile_repeated_blocks(backend='inductor' if cuda else 'eager')
    if option == 'attention': use_attention(editor, '_native_efficient' if cuda else '_native_math')
    if option == 'autocast': autocast_velocity(editor)
    torch.backends.cuda.matmul.allow_tf32 = option == 'tf32'

def inputs_of(config, configs, editor, device):
    "What a transformer call takes, the same numbers for every option."
    torch.manual_seed(1)
    text = random_text(weightless_text(editor, configs['words'], config.batch), device)
    x, image = (torch.randn(config.batch, *editor.latent_shape, device=device) for _ in range(2))
    return x, torch.full((config.batch,), .5, device=device), text, image

def measure(config, configs, nf4, option, device, dtype, repeat, exact=None):
    "(a row of the table: seconds, memory and utilisation with these weights, the velocity)."
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    editor = real_editor(config, configs, device, dtype, nf4)
    inputs = inputs_of(config, configs, editor, device)
    with_option(option, editor, device)
    optimizer = make_optimizer(config, lora_parameters(editor))
    @torch.no_grad()
    def sample(): return editor.velocity(*inputs)
    def train():
        optimizer.zero_grad()
        editor.velocity(*inputs).square().mean().backward()
        optimizer.step()
    if option == 'merge':
        with merged(editor):
            velocity = sample()
            forward = seconds(sample, device, repeat)/config.batch
    else:
        velocity = sample()
        forward = seconds(sample, device, repeat)/config.batch
    both = seconds(train, device, repeat)/config.batch
    T = config.turns or 3
    speed = peak(device)
    rows = count_rows(config, T)
    iteration = (rows['sampled'] + rows['compared'])*forward + rows['trained']*both
    error = None if exact is None else float((velocity - exact).norm()/exact.norm())
    row = dict(weights=weights_name(nf4, dtype), option=option, seconds_forward_row=forward, seconds_train_row=both,
               seconds_iteration=iteration, edits_per_gpu_second=config.sessions_per_iteration*config.group*T/iteration,
               relative_error=error, kernel_share=kernel_share(train, device),
               peak_GB=torch.cuda.max_memory_allocated()/1e9 if device.type == 'cuda' else None,
               utilisation=(flops_of_a_row(config, configs)/forward)/speed if speed else None)
    return row, velocity

def peak(device):
    "Published operations a second of the card, or None."
    if device.type != 'cuda': return None
    return next((v for k, v in PEAK_FLOPS.items() if k in torch.cuda.get_device_name()), None)

def flops_of_a_row(config, configs):
    "Operations of one forward row, counted on the meta device."
    editor = weightless_editor(configs, size=config.size or configs.get('size'), guidance=config.guidance)
    add_lora(editor, 1)
    return profile_row(editor, weightless_text(editor, configs['words']))['flops_forward']

def measure_options(config, configs, nf4, device, dtype, repeat, options=OPTIONS):
    "A row for every option, as it is measured, or why there is none: one that fails spoils no other."
    exact = None
    for option in options_of(config, device, dtype, nf4):
        if option != 'plain' and option not in options: continue       # the errors of others are against it
        failed = dict(weights=weights_name(nf4, dtype), option=option)
        try: row, velocity = measure(config, configs, nf4, option, device, dtype, repeat, exact)
        except torch.OutOfMemoryError: row = dict(failed, error='out of memory')
        except Exception as e:
            if option == 'plain': raise
            row = dict(failed, error=f'{type(e).__name__}: {one_line(e)[:200]}')
        else: exact = velocity if option == 'plain' else exact
        yield row

# --- three iterations, and the plan's parts

def stand_in(editor, configs, device):
    "Let an editor without encoders answer with random numbers of the right shapes."
    def encode_text(texts, images=None):
        once, index = deduplicate(texts)
        return RepeatedText(random_text(weightless_text(editor, configs['words'], len(once)), device), index)
    def encode_image(images): return torch.randn(len(images), *editor.latent_shape, device=device)
    def decode(x): return np.zeros((len(x), editor.size, editor.size, 3), np.uint8)
    editor.encode_text = encode_text
    editor.encode_image = encode_image
    editor.decode = decode
    editor.sigmas = partial(sigma_schedule, mu=1.)
    editor.max_text_tokens = None

def random_judge(sessions, images_PGTHWC):
    "Scores that have nothing to do with the pictures."
    shape = images_PGTHWC.shape[:3]
    rewards = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(0))
    return Scores(('if', 'cc'), rewards, (rewards[..., 0] > .5).float(), rewards[..., 1], rewards[..., 1])

def held(tensors): return sum(x.numel()*x.element_size() for x in tensors if torch.is_tensor(x))

def allocated(device): return torch.cuda.memory_allocated() if device.type == 'cuda' else None

def texts_held(text):
    "Bytes of the different rows of an encoded text."
    if text is None: return 0
    storages = [x.untyped_storage().nbytes() for x in (text.embeds, text.pooled) if x is not None]
    return sum(storages) + texts_held(text.negative)

def run_iterations(config, configs, nf4, device, dtype, iterations=3):
    "Seconds and losses of whole iterations, and the bytes of the plan's parts as they are held."
    gc.collect()
    before = allocated(device)
    editor = real_editor(config, configs, device, dtype, nf4)
    adapter = held(lora_parameters(editor))
    built = allocated(device) - before if before is not None else held(
        [*editor.transformer.parameters()]) + held([m.weight.quant_state.absmax for m in editor.transformer.modules()
                                                    if hasattr(getattr(m, 'weight', None), 'quant_state')])
    stand_in(editor, configs, device)
    policy = Policy(config, editor)
    pictures = [Image.new('RGB', (editor.size, editor.size))]*config.sessions_per_iteration
    T = config.turns or 3
    sessions = [Session(str(p), picture, [f'instruction {p}']*T) for p, picture in enumerate(pictures)]
    log = []
    sampled = None
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
    for i in range(iterations):
        start = time.perf_counter()
        metrics, sampled, *_ = iterate(config, policy, sessions, random_judge, i)
        log.append(dict(seconds=time.perf_counter() - start, loss=metrics['loss'], grad_norm=metrics['grad_norm']))
    optimiser = held([x for state in policy.optimizer.state.values() for x in state.values()])
    rollouts = held([sampled.inputs_TNLC, sampled.clean_TNLC, sampled.path_TKNLC, sampled.next_TKNLC,
                     sampled.mean_TKNLC])
    parts = {'transformer': built - adapter, 'adapter, its gradient, old policy': 3*adapter, 'optimiser': optimiser,
             'rollouts': rollouts + sum(texts_held(t.once) for t in sampled.texts_T)}
    if device.type == 'cuda':
        rest = sum(parts.values())
        parts[f'activations (batch {config.batch})'] = torch.cuda.max_memory_allocated() - before - rest
    return log, parts

# --- text encoders and autoencoder

# FLUX.1's autoencoder as published; those of FLUX.2 and Qwen are their classes' defaults
FLUX_AUTOENCODER = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=('DownEncoderBlock2D',)*4,
    up_block_types=('UpDecoderBlock2D',)*4, layers_per_block=2, latent_channels=16, use_quant_conv=False,
    use_post_quant_conv=False, scaling_factor=.3611, shift_factor=.1159)

def autoencoder_of(editor_name, family):
    "An autoencoder without weights."
    import diffusers
    name = 'AutoencoderKL'
    if 'Flux2' in family: name = 'AutoencoderKLFlux2'
    if 'Qwen' in family: name = 'AutoencoderKLQwenImage'
    cls = getattr(diffusers, name)
    if editor_name in PUBLISHED_EDITORS: config = FLUX_AUTOENCODER if name == 'AutoencoderKL' else {}
    else: config = cls.load_config(find_editor(editor_name)[0], subfolder='vae')
    with torch.device('meta'): return cls.from_config(config)

def quantize_encoder(encoder, dtype):
    "As the loader does on a GPU: not the vision tower, the head, and what its class keeps in float32."
    kept = {*KEPT_IN_16_BITS, *(getattr(encoder, '_keep_in_fp32_modules', None) or ())}
    for name, parent in list(encoder.named_modules()):
        for child, layer in list(parent.named_children()):
            if not isinstance(layer, torch.nn.Linear) or kept & {*name.split('.'), child}: continue
            held_layer = torch.nn.ModuleDict(dict(blocks=torch.nn.ModuleDict(dict(layer=layer))))
            setattr(parent, child, quantize_nf4(held_layer, dtype).blocks.layer)

def encoder_row(name, config, words, quantized, device, dtype, repeat):
    "Seconds a prompt and bytes of a text encoder with random weights; of one that sees, also seconds a picture."
    encoder = weightless_encoder(name, config).to(dtype)
    fill(encoder, device)
    encoder.tie_weights()
    if quantized: quantize_encoder(encoder, dtype)
    encoder.requires_grad_(False).eval()
    text = encoder.config.get_text_config()
    words = min(words, text.max_position_embeddings) if 'CLIP' in name else words
    ids = torch.zeros(1, words, dtype=torch.long, device=device)
    row = dict(part=name, weights=weights_name(quantized, dtype), held_GB=held(encoder.parameters())/1e9, words=words)
    with torch.no_grad():
        row['seconds_a_prompt'] = seconds(lambda: encoder(input_ids=ids), device, repeat)
        tower = getattr(getattr(encoder, 'model', None), 'visual', None)
        if tower is None: return row
        patch = encoder.config.vision_config
        width = patch.in_channels*patch.temporal_patch_size*patch.patch_size**2
        pixels = torch.zeros(28*28, width, device=device, dtype=dtype)                    # about 384 x 384
        grid = torch.tensor([[1, 28, 28]], device=device)
        return row | dict(seconds_a_picture_seen=seconds(lambda: tower(pixels, grid_thw=grid), device, repeat))

def autoencoder_row(config, configs, size, device, dtype, repeat):
    "Seconds a picture and bytes of the autoencoder with random weights; the memory that decoding a picture takes."
    vae = autoencoder_of(config.editor, configs['pipeline'])
    torch.nn.Module.to(vae, dtype)                    # diffusers' own `to` warns of what matters only with weights
    fill(vae, device)
    vae.requires_grad_(False).eval()
    if device.type != 'cpu': vae.enable_slicing()
    if size > TILE_ABOVE: vae.enable_tiling()
    pixels = to_vae(np.zeros((1, size, size, 3), np.uint8), vae)
    if 'Qwen' in configs['pipeline']: pixels = pixels[:, :, None]                         # a video of one picture
    before = allocated(device)
    with torch.no_grad():
        z = vae.encode(pixels).latent_dist.mode()
        row = dict(part=type(vae).__name__, weights=weights_name(False, dtype), held_GB=held(vae.parameters())/1e9,
                   seconds_to_encode=seconds(lambda: vae.encode(pixels), device, repeat))
        if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
        row['seconds_to_decode'] = seconds(lambda: vae.decode(z), device, repeat)
    if device.type == 'cuda': row['decoding_GB'] = (torch.cuda.max_memory_allocated() - before)/1e9
    return row

def measure_encoders(config, configs, device, dtype, repeat):
    "A row for each text encoder (the large one also in 4 bits) and the autoencoder; one that fails spoils no other."
    editor = weightless_editor(configs, size=config.size or configs.get('size'), guidance=config.guidance)
    T = config.turns or 3
    P = config.sessions_per_iteration
    many = dict(seconds_a_prompt=P*T, seconds_a_picture_seen=P*config.group*T, seconds_to_encode=P*config.group*T,
                seconds_to_decode=P*config.group*T)
    jobs = [partial(encoder_row, name, encoder, configs['words'], False) for name, encoder in configs['text']]
    jobs.append(partial(encoder_row, *configs['text'][-1], configs['words'], True))
    jobs.append(partial(autoencoder_row, config, configs, editor.size))
    for job in jobs:
        gc.collect()
        if device.type == 'cuda': torch.cuda.empty_cache()
        try: row = job(device, dtype, repeat)
        except torch.OutOfMemoryError: row = dict(part=str(job.args[0])[:40], error='out of memory')
        except Exception as e: row = dict(part=str(job.args[0])[:40], error=f'{type(e).__name__}: {one_line(e)[:200]}')
        else: row['seconds_an_iteration'] = sum(n*row[k] for k, n in many.items() if k in row)
        yield row

def compare_parts(planned, measured):
    "The plan's parts beside what was held: gigabytes, and the plan's error."
    rows = {part: dict(planned_GB=planned[part]/1e9, held_GB=b/1e9, error=planned[part]/max(b, 1) - 1)
            for part, b in measured.items()}
    return pd.DataFrame.from_dict(rows, orient='index')

# why a toy's plan and what is held differ: planned is a run on the CPU; 8-bit AdamW leaves small tensors in 32 bits
PLAN_OF_TOY = ' (planned in float32, and with 8-bit AdamW, which leaves such small tensors in 32 bits)'

def show(title, table, **kw):
    print(f'\n{title}')
    print(table.to_string(float_format='{:.4g}'.format, na_rep='', **kw))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('settings', nargs='*', default=['experiments/recipes/kontext_nft.yaml'],
                        metavar='RECIPE.yaml | field=value')
    parser.add_argument('--toy', action='store_true', help="the tiny editor's configuration")
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--options', nargs='+', choices=OPTIONS, default=OPTIONS,
                        help='to measure beside `plain`, behind the recipe (default: all)')
    parser.add_argument('--out', default='experiments/results')
    args = parser.parse_args()
    values = {}
    for setting in args.settings: values |= parse_overrides([setting]) if '=' in setting else read_recipe(setting)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    toy = args.toy or device.type == 'cpu'
    if toy: values |= dict(lora_rank=4, batch=2, sessions_per_iteration=2, group=2, keep=None, num_steps=3)
    if toy and not Path(str(values.get('editor'))).is_dir(): values |= dict(editor='tiny', size=48)
    config = make_config(values)
    configs = editor_configs(config.editor)
    dtype = torch.bfloat16
    planned = plan(config)
    name = Path(config.editor).name + ('_toy' if toy else '')
    machine = torch.cuda.get_device_name() if device.type == 'cuda' else f'{platform.machine()} CPU'
    report = dict(finished=False, device=machine, toy=toy, torch=torch.__version__, config=config.model_dump(), rows=[],
                  encoders=[], iterations={}, parts={},
                  planned_GB={k: v/1e9 for k, v in planned['memory'].items()},
                  planned_minutes=planned['minutes'])
    def save(): atomic_write(Path(args.out)/f'bench_{name}.json', to_json(report, indent=1))
    def keep(rows, where):
        for row in rows:
            where.append(row)
            save()
    for nf4 in (True, False):
        weights = weights_name(nf4, dtype)
        here = config.model_copy(update=dict(quantize='nf4' if nf4 else None))
        keep(measure_options(here, configs, nf4, device, dtype, args.repeat, args.options), report['rows'])
        report['iterations'][weights], measured = run_iterations(here, configs, nf4, device, dtype)
        parts = compare_parts(plan(here)['memory'], measured)
        report['parts'][weights] = parts.to_dict('index')
        save()
        show(f'{weights}: three iterations', pd.DataFrame(report['iterations'][weights]))
        show(f'{weights}: memory by part{PLAN_OF_TOY if toy else ""}', parts)
    show('rows, by option', pd.DataFrame(report['rows']).T, header=False)
    keep(measure_encoders(config, configs, device, dtype, args.repeat), report['encoders'])
    report['finished'] = True
    save()
    show('text encoders and autoencoder', pd.DataFrame(report['encoders']).T, header=False)
    note = ' (toy size: these numbers say nothing about a GPU)' if toy else ''
    print(f"planned: {sum(planned['memory'].values())/1e9:.3f} GB with text encoders and autoencoder{note}")

if __name__ == '__main__': main()
