"""`python -m safecode_mllm` is the command `safecode-mllm`."""

import sys

from safecode_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
