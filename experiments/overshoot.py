"""How much of a trained adapter is best: the adapters of finished sweeps, multiplied by a number of at most one:

    python experiments/overshoot.py runs/sweeps/recipe_confirm.json [MORE.json ...] --scales 1 .85 .7 .5
    python experiments/overshoot.py runs/sweeps/recipe_confirm.json --scales .7 --heldout

On 384 sessions of the training split that no run here is trained on, so that a scale can be chosen; with `--heldout`,
on the 512 held-out sessions of the comparison at equal passes. Every evaluation is kept in its run's folder and is not
made again. Rewrites the lines of the settings and scales asked for in experiments/results/overshoot.jsonl, and
overshoot.png from all lines."""
import argparse
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np, torch
from tqdm.auto import tqdm
from mt_editflow_nb.ablation.results import METRICS, compare_points, seed_scores
from mt_editflow_nb.data.files import atomic_write, expect, read_json, read_json_lines, to_json
from mt_editflow_nb.data.plots import line_style, save_figure
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import load_lora
from mt_editflow_nb.evaluation.running import evaluate, read_outcomes, write_outcomes
from mt_editflow_nb.evaluation.scores import Outcomes
from mt_editflow_nb.rewards.cube import load_judge

SPLITS = dict(training=dict(n=384, turns=3, start=400_000), heldout=dict(n=512, turns=8, split='heldout', seed=2))
NOISE, STEPS = dict(training=7, heldout=1234), 3          # those of experiments/tune.py, and of the comparison

def outcomes(run, scale, split):
    "How an editor with a run's adapter times `scale` does; of the base editor where `run` is a folder without one."
    file = run/'overshoot'/f'{split}_{scale:g}.safetensors'
    if not (kept := read_outcomes(file)):
        editor = load_editor()
        if (run/'lora').is_dir(): load_lora(editor, run/'lora')
        for name, p in editor.transformer.named_parameters():
            if 'lora_B' in name: p.data *= scale
        sessions, judge = shape_sessions(**SPLITS[split]), load_judge('verifier')
        found, _ = evaluate(editor, sessions, judge, num_steps=STEPS, seed=NOISE[split])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_outcomes(file, found, [])
        kept = read_outcomes(file)
    return Outcomes(*(np.asarray(x, float) for x in kept[0]))

def finished_runs(path):
    "Label -> seed -> folder of a sweep's finished jobs."
    runs = {}
    for point in read_json(path)['points']:
        for job in point['jobs']:
            folder = path.parent/job['folder']
            if (folder/'results.json').is_file(): runs.setdefault(point['label'], {})[job['seed']] = folder
    expect(runs, path, 'a sweep with finished jobs', 'none')
    return runs

def row_of(label, folders, scale, split, base):
    "Gain of O and change of CC at turn 3 over all seeds, and O of each seed."
    after = Outcomes(*map(np.stack, zip(*(outcomes(folder, scale, split) for folder in folders.values()))))
    before = Outcomes(*(np.stack([x]*len(folders)) for x in base))
    table = compare_points(before, after).loc[3]
    O_S = seed_scores(after)[:, 2, METRICS.index('O')] - seed_scores(before)[:, 2, METRICS.index('O')]
    def numbers(metric): return [round(float(table.loc[metric, k]), 2) for k in ('difference', 'low', 'high')]
    return dict(label=label, split=split, scale=scale, seeds=list(folders), O_gain=numbers('O'),
                CC_change=numbers('CC'), O_gain_of_seeds=O_S.round(2).tolist())

def plot(rows):
    "Success against consistency: a line a setting, a dot a scale."
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(11, 4), layout='constrained')
    labels = list(dict.fromkeys(row['label'] for row in rows))
    for ax, split in zip(axes, SPLITS):
        for i, label in enumerate(labels):
            some = sorted((r for r in rows if r['label'] == label and r['split'] == split), key=lambda r: r['scale'])
            x, y = [r['CC_change'][0] for r in some], [r['O_gain'][0] for r in some]
            ax.plot(x, y, marker='o', label=label, **line_style(i))
            for r in some: ax.annotate(f"{r['scale']:g}", (r['CC_change'][0], r['O_gain'][0]), xytext=(4, 4),
                                       textcoords='offset points', fontsize=8)
        ax.axvline(0, color='k', lw=.5)
        ax.set(title=f'{split} sessions', xlabel='change of CC at turn 3, points', ylabel='gain in O at turn 3, points')
    axes[0].legend()
    return figure

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sweeps', nargs='+', type=Path)
    parser.add_argument('--scales', nargs='+', type=float, default=[1, .85, .7, .5])
    parser.add_argument('--heldout', action='store_true', help='on held-out sessions: for scales that are chosen')
    parser.add_argument('--results', type=Path, default=Path(__file__).resolve().parent/'results')
    a = parser.parse_args()
    torch.set_num_threads(1)
    split, file = 'heldout' if a.heldout else 'training', a.results/'overshoot.jsonl'
    base = outcomes(a.sweeps[0].parent/'.base', 1, split)
    runs = [(label, folders) for path in a.sweeps for label, folders in finished_runs(path).items()]
    rows = {(r['label'], r['split'], r['scale']): r for r in (read_json_lines(file) if file.is_file() else [])}
    for label, folders in tqdm(runs, desc='settings'):
        for scale in a.scales:
            row = rows[label, split, scale] = row_of(label, folders, scale, split, base)
            tqdm.write(to_json(row))
    atomic_write(file, ''.join(f'{to_json(row)}\n' for row in rows.values()))
    save_figure(a.results/'overshoot.png', plot(list(rows.values())))

if __name__ == '__main__': main()
