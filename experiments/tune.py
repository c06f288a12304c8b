"""Try settings of a method on training sessions alone, so that no held-out session has a say in them:

    python experiments/tune.py METHOD [field=value ...] [--seed 0] [--look-every 30]

Trains in the shape world, evaluates on 384 other sessions of the training split, and adds a line to
experiments/results/tuning.jsonl: the method, what differs from the defaults, and scores over passes. A line that is
there already is not made again. The number of lines of a method is what its tuning has cost; those with `scratch` among
their settings were trials with code that is not here (see LOG.md)."""
import argparse
from pathlib import Path
import torch
from tqdm.auto import tqdm
from mt_editflow_nb.ablation.passes import count_passes
from mt_editflow_nb.algorithm.config import RL, first_imitation, make_config
from mt_editflow_nb.algorithm.imitation import edits_per_iteration, right_edits
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.algorithm.updates import warn_when_idle
from mt_editflow_nb.cli.train import parse_overrides
from mt_editflow_nb.data.files import append_json_line, log_rows
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.evaluation.running import evaluate
from mt_editflow_nb.evaluation.scores import edival_scores
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.training.own_results import edit_batches, without_damage
from mt_editflow_nb.training.train import step_of

FIRST_TESTED = 400_000    # of the training split; no run here is trained on sessions from there on
TESTED = 384              # sessions

def look(policy, sessions, judge, num_steps):
    "Scores in percent, metric -> a number for each turn."
    outcomes, _ = evaluate(policy.editor, sessions, judge, num_steps=num_steps, seed=7)
    scores = edival_scores(outcomes.success_IT, outcomes.object_cc_IT, outcomes.background_cc_IT)
    return {metric: scores[metric].round(2).tolist() for metric in scores}

def try_settings(values, look_every):
    "Train once; scores before, on the way and after, with the passes that they took."
    config = make_config(values)
    judge = load_judge('verifier')
    policy = Policy(config, load_editor(lora_rank=config.lora_rank))
    T = config.turns or 3
    P = config.sessions_per_iteration
    tested = shape_sessions(TESTED, 3, start=FIRST_TESTED)
    steps = config.eval_steps or config.num_steps
    passes = 0
    curve = [dict(iteration=0, passes=0) | look(policy, tested, judge, steps)]
    first = first_imitation(config)
    right = []
    for i in tqdm(range(config.iterations), desc='training'):
        if i == first: repeated = edit_batches(without_damage(right), edits_per_iteration(config), config.seed)
        if i < first: sessions = shape_sessions(P, T, start=50_000*config.seed % FIRST_TESTED + P*i)
        else: sessions = repeated(i - first)
        step = step_of(config, i)(config, policy, sessions, judge, i)
        if i < first and config.algorithm in RL: warn_when_idle(policy, step.metrics['rows'], step.scores, i)
        if config.imitate and i < first: right += right_edits(config, sessions, step, judge)
        passes += count_passes(step.metrics, config.model_dump(), T)
        if (i + 1) % look_every == 0 or i + 1 == config.iterations:
            curve.append(dict(iteration=i + 1, passes=passes) | look(policy, tested, judge, steps))
            tqdm.write(str(curve[-1]))
    return curve

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('method')
    parser.add_argument('settings', nargs='*')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--look-every', type=int, default=30, help='iterations between evaluations')
    parser.add_argument('--results', type=Path, default=Path('experiments/results/tuning.jsonl'))
    args = parser.parse_intermixed_args()
    values = parse_overrides(args.settings) | dict(seed=args.seed)
    known = log_rows(args.results)
    if any((row['method'], row['settings']) == (args.method, values) for row in known): return
    torch.set_num_threads(1)
    curve = try_settings(values, args.look_every)
    append_json_line(args.results, dict(method=args.method, settings=values, curve=curve))

if __name__ == '__main__': main()
