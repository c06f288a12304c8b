"""Does a recipe run on this card, before anything is downloaded?

    python experiments/try_card.py experiments/recipes/kontext_nft.yaml [field=value ...]

Makes a pipeline of the published size with random weights in a temporary folder (memory and speed do not depend on
their values; FLUX.1-Kontext-dev takes 34 GB of disk, `--folder /dev/shm` keeps it in memory), loads it as `mtef_train`
does, and trains two iterations of one session with four members on made-up pictures and scores, with an evaluation of
one session before and after. The most memory that was held stands beside the plan of the same configuration, and the
seconds of each phase are in experiments/results/card_NAME.json. What is asked for with `field=value` wins, such as
`group=8`.

FLUX.1 alone: the shipped tiny editor is of its classes and lends tokenizers and scheduler."""
import argparse, shutil, tempfile, time
from pathlib import Path
import torch
from PIL import Image
from bench_gpu import autoencoder_of, fill, random_judge
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.cli.train import parse_overrides, read_recipe
from mt_editflow_nb.data.files import atomic_write, log_rows, one_of, read_json, to_json
from mt_editflow_nb.data.sessions import Session, save_sessions
from mt_editflow_nb.editing.loading import find_editor
from mt_editflow_nb.training.budget import PUBLISHED_EDITORS, plan, plan_text, weightless_editor, weightless_encoder
from mt_editflow_nb.training.train import experiment

SMALL = dict(iterations=2, sessions_per_iteration=1, group=4, eval_sessions=1, eval_steps=4, save_every=1)

def save_filled(module, folder, device):
    "Random weights in bfloat16, on the disk."
    torch.nn.Module.to(module, torch.bfloat16)
    fill(module, device)
    if hasattr(module, 'tie_weights'): module.tie_weights()
    module.save_pretrained(folder)

def make_pipeline(name, folder, device):
    "A pipeline directory of a published editor's size with random weights."
    configs, tiny = PUBLISHED_EDITORS[name], Path(find_editor('tiny')[0])
    for part in ('scheduler', 'tokenizer', 'tokenizer_2'): shutil.copytree(tiny/part, folder/part)
    shutil.copy(tiny/'model_index.json', folder)
    for part, words in (('tokenizer', 77), ('tokenizer_2', configs['words'])):
        file = folder/part/'tokenizer_config.json'
        atomic_write(file, to_json(read_json(file) | dict(model_max_length=words)))
    save_filled(weightless_editor(configs, size=512).transformer, folder/'transformer', device)
    for part, (encoder, config) in zip(('text_encoder', 'text_encoder_2'), configs['text']):
        save_filled(weightless_encoder(encoder, config), folder/part, device)
    save_filled(autoencoder_of(name, configs['pipeline']), folder/'vae', device)

def make_sessions(folder, size, turns):
    "Sessions of noise, enough for training and for one that is held out."
    pictures = [Image.effect_noise((size, size), 60 + i).convert('RGB') for i in range(4)]
    save_sessions([Session(str(i), picture, [f'instruction {t}' for t in range(turns)])
                   for i, picture in enumerate(pictures)], folder)
    return folder/'sessions.jsonl'

def measure(c, run, device):
    "Train, and put what was held and taken beside the plan."
    planned = plan(c)
    print(plan_text(planned), flush=True)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    experiment(c, run, judge=random_judge)
    steps = log_rows(run/'metrics.jsonl')
    return dict(device=torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU', torch=torch.__version__,
                planned_GB={part: b/1e9 for part, b in planned['memory'].items()},
                held_GB=torch.cuda.max_memory_allocated()/1e9 if device.type == 'cuda' else None,
                planned_seconds=planned['minutes'] and 60*planned['minutes'],
                timings=log_rows(run/'timings.jsonl'),
                steps=[{name: row[name] for name in ('loss', 'grad_norm')} for row in steps])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('settings', nargs='+', metavar='RECIPE.yaml | field=value')
    parser.add_argument('--out', default='experiments/results')
    parser.add_argument('--folder', help='where the pipeline is made for the time (default: the temporary folder)')
    a = parser.parse_args()
    values = {}
    for setting in a.settings: values |= parse_overrides([setting]) if '=' in setting else read_recipe(setting)
    name = values.get('editor')
    one_of('editor', name, ['black-forest-labs/FLUX.1-Kontext-dev'])
    values = SMALL | {k: v for k, v in values.items() if k not in SMALL} | parse_overrides(
        [s for s in a.settings if '=' in s])
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    with tempfile.TemporaryDirectory(dir=a.folder) as place:
        place, start = Path(place), time.perf_counter()
        make_pipeline(name, place/'pipeline', device)
        print(f'made a pipeline in {time.perf_counter() - start:.0f} s', flush=True)
        sessions = make_sessions(place/'sessions', values['size'], values.get('turns') or 3)
        c = make_config(values | dict(editor=str(place/'pipeline'), sessions=str(sessions)))
        report = measure(c, place/'run', device)
    report['settings'] = values
    atomic_write(Path(a.out)/f'card_{Path(name).name}.json', to_json(report, indent=1))
    taken, expected = [t['seconds'] for t in report['timings']], report['planned_seconds']
    print(f'an iteration took {taken} s', f'and was planned to take {expected:.1f} s' if expected else '')
    if report['held_GB']:
        planned = sum(report['planned_GB'].values())
        print(f"the most memory held: {report['held_GB']:.2f} GB and CUDA's context, planned {planned:.2f} GB with it")

if __name__ == '__main__': main()
