"""Several runs, one after the other, in processes of torchrun that import all only once:
parallel.py 'laq.py --steps 3 ...' 'vla.py ...'"""
import os
import shlex
import sys

import torch.distributed as dist
from common import run_here

if __name__ == "__main__":
    dist.init_process_group("gloo")
    dist.init_process_group = lambda backend: None
    for line in sys.argv[1:]:
        run_here(*shlex.split(line))
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)                                             # see run() of the stages
