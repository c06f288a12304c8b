"""What every method gains at equal passes, from finished sweeps:

    python experiments/recipe.py runs/sweeps/recipe.json [MORE.json ...] --ours turn-branching
    python experiments/recipe.py runs/sweeps/recipe_confirm.json --ours turn-branching --name recipe_fresh_seeds
    python experiments/recipe.py --pool imitation recipe_first_seeds recipe_fresh_seeds recipe_tuned supervised_more \
        --latest edit-r2 diffusion-nft --ours self-imitation
    python experiments/recipe.py --show mt-editflow      # print a method of the committed results, run nothing

Writes a report and a picture of it into experiments/results: recipe.json and recipe.png, or those of `--name`. Seeds of
one label are put together; `--pool` does that with reports whose runs are gone, but for labels after `--latest`, whose
settings have changed since. `tuning_runs` are the lines of experiments/results/tuning.jsonl with that label.
`turn1_success_by_type` shows which edits an editor can do when it is given the first picture."""
import argparse, shlex, sys
from collections import Counter
from itertools import cycle
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
from mt_editflow_nb.ablation.passes import passes_so_far
from mt_editflow_nb.ablation.results import METRICS, compare_points, load_results, seed_scores
from mt_editflow_nb.algorithm.config import RL
from mt_editflow_nb.data.files import (
    Described, InputError, atomic_write, expect, one_of, read_json, read_json_lines, to_json)
from mt_editflow_nb.data.plots import PALETTE, save_figure
from mt_editflow_nb.data.shapeworld import WORLDS
from mt_editflow_nb.evaluation.scores import Outcomes
from mt_editflow_nb.evaluation.statistics import percentile_interval
from mt_editflow_nb.training.runs import environment

def together(points):
    "One setting's seeds from several sweeps."
    def joined(name): return Outcomes(*(np.concatenate(x) for x in zip(*(getattr(p, name) for p in points))))
    first = points[0]
    expect(all(p.values == first.values for p in points), first.label, 'the same settings in all sweeps',
           [p.values for p in points])
    seeds, curves, configs = ([x for p in points for x in getattr(p, name)] for name in ('seeds', 'curves', 'configs'))
    expect(len(set(seeds)) == len(seeds), first.label, 'each seed once', seeds)
    heldout = [p.heldout for p in points if p.heldout]
    expect(len(set(heldout)) <= 1, first.label, 'the same held-out sessions in all sweeps', heldout)
    return first._replace(seeds=seeds, before=joined('before'), after=joined('after'), curves=curves, configs=configs)

def overall(outcomes): # [S, I, T] -> O at each turn
    "The overall score at each turn, a mean over seeds; None where consistency is void."
    mean_TM = seed_scores(outcomes).mean(0)
    return [None if np.isnan(x) else round(float(x), 2) for x in mean_TM[:, METRICS.index('O')]]

def success_by_type(point, outcomes): # [S, I, T]
    "Type of edit -> success at turn 1 in percent, a mean over seeds and over the sessions that begin with it."
    config = point.configs[0]
    _, I, T = outcomes.success_IT.shape
    make = WORLDS[config.get('sessions', 'shapeworld')]
    type_I = np.array([s.task_types[0] for s in make(I, T, 'heldout', seed=config.get('eval_seed', 0))])
    success_SI = outcomes.success_IT[..., 0]
    return {name: round(100*float(np.nanmean(success_SI[:, type_I == name])), 1) for name in sorted(set(type_I))}

def summary(point, tuning_runs):
    "What is known of a setting, at turn 3 if nothing else is said."
    table = compare_points(point.before, point.after).loc[3]
    passes = float(np.mean([passes_so_far(*run)[-1] for run in zip(point.curves, point.configs)]))
    O = table.loc['O']
    CC = table.loc['CC']
    gain = [float(O[name]) for name in ('difference', 'low', 'high')]
    per_1000 = [1000*x/passes for x in gain]
    learns_from = 'scores' if point.configs[0].get('algorithm', 'nft') in RL else 'targets'
    return dict(seeds=len(point.seeds), learns_from=learns_from, passes=passes,
                turn3_O_gain=gain[0], turn3_O_gain_ci=gain[1:],
                turn3_CC_change=float(CC.difference), turn3_CC_change_ci=[float(CC.low), float(CC.high)],
                gain_per_1000_passes=per_1000[0], gain_per_1000_passes_ci=per_1000[1:],
                O_before=overall(point.before), O_after=overall(point.after),
                turn1_success_by_type=success_by_type(point, point.after), tuning_runs=tuning_runs)

