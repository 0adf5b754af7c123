"""`python -m fedge.edge`: the same as `fedge-edge`."""

import sys

from fedge.edge.cli import main

sys.exit(main())
