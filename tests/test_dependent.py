"Sessions whose turns depend on each other: where turn 1 failed, nothing that follows can be done."
import numpy as np
from mt_editflow_nb.data.shapeworld import (
    apply_edit, dependent_sessions, parse_edit, read_scene, render, teacher_images)
from mt_editflow_nb.data.verifier import verify

sessions = dependent_sessions(40, turns=4, split='heldout')

def edited(skipped):
    "Pictures of an editor that does everything right but leaves some turns out, uint8 [P, 1, T, 48, 48, 3]."
    pictures = []
    for s in sessions:
        scene = read_scene(np.asarray(s.image))
        shown = []
        for t, text in enumerate(s.instructions):
            if t not in skipped: scene = apply_edit(scene, parse_edit(text))
            shown.append(scene)
        pictures.append(render(shown))
    return np.stack(pictures)[:, None]

def test_a_perfect_editor_does_all_of_it():
    perfect = np.stack([teacher_images(s) for s in sessions])[:, None]
    assert np.array_equal(perfect, edited(()))
    verdicts = verify(sessions, perfect)
    assert verdicts['success'].all() and np.nanmin(verdicts['object_cc']) > .99 and verdicts['cc_valid'].all()

def test_after_a_missing_addition_nothing_can_be_done():
    verdicts = verify(sessions, edited((0,)))
    assert not verdicts['success'].any()
    assert (verdicts['graded'][:, :, 1:] == 0).all()

def test_a_mistake_in_the_middle():
    "Where the colour or the shape stayed, the next turn's object is missing; a move is not needed for later turns."
    success_PT = verify(sessions, edited((1,)))['success'][:, 0]
    assert success_PT[:, 0].all() and not success_PT[:, 1].any()
    for session, right in zip(sessions, success_PT): assert right[2] == (session.task_types[1] == 'position_change')
