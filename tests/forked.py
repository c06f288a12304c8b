"Several processes of one program: it is imported once, and each process is a copy of it. Used by scripts of tests."
import os, socket, sys, traceback
import torch.distributed.checkpoint, torch.distributed.fsdp    # noqa: F401

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def in_processes(count, work):
    "Call `work(rank)` in `count` processes that find each other as torchrun's do; returns their exit statuses."
    where = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    there = where | dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    sys.stdout.flush()
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if count > 1: os.environ.update(there, RANK=str(rank), LOCAL_RANK=str(rank))
        status = 1
        try:
            work(rank)
            status = 0
        except BaseException: traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
