"""How fast and how large is a real editor on this machine? python experiments/bench_gpu.py [RECIPE.yaml | field=value ...]

Builds the full-size transformer from its published configuration with random weights (speed and memory do not depend on their
values), block by block, in NF4 and in bf16, with and without torch.compile, and measures what an iteration is made of: rows that only
go forward (sampling) and rows that go forward and backward (training). Text encoders and autoencoder are not built: their time is
the plan's only blind spot, and `kernel_share` says which part of a training step's time lies in matrix products, attention and
4-bit kernels.

Prints a table and writes experiments/results/bench_NAME.json. Without a GPU it runs the tiny editor's configuration on the CPU
(`--toy` asks for that anywhere), compiled without a code generator: that tests the script, its numbers say nothing about a GPU."""
import argparse, gc, json, platform, time
from pathlib import Path
import pandas as pd, torch
from mt_editflow_nb.editing.lora import add_lora, lora_parameters
from mt_editflow_nb.editing.loading import quantize_nf4
from mt_editflow_nb.training.budget import PEAK, count_rows, editor_configs, profile_row, weightless_editor, weightless_text, plan
from mt_editflow_nb.editing.editor import Text
from mt_editflow_nb.data.files import atomic_write
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.policy import make_optimizer
from mt_editflow_nb.cli.train import parse_overrides, read_recipe

def real_editor(c, about, device, dtype, nf4):
    "The transformer with random weights on the device; each block is quantised as soon as it exists, so that bf16 is never held whole."
    e = weightless_editor(about, size=c.size or about.get('size'), guidance=c.guidance, dtype=dtype)
    e.device = device
    def fill(m):
        m.to_empty(device=device)
        for n, p in m.named_parameters(): p.data.normal_(0, .02) if p.ndim > 1 else p.data.fill_(1. if 'norm' in n else 0.)
        for b in m.buffers(): b.zero_()
    for name, child in e.transformer.named_children():
        if 'blocks' not in name: fill(child); continue
        for block in child:
            fill(block)
            if nf4: quantize_nf4(torch.nn.ModuleDict(dict(blocks=block)), dtype)
    if hasattr(e.transformer, 'pos_embed') and hasattr(e.transformer.pos_embed, 'pos_freqs'):             # Qwen's tables are neither weights nor buffers
        e.transformer.pos_embed = type(e.transformer.pos_embed)(theta=10000, axes_dim=list(e.transformer.config.axes_dims_rope), scale_rope=True)
    add_lora(e, c.lora_rank, alpha=c.lora_alpha, targets=c.lora_targets)
    if c.checkpointing: e.transformer.enable_gradient_checkpointing()
    return e

def like(meta, device):
    "Random text rows of the shapes of meta ones."
    fill = lambda x: None if x is None else torch.randn(x.shape, device=device).to(x.dtype)
    return Text(fill(meta.embeds), fill(meta.pooled), None if meta.ids is None else torch.zeros(meta.ids.shape, device=device), None, None if meta.negative is None else like(meta.negative, device))

def seconds(f, device, repeat):
    sync = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    f(); sync(); t = time.perf_counter()
    for _ in range(repeat): f()
    sync()
    return (time.perf_counter() - t)/repeat

KERNELS = ('gemm', 'cutlass', 'flash', 'attention', 'fmha', 'sm90', 'sm80', 'dequant', 'kgemm', 'nvjet')      # on a GPU, parts of their names
OPERATORS = ('addmm', 'aten::mm', 'bmm', 'attention', '4bit')                                                # on the CPU, which has no kernels

def kernel_share(f, device):
    "The part of a step's time that lies in matrix products, attention and 4-bit kernels."
    from torch.profiler import ProfilerActivity, profile
    cuda = device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as prof:
        f()
        if cuda: torch.cuda.synchronize()
    events = [(e.key.lower(), e.self_device_time_total if cuda else e.self_cpu_time_total) for e in prof.key_averages()]
    return sum(t for k, t in events if any(s in k for s in (KERNELS if cuda else OPERATORS)))/max(1, sum(t for _, t in events))

