"""Fill the tables of experiments/FINDINGS.md from what `mtef_report` wrote: python experiments/findings.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a folder of experiments/results/sweeps, and a
number after it is the turn, where it is not the last at which all settings have an overall score. The table `types` is
made from experiments/results/recipe.json, `signal` from signal.jsonl, and `passes` from imitation_curves/passes.csv.
With --check nothing is written, and the exit status is 1 if a table in the text is not the one of the files."""
import argparse, re, sys
from pathlib import Path
import pandas as pd
from jinja2 import Template
from mt_editflow_nb.ablation.results import last_turn
from mt_editflow_nb.data.files import InputError, atomic_write, read_json, read_json_lines, unreadable_file

here = Path(__file__).resolve().parent
results = here/'results'/'sweeps'
findings = here/'FINDINGS.md'

TABLE = Template('''\
| at turn {{ turn }} | seeds | O | difference of O | p (Holm) | of IF | of CC | would have found | monitor |
|---|--:|--:|---|--:|---|---|--:|---|
{% for row in rows %}| {{ row|join(' | ') }} |
{% endfor %}''')

def read_tables(name):
    "(comparisons, scores, monitor) of a sweep's report."
    try: return [pd.read_csv(results/name/f'{table}.csv') for table in ('comparisons', 'scores', 'monitor')]
    except OSError as e: raise InputError(f'{unreadable_file(e.filename, e)}; run mtef_report first') from None

def difference(row): return f'{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]'

def compared_cells(rows):
    "The cells of a setting that is compared: `rows` is metric -> row of comparisons.csv."
    O = rows.loc['O']
    text = difference(rows.loc['O'])
    beyond_doubt = f'**{text}**' if O.p_holm < .05 else text
    of_each = [difference(rows.loc[metric]) for metric in ('IF', 'CC')]
    return [beyond_doubt, f'{O.p_holm:.3f}', *of_each, f'{O.detectable:.1f}']

def table(name, turn=None):
    "Markdown: every setting of a sweep against its baseline; without a turn at the last at which all have an O."
    comparisons, scores, monitor = read_tables(name)
    turn = turn or last_turn(comparisons[comparisons.metric == 'O'].set_index('turn').difference)
    compared = comparisons[comparisons.turn == turn].set_index(['point', 'metric'])
    scores = scores[scores.turn == turn].set_index('point')
    seen = monitor.set_index('point').drop(columns='seeds')
    others = compared.index.unique('point')
    baseline = [label for label in scores.index[1:] if label not in others]
    labels = ['before training', *baseline, *others]
    rows = []
    for label in labels:
        trained = label in seen.index
        found = [f'{signal} {int(n)}' for signal, n in seen.loc[label].items() if n] if trained else []
        cells = compared_cells(compared.loc[label]) if label in others else ['']*5
        seeds = int(scores.seeds[label]) if trained else ''
        rows.append([label, seeds, f'{scores.O[label]:.1f}', *cells, ', '.join(found)])
    return TABLE.render(turn=turn, rows=rows).rstrip()

TYPES = Template('''\
| success at turn 1, percent | {{ types|join(' | ')|replace('_', ' ') }} |
|---|{{ '--:|'*types|length }}
{% for label, success in rows.items() %}| {{ label }} | {{ success.values()|map('round', 1)|join(' | ') }} |
{% endfor %}''')

def table_of_types():
    "Markdown: how often each method of the comparison does each type of edit right."
    report = read_json(here/'results'/'recipe.json')
    before = report['turn1_success_by_type']
    after = {label: m['turn1_success_by_type'] for label, m in report['methods'].items()}
    return TYPES.render(types=list(before), rows={'before training': before} | after).rstrip()

SIGNAL = Template('''\
| SNR per 1,000 passes | {{ stages|join(' | ') }} |
|---|{{ '---|'*stages|length }}
{% for label, cells in rows.items() %}| {{ label }} | {{ cells|join(' | ') }} |
{% endfor %}''')

def signal_label(row):
    "What a line of signal.jsonl is called in the table; None: it is not in it."
    branching = ', turn branching' if row['structure'] == 'branching' else ''
    if row['what'] == 'rule' and row['members'] == 8: return row['rule'] + branching
    if row['what'] == 'level' and row['levels'] == [0] and row['draws'] == 1:
        return f'local, adaptive{branching}, trained at pure noise alone'

def table_of_signal():
    "Markdown: how much of a gradient is signal, by rule and stage of a run."
    rows = {}
    stages = []
    for row in read_json_lines(here/'results'/'signal.jsonl'):
        if row['what'] not in ('rule', 'level') or not (label := signal_label(row)): continue
        stage = 'before training' if row['stage'] == 'base' else f'after {row["stage"]} iterations'
        if stage not in stages: stages.append(stage)
        rows.setdefault(label, {})[stage] = f'{row["snr_per_1000_passes"]:.2f} ± {row["error_per_1000_passes"]:.2f}'
    cells = {label: [of_stage.get(stage, '') for stage in stages] for label, of_stage in rows.items()}
    return SIGNAL.render(stages=stages, rows=cells).rstrip()

PASSES = Template('''\
| in thousand passes | seeds | in all | gain | until O is {{ reach|round|int }} | mean O on the way |
|---|--:|--:|--:|---|--:|
{% for row in rows %}| {{ row|join(' | ') }} |
{% endfor %}''')

def table_of_passes():
    "Markdown: what the methods cost, and how soon they are at one score."
    costs = pd.read_csv(results/'imitation_curves'/'passes.csv')
    rows = []
    for row in costs.itertuples():
        reached = f'{row.to_reach:.1f}' if row.reached else 'not reached'
        if 0 < row.reached < row.seeds: reached += f' ({row.reached} of {row.seeds} seeds)'
        rows.append([row.point, row.seeds, f'{row.passes:.1f}', f'{row.gain:+.1f}', reached, f'{row.area:.1f}'])
    return PASSES.render(reach=costs.reach[0], rows=rows).rstrip()

GENERATED = dict(types=table_of_types, signal=table_of_signal, passes=table_of_passes)

def filled(text):
    "The text with every table made anew."
    def fill(match):
        opening, name, turn, end = match.groups()
        made = GENERATED[name]() if name in GENERATED else table(name, turn and int(turn))
        return f'{opening}\n{made}\n\n{end}'
    return re.sub(r'(<!-- table (\S+)(?: (\d+))? -->\n).*?(<!-- end -->)', fill, text, flags=re.S)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if a table is out of date')
    args = parser.parse_args()
    old = findings.read_text(encoding='utf-8')
    try: new = filled(old)
    except InputError as e:
        print(f'findings.py: {e}', file=sys.stderr)
        return 2
    if args.check: return int(new != old)
    atomic_write(findings, new)
    return 0

if __name__ == '__main__': sys.exit(main())
