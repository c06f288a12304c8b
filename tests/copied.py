"""The tiny editor is read from the disk once a process, and each adapter is added to it once.

Whoever loads it gets a copy of what was read, which takes a sixth of the time. Imported before anything loads an
editor, also in the process that runs chapters."""
import copy, io, pickle
from functools import lru_cache
from types import SimpleNamespace
from weakref import WeakKeyDictionary
import torch
from mt_editflow_nb.editing import loading
from mt_editflow_nb.editing.lora import add_lora, lora_parameters

read_pipeline, read_outline = loading.load_pipeline, loading.outline_editor

class Pickler(pickle.Pickler):
    "Puts tensors aside, which pickle takes long for."
    def __init__(self, file, tensors):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors = tensors

    def persistent_id(self, x):
        if not isinstance(x, torch.Tensor): return None
        self.tensors.append(x)
        return len(self.tensors) - 1

class Unpickler(pickle.Unpickler):
    "Copies the tensors that were put aside; one that is used twice is copied once."
    def __init__(self, file, tensors):
        super().__init__(file)
        self.tensors, self.copies = tensors, {}

    def persistent_load(self, i): return copy.deepcopy(self.tensors[i], self.copies)

class Original:
    "What nobody gets: there are copies of it. Those of modules take a quarter of `deepcopy`'s time."
    def __init__(self, x):
        self.tensors, file = [], io.BytesIO()
        Pickler(file, self.tensors).dump(x)
        self.pickled = file.getvalue()

    def copy(self): return Unpickler(io.BytesIO(self.pickled), self.tensors).load()

@lru_cache(None)
def pristine(device, dtype):
    "(the pipeline and its family, the transformer), as read."
    pipe, family = read_pipeline(loading.TINY_EDITOR, None, device, dtype)
    return Original((pipe, family)), Original(pipe.transformer)

@lru_cache(None)
def pristine_outline():
    "(what is known before weights are read, the transformer in it)."
    outline = read_outline(loading.TINY_EDITOR)
    return Original(outline), Original(outline.transformer)

@lru_cache(None, typed=True)
def adapted(original, rank, seed, alpha, targets):
    "A transformer with an adapter. Raises what `add_lora` raises."
    editor = SimpleNamespace(transformer=original.copy())
    add_lora(editor, rank, seed, alpha, targets)
    return Original(editor.transformer)

copies = WeakKeyDictionary()         # a transformer to which nothing has been added -> what it is a copy of

def load_pipeline(name_or_path, quantize, device, dtype):
    "As in `editing.loading`."
    if str(name_or_path) != loading.TINY_EDITOR or quantize or device.type != 'cpu':
        return read_pipeline(name_or_path, quantize, device, dtype)
    original, transformer = pristine(device, dtype)
    pipe, family = original.copy()
    copies[pipe.transformer] = transformer
    return pipe, family

def outline_editor(name_or_path):
    "As in `editing.loading`."
    if str(name_or_path) != loading.TINY_EDITOR: return read_outline(name_or_path)
    original, transformer = pristine_outline()
    outline = original.copy()
    copies[outline.transformer] = transformer
    return outline

def add_lora_to_copy(editor, rank, seed=0, alpha=None, targets='all'):
    "As `add_lora`: the transformer gives way to a copy of one that has such an adapter."
    original = copies.pop(editor.transformer, None)
    if original is None or type(targets) is not str or editor.transformer.is_gradient_checkpointing:
        return add_lora(editor, rank, seed, alpha, targets)
    editor.transformer = adapted(original, rank, seed, alpha, targets).copy()
    if not isinstance(editor.pipe, type): editor.pipe.transformer = editor.transformer
    return lora_parameters(editor)

loading.load_pipeline, loading.outline_editor, loading.add_lora = load_pipeline, outline_editor, add_lora_to_copy
