"""Does training go too far? The adapters of a finished sweep, multiplied by a number below one:

    python experiments/overshoot.py runs/sweeps/recipe_confirm.json [--scales .7]

On the sweep's own held-out sessions, with the noise of its own evaluation, so that a scale of 1 is what the sweep has
found. Every evaluation is kept in its run's folder and is not made again. Writes experiments/results/overshoot.jsonl, a
line for each setting and scale, and overshoot.png."""
import argparse
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np, torch
from tqdm.auto import tqdm
from mt_editflow_nb.ablation.results import METRICS, compare_points, load_results, seed_scores
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.data.files import atomic_write, read_json, to_json
from mt_editflow_nb.data.plots import line_style, save_figure
from mt_editflow_nb.data.shapeworld import WORLDS
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import load_lora
from mt_editflow_nb.evaluation.running import evaluate, read_outcomes, write_outcomes
from mt_editflow_nb.evaluation.scores import Outcomes
from mt_editflow_nb.rewards.cube import load_judge

NOISE = 1234                                           # as the evaluation of a run has it

def scaled_outcomes(run, scale, file, n=None, turns=None, eval_seed=None):
    """How the editor of a run does with its adapter times `scale`, [I, T]; kept in `file`.

    On the sweep's own held-out sessions, where no number of sessions, of turns, or seed says otherwise."""
    if not (kept := read_outcomes(file)):
        config = make_config(read_json(run/'config.json')['config'])
        editor = load_editor(config.editor)
        load_lora(editor, run/'lora')
        for name, p in editor.transformer.named_parameters():
            if 'lora_B' in name: p.data *= scale
        turns = turns or config.eval_turns or config.turns or 3
        eval_seed = config.eval_seed if eval_seed is None else eval_seed
        sessions = WORLDS[config.sessions](n or config.eval_sessions, turns, 'heldout', seed=eval_seed)
        outcomes, _ = evaluate(editor, sessions, load_judge(config.eval_judge), seed=NOISE,
                               num_steps=config.eval_steps or config.num_steps)
        write_outcomes(file, outcomes, [])
        kept = read_outcomes(file)
    return Outcomes(*(np.asarray(x, float) for x in kept[0]))

def stacked(outcomes_S): return Outcomes(*map(np.stack, zip(*outcomes_S)))

def changes(before, after): # outcomes [S, I, T]
    "By metric, the change at turn 3 over all seeds with its interval, and the change of each seed."
    table = compare_points(before, after).loc[3]
    change = (seed_scores(after) - seed_scores(before))[:, 2]
    of_all = {m: [round(float(table.loc[m, k]), 2) for k in ('difference', 'low', 'high')] for m in ('O', 'IF', 'CC')}
    return of_all, {metric: change[:, METRICS.index(metric)].round(2).tolist() for metric in ('O', 'CC')}

def row_of(label, scale, seeds, before, after): # outcomes [S, I, T]
    "Gain of O and change of CC at turn 3 over all seeds, and the gain of each seed."
    of_all, of_seeds = changes(before, after)
    return dict(label=label, scale=scale, seeds=seeds, O_gain=of_all['O'], CC_change=of_all['CC'],
                O_gain_of_seeds=of_seeds['O'])

def plot(rows):
    "Success against consistency: a line a setting, a dot a scale, with 95 % intervals."
    figure, ax = plt.subplots(figsize=(7, 4), layout='constrained')
    for i, label in enumerate(dict.fromkeys(row['label'] for row in rows)):
        some = [row for row in rows if row['label'] == label]
        x, y = [[row[name][0] for row in some] for name in ('CC_change', 'O_gain')]
        ax.plot(x, y, marker='o', label=label, **line_style(i))
        for row in some:
            cx, *x_ends = row['CC_change']
            cy, *y_ends = row['O_gain']
            ax.plot(x_ends, [cy, cy], [cx, cx], y_ends, color=line_style(i)['color'], lw=.5, alpha=.5)
            ax.annotate(f'{row["scale"]:g}', (cx, cy), xytext=(4, 4), textcoords='offset points', fontsize=8)
    ax.axvline(0, color='k', lw=.5)
    ax.set(xlabel='change of CC at turn 3, points', ylabel='gain in O at turn 3, points')
    ax.legend()
    return figure

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sweep', type=Path, help='NAME.json of a sweep that the exact verifier scores')
    parser.add_argument('--scales', nargs='+', type=float, default=[.7], help='(default: 0.7)')
    parser.add_argument('--results', type=Path, default=Path(__file__).resolve().parent/'results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = {point['label']: {job['seed']: args.sweep.parent/job['folder'] for job in point['jobs']}
               for point in read_json(args.sweep)['points']}
    points = load_results(args.sweep).points
    rows = []
    for label, point in tqdm(points.items(), desc='settings'):
        rows.append(row_of(label, 1., point.seeds, point.before, point.after))
        for scale in args.scales:
            runs = [folders[label][seed] for seed in point.seeds]
            each = [scaled_outcomes(run, scale, run/f'scaled_{scale:g}.safetensors') for run in runs]
            rows.append(row_of(label, scale, point.seeds, point.before, stacked(each)))
    atomic_write(args.results/'overshoot.jsonl', ''.join(f'{to_json(row)}\n' for row in rows))
    save_figure(args.results/'overshoot.png', plot(rows))

if __name__ == '__main__': main()