def times_the_gain(ours, other, draws=500):
    """How many times the gain of `other` ours is, in O at turn 3: the ratio, and its 95 % interval.

    Drawn are seeds and sessions, the same of both. None where seeds differ, or the other gains nothing in a draw."""
    if ours.seeds != other.seeds: return None
    S, I = ours.after.success_IT.shape[:2]
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(S, size=S), rng.integers(I, size=I)) for _ in range(draws)]
    def O(outcomes, seeds, sessions):
        sample = Outcomes(*(x[seeds][:, sessions, :3] for x in outcomes))
        return seed_scores(sample)[:, 2, METRICS.index('O')].mean()
    def gain(point, sample): return O(point.after, *sample) - O(point.before, *sample)
    once = np.arange(S), np.arange(I)
    gains = np.array([(gain(ours, sample), gain(other, sample)) for sample in (once, *drawn)])
    if (gains[:, 1] <= 0).any(): return None
    ratios = gains[:, :1]/gains[:, 1:]
    return [float(x[0]) for x in (ratios[0], *percentile_interval(ratios[1:]))]

def mean_of(values, seeds):
    "A mean over seeds of numbers, or of each of the numbers in lists or dictionaries; None where one is missing."
    first = values[0]
    if isinstance(first, dict): return {key: mean_of([v[key] for v in values], seeds) for key in first}
    if isinstance(first, list): return [mean_of(list(each), seeds) for each in zip(*values)]
    if any(v is None for v in values): return None
    return round(float(np.average(values, weights=seeds)), 6)

def pooled_method(parts):
    """One method of several reports. An interval is the mean of theirs, which is at least as wide as that of all seeds.

    (The standard error of a mean is at most the mean of the standard errors, however the parts are related.)"""
    seeds = [m['seeds'] for m in parts]
    alike = {name: parts[0][name] for name in ('learns_from', 'tuning_runs')}
    numbers = {name: mean_of([m[name] for m in parts], seeds) for name in parts[0] if name not in ('seeds', *alike)}
    return dict(seeds=sum(seeds)) | numbers | alike

def pooled(reports, ours=None, latest=()):
    "Several reports as one, of other seeds or methods on the same sessions; a label of `latest` is that of the last."
    first = reports[0] | (dict(ours=ours) if ours else {})
    alike = ['sessions', 'turn1_success_by_type']
    if not ours: alike.append('ours')
    for name in alike:
        expect(all(r[name] == first[name] for r in reports), f'--pool: {name}', 'the same in all reports',
               [r[name] for r in reports])
    labels = dict.fromkeys(label for r in reports for label in r['methods'])
    for label in latest: one_of('--latest', label, labels)
    parts = {label: [r['methods'][label] for r in reports if label in r['methods']] for label in labels}
    methods = {label: pooled_method(part[-1:] if label in latest else part) for label, part in parts.items()}
    one_of('--ours', first['ours'], methods)
    first.pop('ours_gains_times', None)                                # of runs, which are gone
    return first | provenance() | dict(passes=max(m['passes'] for m in methods.values()), methods=methods)

def provenance():
    "How a report was made; the folder of results is left out, which belongs to one machine."
    words = sys.argv[1:]
    if '--results' in words: del words[words.index('--results'):words.index('--results') + 2]
    command = shlex.join(['python', 'experiments/recipe.py', *words])
    return dict(command=command, commit=environment()['commit'])

def styles(report):
    "Colour and line of each method, the same in both panels; those that learn from targets are dashed."
    left = {kind: cycle(PALETTE[1:]) for kind in ('scores', 'targets')}
    for label, m in report['methods'].items():
        color = PALETTE[0] if label == report['ours'] else next(left[m['learns_from']])
        yield dict(color=color, ls='-' if m['learns_from'] == 'scores' else '--')

