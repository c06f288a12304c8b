"""How much consistency does a method cost? The adapters of a finished sweep on more held-out sessions than it had:

    python experiments/more_sessions.py runs/sweeps/imitation_fresh.json self-imitation

2,048 sessions of three turns that no run has seen, so that a change of CC is known to a point, where 512 leave it open
by two. Every evaluation is kept in its run's folder and is not made again. Writes what was found into
experiments/results/more_sessions.json, beside what it holds of other settings."""
import argparse
from pathlib import Path
import numpy as np, torch
from tqdm.auto import tqdm
from mt_editflow_nb.ablation.results import METRICS, compare_points, load_results, seed_scores
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.data.files import atomic_write, expect, read_json, to_json
from mt_editflow_nb.data.shapeworld import WORLDS
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import load_lora
from mt_editflow_nb.evaluation.running import evaluate, read_outcomes, write_outcomes
from mt_editflow_nb.evaluation.scores import Outcomes
from mt_editflow_nb.rewards.cube import load_judge

NOISE = 1234                                           # as the evaluation of a run has it

def outcomes_of(run, sessions, file, adapter=True):
    "How the editor of a run does on these sessions, with or without its adapter, [I, T]."
    if not (kept := read_outcomes(file)):
        config = make_config(read_json(run/'config.json')['config'])
        editor = load_editor(config.editor)
        if adapter: load_lora(editor, run/'lora')
        outcomes, _ = evaluate(editor, sessions, load_judge(config.eval_judge), seed=NOISE,
                               num_steps=config.eval_steps or config.num_steps)
        write_outcomes(file, outcomes, [])
        kept = read_outcomes(file)
    return Outcomes(*(np.asarray(x, float) for x in kept[0]))

def stacked(outcomes_S): return Outcomes(*map(np.stack, zip(*outcomes_S)))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sweep', type=Path, help='NAME.json of a sweep that the exact verifier scores')
    parser.add_argument('label', help='one of its settings')
    parser.add_argument('--sessions', type=int, default=2048, help='(default: %(default)s)')
    parser.add_argument('--eval-seed', type=int, default=6, help='which ones (default: %(default)s)')
    parser.add_argument('--results', type=Path, default=Path(__file__).resolve().parent/'results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    points = load_results(args.sweep).points
    expect(args.label in points, 'label', f'one of {", ".join(points)}', args.label)
    described, = [p for p in read_json(args.sweep)['points'] if p['label'] == args.label]
    runs = {job['seed']: args.sweep.parent/job['folder'] for job in described['jobs']}
    seeds = points[args.label].seeds
    config = make_config(read_json(runs[seeds[0]]/'config.json')['config'])
    sessions = WORLDS[config.sessions](args.sessions, 3, 'heldout', seed=args.eval_seed)
    name = f'{args.sessions}_of_{args.eval_seed}.safetensors'
    before = outcomes_of(runs[seeds[0]], sessions, runs[seeds[0]]/f'before_{name}', adapter=False)
    after = [outcomes_of(runs[seed], sessions, runs[seed]/f'after_{name}') for seed in tqdm(seeds, desc='seeds')]
    before = stacked([before]*len(seeds))
    after = stacked(after)
    table = compare_points(before, after).loc[3]
    def numbers(metric): return [round(float(table.loc[metric, k]), 2) for k in ('difference', 'low', 'high')]
    change = (seed_scores(after) - seed_scores(before))[:, 2]
    of_seeds = {metric: change[:, METRICS.index(metric)].round(2).tolist() for metric in ('O', 'CC')}
    found = dict(sweep=args.sweep.stem, sessions=args.sessions, eval_seed=args.eval_seed, seeds=seeds, turn=3,
                 change={metric: numbers(metric) for metric in ('O', 'IF', 'CC')}, of_seeds=of_seeds)
    file = args.results/'more_sessions.json'
    known = read_json(file) if file.is_file() else {}
    atomic_write(file, to_json(known | {args.label: found}, indent=1))
    print(found)

if __name__ == '__main__': main()
