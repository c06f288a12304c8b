"""How fast and how large is a real editor on this machine?

    python experiments/bench_gpu.py [RECIPE.yaml | field=value ...]

Builds the full-size transformer from its published configuration with random weights (speed and memory do not depend
on their values), block by block, in NF4 and in bf16, with and without torch.compile, and measures what an iteration is
made of: rows that only go forward (sampling) and rows that go forward and backward (training). Text encoders and
autoencoder are not built: their time is the plan's only blind spot, and `kernel_share` says which part of a training
step's time lies in matrix products, attention and 4-bit kernels.

Prints a table and writes experiments/results/bench_NAME.json. Without a GPU it runs the tiny editor's configuration on
the CPU (`--toy` asks for that anywhere), compiled without a code generator: that tests the script, its numbers say
nothing about a GPU."""
import argparse, gc, platform, time
from pathlib import Path
import pandas as pd, torch
from mt_editflow_nb.data.files import atomic_write, one_line, to_json
from mt_editflow_nb.editing.editor import Text
from mt_editflow_nb.editing.loading import quantize_nf4
from mt_editflow_nb.editing.lora import add_lora, lora_parameters
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.policy import make_optimizer
from mt_editflow_nb.training.budget import (PEAK, count_rows, editor_configs, plan, profile_row, weightless_editor,
                                            weightless_text)
from mt_editflow_nb.cli.train import parse_overrides, read_recipe

def fill(module, device):
    "Random weights on the device."
    module.to_empty(device=device)
    for name, p in module.named_parameters():
        if p.ndim > 1: p.data.normal_(0, .02)
        else: p.data.fill_(1. if 'norm' in name else 0.)
    for buffer in module.buffers(): buffer.zero_()

def real_editor(c, configs, device, dtype, nf4):
    "The transformer with random weights; each block is quantised as soon as it exists: bf16 is never held whole."
    editor = weightless_editor(configs, size=c.size or configs.get('size'), guidance=c.guidance, dtype=dtype)
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
    add_lora(editor, c.lora_rank, alpha=c.lora_alpha, targets=c.lora_targets)
    if c.checkpointing: editor.transformer.enable_gradient_checkpointing()
    return editor

def random_text(text, device):
    "Random text rows of the shapes of weightless ones."
    def some(x): return None if x is None else torch.randn(x.shape, device=device).to(x.dtype)
    ids = None if text.ids is None else torch.zeros(text.ids.shape, device=device)
    negative = None if text.negative is None else random_text(text.negative, device)
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

def measure(c, configs, nf4, compiled, device, dtype, repeat):
    "A row of the table: seconds, memory and utilisation with these weights."
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    editor = real_editor(c, configs, device, dtype, nf4)
    if compiled: editor.transformer.compile_repeated_blocks(**({} if device.type == 'cuda' else dict(backend='eager')))
    n = c.batch
    text = random_text(weightless_text(editor, configs['words'], n), device)
    optimizer = make_optimizer(c, lora_parameters(editor))
    x, image = (torch.randn(n, *editor.latent_shape, device=device) for _ in range(2))
    sigma = torch.full((n,), .5, device=device)
    def sample():
        with torch.no_grad(): editor.velocity(x, sigma, text, image)
    def train():
        optimizer.zero_grad()
        editor.velocity(x, sigma, text, image).square().mean().backward()
        optimizer.step()
    forward, both = seconds(sample, device, repeat)/n, seconds(train, device, repeat)/n
    T, speed = c.turns or 3, peak(device)
    rows = count_rows(c, T)
    iteration = (rows['sampled'] + rows['compared'])*forward + rows['trained']*both
    return dict(weights=weights_name(nf4, dtype), compiled=compiled, seconds_forward_row=forward,
                seconds_train_row=both, seconds_iteration=iteration,
                edits_per_gpu_second=c.sessions_per_iteration*c.group*T/iteration,
                peak_GB=torch.cuda.max_memory_allocated()/1e9 if device.type == 'cuda' else None,
                kernel_share=kernel_share(train, device),
                utilisation=(flops_of_a_row(c, configs)/forward)/speed if speed else None)

def peak(device):
    "Published operations a second of the card, or None."
    if device.type != 'cuda': return None
    return next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), None)

def flops_of_a_row(c, configs):
    "Operations of one forward row, counted on the meta device."
    editor = weightless_editor(configs, size=c.size or configs.get('size'), guidance=c.guidance)
    add_lora(editor, 1)
    return profile_row(editor, weightless_text(editor, configs['words']))['flops_forward']

def try_measure(c, configs, nf4, compiled, device, dtype, repeat):
    "A row, or why there is none: a compiler that cannot do it spoils no other row."
    failed = dict(weights=weights_name(nf4, dtype), compiled=compiled)
    try: return measure(c, configs, nf4, compiled, device, dtype, repeat)
    except torch.OutOfMemoryError: return dict(failed, error='out of memory')
    except Exception as e:
        if not compiled: raise
        return dict(failed, error=f'{type(e).__name__}: {one_line(e)[:200]}')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('settings', nargs='*', default=['experiments/recipes/kontext_nft.yaml'],
                        metavar='RECIPE.yaml | field=value')
    parser.add_argument('--toy', action='store_true', help="the tiny editor's configuration")
    parser.add_argument('--repeat', type=int, default=5)
    parser.add_argument('--out', default='experiments/results')
    a = parser.parse_args()
    values = {}
    for setting in a.settings: values |= parse_overrides([setting]) if '=' in setting else read_recipe(setting)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    toy = a.toy or device.type == 'cpu'
    if toy: values |= dict(lora_rank=4, batch=2)
    if toy and not Path(str(values.get('editor'))).is_dir(): values |= dict(editor='tiny', size=48)
    c = make_config(values)
    configs, dtype = editor_configs(c.editor), torch.bfloat16
    rows = [try_measure(c, configs, nf4, compiled, device, dtype, a.repeat)
            for nf4 in (True, False) for compiled in (False, True)]
    print(pd.DataFrame(rows).T.to_string(header=False, float_format='{:.4g}'.format))
    planned, name = plan(c), Path(c.editor).name + ('_toy' if toy else '')
    machine = torch.cuda.get_device_name() if device.type == 'cuda' else f'{platform.machine()} CPU'
    report = dict(device=machine, toy=toy, torch=torch.__version__, config=c.model_dump(), rows=rows,
                  planned_GB={k: v/1e9 for k, v in planned['memory'].items()}, planned_minutes=planned['minutes'])
    atomic_write(Path(a.out)/f'bench_{name}.json', to_json(report, indent=1))
    note = ' (toy size: these numbers say nothing about a GPU)' if toy else ''
    print(f"planned: {sum(planned['memory'].values())/1e9:.3f} GB with text encoders and autoencoder{note}")

if __name__ == '__main__': main()
