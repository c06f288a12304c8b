"""Does a recipe for FLUX.1-Kontext-dev run on this card, before anything is downloaded?

    python experiments/try_card.py experiments/recipes/kontext_nft.yaml [field=value ...]

Makes a pipeline of the published size with random weights in a temporary folder (memory and speed do not depend on
their values; 34 GB of disk, `--folder /dev/shm` keeps it in memory), loads it as `mtef_train` does, and trains two
iterations of one session with four members on made-up pictures and scores, with an evaluation of one session before and
after. The most memory that was held stands beside the plan of the same configuration; the report has the seconds of
each phase, too. What is asked for with `field=value` wins, such as `group=8`. The tiny editor, which is of the same
classes, lends tokenizers and scheduler."""
import argparse, shutil, sys, tempfile
from pathlib import Path
import torch
from PIL import Image
from bench_gpu import autoencoder_of, fill, random_judge
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.train import parse_overrides, read_recipe
from mt_editflow_nb.data.files import Described, InputError, atomic_write, expect, log_rows, one_of, read_json, to_json
from mt_editflow_nb.data.sessions import Session, save_sessions
from mt_editflow_nb.editing.loading import find_editor
from mt_editflow_nb.training.budget import PUBLISHED_EDITORS, plan, plan_text, weightless_editor, weightless_encoder
from mt_editflow_nb.training.train import experiment

EDITOR = 'black-forest-labs/FLUX.1-Kontext-dev'
# in place of what the recipe says, so that it takes minutes
SMALL = dict(iterations=2, sessions_per_iteration=1, group=4, eval_sessions=1, eval_steps=4, save_every=1)

def card():
    "The GPU, and its name."
    expect(torch.cuda.is_available(), 'card', 'a GPU', Described('none'))
    return torch.device('cuda'), torch.cuda.get_device_name()

def save_random(module, folder, device):
    "Random weights in bfloat16, drawn on the card and kept in host memory: the card need not hold them all."
    torch.nn.Module.to(module, torch.bfloat16)
    fill(module, device, home='cpu')
    if hasattr(module, 'tie_weights'): module.tie_weights()
    module.save_pretrained(folder)

def make_pipeline(folder, device):
    "A pipeline directory of the published size with random weights."
    configs = PUBLISHED_EDITORS[EDITOR]
    tiny = Path(find_editor('tiny')[0])
    for part in ('scheduler', 'tokenizer', 'tokenizer_2'): shutil.copytree(tiny/part, folder/part)
    shutil.copy(tiny/'model_index.json', folder)
    for part, words in (('tokenizer', 77), ('tokenizer_2', configs['words'])):
        file = folder/part/'tokenizer_config.json'
        atomic_write(file, to_json(read_json(file) | dict(model_max_length=words)))
    save_random(weightless_editor(configs, size=512).transformer, folder/'transformer', device)
    for part, (encoder, config) in zip(('text_encoder', 'text_encoder_2'), configs['text']):
        save_random(weightless_encoder(encoder, config), folder/part, device)
    save_random(autoencoder_of(EDITOR, configs['pipeline']), folder/'vae', device)

def make_sessions(folder, config):
    "Sessions of noise, enough for training and for those that are held out."
    count = config.sessions_per_iteration*config.iterations + config.eval_sessions
    size = config.size or 1024
    def session(i):
        picture = Image.effect_noise((size, size), 40 + 5*i).convert('RGB')
        return Session(str(i), picture, [f'instruction {t}' for t in range(config.turns or 3)])
    save_sessions([session(i) for i in range(count)], folder)
    return folder/'sessions.jsonl'

def train_and_report(config, run, device, name):
    "What was held and taken, beside the plan."
    planned = plan(config)
    print(plan_text(planned), flush=True)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    experiment(config, run, judge=random_judge)
    steps = log_rows(run/'metrics.jsonl')
    return dict(device=name, torch=torch.__version__,
                planned_GB={part: b/1e9 for part, b in planned['memory'].items()},
                held_GB=torch.cuda.max_memory_allocated()/1e9 if device.type == 'cuda' else None,
                planned_seconds=planned['minutes'] and 60*planned['minutes'],
                timings=log_rows(run/'timings.jsonl'),
                steps=[{key: row[key] for key in ('loss', 'grad_norm')} for row in steps])

def say(report):
    "Two lines of a report."
    taken = [t['seconds'] for t in report['timings']]
    expected = report['planned_seconds']
    print(f'an iteration took {taken} s', f'and was planned to take {expected:.1f} s' if expected else '')
    if report['held_GB']:
        planned = sum(report['planned_GB'].values())
        print(f"the most memory held: {report['held_GB']:.2f} GB and CUDA's own, planned {planned:.2f} GB with it")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', metavar='RECIPE.yaml')
    parser.add_argument('settings', nargs='*', metavar='field=value')
    parser.add_argument('--out', default='runs', help='folder for the report, card_RECIPE_CARD.json (default: runs)')
    parser.add_argument('--folder', help='where the pipeline is made for the time (default: the temporary folder)')
    args = parser.parse_intermixed_args()
    values = read_recipe(args.recipe) | SMALL | parse_overrides(args.settings)
    one_of('editor', values.get('editor'), [EDITOR])
    expect(not args.folder or Path(args.folder).is_dir(), 'folder', 'a folder', args.folder)
    config = make_config(values)                                           # what is wrong is said before the work
    device, name = card()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        temporary = Path(temporary)
        make_pipeline(temporary/'pipeline', device)
        sessions = make_sessions(temporary/'sessions', config)
        config = make_config(values | dict(editor=str(temporary/'pipeline'), sessions=str(sessions),
                                           heldout=values['eval_sessions']))
        report = train_and_report(config, temporary/'run', device, name) | dict(settings=values)
    atomic_write(Path(args.out)/f"card_{Path(args.recipe).stem}_{name.split()[-1]}.json", to_json(report, indent=1))
    say(report)

if __name__ == '__main__':
    try: main()
    except InputError as e: sys.exit(f'try_card: {e}')
