"""models.train under FSDP without a GPU: `torch.distributed.run tests/fsdp_on_cpu.py OPTIONS`, a process of its own.

PyTorch shards on CPUs too, over gloo, but accelerate takes a run for FSDP only where it finds an accelerator and else
falls back to DDP. Here it is told; all that follows is what it does on GPUs.
"""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from models.train import main

plain = AcceleratorState.__init__


def as_on_gpus(state, *args, fsdp_plugin=None, **options):
    plain(state, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = as_on_gpus

if __name__ == "__main__":
    sys.exit(main())
