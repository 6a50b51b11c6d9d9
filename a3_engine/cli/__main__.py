import sys

from a3_engine.cli import main

sys.exit(main())
