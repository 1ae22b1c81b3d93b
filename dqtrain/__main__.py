"""`python -m dqtrain`."""

import sys

from dqtrain.cli import main

sys.exit(main())
