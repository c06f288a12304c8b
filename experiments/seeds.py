"""Run one configuration with several seeds and summarise it:

    python experiments/seeds.py NAME [--seeds 5] [--jobs 2] [RECIPE.yaml | field=value ...]

Each seed is a run of its own in runs/NAME/seed_S; called again, finished ones are kept and cut ones go on.
Writes to experiments/results: NAME.json, NAME.csv (the table over seeds), NAME.png (learning curves), and
NAME_sessions.png (the first two held-out sessions of seed 0, before and after)."""
import argparse, os, shlex, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pandas as pd
from PIL import Image
from safetensors.numpy import load_file
from mt_editflow_nb.data.files import atomic_write, read_json, to_json
from mt_editflow_nb.data.plots import plot_learning_curves
from mt_editflow_nb.evaluation.scores import Outcomes, outcomes_from, seed_summary
from mt_editflow_nb.training.runs import environment, metrics_rows

def run_seed(seed, folder, settings, threads):
    "Train and evaluate one seed in a process of its own; returns its results."
    out, start = folder/f'seed_{seed}', time.monotonic()
    command = [sys.executable, '-m', 'mt_editflow_nb.training', *settings, f'seed={seed}', '--run', str(out)]
    with open(folder/f'seed_{seed}.log', 'w') as log:
        code = subprocess.call(command, stdout=log, stderr=log, env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    print(f'seed {seed}: exit {code}, {time.monotonic() - start:.0f} s', flush=True)
    if code: raise SystemExit(f'seed {seed} failed, see {folder}/seed_{seed}.log')
    return read_json(out/'results.json')

def outcomes_of(folder, name, seeds):
    "Outcomes of every seed, [S, I, T]."
    each = [outcomes_from(load_file(folder/f'seed_{s}'/f'{name}.safetensors')) for s in range(seeds)]
    return Outcomes(*(np.stack(field) for field in zip(*each)))

def of_seed(results):
    "A seed's results, with gains in place of the table."
    gains = {f"turn{row['turn']}_{row['metric']}": round(row['difference'], 3) for row in results['table']}
    return {k: v for k, v in results.items() if k != 'table'} | dict(gains=gains)

def stacked(pictures):
    "Pictures one above the other."
    both = Image.new('RGB', (max(x.width for x in pictures), sum(x.height for x in pictures)), 'white')
    top = 0
    for picture in pictures:
        both.paste(picture, (0, top))
        top += picture.height
    return both

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name')
    parser.add_argument('settings', nargs='*')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--jobs', type=int, default=2, help='seeds at a time, each with cores/jobs threads')
    a = parser.parse_intermixed_args()
    folder, results = Path('runs')/a.name, Path('experiments/results')
    for path in (folder, results): path.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1)//a.jobs)
    with ThreadPoolExecutor(a.jobs) as pool:
        rows = list(pool.map(lambda seed: run_seed(seed, folder, a.settings, threads), range(a.seeds)))

    summary = seed_summary(outcomes_of(folder, 'before', a.seeds), outcomes_of(folder, 'after', a.seeds))
    T = rows[0]['turns']
    top = summary[f'turn{T}_O']
    gained = {f'turn{T}_O_before': top['before'], f'turn{T}_O_gain': top['gain'], f'turn{T}_O_gain_ci': top['gain_ci']}
    config = read_json(folder/'seed_0'/'config.json')['config']
    report = dict(command=shlex.join(['python', 'experiments/seeds.py', *sys.argv[1:]]), commit=environment()['commit'],
                  seeds=a.seeds, sessions=rows[0]['sessions'], **gained, summary=summary, environment=environment(),
                  config=config, per_seed=[of_seed(r) for r in rows])
    atomic_write(results/f'{a.name}.json', to_json(report, indent=1))
    table = pd.DataFrame(summary).T
    atomic_write(results/f'{a.name}.csv', table.to_csv())

    logs = [metrics_rows(folder/f'seed_{s}') for s in range(a.seeds)]
    figures = {f'turn {t + 1}': [[r | {k: r[k][t:t + 1] for k in ('all_right', 'if', 'cc') if k in r} for r in log]
                                 for log in logs] for t in range(T)}
    plot_learning_curves(figures, ('all_right', 'if', 'cc')).savefig(results/f'{a.name}.png', dpi=90)
    pictures = [Image.open(folder/'seed_0'/'rollouts'/f'heldout_{i}.png').convert('RGB') for i in range(2)]
    stacked(pictures).save(results/f'{a.name}_sessions.png', optimize=True)
    print(table.to_string())

if __name__ == '__main__': main()
