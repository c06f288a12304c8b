"`python -m mt_editflow_nb.training`, which `accelerate launch -m` calls, is the command `mtef_train`."
import sys
from mt_editflow_nb.cli import run_train

if __name__ == '__main__': sys.exit(run_train())