def measure(c, about, nf4, compiled, device, dtype, repeat):
    gc.collect()
    if device.type == 'cuda': torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    e = real_editor(c, about, device, dtype, nf4)
    if compiled: e.transformer.compile_repeated_blocks(**({} if device.type == 'cuda' else dict(backend='eager')))
    text, opt, n = like(weightless_text(e, about['words'], c.batch), device), make_optimizer(c, lora_parameters(e)), c.batch
    x, image, s = torch.randn(n, *e.latent_shape, device=device), torch.randn(n, *e.latent_shape, device=device), torch.full((n,), .5, device=device)
    def sample():
        with torch.no_grad(): e.velocity(x, s, text, image)
    def train():
        opt.zero_grad(); e.velocity(x, s, text, image).square().mean().backward(); opt.step()
    forward, both = seconds(sample, device, repeat)/n, seconds(train, device, repeat)/n
    rows, T = count_rows(c, c.turns or 3), c.turns or 3
    iteration = (rows['sampled'] + rows['compared'])*forward + rows['trained']*both
    flops = flops_of_a_row(c, about)
    return dict(weights='nf4' if nf4 else str(dtype).split('.')[-1], compiled=compiled, seconds_forward_row=forward, seconds_train_row=both, seconds_iteration=iteration,
                edits_per_gpu_second=c.sessions_per_iteration*c.group*T/iteration, peak_GB=torch.cuda.max_memory_allocated()/1e9 if device.type == 'cuda' else None,
                kernel_share=kernel_share(train, device), utilisation=(flops/forward)/peak(device) if peak(device) else None)

def peak(device): return next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), None) if device.type == 'cuda' else None

def flops_of_a_row(c, about):
    "Operations of one forward row, counted on the meta device."
    m = weightless_editor(about, size=c.size or about.get('size'), guidance=c.guidance)
    add_lora(m, 1)
    return profile_row(m, weightless_text(m, about['words']))['flops_forward']

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('settings', nargs='*', default=['experiments/recipes/kontext_nft.yaml'], metavar='RECIPE.yaml | field=value')
    ap.add_argument('--toy', action='store_true', help="the tiny editor's configuration")
    ap.add_argument('--repeat', type=int, default=5)
    ap.add_argument('--out', default='experiments/results')
    a = ap.parse_args()
    values = {}
    for s in a.settings: values |= read_recipe(s) if '=' not in s else parse_overrides([s])
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    toy = a.toy or device.type == 'cpu'
    if toy: values |= dict(lora_rank=4, batch=2) | ({} if Path(str(values.get('editor'))).is_dir() else dict(editor='tiny', size=48))
    c = make_config(values)
    about, dtype = editor_configs(c.editor), torch.bfloat16
    rows = []
    for nf4 in (True, False):
        for compiled in (False, True):
            try: rows.append(measure(c, about, nf4, compiled, device, dtype, a.repeat))
            except torch.OutOfMemoryError: rows.append(dict(weights='nf4' if nf4 else 'bfloat16', compiled=compiled, error='out of memory'))
            except Exception as e:                                       # a compiler that cannot do it spoils no other row
                if not compiled: raise
                rows.append(dict(weights='nf4' if nf4 else 'bfloat16', compiled=compiled, error=f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'))
    print(pd.DataFrame(rows).T.to_string(header=False, float_format='{:.4g}'.format))
    planned = plan(c)
    name = Path(c.editor).name + ('_toy' if toy else '')
    atomic_write(Path(a.out)/f'bench_{name}.json', json.dumps(dict(device=torch.cuda.get_device_name() if device.type == 'cuda' else platform.machine() + ' CPU', toy=toy, torch=torch.__version__,
                                                                   config=c.model_dump(), planned_GB={k: v/1e9 for k, v in planned['memory'].items()}, planned_minutes=planned['minutes'], rows=rows), indent=1))
    print(f"planned: {sum(planned['memory'].values())/1e9:.3f} GB with text encoders and autoencoder" + ('' if not toy else ' (toy size: these numbers say nothing about a GPU)'))

if __name__ == '__main__': main()
