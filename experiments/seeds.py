"""Run one configuration with several seeds and summarise it: python experiments/seeds.py NAME [--seeds 5] [--jobs 2] [RECIPE.yaml | field=value ...]

Each seed is a run of its own in runs/NAME/seed_S; called again, finished ones are kept and cut ones go on.
Writes to experiments/results: NAME.json, NAME.csv (the table over seeds), NAME.png (learning curves), and NAME_sessions.png
(the first two held-out sessions of seed 0, before and after)."""
import argparse, json, os, shlex, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pandas as pd
from safetensors.numpy import load_file
from mt_editflow_nb.evaluation.scores import Outcomes, outcomes_from, seed_summary
from mt_editflow_nb.data.files import atomic_write
from mt_editflow_nb.training.runs import environment

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('name'); ap.add_argument('settings', nargs='*')
ap.add_argument('--seeds', type=int, default=5); ap.add_argument('--jobs', type=int, default=2, help='seeds at a time, each with cores/jobs threads')
a = ap.parse_intermixed_args()
runs, results = Path('runs')/a.name, Path('experiments/results')
runs.mkdir(parents=True, exist_ok=True); results.mkdir(parents=True, exist_ok=True)

def job(seed):
    out, t0 = runs/f'seed_{seed}', time.time()
    threads = str(max(1, (os.cpu_count() or 1)//a.jobs))
    with open(runs/f'seed_{seed}.log', 'w') as log:
        code = subprocess.call([sys.executable, '-m', 'mt_editflow_nb.training', *a.settings, f'seed={seed}', '--run', str(out)], stdout=log, stderr=log,
                               env=dict(os.environ, OMP_NUM_THREADS=threads))
    print(f'seed {seed}: exit {code}, {time.time() - t0:.0f} s', flush=True)
    if code: raise SystemExit(f'seed {seed} failed, see {runs}/seed_{seed}.log')
    return json.loads((out/'results.json').read_text())

with ThreadPoolExecutor(a.jobs) as pool: rows = list(pool.map(job, range(a.seeds)))

def outcomes(name):
    "Of every seed, [S, N, T]."
    saved = [outcomes_from(load_file(runs/f'seed_{s}'/f'{name}.safetensors')) for s in range(a.seeds)]
    return Outcomes(*map(np.stack, zip(*saved)))

T = rows[0]['turns']
summary = seed_summary(outcomes('before'), outcomes('after'))
top = summary[f'turn{T}_O']
atomic_write(results/f'{a.name}.json', json.dumps({
    'command': shlex.join(['python', 'experiments/seeds.py', *sys.argv[1:]]), 'commit': environment()['commit'], 'seeds': a.seeds, 'sessions': rows[0]['sessions'],
    f'turn{T}_O_before': top['before'], f'turn{T}_O_gain': top['gain'], f'turn{T}_O_gain_ci': top['gain_ci'], 'summary': summary,
    'environment': environment(), 'config': json.loads((runs/'seed_0'/'config.json').read_text())['config'],
    'per_seed': [{k: v for k, v in r.items() if k != 'table'} | {'gains': {f"turn{x['turn']}_{x['metric']}": round(x['difference'], 3) for x in r['table']}} for r in rows]}, indent=1))
table = pd.DataFrame(summary).T
atomic_write(results/f'{a.name}.csv', table.to_csv())

from matplotlib.figure import Figure
logs = [[json.loads(x) for x in (runs/f'seed_{s}'/'metrics.jsonl').read_text().splitlines()] for s in range(a.seeds)]
fig = Figure(figsize=(9, 2.8), layout='constrained')
for ax, (key, title) in zip(fig.subplots(1, 3), (('all_right', 'all turns so far right'), ('if', 'graded instruction following'), ('cc', 'content consistency'))):
    for t, color in zip(range(T), ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000')):
        y = np.array([[r[key][t] for r in log] for log in logs])
        n = max(1, y.shape[1]//10)
        y = np.stack([np.convolve(v, np.ones(n)/n, 'valid') for v in y])
        mean, half = y.mean(0), 1.96*y.std(0, ddof=1)/len(y)**.5 if len(y) > 1 else 0
        x = np.arange(y.shape[1]) + n
        ax.plot(x, mean, color=color, label=f'turn {t + 1}'); ax.fill_between(x, mean - half, mean + half, color=color, alpha=.2, lw=0)
    ax.set(title=title, xlabel='iteration')
    ax.legend(fontsize=7)
fig.savefig(results/f'{a.name}.png', dpi=90)

from PIL import Image
strips = [Image.open(runs/'seed_0'/'rollouts'/f'heldout_{i}.png').convert('RGB') for i in range(2)]
both = Image.new('RGB', (max(x.width for x in strips), sum(x.height for x in strips)), 'white')
for i, x in enumerate(strips): both.paste(x, (0, sum(y.height for y in strips[:i])))
both.save(results/f'{a.name}_sessions.png', optimize=True)
print(table.to_string())
