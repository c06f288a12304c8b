"What several files of tests need: patience, and commands in processes of their own that start quickly."
import gc, logging, multiprocessing, os, runpy, signal, sys, time, warnings
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from threading import RLock
from unittest.mock import patch
import pytest

PATIENCE = 600     # seconds: what is waited for takes a few of them, but perhaps other work runs beside the tests

def wait_for(condition, every=.01):
    "Until it is true; an assertion in the condition ends the wait. `every`: seconds between two looks."
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(every)

# Importing torch and diffusers takes seconds: a server that has done so forks every process from itself.
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['diffusers.pipelines.flux.pipeline_flux_kontext', 'mt_editflow_nb.cli.eval',
                                  'mt_editflow_nb.cli.train'])

def _stream_handlers():
    "Those that libraries have opened on what was standard error when they were imported."
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        yield from (h for h in getattr(logger, 'handlers', ()) if type(h) is logging.StreamHandler)

def _other_ends(pipe):
    "The open files that are this pipe, but for the given end."
    for fd in map(int, os.listdir('/proc/self/fd')):
        with suppress(OSError):                      # the list's own file is closed by now
            if fd != pipe and os.path.sameopenfile(fd, pipe): yield fd

def _copy_of_this_process(path, arguments, fds):
    "In the place of `spawnv_passfds`: the copy runs the line that a new interpreter would run."
    child = os.fork()
    if child: return child
    try:
        forkserver._forkserver._lock = RLock()       # the other one is held by whoever starts a server
        sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))
        for handler in _stream_handlers(): handler.setStream(sys.stderr)
        for fd in _other_ends(fds[1]): os.close(fd)  # only the first process holds it: the server ends when it does
        exec(arguments[-1], {})
    finally: os._exit(0)

def start_fork_server():
    "Now, as a copy of this process: what has been imported here need not be imported there again."
    if sys.platform != 'linux': return
    resource_tracker.ensure_running()
    with patch.object(util, 'spawnv_passfds', _copy_of_this_process): forkserver.ensure_running()

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
