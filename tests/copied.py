"""The tiny editor is read from the disk once a process: whoever loads it gets a copy of what was read.

Only what training changes is copied. Imported before anything loads an editor, also in the process that runs
chapters."""
import copy
from functools import lru_cache
from mt_editflow_nb.editing import loading

read_pipeline = loading.load_pipeline

@lru_cache(None)
def pristine(device, dtype):
    "The pipeline as it was read; tests get copies of it."
    return read_pipeline(loading.TINY_EDITOR, None, device, dtype)

def load_pipeline(name_or_path, quantize, device, dtype):
    "As in `editing.loading`."
    if str(name_or_path) != loading.TINY_EDITOR or quantize or device.type != 'cpu':
        return read_pipeline(name_or_path, quantize, device, dtype)
    pipe, family = pristine(device, dtype)
    frozen = [getattr(pipe, name) for name in ('vae', 'tokenizer', 'tokenizer_2', *family.text_encoders)]
    return copy.deepcopy(pipe, {id(part): part for part in frozen}), family

loading.load_pipeline = load_pipeline
