"""What an iteration on 8 and on 64 H100 should take, from the plan's operations and the bytes that cross.

    python experiments/scale_on_paper.py

Nothing is measured. Assumed: 64 sessions x 16 members x 3 turns at 512 pixels, 6 denoising steps, one noise level in
training, bfloat16, the plan's share of an H100's peak, no time for judges, autoencoder and text encoders. Gradients
of the adapter in float32 go round a ring (each card sends twice their size) at 50 GB/s. A judge sees the first picture,
the one before and the result of every turn as PNG, 1.5 bytes a pixel."""
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.training.budget import PEAK_FLOPS, UTILISATION, plan

CARDS = (8, 64)
EDITORS = ('black-forest-labs/FLUX.1-Kontext-dev', 'black-forest-labs/FLUX.2-klein-base-9B')
SESSIONS, GROUP, TURNS, SIZE, RING, PNG = 64, 16, 3, 512, 50e9, 1.5

def on_paper(editor, cards):
    "Seconds and bytes of an iteration."
    judge = 'Qwen/Qwen2.5-VL-32B-Instruct@http://localhost:8000/v1:logit'
    c = make_config(dict(editor=editor, size=SIZE, sessions_per_iteration=SESSIONS, group=GROUP, turns=TURNS,
                         num_steps=6, lora_rank=32, judge=judge, eval_judge=judge))
    p = plan(c, 'H100')
    gradients, pictures = 4*p['adapter'], SESSIONS*GROUP*TURNS*3*PNG*SIZE**2
    return dict(computing=p['flops']/(PEAK_FLOPS['H100']*UTILISATION[None]*cards), gradients=gradients,
                ring=2*gradients*(cards - 1)/cards/RING, pictures=pictures)

if __name__ == '__main__':
    print('| editor | H100 | computing, s | gradients, MB | their ring, s | pictures to judges, GB |')
    print('|--|--|--|--|--|--|')
    for editor in EDITORS:
        for cards in CARDS:
            x = on_paper(editor, cards)
            print(f"| {editor.split('/')[1]} | {cards} | {x['computing']:,.0f} | {x['gradients']/1e6:,.0f} | "
                  f"{x['ring']:.3f} | {x['pictures']/1e9:.1f} |")