def plot(report):
    "Left: the gain at turn 3 with its interval. Right: how the overall score decays over turns."
    figure, (gains, decay) = plt.subplots(1, 2, figsize=(11, 3.6), layout='constrained')
    for y, ((label, m), style) in enumerate(zip(report['methods'].items(), styles(report))):
        gains.plot(m['turn3_O_gain_ci'], [y, y], **style)
        gains.plot(m['turn3_O_gain'], y, 'o', color=style['color'])
        O = [x for x in m['O_after'] if x is not None]
        decay.plot(range(1, len(O) + 1), O, label=label, lw=2.5 if label == report['ours'] else 1, **style)
    O = [x for x in m['O_before'] if x is not None]
    decay.plot(range(1, len(O) + 1), O, 'k:', label='before training')
    gains.axvline(0, color='k', lw=.5)
    gains.set(yticks=range(len(report['methods'])), yticklabels=report['methods'],
              xlabel=f'gain in O at turn 3, points, after {report["passes"]:,.0f} passes')
    gains.invert_yaxis()
    decay.set(xlabel='turn', ylabel='O, percent', xticks=range(1, len(O) + 1))
    decay.legend(fontsize='small', loc='upper left', bbox_to_anchor=(1, 1))
    return figure

def line(label, m):
    "A method in one line."
    low, high = m['turn3_O_gain_ci']
    gain = f"O at turn 3 {m['turn3_O_gain']:+.1f} [{low:+.1f}, {high:+.1f}], CC {m['turn3_CC_change']:+.1f}"
    return f"{label:16} {gain}, {m['seeds']} seeds, {m['passes']:,.0f} passes"

def make_report(sweeps, ours, results):
    "The contents of recipe.json. Raises `InputError` where `ours` is not one of the settings."
    points = {}
    for sweep in sweeps:
        for label, point in load_results(sweep).points.items(): points.setdefault(label, []).append(point)
    one_of('--ours', ours, points)
    tuned = Counter(row['method'] for row in read_json_lines(results/'tuning.jsonl'))
    points = {label: together(each) for label, each in points.items()}
    for label, p in points.items():
        same = None in (p.heldout, points[ours].heldout) or p.heldout == points[ours].heldout
        expect(same, label, f'the held-out sessions of {ours}', Described('others'))
    methods = {label: summary(point, tuned[label]) for label, point in points.items()}
    times = {label: times_the_gain(points[ours], point) for label, point in points.items() if label != ours}
    return dict(**provenance(), passes=max(m['passes'] for m in methods.values()),
                sessions=points[ours].after.success_IT.shape[1], ours=ours, ours_gains_times=times,
                turn1_success_by_type=success_by_type(points[ours], points[ours].before), methods=methods)

def run(args):
    "What the options ask for. Raises `InputError` for what is not there."
    if args.show:
        methods = read_json(args.results/'recipe.json')['methods']
        one_of('--show', args.show, methods)
        print('committed results:', line(args.show, methods[args.show]))
        return
    expect(args.pool or args.sweeps and args.ours, 'recipe.py', 'SWEEP.json and --ours, --pool, or --show',
           Described('none of them'))
    expect(args.pool or not args.latest, '--latest', 'reports to put together: --pool', Described('none of them'))
    if args.pool:
        report = pooled([read_json(args.results/f'{name}.json') for name in args.pool], args.ours, args.latest)
    else: report = make_report(args.sweeps, args.ours, args.results)
    atomic_write(args.results/f'{args.name}.json', to_json(report, indent=1))
    save_figure(args.results/f'{args.name}.png', plot(report))
    for label, m in report['methods'].items(): print(line(label, m))
    for label, times in report.get('ours_gains_times', {}).items():
        if times: print('{} gains {:.2f} [{:.2f}, {:.2f}] times as much as {}'.format(report['ours'], *times, label))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sweeps', nargs='*', type=Path)
    parser.add_argument('--ours', help="the label that is this project's own")
    parser.add_argument('--name', default='recipe', help='of the report (default: recipe)')
    parser.add_argument('--pool', nargs='+', metavar='NAME', help='reports of other seeds, to be put together')
    parser.add_argument('--latest', nargs='+', metavar='LABEL', default=[],
                        help='labels that count in the last report of --pool which has them')
    parser.add_argument('--show', metavar='METHOD', help='a label of the committed results')
    parser.add_argument('--results', type=Path, default=Path(__file__).resolve().parent/'results')
    args = parser.parse_args()
    try: run(args)
    except InputError as e:
        print(f'recipe.py: {e}', file=sys.stderr)
        return 2
    return 0

if __name__ == '__main__': sys.exit(main())
