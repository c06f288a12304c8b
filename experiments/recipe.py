"""Write experiments/results/recipe.json, every method's gain at equal passes, from finished sweeps:

    python experiments/recipe.py runs/sweeps/recipe.json [MORE.json ...] --ours LABEL

Seeds of one label are put together. `tuning_runs` are the lines of experiments/results/tuning.jsonl with that label."""
import argparse, shlex, sys
from collections import Counter
from pathlib import Path
import numpy as np
from mt_editflow_nb.ablation.passes import passes_so_far
from mt_editflow_nb.ablation.results import compare_points, load_results
from mt_editflow_nb.data.files import atomic_write, expect, one_of, read_json_lines, to_json
from mt_editflow_nb.evaluation.scores import Outcomes
from mt_editflow_nb.training.runs import environment

def together(points):
    "One setting's seeds from several sweeps."
    def joined(name): return Outcomes(*(np.concatenate(x) for x in zip(*(getattr(p, name) for p in points))))
    first = points[0]
    expect(all(p.values == first.values for p in points), first.label, 'the same settings in all sweeps',
           [p.values for p in points])
    seeds, curves, configs = ([x for p in points for x in getattr(p, name)] for name in ('seeds', 'curves', 'configs'))
    expect(len(set(seeds)) == len(seeds), first.label, 'each seed once', seeds)
    return first._replace(seeds=seeds, before=joined('before'), after=joined('after'), curves=curves, configs=configs)

def summary(point, tuning_runs):
    "What is known of a setting at turn 3."
    table = compare_points(point.before, point.after).loc[3]
    passes = float(np.mean([passes_so_far(*run)[-1] for run in zip(point.curves, point.configs)]))
    O, CC = table.loc['O'], table.loc['CC']
    gain = [float(O[name]) for name in ('difference', 'low', 'high')]
    per_1000 = [1000*x/passes for x in gain]
    return dict(seeds=len(point.seeds), passes=passes, turn3_O_gain=gain[0], turn3_O_gain_ci=gain[1:],
                turn3_CC_change=float(CC.difference), turn3_CC_change_ci=[float(CC.low), float(CC.high)],
                gain_per_1000_passes=per_1000[0], gain_per_1000_passes_ci=per_1000[1:], tuning_runs=tuning_runs)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sweeps', nargs='+', type=Path)
    parser.add_argument('--ours', required=True)
    a = parser.parse_args()
    points = {}
    for sweep in a.sweeps:
        for label, point in load_results(sweep).points.items(): points.setdefault(label, []).append(point)
    one_of('--ours', a.ours, points)
    results = Path('experiments/results')
    tuned = Counter(row['method'] for row in read_json_lines(results/'tuning.jsonl'))
    methods = {label: summary(together(each), tuned[label]) for label, each in points.items()}
    command = shlex.join(['python', 'experiments/recipe.py', *sys.argv[1:]])
    report = dict(command=command, commit=environment()['commit'],
                  passes=max(m['passes'] for m in methods.values()),
                  sessions=points[a.ours][0].after.success_IT.shape[1], ours=a.ours, methods=methods)
    atomic_write(results/'recipe.json', to_json(report, indent=1))
    for label, m in methods.items():
        low, high = m['turn3_O_gain_ci']
        print(f"{label:24} {m['turn3_O_gain']:+.1f} [{low:+.1f}, {high:+.1f}] in {m['passes']:,.0f} passes")

if __name__ == '__main__': main()
