"""``python -m tests.fuzz_data``"""

import sys

from tests.fuzz_data.runner import main

if __name__ == "__main__":
    sys.exit(main())
