"""How long a file of sessions takes to index, and how much memory: 10^4, 10^5, 10^6 sessions of three turns.

    python experiments/index_sessions.py

Each size runs in a process of its own; seconds are of the processor. Sessions share 1,000 picture files, so that what
is measured is the index and not the disk."""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path
from PIL import Image
from mt_editflow_nb.data.files import to_json
from mt_editflow_nb.data.sessions import load_sessions

SIZES = (10**4, 10**5, 10**6)
PICTURES = 1000
TEXTS = ('Remove the person in the red jacket on the left', 'Change the color of the wooden bench to dark green',
         'Add a small white dog that is sitting beside the bench')

def write_file(folder, n):
    "A file of n sessions."
    for i in range(PICTURES): Image.new('RGB', (64, 48), (i % 256, i//256, 0)).save(folder/f'{i:06d}.png')
    with open(folder/'sessions.jsonl', 'w') as f:
        for i in range(n):
            row = dict(id=f'session-{i:07d}', image=f'{i % PICTURES:06d}.png', instructions=TEXTS,
                       task_types=['subject_remove', 'color_alter', 'subject_add'])
            f.write(json.dumps(row) + '\n')
    return folder/'sessions.jsonl'

def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024   # MB

def measure(n):
    "Seconds and memory of the index, and seconds to reach one session and to look at a picture's head."
    with tempfile.TemporaryDirectory() as tmp:
        file = write_file(Path(tmp), n)
        before, start = memory(), time.process_time()
        sessions = load_sessions(file, decode=False)
        seconds = time.process_time() - start
        start = time.process_time()
        for i in range(0, n, n//1000): sessions[i].instructions
        reached = (time.process_time() - start)/1000
        return dict(sessions=n, seconds=round(seconds, 2), MB=round(memory() - before),
                    file_MB=round(file.stat().st_size/2**20), microseconds_a_session=round(1e6*reached, 1))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, help='measure this size alone, and print it')
    n = parser.parse_args().n
    if n: print(json.dumps(measure(n)))
    else:
        runs = [subprocess.run([sys.executable, __file__, '--n', str(size)], capture_output=True, text=True, check=True)
                for size in SIZES]
        found = [json.loads(run.stdout) for run in runs]
        out = Path(__file__).parent/'results'/'index_sessions.json'
        out.write_text(to_json(found, indent=1) + '\n')
        for row in found: print(row)
