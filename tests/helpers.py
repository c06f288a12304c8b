"What several files of tests need: patience, and commands in processes of their own that start quickly."
import asyncio, contextlib, faulthandler, gc, importlib, multiprocessing, os, runpy, signal, subprocess, sys, time
import threading, traceback, warnings
from functools import partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from unittest.mock import patch
import pytest

PATIENCE = 600     # seconds: what is waited for takes a few of them, but perhaps other work runs beside the tests

def wait_for(condition, every=.01):
    "Until it is true; an assertion in the condition ends the wait. `every`: seconds between two looks."
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(every)

# bitsandbytes wraps functions with `torch.compile` when it is imported, which imports the compiler: two seconds, for
# functions that are not called where its library for this processor can be loaded. Tests that compile unset this.
os.environ['TORCHDYNAMO_DISABLE'] = '1'

# Importing torch and diffusers takes seconds: a server that has done so forks every process from itself.
processes = multiprocessing.get_context('forkserver')
IMPORTED = ('diffusers.pipelines.flux.pipeline_flux_kontext', 'mt_editflow_nb.cli.eval', 'mt_editflow_nb.cli.train')
processes.set_forkserver_preload(list(IMPORTED))

def _forked_interpreter(executable, arguments, kept):
    "In place of `spawnv_passfds`: `python ... -c code`, in a copy of this process; returns its id."
    pid = os.fork()
    if pid: return pid
    try:
        faulthandler.disable()
        forkserver._forkserver._lock = threading.RLock()         # the other one is held by whoever starts a server
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        for fd in map(int, os.listdir('/proc/self/fd')):
            if fd > 2 and fd not in kept:
                with contextlib.suppress(OSError): os.close(fd)          # what listed them is closed already
        exec(arguments[-1], {})
    except Exception: traceback.print_exc()
    finally: os._exit(0)

def fork_server():
    """Import what tests need, and start the server of `processes` as a copy of this process.

    Python would start a new interpreter, which imports everything once more."""
    for name in IMPORTED: importlib.import_module(name)
    if not os.path.isdir('/proc/self/fd'): return
    # it says what has been left behind, such as locks of processes that were killed, when it removes that
    with patch.dict(os.environ, PYTHONWARNINGS='ignore'): resource_tracker.ensure_running()
    with patch.object(multiprocessing.util, 'spawnv_passfds', _forked_interpreter): forkserver.ensure_running()

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

def _run_in_copy(command, env):
    "The body of a `Copy`: `python -c code ...` or `python -m module ...`."
    option, what, *arguments = command[1:]
    status = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in map(int, os.listdir('/proc/self/fd')):        # files of the other process; their numbers stay in use
            with contextlib.suppress(OSError):
                if fd > 2 and fd != nothing: os.dup2(nothing, fd, inheritable=False)
        sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, 1, closefd=False) for fd, mode in enumerate('rww'))
        os.environ.clear()
        os.environ.update(env)
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1): signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asyncio._set_running_loop(None)
        asyncio.set_event_loop(None)
        sys.argv = [option, *arguments]
        if option == '-c': exec(what, dict(__name__='__main__'))
        else: runpy.run_module(what, run_name='__main__', alter_sys=True)
        status = 0
    except SystemExit as e: status = e.code if isinstance(e.code, int) else bool(e.code)
    except BaseException: traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(status)

class Copy(subprocess.Popen):
    "In place of `Popen`: a new interpreter is a copy of this process, which has imported everything."
    def __init__(self, command, *args, env=None, **kw):
        is_python = not isinstance(command, str) and command[0] == sys.executable and command[1] in ('-c', '-m')
        if is_python: kw['preexec_fn'] = partial(_run_in_copy, command, dict(os.environ if env is None else env))
        super().__init__(command, *args, env=env, **kw)

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
