"""torchrun without its own report: ``python training/distributed/torchrun.py [torchrun's arguments] finetune.py ...``.

The processes describe their failures themselves. torchrun would add a traceback of its own and end with 1; this ends
with the exit code of the process that failed first.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    if "--max_restarts" in argv and argv[argv.index("--max_restarts") + 1] == "0":
        # Without restarts torchrun's lines say no more than the processes themselves: which ones fail and are ended.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(list(argv))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)  # negative: killed by a signal
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    main(sys.argv[1:])
