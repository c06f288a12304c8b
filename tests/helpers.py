"What several files of tests need: patience, and commands in processes of their own that start quickly."
import gc, multiprocessing, os, runpy, signal, sys, time, warnings
from pathlib import Path
from unittest.mock import patch
import numpy as np, pytest

PATIENCE = 600     # seconds: what is waited for takes a few of them, but perhaps other work runs beside the tests

def wait_for(condition, every=.01):
    "Until it is true; an assertion in the condition ends the wait. `every`: seconds between two looks."
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(every)

# Importing torch and diffusers takes seconds: a server that has done so forks every process from itself.
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['preloaded'])

def _enter(main, argv, log, env):
    "The body of the process."
    os.environ.update(env)
    gc.freeze()                                      # what was imported before the fork
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.nice(5)                                       # whoever watches it comes first
    for stream, name in ((1, 'out'), (2, 'err')): os.dup2(os.open(f'{log}.{name}', os.O_WRONLY | os.O_APPEND), stream)
    sys.exit(main(argv))

class Command:
    "`main(argv)` in a process of its own, which can be sent signals; what it says goes to files beside `log`."
    def __init__(self, main, argv, log, **env):
        self.log = log
        for stream in ('out', 'err'): Path(f'{log}.{stream}').write_text('')
        self.process = processes.Process(target=_enter, args=(main, argv, log, env))
        self.process.start()
        self.pid = self.process.pid

    def is_running(self): return self.process.is_alive()
    def said(self, stream='out'): return Path(f'{self.log}.{stream}').read_text()
    def send(self, signum): os.kill(self.pid, signum)

    def end(self):
        "Wait for it: its exit status, negative for a signal, and what it has said on standard error."
        self.process.join(PATIENCE)
        assert not self.is_running(), 'waited in vain'
        return self.process.exitcode, self.said('err')

def _exit_status(run, name, arguments):
    with patch.object(sys, 'argv', [str(name), *map(str, arguments)]), warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)              # that the module has been imported before
        with pytest.raises(SystemExit) as end: run(str(name), run_name='__main__')
    return end.value.code

def run_module(name, *arguments):
    "The exit status of `python -m name`, run in this process."
    return _exit_status(runpy.run_module, name, arguments)

def run_script(file, *arguments):
    "The exit status of `python file`, run in this process."
    return _exit_status(runpy.run_path, file, arguments)

# Scripted tools of EdiVal's rules: what they say depends on how bright a picture is.

def detect(image, names, threshold):
    "Sees something in the left half of whatever is bright."
    from mt_editflow_nb.rewards.edival_rules import Found
    bright = np.asarray(image.resize((1, 1))).mean() > 120
    boxes = [[0, 0, .5, 1.]] if bright else []
    return Found(np.array(boxes).reshape(-1, 4), np.ones(len(boxes)))

def ask(images, question): return 'Yes LAMB' if np.asarray(images[-1]).mean() > 125 else 'No'

def colours(images):
    import torch
    x = torch.stack([torch.from_numpy(np.array(im.resize((4, 4)), np.float32)).reshape(16, 3) for im in images])
    return x.mean(1), x

def run_notebook(path, parameters):
    """Run a notebook with parameters, as papermill puts them in, where it is called: in the process of `runner`.

    Returns the executed notebook. A kernel of its own would import everything again."""
    import nbformat
    from execnb.nbio import dict2nb
    from execnb.shell import CaptureShell
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nb = parameterize_notebook(load_notebook_node(str(path)), parameters)
    nb = dict2nb(nb)
    CaptureShell(path).run_all(nb, exc_stop=True)
    return nbformat.from_dict(nb)
